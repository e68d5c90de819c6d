"""Renorm's layers against torch's, eager and compiled: forward, and forward with backward.

    python benchmarks/bench_kernels.py [--only TEXT] [--compiled] [--seconds 4] [--save]

Contenders of a case run interleaved in one process with fresh outputs from the default allocator, as in training.
A sample before or after which another process was running is dropped and counted.
A row has the median and the quartiles of each contender, torch's time over renorm's, and how near renorm comes to
copying: `copies` is its time over that of `Tensor.clone` on the input, `bandwidth` the bytes it must move a second
(x and y in forward, x, dy and dx more with backward) over those of the copy. `saved_mb` is what forward keeps for
backward. With `--save`, `results/kernels.csv` has the rows; those of cases that are not run stay.
"""

import argparse
import csv
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
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
    theirs: Callable[[], nn.Module | Call]
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    floor: float = 0.97  # torch over renorm, forward and backward, at least
    against: str = "torch"
    tags: tuple[str, ...] = field(default=())

    def input(self) -> Tensor:
        x = (torch.randn(self.shape) + 1).to(self.dtype)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x


class SwitchFormula(rn.SwitchNorm2d):
    """Switchable norm in plain torch, as its authors write it."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        var_i, mean_i = torch.var_mean(x, (2, 3), unbiased=False, keepdim=True)
        square = var_i + mean_i.square()
        mean_l, mean_b = mean_i.mean(1, keepdim=True), mean_i.mean(0, keepdim=True)
        var_l = square.mean(1, keepdim=True) - mean_l.square()
        var_b = square.mean(0, keepdim=True) - mean_b.square()
        a, b = self.mean_weight.softmax(0), self.var_weight.softmax(0)
        mean = a[0] * mean_i + a[1] * mean_l + a[2] * mean_b
        var = b[0] * var_i + b[1] * var_l + b[2] * var_b
        weight, bias = (p.view(1, -1, 1, 1) for p in (self.weight, self.bias))
        return (x - mean) / (var + self.eps).sqrt() * weight + bias


class ChannelsByPermute(nn.Module):
    """Layer norm over channels as people write it."""

    def __init__(self, channels: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class BatchByTranspose(nn.Module):
    """Batch norm of (N, L, C) as people write it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


IMAGE = (32, 64, 56, 56)


def large() -> list[Case]:
    """Tensors of 25 to 200 MB."""
    cases = []
    for rows, floors in ((8192, (6, 1.15)), (65536, (6, 1.3))):
        shape = (rows, 768)
        cases.append(
            Case(f"RMSNorm {rows}x768", lambda: rn.RMSNorm(768), lambda: nn.RMSNorm(768), shape, floor=floors[0])
        )
        cases.append(
            Case(f"LayerNorm {rows}x768", lambda: rn.LayerNorm(768), lambda: nn.LayerNorm(768), shape, floor=floors[1])
        )
    image: list[tuple[str, Callable[..., nn.Module], Callable[..., nn.Module], tuple[float, float]]] = [
        (
            "InstanceNorm2d",
            lambda **o: rn.InstanceNorm2d(64, affine=True, **o),
            lambda **o: nn.InstanceNorm2d(64, affine=True, **o),
            (2.5, 3.7),
        ),
        ("BatchNorm2d", lambda **o: rn.BatchNorm2d(64, **o), lambda **o: nn.BatchNorm2d(64, **o), (2.2, 1.2)),
        ("GroupNorm(32)", lambda **o: rn.GroupNorm(32, 64, **o), lambda **o: nn.GroupNorm(32, 64, **o), (1.3, 4)),
    ]
    half_floors = {"InstanceNorm2d": (1.5, 1.5), "BatchNorm2d": (1.3, 1.3), "GroupNorm(32)": (1.0, 10)}
    for name, ours, theirs, floors in image:
        for last in (False, True):
            layout = "channels_last" if last else "NCHW"
            cases.append(Case(f"{name} {layout}", ours, theirs, IMAGE, channels_last=last, floor=floors[last]))
            cases.append(
                Case(
                    f"{name} {layout} bfloat16",
                    lambda ours=ours: ours(dtype=torch.bfloat16),
                    lambda theirs=theirs: theirs(dtype=torch.bfloat16),
                    IMAGE,
                    torch.bfloat16,
                    last,
                    half_floors[name][last],
                )
            )
    for dtype, tag in ((torch.float32, ""), (torch.bfloat16, " bfloat16")):
        cases.append(
            Case(
                f"LayerNorm over channels NCHW{tag}",
                lambda dtype=dtype: rn.Norm("n [c] ...", c=64, dtype=dtype),
                lambda dtype=dtype: ChannelsByPermute(64, dtype),
                IMAGE,
                dtype,
                floor=4 if not tag else 0.97,
                against="permute + F.layer_norm",
            )
        )
    for name, ours, theirs, floor in (
        ("RMSNorm", lambda: rn.RMSNorm(768, dtype=torch.bfloat16), lambda: nn.RMSNorm(768, dtype=torch.bfloat16), 8),
        (
            "LayerNorm",
            lambda: rn.LayerNorm(768, dtype=torch.bfloat16),
            lambda: nn.LayerNorm(768, dtype=torch.bfloat16),
            1.8,
        ),
    ):
        cases.append(Case(f"{name} 65536x768 bfloat16", ours, theirs, (65536, 768), torch.bfloat16, floor=floor))
    return [
        *cases,
        Case("LocalResponseNorm(5)", lambda: rn.LocalResponseNorm(5), lambda: nn.LocalResponseNorm(5), IMAGE, floor=15),
        Case(
            "BatchNorm of (N, L, C)",
            lambda: rn.BatchNorm(384, axis=-1),
            lambda: BatchByTranspose(384),
            (64, 196, 384),
            floor=1.3,
            against="transpose + nn.BatchNorm1d",
        ),
        Case(
            "SwitchNorm2d",
            lambda: rn.SwitchNorm2d(64),
            lambda: SwitchFormula(64),
            IMAGE,
            floor=5,
            against="the formula in plain torch",
        ),
        Case(
            "SwitchNorm2d over BatchNorm2d",
            lambda: rn.SwitchNorm2d(64),
            lambda: rn.BatchNorm2d(64),
            IMAGE,
            floor=1 / 1.4,
            against="renorm.BatchNorm2d",
        ),
    ]


def small() -> list[Case]:
    """Tensors of 128 to 400 thousand entries: never slower than torch."""
    cases = []
    for rows, width in ((1, 128), (8, 16), (32, 256), (128, 512), (512, 768)):
        for name in ("LayerNorm", "RMSNorm", "BatchNorm1d"):
            if name == "BatchNorm1d" and rows == 1:
                continue
            ours, theirs = (
                lambda module=module, name=name, width=width: getattr(module, name)(width) for module in (rn, nn)
            )
            cases.append(Case(f"small {name} {rows}x{width}", ours, theirs, (rows, width)))
    for shape in ((2, 16, 4, 4), (8, 32, 14, 14), (4, 64, 28, 28), (8, 64, 28, 28)):
        channels, size = shape[1], "x".join(map(str, shape))
        for name, options in (
            ("BatchNorm2d", (channels,)),
            ("GroupNorm", (8, channels)),
            ("InstanceNorm2d", (channels,)),
        ):
            for last in (False, True):
                ours, theirs = (
                    lambda module=module, name=name, options=options: getattr(module, name)(*options)
                    for module in (rn, nn)
                )
                layout = "channels_last" if last else "NCHW"
                cases.append(Case(f"small {name} {size} {layout}", ours, theirs, shape, channels_last=last))
        for last in (False, True):
            layout = "channels_last" if last else "NCHW"
            cases.append(
                Case(
                    f"small evaluating BatchNorm2d {size} {layout}",
                    lambda channels=channels: rn.BatchNorm2d(channels).eval(),
                    lambda channels=channels: nn.BatchNorm2d(channels).eval(),
                    shape,
                    channels_last=last,
                )
            )
    return cases


# ---- measuring


def others_running() -> bool:
    """Whether anything but torch's threads is running or waiting for a processor (Linux; elsewhere nobody can say)."""
    try:
        return int(Path("/proc/loadavg").read_text().split()[3].split("/")[0]) > torch.get_num_threads()
    except OSError:
        return False


def undisturbed(call: Callable[[], object], repeat: int, keep: bool) -> float | None:
    """Seconds of one call, or None where the machine was busy with something else."""
    call()  # so that each starts from the caches it leaves itself, not from the contender's before it
    busy = others_running()
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    seconds = (time.perf_counter() - start) / repeat
    return None if (busy or others_running()) and not keep else seconds


def parameters(layer: nn.Module | Call) -> list[Tensor]:
    return list(layer.parameters()) if isinstance(layer, nn.Module) else []


def forward(layer: Call, x: Tensor) -> None:
    with torch.no_grad():
        layer(x)


def both(layer: Call, wanted: list[Tensor], upstream: Tensor) -> None:
    torch.autograd.grad(layer(wanted[0]), wanted, upstream)


def saved(layer: Call, x: Tensor) -> float:
    """Megabytes kept for backward, the input apart."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    leaf = x.detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(leaf)
    kept.pop(leaf.data_ptr(), None)
    return sum(kept.values()) / 1e6


def measure(
    case: Case, contenders: dict[str, Call], seconds: float, keep: bool
) -> tuple[dict[str, list[float]], int, int]:
    """Times by "<contender> <what>", the samples taken of each, and those dropped of all."""
    torch.manual_seed(0)
    x = case.input()
    leaf, upstream = x.clone().requires_grad_(), torch.randn_like(x)
    repeat = max(1, min(20, 200_000 // x.numel()))
    calls: dict[str, Callable[[], object]] = {"copy": x.clone}
    for name, layer in contenders.items():
        calls[f"{name} forward"] = lambda layer=layer: forward(layer, x)
        calls[f"{name} both"] = lambda layer=layer: both(
            layer, [leaf, *(p for p in parameters(layer) if p.requires_grad)], upstream
        )
    for call in calls.values():
        call(), call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    dropped = rounds = 0
    start = time.perf_counter()
    while rounds < 10 or (time.perf_counter() - start < seconds and rounds < 400):
        rounds += 1
        for name, call in calls.items():
            found = undisturbed(call, repeat, keep)
            if found is None:
                dropped += 1
            else:
                times[name].append(found)
    return times, rounds, dropped


HEAD = [
    *("case", "what", "against", "torch_us", "torch_q1", "torch_q3", "renorm_us", "renorm_q1", "renorm_q3", "ratio"),
    *("floor", "compiled_us", "copies", "bandwidth", "saved_mb", "torch_saved_mb", "kernel", "samples", "dropped"),
]


def rows_of(case: Case, compiled: bool, seconds: float, keep: bool) -> list[list[object]]:
    ours, theirs = case.ours(), case.theirs()
    contenders: dict[str, Call] = {"torch": theirs, "renorm": ours}
    if compiled:
        torch._dynamo.reset()
        contenders["compiled"] = torch.compile(case.theirs())
    times, rounds, dropped = measure(case, contenders, seconds, keep)
    x = case.input()
    kept = [round(saved(layer, x), 2) for layer in (ours, theirs)]
    if len(times["copy"]) < 4:
        print(f"{case.name}: too few undisturbed samples; the machine is busy")
        return []
    copy = statistics.median(times["copy"])
    rows: list[list[object]] = []
    for what, tensors in (("forward", 2), ("both", 5)):
        if any(len(times[f"{name} {what}"]) < 4 for name in contenders):
            print(f"{case.name}: too few undisturbed samples; the machine is busy")
            continue
        (t1, t2, t3), (r1, r2, r3) = (
            statistics.quantiles(times[f"{name} {what}"], n=4) for name in ("torch", "renorm")
        )
        c = statistics.median(times[f"compiled {what}"]) * 1e6 if compiled else 0
        micro = [round(value * 1e6, 1) for value in (t2, t1, t3, r2, r1, r3)]
        floor = case.floor if what == "both" or case.name.startswith("small") else ""
        with torch.set_grad_enabled(what == "both"):
            kernel = ours.kernel(x.clone().requires_grad_(what == "both")) if hasattr(ours, "kernel") else ""
        rows.append(
            [
                *(case.name, what, case.against, *micro, round(t2 / r2, 2), floor and round(floor, 2)),
                *(round(c, 1) or "", round(r2 / copy, 2), round(tensors / 2 * copy / r2, 2), *kept, kernel),
                *(rounds, dropped),
            ]
        )
        print(
            f"{case.name:<46} {what:<8} torch {micro[0]:>10} renorm {micro[3]:>10} us  {t2 / r2:>6.2f}x"
            f"  {r2 / copy:>6.2f} copies" + (f"  compiled {c:>10.1f}" if c else "") + f"  {kernel}",
            flush=True,
        )
    return rows


def save(rows: list[list[object]]) -> None:
    """Put rows in the place of those of the same cases."""
    path = Path(__file__).parent / "results" / "kernels.csv"
    kept = list(csv.reader(path.open(newline="")))[1:] if path.exists() else []
    known = {(row[0], row[1]): row for row in kept} | {(str(row[0]), str(row[1])): row for row in rows}
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow([*HEAD, "machine", "instructions", "threads", "torch", "commit"])
        out.writerows(known.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--compiled", action="store_true", help="torch.compile too")
    parser.add_argument("--seconds", type=float, default=4, help="for each case")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--busy", action="store_true", help="keep samples of a busy machine: a look, no figure")
    parser.add_argument("--save", action="store_true", help="write results/kernels.csv")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    module = rn.kernels.extension.module()
    stamp = [platform.machine(), module.instructions if module else "none", options.threads, torch.__version__]
    rows = []
    for case in [*large(), *small()]:
        if options.only not in case.name:
            continue
        made = rows_of(case, options.compiled and not case.name.startswith("small"), options.seconds, options.busy)
        rows += made
        if options.save:
            save([[*row, *stamp, commit.strip()] for row in made])
    ratios = [row[9] for row in rows if row[1] == "both" and not str(row[0]).startswith("small")]
    if ratios:
        mean = statistics.geometric_mean(ratios)
        print(f"geometric mean of {len(ratios)} large cases, forward and backward: {mean:.2f}")


if __name__ == "__main__":
    main()
