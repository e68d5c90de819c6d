"""Small batches hurt batch norm, not group norm (Wu & He 2018)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import optim

from renorm.choices.models import build
from renorm.studies.picture import Plot, draw, points
from renorm.studies.replication import Claim, Plan, Published, Replication, Table
from renorm.studies.rows import Condition, Rows, Value, percent, percent_points
from renorm.studies.training import accuracy, digits, fit, mnist, reestimate, shuffled

_SIZES = (32, 8, 4, 2)
_NORMS = {"batch": "batch norm", "group(32)": "group norm, 32 groups"}
_DATA = {"digits": "digits, MLP", "mnist": "MNIST, MLP"}
_RATE = 0.1  # learning rate at 32 samples; it goes with the batch size


def measure(condition: Condition, seed: int) -> Mapping[str, Value]:
    """Errors of a model trained with one batch size."""
    images = (digits if condition["data"] == "digits" else mnist)(seed).standardized()
    batch_size, model_name = int(condition["batch_size"]), str(condition["model"])
    model = build(model_name, images.x_train.shape[1:], 10, norm=str(condition["norm"]))
    optimizer = optim.SGD(model.parameters(), lr=_RATE * batch_size / 32)
    fit(model, images, shuffled(len(images.x_train), batch_size, int(condition["epochs"])), optimizer)
    found = {
        "test_error": 1 - accuracy(model, images.x_test, images.y_test),
        "train_error": 1 - accuracy(model, images.x_train, images.y_train),
    }
    if condition["norm"] == "batch":
        reestimate(model, images.x_train)
        found["reestimated_error"] = 1 - accuracy(model, images.x_test, images.y_test)
    return found


def judge(rows: Rows) -> tuple[Claim, ...]:
    """Three claims for each data set that the MLP was trained on."""
    return tuple(claim for data in rows.where(model="mlp").levels("data") for claim in _judge(rows, str(data)))


def _judge(rows: Rows, data: str) -> tuple[Claim, ...]:
    where = {"data": data, "model": "mlp"}
    lost = {
        norm: rows.difference(
            "test_error", {**where, "norm": norm, "batch_size": 2}, {**where, "norm": norm, "batch_size": 32}
        )
        for norm in _NORMS
    }
    at_32 = [rows.mean("test_error", **where, norm=norm, batch_size=32) for norm in _NORMS]
    title = _DATA[data]
    return (
        Claim(
            f"{title}: batch norm's test error at 2 is at least 10 points above that at 32",
            percent_points(lost["batch"]),
            lost["batch"].mean >= 0.10,
        ),
        Claim(
            f"{title}: group norm's differs by at most 1.5 points",
            percent_points(lost["group(32)"]),
            abs(lost["group(32)"].mean) <= 0.015,
        ),
        Claim(
            f"{title}: at 32, batch norm's is at most group norm's",
            " against ".join(percent(one) for one in at_32),
            at_32[0].mean <= at_32[1].mean,
        ),
    )


def tables(rows: Rows) -> tuple[Table, ...]:
    """Errors by batch size."""
    lines = []
    for where in ({"data": data, "model": model} for model in ("mlp", "resnet") for data in _DATA):
        for size in rows.where(**where).levels("batch_size"):
            at = {**where, "batch_size": size}
            shown = [
                percent(rows.mean(name, **at, norm=norm)) if rows.where(**at, norm=norm).rows else ""
                for norm, name in (
                    ("batch", "test_error"),
                    ("batch", "train_error"),
                    ("batch", "reestimated_error"),
                    ("group(32)", "test_error"),
                )
            ]
            title = _DATA[where["data"]] if where["model"] == "mlp" else "digits, ResNet"
            lines.append((title, str(size), *shown))
    head = ("data, model", "batch size", "BN, test", "BN, training", "BN, statistics of all training data", "GN, test")
    return (Table("Error", head, tuple(lines)),)


def draw_rows(rows: Rows) -> str:
    """Test error against batch size."""
    plots = []
    for data in rows.where(model="mlp").levels("data"):
        where = {"data": data, "model": "mlp"}
        curves = {
            title: points(
                [math.log2(size) for size in _SIZES],
                [rows.mean("test_error", **where, norm=norm, batch_size=size) for size in _SIZES],
            )
            for norm, title in _NORMS.items()
        }
        plots.append(Plot(f"{_DATA[str(data)]}: test error, log2 batch size", curves))
    return draw(plots, "Batch norm's error rises steeply below 4 samples, group norm's does not")


def reading(rows: Rows) -> str:
    """What follows."""
    where = {"data": "digits", "model": "mlp", "norm": "batch", "batch_size": 2}
    train, all_data = (rows.mean(name, **where) for name in ("train_error", "reestimated_error"))
    said = (
        "In an MLP two samples a batch are two values for each channel: standardized, they are +1 and -1 whatever "
        "they were, and all that is left of a sample is the order of the two. It is no matter of evaluation alone: on "
        f"the digits at 2, the training error is {percent(train)}, and with statistics of all training data in place "
        f"of the running ones the test error is {percent(all_data)}. `renorm check` warns below 8 values for each "
        "channel, and remarks on fewer than 16."
    )
    if not (net := rows.where(model="resnet")).rows:
        return said
    small, large = (net.mean("test_error", batch_size=size) for size in (2, 32))
    return (
        f"{said}\n\n**Counter-example**: a small ResNet on the digits has an error of {percent(small)} at 2 and "
        f"{percent(large)} at 32. Its first channels have 64 positions in each image, so that two samples are over a "
        "hundred values, and it has skips. Which of these saves it was not tested. That there are many values is not "
        "enough: the published ResNet-50 has more, and does lose at 2."
    )


def _conditions(data: tuple[str, ...], epochs: int) -> tuple[Condition, ...]:
    return tuple(
        {"data": one, "model": "mlp", "norm": norm, "batch_size": size, "epochs": epochs}
        for one in data
        for size in _SIZES
        for norm in _NORMS
    )


_RESNET: tuple[Condition, ...] = tuple(
    {"data": "digits", "model": "resnet", "norm": "batch", "batch_size": size, "epochs": 5} for size in (32, 2)
)

REPLICATION = Replication(
    name="small-batches",
    title="Small batches hurt batch norm, not group norm",
    question="How small may a batch be for batch norm, and does group norm mind?",
    published=(
        Published(
            "ResNet-50 on ImageNet, validation error at 32, 16, 8, 4 and 2 images for each worker: batch norm 23.6, "
            "23.7, 24.8, 27.3 and 34.7%, group norm 24.1, 24.2, 24.0, 24.2 and 24.1%",
            "Wu & He 2018, Group Normalization, arXiv:1803.08494, table 2",
        ),
    ),
    protocol=(
        "`mlp` of `renorm.choices.models` (3 x 128, ReLU) is trained with plain SGD and a learning rate of 0.1 B/32 "
        "for equally many epochs at each batch size B. The seed decides the split, the initial weights and the order. "
        "Statistics of all training data: the trained weights, with the running statistics set to those of one pass "
        "over the whole training part. The ResNet of the counter-example, `resnet` of `renorm.choices.models`, has "
        "stages of 32, 64 and 128 channels, and is trained in the same way."
    ),
    quick=Plan(
        (*_conditions(("digits",), 20), *_RESNET),
        3,
        "scikit-learn's digits (1,297 to train on), 20 epochs; a ResNet on them, 5 epochs; 3 seeds",
    ),
    minutes=2,
    full=Plan(
        (*_conditions(("digits", "mnist"), 20), *_RESNET),
        3,
        "the same with 3,000 images of MNIST besides (with `renorm[studies]`), 3 seeds",
    ),
    measure=measure,
    judge=judge,
    tables=tables,
    draw=draw_rows,
    reading=reading,
)
