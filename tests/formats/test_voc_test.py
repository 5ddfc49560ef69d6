"""The archive for the test server: where masks lie, which values they have, and every fault that the check finds."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from afa.cli import main
from afa.data.classes import VOC_CLASSES
from afa.data.palette import voc_palette
from afa.errors import AfaError
from afa.formats.job import MaskItem
from afa.formats.voc_test import FOLDER, MAX_PROBLEMS, check_voc_test
from afa.formats.write import write_format
from made_masks import write_items
from mistakes import refused

NAMES = ("2008_000001", "2008_000004", "2008_000005")


def write_named(folder: Path, ignored: int | None = None) -> list[MaskItem]:
    """Items by `NAMES`, one of them with nothing but ignored pixels."""
    rng = np.random.default_rng(0)
    masks = [rng.integers(0, 3, (20 + i, 30), dtype=np.uint8) for i in range(len(NAMES))]
    if ignored is not None:
        masks[ignored][:] = 255
    return write_items(folder, masks, names=NAMES)


def write(items: list[MaskItem], out: Path, classes: tuple[str, ...] = VOC_CLASSES) -> Path:
    return write_format("voc_test", items, classes, out).path


def test_masks_lie_where_the_server_looks_with_the_values_of_voc(tmp_path: Path) -> None:
    items = write_named(tmp_path)
    path = write(items, tmp_path / "out", classes=("dog", "bird"))
    assert path == tmp_path / "out" / "voc_test.tgz"
    with tarfile.open(path, "r:gz") as archive:
        assert archive.getnames() == [f"results/VOC2012/Segmentation/comp5_test_cls/{name}.png" for name in NAMES]
        for item in items:
            content = archive.extractfile(f"{FOLDER}/{item.name}.png")
            assert content is not None
            with Image.open(io.BytesIO(content.read())) as image:
                assert image.mode == "P"
                values = np.array(image)
                assert image.getpalette() == voc_palette().ravel().tolist()
            label = np.array(Image.open(item.mask_path))
            np.testing.assert_array_equal(values, np.array([0, 12, 3])[label])  # dog is the 12th class, bird the 3rd
    check = check_voc_test(path, names=NAMES, images=tmp_path / "images")
    assert check.problems == ()
    assert str(check) == f"{path}: 3 masks, ready for the server"
    assert str(check_voc_test(path)).endswith("not compared with a list and images")


def test_the_same_masks_give_the_same_bytes(tmp_path: Path) -> None:
    items = write_named(tmp_path)
    first = write(items, tmp_path / "one").read_bytes()
    assert write(items, tmp_path / "one").read_bytes() == write(items, tmp_path / "two").read_bytes() == first


def test_what_cannot_be_sent_is_refused(tmp_path: Path) -> None:
    items = write_named(tmp_path, ignored=1)
    with pytest.raises(AfaError, match=r"2008_000004\.png: .*ignored.*voc_test"):
        write(items, tmp_path / "out")
    with pytest.raises(AfaError, match=r"^class 'zebra' .*PASCAL VOC"):
        write(items, tmp_path / "out", classes=("cat", "zebra"))
    nested = [MaskItem(f"sub/{items[0].name}", items[0].image_path, items[0].mask_path)]
    with pytest.raises(AfaError, match=r"^name 'sub/2008_000001' has a folder"):
        write(nested, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def png(label: NDArray[np.uint8], palette: NDArray[np.uint8] | None = None, mode: str = "P") -> bytes:
    image = Image.fromarray(label)
    if mode == "P":
        image.putpalette((voc_palette() if palette is None else palette).tobytes())
    encoded = io.BytesIO()
    image.convert(mode).save(encoded, format="PNG")
    return encoded.getvalue()


def pack(path: Path, files: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


PLAIN = np.zeros((20, 30), dtype=np.uint8)
GOOD = [(f"{FOLDER}/{name}.png", png(np.full((20 + i, 30), i, dtype=np.uint8))) for i, name in enumerate(NAMES)]
FIRST = GOOD[0][0]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda: GOOD[1:], f"missing: {NAMES[0]}.png"),
        (lambda: [*GOOD, (f"{FOLDER}/x.png", png(PLAIN))], "not in the list: x.png"),
        (lambda: [*GOOD, GOOD[2]], f"twice in the archive: {NAMES[2]}.png"),
        (lambda: [*GOOD, ("x.png", png(PLAIN))], f"not a PNG in {FOLDER}: x.png"),
        (lambda: [*GOOD, (f"{FOLDER}/notes.txt", b"")], f"not a PNG in {FOLDER}: {FOLDER}/notes.txt"),
        (lambda: [(FIRST, png(PLAIN + 255)), *GOOD[1:]], f"values above 20: {NAMES[0]}.png (255)"),
        (lambda: [(FIRST, png(PLAIN + 21)), *GOOD[1:]], f"values above 20: {NAMES[0]}.png (21)"),
        (lambda: [(FIRST, png(PLAIN, mode="L")), *GOOD[1:]], f"not an index PNG: {NAMES[0]}.png (PNG, mode L)"),
        (lambda: [(FIRST, png(PLAIN, voc_palette() + 1)), *GOOD[1:]], f"another palette than VOC's: {NAMES[0]}.png"),
        (
            lambda: [(FIRST, png(PLAIN[:9])), *GOOD[1:]],
            f"not of the image's size: {NAMES[0]}.png (30x9, image 30x20)",
        ),
        (lambda: [(FIRST, b"no"), *GOOD[1:]], f"not a readable PNG: {NAMES[0]}.png"),
    ],
)
def test_each_fault_is_found(tmp_path: Path, change: Callable[[], list[tuple[str, bytes]]], problem: str) -> None:
    write_named(tmp_path)
    assert check_voc_test(pack(tmp_path / "good.tgz", GOOD), names=NAMES, images=tmp_path / "images").problems == ()
    check = check_voc_test(pack(tmp_path / "bad.tgz", change()), names=NAMES, images=tmp_path / "images")
    assert len(check.problems) == 1
    assert check.problems[0].startswith(problem)


def test_many_problems_are_counted(tmp_path: Path) -> None:
    names = [f"{i:03d}" for i in range(MAX_PROBLEMS + 5)]
    check = check_voc_test(pack(tmp_path / "empty.tgz", []), names=names)
    assert check.problems[0].endswith(f"{names[MAX_PROBLEMS - 1]}.png and 5 more")
    assert check.problems[1] == f"empty: no mask in {FOLDER}"


def test_no_archive(tmp_path: Path) -> None:
    with pytest.raises(AfaError, match=r"gone\.tgz: no such archive"):
        check_voc_test(tmp_path / "gone.tgz")
    (tmp_path / "text.tgz").write_text("text")
    with refused("text.tgz: cannot be read as a tar archive (file could not be opened successfully); write it again"):
        check_voc_test(tmp_path / "text.tgz")


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_archive_that_ends_too_early(tmp_path: Path, share: float) -> None:
    path = pack(tmp_path / "short.tgz", [(FIRST, os.urandom(9000))])
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with refused("short.tgz: cannot be read as a tar archive"):
        check_voc_test(path)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_named(tmp_path)
    (tmp_path / "test.txt").write_text("\n".join(NAMES))
    archive = str(pack(tmp_path / "good.tgz", GOOD))
    arguments = ["--list", str(tmp_path / "test.txt"), "--images", str(tmp_path / "images")]
    assert main(["check-voc", archive, *arguments]) == 0
    assert capsys.readouterr().out == f"{archive}: 3 masks, ready for the server\n"
    pack(tmp_path / "good.tgz", GOOD[1:])
    assert main(["check-voc", archive, *arguments]) == 1
    assert capsys.readouterr().out.endswith(f"not ready for the server:\n  missing: {NAMES[0]}.png\n")
