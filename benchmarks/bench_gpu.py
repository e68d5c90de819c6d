"""Renorm's layers on a GPU against torch's, eager and compiled, and Liger's and apex's where they import.

    python benchmarks/bench_gpu.py [--only TEXT] [--list] [--rounds 30] [--save]

Contenders of a case run interleaved in one process, forward alone and forward with backward, timed by CUDA events.
`gbps` is what a norm must move at least (see `tensors`) over its time, `of_copy` that rate over the rate of a copy on
the device, measured in the same rounds. Small tensors are timed on the host: microseconds until a call returns. With
`--save`, `results/gpu.csv` has the rows.
"""

import argparse
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

Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One norm on one input."""

    name: str
    ours: Callable[[], nn.Module]
    theirs: Callable[[], nn.Module] | None
    shape: tuple[int, ...]
    channels_last: bool = False
    passes: int = 1  # how often forward must read x: twice where a set is spread over memory
    others: tuple[tuple[str, str, tuple[int, ...]], ...] = ()  # (module, class, arguments)
    small: bool = False

    def input(self) -> Tensor:
        x = torch.randn(self.shape, device="cuda", dtype=torch.bfloat16) + 1
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x


def fused(name: str, width: int) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    """The fused layers that people install for this norm."""
    return (
        (f"liger_kernel.transformers.{'rms_norm' if name == 'RMSNorm' else 'layer_norm'}", f"Liger{name}", (width,)),
        ("apex.normalization", f"Fused{name}", (width,)),
    )


def rows() -> list[Case]:
    """Transformer rows of 256 MiB and more, from 512 to 16 384 wide; and few long ones."""
    cases = []
    for count, width in ((262_144, 512), (65_536, 2_048), (32_768, 4_096), (8_192, 16_384), (16, 16_384)):
        for name in ("LayerNorm", "RMSNorm"):
            ours, theirs = (lambda of=of, name=name, width=width: getattr(of, name)(width) for of in (rn, nn))
            cases.append(Case(f"{name} {count}x{width}", ours, theirs, (count, width), others=fused(name, width)))
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


def tensors(case: Case, what: str) -> int:
    """How many times the input's bytes a norm must move: x and y; with backward x, dy and dx too.

    Where forward must read x twice, backward must read x and dy twice.
    """
    forward = case.passes + 1
    return forward if what == "forward" else forward + 2 * case.passes + 1


# ---- measuring


def contenders(case: Case) -> dict[str, nn.Module]:
    """Layers by name, ours first, in bfloat16 on the GPU."""
    found: dict[str, nn.Module] = {"renorm": case.ours()}
    if case.theirs is not None:
        found["torch"] = case.theirs()
        if not case.small:
            torch._dynamo.reset()
            found["compiled"] = torch.compile(case.theirs(), mode="max-autotune-no-cudagraphs")
    for module, name, options in case.others:
        if importlib.util.find_spec(module.split(".")[0]) is not None:
            layer = getattr(importlib.import_module(module), name)(*options)
            found[module.split(".")[0].removesuffix("_kernel")] = layer
    return {name: layer.to("cuda", torch.bfloat16) for name, layer in found.items()}


def calls_of(layer: nn.Module, x: Tensor, leaf: Tensor, upstream: Tensor) -> dict[str, Callable[[], object]]:
    wanted = [leaf, *(p for p in layer.parameters() if p.requires_grad)]

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    return {"forward": forward, "both": lambda: torch.autograd.grad(layer(leaf), wanted, upstream)}


def on_the_device(call: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3


def on_the_host(call: Callable[[], object], repeat: int = 100) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    seconds = (time.perf_counter() - start) / repeat
    torch.cuda.synchronize()
    return seconds * 1e6


def measure(case: Case, rounds: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Microseconds by "<contender> <what>" and of "copy"; and the kernels that ran of ours."""
    torch.manual_seed(0)
    x = case.input()
    leaf, upstream, target = x.clone().requires_grad_(), torch.randn_like(x), torch.empty_like(x)
    layers = contenders(case)
    calls: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(x)}
    for name, layer in layers.items():
        for what, call in calls_of(layer, x, leaf, upstream).items():
            calls[f"{name} {what}"] = call
    for call in calls.values():
        for _ in range(3):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    clock = on_the_host if case.small else on_the_device
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(clock(call))
    with torch.no_grad():
        ours = layers["renorm"].kernel(x)  # type: ignore[operator]
    return times, {"forward": ours, "both": layers["renorm"].kernel(leaf)}  # type: ignore[operator]


HEAD = [
    *("case", "what", "contender", "us", "q1", "q3", "ratio", "gbps", "of_copy", "copy_gbps", "kernel", "clock"),
    *("rounds", "gpu", "cuda", "torch", "triton", "commit"),
]


def rows_of(case: Case, times: dict[str, list[float]], kernels: dict[str, str], nbytes: int) -> list[list[object]]:
    """A row for each contender; `ratio` is its time over ours."""
    copy = statistics.median(times["copy"])
    found: list[list[object]] = []
    for what in ("forward", "both"):
        names = [name.removesuffix(f" {what}") for name in times if name.endswith(f" {what}")]
        ours = statistics.median(times[f"renorm {what}"])
        for name in names:
            low, middle, high = statistics.quantiles(times[f"{name} {what}"], n=4)
            rate = tensors(case, what) * nbytes / middle / 1e3
            rates = ["", "", ""] if case.small else [round(rate), round(rate * copy / 2e-3 / nbytes, 3)]
            rates = rates if case.small else [*rates, round(2e-3 * nbytes / copy)]
            kernel = kernels[what] if name == "renorm" else ""
            numbers = [round(value, 2) for value in (middle, low, high, middle / ours)]
            clock = "host" if case.small else "device"
            found.append([case.name, what, name, *numbers, *rates, kernel, clock, len(times["copy"])])
    return found


def stamp() -> list[object]:
    """What the rows were measured on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    versions = torch.version.cuda, torch.__version__, importlib.metadata.version("triton")
    return [torch.cuda.get_device_name(), *versions, commit.strip()]


def show(rows: list[list[object]]) -> None:
    for row in rows:
        speed = f"  {row[7]} GB/s, {row[8]} of a copy" if row[7] else ""
        print(f"{row[0]:<48} {row[1]:<8} {row[2]:<9} {row[3]:>10} us  {row[6]:>6}x{speed}  {row[10]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--list", action="store_true", help="name the cases, which needs no GPU, and stop")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--save", action="store_true", help="write results/gpu.csv")
    options = parser.parse_args()
    cases = [case for case in [*rows(), *images(), *small()] if options.only in case.name]
    if options.list:
        print(*(f"{case.name}  {case.ours().__class__.__name__}" for case in cases), sep="\n")
        return
    if not torch.cuda.is_available():
        parser.error("this measures a GPU, and torch finds none here; --list names the cases without one")
    print(rn.kernels.status())
    if not cases:
        parser.error(f"no case is called {options.only!r}; --list names them")
    found: list[list[object]] = []
    for case in cases:
        times, kernels = measure(case, options.rounds)
        new = rows_of(case, times, kernels, 2 * torch.Size(case.shape).numel())
        show(new)
        found += [[*row, *stamp()] for row in new]
        torch.cuda.empty_cache()
        if options.save:
            with (Path(__file__).parent / "results" / "gpu.csv").open("w", newline="") as file:
                csv.writer(file).writerows([HEAD, *found])
    ratios = [float(str(row[6])) for row in found if row[1:3] == ["both", "torch"] and row[11] == "device"]
    if ratios:
        print(f"geometric mean of {len(ratios)} cases, forward and backward: {statistics.geometric_mean(ratios):.2f}")


if __name__ == "__main__":
    main()
