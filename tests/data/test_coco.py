from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO

from afa.config import DataConfig
from afa.data import coco as coco_module
from afa.data.coco import Instance, convert_coco, decode_runs, fill_polygons, main, semantic_mask
from afa.data.open import open_data
from afa.data.palette import write_index_png
from afa.errors import AfaError
from mistakes import refused, said
from opened import forbidden

HEIGHT, WIDTH = 60, 90

# pycocotools 2.0.11 with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def outline(rng: np.random.Generator, radius: float) -> NDArray[np.float64]:
    """(12, 2) corners of a ragged polygon within the image."""
    angle = np.sort(rng.uniform(0, 2 * np.pi, 12))
    reach = rng.uniform(0.5, 1.0, 12) * radius
    center = rng.uniform(radius, (WIDTH - radius, HEIGHT - radius))
    return center + np.stack([np.cos(angle), np.sin(angle)], axis=1) * reach[:, None]


def reference(polygons: list[NDArray[np.float64]]) -> NDArray[np.bool_]:
    """What pycocotools makes of polygons."""
    runs = coco_masks.frPyObjects([polygon.ravel().tolist() for polygon in polygons], HEIGHT, WIDTH)
    return np.asarray(coco_masks.decode(coco_masks.merge(runs)), dtype=bool)


@pytest.mark.parametrize(("radius", "least"), [(8, 0.9), (15, 0.95), (28, 0.97)])
def test_polygons_agree_with_pycocotools(radius: float, least: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        polygons = [outline(rng, radius), outline(rng, radius)]
        ours = fill_polygons([polygon.astype(np.float32) for polygon in polygons], HEIGHT, WIDTH)
        theirs = reference(polygons)
        assert (ours & theirs).sum() / (ours | theirs).sum() > least


def test_polygons_fill_the_pixels_whose_middle_they_hold() -> None:
    square = box(2, 1, 5, 3)
    expected = np.zeros((4, 7), dtype=bool)
    expected[1:3, 2:5] = True
    assert (fill_polygons([square], 4, 7) == expected).all()
    assert (fill_polygons([square + np.float32(0.3)], 4, 7) == expected).all()
    assert fill_polygons([(square - 2.5) * 1000], 4, 7).all()
    assert not fill_polygons([square + 100, square - 100], 4, 7).any()
    assert not fill_polygons([], 4, 7).any()


@pytest.mark.parametrize("seed", range(5))
def test_runs_agree_with_pycocotools(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((HEIGHT, WIDTH)) < rng.choice([0.02, 0.5, 0.98])
    mask[: rng.integers(0, HEIGHT)] = seed % 2 == 0  # long runs: several characters a number
    text = coco_masks.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    assert (decode_runs(text, HEIGHT, WIDTH) == mask).all()
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat, prepend=False, append=not flat[-1]))
    counts = np.diff(edges, prepend=0).tolist()
    assert (decode_runs(counts, HEIGHT, WIDTH) == mask).all()


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([1, 2], "run lengths that do not fill a mask of 2x2 pixels"),
        ([-1, 5], "run lengths that do not fill"),
        ([10**30], "run lengths that do not fill"),
        ("4~", "unknown character"),
        ("é", "unknown character"),
        ("P", "end too early"),
        ("PPPPPPPPPPPPPPPPPPPPPPP", "unknown character"),
    ],
)
def test_broken_runs(counts: Any, expected: str) -> None:
    with refused(expected):
        decode_runs(counts, 2, 2)


def box(left: int, top: int, right: int, bottom: int) -> NDArray[np.float32]:
    return np.array([[left, top], [right, top], [right, bottom], [left, bottom]], dtype=np.float32)


def test_small_lies_over_large_and_crowds_lie_lowest() -> None:
    instances = [
        Instance(7, False, polygons=(box(2, 0, 3, 1),)),
        Instance(90, False, polygons=(box(0, 0, 4, 1),)),
        Instance(7, True, counts=(2, 6)),
        Instance(7, False),
    ]
    mask = semantic_mask(instances, {7: 1, 90: 2}, 1, 8, where="x")
    assert mask.dtype == np.uint8
    assert mask.tolist() == [[2, 2, 1, 2, 255, 255, 255, 255]]


def write_coco(folder: Path, *, seed: int = 0, first_id: int = 1) -> tuple[Path, Path]:
    """A small COCO: 6 images, the last without annotation; objects do not cover each other but for the crowd."""
    rng = np.random.default_rng(seed)
    images = folder / f"images{first_id}"
    images.mkdir(parents=True)
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 90, "name": "traffic light"}, {"id": 3, "name": "cat"}, {"id": 11, "name": "dog"}],
    }
    for number in range(first_id, first_id + 6):
        name = f"COCO_{number:012d}.jpg"
        Image.new("RGB", (WIDTH, HEIGHT)).save(images / name)
        content["images"].append({"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH})
        if number == first_id + 5:
            continue
        polygon = outline(rng, 15)
        polygon[:, 0] *= 0.6
        content["annotations"].append(
            {"id": 10 * number, "image_id": number, "category_id": [90, 3][number % 2], "iscrowd": 0,
             "segmentation": [polygon.ravel().tolist()]}
        )  # fmt: skip
        crowd = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
        crowd[:, 60 : 61 + number] = 1
        text = coco_masks.encode(crowd)["counts"].decode()
        content["annotations"].append(
            {"id": 10 * number + 1, "image_id": number, "category_id": 11, "iscrowd": 1,
             "segmentation": {"counts": text, "size": [HEIGHT, WIDTH]}}
        )  # fmt: skip
    path = folder / f"instances{first_id}.json"
    path.write_text(json.dumps(content))
    return path, images


def test_conversion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, train_images = write_coco(tmp_path)
    val, val_images = write_coco(tmp_path, seed=1, first_id=100)
    out = tmp_path / "out"
    for split, path, images in (("train", train, train_images), ("val", val, val_images)):
        assert main([str(path), str(images), str(out), "--split", split]) == 0
    said = capsys.readouterr().out
    assert said.count("5 images with annotations, 1 without left out; 5 masks written, 0 there before") == 2
    layout = open_data(DataConfig(root=str(out)))
    assert layout.kind == "voc"
    assert layout.classes == ("cat", "dog", "traffic light")
    tagged = layout.train()
    assert tagged.names[0] == "images1/COCO_000000000001"
    assert tagged.image(0).shape == (HEIGHT, WIDTH, 3)
    scored = layout.masked()
    assert len(scored) == 5
    oracle = COCO(str(val))
    for i, name in enumerate(scored.names):
        number = int(name.rsplit("_", 1)[-1])
        annotations = oracle.loadAnns(oracle.getAnnIds(imgIds=number))
        expected = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
        for annotation in sorted(annotations, key=lambda a: -a["iscrowd"]):
            value = 255 if annotation["iscrowd"] else sorted(oracle.cats).index(annotation["category_id"]) + 1
            expected[oracle.annToMask(annotation) > 0] = value
        assert (scored.mask(i) != expected).mean() < 0.01
        crowd = oracle.annToMask(annotations[1]) > 0
        assert (scored.mask(i)[crowd] == 255).all()
        present = {annotation["category_id"] for annotation in annotations}
        assert scored.tags(i).tolist() == [float(c in present) for c in (3, 11, 90)]


def test_images_are_copied_where_links_are_not_allowed(tmp_path: Path) -> None:
    """As on Windows without the right to make them; a second call goes on with what is there."""
    instances, images = write_coco(tmp_path)
    target, linked = tmp_path / "out", tmp_path / "linked"
    convert_coco(instances, images, linked, split="train")
    for _ in range(2):
        with forbidden("os.symlink", "os.link"):
            convert_coco(instances, images, target, split="train")
    names = (target / "lists" / "train.txt").read_text()
    assert names == (linked / "lists" / "train.txt").read_text()
    copies = [path for path in (target / "JPEGImages").rglob("*") if path.is_file()]
    assert len(copies) == len(names.split())
    assert not any(path.is_symlink() or path.stat().st_nlink > 1 for path in copies)
    assert open_data(DataConfig(root=str(target), train_list="lists/train.txt")).train().image(0).ndim == 3
    copies[0].write_bytes(b"another image")
    with forbidden("os.symlink"), refused(copies[0], "another image than", "choose another OUT"):
        convert_coco(instances, images, target, split="train")


def test_an_interrupted_conversion_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, images = write_coco(tmp_path)
    out = tmp_path / "out"
    written: list[Path] = []

    def write_two(target: Path, label: NDArray[np.uint8]) -> None:
        if len(written) == 2:
            raise AfaError("the disk is full")
        written.append(target)
        write_index_png(target, label)

    monkeypatch.setattr(coco_module, "write_index_png", write_two)
    with pytest.raises(AfaError, match="disk is full"):
        convert_coco(path, images, out, split="train")
    assert not (out / "lists" / "train.txt").exists()
    monkeypatch.undo()
    times = [file.stat().st_mtime_ns for file in written]
    summary = convert_coco(path, images, out, split="train")
    assert (summary.num_images, summary.num_without, summary.num_written) == (5, 1, 3)
    assert [file.stat().st_mtime_ns for file in written] == times
    assert convert_coco(path, images, out, split="train").num_written == 0
    assert len((out / "lists" / "train.txt").read_text().splitlines()) == 5


def spoil(path: Path, key: str, change: dict[str, Any]) -> None:
    content = json.loads(path.read_text())
    content[key][0] |= change
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("key", "change", "expected"),
    [
        ("annotations", {"segmentation": 5}, "segmentation is no list"),
        ("annotations", {"segmentation": [[1, 2, "x", 4]]}, "segmentation is no list"),
        ("annotations", {"segmentation": [[1, 2, 3]]}, "segmentation is no list"),
        ("annotations", {"segmentation": {"counts": {}}}, "counts are neither"),
        ("annotations", {"segmentation": {"counts": [1]}}, "do not fill a mask of 90x60 pixels"),
        ("annotations", {"category_id": 4}, "category id 4, which"),
        ("annotations", {"image_id": 400}, "image id 400, which"),
        ("images", {"height": 10**9}, "90x1000000000 pixels; correct"),
        ("images", {"height": "60"}, "has no whole number as height"),
        ("images", {"file_name": "../../x.jpg"}, "has no image '../../x.jpg' (1 of 5 images missing)"),
        ("images", {"file_name": "x.jpg"}, "has no image 'x.jpg' (1 of 5 images missing)"),
        ("categories", {"name": "background"}, "leave 'background' out"),
    ],
)
def test_mistakes_in_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, change: dict[str, Any], expected: str
) -> None:
    path, images = write_coco(tmp_path)
    spoil(path, key, change)
    assert main([str(path), str(images), str(tmp_path / "out"), "--split", "train"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("afa: error: ")
    assert expected in said


def test_other_mistakes(tmp_path: Path) -> None:
    path, images = write_coco(tmp_path)
    out = tmp_path / "out"

    def message(*arguments: Path, split: str = "train") -> str:
        return said(convert_coco, *arguments, split=split)

    assert "none.json: no such file" in message(tmp_path / "none.json", images, out)
    assert "none: no such folder" in message(path, tmp_path / "none", out)
    assert "--split is '../train'; use a word" in message(path, images, out, split="../train")
    out.write_text("x")
    assert "out: cannot be written (" in message(path, images, out)
    out.unlink()
    convert_coco(path, images, out, split="train")
    spoil(path, "categories", {"name": "lamp"})
    assert "classes.txt: lists other classes; choose" in message(path, images, out)
