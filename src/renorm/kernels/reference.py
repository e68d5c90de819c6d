"""Measure and apply in plain torch: the definition the other kernels are held to.

Any dtype, device and strides; differentiable as often as wanted; traced by torch.compile, vmap and export.
"""

from __future__ import annotations

import torch
from torch import Tensor

from renorm.kernels.moments import Affine, Moments, statistics_dtype
from renorm.pattern import Partition

__all__ = ["apply", "measure"]


def measure(x: Tensor, part: Partition, *, mask: Tensor | None = None, about_zero: bool = False) -> Moments:
    r"""Moments of each set; with `about_zero` the mean is taken to be 0 and var is the mean square.

    Three passes: the mean in x's precision, the mean of what it leaves, and the variance about both. The
    second one recovers the digits the first lost, so that a mean 1e4 times the deviation costs nothing.
    """
    v = part.view(x).to(_working_dtype(x))
    dtype = statistics_dtype(x)
    if mask is None:
        size = 1
        for i in part.reduced:
            size = size * v.shape[i]
        count = v.new_full([1] * v.dim(), size, dtype=dtype)
        real = None
    else:
        real = part.view(mask)
        v = torch.where(real, v, 0)
        count = _sum(real, part).to(dtype)
    n = count.clamp(min=1)

    def average(values: Tensor) -> Tensor:
        if real is not None:
            values = torch.where(real, values, 0)
        return _sum(values, part).to(dtype) / n

    if about_zero:
        var = average(v.square())
        return Moments(count, torch.zeros_like(var), torch.where(count > 0, var, 1), part.names)
    if not part.reduced:  # the ellipsis in brackets stands for nothing: each entry is its own mean
        return Moments(count, v.to(dtype), torch.where(count > 0, torch.zeros_like(v, dtype=dtype), 1), part.names)
    pivot = average(v).detach().to(v.dtype)
    v = v - pivot
    rest = average(v)
    var = average((v - rest.to(v.dtype)).square())
    return Moments(count, pivot.to(dtype) + rest, torch.where(count > 0, var, 1), part.names)


def apply(
    x: Tensor,
    part: Partition,
    affine: Affine,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """``((x - center) * scale + shift) * weight + bias`` in x's dtype and layout; 0 where `mask` is False.

    `weight` and `bias` are contiguous over the partition's weighted axes.
    """
    v = part.view(x).to(_working_dtype(x))
    real = None if mask is None else part.view(mask)
    if real is not None:
        v = torch.where(real, v, 0)
    scale, shift = affine.scale, affine.shift
    if affine.center is not None:
        high = affine.center.detach().to(v.dtype)
        v = v - high
        rest = (high.to(scale.dtype) - affine.center) * scale
        shift = rest if shift is None else shift + rest
    if shift is None:
        shift = torch.zeros_like(scale)
    along = [size if i in part.weighted else 1 for i, size in enumerate(v.shape)]
    w = None if weight is None else weight.reshape(along).to(scale.dtype)
    b = None if bias is None else bias.reshape(along).to(scale.dtype)
    if not set(part.weighted) & set(part.reduced):
        # The parameters are constant in each set: they join the small tensors.
        if w is not None:
            scale, shift = scale * w, shift * w
        if b is not None:
            shift = shift + b
        w = b = None
    y = torch.addcmul(shift.to(v.dtype), v, scale.to(v.dtype))
    if w is not None:
        y = y * w.to(y.dtype)
    if b is not None:
        y = y + b.to(y.dtype)
    if real is not None:
        y = torch.where(real, y, 0)
    return y.reshape(x.shape).to(x.dtype)


def _sum(values: Tensor, part: Partition) -> Tensor:
    # Torch's sum over no axes is a sum over all of them.
    return values.sum(part.reduced, keepdim=True) if part.reduced else values


def _working_dtype(x: Tensor) -> torch.dtype:
    """What entries are computed in: float32 at least."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
