"""Renorm's Triton kernels on a GPU against torch's, eager and compiled, and Liger's and apex's where they import.

    python benchmarks/bench_gpu.py [--only TEXT] [--list] [--rounds 30] [--budget 540] [--save] [--again]

A command begins no case for which `--budget` has too few seconds left, so that it ends within ten minutes; with
`--save` `results/gpu.csv` keeps a row for each contender, and cases which this commit has measured on this GPU are left
out unless `--again` is given. So all of it is this line, again and again until it says that nothing is left:

    PYTHONPATH=src python benchmarks/bench_gpu.py --save

Contenders of a case run interleaved in one process, forward alone and forward with backward, timed by CUDA events.
Before each, L2 is filled with something else, and the GPU waits until the host has launched everything. `gbps` is what
a norm must move at least (see `moved`) over its time, `of_copy` that rate over the rate of a copy on the device, which
is measured in the same rounds. Small tensors are timed on the host: microseconds until a call returns. Before anything
is timed, y and dx are compared with those of the reference in float32 (`off`): from 2 % on the command fails.
"""

import argparse
import contextlib
import copy
import csv
import importlib
import importlib.metadata
import importlib.util
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import renorm as rn

DEVICE = "cuda"
RESULTS = Path(__file__).parent / "results" / "gpu.csv"
WAIT = 2_000_000  # clock cycles, about 1 ms: the host is done with launching
TOLERANCE = 0.02  # bfloat16 rounds to 0.4 %


@dataclass(frozen=True)
class Case:
    """One norm on one input."""

    name: str
    ours: Callable[[], nn.Module]
    theirs: Callable[[], nn.Module] | None  # torch's; None where it has none, and the formula in plain torch runs
    shape: tuple[int, ...]
    channels_last: bool = False
    passes: int = 1  # how often forward must read x: twice where a set is spread over memory
    others: tuple[tuple[str, Callable[[], nn.Module]], ...] = ()  # (name, layer) of packages that may be there
    small: bool = False
    residual: bool = False

    def input(self) -> Tensor:
        x = torch.randn(self.shape, device=DEVICE, dtype=torch.bfloat16) + 1
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x


def moved(case: Case, what: str) -> int:
    """How many times the input's bytes a norm must move: x and y; with backward x, dy and dx too.

    Where forward must read x twice, backward must read x and dy twice. A residual is read, and the sum written.
    """
    forward = case.passes + 1 + 2 * case.residual
    return forward if what == "forward" else forward + 2 * case.passes + 1


class Added(nn.Module):
    """The norm of x and a residual, ours or torch's."""

    def __init__(self, norm: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.norm = norm
        self.register_buffer("residual", torch.randn(shape, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.norm, rn.Norm):
            return self.norm.add(x, self.residual)[0]
        y: Tensor = self.norm(x + self.residual)
        return y


def liger(name: str, width: int) -> nn.Module:
    module = importlib.import_module(f"liger_kernel.transformers.{'rms_norm' if name == 'RMSNorm' else 'layer_norm'}")
    # In place, its backward would write over the gradient that all contenders share.
    options = {"in_place": False} if name == "RMSNorm" else {"bias": True}
    layer: nn.Module = getattr(module, f"Liger{name}")(width, **options)
    return layer


def apex(name: str, width: int) -> nn.Module:
    layer: nn.Module = getattr(importlib.import_module("apex.normalization"), f"Fused{name}")(width)
    return layer


def rows() -> list[Case]:
    """Transformer rows of 256 MiB and more, from 512 to 16 384 wide; and few long ones."""
    cases = []
    for count, width in ((262_144, 512), (65_536, 2_048), (32_768, 4_096), (8_192, 16_384), (16, 16_384)):
        for name in ("LayerNorm", "RMSNorm"):
            ours, theirs = (lambda of=of, name=name, width=width: getattr(of, name)(width) for of in (rn, nn))
            others = tuple((of.__name__, lambda of=of, name=name, width=width: of(name, width)) for of in (liger, apex))
            cases.append(Case(f"{name} {count}x{width}", ours, theirs, (count, width), others=others))
    shape = (32_768, 4_096)
    for name in ("LayerNorm", "RMSNorm"):
        ours, theirs = (lambda of=of, name=name: Added(getattr(of, name)(4_096), shape) for of in (rn, nn))
        cases.append(Case(f"residual {name} 32768x4096", ours, theirs, shape, residual=True))
    return cases


def images() -> list[Case]:
    """Maps from 7x7 to 512x512 in both layouts, and a video."""
    cases = []
    for shape in ((256, 2048, 16, 16), (256, 64, 112, 112), (1, 32, 2048, 2048), (8, 64, 512, 512), (256, 2048, 7, 7)):
        channels, size = shape[1], "x".join(map(str, shape))
        for last in (False, True):
            made: list[tuple[str, Callable[..., nn.Module], Callable[..., nn.Module] | None, int]] = [
                ("BatchNorm2d", rn.BatchNorm2d, nn.BatchNorm2d, 2),
                ("GroupNorm", lambda c: rn.GroupNorm(32, c), lambda c: nn.GroupNorm(32, c), 1),
                (
                    "InstanceNorm2d",
                    lambda c: rn.InstanceNorm2d(c, affine=True),
                    lambda c: nn.InstanceNorm2d(c, affine=True),
                    1,
                ),
                ("LayerNorm2d", rn.LayerNorm2d, None, 1),
                ("SwitchNorm2d", rn.SwitchNorm2d, nn.BatchNorm2d, 2),
                ("GhostBatchNorm", lambda c: rn.GhostBatchNorm(c, 32), None, 2),
            ]
            for name, ours, theirs, passes in made:
                if name == "GhostBatchNorm" and shape[0] < 32:
                    continue
                cases.append(
                    Case(
                        f"{name} {size} {'channels_last' if last else 'NCHW'}",
                        lambda ours=ours, channels=channels: ours(channels),
                        None if theirs is None else lambda theirs=theirs, channels=channels: theirs(channels),
                        shape,
                        last,
                        passes,
                    )
                )
    video = (8, 64, 16, 128, 128)
    for name in ("BatchNorm3d", "InstanceNorm3d"):
        ours, theirs = (lambda of=of, name=name: getattr(of, name)(64) for of in (rn, nn))
        cases.append(Case(f"{name} 8x64x16x128x128", ours, theirs, video, passes=2 if name == "BatchNorm3d" else 1))
    return cases


def small() -> list[Case]:
    """Tensors that a GPU is done with before the host is."""
    made: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = [
        ("LayerNorm", (768,), (128, 768)),
        ("RMSNorm", (768,), (128, 768)),
        ("BatchNorm2d", (64,), (8, 64, 14, 14)),
        ("GroupNorm", (32, 64), (8, 64, 14, 14)),
        ("InstanceNorm2d", (64,), (8, 64, 14, 14)),
    ]
    return [
        Case(
            f"small {name}",
            *(lambda of=of, n=name, a=options: getattr(of, n)(*a) for of in (rn, nn)),
            shape,
            small=True,
        )
        for name, options, shape in made
    ]


def zoo() -> list[Case]:
    """The other norms that have kernels, against the formula in plain torch; and a norm with its activation."""
    width, shape = 256, (128, 256, 56, 56)
    names = (
        *("BatchRenorm", "PowerNorm", "SelfNorm", "FRN", "GlobalResponseNorm", "EvoNormB0", "EvoNormS0"),
        "PositionalNorm",
    )
    cases = [Case(f"{name} 128x256x56x56", lambda name=name: getattr(rn, name)(width), None, shape) for name in names]
    ours = lambda: rn.BatchNorm2d(width, activation="relu")  # noqa: E731
    theirs = lambda: nn.Sequential(nn.BatchNorm2d(width), nn.ReLU())  # noqa: E731
    cases.append(Case("BatchNorm2d with ReLU 128x256x56x56", ours, theirs, shape, passes=2))
    cases.append(Case("ScaleNorm 65536x2048", lambda: rn.ScaleNorm(2048), None, (65_536, 2048)))
    cases.append(Case("RevIN 4096x128x256", lambda: rn.RevIN(128), None, (4096, 128, 256)))
    return cases


# ---- measuring


def by(backend: str, layer: nn.Module) -> nn.Module:
    """The same layer, all its norms by these kernels."""
    for module in layer.modules():
        if isinstance(module, rn.Norm):
            module.backend = backend
    return layer


def contenders(case: Case) -> dict[str, nn.Module]:
    """Layers by name, ours first, in bfloat16 on the GPU."""
    found: dict[str, nn.Module] = {"renorm": by("triton", case.ours())}
    found["torch"] = by("reference", case.ours()) if case.theirs is None else case.theirs()
    if case.theirs is not None and not case.small:
        torch._dynamo.reset()
        found["compiled"] = torch.compile(case.theirs(), mode="max-autotune-no-cudagraphs")
    for name, make in case.others:
        if importlib.util.find_spec({"liger": "liger_kernel"}.get(name, name)) is not None:
            try:
                found[name] = make()
            except Exception as error:
                print(f"{name} is installed and does not work: {error}")
    return {name: layer.to(DEVICE, torch.bfloat16) for name, layer in found.items()}


def off(layer: nn.Module, x: Tensor, upstream: Tensor) -> float:
    """The larger relative error of y and dx, by their norms, against the reference in float32."""
    exact = by("reference", copy.deepcopy(layer).float())
    errors = []
    leaf, wide = x.clone().requires_grad_(), x.float().requires_grad_()
    y, wanted = layer(leaf), exact(wide)
    pairs = [
        (y, wanted),
        (torch.autograd.grad(y, leaf, upstream)[0], torch.autograd.grad(wanted, wide, upstream.float())[0]),
    ]
    for found, right in pairs:
        errors.append(((found.float() - right).norm() / right.norm()).item())
    return max(errors)


def calls_of(layer: nn.Module, x: Tensor, leaf: Tensor, upstream: Tensor) -> dict[str, Callable[[], object]]:
    wanted = [leaf, *(p for p in layer.parameters() if p.requires_grad)]

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    return {"forward": forward, "both": lambda: torch.autograd.grad(layer(leaf), wanted, upstream, allow_unused=True)}


def on_the_device(call: Callable[[], object], other: Tensor) -> float:
    other.zero_()  # nothing of the last call is left in L2
    torch.cuda._sleep(WAIT)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3


def on_the_host(call: Callable[[], object], other: Tensor, repeat: int = 100) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    seconds = (time.perf_counter() - start) / repeat
    torch.cuda.synchronize()
    return seconds * 1e6


def measure(case: Case, rounds: int) -> tuple[dict[str, list[float]], str, float]:
    """Microseconds by "<contender> <what>" and of "copy"; the kernel that ran of ours, and how far off it is."""
    torch.manual_seed(0)
    x = case.input()
    leaf, upstream, target = x.clone().requires_grad_(), torch.randn_like(x), torch.empty_like(x)
    layers = contenders(case)
    error = off(layers["renorm"], x, upstream)
    calls: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(x)}
    for name, layer in layers.items():
        for what, call in calls_of(layer, x, leaf, upstream).items():
            calls[f"{name} {what}"] = call
    for call in calls.values():
        for _ in range(3):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    clock = on_the_host if case.small else on_the_device
    other = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)  # five times L2
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(clock(call, other))
    norms = [module for module in layers["renorm"].modules() if isinstance(module, rn.Norm)]
    return times, norms[0].kernel(x), error


HEAD = [
    *("case", "what", "contender", "us", "q1", "q3", "ratio", "gbps", "of_copy", "copy_gbps", "kernel", "off", "clock"),
    *("rounds", "gpu", "cuda", "torch", "triton", "commit"),
]


def rows_of(case: Case, times: dict[str, list[float]], kernel: str, error: float, nbytes: int) -> list[list[object]]:
    """A row for each contender; `ratio` is its time over ours."""
    copy = statistics.median(times["copy"])
    found: list[list[object]] = []
    for what in ("forward", "both"):
        names = [name.removesuffix(f" {what}") for name in times if name.endswith(f" {what}")]
        ours = statistics.median(times[f"renorm {what}"])
        for name in names:
            low, middle, high = statistics.quantiles(times[f"{name} {what}"], n=4)
            rate = moved(case, what) * nbytes / middle / 1e3
            rates = ["", "", ""] if case.small else [round(rate), round(rate * copy / 2e-3 / nbytes, 3)]
            rates = rates if case.small else [*rates, round(2e-3 * nbytes / copy)]
            own = [kernel, f"{error:.2g}"] if name == "renorm" else ["", ""]
            numbers = [round(value, 2) for value in (middle, low, high, middle / ours)]
            clock = "host" if case.small else "device"
            found.append([case.name, what, name, *numbers, *rates, *own, clock, len(times["copy"])])
    return found


def stamp() -> list[object]:
    """What the rows are measured on."""
    commit = ""  # there may be no repository beside the files
    with contextlib.suppress(OSError):
        asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        commit = asked.stdout.strip()
    versions = torch.version.cuda or "", torch.__version__, importlib.metadata.version("triton")
    return [torch.cuda.get_device_name(), *versions, commit]


def show(rows: list[list[object]]) -> None:
    for row in rows:
        speed = f"  {row[7]} GB/s, {row[8]} of a copy" if row[7] else ""
        print(
            f"{row[0]:<48} {row[1]:<8} {row[2]:<9} {row[3]:>10} us  {row[6]:>6}x{speed}  {row[10]} {row[11]}",
            flush=True,
        )


def read(path: Path) -> list[list[str]]:
    """Rows that were kept, without the head."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.reader(file))[1:]


def keep(path: Path, rows: list[list[object]]) -> None:
    """The rows, in place of those of the same case on the same GPU."""
    replaced = {(str(row[0]), str(row[-5])) for row in rows}
    rest = [row for row in read(path) if (row[0], row[-5]) not in replaced]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([HEAD, *rest, *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--list", action="store_true", help="name the cases, which needs no GPU, and stop")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--budget", type=float, default=540, help="seconds after which no case is begun")
    parser.add_argument("--save", action="store_true", help="keep the rows in results/gpu.csv")
    parser.add_argument("--again", action="store_true", help="also the cases that have rows of this commit")
    options = parser.parse_args()
    cases = [case for case in [*small(), *rows(), *images(), *zoo()] if options.only in case.name]
    if options.list:
        print(*(f"{case.name}  {case.ours().__class__.__name__}" for case in cases), sep="\n")
        return
    if not torch.cuda.is_available():
        parser.error("this measures a GPU, and torch finds none here; --list names the cases without one")
    print(rn.kernels.status())
    if not cases:
        parser.error(f"no case is called {options.only!r}; --list names them")
    run(cases, options)


def run(cases: list[Case], options: argparse.Namespace) -> None:
    """Measure them while the budget lasts."""
    start, longest, wrong = time.monotonic(), 0.0, []
    found: list[list[object]] = []
    stamped = stamp()
    here = [str(value) for value in stamped]
    done = {row[0] for row in read(RESULTS) if row[-5:] == here} if options.save and not options.again else set()
    left = [case for case in cases if case.name not in done]
    while left and time.monotonic() - start + longest < options.budget:
        case, began = left.pop(0), time.monotonic()
        times, kernel, error = measure(case, options.rounds)
        new = rows_of(case, times, kernel, error, 2 * torch.Size(case.shape).numel())
        show(new)
        new = [[*row, *stamped] for row in new]
        found += new
        if not error <= TOLERANCE:
            wrong.append(f"{case.name} is off by {error:.2g}")
        if options.save:
            keep(RESULTS, new)
        torch.cuda.empty_cache()
        longest = max(longest, time.monotonic() - began)
    ratios = [float(str(row[6])) for row in found if row[1:3] == ["both", "torch"] and row[12] == "device"]
    if ratios:
        print(f"geometric mean of {len(ratios)} cases, forward and backward: {statistics.geometric_mean(ratios):.2f}")
    print(f"{len(left)} cases are left" if left else "nothing is left")
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
