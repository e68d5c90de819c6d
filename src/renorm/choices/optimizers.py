"""Optimizers by name, each one of torch.optim with a stated setting, its formula, and its path on a test function."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn, optim

from renorm.choices.picture import Line, Panel, chart, colour, contours
from renorm.choices.registry import look_up
from renorm.drawing import Drawing
from renorm.errors import StudyError

__all__ = [
    "FUNCTIONS",
    "NAMES",
    "OPTIMIZERS",
    "Function",
    "Optimizer",
    "build",
    "draw_trajectory",
    "trajectory",
]


@dataclass(frozen=True)
class Optimizer:
    """One method: the formula as it is taught, and what torch computes.

    In the formulas g is the gradient of the loss J of the batch, alpha the learning rate; all operations are entry by
    entry, and all state begins at 0.
    """

    name: str  # as NAMES and build have it
    make: Callable[..., optim.Optimizer]  # called with the parameters and lr
    formula: str  # LaTeX, one line a step, as the literature has it
    torch: str  # LaTeX: what torch.optim computes at these settings
    difference: str  # between the two, in words
    source: str  # one line


_GRADIENT = r"g_t = \nabla J(\theta_t)"
_MEAN = r"g_t = \tfrac1m \sum_{i \in B_t} \nabla J_i(\theta_t)"
_SQUARES = r"E[g^2]_t = \rho E[g^2]_{t-1} + (1 - \rho) g_t^2"
_MOMENTS = r"m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t,\quad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2"
_ADAM = r"\alpha \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}"

_ALL = (
    Optimizer(
        "sgd",
        optim.SGD,
        rf"{_MEAN},\quad \theta_{{t+1}} = \theta_t - \alpha g_t",
        rf"{_MEAN},\quad \theta_{{t+1}} = \theta_t - \alpha g_t",
        "none; the batch B_t of m samples makes it batch (m = all), stochastic (m = 1) or mini-batch gradient descent",
        "H. Robbins, S. Monro: A stochastic approximation method, 1951",
    ),
    Optimizer(
        "momentum",
        partial(optim.SGD, momentum=0.9),
        rf"{_GRADIENT},\quad m_{{t+1}} = \mu m_t + \alpha g_t,\quad \theta_{{t+1}} = \theta_t - m_{{t+1}}",
        rf"{_GRADIENT},\quad b_{{t+1}} = \mu b_t + g_t,\quad \theta_{{t+1}} = \theta_t - \alpha b_{{t+1}}",
        "the learning rate is outside torch's buffer: the same path while it is constant; when it is lowered, torch's "
        "next step shrinks at once, the formula's only as the buffer forgets",
        "B. T. Polyak: Some methods of speeding up the convergence of iteration methods, 1964",
    ),
    Optimizer(
        "nesterov",
        partial(optim.SGD, momentum=0.9, nesterov=True),
        r"m_{t+1} = \mu m_t + \alpha \nabla J(\theta_t - \mu m_t),\quad \theta_{t+1} = \theta_t - m_{t+1}",
        rf"{_GRADIENT},\quad b_{{t+1}} = \mu b_t + g_t,\quad \theta_{{t+1}} = \theta_t - \alpha (g_t + \mu b_{{t+1}})",
        "torch's parameters are the formula's look-ahead points theta_t - mu m_t, where the gradient is taken: one "
        "path seen from two places while the learning rate is constant; the rate is outside the buffer, too",
        "Y. Nesterov, 1983; in this form I. Sutskever et al.: On the importance of initialization and momentum, 2013",
    ),
    Optimizer(
        "adagrad",
        optim.Adagrad,
        rf"{_GRADIENT},\quad r_t = r_{{t-1}} + g_t^2,"
        r"\quad \theta_{t+1} = \theta_t - \frac{\alpha}{\sqrt{r_t + \epsilon}} g_t",
        rf"{_GRADIENT},\quad r_t = r_{{t-1}} + g_t^2,"
        r"\quad \theta_{t+1} = \theta_t - \frac{\alpha}{\sqrt{r_t} + \epsilon} g_t",
        "epsilon, 1e-10, is outside torch's root; the step has g, not g^2",
        "J. Duchi, E. Hazan, Y. Singer: Adaptive subgradient methods, 2011",
    ),
    Optimizer(
        "adadelta",
        optim.Adadelta,
        rf"{_GRADIENT},\quad {_SQUARES},\quad \Delta_t = -\frac{{\sqrt{{E[\Delta^2]_{{t-1}} + \epsilon}}}}"
        r"{\sqrt{E[g^2]_t + \epsilon}} g_t,\quad E[\Delta^2]_t = \rho E[\Delta^2]_{t-1} + (1 - \rho) \Delta_t^2,"
        r"\quad \theta_{t+1} = \theta_t + \Delta_t",
        rf"{_GRADIENT},\quad {_SQUARES},\quad \Delta_t = -\frac{{\sqrt{{E[\Delta^2]_{{t-1}} + \epsilon}}}}"
        r"{\sqrt{E[g^2]_t + \epsilon}} g_t,\quad E[\Delta^2]_t = \rho E[\Delta^2]_{t-1} + (1 - \rho) \Delta_t^2,"
        r"\quad \theta_{t+1} = \theta_t + \alpha \Delta_t",
        "torch multiplies the step by a learning rate, which the method does without: 1 is the method itself; the "
        "average of squared steps is of Delta, before that factor",
        "M. D. Zeiler: ADADELTA, 2012 (arXiv:1212.5701)",
    ),
    Optimizer(
        "rmsprop",
        optim.RMSprop,
        rf"{_GRADIENT},\quad {_SQUARES},"
        r"\quad \theta_{t+1} = \theta_t - \frac{\alpha}{\sqrt{E[g^2]_t + \epsilon}} g_t",
        rf"{_GRADIENT},\quad {_SQUARES},"
        r"\quad \theta_{t+1} = \theta_t - \frac{\alpha}{\sqrt{E[g^2]_t} + \epsilon} g_t",
        "epsilon, 1e-8, is outside torch's root; torch calls rho alpha and has 0.99; the step is subtracted",
        "G. Hinton: Neural networks for machine learning, lecture 6, 2012",
    ),
    Optimizer(
        "adam",
        optim.Adam,
        rf"{_GRADIENT},\quad {_MOMENTS},\quad \theta_{{t+1}} = \theta_t - {_ADAM}",
        rf"{_GRADIENT},\quad {_MOMENTS},\quad \theta_{{t+1}} = \theta_t - {_ADAM}",
        "none; t counts from 1",
        "D. P. Kingma, J. Ba: Adam, 2015 (arXiv:1412.6980)",
    ),
    Optimizer(
        "adamw",
        optim.AdamW,
        rf"{_GRADIENT},\quad {_MOMENTS},"
        rf"\quad \theta_{{t+1}} = \theta_t - \eta_t \left({_ADAM} + \lambda \theta_t\right)",
        rf"{_GRADIENT},\quad {_MOMENTS},\quad \theta_{{t+1}} = (1 - \alpha \lambda) \theta_t - {_ADAM}",
        "the paper's decay has a schedule eta_t of its own; torch's is multiplied by the learning rate, lambda 0.01",
        "I. Loshchilov, F. Hutter: Decoupled weight decay regularization, 2019 (arXiv:1711.05101)",
    ),
)

OPTIMIZERS: Mapping[str, Optimizer] = MappingProxyType({optimizer.name: optimizer for optimizer in _ALL})

NAMES: tuple[str, ...] = tuple(OPTIMIZERS)


def build(name: str, parameters: Iterable[nn.Parameter], lr: float) -> optim.Optimizer:
    """An optimizer of `parameters` at learning rate `lr`, all else at torch's defaults.

    "sgd" has no momentum; "momentum" and "nesterov" have 0.9 of it. Only "adamw" has weight decay, 0.01.

    Raises:
        StudyError: no optimizer is called that, or `lr` is not a positive finite number.

    >>> weight = nn.Parameter(torch.zeros(2))
    >>> build("momentum", [weight], lr=0.1).defaults["momentum"]
    0.9
    """
    if not (math.isfinite(lr) and lr > 0):
        raise StudyError(f"the learning rate must be a positive finite number; got {lr!r}")
    return look_up(OPTIMIZERS, name, "optimizer").make(parameters, lr=lr)


# Test functions of two variables, and the paths on them.


@dataclass(frozen=True)
class Function:
    """A function of two variables whose difficulty has a name."""

    formula: str  # LaTeX
    value: Callable[[Tensor, Tensor], Tensor]
    start: tuple[float, float]  # where paths begin
    minima: tuple[tuple[float, float], ...]
    x: tuple[float, float]  # what a picture shows
    y: tuple[float, float]


FUNCTIONS: Mapping[str, Function] = MappingProxyType({
    # H. H. Rosenbrock, 1960: a bent valley, along which the function hardly falls
    "rosenbrock": Function(
        r"(1 - x)^2 + 100 (y - x^2)^2", lambda x, y: (1 - x) ** 2 + 100 * (y - x**2) ** 2,
        (-1.2, 1.0), ((1.0, 1.0),), (-2.0, 2.0), (-1.0, 3.0),
    ),
    # no gradient at (0, 0), a minimum on either side of it; the start is a hair beside the ridge
    "saddle": Function(
        r"\tfrac12 x^2 - \tfrac12 y^2 + \tfrac14 y^4", lambda x, y: x**2 / 2 - y**2 / 2 + y**4 / 4,
        (-1.5, 0.001), ((0.0, 1.0), (0.0, -1.0)), (-2.0, 1.0), (-1.0, 1.5),
    ),
    # fifty times as steep across as along: its condition number is 50
    "ravine": Function(
        r"\tfrac12 x^2 + 25 y^2", lambda x, y: x**2 / 2 + 25 * y**2,
        (-2.0, 0.6), ((0.0, 0.0),), (-2.5, 1.0), (-1.0, 1.0),
    ),
})  # fmt: skip


def trajectory(
    optimizer_name: str, function: str = "rosenbrock", steps: int = 100, lr: float = 1e-3
) -> npt.NDArray[np.float64]:
    r"""The path of an optimizer on a test function, with exact gradients in float64: (steps + 1, 2), the start first.

    $$\theta_{t+1} = \theta_t - \text{step}(\nabla f(\theta_t)), \qquad \theta = (x, y)$$
    "rosenbrock" is a bent valley with its minimum at (1, 1), "saddle" begins near the ridge between two minima,
    "ravine" is fifty times as steep across as along; see :data:`FUNCTIONS`. A path that diverges ends in inf and nan.

    Raises:
        StudyError: no optimizer or function is called that, `steps` is below 1, or `lr` is not positive and finite.

    >>> trajectory("sgd", "ravine", steps=2, lr=0.01).round(3)
    array([[-2.  ,  0.6 ],
           [-1.98,  0.3 ],
           [-1.96,  0.15]])
    """
    chosen = look_up(FUNCTIONS, function, "function")
    if steps < 1:
        raise StudyError(f"a path has at least 1 step; got steps={steps}: write for example 100")
    place = nn.Parameter(torch.tensor(chosen.start, dtype=torch.float64))
    optimizer = build(optimizer_name, [place], lr)
    path = [place.detach().clone()]
    for _ in range(steps):
        with torch.enable_grad():
            (place.grad,) = torch.autograd.grad(chosen.value(*place), place)
        optimizer.step()
        path.append(place.detach().clone())
    return torch.stack(path).numpy()


def draw_trajectory(
    names: str | Sequence[str],
    function: str = "rosenbrock",
    steps: int = 100,
    lr: float | Mapping[str, float] = 1e-3,
) -> Drawing:
    """The picture of the paths of one optimizer or several, over the contours of a test function.

    A dot marks where a path ends; the levels are even in the logarithm of the height above the minimum.

    Args:
        names: optimizers by name.
        function: "rosenbrock", "saddle" or "ravine".
        steps: how many steps each takes.
        lr: the learning rate of all, or of each by its name.

    Raises:
        StudyError: as :func:`trajectory`; no name came; `lr` has no rate for one of the names.

    >>> draw_trajectory(["sgd", "momentum"], "ravine", lr=0.01).svg[:4]
    '<svg'
    """
    chosen = [look_up(OPTIMIZERS, name, "optimizer").name for name in ([names] if isinstance(names, str) else names)]
    if not chosen:
        raise StudyError("a picture needs at least one optimizer; got none: write for example 'sgd'")
    missing = [name for name in chosen if isinstance(lr, Mapping) and name not in lr]
    if missing:
        raise StudyError(f"lr must have a rate for each optimizer; got none for {', '.join(missing)}: write a number")
    rates = [lr[name] if isinstance(lr, Mapping) else lr for name in chosen]
    paths = [trajectory(name, function, steps, rate) for name, rate in zip(chosen, rates, strict=True)]
    lines = [Line(path, colour(index), mark=True) for index, path in enumerate(paths)]
    place = look_up(FUNCTIONS, function, "function")
    words = f"{', '.join(chosen)}: {steps} steps on the function {function}"
    panel = Panel(f"{function}, {steps} steps", place.x, place.y, (*_levels(place), *lines))
    legend = [
        (f"{name}, lr {rate:g}", colour(index)) for index, (name, rate) in enumerate(zip(chosen, rates, strict=True))
    ]
    return Drawing(chart([panel], legend, words))


def _levels(function: Function) -> list[Line]:
    x, y = np.linspace(*function.x, 101), np.linspace(*function.y, 101)
    corners = torch.from_numpy(x), torch.from_numpy(y)[:, None]
    lowest = min(float(function.value(*torch.tensor(place).double())) for place in function.minima)
    height = function.value(*corners).numpy() - lowest
    lines = []
    for level in np.geomspace(height.max() / 2000, height.max() / 1.5, 12):
        pieces = contours(x, y, height, float(level))
        broken = np.concatenate([pieces, np.full((len(pieces), 1, 2), np.nan)], 1).reshape(-1, 2)
        lines.append(Line(broken, width=1.0, opacity=0.3))
    return lines
