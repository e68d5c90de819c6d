"""Nest -> grids and tiles: how the Triton kernels are launched.

Nothing is tuned when it is imported or run: the choices are constants, each with its reason.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache

import torch

__all__ = [
    "CHOICES",
    "NARROW",
    "Choices",
    "Loops",
    "Tile",
    "backward_warps",
    "cell_tile",
    "fused_tile",
    "loops",
    "merging",
    "processors",
    "programs",
    "quotient",
    "splits",
    "warps",
]


@dataclass(frozen=True)
class Choices:
    """Sizes of tiles and grids, for a GPU like the H200: 132 processors, 4.8 TB/s, 50 MB of L2.

    Registers are those that ptxas reports for sm_90; nothing here has been timed yet.
    """

    # A set of so many entries fits the registers of one program, 32 a thread. Fewer and larger sets are not split
    # among programs up to here: one reads its 64 KB in about a microsecond, which is less than another launch takes.
    fused_forward: int = 32_768  # 1024 threads of 64 registers: none is spilt
    # x and dy: 512 threads of up to 128 registers. Where sums for parameters that run along are kept as well, 16 384
    # entries fill the registers of a processor: 1024 threads of 64, of which 32 are in its L1 cache. To read x and dy
    # once more for them would cost two thirds of the traffic, this costs some 30 % of the L1's.
    fused_backward: int = 16_384
    tile: int = 2_048  # entries of a tile otherwise: 16 for each of 128 threads, two loads of 16 bytes in bfloat16
    columns: int = 64  # cells side by side in a tile of columns: 128 bytes in bfloat16, a full line of the cache
    least_columns: int = 8  # 16 bytes, one load; the other half of a sector of 32 is read by the next program, from L2
    # To cover 0.7 us of latency at 4.8 TB/s, 25 KB must be on their way to each processor: 32 warps ask for 32 KB at
    # 32 bytes a thread, and they fit at 64 registers a thread.
    warps: int = 32  # of a processor
    steps: int = 4  # tiles that one program of a pass takes at least, to pay for its start
    many_steps: int = 16  # and where the processors have enough to do anyway
    waves: int = 4  # programs are so many times what fits, so that the last ones to end are a small part of all
    entries_per_warp: int = 1_024  # 32 a thread, 64 bytes in bfloat16
    small_map: int = 128  # entries up to which those of all channels are visited as columns, see `loops`
    parts: int = 64  # partial results that are merged at a time


CHOICES = Choices()
NARROW = (1 << 31) - (1 << 17)  # entries that 32 bits count, with the indices of a tile that begins at the last


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
    flat: bool  # k holds what was k and b
    row: bool  # b is contiguous; otherwise k is
    sizes: tuple[int, int, int]  # of the outer loops, innermost first, without the last
    x: tuple[int, ...]  # strides of a, b, k, and the outer loops, innermost first
    y: tuple[int, ...]
    mask: tuple[int, ...]
    wide: bool  # 32 bits do not count the entries from the first to the last

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

    def full(self, of: Loops) -> bool:
        """Whether all entries are of sets, as long as there are sets enough."""
        return self.merge == of.merge and self.entries == of.num_b


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
    flat = row and not along and r0 > 1 and r1 <= CHOICES.small_map and r1 % 8 != 0
    flat = flat and k1_strides == [r1, r1, r1 * mask_inner]
    if flat:
        # The rows of small maps lie one after another, but each is too short and too crooked for loads of 16 bytes.
        a, b = (1, [0, 0, 0]), a
        k1, k1_strides, merge, param_div, row = k1 * r1, [1, 1, mask_inner], merge * r1, max(1, param_div) * r1, False
    outer = [*outer[::-1], *[(1, [0, 0, 0])] * (4 - len(outer))]
    num_outer = 1
    for size, _ in outer:
        num_outer *= size
    x, y, mask = (
        (a[1][operand], b[1][operand], k1_strides[operand], *(strides[operand] for _, strides in outer))
        for operand in range(3)
    )
    sizes = (outer[0][0], outer[1][0], outer[2][0])
    counts = (a[0], b[0], k1, *(size for size, _ in outer))
    reach = max(sum((n - 1) * step for n, step in zip(counts, steps, strict=True)) for steps in (x, y, mask))
    wide = reach >= NARROW
    return Loops(
        num_outer, k1, a[0], b[0], merge, params, max(1, param_div), bool(along), flat, row, sizes, x, y, mask, wide
    )


def _power(number: int) -> int:
    return 1 << (number - 1).bit_length()


def fused_tile(of: Loops, limit: int) -> Tile | None:
    """A tile that holds whole sets; None where none fits."""
    merge, entries = _power(of.merge), _power(of.num_b)
    one = merge * entries
    if of.along and not of.row:
        limit //= 2  # as several sets lie side by side, every thread keeps some of each
    if of.num_a > 1 or of.num_k % of.merge or of.flat or one > limit:
        return None
    there = _power(of.num_k // of.merge)
    if of.row:
        return Tile(min(there, max(1, CHOICES.tile // one)), merge, entries)
    # Twice a tile: of columns more is added up in a thread, and less between threads.
    line, least = (max(1, number // merge) for number in (CHOICES.columns, CHOICES.least_columns))
    sets = min(there, line, max(least, 2 * CHOICES.tile // one))
    return Tile(sets, merge, entries) if sets * one <= limit else None


def cell_tile(of: Loops) -> Tile:
    """A tile of cells and entries, for kernels that loop over what does not fit."""
    if of.row:
        entries = min(_power(of.num_b), CHOICES.tile)
        return Tile(min(_power(of.num_k), CHOICES.tile // entries), 1, entries)
    cells = min(_power(of.num_k), CHOICES.columns)
    return Tile(cells, 1, min(_power(of.num_b), CHOICES.tile // cells))


def merging(parts: int) -> int:
    """How many partial results of a set are merged at a time."""
    return min(_power(parts), CHOICES.parts)


def splits(tiles: int, steps: int, machine: int, waves: int = 1) -> int:
    """Among how many programs the steps of each of these tiles are divided; `machine` programs run at a time."""
    filling = min(quotient(machine, tiles), quotient(steps, CHOICES.steps))
    return max(filling, min(quotient(waves * machine, tiles), quotient(steps, CHOICES.many_steps)))


def quotient(number: int, by: int) -> int:
    """Rounded up."""
    return -(-number // by)


@lru_cache(maxsize=64)
def processors(device: torch.device) -> int:
    """Multiprocessors of this device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def programs(device: torch.device, num_warps: int) -> int:
    """How many programs of so many warps run at a time."""
    return processors(device) * max(1, CHOICES.warps // num_warps)


def warps(tile: Tile) -> int:
    """Warps of a program that holds one such tile."""
    return min(32, max(4, tile.size // CHOICES.entries_per_warp))


def backward_warps(tile: Tile, along: bool) -> int:
    """Warps of a program that holds x, dy, and sums for the parameters that run along."""
    return min(32 if along else 16, max(4, 2 * tile.size // CHOICES.entries_per_warp))
