"""Rules of `watch` about losses: flat, diverging, overfitted, better in validation than in training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from statistics import median

from torch import nn

from renorm.diagnose.catalogue import Found, rule
from renorm.diagnose.history import Fit, History
from renorm.diagnose.rules.activations import apart, distance, seen
from renorm.diagnose.rules.steps import MLP, PLATEAU, SETTLED, training
from renorm.diagnose.rules.words import listed
from renorm.diagnose.trace import kind_of_module

WINDOW = 40  # losses, whose mean is compared with that of others
BY_HEART = 20  # parameters: fewer learn nothing by heart
WINDOWS = 8  # of these, in which a loss should have fallen

EVALUATED = """
x, noise = torch.randn({size}, 8), torch.randn({size}, 8)
y = x[:, :3].argmax(1)
{labels}
{model}
optimizer = {optimizer}
with rn.watch(model, optimizer, on_error="silent") as w:
    for step in range({steps}):
        i = torch.randint({seen}, (32,))
        model.train()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[i]), y[i])
        loss.backward()
        optimizer.step()
        w.step(loss)
        if step % 20 == 19:
            model.eval()
            with torch.no_grad():
                w.validate({validate})
report = w.report
"""


def evaluated(
    model: str = MLP,
    optimizer: str = "torch.optim.Adam(model.parameters(), lr=0.003)",
    labels: str = "",
    steps: int = 300,
    size: int = 2000,
    seen: int = 1000,
    validate: str = "F.cross_entropy(model(x[1000:]), y[1000:])",
) -> str:
    """An example: a small classifier that is trained, validated and watched."""
    return EVALUATED.format(**locals())


def mean(values: list[float]) -> float:
    """The mean."""
    return math.fsum(values) / len(values)


def trimmed(values: list[float]) -> float:
    """The mean without the lowest and the highest tenth: single batches may be odd."""
    cut = len(values) // 10
    return mean(sorted(values)[cut : len(values) - cut])


def windows(history: History, size: int) -> list[list[float]]:
    """The losses in windows of this size, the last ends with the last loss."""
    losses = history.latest(len(history.losses))
    return [losses[i : i + size] for i in range(len(losses) % size, len(losses), size)]


# ---- training


@rule(
    "W08",
    "loss-is-flat",
    "warning",
    when="watch",
    title="The loss has not fallen since training started",
    why="Nothing is learnt: a wrong pairing of inputs and targets, a learning rate off by orders of magnitude, dead "
    "layers, a loss on the wrong tensor.",
    fix="Overfit one batch first: with a working set-up its loss goes to 0. Check that inputs and targets belong "
    "together, and try learning rates ten times larger and smaller.",
    source="SageMaker Debugger's LossNotDecreasing fires on 22 of 24 healthy runs, since converged ones are flat, too: "
    "here only a loss at its start or at the level of guessing counts; calibrated on the clean programs of "
    "tests/diagnose",
    bad=training(model=MLP, steps=500).replace("y[i])", "y[torch.randint(256, (32,))])"),
    good=training(steps=400),
)
def loss_is_flat(history: History) -> Iterator[Found]:
    """320 steps without gain, at the level of guessing; at any level where it never fell, that is said (info)."""
    parts = windows(history, WINDOW)[-WINDOWS:]
    if len(parts) < WINDOWS or len(history.optimizers) > 1 or warms_up(history, WINDOW * WINDOWS):
        return
    levels = [trimmed(part) for part in parts]
    now = mean(levels)
    if not all(map(math.isfinite, levels)) or min(levels) < levels[0] * (1 - PLATEAU):
        return
    floor = floors(history, now)
    if floor is not None and abs(now / mean(history.start) - 1) < 0.3:
        yield Found(f"the loss is {now:.4g} in each of the last {WINDOW * WINDOWS} steps: {floor}")
    elif abs(history.progress) < PLATEAU:
        scatter = math.sqrt(mean([(loss - now) ** 2 for loss in parts[-1]]))
        if max(history.start) > now + 4 * scatter:  # it fell at once
            return
        yield Found(f"the loss is {now:.4g}, and was {mean(history.start):.4g} at the start", severity="info")


def warms_up(history: History, steps: int) -> bool:
    """Whether the learning rate rose in the last `steps`."""
    samples = [sample for sample in history.samples if sample.step >= history.step - steps]
    rates = [max(sample.rates.values(), default=0.0) for sample in samples]
    return len(rates) > 1 and max(rates) > 1.01 * rates[0]


def floors(history: History, loss: float) -> str | None:
    """Which known level the loss stands at: that of guessing, or the lowest that a second softmax leaves."""
    sample, made = history.last, history.events.get("loss", frozenset())
    shapes = sample.outputs if sample is not None else ()
    if made and not any(name.startswith(("NllLoss", "LogSoftmax", "BinaryCrossEntropy")) for name in made):
        return None  # that of a regression has no such level
    for classes in sorted({shape[axis] for shape in shapes if len(shape) > 1 for axis in (1, -1)} - {1}):
        if abs(loss / math.log(classes) - 1) < 0.02:
            return f"ln {classes}, what guessing one of {classes} classes gives"
        low = math.log(1 + (classes - 1) / math.e)
        doubled = any(kind_of_module(module) == "softmax" for module in history.model.modules())
        if classes > 2 and doubled and abs(loss / low - 1) < 0.005:
            return f"the lowest that a cross-entropy of probabilities can have for {classes} classes"
    binary = any(len(shape) < 2 or shape[-1] == 1 for shape in shapes)
    return "ln 2, what guessing gives" if binary and abs(loss / math.log(2) - 1) < 0.01 else None


@rule(
    "W09",
    "loss-diverges",
    "warning",
    when="watch",
    title="The loss has risen well above where it was",
    why="What was learnt is lost again; it seldom comes back by itself.",
    fix="Lower the learning rate, warm it up, or clip gradients; go back to the checkpoint before the rise.",
    source="TheDeepChecker takes twice the minimum; that the rise must be a quarter of all that was gained, and last "
    "for 20 steps, is ours: calibrated on the clean programs of tests/diagnose",
    bad=training(steps=300, update="optimizer.param_groups[0]['lr'] = 10.0 if step > 200 else 0.1; optimizer.step()"),
    good=training(steps=300),
)
def loss_diverges(history: History) -> Iterator[Found]:
    """The median of 20 losses is twice the lowest mean of 20, and a quarter of what was gained is lost."""
    if len(history.losses) < 60 or len(history.optimizers) > 1:
        return
    parts = [part for part in windows(history, 20) if len(part) == 20 and all(map(math.isfinite, part))]
    if len(parts) < 3:
        return
    lowest, now = min(mean(part) for part in parts[:-1]), median(parts[-1])
    gained = mean(history.start) - lowest
    # Most of the last losses are above: no single batch did it.
    if lowest > 0 and now > 2 * lowest and now - lowest > 0.25 * abs(gained) and sorted(parts[-1])[4] > lowest:
        yield Found(f"the median of the last 20 losses is {now:.4g}; the mean of 20 was {lowest:.4g} before")


# ---- validation


@rule(
    "W10",
    "overfitting",
    "warning",
    when="watch",
    title="The validation loss rises while the training loss falls",
    why="The model learns the training data by heart; from here on it gets worse on everything else.",
    fix="Keep the weights of the best validation (early stopping); more data or augmentation, weight decay, dropout.",
    source="SageMaker Debugger's Overfit takes a ratio above 0.1; that the validation loss must rise three times, and "
    "by a twentieth, is ours: calibrated on the clean programs of tests/diagnose",
    bad=evaluated(
        seen=64,
        labels="y[::3] = torch.randint(3, y[::3].shape)",
        optimizer="torch.optim.Adam(model.parameters(), 0.01)",
    ),
    good=evaluated(),
)
def overfitting(history: History) -> Iterator[Found]:
    """Above training by a tenth, risen three times running, 5% above the best, 40 steps ago; training gained."""
    found = [one for one in history.validations if math.isfinite(one.loss) and math.isfinite(one.training)]
    if len(found) < 5 or sum(map(math.prod, history.sizes.values())) < BY_HEART:
        return
    recent = found[-4:]
    best = min(found, key=lambda one: one.loss)
    rises = all(later.loss > earlier.loss for earlier, later in pairwise(recent))
    above = recent[-1].loss > recent[-1].training + 0.1 * abs(recent[-1].training)
    worse = recent[-1].loss > best.loss + 0.05 * abs(best.loss)
    apart = recent[-1].step - best.step >= WINDOW  # else the training losses are those of the same steps
    if rises and above and worse and apart and recent[-1].training < best.training:
        yield Found(
            f"the validation loss rose from {best.loss:.4g} in step {best.step} to {recent[-1].loss:.4g}, the training "
            f"loss fell from {best.training:.4g} to {recent[-1].training:.4g}"
        )


@rule(
    "W11",
    "no-more-gain",
    "info",
    when="watch",
    title="Neither validation nor training gains any more",
    why="Training longer as it is costs time and changes nothing.",
    fix="Stop, or lower the learning rate (torch.optim.lr_scheduler.ReduceLROnPlateau).",
    source="10 validations and 0.001 are usual settings of early stopping",
    bad=evaluated(model="model = nn.Linear(8, 3)", labels="y[::2] = torch.randint(3, y[::2].shape)", steps=900).replace(
        "lr=0.003", "lr=0.03"
    ),
    good=evaluated(),
)
def no_more_gain(history: History) -> Iterator[Found]:
    """The best of the last 10 validations is no better than the best before, and training gained less than 1%."""
    found = [one for one in history.validations if math.isfinite(one.loss)]
    if len(found) < 15:
        return
    before, last = found[:-10], found[-10:]
    best = min(one.loss for one in before)
    gained = best - min(one.loss for one in last)
    trained = last[0].training - last[-1].training
    if gained < 1e-3 * abs(best) and trained < 0.01 * abs(last[0].training):
        yield Found(
            f"the best validation loss is {best:.4g}, of 10 validations ago; training went from {last[0].training:.4g} "
            f"to {last[-1].training:.4g} since"
        )


UNLIKE = """
model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32, momentum={}), nn.ReLU(), nn.Linear(32, 3))
x += 10
""".strip()


@rule(
    "W15",
    "evaluation-differs",
    "warning",
    when="watch",
    title="Validation is far worse than training, and running statistics are to blame",
    why="In evaluation batch norms use running statistics. Where those are not the ones of the data, the model that is "
    "validated is not the one that was trained, however well that does.",
    fix="Use a momentum of 0.1 (torch's is the share of the new batch: 1 - that of TensorFlow), or recalibrate before "
    "each validation: torch.optim.swa_utils.update_bn(loader, model); with small batches, a group norm.",
    source="TheDeepChecker compares the same batch in both modes; here the distance of running and batch statistics is "
    "the confirmation: calibrated on the clean programs of tests/diagnose",
    bad=evaluated(model=UNLIKE.format("0.001"), steps=200),
    good=evaluated(model=UNLIKE.format("0.1"), steps=200),
)
def evaluation_differs(history: History) -> Iterator[Found]:
    """Validation losses 1.5 times those of training, twice, and batch norms whose running statistics are apart."""
    found = [one for one in history.validations[-2:] if one.training > 0 and one.loss > 1.5 * one.training]
    if len(found) < 2 or found[-1].loss - found[-1].training < 0.05 * abs(mean(history.start)):
        return
    off = {
        name: samples[-1]
        for name, samples in seen(history, ("batch_norm", "norm"), 2)
        if all(map(apart, samples)) and not samples[-1]["frozen"]
    }
    if off:
        name = max(off, key=lambda one: off[one]["mean"])
        yield Found(
            f"the validation loss is {found[-1].loss:.4g}, that of training {found[-1].training:.4g}, and running and "
            f"batch statistics of {listed(off)} are apart: of {name} {distance(off[name])}",
            module=name,
        )


CORRELATED = """
x = torch.randn(2000, 8)
y = x[:, :1] + 0.5 * torch.randn(2000, 1)
{quiet}
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
with rn.watch(model, optimizer, on_error="silent") as w:
    for step in range(300):
        i = torch.randint(1000, (64,))
        optimizer.zero_grad()
        outputs = model(x[i])
        loss = F.mse_loss(outputs, y[i])
        loss.backward()
        optimizer.step()
        w.step(loss, outputs, y[i])
        if step % 20 == 19:
            with torch.no_grad():
                outputs = model(x[1000:])
                w.validate(F.mse_loss(outputs, y[1000:]), outputs, y[1000:])
report = w.report
"""


@rule(
    "W22",
    "validation-below-training",
    "info",
    when="watch",
    title="The validation loss is below the training loss",
    why="It is no proof of a better fit. Dropout, augmentation and regularizing terms make only the training loss "
    "larger; and a squared error is small where the targets vary little, however badly it follows them.",
    fix="Compare both losses on the same data in evaluation mode. For a regression look at the error over the variance "
    "of the targets (1 - R²) and at the correlation, and pass both to watch: w.validate(loss, outputs, targets).",
    source="mean squared error = variance of the targets + variance and squared shift of the outputs - twice their "
    "covariance; 0.8 is ours: calibrated on the clean programs of tests/diagnose",
    bad=CORRELATED.format(quiet="x[1000:] *= 0.3\ny[1000:] = x[1000:, :1] + 0.3 * torch.randn(1000, 1)"),
    good=CORRELATED.format(quiet=""),
)
def validation_below_training(history: History) -> Iterator[Found]:
    """Below 0.8 times training in 3 validations running; a warning where outputs follow the targets worse all the "
    "same."""
    recent = [one for one in history.validations[-3:] if one.training > 0 and 0 <= one.loss < 0.8 * one.training]
    if len(recent) < 3 or recent[-1].training < 0.85 * recent[0].training:  # means over some steps lag behind
        return
    if recent[-1].training - recent[-1].loss < 0.05 * abs(mean(history.start)):
        return
    head = f"the validation loss is {recent[-1].loss:.4g}, that of training {recent[-1].training:.4g}"
    there = [fit for fit in history.fits if not fit.validation and fit.step >= recent[0].step - SETTLED]
    here = [fit for fit in history.fits if fit.validation][-3:]
    if there and len(here) == 3 and all(math.isfinite(fit.correlation) for fit in (*there, *here)):
        trained, checked = averaged(there), averaged(here)
        if checked.correlation < trained.correlation - 0.05:
            yield Found(
                f"{head}, yet outputs follow the targets worse: correlation {checked.correlation:.3f} against "
                f"{trained.correlation:.3f}. {explained(trained, checked)}",
                severity="warning",
            )
            return
        yield Found(f"{head}. {explained(trained, checked)}")
        return
    dropouts = [name for name, module in history.model.named_modules() if kind_of_module(module) == "dropout"]
    active = [name for name in dropouts if getattr(history.model.get_submodule(name), "p", 0) > 0]
    norms = [name for name, m in history.model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    reason = f"{listed(active)} drop values only in training" if active else "augmentation or regularizing terms do it"
    if norms and not active:
        reason += ", as do the batch statistics of small batches"
    yield Found(f"{head}: {reason}")


def averaged(fits: list[Fit]) -> Fit:
    """The means of several."""
    names = ("error", "variance", "spread", "shift", "correlation")
    return Fit(fits[-1].step, fits[-1].validation, *(mean([getattr(fit, name) for fit in fits]) for name in names))


def explained(trained: Fit, checked: Fit) -> str:
    """What makes the error smaller, in words: variance, level or shape."""
    if not (checked.variance > 0 and trained.variance > 0):
        return "The targets are constant"
    text = (
        f"The variance of the targets is {checked.variance:.3g} in validation and {trained.variance:.3g} in training; "
        f"{checked.error / checked.variance:.2f} and {trained.error / trained.variance:.2f} of it is left as error"
    )
    if abs(checked.shift) > 0.1 * math.sqrt(checked.error):
        text += f"; the outputs are off by {checked.shift:+.3g} on average"
    return text
