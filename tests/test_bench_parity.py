"""The parity command on the recorded vectors, and on vectors that the naive implementation makes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import naive
import parity

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
