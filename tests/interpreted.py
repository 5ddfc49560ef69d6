"""Running kernels in Triton's interpreter, which has to be chosen before a process starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from afa.kernels.dispatch import fused


def interpret(command: str, beside: str, *, folder: Path | None = None) -> None:
    """Run Python in a process of its own whose fused kernels are interpreted on the CPU; skip where Triton is not.

    Args:
        command: Python code; raises where something is wrong.
        beside: File whose folder it can import from.
        folder: Where it runs.
    """
    pytest.importorskip("triton")
    path = os.pathsep.join([str(Path(beside).parent), *sys.path])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", command], cwd=folder, env=environment, check=True)
    assert not fused(torch.device("cpu"))
