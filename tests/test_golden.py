"""Nothing that a user gets changes unseen: weights, reports, masks, formats, and what is said of data sets.

`golden.json` has them. `AFA_GOLDEN=write pytest tests/test_golden.py` records it anew, for a change that is meant; say
in the commit why. On the machine that recorded it everything is compared exactly. Elsewhere sums are rounded otherwise:
there, what was computed is compared up to a tolerance, and what was read or said still exactly.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from afa.cli import main
from afa.config import DataConfig
from afa.data.open import open_data
from layouts import LAYOUTS


def said_of(root: Path) -> dict[str, Any]:
    """What is found in a data set: the one place here that names functions which may move."""
    layout = open_data(DataConfig(root=str(root)))
    sides = {"train": layout.train(), "validation": layout.validation() if layout.has_validation else None}
    return {
        "says": layout.describe(),
        "classes": layout.classes,
        "untagged": layout.untagged,
        **{side: {} if images is None else tags_of(images) for side, images in sides.items()},
    }


def tags_of(images: Any) -> dict[str, str]:
    return {
        name: " ".join(images.classes[c] for c in np.flatnonzero(images.tags(i))) for i, name in enumerate(images.names)
    }


GOLDEN = Path(__file__).with_name("golden.json")
WRITE = os.environ.get("AFA_GOLDEN") == "write"
if WRITE and os.environ.get("CI"):
    raise RuntimeError("AFA_GOLDEN=write records golden.json by hand; unset it in CI")

# The start of the affinity is that of the runs which were recorded.
SHORT = """
    --model.affinity_init published
    --data.workers 0 --augment.crop_size 64 --model.decoder_width 16 --schedule.batch_size 4 --schedule.warmup_steps 2
    --train.device cpu --train.log_steps 1 --train.save_steps 4 --train.example_images 2 --train.tensorboard false
"""
DEMO = SHORT + "--schedule.max_steps 6 --schedule.cls_steps 2 --schedule.refined_steps 4"
# Whatever the demo leaves out or chooses otherwise.
OTHER = (
    SHORT
    + """
    --preset demo --schedule.max_steps 6 --schedule.cls_steps 2 --schedule.refined_steps 3
    --model.backbone dinov2_tiny --model.drop_path 0.1 --model.decoder_dropout 0.1 --model.freeze_blocks 1
    --model.pooling gmp --model.feature_levels 2 --model.attention_scaling false
    --pseudo.label_rule threshold --pseudo.softmax_scores false --pseudo.refinement pamr --pseudo.affinity_radius 8
    --pseudo.walk_epsilon 0.1 --pseudo.reuse_training_pass false
    --loss.energy_weight 30 --loss.segmentation_form plain --loss.affinity_form paper
    --schedule.affinity_target segmentation --schedule.grad_clip 1 --schedule.freeze_norms true
    --evaluation.protocol multiscale+crf --evaluation.long_side 128 --train.eval_steps 3 --train.eval_images 4
"""
)
FORMATS = "coco,cvat,hf,labelme,labelstudio,mmseg,panoptic,voc,yolo"
SECTIONS = {
    "runs": ("demo", "other", "predict", "formats", "pseudo", "evaluate"),
    "layouts": ("layout", "check"),
}
"""First words of the keys that a test compares."""
VARYING = {"seconds", "seconds_train", "images_per_second", "torch", "python", "afa", "commit", "report_commit", "root"}
"""Keys of times, versions and paths."""


def machine() -> dict[str, str]:
    """What rounding depends on."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    return {
        "cpu": model[1] if model else platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
    }


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums are split by threads, so their number is part of a result."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def lasting(value: Any) -> Any:
    """A JSON value without times, versions and paths."""
    if isinstance(value, dict):
        return {key: lasting(each) for key, each in value.items() if key not in VARYING}
    return [lasting(each) for each in value] if isinstance(value, list) else value


def digest(parts: Any) -> str:
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(part if isinstance(part, bytes) else str(part).encode())
    return hashed.hexdigest()


def afa(words: str, **places: Path) -> None:
    """Run a command, in whose words {NAME} is a path."""
    assert main([word.format(**places) for word in words.split()]) == 0


def of_run(name: str, run: Path) -> Iterator[tuple[str, Any]]:
    """What a run folder holds."""
    weights = load_file(run / "model.safetensors")
    yield f"{name}/weights", digest(part for key in sorted(weights) for part in (key, weights[key].tobytes()))
    for key, tensor in sorted(weights.items()):
        wide = tensor.astype(np.float64)
        yield (
            f"{name}/weights/{key}",
            [list(tensor.shape), float(f"{np.sqrt((wide**2).mean()):.6g}"), wide.mean().round(8)],
        )
    for i, line in enumerate((run / "metrics.jsonl").read_text().splitlines()):
        yield f"{name}/metrics/{i}", lasting(json.loads(line))
    for key, value in lasting(json.loads((run / "report.json").read_text())).items():
        yield f"{name}/report/{key}", value
    for path in sorted((run / "evaluation").iterdir()):
        yield f"{name}/{path.name}", lasting(json.loads(path.read_text()))
    names = (path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file())
    yield f"{name}/files", sorted(each for each in names if not each.startswith("data/"))


def of_masks(name: str, folder: Path) -> Iterator[tuple[str, Any]]:
    """Index masks: their pixels, and the share of each value."""
    masks = {path.name: np.asarray(Image.open(path)) for path in sorted((folder / "masks").glob("*.png"))}
    yield f"{name}/masks", digest(part for key, mask in masks.items() for part in (key, mask.shape, mask.tobytes()))
    values, counts = np.unique(np.concatenate([mask.ravel() for mask in masks.values()]), return_counts=True)
    yield (
        f"{name}/shares",
        {str(v): round(c / counts.sum(), 4) for v, c in zip(values.tolist(), counts.tolist(), strict=True)},
    )


def of_formats(folder: Path) -> Iterator[tuple[str, Any]]:
    """Everything that `predict --format` writes, by its bytes, but images, which are the masks over again."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    yield "predict/files", list(files)
    for name, path in files.items():
        if path.suffix not in {".jpg", ".png"} and name != "predict.json":  # that has paths
            yield f"formats/{name}", digest([path.read_bytes()])


def of_runs(folder: Path) -> Iterator[tuple[str, Any]]:
    """What two tiny runs leave behind, and what the commands make of them."""
    demo, data, other = folder / "demo", folder / "demo" / "data", folder / "other"
    afa("demo --smoke --out {demo} " + DEMO, demo=demo)
    yield from of_run("demo", demo)
    afa("train {data} --out {other} " + OTHER, data=data, other=other)
    yield from of_run("other", other)
    images = data / "JPEGImages" / "val_0000{}.jpg"
    words = " ".join(str(images).format(i) for i in range(3))
    afa(f"predict {{demo}} {words} --out {{out}} --format {FORMATS}", demo=demo, out=folder / "predicted")
    yield from of_masks("predict", folder / "predicted")
    yield from of_formats(folder / "predicted")
    afa(
        "pseudo {other} --data {data} --list {data}/lists/val.txt --out {out}",
        other=other,
        data=data,
        out=folder / "pseudo",
    )
    yield from of_masks("pseudo", folder / "pseudo")
    for run, flags in (("demo", "--labels refined"), ("demo", "--boundary"), ("other", "--labels cam --refine")):
        place = folder / "scores.json"
        afa(
            f"evaluate {{run}} --data {{data}} --limit 4 --json {{place}} {flags}",
            run=folder / run,
            data=data,
            place=place,
        )
        yield f"evaluate/{run} {flags}", lasting(json.loads(place.read_text()))


def of_layouts(folder: Path) -> Iterator[tuple[str, Any]]:
    for number, (name, make) in enumerate(LAYOUTS.items()):
        root = folder / f"{number:02d}"
        root.mkdir()
        make(root)
        for key, value in said_of(root).items():
            yield f"layout/{name}/{key}", value.replace(str(root), "ROOT") if isinstance(value, str) else value
    place = folder / "check.json"
    afa("check {root} --fast --json {place}", root=folder / "00", place=place)
    for key, value in lasting(json.loads(place.read_text())).items():
        yield f"check/{key}", value.replace(str(folder / "00"), "ROOT") if isinstance(value, str) else value


def near(found: Any, golden: Any, tolerance: float) -> bool:
    """Whether JSON values are alike: numbers to a thousandth of their size, or to the tolerance."""
    if isinstance(golden, dict):
        return found.keys() == golden.keys() and all(near(found[key], golden[key], tolerance) for key in golden)
    if isinstance(golden, list):
        return len(found) == len(golden) and all(map(near, found, golden, [tolerance] * len(golden)))
    if isinstance(golden, float) and isinstance(found, float):
        return abs(found - golden) <= 1e-3 * abs(golden) + tolerance
    return bool(found == golden)


def kept(found: Any, golden: Any) -> Any:
    """Of what was found that which the record knows: new keys of the configuration change nothing that was there."""
    if not isinstance(found, dict) or not isinstance(golden, dict):
        return found
    return {key: kept(value, golden[key]) for key, value in found.items() if key in golden}


def alike(key: str, found: Any, golden: Any) -> bool:
    """Whether another machine may have computed this.

    With PyTorch, oneDNN and MKL held to SSE4, losses and weights differed by 1e-5 of their size, but for the biases of
    the keys: the softmax does not see them, and AdamW makes steps of some 1e-5 of the noise that is their gradient.
    """
    if key.endswith(("/weights", "/masks")) or key.startswith("formats/"):
        return True  # digests
    if key.endswith("/config"):
        return bool(found == golden)
    percents = key.startswith("evaluate/") or key.endswith(".json") or "/report/" in key
    return near(found, golden, 1.0 if percents else 0.01 if key.endswith("/shares") else 1e-4)


def assert_golden(section: str, pairs: Iterator[tuple[str, Any]]) -> None:
    """Compare with a section of the file, or write it."""
    found = json.loads(json.dumps(dict(pairs)))
    stored = json.loads(GOLDEN.read_text(encoding="utf-8"))
    golden = {key: value for key, value in stored.items() if key.split("/")[0] in SECTIONS[section]}
    if WRITE:
        rows = {key: value for key, value in stored.items() if key not in golden} | found | {"machine": machine()}
        lines = (f"{json.dumps(key)}: {json.dumps(rows[key])}" for key in sorted(rows))
        GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        return
    assert found.keys() >= golden.keys()
    found = kept(found, golden)
    exact = section == "layouts" or stored["machine"] == machine()
    differ = [
        f"{key}:\n  golden {value}\n  found  {found[key]}"
        for key, value in golden.items()
        if not (found[key] == value if exact else alike(key, found[key], value))
    ]
    where = "exactly" if exact else f"by tolerance, as this is {machine()}"
    assert not differ, f"{len(differ)} of {len(golden)} differ, compared {where}\n" + "\n".join(differ)


@pytest.mark.slow
def test_runs(tmp_path: Path) -> None:
    with one_thread():
        assert_golden("runs", of_runs(tmp_path))


def test_layouts(tmp_path: Path) -> None:
    assert_golden("layouts", of_layouts(tmp_path))
