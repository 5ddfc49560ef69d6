from __future__ import annotations

import pickle
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from afa.config import load_config
from afa.data.loader import train_batches
from afa.data.readers.datasets import tagged_dataset
from mistakes import said

datasets = pytest.importorskip("datasets")


def encoded(value: int, *, orientation: int = 1) -> dict[str, Any]:
    """A gray image of 6x4 pixels as the library stores it."""
    content = BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("L", (6, 4), value).save(content, format="PNG", exif=exif)
    return {"bytes": content.getvalue(), "path": None}


def dataset(feature: Any, values: list[Any], column: str = "labels") -> Any:
    images = [encoded(10 * i, orientation=6 if i == 1 else 1) for i in range(len(values))]
    features = datasets.Features({"picture": datasets.Image(), column: feature})
    return datasets.Dataset.from_dict({"picture": images, column: values}, features=features)


def test_one_label() -> None:
    images = tagged_dataset(dataset(datasets.ClassLabel(names=["dog", "cat"]), [1, 0, 1], "label"))
    assert images.classes == ("dog", "cat")
    assert images.names == ("0", "1", "2")
    assert [images.tags(i).tolist() for i in range(3)] == [[0, 1], [1, 0], [0, 1]]
    assert images.image(2).shape == (4, 6, 3)
    assert (images.image(2) == 20).all()
    assert images.image(1).shape == (6, 4, 3)  # upright


def test_several_labels() -> None:
    feature = datasets.List(datasets.ClassLabel(names=["dog", "cat", "cow"]))
    images = tagged_dataset(dataset(feature, [[1, 0], [], None, [2]]))
    assert images.names == ("0", "1", "3")
    assert [images.tags(i).tolist() for i in range(3)] == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert images.negative.tolist() == [False, True, False]
    assert (images.image(2) == 30).all()


def test_texts() -> None:
    rows = dataset(datasets.List(datasets.Value("string")), [["cat"], ["dog", "cat"]], "my tags")
    images = tagged_dataset(rows, tag_column="my tags")
    assert images.classes == ("cat", "dog")
    assert tagged_dataset(rows, tag_column="my tags", classes=("dog", "cat")).tags(0).tolist() == [0, 1]
    refused = said(tagged_dataset, rows, tag_column="my tags", classes=("cat",))
    assert "row 1: unknown tag 'dog'; allowed: cat" in refused


def test_training_takes_them() -> None:
    images = tagged_dataset(dataset(datasets.ClassLabel(names=["dog", "cat"]), [1, 0, 1], "label"))
    config = load_config(
        None, {"data.workers": 0, "augment.crop_size": 32, "schedule.batch_size": 2, "schedule.max_steps": 1}
    )
    batch = next(train_batches(images, config))
    assert batch.image.shape == (2, 3, 32, 32)
    assert (pickle.loads(pickle.dumps(images)).image(2) == 20).all()


def test_mistakes() -> None:
    rows = dataset(datasets.Value("int64"), [5, 6])

    assert "'labels' holds 5; cast" in said(tagged_dataset, rows)
    assert "no image column 'labels'; " in said(tagged_dataset, rows, image_column="labels")
    assert "no tag column 'x'; " in said(tagged_dataset, rows, tag_column="x")
    assert "give one split of it" in said(tagged_dataset, datasets.DatasetDict({"train": rows}))
    broken = dataset(datasets.Value("string"), ["cat"]).cast_column("picture", datasets.Image(decode=False))
    broken = broken.map(lambda row: {"picture": {"bytes": b"no image", "path": None}})
    images = tagged_dataset(broken.cast_column("picture", datasets.Image()))
    assert "row 0: cannot be read as an image" in said(images.image, 0)
    none = dataset(datasets.List(datasets.ClassLabel(names=["cat"])), [[], []])
    assert "has a tag in column 'labels'" in said(tagged_dataset, none)
    assert np.asarray(Image.open(BytesIO(encoded(10)["bytes"]))).max() == 10  # the good one is good
