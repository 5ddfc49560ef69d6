"""The step benchmark: its two sides agree, it notices when they do not, and what it counts is right."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import step as bench
from afa.kernels.layers import depthwise_gelu, linear
from afa.kernels.walk import window_mask
from afa.runs.network import build_network
from afa.training.schedule import phase

CPU = torch.device("cpu")
FLAGS = ["--backbone", "mit_tiny", "--crop", "64", "--classes", "3", "--steps", "1", "--phase", "refined"]


def make_sides() -> tuple[Any, Any]:
    config = bench.step_config(backbone="mit_tiny", crop=64, batch=2)
    torch.manual_seed(0)
    network = build_network(config.model, 3)
    return bench.OurStep(network, config, CPU), bench.PublishedStep(network, config, CPU)


def make_batch() -> Any:
    """One image with an empty margin, one without."""
    batch = bench.make_batch(1, crop=64, batch=2, num_classes=3, photograph=(50, 62))
    full = [box == [0, 64, 0, 64] for box in batch.valid_box.tolist()]
    assert full == [False, True]
    return batch


@pytest.mark.parametrize("name", ["cls", "initial", "refined"])
def test_both_sides_agree(name: str) -> None:
    ours, published = make_sides()
    batch = make_batch()
    one = phase(bench.STEPS[name], ours.config)
    assert one.name == name
    found, wrong = bench.find_difference(ours, published, batch, one)
    assert not wrong
    assert all(f"{loss}_loss" in found for loss in ({"cls"} if name == "cls" else {"cls", "seg", "aff"}))
    labels = ours.losses(batch, one).labels
    for label in {"cls": [], "initial": [labels.initial_label]}.get(name, [labels.initial_label, labels.refined_label]):
        kinds = set(label.unique().tolist())
        assert {0, 255} < kinds, "the comparison says little where a kind of label is missing"


def test_both_sides_have_the_same_gradients() -> None:
    ours, published = make_sides()
    batch = make_batch()
    one = phase(bench.STEPS["refined"], ours.config)
    ours.losses(batch, one).total.backward()
    published.losses(batch, one).total.backward()
    first = "stages.0.patch_embeddings.proj.weight"
    pairs = {
        "first layer": (
            ours.network.backbone.encoder.get_parameter(first),
            published.network.encoder.get_parameter(first),
        ),
        "classifier": (ours.network.classifier.weight, published.network.classifier.weight),
        "fuse": (ours.network.decoder.fuse.weight, published.network.decoder.fuse.weight),
        "mix": (ours.network.affinity_head.mix.weight, published.network.mix.weight),
    }
    for name, (our, their) in pairs.items():
        scale = their.grad.abs().max()
        assert scale > 0, name
        torch.testing.assert_close(our.grad / scale, their.grad / scale, rtol=0, atol=1e-3, msg=name)


def test_benchmark_prints_and_writes_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([*FLAGS, "--roofline", "--json", str(tmp_path / "step.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\d+\.\dx", lines[-1])
    refined = json.loads((tmp_path / "step.json").read_text())["phases"]["refined"]
    assert lines[-1] == f"{refined['ratio']:.1f}x"
    last = [line.split(maxsplit=1) for line in lines[-6:-2]]
    kinds = {"ratio": "medians", "fastest_ratio": "fastest steps", "processor_ratio": "processor time"}
    assert last == [["ratios", "refined"], *([f"{refined[kind]:.2f}x", words] for kind, words in kinds.items())]
    assert refined["ratio"] == refined["seconds"]["published"] / refined["seconds"]["ours"]
    for side, stages in refined["stages"].items():
        assert list(stages) == list(bench.STAGES)
        assert all(seconds > 0 for seconds in stages.values()), side
    assert 0 < refined["par_share"] < 1
    assert refined["roofline"]["product_rate"] > 0
    flops = refined["roofline"]["flops"]
    # Six whole passes, at 1, 1/4 and 9/4 of the area, beside the training forward.
    assert flops["published"]["CAM passes"] >= 2 * 3.5 * flops["published"]["training forward"]
    assert 0 < flops["ours"]["CAM passes"] < flops["published"]["CAM passes"]


def test_benchmark_times_nothing_when_results_differ(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build = bench.PublishedStep._build_optimizer

    def alter(published: Any) -> Any:
        with torch.no_grad():
            published.network.classifier.weight += 0.01
        return build(published)

    monkeypatch.setattr(bench.PublishedStep, "_build_optimizer", alter)
    assert bench.main(FLAGS) == 1
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1
    assert "results differ, so nothing is timed" in captured.err
    assert "whole step" not in captured.out


def test_mask_of_the_loop_is_the_window() -> None:
    from published_step import radius_mask

    assert torch.equal(radius_mask(6, 2) == 1, window_mask(6, 6, 2))


def test_meter_takes_out_what_inner_stages_take() -> None:
    readings = iter([0.0, 1.0, 11.0, 111.0, 1111.0, 11111.0])
    meter = bench.StageMeter(lambda: next(readings))
    with meter("outer"):
        with meter("inner"):
            pass
        with meter("inner"):
            pass
    assert meter.totals == {"outer": 1 + 100 + 10000, "inner": 10 + 1000}


def test_counter_knows_grouped_convolutions_and_attention() -> None:
    convolution = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
    image = torch.randn(1, 8, 10, 10, requires_grad=True)
    forward = 2 * (8 * 10 * 10) * 9
    with bench.flop_counter() as counter:
        convolution(image).sum().backward()
    assert counter.get_total_flops() == 3 * forward
    rows, weight, kernel = torch.randn(2 * 16, 8), torch.randn(12, 8), torch.randn(8, 1, 3, 3)
    with bench.flop_counter() as counter, torch.no_grad():
        linear(rows, weight, None)
        depthwise_gelu(rows.view(2, 16, 8), kernel, None, 4, 4)
    assert counter.get_total_flops() == 2 * 32 * 8 * 12 + 2 * 32 * 8 * 9
    query = torch.randn(1, 2, 32, 8)
    with bench.flop_counter() as counter:
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert counter.get_total_flops() == 2 * (2 * 2 * 32 * 32 * 8)


def test_floor_of_the_refinement_counts_kernel_and_iterations() -> None:
    config = bench.step_config(
        backbone="mit_tiny", crop=64, batch=2, keys={"pseudo.iterations": 3, "pseudo.dilations": [1]}
    )
    batch = bench.make_batch(0, crop=64, batch=2, num_classes=1)
    initial = phase(bench.STEPS["initial"], config)
    operations, moved = bench.refinement_floor(config, batch, initial)
    pixels, channels = 2 * 32 * 32, 2 * 2
    assert moved == 4 * pixels * (3 + 8 + 3 * (8 + 2 * channels))
    assert operations == pixels * (25 * 8 + 3 * 2 * 8 * channels)
    refined = phase(bench.STEPS["refined"], config)
    assert bench.refinement_floor(config, batch, refined)[1] - moved == 4 * pixels * 3 * (8 + 2 * channels)


@pytest.mark.gpu
def test_benchmark_runs_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([*FLAGS, "--device", "cuda", "--precision", "bf16"]) == 0
    assert "peak memory" in capsys.readouterr().out
