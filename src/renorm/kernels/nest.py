"""Plan -> Nest: how the native and the Triton kernels visit a tensor, ``outer x r0 x k1 x r1`` (csrc/job.h).

A *cell* is what one mean and one parameter belong to. Its loops are the kept axes and those averaged axes that the
parameters run along; sets are made of neighbouring cells (the channels of a group). Where the parameters run along
all averaged axes (layer norm), cells are the sets, and the parameters run *along* the summed loops.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from renorm.pattern import Partition
from renorm.plan import contiguous, split_strides

__all__ = ["Nest", "nest"]

_MAX_OUTER = 4
_X, _Y, _MASK = range(3)


@dataclass(frozen=True)
class Nest:
    """What a kernel needs to know of a partition, a shape and strides."""

    packed: bytes  # struct Nest of csrc/job.h
    x_strides: tuple[int, ...]  # that the input must have
    mask_strides: tuple[int, ...] | None  # that the mask must have
    y_strides: tuple[int, ...]  # of the output and of gradients: dense, in the order of the input's
    entries: int
    sets: int  # how many groups of entries share statistics
    cells: int
    params: int  # entries of weight and of bias
    kept: tuple[int, ...]  # kept axes of the split view, in the order of the statistics
    weighted: tuple[int, ...]  # weighted axes of the split view, in the order of the kernel's parameters
    split: tuple[int, ...]  # shape of the split view
    stat_shape: tuple[int, ...]  # of the statistics in the split view: 1 on every averaged axis
    in_order: bool  # statistics and parameters lie as the partition has them
    row: bool  # the innermost loop is summed over
    along: bool  # the parameters run along the summed loops
    run: int  # entries of the innermost loop
    backend: str = "native"  # whose kernels run it; "triton" otherwise


@dataclass(frozen=True)
class _Loop:
    size: int
    strides: tuple[int, ...]  # of x, y and the mask
    cell: bool


@lru_cache(maxsize=4096)
def nest(
    part: Partition,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    mask_strides: tuple[int, ...] | None = None,
    backend: str = "native",
) -> Nest | str:
    """The nest for a tensor of this shape and these strides, or the reason why there is none. Cached by value.

    Where the input or the mask lies too oddly, it is for copies of them with `x_strides` and `mask_strides`.
    """
    dense = torch.empty_like(torch.empty_strided(shape, strides, device="meta")).stride()
    found = _nest(part, shape, strides, dense, mask_strides)
    if isinstance(found, str) and strides != dense:
        found = _nest(part, shape, dense, dense, mask_strides)
    if isinstance(found, str) and mask_strides is not None:
        found = _nest(part, shape, dense, dense, dense)
    if isinstance(found, str):
        rows = contiguous(shape)
        found = _nest(part, shape, rows, rows, None if mask_strides is None else rows)
    return found if isinstance(found, str) else replace(found, backend=backend)


def _nest(
    part: Partition,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dense: tuple[int, ...],
    mask_strides: tuple[int, ...] | None,
) -> Nest | str:
    split = part.split_shape(shape)
    if math.prod(split) == 0:
        return "the input has no entries"
    operands = [split_strides(part, split, s) for s in (strides, dense, mask_strides or (0,) * len(shape))]
    axes = [i for i, size in enumerate(split) if size != 1]
    if any(operands[_X][i] == 0 for i in axes):
        return "an axis is expanded"
    # Of equal strides, as sliding windows have them, the order is the output's: the sum with a residual lies so, and
    # a backward pass goes by that.
    axes.sort(key=lambda i: (-operands[_X][i], -operands[_Y][i]))
    kept, weighted, reduced = set(part.kept), set(part.weighted), set(part.reduced)
    along = not any(i in reduced - weighted for i in axes) and not any(i in kept & weighted for i in axes)
    along = along and any(i in reduced for i in axes)
    cell_axes = [i for i in axes if i in kept or (i in weighted and not along)]
    loops = _merge([_Loop(split[i], tuple(o[i] for o in operands), i in cell_axes) for i in axes])
    merge = 1
    if not along:
        inner = [i for i in cell_axes if i in reduced]
        if cell_axes[len(cell_axes) - len(inner) :] != inner:
            return "the sets are not neighbouring cells"
        merge = math.prod([split[i] for i in inner])
    order = [i for i in axes if i in weighted]
    params = math.prod([split[i] for i in order]) if weighted else 0
    param_div = 1
    if order and not along:
        last = cell_axes.index(order[-1]) + 1
        if cell_axes[last - len(order) : last] != order:
            return "the parameters' axes are not neighbours"
        param_div = math.prod([split[i] for i in cell_axes[last:]])
    form = _form(loops, along)
    if isinstance(form, str):
        return form
    outer, r0, k1, r1 = form
    sizes = [r0.size, k1.size, r1.size, merge, params, param_div, int(along), len(outer)]
    padded = outer + [_ONE] * (_MAX_OUTER - len(outer))
    steps = [[loop.strides[operand] for loop in (r0, k1, *padded)] for operand in range(3)]
    row = r1.size > 1 or k1.size == 1
    inner_loop = r1 if row else k1
    if not row and k1.size % merge:
        return "the sets reach beyond the innermost loop"
    if inner_loop.strides[_MASK] not in (0, 1):
        return "the mask is not contiguous"
    numbers = [
        *sizes,
        *(loop.size for loop in padded),
        *(step for row in steps for step in row),
        inner_loop.strides[_MASK],
    ]
    num_cells = math.prod([loop.size for loop in (*outer, k1)])
    ones = [i for i, size in enumerate(split) if size == 1]
    stat_order = tuple([i for i in ones if i in kept] + [i for i in axes if i in kept])
    param_order = tuple([i for i in ones if i in weighted] + order)
    return Nest(
        packed=struct.pack(f"={len(numbers)}q", *numbers),
        x_strides=strides,
        mask_strides=mask_strides,
        y_strides=dense,
        entries=math.prod(split),
        sets=num_cells // merge,
        cells=num_cells,
        params=params,
        kept=stat_order,
        weighted=param_order,
        split=split,
        stat_shape=tuple([size if i in kept else 1 for i, size in enumerate(split)]),
        in_order=_ascending([i for i in axes if i in kept]) and _ascending(order),
        row=row,
        along=along,
        run=inner_loop.size,
    )


_ONE = _Loop(1, (0, 0, 0), True)


def _form(loops: list[_Loop], along: bool) -> tuple[list[_Loop], _Loop, _Loop, _Loop] | str:
    """(outer, r0, k1, r1) of merged loops, or why they do not fit."""
    outer, r0, k1, r1 = list(loops), _ONE, _ONE, _ONE
    if outer and outer[-1].strides[:2] != (1, 1):
        return "the innermost axis is not contiguous"
    if outer and not outer[-1].cell:
        r1 = outer.pop()
        if any(not loop.cell for loop in outer):
            if along:
                return "the parameters run along axes that are not neighbours"
            if outer[-1].cell:
                k1 = outer.pop()
            r0 = outer.pop()
    elif outer:
        k1 = outer.pop()
        if outer and not outer[-1].cell:
            r0 = outer.pop()
    if (r0 is not _ONE and r0.cell) or any(not loop.cell for loop in outer):
        return "averaged and kept axes alternate too often"
    if len(outer) > _MAX_OUTER:
        return "there are too many separate axes"
    return outer, r0, k1, r1


def _merge(loops: list[_Loop]) -> list[_Loop]:
    merged: list[_Loop] = []
    for loop in loops:
        outer = merged[-1] if merged else None
        if (
            outer is not None
            and outer.cell == loop.cell
            and all(a == loop.size * b for a, b in zip(outer.strides, loop.strides, strict=True))
        ):
            merged[-1] = _Loop(outer.size * loop.size, loop.strides, loop.cell)
        else:
            merged.append(loop)
    return merged


def _ascending(values: Sequence[int]) -> bool:
    return list(values) == sorted(values)
