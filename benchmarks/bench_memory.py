"""Memory to train a stack of convolution, batch norm and leaky ReLU: in-place activated batch norm beside the others.

    python benchmarks/bench_memory.py [--depth 12] [--batch 16] [--device cuda] [--save]

Each contender runs in a process of its own: the same weights, one step forward and backward. `kept_mb` is the memory of
the tensors that forward keeps for backward, each storage once and the parameters apart, as autograd's hooks see them.
`peak_mb` is how far the step's peak rises above what the process had before it: of resident memory on the CPU (Linux),
of allocated memory on a GPU. `tensors` is `kept_mb` over the size of one activation, for each block; the input of the
stack is left out. With `--save`, `results/memory.csv` has the rows.
"""

import argparse
import csv
import gc
import platform
import subprocess
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor, nn

import renorm as rn
from renorm.norms.inplace import InPlaceBatchNorm2d

CONTENDERS: dict[str, Callable[[int], list[nn.Module]]] = {
    "nn.BatchNorm2d + nn.LeakyReLU": lambda c: [nn.BatchNorm2d(c), nn.LeakyReLU()],
    "nn.BatchNorm2d + nn.LeakyReLU(inplace)": lambda c: [nn.BatchNorm2d(c), nn.LeakyReLU(inplace=True)],
    "rn.BatchNorm2d(activation)": lambda c: [rn.BatchNorm2d(c, activation="leaky_relu")],
    "rn.InPlaceBatchNorm2d": lambda c: [InPlaceBatchNorm2d(c)],
}
HEAD = ["contender", "kept_mb", "tensors", "peak_mb", "loss", "depth", "shape", "device"]


def stack(name: str, depth: int, channels: int) -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [
        [nn.Conv2d(channels, channels, 3, padding=1, bias=False), *CONTENDERS[name](channels)] for _ in range(depth)
    ]
    return nn.Sequential(*(layer for block in blocks for layer in block))


def kept(model: nn.Module, x: Tensor) -> float:
    """Bytes that forward keeps for backward, the parameters and the input apart."""
    apart = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers(), x]}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in apart:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    del y
    return sum(found.values())


def resident(field: str) -> float:
    """Bytes of this process: VmRSS is now, VmHWM the highest since `forget`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def peak(step: Callable[[], None], device: str) -> float:
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the highest is forgotten
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def row(name: str, depth: int, shape: tuple[int, ...], device: str, threads: int) -> list[object]:
    torch.set_num_threads(threads)
    model = stack(name, depth, shape[1]).to(device)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
    losses: list[float] = []

    def step(x: Tensor = x) -> None:
        loss = model(x).square().mean()
        loss.backward()
        losses.append(loss.item())

    step(x[:2, :, :8, :8])  # so that the gradients are there, and what libraries load for themselves
    highest = peak(step, device) / 1e6
    found = kept(model, x)
    tensors = found / (x.numel() * x.element_size()) / depth
    return [
        *(name, round(found / 1e6, 1), round(tensors, 2), round(highest, 1), round(losses[-1], 6)),
        *(depth, "x".join(map(str, shape)), device),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--size", type=int, default=56)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="write results/memory.csv")
    options = parser.parse_args()
    shape = (options.batch, options.channels, options.size, options.size)
    rows: list[list[object]] = []
    print(f"{'contender':<40} {'kept':>10} {'a block':>10} {'peak':>10}")
    for name in CONTENDERS:
        with get_context("spawn").Pool(1) as pool:
            found = pool.apply(row, (name, options.depth, shape, options.device, options.threads))
        rows.append(found)
        print(f"{name:<40} {found[1]:>7} MB {found[2]:>10} {found[3]:>7} MB", flush=True)
    if options.save:
        describe = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(describe, capture_output=True, text=True, check=True).stdout
        module = rn.kernels.extension.module()
        stamp = [platform.machine(), module.instructions if module else "none", options.threads, torch.__version__]
        path = Path(__file__).parent / "results" / "memory.csv"
        with path.open("w", newline="") as file:
            out = csv.writer(file)
            out.writerow([*HEAD, "machine", "instructions", "threads", "torch", "commit"])
            out.writerows([*found, *stamp, commit.strip()] for found in rows)


if __name__ == "__main__":
    main()
