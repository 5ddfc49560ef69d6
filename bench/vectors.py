"""Recorded outputs of the published implementation, and how far afa may be from them: what `bench/parity.py` reads."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from afa.errors import AfaError

MEASURES: Final[dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]]] = {
    "difference": ("", lambda found, expected: (found - expected).abs().max()),
    "relative": (" rel", lambda found, expected: (found - expected).norm() / expected.norm()),
    "percent": (" %", lambda found, expected: 100 * (found != expected).double().mean()),
    "pixels": (" px", lambda found, expected: (found != expected).sum()),
}
"""How errors are measured: unit, and (what afa found, what was recorded) as float64 of one shape -> error. `relative`
is the norm of the difference over that of what was recorded."""


class Vectors:
    """Arrays of one `.npz` file by key; a missing key is an error that names it.

    Args:
        path: The file.

    Raises:
        AfaError: The file is missing or is not an `.npz` archive of plain arrays.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with np.load(path, allow_pickle=False) as archive:
                self.arrays = {key: archive[key] for key in archive.files}
        except FileNotFoundError:
            raise AfaError(f"{path}: no such file; pass an .npz file of recorded vectors") from None
        except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile):
            raise AfaError(f"{path}: not an .npz file of plain arrays; record it again") from None

    def __getitem__(self, key: str) -> Tensor:
        """Array of a key, floating-point ones as float32.

        Raises:
            AfaError: The key is not in the file.
        """
        array = self.recorded(key)
        return array.float() if array.is_floating_point() else array

    def recorded(self, key: str) -> Tensor:
        """Array of a key in the precision it was recorded in.

        Raises:
            AfaError: The key is not in the file.
        """
        if key not in self.arrays:
            raise AfaError(f"{self.path}: key {key} is missing; record it with the same layout as the others")
        return torch.from_numpy(np.asarray(self.arrays[key]))

    def keys_like(self, prefix: str, *, such_as: str) -> tuple[str, ...]:
        """Keys that start with a prefix, in the order of the file.

        Raises:
            AfaError: There is none; the message names one `such_as`.
        """
        keys = tuple(key for key in self.arrays if key.startswith(prefix))
        if not keys:
            raise AfaError(f"{self.path}: key {prefix}{such_as} is missing; record at least one like it")
        return keys


@dataclass(frozen=True)
class Check:
    """One recorded output and how afa computes it.

    Attributes:
        key: Key of the recorded output.
        what: Description of the output.
        tolerance: Largest error that passes.
        compute: Turns the recorded inputs into afa's output.
        measure: Key of `MEASURES`.
        expected: Brings the recorded output into the layout of afa's; None: it has that layout.
    """

    key: str
    what: str
    tolerance: float
    compute: Callable[[Vectors], Tensor]
    measure: str = "difference"
    expected: Callable[[Vectors], Tensor] | None = None

    @property
    def unit(self) -> str:
        """Unit of error and tolerance."""
        return MEASURES[self.measure][0]

    def run(self, vectors: Vectors) -> Result:
        """Compute the output and compare it.

        Raises:
            AfaError: A key is missing.
        """
        expected = (self.expected(vectors) if self.expected else vectors.recorded(self.key)).double()
        found = self.compute(vectors).detach().double()
        if found.shape != expected.shape:
            return Result(self, float("inf"))
        return Result(self, float(MEASURES[self.measure][1](found, expected)))


@dataclass(frozen=True)
class Result:
    """Outcome of one check.

    Attributes:
        check: The check.
        error: In the measure of the check; NaN where one side is NaN, infinite where the shapes differ.
    """

    check: Check
    error: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; NaN is not."""
        return self.error <= self.check.tolerance
