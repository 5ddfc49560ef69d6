"""`afa.ray`: the masks of a Ray data set and of Spark's data frames are those of `afa predict`."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import afa
from afa.ray import Segmenter, segment
from mistakes import refused


@pytest.fixture(scope="module")
def written(tiny_run: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The masks that `afa predict` writes of four images, by file name."""
    out = tmp_path_factory.mktemp("ray") / "out"
    afa.predict(tiny_run, images(tiny_data), out, overlay=False)
    return {path.name: (out / "masks" / f"{path.stem}.png").read_bytes() for path in images(tiny_data)}


def images(tiny_data: Path) -> list[Path]:
    return sorted((tiny_data / "JPEGImages").iterdir())[:4]


def test_cells_of_every_kind_and_broken_ones(tiny_run: Path, tiny_data: Path, written: dict[str, bytes]) -> None:
    one, two, three, four = images(tiny_data)
    cells: list[Any] = [one.read_bytes(), str(two), {"bytes": three.read_bytes(), "path": "c.jpg"}]
    cells += [{"bytes": None, "path": str(four)}, b"broken", None, {"bytes": b"torn", "path": "d.jpg"}]
    batch = {"image": np.array(cells, object), "key": np.arange(7)}
    segmenter = pickle.loads(pickle.dumps(Segmenter(tiny_run, device="cpu")))
    result = segmenter(batch)
    assert list(result) == ["key", "mask", "error"]
    assert list(result["mask"]) == [written[path.name] for path in (one, two, three, four)] + [None] * 3
    assert list(result["error"][:4]) == [""] * 4
    assert all("\n" not in words and words for words in result["error"][4:])
    assert result["error"][6].startswith("d.jpg: ")
    assert len(pickle.dumps(segmenter)) < 2000
    with refused("there is no column 'photo', only image, key"):
        Segmenter(tiny_run, column="photo")(batch)


def test_tags_rule_classes_out(tiny_run: Path, tiny_data: Path) -> None:
    predictor = afa.Predictor.from_run(tiny_run, device="cpu")
    name = predictor.classes[0]
    tags = np.array([[name], ["unicorn"]], object)
    batch = {"image": np.array([str(path) for path in images(tiny_data)[:2]], object), "tags": tags}
    result = Segmenter(tiny_run, tags="tags", device="cpu", keep_images=True)(batch)
    assert result["mask"][1] is None
    assert "'unicorn'" in result["error"][1]
    expected = predictor(str(images(tiny_data)[0]), [name])
    assert result["error"][0] == ""
    from afa.data.palette import index_png

    assert result["mask"][0] == index_png(expected.label)


def test_data_frames_as_spark_hands_them_over(tiny_run: Path, tiny_data: Path, written: dict[str, bytes]) -> None:
    pandas = pytest.importorskip("pandas")
    paths = images(tiny_data)
    rows = [pandas.DataFrame({"path": [path.name], "content": [path.read_bytes()]}) for path in paths]
    frames = list(Segmenter(tiny_run, column="content", device="cpu").frames(iter(rows)))
    assert [list(frame) for frame in frames] == [["path", "mask", "error"]] * 4
    assert {frame["path"][0]: frame["mask"][0] for frame in frames} == written


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)  # readers need some, too
    yield ray
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_actors_of_ray(cluster: Any, tiny_run: Path, tiny_data: Path, written: dict[str, bytes]) -> None:
    paths = [str(path) for path in images(tiny_data)]
    dataset = cluster.data.read_binary_files(paths, include_paths=True)
    dataset = dataset.union(cluster.data.from_items([{"bytes": b"torn", "path": "torn.jpg"}]))
    rows = segment(dataset, tiny_run, column="bytes", actors=2, batch_size=2, device="cpu").take_all()
    assert {Path(row["path"]).name: row["mask"] for row in rows} == {**written, "torn.jpg": None}
    assert [row["error"] != "" for row in sorted(rows, key=lambda row: row["path"])] == [False] * 4 + [True]
    arrays = segment(cluster.data.read_images(paths), tiny_run, actors=(1, 2), device="cpu").take_all()
    assert sorted(row["mask"] for row in arrays) == sorted(written.values())


def test_without_ray_a_line_says_what_to_install(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray.data", None)
    with refused("Ray Data is not installed; pip install 'afa[ray]'"):
        segment(None, tiny_run)  # type: ignore[arg-type]
