"""Two processes compute what one computes, and only the first one writes."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import process_means
from afa.api import SCORED_LABELS, train_and_report
from afa.runs.run import Run
from afa.runtime import Processes
from tiny import NO_DROPOUT, final_weights, start_python, tiny_config, tiny_flags

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

TOLERANCE = 1e-5
"""Largest difference of a weight after six steps, over the largest of its tensor (measured: 2.4e-6 and 5.1e-6)."""

IDLE = re.compile(r"k_proj\.bias$")
"""What the loss does not depend on: softmax ignores a bias of the keys. Its gradient is rounding, which AdamW turns
into steps of the learning rate."""

AUDIT = """
import os, sys

def refuse(event, arguments):
    path = os.fspath(arguments[0]) if arguments and isinstance(arguments[0], (str, bytes, os.PathLike)) else ""
    writes = event in ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate") or (
        event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    )
    if writes and str(path).startswith(os.environ["TINY_RUN"]):
        print(f"rank 1 writes: {event} {path}", file=sys.stderr, flush=True)
        os._exit(9)

if os.environ.get("RANK") == "1":
    sys.addaudithook(refuse)
"""


def test_a_single_process_needs_no_group() -> None:
    alone = Processes()
    assert alone.is_main
    count = torch.tensor(3)
    assert alone.total(count) is count
    assert alone.any(True, torch.device("cpu"))
    assert not alone.any(False, torch.device("cpu"))
    alone.wait()


@pytest.mark.slow
def test_losses_of_two_processes_are_means_of_each_or_of_the_whole_batch(tmp_path: Path) -> None:
    process = start_python([*TORCHRUN, process_means.__file__, str(tmp_path / "made.pt")])
    each = [process_means.gradients(slice(i, i + 1), "process") for i in (0, 1)]
    whole = process_means.gradients(slice(0, 2), "batch")
    _, messages = process.communicate()
    assert process.returncode == 0, messages
    made = torch.load(tmp_path / "made.pt", weights_only=True)
    for name, found in made["process"].items():
        torch.testing.assert_close(found, (each[0][name] + each[1][name]) / 2, rtol=1e-4, atol=1e-6, msg=name)
    for name, found in made["batch"].items():
        torch.testing.assert_close(found, whole[name], rtol=1e-4, atol=1e-6, msg=name)
    for name in ("seg", "aff"):
        assert abs(float(made["process"][name] / made["batch"][name]) - 1) > 1e-3


@pytest.mark.slow
def test_two_processes_equal_one(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: dict[str, Any] = NO_DROPOUT | {"train.eval_steps": 3}
    (tmp_path / "sitecustomize.py").write_text(AUDIT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("TINY_RUN", str(tmp_path / "two"))
    flags = [*tiny_flags(tiny_data, keys), "--out", str(tmp_path / "two")]
    process = start_python([*TORCHRUN, "-m", "afa", *flags])
    train_and_report(tiny_config(tiny_data, keys), tmp_path / "one")
    output, messages = process.communicate()
    assert process.returncode == 0, messages
    assert output.count("[schedule]") == 1
    assert not re.search(r"(User|Future|Deprecation|Runtime)Warning|\[W", messages), messages  # of Python, of C++
    assert messages.count("run folder ") == messages.count("seg: mIoU ") == 1

    one, two = final_weights(tmp_path / "one"), final_weights(tmp_path / "two")
    differences = {key: float((one[key] - two[key]).abs().max()) for key in one}
    relative = {key: d / float(one[key].abs().max()) for key, d in differences.items() if not IDLE.search(key)}
    worst = max(relative, key=lambda key: relative[key])
    print(f"largest relative difference: {relative[worst]:.1e} in {worst}")
    assert relative[worst] <= TOLERANCE
    assert len(relative) > 0.85 * len(differences)
    assert max(d for key, d in differences.items() if IDLE.search(key)) < 1e-3

    lines, others = (Run(tmp_path / run).metrics() for run in ("one", "two"))
    assert [(line["kind"], line["step"]) for line in lines] == [(line["kind"], line["step"]) for line in others]
    for line, other in zip(lines, others, strict=True):
        for key in line.keys() - {"seconds", "images_per_second"}:
            # A pixel on the edge between two classes may fall to either side: a hundredth of a percent on six images.
            margin = {"abs": 0.1} if key == "miou" else {"rel": 1e-5}
            expected = pytest.approx(line[key], **margin) if isinstance(line[key], float) else line[key]
            assert other[key] == expected, (key, line["step"])

    for labels in SCORED_LABELS:
        figures, others_figures = (
            json.loads((tmp_path / run / "evaluation" / f"{labels}.json").read_text()) for run in ("one", "two")
        )
        assert others_figures["miou"] == pytest.approx(figures["miou"], abs=0.1)
        assert others_figures["per_class"] == pytest.approx(figures["per_class"], abs=0.3)
        assert others_figures["num_images"] == figures["num_images"] == 6
    assert json.loads((tmp_path / "two" / "environment.json").read_text())["processes"] == 2
