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
import warnings
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
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import renorm as rn
from renorm.errors import BackendError, ShapeError
from renorm.kernels import Affine, apart, extension, fused, native
from renorm.pattern import Partition, partition

with_extension = pytest.mark.skipif(extension.module() is None, reason="renorm was installed without its extension")
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
    # The mean's error is that of a sum of terms of about 1; a float64 mean is rounded itself, here as there.
    x_size = x_hat.abs() + 1 + (mean.abs() * rstd if x.dtype == torch.float64 else 0)
    size = h.abs() + total(h.abs()) / n + x_size * total((h * x_size).abs()) / n
    pairs = [
        (torch.where(real, a, 0).reshape(x.shape), torch.where(real, terms, 0).reshape(x.shape))
        for a, terms in ((x_hat * w + b, x_size * w.abs() + b.abs()), (dx, rstd * size))
    ]
    pairs += [
        (over_all(g * x_hat, s.weight), over_all((g * x_size).abs(), s.weight)),
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


def compare(x: Tensor, s: Setting, wanted: Wanted, found: "Found", label: str = "", k: float = 10) -> None:
    """`k`: 2 units were seen in float32 and 6 in float64, where the formula is rounded as well."""
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


def run(x: Tensor, s: Setting, *, in_two: bool = False) -> Found:
    """The kernels in one call, or measure and apply apart with the plain solve between them."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, s.weight, s.bias)]
    made, mask = nest_of(x, s)
    if in_two:
        moments, measured = apart.measure(leaves[0], s.part, made, mask=mask, about_zero=s.about_zero)
        affine = Affine((moments.var + s.eps).rsqrt(), None if s.about_zero else moments.mean)
        y = apart.apply(leaves[0], s.part, measured, affine, *leaves[1:], about_zero=s.about_zero)
    else:
        y, stats = fused.normalize(leaves[0], s.part, made, *leaves[1:], s.eps, about_zero=s.about_zero, mask=mask)
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
    words = [f"{r0}x{k1}x{r1}", f"merge {merge}" * (merge > 1), "along" * along, f"outer {outer}" * (outer > 0)]
    return ", ".join(word for word in words if word)


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
    Case("n c [...]", (8, 17, 19, 23), "1x1x437, outer 1"),
    Case("n (g [c]) [...]", (1, 32, 41, 43), "1x1x1763, merge 32, outer 1", G1, "g c"),  # one set
    Case("n c [...]", (3, 1, 97, 173), "1x1x16781, outer 1"),  # three sets, in chunks
    Case("[n] c [...]", (5, 3, 61, 67), "5x3x4087"),  # three sets
    Case("[n] c [...]", (16, 40, 7, 11), "16x40x77"),
    Case("n [c]", (11, 5003), "1x1x5003, along, outer 1"),
    Case("n [c]", (521, 96), "1x1x96, along, outer 1", about_zero=True),
    Case("n [c]", (3, 17001), "1x1x17001, along, outer 1"),
    Case("[n l] c", (31, 17, 100), "527x100x1"),  # split by rows
    Case("t [n] c", (3, 419, 40), "419x40x1, outer 1"),  # three tables, each split by rows
    Case("[n] c", (24, 2500), "24x2500x1"),  # panels of columns
    Case("n [l] (g [c])", (1, 1603, 32), "1603x32x1, merge 16", G2, "g c"),
    Case("n [l] (g [c])", (5, 307, 36), "307x36x1, merge 12, outer 1", G3, "g c"),
    Case("n [c] ...", (2, 64, 19, 23), "64x437x1, along, outer 1"),
    Case("n [c] ...", (2, 300, 9, 11), "300x99x1, along, outer 1"),
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
                compare(x, s, wanted, run(laid, s, in_two=True), f"{number} threads")


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
        compare(x, s, wanted, run(dirty, s, in_two=True), f"mask of {kind}, apart")


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


# Of itself, in float32. A block of 2048 is 16 sums of 128 terms where vectors have 16 bytes, 64 sums of 32 where 64.
VARIANCE = 2e-6 if getattr(extension.module(), "instructions", "") in ("avx2", "avx512") else 4e-6


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


def arranged(sets: dict[str, Tensor], arrangement: str, weighted: bool) -> tuple[Tensor, Setting]:
    arrange, pattern, _ = ARRANGEMENTS[arrangement]
    x = arrange(torch.stack(list(sets.values())))
    along = tuple(name for name in "c" if weighted and name in pattern)
    part = partition(pattern, x.dim(), {"c": 8} if "(" in pattern else {}, along)
    shape = [size for size, _ in zip_weighted(part, x)]
    weight, bias = (draw(shape, seed=seed) if shape else None for seed in (1, 2))
    return x, Setting(part, weight, bias, draw(x.shape, seed=3))


@with_extension
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("n", [240, 26400])
def test_hard_sets_keep_their_digits(n, arrangement, weighted, masked):
    x, s = arranged(hard_sets(n), arrangement, weighted)
    if masked:
        s = s._replace(mask=draw(x.shape, seed=5) > -1)
    wanted = formula(x, s)
    ordinary = wanted.var > 1e-30  # below, float32 has no squares, and only eps counts
    for number in (1, 3):
        with threads(number):
            found = run(x, s)
            off = ((found.var - wanted.var).abs() / wanted.var)[ordinary].max().item()
            assert off <= VARIANCE, f"variances are off by {off:.2g}"
            assert (found.var[~ordinary] <= 1e-30).all()
            # An error of 2e-6 in the variance is one of 8.4 units in x_hat. Torch's own layers err by up to 1e5
            # units at a mean of 1e4, and by 7e6, all digits, from 1e18 on.
            compare(x, s, wanted, found, f"{number} threads", k=12)


@with_extension
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_sets_whose_variance_is_no_float32(arrangement):
    """From 1e20 on 1 / var is no float32, and the gradient's last term is lost; torch has lost y by then."""
    made = {f"{scale:g}": draw((2400,), seed=8) * scale for scale in (1e19, 1e24, 1e30, 1e34)}
    x, s = arranged(made, arrangement, weighted=False)
    wanted, found = formula(x, s), run(x, s)
    assert ((found.var - wanted.var).abs() / wanted.var).max() <= VARIANCE
    assert units(found.y, wanted.y, torch.float32) <= 12
    assert found.dx.isfinite().all()
    close(found.dx * 1e19, wanted.dx[0] * 1e19, 0.15 * wanted.dx[0].abs().max().item() * 1e19)


@with_extension
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_ordinary_sets_are_as_exact_as_torchs(arrangement):
    """Rounding differs, entry by entry: twice torch's largest error, or 2 units where torch's happens to be less."""
    x, s = arranged({str(i): draw((26400,), seed=i, mean=0.5) for i in range(8)}, arrangement, weighted=False)
    wanted, found = formula(x, s), run(x, s)
    leaf = x.detach().requires_grad_()
    y = ARRANGEMENTS[arrangement][2](leaf)
    (dx,) = torch.autograd.grad(y, leaf, s.dy)
    for ours, theirs, what in ((found.y, y, wanted.y), (found.dx, dx, wanted.dx)):
        assert units(ours, what, torch.float32) <= max(2, 2 * units(theirs, what, torch.float32))


@with_extension
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_what_is_not_finite_stays_in_its_set(arrangement, bad):
    sets = {str(i): draw((2400,), seed=i) for i in range(8)}
    clean, s = arranged(sets, arrangement, weighted=False)
    wanted = formula(clean, s)
    for place in (0, 70, 2399):  # in the entries that give the first shift, and beyond
        dirty = sets | {"3": torch.where(torch.arange(2400) == place, bad, sets["3"])}
        x, _ = arranged(dirty, arrangement, weighted=False)
        for number in (1, 2):
            with threads(number):
                found = run(x, s)
                own = s.part.view((x != clean) | x.isnan()).any(s.part.reduced, keepdim=True)
                own = own.expand(s.part.view(x).shape).reshape(x.shape)
                assert found.y[own].isnan().all()
                assert found.dx[own].isnan().all()
                rest = found._replace(y=torch.where(own, 0, found.y), dx=torch.where(own, 0, found.dx))
                y, dx = ((torch.where(own, 0, value), terms) for value, terms in (wanted.y, wanted.dx))
                compare(x, s, wanted._replace(y=y, dx=dx), rest)


@with_extension
def test_constant_sets():
    for arrangement in ARRANGEMENTS:
        for value in (0.0, 0.1, -3e4, 1e-30):
            x, s = arranged({str(i): torch.full((2400,), value) for i in range(5)}, arrangement, weighted=False)
            found = run(x, s)
            assert (found.var <= (1e-7 * value) ** 2).all()
            close(found.y, torch.zeros(()), 1e-7 * abs(value) / EPS**0.5)
            compare(x, s, formula(x, s), found._replace(y=torch.zeros_like(x)))


# ---- parameters


@with_extension
@pytest.mark.parametrize("case", [*SMALL, LARGE[1], LARGE[8]], ids=named)
def test_weight_or_bias_alone(case):
    for dtype in DTYPES:
        for parameters in DTYPES:
            s, x = case.setting(dtype, parameters), case.input(dtype)
            if s.weight is None:
                return
            for some in (s._replace(weight=None), s._replace(bias=None), s):
                wanted = formula(x, some)
                for in_two in (False, True):
                    found = run(x, some, in_two=in_two)
                    compare(x, some, wanted, found, f"{dtype} with {parameters}")
                    assert {t.dtype for t in (found.dw, found.db) if t is not None} == {parameters}


@with_extension
def test_one_tensor_as_weight_and_bias():
    for case in (SMALL[1], SMALL[6], SMALL[10], SMALL[15]):
        x, s = case.input(torch.float64), case.setting(torch.float64)
        s = s._replace(bias=s.weight)
        made, _ = nest_of(x, s)
        both, leaf = s.weight.requires_grad_(), x.requires_grad_()
        wanted = formula(x.detach(), s)
        for again in (False, True):  # with a graph of the gradient, too
            y, _ = fused.normalize(leaf, s.part, made, both, both, EPS, about_zero=s.about_zero)
            dx, dw = torch.autograd.grad(y, [leaf, both], s.dy, create_graph=again)
            assert units(dx, wanted.dx, torch.float64) <= 10
            assert units(dw, (wanted.dw[0] + wanted.db[0], wanted.dw[1] + wanted.db[1]), torch.float64) <= 10


@with_extension
def test_parameters_that_are_not_contiguous():
    for case in (SMALL[1], SMALL[6], SMALL[8], SMALL[14]):
        x, s = case.input(torch.float32), case.setting(torch.float32)
        strided = s._replace(weight=torch.stack([s.weight] * 2, -1)[..., 0], bias=torch.stack([s.bias] * 2, -1)[..., 0])
        flat = s._replace(weight=torch.stack([s.weight.flatten()] * 2, -1)[..., 0], bias=s.bias.flatten())
        for some in (strided, flat):
            for in_two in (False, True):
                compare(x, some, formula(x, some), run(x, some, in_two=in_two))


@with_extension
def test_parameters_of_another_size_are_refused():
    for wrong in (3, 12):
        layer = rn.GroupNorm(3, 6, backend="native")
        x = torch.randn(4, 6, 5)
        layer(x)  # what is remembered of this shape does not know the parameters to come
        layer.weight = nn.Parameter(torch.ones(wrong))
        with pytest.raises(ShapeError, match=rf"must have 6 entries for this input; got shape \({wrong},\)"):
            layer(x)


# ---- inputs


@with_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*SMALL, LARGE[1], LARGE[8]], ids=named)
def test_expanded_and_aliasing_inputs(case, dtype):
    x, s = case.input(dtype), case.setting(dtype)
    for dim in range(x.dim()):
        wide = x.narrow(dim, 0, 1).expand(x.shape)
        compare(wide, s, formula(wide, s), run(wide, s), f"expanded along {dim}")
        up = s._replace(dy=s.dy.narrow(dim, 0, 1).expand(x.shape))
        compare(x, up, formula(x, up), run(x, up), f"gradient expanded along {dim}")
    ones = s._replace(dy=torch.ones((), dtype=dtype).expand(x.shape))
    compare(x, ones, formula(x, ones), run(x, ones), "of a sum")
    for laid in more_layouts(x).values():
        alias = s._replace(dy=laid)
        compare(laid, alias, formula(laid, alias), run(laid, alias), "x is its own gradient")
        other = s._replace(dy=more_layouts(s.dy)["reversed"])
        compare(laid, other, formula(laid, other), run(laid, other), "a gradient that lies otherwise")


@with_extension
def test_windows_that_share_memory():
    line = draw((40,), seed=9)
    for size, stride in (((9, 8), (4, 1)), ((9, 8), (1, 1)), ((3, 9, 4), (2, 4, 1))):
        for pattern in ("n [c]" if len(size) == 2 else "n l [c]", "[n] c" if len(size) == 2 else "[n l] c"):
            x = line.as_strided(size, stride)
            s = Case(pattern, size, "").setting(torch.float32)
            compare(x, s, formula(x, s), run(x, s))


@with_extension
@given(case=cases(), data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_pattern_and_strides_are_the_formula(case, data):
    """Where there is a nest for them: the reasons against it are strings."""
    pattern, sizes, weighted, like = case
    part = partition(pattern, like.dim(), sizes, weighted)
    assume(like.numel() > 0)
    dtype = data.draw(st.sampled_from(DTYPES))
    memory = draw((like.untyped_storage().size() // 8,), dtype, 1, mean=0.5)
    x = memory.as_strided(like.shape, like.stride(), like.storage_offset())
    shape = [size for size, _ in zip_weighted(part, x)]
    weight, bias = (draw(shape, dtype, seed) if shape and data.draw(st.booleans()) else None for seed in (2, 3))
    mask = None
    if data.draw(st.booleans()):
        narrow = [data.draw(st.sampled_from(sorted({1, size}))) for size in x.shape]
        order = data.draw(st.permutations(range(x.dim())))
        mask = draw([narrow[i] for i in order], seed=4) > -0.5
        mask = mask.permute([order.index(i) for i in range(x.dim())]).expand(x.shape)
    s = Setting(part, weight, bias, draw(x.shape, dtype, 5), mask, about_zero=data.draw(st.booleans()))
    if isinstance(native.fit(x, part, weight, bias, mask), str):
        return
    wanted = formula(x, s)
    for in_two in (False, True):
        found = run(x, s, in_two=in_two)
        compare(x, s, wanted, found, f"in two: {in_two}")
        usual = wanted.var > 1e-24 * wanted.mean.square()  # below, it is what the formula's mean was rounded by
        close((found.var / wanted.var)[usual], torch.ones(()), 1e-6)


def zip_weighted(part: Partition, x: Tensor):
    split = part.split_shape(x.shape)
    return [(split[i], i) for i in part.weighted]


@with_extension
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_offsets_of_more_than_32_bits(dtype, tmp_path):
    """A few entries, far apart in a file that is mapped and nearly all hole."""
    far = 2**31 + 24
    path = tmp_path / "sparse"
    try:
        with open(path, "wb") as file:
            file.truncate(dtype.itemsize * (3 * far))
        memory = torch.from_file(str(path), shared=True, size=3 * far, dtype=dtype)
    except (OSError, RuntimeError) as error:
        pytest.skip(f"there is no room for a sparse file: {error}")
    for pattern, shape, strides in (
        ("n [c]", (3, 20), (far, 1)),
        ("[n] c", (3, 20), (far, 1)),
        ("[n] c l", (3, 4, 5), (far, 5, 1)),
        ("n [c] l", (3, 4, 5), (far, 5, 1)),
        ("n [l] c", (3, 4, 5), (5, far // 2, 1)),
    ):
        case = Case(pattern, shape, "")
        x = memory.as_strided(shape, strides)
        x.copy_(case.input(dtype))
        s = case.setting(dtype)
        assert nest_of(x, s)[0].x_strides == strides, "it should not be copied first"
        compare(x, s, formula(x, s), run(x, s), pattern)
    bytes_ = memory.view(torch.uint8)[: 2 * far + 64]
    mask = bytes_.as_strided((3, 20), (far, 1)).view(torch.bool)
    mask.copy_(draw((3, 20), seed=6) > -0.4)
    for pattern in ("n [c]", "[n] c"):
        case = Case(pattern, (3, 20), "")
        s = case.setting(dtype)._replace(mask=mask)
        assert nest_of(case.input(dtype), s)[0].mask_strides == (far, 1)
        compare(case.input(dtype), s, formula(case.input(dtype), s), run(case.input(dtype), s), pattern)


# ---- an addition before, an activation behind


FOLLOW = {None: lambda z: z, "relu": F.relu, "leaky_relu": F.leaky_relu, "gelu": F.gelu, "silu": F.silu}


def check_neighbours(x: Tensor, residual: Tensor | None, s: Setting, activation: str | None) -> None:
    """Against float64 autograd, from the sum as it is rounded."""
    made, mask = nest_of(x, s)
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, residual, s.weight, s.bias)]
    y, total, _ = fused.normalize_with_neighbours(
        *leaves[:2], s.part, made, *leaves[2:], s.eps, about_zero=s.about_zero, mask=mask, activation=activation
    )
    exact = x if residual is None else x + residual
    assert torch.equal(total, exact)
    wide = [None if t is None else t.detach().double().requires_grad_() for t in (exact, s.weight, s.bias)]
    v = s.part.view(wide[0])
    real = torch.ones_like(v, dtype=torch.bool) if mask is None else s.part.view(mask)
    n = real.sum(s.part.reduced, keepdim=True).clamp(min=1)
    mean = torch.where(real, v, 0).sum(s.part.reduced, keepdim=True) / n * (0 if s.about_zero else 1)
    var = torch.where(real, v - mean, 0).square().sum(s.part.reduced, keepdim=True) / n
    along = [size if i in s.part.weighted else 1 for i, size in enumerate(v.shape)]
    z = (v - mean) / (var + s.eps).sqrt()
    z = z if wide[1] is None else z * wide[1].reshape(along)
    z = z if wide[2] is None else z + wide[2].reshape(along)
    z = torch.where(real, z, 0).reshape(x.shape)
    wanted = FOLLOW[activation](z)
    accumulator = eps_of(torch.float64 if x.dtype == torch.float64 else torch.float32)
    rounding = 0 if x.dtype in (torch.float32, torch.float64) else 0.505 * eps_of(x.dtype)
    close(y, wanted, (16 * accumulator + rounding) * max(1, wanted.abs().max().item()))
    dy = torch.where(z.abs() < 1e-3, 0, s.dy) if activation in ("relu", "leaky_relu") else s.dy  # a step is there
    outputs, up = ((y, total), (dy, s.dy.flip(0))) if residual is not None else ((y,), (dy,))
    found = torch.autograd.grad(outputs, [t for t in leaves if t is not None], up)
    expected = list(torch.autograd.grad(wanted, [t for t in wide if t is not None], dy.double()))
    if residual is not None:
        expected[0] = torch.where(real.reshape(x.shape), expected[0], 0) + up[1].double()
        expected.insert(0, expected[0])
    for a, b in zip(found, expected, strict=True):
        half = 0 if a.dtype in (torch.float32, torch.float64) else 0.505 * eps_of(a.dtype)
        close(a, b, (64 * accumulator + half) * max(1, b.abs().max().item()))


@with_extension
@pytest.mark.parametrize("case", ALL, ids=named)
def test_an_addition_and_an_activation(case):
    for i, activation in enumerate(FOLLOW):
        dtype = DTYPES[i % len(DTYPES)]
        x, residual, s = case.input(dtype), draw(case.shape, dtype, 10), case.setting(dtype)
        mask = None if i % 2 else draw(case.shape, seed=11) > -0.5
        for number in (1, 3):
            with threads(number):
                check_neighbours(x, residual, s, activation)
                check_neighbours(x, None, s, activation)
        for laid in more_layouts(x).values():
            check_neighbours(laid, residual, s._replace(mask=mask), activation)
        check_neighbours(x, x, s, activation)


# ---- autograd


class Own(rn.Norm):
    """A solve of one's own, which no torch kernel knows; `penalty` is made of the moments beside y."""

    def solve(self, moments):
        self.stashed = moments
        return Affine((moments.var + self.eps).rsqrt(), moments.mean / 2, 0.3 * moments.var.log1p())


def own_formula(x: Tensor, layer: rn.Norm) -> tuple[Tensor, Tensor, Tensor]:
    """`Own("n (g [c]) [...]", g=2, c=3)` in plain torch: y, mean and var."""
    groups = x.reshape(len(x), 2, -1)
    mean = groups.mean(-1, keepdim=True)
    var = (groups - mean).square().mean(-1, keepdim=True)
    y = ((groups - mean / 2) * (var + layer.eps).rsqrt() + 0.3 * var.log1p()).view(x.shape)
    return y * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1), mean, var


def own_case():
    layer = Own("n (g [c]) [...]", g=2, c=3, backend="native", dtype=torch.float64)
    with torch.no_grad():
        for parameter, seed in ((layer.weight, 1), (layer.bias, 2)):
            parameter.copy_(draw(parameter.shape, torch.float64, seed))
    return layer, draw((4, 6, 5, 3), torch.float64, 3, mean=1.0).requires_grad_()


LOSSES = {
    "y": lambda y, mean, var: y.pow(3).sum(),
    "y and moments": lambda y, mean, var: y.pow(3).sum() + mean.pow(2).sum() + (var * mean).sum(),
    "y and the variance": lambda y, mean, var: (y.mean() * var).sum(),
    "moments": lambda y, mean, var: (var * mean).sum(),
    "the mean": lambda y, mean, var: mean.sin().sum(),
}


@with_extension
@pytest.mark.parametrize("loss", LOSSES)
def test_a_solve_of_ones_own_and_stashed_moments(loss):
    layer, x = own_case()
    leaves = [x, layer.weight, layer.bias]
    y = layer(x)
    found = LOSSES[loss](y, layer.stashed.mean, layer.stashed.var)
    wanted_y, *moments = own_formula(x, layer)
    wanted = LOSSES[loss](wanted_y, *moments)
    close(y, wanted_y, 1e-13)
    expected = torch.autograd.grad(wanted, leaves, create_graph=True, allow_unused=True)
    for again in (False, True):
        gradients = torch.autograd.grad(found, leaves, create_graph=again, retain_graph=True, allow_unused=True)
        for a, b in zip(gradients, expected, strict=True):
            if b is not None:
                close(a, b, 1e-11 * max(1, b.abs().max().item()))
    (twice,) = torch.autograd.grad(gradients[0].square().sum(), x, retain_graph=True)
    (expected_twice,) = torch.autograd.grad(expected[0].square().sum(), x)
    close(twice, expected_twice, 1e-10 * max(1, expected_twice.abs().max().item()))
    found.backward()
    for leaf, b in zip(leaves, expected, strict=True):
        if b is not None:
            close(leaf.grad, b, 1e-11 * max(1, b.abs().max().item()))


@with_extension
def test_backward_twice_and_for_some():
    """With the graph kept; for the weight, the bias or x alone; in parts, one gradient after the other."""
    plain = rn.GroupNorm(2, 6, backend="native", dtype=torch.float64)
    with torch.no_grad():
        plain.weight.copy_(draw((6,), torch.float64, 1))
    own, x = own_case()
    part = partition("n (g [c]) [...]", 4, {"g": 2}, ("g", "c"))
    dy = draw(x.shape, torch.float64, 4)
    norm = formula(x.detach(), Setting(part, plain.weight.detach(), plain.bias.detach(), dy))
    of_own = torch.autograd.grad(own_formula(x, own)[0], [x, own.weight, own.bias], dy)
    for layer, wanted in ((plain, [norm.dx[0], norm.dw[0], norm.db[0]]), (own, of_own)):
        leaves = [x, layer.weight, layer.bias]
        y = layer(x)
        for _ in range(2):
            for a, b in zip(torch.autograd.grad(y, leaves, dy, retain_graph=True), wanted, strict=True):
                close(a, b, 1e-12)
        for i in (1, 0, 2, 0):
            close(torch.autograd.grad(y, leaves[i], dy, retain_graph=True)[0], wanted[i], 1e-12)
        for _ in range(2):
            y.backward(dy, retain_graph=True)
        for leaf, b in zip(leaves, wanted, strict=True):
            close(leaf.grad, 2 * b, 1e-12)
            leaf.grad = None
        frozen = layer.requires_grad_(False)(x)
        close(torch.autograd.grad(frozen, x, dy)[0], wanted[0], 1e-12)
        layer.requires_grad_(True)
        close(torch.autograd.grad(layer(x.detach()), layer.weight, dy)[0], wanted[1], 1e-12)
        with torch.no_grad():
            assert not layer(x).requires_grad


@with_extension
@pytest.mark.parametrize("backend", ["auto", "native"])
def test_two_forward_passes_before_their_backward_passes(backend):
    """What a tracked batch norm remembers changes between a forward and its backward."""
    for size in (7, 60):  # torch's kernel and ours, where the layer may choose
        ours, theirs = rn.BatchNorm2d(6, dtype=torch.float64), nn.BatchNorm2d(6, dtype=torch.float64)
        ours.backend = backend
        a, b = (draw((4, 6, size, size), torch.float64, seed, mean=seed).requires_grad_() for seed in (1, 2))
        results = []
        for layer in (ours, theirs):
            y, z = layer(a), layer(b)
            results.append(torch.autograd.grad(z.pow(3).sum() + y.pow(3).sum(), [a, b, *layer.parameters()]))
        for p, q in zip(*results, strict=True):
            close(p, q, 1e-9 * max(1, q.abs().max().item()))
        for p, q in zip(ours.buffers(), theirs.buffers(), strict=True):
            close(p, q, 1e-12)


@with_extension
@pytest.mark.parametrize("backend", ["auto", "native", "reference"])
def test_a_backward_in_evaluation_after_running_statistics_have_moved(backend):
    """Right, by the statistics of its forward; or an error; or what torch makes of it, which takes the new ones."""
    x = draw((4, 6, 60, 60), torch.float64, 1).requires_grad_()
    results = []
    for layer in (rn.BatchNorm2d(6, dtype=torch.float64), nn.BatchNorm2d(6, dtype=torch.float64)):
        if isinstance(layer, rn.Norm):
            layer.backend = backend
        layer(x.detach() * 3 + 1)
        mean, var = (t.clone().view(-1, 1, 1) for t in (layer.running_mean, layer.running_var))
        y = layer.eval()(x)
        layer.train()(x.detach() * 10)
        results.append(torch.autograd.grad(y.pow(3).sum(), x)[0])
    (right,) = torch.autograd.grad(((x - mean) / (var + EPS).sqrt()).pow(3).sum(), x)
    off = [(results[0] - wanted).abs().max() / wanted.abs().max() for wanted in (right, results[1])]
    assert min(off) < 1e-12


@with_extension
def test_hooks_that_lay_saved_tensors_otherwise():
    """What has been on a disk comes back contiguous: masks that were expanded, weights that were strided."""

    def write(t: Tensor):
        return t.detach().numpy().copy(order="C")

    for case, kind in ((SMALL[1], "but dimension 1"), (SMALL[14], "but the innermost"), (SMALL[10], "samples")):
        x, plain = more_layouts(case.input(torch.float32))["reversed"], case.setting(torch.float32)
        s = plain._replace(mask=masks(case.shape)[kind], weight=torch.stack([plain.weight] * 2, -1)[..., 0])
        for in_two in (False, True):
            with torch.autograd.graph.saved_tensors_hooks(write, torch.from_numpy):
                compare(x, s, formula(x, s), run(x, s, in_two=in_two), kind)


@with_extension
def test_an_input_that_is_changed_before_the_backward_is_an_error():
    for in_two in (False, True):
        x = draw((3, 8)).requires_grad_()
        layer = (Own("n [c]", c=8) if in_two else rn.LayerNorm(8)).requires_grad_(False)
        layer.backend = "native"
        y = layer(x)
        with torch.no_grad():
            x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


# ---- what looks at every operation


def watched_layers():
    """(layer, input) that run natively where nothing looks on: in one call, masked at times, and with a solve."""
    own, _ = own_case()
    own.backend = "auto"
    for layer, shape in (
        (rn.RMSNorm(7, dtype=torch.float64), (4, 6, 7)),
        (rn.Norm("(k [b]) c [...]", b=2, c=6, running=None, dtype=torch.float64), (4, 6, 5)),
        (rn.RMSNorm(7, activation="gelu", dtype=torch.float64), (4, 6, 7)),
        (own, (4, 6, 5, 3)),
    ):
        x = draw(shape, torch.float64, 3, mean=1.0)
        assert layer.kernel(x) == "native"
        yield layer, x


@with_extension
def test_dispatch_modes_see_every_operation():
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            names.append(str(operation))
            return operation(*args, **(kwargs or {}))

    for layer, x in watched_layers():
        names: list[str] = []
        expected = layer(x)
        with Seen():
            y = layer(x)
            assert layer.kernel(x) != "native"
        assert len(names) > 1
        close(y, expected, 1e-13)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert layer(mode.from_tensor(x)).shape == x.shape
        traced = make_fx(layer)(x)
        close(traced(x + 1), layer(x + 1), 1e-13)


@with_extension
def test_function_transforms():
    for layer, x in watched_layers():
        dy = draw(x.shape, torch.float64, 4)
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(layer(leaf), leaf, dy)
        close(torch.func.grad(lambda x, f=layer, dy=dy: (f(x) * dy).sum())(x), dx, 1e-12)
        stack = torch.stack([x, x + 1, 2 * x])
        close(torch.vmap(layer)(stack), torch.stack([layer(one) for one in stack]), 1e-13)
        _, tangent = torch.func.jvp(layer, (x,), (dy,))
        close((tangent * dy).sum(), (dx * dy).sum(), 1e-10)
        with forward_ad.dual_level():
            y = layer(forward_ad.make_dual(x, dy))
            close(forward_ad.unpack_dual(y).tangent, tangent, 1e-12)
        many = torch.stack([dy, -dy, 2 * dy])
        expected = torch.stack([dx, -dx, 2 * dx])
        y = layer(leaf)
        (batched,) = torch.autograd.grad(y, leaf, many, is_grads_batched=True, retain_graph=True)
        close(batched, expected, 1e-12)

        def back(one, y=y, leaf=leaf):
            return torch.autograd.grad(y, leaf, one, retain_graph=True)[0]

        close(torch.vmap(back)(many), expected, 1e-12)


@with_extension
def test_traced_modules_compute_on_other_inputs():
    for layer, x in watched_layers():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # jit.trace is deprecated
            traced = torch.jit.trace(layer, x)
        close(traced(3 * x + 1), layer(3 * x + 1), 1e-13)


@with_extension
def test_other_kinds_of_tensors():
    class Sub(Tensor):
        pass

    for layer, x in watched_layers():
        expected = layer(x)
        close(layer(x.as_subclass(Sub)).as_subclass(Tensor), expected, 1e-13)
        with torch.inference_mode():
            close(layer(x), expected, 1e-13)
        pair = torch.complex(x, x).conj()
        assert pair.imag.is_neg()
        close(layer(pair.imag), layer(-x), 1e-13)
        leaf = x.clone().requires_grad_()
        (found,) = torch.autograd.grad(torch.complex(leaf, layer(leaf)).conj().imag.sum(), leaf)
        (expected,) = torch.autograd.grad(-layer(leaf).sum(), leaf)
        close(found, expected, 1e-12)


@with_extension
def test_another_default_device_is_for_tensors_to_come():
    for layer, x in watched_layers():
        x = more_layouts(x)["sliced"]
        leaf = x.detach().requires_grad_()
        y = layer(leaf)
        (expected,) = torch.autograd.grad(y.square().sum(), leaf)
        with torch.device("meta"):
            z = layer(leaf)
            (found,) = torch.autograd.grad(z.square().sum(), leaf)
        assert torch.equal(y, z)
        assert torch.equal(found, expected)


# ---- processes


def python(code: str, **variables: str) -> str:
    """What a fresh Python prints; the limit is for one that hangs."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RENORM_", "OMP_"))}
    folders = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**environment, "PYTHONPATH": os.pathsep.join(folders), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


COMPACT = """
import torch, test_native as t
print(t.extension.status())
for case in t.ALL:
    for dtype in t.DTYPES:
        x, s = case.input(dtype), case.setting(dtype)
        for number in (1, 2):
            with t.threads(number):
                t.compare(x, s, t.formula(x, s), t.run(x, s), t.named(case))
        t.check_neighbours(x, x.flip(0), s, "gelu")
        s = s._replace(mask=t.draw(case.shape, seed=5) > -0.5)
        t.compare(x, s, t.formula(x, s), t.run(x, s), t.named(case) + " masked")
for arrangement in t.ARRANGEMENTS:
    t.test_hard_sets_keep_their_digits(240, arrangement, True, False)
"""


@with_extension
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_each_instruction_set(isa):
    said = python(COMPACT, RENORM_ISA=isa)
    ran = re.search(r"(\w+) kernels for CPU", said).group(1)
    if ran != isa:
        pytest.skip(f"this processor, or this build, has {ran}")


@with_extension
@pytest.mark.parametrize("number", [4, 7, 16])
def test_more_threads_than_rows(number):
    """In a process of its own: a thread without a row may not look for the mean of its first rows forever."""
    python(f"""
import torch, test_native as t
torch.set_num_threads({number})
few = [
    t.Case("n [c] ...", (1, 3, 150, 150), "", weighted=""),
    t.Case("[n] c d", (3, 22, 1000), "", weighted=""),
    t.Case("[n] c", (3, 22000), ""),
    t.Case("[n] c", (8, 25088), ""),
    t.Case("n [l] c", (2, 5, 30000), ""),
]
for case in (*few, *t.LARGE, *t.NARROW):
    x, s = case.input(torch.float32), case.setting(torch.float32)
    t.compare(x, s, t.formula(x, s), t.run(x, s), t.named(case))
    s = s._replace(mask=t.draw(case.shape, seed=5) > -0.5)
    t.compare(x, s, t.formula(x, s), t.run(x, s), t.named(case) + " masked")
""")


@with_extension
def test_an_instruction_set_that_there_is_not_is_told():
    said = python("import renorm; print(renorm.kernels.status())", RENORM_ISA="avx-512")
    assert "RENORM_ISA is one of baseline, avx2, avx512; got avx-512" in said


@with_extension
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_subnormal_halves_where_subnormal_floats_are_flushed(isa):
    python(
        """
import torch, renorm as rn
halves = torch.arange(1, 65, dtype=torch.float64) * 2.0**-24
torch.set_flush_denormal(True)
y = rn.LayerNorm(64, eps=0.0, elementwise_affine=False, backend="native")(halves.half()[None].repeat(3, 1))
wanted = (halves - halves.mean()) / halves.std(correction=0)
assert (y.double() - wanted).abs().max() < 2e-3, y
""",
        RENORM_ISA=isa,
    )


@with_extension
@needs_proc
def test_one_pool_of_threads_that_follows_torch():
    said = python("""
import os, torch, renorm
x, y = torch.randn(64, 64, 40, 40), torch.randn(1 << 20)
layer = renorm.Norm("n c [...]", c=64, backend="native")
tasks = lambda: len(os.listdir("/proc/self/task"))
torch.set_num_threads(1)
layer(x).sum().backward()
print("one:", tasks())
torch.set_num_threads(3)  # torch may start threads of other pools here, too
before = tasks()
layer(x)
print("more:", tasks() - before)
y.exp()
print("shared:", tasks() - before)
maps = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rpartition("/")[2]}
print("pools:", len([path for path in maps if "libgomp" in path or "libomp" in path or "libiomp" in path]))
""")
    if not extension.module().openmp:
        pytest.skip("the kernels have been built for one thread")
    assert "more: 2\n" in said
    assert "shared: 2\n" in said
    assert "pools: 1\n" in said


@with_extension
@needs_proc
def test_no_thread_ends_where_fewer_work():
    """A team of fewer threads than torch's would end the others, which torch's next operation starts again."""
    said = python("""
import os, torch, renorm
torch.set_num_threads(4)
layer, x, large = renorm.Norm("n c [...]", c=8, backend="native"), torch.randn(4, 8, 32, 40), torch.randn(1 << 20)
tasks = lambda: set(os.listdir("/proc/self/task"))
layer(x), large.exp()
before = tasks()
for _ in range(20):
    layer(x), large.exp()
print("the same:", before == tasks())
""")
    assert "the same: True" in said


@with_extension
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are spawned here")
def test_a_fork_after_use_computes_the_same():
    """In the child the pool's threads are gone: a kernel that waited for them would never end."""
    said = python("""
import os, sys, torch, test_native as t
torch.set_num_threads(2)
case = t.Case("[n] c [...]", (16, 40, 31, 33), "")
one = t.Case("n c [...]", (1, 1, 500, 700), "")  # one set, which the threads share
before = [(c.input(torch.float32), c.setting(torch.float32)) for c in (case, one)]
wanted = [t.formula(x, s) for x, s in before]
for (x, s), w in zip(before, wanted):
    t.compare(x, s, w, t.run(x, s))
child = os.fork()
found = [t.run(x, s) for x, s in before]
if child == 0:
    torch.set_num_threads(1)  # for torch's own operations, of which the comparison is made
    for (x, s), w, f in zip(before, wanted, found):
        t.compare(x, s, w, f)
    grandchild = os.fork()
    again = t.run(*before[0])
    ok = t.same(again, t.run(*before[0]))
    if grandchild == 0:
        os._exit(0 if ok else 1)
    os._exit(os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]))
for (x, s), w, f in zip(before, wanted, found):
    t.compare(x, s, w, f)
print("child:", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""")
    assert said.endswith("child: 0\n")


@with_extension
def test_several_python_threads_at_once():
    dtypes = (torch.float32, torch.bfloat16)
    work = [(case.input(dtype), case.setting(dtype)) for case in LARGE[::2] for dtype in dtypes]
    with threads(2):
        wanted = [run(x, s) for x, s in work]
        with ThreadPoolExecutor(4) as pool:
            for _ in range(3):
                for found, expected in zip(pool.map(lambda pair: run(*pair), work), wanted, strict=True):
                    assert same(found, expected)


# ---- without the extension


USE = """
import torch, renorm
from renorm.kernels import extension
print(renorm.kernels.status())
x = torch.randn(64, 32, 20, 20).requires_grad_()
for layer in (renorm.BatchNorm2d(32), renorm.GroupNorm(4, 32), renorm.RMSNorm(20), renorm.Norm("n [c] ...", c=32)):
    y = layer(x)
    y.square().sum().backward()
    print(layer.kernel(x), bool(y.isfinite().all()))
print(renorm.LocalResponseNorm(5)(x).shape)
try:
    renorm.RMSNorm(20, backend="native")(x)
except renorm.errors.BackendError as error:
    print(error)
"""
ABSENCES = {
    "installed without": (
        """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "renorm.kernels._native":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Finder())
""",
        "renorm was installed without them, ",
    ),
    "a library that cannot be loaded": (
        """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "renorm.kernels._native":
            raise ImportError("libgomp.so.1: cannot open shared object file")
sys.meta_path.insert(0, Finder())
""",
        "they cannot be loaded: libgomp.so.1: cannot open shared object file",
    ),
    "other sources": (
        """
import sys, types
sys.modules["renorm.kernels._native"] = types.SimpleNamespace(interface=0)
""",
        "they were built from other sources: install renorm again",
    ),
}


@pytest.mark.parametrize("absence", ABSENCES)
def test_without_the_extension_all_works_and_says_so(absence):
    hide, reason = ABSENCES[absence]
    said = python(hide + USE)
    (told,) = re.findall("native: not available: (.*)\n", said)
    assert told.startswith(reason)
    assert "torch.batch_norm True\n" in said
    assert "torch.group_norm True\n" in said
    assert "torch.rms_norm True\n" in said
    assert f"backend='native' cannot run here: {told}; write backend='auto' or 'reference'" in said


def test_why_it_is_missing_reaches_the_layer(monkeypatch):
    monkeypatch.setattr(extension, "_MODULE", None)
    monkeypatch.setattr(extension, "_MISSING", "nobody built it")
    x = torch.randn(3, 5)
    assert "not available: nobody built it" in extension.status()
    assert rn.RMSNorm(5).kernel(x) == "torch.rms_norm"
    with pytest.raises(BackendError, match="backend='native' cannot run here: nobody built it; write"):
        rn.RMSNorm(5, backend="native")(x)


@with_extension
def test_a_sum_with_a_residual_of_sliding_windows():
    """Two axes of x have one stride; the sum is dense, and a backward pass goes by it."""
    layer = rn.Norm("a b [c]", weight=None, bias=False, backend="native")
    windows = draw((12, 4)).unfold(0, 3, 1)[:8].permute(2, 0, 1)
    assert windows.stride() == (4, 4, 1)
    residual, upstream = draw(windows.shape, seed=1), draw(windows.shape, seed=2)
    x = windows.detach().requires_grad_()
    y, _ = layer.add(x, residual)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    exact = windows.double().requires_grad_()
    total = exact + residual.double()
    z = (total - total.mean(2, keepdim=True)) / (total.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    (wanted,) = torch.autograd.grad(z, exact, upstream.double())
    close(gradient, wanted, 1e-5)


class Wrapped(Tensor):
    """A parameter that is no plain tensor."""


@with_extension
@pytest.mark.parametrize(
    "other",
    [
        lambda p: nn.Parameter(p.detach().half()),
        lambda p: nn.Parameter(p.detach().double()),
        lambda p: nn.Parameter(p.detach().as_subclass(Wrapped)),
        lambda p: nn.Parameter(p.detach().to("meta")),
    ],
    ids=["half", "double", "subclass", "meta"],
)
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_parameter_that_is_replaced_is_looked_at_again(name, other):
    layer, x = rn.GroupNorm(2, 4, backend="native"), draw((3, 4, 5))
    layer(x)
    setattr(layer, name, other(getattr(layer, name)))
    with pytest.raises(BackendError, match="backend='native' cannot run here"):
        layer(x)


@with_extension
@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_a_counter_of_another_dtype(dtype):
    """Its neighbour in memory is not written to."""
    for backend, shape in (("native", (64, 4)), ("torch", (64, 4)), ("auto", (2, 4))):
        layer = rn.BatchNorm1d(4, backend=backend)
        memory = torch.tensor([-1, 5], dtype=dtype)
        layer.num_batches_tracked = memory[0]
        for _ in range(3):
            layer(draw(shape))
        assert memory.tolist() == [2, 5]
    layer(draw((64, 4)))
    layer.num_batches_tracked = torch.tensor(7)  # after the way was found with another one
    layer(draw((64, 4)))
    assert layer.num_batches_tracked == 8


@with_extension
@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
def test_statistics_beyond_their_dtype_change_nothing(backend):
    layer = rn.BatchNorm1d(4, backend=backend)
    layer(draw((4096, 4)) * 1e20)
    assert layer.num_batches_tracked == 0
    assert layer.running_var.tolist() == [1.0] * 4


@with_extension
@pytest.mark.parametrize(
    "layer", [rn.InstanceNorm2d(16), rn.InstanceNorm2d(16, affine=True), rn.Norm("n c [...]", c=16)]
)
def test_small_instance_norms_keep_the_digits_of_a_large_mean(layer):
    """Torch's err by 1e-3 here."""
    x, upstream = draw((4, 16, 8, 8), mean=1e4), draw((4, 16, 8, 8), seed=1)
    leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    z = (exact - exact.mean((2, 3), keepdim=True)) / (exact.var((2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    y = layer(leaf)
    close(y, z, 5e-6)
    (found,), (wanted,) = torch.autograd.grad(y, leaf, upstream), torch.autograd.grad(z, exact, upstream.double())
    close(found, wanted, 5e-6)


@with_extension
def test_reasons_against():
    """Each names what stands in the way."""
    part = partition("n [c]", 2, {}, ("c",))
    x, one = torch.randn(3, 5), torch.ones(5)
    for arguments, words in (
        ((torch.zeros(3, 5, dtype=torch.complex64), None, None), "the input is torch.complex64"),
        ((torch.zeros(3, 5, device="meta"), None, None), "the input is on meta"),
        ((x, one.to("meta"), None), "the parameters are torch.float32 on meta"),
        ((x, one.int(), None), "the parameters are torch.int32 on cpu"),
        ((x, one, one.double()), "weight and bias differ in dtype"),
        ((torch.zeros(0, 5), one, None), "the input has no entries"),
    ):
        assert native.fit(arguments[0], part, *arguments[1:]) == words
