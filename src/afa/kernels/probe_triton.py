"""The smallest kernel: if it can be built and started, so can the others."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def try_kernel(device: torch.device) -> None:
    """Start a kernel on a device, without waiting for it.

    Raises:
        Exception: Whatever Triton raises where it cannot, of no common class.
    """
    _fill_kernel[(1,)](torch.empty(1, device=device))


@triton.jit
def _fill_kernel(out):
    tl.store(out + tl.program_id(0), 1.0)
