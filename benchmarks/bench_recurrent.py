"""LSTM and GRU with layer norm beside torch's layers without, and beside a Python loop of the same cells.

    python benchmarks/bench_recurrent.py [--only TEXT] [--threads 2] [--seconds 4] [--save]

The contenders of a case run interleaved in one process. `torch` is nn.LSTM or nn.GRU, which has less to do; `loop` the
cell of the paper written with torch's operations, one step at a time. A row has the median and the quartiles of each,
and their times over renorm's. A sample before or after which another process was running is dropped and counted.
With `--save`, `results/recurrent.csv` has the rows.
"""

import argparse
import csv
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_kernels import undisturbed
from torch import Tensor, nn

from renorm.kernels import extension
from renorm.norms.recurrent import LayerNormGRU, LayerNormLSTM


@dataclass(frozen=True)
class Case:
    """One cell on one input."""

    cell: str
    steps: int
    batch: int
    features: int
    hidden: int
    bidirectional: bool = False

    @property
    def name(self) -> str:
        sides = " bidirectional" if self.bidirectional else ""
        return f"{self.cell} T={self.steps} N={self.batch} I={self.features} H={self.hidden}{sides}"


SIZES = [(100, 32, 256, 256), (50, 16, 128, 128), (100, 1, 256, 256), (200, 64, 40, 512), (20, 64, 1024, 1024)]
CASES = [Case(cell, *sizes) for cell in ("LSTM", "GRU") for sizes in SIZES] + [Case("LSTM", 100, 32, 256, 256, True)]


class Loop(nn.Module):
    """The paper's cells as people write them: the input's part at once, then a loop over the steps."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def direction(self, x: Tensor, end: str) -> Tensor:
        p, hidden = dict(self.layer.named_parameters()), self.layer.hidden_size
        sizes = [4 * hidden] if self.layer.mode == "LSTM" else [2 * hidden, hidden]

        def norm(a: Tensor, which: str) -> list[Tensor]:
            parts = (a, p[f"norm_weight_{which}_{end}"], p[f"norm_bias_{which}_{end}"])
            split = zip(*(part.split(sizes, -1) for part in parts), strict=True)
            return [F.layer_norm(v, [v.shape[-1]], weight, bias) for v, weight, bias in split]

        of_x = norm(F.linear(x, p[f"weight_ih_{end}"]), "ih")
        b_x, b_h = (p[f"bias_{which}_{end}"].split(sizes) for which in ("ih", "hh"))
        steps = [(v + b).unbind(0) for v, b in zip(of_x, b_x, strict=True)]
        h = c = x.new_zeros(x.shape[1], hidden)
        outs = []
        for t in range(len(x)):
            of_h = [v + b for v, b in zip(norm(F.linear(h, p[f"weight_hh_{end}"]), "hh"), b_h, strict=True)]
            if self.layer.mode == "LSTM":
                i, f, g, o = (steps[0][t] + of_h[0]).chunk(4, -1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                inner = F.layer_norm(c, [hidden], p[f"norm_weight_c_{end}"], p[f"norm_bias_c_{end}"])
                h = o.sigmoid() * inner.tanh()
            else:
                r, z = (steps[0][t] + of_h[0]).sigmoid().chunk(2, -1)
                n = torch.tanh(steps[1][t] + r * of_h[1])
                h = n + z * (h - n)
            outs.append(h)
        return torch.stack(outs)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        y = self.direction(x, "l0")
        if self.layer.bidirectional:
            y = torch.cat([y, self.direction(x.flip(0), "l0_reverse").flip(0)], -1)
        return y, None


def calls_of(case: Case) -> dict[str, Callable[[], object]]:
    """By "<contender> <what>"."""
    torch.manual_seed(0)
    sizes = (case.features, case.hidden)
    ours = (LayerNormLSTM if case.cell == "LSTM" else LayerNormGRU)(*sizes, bidirectional=case.bidirectional)
    theirs = (nn.LSTM if case.cell == "LSTM" else nn.GRU)(*sizes, bidirectional=case.bidirectional)
    contenders = {"renorm": ours, "torch": theirs, "loop": Loop(ours)}
    x = torch.randn(case.steps, case.batch, case.features)
    leaf, upstream = x.clone().requires_grad_(), torch.randn_like(theirs(x)[0])
    few = x[:5]  # norms of weight 1 make the cells chaotic: rounding errors grow tenfold every 30 steps or so
    assert torch.allclose(ours(few)[0], contenders["loop"](few)[0], atol=1e-4)

    def forward(layer: nn.Module) -> None:
        with torch.no_grad():
            layer(x)

    def both(layer: nn.Module) -> None:
        torch.autograd.grad(layer(leaf)[0], [leaf, *layer.parameters()], upstream)

    calls: dict[str, Callable[[], object]] = {}
    for name, layer in contenders.items():
        calls[f"{name} forward"] = lambda layer=layer: forward(layer)
        calls[f"{name} both"] = lambda layer=layer: both(layer)
    return calls


HEAD = [
    *("case", "what"),
    *(f"{name}_{of}" for name in ("renorm", "torch", "loop") for of in ("ms", "q1", "q3")),
    *("torch_over_renorm", "loop_over_renorm", "samples", "dropped"),
]


def rows_of(case: Case, seconds: float, keep: bool) -> list[list[object]]:
    calls = calls_of(case)
    times: dict[str, list[float]] = {name: [] for name in calls}
    rounds = dropped = 0
    start = time.perf_counter()
    while rounds < 5 or (time.perf_counter() - start < seconds and rounds < 200):
        rounds += 1
        for name, call in calls.items():
            found = undisturbed(call, 1, keep)
            if found is None:
                dropped += 1
            else:
                times[name].append(found)
    rows: list[list[object]] = []
    for what in ("forward", "both"):
        found = [times[f"{name} {what}"] for name in ("renorm", "torch", "loop")]
        if min(map(len, found)) < 4:
            print(f"{case.name}: too few undisturbed samples; the machine is busy")
            continue
        quartiles = [[value * 1e3 for value in statistics.quantiles(sample, n=4)] for sample in found]
        ours, torchs, loops = (q[1] for q in quartiles)
        figures = [round(value, 3) for q1, q2, q3 in quartiles for value in (q2, q1, q3)]
        rows.append([case.name, what, *figures, round(torchs / ours, 2), round(loops / ours, 2), rounds, dropped])
        print(
            f"{case.name:<44} {what:<8} renorm {ours:>9.2f}  torch {torchs:>9.2f}  loop {loops:>9.2f} ms   "
            f"{torchs / ours:>5.2f}x  {loops / ours:>5.2f}x",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=4, help="for each case")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--busy", action="store_true", help="keep samples of a busy machine: a look, no figure")
    parser.add_argument("--save", action="store_true", help="write results/recurrent.csv")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    module = extension.module()
    instructions = module.instructions if module else "none"
    stamp = [platform.machine(), instructions, options.threads, torch.__version__, commit.strip()]
    rows = [row for case in CASES if options.only in case.name for row in rows_of(case, options.seconds, options.busy)]
    if options.save:
        with (Path(__file__).parent / "results" / "recurrent.csv").open("w", newline="") as file:
            out = csv.writer(file)
            out.writerow([*HEAD, "machine", "instructions", "threads", "torch", "commit"])
            out.writerows([*row, *stamp] for row in rows)


if __name__ == "__main__":
    main()
