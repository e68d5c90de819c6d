"""Backward: sums and dx of sets that fit a tile in one pass; any other by reduce, solve and combine.

With g = dy, times the activation's derivative, the gradient of a set is ``dx = scale w g + B (x - c) + D``, where c is
its mean in float32. No atomics: what several programs add to goes to rows of its own, which are summed afterwards.
"""

import triton
import triton.language as tl

from renorm.kernels.triton.tiles import (
    cell_line,
    derivative,
    offset_of,
    parameter_of,
    place,
    rounded_line,
    span,
    wide,
)

__all__ = ["combine", "combine_along", "fused_backward", "reduce", "solve"]


@triton.jit
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
    SETS: tl.constexpr,
    MERGE: tl.constexpr,
    B: tl.constexpr,
):
    """All gradients of neighbouring tiles of SETS x MERGE cells x B entries."""
    pid = tl.program_id(0).to(tl.int64)
    m = tl.arange(0, MERGE)
    b = tl.arange(0, B).to(tl.int64)
    dw = tl.zeros([B], tl.float32)
    db = tl.zeros([B], tl.float32)
    low, high = span(pid, tl.num_programs(0), wide(tiles))
    for tile in range(low, high):
        outer, s = place(tile, num_k, tiles_k, SETS)
        k = s[:, None] * merge + m[None, :]
        inside_s = s < num_k
        inside_k = inside_s[:, None] & (m < merge)[None, :]
        real = inside_k[:, :, None] & (b < num_b)[None, None, :]
        inside = real
        y_offset = offset_of(outer, sizes, ys) + k[:, :, None] * ys[2] + b[None, None, :] * ys[1]
        x_offset = offset_of(outer, sizes, xs) + k[:, :, None] * xs[2] + b[None, None, :] * xs[1]
        x = tl.load(x_ptr + x_offset, inside, 0.0).to(tl.float32)
        g = tl.load(dy_ptr + y_offset, inside, 0.0).to(tl.float32)
        if mask_ptr is not None:
            m_offset = offset_of(outer, sizes, ms) + k[:, :, None] * ms[2] + b[None, None, :] * ms[1]
            real = real & (tl.load(mask_ptr + m_offset, inside, 0) != 0)
            g = tl.where(real, g, 0.0)
        index = outer * num_k + s
        _, scale, center, shift = cell_line(stats_ptr, None, index, sets, inside_s, ABOUT_ZERO)
        one = tl.full([SETS], 1.0, tl.float64)
        c, slant, d = rounded_line(center, scale, center, shift, one, tl.zeros([SETS], tl.float64))
        n = tl.maximum(tl.load(stats_ptr + 2 * wide(sets) + index, inside_s, 1.0), 1.0).to(tl.float32)
        x_hat = (x - c[:, None, None]) * slant[:, None, None] + d[:, None, None]
        x_hat = tl.where(real, x_hat, 0.0)
        p = parameter_of(outer * num_k * merge + k, num_params, param_div)
        w = tl.full([SETS, MERGE, B], 1.0, tl.float32)
        if w_ptr is not None:
            if ALONG:
                w *= tl.load(w_ptr + b, b < num_b, 0.0).to(tl.float32)[None, None, :]
            else:
                w *= tl.load(w_ptr + p, inside_k, 0.0).to(tl.float32)[:, :, None]
        if ACT != 0:
            z = x_hat * w
            if b_ptr is not None:
                if ALONG:
                    z += tl.load(b_ptr + b, b < num_b, 0.0).to(tl.float32)[None, None, :]
                else:
                    z += tl.load(b_ptr + p, inside_k, 0.0).to(tl.float32)[:, :, None]
            g *= derivative(z, slope, ACT)
        if ALONG:
            dw += tl.sum(tl.sum(g * x_hat, 0), 0)
            db += tl.sum(tl.sum(g, 0), 0)
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
            dx = tl.where(real, g * slant[:, None, None], 0.0)
            if dsum_ptr is not None:
                dx += tl.load(dsum_ptr + y_offset, inside, 0.0).to(tl.float32)
            tl.store(dx_ptr + y_offset, dx.to(dx_ptr.dtype.element_ty), inside)
    if ALONG:
        if dw_ptr is not None:
            tl.store(dw_ptr + pid * num_b + b, dw, b < num_b)
        if db_ptr is not None:
            tl.store(db_ptr + pid * num_b + b, db, b < num_b)


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


@triton.jit
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
    K: tl.constexpr,
    B: tl.constexpr,
):
    """The sums of a part of each cell of a tile."""
    pid = tl.program_id(0).to(tl.int64)
    outer, k = place(pid // splits, num_k, tiles_k, K)
    inside_k = k < num_k
    cell = outer * num_k + k
    c, slant, d = lines(
        w_ptr, b_ptr, stats_ptr, affine_ptr, cell, inside_k, merge, sets, num_params, param_div, ALONG, ABOUT_ZERO, K
    )
    tiles_b = (num_b + B - 1) // B
    low, high = span(pid % splits, splits, tiles_b * num_a)
    x_base = offset_of(outer, sizes, xs)
    y_base = offset_of(outer, sizes, ys)
    m_base = y_base
    if mask_ptr is not None:
        m_base = offset_of(outer, sizes, ms)
    s1 = tl.zeros([K, B], tl.float32)
    s2 = tl.zeros([K, B], tl.float32)
    for step in range(low, high):
        b = step % tiles_b * B + tl.arange(0, B)
        a = step // tiles_b
        real = inside_k[:, None] & (b < num_b)[None, :]
        x = tl.load(x_ptr + x_base + a * xs[0] + (k * xs[2])[:, None] + (b * xs[1])[None, :], real, 0.0)
        g = tl.load(dy_ptr + y_base + a * ys[0] + (k * ys[2])[:, None] + (b * ys[1])[None, :], real, 0.0)
        if mask_ptr is not None:
            offset = m_base + a * ms[0] + (k * ms[2])[:, None] + (b * ms[1])[None, :]
            real = real & (tl.load(mask_ptr + offset, real, 0) != 0)
        x, g, w = upstream(x, g, real, c, slant, d, w_ptr, b_ptr, b, num_b, slope, ALONG, ACT)
        g *= w
        s1 += g
        s2 += g * x
    at = parts_ptr + pid % splits * cells + cell
    tl.store(at, tl.sum(s1, 1), inside_k)
    tl.store(at + wide(splits) * cells, tl.sum(s2, 1), inside_k)


@triton.jit
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
    SETS: tl.constexpr,
    MERGE: tl.constexpr,
):
    """From the sums of each cell to the parameters' gradients, and to what dx needs."""
    index = tl.program_id(0).to(tl.int64) * SETS + tl.arange(0, SETS)
    inside = index < sets
    mean, scale, center, shift = cell_line(stats_ptr, affine_ptr, index, sets, inside, ABOUT_ZERO)
    if ABOUT_ZERO:
        mean = tl.zeros([SETS], tl.float64)
    away = center - mean.to(tl.float32).to(tl.float64)
    s1 = tl.zeros([SETS], tl.float64)
    scaled = tl.zeros([SETS], tl.float64)
    for first in range(0, merge, MERGE):
        m = first + tl.arange(0, MERGE)
        here = inside[:, None] & (m < merge)[None, :]
        cell = index[:, None] * merge + m[None, :]
        g1 = tl.zeros([SETS, MERGE], tl.float64)
        g2 = tl.zeros([SETS, MERGE], tl.float64)
        for split in range(0, splits):
            at = parts_ptr + wide(split) * cells + cell
            g1 += tl.load(at, here, 0.0)
            g2 += tl.load(at + wide(splits) * cells, here, 0.0)
        g2 -= away[:, None] * g1
        if dw_ptr is not None:
            tl.store(dw_ptr + cell, (scale[:, None] * g2 + shift[:, None] * g1).to(tl.float32), here)
        if db_ptr is not None:
            tl.store(db_ptr + cell, g1.to(tl.float32), here)
        if not ALONG:
            if w_ptr is not None:
                w = tl.load(w_ptr + parameter_of(cell, num_params, param_div), here, 0.0).to(tl.float64)
                g1 *= w
                g2 *= w
        s1 += tl.sum(g1, 1)
        scaled += tl.sum(g2, 1)
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


@triton.jit
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
    K: tl.constexpr,
    B: tl.constexpr,
):
    """Write dx."""
    pid = tl.program_id(0).to(tl.int64)
    outer, k = place(pid // splits, num_k, tiles_k, K)
    inside_k = k < num_k
    cell = outer * num_k + k
    c, slant, d = lines(
        w_ptr, b_ptr, stats_ptr, affine_ptr, cell, inside_k, merge, sets, num_params, param_div, False, ABOUT_ZERO, K
    )
    by_b = tl.load(by_ptr + cell // merge, inside_k, 0.0).to(tl.float32)
    by_d = tl.load(by_ptr + sets + cell // merge, inside_k, 0.0).to(tl.float32)
    tiles_b = (num_b + B - 1) // B
    low, high = span(pid % splits, splits, tiles_b * num_a)
    x_base = offset_of(outer, sizes, xs)
    y_base = offset_of(outer, sizes, ys)
    m_base = y_base
    if mask_ptr is not None:
        m_base = offset_of(outer, sizes, ms)
    for step in range(low, high):
        b = step % tiles_b * B + tl.arange(0, B)
        a = step // tiles_b
        inside = inside_k[:, None] & (b < num_b)[None, :]
        real = inside
        y_offset = y_base + a * ys[0] + (k * ys[2])[:, None] + (b * ys[1])[None, :]
        x = tl.load(x_ptr + x_base + a * xs[0] + (k * xs[2])[:, None] + (b * xs[1])[None, :], inside, 0.0)
        g = tl.load(dy_ptr + y_offset, inside, 0.0)
        if mask_ptr is not None:
            offset = m_base + a * ms[0] + (k * ms[2])[:, None] + (b * ms[1])[None, :]
            real = real & (tl.load(mask_ptr + offset, inside, 0) != 0)
        x, g, _ = upstream(x, g, real, c, slant, d, w_ptr, b_ptr, b, num_b, slope, False, ACT)
        dx = tl.where(real, g * slant[:, None] + x * by_b[:, None] + by_d[:, None], 0.0)
        if dsum_ptr is not None:
            dx += tl.load(dsum_ptr + y_offset, inside, 0.0).to(tl.float32)
        tl.store(dx_ptr + y_offset, dx.to(dx_ptr.dtype.element_ty), inside)


@triton.jit
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
    K: tl.constexpr,
    B: tl.constexpr,
):
    """The same where the parameters run along: a program stays with its entries and sums their gradients over cells."""
    pid = tl.program_id(0).to(tl.int64)
    b = pid // splits * B + tl.arange(0, B)
    low, high = span(pid % splits, splits, wide(tiles))
    dw = tl.zeros([B], tl.float32)
    db = tl.zeros([B], tl.float32)
    for tile in range(low, high):
        outer, k = place(tile, num_k, tiles_k, K)
        inside_k = k < num_k
        cell = outer * num_k + k
        c, slant, d = lines(w_ptr, b_ptr, stats_ptr, affine_ptr, cell, inside_k, 1, sets, 1, 1, True, ABOUT_ZERO, K)
        inside = inside_k[:, None] & (b < num_b)[None, :]
        real = inside
        y_offset = offset_of(outer, sizes, ys) + (k * ys[2])[:, None] + (b * ys[1])[None, :]
        x_offset = offset_of(outer, sizes, xs) + (k * xs[2])[:, None] + (b * xs[1])[None, :]
        x = tl.load(x_ptr + x_offset, inside, 0.0)
        g = tl.load(dy_ptr + y_offset, inside, 0.0)
        if mask_ptr is not None:
            offset = offset_of(outer, sizes, ms) + (k * ms[2])[:, None] + (b * ms[1])[None, :]
            real = real & (tl.load(mask_ptr + offset, inside, 0) != 0)
        x, g, w = upstream(x, g, real, c, slant, d, w_ptr, b_ptr, b, num_b, slope, True, ACT)
        dw += tl.sum(g * (x * slant[:, None] + d[:, None]), 0)
        db += tl.sum(g, 0)
        if dx_ptr is not None:
            by_b = tl.load(by_ptr + cell, inside_k, 0.0).to(tl.float32)
            by_d = tl.load(by_ptr + sets + cell, inside_k, 0.0).to(tl.float32)
            dx = tl.where(real, g * w * slant[:, None] + x * by_b[:, None] + by_d[:, None], 0.0)
            if dsum_ptr is not None:
                dx += tl.load(dsum_ptr + y_offset, inside, 0.0).to(tl.float32)
            tl.store(dx_ptr + y_offset, dx.to(dx_ptr.dtype.element_ty), inside)
    if dw_ptr is not None:
        tl.store(dw_ptr + pid % splits * num_b + b, dw, b < num_b)
    if db_ptr is not None:
        tl.store(db_ptr + pid % splits * num_b + b, db, b < num_b)
