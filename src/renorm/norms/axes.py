"""The axes of a layer: which its parameters and running statistics run along, by name, and at one rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from renorm.errors import PatternError
from renorm.kernels import aten, graph
from renorm.pattern import Partition, Pattern, partition

__all__ = ["Bound", "bind", "check_sizes", "parameter_shape", "running_axes", "weighted_axes"]


def weighted_axes(pattern: Pattern, weight: str | None) -> tuple[str, ...]:
    """The axes that `weight` names; for ``"auto"`` those of the dimension that holds the axis ``c``."""
    if weight is None:
        return ()
    if weight != "auto":
        return pattern.select(weight, "weight")
    if "c" not in pattern.names:
        raise PatternError(
            "no axis is called c, so it is not clear where weight and bias run: pass weight='names' or weight=None",
            pattern.text,
            0,
            len(pattern.text),
        )
    return pattern.beside("c")


def running_axes(pattern: Pattern, weighted: tuple[str, ...], running: str | None) -> tuple[str, ...]:
    """The axes that `running` names; for ``"auto"`` the kept ones that are weighted, of a norm over the batch."""
    if running is None:
        return ()
    reduced = {axis.name for axis in pattern.axes if axis.reduced}
    if running == "auto":
        over_the_batch = any(axis.reduced for axis in pattern.dims[0])
        return tuple(name for name in weighted if name not in reduced) if over_the_batch else ()
    axes = pattern.select(running, "running")
    for name in axes:
        if name in reduced:
            pattern.fail(name, f"running statistics run along kept axes, and {name!r} is averaged over")
    return axes


def check_sizes(pattern: Pattern, sizes: Mapping[str, int], needed: tuple[str, ...]) -> None:
    """Raise PatternError where the sizes do not fit the pattern, or one of the axes `needed` has none."""
    pattern.check_sizes(sizes)
    for name in needed:
        if name not in sizes:
            pattern.fail(name, f"the parameters run along {name!r}: pass its size, {name}=...")


def parameter_shape(pattern: Pattern, axes: tuple[str, ...], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """One size for each dimension that has any of `axes`."""
    dims = [[axis.name for axis in dim if axis.name in axes] for dim in pattern.dims]
    return tuple(math.prod(sizes[name] for name in dim) for dim in dims if dim)


@dataclass(frozen=True)
class Bound:
    """The pattern at one rank, with what can be known of it before a tensor comes."""

    part: Partition
    text: str  # the partition as an argument of operators
    op: str | None  # torch's kernel for the partition, see aten.recognize
    running: tuple[int, ...]  # axes of the split view along which running statistics are kept
    channels_second: bool  # those are dimension 1, whole, and the parameters run along it: F.batch_norm serves


def bind(
    pattern: str, rank: int, sizes: Mapping[str, int], weighted: tuple[str, ...], running: tuple[str, ...]
) -> Bound:
    """The pattern at this rank, with parameters along the axes `weighted` and running statistics along `running`."""
    part = partition(pattern, rank, sizes, weighted)
    along = tuple(i for i, name in enumerate(part.names) if name in running)
    whole = tuple(i for i, dim in enumerate(part.dims) if dim == 1)
    channels_second = along == whole and part.weighted in ((), whole)
    return Bound(part, graph.to_text(part), aten.recognize(part), along, channels_second)
