"""Rules of `watch` about the classes that are predicted: one that is neglected, one that is the only one."""

from __future__ import annotations

import math
from collections.abc import Iterator

from renorm.diagnose.catalogue import Found, rule
from renorm.diagnose.history import Counts, History
from renorm.diagnose.rules.curves import WINDOW, mean, warms_up
from renorm.diagnose.rules.steps import SETTLED

PREDICTED = """
x = torch.randn(512, 8)
{labels}
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
{model}
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with rn.watch(model, optimizer, on_error="silent") as w:
    for step in range(400):
        i = torch.randint(512, (64,))
        optimizer.zero_grad()
        outputs = model(x[i])
        loss = F.cross_entropy(outputs, y[i])
        loss.backward()
        optimizer.step()
        w.step(loss, outputs, y[i])
report = w.report
"""
BALANCED = "y = x[:, :3].argmax(1)"


def counted(history: History, enough: int) -> Counts | None:
    """The last predictions in training, `enough` of them, behind the start; None before there are as many."""
    labels: list[int] = []
    predicted: list[int] = []
    right: list[int] = []
    spreads: list[float] = []
    for counts in reversed(history.counts):
        if counts.validation or counts.step < SETTLED or (labels and len(counts.labels) != len(labels)):
            continue
        spreads.append(counts.spread)
        labels = [a + b for a, b in zip(labels or [0] * len(counts.labels), counts.labels, strict=True)]
        predicted = [a + b for a, b in zip(predicted or [0] * len(counts.labels), counts.predicted, strict=True)]
        right = [a + b for a, b in zip(right or [0] * len(counts.labels), counts.right, strict=True)]
        if sum(labels) >= enough:
            return Counts(counts.step, False, tuple(labels), tuple(predicted), tuple(right), max(spreads))
    return None


@rule(
    "W12",
    "neglected-class",
    "warning",
    when="watch",
    title="A rare class is hardly ever recognized",
    why="The loss is a mean over samples: a class that is a twentieth of them is a twentieth of it, and the accuracy "
    "looks good without.",
    fix="Weight the loss, torch.nn.CrossEntropyLoss(weight=...), or draw rare classes more often, "
    "torch.utils.data.WeightedRandomSampler; look at the recall of each class.",
    source="SageMaker Debugger's ClassImbalance: a ratio of 10, a misprediction of 0.7; that the other classes must be "
    "recognized is ours: calibrated on the clean programs of tests/diagnose",
    bad=PREDICTED.format(labels="y = (x[:, 0] > 0).long(); y[::32] = 2", model=""),
    good=PREDICTED.format(labels=BALANCED, model=""),
)
def neglected_class(history: History) -> Iterator[Found]:
    """A tenth as frequent as another, its recall below 0.3 while 80% of all are right.

    Without that the ratio alone is told, as an info.
    """
    counts = counted(history, 500)
    if counts is None:
        return
    most, total = max(counts.labels), sum(counts.labels)
    rare = [k for k, number in enumerate(counts.labels) if 10 <= number < most / 10]
    missed = [k for k in rare if counts.right[k] < 0.3 * counts.labels[k]]
    if missed and sum(counts.right) > 0.8 * total:
        k = missed[0]
        yield Found(
            f"{counts.right[k]} of {counts.labels[k]} samples of class {k} are recognized, of all {sum(counts.right)} "
            f"of {total}; the most frequent class has {most}"
        )
    elif rare and len(counts.labels) <= 50:  # words are as they are
        yield Found(
            f"class {rare[0]} has {counts.labels[rare[0]]} of {total} labels, the most frequent {most}", severity="info"
        )


@rule(
    "W13",
    "one-class-predicted",
    "error",
    when="watch",
    title="The model predicts the same class for everything",
    why="It has learnt how frequent the classes are at most, and nothing about the inputs.",
    fix="Look for dead units, a learning rate that is too high, inputs and targets that do not belong together, or a "
    "last layer that does not learn.",
    source="a constant prediction with labels that vary: an error where the outputs themselves hardly do; 99% of 300, "
    "no label with more than 90%, and a loss not below the labels' entropy: calibrated on the clean programs of "
    "tests/diagnose",
    bad=PREDICTED.format(
        labels=BALANCED, model="model[0].bias.data.fill_(-9.0)  # no unit is above 0\nmodel[2].bias.data[1] = 0.5"
    ).replace("SGD(model.parameters(), lr=0.1)", "SGD(model.parameters(), lr=0.001)"),
    good=PREDICTED.format(labels=BALANCED, model=""),
)
def one_class_predicted(history: History) -> Iterator[Found]:
    """In the last 300 predictions behind the start; the loss is that of a guess or worse, and no longer falls."""
    counts = counted(history, 300)
    if counts is None or warms_up(history, SETTLED):
        return
    total = sum(counts.labels)
    if max(counts.labels) > 0.9 * total or max(counts.predicted) < 0.99 * total:
        return
    entropy = -sum(n / total * math.log(n / total) for n in counts.labels if n)
    losses, before = history.latest(2 * WINDOW), history.latest(4 * WINDOW)[: 2 * WINDOW]
    if len(before) < 2 * WINDOW or mean(losses) < 0.95 * entropy or mean(losses) < 0.995 * mean(before):
        return
    k = counts.predicted.index(max(counts.predicted))
    yield Found(
        f"class {k} is predicted for {counts.predicted[k]} of the last {total} samples; {counts.labels[k]} of them "
        f"have that label, and the loss, {mean(losses):.3g}, is not below that of guessing by frequency, {entropy:.3g}",
        severity=None if counts.spread < 0.01 else "warning",
    )
