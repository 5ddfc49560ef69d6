"""The flags and arguments of each command, as data: what `add_argument` takes of each.

Their destinations have the names of the parameters that they are for.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
from typing import Any

Flag = tuple[tuple[str, ...], dict[str, Any]]

_FORMAT_HELP = (
    "also write the masks for other tools, names separated by commas: "
    "coco, cvat, hf, labelme, labelstudio, mmseg, panoptic, voc, voc_test, yolo"
)


def _argument(*names: str, **settings: Any) -> Flag:
    return names, settings


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _folder(text: str) -> str:
    if os.path.isfile(text):
        raise argparse.ArgumentTypeError(f"{text!r} is a file; pass another --out")
    return text


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 to 65535")
    return int(text)


def _minutes(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes above 0")


_RUN = _argument("run", metavar="RUN", help="run folder")
_OUT_RUN = _argument("--out", type=_folder, required=True, metavar="RUN", help="run folder")
_DATA = _argument("--data", required=True, metavar="DIR", help="folder of the data set")
_PRESET = _argument("--preset", metavar="NAME", help="starting values: paper, paper_coco, rrm, frozen or demo")
_JSON = _argument("--json", metavar="FILE", help="also write the figures here; - is standard output")
_FORMATS = _argument("--format", dest="formats", default="", metavar="NAMES", help=_FORMAT_HELP)
_SKIP = _argument(
    "--skip-missing", action="store_const", const="true", help="leave out, and count, tags whose image is missing"
)

TILES = (
    _argument("--tiles", default="off", metavar="auto|off|SIDE", help="show large images to the network in tiles"),
    _argument("--max-pixels", type=int, metavar="N", help="limit of pixels of an image; 0 is none"),
    _argument("--out-shards", type=_positive, default=0, metavar="N", help="write the masks as shards of N images"),
    _argument("--rle", action="store_true", help="in shards: run lengths as of COCO in place of PNGs"),
)
NETWORK = (
    _argument("--device", metavar="auto|cpu|cuda|mps", help="where to compute (default: auto)"),
    _argument("--seed", metavar="N", help="seed of everything random"),
    _argument("--precision", metavar="auto|fp32|bf16|fp16", help="arithmetic of the network"),
    _argument(
        "--skip-broken", action="store_const", const="true", help="leave out images that cannot be read, and count them"
    ),
)
"""Flags of every command that runs the network."""

DEMO = (
    _argument(
        "--out", dest="run", type=_folder, default="runs/demo", metavar="RUN", help="run folder (default: %(default)s)"
    ),
    _argument("--smoke", action="store_true", help="a few steps only, to see that everything runs"),
    _argument("--one-class", action="store_true", help="images of one class, half of them without it"),
    _argument("--resume", action="store_true", help="go on with the run in RUN"),
    *NETWORK,
)
CHECK = (
    _argument("data", metavar="DIR", help="folder of the data set, in any layout of docs/data.md"),
    _argument("--config", dest="file", metavar="FILE", help="TOML configuration of the training to come"),
    _PRESET,
    _argument("--out", type=_folder, metavar="OUT", help="also write check.html and check.json there"),
    _JSON,
    _argument("--fast", action="store_true", help="tags and counts only: read no image, try no training step"),
    _argument("--limit", type=_positive, metavar="N", help="read only N images, evenly spread"),
    _argument(
        "--at-scale", default="", metavar="N", help="say what N images would cost, such as 100M; --device H100: there"
    ),
    _SKIP,
    *NETWORK,
)
TRAIN = (
    _argument("folder", nargs="?", metavar="DIR", help="folder of the data set; alone, it decides all settings"),
    _argument("--config", dest="file", metavar="FILE", help="TOML configuration"),
    _PRESET,
    _OUT_RUN,
    _argument("--minutes", type=_minutes, metavar="M", help="with DIR alone: what all may take here (default: 60)"),
    _argument("--resume", action="store_true", help="go on with the run in RUN, exactly"),
    _SKIP,
    *NETWORK,
)
EVALUATE = (
    _RUN,
    _DATA,
    _argument(
        "--list", dest="list_file", metavar="FILE", help="image names, one a line (default: those for validation)"
    ),
    _argument(
        "--protocol", choices=("single", "multiscale", "single+crf", "multiscale+crf"), help="default: that of the run"
    ),
    _argument(
        "--labels",
        choices=("seg", "cam", "propagated", "initial", "refined"),
        default="seg",
        help="what is scored; all but seg use the images' true tags (default: %(default)s)",
    ),
    _argument("--refine", action="store_true", help="refine cam or propagated scores by the image first"),
    _argument("--boundary", action="store_true", help="also score the boundary IoU"),
    _argument("--limit", type=_positive, metavar="N", help="only the first N images"),
    _SKIP,
    _JSON,
    *NETWORK,
)
PREDICT = (
    _RUN,
    _argument("images", nargs="+", metavar="IMAGES", help="image files or folders, or shards"),
    _argument("--out", type=_folder, required=True, metavar="DIR", help="folder or address of the results"),
    _argument("--tags", metavar="FILE", help="tags of the images: only tagged classes are predicted"),
    _argument("--scores", action="store_true", help="also write class scores"),
    _argument("--crf", action="store_true", help="refine the masks by the dense CRF"),
    _argument("--resume", action="store_true", help="go on with the masks that are in --out already"),
    _argument("--no-overlay", dest="overlay", action="store_false", help="write no color overlays"),
    _FORMATS,
    *TILES,
    *NETWORK,
)
MASKS = (
    _argument("data", metavar="DIR", help="folder of the data set: images and tags"),
    _argument("--out", required=True, type=_folder, metavar="OUT", help="folder or address of the masks"),
    _argument("--config", dest="file", metavar="FILE", help="TOML configuration (default: preset frozen)"),
    _argument(
        "--list", dest="list_file", metavar="FILE", help="image names, one a line (default: every image with tags)"
    ),
    _argument("--examples", type=int, default=8, metavar="N", help="images shown in OUT/masks.html (default: 8)"),
    _SKIP,
    _FORMATS,
    *TILES,
    *NETWORK,
)
PSEUDO = (
    _RUN,
    _DATA,
    _argument("--out", type=_folder, required=True, metavar="DIR", help="folder or address of the labels"),
    _argument("--list", dest="list_file", metavar="FILE", help="image names, one a line (default: those to train on)"),
    _argument("--kind", choices=("refined", "initial", "propagated", "cam"), default="refined"),
    _SKIP,
    _FORMATS,
    *TILES,
    *NETWORK,
)
EXPORT = (
    _argument("run", metavar="RUN", help="run folder, or a folder or hub id of save_pretrained"),
    _argument("--format", required=True, choices=("onnx", "torch", "hf"), help="hf is a folder"),
    _argument("--out", required=True, metavar="PATH", help="file .onnx or .pt2, or folder (hf)"),
    _argument("--check", metavar="DIR", help="images to compare with PyTorch on (default: generated ones)"),
    _argument("--opset", type=_positive, metavar="N", help="version of ONNX's operators, 18 or newer"),
)
CHECK_VOC = (
    _argument("archive", metavar="ARCHIVE", help="what --format voc_test wrote, or any other"),
    _argument("--list", dest="list_file", metavar="FILE", help="names of the test images, one a line"),
    _argument("--images", metavar="DIR", help="folder of the test images, for their sizes"),
)
REPORT = (
    _argument("runs", nargs="+", metavar="RUN", help="run folder; several with --compare"),
    _argument("--compare", action="store_true", help="tables of the runs' figures beside the paper's"),
    _argument("--out", type=_folder, metavar="DIR", help="--compare: also write compare.html and compare.json there"),
    _argument("--figures", action="store_true", help="also draw the paper's figures, as RUN/figures/*.png"),
    _argument("--data", metavar="DIR", help="--figures: folder of the data set (default: that of the run)"),
)
EXPLORE = (
    _RUN,
    _argument("--data", metavar="DIR", help="folder of the data set (default: that of the run)"),
    _argument("--compare", metavar="RUN", help="another run to compare with"),
    _argument("--port", type=_port, metavar="N", help="default: 7860, or a free one if that is taken"),
    _argument(
        "--no-browser",
        dest="browser",
        action="store_false",
        help="open no browser; the first line printed is the address",
    ),
    _argument("--device", default="auto", metavar="auto|cpu|cuda|mps", help="where to compute (default: auto)"),
)
KEYS = (
    _argument("word", nargs="?", metavar="SECTION|WORD", help="only the keys of a section, or those with a word"),
    _argument("--markdown", action="store_true", help="the page docs/configuration.md"),
)
