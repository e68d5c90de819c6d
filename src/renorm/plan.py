"""Partition + shape + strides -> Plan: the few loops that visit a tensor in the order its memory lies.

A plan is what a compiled kernel runs on. Axes of the split view are sorted by stride, those of one entry are
left out, and neighbours of the same role that are evenly spaced in every tensor are merged into one. What
remains is usually three axes. The innermost one decides the kernel: reduced is *row*, kept is *column*.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from renorm.pattern import Partition, Pattern, partition

__all__ = ["Loop", "Plan", "contiguous", "plan", "split_strides"]


@dataclass(frozen=True)
class Loop:
    """One loop of a plan: merged axes of the same role."""

    size: int  # entries
    stride: int  # step in the tensor, in entries
    reduced: bool  # averaged over; otherwise it numbers sets
    weighted: bool  # the parameters run along it
    stat_stride: int  # step in the statistics, which are contiguous over the kept axes; 0 if reduced
    param_stride: int  # step in the parameters, which are contiguous over the weighted axes; 0 if not weighted
    names: tuple[str, ...]  # the axes merged into it, outermost first

    def joins(self, inner: Loop) -> bool:
        """Whether this loop and the one inside it can run as a single loop."""
        return (
            self.reduced == inner.reduced
            and self.weighted == inner.weighted
            and self.stride == inner.size * inner.stride
            and self.stat_stride == inner.size * inner.stat_stride
            and self.param_stride == inner.size * inner.param_stride
        )


@dataclass(frozen=True)
class Plan:
    """How to visit one tensor: loops from the outermost to the innermost.

    >>> print(plan("n (g [c]) [...]", (8, 64, 7, 7), sizes={"g": 32}, weighted=("g", "c")))
    n (g [c]) [...] on 8x64x7x7: 256 sets of 98 entries, row kernel
      n          kept                 8 x 3136
      g          kept     weighted   32 x 98
      c          reduced  weighted    2 x 49
      ...0 ...1  reduced             49 x 1
    """

    partition: Partition  # what was asked for
    shape: tuple[int, ...]  # of the tensor
    strides: tuple[int, ...]  # of the tensor, in entries
    loops: tuple[Loop, ...]  # outermost first
    num_sets: int  # how many groups of entries share statistics
    set_size: int  # entries in each of them

    @property
    def kind(self) -> str:
        """``"row"`` where the innermost loop is reduced, ``"column"`` where it is kept."""
        return "row" if not self.loops or self.loops[-1].reduced else "column"

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        sets = f"{self.num_sets} sets of {self.set_size} entries"
        lines = [f"{self.partition.pattern.text} on {shape}: {sets}, {self.kind} kernel"]
        labels = [" ".join(loop.names) for loop in self.loops]
        width = max(map(len, labels), default=0)
        digits = max((len(str(loop.size)) for loop in self.loops), default=0)
        for label, loop in zip(labels, self.loops, strict=True):
            role = "reduced" if loop.reduced else "kept"
            weighted = "weighted" if loop.weighted else ""
            lines.append(f"  {label:<{width}}  {role:<7}  {weighted:<8}  {loop.size:>{digits + 1}} x {loop.stride}")
        return "\n".join(line.rstrip() for line in lines)


def plan(
    pattern: str | Pattern | Partition,
    shape: Sequence[int],
    strides: Sequence[int] | None = None,
    *,
    sizes: Mapping[str, int] | None = None,
    weighted: Sequence[str] = (),
) -> Plan:
    """The plan for a tensor of this shape and these strides (default: contiguous). Cached by value.

    Raises ShapeError where the shape does not fit the pattern, PatternError where a size or name does not.
    """
    if not isinstance(pattern, Partition):
        pattern = partition(pattern, len(shape), sizes, weighted)
    if strides is None:
        strides = contiguous(shape)
    return _plan(pattern, tuple(shape), tuple(strides))


@lru_cache(maxsize=4096)
def _plan(part: Partition, shape: tuple[int, ...], strides: tuple[int, ...]) -> Plan:
    split = part.split_shape(shape)
    kept, weighted = set(part.kept), set(part.weighted)
    stat_strides = _strides_along(split, kept)
    param_strides = _strides_along(split, weighted)
    loops: list[Loop] = []
    for axis, (size, stride) in enumerate(zip(split, split_strides(part, split, strides), strict=True)):
        if size != 1:
            role = (axis not in kept, axis in weighted, stat_strides[axis], param_strides[axis])
            loops.append(Loop(size, stride, *role, names=(part.names[axis],)))
    # An axis of stride 0 (expanded) repeats the same memory: outermost, where repeating costs least.
    loops.sort(key=lambda loop: -loop.stride if loop.stride else -math.inf)
    return Plan(
        partition=part,
        shape=shape,
        strides=strides,
        loops=_merge(loops),
        num_sets=math.prod(split[i] for i in part.kept),
        set_size=math.prod(split[i] for i in part.reduced),
    )


def _merge(loops: list[Loop]) -> tuple[Loop, ...]:
    merged: list[Loop] = []
    for loop in loops:
        if merged and merged[-1].joins(loop):
            outer = merged.pop()
            loop = Loop(
                outer.size * loop.size,
                loop.stride,
                loop.reduced,
                loop.weighted,
                loop.stat_stride,
                loop.param_stride,
                outer.names + loop.names,
            )
        merged.append(loop)
    return tuple(merged)


def split_strides(part: Partition, split: tuple[int, ...], strides: tuple[int, ...]) -> list[int]:
    """The strides of the split view, whose shape is `split`, of a tensor with these strides."""
    result = [0] * len(split)
    inside = dict(enumerate(strides))  # for each dimension, the stride of its next axis from the right
    for axis in reversed(range(len(split))):
        dim = part.dims[axis]
        result[axis] = inside[dim]
        inside[dim] *= split[axis]
    return result


def _strides_along(split: tuple[int, ...], axes: set[int]) -> list[int]:
    """Contiguous strides over `axes`, 0 on the others."""
    result, step = [0] * len(split), 1
    for axis in reversed(range(len(split))):
        if axis in axes:
            result[axis] = step
            step *= split[axis]
    return result


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor of this shape."""
    return tuple(_strides_along(tuple(shape), set(range(len(shape)))))
