"""Running statistics: what a layer that normalizes over the batch uses when the batch is not there.

$$\\text{running} \\leftarrow (1 - m) \\cdot \\text{running} + m \\cdot \\text{batch}$$

with torch's momentum m, or m = 1 / (batches so far) where momentum is None. A batch whose statistics are not
finite changes nothing: one overflow would otherwise stay in the running mean for good (pytorch#88474).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from renorm.errors import ShapeError
from renorm.kernels import extension, native
from renorm.kernels.moments import Moments
from renorm.kernels.nest import Nest
from renorm.norms.axes import Bound
from renorm.pattern import Partition

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["OneValue", "Tracking", "commit", "pool", "recomputing", "update"]

OneValue = Literal["raise", "running", "allow"]


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


class Tracking(nn.Module):
    """A layer that keeps running statistics, or none: when it normalizes by them, and when it moves them."""

    momentum: float | None
    unbiased: bool
    one_value: OneValue
    frozen: bool = False
    track_running_stats: bool
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    _process_group: ProcessGroup | None

    def _learns(self) -> bool:
        """Whether statistics come from the input although running ones exist."""
        return self.training and not self.frozen

    def _running(self) -> tuple[Tensor, Tensor] | None:
        """The running mean and variance, where this forward moves them."""
        if self.running_mean is None or self.running_var is None or not (self.track_running_stats and self._learns()):
            return None
        return self.running_mean, self.running_var

    def _uses_running(self, part: Partition, x: Tensor) -> bool:
        if self.running_mean is not None and not self._learns():
            return True
        if self.one_value == "allow" or self._process_group is not None:  # other processes may have more
            return False
        if part.set_size(x) != 1:
            return False
        if self.one_value == "running" and self.running_mean is not None:
            return True
        what = "spatial element" if "n" in [part.names[i] for i in part.kept] else "value per channel"
        remedy = (
            "" if self.running_mean is None else ", or one_value='running' to normalize such a batch by what is known"
        )
        raise ShapeError(
            f"Expected more than 1 {what} when training, got input size {tuple(x.shape)}: the variance of one value "
            f"is 0. Use larger batches or inputs, or drop_last=True in the data loader{remedy}"
        )

    def _running_moments(self, bound: Bound, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        assert self.running_mean is not None
        assert self.running_var is not None
        shape = [(size or 1) if i in bound.running else 1 for i, size in enumerate(bound.part.sizes)]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return self.running_mean.reshape(shape).to(wide), self.running_var.reshape(shape).to(wide)

    @torch.no_grad()
    def _track(self, running: tuple[Tensor, Tensor], batch: Moments, bound: Bound) -> None:
        if not recomputing():
            pooled = pool(batch, bound.part, bound.running, unbiased=self.unbiased)
            update(running, self.num_batches_tracked, self.momentum, pooled)

    def _track_natively(self, stats: Tensor, made: Nest, bound: Bound) -> None:
        """Move the running statistics towards those that a kernel of ours measured."""
        running, batches = self._running(), self.num_batches_tracked
        assert running is not None
        one_each = bound.running == bound.part.kept and made.in_order
        if one_each and (batches is not None or self.momentum is not None) and extension.tracks(running, batches):
            if not recomputing():
                extension.track(stats, running, batches, self.momentum, unbiased=self.unbiased)
        else:
            self._track(running, native.moments_of(stats, bound.part, made), bound)
