"""Full supervision: masks follow their images through the augmentation, and the losses are plain ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate, multilabel_soft_margin_loss

from afa.config import AugmentConfig, DataConfig
from afa.data.loader import train_batches
from afa.data.open import open_data
from afa.data.transforms import draw_crop, resample_image
from afa.errors import AfaError
from afa.runs.run import Run
from afa.runtime import Processes
from afa.training.schedule import phase
from afa.training.supervised import MaskedBatch, open_masked, supervised_losses, with_mask, with_masks
from afa.types import IGNORE_INDEX, Batch, NetworkOutput
from tiny import assert_same_weights, tiny_config, train_tiny

CPU = torch.device("cpu")


def coordinate_data(root: Path, tiny_data: Path) -> Path:
    """The tiny data, whose images and masks both tell where each pixel was: mask = 1 where red is above 127."""
    shutil.copytree(tiny_data, root)
    generator = np.random.default_rng(0)
    for path in (root / "SegmentationClassAug").iterdir():
        mask = np.kron(generator.integers(0, 2, (8, 8)), np.ones((8, 8))).astype(np.uint8)
        Image.fromarray(mask, "L").save(path)
        image = root / "JPEGImages" / path.name
        next((root / "JPEGImages").glob(f"{path.stem}.*")).unlink()
        Image.fromarray(np.repeat(255 * mask[:, :, None], 3, axis=2)).save(image)
    return root


@pytest.mark.parametrize("balance", [0.0, 1.0])
@pytest.mark.parametrize("processes", [Processes(), Processes(rank=1, count=2)])
def test_masks_follow_their_images(tiny_data: Path, tmp_path: Path, processes: Processes, balance: float) -> None:
    root = coordinate_data(tmp_path / "data", tiny_data)
    keys = {"augment.crop_size": 96, "augment.scale_min": 0.6, "augment.scale_max": 2.0}
    config = tiny_config(root, keys | {"train.class_balance": balance})
    images = open_masked(open_data(config.data), config.data.train_list)
    batches = train_batches(images, config, start=2, processes=processes)
    seen = 0
    sums = set()
    for batch in with_masks(batches, images, config, start=2, processes=processes):
        assert batch.mask.shape == (4 // processes.count, 96, 96)
        for image, mask, (top, bottom, left, right) in zip(
            batch.image, batch.mask, batch.valid_box.tolist(), strict=True
        ):
            inside = torch.zeros_like(mask, dtype=torch.bool)
            inside[top:bottom, left:right] = True
            assert (mask[~inside] == IGNORE_INDEX).all()
            # Bilinear resampling smears only the borders between cells of at least 8 x 0.6 pixels.
            clear = inside & ((image[0] < 64) | (image[0] > 191))
            assert clear[inside].float().mean() > 0.5
            agree = (mask == (image[0] > 127))[clear].float().mean()
            assert agree > 0.99
            sums.add(int(mask[inside].sum()))
            seen += 1
    assert seen == 16 // processes.count
    assert len(sums) > 2


def test_a_mask_is_resampled_to_the_nearest_pixel() -> None:
    """Against the definition, at random crops: the value of the pixel that holds the center of each place."""
    rng = np.random.default_rng(0)
    augment = AugmentConfig(crop_size=64, scale_min=0.5, scale_max=2.0)
    for _ in range(20):
        mask = rng.integers(0, 21, (40, 57)).astype(np.uint8)
        plan = draw_crop((40, 57), augment, rng)
        canvas = np.full((64, 64), IGNORE_INDEX, dtype=np.uint8)
        resample_image(mask, plan, canvas, Image.Resampling.NEAREST)
        expected = np.full_like(canvas, IGNORE_INDEX)
        centers = [
            span.first + (np.arange(span.end - span.start) + 0.5) * (span.last - span.first) / (span.end - span.start)
            for span in (plan.rows, plan.columns)
        ]
        part = mask[np.ix_(*(np.floor(center).astype(int) for center in centers))]
        # On the edge between two pixels either is right.
        unsure = [np.abs(center - center.round()) < 1e-3 for center in centers]
        edge = unsure[0][:, None] | unsure[1]
        top, bottom, left, right = plan.valid_box
        found = canvas[top:bottom, left:right].copy()
        found = found[:, ::-1] if plan.flip else found
        assert (found == part)[~edge].all()
        assert edge.mean() < 0.5
        expected[top:bottom, left:right] = canvas[top:bottom, left:right]
        assert (canvas == expected).all()


def test_losses_are_plain_cross_entropy_and_the_tags() -> None:
    generator = torch.Generator().manual_seed(0)
    seg_logits = torch.randn(2, 4, 8, 8, generator=generator, requires_grad=True)
    image_logits = torch.randn(2, 3, generator=generator)
    asked = []

    def forward(image: Tensor, segmentation: bool, affinity: bool) -> NetworkOutput:
        asked.append((segmentation, affinity))
        return NetworkOutput(image_logits, torch.zeros(2, 3, 2, 2), seg_logits=seg_logits)

    mask = torch.randint(0, 4, (2, 32, 32), generator=generator, dtype=torch.uint8)
    mask[:, :5] = IGNORE_INDEX
    tags = torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    batch = Batch(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), tags, torch.tensor([[0, 32, 0, 32]] * 2), ("a", "b"))
    config = tiny_config(Path(), {"train.supervision": "masks"})
    kind = phase(0, config)

    def never(image: Tensor, affinity: bool) -> NetworkOutput:
        raise AssertionError

    losses = supervised_losses(forward, never, with_mask(batch, mask), config=config, phase=kind)
    logits = interpolate(seg_logits, size=(32, 32), mode="bilinear", align_corners=False)
    seg = cross_entropy(logits, mask.long(), ignore_index=IGNORE_INDEX)
    cls = multilabel_soft_margin_loss(image_logits, tags)
    assert float(losses.seg or 0) == pytest.approx(float(seg.detach()), rel=1e-5)
    assert float(losses.total.detach()) == pytest.approx(float((seg + cls).detach()), rel=1e-5)
    assert asked == [(True, False)]
    assert (losses.aff, losses.reg, losses.labels.initial_label) == (None, None, None)
    losses.total.backward()  # type: ignore[no-untyped-call]
    assert seg_logits.grad is not None

    moved = with_mask(batch, mask).to(torch.device("meta"))
    assert isinstance(moved, MaskedBatch)
    assert moved.mask.device.type == moved.image.device.type == "meta"


def run_training(root: Path, run: Path, **keys: Any) -> None:
    config = tiny_config(root, {"train.supervision": "masks", "data.val_list": "", **keys})
    train_tiny(config, run)


def test_a_run_learns_from_masks_says_so_and_resumes_exactly(tiny_data: Path, tmp_path: Path) -> None:
    run_training(tiny_data, tmp_path / "run")
    lines = Run(tmp_path / "run").metrics()
    assert {line["phase"] for line in lines} == {"masks"}
    for line in lines:
        assert line["loss"] == pytest.approx(line["cls_loss"] + line["seg_loss"])
        assert line["aff_loss"] is line["reg_loss"] is None
    # Other masks, other weights.
    root = tmp_path / "data"
    shutil.copytree(tiny_data, root)
    for path in (root / "SegmentationClassAug").iterdir():
        Image.fromarray(np.zeros((64, 64), dtype=np.uint8), "L").save(path)
    run_training(root, tmp_path / "empty")
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "run", tmp_path / "empty")
    # From the checkpoint of step 4.
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step_00000006")
    (tmp_path / "cut" / "model.safetensors").unlink()
    config = tiny_config(tiny_data, {"train.supervision": "masks", "data.val_list": ""})
    train_tiny(config, tmp_path / "cut", resume=True)
    assert_same_weights(tmp_path / "run", tmp_path / "cut")
    with pytest.raises(AfaError, match=r"train\.supervision = masks, not tags"):
        train_tiny(tiny_config(tiny_data, {"data.val_list": ""}), tmp_path / "cut", resume=True)


def test_missing_masks_or_lists_are_one_clear_line(tiny_data: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(tiny_data, root)
    name = (root / "lists" / "train.txt").read_text().split()[0]
    (root / "SegmentationClassAug" / f"{name}.png").unlink()
    layout = open_data(DataConfig(root=str(root)))
    with pytest.raises(AfaError, match=rf"no {name}\.png \(1 of 24"):
        open_masked(layout, "lists/train.txt")
    assert len(layout.train()) == 24
    with pytest.raises(AfaError, match=r"absent\.txt: .*supervision = masks"):
        open_masked(layout, "absent.txt")


def test_what_shows_results_says_fully_supervised(tiny_data: Path, tmp_path: Path) -> None:
    from afa.cli import main
    from tiny import tiny_flags

    run = tmp_path / "run"
    assert main([*tiny_flags(tiny_data, {"train.supervision": "masks"}), "--out", str(run)]) == 0
    words = "fully supervised (masks)"
    assert json.loads((run / "report.json").read_text())["supervision"] == words
    for kind in ("seg", "cam"):
        assert json.loads((run / "evaluation" / f"{kind}.json").read_text())["supervision"] == words
    page = (run / "report.html").read_text()
    assert words in page
    assert "image tags alone" not in page
