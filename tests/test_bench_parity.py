"""The parity command on the recorded vectors, and on vectors that the naive implementation makes."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import naive
import parity
import parity_step
from afa.config import load_config
from afa.training.schedule import phase
from parity_step import SIZE
from published_step import PublishedStep

HEIGHT, WIDTH = 24, 32
BOXES = ((0, 24, 0, 32), (3, 22, 5, 30))
OUTPUTS = [check.key for check in parity.CHECKS]


def _smooth(rng: np.random.Generator, channels: int, size: tuple[int, int]) -> np.ndarray:
    return naive.bilinear(rng.random((channels, 4, 5)), size)


def _stack(arrays: list[np.ndarray]) -> np.ndarray:
    return np.stack(arrays).astype(np.float32)


@pytest.fixture(scope="module")
def vectors() -> dict[str, np.ndarray]:
    """Vectors of the recorded layout with other sizes, radii, scales and numbers of classes."""
    rng = np.random.default_rng(0)
    size = (HEIGHT, WIDTH)
    made: dict[str, np.ndarray] = {}

    image = _stack([_smooth(rng, 3, size) for _ in BOXES])
    scores = _stack([rng.random((3, 12, 9)) for _ in BOXES])
    made |= {"par_image": image, "par_scores": scores}
    made["par_out"] = _stack([naive.par(*pair) for pair in zip(image, scores, strict=True)])

    grids = {"1.0": (3, 4), "0.75": (2, 3)}
    raw = {scale: rng.normal(size=(4, 3, *grid)).astype(np.float32) for scale, grid in grids.items()}
    made |= {f"cam_raw_{scale}": values for scale, values in raw.items()}
    made["cam_out"] = _stack(
        [naive.fuse_scores([r[i] for r in raw.values()], [r[i + 2] for r in raw.values()], size) for i in range(2)]
    )

    tags = np.array([[1, 1, 0], [0, 0, 1]], dtype=np.float32)
    cam = _stack([_smooth(rng, 3, size) for _ in BOXES])
    made |= {"refine_image": image, "refine_cam": cam, "refine_tags": tags, "refine_box": np.array(BOXES)}
    made["cam_label"] = np.stack(
        [naive.threshold_label(cam[i], tags[i], BOXES[i], low=0.35, high=0.55) for i in range(2)]
    )
    made["refine_label"] = _stack([naive.initial_label(image[i], cam[i], tags[i], BOXES[i]) for i in range(2)])
    present = np.concatenate([np.ones((2, 1)), tags], axis=1)[:, :, None, None]
    made["refine2_scores"] = _stack([_smooth(rng, 4, size) for _ in BOXES]) * present.astype(np.float32)
    made["refine2_out"] = _stack([naive.refine_in_box(image[i], made["refine2_scores"][i], BOXES[i]) for i in range(2)])

    token_cam = rng.random((2, 3, 4, 5)).astype(np.float32)
    half = rng.normal(size=(2, 20, 20))
    affinity = (1 / (1 + np.exp(half + half.transpose(0, 2, 1)))).astype(np.float32)
    made |= {"walk_cam": token_cam, "walk_tags": tags, "walk_affinity": affinity, "walk_radius": np.array(1)}
    for name, background in (("low", 0.35), ("high", 0.55)):
        made[f"walk_out_{name}"] = _stack(
            [naive.propagate(token_cam[i], tags[i], affinity[i], background=background, radius=1) for i in range(2)]
        )

    label = np.kron(rng.choice([0, 1, 2, 255], size=(3, 3, 4)), np.ones((8, 8), dtype=np.int64))
    made |= {"afflabel_label": label, "afflabel_radius": np.array(1)}
    made["afflabel_out"] = np.stack([naive.affinity_label(naive.nearest(one, (3, 4)), radius=1) for one in label])
    made["affloss_affinity"] = rng.random((3, 12, 12)).astype(np.float32)
    made["affloss_out"] = np.float32(naive.affinity_loss(made["affloss_affinity"], made["afflabel_out"]))

    made["segloss_logits"] = rng.normal(size=(3, 4, HEIGHT, WIDTH)).astype(np.float32)
    made["segloss_label"] = label
    made["segloss_out"] = np.float32(naive.segmentation_loss(made["segloss_logits"], label))
    made["lr_steps"] = np.array([0, 3, 1499, 1500, 12_345])
    made["lr_out"] = np.array([naive.learning_rate(int(step)) for step in made["lr_steps"]])
    made["miou_label"], made["miou_pred"] = label[0], rng.integers(0, 5, size=label[0].shape)
    made["miou_out"] = np.array(naive.miou(made["miou_label"], made["miou_pred"], 5))
    return made


def save(folder: Path, vectors: dict[str, np.ndarray]) -> Path:
    path = folder / "vectors.npz"
    np.savez(path, **vectors)
    return path


def published_weights() -> dict[str, np.ndarray]:
    """Random weights of the recorded network under their published names."""
    rng = np.random.default_rng(1)
    made: dict[str, np.ndarray] = {}

    def layer(name: str, *shape: int, bias: bool = True) -> None:
        made[f"{name}.weight"] = rng.normal(size=shape) * np.prod(shape[1:]) ** -0.5
        if bias:
            made[f"{name}.bias"] = 0.1 * rng.normal(size=shape[0])

    def norm(name: str, channels: int) -> None:
        made[f"{name}.weight"], made[f"{name}.bias"] = 1 + 0.1 * rng.normal(size=(2, channels))

    before = 3
    for i, (c, depth, reduction) in enumerate(zip(SIZE.channels, SIZE.depths, (8, 4, 2, 1), strict=True), 1):
        layer(f"encoder.patch_embed{i}.proj", c, before, *((7, 7) if i == 1 else (3, 3)))
        for name in (f"encoder.patch_embed{i}.norm", f"encoder.norm{i}"):
            norm(name, c)
        for block in (f"encoder.block{i}.{j}" for j in range(depth)):
            for name in ("norm1", "norm2", *(["attn.norm"] if reduction > 1 else [])):
                norm(f"{block}.{name}", c)
            if reduction > 1:
                layer(f"{block}.attn.sr", c, c, reduction, reduction)
            for name, rows, columns in (("q", c, c), ("kv", 2 * c, c), ("proj", c, c)):
                layer(f"{block}.attn.{name}", rows, columns)
            for name, shape in (("fc1", (4 * c, c)), ("dwconv.dwconv", (4 * c, 1, 3, 3)), ("fc2", (c, 4 * c))):
                layer(f"{block}.mlp.{name}", *shape)
        layer(f"decoder.linear_c{i}.proj", 8, c)
        before = c
    layer("decoder.linear_fuse.conv", 8, 32, 1, 1, bias=False)
    norm("decoder.linear_fuse.bn", 8)
    made |= {"decoder.linear_fuse.bn.running_mean": np.zeros(8), "decoder.linear_fuse.bn.running_var": np.ones(8)}
    layer("decoder.linear_pred", 4, 8, 1, 1)
    layer("attn_proj", 1, 16, 1, 1)
    made["attn_proj.weight"] *= 0.2
    layer("classifier", 3, before, 1, 1, bias=False)
    return {f"weight/{name}": values.astype(np.float32) for name, values in made.items()}


def published_gradients(network: Any) -> dict[str, Tensor]:
    """Some gradients of a `PublishedNetwork` under their published names."""
    stages = network.encoder.stages
    attention = stages[1].blocks[0].attention
    return {
        "encoder.norm4.weight": stages[3].layer_norm.weight.grad,
        "encoder.block2.0.attn.kv.weight": torch.cat([attention.k_proj.weight.grad, attention.v_proj.weight.grad]),
        "decoder.linear_c1.proj.weight": network.decoder.projections[0].weight.grad,
        "decoder.linear_fuse.conv.weight": torch.cat(network.decoder.fuse.weight.grad.chunk(4, 1)[::-1], 1),
        "decoder.linear_fuse.bn.weight": network.decoder.norm.weight.grad,
        "attn_proj.bias": network.mix.bias.grad,
    }


@pytest.fixture(scope="module")
def step_vectors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Steps of another image and other weights, by the loop of `bench/published_step.py`."""
    rng = np.random.default_rng(2)
    smooth = np.stack([naive.bilinear(rng.random((3, 7, 6)), (64, 64)) for _ in BOXES])
    image = (255 * np.clip(smooth + 0.1 * rng.normal(size=smooth.shape), 0, 1)).astype(np.uint8)
    made = published_weights() | {
        "image": image,
        "tags": np.array([[1, 1, 0], [0, 0, 1]], dtype=np.uint8),
        "box": np.array([[0, 64, 0, 64], [6, 60, 10, 64]]),
    }
    steps = parity_step.Steps(parity.Vectors(save(tmp_path_factory.mktemp("steps"), made)))
    for variant, par_image in (("published", "truncated"), ("exact", "exact")):
        config = load_config(None, {"augment.crop_size": 64, "loss.energy_weight": 0, "pseudo.par_image": par_image})
        for number in (1000, 4000, 10_000):
            step = PublishedStep(steps.network, config, torch.device("cpu"))
            kind = phase(max(number, 4000), config)
            losses = step.losses(steps.batch, kind)
            total = losses.values["cls"] if number == 1000 else losses.total
            found = {f"{name}_loss": value for name, value in losses.values.items()}
            labels = {"initial_label": losses.initial_label, "refined_label": losses.refined_label}
            found |= {name: label for name, label in labels.items() if label is not None and number > 1000}
            if number > 1000 and variant == "published":
                total.backward()
                found |= {f"grad/{name}": each for name, each in published_gradients(step.network).items()}
            made |= {f"{variant}/{number}/{name}": each.detach().numpy() for name, each in found.items()}
    return made


def test_steps_agree(step_vectors: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = parity.main([str(save(tmp_path, step_vectors))])
    table = capsys.readouterr().out
    assert status == 0, table
    assert table.count("gradient") == 12
    assert table.count("image not truncated") == 3


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("published/4000/seg_loss", lambda value: value * 1.0001),
        ("published/10000/aff_loss", lambda value: value * 1.0001),
        ("exact/1000/cls_loss", lambda value: value + np.float32("nan")),
        (
            "published/10000/refined_label",
            lambda value: np.where(np.arange(value.size).reshape(value.shape) < 5, 7, value),
        ),
        ("published/10000/grad/encoder.block2.0.attn.kv.weight", lambda value: value[::-1]),
        ("published/4000/grad/decoder.linear_fuse.conv.weight", lambda value: value[:, ::-1]),
        ("published/4000/grad/attn_proj.bias", lambda value: value * 1.001),
        ("exact/4000/initial_label", lambda value: value[:, :60]),
    ],
)
def test_wrong_steps_are_missed(
    key: str,
    change: Callable[[np.ndarray], np.ndarray],
    step_vectors: dict[str, np.ndarray],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    step, first = key.split("/")[:2], "published/1000/cls_loss"
    some = {name: each for name, each in step_vectors.items() if name[0] not in "pe" or name.split("/")[:2] == step}
    changed = some | {first: step_vectors[first], key: change(step_vectors[key])}
    assert parity.main([str(save(tmp_path, changed))]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines if line.endswith("MISS")} == {key}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("weight/encoder.norm4.bias", None, "lacks key 'backbone.encoder.stages.3.layer_norm.bias'"),
        ("weight/classifier.weight", np.zeros((3, 9, 1, 1)), r"'classifier.weight' has shape \(3, 9, 1, 1\)"),
        ("weight/decoder.linear_c5.proj.weight", np.zeros(3), "unmatched key 'decoder.linear_c5.proj.weight'"),
        ("tags", None, "key tags is missing"),
        ("published/4000/reg_loss", np.zeros(()), "key published/4000/reg_loss is unknown"),
    ],
)
def test_unusable_steps_are_one_line(
    key: str,
    value: np.ndarray | None,
    message: str,
    step_vectors: dict[str, np.ndarray],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changed = {name: each for name, each in (step_vectors | {key: value}).items() if each is not None}
    assert parity.main([str(save(tmp_path, changed))]) == 2
    assert re.fullmatch(rf"parity: .*{message}.*\n", capsys.readouterr().err)


@pytest.mark.data
def test_recorded_steps_agree(shared_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.main([str(shared_dir / "parity" / "step_vectors.npz")]) == 0
    lines = capsys.readouterr().out.splitlines()
    keys = [line.split()[0] for line in lines[1:-1]]
    assert sum("/grad/" in key for key in keys) == 3 * 12
    for variant, number in product(("published", "exact"), (1000, 4000, 10_000)):
        assert f"{variant}/{number}/aff_loss" in keys


@pytest.mark.data
def test_recorded_vectors_agree(shared_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.main([str(shared_dir / "parity" / "reference_vectors.npz")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == OUTPUTS


def test_vectors_of_other_sizes_agree(
    vectors: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = parity.main([str(save(tmp_path, vectors))])
    table = capsys.readouterr().out
    assert status == 0, table
    assert "MISS" not in table
    assert "all 12 outputs agree" in table


@pytest.mark.parametrize("key", OUTPUTS)
def test_tampered_output_is_missed(
    key: str, vectors: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tampered = vectors | {key: np.array(vectors[key], copy=True)}
    flat = tampered[key].reshape(-1)
    if key in {"cam_label", "afflabel_out", "refine_label"}:
        flat[: 1 + flat.size // 500] = 77
    else:
        flat[0] += max(1e-3 * abs(flat[0]), 2e-4) if key != "lr_out" else 1e-10
    assert parity.main([str(save(tmp_path, tampered))]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert key in {line.split()[0] for line in lines if line.endswith("MISS")}
    assert lines[-1].startswith("missed:")


@pytest.mark.parametrize("value", [np.float32("nan"), np.zeros(3, dtype=np.float32)])
def test_nan_and_other_shapes_are_misses(
    value: np.ndarray, vectors: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parity.main([str(save(tmp_path, vectors | {"segloss_out": np.asarray(value)}))]) == 1
    assert "missed: segloss_out" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["par_scores", "walk_radius", "miou_out", "refine_box"])
def test_missing_key_is_named_in_one_line(
    key: str, vectors: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(tmp_path, {name: value for name, value in vectors.items() if name != key})
    assert parity.main([str(path)]) == 2
    assert re.fullmatch(rf"parity: {path}: key {key} is missing; record .*\n", capsys.readouterr().err)


def test_missing_scales_are_named(
    vectors: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(tmp_path, {name: value for name, value in vectors.items() if not name.startswith("cam_raw_")})
    assert parity.main([str(path)]) == 2
    assert "key cam_raw_1.0 is missing" in capsys.readouterr().err


def test_file_that_is_no_archive_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.npz").write_text("hello")
    np.save(tmp_path / "array.npy", np.zeros(3))
    for name, message in (
        ("absent.npz", "no such file; pass"),
        ("text.npz", "not an .npz file"),
        ("array.npy", "not an .npz file"),
    ):
        assert parity.main([str(tmp_path / name)]) == 2
        assert re.fullmatch(rf"parity: {tmp_path / name}: {message}.*\n", capsys.readouterr().err)


def test_wrong_number_of_arguments_prints_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.main([]) == 2
    assert capsys.readouterr().err == "usage: python bench/parity.py VECTORS.npz\n"
