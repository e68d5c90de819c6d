"""Backward: sums and dx of sets that fit a tile in one pass; any other by reduce, solve and combine.

With g = dy, times the activation's derivative, the gradient of a set is ``dx = scale w g + B (x - c) + D``, where c is
its mean in float32. No atomics: what several programs add to goes to rows of its own, which are summed afterwards.
"""

import triton
import triton.language as tl

from renorm.kernels.triton.tiles import (
    ROUGH,
    bases_of,
    cell_line,
    counted,
    derivative,
    offset_of,
    parameter_of,
    place,
    rounded_line,
    span,
    wide,
)

__all__ = ["combine", "combine_along", "fused_backward", "reduce", "solve"]


@triton.jit(do_not_specialize=["tiles_k", "sets", "tiles"], do_not_specialize_on_alignment=ROUGH)
def fused_backward(
    x_ptr,
    dy_ptr,
    dsum_ptr,
    dx_ptr,
    mask_ptr,
    w_ptr,
    b_ptr,
    stats_ptr,
    dw_ptr,  # (cells), or with ALONG a row for each program
    db_ptr,
    num_k,  # sets in the innermost cell loop
    tiles_k,
    num_b,
    merge,
    sets,
    tiles,
    num_params,
    param_div,
    slope,
    sizes,
    xs,
    ys,
    ms,
    ALONG: tl.constexpr,
    ABOUT_ZERO: tl.constexpr,
    ACT: tl.constexpr,
    WIDE: tl.constexpr,
    DENSE: tl.constexpr,  # x lies as y
    FULL: tl.constexpr,  # as in forward
    SETS: tl.constexpr,
    MERGE: tl.constexpr,
    B: tl.constexpr,
):
    """All gradients of neighbouring tiles of SETS x MERGE cells x B entries."""
    pid = counted(tl.program_id(0), WIDE)
    m = tl.arange(0, MERGE)
    b = counted(tl.arange(0, B), WIDE)
    dw = tl.zeros([SETS, MERGE, B], tl.float32)
    db = tl.zeros([SETS, MERGE, B], tl.float32)
    low, high = span(pid, tl.num_programs(0), tiles)
    for tile in range(low, high):
        outer, s = place(counted(tile, WIDE), num_k, tiles_k, SETS)
        k = s[:, None] * merge + m[None, :]
        inside_s = s < num_k
        inside_k = inside_s[:, None] & (m < merge)[None, :]
        real = inside_k[:, :, None] & (b < num_b)[None, None, :]
        inside = real
        y_offset = offset_of(outer, sizes, ys) + k[:, :, None] * ys[2] + b[None, None, :] * ys[1]
        x_offset = y_offset
        if not DENSE:
            x_offset = offset_of(outer, sizes, xs) + k[:, :, None] * xs[2] + b[None, None, :] * xs[1]
        x = tl.load(x_ptr + x_offset, inside, 0.0).to(tl.float32)
        g = tl.load(dy_ptr + y_offset, inside, 0.0).to(tl.float32)
        if mask_ptr is not None:
            m_offset = offset_of(outer, sizes, ms) + k[:, :, None] * ms[2] + b[None, None, :] * ms[1]
            real = real & (tl.load(mask_ptr + m_offset, inside, 0) != 0)
        index = outer * num_k + s
        _, scale, center, shift = cell_line(stats_ptr, None, index, sets, inside_s, ABOUT_ZERO)
        one = tl.full([SETS], 1.0, tl.float64)
        c, slant, d = rounded_line(center, scale, center, shift, one, tl.zeros([SETS], tl.float64))
        n = tl.maximum(tl.load(stats_ptr + 2 * wide(sets) + index, inside_s, 1.0), 1.0).to(tl.float32)
        p = parameter_of(outer * num_k * merge + k, num_params, param_div)
        w = tl.full([SETS, MERGE, B], 1.0, tl.float32)
        v = tl.zeros([SETS, MERGE, B], tl.float32)
        if w_ptr is not None:
            if ALONG:
                w *= tl.load(w_ptr + b, b < num_b, 0.0).to(tl.float32)[None, None, :]
            else:
                w *= tl.load(w_ptr + p, inside_k, 0.0).to(tl.float32)[:, :, None]
        if b_ptr is not None:
            if ACT != 0:
                if ALONG:
                    v += tl.load(b_ptr + b, b < num_b, 0.0).to(tl.float32)[None, None, :]
                else:
                    v += tl.load(b_ptr + p, inside_k, 0.0).to(tl.float32)[:, :, None]
        x_hat = (x - c[:, None, None]) * slant[:, None, None] + d[:, None, None]
        if not FULL:
            x_hat = tl.where(real, x_hat, 0.0)
            g = tl.where(real, g, 0.0)
        if ACT != 0:
            g *= derivative(x_hat * w + v, slope, ACT)
        if ALONG:
            dw += g * x_hat
            db += g
        else:
            cell = outer * num_k * merge + k
            if dw_ptr is not None:
                tl.store(dw_ptr + cell, tl.sum(g * x_hat, 2), inside_k)
            if db_ptr is not None:
                tl.store(db_ptr + cell, tl.sum(g, 2), inside_k)
        if dx_ptr is not None:
            g *= w
            first = tl.sum(tl.sum(g, 2), 1) / n
            second = tl.sum(tl.sum(g * x_hat, 2), 1) / n
            g -= x_hat * second[:, None, None]
            if not ABOUT_ZERO:
                g -= first[:, None, None]
            dx = g * slant[:, None, None]
            if mask_ptr is not None:
                dx = tl.where(real, dx, 0.0)
            if dsum_ptr is not None:
                dx += tl.load(dsum_ptr + y_offset, inside, 0.0).to(tl.float32)
            tl.store(dx_ptr + y_offset, dx.to(dx_ptr.dtype.element_ty), inside)
    if ALONG:
        if dw_ptr is not None:
            tl.store(dw_ptr + pid * num_b + b, tl.sum(tl.sum(dw, 0), 0), b < num_b)
        if db_ptr is not None:
            tl.store(db_ptr + pid * num_b + b, tl.sum(tl.sum(db, 0), 0), b < num_b)


@triton.jit
def upstream(
    x,
    g,
    real,
    c,
    slant,
    d,
    w_ptr,
    b_ptr,
    b,
    num_b,
    slope,
    ALONG: tl.constexpr,
    ACT: tl.constexpr,
):
    """x - c, the gradient g behind the activation, and the weight along a tile's entries; 0 where nothing is real."""
    x = tl.where(real, x.to(tl.float32) - c[:, None], 0.0)
    g = tl.where(real, g.to(tl.float32), 0.0)
    w = tl.full([1, b.shape[0]], 1.0, tl.float32)
    if ALONG:
        if w_ptr is not None:
            w = tl.load(w_ptr + b, b < num_b, 0.0).to(tl.float32)[None, :]
    if ACT != 0:
        z = x * slant[:, None] + d[:, None]
        if ALONG:
            z *= w
            if b_ptr is not None:
                z += tl.load(b_ptr + b, b < num_b, 0.0).to(tl.float32)[None, :]
        g *= derivative(z, slope, ACT)
    return x, g, w


@triton.jit
def lines(
    w_ptr,
    b_ptr,
    stats_ptr,
    affine_ptr,
    cell,
    inside_k,
    merge,
    sets,
    num_params,
    param_div,
    ALONG: tl.constexpr,
    ABOUT_ZERO: tl.constexpr,
    K: tl.constexpr,
):
    """The line of each cell about its mean, and scale times weight."""
    mean, scale, center, shift = cell_line(stats_ptr, affine_ptr, cell // merge, sets, inside_k, ABOUT_ZERO)
    if ABOUT_ZERO:
        mean = tl.zeros([K], tl.float64)
    w = tl.full([K], 1.0, tl.float64)
    v = tl.zeros([K], tl.float64)
    if not ALONG:
        p = parameter_of(cell, num_params, param_div)
        if w_ptr is not None:
            w = tl.load(w_ptr + p, inside_k, 0.0).to(tl.float64)
        if b_ptr is not None:
            v = tl.load(b_ptr + p, inside_k, 0.0).to(tl.float64)
    return rounded_line(mean, scale, center, shift, w, v)


@triton.jit(do_not_specialize=["tiles_k", "cells", "sets", "splits"], do_not_specialize_on_alignment=ROUGH)
def reduce(
    x_ptr,
    dy_ptr,
    mask_ptr,
    w_ptr,
    b_ptr,
    stats_ptr,
    affine_ptr,
    parts_ptr,  # sum of g and of g (x - c), the weight in g where it runs along: (2, splits, cells)
    num_k,
    tiles_k,
    num_a,
    num_b,
    merge,
    cells,
    sets,
    splits,
    num_params,
    param_div,
    slope,
    sizes,
    xs,
    ys,
    ms,
    ALONG: tl.constexpr,
    ABOUT_ZERO: tl.constexpr,
    ACT: tl.constexpr,
    WIDE: tl.constexpr,
    DENSE: tl.constexpr,
    K: tl.constexpr,
    B: tl.constexpr,
):
    """The sums of a part of each cell of a tile."""
    pid = counted(tl.program_id(0), WIDE)
    outer, k = place(pid // splits, num_k, tiles_k, K)
    inside_k = k < num_k
    cell = outer * num_k + k
    c, slant, d = lines(
        w_ptr, b_ptr, stats_ptr, affine_ptr, cell, inside_k, merge, sets, num_params, param_div, ALONG, ABOUT_ZERO, K
    )
    tiles_b = (counted(num_b, WIDE) + B - 1) // B
    low, high = span(pid % splits, splits, tiles_b * num_a)
    x_base, y_base, m_base = bases_of(mask_ptr, outer, sizes, xs, ys, ms)
    s1 = tl.zeros([K, B], tl.float32)
    s2 = tl.zeros([K, B], tl.float32)
    for step in range(low, high):
        b = counted(step, WIDE) % tiles_b * B + tl.arange(0, B)
        a = counted(step, WIDE) // tiles_b
        real = inside_k[:, None] & (b < num_b)[None, :]
        y_offset = y_base + a * ys[0] + (k * ys[2])[:, None] + (b * ys[1])[None, :]
        x_offset = y_offset
        if not DENSE:
            x_offset = x_base + a * xs[0] + (k * xs[2])[:, None] + (b * xs[1])[None, :]
        x = tl.load(x_ptr + x_offset, real, 0.0)
        g = tl.load(dy_ptr + y_offset, real, 0.0)
        if mask_ptr is not None:
            offset = m_base + a * ms[0] + (k * ms[2])[:, None] + (b * ms[1])[None, :]
            real = real & (tl.load(mask_ptr + offset, real, 0) != 0)
        x, g, w = upstream(x, g, real, c, slant, d, w_ptr, b_ptr, b, num_b, slope, ALONG, ACT)
        g *= w
        s1 += g
        s2 += g * x
    at = parts_ptr + wide(pid % splits) * cells + cell
    tl.store(at, tl.sum(s1, 1), inside_k)
    tl.store(at + wide(splits) * cells, tl.sum(s2, 1), inside_k)


@triton.jit(do_not_specialize=["cells", "sets", "splits"], do_not_specialize_on_alignment=ROUGH)
def solve(
    parts_ptr,
    stats_ptr,
    affine_ptr,
    w_ptr,
    by_ptr,  # B and D: (2, sets)
    dw_ptr,  # of each cell
    db_ptr,
    daffine_ptr,
    cells,
    sets,
    splits,
    merge,
    num_params,
    param_div,
    ALONG: tl.constexpr,
    ABOUT_ZERO: tl.constexpr,
    FIXED: tl.constexpr,
    WIDE: tl.constexpr,
    SETS: tl.constexpr,
    MERGE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """From the sums of each cell to the parameters' gradients, and to what dx needs."""
    index = counted(tl.program_id(0), WIDE) * SETS + tl.arange(0, SETS)
    inside = index < sets
    mean, scale, center, shift = cell_line(stats_ptr, affine_ptr, index, sets, inside, ABOUT_ZERO)
    if ABOUT_ZERO:
        mean = tl.zeros([SETS], tl.float64)
    away = center - mean.to(tl.float32).to(tl.float64)
    first_sum = tl.zeros([SETS, MERGE], tl.float64)
    second_sum = tl.zeros([SETS, MERGE], tl.float64)
    for first in range(0, merge, MERGE):
        m = first + tl.arange(0, MERGE)
        here = inside[:, None] & (m < merge)[None, :]
        cell = index[:, None] * merge + m[None, :]
        g1 = tl.zeros([SETS, MERGE, PARTS], tl.float64)
        g2 = tl.zeros([SETS, MERGE, PARTS], tl.float64)
        for part in range(0, splits, PARTS):
            split = part + tl.arange(0, PARTS)
            at = parts_ptr + split.to(tl.int64)[None, None, :] * cells + cell[:, :, None]
            there = here[:, :, None] & (split < splits)[None, None, :]
            g1 += tl.load(at, there, 0.0)
            g2 += tl.load(at + wide(splits) * cells, there, 0.0)
        g1 = tl.sum(g1, 2)
        g2 = tl.sum(g2, 2) - away[:, None] * g1
        if dw_ptr is not None:
            tl.store(dw_ptr + cell, (scale[:, None] * g2 + shift[:, None] * g1).to(tl.float32), here)
        if db_ptr is not None:
            tl.store(db_ptr + cell, g1.to(tl.float32), here)
        if not ALONG:
            if w_ptr is not None:
                w = tl.load(w_ptr + parameter_of(cell, num_params, param_div), here, 0.0).to(tl.float64)
                g1 *= w
                g2 *= w
        first_sum += g1
        second_sum += g2
    s1 = tl.sum(first_sum, 1)
    scaled = tl.sum(second_sum, 1)
    if daffine_ptr is not None:
        tl.store(daffine_ptr + index, scaled, inside)
        tl.store(daffine_ptr + sets + index, -scale * s1, inside)
        tl.store(daffine_ptr + 2 * wide(sets) + index, s1, inside)
    b = tl.zeros([SETS], tl.float64)
    d = tl.zeros([SETS], tl.float64)
    if not FIXED:
        count = tl.load(stats_ptr + 2 * wide(sets) + index, inside, 0.0)
        n = tl.maximum(count, 1.0)
        b = -scale * scale * scale * scaled / n
        d = -b * away
        if not ABOUT_ZERO:
            d -= scale * s1 / n
        b = tl.where(count > 0, b, 0.0)
        d = tl.where(count > 0, d, 0.0)
    tl.store(by_ptr + index, b, inside)
    tl.store(by_ptr + sets + index, d, inside)


@triton.jit(do_not_specialize=["tiles_k", "sets", "splits"], do_not_specialize_on_alignment=ROUGH)
def combine(
    x_ptr,
    dy_ptr,
    dsum_ptr,
    dx_ptr,
    mask_ptr,
    w_ptr,
    b_ptr,
    stats_ptr,
    affine_ptr,
    by_ptr,
    num_k,
    tiles_k,
    num_a,
    num_b,
    merge,
    sets,
    splits,
    num_params,
    param_div,
    slope,
    sizes,
    xs,
    ys,
    ms,
    ABOUT_ZERO: tl.constexpr,
    ACT: tl.constexpr,
    WIDE: tl.constexpr,
    DENSE: tl.constexpr,
    K: tl.constexpr,
    B: tl.constexpr,
):
    """Write dx."""
    pid = counted(tl.program_id(0), WIDE)
    outer, k = place(pid // splits, num_k, tiles_k, K)
    inside_k = k < num_k
    cell = outer * num_k + k
    c, slant, d = lines(
        w_ptr, b_ptr, stats_ptr, affine_ptr, cell, inside_k, merge, sets, num_params, param_div, False, ABOUT_ZERO, K
    )
    by_b = tl.load(by_ptr + cell // merge, inside_k, 0.0).to(tl.float32)
    by_d = tl.load(by_ptr + sets + cell // merge, inside_k, 0.0).to(tl.float32)
    tiles_b = (counted(num_b, WIDE) + B - 1) // B
    low, high = span(pid % splits, splits, tiles_b * num_a)
    x_base, y_base, m_base = bases_of(mask_ptr, outer, sizes, xs, ys, ms)
    for step in range(low, high):
        b = counted(step, WIDE) % tiles_b * B + tl.arange(0, B)
        a = counted(step, WIDE) // tiles_b
        inside = inside_k[:, None] & (b < num_b)[None, :]
        real = inside
        y_offset = y_base + a * ys[0] + (k * ys[2])[:, None] + (b * ys[1])[None, :]
        x_offset = y_offset
        if not DENSE:
            x_offset = x_base + a * xs[0] + (k * xs[2])[:, None] + (b * xs[1])[None, :]
        x = tl.load(x_ptr + x_offset, inside, 0.0)
        g = tl.load(dy_ptr + y_offset, inside, 0.0)
        if mask_ptr is not None:
            offset = m_base + a * ms[0] + (k * ms[2])[:, None] + (b * ms[1])[None, :]
            real = real & (tl.load(mask_ptr + offset, inside, 0) != 0)
        x, g, _ = upstream(x, g, real, c, slant, d, w_ptr, b_ptr, b, num_b, slope, False, ACT)
        dx = tl.where(real, g * slant[:, None] + x * by_b[:, None] + by_d[:, None], 0.0)
        if dsum_ptr is not None:
            dx += tl.load(dsum_ptr + y_offset, inside, 0.0).to(tl.float32)
        tl.store(dx_ptr + y_offset, dx.to(dx_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["tiles_k", "sets", "tiles", "splits"], do_not_specialize_on_alignment=ROUGH)
def combine_along(
    x_ptr,
    dy_ptr,
    dsum_ptr,
    dx_ptr,
    mask_ptr,
    w_ptr,
    b_ptr,
    stats_ptr,
    affine_ptr,
    by_ptr,
    dw_ptr,  # a row for each program of an entry
    db_ptr,
    num_k,
    tiles_k,
    num_b,
    sets,
    tiles,
    splits,
    slope,
    sizes,
    xs,
    ys,
    ms,
    ABOUT_ZERO: tl.constexpr,
    ACT: tl.constexpr,
    WIDE: tl.constexpr,
    DENSE: tl.constexpr,
    K: tl.constexpr,
    B: tl.constexpr,
):
    """The same where the parameters run along: a program stays with its entries and sums their gradients over cells."""
    pid = counted(tl.program_id(0), WIDE)
    b = pid // splits * B + tl.arange(0, B)
    low, high = span(pid % splits, splits, tiles)
    dw = tl.zeros([K, B], tl.float32)
    db = tl.zeros([K, B], tl.float32)
    for tile in range(low, high):
        outer, k = place(counted(tile, WIDE), num_k, tiles_k, K)
        inside_k = k < num_k
        cell = outer * num_k + k
        c, slant, d = lines(w_ptr, b_ptr, stats_ptr, affine_ptr, cell, inside_k, 1, sets, 1, 1, True, ABOUT_ZERO, K)
        inside = inside_k[:, None] & (b < num_b)[None, :]
        real = inside
        y_offset = offset_of(outer, sizes, ys) + (k * ys[2])[:, None] + (b * ys[1])[None, :]
        x_offset = y_offset
        if not DENSE:
            x_offset = offset_of(outer, sizes, xs) + (k * xs[2])[:, None] + (b * xs[1])[None, :]
        x = tl.load(x_ptr + x_offset, inside, 0.0)
        g = tl.load(dy_ptr + y_offset, inside, 0.0)
        if mask_ptr is not None:
            offset = offset_of(outer, sizes, ms) + (k * ms[2])[:, None] + (b * ms[1])[None, :]
            real = real & (tl.load(mask_ptr + offset, inside, 0) != 0)
        x, g, w = upstream(x, g, real, c, slant, d, w_ptr, b_ptr, b, num_b, slope, True, ACT)
        dw += g * (x * slant[:, None] + d[:, None])
        db += g
        if dx_ptr is not None:
            by_b = tl.load(by_ptr + cell, inside_k, 0.0).to(tl.float32)
            by_d = tl.load(by_ptr + sets + cell, inside_k, 0.0).to(tl.float32)
            dx = tl.where(real, g * w * slant[:, None] + x * by_b[:, None] + by_d[:, None], 0.0)
            if dsum_ptr is not None:
                dx += tl.load(dsum_ptr + y_offset, inside, 0.0).to(tl.float32)
            tl.store(dx_ptr + y_offset, dx.to(dx_ptr.dtype.element_ty), inside)
    if dw_ptr is not None:
        tl.store(dw_ptr + pid % splits * num_b + b, tl.sum(dw, 0), b < num_b)
    if db_ptr is not None:
        tl.store(db_ptr + pid % splits * num_b + b, tl.sum(db, 0), b < num_b)
