"""The Triton kernels in Triton's interpreter, against the float64 formulas that hold the native ones.

Triton reads TRITON_INTERPRET when it is imported, so these run in a process of their own: `test_triton.py` starts it.
With RENORM_TEST_DEVICE=cuda in its place they run on a GPU.
"""

import importlib
import math
import mmap
import os
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import test_native
import torch
from checks import close, eps_of
from test_native import FOLLOW, Case, Own, Setting, compare, draw, formula, masks, more_layouts, run, same
from torch import Tensor

import renorm as rn
from renorm.errors import BackendError
from renorm.kernels import Affine, apart, graph, native, reference, select
from renorm.kernels.triton import available, launch
from renorm.pattern import partition

DEVICE = os.environ.get("RENORM_TEST_DEVICE", "cpu")
interpreted = pytest.mark.skipif(DEVICE != "cpu", reason="of the interpreter, on CPU tensors")

# NumPy warns where a GPU gives infinity or NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
G2, G3 = (("g", 2),), (("g", 3),)
# A tile holds whole sets here, and not with no room in a tile: see `room`.
CASES = [
    Case("n c [...]", (2, 3, 3, 5), ""),
    Case("n (g [c]) [...]", (2, 9, 3, 5), "", G3, "g c"),
    Case("n [c ...]", (2, 3, 3, 5), ""),
    Case("n [c ...]", (2, 3, 3, 5), "", weighted=""),
    Case("[n] c [...]", (4, 3, 3, 5), ""),
    Case("(k [b]) c [...]", (4, 3, 3, 5), "", (("b", 2),)),
    Case("n l [c]", (2, 3, 21), ""),
    Case("n l [c]", (2, 3, 21), "", about_zero=True),
    Case("n [c h w]", (3, 2, 3, 5), "", weighted="c h w"),
    Case("[n l] c", (4, 5, 7), ""),
    Case("[n] c", (19, 5), "", about_zero=True),
    Case("t [n] c", (3, 9, 5), ""),
    Case("n (g [c])", (4, 12), "", G3, "g c"),
    Case("n [l] (g [c])", (3, 5, 12), "", G3, "g c"),
    Case("n [c] ...", (2, 17, 2, 3), ""),
    Case("n [c] ...", (2, 17, 2, 3), "", about_zero=True),
    Case("n c [...]", (2, 2, 2, 3, 4), ""),
    Case("[n] c", (1, 6), ""),
    Case("[n] c [...]", (6, 3, 3, 3), ""),
    Case("(k [b]) (g [c]) [...]", (4, 4, 3, 3), "", (("b", 2), ("g", 2)), "g c"),
]


FUSED, IN_PASSES = ([(case, room) for case in CASES] for room in ("fused", "in passes"))


def named(value: Case | str) -> str:
    """Of a test."""
    return test_native.named(value) if isinstance(value, Case) else value


@pytest.fixture(autouse=True)
def _by_triton(monkeypatch):
    """The functions of `test_native` run Triton's kernels."""

    def nest_of(x: Tensor, s: Setting):
        mask = None if s.mask is None else s.mask.expand(x.shape)
        made = native.fit(x, s.part, s.weight, s.bias, mask, "triton")
        assert not isinstance(made, str), made
        assert made.backend == "triton"
        return made, mask

    monkeypatch.setattr(test_native, "nest_of", nest_of)


@pytest.fixture(autouse=True)
def _rounding(monkeypatch):
    """The interpreter cuts off what bfloat16 has no room for; a GPU, as torch, rounds to the nearest."""
    if DEVICE != "cpu":
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(values, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, mode)
        nearest = torch.from_numpy(np.ascontiguousarray(values).copy()).view(torch.float32).bfloat16()
        return nearest.view(torch.int16).numpy().view(np.uint16).reshape(values.shape)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


# Whole sets in a tile; none, and several programs for each; none, and tiles of a few entries.
ROOM = {
    "fused": {},
    "in passes": {"fused_forward": 0, "fused_backward": 0, "steps": 1},
    "small tiles": {"fused_forward": 0, "fused_backward": 0, "steps": 2, "tile": 64, "columns": 8, "parts": 2},
}


@pytest.fixture(params=ROOM)
def room(request, monkeypatch):
    """Each way through the kernels."""
    monkeypatch.setattr(launch, "CHOICES", launch.Choices(**ROOM[request.param]))
    return request.param


@pytest.mark.parametrize("case", CASES, ids=named)
def test_values_and_gradients_are_the_formulas(case, room):
    for dtype in DTYPES[: 1 if room == "small tiles" else 3]:
        x, s = case.input(dtype), case.setting(dtype)
        wanted = formula(x, s)
        found = run(x, s)
        compare(x, s, wanted, found, str(dtype))
        assert found.y.dtype == found.dx.dtype == dtype
        close(found.mean, wanted.mean, 4 * eps_of(torch.float32) * max(1, wanted.mean.abs().max().item()))
        close(found.var / wanted.var.clamp(min=1e-9), wanted.var / wanted.var.clamp(min=1e-9), 1e-5)
    if room == "small tiles":
        return
    assert same(found, run(x, s)), "not the same twice"
    s = case.setting(dtype, torch.float32)
    compare(x, s, formula(x, s), run(x, s), "float32 parameters")


@pytest.mark.parametrize(("case", "room"), [*FUSED, *IN_PASSES[1::2]], ids=named, indirect=["room"])
def test_any_layout_and_measure_and_apply_apart(case, room):
    x, s = case.input(torch.float32), case.setting(torch.float32)
    wanted = formula(x, s)
    for name, laid in more_layouts(x).items():
        compare(x, s, wanted, run(laid, s, in_two=room == "in passes"), name)


@pytest.mark.parametrize(("case", "room"), [*FUSED, *IN_PASSES], ids=named, indirect=["room"])
def test_masked_values_and_gradients_are_the_formulas(case, room):
    x, plain = case.input(torch.float32), case.setting(torch.float32)
    for kind in ("entries", "nothing real", "one real", "samples", "but dimension 1"):
        mask = masks(case.shape)[kind]
        s = plain._replace(mask=mask)
        dirty = torch.where(mask, x, float("nan"))
        compare(x, s, formula(x, s), run(dirty, s, in_two=kind == "entries" and room != "fused"), f"mask of {kind}")


@pytest.mark.parametrize("case", CASES[:12:3], ids=named)
@pytest.mark.parametrize("room", ["fused", "in passes"], indirect=True)
def test_weight_or_bias_alone(case, room):
    x, s = case.input(torch.float32), case.setting(torch.float32)
    for alone in (s._replace(weight=None), s._replace(bias=None), s._replace(weight=None, bias=None)):
        compare(x, alone, formula(x, alone), run(x, alone))


@pytest.mark.parametrize("case", CASES[::2], ids=named)
@pytest.mark.parametrize("room", ["fused", "in passes"], indirect=True)
def test_an_addition_and_an_activation(case, room):
    for i, activation in enumerate(FOLLOW):
        dtype = DTYPES[i % len(DTYPES)]
        x, residual, s = case.input(dtype), draw(case.shape, dtype, 10), case.setting(dtype)
        mask = None if i % 2 else draw(case.shape, seed=11) > -0.5
        test_native.check_neighbours(x, None if i == 1 else residual, s._replace(mask=mask), activation)
    test_native.check_neighbours(more_layouts(x)["transposed"], residual, s, activation)


def test_every_remainder_of_a_tile(room):
    for width in (1, 2, 15, 16, 17, 33):
        for pattern, shape in (("n [c]", (3, width)), ("n c [l]", (2, 3, width)), ("[n] c", (7, width))):
            case = Case(pattern, shape, "")
            x, s = case.input(torch.float32), case.setting(torch.float32)
            compare(x, s, formula(x, s), run(x, s), f"{pattern} of {width}")


# ---- hard numbers


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("arrangement", test_native.ARRANGEMENTS)
@pytest.mark.parametrize("room", ["fused", "in passes"], indirect=True)
def test_hard_sets_keep_their_digits(arrangement, masked, room):
    """Means of up to 1e6 deviations, steps, drifts and outliers."""
    sets = test_native.hard_sets(240)
    del sets["huge"]  # its squares are no float32
    x, s = test_native.arranged(sets, arrangement, weighted=not masked)
    if masked:
        s = s._replace(mask=draw(x.shape, seed=5) > -1)
    wanted, found = formula(x, s), run(x, s)
    ordinary = wanted.var > 1e-30
    off = ((found.var - wanted.var).abs() / wanted.var)[ordinary].max().item()
    assert off <= 4e-6, f"variances are off by {off:.2g}"
    compare(x, s, wanted, found, k=12)


@pytest.mark.parametrize("room", ["fused", "small tiles"], indirect=True)
def test_a_large_mean_in_half_precision(room):
    """1e4 deviations: in float16 the values are multiples of 8, all digits of which count."""
    for dtype in DTYPES:
        x = (draw((3, 500)) * 100 + 1e4).to(dtype)
        s = Setting(
            partition("n [c]", 2, {}, ("c",)), draw((500,), dtype, 1), draw((500,), dtype, 2), draw(x.shape, dtype)
        )
        compare(x, s, formula(x, s), run(x, s))


@pytest.mark.parametrize("arrangement", test_native.ARRANGEMENTS)
@pytest.mark.parametrize("room", ["fused", "in passes"], indirect=True)
def test_what_is_not_finite_stays_in_its_set(arrangement, room):
    sets = {str(i): draw((240,), seed=i) for i in range(8)}
    clean, s = test_native.arranged(sets, arrangement, weighted=False)
    wanted = formula(clean, s)
    for place, bad in ((0, math.nan), (239, -math.inf)):
        dirty = sets | {"3": torch.where(torch.arange(240) == place, bad, sets["3"])}
        x, _ = test_native.arranged(dirty, arrangement, weighted=False)
        found = run(x, s)
        own = s.part.view((x != clean) | x.isnan()).any(s.part.reduced, keepdim=True)
        own = own.expand(s.part.view(x).shape).reshape(x.shape)
        assert found.y[own].isnan().all()
        assert found.dx[own].isnan().all()
        rest = found._replace(y=torch.where(own, 0, found.y), dx=torch.where(own, 0, found.dx))
        y, dx = ((torch.where(own, 0, value), terms) for value, terms in (wanted.y, wanted.dx))
        compare(x, s, wanted._replace(y=y, dx=dx), rest)


@pytest.mark.parametrize("room", ["fused", "in passes"], indirect=True)
def test_constant_sets(room):
    for arrangement in ("rows", "columns", "pieces"):
        for value in (0.0, 0.1, -3e4):
            sets = {str(i): torch.full((240,), value) for i in range(5)}
            x, s = test_native.arranged(sets, arrangement, weighted=False)
            found = run(x, s)
            assert (found.var <= (1e-7 * value) ** 2).all()
            compare(x, s, formula(x, s), found._replace(y=torch.zeros_like(x)))


# ---- what a launch is made of


def test_rows_longer_than_a_tile_and_more_programs_than_sets():
    """A row that no tile holds, its parameters along it; few sets, which several programs share."""
    for case in (
        Case("n [c]", (3, 40_003), ""),
        Case("[n] c [...]", (5, 2, 61, 67), ""),
        Case("n [c] l", (2, 300, 99), ""),
        Case("n (g [c]) [...]", (1, 8, 41, 43), "", (("g", 1),), "g c"),
    ):
        x, s = case.input(torch.float32), case.setting(torch.float32)
        compare(x, s, formula(x, s), run(x, s), case.pattern)


def loops_of(case):
    made = native.fit(case.input(torch.float32), case.setting(torch.float32).part, None, None, None, "triton")
    return launch.loops(made.packed)


def test_a_tile_holds_whole_sets_where_it_can():
    def tile(case, limit=launch.CHOICES.fused_forward):
        return launch.fused_tile(loops_of(case), limit)

    assert tile(Case("n [c]", (2000, 700), "")) == launch.Tile(2, 1, 1024)
    assert tile(Case("n [c]", (8, 16_384), "")) == launch.Tile(1, 1, 16_384)
    assert tile(Case("n [c]", (2000, 40_000), "")) is None
    assert tile(Case("[n] c [...]", (4, 8, 3, 3), "")) is None  # a set is not one run
    assert tile(Case("n (g [c]) [...]", (8, 12, 5, 7), "", G3, "g c")) == launch.Tile(8, 4, 64)
    assert tile(Case("n [c] ...", (2, 64, 8, 8), "")) == launch.Tile(64, 1, 64)
    assert tile(Case("n [c] ...", (2, 1024, 8, 8), "")) == launch.Tile(8, 1, 1024)
    assert tile(Case("n [c] ...", (2, 1024, 8, 8), ""), launch.CHOICES.fused_backward) == launch.Tile(8, 1, 1024)
    assert tile(Case("n [c] ...", (2, 2048, 8, 8), ""), launch.CHOICES.fused_backward) is None


def test_a_small_map_is_visited_by_columns_where_its_rows_are_not_aligned():
    small = loops_of(Case("[n] c [...]", (17, 6, 3, 3), ""))
    assert (small.flat, small.row, small.num_k, small.num_b, small.merge, small.param_div) == (
        True,
        False,
        54,
        17,
        9,
        9,
    )
    for shape in ((17, 6, 4, 4), (17, 6, 15, 15)):
        other = loops_of(Case("[n] c [...]", shape, ""))
        assert (other.flat, other.row, other.num_k, other.merge) == (False, True, 6, 1)


def test_every_program_has_work_and_no_step_is_left_out():
    for tiles in (1, 7, 1000):
        for steps in (1, 2, 5, 640):
            for machine in (1, 8, 1056):
                for waves in (1, 4):
                    parts = launch.splits(tiles, steps, machine, waves)
                    assert 1 <= parts <= steps
                    assert parts == 1 or parts * tiles < waves * machine + tiles


# ---- tensors beyond 2^31 entries


def far_apart(values: Tensor, step: int) -> Tensor:
    """The same, samples `step` entries apart, in memory of which only what is touched exists."""
    size = step * (len(values) - 1) + values[0].numel()
    if DEVICE != "cpu":  # there is memory enough
        return (
            torch.empty(size, dtype=values.dtype).as_strided(values.shape, (step, *values.stride()[1:])).copy_(values)
        )
    size *= values.element_size()
    unreserved = 0x4000  # MAP_NORESERVE of Linux, which Python names from 3.12 on
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | unreserved)
    flat = torch.frombuffer(memory, dtype=values.dtype)
    return flat.as_strided(values.shape, (step, *values.stride()[1:])).copy_(values)


@pytest.mark.skipif(sys.platform != "linux", reason="memory that is not there until it is touched")
@pytest.mark.parametrize("room", ["fused", "in passes"], indirect=True)
@pytest.mark.parametrize(
    "case",
    [Case("n [c]", (3, 35), ""), Case("[n] c [...]", (3, 4, 2, 5), ""), Case("n [c] ...", (3, 9, 2, 2), "")],
    ids=named,
)
def test_offsets_beyond_32_bits(case, room):
    """Of entries, not of bytes: 2^30 entries apart, the third sample begins at 2^31."""
    x, s = case.input(torch.float32), case.setting(torch.float32)
    far = far_apart(x, 2**30)
    made = native.fit(far, s.part, s.weight, s.bias, None, "triton")
    assert made.x_strides == far.stride(), "it would be copied"
    assert launch.loops(made.packed).wide
    compare(x, s, formula(x, s), run(far, s))


def test_any_layout_with_indices_of_64_bits(monkeypatch):
    monkeypatch.setattr(launch, "NARROW", 0)
    launch.loops.cache_clear()
    for case in CASES[:12:2]:
        x, s = case.input(torch.float32), case.setting(torch.float32)
        assert loops_of(case).wide
        compare(x, s, formula(x, s), run(x, s), case.pattern)
    launch.loops.cache_clear()


# ---- the benchmark, on the CPU


@interpreted
def test_the_benchmark_measures_keeps_and_goes_on(monkeypatch, tmp_path, capsys):
    """Everything but CUDA's clock and compiler."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    bench = importlib.import_module("bench_gpu")
    small = [replace(case, shape=(4, *case.shape[1:])) for case in bench.small()[:1]]
    norms = {"LayerNorm": rn.LayerNorm, "RMSNorm": rn.RMSNorm}
    cases = [bench.Case(name, lambda of=of: of(16), lambda of=of: of(16), (8, 16)) for name, of in norms.items()]
    cases += [*small, bench.Case("no twin", lambda: rn.FRN(3), None, (2, 3, 4, 4), channels_last=True)]
    cases += [bench.Case("added", lambda: bench.Added(rn.LayerNorm(16), (8, 16)), None, (8, 16), residual=True)]
    monkeypatch.setattr(bench, "DEVICE", "cpu")
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "gpu.csv")
    for clock in ("on_the_device", "on_the_host"):
        monkeypatch.setattr(bench, clock, lambda call, other: (call(), 1.0)[1])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    monkeypatch.setattr(torch, "compile", lambda layer, mode: layer)
    options = Namespace(rounds=2, budget=1e9, save=True, again=False)
    for budget, left in ((0, "5 cases are left"), (1e9, "nothing is left")):
        bench.run(list(cases), Namespace(**vars(options) | {"budget": budget}))
        assert left in capsys.readouterr().out
    kept = bench.read(bench.RESULTS)
    assert {row[0] for row in kept} == {case.name for case in cases}
    assert {row[10] for row in kept if row[2] == "renorm"} == {"triton"}
    assert {row[2] for row in kept if row[0] == "LayerNorm"} == {"renorm", "torch", "compiled"}
    monkeypatch.setattr(bench, "measure", None)  # which is not asked again
    bench.run(list(cases), options)
    monkeypatch.undo()
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "gpu.csv")
    monkeypatch.setattr(bench, "measure", lambda case, rounds: ({**FOUR}, "triton", math.nan))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    with pytest.raises(SystemExit, match="RMSNorm is off by nan"):
        bench.run(cases[1:2], Namespace(**vars(options) | {"again": True}))
    assert len(bench.read(bench.RESULTS)) == len(kept) - 4, "rows of the case are replaced: two for six"


FOUR = {name: [1.0, 2.0] for name in ("copy", "renorm forward", "renorm both")}


# ---- layers


def same_as_reference(make, shape, *, mask=None, again=2):
    """Outputs, gradients and running statistics of a layer, in several forward passes."""
    for dtype in (torch.float32, torch.bfloat16):
        found = []
        for backend in ("triton", "reference"):
            layer = make(backend)
            with torch.no_grad():
                for i, parameter in enumerate(layer.parameters()):
                    parameter.add_(0.3 * draw(parameter.shape, seed=i))
            x = draw(shape, dtype, 7, mean=1.5).requires_grad_()
            for _ in range(again):
                y = layer(x, mask) if mask is not None else layer(x)
            assert layer.kernel(x, mask) == backend
            y.backward(draw(shape, dtype, 8))
            found.append([y, x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
        for a, b in zip(*found, strict=True):
            if a is None and b is None:  # of a frozen parameter
                continue
            assert a.dtype == b.dtype
            close(a, b, (8 if dtype == torch.float32 else 2) * eps_of(dtype) * max(4, b.abs().max().item()))


LAYERS = {
    "batch": (lambda b: rn.BatchNorm2d(5, backend=b), (4, 5, 3, 7)),
    "batch, moving average": (lambda b: rn.BatchNorm2d(5, momentum=None, backend=b), (4, 5, 3, 7)),
    "layer": (lambda b: rn.LayerNorm(33, backend=b), (2, 5, 33)),
    "group": (lambda b: rn.GroupNorm(3, 6, backend=b), (2, 6, 3, 7)),
    "instance": (lambda b: rn.InstanceNorm2d(5, affine=True, backend=b), (2, 5, 3, 7)),
    "RMS": (lambda b: rn.RMSNorm(33, backend=b), (2, 5, 33)),
    "part of RMS": (lambda b: rn.RMSNorm(33, partial=0.5, backend=b), (2, 5, 33)),
    "Gemma's RMS": (lambda b: rn.RMSNorm(33, offset=True, backend=b), (2, 5, 33)),
    "switch": (lambda b: rn.SwitchNorm2d(6, backend=b), (4, 6, 3, 7)),
    "layer over channels": (lambda b: rn.LayerNorm2d(6, backend=b), (2, 6, 3, 7)),
    "ghost": (lambda b: rn.GhostBatchNorm(5, 2, backend=b), (5, 5, 3, 7)),
    "frozen batch": (lambda b: rn.freeze(rn.BatchNorm2d(5, backend=b)), (4, 5, 3, 7)),
    "batch with SiLU": (lambda b: rn.BatchNorm2d(5, activation="silu", backend=b), (4, 5, 3, 7)),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_those_of_the_reference(name, masked):
    make, shape = LAYERS[name]
    same_as_reference(make, shape, mask=draw(shape, seed=9) > -0.6 if masked else None)


def test_a_residual_through_a_layer():
    layer, plain = rn.LayerNorm(33, backend="triton"), rn.LayerNorm(33, backend="reference")
    x, residual = draw((4, 33), seed=1).requires_grad_(), draw((4, 33), seed=2).requires_grad_()
    for a, b in zip(layer.add(x, residual), plain.add(x, residual), strict=True):
        close(a, b, 1e-6)
        for p, q in zip(
            *(torch.autograd.grad(t.square().sum(), (x, residual), retain_graph=True) for t in (a, b)), strict=True
        ):
            close(p, q, 2e-5)
    assert "kernel=triton" in repr(layer)


@interpreted
def test_empty_inputs_and_other_dtypes_are_refused_by_name_and_the_reference_serves():
    for x, reason in (
        (torch.zeros(0, 5), "the input has no entries"),
        (torch.zeros(2, 5, dtype=torch.float64), "the input is torch.float64"),
    ):
        with pytest.raises(BackendError, match=f"backend='triton' cannot run here: {reason}; write backend='auto'"):
            rn.LayerNorm(5, backend="triton", dtype=x.dtype)(x)
        assert rn.LayerNorm(5, dtype=x.dtype)(x).shape == x.shape
    with pytest.raises(BackendError, match="the mask is on meta"):
        rn.LayerNorm(5, backend="triton")(torch.zeros(2, 5), torch.ones(2, 5, dtype=torch.bool, device="meta"))
    with pytest.raises(BackendError, match=r"the parameters are torch\.float64 on cpu"):
        rn.LayerNorm(5, backend="triton", dtype=torch.float64)(torch.zeros(2, 5))


@interpreted
def test_the_automatic_choice_on_the_cpu_is_not_the_interpreter():
    assert rn.LayerNorm(8).kernel(torch.zeros(2, 8)) != "triton"
    assert rn.Norm("n [c] ...", c=8).kernel(torch.zeros(2, 8, 3)) != "triton"


def test_second_derivatives_are_those_of_the_reference():
    x, dy = draw((3, 12), seed=1).requires_grad_(), draw((3, 12), seed=2)
    found = []
    for backend in ("triton", "reference"):
        layer = rn.GroupNorm(3, 12, backend=backend)
        (dx,) = torch.autograd.grad(layer(x), x, dy, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), [x, layer.weight]))
    for a, b in zip(*found, strict=True):
        close(a, b, 1e-4 * b.abs().max().item())


def test_inside_transforms_the_kernels_do_not_run(monkeypatch):
    monkeypatch.setattr(select, "ENVIRONMENT", "auto")
    layer = rn.LayerNorm(6, backend="triton")
    with pytest.raises(BackendError, match="a transform, a mode or a tracer looks at every operation"):
        torch.func.vmap(layer)(draw((3, 2, 6)))


def test_a_solve_of_ones_own_and_its_moments():
    """Gradients of an output and of the moments that a loss takes from it."""
    found = []
    for backend in ("triton", "reference"):
        layer = Own("n (g [c]) [...]", g=2, c=3, backend=backend)
        x = draw((4, 6, 5, 3), seed=3, mean=1.0).requires_grad_()
        y = layer(x)
        loss = y.pow(3).sum() + layer.stashed.mean.pow(2).sum() + (layer.stashed.var * layer.stashed.mean).sum()
        found.append([y, *torch.autograd.grad(loss, [x, layer.weight, layer.bias])])
    for a, b in zip(*found, strict=True):
        close(a, b, 2e-6 * max(1, b.abs().max().item()))


@pytest.mark.parametrize(
    "make", [lambda: rn.GroupNorm(2, 6, backend="triton"), lambda: rn.BatchNorm2d(6, backend="triton")]
)
def test_in_a_compiled_graph(make):
    layer, twin = make(), make()
    x = draw((4, 6, 5, 3), seed=3, mean=1.0)
    dy = draw(x.shape, seed=4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for run_it, of in ((compiled, layer), (twin, twin)):
        leaf = x.clone().requires_grad_()
        y = run_it(leaf)
        y.backward(dy)
        results.append([y, leaf.grad, of.weight.grad, of.bias.grad, *of.buffers()])
    for a, b in zip(*results, strict=True):
        close(a, b, 1e-6 * max(1, b.abs().max().item()))
    operators = []

    def look(graph, inputs):
        operators.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    torch.compile(layer, fullgraph=True, backend=look)(x)
    assert any("renorm" in name and "normalize" in name for name in operators), operators


def test_the_operator_passes_torchs_own_checks():
    part = partition("n (g [c]) [...]", 4, {"g": 2, "c": 3}, ("g", "c"))
    x = draw((2, 6, 3, 5), seed=1).requires_grad_()
    weight, bias = (draw((6,), seed=seed).requires_grad_() for seed in (2, 3))
    arguments = (x, weight, bias, None, graph.to_text(part), 1e-5, False, "triton")
    torch.library.opcheck(graph._normalize, arguments, test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(graph._normalize, arguments, test_utils="test_autograd_registration")


def test_reasons_against():
    assert available.why_not(torch.zeros(2)) is None, "the kernels would not run at all"
    assert available.obstacle("mps", 0) == "the input is on mps"
    assert available.why_not(torch.zeros(2, dtype=torch.int64)) == "the input is torch.int64"


def test_an_affine_of_ones_own_under_a_mask():
    part = partition("n c [...]", 4, {}, ("c",))
    x, mask = draw((3, 4, 5, 6), seed=1).requires_grad_(), draw((3, 4, 5, 6), seed=2) > -0.5
    made = native.fit(x, part, None, None, mask, "triton")
    moments, measured = apart.measure(x, part, made, mask=mask)
    found = apart.apply(x, part, measured, Affine(moments.var.rsqrt(), moments.mean * 0.5, moments.mean), None, None)
    m = reference.measure(x, part, mask=mask)
    wanted = reference.apply(x, part, Affine(m.var.rsqrt(), m.mean * 0.5, m.mean), mask=mask)
    dy = draw(x.shape, seed=3)
    close(found, wanted, 2e-6)
    close(torch.autograd.grad(found, x, dy)[0], torch.autograd.grad(wanted, x, dy)[0], 1e-5)
