"""Rules of `watch` about gradients and updates: what an optimizer gets, and what it does with it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median

import torch
from torch import nn

from renorm.diagnose.catalogue import Found, rule
from renorm.diagnose.history import History, Sample
from renorm.diagnose.rules.words import listed

SETTLED = 100  # steps, before which a schedule may still warm up and layers that start at zero are on their way
FEW = 8  # entries of a matrix
PLATEAU = 0.02  # of the first losses: a loss that fell by less has not fallen

TRAIN = """
x = torch.randn(256, 8)
y = x[:, :3].argmax(1)
{model}
optimizer = {optimizer}
with rn.watch(model, optimizer, on_error="silent") as w:
    for step in range({steps}):
        i = torch.randint(256, (32,))
        {zero}
        loss = F.cross_entropy(model(x[i]), y[i])
        loss.backward()
        {update}
        w.step(loss)
report = w.report
"""
MLP = "model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))"


def training(
    model: str = MLP,
    optimizer: str = "torch.optim.SGD(model.parameters(), lr=0.1)",
    steps: int = 60,
    zero: str = "optimizer.zero_grad()",
    update: str = "optimizer.step()",
) -> str:
    """An example: a small classifier that is trained and watched."""
    return TRAIN.format(model=model, optimizer=optimizer, steps=steps, zero=zero, update=update)


# ---- what is not finite


@rule(
    "W01",
    "non-finite",
    "error",
    when="watch",
    title="The loss or a gradient is not finite",
    why="The next step makes every parameter that it reaches nan, and nothing that is trained afterwards counts.",
    fix="Go back to a checkpoint. Look for a division, logarithm or root at 0, for an overflow in float16, for nan in "
    "the data; lower the learning rate or clip the gradients where the loss grew before.",
    source="a number that is not finite is one",
    bad=training(model="x[17] = float('nan')\n" + MLP, steps=40),
    good=training(steps=40),
)
def non_finite(history: History) -> Iterator[Found]:
    """A loss of any step, or a gradient of a sampled one, is nan or infinite."""
    lost = next(((step, value) for step, value in history.losses if not math.isfinite(value)), None)
    if lost is not None:
        step, value = lost
        yield Found(f"the loss of step {step} is {value:g}{origin(history, step)}")
        located = history.events.get("located")
        if located is not None:
            yield Found(f"{located} is the first layer whose output is not finite", module=located)
        return
    last = history.last
    if last is None or last.skipped:
        return
    names = [name for name, norm in last.gradients.items() if not math.isfinite(norm)]
    if names:
        share = f"{listed(names)}" if len(names) < len(last.gradients) else "all parameters"
        yield Found(
            f"the gradient of {share} is not finite in step {last.step}{given(last)}",
            module=names[-1].rpartition(".")[0] if len(names) < len(last.gradients) else "",
        )


def origin(history: History, step: int) -> str:
    """What is known of where it comes from, for a message."""
    sample = next((sample for sample in history.samples if sample.step == step), None)
    if sample is not None and given(sample):
        return given(sample)
    before = [value for at, value in history.losses if at < step and math.isfinite(value)][-3:]
    if before and history.start and before[-1] > 10 * abs(history.start[0]):
        return f": it had grown from {history.start[0]:.3g} to {before[-1]:.3g} before"
    names = history.events.get("lost", [])
    if names and len(names) < len(history.sizes) / 2:
        return f"; so are values of {listed(names)}, and of no other parameter"
    if names:
        return f", and {len(names)} of {len(history.sizes)} parameters hold values that are not finite"
    return "; all parameters are finite: it comes from the batch, the forward pass or the loss"


def given(sample: Sample) -> str:
    """Whether the batch is to blame, for a message."""
    bad = sample.inputs is not None and not math.isfinite(sample.inputs)
    return ": the batch itself has values that are not finite" if bad else ""


# ---- gradients

DEEP = """
layers = [m for _ in range(6) for m in (nn.Linear(32, 32), {0})]
model = nn.Sequential(nn.Linear(8, 32), {0}, *layers, nn.Linear(32, 3))
""".strip()


@rule(
    "W02",
    "vanishing-gradient",
    "warning",
    when="watch",
    title="Gradients vanish on the way to the first layer, and the loss does not fall",
    why="The first layers stay what they were at the start, and the last ones see little more than noise.",
    fix="Use ReLU or GELU in place of sigmoid and tanh, residual connections, a norm, or an initialization that fits.",
    source="SageMaker Debugger's VanishingGradient and the ratio of TheDeepChecker; only on a plateau: calibrated on "
    "the clean programs of tests/diagnose",
    bad=training(model=DEEP.format("nn.Sigmoid()"), steps=120),
    good=training(model=DEEP.format("nn.ReLU()"), optimizer="torch.optim.Adam(model.parameters(), 1e-3)", steps=120),
)
def vanishing_gradient(history: History) -> Iterator[Found]:
    """Root mean squares of gradients, first matrix over last, below 1e-2 in 3 samples, the loss at its start."""
    samples = history.recent(3)
    if len(samples) < 3 or not history.progress < PLATEAU:
        return
    found = []
    for sample in samples:
        names = [name for name in history.matrices(sample) if not isinstance(owner(history, name), nn.Embedding)]
        if len(names) < 3:
            return
        ends = [sample.gradients[name] / math.sqrt(math.prod(history.sizes[name])) for name in (names[0], names[-1])]
        if not ends[0] < 1e-2 * ends[1]:
            return
        found.append((names[0], names[-1], ends[0] / ends[1]))
    first, last, ratio = max(found, key=lambda one: one[2])
    yield Found(
        f"the gradient of {first} is {ratio:.1g} times that of {last} (root mean squares, {len(samples)} samples), and "
        f"the loss is {abs(100 * history.progress):.1f}% {'below' if history.progress >= 0 else 'above'} its start",
        module=first.rpartition(".")[0],
        key="",
        severity="error" if ratio < 1e-6 else None,
    )


def owner(history: History, name: str) -> nn.Module | None:
    """The module that has this parameter."""
    try:
        return history.model.get_submodule(name.rpartition(".")[0])
    except AttributeError:
        return None


@rule(
    "W03",
    "exploding-gradient",
    "warning",
    when="watch",
    title="Gradients grew ten times, and the loss with them",
    why="Such steps throw the weights far away; what was learnt is lost, and the next ones are larger still.",
    fix="torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # before optimizer.step(); or a lower learning rate",
    source="SageMaker Debugger's ExplodingTensor looks for nan only, TheDeepChecker for 1e6; the factor 10 over the "
    "trailing median: calibrated on the clean programs of tests/diagnose",
    bad=training(steps=400, update="optimizer.param_groups[0]['lr'] *= 1.03 if step > 150 else 1; optimizer.step()"),
    good=training(steps=400),
)
def exploding_gradient(history: History) -> Iterator[Found]:
    """The norm is above 10 times the median of up to 32 samples before, or above 1e6, while the loss rises."""
    samples = [sample for sample in history.recent(33) if not sample.skipped and math.isfinite(sample.gradient)]
    if len(samples) < 9 or len(history.losses) < 2 * len(history.start) or len(history.optimizers) > 1:
        return
    usual, norm = median(sample.gradient for sample in samples[:-1]), samples[-1].gradient
    now, before = history.latest(5), history.latest(25)[:-5]
    if not before or not all(map(math.isfinite, now)):
        return
    rise = math.fsum(now) / len(now) - median(before)
    start = abs(history.start[0])
    if (norm > 10 * usual or norm > 1e6) and rise > max(0.2 * abs(median(before)), 0.05 * start):
        yield Found(
            f"the gradient's norm is {norm:.3g}, {norm / usual:.1f} times its median of the {len(samples) - 1} samples "
            f"before, and the loss rose from {median(before):.3g} to {median(before) + rise:.3g}"
        )


# ---- updates


@rule(
    "W06",
    "size-of-updates",
    "warning",
    when="watch",
    title="Steps are far too large, or far too small, for the weights",
    why="A step as large as the weights replaces what was learnt, one of a millionth of them changes nothing. About a "
    "thousandth is usual.",
    fix="Lower the learning rate tenfold where steps are too large; raise it where they are too small.",
    source="the ratio is Karpathy's (cs231n); clean runs stayed below 0.14: calibrated on the clean programs of "
    "tests/diagnose",
    bad=training(optimizer="torch.optim.Adam(model.parameters(), lr=1.0)"),
    good=training(optimizer="torch.optim.Adam(model.parameters(), lr=0.01)"),
)
def size_of_updates(history: History) -> Iterator[Found]:
    """‖change‖ / ‖weight‖ of matrices above 0.3 in 3 samples, or below 1e-5 in all; above 1 without gain is an error.

    Matrices that started near zero are left out: their first steps are large beside them.
    """
    samples = [sample for sample in history.recent(3) if not sample.skipped]
    if len(samples) < 3 or history.first is None:
        return
    ratios = {
        name: [sample.ratio(name) for sample in samples]
        for name in history.matrices(samples[-1])
        if grown_up(history, name) and all(name in sample.updates for sample in samples)
    }
    large = {name: min(values) for name, values in ratios.items() if min(values) > 0.3}
    if large:
        name = max(large, key=lambda one: large[one])
        harmful = large[name] > 1 and history.progress < 0
        yield Found(
            f"each step changes {name} by {large[name]:.2f} times its own norm{and_others(large)} "
            f"(learning rate {samples[-1].rates.get(name, math.nan):g})",
            module=name.rpartition(".")[0],
            severity="error" if harmful else None,
            key="large",
        )
    yield from too_small(history)


def and_others(names: dict[str, float]) -> str:
    """That there are more, for a message."""
    return f", and so for {len(names) - 1} more" if len(names) > 1 else ""


def grown_up(history: History, name: str) -> bool:
    """Whether a weight had a size when training started that its size now is to be compared with."""
    first = history.first
    if first is None or not first.weights.get(name):
        return False
    entries = math.prod(history.sizes[name])  # a few numbers may all be near zero by chance
    return entries >= FEW and first.weights[name] / math.sqrt(entries) > 1e-3


def too_small(history: History) -> Iterator[Found]:
    """No matrix ever moved by more than a hundred thousandth of itself, though there are gradients."""
    samples = [sample for sample in history.samples if not sample.skipped]
    if len(samples) < 8 or history.step < SETTLED // 2:
        return
    names = [name for name in history.matrices(samples[-1]) if samples[-1].gradients[name] > 0]
    rates = [sample.rates.get(names[0], math.nan) for sample in samples] if names else []
    if not names or rates[-1] > 1.5 * rates[0]:  # it still warms up
        return
    most = max(sample.ratio(name) for sample in samples for name in names)
    if most < 1e-5 and abs(history.progress) < (PLATEAU if most > 1e-6 else 0.2):  # batches differ
        yield Found(
            f"no step changed any weight by more than {most:.1g} times its norm (learning rate {rates[-1]:g})",
            fix="Raise the learning rate: steps of about a thousandth of the weights are usual.",
            key="small",
        )


@rule(
    "W07",
    "parameter-never-moves",
    "error",
    when="watch",
    title="A parameter has a gradient, and the optimizer does not change it",
    why="It stays what it was at the start: it is not what the optimizer holds, or its steps are lost in rounding.",
    fix="Create the optimizer after the model is complete and on its device; keep weights in float32 where steps are "
    "small (autocast, or a copy of the weights in float32).",
    source="the bits of the parameter before and after steps with a learning rate above 0",
    bad=training(
        model=MLP,
        optimizer="torch.optim.SGD(model.parameters(), lr=0.1)\nmodel[2] = nn.Linear(32, 3)  # not what it holds",
    ),
    good=training(),
)
def parameter_never_moves(history: History) -> Iterator[Found]:
    """Of a matrix the bits are the same in 3 samples, or nearly all; or the optimizer holds what the model has not."""
    yield from replaced(history)
    samples = [s for s in history.recent(3) if not s.skipped]
    if len(samples) < 3 or samples[0].step < SETTLED:
        return
    most = max(max(sample.rates.values(), default=0.0) for sample in history.samples)
    still = [
        name
        for name in history.matrices(samples[-1])
        if all(stands(sample, name) and sample.rates.get(name, 0.0) >= 0.1 * most > 0 for sample in samples)
        and math.isfinite(samples[-1].gradients[name])
    ]
    if still:
        kinds = {p.dtype for name, p in history.model.named_parameters() if name.replace("_orig_mod.", "") in still}
        low = kinds & {torch.bfloat16, torch.float16}
        dtype = f", in {str(low.pop()).removeprefix('torch.')}: steps are lost in rounding" if low else ""
        yield Found(
            f"{listed(still)} had a gradient and a learning rate in {len(samples)} samples and did not change{dtype}",
            module=still[0].rpartition(".")[0],
            key="",
        )
        return
    names = [name for name in history.matrices(samples[-1]) if not isinstance(owner(history, name), nn.Embedding)]
    rounded = {
        n: max(s.moved.get(n, 1.0) for s in samples) for n in names if samples[-1].rates.get(n, 0.0) > 0.1 * most
    }
    rounded = {name: moved for name, moved in rounded.items() if moved < 0.05}
    if rounded:
        yield Found(
            f"at most {100 * max(rounded.values()):.2g}% of the entries of {listed(rounded)} changed in each of "
            f"{len(samples)} steps: in this precision the others round back to what they were",
            module=next(iter(rounded)).rpartition(".")[0],
            severity="warning",
            key="rounded",
        )


def stands(sample: Sample, name: str) -> bool:
    """Whether the optimizer should have changed the parameter and did not."""
    if name in sample.partly or sample.updates.get(name) != 0.0:
        return False
    # A gradient that vanished on the way, and is lost in rounding by right, is another rule's.
    return sample.gradients.get(name, 0.0) > 1e-6 * max(sample.gradients.values())


def replaced(history: History) -> Iterator[Found]:
    """Parameters of the model that get gradients while the optimizer holds others in their place."""
    if len(history.samples) < 3 or len(history.optimizers) > 1:
        return
    mine = {p for group in history.optimizer.param_groups for p in group["params"]}
    own = dict(history.model.named_parameters())
    strangers = [p for p in mine - set(own.values()) if p.requires_grad]
    shapes = [p.shape for p in strangers]
    missing = [name for name, p in own.items() if p not in mine and p.grad is not None and p.shape in shapes]
    if missing:
        yield Found(
            f"the optimizer holds {len(strangers)} parameters that the model does not have, while {listed(missing)} of "
            "the model get gradients and no steps",
            module=missing[0].rpartition(".")[0],
            fix="# behind the last change of the model\noptimizer = "
            f"torch.optim.{type(history.optimizer).__name__}(model.parameters(), ...)",
        )


@rule(
    "W19",
    "gradients-not-cleared",
    "error",
    when="watch",
    title="Gradients of the steps before are still there when new ones are added",
    why="Each step follows the sum of all gradients so far: like a momentum of 1, which overshoots and diverges.",
    fix="optimizer.zero_grad()  # in each step, before loss.backward()",
    source="what every backward pass between two steps found in the place of the gradient",
    bad=training(zero="pass"),
    good=training(),
)
def gradients_not_cleared(history: History) -> Iterator[Found]:
    """In 3 samples no backward pass since the last step found an empty gradient; accumulation clears it once a step."""
    samples = history.recent(3)
    left = [sample.left for sample in samples if sample.left is not None]
    if len(left) == 3 and min(left) > 0:
        yield Found(
            f"the gradients of the step before were still there (norm {left[-1]:.3g} of one parameter) when those of "
            f"step {samples[-1].step} were added"
        )


@rule(
    "W20",
    "left-in-evaluation-mode",
    "warning",
    when="watch",
    title="The model trains in evaluation mode since some step",
    why="Dropout is off and batch norms use and keep old running statistics: usually model.train() is missing behind a "
    "validation.",
    fix="model.train()  # behind each validation, before the next step",
    source="the mode of the model at the optimizer's step",
    bad=training(
        model="model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))",
        steps=120,
        update="optimizer.step(); step == 50 and model.eval()",
    ),
    good=training(
        model="model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))",
        steps=120,
        update="optimizer.step(); step == 50 and model.eval(); model.train()",
    ),
)
def left_in_evaluation_mode(history: History) -> Iterator[Found]:
    """It was in training mode when training started, and holds layers to which that makes a difference."""
    first, last = history.first, history.last
    if first is None or last is None:
        return
    modules = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm, nn.RNNBase)
    for label, mode in last.modes.items():
        model = history.model.get_submodule(label) if label else history.model
        # Several optimizers may train one model while they only look at another.
        prefix = f"{label}." if label else ""
        if not any(name.startswith(prefix) for name in last.updates) or mode or not first.modes.get(label, False):
            continue
        found = [name for name, module in model.named_modules() if isinstance(module, modules) and matters(module)]
        if found and not model.training:
            yield Found(
                f"{label or 'the model'} was in training mode in step {first.step} and is in evaluation mode in step "
                f"{last.step}: {listed(found)} work differently",
                module=label,
                fix=f"{label or 'model'}.train()  # behind each validation",
            )


def matters(module: nn.Module) -> bool:
    """Whether the mode makes a difference to the layer."""
    rate = getattr(module, "p", getattr(module, "dropout", 1.0))
    return not isinstance(rate, float) or rate > 0
