"""What the Triton kernels share: where a cell lies, the line of a set, activations.

A tensor is visited as ``outer x k x a x b``: `outer` and `k` number the cells, `a` and `b` are summed over. Rows and
columns differ only in which of `b` and `k` is contiguous, so one source serves both. Strides are (a, b, k, outer ...);
`sizes` are those of the outer loops, innermost first, without the last.
"""

import triton
import triton.language as tl

__all__ = [
    "ROUGH",
    "activate",
    "bases_of",
    "cell_line",
    "counted",
    "derivative",
    "offset_of",
    "parameter_of",
    "place",
    "rounded_line",
    "span",
    "wide",
]

# Triton compiles a kernel anew for arguments that are 1, or multiples of 16. The first matters for these numbers, which
# are divided by, the second for none of them. What depends on the size of a batch is given to `do_not_specialize`.
ROUGH = ["num_a", "num_params", "param_div", "sizes"]


@triton.jit
def offset_of(outer, sizes, strides):
    """Where an outer index lies."""
    offset = outer % sizes[0] * strides[3]
    outer = outer // sizes[0]
    offset += outer % sizes[1] * strides[4]
    outer = outer // sizes[1]
    offset += outer % sizes[2] * strides[5]
    return offset + outer // sizes[2] * strides[6]


@triton.jit
def bases_of(mask_ptr, outer, sizes, xs, ys, ms):
    """Where an outer index lies in x, y and the mask."""
    y_base = offset_of(outer, sizes, ys)
    m_base = y_base
    if mask_ptr is not None:
        m_base = offset_of(outer, sizes, ms)
    return offset_of(outer, sizes, xs), y_base, m_base


@triton.jit
def wide(number):
    """An argument in int64, whatever Triton made of it."""
    return tl.zeros([], tl.int64) + number


@triton.jit
def counted(number, WIDE: tl.constexpr):
    """A number that indices are made of: in int64 where 32 bits cannot count the entries, see `launch.Loops.wide`."""
    return wide(number) if WIDE else number


@triton.jit
def place(tile, num_k, tiles_k, CELLS: tl.constexpr):
    """The outer index of a tile of cells, and their indices in the innermost cell loop."""
    return tile // tiles_k, tile % tiles_k * CELLS + tl.arange(0, CELLS)


@triton.jit
def span(split, splits, total):
    """The part [low, high) of `total` that is a program's; empty ones lie at the end."""
    size = (total + splits - 1) // splits
    return tl.minimum(split * size, total), tl.minimum(split * size + size, total)


@triton.jit
def parameter_of(cell, num_params, param_div):
    """The index of a cell's parameter."""
    return cell // param_div % num_params


@triton.jit
def cell_line(stats_ptr, affine_ptr, index, sets, inside, ABOUT_ZERO: tl.constexpr):
    """Mean, scale, center and shift of sets, in float64: y = (x - center) scale + shift."""
    mean = tl.load(stats_ptr + index, inside, 0.0)
    if affine_ptr is None:
        scale = tl.load(stats_ptr + 3 * wide(sets) + index, inside, 0.0)
        center = mean
        if ABOUT_ZERO:
            center = tl.zeros_like(mean)
        shift = tl.zeros_like(mean)
    else:
        scale = tl.load(affine_ptr + index, inside, 0.0)
        center = tl.load(affine_ptr + sets + index, inside, 0.0)
        shift = tl.load(affine_ptr + 2 * wide(sets) + index, inside, 0.0)
    return mean, scale, center, shift


@triton.jit
def rounded_line(pivot, scale, center, shift, w, b):
    """The same about a float32 pivot with weight and bias, in float32; what rounding it loses is in the shift."""
    c = pivot.to(tl.float32)
    d = b + (shift - (center - c.to(tl.float64)) * scale) * w
    return c, (scale * w).to(tl.float32), d.to(tl.float32)


@triton.jit
def activate(z, slope, KIND: tl.constexpr):
    """The activation of this number, see `native.ACTIVATIONS`."""
    if KIND == 1:
        z = tl.where(z < 0, 0.0, z)
    elif KIND == 2:
        z = tl.where(z < 0, z * slope, z)
    elif KIND == 3:
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif KIND == 4:
        z = z / (1.0 + tl.exp(-z))
    return z


@triton.jit
def derivative(z, slope, KIND: tl.constexpr):
    """Its derivative at `z`."""
    if KIND == 1:
        d = tl.where(z > 0, 1.0, 0.0)
    elif KIND == 2:
        d = tl.where(z > 0, 1.0, slope)
    elif KIND == 3:
        cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        d = cdf + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    else:
        gate = 1.0 / (1.0 + tl.exp(-z))
        d = gate * (1.0 + z * (1.0 - gate))
    return d
