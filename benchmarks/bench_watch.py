"""What it costs to watch a training: watched against unwatched steps, interleaved.

    python benchmarks/bench_watch.py [--steps 300] [--every 25] [--device cuda] [--save]

Each model is trained twice from the same weights on the same batch, a step of one and a step of the other in turn;
which comes first changes from step to step. The first steps, which are all sampled, are left out. `sampled` is what a
sampled step costs over an unwatched one beside it, `off` what the others cost: medians and quartiles, in percent.
`overhead` is both together, sampled steps at their share of 1 in `every`. `syncs` are the waits of the host for the
device in a sampled step (on a GPU). With `--save`, `results/watch.csv` has the rows.
"""

import argparse
import csv
import platform
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import renorm as rn

HEAD = [
    *("model", "step_ms", "off_percent", "off_q1", "off_q3", "sampled_percent", "sampled_q1", "sampled_q3"),
    *("overhead_percent", "syncs", "every", "steps", "parameters", "device", "machine", "threads", "torch", "commit"),
]
DENSE = 10


class Block(nn.Module):
    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Sequential()
        if stride != 1 or width != out:
            self.down = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.down(x))


def resnet() -> tuple[nn.Module, Tensor, Tensor]:
    """ResNet-20 for images of 32 x 32, batch 16."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    for width, out, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2)):
        layers += [Block(width, out, stride), Block(out, out, 1), Block(out, out, 1)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return model, torch.randn(16, 3, 32, 32), torch.randint(10, (16,))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 128)
        layer = nn.TransformerEncoderLayer(128, 4, 512, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.encoder(self.embedding(x)).mean(1))
        return y


def transformer() -> tuple[nn.Module, Tensor, Tensor]:
    """An encoder of 4 layers, width 128, batch 16 of 64 tokens."""
    return Transformer(), torch.randint(1000, (16, 64)), torch.randint(10, (16,))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(32, 128, 2, batch_first=True)
        self.head = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.lstm(x)[0][:, -1])
        return y


def lstm() -> tuple[nn.Module, Tensor, Tensor]:
    """An LSTM of 2 layers, width 128, batch 16 of 50 steps."""
    return Recurrent(), torch.randn(16, 50, 32), torch.randint(10, (16,))


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor, Tensor]]] = {
    "resnet20": resnet,
    "transformer": transformer,
    "lstm": lstm,
}


class Training:
    def __init__(self, name: str, device: str) -> None:
        torch.manual_seed(0)
        model, x, y = MODELS[name]()
        self.model, self.x, self.y = model.to(device), x.to(device), y.to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-4)
        self.watch: rn.diagnose.Watch | None = None

    def step(self) -> None:
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(self.x), self.y)
        loss.backward()
        self.optimizer.step()
        if self.watch is not None:
            self.watch.step(loss)
        else:
            loss.detach()

    def timed(self, device: str) -> float:
        start = time.perf_counter()
        self.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def syncs_of(training: Training, every: int) -> int | str:
    """How often a sampled step waits for the device; the training is left in front of one."""
    if training.x.device.type != "cuda":
        return ""
    while (training.watch.history.step + 1) % every:  # type: ignore[union-attr]
        training.step()
    training.step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            training.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in caught)


def row(name: str, steps: int, every: int, device: str) -> list[object]:
    plain, watched = Training(name, device), Training(name, device)
    with rn.watch(watched.model, watched.optimizer, every=every, dense=DENSE, on_error="silent") as watch:
        watched.watch = watch
        for _ in range(DENSE + 5):
            plain.step()
            watched.step()
        usual: list[float] = []
        ratios: dict[bool, list[float]] = {True: [], False: []}
        for i in range(steps):
            sampled = watch.history.step % every == 0
            order = (plain, watched) if i % 2 else (watched, plain)
            times = {id(one): one.timed(device) for one in order}
            usual.append(times[id(plain)])
            ratios[sampled].append(times[id(watched)] / times[id(plain)])
        waits = syncs_of(watched, every)
    assert not watch.report.failures, watch.report.failures
    off, on = ([100 * (ratio - 1) for ratio in ratios[key]] for key in (False, True))
    overhead = median(off) * (every - 1) / every + median(on) / every
    (off_1, _, off_3), (on_1, _, on_3) = (quantiles(values, n=4) for values in (off, on))
    numbers = [1000 * median(usual), median(off), off_1, off_3, median(on), on_1, on_3, overhead]
    parameters = sum(p.numel() for p in plain.model.parameters())
    return [name, *(round(number, 2) for number in numbers), waits, every, steps, parameters, device]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--every", type=int, default=25)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--save", action="store_true", help="write results/watch.csv")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    print(f"{'model':<12} {'a step':>10} {'not sampled':>22} {'sampled':>22} {'overhead':>9} {'waits':>6}")
    for name in options.models:
        found = row(name, options.steps, options.every, options.device)
        rows.append(found)
        off, on = (f"{found[i]:+.1f}% ({found[i + 1]:+.1f} to {found[i + 2]:+.1f})" for i in (2, 5))
        print(f"{name:<12} {found[1]:>7} ms {off:>22} {on:>22} {found[8]:>8}% {found[9]!s:>6}", flush=True)
    if options.save:
        describe = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
        machine = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
        path = Path(__file__).parent / "results" / "watch.csv"
        with path.open("w", newline="") as file:
            out = csv.writer(file)
            out.writerow(HEAD)
            out.writerows([*found, machine, options.threads, torch.__version__, commit] for found in rows)


if __name__ == "__main__":
    main()
