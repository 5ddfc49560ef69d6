"""Saved networks: the round trip, what the model card says, what is refused, and the hub, which is played here."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from safetensors.torch import load_file

from afa.config import load_config
from afa.errors import AfaError
from afa.inference.hub import find_pretrained, load_pretrained, push_to_hub, save_pretrained
from afa.inference.model_card import model_card
from afa.runs.network import load_run
from mistakes import refused
from tiny import write_untrained

CPU = torch.device("cpu")
CLASSES = ("cat", "dining table", "a|b_c")
SCORES = {
    "miou": 61.234,
    "per_class": {"background": 88.5, "cat": 55.25, "dining table": None, "a|b_c": 39.95},
    "protocol": "single",
    "labels": "seg",
    "num_images": 37,
    "seconds": 1.5,
}


def add_scores(run: Path) -> None:
    (run / "evaluation").mkdir()
    (run / "evaluation" / "seg.json").write_text(json.dumps(SCORES))
    (run / "evaluation" / "cam.json").write_text(json.dumps(SCORES | {"miou": 48.2}))
    environment = {"device": "NVIDIA H100", "seconds_train": 4321.9, "num_parameters": 1234567, "torch": "2.13.0"}
    (run / "environment.json").write_text(json.dumps(environment))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """An untrained run on data in a folder whose path nobody is to learn."""
    secret = tmp_path / "secret"
    keys = {"data.root": str(secret / "pets"), "data.tags": str(secret / "tags.csv"), "evaluation.short_side": 48}
    write_untrained(tmp_path / "run", CLASSES, keys)
    return tmp_path / "run"


@pytest.fixture
def saved(run: Path, tmp_path: Path) -> Path:
    return save_pretrained(run, tmp_path / "saved")


def front_matter(card: str) -> dict[str, Any]:
    head, _, _ = card.removeprefix("---\n").partition("\n---\n")
    values: dict[str, Any] = yaml.safe_load(head)
    return values


def test_round_trip(run: Path, tmp_path: Path) -> None:
    folder = save_pretrained(run, tmp_path / "new" / "saved")
    names = {"model.safetensors", "config.json", "preprocessor_config.json", "README.md"}
    assert {path.name for path in folder.iterdir()} == names
    assert [path.name for path in folder.parent.iterdir()] == ["saved"]
    before, loaded = load_run(run, CPU), load_pretrained(folder, CPU)
    assert loaded.classes == CLASSES
    assert loaded.config.evaluation == before.config.evaluation
    assert loaded.config.model == before.config.model
    assert not loaded.network.training
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded.network.segment(image), before.network.segment(image))
    description = json.loads((folder / "config.json").read_text())
    assert description["architecture"] == "mit_tiny"
    assert description["protocol"] == "single"
    preprocessor = json.loads((folder / "preprocessor_config.json").read_text())
    assert preprocessor["image_mean"] == [0.485, 0.456, 0.406]
    assert preprocessor["size"] == {"shortest_edge": 48}


def test_a_network_in_memory_and_a_run_folder_load_too(run: Path, tmp_path: Path) -> None:
    loaded = load_pretrained(run, CPU)
    with torch.no_grad():
        loaded.network.classifier.weight.fill_(2.0)
    folder = save_pretrained(loaded, tmp_path / "saved")
    assert (load_file(folder / "model.safetensors")["classifier.weight"] == 2).all()
    assert "there are no figures" in (folder / "README.md").read_text()


def test_nothing_saved_tells_of_this_machine(run: Path, saved: Path) -> None:
    for path in saved.iterdir():
        content = path.read_bytes()
        assert b"secret" not in content, path
        assert str(run.parent).encode() not in content, path
    assert b"pets" in (saved / "README.md").read_bytes()


def test_card_repeats_the_figures_of_the_run_and_no_others(run: Path, tmp_path: Path) -> None:
    add_scores(run)
    card = (save_pretrained(run, tmp_path / "saved") / "README.md").read_text()
    assert "| segmentation | 61.23 | single | 37 |" in card
    assert "| CAM, given the images' true tags | 48.20 | single | 37 |" in card
    assert "| dining table | - |" in card
    assert "| a\\|b\\_c | 39.95 |" in card
    assert "propagated" not in card
    assert "1,234,567" in card
    assert "4,322 s" in card
    assert "NVIDIA H100" in card
    assert "No pixel mask was read in training" in card
    assert "not finished" not in card
    # Saved once more, from the folder: the same figures.
    again = save_pretrained(tmp_path / "saved", tmp_path / "again")
    assert (again / "README.md").read_text().replace("# again", "# saved") == card


def test_card_falls_back_on_the_report(run: Path, tmp_path: Path) -> None:
    report = {"miou": 33.3, "per_class": {"seg": {"cat": 20.0}, "cam": None}, "protocol": "multiscale", "num_images": 5}
    (run / "report.json").write_text(json.dumps(report))
    card = (save_pretrained(run, tmp_path / "saved") / "README.md").read_text()
    assert "| segmentation | 33.30 | multiscale | 5 |" in card
    assert "| cat | 20.00 |" in card


def test_card_of_an_unfinished_run_says_so(run: Path, tmp_path: Path) -> None:
    step = run / "checkpoints" / "step_00000040"
    step.mkdir(parents=True)
    (run / "model.safetensors").rename(step / "model.safetensors")
    (run / "checkpoints" / "latest").write_text("step_00000040\n")
    card = (save_pretrained(run, tmp_path / "saved") / "README.md").read_text()
    assert "step_00000040: **training was not finished**" in card


@pytest.mark.parametrize(
    ("backbone", "weights", "metadata", "text"),
    [
        ("mit_tiny", "", {}, "started from random weights"),
        ("dinov2_small", "facebook/dinov2-small", {"license": "apache-2.0"}, "license: Apache-2.0. It applies"),
        ("mit_b1", "nvidia/mit-b1", {"license": "other", "license_name": "nvidia-non-commercial"}, "evaluation only"),
        ("mit_b1", "weights/mit_b1.pth", {"license": "other"}, "evaluation only"),
        ("mit_b1", "weights/mine", {"license": "unknown"}, "whose license afa does not know"),
        ("mit_b1", "somebody/mit-b1-pets", {"license": "unknown"}, "whose license afa does not know"),
    ],
)
def test_license_is_that_of_the_initial_weights(
    backbone: str, weights: str, metadata: dict[str, str], text: str
) -> None:
    config = load_config(None, {"model.backbone": backbone, "model.weights": weights})
    card = model_card(config, CLASSES, {}, title='a "b": c')
    values = front_matter(card)
    assert values["library_name"] == "afa"
    assert values["pipeline_tag"] == "image-segmentation"
    assert "weakly-supervised" in values["tags"]
    assert metadata.items() <= values.items()
    assert ("license" in values) == bool(weights)
    assert text in card
    assert not weights or f"`{weights}`" in card.partition("## License")[2]
    assert ("base_model" in values) == (weights.count("/") == 1 and not weights.endswith(".pth"))


def test_card_names_the_second_encoder_and_its_license() -> None:
    keys = {"model.backbone": "clip_b16", "model.weights": "openai/clip-vit-base-patch16"}
    for weights, words, license_ in (
        ("", "`facebook/dinov2-small`, published under this license: Apache-2.0.", "other"),
        ("weights/mine", "`weights/mine`, whose license afa does not know", "unknown"),
    ):
        second = {"model.second_backbone": "dinov2_small", "model.second_weights": weights}
        card = model_card(load_config(None, keys | second), CLASSES, {}, title="both")
        assert "| second encoder | `dinov2_small`, frozen, of" in card
        assert words in card.partition("## License")[2]
        assert "started from `openai/clip-vit-base-patch16`, published under this license: MIT. It applies" in card
        assert front_matter(card)["license"] == license_
        assert front_matter(card)["base_model"][0] == "openai/clip-vit-base-patch16"


# --- What is refused ---


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"library": None, "model_type": "segformer"}, "is a 'segformer' model of transformers"),
        ({"library": "keras"}, "is of another library"),
        ({"format": 2}, "format is 2, this afa reads 1; install"),
        ({"config": []}, "has no object `config`"),
        ({"config": {"model": {"backbone": "nonsense"}}}, "model.backbone is 'nonsense'"),
        ({"config": {"odd": {}}}, "unknown section [odd]"),
        ({"classes": []}, "`classes` must list 1 to 254"),
        ({"classes": ["cat", "cat"]}, "`classes` must list 1 to 254"),
        ({"classes": ["cat", "do\ng"]}, "`classes` holds 'do\\ng'"),
        ({"classes": ["cat", 3]}, "`classes` holds 3"),
        ({"classes": ["cat", "dog"]}, "it belongs to another network"),
    ],
)
def test_odd_config_json(saved: Path, values: dict[str, Any], message: str) -> None:
    change(saved / "config.json", **values)
    with refused(message):
        load_pretrained(saved, CPU)


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, "\x00", '{"a": "\\ud800"}'])
def test_broken_config_json(saved: Path, text: str) -> None:
    (saved / "config.json").write_text(text)
    with refused("config.json: "):
        load_pretrained(saved, CPU)


def test_other_normalization_is_refused(saved: Path) -> None:
    change(saved / "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5])
    with pytest.raises(AfaError, match=r"image_mean is \[0\.5, 0\.5, 0\.5\], but"):
        load_pretrained(saved, CPU)
    (saved / "preprocessor_config.json").unlink()
    load_pretrained(saved, CPU)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickled_weights_are_never_read(saved: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    weights = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    torch.save(weights, saved / name)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    with refused(f"holds only {name}, a pickle", "afa reads"):
        load_pretrained(saved, CPU)
    (saved / name).rename(saved / "model.safetensors")
    with pytest.raises(AfaError, match=r"model\.safetensors: broken weights file"):
        load_pretrained(saved, CPU)


def test_folders_that_are_something_else(run: Path, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(AfaError, match="is a run folder; save into another one"):
        save_pretrained(saved, run)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(AfaError, match="is a 'bert' model of transformers"):
        save_pretrained(run, tmp_path / "other")
    (tmp_path / "file").touch()
    with pytest.raises(AfaError, match="file: is a file; pass a folder"):
        save_pretrained(run, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AfaError, match=r"empty: has no config\.json; pass a run"):
        load_pretrained(tmp_path / "empty", CPU)
    with pytest.raises(AfaError, match=r"nothing/at/all: no such folder; pass"):
        load_pretrained("nothing/at/all", CPU)


def test_a_disk_that_refuses_leaves_the_earlier_save(run: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("afa.inference.hub.save_file", refuse)
    with pytest.raises(AfaError, match="No space left on device"):
        save_pretrained(run, saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert not list(saved.parent.glob(".partial*"))


# --- The hub ---


def test_a_hub_id_is_fetched_without_pickles(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, list[str]]] = []

    def download(repo_id: str, *, allow_patterns: list[str]) -> str:
        calls.append((repo_id, allow_patterns))
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_pretrained("me/pets-afa", CPU).classes == CLASSES
    names = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    assert [(repo_id, sorted(patterns)) for repo_id, patterns in calls] == [("me/pets-afa", names)]


def test_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with refused("me/pets-that-nobody-has: not a run folder", "cannot be fetched", "--out of afa train", "download"):
        find_pretrained("me/pets-that-nobody-has")


class FakeHub:
    """Takes what is pushed."""

    def __init__(self, *, public: bool = False, error: Exception | None = None) -> None:
        self.public = public
        self.error = error
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        if self.error:
            raise self.error
        self.created.append({"repo_id": repo_id, "private": private, "exist_ok": exist_ok})
        return f"https://huggingface.co/{repo_id}"

    def repo_info(self, repo_id: str) -> SimpleNamespace:
        return SimpleNamespace(private=self.created[-1]["private"] and not self.public)

    def upload_folder(self, *, repo_id: str, folder_path: Path, allow_patterns: list[str], commit_message: str) -> None:
        assert "afa" in commit_message
        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        self.files = {name: content for name, content in files.items() if name in allow_patterns}


def use(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    return hub


@pytest.mark.parametrize("private", [False, True])
def test_push(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private: bool) -> None:
    hub = use(FakeHub(), monkeypatch)
    assert push_to_hub(run, "me/pets-afa", private=private) == "https://huggingface.co/me/pets-afa"
    assert hub.created == [{"repo_id": "me/pets-afa", "private": private, "exist_ok": True}]
    assert hub.files["README.md"].decode().count("# pets-afa\n") == 1
    for name, content in hub.files.items():
        (tmp_path / name).write_bytes(content)
    assert load_pretrained(tmp_path, CPU).classes == CLASSES


def test_a_private_push_does_not_end_in_public(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = use(FakeHub(public=True), monkeypatch)
    with pytest.raises(AfaError, match="is public on the hub already"):
        push_to_hub(run, "me/pets", private=True)
    assert not hub.files


def test_push_that_fails(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(FakeHub(error=ConnectionError("no route\nto host")), monkeypatch)
    with refused("me/pets: cannot be pushed", "(no route); check"):
        push_to_hub(run, "me/pets")
    with pytest.raises(AfaError, match="'pets' is no hub id; write OWNER/NAME"):
        push_to_hub(run, "pets")


def test_push_of_a_network_in_memory(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_scores(run)
    hub = use(FakeHub(), monkeypatch)
    push_to_hub(load_run(run, CPU), "me/pets")
    assert b"| segmentation | 61.23 |" in hub.files["README.md"]
