"""Masks of many files: names, broken images, tags, resuming, and the messages of errors."""

import io
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from afa.config import Config, DataConfig, EvaluationConfig, PseudoConfig
from afa.data.dataset import TaggedImages
from afa.data.images import read_mask
from afa.data.open import open_data
from afa.data.palette import voc_palette
from afa.errors import AfaError
from afa.formats.write import mask_items
from afa.inference import files, masks, prediction
from afa.inference.files import output_names, predict_files, pseudo_files
from afa.inference.masks import PredictSummary
from afa.inference.predictor import Predictor
from afa.inference.stamp import STAMP
from colors import CLASSES, ColorNetwork
from mistakes import refused


def write_image(path: Path, color: int, *, size: tuple[int, int] = (40, 50)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), 60 * color, dtype=np.uint8)).save(path)
    return path


def write_images(folder: Path, colors: dict[str, int] | list[int], **settings: Any) -> Path:
    """Write FOLDER/NAME.png of each color; without names they are numbered from 00."""
    named = colors if isinstance(colors, dict) else {f"{i:02d}": color for i, color in enumerate(colors)}
    for name, color in named.items():
        write_image(folder / f"{name}.png", color, **settings)
    return folder


def make_predictor(shift: float = 0.0, batch_size: int = 0) -> Predictor:
    """A predictor whose network's one weight is `shift`."""
    network = ColorNetwork()
    network.anchor.data += shift
    config = Config(evaluation=EvaluationConfig(batch_size=batch_size))
    return Predictor(network, CLASSES, config=config)  # type: ignore[arg-type]


def run(
    paths: list[Path] | Path, out: Path, *, shift: float = 0.0, batch_size: int = 0, **settings: Any
) -> PredictSummary:
    paths = [paths] if isinstance(paths, Path) else paths
    return predict_files(make_predictor(shift, batch_size), paths, out, **settings)


def files_in(folder: Path) -> list[str]:
    """Files in a folder but for the stamp."""
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(file for file in files if file != STAMP)


def test_files_become_index_png_and_overlay(tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = run([write_image(tmp_path / "one.png", 1), write_image(tmp_path / "two.JPG", 2, size=(9, 70))], out)
    assert files_in(out) == ["masks/one.png", "masks/two.png", "overlays/one.jpg", "overlays/two.jpg"]
    with Image.open(out / "masks" / "one.png") as mask:
        assert mask.mode == "P"
        assert mask.getpalette() == voc_palette().ravel().tolist()
        assert (np.array(mask) == 1).all()
    assert (read_mask(out / "masks" / "two.png") == np.full((9, 70), 2)).all()
    with Image.open(out / "overlays" / "two.jpg") as picture:
        assert (picture.format, picture.size) == ("JPEG", (70, 9))
    assert (summary.written, summary.skipped, summary.failed) == (2, 0, ())
    assert str(summary).startswith(f"2 masks written to {out / 'masks'} in ")


def test_scores_and_no_overlay(tmp_path: Path) -> None:
    image = write_image(tmp_path / "one.png", 3)
    run(image, tmp_path / "out", scores=True, overlay=False)
    assert files_in(tmp_path / "out") == ["masks/one.png", "scores/one.npz"]
    with np.load(tmp_path / "out" / "scores" / "one.npz") as written:
        assert written["classes"].tolist() == ["background", *CLASSES]
        assert written["scores"].dtype == np.float16
        expected = make_predictor()(image).scores
        np.testing.assert_array_equal(written["scores"], expected.astype(np.float16))


def test_folders_keep_their_tree_and_files_are_done_once(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", {"x": 1, "deep/er/x": 2})
    (images / "notes.txt").write_text("not an image")
    out = tmp_path / "out"
    summary = run([images, images / "x.png", images / "deep" / ".." / "x.png"], out, overlay=False)
    assert files_in(out) == ["masks/deep/er/x.png", "masks/x.png"]
    assert read_mask(out / "masks" / "deep" / "er" / "x.png").max() == 2
    assert summary.written == 2


def test_several_folders_keep_their_names(tmp_path: Path) -> None:
    folders = [write_images(tmp_path / "monday", {"x": 1}), write_images(tmp_path / "tuesday", {"x": 2})]
    run(folders, tmp_path / "out", overlay=False)
    assert files_in(tmp_path / "out") == ["masks/monday/x.png", "masks/tuesday/x.png"]
    assert read_mask(tmp_path / "out" / "masks" / "tuesday" / "x.png").max() == 2


def test_images_of_the_same_name_get_longer_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever shares its name keeps its suffix; then comes its folder; last a part of a hash, so that none is lost."""
    data = tmp_path / "data"
    for color, name in enumerate(("a.png", "a.jpg", "b.png", "c/a.png", "x.y.png", "x.png")):
        write_image(data / name, color % 4)
    run(data, tmp_path / "out", overlay=False, tags=dict.fromkeys(("a", "b", "x", "x.y"), CLASSES))
    names = ["a.jpg.png", "a.png.png", "b.png", "c/a.png", "x.png", "x.y.png"]
    assert files_in(tmp_path / "out" / "masks") == sorted(names)
    assert "2 images share their names with others" in capsys.readouterr().err
    items = mask_items(output_names([data], tmp_path / "out").items(), tmp_path / "out")
    assert [item.file_name for item in items] == ["a.jpg", "a.png", "b.png", "c/a.png", "x.png", "x.y.png"]
    files = [write_image(tmp_path / folder / "a.png", 1) for folder in ("i", "j", "k/j")]
    found = output_names(files, tmp_path / "other")
    assert next(iter(found)) == "i/a.png"
    assert [name.partition("~")[0] for name in found] == ["i/a.png", "a.png", "a.png"]
    assert list(found.values()) == files
    assert output_names(files[::-1], tmp_path / "other") == found  # whatever their order


def test_masks_of_an_earlier_call_are_not_images(tmp_path: Path) -> None:
    write_image(tmp_path / "x.png", 1)
    for _ in range(2):
        summary = run(tmp_path, tmp_path, scores=True)
        assert summary.written == 1
    assert files_in(tmp_path / "masks") == ["x.png"]
    # Asked for by name, a folder called masks is as good as any.
    assert run(tmp_path / "masks", tmp_path / "out").written == 1


def test_broken_images_are_reported_and_the_rest_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_images(tmp_path / "images", [i % 4 for i in range(12)])
    encoded = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(encoded, "png")
    (images / "03.png").write_bytes(encoded.getvalue()[:1000])
    (images / "07.png").write_bytes(b"")
    summary = run(images, tmp_path / "out", overlay=False)
    assert files_in(tmp_path / "out") == [f"masks/{i:02d}.png" for i in range(12) if i not in (3, 7)]
    assert summary.written == 10
    assert str(summary).endswith("; 2 images failed")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"skipped: {line}" for line in summary.failed]
    assert lines[0].startswith(f"skipped: {images / '03.png'}: cannot be read")
    assert lines[1].startswith(f"skipped: {images / '07.png'}: the file is empty (0 bytes)")


def test_broken_images_are_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", [1, 2, 3])
    (images / "01.png").write_bytes(b"broken")
    made = make_predictor()
    made.config = replace(made.config, data=DataConfig(skip_broken=True))
    tags = {"00": ("catt",), "01": ("cat",), "02": ("cat",)}
    summary = predict_files(made, [images], tmp_path / "out", tags=tags)
    assert files_in(tmp_path / "out" / "masks") == ["02.png"]
    assert len(summary.failed) == 1  # a wrong tag is no broken image
    assert "'catt'" in summary.failed[0]
    assert len(summary.broken) == 1
    assert "01.png: not an image" in summary.broken[0]
    assert "1 broken image left out" in str(summary)


def test_twelve_bits_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    levels = np.random.default_rng(0).integers(0, 4096, (40, 50)).astype(np.uint16)
    levels[0, 0] = 4095
    Image.fromarray(levels).save(tmp_path / "a.png")
    made = make_predictor()
    predict_files(made, [tmp_path / "a.png"], tmp_path / "out")
    assert "is 4095 of 65535, so they are nearly black; set data.white_level to 4095" in capsys.readouterr().err
    made.config = replace(made.config, data=DataConfig(white_level=4095))
    predict_files(made, [tmp_path / "a.png"], tmp_path / "other")
    assert "warning" not in capsys.readouterr().err
    seen = made.prepare(tmp_path / "a.png").pixels
    np.testing.assert_array_equal(seen[:, :, 0], np.rint(levels / 4095 * 255))
    with Image.open(tmp_path / "a.png") as picture:
        np.testing.assert_array_equal(made.prepare(picture).pixels, seen)


def test_tags_restrict_each_image(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", {"a": 1, "sub/b": 1, "c": 3, "sub/d": 1})
    tags = {"a": ("cat",), "sub/b": ("dog",), "b": ("cat",), "c": ("cat", "horse"), "d": ("cat",)}
    run(images, tmp_path / "out", tags=tags)
    written = tmp_path / "out" / "masks"
    assert read_mask(written / "a.png").min() == 1
    assert 1 not in read_mask(written / "sub" / "b.png")
    assert read_mask(written / "c.png").min() == 3
    # Found by the file's name.
    assert read_mask(written / "sub" / "d.png").min() == 1


def test_unknown_tag_fails_that_image(tmp_path: Path) -> None:
    paths = [write_image(tmp_path / "a.png", 1), write_image(tmp_path / "b.png", 1)]
    summary = run(paths, tmp_path / "out", tags={"a": ("catt",), "b": ("cat",)})
    assert summary.written == 1
    assert summary.failed == (f"{paths[0]}: unknown tag 'catt'; did you mean cat? allowed: cat, dog, horse",)


def test_messages(tmp_path: Path) -> None:
    image = write_image(tmp_path / "a.png", 1)
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "file").write_text("")
    cases: list[tuple[list[Path], dict[str, Any], list[Any]]] = [
        ([image], {"tags": {"b": ("cat",)}}, ["tags", "'a' (1 of 1 images); add"]),
        ([], {}, ["no image to predict; pass"]),
        ([empty], {}, [f"{empty}: no image"]),
        ([tmp_path / "gone.jpg"], {}, [f"{tmp_path / 'gone.jpg'}: no such image", "check"]),
    ]
    for paths, settings, parts in cases:
        with refused(*parts):
            run(paths, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
    with pytest.raises(AfaError, match=r"file/masks: .*Not a directory.*choose"):
        run(image, tmp_path / "file")
    (tmp_path / "out" / "overlays" / "a.jpg").mkdir(parents=True)
    with pytest.raises(AfaError, match=r"overlays/a\.jpg: .*Is a directory"):
        run(image, tmp_path / "out")


def test_a_failed_write_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(masks.np, "savez_compressed", fail)
    image = write_image(tmp_path / "a.png", 1)
    with pytest.raises(AfaError, match=r"scores/a\.npz: .*No space left"):
        run(image, tmp_path / "out", scores=True)
    assert files_in(tmp_path / "out") == []


@pytest.mark.parametrize("length", [246, 250])
@pytest.mark.parametrize("tiles", ["off", 128])
def test_long_names(tmp_path: Path, length: int, tiles: str | int) -> None:
    """What fits is written, and what does not fails alone."""
    images = tmp_path / "images"
    for name in ("b.png", f"{'a' * length}.png", f"{'a' * length}.jpg"):
        write_image(images / name, 1, size=(140, 50))
    made = make_predictor()
    made.network.backbone = SimpleNamespace(min_size=32)  # type: ignore[assignment]
    made = Predictor(made.network, CLASSES, config=made.config, tiles=tiles)
    summary = predict_files(made, [images], tmp_path / "out")
    assert summary.written + len(summary.failed) == 3
    assert [line.rpartition(": ")[2] for line in summary.failed] == (length == 250) * 2 * [
        "cannot be written (File name too long); give the image a shorter name"
    ]
    found = mask_items(output_names([images], tmp_path / "out").items(), tmp_path / "out")
    assert len(found) == summary.written


def test_batches_of_equal_size_write_the_same_files(tmp_path: Path) -> None:
    images = tmp_path / "images"
    for i in range(20):
        write_image(images / f"{i:02d}.png", i % 4, size=(40, 50) if i % 3 else (60, 33 + i))
    (images / "04.png").write_bytes(b"broken")
    one = run(images, tmp_path / "one", scores=True)
    four = run(images, tmp_path / "four", batch_size=4, scores=True)
    assert (four.written, four.failed) == (one.written, one.failed) == (19, one.failed)
    names = files_in(tmp_path / "one")
    assert files_in(tmp_path / "four") == names
    for name in names:
        if name.endswith(".png"):
            expected = read_mask(tmp_path / "one" / name)
            np.testing.assert_array_equal(read_mask(tmp_path / "four" / name), expected)
            assert expected[0, 0] == int(Path(name).stem) % 4


def test_resume_leaves_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, out = write_images(tmp_path / "images", dict.fromkeys("01234", 1)), tmp_path / "out"
    run(images, out, resume=True)
    (out / "masks" / "3.png").unlink()
    write_image(images / "5.png", 2)
    before = {i: (out / "masks" / f"{i}.png").stat().st_mtime_ns for i in (0, 1, 2, 4)}
    capsys.readouterr()
    summary = run(images, out, resume=True)
    assert (summary.written, summary.skipped) == (2, 4)
    assert {i: (out / "masks" / f"{i}.png").stat().st_mtime_ns for i in before} == before
    assert read_mask(out / "masks" / "5.png").max() == 2
    assert re.fullmatch(rf"{out / 'masks'}: 4 of 6 masks .*left.*\n", capsys.readouterr().err)
    # Without it, everything is done anew.
    assert run(images, out).written == 6


def test_resume_does_not_mix_networks_or_settings(tmp_path: Path) -> None:
    image, out = write_image(tmp_path / "a.png", 1), tmp_path / "out"
    run(image, out)
    stamp = json.loads((out / STAMP).read_text())
    assert {"weights", "classes", "protocol", "precision", "max_side"} < stamp.keys()
    for settings, found in (
        ({"shift": 1.0}, "the masks that are there were made with other weights; "),
        ({"tags": {"a": ("cat",)}}, "the masks that are there were made without tags; "),
        ({"overlay": False}, r"overlay was true .* false now"),
    ):
        with pytest.raises(AfaError, match=found) as caught:
            run(image, out, resume=True, **settings)
        assert str(caught.value).startswith(f"{out / STAMP}: ")
        assert "without --resume" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert json.loads((out / STAMP).read_text()) == stamp
    assert run(image, out, shift=1.0).written == 1
    assert run(image, out, shift=1.0, resume=True).skipped == 1


def test_resume_with_other_tags_says_so_in_words(tmp_path: Path) -> None:
    image, out = write_image(tmp_path / "a.png", 1), tmp_path / "out"
    run(image, out, tags={"a": ("cat",)})
    for settings, how in (({"tags": {"a": ("dog",)}}, "with other tags"), ({}, "with tags")):
        with refused(f"{out / STAMP}: the masks that are there were made {how}; predict without --resume"):
            run(image, out, resume=True, **settings)


def test_resume_redoes_masks_that_are_older_than_the_stamp(tmp_path: Path) -> None:
    """A call that replaces the masks of another network was stopped: what it did not reach is not its own."""
    paths = [write_image(tmp_path / f"{name}.png", 1) for name in "ab"]
    out = tmp_path / "out"
    run(paths, out)
    os.utime(out / "masks" / "a.png", (1e9, 1e9))
    summary = run(paths, out, resume=True)
    assert (summary.written, summary.skipped) == (1, 1)


def test_resume_needs_a_stamp(tmp_path: Path) -> None:
    image, out = write_image(tmp_path / "a.png", 1), tmp_path / "out"
    run(image, out)
    (out / STAMP).write_text("{")
    with pytest.raises(AfaError, match=r"predict\.json: broken; .*--resume"):
        run(image, out, resume=True)
    (out / STAMP).unlink()
    with pytest.raises(AfaError, match=r"predict\.json: missing, .*masks in "):
        run(image, out, resume=True)


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, out = write_images(tmp_path / "images", [1] * 40), tmp_path / "out"
    write, lock, left = masks.write_index_png, threading.Lock(), 13

    def write_while_there_is_space(path: Path, label: np.ndarray) -> None:
        nonlocal left
        with lock:
            left -= 1
            if left < 0:
                raise AfaError(f"{path}: cannot be written (No space left on device); free space")
        write(path, label)

    monkeypatch.setattr(masks, "write_index_png", write_while_there_is_space)
    with refused("(No space left on device); free space; 13 masks", "27 missing; ", "--resume"):
        run(paths, out, batch_size=4, overlay=False)
    assert len(files_in(out)) == 13
    left = 100
    summary = run(paths, out, batch_size=4, overlay=False, resume=True)
    assert (summary.written, summary.skipped) == (27, 13)


def test_reading_does_not_run_away_from_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_images(tmp_path / "images", [1] * 150, size=(32, 32))
    counts, lock = {"read": 0, "written": 0, "ahead": 0}, threading.Lock()
    read, write = prediction.read_image, masks.write_index_png

    def count_read(path: Path, **settings: Any) -> np.ndarray:
        with lock:
            counts["read"] += 1
            counts["ahead"] = max(counts["ahead"], counts["read"] - counts["written"])
        return read(path, **settings)

    def write_slowly(path: Path, label: np.ndarray) -> None:
        time.sleep(0.002)
        write(path, label)
        with lock:
            counts["written"] += 1

    monkeypatch.setattr(prediction, "read_image", count_read)
    monkeypatch.setattr(masks, "write_index_png", write_slowly)
    run(paths, tmp_path / "out", batch_size=4, overlay=False)
    assert counts["written"] == 150
    assert counts["ahead"] < 60


def tagged_images(root: Path, colors: dict[str, int]) -> TaggedImages:
    write_images(root / "JPEGImages", colors)
    (root / "lists").mkdir()
    (root / "classes.txt").write_text("\n".join(CLASSES))
    (root / "lists" / "train.txt").write_text("\n".join(colors))
    rows = [f"{name},{CLASSES[color - 1]}" for name, color in colors.items()]
    (root / "lists" / "tags.csv").write_text("\n".join(["image,tags", *rows]))
    return open_data(DataConfig(root=str(root))).train()


@pytest.fixture
def pseudo_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Let a pseudo label be the tagged class on the left half and uncertain on the right."""
    calls: list[dict[str, Any]] = []

    def pseudo_labels(
        network: object, images: list[Tensor], tags: list[np.ndarray], config: Config, **settings: Any
    ) -> Iterator[Tensor]:
        for image, image_tags in zip(images, tags, strict=True):
            calls.append({"tags": image_tags.tolist(), **settings})
            label = torch.full(image.shape[:2], 255)
            label[:, : image.shape[1] // 2] = int(image_tags.argmax()) + 1
            yield label

    monkeypatch.setattr(files, "pseudo_labels", pseudo_labels)
    return calls


def run_pseudo(images: TaggedImages, out: Path, **settings: Any) -> PredictSummary:
    settings = {"config": Config(), **settings}
    return pseudo_files(ColorNetwork(), images, out, **settings)  # type: ignore[arg-type]


def test_pseudo_labels_are_written_with_their_uncertain_pixels(
    tmp_path: Path, pseudo_calls: list[dict[str, Any]]
) -> None:
    images = tagged_images(tmp_path / "data", {"a": 1, "b": 3})
    summary = run_pseudo(images, tmp_path / "out", kind="initial")
    assert files_in(tmp_path / "out") == ["masks/a.png", "masks/b.png"]
    mask = read_mask(tmp_path / "out" / "masks" / "b.png")
    assert (mask[:, :25] == 3).all()
    assert (mask[:, 25:] == 255).all()
    assert [call["tags"] for call in pseudo_calls] == [[1, 0, 0], [0, 0, 1]]
    assert {call["kind"] for call in pseudo_calls} == {"initial"}
    assert (summary.written, summary.skipped, summary.failed) == (2, 0, ())


def test_pseudo_labels_resume(
    tmp_path: Path, pseudo_calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    images = tagged_images(tmp_path / "data", {"a": 1, "b": 2, "c": 3})
    out = tmp_path / "out"
    run_pseudo(images, out, overlay=True)
    assert len(pseudo_calls) == 3
    (out / "masks" / "b.png").unlink()
    before = (out / "masks" / "a.png").stat().st_mtime_ns
    capsys.readouterr()
    summary = run_pseudo(images, out, overlay=True)
    assert len(pseudo_calls) == 4
    assert (out / "masks" / "a.png").stat().st_mtime_ns == before
    assert files_in(out) == [*(f"masks/{name}.png" for name in "abc"), *(f"overlays/{name}.jpg" for name in "abc")]
    assert (summary.written, summary.skipped) == (1, 2)
    assert re.search(r"2 were there .*\(delete", str(summary))
    assert re.fullmatch(rf"{out / 'masks'}: 2 of 3 masks .*left.*\n", capsys.readouterr().err)


def test_pseudo_labels_of_another_kind_or_call_are_not_mixed(
    tmp_path: Path, pseudo_calls: list[dict[str, Any]]
) -> None:
    images, out = tagged_images(tmp_path / "data", {"a": 1, "b": 2}), tmp_path / "out"
    run_pseudo(images, out)
    with pytest.raises(AfaError, match=r"made was .* now; delete"):
        run_pseudo(images, out, kind="initial")
    changed = Config(pseudo=PseudoConfig(iterations=3))
    with pytest.raises(AfaError, match=r"pseudo\.iterations was 10 .*3 now"):
        run_pseudo(images, out, config=changed)
    run([write_image(tmp_path / "c.png", 1)], tmp_path / "predicted")
    with pytest.raises(AfaError, match=r"made was \"predictions\" for"):
        run_pseudo(images, tmp_path / "predicted")
    assert len(pseudo_calls) == 2


def test_pseudo_labels_go_on_after_a_broken_image(tmp_path: Path, pseudo_calls: list[dict[str, Any]]) -> None:
    images = tagged_images(tmp_path / "data", {"a": 1, "b": 2})
    (tmp_path / "data" / "JPEGImages" / "a.png").write_bytes(b"broken")
    summary = run_pseudo(images, tmp_path / "out")
    assert files_in(tmp_path / "out") == ["masks/b.png"]
    assert len(summary.failed) == 1
    assert "a.png: not an image" in summary.failed[0]


def test_pseudo_labels_leave_broken_images_out_where_that_is_asked_for(
    tmp_path: Path, pseudo_calls: list[dict[str, Any]]
) -> None:
    images = tagged_images(tmp_path / "data", {"a": 1, "b": 2})
    (tmp_path / "data" / "JPEGImages" / "a.png").write_bytes(b"broken")
    config = Config(data=DataConfig(skip_broken=True))
    summary = pseudo_files(ColorNetwork(), images, tmp_path / "out", config=config)  # type: ignore[arg-type]
    assert files_in(tmp_path / "out") == ["masks/b.png"]
    assert (len(summary.failed), len(summary.broken)) == (0, 1)


def test_unknown_pseudo_kind(tmp_path: Path) -> None:
    images = tagged_images(tmp_path / "data", {"a": 1})
    with pytest.raises(AfaError, match=r"^labels is 'seg'; use .*refined"):
        run_pseudo(images, tmp_path / "out", kind="seg")
