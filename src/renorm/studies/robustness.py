"""Batch norm and adversarial attack (Galloway et al. 2019, Benz et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

from renorm.choices.models import build
from renorm.studies.picture import Plot, draw, points
from renorm.studies.replication import Claim, Plan, Published, Replication, Table
from renorm.studies.rows import Condition, Rows, Value, percent, percent_points
from renorm.studies.training import accuracy, fit, mnist, shuffled

_NORMS = {
    "none": "no norm",
    "batch": "batch norm",
    "group(8)": "group norm, 8 groups",
    "layer": "layer norm",
    "instance": "instance norm",
}
_RATES = (0.01, 0.03, 0.06)
_EPS = {"0.025": 0.025, "0.05": 0.05, "0.1": 0.1}  # largest change of a pixel, of which white is 1
_JUDGED = "0.1"


def measure(condition: Condition, seed: int) -> Mapping[str, Value]:
    """Accuracy on clean and on attacked test images."""
    pixels = mnist(seed).halved()
    images = pixels.standardized()
    mean, std = pixels.x_train.mean().item(), pixels.x_train.std().item()
    model = build("cnn", images.x_train.shape[1:], 10, norm=str(condition["norm"]))
    optimizer = optim.SGD(model.parameters(), lr=float(condition["lr"]), momentum=0.9)
    fit(model, images, shuffled(len(images.x_train), 32, int(condition["epochs"])), optimizer)
    found: dict[str, Value] = {"clean": accuracy(model, images.x_test, images.y_test)}
    num = int(condition["attacked"])
    x, y = images.x_test[:num], images.y_test[:num]
    for name, eps in _EPS.items():
        attacked = pgd(model, x, y, eps / std, steps=int(condition["steps"]), low=-mean / std, high=(1 - mean) / std)
        found[name] = accuracy(model, attacked, y)
    return found


def pgd(model: nn.Module, x: Tensor, y: Tensor, eps: float, *, steps: int, low: float, high: float) -> Tensor:
    """Images within eps of x in every pixel, and within [low, high], on which the loss is large.

    Projected gradient ascent from a random start (Madry et al. 2018, arXiv:1706.06083), in evaluation mode, with steps
    of 2.5 eps / steps along the sign of the gradient.
    """
    model.eval()
    least, most = (x - eps).clamp(min=low), (x + eps).clamp(max=high)
    attacked = least + (most - least) * torch.rand_like(x)
    for _ in range(steps):
        attacked.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(attacked), y), attacked)
        attacked = attacked.detach() + 2.5 * eps / steps * gradient.sign()
        attacked = torch.minimum(torch.maximum(attacked, least), most)
    return attacked


def matched(rows: Rows) -> dict[str, float]:
    """The learning rate of each norm: without one, the best; else that with the clean accuracy nearest to it."""
    rates = [float(rate) for rate in rows.levels("lr")]
    clean = {(norm, rate): rows.mean("clean", norm=norm, lr=rate).mean for norm in _NORMS for rate in rates}
    target = max(value for (norm, _), value in clean.items() if norm == "none")
    return {norm: min(rates, key=lambda rate: abs(clean[norm, rate] - target)) for norm in _NORMS}


def judge(rows: Rows) -> tuple[Claim, ...]:
    """That clean accuracies agree, and what batch norm costs under attack."""
    rates = matched(rows)
    none, batch = ({"norm": norm, "lr": rates[norm]} for norm in ("none", "batch"))
    gap = rows.difference("clean", none, batch)
    lost = rows.difference(_JUDGED, none, batch)
    return (
        Claim(
            "at the matched learning rates, clean accuracy with and without batch norm differs by at most 2 points",
            percent_points(gap),
            abs(gap.mean) <= 0.02,
        ),
        Claim(
            f"under attack with eps {_JUDGED}, accuracy without a norm is at least 10 points higher",
            percent_points(lost),
            lost.mean >= 0.10,
        ),
    )


def tables(rows: Rows) -> tuple[Table, ...]:
    """Accuracies at the matched learning rates, and at all of them."""
    rates = matched(rows)
    lines = tuple((title, f"{rates[norm]:g}", *_cells(rows, norm, rates[norm])) for norm, title in _NORMS.items())
    every = tuple(
        (title, f"{rate:g}", *_cells(rows, norm, float(rate)))
        for norm, title in _NORMS.items()
        for rate in rows.levels("lr")
    )
    head = ("norm", "learning rate", "clean", *(f"eps {name}" for name in _EPS))
    return (
        Table("Test accuracy at the learning rates with like clean accuracy", head, lines),
        Table("Test accuracy at all learning rates", head, every),
    )


def _cells(rows: Rows, norm: str, rate: float) -> tuple[str, ...]:
    return tuple(percent(rows.mean(name, norm=norm, lr=rate)) for name in ("clean", *_EPS))


def draw_rows(rows: Rows) -> str:
    """Accuracy against the strength of the attack, and clean against attacked accuracy."""
    strength = {
        title: points(
            [0.0, *_EPS.values()],
            [rows.mean(name, norm=norm, lr=matched(rows)[norm]) for name in ("clean", *_EPS)],
        )
        for norm, title in _NORMS.items()
    }
    plane = {
        title: sorted(
            (rows.mean("clean", norm=norm, lr=rate).mean, rows.mean("0.05", norm=norm, lr=rate).mean)
            for rate in rows.levels("lr")
        )
        for norm, title in _NORMS.items()
    }
    return draw(
        [Plot("accuracy by eps, matched rates", strength), Plot("accuracy at eps 0.05 by clean accuracy", plane)],
        "Accuracy falls faster under attack with a norm than without",
    )


def reading(rows: Rows) -> str:
    """What follows."""
    rates = matched(rows)
    found = {norm: rows.mean(_JUDGED, norm=norm, lr=rates[norm]) for norm in _NORMS}
    others = ", ".join(f"{title} {percent(found[norm])}" for norm, title in _NORMS.items() if norm != "batch")
    return (
        f"At like clean accuracy and eps {_JUDGED}, batch norm leaves {percent(found['batch'])}; {others}. So it is "
        "not normalizing as such that costs here: it is batch norm above all. That other norms hurt as well (Benz et "
        "al.) is not judged; compare their intervals with that without a norm.\n\nA gradient attack from one start is "
        "a lower bound of what an attacker can do, and differs in strength by how smooth a net is. A norm is no "
        "defence: whoever needs robustness trains on attacked images."
    )


def _conditions(epochs: int, attacked: int, steps: int) -> tuple[Condition, ...]:
    return tuple(
        {"norm": norm, "lr": rate, "epochs": epochs, "attacked": attacked, "steps": steps}
        for norm in _NORMS
        for rate in _RATES
    )


REPLICATION = Replication(
    name="robustness",
    title="Batch norm and adversarial attack",
    question="Is a network with batch norm easier to fool, and are other norms better?",
    published=(
        Published(
            "Batch norm reduces the robustness to small adversarial changes of the input by double-digit percentages, "
            "on five data sets",
            "Galloway et al. 2019, Batch Normalization is a Cause of Adversarial Vulnerability, arXiv:1905.02161, "
            "abstract",
        ),
        Published(
            "Other norms make networks more vulnerable, too",
            "Benz et al. 2021, Batch Normalization Increases Adversarial Vulnerability and Decreases Adversarial "
            "Transferability, arXiv:2010.03316",
        ),
    ),
    protocol=(
        "`cnn` of `renorm.choices.models` on MNIST at half its resolution (14 x 14), SGD with momentum 0.9, batches "
        "of 32, three learning rates. Robustness changes with training as well, so that norms are compared at like "
        "clean accuracy: without a norm the best learning rate is taken, with each norm the one whose mean clean "
        "accuracy is nearest to that. The attack is projected gradient ascent (PGD) on the loss in evaluation mode, "
        "from a random start, within eps of each pixel (white is 1); accuracy under attack is of the first test "
        "images."
    ),
    quick=Plan(
        _conditions(3, 300, 10), 3, "3,000 images (with `renorm[studies]`), 3 epochs, 10 steps on 300 images, 3 seeds"
    ),
    minutes=2,
    full=Plan(_conditions(6, 1000, 40), 5, "the same with 6 epochs, 40 steps on 1,000 images, 5 seeds"),
    measure=measure,
    judge=judge,
    tables=tables,
    draw=draw_rows,
    reading=reading,
)
