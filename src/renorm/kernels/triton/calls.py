"""The two calls, forward and backward, as the extension has them, in Triton. Importing this file imports Triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from renorm.kernels.nest import Nest
from renorm.kernels.triton import backward as back
from renorm.kernels.triton import forward as ahead
from renorm.kernels.triton import launch

__all__ = ["backward", "forward"]


def forward(
    x: Tensor,
    made: Nest,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    *,
    eps: float,
    about_zero: bool,
    mask: Tensor | None,
    residual: Tensor | None,
    total: Tensor | None,
    measured: bool,
    affine: Tensor | None,
    activation: int,
    slope: float,
) -> None:
    """Measure into `stats` unless they are given, and write `y` unless it is None; as `native.forward`."""
    of = launch.loops(made.packed)
    sets, xs, ms = of.sets, of.x, of.mask
    tile = launch.fused_tile(of, launch.CHOICES.fused_forward)
    common: dict[str, Any] = {"ALONG": of.along, "ABOUT_ZERO": about_zero, "ACT": activation, "WIDE": of.wide}
    with _on(x):
        if tile is not None and y is not None and not measured:
            num_k = of.num_k // of.merge
            tiles_k = launch.quotient(num_k, tile.cells)
            ahead.fused_forward[(of.num_outer * tiles_k,)](
                x, residual, total, y, mask, weight, bias, stats,
                num_k, tiles_k, of.num_b, of.merge, sets, max(1, of.params), of.param_div, eps, slope,
                of.sizes, xs, of.y, ms,
                **common, DENSE=xs == of.y, FULL=mask is None and tile.full(of),
                SETS=tile.cells, MERGE=tile.merge, B=tile.entries, num_warps=launch.warps(tile),
            )  # fmt: skip
            return
        if residual is not None:
            assert total is not None
            x, xs = torch.add(x, residual, out=total), of.y
        tile = launch.cell_tile(of)
        tiles_k = launch.quotient(of.num_k, tile.cells)
        tiles, steps = of.num_outer * tiles_k, of.num_a * launch.quotient(of.num_b, tile.entries)
        num_warps = launch.warps(tile)
        machine = launch.programs(x.device, num_warps)
        size: dict[str, int] = {"K": tile.cells, "B": tile.entries, "num_warps": num_warps}
        if not measured:
            parts = launch.splits(tiles, steps, machine, launch.CHOICES.waves)
            partial = torch.empty((3, parts, of.cells), dtype=torch.float64, device=x.device)
            ahead.measure[(tiles * parts,)](
                x, mask, partial, of.num_k, tiles_k, of.num_a, of.num_b, of.cells, parts, of.sizes, xs, ms,
                ABOUT_ZERO=about_zero, WIDE=of.wide, **size,
            )  # fmt: skip
            at_once = launch.merging(parts * of.merge)
            num = max(1, 256 // at_once)
            ahead.finish[(launch.quotient(sets, num),)](
                partial, stats, of.cells, sets, parts, of.merge, eps, WIDE=of.wide, SETS=num, PARTS=at_once
            )
        if y is not None:
            parts = launch.quotient(steps, launch.CHOICES.steps)
            ahead.apply[(tiles * parts,)](
                x, y, mask, weight, bias, stats, affine,
                of.num_k, tiles_k, of.num_a, of.num_b, of.merge, sets, parts, max(1, of.params), of.param_div, slope,
                of.sizes, xs, of.y, ms,
                **common, DENSE=xs == of.y, **size,
            )  # fmt: skip


def backward(
    x: Tensor,
    dy: Tensor,
    made: Nest,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dx: Tensor | None,
    *,
    about_zero: bool,
    mask: Tensor | None,
    fixed: bool,
    affine: Tensor | None,
    combine: Tensor | None,
    wants: tuple[bool, bool],
    affine_gradient: Tensor | None,
    dsum: Tensor | None,
    activation: int,
    slope: float,
) -> tuple[Tensor | None, Tensor | None]:
    """Write `dx` unless it is None, and give the wanted gradients of weight and bias; as `native.backward`."""
    of = launch.loops(made.packed)
    call = _Backward(of, x, dy, mask, weight, bias, stats, affine, dx, dsum, activation, slope, about_zero)
    with_weight, with_bias = wants[0] and weight is not None, wants[1] and bias is not None
    tile = launch.fused_tile(of, launch.CHOICES.fused_backward)
    with _on(x):
        if tile is not None and affine is None and combine is None and not fixed:
            dw, db = call.fused(tile, with_weight, with_bias)
        else:
            dw, db = call.in_passes(with_weight, with_bias, fixed, combine, affine_gradient)
    return _collected(dw, of, weight), _collected(db, of, bias)


class _Backward:
    """One backward pass: what all its kernels are given."""

    def __init__(self, of: launch.Loops, *tensors: Any) -> None:
        self.of = of
        self.x, self.dy, self.mask, self.weight, self.bias, self.stats, self.affine, self.dx, self.dsum = tensors[:9]
        self.activation, self.slope, self.about_zero = tensors[9:]
        self.options: dict[str, Any] = {"ABOUT_ZERO": self.about_zero, "ACT": self.activation, "WIDE": of.wide}
        self.options["DENSE"] = of.x == of.y
        self.strides = of.sizes, of.x, of.y, of.mask
        self.parameters = max(1, of.params), of.param_div

    def sums(self, wanted: bool, rows: int) -> Tensor | None:
        """Memory for the gradients of a parameter: of each cell, or where it runs along a row for each program."""
        shape = (rows, self.of.num_b) if self.of.along else (self.of.cells,)
        return torch.empty(shape, dtype=torch.float32, device=self.x.device) if wanted else None

    def fused(self, tile: launch.Tile, weight: bool, bias: bool) -> tuple[Tensor | None, Tensor | None]:
        of = self.of
        num_k = of.num_k // of.merge
        tiles_k = launch.quotient(num_k, tile.cells)
        tiles = of.num_outer * tiles_k
        num_warps = launch.backward_warps(tile, of.along)
        grid = min(tiles, launch.programs(self.x.device, num_warps)) if of.along else tiles
        dw, db = self.sums(weight, grid), self.sums(bias, grid)
        back.fused_backward[(grid,)](
            self.x, self.dy, self.dsum, self.dx, self.mask, self.weight, self.bias, self.stats, dw, db,
            num_k, tiles_k, of.num_b, of.merge, of.sets, tiles, *self.parameters, self.slope, *self.strides,
            ALONG=of.along, **self.options, FULL=self.mask is None and tile.full(of),
            SETS=tile.cells, MERGE=tile.merge, B=tile.entries, num_warps=num_warps,
        )  # fmt: skip
        return dw, db

    def in_passes(
        self, weight: bool, bias: bool, fixed: bool, combine: Tensor | None, affine_gradient: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        of, tile = self.of, launch.cell_tile(self.of)
        tiles_k = launch.quotient(of.num_k, tile.cells)
        tiles, steps = of.num_outer * tiles_k, of.num_a * launch.quotient(of.num_b, tile.entries)
        num_warps = launch.warps(tile)
        machine = launch.programs(self.x.device, num_warps)
        size: dict[str, int] = {"K": tile.cells, "B": tile.entries}
        dw = db = None
        by = combine
        if by is None:
            parts = launch.splits(tiles, steps, machine, launch.CHOICES.waves)
            partial = torch.empty((2, parts, of.cells), dtype=torch.float64, device=self.x.device)
            by = torch.empty((2, of.sets), dtype=torch.float64, device=self.x.device)
            back.reduce[(tiles * parts,)](
                self.x, self.dy, self.mask, self.weight, self.bias, self.stats, self.affine, partial,
                of.num_k, tiles_k, of.num_a, of.num_b, of.merge, of.cells, of.sets, parts, *self.parameters,
                self.slope, *self.strides, ALONG=of.along, **self.options, **size, num_warps=num_warps,
            )  # fmt: skip
            if not of.along:
                dw, db = self.sums(weight, 1), self.sums(bias, 1)
            at_once, merge = launch.merging(parts), launch.merging(of.merge)
            num = max(1, 256 // (at_once * merge))
            back.solve[(launch.quotient(of.sets, num),)](
                partial, self.stats, self.affine, self.weight, by, dw, db, affine_gradient,
                of.cells, of.sets, parts, of.merge, *self.parameters,
                ALONG=of.along, ABOUT_ZERO=self.about_zero, FIXED=fixed, WIDE=of.wide,
                SETS=num, MERGE=merge, PARTS=at_once,
            )  # fmt: skip
        if not of.along:
            if self.dx is not None:
                parts = launch.quotient(steps, launch.CHOICES.steps)
                back.combine[(tiles * parts,)](
                    self.x, self.dy, self.dsum, self.dx, self.mask, self.weight, self.bias, self.stats, self.affine,
                    by, of.num_k, tiles_k, of.num_a, of.num_b, of.merge, of.sets, parts, *self.parameters,
                    self.slope, *self.strides, **self.options, **size, num_warps=num_warps,
                )  # fmt: skip
        elif self.dx is not None or weight or bias:
            parts = launch.splits(steps, tiles, machine)
            dw, db = self.sums(weight, parts), self.sums(bias, parts)
            back.combine_along[(steps * parts,)](
                self.x, self.dy, self.dsum, self.dx, self.mask, self.weight, self.bias, self.stats, self.affine,
                by, dw, db, of.num_k, tiles_k, of.num_b, of.sets, tiles, parts, self.slope, *self.strides,
                **self.options, **size, num_warps=2 * num_warps,
            )  # fmt: skip
        return dw, db


def _collected(sums: Tensor | None, of: launch.Loops, like: Tensor | None) -> Tensor | None:
    """A parameter's gradient from its parts, in the kernel's order: summed in one order, so the same every time."""
    if sums is None:
        return None
    assert like is not None
    if of.along:
        sums = sums.sum(0)
    elif of.cells != of.params:
        sums = sums.view(-1, of.params, of.param_div).sum((0, 2))
    return sums.to(like.dtype).view(like.shape)


def _on(x: Tensor) -> Any:
    """Triton launches on the current device; the tensors may be on another."""
    return torch.cuda.device(x.get_device() if x.is_cuda else -1)
