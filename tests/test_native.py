"""The native kernels: every driver, dtype, layout and thread count against float64 formulas written here.

They are called directly, so that whatever `select` would choose it is they that run. An error is counted in units of
the accumulator's rounding times the terms that were added up, after half a unit for rounding the result: see `Wanted`.
"""

import math
import os
import re
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from checks import close, eps_of, layouts
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_plan import cases
from torch import Tensor, nn

import renorm as rn
from renorm.errors import BackendError, ShapeError
from renorm.kernels import Affine, native, reference
from renorm.pattern import Partition, partition

with_extension = pytest.mark.skipif(
    native.native_module() is None, reason="renorm was installed without its extension"
)
needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="what a process has is read from /proc")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
HALF = (torch.bfloat16, torch.float16)
EPS = 1e-5


# ---- the formulas


class Wanted(NamedTuple):
    """What a norm must give, in float64, and beside each the sum of the sizes of the terms it is made of."""

    y: tuple[Tensor, Tensor]
    dx: tuple[Tensor, Tensor]
    dw: tuple[Tensor, Tensor]
    db: tuple[Tensor, Tensor]
    mean: Tensor  # in the split view, with 1 on every averaged axis
    var: Tensor


class Setting(NamedTuple):
    """One call of a norm, but for the input."""

    part: Partition
    weight: Tensor | None
    bias: Tensor | None
    dy: Tensor
    mask: Tensor | None = None
    about_zero: bool = False
    eps: float = EPS


def formula(x: Tensor, s: Setting) -> Wanted:
    """A norm and its gradients, by the formulas."""
    v, g = s.part.view(x.double()), s.part.view(s.dy.double())
    real = torch.ones_like(v, dtype=torch.bool) if s.mask is None else s.part.view(s.mask.expand(x.shape))
    dims = s.part.reduced

    def total(values: Tensor) -> Tensor:
        values = torch.where(real, values, 0)
        return values.sum(dims, keepdim=True) if dims else values

    def over_all(values: Tensor, like: Tensor | None) -> Tensor:
        others = [i for i in range(v.dim()) if i not in s.part.weighted]
        values = torch.where(real, values, 0)
        values = values.sum(others) if others else values
        return values if like is None else values.reshape(like.shape)

    n = total(torch.ones_like(v)).clamp(min=1)
    empty = total(torch.ones_like(v)) == 0
    mean = torch.zeros_like(n) if s.about_zero else total(v) / n
    var = torch.where(empty, 1, total((v - mean).square()) / n)
    rstd = (var + s.eps).rsqrt()
    x_hat = (v - mean) * rstd
    along = [size if i in s.part.weighted else 1 for i, size in enumerate(v.shape)]
    w = torch.ones(along).double() if s.weight is None else s.weight.double().reshape(along)
    b = torch.zeros(along).double() if s.bias is None else s.bias.double().reshape(along)
    h = g * w
    first, second = (0 if s.about_zero else 1) * total(h) / n, total(h * x_hat) / n
    dx = rstd * (h - first - x_hat * second)
    size = h.abs() + total(h.abs()) / n + x_hat.abs() * total((h * x_hat).abs()) / n
    pairs = [
        (torch.where(real, a, 0).reshape(x.shape), torch.where(real, terms, 0).reshape(x.shape))
        for a, terms in ((x_hat * w + b, (x_hat.abs() + 1) * w.abs() + b.abs()), (dx, rstd * size))
    ]
    pairs += [
        (over_all(g * x_hat, s.weight), over_all((g * x_hat).abs() + g.abs(), s.weight)),
        (over_all(g, s.bias), over_all(g.abs(), s.bias)),
    ]
    return Wanted(*pairs, mean, var)


def units(actual: Tensor, wanted: tuple[Tensor, Tensor], accumulator: torch.dtype) -> float:
    """The largest error beyond rounding the result to its dtype, in roundings of the accumulator for each term."""
    value, terms = wanted
    if value.numel() == 0:
        return 0.0
    tiny = 2.0**-25 if actual.dtype == torch.float16 else 1e-42  # half a subnormal
    rounding = value.abs() * (0 if actual.dtype == accumulator else 0.505 * eps_of(actual.dtype)) + tiny
    beyond = ((actual.double() - value).abs() - rounding).clamp(min=0)
    return (beyond / (eps_of(accumulator) * terms + 1e-300)).max().item()


def compare(x: Tensor, s: Setting, wanted: Wanted, found: "Found", label: str = "", k: float = 16) -> None:
    """`k`: a sum of 2048 terms by 16 to 64 partial sums errs 3 units, the coefficients and what they multiply 2 more
    each; 6 were seen."""
    accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name in ("y", "dx", "dw", "db"):
        actual = getattr(found, name)
        if actual is None:
            continue
        error = units(actual, getattr(wanted, name), accumulator)
        assert error <= k, f"{label}: {name} is off by {error:.3g} units, allowed {k}"  # NaN fails too
    if s.mask is not None:
        assert (found.y[~s.mask.expand(x.shape)] == 0).all(), label
        assert found.dx is None or (found.dx[~s.mask.expand(x.shape)] == 0).all(), label


class Found(NamedTuple):
    """What the kernels gave."""

    y: Tensor
    dx: Tensor | None
    dw: Tensor | None
    db: Tensor | None
    mean: Tensor
    var: Tensor


def nest_of(x: Tensor, s: Setting):
    mask = None if s.mask is None else s.mask.expand(x.shape)
    made = native.fit(x, s.part, s.weight, s.bias, mask)
    assert not isinstance(made, str), made
    return made, mask


def run(x: Tensor, s: Setting, *, apart: bool = False) -> Found:
    """The kernels in one call, or measure and apply apart with the plain solve between them."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, s.weight, s.bias)]
    made, mask = nest_of(x, s)
    if apart:
        moments, measured = native.measure(leaves[0], s.part, made, mask=mask, about_zero=s.about_zero)
        affine = Affine((moments.var + s.eps).rsqrt(), None if s.about_zero else moments.mean)
        y = native.apply(leaves[0], s.part, measured, affine, *leaves[1:], about_zero=s.about_zero)
    else:
        y, stats = native.normalize(
            leaves[0], s.part, made, *leaves[1:], s.eps, about_zero=s.about_zero, mask=mask
        )
        moments = native.moments_of(stats, s.part, made)
    gradients = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], s.dy))
    dx, dw, db = (None if t is None else next(gradients) for t in leaves)
    return Found(y.detach(), dx, dw, db, moments.mean.detach(), moments.var.detach())


def same(a: Found, b: Found) -> bool:
    return all(p is q or torch.equal(p, q) for p, q in zip(a, b, strict=True))


@contextmanager
def threads(number: int):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def draw(shape, dtype=torch.float32, seed=0, mean=0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + mean).to(dtype)


# ---- the drivers


@dataclass(frozen=True)
class Case:
    """A norm and a shape that take one way through the kernels."""

    pattern: str
    shape: tuple[int, ...]
    form: str  # of the loops over contiguous memory: r0 x k1 x r1, cells that share statistics, along
    sizes: tuple[tuple[str, int], ...] = ()
    weighted: str = "c"
    about_zero: bool = False

    def setting(self, dtype: torch.dtype, parameters: torch.dtype | None = None) -> Setting:
        part = partition(self.pattern, len(self.shape), dict(self.sizes), tuple(self.weighted.split()))
        split = part.split_shape(self.shape)
        shape = [split[i] for i in part.weighted]
        weight, bias = (draw(shape, parameters or dtype, seed) for seed in (1, 2))
        dy = draw(self.shape, dtype, 3, mean=0.25)
        return Setting(part, weight if shape else None, bias if shape else None, dy, about_zero=self.about_zero)

    def input(self, dtype: torch.dtype) -> Tensor:
        return draw(self.shape, dtype, 4, mean=1.5)


def form(x: Tensor, s: Setting) -> str:
    r0, k1, r1, merge, _, _, along, outer = struct.unpack("=8q", nest_of(x, s)[0].packed[:64])
    words = [f"{r0}x{k1}x{r1}"] + [f"merge {merge}"] * (merge > 1) + ["along"] * along + [f"outer {outer}"] * (outer > 0)
    return ", ".join(words)


G3, G1, G2 = (("g", 3),), (("g", 1),), (("g", 2),)
SMALL = [
    # Rows: the innermost loop is averaged over.
    Case("n c [...]", (3, 5, 7, 9), "1x1x63, outer 1"),
    Case("n (g [c]) [...]", (3, 12, 5, 7), "1x1x35, merge 4, outer 1", G3, "g c"),
    Case("n [c ...]", (3, 6, 5, 9), "1x1x45, merge 6, outer 1"),
    Case("n [c ...]", (3, 6, 5, 9), "1x1x270, outer 1", weighted=""),
    Case("[n] c [...]", (9, 5, 11, 7), "9x5x77"),
    Case("(k [b]) c [...]", (6, 5, 4, 7), "2x5x28, outer 1", (("b", 2),)),
    Case("n l [c]", (6, 11, 53), "1x1x53, along, outer 1"),
    Case("n l [c]", (6, 11, 53), "1x1x53, along, outer 1", about_zero=True),
    Case("n [c h w]", (3, 4, 5, 7), "1x1x140, along, outer 1", weighted="c h w"),
    Case("n [l] c", (5, 23, 1), "1x1x23, outer 1"),
    # Columns: the innermost loop runs over sets.
    Case("[n l] c", (7, 19, 13), "133x13x1"),
    Case("[n] c", (37, 21), "37x21x1", about_zero=True),
    Case("t [n] c", (5, 29, 9), "29x9x1, outer 1"),
    Case("n (g [c])", (7, 24), "1x168x1, merge 8", G3, "g c"),
    Case("n [l] (g [c])", (5, 9, 24), "9x24x1, merge 8, outer 1", G3, "g c"),
    Case("n [c] ...", (5, 17, 6, 7), "17x42x1, along, outer 1"),
    Case("n [c] ...", (2, 261, 3, 5), "261x15x1, along, outer 1"),
    Case("n [c] ...", (5, 17, 6, 7), "17x42x1, along, outer 1", about_zero=True),
]
# Enough for three threads; few and many sets, short and long runs, tables of more than one panel.
LARGE = [
    Case("n c [...]", (8, 21, 23, 17), "1x1x391, outer 1"),
    Case("n (g [c]) [...]", (1, 32, 61, 67), "1x1x4087, merge 32, outer 1", G1, "g c"),  # one set
    Case("n c [...]", (3, 1, 160, 211), "1x1x33760, outer 1"),  # three sets, in chunks
    Case("[n] c [...]", (8, 3, 61, 67), "8x3x4087"),  # three sets
    Case("[n] c [...]", (16, 48, 9, 11), "16x48x99"),
    Case("n [c]", (41, 5003), "1x1x5003, along, outer 1"),
    Case("n [c]", (1024, 96), "1x1x96, along, outer 1", about_zero=True),
    Case("n [c]", (3, 40001), "1x1x40001, along, outer 1"),
    Case("[n l] c", (31, 37, 100), "1147x100x1"),  # split by rows
    Case("t [n] c", (3, 999, 40), "999x40x1, outer 1"),  # three tables, each split by rows
    Case("[n] c", (24, 5000), "24x5000x1"),  # panels of columns
    Case("n [l] (g [c])", (1, 2003, 32), "2003x32x1, merge 16", G2, "g c"),
    Case("n [l] (g [c])", (7, 403, 36), "403x36x1, merge 12, outer 1", G3, "g c"),
    Case("n [c] ...", (2, 64, 31, 33), "64x1023x1, along, outer 1"),
    Case("n [c] ...", (2, 300, 16, 17), "300x272x1, along, outer 1"),
]
# Rows of 1, 2, 4 and 8 vectors of any width stay in registers.
NARROW = [Case("[n] c", (3 * 16411 // c, c), f"{3 * 16411 // c}x{c}x1") for c in (8, 16, 32, 64, 128)]
ALL = [*SMALL, *LARGE, *NARROW]


def named(case: Case) -> str:
    return f"{case.pattern}-{'x'.join(map(str, case.shape))}{'-rms' * case.about_zero}{'-plain' * (not case.weighted)}"


def more_layouts(x: Tensor) -> dict[str, Tensor]:
    """Those of checks.py, rows of a wider tensor, and dimensions in reverse."""
    made = layouts(x)
    made["rows"] = torch.cat([x, -x], -1)[..., : x.shape[-1]]
    made["reversed"] = x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))
    return made


@with_extension
@pytest.mark.parametrize("case", ALL, ids=named)
def test_the_loops_are_those_meant(case):
    assert form(case.input(torch.float32), case.setting(torch.float32)) == case.form


@with_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ALL, ids=named)
def test_values_and_gradients_are_the_formulas(case, dtype):
    x, s = case.input(dtype), case.setting(dtype)
    wanted = formula(x, s)
    for name, laid in more_layouts(x).items():
        for number in (1, 2, 3):
            with threads(number):
                found = run(laid, s)
                compare(x, s, wanted, found, f"{name}, {number} threads")
                assert found.y.dtype == found.dx.dtype == dtype
                assert same(found, run(laid, s)), f"{name}, {number} threads: not the same twice"
    if dtype in HALF:
        s = case.setting(dtype, torch.float32)
        compare(x, s, formula(x, s), run(x, s), "float32 parameters")


@with_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ALL, ids=named)
def test_measure_and_apply_apart_are_the_formulas(case, dtype):
    x, s = case.input(dtype), case.setting(dtype)
    wanted = formula(x, s)
    for number in (1, 2, 3):
        with threads(number):
            for laid in (x, more_layouts(x)["reversed"]):
                compare(x, s, wanted, run(laid, s, apart=True), f"{number} threads")


@with_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_remainder_of_a_vector(dtype):
    """Vectors have 2 to 16 lanes and go by four: widths around every multiple."""
    for width in [*range(1, 70), 127, 128, 129, 255, 256, 257]:
        for case in (
            Case("n [c]", (3, width), ""),
            Case("n c [l]", (2, 3, width), ""),
            Case("[n] c", (7, width), ""),
            Case("n [c] l", (2, 6, width), ""),
        ):
            x, s = case.input(dtype), case.setting(dtype)
            compare(x, s, formula(x, s), run(x, s), f"{case.pattern} of {width}")
            mask = draw(case.shape, seed=5) > -0.5
            s = s._replace(mask=mask)
            compare(x, s, formula(x, s), run(x, s), f"{case.pattern} of {width}, masked")


# ---- masks


def masks(shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Masks of every kind: what they vary along, and what they leave."""
    some = draw(shape, seed=6) > -0.4
    made = {
        "entries": some,
        "entries, transposed": some.transpose(0, -1).contiguous().transpose(0, -1),
        "all real": torch.ones(shape, dtype=torch.bool),
        "nothing real": torch.zeros(shape, dtype=torch.bool),
        "one real": torch.arange(math.prod(shape)).view(shape) == 1,
        "samples": some[(slice(None), *[slice(0, 1)] * (len(shape) - 1))],
        "but the innermost": some[..., :1],
        "but dimension 1": some[:, :1],
        "half": (torch.arange(shape[0]) < (shape[0] + 1) // 2).view(-1, *[1] * (len(shape) - 1)),
    }
    return {name: mask.expand(shape) for name, mask in made.items()}


@with_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=named)
def test_masked_values_and_gradients_are_the_formulas(case, dtype):
    x, plain = case.input(dtype), case.setting(dtype)
    for kind, mask in masks(case.shape).items():
        s = plain._replace(mask=mask)
        wanted = formula(x, s)
        dirty = torch.where(mask, x, float("nan"))
        for name, laid in more_layouts(dirty).items():
            compare(x, s, wanted, run(laid, s), f"mask of {kind}, {name}")
        compare(x, s, wanted, run(dirty, s, apart=True), f"mask of {kind}, apart")


@with_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*LARGE, *NARROW[::2]], ids=named)
def test_masked_values_on_several_threads(case, dtype):
    x, plain = case.input(dtype), case.setting(dtype)
    for kind in ("entries", "samples", "but the innermost", "half"):
        mask = masks(case.shape)[kind]
        s = plain._replace(mask=mask)
        wanted = formula(x, s)
        for number in (1, 3):
            with threads(number):
                compare(x, s, wanted, run(torch.where(mask, x, float("inf")), s), f"mask of {kind}, {number} threads")


# ---- hard numbers


def hard_sets(n: int) -> dict[str, Tensor]:
    """Sets whose variance is lost by one shortcut or another."""
    noise, i = draw((n,), torch.float64, 7), torch.arange(n, dtype=torch.float64)
    made = {
        "mean 1e2": noise + 1e2,
        "mean 1e4": noise + 1e4,
        "mean -1e6": noise - 1e6,
        "the first zero": torch.where(i < 1, 0, noise + 1e4),
        "the first 16 zero": torch.where(i < 16, 0, noise + 1e4),
        "the first 100 zero": torch.where(i < 100, 0, noise + 1e4),
        "the first large": torch.where(i < 1, 1e4, noise),
        "two levels": torch.where(i < n // 2, 0, 1e4) + noise,
        "drift": i * (1e4 / n) + noise,
        "alternating": (1 - 2 * (i % 2)) * 1e4 + noise,
        "an outlier": torch.where(i == n // 2, 1e8, noise),
        "nearly constant": 3 + noise * 1e-6,
        "huge": noise * 1e18,
        "larger": noise * 1e30,
        "huge mean": (noise + 1e3) * 1e15,
        "tiny": noise * 1e-20,
    }
    return {name: values.float() for name, values in made.items()}


# (a tensor of (sets, n) as an input, the pattern, torch's own on the same)
ARRANGEMENTS = {
    "rows": (lambda v: v, "s [n]", lambda x: F.layer_norm(x, x.shape[1:])),
    "columns": (lambda v: v.T.contiguous(), "[n] s", lambda x: F.batch_norm(x, None, None, training=True)),
    "pieces": (
        lambda v: v.view(len(v), 24, -1).transpose(0, 1).contiguous(),
        "[a] s [b]",
        lambda x: F.batch_norm(x, None, None, training=True),
    ),
    "groups": (lambda v: v.view(len(v), 8, -1), "s [c l]", lambda x: F.group_norm(x, 1)),
    "groups, channels last": (
        lambda v: v.view(len(v), 8, -1).permute(2, 0, 1).reshape(-1, 8 * len(v)).T,
        "(s [c]) [l]",
        lambda x: F.group_norm(x[None].contiguous(), x.shape[0] // 8)[0],
    ),
    "channels": (
        lambda v: v.T.contiguous()[None],
        "b [c] p",
        lambda x: F.layer_norm(x.transpose(1, 2), x.shape[1:2]).transpose(1, 2),
    ),
}


@with_extension
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("n", [240, 26400])
def test_hard_sets_keep_their_digits(n, arrangement, weighted):
    sets = hard_sets(n)
    arrange, pattern, by_torch = ARRANGEMENTS[arrangement]
    x = arrange(torch.stack(list(sets.values())))
    along = tuple(name for name in ("c",) if weighted and name in pattern)
    part = partition(pattern, x.dim(), {"c": 8} if "(" in pattern else {}, along)
    shape = [part.split_shape(x.shape)[i] for i in part.weighted]
    weight, bias = (draw(shape, seed=seed) if shape else None for seed in (1, 2))
    s = Setting(part, weight, bias, draw(x.shape, seed=3))
    wanted = formula(x, s)
    for number in (1, 3):
        with threads(number):
            found = run(x, s)
            usual = wanted.var > 1e-30  # below, float32 has no squares, and eps alone counts
            off = ((found.var - wanted.var).abs() / wanted.var)[usual].max().item()
            assert off <= 2e-6, f"variances are off by {off:.2g}"
            assert (found.var[~usual] <= 1e-30).all()
            ordinary = (wanted.var < 1e37).expand(part.view(x).shape).reshape(x.shape)  # where 1 / var is a float32
            compare(x, s._replace(), wanted._replace(dx=(wanted.dx[0] * ordinary, wanted.dx[1] * ordinary)),
                    found._replace(dx=found.dx * ordinary), f"{number} threads")
            if not weighted:
                finite = part.view(by_torch(x)).isfinite()
                for values in (found.y, by_torch(x)):
                    pass


# ---- the measuring of k: removed below
