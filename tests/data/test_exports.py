from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest

from afa.data.readers.tag_files import TagFile, read_tag_file
from afa.errors import AfaError

COCO: dict[str, Any] = {
    "info": {"year": 2014},
    "images": [
        {"id": 7, "file_name": "b.jpg", "height": 4, "width": 6},
        {"id": 3, "file_name": "train/a.jpg", "height": 4, "width": 6},
        {"id": 5, "file_name": "c.jpg", "height": 4, "width": 6},
    ],
    "annotations": [
        {"id": 1, "image_id": 3, "category_id": 90, "segmentation": [[12345.5, 0, 5, 0, 5, 3]], "iscrowd": 0},
        {"id": 2, "image_id": 3, "category_id": 2, "segmentation": {"counts": "SECRETRUNS", "size": [4, 6]}},
        {"id": 3, "image_id": 3, "category_id": 2, "segmentation": [], "bbox": [1, 2, 3, 4]},
        {"id": 4, "image_id": 7, "category_id": 17, "iscrowd": 1},
    ],
    "categories": [{"id": 90, "name": "toothbrush"}, {"id": 2, "name": "bicycle"}, {"id": 17, "name": "cat"}],
}


def write(folder: Path, content: Any, name: str = "export.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def tags_of(path: Path) -> dict[str, tuple[str, ...]]:
    return {entry.image: entry.tags for entry in read_tag_file(TagFile(path)).entries.values()}


def message(path: Path) -> str:
    with pytest.raises(AfaError) as caught:
        read_tag_file(TagFile(path))
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text


def test_coco(tmp_path: Path) -> None:
    path = write(tmp_path, COCO)
    assert TagFile(path).kind == "coco"
    assert read_tag_file(TagFile(path)).classes == ("bicycle", "cat", "toothbrush")
    assert tags_of(path) == {"b.jpg": ("cat",), "train/a.jpg": ("bicycle", "toothbrush"), "c.jpg": ()}
    assert tags_of(write(tmp_path, dict(reversed(COCO.items())))) == tags_of(path)


def reachable(value: object) -> list[object]:
    """All objects that an object leads to, but for modules, classes and functions."""
    found: dict[int, object] = {}
    queue = [value]
    while queue:
        item = queue.pop()
        if id(item) not in found and not isinstance(item, type) and not callable(item):
            found[id(item)] = item
            queue += gc.get_referents(item)
    return list(found.values())


def test_no_outline_of_coco_is_held(tmp_path: Path) -> None:
    held = reachable(read_tag_file(TagFile(write(tmp_path, COCO))))
    assert "cat" in held
    assert 12345.5 not in held
    assert not [item for item in held if isinstance(item, str) and ("SECRET" in item or "segmentation" in item)]
    assert 12345.5 in reachable(COCO)  # the search does find it


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"images": []}, "no images; give"),
        ({"categories": []}, "no categories"),
        ({"images": [{"id": 1}]}, "image 1 has no file_name"),
        ({"images": COCO["images"] * 2}, "image id 7 is there twice"),
        ({"categories": COCO["categories"] * 2}, "category id 90 is there twice"),
        ({"categories": [{"id": 90}]}, "category 90 has no name"),
        ({"annotations": [{"image_id": 9, "category_id": 2}]}, "image id 9, which"),
        ({"annotations": [{"image_id": 3, "category_id": 1}]}, "category id 1, which"),
        ({"annotations": [{"image_id": 3}]}, "{'image_id': 3} has no whole number as category_id"),
        ({"annotations": [5]}, "5 has no whole number as image_id"),
        ({"categories": [{"id": 2, "name": "a"}, {"id": 90, "name": "a"}, {"id": 17, "name": "b"}]}, "class 'a' is"),
    ],
)
def test_coco_mistakes(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    assert expected in message(write(tmp_path, COCO | change))


def result(kind: str, names: list[Any]) -> dict[str, Any]:
    return {"from_name": "x", "to_name": "image", "type": kind, "value": {kind: names}}


def test_label_studio(tmp_path: Path) -> None:
    tasks = [
        {
            "id": 1,
            "data": {"image": "/data/upload/3/0a1b2c3d-my%20cat.jpg"},
            "annotations": [
                {"was_cancelled": True, "result": [result("choices", ["canceled"])]},
                {"result": [result("choices", ["cat", "dog"]), result("taxonomy", [["animal", "bird"]])]},
                {"result": [result("rectanglelabels", ["cow"]), {"type": "rating", "value": {"rating": 3}}]},
            ],
            "predictions": [{"result": [result("choices", ["predicted"])]}],
        },
        {"id": 2, "data": {"note": "x", "photo": "/data/local-files/?d=pets/b.jpg"}, "annotations": []},
        {"id": 3, "data": {"image": "s3://bucket/pets/c.jpg"}, "annotations": [{"result": []}]},
        {"id": 4, "data": {"image": "pets/d.PNG"}, "annotations": [{"result": [result("brushlabels", ["cat"])]}]},
    ]
    path = write(tmp_path, tasks)
    assert TagFile(path).kind == "labelstudio"
    assert tags_of(path) == {
        "0a1b2c3d-my cat.jpg": ("bird", "cat", "cow", "dog"),
        "pets/b.jpg": (),
        "c.jpg": (),
        "pets/d.PNG": ("cat",),
    }


def test_label_studio_short_export(tmp_path: Path) -> None:
    tasks = [
        {"image": "http://localhost:8080/data/upload/1/a.jpg", "id": 1, "choice": "cat", "annotator": 1},
        {"image": "b.jpg", "id": 2, "animals": {"choices": ["cat", "dog"]}, "lead_time": 2.5},
        {"image": "c.jpg", "id": 3, "kind": [["animal", "bird"]], "annotator": 1},
        {"image": "d.jpg", "id": 4, "boxes": [{"x": 1, "rectanglelabels": ["cow"]}], "annotator": 1},
    ]
    path = write(tmp_path, tasks)
    assert TagFile(path).kind == "labelstudio"
    assert tags_of(path) == {"a.jpg": ("cat",), "b.jpg": ("cat", "dog"), "c.jpg": ("bird",), "d.jpg": ("cow",)}


def test_label_studio_mistakes(tmp_path: Path) -> None:
    task = {"id": 1, "data": {"text": "hello"}, "annotations": []}
    assert "task 1: names no image; export" in message(write(tmp_path, [task]))
    good = {"id": 1, "data": {"image": "a.jpg"}, "annotations": [{"result": [result("choices", ["cat"])]}]}
    assert "task 2: is no task; export" in message(write(tmp_path, [good, 5]))


CVAT = """<?xml version="1.0" encoding="utf-8"?>
<annotations><version>1.1</version>
<meta><job><labels>
  <label><name>dog</name><color>#ff0000</color><attributes><attribute><name>age</name></attribute></attributes></label>
  <label><name>cat</name></label><label><name>unused</name></label>
</labels></job></meta>
<image id="0" name="x/a.jpg" subset="Train" width="6" height="4">
  <tag label="cat" source="manual"><attribute name="age">3</attribute></tag><tag label="dog"></tag><tag label="cat"/>
</image>
<image id="1" name="b &amp; c.jpg" subset="Validation" width="6" height="4">
  <polygon label="dog" points="12345.5,1;2,2;3,3"></polygon></image>
<image id="2" name="d.jpg" width="6" height="4"/>
</annotations>"""


def test_cvat(tmp_path: Path) -> None:
    path = write(tmp_path, CVAT, "annotations.xml")
    file = read_tag_file(TagFile(path))
    assert file.classes == ("dog", "cat", "unused")
    assert file.declared
    assert [(entry.image, entry.tags, entry.split) for entry in file.entries.values()] == [
        ("x/a.jpg", ("dog", "cat"), "Train"),
        ("b & c.jpg", ("dog",), "Validation"),
        ("d.jpg", (), ""),
    ]
    assert not [item for item in reachable(file) if isinstance(item, str) and "12345" in item]


def test_cvat_without_list_of_labels(tmp_path: Path) -> None:
    path = write(tmp_path, '<annotations><image name="a.jpg"><tag label="b"/></image></annotations>', "a.xml")
    found = read_tag_file(TagFile(path))
    assert (found.classes, found.declared) == (("b",), False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<annotations>", "not an XML file (no element found"),
        ("{}", "not an XML file (not well-formed"),
        ("<annotation/>", "is <annotation>, not <annotations>; export"),
        ('<annotations><image id="0"/></annotations>', "image 1 has no name"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotations/>', "(a); remove the DOCTYPE"),
        ("<annotations/>", "0 classes; give 1 to 254"),
    ],
)
def test_cvat_mistakes(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in message(write(tmp_path, text, "a.xml"))
