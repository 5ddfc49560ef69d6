"""Prediction in tiles: how tiles lie and blend, equality with one view, files of every format, messages."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from afa.cli import main
from afa.config import Config, EvaluationConfig, load_config
from afa.data.dataset import TaggedImages
from afa.data.images import read_mask
from afa.evaluation.protocols import cam_limits, pseudo_labels
from afa.inference.files import predict_files, pseudo_files, pseudo_tiling
from afa.inference.masks import PredictSummary, summarize_masks
from afa.inference.predictor import Predictor
from afa.inference.tiles import ArrayRows, Span, Window, blend, cut
from afa.runs.network import load_run
from colors import CLASSES, ColorNetwork
from mistakes import refused
from tiny import write_untrained

GEO = {33550: (0.5, 0.5, 0.0), 34735: (1, 1, 0, 0)}


def picture(height: int, width: int, *, seed: int = 0) -> np.ndarray:
    """Soft blobs of random colors."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 40 + 2, width // 40 + 2, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def color_predictor(tiles: str | int = "off", *, max_side: int = 1024, **settings: Any) -> Predictor:
    network = ColorNetwork()
    network.backbone = SimpleNamespace(min_size=32)  # type: ignore[assignment]
    config = Config(evaluation=EvaluationConfig(**settings))
    return Predictor(network, CLASSES, config=config, tiles=tiles, max_side=max_side)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("untrained")
    write_untrained(run, CLASSES)
    return run


@pytest.mark.parametrize("grid", [14, 16, 32])
@pytest.mark.parametrize("length", [1, 127, 300, 448, 449, 480, 600, 850, 1000, 4321, 30_000])
def test_tiles_cover_an_axis(length: int, grid: int) -> None:
    side = 448
    spans = cut(length, side, grid=grid)
    assert (spans[0].start, spans[0].low, spans[-1].stop, spans[-1].high) == (0, 0, length, length)
    total = np.zeros(length)
    for span, following in zip(spans, [*spans[1:], None], strict=True):
        assert span.start % grid == 0
        assert span.stop - span.start <= side
        assert len(spans) == 1 or span.stop - span.start > side - grid
        assert span.start <= span.low < span.end <= span.high <= span.stop
        weights = span.weights()
        assert weights.min() > 0
        total[span.low : span.high] += weights
        if following:
            assert following.low == span.end
            assert following.rise == span.fall >= 2
            assert following.middle[0] == span.middle[1]
            # The border of a tile is not asked.
            assert min(following.low - following.start, span.stop - span.high) >= side // 20
    np.testing.assert_allclose(total, 1, atol=1e-6)


def test_blending_weights_follow_the_ramps() -> None:
    """Two tiles that say 0 and 1: between them the blend rises evenly, elsewhere one of them is all."""
    rows, columns = cut(160, 160, grid=32), cut(250, 160, grid=32)
    assert len(columns) == 2

    def logits(row: Span) -> list[Tensor]:
        return [torch.full((1, 160, span.stop - span.start), float(i)) for i, span in enumerate(columns)]

    ((_, parts),) = [(row, torch.cat(list(parts), 2)) for row, parts in blend(rows, columns, logits)]
    line = parts[0, 7].numpy()
    ramp = slice(columns[1].low, columns[1].low + columns[1].rise)
    assert (line[: ramp.start] == 0).all()
    assert (line[ramp.stop :] == 1).all()
    np.testing.assert_allclose(np.diff(line[ramp]), 1 / columns[1].rise, atol=1e-6)


def test_tiles_that_agree_blend_to_what_they_say() -> None:
    whole = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 700, 500)).astype(np.float32))
    rows, columns = cut(700, 160, grid=32), cut(500, 160, grid=32)

    def logits(row: Span) -> list[Tensor]:
        return [whole[:, row.start : row.stop, span.start : span.stop].clone() for span in columns]

    found = torch.cat([torch.cat(list(parts), 2) for _, parts in blend(rows, columns, logits)], 1)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-6)


def test_a_window_holds_the_rows_that_are_asked_for() -> None:
    pixels = picture(90, 5)
    window = Window(ArrayRows(pixels))
    for start, stop in ((0, 40), (0, 40), (30, 70), (65, 90)):
        np.testing.assert_array_equal(window.move(start, stop), pixels[start:stop])


@pytest.mark.parametrize("protocol", ["single", "multiscale", "single+crf"])
def test_a_network_that_looks_nowhere_else_sees_no_tiles(protocol: Any) -> None:
    """Its maps are the same in every tile, so that the class map is that of one view, ramps included."""
    image = picture(336, 416)
    settings = {"protocol": protocol, "scales": (1.0,), "crf_iterations": 1, "crf_bilateral_weight": 0.0}
    tiled, whole = color_predictor(160, **settings)(image), color_predictor(long_side=416, **settings)(image)
    assert (tiled.label != whole.label).mean() <= (0.001 if "crf" in protocol else 0)
    assert len(np.unique(tiled.label)) == 4
    assert (tiled.scores.argmax(0) != tiled.label).mean() < 0.001  # of equal scores either
    np.testing.assert_allclose(tiled.scores.sum(0), 1, atol=1e-5)


def test_away_from_seams_a_tile_decides_alone(untrained: Path) -> None:
    predictor = Predictor.from_run(untrained, device="cpu", tiles=160)
    image = picture(300, 330)
    label = predictor(image).label
    seen = Predictor(predictor.network, predictor.classes, config=predictor.config)
    rows, columns = (cut(length, 160, grid=predictor.tiling.grid) for length in image.shape[:2])
    for row in rows:
        for column in columns:
            own = seen(image[row.start : row.stop, column.start : column.stop].copy()).label
            inner = (slice(row.low + row.rise, row.end), slice(column.low + column.rise, column.end))
            there = tuple(
                slice(s.start - span.start, s.stop - span.start) for s, span in zip(inner, (row, column), strict=True)
            )
            np.testing.assert_array_equal(label[inner], own[there])


def test_auto_tiles_what_would_be_scaled_down() -> None:
    predictor = color_predictor("auto", max_side=160)
    predictor(picture(100, 160))
    assert predictor.network.sizes == [(100, 160)]  # type: ignore[comparison-overlap]
    predictor.network.sizes.clear()  # type: ignore[operator]
    predictor(picture(100, 300))
    assert predictor.network.sizes == [(100, 160), (100, 160), (100, 140)]  # type: ignore[comparison-overlap]
    assert color_predictor("auto", max_side=1000, short_side=300).tiling.side == 288
    assert color_predictor("off").tiling.side == 0


def test_images_up_to_a_side_keep_their_resolution() -> None:
    """Beyond `max_side` they are one view as large as a tile may be."""
    predictor = color_predictor(320, max_side=160)
    predictor(picture(200, 310))
    assert predictor.network.sizes == [(200, 310)]  # type: ignore[comparison-overlap]


def predict(paths: list[Path], out: Path, *, tiles: str | int = 160, **settings: Any) -> PredictSummary:
    return predict_files(color_predictor(tiles), paths, out, **settings)


def test_files_of_every_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = picture(300, 400)
    gray = np.asarray(Image.fromarray(image).convert("L"))
    images = tmp_path / "images"
    images.mkdir()
    Image.fromarray(image).save(images / "rgb.png")
    Image.fromarray(image).save(images / "photo.jpg", quality=95)
    Image.fromarray(image).save(images / "rgb8.tif", compression="tiff_lzw", tiffinfo=GEO)
    Image.fromarray(gray.astype(np.uint16) * 257).save(images / "gray16.tif")
    Image.fromarray(gray.astype(np.uint16) * 257).save(images / "deep.png")
    Image.fromarray(image[:90, :90]).save(images / "small.tif")
    out = tmp_path / "out"
    summary = predict([images], out)
    assert (summary.written, summary.failed) == (6, ())
    line = "deep: 400 x 300 pixels, in 9 tiles of at most 160 x 160; 4 more images in tiles too"
    assert capsys.readouterr().err.splitlines() == [line]
    names = ["deep.png", "gray16.tif", "photo.png", "rgb.png", "rgb8.tif", "small.png"]
    assert sorted(path.name for path in (out / "masks").iterdir()) == names
    whole = color_predictor()
    for name in names:
        (source,) = images.glob(f"{Path(name).stem}.*")
        np.testing.assert_array_equal(read_mask(out / "masks" / name), whole(source).label)
    with Image.open(out / "masks" / "rgb8.tif") as mask:
        assert {tag: mask.tag_v2[tag] for tag in GEO} == GEO
    with Image.open(out / "overlays" / "rgb.jpg") as overlay:
        assert overlay.size == (400, 300)
    assert predict([images], out, resume=True).skipped == 6
    with refused("predict.json: tiles was 160 for the masks that are there and is 192 now"):
        predict([images], out, tiles=192, resume=True)


def test_an_image_has_one_mask(tmp_path: Path) -> None:
    """Whether a call writes it as TIFF or as PNG, that of an earlier call makes room."""
    Image.fromarray(picture(300, 200)).save(tmp_path / "a.tif")
    masks = tmp_path / "out" / "masks"
    for tiles, name in ((160, "a.tif"), ("off", "a.png"), (160, "a.tif")):
        predict([tmp_path / "a.tif"], tmp_path / "out", tiles=tiles)
        assert [path.name for path in masks.iterdir()] == [name]


def test_tags_and_broken_images(tmp_path: Path) -> None:
    for name in ("a", "b"):
        Image.fromarray(picture(300, 200)).save(tmp_path / f"{name}.png", compress_level=0)
    content = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(content[: len(content) // 2])
    out = tmp_path / "out"
    summary = predict([tmp_path / "a.png", tmp_path / "b.png"], out, tags={"a": ["dog"], "b": ["cat"]})
    assert set(np.unique(read_mask(out / "masks" / "a.png"))) == {0, 2}
    assert summary.written == 1
    assert summary.failed[0].startswith(f"{tmp_path / 'b.png'}: cannot be read as an image (the file is truncated")
    assert [path.name for path in (out / "masks").iterdir()] == ["a.png"]


def test_mistakes(tmp_path: Path) -> None:
    for tiles in ("all", "96", -1, "1.5"):
        with refused(f"--tiles is {tiles}; use auto, off, or a side of at least 128"):
            color_predictor(tiles)
    Image.fromarray(picture(200, 200)).save(tmp_path / "a.png")
    with refused("--scores", "tiles", "leave out"):
        predict([tmp_path / "a.png"], tmp_path / "out", scores=True)


def test_the_limit_is_a_flag(tmp_path: Path, untrained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(picture(150, 200)).save(tmp_path / "a.png")
    call = ["predict", str(untrained), str(tmp_path / "a.png"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    for tiles in ("off", "128"):
        assert main([*call, "--tiles", tiles, "--max-pixels", "29999"]) == 1
        assert "a.png: more than 29,999 pixels; " in capsys.readouterr().err
        assert main([*call, "--tiles", tiles, "--max-pixels", "0"]) == 0
        assert main([*call, "--tiles", tiles, "--max-pixels", "-1"]) == 2
        line = "error: --max-pixels is -1; use 1 or more pixels, or 0 for no limit"
        assert capsys.readouterr().err.splitlines()[-1].endswith(line)


def tagged(folder: Path, **images: np.ndarray) -> TaggedImages:
    folder.mkdir()
    for name, pixels in images.items():
        Image.fromarray(pixels).save(folder / f"{name}.png")
    paths = [folder / f"{name}.png" for name in images]
    tags = np.tile([True, False, True], (len(images), 1))
    return TaggedImages(classes=CLASSES, names=tuple(images), paths=paths, tags=tags)


SETTINGS = {"pseudo.scales": (1.0, 0.5), "augment.crop_size": 160, "pseudo.affinity_radius": 2}


@pytest.mark.parametrize("kind", ["cam", "refined"])
def test_the_cam_of_an_image_has_one_range(untrained: Path, kind: str) -> None:
    """One tile with the range of its image is the image; and a tile has another label where the range is another."""
    config = load_config(None, SETTINGS)
    network = load_run(untrained, torch.device("cpu")).network
    image, tags = picture(160, 192), np.array([1, 0, 1], np.float32)
    limits = cam_limits(network, [image], config)
    assert (limits[1] > limits[0]).all()
    (expected,) = pseudo_labels(network, [image], [tags], config, kind=kind)
    (found,) = pseudo_labels(network, [image], [tags], config, kind=kind, limits=limits)
    assert (found != expected).float().mean() < 0.001
    limits = torch.stack([limits[0], 4 * limits[1]])  # elsewhere in the image the CAM is four times as high
    (lower,) = pseudo_labels(network, [image], [tags], config, kind=kind, limits=limits)
    assert (lower == 0).sum() > (expected == 0).sum()


def test_pseudo_labels_in_tiles(tmp_path: Path, untrained: Path) -> None:
    images = tagged(tmp_path / "images", small=picture(100, 128), large=picture(300, 210, seed=1))
    config = load_config(None, SETTINGS)
    network, out = load_run(untrained, torch.device("cpu")).network, tmp_path / "out"
    tiling = pseudo_tiling(network, config, 160, max_pixels=None)
    summary = pseudo_files(network, images, out, config=config, kind="cam", tiling=tiling, overlay=True)
    assert (summary.written, summary.failed) == (2, ())
    for name, size in (("small", (100, 128)), ("large", (300, 210))):
        mask = read_mask(out / "masks" / f"{name}.png")
        assert mask.shape == size
        assert set(np.unique(mask)) <= {0, 1, 3}
    found = summarize_masks(summary, images, out)
    assert found.num_images == 2
    limited = pseudo_tiling(network, config, 160, max_pixels=12_799)
    failed = pseudo_files(network, images, tmp_path / "no", config=config, tiling=limited).failed
    assert [line.partition(" more than ")[2][:6] for line in failed] == ["12,799"] * 2
    assert pseudo_tiling(network, config, "auto", max_pixels=None).side == 160
    (out / "masks" / "large.png").rename(out / "masks" / "kept.png")
    label = read_mask(out / "masks" / "kept.png")
    # As a TIFF it is counted alike.
    tiff = tagged(tmp_path / "tiff", large=picture(300, 210, seed=1))
    Image.open(tiff.image_path(0)).save(tmp_path / "tiff" / "large.tif")
    again = TaggedImages(classes=CLASSES, names=("large",), paths=[tmp_path / "tiff" / "large.tif"], tags=tiff.tagged)
    other = tmp_path / "other"
    summary = pseudo_files(network, again, other, config=config, kind="cam", tiling=tiling)
    np.testing.assert_array_equal(read_mask(other / "masks" / "large.tif"), label)
    coverage = 100 * float(((label > 0) & (label < 255)).mean())
    assert summarize_masks(summary, again, other).coverage == pytest.approx(coverage)
