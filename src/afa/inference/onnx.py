"""Writes a network as one file for other programs: ONNX or torch.export, raw pixels in, logits out.

Normalization and resizing are inside the file, batch and size are free, and a file stays only where it computes what
PyTorch computes. Weights and configuration for afa itself are up to `afa.inference.hub`.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import io
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate

from afa import __version__
from afa.data import pixels as pixels_module
from afa.data.files import find_images
from afa.data.images import read_image
from afa.data.pixels import WHITE_LEVEL
from afa.demo.shapes import draw_shapes
from afa.errors import AfaError, first_line, quiet
from afa.evaluation.protocols import MIN_SIDE
from afa.model.network import AfaNetwork
from afa.runs.files import write_whole
from afa.runtime import image_progress
from afa.types import IMAGE_MEAN, IMAGE_STD

PIXELS_FILE: Final = "afa_pixels.py"
"""Beside each exported file: the code that turns pictures into its pixels, which needs NumPy and Pillow alone."""

Pixels = Literal["uint8", "float32"]

MAX_SIDE: Final = 1024
"""Longer side above which images are scaled down for the network, pixels; as `Predictor` has it."""

MIN_OPSET: Final = 18
"""First version of ONNX's operators with a resize that smooths."""

TOLERANCE: Final = 1e-4
"""Largest difference of a logit that passes, over the largest logit."""

MIN_AGREEMENT: Final = 0.9999
"""Smallest share of pixels of equal class that passes."""

_CHECK_SHAPES: Final = ((1, 240, 320), (2, 45, 70), (3, 193, 131))
_MAX_CHECK_IMAGES: Final = 8
_LOUD: Final = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
_ONNX_PACKAGES: Final = ("onnx", "onnxscript", "onnxruntime")

_MAX_ONNX_BYTES: Final = 1.9e9

_NOTHING: Final[Mapping[str, str]] = MappingProxyType({})

_Run = Callable[[NDArray[Any]], NDArray[np.float32]]


class DeployedNetwork(nn.Module):
    """A network that takes the pixels of an image file and returns logits at the same size, on a single scale.

    Args:
        network: Trained network; kept as it is, on its device.
        short_side: Images are scaled to this shorter side for the network, pixels; 0 keeps their size.
        max_side: Larger images are scaled down to this longer side first, pixels; 0 never does.
    """

    def __init__(self, network: AfaNetwork, *, short_side: int = 0, max_side: int = MAX_SIDE) -> None:
        super().__init__()
        self.network = network
        self.short_side = short_side
        self.max_side = max_side
        self.mean: Tensor
        self.std: Tensor
        device = next(network.parameters()).device
        self.register_buffer("mean", 255 * torch.tensor(IMAGE_MEAN, device=device).view(1, 3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(IMAGE_STD, device=device).view(1, 3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """Segment a batch.

        Args:
            image: (B, 3, H, W) RGB in [0, 255], uint8 or float, of any size.

        Returns:
            (B, K, H, W) float32 logits; their argmax over K is the class, 0 = background.
        """
        height, width = image.shape[2:]
        pixels = (image.float() - self.mean) / self.std
        # Also if the size stays the same: a branch would fix an exported file to one of its two cases.
        view = interpolate(
            pixels, size=self._view_size(height, width), mode="bilinear", align_corners=False, antialias=True
        )
        return interpolate(self.network.segment(view), size=(height, width), mode="bilinear", align_corners=False)

    def _view_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that the network sees.

        Computed on tensors: a trace then takes the sides as given numbers, where formulas of the image's sides would
        pile up with every layer, and every guess about them would become a limit of the file.
        """
        sides = torch.stack([_number(height), _number(width)])
        if self.max_side:
            sides = (sides * (_number(self.max_side) / sides.amax(0)).clamp(max=1)).round().clamp(min=1)
        if self.short_side:
            sides = (sides * (_number(self.short_side) / sides.amin(0))).round()
        view: list[Any] = [side.item() for side in sides.clamp(min=MIN_SIDE).long().unbind()]
        for side in view:
            torch._check(side >= MIN_SIDE)  # type: ignore[no-untyped-call]
        return view[0], view[1]


@dataclass(frozen=True)
class ExportCheck:
    """Difference between an exported file and PyTorch.

    Attributes:
        path: The file.
        shapes: (batch, height, width) of the inputs that were compared.
        difference: Largest difference of a logit, over the largest logit.
        agreement: Share of pixels of equal class, of the worst input.
    """

    path: Path
    shapes: tuple[tuple[int, int, int], ...]
    difference: float
    agreement: float

    def __str__(self) -> str:
        shapes = ", ".join("x".join(map(str, shape)) for shape in self.shapes)
        return (
            f"{self.path}: as PyTorch at {shapes}: logits differ by {self.difference:.1e} of the largest, "
            f"{self.agreement:.4%} of pixels have the same class"
        )


def export_onnx(
    network: AfaNetwork,
    path: Path,
    *,
    metadata: Mapping[str, str] = _NOTHING,
    images: Sequence[NDArray[np.uint8]] = (),
    short_side: int = 0,
    max_side: int = MAX_SIDE,
    pixels: Pixels = "uint8",
    opset: int | None = None,
) -> ExportCheck:
    """Write a network as an ONNX file with free batch and size, and compare it with PyTorch in ONNX Runtime.

    The file has one input, `image`, and one output, `logits`, as `DeployedNetwork`; its metadata are those given.

    Args:
        network: Trained network; left as it is.
        path: File to write, *.onnx.
        metadata: Texts to keep in the file, such as `export_metadata`.
        images: (H, W, 3) uint8 RGB to compare on, of any sizes; without any they are generated.
        short_side: As for `DeployedNetwork`.
        max_side: As for `DeployedNetwork`.
        pixels: Type of the input.
        opset: Version of ONNX's operators, 18 or newer; None is the exporter's choice.

    Raises:
        AfaError: Another suffix; a package of the extra `onnx` is not installed; an opset that the exporter lacks;
            the network cannot be exported or its file computes something else: then there is no file.
    """
    _check_suffix(path, ".onnx")
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise AfaError(f'ONNX export needs the package {missing[0]}; pip install "afa[onnx]"')
    if opset is not None and opset < MIN_OPSET:
        raise AfaError(f"--opset is {opset}; use {MIN_OPSET} or newer, older ones cannot resize smoothly")
    if sum(parameter.numel() * 4 for parameter in network.parameters()) > _MAX_ONNX_BYTES:
        raise AfaError(f"{path}: the weights exceed the 2 GB that an ONNX file can hold; export to .pt2 instead")
    deployed = _deployed(network, short_side=short_side, max_side=max_side)

    def load(content: bytes) -> _Run:
        runtime = importlib.import_module("onnxruntime")
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        loaded = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        return lambda batch: loaded.run(["logits"], {"image": batch})[0]

    def make() -> bytes:
        return _onnx_file(_trace(deployed, pixels), metadata, opset)

    return _write_checked(deployed, path, make, load, images=images, pixels=pixels)


def export_torch(
    network: AfaNetwork,
    path: Path,
    *,
    metadata: Mapping[str, str] = _NOTHING,
    images: Sequence[NDArray[np.uint8]] = (),
    short_side: int = 0,
    max_side: int = MAX_SIDE,
    pixels: Pixels = "uint8",
) -> ExportCheck:
    """Write a network as a torch.export file with free batch and size, and compare it with PyTorch once it is loaded.

    `torch.export.load(path).module()` needs PyTorch alone, and computes what `DeployedNetwork` does on the CPU.

    Args:
        network: Trained network; left as it is.
        path: File to write, *.pt2; its extra file `metadata.json` holds the metadata.
        metadata: Texts to keep in the file, such as `export_metadata`.
        images: (H, W, 3) uint8 RGB to compare on, of any sizes; without any they are generated.
        short_side: As for `DeployedNetwork`.
        max_side: As for `DeployedNetwork`.
        pixels: Type of the input.

    Raises:
        AfaError: Another suffix; the network cannot be exported or its file computes something else: then there is
            no file.
    """
    _check_suffix(path, ".pt2")
    deployed = _deployed(network, short_side=short_side, max_side=max_side)

    def make() -> bytes:
        content, extra = io.BytesIO(), {"metadata.json": json.dumps(dict(metadata))}
        torch.export.save(_trace(deployed, pixels), content, extra_files=extra)
        return content.getvalue()

    def load(content: bytes) -> _Run:
        module = torch.export.load(io.BytesIO(content)).module()
        return lambda batch: module(torch.from_numpy(batch)).numpy()

    return _write_checked(deployed, path, make, load, images=images, pixels=pixels)


def read_check_images(folder: Path) -> list[NDArray[np.uint8]]:
    """Read the first images of a folder, to compare exported files on.

    Raises:
        AfaError: No such folder, no image in it, or one that is broken.
    """
    return [read_image(file) for file in find_images([folder])[:_MAX_CHECK_IMAGES]]


def _number(value: float) -> Tensor:
    return torch.scalar_tensor(value, dtype=torch.float64)


def _check_suffix(path: Path, suffix: str) -> None:
    if path.suffix != suffix:
        raise AfaError(f"{path}: this format is written to a {suffix} file; pass {path.with_suffix(suffix)}")


def _deployed(network: AfaNetwork, *, short_side: int, max_side: int) -> DeployedNetwork:
    """A copy on the CPU, in evaluation mode."""
    own = copy.deepcopy(network).cpu().float()
    return DeployedNetwork(own, short_side=short_side, max_side=max_side).eval()


def _free_sizes() -> dict[int, Any]:
    return {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}


def _trace(deployed: DeployedNetwork, pixels: Pixels) -> torch.export.ExportedProgram:
    example = torch.zeros(2, 3, 83, 107, dtype=getattr(torch, pixels))
    exported = torch.export.export(deployed, (example,), dynamic_shapes=(_free_sizes(),))
    for parameter in exported.parameters():
        parameter.requires_grad_(False)
    return exported


def _onnx_file(exported: torch.export.ExportedProgram, metadata: Mapping[str, str], opset: int | None) -> bytes:
    program: Any = torch.onnx.export(
        exported,
        dynamic_shapes=(_free_sizes(),),
        input_names=["image"],
        output_names=["logits"],
        opset_version=opset,
        dynamo=True,
        verbose=False,
    )
    found = program.model.opset_imports[""]
    if opset is not None and found != opset:
        raise AfaError(f"--opset is {opset}, but this exporter writes {found}; leave --opset out")
    program.model.metadata_props.update(metadata)
    content: bytes = program.model_proto.SerializeToString()
    return content


def export_metadata(classes: Sequence[str], *, white_level: int = WHITE_LEVEL) -> dict[str, str]:
    """What a file says of itself: the version of afa, the K class names as JSON, and the white level of its pixels."""
    return {
        "afa": __version__,
        "classes": json.dumps(["background", *classes]),
        "white_level": str(white_level),
    }


def _write_checked(
    deployed: DeployedNetwork,
    path: Path,
    make: Callable[[], bytes],
    load: Callable[[bytes], _Run],
    *,
    images: Sequence[NDArray[np.uint8]],
    pixels: Pixels,
) -> ExportCheck:
    """Make the content of a file, compare it with PyTorch, and only then write it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shapes = _check_shapes(deployed)
        with torch.no_grad(), image_progress(f"export {path.name}", total=2 + len(shapes), unit="parts") as advance:
            with quiet(*_LOUD):
                content = make()
            advance(1, words="loading what was made")
            with quiet(*_LOUD):
                run = load(content)
            source, found = itertools.cycle(images or _generated_images()), []
            for shape in shapes:
                advance(1, words="comparing with PyTorch")
                with quiet(*_LOUD):
                    found.append(_compare(deployed, run, shape, source, pixels))
            advance(1)
        check = _passed(path, shapes, found)
    except AfaError:
        raise
    except OSError as error:
        raise AfaError(f"{path}: cannot be written ({error.strerror or error}); choose another place") from None
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise AfaError(f"{path}: this network cannot be exported ({reason})") from None
    write_whole(path, content)
    write_whole(path.with_name(PIXELS_FILE), inspect.getsource(pixels_module))
    return check


def _check_shapes(deployed: DeployedNetwork) -> tuple[tuple[int, int, int], ...]:
    """(batch, height, width) of what is compared."""
    large = ((1, 64, deployed.max_side + 76),) if deployed.max_side and not deployed.short_side else ()
    return (*_CHECK_SHAPES, *large)


def _compare(
    deployed: DeployedNetwork,
    run: _Run,
    shape: tuple[int, int, int],
    source: Iterator[NDArray[np.uint8]],
    pixels: Pixels,
) -> tuple[float, float]:
    """Largest difference of the logits, in parts of the largest; share of the pixels with the same class."""
    batch, height, width = shape
    resized = [Image.fromarray(next(source)).resize((width, height)) for _ in range(batch)]
    pixel_batch = np.stack([np.asarray(image).transpose(2, 0, 1) for image in resized]).astype(pixels)
    expected = deployed(torch.from_numpy(pixel_batch)).numpy()
    found = run(pixel_batch)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    difference = float(np.abs(found - expected).max() / np.abs(expected).max())
    return difference, float((found.argmax(1) == expected.argmax(1)).mean())


def _passed(path: Path, shapes: tuple[tuple[int, int, int], ...], found: Sequence[tuple[float, float]]) -> ExportCheck:
    """The check, or an error if the file computes something else."""
    # NumPy's extremes keep a NaN, and the comparison is written so that it fails.
    differences, agreements = map(np.array, zip(*found, strict=True))
    difference, agreement = float(differences.max()), float(agreements.min())
    if not (difference <= TOLERANCE and agreement >= MIN_AGREEMENT):
        raise AfaError(
            f"{path}: not written, the exported file differs from PyTorch: logits by {difference:.1e} of the largest "
            f"({TOLERANCE:.0e} passes), {agreement:.3%} of pixels have the same class ({MIN_AGREEMENT:.2%} pass)"
        )
    return ExportCheck(path, shapes, difference, agreement)


def _generated_images() -> list[NDArray[np.uint8]]:
    rng = np.random.default_rng(0)
    return [draw_shapes(rng, 192).image for _ in range(4)]
