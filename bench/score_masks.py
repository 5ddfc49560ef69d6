"""Score a folder of masks, such as that of `afa masks`, against the masks of a data set.

    python bench/score_masks.py OUT/masks --data VOC2012 --list lists/val_dev.txt [--classes cat,cow,dog]

Pixels that a mask leaves open (255) count as background. The last line is the mIoU in percent.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from afa.config import load_config
from afa.data.images import read_mask
from afa.data.open import open_data
from afa.evaluation.confusion import ConfusionMatrix
from afa.runtime import read_ahead
from afa.types import IGNORE_INDEX


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("masks", type=Path, help="folder of index PNGs")
    parser.add_argument("--data", required=True, help="folder of the data set")
    parser.add_argument("--list", help="image names, one a line (default: those for validation)")
    parser.add_argument("--classes", default="", help="data.class_subset")
    arguments = parser.parse_args()
    config = load_config(None, {"data.root": arguments.data, "data.class_subset": arguments.classes})
    images = open_data(config.data).masked(list_file=arguments.list)
    confusion = ConfusionMatrix(1 + len(images.classes))

    def read(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        mask = torch.from_numpy(read_mask(arguments.masks / f"{images.names[index]}.png"))
        return torch.from_numpy(images.mask(index)), mask.masked_fill(mask == IGNORE_INDEX, 0).long()

    for _, reading in read_ahead(read, range(len(images))):
        confusion.update(*reading.result())
    for name, score in zip(("background", *images.classes), confusion.per_class_iou(), strict=True):
        print(f"{name:16} {'  -  ' if score is None else f'{100 * score:5.1f}'}")
    print(f"mIoU {100 * confusion.miou():.2f} on {len(images)} images")


if __name__ == "__main__":
    main()
