"""Data sets that the `datasets` library stored with the images within, read from the folder alone."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from afa.config import DataConfig
from afa.data.open import DataSet, open_data
from layouts import write
from mistakes import said

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def found(root: Path, **keys: Any) -> DataSet:
    return open_data(DataConfig(root=str(root), **keys))


def tags_of(images: Any) -> list[tuple[str, ...]]:
    return [tuple(images.classes[c] for c in np.flatnonzero(images.tags(i))) for i in range(len(images))]


def picture(shade: int) -> Image.Image:
    return Image.new("RGB", (6, 4), (shade, 0, 0))


SINGLE = datasets.ClassLabel(names=["dog", "cat", "owl"])


def stored(label: Any, values: list[Any], shade: int = 0) -> Any:
    columns = {"image": [picture(shade + 10 * n) for n in range(len(values))], "label": values}
    return datasets.Dataset.from_dict(columns, features=datasets.Features({"image": datasets.Image(), "label": label}))


def as_hub(root: Path, train: Any, other: Any) -> None:
    (root / "data").mkdir(parents=True)
    train.to_parquet(root / "data" / "train-00000-of-00001.parquet")
    other.to_parquet(root / "data" / "validation-00000-of-00001.parquet")


def as_saved(root: Path, train: Any, other: Any) -> None:
    datasets.DatasetDict({"train": train, "validation": other}).save_to_disk(root)


def as_files(root: Path, train: Any, other: Any) -> None:
    root.mkdir()
    train.to_parquet(root / "pets_train.parquet")
    other.to_parquet(root / "pets_val.parquet")


@pytest.mark.parametrize("store", [as_hub, as_saved, as_files])
@pytest.mark.parametrize(
    ("label", "values", "classes"),
    [
        (SINGLE, [0, 1, 1], ("dog", "cat", "owl")),
        (datasets.List(SINGLE), [[0], [1], [0, 1]], ("dog", "cat", "owl")),
        (datasets.Value("string"), ["dog", "cat", "cat"], ("cat", "dog")),
    ],
)
def test_images_and_labels(tmp_path: Path, cache: Path, store: Any, label: Any, values: Any, classes: Any) -> None:
    root = tmp_path / "pets"
    store(root, stored(label, values), stored(label, values[:2], shade=100))
    data = found(root)
    assert (data.kind, data.classes) == ("hf", classes)
    train = data.train()
    assert tags_of(train)[:2] == [("dog",), ("cat",)]
    assert set(tags_of(train)[2]) == ({"cat"} if values[2] in (1, "cat") else {"dog", "cat"})
    assert [int(train.image(n)[0, 0, 0]) for n in range(3)] == [0, 10, 20]
    assert [int(data.validation().image(n)[0, 0, 0]) for n in range(2)] == [100, 110]
    assert "Hugging Face images in " in data.describe()
    assert str(cache) in data.describe()
    assert data.untagged == ()
    assert not [path for path in root.rglob("*") if path.suffix in (".png", ".jsonl", ".jpg")]


def test_names_that_mean_none_of_the_classes(tmp_path: Path) -> None:
    root, label = tmp_path / "pets", datasets.ClassLabel(names=["None", "cat", "normal"])
    as_files(root, stored(label, [0, 1, 2, -1]), stored(label, [1]))
    for negatives, classes, expected in (
        (("none",), ("cat", "normal"), [False, False, True]),
        (("none", "normal"), ("cat",), [True, False, True]),
        ((), ("None", "cat", "normal"), [False, False, False]),
    ):
        data = found(root, negatives=negatives)
        assert data.classes == classes
        assert sorted(data.train().negative.tolist()) == sorted(expected)
        assert len(data.untagged) == 1
    assert len(list((tmp_path / "cache" / "afa" / "shards").glob("*.tar"))) == 2
    write(root, "classes.txt", "normal #ff8000\ncat\nNone\n")
    data = found(root)
    assert (data.classes, data.colors) == (("normal", "cat", "None"), {"normal": (255, 128, 0)})
    assert not data.train().negative.any()


def test_images_are_unpacked_once_and_anew_when_the_files_change(tmp_path: Path, cache: Path) -> None:
    root = tmp_path / "pets"
    as_files(root, stored(SINGLE, [0, 1]), stored(SINGLE, [0]))
    first = found(root).train().image_path(0)
    written = first.stat().st_mtime_ns
    assert found(root).train().image_path(0).stat().st_mtime_ns == written
    assert {path.suffix for path in (cache / "afa" / "shards").iterdir()} == {".tar", ".index", ".lock"}
    as_files(tmp_path / "new", stored(SINGLE, [1, 1], shade=50), stored(SINGLE, [0]))
    (tmp_path / "new" / "pets_train.parquet").replace(root / "pets_train.parquet")
    again = found(root).train()
    assert int(again.image(0)[0, 0, 0]) == 50
    assert again.image_path(0).stat().st_mtime_ns != written


def plain(root: Path, **columns: Any) -> None:
    """A file that other programs wrote: without the library's words on the columns."""
    root.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), root / "x.parquet")


def content(shade: int) -> bytes:
    file = io.BytesIO()
    picture(shade).save(file, "PNG")
    return file.getvalue()


def test_files_of_other_programs(tmp_path: Path) -> None:
    root = tmp_path / "pets"
    plain(root, label=["cat", "dog", None], photo=[content(1), content(2), content(3)])
    data = found(root)
    assert [sorted({tag for tags in tags_of(data.tagged()) for tag in tags}), len(data.untagged)] == [["cat", "dog"], 1]
    plain(root, label=[0, 1, 1], photo=[content(1), content(2), content(3)])
    assert "the tag holds 0; cast it to ClassLabel, or give the names" in said(found, root)
    write(root, "classes.txt", "ant\nbee\n")
    assert found(root).classes == ("ant", "bee")
    plain(root, label=[0, 1, 2], photo=[content(1), content(2), content(3)])
    assert "x.parquet, row 2: the tag holds 2, and the 2 names have numbers from 0; correct" in said(found, root)


def test_files_without_any_class(tmp_path: Path) -> None:
    plain(tmp_path, label=["none", ""], photo=[content(1), content(2)])
    assert f"{tmp_path / 'x.parquet'}: 0 classes; each image is without a tag, or its tags" in said(found, tmp_path)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (
            {"file": ["a.jpg"], "label": ["cat"]},
            "x.parquet: no column of images (there are file, label); add it, or use",
        ),
        (
            {"image": [content(1)], "kind": ["cat"]},
            "x.parquet: no column of tags, such as label (there are image, kind)",
        ),
        ({"image": [{"bytes": None, "path": "a.jpg"}], "label": ["cat"]}, "no column of images"),
        ({"image": [b""], "label": ["cat"]}, "x.parquet, row 0: holds no image; use the images"),
        ({"image": [content(1)], "label": [1.5]}, "x.parquet, row 0: the tag holds 1.5; cast"),
    ],
)
def test_mistakes(tmp_path: Path, cache: Path, columns: dict[str, Any], expected: str) -> None:
    plain(tmp_path / "pets", **columns)
    assert expected in said(found, tmp_path / "pets")
    assert not list((cache / "afa" / "shards").glob(".*.partial"))


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
@pytest.mark.parametrize("start", [b"", b"PAR1", b"ARROW1\0\0", b"\0" * 99])
def test_broken_files(tmp_path: Path, name: str, start: bytes) -> None:
    (tmp_path / name).write_bytes(start)
    assert f"{tmp_path / name}: cannot be read (" in said(found, tmp_path)
