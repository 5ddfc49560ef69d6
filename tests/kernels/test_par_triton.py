"""The fused kernels against the plain code: in Triton's interpreter on a CPU, and compiled on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from afa.config import PseudoConfig
from afa.kernels import dispatch as kernels
from afa.kernels.dispatch import fused
from afa.kernels.par import refine, refinement_kernel
from afa.pseudo.refiner import Refiner
from interpreted import interpret
from tensors import uniform

DILATIONS = (1, 2, 4)
EXTENT = torch.tensor([[14, 23], [19, 11]])


def make(device: str = "cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image, scores = (torch.rand(2, 3, 19, 23, generator=generator) for _ in range(2))
    return image.to(device), scores.to(device)


def results(device: str = "cpu") -> dict[str, Tensor]:
    """Kernels and refined scores of every kind, with and without an extent, zeroed outside of it."""
    image, scores = make(device)
    found: dict[str, Tensor] = {}
    for kind in ("par", "par_color", "pamr"):
        for name, extent in (("whole", None), ("part", EXTENT.to(device))):
            kernel = refinement_kernel(image, dilations=DILATIONS, kind=kind, extent=extent)  # type: ignore[arg-type]
            refined = refine(scores, kernel, dilations=DILATIONS, iterations=3, extent=extent)
            for what, maps in (("kernel", kernel), ("refined", refined)):
                if extent is not None:
                    for maps_of_one, (rows, columns) in zip(maps, extent.tolist(), strict=True):
                        maps_of_one[:, rows:] = 0
                        maps_of_one[:, :, columns:] = 0
                found[f"{kind} {name} {what}"] = maps.cpu()
    found["in box"] = boxes(device).cpu()
    return found


def boxes(device: str) -> Tensor:
    image, scores = make(device)
    box = torch.tensor([[2, 17, 0, 23], [5, 6, 9, 14]], device=device)
    return Refiner(image, PseudoConfig(dilations=DILATIONS, iterations=3))._refine_boxes(scores, box)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, maps in expected.items():
        torch.testing.assert_close(found[name], maps, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_interpreted_kernels_equal_the_plain_code(tmp_path: Path) -> None:
    command = (
        "import torch, test_par_triton as t; assert t.fused(torch.device('cpu')); torch.save(t.results(), 'out.pt')"
    )
    interpret(command, __file__, folder=tmp_path)
    assert_equal(torch.load(tmp_path / "out.pt"), results())


def test_extent_is_the_same_as_cropping() -> None:
    image, scores = make()
    kernel = refinement_kernel(image, dilations=DILATIONS, extent=EXTENT)
    refined = refine(scores, kernel, dilations=DILATIONS, iterations=3, extent=EXTENT)
    for i, (rows, columns) in enumerate(EXTENT.tolist()):
        part = (slice(i, i + 1), slice(None), slice(0, rows), slice(0, columns))
        cropped = refinement_kernel(image[part], dilations=DILATIONS)
        torch.testing.assert_close(kernel[part], cropped)
        expected = refine(scores[part], cropped, dilations=DILATIONS, iterations=3)
        torch.testing.assert_close(refined[part], expected, rtol=0, atol=1e-6)


def test_boxes_at_once_equal_boxes_one_by_one() -> None:
    image, scores = uniform(3, 3, 64, 96, seed=1), uniform(3, 3, 6, 7, seed=1)
    box = torch.tensor([[0, 64, 0, 96], [5, 38, 10, 71], [63, 64, 1, 4]])
    refiner = Refiner(image, PseudoConfig(dilations=DILATIONS, iterations=3))
    at_once = refiner._refine_boxes(interpolate(scores, size=(64, 96), mode="bilinear"), box)
    torch.testing.assert_close(at_once, refiner.in_box(scores, box), rtol=0, atol=1e-5)


@pytest.mark.gpu
def test_compiled_kernels_equal_the_plain_code(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fused(torch.device("cuda"))
    expected = results()
    assert_equal(results("cuda"), expected)
    monkeypatch.setattr(kernels, "_HAS_TRITON", False)
    assert_equal(results("cuda"), expected)
