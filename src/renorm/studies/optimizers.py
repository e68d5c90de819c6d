"""Optimizers on ravines, where the speed is known, and on real data."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn, optim

from renorm.choices import models, optimizers
from renorm.studies.picture import Plot, draw
from renorm.studies.replication import Claim, Plan, Published, Replication, Table
from renorm.studies.rows import Condition, Interval, Rows, Value, geometric, interval, percent
from renorm.studies.training import accuracy, digits, fit, shuffled

_CONDITION = 1000.0  # largest over smallest curvature, where contraction is measured
_STEEP = 100.0  # the same of the ravine that all optimizers go down
_STEPS, _CAP = 4000, 1000  # of the contraction; at most, on the ravine
_EXACT = {"gd": "gradient descent", "heavy ball": "heavy ball"}
_COORDINATE = ("adagrad", "rmsprop", "adam")  # these divide each coordinate by its own size
_RAVINE = ("sgd", "momentum", "nesterov", *_COORDINATE)
_TARGET = 0.2  # mean training loss of _WINDOW steps, on real data
_WINDOW = 20


def measure(condition: Condition, seed: int) -> Mapping[str, Value]:
    """One part of the study, as the condition says."""
    if condition["part"] == "contraction":
        return {"factor": contraction(str(condition["method"]), _CONDITION, seed)}
    name, rate = str(condition["optimizer"]), float(condition.get("lr", math.nan))
    if condition["part"] == "ravine":
        rates = _rates(-4, 2)
        return {"steps": [ravine(name, one, bool(condition["rotated"]), seed) for one in rates], "rates": rates}
    images = digits(seed).standardized()
    model = models.build("mlp", images.x_train.shape[1:], 10, norm="none")
    optimizer = optimizers.build(name, model.parameters(), rate)
    losses = fit(model, images, shuffled(len(images.x_train), 32, int(condition["epochs"])), optimizer)
    mean = np.convolve(losses, np.full(_WINDOW, 1 / _WINDOW), "valid")
    reached = np.flatnonzero(mean < _TARGET)
    return {
        "steps": float(reached[0] + _WINDOW) if len(reached) else math.inf,
        "loss": float(mean[-1]) if len(mean) else math.inf,
        "test": accuracy(model, images.x_test, images.y_test),
    }


def best_settings(method: str, condition: float) -> tuple[float, float, float]:
    """Learning rate and momentum that are best for curvatures from 1 to `condition`, and the factor they give.

    B. T. Polyak 1964: gradient descent contracts by (k - 1) / (k + 1) a step, heavy ball by the same of sqrt(k).
    """
    root = math.sqrt(condition)
    if method == "gd":
        return 2 / (condition + 1), 0.0, (condition - 1) / (condition + 1)
    return 4 / (root + 1) ** 2, ((root - 1) / (root + 1)) ** 2, (root - 1) / (root + 1)


def contraction(method: str, condition: float, seed: int) -> float:
    """By what the distance to the minimum shrinks in a step of torch's SGD with the best settings.

    The second half of the steps counts. Of the heavy ball's k-th step a factor k is divided out: there the two roots of
    its recursion are equal.
    """
    rate, momentum, _ = best_settings(method, condition)
    random = torch.Generator().manual_seed(seed)
    place = nn.Parameter(torch.randn(2, generator=random, dtype=torch.float64))
    curvature = torch.tensor([1.0, condition], dtype=torch.float64)
    optimizer = optim.SGD([place], lr=rate, momentum=momentum)
    norms = []
    for _ in range(_STEPS):
        place.grad = curvature * place.detach()
        optimizer.step()
        norms.append(place.detach().norm().item())
    half = _STEPS // 2
    grown = 2.0 if method == "heavy ball" else 1.0
    return (norms[-1] / norms[half - 1] / grown) ** (1 / half)  # type: ignore[no-any-return]


def ravine(name: str, rate: float, rotated: bool, seed: int) -> float:
    """Steps until the distance to the minimum is a thousandth of that at the start; inf where it takes too many.

    Rotated by 45 degrees, the ravine and the start are the same, but the coordinates no longer lie along it.
    """
    random = torch.Generator().manual_seed(seed)
    angle = 2 * math.pi * torch.rand((), generator=random, dtype=torch.float64)
    place = torch.stack([angle.cos(), angle.sin()])
    turn = torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=torch.float64) / math.sqrt(2)
    turn = turn if rotated else torch.eye(2, dtype=torch.float64)
    hessian = turn @ torch.diag(torch.tensor([1.0, _STEEP], dtype=torch.float64)) @ turn.T
    parameter = nn.Parameter(turn @ place)
    optimizer = optimizers.build(name, [parameter], rate)
    for step in range(1, _CAP + 1):
        parameter.grad = hessian @ parameter.detach()
        optimizer.step()
        distance = parameter.detach().norm().item()
        if distance <= 1e-3:
            return float(step)
        if not distance < 1e6:
            break
    return math.inf


def _rates(low: int, high: int) -> list[float]:
    """Four to a decade, from 10^low to 10^high."""
    return [float(f"{10 ** (low + index / 4):.3g}") for index in range(4 * (high - low) + 1)]


def judge(rows: Rows) -> tuple[Claim, ...]:
    """The factors, what a rotation changes, and what momentum and all optimizers do on real data."""
    found = {method: rows.values("factor", part="contraction", method=method) for method in _EXACT}
    exact = {method: best_settings(method, _CONDITION)[2] for method in _EXACT}
    turned = {name: _turned(rows, name) for name in _RAVINE}
    faster = _fewer(rows, "momentum", "sgd")
    accuracies = {name: rows.mean("test", **_fastest(rows, name)) for name in optimizers.NAMES}
    means = [one.mean for one in accuracies.values()]
    return (
        *(
            Claim(
                f"{title} contracts by {exact[method]:.6f} a step at condition 1,000, to within 0.0001",
                f"{found[method].mean():.6f}",
                bool((abs(found[method] - exact[method]) < 1e-4).all()),
            )
            for method, title in _EXACT.items()
        ),
        Claim(
            "rotating the ravine changes gradient descent and momentum by at most 1%",
            ", ".join(f"{name} {turned[name].mean:.2f} times" for name in ("sgd", "momentum", "nesterov")),
            all(abs(turned[name].mean - 1) <= 0.01 for name in ("sgd", "momentum", "nesterov")),
        ),
        *(
            Claim(
                f"{name}, which scales each coordinate, needs more steps on the rotated ravine",
                f"{turned[name].text(2)} times",
                turned[name].low > 1,
            )
            for name in _COORDINATE
        ),
        Claim(
            "real data: momentum reaches the training loss in fewer steps than plain SGD, each at its best rate",
            f"{faster.text(2)} times the steps",
            faster.high < 1,
        ),
        Claim(
            "real data: at these rates all optimizers end within 2 points of test accuracy",
            f"{min(means):.1%} to {max(means):.1%}",
            max(means) - min(means) <= 0.02,
        ),
    )


def _turned(rows: Rows, name: str) -> Interval:
    """How many times as many steps the rotated ravine takes, at the best rate of each."""
    aligned, rotated = (_ravine_steps(rows, name, turned).min(1) for turned in (0, 1))
    return geometric(rotated / aligned)


def _fewer(rows: Rows, first: str, second: str) -> Interval:
    """The steps of one optimizer over those of another on real data."""
    return rows.ratio("steps", _fastest(rows, first), _fastest(rows, second))


def _ravine_steps(rows: Rows, name: str, rotated: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return rows.values("steps", part="ravine", optimizer=name, rotated=rotated)


def _fastest(rows: Rows, name: str) -> dict[str, object]:
    """The condition with the learning rate that takes the fewest steps in the mean over seeds."""
    return rows.best("steps", part="digits", optimizer=name)


def tables(rows: Rows) -> tuple[Table, ...]:
    """Steps on the ravines and on real data."""
    lines = []
    for name in _RAVINE:
        aligned, rotated = (interval(_ravine_steps(rows, name, turned).min(1)) for turned in (0, 1))
        lines.append((name, aligned.text(0), rotated.text(0)))
    real = []
    for name in optimizers.NAMES:
        best = _fastest(rows, name)
        real.append((name, f"{best['lr']:g}", rows.mean("steps", **best).text(0), percent(rows.mean("test", **best))))
    return (
        Table(
            "Steps to a thousandth of the distance on a ravine of condition 100, each seed at its best learning rate",
            ("optimizer", "along the axes", "rotated by 45 degrees"),
            tuple(lines),
        ),
        Table(
            f"Digits: steps until the mean training loss of {_WINDOW} steps is below {_TARGET}, at the learning rate "
            "with the fewest",
            ("optimizer", "learning rate", "steps", "test accuracy in the end"),
            tuple(real),
        ),
    )


def draw_rows(rows: Rows) -> str:
    """Steps against the learning rate; where the target is not reached a curve leaves at the top."""
    plots = []
    for turned, title in ((0, "along the axes"), (1, "rotated")):
        curves = {}
        for name in _RAVINE:
            rates = rows.where(part="ravine", optimizer=name).rows[0].values["rates"]
            assert isinstance(rates, list)
            curves[name] = list(zip(rates, np.median(_ravine_steps(rows, name, turned), axis=0).tolist(), strict=True))
        plots.append(Plot(f"ravine {title}: log10 steps, log10 rate", curves, log_x=True, log_y=True))
    curves = {}
    for name in optimizers.NAMES[:-1]:  # AdamW's curve is Adam's
        where = rows.where(part="digits", optimizer=name)
        curves[name] = [(float(rate), float(np.median(where.values("steps", lr=rate)))) for rate in where.levels("lr")]
    plots.append(Plot("digits: log10 steps, log10 rate", curves, log_x=True, log_y=True))
    return draw(plots, "Steps to a target against the learning rate, for each optimizer")


def reading(rows: Rows) -> str:
    """What follows."""
    rates = {name: _fastest(rows, name)["lr"] for name in ("sgd", "rmsprop")}
    return (
        "AdaGrad and RMSProp divide each coordinate by the size of its own gradients. Along the axes that undoes the "
        "ravine, and at a large learning rate a few steps do. Turned by 45 degrees, the two coordinates have "
        "gradients of like size, and the advantage is gone: a picture of optimizers on a function that lies along the "
        "axes flatters them. Gradient descent and momentum do not notice. Adam, which averages its gradients as "
        "momentum does, is between.\n\nOn real data the optimizers are nearer to each other than on the ravine once "
        "each has its best learning rate. "
        f"Where that is differs a lot: {rates['rmsprop']:g} for RMSProp, {rates['sgd']:g} for plain SGD. Tune it: "
        "`renorm compare --tune-lr`. That defaults do as well as tuning is not tested: all are tuned here, on the loss "
        "that is reported."
    )


_REAL_RATES: Mapping[str, tuple[int, int]] = {
    "sgd": (-2, 0), "momentum": (-3, -1), "nesterov": (-3, -1), "adagrad": (-3, -1), "adadelta": (-1, 1),
    "rmsprop": (-4, -2), "adam": (-4, -2), "adamw": (-4, -2),
}  # fmt: skip  # powers of ten


def _conditions(epochs: int) -> tuple[Condition, ...]:
    exact: list[Condition] = [{"part": "contraction", "method": method} for method in _EXACT]
    steep: list[Condition] = [
        {"part": "ravine", "optimizer": name, "rotated": turned} for name in _RAVINE for turned in (0, 1)
    ]
    real: list[Condition] = [
        {"part": "digits", "optimizer": name, "lr": rate, "epochs": epochs}
        for name in optimizers.NAMES
        for rate in _rates(*_REAL_RATES[name])
    ]
    return (*exact, *steep, *real)


REPLICATION = Replication(
    name="optimizers",
    title="Optimizers on ravines and on real data",
    question="Which optimizers get along a ravine, and does it carry over to real data?",
    published=(
        Published(
            "On a quadratic with condition number k, gradient descent contracts by (k - 1) / (k + 1) a step at best, "
            "the heavy ball by (sqrt(k) - 1) / (sqrt(k) + 1)",
            "Polyak 1964, Some methods of speeding up the convergence of iteration methods",
        ),
        Published(
            "Over many tasks, several optimizers at their defaults do about as well as one that is tuned",
            "Schmidt et al. 2021, Descending through a Crowded Valley, arXiv:2007.01547, abstract",
        ),
    ),
    protocol=(
        "Contraction: torch's SGD with Polyak's best settings on curvatures 1 and 1,000, 4,000 steps in float64. "
        "Ravine: curvatures 1 and 100, exact gradients, a start at distance 1 in a direction that the seed draws, at "
        "most 1,000 steps; 25 learning rates from 0.0001 to 100, four to a decade; once with the axes along the "
        "ravine and once rotated by 45 degrees. AdamW is left out there, since its decay pulls to the minimum at 0, "
        "and Adadelta, which has no learning rate of its own. Real data: `mlp` of `renorm.choices.models` without a "
        "norm on the digits, batches of 32, nine learning rates for each optimizer, four to a decade."
    ),
    quick=Plan(_conditions(5), 3, "scikit-learn's digits, 5 epochs, 3 seeds"),
    minutes=1,
    full=Plan(_conditions(15), 8, "15 epochs, 8 seeds"),
    measure=measure,
    judge=judge,
    tables=tables,
    draw=draw_rows,
    reading=reading,
)
