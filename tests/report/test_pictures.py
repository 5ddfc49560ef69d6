"""Examples of a report, and the paper's figures: which pictures, in which colors, on which sheets."""

import json
import shutil
from collections.abc import Callable, Collection
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from afa.cli import main
from afa.config import ModelConfig, PseudoConfig, load_config
from afa.data.dataset import MaskedImages, TaggedImages
from afa.data.open import open_data
from afa.data.palette import voc_palette
from afa.evaluation.protocols import logit_maps, pseudo_labels
from afa.report import pictures
from afa.report.drawing import DISPLAY_SIZE, SHEET_SIDE, blend_heat, blend_label, heat_colors
from afa.report.figures import FIGURES, write_figures
from afa.report.pictures import PICTURES, draw_sheet, write_examples
from afa.runs.network import build_network, load_run
from afa.types import NetworkOutput, normalize_image
from mistakes import refused

CPU = torch.device("cpu")
SIDE, GAP, HEADER = SHEET_SIDE, 6, 26


class FakeNetwork(nn.Module):
    """Says class 1 on the left and background on the right, whatever the image."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.modes: list[bool] = []

    def forward(self, image: Tensor, *, segmentation: bool = True, affinity: bool = True) -> NetworkOutput:
        self.modes.append(self.training)
        rows, columns = image.shape[2] // 4, image.shape[3] // 4
        logits = torch.zeros(image.shape[0], 3, rows, columns)
        logits[:, 1, :, : columns // 2] = 1
        logits[:, 0, :, columns // 2 :] = 1
        return NetworkOutput(torch.zeros(image.shape[0], 2), torch.zeros(image.shape[0], 2, 1, 1), seg_logits=logits)

    def score(self, image: Tensor, affinity: bool) -> NetworkOutput:
        raise AssertionError("pseudo labels are made up")


def fake_pseudo(
    score: Any, image: Tensor, tags: Tensor, *, config: PseudoConfig, want: Collection[str], refined: bool
) -> dict[str, Tensor]:
    assert set(want) == {"cam", "propagated", "refined_label"}
    assert 0 <= image.min() <= image.max() <= 1
    height, width = image.shape[2:]
    ramp = torch.linspace(0, 1, width).expand(height, width)
    absent = torch.full_like(ramp, 5.0)  # must not show: the class is not tagged
    label = torch.full((1, height, width), 255)
    label[:, :, : width // 2] = 2
    cam = torch.stack([ramp, absent] if tags[0, 0] else [absent, ramp])[None]
    return {
        "cam": cam,
        "propagated": torch.cat([torch.full_like(cam[:, :1], 9.0), 0.1 * cam], 1),
        "refined_label": label,
    }


def open_images(folder: Path, tags: list[list[int]], *, masks: bool) -> TaggedImages:
    numbers = range(len(tags))
    for i in numbers:
        Image.fromarray(np.full((64, 96, 3), 40 * i, np.uint8)).save(folder / f"{i}.png")
        Image.fromarray(np.ones((64, 96), np.uint8)).save(folder / f"{i}_mask.png")
    opened: dict[str, Any] = {"classes": ("cat", "dog"), "names": tuple(f"image{i}" for i in numbers)}
    opened |= {"paths": [folder / f"{i}.png" for i in numbers], "tags": np.array(tags, dtype=bool)}
    if not masks:
        return TaggedImages(**opened)
    opened |= {"has_tags": np.ones(len(tags), dtype=bool), "mask_values": {0: 0, 1: 1, 2: 2}}
    return MaskedImages(**opened, mask_paths=[folder / f"{i}_mask.png" for i in numbers], origin="tags.csv")


Draw = Callable[[TaggedImages, int], Path]


@pytest.fixture
def network() -> FakeNetwork:
    return FakeNetwork()


@pytest.fixture
def draw(network: FakeNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Draw:
    """Writes examples of images with made up pseudo labels; gives their folder."""
    monkeypatch.setattr(pictures, "infer_pseudo", fake_pseudo)
    run = tmp_path / "run"
    (run / "examples" / "009").mkdir(parents=True)

    def call(images: TaggedImages, count: int) -> Path:
        write_examples(network, images, run, config=load_config(), count=count)  # type: ignore[arg-type]
        return run / "examples"

    return call


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_pictures_and_index(tmp_path: Path, network: FakeNetwork, draw: Draw) -> None:
    network.train()
    folder = draw(open_images(tmp_path, [[1, 0], [0, 0], [0, 1]], masks=True), 5)
    assert network.training
    assert network.modes == [False, False, False]
    assert json.loads((folder / "index.json").read_text()) == [
        {"name": "image0", "tags": ["cat"], "folder": "000"},
        {"name": "image2", "tags": ["dog"], "folder": "001"},
        {"name": "image1", "tags": [], "folder": "002"},
    ]
    assert {path.name for path in folder.iterdir()} == {"000", "001", "002", "index.json", "sheet.png"}
    assert (read(folder / "002" / "cam.png")[:, :, 0] < 140).all()  # no class, nothing hot
    for number in ("000", "001"):
        found = {path.stem: read(path) for path in (folder / number).iterdir()}
        assert found.keys() == PICTURES.keys()
        assert {picture.shape for picture in found.values()} == {(64, 96, 3)}
        for name in ("cam", "propagated"):
            row = found[name][30].sum(-1).astype(int)
            assert row[-1] > row[48] > row[0], name
    prediction = read(folder / "001" / "prediction.png")[30]
    assert prediction[10, 0] > prediction[10, 1]  # class 1 is red
    assert prediction[90].tolist() == [40, 40, 40]  # the background is the photograph, dimmed


@pytest.mark.parametrize(("tags", "names"), [([[1, 0]] * 5, [0, 2, 4]), ([[0, 0]], [])])
def test_examples_are_spread_evenly(tags: list[list[int]], names: list[int], tmp_path: Path, draw: Draw) -> None:
    folder = draw(open_images(tmp_path, tags, masks=False), 3)
    index = json.loads((folder / "index.json").read_text())
    assert [entry["name"] for entry in index] == [f"image{i}" for i in names]
    for entry in index:  # without masks there is no truth
        assert {path.stem for path in (folder / entry["folder"]).iterdir()} == set(PICTURES) - {"truth"}


def test_real_network_and_sizes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = build_network(ModelConfig(backbone="mit_tiny", weights="", decoder_width=16), 2)
    images = open_images(tmp_path, [[1, 1], [1, 0]], masks=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 400, 3), dtype=np.uint8)).save(tmp_path / "1.png")
    Image.fromarray(np.ones((20, 400), np.uint8)).save(tmp_path / "1_mask.png")
    before = {key: value.clone() for key, value in network.state_dict().items()}
    write_examples(network, images, tmp_path, config=load_config(), count=2)
    assert {read(path).shape for path in (tmp_path / "examples" / "000").iterdir()} == {(64, 96, 3)}
    assert {read(path).shape for path in (tmp_path / "examples" / "001").iterdir()} == {(19, 384, 3)}
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_heat_colors_grow_brighter() -> None:
    colors = heat_colors(np.linspace(0, 1, 50))
    assert colors.shape == (50, 3)
    assert colors.dtype == np.uint8
    assert (np.diff(colors.astype(float) @ [0.2126, 0.7152, 0.0722]) > 0).all()


def test_blends_leave_their_inputs_alone() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
    label = np.zeros((9, 12), np.uint8)
    label[:, 4:] = 3
    label[:, 8:] = 255
    copies = image.copy(), label.copy()
    heat = blend_heat(image, torch.from_numpy(rng.random((2, 9, 12))))
    painted = blend_label(image, torch.from_numpy(label))
    assert (image == copies[0]).all()
    assert (label == copies[1]).all()
    assert heat.shape == painted.shape == image.shape
    assert (painted[4, 4] == voc_palette()[3]).all()  # the outline


def test_images_are_normalized_once(tmp_path: Path, network: FakeNetwork, draw: Draw) -> None:
    seen: list[Tensor] = []
    network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    draw(open_images(tmp_path, [[1, 0]], masks=False), 1)
    torch.testing.assert_close(seen[0], normalize_image(torch.zeros(1, 3, 64, 96)))


def test_the_sheet_has_a_row_an_example_and_leaves_missing_pictures_white(tmp_path: Path) -> None:
    for name, color in (("000", "red"), ("001", "blue")):
        (tmp_path / name).mkdir()
        for key in ("image", "prediction"):
            Image.new("RGB", (40, 20), color).save(tmp_path / name / f"{key}.png")
    one, two = draw_sheet([tmp_path / "000"]), draw_sheet([tmp_path / "000", tmp_path / "001"])
    assert two.width == one.width
    assert two.height > one.height
    colors = {color for _, color in two.getcolors(two.width * two.height) or []}
    assert {(255, 0, 0), (0, 0, 255), (255, 255, 255)} <= colors
    assert (0, 0, 255) not in {color for _, color in one.getcolors(one.width * one.height) or []}


@pytest.fixture(scope="module")
def run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("figures") / "run"
    shutil.copytree(tiny_run, copy)
    return copy


@pytest.fixture(scope="module")
def sheets(run: Path) -> dict[str, np.ndarray]:
    paths = write_figures(run, count=2, device="cpu")
    assert [path.relative_to(run).as_posix() for path in paths] == [f"figures/{name}.png" for name in FIGURES]
    return {path.stem: np.array(Image.open(path)) for path in paths}


def picture(sheet: np.ndarray, row: int, column: int) -> np.ndarray:
    top, left = HEADER + GAP + row * (SIDE + GAP), GAP + column * (SIDE + GAP)
    return sheet[top : top + SIDE, left : left + SIDE].astype(int)


def test_sheets_have_a_row_an_image_and_a_column_a_caption(sheets: dict[str, np.ndarray]) -> None:
    for name, captions in FIGURES.items():
        rows = 4 if name == "affinity" else 2
        expected = (HEADER + GAP + rows * (SIDE + GAP), GAP + len(captions) * (SIDE + GAP), 3)
        assert sheets[name].shape == expected
        for row in range(rows):
            for column in range(len(captions)):
                assert picture(sheets[name], row, column).std() > 3, (name, row, column)


def test_sheets_show_the_labels(sheets: dict[str, np.ndarray], run: Path) -> None:
    loaded = load_run(run, CPU)
    config, images = loaded.config, open_data(loaded.config.data).masked()
    pixels, tags = images.image(0), images.tags(0)
    shown = np.asarray(Image.fromarray(pixels).resize((DISPLAY_SIZE, DISPLAY_SIZE), Image.Resampling.LANCZOS))

    def difference(name: str, column: int, label: torch.Tensor) -> float:
        drawn = blend_label(shown, label)
        small = np.asarray(Image.fromarray(drawn).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        return float(np.abs(small - picture(sheets[name], 0, column)).mean())

    for column, (refine, kind) in enumerate(product((False, True), ("cam", "propagated")), start=1):
        (label,) = pseudo_labels(loaded.network, [pixels], [tags], config, kind=kind, refine=refine)
        assert difference("labels", column, label) < 2, column
    plain = logit_maps(loaded.network, [pixels], config)[0].label(pixels.shape[:2])
    assert difference("results", 1, plain) < 2
    assert difference("results", 3, torch.from_numpy(images.mask(0))) < 2
    assert difference("results", 3, torch.zeros_like(plain)) > 4


def test_query_points_are_marked_on_all_three(sheets: dict[str, np.ndarray]) -> None:
    for row in range(4):
        for column in range(3):
            yellow = np.abs(picture(sheets["affinity"], row, column) - (255, 220, 40)).sum(-1) < 30
            assert yellow.sum() > 20, (row, column)


def test_figures_command_and_data_that_is_gone(
    run: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / "figures", ignore_errors=True)
    assert main(["report", str(run), "--figures", "--data", str(tiny_data)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [*(str(run / "figures" / f"{name}.png") for name in FIGURES), str(run / "report.html")]
    assert all(Path(line).is_file() for line in lines)
    with refused(tmp_path / "gone"):
        write_figures(run, data=str(tmp_path / "gone"))
