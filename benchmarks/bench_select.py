"""The measurements behind kernels/select.py: torch's kernels, the reference, and what the layer chooses.

    python benchmarks/bench_select.py [--rounds 30]

Contenders of a case run interleaved in one process on the same input; a row of `results/select.csv` has the median
and the quartiles of each, forward alone and forward with backward, and the forward's copies: its time over that of
`Tensor.clone` on the input, which moves two tensors' bytes.
"""

import argparse
import csv
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import renorm as rn

IMAGE = (16, 64, 56, 56)
ROWS = (8192, 768)
SMALL = (2, 128)
Contenders = dict[str, Callable[[Tensor], Tensor]]


def norm(pattern: str, backend: str = "auto", **options: object) -> Callable[[Tensor], Tensor]:
    return rn.Norm(pattern, backend=backend, **options)  # type: ignore[arg-type]


def cases() -> dict[str, tuple[Tensor, Contenders]]:
    """For each case the input and who competes on it."""
    image = torch.randn(IMAGE) + 1
    last = image.contiguous(memory_format=torch.channels_last)
    w, b = torch.ones(64), torch.zeros(64)
    group = {"torch": lambda x: F.group_norm(x, 32, w, b), "renorm": rn.GroupNorm(32, 64)}
    group["reference"] = rn.GroupNorm(32, 64, backend="reference")
    instance = {"torch": lambda x: F.instance_norm(x, None, None, w, b), "renorm": rn.InstanceNorm2d(64, affine=True)}
    channels = {
        "permute + F.layer_norm": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (64,), w, b).permute(0, 3, 1, 2),
        "renorm": norm("n [c] ...", c=64),
        "reference": norm("n [c] ...", "reference", c=64),
    }
    rms = {
        "torch": lambda x: F.rms_norm(x, (768,), torch.ones(768)),
        "renorm": rn.RMSNorm(768),
        "reference": rn.RMSNorm(768, backend="reference"),
        "F.layer_norm": lambda x: F.layer_norm(x, (768,), torch.ones(768)),
    }
    return {
        "group norm 32, NCHW": (image, group),
        "group norm 32, channels_last": (last, group),
        "instance norm, NCHW": (image, instance),
        "instance norm, channels_last": (last, instance),
        "layer norm over channels, NCHW": (image, channels),
        "layer norm over channels, channels_last": (last, channels),
        "rms norm 8192x768": (torch.randn(ROWS), rms),
        "switch norm, NCHW": (image, {"renorm": rn.SwitchNorm2d(64), "renorm batch norm": rn.BatchNorm2d(64)}),
        "layer norm 2x128": (torch.randn(SMALL), {"torch": torch.nn.LayerNorm(128), "renorm": rn.LayerNorm(128)}),
        "batch norm 2x128": (torch.randn(SMALL), {"torch": torch.nn.BatchNorm1d(128), "renorm": rn.BatchNorm1d(128)}),
    }


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def backward(call: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor) -> None:
    torch.autograd.grad(call(x.requires_grad_()), x, upstream)


def measure(x: Tensor, contenders: Contenders, rounds: int) -> dict[str, dict[str, list[float]]]:
    times: dict[str, dict[str, list[float]]] = {name: {"forward": [], "both": [], "copy": []} for name in contenders}
    upstream = torch.randn_like(x)
    for turn in range(rounds + 3):  # the first three warm up
        for name, call in contenders.items():
            with torch.no_grad():
                row = {"copy": seconds(x.clone), "forward": seconds(lambda call=call: call(x.detach()))}
            row["both"] = seconds(lambda call=call: backward(call, x.detach(), upstream))
            if turn >= 3:
                for key, value in row.items():
                    times[name][key].append(value)
    return times


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    stamp = [platform.machine(), torch.get_num_threads(), torch.__version__, commit.strip()]
    head = ["case", "contender", "forward_us", "forward_q1", "forward_q3", "both_us", "both_q1", "both_q3", "copies"]
    path = Path(__file__).parent / "results" / "select.csv"
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow([*head, "machine", "threads", "torch", "commit"])
        for case, (x, contenders) in cases().items():
            for name, found in measure(x, contenders, rounds).items():
                (f1, f2, f3), (b1, b2, b3) = (statistics.quantiles(found[key], n=4) for key in ("forward", "both"))
                copies = f2 / statistics.median(found["copy"])
                row = [*(round(value * 1e6, 1) for value in (f2, f1, f3, b2, b1, b3)), round(copies, 2)]
                out.writerow([case, name, *row, *stamp])
                print(f"{case:<42} {name:<24} forward {row[0]:>10} us   with backward {row[3]:>10} us")


if __name__ == "__main__":
    main()
