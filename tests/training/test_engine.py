"""Training steps as a whole: nothing waits for the device, and recorded steps are the steps they recorded."""

from __future__ import annotations

import dataclasses
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from afa.config import Config
from afa.kernels import dispatch as kernels
from afa.runs.network import build_network
from afa.training.engine import TrainingEngine
from afa.training.schedule import phase
from afa.training.step import compute_losses, gradient_norm
from afa.types import Batch, NetworkOutput, normalize_image
from encoders import ONE_OF_EACH_KIND
from tiny import tiny_config

NUM_CLASSES = 4
STEPS = 14


def config(tmp_path: Path, **keys: Any) -> Config:
    return tiny_config(
        tmp_path, {"schedule.max_steps": STEPS, "schedule.cls_steps": 4, "schedule.refined_steps": 9} | keys
    )


def make_batch(seed: int, size: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (4, 3, size, size), generator=generator, dtype=torch.uint8)
    tags = torch.zeros(4, NUM_CLASSES)
    tags[:, [seed % NUM_CLASSES, (seed + 1) % NUM_CLASSES]] = 1
    box = torch.tensor([[0, size, 0, size], [3, size, 0, size - 5], [0, size // 2, 4, size], [0, size, 0, size]])
    return Batch(image, tags, box, ("a", "b", "c", "d"))


def make_network(settings: Config) -> Any:
    torch.manual_seed(0)
    return build_network(settings.model, NUM_CLASSES)


@pytest.mark.parametrize("step", [0, 5, 12])
def test_losses_never_ask_for_a_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """On tensors that have no values: to read one, or to make a shape that depends on one, raises."""
    settings = config(tmp_path, **{"loss.energy_weight": 0.01})
    monkeypatch.setattr(kernels, "_HAS_TRITON", False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # knows no such device
    network = make_network(settings).train().to("meta")
    batch = make_batch(0, settings.augment.crop_size).to(torch.device("meta"))
    kind = phase(step, settings)

    def forward(image: Tensor, segmentation: bool, affinity: bool) -> NetworkOutput:
        output: NetworkOutput = network(image, segmentation=segmentation, affinity=affinity)
        return output

    losses = compute_losses(forward, network.score, batch, config=settings, phase=kind, num_slots=4)
    assert (losses.reg is None) == (step == 0)
    losses.total.backward()
    assert gradient_norm(list(network.parameters())).device.type == "meta"
    with pytest.raises((RuntimeError, NotImplementedError)):
        compute_losses(forward, network.score, batch, config=settings, phase=phase(12, settings))


def run(settings: Config, device: str, *, record: bool) -> tuple[TrainingEngine, list[Tensor]]:
    settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, cuda_graphs=record))
    engine = TrainingEngine(make_network(settings).to(device).train(), settings, device=torch.device(device))
    totals = []
    for step in range(STEPS):
        batch = make_batch(step, settings.augment.crop_size)
        totals.append(engine.take_step(step, batch).total.clone())
    return engine, totals


@pytest.mark.gpu
def test_recorded_steps_equal_plain_ones(tmp_path: Path) -> None:
    settings = config(tmp_path, **{"model.drop_path": 0.1, "loss.energy_weight": 0.01})
    plain, expected = run(settings, "cuda", record=False)
    recorded, found = run(settings, "cuda", record=True)
    assert not plain.records
    assert len(recorded._recordings) >= 3
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=5e-3, atol=1e-3)


@pytest.mark.gpu
def test_steps_on_a_gpu_are_those_of_the_cpu(tmp_path: Path) -> None:
    # Which paths and channels are dropped differs by device.
    keys = {"model.drop_path": 0.0, "model.decoder_dropout": 0.0, "train.precision": "fp32"}
    settings = config(tmp_path, **keys)
    totals = [torch.stack(run(settings, device, record=False)[1]).cpu() for device in ("cuda", "cpu")]
    torch.testing.assert_close(totals[0][:6], totals[1][:6], rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("record", [False, True])
def test_steps_never_wait_for_the_gpu(tmp_path: Path, record: bool) -> None:
    settings = config(tmp_path, **{"loss.energy_weight": 0.01})
    engine, _ = run(settings, "cuda", record=record)
    batch = make_batch(0, settings.augment.crop_size).pin_memory()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in (0, 5, 12):
            engine.take_step(step, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_steps_share_round_numbers_of_slots_only_where_they_are_recorded(tmp_path: Path) -> None:
    engine = TrainingEngine(make_network(config(tmp_path)), config(tmp_path), device=torch.device("cpu"))
    tags = torch.tensor([[1.0, 1, 0, 0], [1, 0, 0, 0]])
    assert engine._num_slots(tags) == 3
    assert engine._num_slots(torch.zeros(1, 4)) == 2
    engine.records = True
    assert [engine._num_slots(torch.ones(1, n)) for n in (1, 2, 3, 4, 7, 8)] == [2, 3, 4, 5, 8, 9]
    assert engine._num_slots(tags) == 4


# --- The start of the affinity -------------------------------------------------------------------------------------


def sharp_engine(tmp_path: Path, backbone: str, **keys: Any) -> TrainingEngine:
    """An engine whose encoder attends as sharply as a trained one; the affinity learns from step 4 on."""
    settings = config(tmp_path, **{"model.backbone": backbone, "model.drop_path": 0.1} | keys)
    torch.manual_seed(settings.train.seed)
    network = build_network(settings.model, NUM_CLASSES).train()
    for name, parameter in network.backbone.named_parameters():
        if name.endswith(("query.weight", "q_proj.weight")):
            parameter.data *= 60
    return TrainingEngine(network, settings, device=torch.device("cpu"))


def affinity_of(engine: TrainingEngine, batch: Batch) -> Tensor:
    affinity = engine.network.score(normalize_image(batch.image.float() / 255), True).affinity
    assert affinity is not None
    return affinity


@pytest.mark.parametrize("backbone", ONE_OF_EACH_KIND)
def test_a_calibrated_affinity_is_alive_with_every_seed(tmp_path: Path, backbone: str) -> None:
    """Its sigmoid is within 0.01 and 0.99 for pairs of images that it was not calibrated on."""

    def alive(init: str, seed: int) -> float:
        keys = {"train.seed": seed, "model.affinity_init": init, "model.attention_scaling": seed % 2 == 1}
        engine = sharp_engine(tmp_path, backbone, **keys, **{"schedule.learning_rate": 0.0})
        engine.take_step(4, make_batch(seed, 64))
        affinity = affinity_of(engine, make_batch(9, 64))
        return float(((affinity > 0.01) & (affinity < 0.99)).float().mean())

    assert alive("published", 0) < 0.1
    assert min(alive("calibrated", seed) for seed in range(5)) > 0.9


def test_calibration_is_of_the_pairs_that_the_loss_counts(tmp_path: Path) -> None:
    """Pairs of tokens within the radius, both of them in the valid box, of the first batch of the phase alone."""
    keys = {"model.affinity_init": "calibrated", "pseudo.affinity_radius": 2, "schedule.learning_rate": 0.0}
    engine, batch = sharp_engine(tmp_path, "mit_tiny", **keys), make_batch(0, 64)
    for step in (2, 3):
        engine.take_step(step, batch)
        assert not engine.network.affinity_head.mix.weight.any()
    engine.take_step(4, batch)
    affinity, logits = affinity_of(engine, batch).double(), []
    for image, (top, bottom, left, right) in zip(affinity, batch.valid_box.tolist(), strict=True):
        # A token of the 4 x 4 has the label of the first of its 16 x 16 pixels.
        inside = [(r, c) for r in range(4) for c in range(4) if top <= 16 * r < bottom and left <= 16 * c < right]
        for r, c in inside:
            for y, x in inside:
                if max(abs(r - y), abs(c - x)) <= 2:
                    value = float(image[4 * r + c, 4 * y + x])
                    logits.append(math.log(value / (1 - value)))
    assert sum(logits) / len(logits) == pytest.approx(0, abs=1e-3)
    assert math.sqrt(sum(value**2 for value in logits) / len(logits)) == pytest.approx(1, abs=1e-3)
    weight = engine.network.affinity_head.mix.weight.clone()
    engine.take_step(5, make_batch(1, 64))
    assert torch.equal(engine.network.affinity_head.mix.weight, weight)


def test_a_head_that_has_learned_is_not_calibrated(tmp_path: Path) -> None:
    keys = {"model.affinity_init": "calibrated", "schedule.learning_rate": 0.0, "schedule.weight_decay": 0.0}
    engine = sharp_engine(tmp_path, "mit_tiny", **keys)
    state = {key: torch.randn_like(value) for key, value in engine.network.affinity_head.state_dict().items()}
    engine.network.affinity_head.load_state_dict(state)
    engine.take_step(4, make_batch(0, 64))
    for key, value in engine.network.affinity_head.state_dict().items():
        assert torch.equal(value, state[key])


def test_a_batch_without_pairs_leaves_the_calibration_to_the_next_one(tmp_path: Path) -> None:
    keys = {"model.affinity_init": "calibrated", "schedule.learning_rate": 0.0}
    engine, expected = (sharp_engine(tmp_path, "mit_tiny", **keys) for _ in range(2))
    batch = make_batch(0, 64)
    engine.take_step(4, dataclasses.replace(batch, valid_box=torch.zeros_like(batch.valid_box)))
    assert not engine.network.affinity_head.mix.weight.any()
    for each in (engine, expected):
        each.take_step(5, batch)
        assert each.network.affinity_head.mix.weight.all()
    assert torch.equal(engine.network.affinity_head.mix.weight, expected.network.affinity_head.mix.weight)
