"""Rules of `watch` about what passes through the layers: dead and saturated units, statistics of batch norms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

from torch import nn

from renorm.diagnose.catalogue import Found, Severity, rule
from renorm.diagnose.history import History, Sample
from renorm.diagnose.rules.steps import SETTLED, training
from renorm.diagnose.rules.words import listed

YOUNG = 80  # steps in which a loss need not have fallen
UNITS = 8  # of a layer, at least, for a share of them to say something
NORMED = "model = nn.Sequential(nn.Linear(8, 32), {}, nn.ReLU(), nn.Linear(32, 3))"


def seen(history: History, kinds: tuple[str, ...], count: int) -> Iterator[tuple[str, list[dict[str, float]]]]:
    """The layers of these kinds that are in each of the last `count` samples, and their numbers."""
    samples = history.recent(count)
    if len(samples) < count:
        return
    for name, layer in samples[-1].layers.items():
        if layer.kind in kinds and all(name in sample.layers for sample in samples):
            yield name, [sample.layers[name].numbers for sample in samples]


def bound(history: History, stuck: float, learning: float) -> float:
    """How much is too much, for a training whose loss does not fall, and for one whose loss does; between for both."""
    if history.progress > 0.2:
        return learning
    return stuck if history.step >= YOUNG else (stuck + learning) / 2


def and_so(found: Mapping[str, object], worst: str) -> str:
    """Which other layers have it too, for a message."""
    others = [name for name in found if name != worst]
    return f" (alike: {listed(others)})" if others else ""


def module_of(name: str) -> str:
    """The module of a layer's name, which may be a function in it or one of its calls."""
    name = name.partition(" (call ")[0]
    return name.rpartition(" in ")[2] if "()" in name else name


# ---- activations


@rule(
    "W04",
    "dead-units",
    "warning",
    when="watch",
    title="Units of a ReLU are 0 for everything they see",
    why="A unit that is 0 for every input gets no gradient: it stays dead, and the layer is as narrow as what is left.",
    fix="Lower the learning rate, start again from an initialization that fits, or use LeakyReLU or GELU.",
    source="SageMaker Debugger's DeadRelu and TheDeepChecker look at single batches; here a unit counts over 5 samples "
    "and 256 values: calibrated on the clean programs of tests/diagnose",
    bad=training(
        model="model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))\n"
        "nn.init.constant_(model[0].bias, -8.0)"
    ),
    good=training(),
)
def dead_units(history: History) -> Iterator[Found]:
    """More than half of the units, four fifths while the loss falls; an error if nearly all and weights stand still."""
    found = {}
    for name, (numbers,) in seen(history, ("relu",), 1):
        judged = numbers["units"] >= UNITS and numbers["samples"] >= 5 and numbers["entries"] >= 256
        if judged and numbers["dead"] > bound(history, 0.5, 0.8):
            found[name] = numbers
    if found:
        name = max(found, key=lambda one: found[one]["dead"])
        numbers = found[name]
        sample = history.samples[-1]
        stuck = [one for one in history.matrices(sample) if sample.gradients[one] == 0]
        severity: Severity = "error" if numbers["dead"] > 0.95 and stuck else "warning"
        yield Found(
            f"{100 * numbers['dead']:.0f}% of the {numbers['units']:.0f} units of {name} were 0 for all of the last "
            f"{numbers['entries']:.0f} values of each{and_so(found, name)}"
            + (f"; {listed(stuck)} get no gradient" if severity == "error" else ""),
            module=module_of(name),
            severity=severity,
            key="",
        )


@rule(
    "W05",
    "saturated-units",
    "warning",
    when="watch",
    title="Most values of a hidden tanh or sigmoid are at its ends",
    why="The slope there is below 1% of that in the middle: almost no gradient passes.",
    fix="Normalize what goes into it, lower the learning rate or the size of the weights at the start, or use ReLU.",
    source="SageMaker Debugger's SaturatedActivation looks at 9.5 for tanh and 23 for sigmoid, which is late; 3 and 6 "
    "with slopes of 0.010 and 0.0025 are ours: calibrated on the clean programs of tests/diagnose",
    bad=training(
        model="x *= 100\nmodel = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 3))",
    ),
    good=training(model="model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 3))"),
)
def saturated_units(history: History) -> Iterator[Found]:
    """More than half of the values in 3 samples, nine tenths while the loss falls; the model's outputs are left out."""
    shares = {
        name: min(numbers["saturated"] for numbers in samples)
        for name, samples in seen(history, ("tanh", "sigmoid"), 3)
        if min(numbers["entries"] for numbers in samples) >= 64
    }
    found = {name: share for name, share in shares.items() if share > bound(history, 0.5, 0.9)}
    if found:
        name = max(found, key=lambda one: found[one])
        limit = 3 if history.samples[-1].layers[name].kind == "tanh" else 6
        yield Found(
            f"{100 * found[name]:.0f}% of the values that go into {name} are beyond ±{limit}{and_so(found, name)}",
            module=module_of(name),
            key="",
        )


# ---- batch norms


def expected(numbers: dict[str, float]) -> tuple[float, float]:
    """How far batch and running statistics of the same data may be apart: of the means, of the logarithms of variances.

    The values of one sample are as good as one: those of neighbouring pixels are nearly the same.
    """
    samples = max(1.0, numbers["samples"])
    return max(0.5, 3 / math.sqrt(samples)), max(1.0, 3 * math.sqrt(2 / samples))


def apart(numbers: dict[str, float]) -> bool:
    """Whether the running statistics are not those of this batch."""
    mean, var = expected(numbers)
    return numbers["mean"] > mean or numbers["var"] > var


def off(history: History, after: Callable[[nn.Module], int]) -> Iterator[tuple[str, dict[str, float]]]:
    """The batch norms whose running statistics were apart from the batch's in 3 samples, `after` some steps."""
    for name, samples in seen(history, ("batch_norm", "norm"), 3):
        module = history.model.get_submodule(name)
        if history.step >= after(module) and all(map(apart, samples)) and not samples[-1]["frozen"]:
            yield name, samples[-1]


def memory(module: nn.Module) -> int:
    """Steps behind which running statistics have forgotten where they started, small variances included."""
    momentum = getattr(module, "momentum", None)
    return round(12 / momentum) if momentum else SETTLED


def distance(numbers: dict[str, float]) -> str:
    """How far they are apart, for a message."""
    mean, var = expected(numbers)
    return (
        f"means by {numbers['mean']:.2f} standard deviations (up to {mean:.2f} is chance), variances by a factor of "
        f"{math.exp(min(50.0, numbers['var'])):.3g} (up to {math.exp(var):.3g})"
    )


SORTED = """
x = torch.randn(256, 8) + 4 * torch.arange(4.).repeat_interleave(64)[:, None]
y = torch.arange(4).repeat_interleave(64)
model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
with rn.watch(model, optimizer, on_error="silent") as w:
    for step in range(200):
        i = {}
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[i]), y[i])
        loss.backward()
        optimizer.step()
        w.step(loss)
report = w.report
"""


@rule(
    "W14",
    "batches-unlike-running-statistics",
    "warning",
    when="watch",
    title="A batch norm's running statistics are not those of its batches",
    why="In evaluation the layer uses the running statistics: the model then works on other values than in training.",
    fix="Shuffle the data (each batch should look like the whole); use larger batches; a momentum of 0.1 or so; or a "
    "group norm, which has no running statistics.",
    source="arXiv:2210.05153 measures this distance; that of batches of the same data follows from their size, three "
    "times which is ours: calibrated on the clean programs of tests/diagnose",
    bad=SORTED.format("torch.arange(32) + 32 * (step // 2 % 8)  # not shuffled"),
    good=SORTED.format("torch.randint(256, (32,))"),
)
def batches_unlike_running_statistics(history: History) -> Iterator[Found]:
    """In 3 samples, after the start is forgotten; all batches between two steps count as one.

    Not where several optimizers take turns: a critic sees real and made images in batches of their own, on purpose.
    """
    if len(history.optimizers) > 1:
        return
    found = dict(off(history, memory))
    if found:
        name = max(found, key=lambda one: found[one]["mean"])
        yield Found(
            f"running and batch statistics of {listed(found)} are apart, of {name} {distance(found[name])}",
            name,
            key="",
        )


@rule(
    "W16",
    "frozen-norm-drifts",
    "warning",
    when="watch",
    title="A frozen batch norm still follows the data",
    why="requires_grad=False keeps its weight, but in training mode its running mean and variance move on with every "
    "batch: the frozen part is not the one that was loaded.",
    fix="Put frozen norms into evaluation mode behind every model.train():\n"
    "for module in model.modules():\n    if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):\n"
    "        module.eval()",
    source="torch.nn.BatchNorm2d: running statistics depend on the mode alone",
    bad=training(
        model=NORMED.format("nn.BatchNorm1d(32)") + "\nmodel[:2].requires_grad_(False)",
        optimizer="torch.optim.SGD(model[3].parameters(), lr=0.1)",
    ),
    good=training(
        model=NORMED.format("nn.BatchNorm1d(32)") + "\nmodel[:2].requires_grad_(False)\nmodel[:2].eval()",
        optimizer="torch.optim.SGD(model[3].parameters(), lr=0.1)",
    ),
)
def frozen_norm_still_moves(history: History) -> Iterator[Found]:
    """Its parameters never learnt, and its running means are elsewhere than in the first sample."""
    found = {
        name: samples[-1]["drift"]
        for name, samples in seen(history, ("batch_norm", "norm"), 2)
        if samples[-1]["frozen"] and samples[-1].get("drift", 0.0) > 1e-3
    }
    if found and len(history.samples) > 5:
        name = max(found, key=lambda one: found[one])
        verb = "is" if len(found) == 1 else "are"
        yield Found(
            f"{listed(found)} {verb} frozen and in training mode: the running mean of {name} moved by "
            f"{found[name]:.2g} standard deviations since step {history.samples[0].step}",
            module=name,
            key="",
        )


@rule(
    "W17",
    "silent-channels",
    "info",
    when="watch",
    title="Channels of a batch norm carry nothing",
    why="A channel whose variance is about eps is a constant, one whose weight is 0 passes nothing on: both cost the "
    "same as the others.",
    fix="Look at what feeds the layer: dead units, or weight decay on the norm's weight; or make the layer narrower.",
    source="Network slimming (arXiv:1708.06519) prunes channels by their weight; 1e-3 and a quarter are ours: "
    "calibrated on the clean programs of tests/diagnose",
    bad=training(
        model=NORMED.format("nn.BatchNorm1d(32)") + "\nmodel[0].weight.data[:16] = 0",
        optimizer="torch.optim.SGD(model[3].parameters(), lr=0.1)",
        steps=200,
    ),
    good=training(model=NORMED.format("nn.BatchNorm1d(32)"), steps=200),
)
def silent_channels(history: History) -> Iterator[Found]:
    """More than a quarter of the channels, in 3 samples, after the start."""
    if history.step < SETTLED:
        return
    for name, samples in seen(history, ("batch_norm", "norm"), 3):
        small, weak = (min(numbers.get(key, 0.0) for numbers in samples) for key in ("small", "weak"))
        if max(small, weak) > 0.25:
            what = "a running variance below 10 eps" if small >= weak else "a weight below 0.001"
            yield Found(f"{100 * max(small, weak):.0f}% of the channels of {name} have {what}", module=name)


@rule(
    "W18",
    "uneven-batches",
    "info",
    when="watch",
    title="Some batches are much smaller, and batch norm works on few values in them",
    why="The statistics of a small batch are noisy, and count as much in the running ones as those of a full batch.",
    fix="DataLoader(..., drop_last=True)",
    source="16 values is a bound of ours: calibrated on the clean programs of tests/diagnose; that batch norm is the "
    "worse the fewer values it has is in arXiv:1803.08494",
    bad=training(model="x = x[:200]; y = y[:200]\n" + NORMED.format("nn.BatchNorm1d(32)"), steps=100).replace(
        "i = torch.randint(256, (32,))", "i = torch.randperm(200)[: 8 if step % 7 == 6 else 32]  # 200 = 6 * 32 + 8"
    ),
    good=training(model=NORMED.format("nn.BatchNorm1d(32)"), steps=100),
)
def uneven_batches(history: History) -> Iterator[Found]:
    """Below 16 values for each channel, less than half of what other sampled steps had."""
    samples: list[Sample] = history.recent(len(history.samples))
    most: dict[str, float] = {}
    for sample in samples:
        for name, layer in sample.layers.items():
            if layer.kind in ("batch_norm", "norm"):
                most[name] = max(most.get(name, 0.0), layer.numbers["values"])
    for name, layer in samples[-1].layers.items() if samples else ():
        if layer.kind in ("batch_norm", "norm") and layer.numbers["fewest"] < min(16, most[name] / 2):
            few = layer.numbers["fewest"]
            yield Found(
                f"{name} had {most[name]:.0f} values for each channel in most steps, and {few:.0f} in some", name
            )
            return
