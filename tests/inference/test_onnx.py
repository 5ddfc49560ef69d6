"""Exported files against the evaluation's own path through the network, at sizes that the export never saw."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from afa.config import Config, EvaluationConfig
from afa.data.images import read_image
from afa.errors import AfaError
from afa.evaluation.protocols import logit_maps
from afa.inference import onnx as export
from afa.inference.onnx import (
    PIXELS_FILE,
    DeployedNetwork,
    export_metadata,
    export_onnx,
    export_torch,
    read_check_images,
)
from afa.model.network import AfaNetwork
from afa.model.registry import build_backbone
from mistakes import refused

CLASSES = ("cat", "dining table", "Äpfel")
SHAPES = ((1, 64, 64), (3, 33, 47), (2, 17, 100), (1, 1, 1), (2, 155, 101))


def make_network(backbone: str) -> AfaNetwork:
    torch.manual_seed(0)
    return AfaNetwork(build_backbone(backbone), 3, decoder_width=16).eval()


def random_batch(batch: int, height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (batch, 3, height, width), dtype=np.uint8)


def expected_logits(network: AfaNetwork, batch: NDArray[np.uint8], *, short_side: int = 0) -> NDArray[np.float32]:
    config = Config(evaluation=EvaluationConfig(short_side=short_side))
    images = [np.ascontiguousarray(image.transpose(1, 2, 0)) for image in batch]
    maps = [logit_maps(network, [image], config)[0] for image in images]
    return np.stack([each.enlarge(image.shape[:2]).numpy() for each, image in zip(maps, images, strict=True)])


def assert_close(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    assert (found.argmax(1) == expected.argmax(1)).mean() >= 0.9999


@pytest.fixture(scope="module", params=["mit_tiny", "dinov2_tiny"])
def onnx_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[AfaNetwork, Path]:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    network = make_network(request.param).train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    path = tmp_path_factory.mktemp("onnx") / "new" / "network.onnx"
    check = export_onnx(network, path, metadata=export_metadata(CLASSES, white_level=4095), max_side=160)
    assert check.path == path
    assert check.difference <= 1e-4
    assert check.agreement >= 0.9999
    assert {batch for batch, _, _ in check.shapes} == {1, 2, 3}
    assert {file.name for file in path.parent.iterdir()} == {"network.onnx", PIXELS_FILE}
    assert network.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    return network.eval(), path


def test_onnx_computes_what_the_evaluation_computes(onnx_file: tuple[AfaNetwork, Path]) -> None:
    import onnxruntime

    network, path = onnx_file
    engine = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for shape in SHAPES:
        batch = random_batch(*shape)
        (found,) = engine.run(None, {"image": batch})
        assert_close(found, expected_logits(network, batch))
    large = random_batch(1, 90, 200)
    (found,) = engine.run(None, {"image": large})
    with torch.no_grad():
        shrunk = DeployedNetwork(network, max_side=160)(torch.from_numpy(large)).numpy()
    assert_close(found, shrunk)
    assert np.abs(found - expected_logits(network, large)).max() > 1e-2 * np.abs(found).max()


def test_the_documented_tiles(onnx_file: tuple[AfaNetwork, Path]) -> None:
    import onnxruntime

    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(def starts.*?)```", page, re.DOTALL)
    engine = onnxruntime.InferenceSession(onnx_file[1], providers=["CPUExecutionProvider"])
    names: dict[str, Any] = {"np": np, "engine": engine, "classes": ["background", *CLASSES]}
    exec(code, names)
    image = np.ascontiguousarray(random_batch(1, 160, 150)[0].transpose(1, 2, 0))
    expected = engine.run(None, {"image": image.transpose(2, 0, 1)[None]})[0][0].argmax(0)
    np.testing.assert_array_equal(names["predict_in_tiles"](image, 160), expected)
    large = np.tile(image, (3, 2, 1))
    found = names["predict_in_tiles"](large, 160)
    assert found.shape == large.shape[:2]
    # The corner lies in one tile only.
    corner = engine.run(None, {"image": np.ascontiguousarray(large[:160, :160].transpose(2, 0, 1)[None])})[0][0]
    second = min(names["starts"](300, 160)[1], names["starts"](480, 160)[1])
    np.testing.assert_array_equal(found[:second, :second], corner.argmax(0)[:second, :second])


def test_onnx_says_what_goes_in_and_out(onnx_file: tuple[AfaNetwork, Path]) -> None:
    import onnx

    model = onnx.load(onnx_file[1])
    onnx.checker.check_model(model)
    (image,), (logits,) = model.graph.input, model.graph.output
    sides = [side.dim_param or side.dim_value for side in image.type.tensor_type.shape.dim]
    assert (image.name, sides) == ("image", ["batch", 3, "height", "width"])
    assert image.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    sides = [side.dim_param or side.dim_value for side in logits.type.tensor_type.shape.dim]
    assert (logits.name, sides) == ("logits", ["batch", 4, "height", "width"])
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["classes"]) == ["background", *CLASSES]


@pytest.mark.parametrize("kind", ["12-bit gray", "transparent", "turned", "plain"])
def test_the_documented_sample_sees_the_pixels_that_training_saw(
    onnx_file: tuple[AfaNetwork, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    network, path = onnx_file
    pixels = np.random.default_rng(1).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    exif = Image.Exif()
    if kind == "12-bit gray":
        picture = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 16)
    elif kind == "transparent":
        picture = Image.fromarray(np.dstack([pixels, pixels[:, :, 0]]), "RGBA")
    else:
        picture = Image.fromarray(pixels)
        exif[0x0112] = 6 if kind == "turned" else 1
    picture.save(tmp_path / "photo.jpg", format="PNG", exif=exif)
    for name in ("network.onnx", "afa_pixels.py"):
        (tmp_path / name).symlink_to(path.with_name(name))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    sample = next(part.split("```")[0] for part in page.split("```python\n") if "InferenceSession" in part)
    seen: dict[str, Any] = {}
    exec(sample, seen)
    expected = read_image(tmp_path / "photo.jpg", white_level=4095)
    np.testing.assert_array_equal(seen["image"][0], expected.transpose(2, 0, 1))
    assert_close(seen["logits"], expected_logits(network, seen["image"]))
    assert seen["classes"] == ["background", *CLASSES]


def test_torch_export_of_float_pixels_at_a_short_side(tmp_path: Path) -> None:
    network = make_network("dinov2_tiny")
    export_torch(network, tmp_path / "network.pt2", metadata=export_metadata(CLASSES), short_side=48, pixels="float32")
    extra = {"metadata.json": ""}
    module = torch.export.load(tmp_path / "network.pt2", extra_files=extra).module()
    assert json.loads(json.loads(extra["metadata.json"])["classes"]) == ["background", *CLASSES]
    for shape in ((1, 64, 64), (3, 33, 47), (2, 155, 101)):
        batch = random_batch(*shape)
        found = module(torch.from_numpy(batch).float())
        assert not found.requires_grad
        assert_close(found.numpy(), expected_logits(network, batch, short_side=48))


@pytest.mark.parametrize("backbone", ["mit_tiny", "dinov2_tiny"])
@pytest.mark.parametrize("short_side", [0, 40])
def test_deployed_network_is_the_single_protocol(backbone: str, short_side: int) -> None:
    network = make_network(backbone)
    deployed = DeployedNetwork(network, short_side=short_side).eval()
    for shape in SHAPES:
        batch = random_batch(*shape)
        with torch.no_grad():
            found = deployed(torch.from_numpy(batch))
            as_float = deployed(torch.from_numpy(batch).double())
        assert_close(found.numpy(), expected_logits(network, batch, short_side=short_side))
        assert torch.equal(found, as_float)


class Recorder(nn.Module):
    """Notes the size of what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.size: tuple[int, ...] = ()

    def segment(self, view: Tensor) -> Tensor:
        self.size = tuple(view.shape[2:])
        return view[:, :, ::4, ::4]


@pytest.mark.parametrize("max_side", [0, 64])
@pytest.mark.parametrize("short_side", [0, 40, 51])
def test_sizes_are_rounded_as_the_predictor_rounds_them(max_side: int, short_side: int) -> None:
    recorder = Recorder()
    deployed = DeployedNetwork(recorder, short_side=short_side, max_side=max_side)  # type: ignore[arg-type]
    for height, width in ((64, 64), (65, 30), (3, 200), (1, 1), (97, 131), (32, 48), (90, 60)):
        deployed(torch.zeros(1, 3, height, width))
        h, w = height, width
        if max_side and max_side / max(h, w) < 1:
            factor = max_side / max(h, w)
            h, w = max(1, round(h * factor)), max(1, round(w * factor))
        if short_side:
            factor = short_side / min(h, w)
            h, w = round(h * factor), round(w * factor)
        assert recorder.size == (max(32, h), max(32, w)), (height, width)


def test_shrinking_before_the_network_looks_like_the_predictors() -> None:
    from afa.inference.predictor import Predictor

    network = make_network("mit_tiny")
    rng = np.random.default_rng(0)
    image = np.array(Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).resize((150, 100)))
    with torch.no_grad():
        found = DeployedNetwork(network, max_side=90)(torch.from_numpy(image.transpose(2, 0, 1).copy())[None])
    expected = Predictor(network, CLASSES, max_side=90)(image)
    # The predictor shrinks with Pillow, which rounds to whole gray levels.
    np.testing.assert_allclose(found.softmax(1)[0].numpy(), expected.scores, atol=0.02)
    assert (found[0].argmax(0).numpy() == expected.label).mean() > 0.98


# --- What is not written ---


def write_checked(path: Path, run: Callable[[NDArray[Any], NDArray[np.float32]], NDArray[np.float32]]) -> None:
    """The check around a file that holds nothing; `run` may spoil the right answer."""
    deployed = DeployedNetwork(make_network("mit_tiny"), max_side=0).eval()

    def load(content: bytes) -> Callable[[NDArray[Any]], NDArray[np.float32]]:
        assert content == b"file"
        return lambda batch: run(batch, deployed(torch.from_numpy(batch)).numpy())

    export._write_checked(deployed, path, lambda: b"file", load, images=(), pixels="uint8")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda _, logits: logits + 2e-4 * np.abs(logits).max(), "differs from PyTorch: logits by 2"),
        (lambda _, logits: logits * np.nan, "differs from PyTorch: logits by nan"),
        (lambda batch, logits: logits if len(batch) == 1 else logits[..., ::-1], "differs from PyTorch"),
        (lambda _, logits: logits[:, :, 1:], "cannot be exported (AssertionError"),
        (lambda _, __: 1 / 0, "cannot be exported (ZeroDivisionError: division by zero)"),
    ],
)
def test_a_file_that_differs_is_not_written(tmp_path: Path, spoil: Any, message: str) -> None:
    path = tmp_path / "network.onnx"
    with refused(f"{path}: ", message):
        write_checked(path, spoil)
    assert not list(tmp_path.iterdir())
    write_checked(path, lambda _, logits: logits)
    assert sorted(tmp_path.iterdir()) == [tmp_path / PIXELS_FILE, path]


def test_one_class_in_a_thousand_pixels_is_enough_to_fail(tmp_path: Path) -> None:
    def swap(_: Any, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        flat = logits.reshape(*logits.shape[:2], -1)[:, :, ::1000]
        flat[:] = np.sort(flat, axis=1)[:, ::-1] * 1e-9
        return logits

    with pytest.raises(AfaError, match="of pixels have the same class"):
        write_checked(tmp_path / "network.onnx", swap)


@pytest.mark.parametrize(
    ("path", "opset", "parts"),
    [
        ("network.pt", None, ["network.pt: ", "pass network.onnx"]),
        ("network.onnx", 17, ["--opset is 17; use 18"]),
        ("network.onnx", None, ["2 GB ", "ONNX ", ".pt2"]),
    ],
)
def test_what_onnx_refuses(monkeypatch: pytest.MonkeyPatch, path: str, opset: int | None, parts: list[str]) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(export, "_MAX_ONNX_BYTES", 1e6)
    with refused(*parts):
        export_onnx(make_network("mit_tiny"), Path(path), opset=opset)


def test_missing_packages_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else name)
    with refused("onnxscript; ", "afa[onnx]"):
        export_onnx(make_network("mit_tiny"), tmp_path / "network.onnx")


def test_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AfaError, match=r"file/network\.pt2: cannot.*choose"):
        export_torch(make_network("mit_tiny"), tmp_path / "file" / "network.pt2")


def test_check_images_are_the_first_of_a_folder(tmp_path: Path) -> None:
    for index in range(10):
        Image.new("RGB", (index + 1, 5), (index, 0, 0)).save(tmp_path / f"{index}.png")
    images = read_check_images(tmp_path)
    assert [image.shape for image in images] == [(5, width, 3) for width in range(1, 9)]
    with pytest.raises(AfaError, match="no such image or folder"):
        read_check_images(tmp_path / "nothing")
