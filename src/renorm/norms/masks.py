"""Masks: which entries of an input are real."""

from __future__ import annotations

import torch
from torch import Tensor

from renorm.errors import ShapeError

__all__ = ["expand_mask"]


def expand_mask(mask: Tensor, x: Tensor) -> Tensor:
    """`mask` in the shape of `x`; raises ShapeError where it is no boolean tensor or does not broadcast."""
    if not isinstance(mask, Tensor):
        raise ShapeError(f"a mask is a tensor; got {type(mask).__name__}: write torch.as_tensor(mask)")
    if mask.dtype != torch.bool:
        raise ShapeError(f"a mask is boolean, True on real entries; got {mask.dtype}: write mask.bool()")
    try:
        return mask.expand(x.shape)
    except RuntimeError:
        raise ShapeError(
            f"a mask must broadcast to the input's shape {tuple(x.shape)}; got {tuple(mask.shape)}: give it as many "
            "dimensions, of size 1 where it does not vary, as in mask[:, None, :]"
        ) from None
