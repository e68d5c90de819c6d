"""The Triton kernels: interpreted, in a process of their own; compiled for a GPU that is not there; and who chooses."""

import importlib.util
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from absent_gpu import absent_gpu, both_ways, on_it
from torch._subclasses import FakeTensorMode

import renorm as rn
from renorm.errors import BackendError
from renorm.kernels import select
from renorm.kernels.triton import available

with_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
HERE = Path(__file__).parent


@with_triton
def test_the_kernels_in_the_interpreter():
    """Triton reads TRITON_INTERPRET once, when it is imported: the tests of this process must not see it."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted_triton.py")]
    variables = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=variables, cwd=HERE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]


# ---- compiled


@pytest.fixture
def gpu(tmp_path_factory, monkeypatch):
    """Launches on an H200 that is not there."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))
    with absent_gpu(monkeypatch) as launches:
        yield launches


def layer(name, *arguments, **options):
    """A layer by Triton."""
    return getattr(rn, name)(*arguments, backend="triton", **options)


ROWS_512, IMAGES = (262_144, 512), (256, 64, 112, 112)
# (layer, shape, channels_last): in one pass and in several, rows and columns, parameters along the sets or not.
COMPILED = [
    (("LayerNorm", 512), ROWS_512, False),
    (("LayerNorm", 4096), (32_768, 4096), False),
    (("LayerNorm", 16_384), (8192, 16_384), False),
    (("LayerNorm", 40_000), (64, 40_000), False),
    (("RMSNorm", 2048), (65_536, 2048), False),
    (("BatchNorm2d", 64), IMAGES, False),
    (("BatchNorm2d", 64), IMAGES, True),
    (("BatchNorm2d", 2048), (256, 2048, 7, 7), False),
    (("GroupNorm", 32, 2048), (256, 2048, 16, 16), False),
    (("GroupNorm", 32, 2048), (256, 2048, 16, 16), True),
    (("GroupNorm", 32, 64), (8, 64, 512, 512), True),
    (("InstanceNorm2d", 64), IMAGES, False),
    (("LayerNorm2d", 64), IMAGES, False),
    (("LayerNorm2d", 2048), (256, 2048, 16, 16), False),
    (("SwitchNorm2d", 64), IMAGES, False),
]
SPILT = {((1, 1, 16_384), "fused_backward"): 128}  # bytes a thread; see `launch.Choices.fused_backward`


@with_triton
@pytest.mark.parametrize(("made", "shape", "last"), COMPILED, ids=[f"{m[0]} {s}{' last' * c}" for m, s, c in COMPILED])
def test_the_kernels_compile_for_a_gpu_and_move_16_bytes_at_once(gpu, made, shape, last):
    """As they are launched there: without atomics, registers enough for 16 warps, and wide loads."""
    both_ways(layer(*made), on_it(*shape, channels_last=last))
    assert gpu
    for launched in gpu:
        assert "atom." not in launched.ptx
        assert "red." not in re.sub(r"shared\.", "", launched.ptx)
        registers, spilt = launched.resources()
        tile = tuple(launched.arguments.get(name) for name in ("SETS", "MERGE", "B"))
        assert spilt <= SPILT.get((tile, launched.name), 0), f"{launched.name} spills {spilt} bytes"
        assert registers * 32 * max(16, launched.kernel.metadata.num_warps) <= 65_536, (launched.name, registers)
        assert launched.programs < 2**31
        if launched.name not in ("finish", "solve"):
            assert re.search(r"ld\.global(\.\w+)*\.v4\.b32", launched.ptx), f"{launched.name} reads less at once"


@with_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_they_compile_with_a_mask_an_activation_and_a_residual(gpu, dtype, last):
    mask = torch.empty(8, 1, 14, 14, dtype=torch.bool, device="meta")
    for make in (
        lambda **o: layer("GroupNorm", 2, 64, **o),
        lambda **o: layer("BatchNorm2d", 64, **o),
        lambda **o: layer("LayerNorm2d", 64, **o),
    ):
        x = on_it(8, 64, 14, 14, dtype=dtype, channels_last=last)
        for activation in ("gelu", "leaky_relu"):
            normed = make(activation=activation).to("meta", dtype)
            both_ways(normed, x, mask)
            y, total = normed.add(x.requires_grad_(), torch.empty_like(x))
            torch.autograd.backward([y, total], [torch.empty_like(y), torch.empty_like(y)])
    names = {launched.name for launched in gpu}
    assert {"fused_forward", "fused_backward"} <= names
    assert last or {"measure", "finish", "apply", "reduce", "solve", "combine"} <= names


@with_triton
def test_they_compile_for_an_a100(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with absent_gpu(monkeypatch, capability=80, processors=108) as launches:
        both_ways(layer("LayerNorm", 4096), on_it(8192, 4096))
        both_ways(layer("BatchNorm2d", 64), on_it(64, 64, 56, 56))
    for launched in launches:
        assert ".target sm_80" in launched.ptx
        assert launched.resources()[1] == 0


@with_triton
def test_a_batch_of_another_size_needs_few_compilations(gpu):
    """Batches differ from step to step; what a kernel is compiled for must not."""
    for batch in range(9, 80):
        both_ways(layer("BatchNorm2d", 64), on_it(batch, 64, 14, 14))
        both_ways(layer("LayerNorm", 768), on_it(batch, 50, 768))
    compiled = {}
    for launched in gpu:
        compiled.setdefault(launched.name, set()).add(launched.kernel.hash)
    counts = {name: len(kernels) for name, kernels in compiled.items()}
    assert counts.pop("finish") <= 8, "a power of 2 for the number of parts"
    assert counts.pop("solve") <= 8
    assert max(counts.values()) <= 4, counts


@with_triton
def test_entries_beyond_32_bits_are_counted_in_64(gpu):
    for rows, wide in ((2**21 - 128, False), (2**21, True)):
        both_ways(layer("LayerNorm", 1024), on_it(rows, 1024))
        both_ways(layer("BatchNorm1d", 1024), on_it(rows, 1024))
        assert {launched.arguments["WIDE"] for launched in gpu} == {wide}
        gpu.clear()
    x = torch.empty_strided((3, 1024), (2**30, 1), dtype=torch.bfloat16, device="meta")
    both_ways(layer("LayerNorm", 1024), x)
    assert gpu[0].arguments["WIDE"], "few entries, but far apart"


# ---- who chooses them


@pytest.fixture
def asked_again():
    """What was found out of this machine is forgotten before and after."""
    available._obstacle.cache_clear()
    available._ASKED.clear()
    yield
    available._obstacle.cache_clear()
    available._ASKED.clear()


@with_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter runs on the CPU")
def test_on_the_cpu_it_cannot_run_and_says_so(asked_again):
    layer = rn.LayerNorm(8, backend="triton")
    with pytest.raises(BackendError, match="backend='triton' cannot run here: the input is on cpu, where Triton only"):
        layer(torch.zeros(2, 8))
    with pytest.raises(BackendError, match="write backend='auto' or 'reference'"):
        rn.SwitchNorm2d(3, backend="triton")(torch.zeros(2, 3, 4, 4))
    with pytest.raises(BackendError, match="the input is on cpu"):
        rn.BatchNorm2d(3, backend="triton").eval()(torch.zeros(2, 3, 4, 4))


def test_what_has_no_triton_kernels_says_so():
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(BackendError, match="there is no Triton kernel for local response norm"):
        rn.LocalResponseNorm(3, backend="triton")(x)
    with pytest.raises(BackendError, match="backend='triton' cannot run here: it has no kernel for recurrence"):
        rn.LayerNormLSTM(3, 4, backend="triton")(torch.zeros(5, 2, 3))


def test_in_place_by_triton_says_so(monkeypatch):
    layer = rn.InPlaceBatchNorm2d(3, backend="triton")
    monkeypatch.setattr(rn.Norm, "_choose", lambda *_: "triton")
    with pytest.raises(BackendError, match="there is no Triton kernel that works in place"):
        layer(torch.randn(2, 3, 4, 4))
    layer.backend = "auto"
    assert layer.kernel(torch.randn(2, 3, 4, 4)) == "reference"


def test_the_environment_names_it():
    code = "import renorm as rn, torch; rn.LayerNorm(8)(torch.zeros(2, 8))"
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"RENORM_BACKEND": "triton"}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
    assert "BackendError: backend='triton' cannot run here" in done.stderr


def test_reasons_against_a_device(asked_again, monkeypatch):
    assert available.obstacle("xpu", 0) in ("the input is on xpu", "Triton is not installed")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    available._obstacle.cache_clear()
    assert available.obstacle("cuda", 0) == "Triton is not installed"
    assert available.status() == "not available: Triton is not installed"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert available.status() == "not available: there is no GPU that torch can use"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7 + index, 5))
    monkeypatch.setattr(available.importlib, "import_module", lambda name: Probe)
    available._obstacle.cache_clear()
    old = "Triton needs a GPU of compute capability 8.0, and this one has 7.5"
    assert available.status() == f"GPU 0: {old}; GPU 1: kernels"
    Probe.error = RuntimeError("no C compiler")
    available._obstacle.cache_clear()
    assert available.obstacle("cuda", 1) == "Triton does not work: RuntimeError: no C compiler"
    Probe.error = None
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert available.status().startswith("kernels for CUDA tensors")


def test_a_graph_that_is_captured_does_not_hold_the_trial(asked_again, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(available.importlib, "import_module", lambda name: Probe)
    capturing = True
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    assert available.obstacle("cuda", 0).startswith("a CUDA graph is being captured, and Triton was not tried before")
    capturing = False
    assert available.obstacle("cuda", 0) is None
    capturing = True
    assert available.obstacle("cuda", 0) is None


@with_triton
def test_the_trial_compiles_for_a_gpu(gpu, monkeypatch):
    from renorm.kernels.triton import probe

    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())

    with pytest.raises(RuntimeError, match="meta"):  # there is no sum to look at
        probe.run(torch.device("meta"))
    assert [launched.name for launched in gpu] == ["_add"]


class Probe:
    """In place of the module that compiles a kernel."""

    error: Exception | None = None

    @classmethod
    def run(cls, device):
        if cls.error is not None:
            raise cls.error


def test_the_choice_on_cuda_tensors(monkeypatch):
    """Of tensors that only say where they are: no GPU is needed to choose."""
    layer = rn.LayerNorm(8)
    with FakeTensorMode():
        x = torch.zeros(2, 8, device="cuda")
        weight = torch.ones(8, device="cuda")
    part = layer._bounds[2].part
    monkeypatch.setattr(available, "why_not", lambda x: None)
    assert rn.kernels.explain(layer, x).startswith("kernel: torch.layer_norm\n")
    assert select.choose(x, part, "layer_norm", weight, None, backend="triton") == "triton"
    assert select.choose(x, part, None, weight, None, backend="triton") == "triton"
    assert select.choose(x, part, None, weight, None) == "reference"  # until a GPU has timed them
    assert select.choose(x, part, "layer_norm", weight, None, backend="torch") == "torch.layer_norm"
    assert select.choose(x, part, "layer_norm", weight, None, backend="reference") == "reference"
    assert select.choose(x, part, "batch_norm", weight, None, fixed=True) == "torch.batch_norm"
    with pytest.raises(BackendError, match=r"the input is on cuda; write"):
        select.choose(x, part, None, weight, None, backend="native")
    with pytest.raises(BackendError, match=r"the parameters are torch\.float32 on cpu"):
        select.choose(x, part, None, torch.ones(8), None, backend="triton")


# ---- the benchmark, as far as it goes without a GPU


def bench(*options):
    command = [sys.executable, str(HERE.parent / "benchmarks" / "bench_gpu.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})


def test_the_benchmark_names_its_cases_and_says_what_it_lacks():
    listed = bench("--list", "--only", "LayerNorm")
    assert listed.returncode == 0, listed.stderr
    assert "LayerNorm 262144x512  LayerNorm" in listed.stdout
    assert "small LayerNorm  LayerNorm" in listed.stdout
    without = bench()
    assert without.returncode == 2
    assert "this measures a GPU, and torch finds none here" in without.stderr


def test_the_benchmarks_figures(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE.parent / "benchmarks"))
    bench_gpu = importlib.import_module("bench_gpu")
    case = bench_gpu.Case("batch", lambda: rn.BatchNorm2d(3), None, (2, 3, 4, 4), passes=2)
    times = {"copy": [10.0] * 4, "renorm forward": [20.0] * 4, "torch forward": [30.0] * 4}
    times |= {"renorm both": [80.0] * 4, "torch both": [40.0] * 4}
    rows = bench_gpu.rows_of(case, times, "triton", 0.004, 1_000_000)
    assert [len(row) + 5 for row in rows] == [len(bench_gpu.HEAD)] * 4
    # Batch norm moves 3 MB forward in 20 us, 150 GB/s, where a copy moves 2 MB in 10 us; 8 MB with backward.
    assert rows[0][:7] == ["batch", "forward", "renorm", 20.0, 20.0, 20.0, 1.0]
    assert rows[0][7:] == [150, 0.75, 200, "triton", "0.004", "device", 4]
    assert rows[1][2:7] == ["torch", 30.0, 30.0, 30.0, 1.5]
    assert rows[2][7:10] == [100, 0.5, 200]
    added = bench_gpu.Case("added", lambda: rn.LayerNorm(3), None, (2, 3), residual=True)
    assert (bench_gpu.moved(added, "forward"), bench_gpu.moved(added, "both")) == (4, 7)
