"""Running statistics: what a layer that normalizes over the batch uses when the batch is not there.

$$\\text{running} \\leftarrow (1 - m) \\cdot \\text{running} + m \\cdot \\text{batch}$$

with torch's momentum m, or m = 1 / (batches so far) where momentum is None. A batch whose statistics are not
finite changes nothing: one overflow would otherwise stay in the running mean for good (pytorch#88474).
"""

from __future__ import annotations

import torch
from torch import Tensor

from renorm.kernels.moments import Moments
from renorm.pattern import Partition

__all__ = ["commit", "pool", "recomputing", "update"]


def recomputing() -> bool:
    """Whether this forward runs inside a backward pass, as activation checkpointing does to get it again.

    Such a forward has been counted once already (pytorch#96136).
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def pool(
    moments: Moments, part: Partition, axes: tuple[int, ...], *, unbiased: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(mean, has_mean, var, has_var), flat along `axes`: averages over the other kept ones, and whether there are any.

    Sets without a real entry are left out, and for the unbiased variance, ``var * n / (n - 1)``, those with one.
    """
    others = [i for i in part.kept if i not in axes]
    count = moments.count.expand(moments.mean.shape)
    var = moments.var * count / (count - 1).clamp(min=1) if unbiased else moments.var
    has_mean, has_var = count > 0, count > (1 if unbiased else 0)

    def average(values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        if not others:
            return values.flatten(), valid.flatten()
        sets = valid.sum(others, keepdim=True)
        total = torch.where(valid, values, 0).sum(others, keepdim=True)
        return (total / sets.clamp(min=1)).flatten(), (sets > 0).flatten()

    return (*average(moments.mean, has_mean), *average(var, has_var))


def commit(running: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], num_batches_tracked: Tensor | None) -> None:
    """Take over the new running mean and variance, if every entry of both is finite."""
    finite = torch.stack(new).isfinite().all()
    for old, value in zip(running, new, strict=True):
        old.copy_(torch.where(finite, value, old))
    if num_batches_tracked is not None:
        num_batches_tracked.add_(finite)


def update(
    running: tuple[Tensor, Tensor],
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    pooled: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Move the running mean and variance towards what `pool` gave, in place and without a look at their values."""
    mean, has_mean, var, has_var = pooled
    finite = mean.isfinite().all() & var.isfinite().all() & has_mean.any()
    if num_batches_tracked is not None:
        num_batches_tracked.add_(finite)
    factor: float | Tensor
    if momentum is not None:
        factor = momentum
    elif num_batches_tracked is not None:
        factor = 1.0 / num_batches_tracked.clamp(min=1).to(mean.dtype)
    else:
        return
    for old, value, valid in zip(running, (mean, var), (has_mean, has_var), strict=True):
        flat = old.flatten()
        new = factor * value.to(flat.dtype) + (1 - factor) * flat
        old.copy_(torch.where(finite & valid, new.to(flat.dtype), flat).view_as(old))
