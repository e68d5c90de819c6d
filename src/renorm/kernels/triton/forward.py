"""Forward: a norm whose sets fit a tile in one pass; any other by measure, finish and apply.

Entries are float32 in here, statistics float64: mean, biased variance, count and 1 / sqrt(var + eps), one row each
over the sets. Sums are of x - shift, with a shift near the mean.
"""

import triton
import triton.language as tl

from renorm.kernels.triton.tiles import (
    ROUGH,
    activate,
    bases_of,
    cell_line,
    counted,
    offset_of,
    parameter_of,
    place,
    rounded_line,
    span,
    wide,
)

__all__ = ["apply", "finish", "fused_forward", "measure"]


@triton.jit(do_not_specialize=["tiles_k", "sets"], do_not_specialize_on_alignment=ROUGH)
def fused_forward(
    x_ptr,
    residual_ptr,
    total_ptr,
    y_ptr,
    mask_ptr,
    w_ptr,
    b_ptr,
    stats_ptr,
    num_k,  # sets in the innermost cell loop
    tiles_k,
    num_b,
    merge,
    sets,
    num_params,
    param_div,
    eps,
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
    FULL: tl.constexpr,  # the tile has no entries beyond those of its sets, nor is there a mask
    SETS: tl.constexpr,
    MERGE: tl.constexpr,
    B: tl.constexpr,
):
    """Measure, standardize and recover a tile of SETS x MERGE cells x B entries."""
    outer, s = place(counted(tl.program_id(0), WIDE), num_k, tiles_k, SETS)
    m = tl.arange(0, MERGE)
    b = counted(tl.arange(0, B), WIDE)
    k = s[:, None] * merge + m[None, :]
    inside_k = (s < num_k)[:, None] & (m < merge)[None, :]
    inside = inside_k[:, :, None] & (b < num_b)[None, None, :]
    y_offset = offset_of(outer, sizes, ys) + k[:, :, None] * ys[2] + b[None, None, :] * ys[1]
    x_offset = y_offset
    if not DENSE:
        x_offset = offset_of(outer, sizes, xs) + k[:, :, None] * xs[2] + b[None, None, :] * xs[1]
    x = tl.load(x_ptr + x_offset, inside, 0.0)
    if residual_ptr is not None:
        x = (x.to(tl.float32) + tl.load(residual_ptr + y_offset, inside, 0.0).to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + y_offset, x, inside)
    x = x.to(tl.float32)
    real = inside
    count = tl.full([SETS], 1, tl.float32) * merge * num_b
    if mask_ptr is not None:
        m_offset = offset_of(outer, sizes, ms) + k[:, :, None] * ms[2] + b[None, None, :] * ms[1]
        real = inside & (tl.load(mask_ptr + m_offset, inside, 0) != 0)
        count = tl.sum(tl.sum(real.to(tl.float32), 2), 1)
    n = tl.maximum(count, 1.0)
    mean = tl.zeros([SETS], tl.float64)
    if ABOUT_ZERO:
        if not FULL:
            x = tl.where(real, x, 0.0)
        var = tl.sum(tl.sum(x * x, 2), 1) / n
    else:
        # The mean, and the mean of what it leaves: a mean 1e4 times the deviation costs nothing.
        pivot = tl.sum(tl.sum(x if FULL else tl.where(real, x, 0.0), 2), 1) / n
        x -= pivot[:, None, None]
        if not FULL:
            x = tl.where(real, x, 0.0)
        rest = tl.sum(tl.sum(x, 2), 1) / n
        var = tl.sum(tl.sum(x * x, 2), 1) / n - rest * rest
        var = tl.where(var < 0, 0.0, var)
        x -= rest[:, None, None]
        mean = pivot.to(tl.float64) + rest.to(tl.float64)
    var = tl.where(count > 0, var, 1.0)
    # As exact as var is: in float64 this root is half of all instructions where sets are small.
    rstd = tl.div_rn(1.0, tl.sqrt_rn(var + eps))
    index = outer * num_k + s
    tl.store(stats_ptr + index, mean, s < num_k)
    tl.store(stats_ptr + sets + index, var.to(tl.float64), s < num_k)
    tl.store(stats_ptr + 2 * wide(sets) + index, count.to(tl.float64), s < num_k)
    tl.store(stats_ptr + 3 * wide(sets) + index, rstd.to(tl.float64), s < num_k)
    z = x * rstd[:, None, None]
    if ALONG:
        if w_ptr is not None:
            z *= tl.load(w_ptr + b, b < num_b, 0.0).to(tl.float32)[None, None, :]
        if b_ptr is not None:
            z += tl.load(b_ptr + b, b < num_b, 0.0).to(tl.float32)[None, None, :]
    else:
        p = parameter_of(outer * num_k * merge + k, num_params, param_div)
        if w_ptr is not None:
            z *= tl.load(w_ptr + p, inside_k, 0.0).to(tl.float32)[:, :, None]
        if b_ptr is not None:
            z += tl.load(b_ptr + p, inside_k, 0.0).to(tl.float32)[:, :, None]
    z = activate(z, slope, ACT)
    if mask_ptr is not None:
        z = tl.where(real, z, 0.0)
    tl.store(y_ptr + y_offset, z.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def shifted_sums(
    x_ptr,
    mask_ptr,
    x_base,
    m_base,
    k,
    inside_k,
    num_b,
    tiles_b,
    low,
    high,
    shift,
    xs,
    ms,
    WIDE: tl.constexpr,
    K: tl.constexpr,
    B: tl.constexpr,
):
    """Sum and sum of squares of x - shift, and under a mask the count, of each cell over the steps [low, high)."""
    s = tl.zeros([K, B], tl.float32)
    q = tl.zeros([K, B], tl.float32)
    n = tl.zeros([K, B], tl.int32)
    for step in range(low, high):
        b = counted(step, WIDE) % tiles_b * B + tl.arange(0, B)
        a = counted(step, WIDE) // tiles_b
        real = inside_k[:, None] & (b < num_b)[None, :]
        offset = x_base + a * xs[0] + (k * xs[2])[:, None] + (b * xs[1])[None, :]
        x = tl.load(x_ptr + offset, real, 0.0).to(tl.float32)
        if mask_ptr is not None:
            offset = m_base + a * ms[0] + (k * ms[2])[:, None] + (b * ms[1])[None, :]
            real = real & (tl.load(mask_ptr + offset, real, 0) != 0)
            n += real.to(tl.int32)
        d = tl.where(real, x - shift[:, None], 0.0)
        s += d
        q += d * d
    return tl.sum(s, 1), tl.sum(q, 1), tl.sum(n, 1)


@triton.jit(do_not_specialize=["tiles_k", "cells", "splits"], do_not_specialize_on_alignment=ROUGH)
def measure(
    x_ptr,
    mask_ptr,
    parts_ptr,  # count, mean, sum of squared deviations: (3, splits, cells)
    num_k,
    tiles_k,
    num_a,
    num_b,
    cells,
    splits,
    sizes,
    xs,
    ms,
    ABOUT_ZERO: tl.constexpr,
    WIDE: tl.constexpr,
    K: tl.constexpr,
    B: tl.constexpr,
):
    """Moments of a part of each cell of a tile."""
    pid = counted(tl.program_id(0), WIDE)
    outer, k = place(pid // splits, num_k, tiles_k, K)
    inside_k = k < num_k
    tiles_b = (counted(num_b, WIDE) + B - 1) // B
    low, high = span(pid % splits, splits, tiles_b * num_a)
    x_base = offset_of(outer, sizes, xs)
    m_base = x_base
    if mask_ptr is not None:
        m_base = offset_of(outer, sizes, ms)
    shift = tl.zeros([K], tl.float32)
    if not ABOUT_ZERO:  # the mean of the first tile
        first = tl.minimum(low + 1, high)
        s, q, n = shifted_sums(
            x_ptr, mask_ptr, x_base, m_base, k, inside_k, num_b, tiles_b, low, first, shift, xs, ms, WIDE, K, B
        )
        if mask_ptr is None:
            n += tl.minimum(num_b - low % tiles_b * B, B).to(tl.int32)
        shift = s / tl.maximum(n, 1)
        shift = tl.where(shift - shift == 0, shift, 0.0)
    s, q, n = shifted_sums(
        x_ptr, mask_ptr, x_base, m_base, k, inside_k, num_b, tiles_b, low, high, shift, xs, ms, WIDE, K, B
    )
    if mask_ptr is None:
        up_to_low = low // tiles_b * num_b + tl.minimum(low % tiles_b * B, num_b)
        up_to_high = high // tiles_b * num_b + tl.minimum(high % tiles_b * B, num_b)
        n += (up_to_high - up_to_low).to(tl.int32)
    if not ABOUT_ZERO:
        # Where the shift is more than 2.5 deviations off, sums about it have lost a digit: once more about the mean.
        far = (29.0 * s * s > 25.0 * q * n) & inside_k
        if tl.max(far.to(tl.int32), 0) > 0:
            shift += s / tl.maximum(n, 1)
            s, q, _ = shifted_sums(
                x_ptr, mask_ptr, x_base, m_base, k, inside_k, num_b, tiles_b, low, high, shift, xs, ms, WIDE, K, B
            )
    count = n.to(tl.float64)
    mean = tl.zeros([K], tl.float64)
    squares = q.to(tl.float64)
    if not ABOUT_ZERO:
        rest = s.to(tl.float64) / tl.maximum(count, 1.0)
        mean = tl.where(count > 0, shift.to(tl.float64) + rest, 0.0)
        squares -= s.to(tl.float64) * rest
        squares = tl.where(squares < 0, 0.0, squares)
    at = parts_ptr + wide(pid % splits) * cells + outer * num_k + k
    row = wide(splits) * cells
    tl.store(at, count, inside_k)
    tl.store(at + row, mean, inside_k)
    tl.store(at + 2 * row, squares, inside_k)


@triton.jit(do_not_specialize=["cells", "sets", "splits"], do_not_specialize_on_alignment=ROUGH)
def finish(
    parts_ptr,
    stats_ptr,
    cells,
    sets,
    splits,
    merge,
    eps,
    WIDE: tl.constexpr,
    SETS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Merge the parts of the cells of each set (Chan, Golub & LeVeque 1983)."""
    index = counted(tl.program_id(0), WIDE) * SETS + tl.arange(0, SETS)
    inside = (index < sets)[:, None]
    row = wide(splits) * cells
    total = tl.zeros([SETS], tl.float64)
    mean = tl.zeros([SETS], tl.float64)
    squares = tl.zeros([SETS], tl.float64)
    for first in range(0, splits * merge, PARTS):
        part = first + tl.arange(0, PARTS)
        here = inside & (part < splits * merge)[None, :]
        at = (
            parts_ptr + (part // merge).to(tl.int64)[None, :] * cells + index[:, None] * merge + (part % merge)[None, :]
        )
        count = tl.load(at, here, 0.0)
        means = tl.load(at + row, here, 0.0)
        more = tl.sum(count, 1)
        new_total = total + more
        new_mean = tl.sum(count * means, 1) / tl.maximum(more, 1.0)
        away = means - new_mean[:, None]
        squares += tl.sum(tl.load(at + 2 * row, here, 0.0) + count * away * away, 1)
        by = new_mean - mean
        share = more / tl.maximum(new_total, 1.0)
        squares += by * by * total * share
        mean += by * share
        total = new_total
    var = tl.where(total > 0, squares / tl.maximum(total, 1.0), 1.0)
    tl.store(stats_ptr + index, mean, index < sets)
    tl.store(stats_ptr + sets + index, var, index < sets)
    tl.store(stats_ptr + 2 * wide(sets) + index, total, index < sets)
    tl.store(stats_ptr + 3 * wide(sets) + index, 1.0 / tl.sqrt(var + eps), index < sets)


@triton.jit(do_not_specialize=["tiles_k", "sets", "splits"], do_not_specialize_on_alignment=ROUGH)
def apply(
    x_ptr,
    y_ptr,
    mask_ptr,
    w_ptr,
    b_ptr,
    stats_ptr,
    affine_ptr,
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
    ALONG: tl.constexpr,
    ABOUT_ZERO: tl.constexpr,
    ACT: tl.constexpr,
    WIDE: tl.constexpr,
    DENSE: tl.constexpr,
    K: tl.constexpr,
    B: tl.constexpr,
):
    """Write y by the line of each cell."""
    pid = counted(tl.program_id(0), WIDE)
    outer, k = place(pid // splits, num_k, tiles_k, K)
    inside_k = k < num_k
    cell = outer * num_k + k
    _, scale, center, shift = cell_line(stats_ptr, affine_ptr, cell // merge, sets, inside_k, ABOUT_ZERO)
    w = tl.full([K], 1.0, tl.float64)
    v = tl.zeros([K], tl.float64)
    if not ALONG:
        p = parameter_of(cell, num_params, param_div)
        if w_ptr is not None:
            w = tl.load(w_ptr + p, inside_k, 0.0).to(tl.float64)
        if b_ptr is not None:
            v = tl.load(b_ptr + p, inside_k, 0.0).to(tl.float64)
    c, slant, d = rounded_line(center, scale, center, shift, w, v)
    tiles_b = (counted(num_b, WIDE) + B - 1) // B
    low, high = span(pid % splits, splits, tiles_b * num_a)
    x_base, y_base, m_base = bases_of(mask_ptr, outer, sizes, xs, ys, ms)
    for step in range(low, high):
        b = counted(step, WIDE) % tiles_b * B + tl.arange(0, B)
        a = counted(step, WIDE) // tiles_b
        inside = inside_k[:, None] & (b < num_b)[None, :]
        y_offset = y_base + a * ys[0] + (k * ys[2])[:, None] + (b * ys[1])[None, :]
        x_offset = y_offset
        if not DENSE:
            x_offset = x_base + a * xs[0] + (k * xs[2])[:, None] + (b * xs[1])[None, :]
        x = tl.load(x_ptr + x_offset, inside, 0.0)
        z = (x.to(tl.float32) - c[:, None]) * slant[:, None] + d[:, None]
        if ALONG:
            if w_ptr is not None:
                z *= tl.load(w_ptr + b, b < num_b, 0.0).to(tl.float32)[None, :]
            if b_ptr is not None:
                z += tl.load(b_ptr + b, b < num_b, 0.0).to(tl.float32)[None, :]
        z = activate(z, slope, ACT)
        if mask_ptr is not None:
            offset = m_base + a * ms[0] + (k * ms[2])[:, None] + (b * ms[1])[None, :]
            z = tl.where(tl.load(mask_ptr + offset, inside, 0) != 0, z, 0.0)
        tl.store(y_ptr + y_offset, z.to(y_ptr.dtype.element_ty), inside)
