"""A small kernel: whether Triton compiles and launches what the others are made of, tuples and absent tensors."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["run"]


@triton.jit
def _add(out_ptr, absent_ptr, numbers):
    if absent_ptr is None:
        tl.store(out_ptr, numbers[0] + numbers[1])


def run(device: torch.device) -> None:
    """Compile and launch a kernel on this device; raises what Triton raises, RuntimeError where the sum is wrong."""
    with torch.cuda.device(device):
        out = torch.empty(1, device=device)
        _add[(1,)](out, None, (1, 2))
        if float(out) != 3:
            raise RuntimeError(f"1 + 2 is {float(out)} there")
