"""Synchronized statistics: the batches of several processes are one batch.

Each process measures its own part, the moments of all parts are gathered, in one collective, and merged; the
gradient takes the same way back. The parts may differ in size, and be empty.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from renorm.kernels.moments import Moments

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["gather", "merge", "named"]


def merge(moments: Moments, group: ProcessGroup) -> Moments:
    """Moments of the union of the sets that all processes of `group` have: as `Moments.merge`, exactly."""
    mean, var = moments.mean, moments.var
    every = gather(torch.stack([moments.count.to(mean.dtype).expand(mean.shape), mean, var]), group)
    stacked = Moments(every[:, 0].detach(), every[:, 1], every[:, 2], ("process", *moments.names))
    merged = stacked.merge("process")
    return Moments(merged.count[0], merged.mean[0], merged.var[0], moments.names)


def gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """`x` of each process of `group`, along a new first dimension; differentiable as often as wanted.

    The gradient of a process is the sum of what the losses of all of them ask of its entries.
    """
    y: Tensor = _Gather.apply(x, group)  # type: ignore[no-untyped-call]
    return y


def named(group: str | None) -> ProcessGroup | None:
    """The process group of this name, which is what a pickled layer has; None where there are no groups here."""
    if group is None or not dist.is_available() or not dist.is_initialized():
        return None
    resolve: Any = dist.distributed_c10d  # its own is not in the public names
    found: ProcessGroup = resolve._resolve_process_group(group)
    return found


# The functional collectives are what torch.compile can hold in a graph; they return before the result is there.


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        flat = x.contiguous().view(1, -1)
        every = torch.ops._c10d_functional.all_gather_into_tensor(flat, group.size(), group.group_name)
        y: Tensor = torch.ops._c10d_functional.wait_tensor(every)
        return y.view(group.size(), *x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _OwnSum.apply(dy, ctx.group), None  # type: ignore[no-untyped-call]


class _OwnSum(torch.autograd.Function):
    """The sum over processes, of which each keeps its own row: what `_Gather` is transposed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        total = torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group.group_name)
        y: Tensor = torch.ops._c10d_functional.wait_tensor(total)
        return y[dist.get_rank(group)]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _Gather.apply(dy, ctx.group), None  # type: ignore[no-untyped-call]
