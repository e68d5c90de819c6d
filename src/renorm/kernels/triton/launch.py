"""Nest -> grids and tiles: how the Triton kernels are launched.

Nothing is tuned when it is imported or run: the choices are constants, each with its reason.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache

import torch

__all__ = ["CHOICES", "Choices", "Loops", "Tile", "cell_tile", "fused_tile", "loops", "programs", "splits", "warps"]


@dataclass(frozen=True)
class Choices:
    """Sizes of tiles and grids."""

    # A set of so many entries still fits the registers of one program: 32 each at 1024 threads. Not measured yet.
    fused_forward: int = 32_768
    fused_backward: int = 16_384  # x and dy: twice as much for each entry. Not measured yet.
    # Large sets go to several programs where they are fewer than programs that can run: one of them would read alone
    # while the others wait. Not measured yet.
    alone: int = 8_192
    tile: int = 2_048  # entries of a tile otherwise: 16 for each of 128 threads, two loads of 16 bytes in bfloat16
    columns: int = 64  # cells side by side in a tile of columns: 128 bytes in bfloat16, a full line of the cache
    least_columns: int = 16  # 32 bytes in bfloat16, the least that memory is read in
    steps: int = 4  # tiles that one program of a pass takes at least, to pay for its start. Not measured yet.
    waves: int = 8  # programs for each multiprocessor where the work can be split. Not measured yet.
    entries_per_warp: int = 1_024  # 32 for each thread: loads in flight against registers. Not measured yet.
    parts: int = 64  # partial results that are merged at a time. Not measured yet.


CHOICES = Choices()


@dataclass(frozen=True)
class Loops:
    """A nest as these kernels visit it: ``outer x k x a x b``, cells by `outer` and `k`, sums over `a` and `b`."""

    num_outer: int
    num_k: int
    num_a: int
    num_b: int
    merge: int  # neighbouring cells that share statistics
    params: int
    param_div: int  # parameter of a cell: cell // param_div % params
    along: bool  # the parameters run along b
    row: bool  # b is contiguous; otherwise k is
    sizes: tuple[int, int, int]  # of the outer loops, innermost first, without the last
    x: tuple[int, ...]  # strides of a, b, k, and the outer loops, innermost first
    y: tuple[int, ...]
    mask: tuple[int, ...]

    @property
    def cells(self) -> int:
        """Their number."""
        return self.num_outer * self.num_k

    @property
    def sets(self) -> int:
        """Their number."""
        return self.cells // self.merge


@dataclass(frozen=True)
class Tile:
    """What a program works on at a time; powers of two."""

    cells: int  # of the innermost cell loop; sets, where several cells of a set are in a tile
    merge: int
    entries: int

    @property
    def size(self) -> int:
        """Entries in all."""
        return self.cells * self.merge * self.entries


@lru_cache(maxsize=4096)
def loops(packed: bytes) -> Loops:
    """The loops of `Nest.packed`."""
    numbers = struct.unpack(f"={len(packed) // 8}q", packed)
    r0, k1, r1, merge, params, param_div, along, dims = numbers[:8]
    outer = [(numbers[8 + i], [numbers[12 + 6 * operand + 2 + i] for operand in range(3)]) for i in range(dims)]
    r0_strides, k1_strides = ([numbers[12 + 6 * operand + i] for operand in range(3)] for i in range(2))
    row = r1 > 1 or k1 == 1
    mask_inner = numbers[30]
    if row:
        a, b = (r0, r0_strides), (r1, [1, 1, mask_inner])
        if k1 == 1 and outer:
            k1, k1_strides = outer.pop()
    else:
        a, b = (1, [0, 0, 0]), (r0, r0_strides)
        k1_strides = [1, 1, mask_inner]
    outer = [*outer[::-1], *[(1, [0, 0, 0])] * (4 - len(outer))]
    num_outer = 1
    for size, _ in outer:
        num_outer *= size
    x, y, mask = (
        (a[1][operand], b[1][operand], k1_strides[operand], *(strides[operand] for _, strides in outer))
        for operand in range(3)
    )
    sizes = (outer[0][0], outer[1][0], outer[2][0])
    return Loops(num_outer, k1, a[0], b[0], merge, params, max(1, param_div), bool(along), row, sizes, x, y, mask)


def _power(number: int) -> int:
    return 1 << (number - 1).bit_length()


def fused_tile(of: Loops, limit: int, machine: int) -> Tile | None:
    """A tile that holds whole sets, `machine` being how many programs can run; None where there is no good one."""
    merge, entries = _power(of.merge), _power(of.num_b)
    one = merge * entries
    if of.num_a > 1 or of.num_k % of.merge or one > limit:
        return None
    if one > CHOICES.alone and of.sets < machine:
        return None
    wanted = max(1, CHOICES.tile // one)
    if not of.row:
        least = max(1, CHOICES.least_columns // merge)
        wanted = max(wanted, min(least, _power(of.num_k // of.merge)))
    sets = min(wanted, _power(of.num_k // of.merge), max(1, CHOICES.columns // merge) if not of.row else wanted)
    return Tile(sets, merge, entries) if sets * one <= limit else None


def cell_tile(of: Loops) -> Tile:
    """A tile of cells and entries, for kernels that loop over what does not fit."""
    if of.row:
        entries = min(_power(of.num_b), CHOICES.tile)
        return Tile(min(_power(of.num_k), CHOICES.tile // entries), 1, entries)
    cells = min(_power(of.num_k), CHOICES.columns)
    return Tile(cells, 1, min(_power(of.num_b), CHOICES.tile // cells))


def splits(tiles: int, steps: int, machine: int) -> int:
    """Among how many programs the steps of each of these tiles are divided."""
    return max(1, min(-(-machine // tiles), -(-steps // CHOICES.steps)))


@lru_cache(maxsize=64)
def programs(device: torch.device) -> int:
    """How many programs keep this device busy."""
    if device.type != "cuda":
        return CHOICES.waves  # the interpreter runs one at a time
    return CHOICES.waves * int(torch.cuda.get_device_properties(device).multi_processor_count)


def warps(tile: Tile) -> int:
    """Warps of a program that holds one such tile."""
    return min(32, max(1, tile.size // CHOICES.entries_per_warp)) if tile.size > CHOICES.tile else 4
