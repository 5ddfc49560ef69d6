"""What is said of a result without masks: figures of a network whose CAM and prediction are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from afa.config import Config, load_config
from afa.data.dataset import TaggedImages
from afa.evaluation.worth import Worth, measure_worth, threshold_settings
from afa.types import IMAGE_MEAN, IMAGE_STD, NetworkOutput

CONFIG = load_config(
    None,
    {"pseudo.scales": "1.0", "pseudo.propagation": "none", "pseudo.mirror": "false", "pseudo.dilations": "1,2",
     "pseudo.background_cam": "0.5"},
)  # fmt: skip


class Halves(nn.Module):
    """The CAM of a class is its color. So is the prediction, which is surest where the color is pure."""

    num_classes = 2
    text = None

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))

    def forward(self, image: Tensor, **_: bool) -> NetworkOutput:
        color = image * torch.tensor(IMAGE_STD)[:, None, None] + torch.tensor(IMAGE_MEAN)[:, None, None]
        background = torch.full_like(color[:, :1], 0.5)
        logits = 10 * torch.cat([background, color[:, :2]], 1)
        return NetworkOutput(logits[:, 1:].amax((2, 3)) - 5, color[:, :2], seg_logits=logits)

    def score(self, image: Tensor, affinity: bool = False) -> NetworkOutput:
        return self(image)


@pytest.fixture
def images(tmp_path: Path) -> TaggedImages:
    pixels = np.zeros((4, 32, 48, 3), dtype=np.uint8)
    pixels[0, :, :24, 0] = 255  # half is red, as its tag says
    pixels[1, :, :24, 1] = 255  # its tag says red, and half is green: no CAM of either
    pixels[2, :, :12, 0] = 255
    pixels[2, :, 12:24, 0] = 140  # hardly red
    pixels[3, :, :, 0] = 255  # red all over; a CAM is relative, so it has none
    for i, each in enumerate(pixels):
        Image.fromarray(each).save(tmp_path / f"{i}.png")
    names = tuple("0123")
    tags = np.array([[1, 0], [1, 0], [1, 0], [1, 0]], dtype=bool)
    return TaggedImages(
        classes=("red", "green"), names=names, paths=[f"{n}.png" for n in names], tags=tags, folder=tmp_path
    )


def measured(images: TaggedImages, config: Config = CONFIG) -> Worth:
    network: Any = Halves()
    return measure_worth(network, images, config)


def test_coverage_and_agreement(images: TaggedImages) -> None:
    worth = measured(images)
    (red,) = worth.classes
    assert (worth.num_images, red.name, red.images) == (4, "red", 4)
    assert red.prediction.mean == pytest.approx(100 * (0.5 + 0 + 0.5 + 1) / 4, abs=0.1)
    assert (red.prediction.nothing, red.prediction.everything) == (1, 1)
    assert (red.cam.nothing, red.cam.everything) == (2, 0)
    assert red.cam.mean == pytest.approx(100 * (0.5 + 0 + 0.5 + 0) / 4, abs=0.1)
    # Of 4 images the CAM has half of the first and third; the prediction has these and all of the last.
    assert red.agreement == pytest.approx(100 * 1 / 2, abs=0.1)
    names = [name for name, _ in worth.uncertain]
    assert (names[0], sorted(names)) == ("2", ["0", "1", "2", "3"])
    (line,) = worth.failures()
    assert line.startswith("class 'red': its CAM covers nothing in 2 of 4 images; try lower background scores")


def test_background_scores_side_by_side(images: TaggedImages) -> None:
    lower, same, higher = measured(images).thresholds
    assert [each.name for each in (lower, same, higher)] == ["lower", "set", "higher"]
    assert (same.low, same.high) == (CONFIG.pseudo.background_low, CONFIG.pseudo.background_high)
    assert (round(same.low - lower.low, 6), round(higher.high - same.high, 6)) == (0.1, 0.1)
    assert lower.foreground >= same.foreground >= higher.foreground
    assert lower.foreground > higher.foreground
    for each in (lower, same, higher):
        assert 0 <= each.foreground + each.uncertain <= 100


def test_background_scores_stay_in_range() -> None:
    config = load_config(None, {"pseudo.background_low": "0.06", "pseudo.background_high": "0.94"})
    found = [(each.pseudo.background_low, each.pseudo.background_high) for each in threshold_settings(config).values()]
    assert np.allclose(found, [(0.05, 0.84), (0.06, 0.94), (0.16, 0.95)])
