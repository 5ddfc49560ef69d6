"""The command line end to end: each subcommand on a real small run, and one line for every mistake."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import afa
from afa.cli import build_parser, main
from afa.config import config_to_dict, load_config
from afa.config.keys import COMMON, all_keys
from afa.data.images import read_mask
from tiny import SETTINGS, assert_same_weights, final_weights, tiny_config, tiny_flags

ROOT = Path(__file__).parents[1]
COMMANDS = ("demo", "check", "train", "evaluate", "predict", "pseudo", "export", "check-voc", "report", "keys")
LABELS = ("seg", "cam", "propagated", "initial", "refined")
SCORE_KEYS = {"miou", "per_class", "protocol", "labels", "num_images", "seconds"}


@dataclass(frozen=True)
class Answer:
    """Exit status, standard output and standard error of a command."""

    status: int
    out: str
    err: str


Command = Callable[..., Answer]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command line in this process."""

    def run(*words: object) -> Answer:
        capsys.readouterr()
        status = main([str(word) for word in words])
        return Answer(status, *capsys.readouterr())

    return run


def assert_mistake(answer: Answer, *parts: str) -> None:
    """Status 2, and one line on standard error, with these words in it; what the check warns of may come before."""
    assert answer.status == 2, answer
    lines = [line for line in answer.err.splitlines(keepends=True) if not line.startswith("warning: ")]
    assert len(lines) == 1, answer.err
    assert lines[0].startswith("afa: error: "), answer.err
    assert lines[0].endswith("\n")
    for part in parts:
        assert part in lines[0]


# --- Help ---


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_help(name: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*([name] if name else []), "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: afa {name or ''}".rstrip())
    if name is None:
        assert all(re.search(rf"^ +{command}( |$)", text, re.MULTILINE) for command in COMMANDS)
        assert "--SECTION.KEY" in text


def test_the_documented_flags_are_those_of_the_parser() -> None:
    """The usage lines of docs/interfaces.md name every flag and no other."""
    page = (ROOT / "docs" / "interfaces.md").read_text(encoding="utf-8")
    usage = page.split("```text\n")[1].split("```")[0]
    documented: dict[str, set[str]] = {}
    for entry in re.split(r"^afa ", usage, flags=re.MULTILINE)[1:]:
        documented.setdefault(entry.split()[0], set()).update(re.findall(r"--[a-z-]+(?![\w.-])", entry))
    subparsers = next(a for a in build_parser()._actions if a.dest not in ("help", "version") and a.choices)
    assert isinstance(subparsers.choices, dict)
    shared = {"--help", "--device", "--seed", "--precision", "--skip-broken"}
    for name in COMMANDS:
        flags = {option for option in subparsers.choices[name]._option_string_actions if option.startswith("--")}
        assert flags - shared == documented[name], name
        assert (shared <= flags) == (name not in ("export", "check-voc", "report", "keys"))


def test_help_of_train_shows_the_keys_that_are_changed_most(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    shown = [line.split()[0] for line in lines if re.match(r"  --\w+\.\w+ ", line)]
    assert shown == [f"--{name}" for name in COMMON]
    assert len(shown) == 20


def test_keys(command: Command) -> None:
    keys = [key.name for key in all_keys()]
    for words, names in (([], keys), (["loss"], [name for name in keys if name.startswith("loss.")])):
        answer = command("keys", *words)
        assert (answer.status, re.findall(r"^--([\w.]+)  \(default ", answer.out, re.MULTILINE)) == (0, names)
    assert "--schedule.max_steps  (default 20000; a whole number, 1 or more)\n    Training steps.\n" in (
        command("keys", "max_steps").out
    )
    assert_mistake(command("keys", "nothing_like_it"), "no key has 'nothing_like_it'")
    assert_mistake(command("keys", "--loss.affinity_weight", "1"), "takes no configuration keys")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert (caught.value.code, capsys.readouterr().out) == (0, f"afa {afa.__version__}\n")


def test_module_and_script_are_the_same_program() -> None:
    for program in ([sys.executable, "-m", "afa"], [str(Path(sys.executable).with_name("afa"))]):
        result = subprocess.run([*program, "segment"], capture_output=True, text=True)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith("afa: error: argument COMMAND: invalid choice: 'segment'")


# --- check ---


def test_check_prints_and_writes(tiny_data: Path, tmp_path: Path, command: Command) -> None:
    out, figures = tmp_path / "out", tmp_path / "figures.json"
    flags = [word for key, value in SETTINGS.items() for word in (f"--{key}", value)]
    answer = command("check", tiny_data, "--preset", "demo", *flags, "--limit", "9", "--out", out, "--json", figures)
    assert answer.status == 0, answer.err
    assert answer.out.startswith(f"{tiny_data}: VOC layout")
    assert "for 6 steps" in answer.out
    assert {path.name for path in out.iterdir()} == {"check.html", "check.json"}
    report = json.loads(figures.read_text())
    assert (report["num_train"], report["images"]["read"], report["training"]["steps"]) == (24, 9, 6)
    assert answer.err.splitlines()[-1] == str(out / "check.html")


def test_check_of_broken_data_is_status_1(tiny_data: Path, tmp_path: Path, command: Command) -> None:
    root = tmp_path / "data"
    shutil.copytree(tiny_data, root)
    (root / "JPEGImages" / "train_00003.jpg").unlink()
    answer = command("check", root, "--fast", "--json", "-")
    assert (answer.status, answer.err) == (1, "")
    (error,) = (p for p in json.loads(answer.out)["problems"] if p["severity"] == "error")
    assert "train_00003" in error["message"]
    # Training stops at the same words.
    assert_mistake(command(*tiny_flags(root), "--out", tmp_path / "run"), error["message"])
    assert not (tmp_path / "run").exists()


def test_check_estimates_the_training_that_the_folder_alone_would_get(
    tiny_data: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from afa.check import collect
    from afa.config import Config

    seen: list[Config] = []
    check = collect.check_data

    def spy(config: Config, *data: Any, **flags: Any) -> dict[str, Any]:
        seen.append(config)
        return check(config, *data, **flags)

    monkeypatch.setattr(collect, "check_data", spy)
    for flags in ([], ["--preset", "paper"]):
        assert command("check", tiny_data, "--fast", "--device", "cpu", *flags).status == 0
    assert [config.model.backbone for config in seen] == ["clip_b16", "mit_b1"]


# --- train ---


def test_train_with_file_flags_and_bf16(tiny_data: Path, tmp_path: Path, command: Command) -> None:
    """Flags win over the file, the file over the preset; the resolved configuration is printed and stored."""
    file = tmp_path / "tiny.toml"
    file.write_text('preset = "demo"\n[schedule]\nmax_steps = 2\nbatch_size = 8\n[model]\ndecoder_width = 8\n')
    flags = [
        "--schedule.batch_size=4", "--schedule.cls_steps", "1", "--schedule.refined_steps", "1", "--augment.crop_size",
        "64", "--data.workers", "0", "--train.example_images", "0", "--train.log_steps", "1", "--data.val_list", "",
        "--pseudo.scales", "1,0.5,1.5", "--train.tensorboard", "false",
    ]  # fmt: skip
    run = tmp_path / "run"
    answer = command(
        "train", "--config", file, "--data.root", tiny_data, "--out", run, *flags, "--device", "cpu", "--seed", "7",
        "--precision", "bf16",
    )  # fmt: skip
    assert answer.status == 0, answer.err
    config = load_config(run / "config.toml")
    assert tomllib.loads(answer.out) == config_to_dict(config)
    assert (config.preset, config.schedule.max_steps, config.model.decoder_width) == ("demo", 2, 8)
    assert (config.schedule.batch_size, config.pseudo.scales) == (4, (1.0, 0.5, 1.5))
    assert (config.train.device, config.train.seed, config.train.precision) == ("cpu", 7, "bf16")
    assert "Traceback" not in answer.err
    assert f"open {run / 'report.html'}" in answer.err
    assert all(tensor.isfinite().all() for tensor in final_weights(run).values())
    phases = [json.loads(line)["phase"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert phases == ["cls", "initial"]


def test_the_stored_configuration_repeats_the_run(tiny_run: Path, tmp_path: Path, command: Command) -> None:
    answer = command("train", "--config", tiny_run / "config.toml", "--out", tmp_path / "again")
    assert answer.status == 0, answer.err
    assert_same_weights(tmp_path / "again", tiny_run)
    # The same command again is refused, and goes on when asked to.
    refused = command("train", "--config", tiny_run / "config.toml", "--out", tmp_path / "again")
    assert_mistake(refused, f"{tmp_path / 'again'}: holds a run already; pass --resume")
    flags = ["--config", tiny_run / "config.toml", "--out", tmp_path / "again", "--resume"]
    assert command("train", *flags).status == 0
    assert_mistake(command("train", *flags, "--schedule.max_steps", "9"), "started with schedule.max_steps = 6, not 9")


def test_stopping_is_one_line_too(
    tiny_data: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from afa.training import loop

    monkeypatch.setattr(loop, "interrupts", lambda: nullcontext(lambda: True))
    answer = command(*tiny_flags(tiny_data), "--out", tmp_path)
    assert_mistake(answer, "step 1 of 6; ", "--resume")


def test_an_interrupt_elsewhere_says_so(
    tiny_run: Path, tiny_data: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from afa.evaluation import evaluate

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "evaluate", interrupted)
    answer = command("evaluate", tiny_run, "--data", tiny_data)
    assert (answer.status, answer.out, answer.err) == (130, "", "afa: stopped\n")


def test_train_needs_but_a_folder(tiny_table: Path, tmp_path: Path, command: Command) -> None:
    """Four lines say what was chosen; without masks the tags are scored, here and by `afa evaluate`."""
    run = tmp_path / "run"
    few = ["--model.weights", "", "--schedule.max_steps", "3", "--train.tensorboard", "false", "--device", "cpu"]
    answer = command("train", tiny_table, "--out", run, *few)
    assert answer.status == 0, answer.err
    lines = answer.err.splitlines()
    assert [line.split(":")[0] for line in lines[:4]] == ["data", "encoder", "schedule", "scores"]
    config = load_config(run / "config.toml")
    assert tomllib.loads(answer.out) == config_to_dict(config)
    assert (config.data.root, config.schedule.max_steps) == (str(tiny_table), 3)
    scores = json.loads((run / "evaluation" / "tags.json").read_text())
    assert scores["miou"] is None
    assert json.loads((run / "report.json").read_text())["tag_f1"] == scores["tag_f1"]
    again = command("evaluate", run, "--data", tiny_table, "--device", "cpu")
    assert again.status == 0, again.err
    assert re.fullmatch(rf"{tiny_table}: no masks, .*tags are scored\n", again.err)
    *rows, last = again.out.splitlines()
    assert [row.split()[0] for row in rows] == list(scores["per_class"])
    assert re.match(rf"tag F1 +{scores['tag_f1']:.2f} +\(tags, single, {scores['num_images']} images, \d+ s\)$", last)
    assert_mistake(command("evaluate", run, "--data", tiny_table, "--labels", "cam"), "no folder of masks")
    # The run's own settings hold where it goes on.
    assert command("train", tiny_table, "--out", run, "--resume", "--device", "cpu").status == 0
    both = command("train", tiny_table, "--data.root", "other", "--out", run)
    assert_mistake(both, f"{tiny_table} and data.root other")


# --- evaluate ---


@pytest.mark.parametrize("labels", LABELS)
def test_evaluate_labels(tiny_run: Path, tiny_data: Path, tmp_path: Path, command: Command, labels: str) -> None:
    path = tmp_path / "figures.json"
    answer = command("evaluate", tiny_run, "--data", tiny_data, "--labels", labels, "--json", path)
    assert (answer.status, answer.err) == (0, "")
    figures = json.loads(path.read_text())
    assert figures.keys() >= SCORE_KEYS
    classes = ["background", *(tiny_data / "classes.txt").read_text().split()]
    assert list(figures["per_class"]) == classes
    assert (figures["labels"], figures["protocol"], figures["num_images"]) == (labels, "single", 6)
    *rows, last = answer.out.splitlines()
    assert [row.split()[0] for row in rows] == classes
    assert re.match(rf"mIoU +{figures['miou']:.2f} +\({labels}, single, 6 images, \d+ s\)$", last)
    stored = tiny_run / "evaluation" / f"{labels}.json"
    if stored.exists():
        assert json.loads(stored.read_text())["per_class"] == figures["per_class"]


def test_evaluate_multiscale_and_limit(tiny_run: Path, tiny_data: Path, command: Command) -> None:
    answers = [
        command(
            "evaluate", tiny_run, "--data", tiny_data, "--protocol", protocol, "--limit", "2", "--json", "-",
            "--evaluation.long_side", "64",
        )
        for protocol in ("single", "multiscale")
    ]  # fmt: skip
    single, multiscale = (json.loads(answer.out) for answer in answers)
    assert (single["protocol"], single["num_images"]) == ("single", 2)
    assert (multiscale["protocol"], multiscale["num_images"]) == ("multiscale", 2)
    assert single["per_class"] != multiscale["per_class"]


def test_evaluate_another_list_and_refined_labels(
    tiny_run: Path, tiny_data: Path, tmp_path: Path, command: Command
) -> None:
    chosen = tmp_path / "chosen.txt"
    chosen.write_text("train_00002\ntrain_00005\nval_00001\n")
    base = ["evaluate", tiny_run, "--data", tiny_data, "--list", chosen, "--labels", "cam", "--json", "-"]
    plain, refined = (json.loads(command(*base, *more).out) for more in ([], ["--refine"]))
    assert plain["num_images"] == refined["num_images"] == 3
    assert plain["per_class"] != refined["per_class"]


def test_keys_may_come_before_the_run(tiny_run: Path, tiny_data: Path, command: Command) -> None:
    answer = command("evaluate", "--evaluation.batch_size", "2", tiny_run, "--data", tiny_data, "--limit", "1")
    assert answer.status == 0, answer.err


def test_an_unfinished_run_is_evaluated_from_its_last_checkpoint(
    tiny_run: Path, tiny_data: Path, tmp_path: Path, command: Command
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    (run / "model.safetensors").unlink()
    whole = command("evaluate", tiny_run, "--data", tiny_data, "--json", "-")
    answer = command("evaluate", run, "--data", tiny_data, "--json", "-")
    assert json.loads(answer.out)["per_class"] == json.loads(whole.out)["per_class"]
    shutil.rmtree(run / "checkpoints")
    assert_mistake(command("evaluate", run, "--data", tiny_data), f"{run}: has no weights yet", "train it first")


# --- predict, pseudo, report ---


def test_predict_files_and_folders(tiny_run: Path, tiny_data: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "out"
    one = tmp_path / "one.png"
    Image.fromarray(np.full((50, 90, 3), 90, dtype=np.uint8)).save(one)
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("val_00000.jpg", "val_00001.jpg"):
        shutil.copy(tiny_data / "JPEGImages" / name, folder)
    answer = command("predict", tiny_run, one, folder, "--out", out, "--scores")
    assert answer.status == 0, answer.err
    assert answer.err == ""
    assert re.match(rf"3 masks written to {re.escape(str(out / 'masks'))} in [\d.]+ s\n$", answer.out)
    names = {"one", "val_00000", "val_00001"}
    for kind, suffix in (("masks", ".png"), ("overlays", ".jpg"), ("scores", ".npz")):
        assert {path.name for path in (out / kind).iterdir()} == {name + suffix for name in names}
    mask = read_mask(out / "masks" / "one.png")
    assert mask.shape == (50, 90)
    num_classes = len((tiny_data / "classes.txt").read_text().split())
    with np.load(out / "scores" / "one.npz") as scores:
        assert scores["scores"].shape == (num_classes + 1, 50, 90)


def test_predict_with_tags_keeps_to_them(tiny_run: Path, tiny_data: Path, tmp_path: Path, command: Command) -> None:
    classes = (tiny_data / "classes.txt").read_text().split()
    tags = tmp_path / "tags.csv"
    tags.write_text(f"image,tags\nval_00000,{classes[1]}\n")
    image = tiny_data / "JPEGImages" / "val_00000.jpg"
    answer = command("predict", tiny_run, image, "--out", tmp_path / "out", "--tags", tags, "--no-overlay")
    assert answer.status == 0, answer.err
    assert set(np.unique(read_mask(tmp_path / "out" / "masks" / "val_00000.png"))) <= {0, 2}
    assert not (tmp_path / "out" / "overlays").exists()
    free = command("predict", tiny_run, image, "--out", tmp_path / "free", "--no-overlay")
    assert free.status == 0
    tags.write_text("image,tags\nval_00000,none\n")
    negative = command("predict", tiny_run, image, "--out", tmp_path / "none", "--tags", tags, "--no-overlay")
    assert negative.status == 0, negative.err
    assert not read_mask(tmp_path / "none" / "masks" / "val_00000.png").any()
    other = tiny_data / "JPEGImages" / "val_00001.jpg"
    missing = command("predict", tiny_run, other, "--out", tmp_path / "out", "--tags", tags)
    assert_mistake(missing, "the tags have no entry for 'val_00001'")
    tags.write_text("image,tags\nval_00000,zebra\n")
    assert_mistake(command("predict", tiny_run, image, "--out", tmp_path, "--tags", tags), str(tags), "'zebra'")


def test_a_broken_image_among_others_is_status_1(
    tiny_run: Path, tiny_data: Path, tmp_path: Path, command: Command
) -> None:
    whole = tiny_data / "JPEGImages" / "val_00000.jpg"
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(whole.read_bytes()[:300])
    answer = command("predict", tiny_run, whole, broken, "--out", tmp_path / "out")
    assert answer.status == 1
    assert answer.err.startswith(f"skipped: {broken}: ")
    assert answer.err.count("\n") == 1
    assert "1 masks written" in answer.out
    assert "1 images failed" in answer.out


@pytest.mark.parametrize("kind", ["refined", "initial", "propagated", "cam"])
def test_pseudo_labels(tiny_run: Path, tiny_data: Path, tmp_path: Path, command: Command, kind: str) -> None:
    (tmp_path / "list.txt").write_text("train_00000\ntrain_00003\n")
    answer = command(
        "pseudo", tiny_run, "--data", tiny_data, "--out", tmp_path, "--list", tmp_path / "list.txt", "--kind", kind
    )
    assert answer.status == 0, answer.err
    assert answer.out.startswith(f"2 masks written to {tmp_path / 'masks'}")
    classes = (tiny_data / "classes.txt").read_text().split()
    lines = (tiny_data / "lists" / "tags.csv").read_text().splitlines()
    tags = {name: row.split() for name, row in (line.split(",") for line in lines)}
    for name in ("train_00000", "train_00003"):
        found = set(np.unique(read_mask(tmp_path / "masks" / f"{name}.png")))
        allowed = {0, *(classes.index(tag) + 1 for tag in tags[name])}
        assert found <= allowed | ({255} if kind in ("initial", "refined") else set())


def test_pseudo_labels_of_the_training_list(tiny_run: Path, tiny_data: Path, tmp_path: Path, command: Command) -> None:
    answer = command("pseudo", tiny_run, "--data", tiny_data, "--out", tmp_path)
    assert answer.out.startswith("24 masks written")
    again = command("pseudo", tiny_run, "--data", tiny_data, "--out", tmp_path)
    assert again.out.startswith("0 masks written")
    assert "24 were there already" in again.out


def test_report_is_written_anew(tiny_run: Path, tmp_path: Path, command: Command) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    before = json.loads((run / "report.json").read_text())
    (run / "report.json").unlink()
    (run / "report.html").unlink()
    answer = command("report", run)
    assert (answer.status, answer.out, answer.err) == (0, f"{run / 'report.html'}\n", "")
    assert json.loads((run / "report.json").read_text()) == before
    assert_mistake(command("report", run, "--train.seed", "3"), "--train.seed: afa report takes no configuration keys")


# --- Mistakes ---


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["required: COMMAND", "afa --help"]),
        (["segment"], ["invalid choice: 'segment'", "evaluate"]),
        (["train"], ["required: --out", "afa train --help"]),
        (["train", "--out", "RUN"], ["data.root is not set; pass"]),
        (["train", "--out", "RUN", "--data.root"], ["--data.root has no value"]),
        (["train", "--out", "RUN", "--data.root", "--resume"], ["--data.root has no value"]),
        (["train", "--out", "RUN", "--data.root", "nowhere"], ["nowhere: no such folder", "data.root"]),
        (["train", "--out", "RUN", "--fast"], ["unknown argument '--fast'"]),
        (["train", "DIR", "--out", "RUN"], ["DIR: no such folder"]),
        (["train", "DIR", "EXTRA", "--out", "RUN"], ["unknown argument 'EXTRA'"]),
        (["check"], ["required: DIR"]),
        (["check", "DIR"], ["DIR: no such folder"]),
        (["check", "DIR", "--schedule.step", "3"], ["unknown key schedule.step"]),
        (["train", "--out", "RUN", "--schedule.max_step", "9"], ["did you mean schedule.max_steps?"]),
        (["train", "--out", "RUN", "--shedule.max_steps", "9"], ["shedule.max_steps", "did you mean"]),
        (["train", "--out", "RUN", "--schedule.max_steps", "many"], ["schedule.max_steps is 'many'", "whole number"]),
        (["train", "--out", "RUN", "--schedule.max_steps", "0"], ["schedule.max_steps is 0; use", "1 or more"]),
        (["train", "--out", "RUN", "--pseudo.refinement", "pra"], ["pseudo.refinement is 'pra'", "par_color"]),
        (["train", "--out", "RUN", "--augment.crop_size", "100"], ["augment.crop_size is 100", "multiple of 32"]),
        (["train", "--out", "RUN", "--preset", "best"], ["preset is 'best'", "paper_coco"]),
        (["train", "--out", "RUN", "--device", "tpu"], ["train.device is 'tpu'", "auto, cpu, cuda, mps"]),
        (["train", "--out", "RUN", "--precision", "fp8"], ["train.precision is 'fp8'", "bf16"]),
        (["train", "--out", "RUN", "--seed", "-1"], ["train.seed is -1"]),
        (["train", "--out", "RUN", "--config", "none.toml"], ["none.toml: no such"]),
        (["evaluate", "RUN"], ["required: --data"]),
        (["evaluate", "RUN", "--data", "DIR"], ["RUN: not a run folder"]),
        (["evaluate", "RUN", "--data", "DIR", "--limit", "0"], ["--limit", "'0' is not a whole number above 0"]),
        (["evaluate", "RUN", "--data", "DIR", "--limit", "x"], ["--limit", "'x' is not a whole number above 0"]),
        (["evaluate", "RUN", "--data", "DIR", "--labels", "gold"], ["--labels", "'gold'", "propagated"]),
        (["evaluate", "RUN", "--data", "DIR", "--protocol", "crf"], ["--protocol", "'crf'", "multiscale"]),
        (["predict", "RUN", "--out", "OUT"], ["required: IMAGES"]),
        (["predict", "RUN", "image.jpg", "--out", "OUT"], ["RUN: not a run folder"]),
        (["pseudo", "RUN", "--data", "DIR", "--out", "OUT"], ["RUN: not a run folder"]),
        (["pseudo", "RUN", "--data", "DIR", "--out", "OUT", "--kind", "gold"], ["--kind", "'gold'", "refined"]),
        (["report", "RUN"], ["RUN: not a run folder"]),
        (["report", "."], [".: not a run folder"]),
        (["demo", "--demo.size", "3"], ["unknown key demo.size"]),
    ],
    ids=lambda value: " ".join(value) if value and not value[0].startswith("-") else None,
)
def test_mistakes(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], parts: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_mistake(command(*words), *parts)
    assert os.listdir() == []


def test_a_bad_configuration_file(command: Command, tmp_path: Path) -> None:
    """One of them; tests/test_configuration.py has all."""
    path = tmp_path / "bad.toml"
    path.write_text("[schedule\n")
    assert_mistake(command("train", "--config", path, "--out", tmp_path / "run"), str(path), "not valid TOML")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_there(
    tiny_run: Path, tiny_data: Path, command: Command, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    answer = command("evaluate", tiny_run, "--data", tiny_data, "--device", name)
    assert_mistake(answer, f"--device is '{name}'", "available: auto, cpu")


def test_missing_data(tiny_run: Path, tiny_data: Path, tmp_path: Path, command: Command) -> None:
    evaluate = ["evaluate", tiny_run, "--data"]
    assert_mistake(command(*evaluate, tmp_path / "none"), f"{tmp_path / 'none'}: no such folder")
    assert_mistake(command(*evaluate, tiny_data, "--list", "other.txt"), "other.txt: no such list")
    (tmp_path / "empty.txt").write_text("\n")
    assert_mistake(command(*evaluate, tiny_data, "--list", tmp_path / "empty.txt"), "empty.txt: the list is empty")
    (tmp_path / "wrong.txt").write_text("val_00000\nval_99999\n")
    assert_mistake(command(*evaluate, tiny_data, "--list", tmp_path / "wrong.txt"), "'val_99999' (1 of 2")
    answer = command("predict", tiny_run, tmp_path / "none.jpg", "--out", tmp_path / "out")
    assert_mistake(answer, "none.jpg")
    train = tiny_flags(tiny_data, {"data.tags": "none.csv"})
    assert_mistake(command(*train, "--out", tmp_path / "run"), "none.csv")


def test_broken_and_foreign_weights(tiny_run: Path, tiny_data: Path, tmp_path: Path, command: Command) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    weights = run / "model.safetensors"
    whole = weights.read_bytes()
    for content in (b"", b"junk", whole[: len(whole) // 2]):
        weights.write_bytes(content)
        assert_mistake(command("evaluate", run, "--data", tiny_data), f"{weights}: broken weights file")
    weights.write_bytes(whole)
    config = run / "config.toml"
    config.write_text(config.read_text().replace("decoder_width = 16", "decoder_width = 24"))
    assert_mistake(command("evaluate", run, "--data", tiny_data), "'decoder.", "it belongs to another network")
    config.write_text(config.read_text().replace('backbone = "mit_tiny"', 'backbone = "mit_huge"'))
    assert_mistake(command("predict", run, tiny_data, "--out", tmp_path), "model.backbone is 'mit_huge'")


def test_missing_initial_weights(tiny_data: Path, tmp_path: Path, command: Command) -> None:
    for weights in ("none/at/all", str(tmp_path / "none.pth")):
        train = tiny_flags(tiny_data, {"model.weights": weights})
        assert_mistake(command(*train, "--out", tmp_path / weights.replace("/", "_")), f"{weights}: no such weights")


def test_an_output_that_cannot_be_written(tiny_run: Path, tiny_data: Path, tmp_path: Path, command: Command) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    image = tiny_data / "JPEGImages" / "val_00000.jpg"
    for words in (
        ["train", tiny_data], ["demo"], ["check", tiny_data], ["predict", tiny_run, image],
        ["pseudo", tiny_run, "--data", tiny_data], ["report", "--compare", tiny_run],
    ):  # fmt: skip
        assert_mistake(command(*words, "--out", blocked), str(blocked), "is a file; pass another --out")
    assert_mistake(command("predict", tiny_run, image, "--out", blocked / "out"), str(blocked))
    assert_mistake(command("pseudo", tiny_run, "--data", tiny_data, "--out", blocked / "out"), str(blocked))
    json_path = blocked / "figures.json"
    assert_mistake(command("evaluate", tiny_run, "--data", tiny_data, "--limit", "1", "--json", json_path), "file")
    assert_mistake(command(*tiny_flags(tiny_data), "--out", blocked / "run"), str(blocked))


def test_the_tiny_flags_are_the_tiny_configuration(tiny_data: Path, tmp_path: Path, command: Command) -> None:
    """Flags and the configuration in Python are the same thing."""
    train = [*tiny_flags(tiny_data, {"schedule.max_steps": 1, "data.val_list": ""}), "--out", tmp_path]
    answer = command(*train)
    assert tomllib.loads(answer.out) == config_to_dict(
        tiny_config(tiny_data, {"schedule.max_steps": 1, "data.val_list": ""})
    )
