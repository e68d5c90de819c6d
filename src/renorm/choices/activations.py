"""Activation functions by name, each a layer of torch.nn with what is known about it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from renorm.choices.picture import Line, Panel, chart, colour
from renorm.choices.registry import look_up
from renorm.drawing import Drawing
from renorm.errors import StudyError

__all__ = ["ACTIVATIONS", "NAMES", "Activation", "BinaryStep", "build", "draw_activation"]

_INF = math.inf


class BinaryStep(nn.Module):
    """1 from 0 on, 0 below: $$f(x) = [x \\ge 0]$$ Its gradient is 0 everywhere, so nothing before it learns.

    >>> BinaryStep()(torch.tensor([-0.5, 0.0, 2.0]))
    tensor([0., 1., 1.])
    """

    def forward(self, x: Tensor) -> Tensor:
        """An array of the same shape."""
        # of two signs, whose gradient is 0: torch.heaviside has none and raises, a comparison cuts the graph
        step = (torch.sign(torch.sign(x) + 0.5) + 1) / 2
        return torch.where(x.isnan(), x, step)  # torch's sign of nan is 0


@dataclass(frozen=True)
class Activation:
    """What is known about one activation function, with torch's default settings."""

    name: str  # as NAMES and build have it
    layer: Callable[[], nn.Module]  # makes the layer
    formula: str  # f(x), in LaTeX
    derivative: str  # f'(x), in LaTeX
    slope: Callable[[Tensor], Tensor]  # f' entry by entry; of softmax the Jacobian, (..., K) -> (..., K, K)
    range: tuple[float, float]  # the greatest lower and the least upper bound of f
    saturates: tuple[float, float]  # |f'| < 0.01 for all x below the first and above the second; of softmax (x, 0)
    gain: float  # the standard deviation of the weights before it, times sqrt(fan in)
    gain_source: str  # where that is from
    elementwise: bool = True  # False where an entry of the output depends on other entries


def _torch_gain(name: str, slope: float | None = None, also: str = "") -> tuple[float, str]:
    return float(nn.init.calculate_gain(name, slope)), f"torch.nn.init.calculate_gain({name!r}){also}"  # type: ignore[arg-type]


def _moment_gain(value: float) -> tuple[float, str]:
    """1 / sqrt(E f(z)^2) of a standard normal z, which is how He et al. come to sqrt(2) for ReLU."""
    return value, "1 / sqrt(E f(z)^2), z standard normal: the argument of He et al. 2015 (arXiv:1502.01852)"


_OUTPUT_GAIN = (1.0, "as a linear layer: it stands at the output, before a loss")


def _inside(x: Tensor, low: float, high: float, slope: float) -> Tensor:
    """`slope` where low < x < high, else 0, as torch has it at the ends."""
    return slope * ((x > low) & (x < high)).to(x.dtype)


def _above(x: Tensor, below: Tensor | float, above: float = 1.0) -> Tensor:
    """`above` where x > 0; `below` at 0, as torch has it, and under it."""
    return torch.where(
        x > 0, torch.full_like(x, above), torch.as_tensor(below, dtype=x.dtype, device=x.device).expand_as(x)
    )


def _sigmoid_slope(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * torch.sigmoid(-x)  # 1 - sigmoid(x) would be 0 from x = 37 on


def _gelu_slope(x: Tensor) -> Tensor:
    density = torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    cumulated: Tensor = torch.special.ndtr(x)
    return cumulated + x * density


def _mish_slope(x: Tensor) -> Tensor:
    bend = torch.tanh(F.softplus(x))
    return bend + x * (1 - bend**2) * torch.sigmoid(x)


def _hardswish_slope(x: Tensor) -> Tensor:
    middle = torch.where(x > -3, x / 3 + 0.5, torch.zeros_like(x))
    return torch.where(x < 3, middle, torch.ones_like(x))


def _softmax_slope(x: Tensor) -> Tensor:
    p = torch.softmax(x, -1)
    return torch.diag_embed(p) - p[..., :, None] * p[..., None, :]


_ALPHA, _SCALE = 1.6732632423543772, 1.0507009873554805  # of SELU

_ALL = (
    Activation(
        "relu", nn.ReLU, r"\max(0, x)", r"[x > 0]", lambda x: _above(x, 0.0), (0, _INF), (0, _INF), *_torch_gain("relu")
    ),
    Activation(
        "leaky_relu", nn.LeakyReLU, r"\max(0, x) + 0.01 \min(0, x)", r"1 \text{ if } x > 0 \text{ else } 0.01",
        lambda x: _above(x, 0.01), (-_INF, _INF), (-_INF, _INF), *_torch_gain("leaky_relu", 0.01),
    ),
    Activation(
        "elu", nn.ELU, r"x \text{ if } x > 0 \text{ else } e^x - 1", r"1 \text{ if } x > 0 \text{ else } e^x",
        lambda x: torch.exp(x.clamp(max=0)), (-1, _INF), (-4.605, _INF), *_moment_gain(1.2452),
    ),
    Activation(
        "selu", nn.SELU, r"\lambda x \text{ if } x > 0 \text{ else } \lambda \alpha (e^x - 1),\ "
        r"\lambda = 1.0507,\ \alpha = 1.6733",
        r"\lambda \text{ if } x > 0 \text{ else } \lambda \alpha e^x",
        lambda x: _above(x, _SCALE * _ALPHA * torch.exp(x.clamp(max=0)), _SCALE),
        (-_SCALE * _ALPHA, _INF), (-5.169, _INF),
        *_torch_gain("selu", also="; 1, torch's 'linear', is what makes a deep net normalize itself"),
    ),
    Activation(
        "gelu", nn.GELU, r"x \Phi(x),\ \Phi(x) = \tfrac12 (1 + \operatorname{erf}(x / \sqrt 2))",
        r"\Phi(x) + x \varphi(x),\ \varphi(x) = e^{-x^2/2} / \sqrt{2 \pi}", _gelu_slope,
        (-0.16997, _INF), (-3.067, _INF), *_moment_gain(1.5335),
    ),
    Activation(
        "silu", nn.SiLU, r"x \sigma(x),\ \sigma(x) = 1 / (1 + e^{-x})", r"\sigma(x) (1 + x (1 - \sigma(x)))",
        lambda x: torch.sigmoid(x) + x * _sigmoid_slope(x), (-0.27846, _INF), (-6.261, _INF), *_moment_gain(1.6765),
    ),
    Activation(
        "mish", nn.Mish, r"x \tanh(\ln(1 + e^x))", r"t + x (1 - t^2) \sigma(x),\ t = \tanh(\ln(1 + e^x))",
        _mish_slope, (-0.30884, _INF), (-6.264, _INF), *_moment_gain(1.4868),
    ),
    Activation(
        "softplus", nn.Softplus, r"\ln(1 + e^x)", r"\sigma(x)", torch.sigmoid, (0, _INF), (-4.595, _INF),
        *_moment_gain(1.0419),
    ),
    Activation(
        "sigmoid", nn.Sigmoid, r"\sigma(x) = 1 / (1 + e^{-x})", r"\sigma(x) (1 - \sigma(x))", _sigmoid_slope,
        (0, 1), (-4.585, 4.585), *_torch_gain("sigmoid"),
    ),
    Activation(
        "tanh", nn.Tanh, r"(e^x - e^{-x}) / (e^x + e^{-x})", r"1 - \tanh^2 x", lambda x: torch.cosh(x) ** -2,
        (-1, 1), (-2.993, 2.993), *_torch_gain("tanh"),
    ),
    Activation(
        "identity", nn.Identity, "x", "1", torch.ones_like, (-_INF, _INF), (-_INF, _INF), *_torch_gain("linear")
    ),
    Activation(
        "binary_step", BinaryStep, r"[x \ge 0]", "0", torch.zeros_like, (0, 1), (_INF, -_INF), *_moment_gain(2**0.5)
    ),
    Activation(
        "prelu", nn.PReLU, r"\max(0, x) + a \min(0, x),\ a \text{ learnt, from } 0.25",
        r"1 \text{ if } x > 0 \text{ else } a", lambda x: _above(x, 0.25), (-_INF, _INF), (-_INF, _INF),
        *_torch_gain("leaky_relu", 0.25),
    ),
    Activation(
        "relu6", nn.ReLU6, r"\min(\max(0, x), 6)", r"[0 < x < 6]", lambda x: _inside(x, 0, 6, 1.0), (0, 6), (0, 6),
        *_moment_gain(2**0.5),
    ),
    Activation(
        "hardtanh", nn.Hardtanh, r"\min(\max(-1, x), 1)", r"[-1 < x < 1]", lambda x: _inside(x, -1, 1, 1.0),
        (-1, 1), (-1, 1), *_moment_gain(1.3920),
    ),
    Activation(
        "hardsigmoid", nn.Hardsigmoid, r"\min(\max(0, x / 6 + \tfrac12), 1)", r"\tfrac16 [-3 < x < 3]",
        lambda x: _inside(x, -3, 3, 1 / 6), (0, 1), (-3, 3), *_moment_gain(1.8978),
    ),
    Activation(
        "hardswish", nn.Hardswish, r"x \min(\max(0, x / 6 + \tfrac12), 1)",
        r"0 \text{ if } x \le -3,\ 1 \text{ if } x \ge 3,\ x / 3 + \tfrac12 \text{ between}", _hardswish_slope,
        (-0.375, _INF), (-3, _INF), *_moment_gain(1.7367),
    ),
    Activation(
        "softsign", nn.Softsign, r"x / (1 + |x|)", r"1 / (1 + |x|)^2", lambda x: (1 + x.abs()) ** -2,
        (-1, 1), (-9, 9), *_moment_gain(2.3375),
    ),
    Activation(
        "logsigmoid", nn.LogSigmoid, r"\ln \sigma(x)", r"\sigma(-x)", lambda x: torch.sigmoid(-x),
        (-_INF, 0), (-_INF, 4.595), *_OUTPUT_GAIN,
    ),
    Activation(
        "softmax", partial(nn.Softmax, dim=-1), r"p_i = e^{x_i} / \sum_j e^{x_j}",
        r"\partial p_i / \partial x_j = p_i ([i = j] - p_j)", _softmax_slope, (0, 1), (-4.585, 4.585), *_OUTPUT_GAIN,
        elementwise=False,
    ),
)  # fmt: skip

ACTIVATIONS: Mapping[str, Activation] = MappingProxyType({activation.name: activation for activation in _ALL})

# What compare offers for hidden layers: entry by entry, without weights of its own, with a gradient.
NAMES: tuple[str, ...] = tuple(ACTIVATIONS)[: tuple(ACTIVATIONS).index("identity") + 1]


def build(name: str) -> nn.Module:
    """An activation layer with torch's default settings; it draws no random numbers.

    Raises:
        StudyError: no activation is called that.

    >>> build("gelu")
    GELU(approximate='none')
    """
    return look_up(ACTIVATIONS, name, "activation").layer()


def draw_activation(names: str | Sequence[str]) -> Drawing:
    """The picture of f (left) and f' (right) for one activation or several; notebooks show it, `.save` writes it.

    Softmax is drawn as its first output of the two logits (x, 0).

    Raises:
        StudyError: no activation is called that, or no name came.

    >>> draw_activation(["relu", "gelu"]).svg[:4]
    '<svg'
    """
    chosen = [look_up(ACTIVATIONS, name, "activation") for name in ([names] if isinstance(names, str) else names)]
    if not chosen:
        raise StudyError("a picture needs at least one activation; got none: write for example 'relu'")
    x = torch.linspace(-5, 5, 1001, dtype=torch.float64)
    values = [_curve(activation.layer().double(), activation, x) for activation in chosen]
    slopes = [_curve(activation.slope, activation, x) for activation in chosen]
    panels = [
        Panel(title, (-5, 5), _around(curves), tuple(_line(x, curve, index) for index, curve in enumerate(curves)))
        for title, curves in (("f(x)", values), ("f′(x)", slopes))
    ]
    words = ", ".join(activation.name for activation in chosen)
    legend = [(activation.name, colour(index)) for index, activation in enumerate(chosen)]
    return Drawing(chart(panels, legend, f"{words}: the function and its derivative, from -5 to 5"))


@torch.no_grad()
def _curve(function: Callable[[Tensor], Tensor], activation: Activation, x: Tensor) -> Tensor:
    if activation.elementwise:
        return function(x)
    y = function(torch.stack([x, torch.zeros_like(x)], -1))
    return y.reshape(len(x), -1)[:, 0]  # the first output; of a Jacobian, by the first input


def _line(x: Tensor, y: Tensor, index: int) -> Line:
    points = np.stack([x.numpy(), y.numpy()], 1)
    jumps = np.abs(np.diff(points[:, 1])) > 0.1  # more than 10 times as steep as any of them: a step, not a slope
    points = np.insert(points, np.flatnonzero(jumps) + 1, np.nan, axis=0)
    return Line(points, colour(index))


def _around(curves: Sequence[Tensor]) -> tuple[float, float]:
    low = min(float(curve.min()) for curve in curves)
    high = max(float(curve.max()) for curve in curves)
    space = 0.06 * max(high - low, 1.0)
    return low - space, high + space
