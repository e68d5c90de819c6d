"""The smallest kernel there is: whether Triton compiles and launches at all."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["run"]


@triton.jit
def _one(out_ptr):
    tl.store(out_ptr, 1.0)


def run(device: torch.device) -> None:
    """Compile and launch a kernel on this device; raises what Triton raises."""
    with torch.cuda.device(device):
        _one[(1,)](torch.empty(1, device=device))
