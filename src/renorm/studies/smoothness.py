"""Batch norm smooths the loss and widens the range of learning rates (Santurkar et al. 2018)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn, optim

from renorm.measures import smoothness as measures
from renorm.norms import named
from renorm.studies.picture import Plot, draw, points
from renorm.studies.replication import Claim, Plan, Published, Replication, Table
from renorm.studies.rows import Condition, Rows, Value, percent, percent_points
from renorm.studies.training import accuracy, fit, mnist, shuffled

_NORMS = {"none": "no norm", "batch": "batch norm"}
_RATES = (0.03, 0.1, 0.3, 1.0, 3.0)
_LOOKED_AT = 0.1  # the learning rate at which smoothness is measured: the largest that both can use
_EVERY = 8  # steps between two measurements
_USABLE = 0.9  # of the accuracy at a net's best rate
_MEASURES = {"beta": "effective beta", "change": "change of the gradient", "range": "range of the loss"}


def measure(condition: Condition, seed: int) -> Mapping[str, Value]:
    """Accuracy after training; at one learning rate, what each measured step said of the loss."""
    images = mnist(seed).halved().standardized()
    rate, norm = float(condition["lr"]), str(condition["norm"])
    model = plain_net(norm)
    found: list[measures.Smoothness] = []

    def look(step: int, x: Tensor, y: Tensor) -> None:
        if step % _EVERY == 0:
            found.append(measures.smoothness(model, lambda: F.cross_entropy(model(x), y), lr=rate))

    epochs = int(condition["epochs"])
    batches = shuffled(len(images.x_train), 64, epochs)
    optimizer = optim.SGD(model.parameters(), lr=rate)
    fit(model, images, batches, optimizer, *([look] if rate == _LOOKED_AT else []))
    end: dict[str, Value] = {"accuracy": accuracy(model, images.x_test, images.y_test)}
    if not found:
        return end
    missed = -(-epochs * (len(images.x_train) // 64) // _EVERY) - len(found)  # a loss that is not finite ends it
    curves = {
        "beta": [one.beta for one in found],
        "change": [one.gradient_range[1] for one in found],
        "range": [one.loss_range[1] - one.loss_range[0] for one in found],
    }
    for name, curve in curves.items():
        end[name] = curve + [math.nan] * missed
        end[f"{name}_median"] = float(np.nanmedian(curve))
    return end


def plain_net(norm: str) -> nn.Module:
    """Eight 3x3 convolutions in a row, without skips: each with a norm and ReLU, the weights as He et al. 2015 draw."""
    layers: list[nn.Module] = []
    width = 1
    for index, channels in enumerate((16, 16, 16, 32, 32, 32, 32, 32)):
        conv = nn.Conv2d(width, channels, 3, padding=1, stride=2 if index in (3, 6) else 1)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        layers += [conv, named.build(norm, channels), nn.ReLU()]
        width = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def judge(rows: Rows) -> tuple[Claim, ...]:
    """Three medians, the learning rates that can be used, and the best accuracy."""
    claims = []
    for name, title in _MEASURES.items():
        ratio = rows.ratio(f"{name}_median", {"norm": "none", "lr": _LOOKED_AT}, {"norm": "batch", "lr": _LOOKED_AT})
        claims.append(
            Claim(
                f"{title}, median over training: at least 1.5 times lower with batch norm",
                f"{ratio.text(1)} times",
                ratio.mean >= 1.5,
            )
        )
    without, with_norm = (max(usable(rows, norm)) for norm in _NORMS)
    best = [rows.mean("accuracy", norm=norm, lr=_best(rows, norm)) for norm in _NORMS]
    gap = rows.difference(
        "accuracy", {"norm": "batch", "lr": _best(rows, "batch")}, {"norm": "none", "lr": _best(rows, "none")}
    )
    return (
        *claims,
        Claim(
            "the largest usable learning rate is at least 3 times larger with batch norm",
            f"{with_norm:g} against {without:g}",
            with_norm >= 3 * without,
        ),
        Claim(
            "the final accuracy is about the same: at its own best learning rate each, at most 2 points apart",
            f"{percent(best[1])} with batch norm, {percent(best[0])} without; {percent_points(gap)} apart",
            abs(gap.mean) <= 0.02,
        ),
    )


def usable(rows: Rows, norm: str) -> list[float]:
    """The learning rates with at least 90% of the mean accuracy at the best one."""
    best = rows.mean("accuracy", norm=norm, lr=_best(rows, norm)).mean
    return [rate for rate in _rates(rows) if rows.mean("accuracy", norm=norm, lr=rate).mean >= _USABLE * best]


def _best(rows: Rows, norm: str) -> float:
    return max(_rates(rows), key=lambda rate: rows.mean("accuracy", norm=norm, lr=rate).mean)


def _rates(rows: Rows) -> list[float]:
    return sorted(float(rate) for rate in rows.levels("lr"))


def tables(rows: Rows) -> tuple[Table, ...]:
    """Accuracy by learning rate, and the medians."""
    lines = tuple(
        (f"{rate:g}", *(percent(rows.mean("accuracy", norm=norm, lr=rate)) for norm in _NORMS)) for rate in _rates(rows)
    )
    medians = tuple(
        (title, *(rows.mean(f"{name}_median", norm=norm, lr=_LOOKED_AT).text(2) for norm in _NORMS))
        for name, title in _MEASURES.items()
    )
    return (
        Table("Test accuracy", ("learning rate", *_NORMS.values()), lines),
        Table(f"Medians over training at learning rate {_LOOKED_AT:g}", ("", *_NORMS.values()), medians),
    )


def draw_rows(rows: Rows) -> str:
    """The measures along training, and accuracy against the learning rate."""
    plots = []
    for name, title in _MEASURES.items():
        curves = {}
        for norm, label in _NORMS.items():
            values = np.nanmedian(rows.values(name, norm=norm, lr=_LOOKED_AT), axis=0)
            curves[label] = [(_EVERY * index, float(value)) for index, value in enumerate(values)]
        plots.append(Plot(f"{title}, log10, by step", curves, log_y=True))
    rates = _rates(rows)
    accuracies = {
        title: points(rates, [rows.mean("accuracy", norm=norm, lr=rate) for rate in rates])
        for norm, title in _NORMS.items()
    }
    plots.append(Plot("accuracy by log10 learning rate", accuracies, log_x=True))
    return draw(plots, "Batch norm lowers all three measures and allows larger learning rates")


def reading(rows: Rows) -> str:
    """What follows."""
    without, with_norm = (rows.mean("accuracy", norm=norm, lr=_best(rows, norm)) for norm in _NORMS)
    return (
        "Batch norm makes this net easier to train, in both senses: along the gradient loss and gradient change less, "
        "and learning rates work that without a norm end in chance or in infinity.\n\nThat a norm does not change the "
        "final accuracy is a claim of its own, and not the paper's: it reports better generalization with batch norm. "
        f"Here, at the best rates, it is {percent(without)} without a norm and "
        f"{percent(with_norm)} with one; in eight convolutions without skips a norm has most to do."
    )


def _conditions(rates: tuple[float, ...], epochs: int) -> tuple[Condition, ...]:
    return tuple({"norm": norm, "lr": rate, "epochs": epochs} for rate in rates for norm in _NORMS)


REPLICATION = Replication(
    name="smoothness",
    title="Batch norm smooths the loss and widens the range of learning rates",
    question="Does batch norm make the loss smoother, and is the final accuracy the same?",
    published=(
        Published(
            "Along the gradient, the loss varies less with batch norm, the gradient changes less, and the effective "
            "beta-smoothness is lower; it is this that lets training be fast and stable, not less internal covariate "
            "shift",
            "Santurkar et al. 2018, How Does Batch Normalization Help Optimization?, arXiv:1805.11604",
        ),
    ),
    protocol=(
        "Eight 3x3 convolutions of 16 and 32 channels in a row, without skips, so that the net without a norm has "
        "work to do; He initialization, ReLU, global mean, a linear layer. MNIST at half its resolution (14 x 14), "
        "batches of 64, plain SGD. Every 8 steps at learning rate 0.1, `renorm.measures.smoothness` takes steps of "
        "1/2 to 4 times that rate along the gradient of the batch: the width of the range of the losses, the largest "
        "change of the gradient, and the largest change for a unit of distance (beta). A learning rate is usable "
        "where the mean test accuracy is at least 90% of that at the net's best rate. Curves are medians over seeds."
    ),
    quick=Plan(_conditions(_RATES, 4), 3, "3,000 images (with `renorm[studies]`), 4 epochs, 5 learning rates, 3 seeds"),
    minutes=2,
    full=Plan(_conditions(_RATES, 12), 3, "the same with 12 epochs"),
    measure=measure,
    judge=judge,
    tables=tables,
    draw=draw_rows,
    reading=reading,
)
