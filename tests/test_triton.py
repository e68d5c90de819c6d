"""The Triton kernels: interpreted, in a process of their own; compiled for a GPU that is not there; and who chooses."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
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


NUMBERS = {"num_k": 64, "tiles_k": 2, "num_a": 3, "num_b": 4096, "merge": 1, "sets": 1000}
ROW, COLUMN = (0, 1, 64, 4096, 0, 0, 0), (0, 64, 1, 4096, 0, 0, 0)
WIDE = ("stats_ptr", "affine_ptr", "parts_ptr", "by_ptr", "daffine_ptr")  # float64
GRADIENTS = ("dw_ptr", "db_ptr")


def compiled(function, strides, dtype, absent, constants):
    """PTX for an H100, as a launch on aligned tensors of such strides would compile it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_it

    signature, known, attributes = {}, {}, {}
    for i, name in enumerate(function.arg_names):
        if name in constants or name in absent or NUMBERS.get(name) == 1:
            signature[name], known[(i,)] = "constexpr", constants.get(name, NUMBERS.get(name))
        elif name in ("sizes", "xs", "ys", "ms"):
            values = (64, 1, 1) if name == "sizes" else strides
            signature[name] = tuple("constexpr" if value == 1 else "i32" for value in values)
            for j, value in enumerate(values):
                if value == 1:
                    known[(i, j)] = 1
                else:
                    attributes[(i, j)] = [["tt.divisibility", 16]]
        else:
            kinds = {"eps": "fp32", "slope": "fp32", "mask_ptr": "*i1"}
            kinds |= dict.fromkeys(WIDE, "*fp64") | dict.fromkeys(GRADIENTS, "*fp32")
            signature[name] = kinds.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
            if name.endswith("_ptr") or NUMBERS.get(name, 1) % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constexprs=known, attrs=attributes)
    return compile_it(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["ptx"]


PLAIN = ("mask_ptr", "affine_ptr", "residual_ptr", "total_ptr", "dsum_ptr")
ROWS, COLUMNS = {"K": 1, "B": 2048}, {"K": 64, "B": 32}
ONE_ROW, SOME_COLUMNS = {"SETS": 1, "MERGE": 1, "B": 2048}, {"SETS": 32, "MERGE": 1, "B": 64}
# (kernel, its tile, what is absent): with everything and with nothing, contiguous in either way.
COMPILED = [
    *(("fused_forward", tile, absent) for tile in (ONE_ROW, SOME_COLUMNS) for absent in (PLAIN, ())),
    *(("fused_backward", tile, absent) for tile in (ONE_ROW, SOME_COLUMNS) for absent in (PLAIN, ())),
    *((name, tile, PLAIN) for name in ("measure", "apply", "reduce", "combine") for tile in (ROWS, COLUMNS)),
    *((name, ROWS, ()) for name in ("measure", "apply", "reduce", "combine", "combine_along")),
    ("combine_along", COLUMNS, PLAIN),
    ("finish", {"SETS": 2, "PARTS": 64}, ()),
    ("solve", {"SETS": 4, "MERGE": 32}, ()),
]


@with_triton
@pytest.mark.parametrize(("name", "tile", "absent"), COMPILED)
def test_the_kernels_compile_for_a_gpu_and_move_16_bytes_at_once(name, tile, absent, tmp_path, monkeypatch):
    """Without atomics, registers enough, and wide loads: Triton knows what is contiguous."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from renorm.kernels.triton import backward, forward

    function = getattr(forward if hasattr(forward, name) else backward, name)
    constants = tile | {
        "ALONG": name in ("fused_forward", "fused_backward"),
        "ABOUT_ZERO": False,
        "ACT": 3,
        "FIXED": False,
    }
    constants = {key: value for key, value in constants.items() if key in function.arg_names}
    strides = COLUMN if tile in (COLUMNS, SOME_COLUMNS) else ROW
    ptx = compiled(function, strides, "bf16", absent, constants)
    assert "atom." not in ptx
    assert "red." not in re.sub(r"shared\.", "", ptx)
    assert ".local" not in ptx, "registers are spilt"
    if name not in ("finish", "solve"):
        assert re.search(r"ld\.global(\.\w+)*\.v4\.b32", ptx), "x is not read 16 bytes at a time"


# ---- who chooses them


@pytest.fixture
def asked_again():
    """What was found out of this machine is forgotten before and after."""
    available._obstacle.cache_clear()
    yield
    available._obstacle.cache_clear()


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
    kernels = {"forward": "triton", "both": "triton"}
    rows = bench_gpu.rows_of(case, times, kernels, 1_000_000)
    assert [len(row) + 5 for row in rows] == [len(bench_gpu.HEAD) - 0] * 4
    # Batch norm moves 3 MB forward in 20 us, 150 GB/s, where a copy moves 2 MB in 10 us; 8 MB with backward.
    assert rows[0] == ["batch", "forward", "renorm", 20.0, 20.0, 20.0, 1.0, 150, 0.75, 200, "triton", "device", 4]
    assert rows[1][2:7] == ["torch", 30.0, 30.0, 30.0, 1.5]
    assert rows[2][7:10] == [100, 0.5, 200]
