"""Switchable norm's weights against the batch size (Luo et al. 2018)."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping

from torch import optim

from renorm.choices.models import build
from renorm.norms.zoo import SwitchNorm
from renorm.studies.picture import Plot, draw, points
from renorm.studies.replication import Claim, Plan, Published, Replication, Table
from renorm.studies.rows import Condition, Rows, Value, percent
from renorm.studies.training import accuracy, digits, fit, shuffled

_SIZES = (32, 8, 2)
_PARTITIONS = ("instance", "layer", "batch")
_MOMENTS = {"mean": "mean", "var": "variance"}
_ARMS = {"epochs": "equal epochs", "steps": "equal steps"}
_RATES = {"epochs": 0.05, "steps": 0.02}  # learning rate; of equal epochs at 32 samples, it goes with the batch size


def measure(condition: Condition, seed: int) -> Mapping[str, Value]:
    """The weights after training, as means over the layers, and the accuracy."""
    images = digits(seed).standardized()
    arm, batch_size, length = str(condition["equal"]), int(condition["batch_size"]), int(condition["length"])
    model = build("cnn", images.x_train.shape[1:], 10, norm="switch")
    rate = _RATES[arm] * (batch_size / 32 if arm == "epochs" else 1)
    steps = length * (len(images.x_train) // batch_size) if arm == "epochs" else length
    batches = itertools.islice(shuffled(len(images.x_train), batch_size, steps), steps)
    fit(model, images, batches, optim.SGD(model.parameters(), lr=rate, momentum=0.9))
    mixtures = [layer.mixture() for layer in model.modules() if isinstance(layer, SwitchNorm)]
    found: dict[str, Value] = {"test": accuracy(model, images.x_test, images.y_test)}
    for index, moment in enumerate(_MOMENTS):
        for name in _PARTITIONS:
            found[f"{moment}_{name}"] = statistics.fmean(one[name][index] for one in mixtures)
    return found


def judge(rows: Rows) -> tuple[Claim, ...]:
    """Whether batch norm's share falls with the batch size, to less than the third that it starts with."""
    claims = []
    for arm, title in _ARMS.items():
        for moment, of in _MOMENTS.items():
            shares = [rows.mean(f"{moment}_batch", equal=arm, batch_size=size) for size in _SIZES]
            falls = shares[0].mean > shares[1].mean > shares[2].mean
            claims.append(
                Claim(
                    f"{title}: batch statistics' share of the {of} falls from 32 over 8 to 2, there below 1/3",
                    ", ".join(one.text(3) for one in shares),
                    falls and shares[2].mean < 1 / 3,
                )
            )
    return tuple(claims)


def tables(rows: Rows) -> tuple[Table, ...]:
    """The weights by batch size, for each arm."""
    made = []
    for arm, title in _ARMS.items():
        lines = []
        for size in _SIZES:
            where = {"equal": arm, "batch_size": size}
            shares = (rows.mean(f"{m}_{name}", **where).text(2) for m in _MOMENTS for name in _PARTITIONS)
            lines.append((str(size), *shares, percent(rows.mean("test", **where))))
        head = ("batch size", *(f"{of}: {name}" for of in _MOMENTS.values() for name in _PARTITIONS), "test accuracy")
        made.append(Table(f"Weights, means over the layers, {title}", head, tuple(lines)))
    return tuple(made)


def draw_rows(rows: Rows) -> str:
    """The weights against the batch size."""
    x = [math.log2(size) for size in _SIZES]
    plots = []
    for arm, title in _ARMS.items():
        for moment, of in _MOMENTS.items():
            curves = {
                name: points(x, [rows.mean(f"{moment}_{name}", equal=arm, batch_size=size) for size in _SIZES])
                for name in _PARTITIONS
            }
            plots.append(Plot(f"{title}: weight in the {of}, log2 batch size", curves))
    return draw(plots, "The weight of batch statistics against the batch size")


def reading(rows: Rows) -> str:
    """What follows."""
    shares = {
        (arm, moment): [rows.mean(f"{moment}_batch", equal=arm, batch_size=size).text(2) for size in (32, 2)]
        for arm in _ARMS
        for moment in _MOMENTS
    }

    def change(arm: str, moment: str) -> str:
        return " at 32 and ".join(shares[arm, moment]) + " at 2"

    return (
        "With equal epochs a batch of 2 takes 16 times the steps of a batch of 32. The two arms tell how much of the "
        "fall is due to that. Batch statistics' share of the mean is "
        f"{change('epochs', 'mean')} with equal epochs, {change('steps', 'mean')} with equal steps; that of the "
        f"variance {change('epochs', 'var')}, and {change('steps', 'var')}.\n\n"
        "The weights are trained like all others: they are no ranking of norms, and no measure of how well each would "
        "do alone."
    )


def _conditions(epochs: int, steps: int) -> tuple[Condition, ...]:
    lengths = {"epochs": epochs, "steps": steps}
    return tuple({"equal": arm, "length": lengths[arm], "batch_size": size} for arm in _ARMS for size in _SIZES)


REPLICATION = Replication(
    name="switch-weights",
    title="Switchable norm's weights against the batch size",
    question="Which statistics does a norm choose that can choose, and does it depend on the batch size?",
    published=(
        Published(
            "The smaller the batch, the less weight the batch statistics have. ResNet-50 on ImageNet, top-1 accuracy "
            "from 32 to 2 images for each worker: batch norm from 76.4 to 65.3%, group norm 75.9 and 75.9%, "
            "switchable norm from 76.9 to 75.6%",
            "Luo et al. 2018, Differentiable Learning-to-Normalize via Switchable Normalization, arXiv:1806.10779",
        ),
    ),
    protocol=(
        "`cnn` of `renorm.choices.models` with `SwitchNorm` after each of its three convolutions, on scikit-learn's "
        "digits; SGD with momentum 0.9. Its weights begin at 1/3 each and are trained like all others; `mixture()` "
        "says what they are in the end. Equal epochs: the learning rate is 0.05 B/32 for batches of B. A small batch "
        "then takes more steps, so that the second arm has equally many steps at one learning rate, 0.02, for all."
    ),
    quick=Plan(_conditions(6, 600), 3, "6 epochs, 600 steps, 3 seeds"),
    minutes=2,
    full=Plan(_conditions(20, 2000), 6, "20 epochs, 2,000 steps, 6 seeds"),
    measure=measure,
    judge=judge,
    tables=tables,
    draw=draw_rows,
    reading=reading,
)
