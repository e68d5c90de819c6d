"""How smooth the loss is where a model stands: the quantities of Santurkar et al. 2018.

They depend on the scale of the weights and of the loss. Follow them over the training of two models on the same task;
no value of them is good or bad: a model that has stopped learning can have a smaller beta than one that learns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from renorm.errors import MeasureError

__all__ = ["MULTIPLES", "Smoothness", "smoothness"]

MULTIPLES = tuple(float(0.5 * 8 ** (i / 7)) for i in range(8))  # from 1/2 to 4, evenly spaced in their logarithms


@dataclass(frozen=True)
class Smoothness:
    """What one minibatch says of the loss along its own gradient."""

    loss: float  # L, where the model stands
    gradient_norm: float  # of g, the gradient there
    steps: tuple[float, ...]  # eta, as multiples of g
    losses: tuple[float, ...]  # L after each step, on the same minibatch
    gradient_changes: tuple[float, ...]  # norm of the change of the gradient after each step

    @property
    def loss_range(self) -> tuple[float, float]:
        """The smallest and the largest loss after a step."""
        return _range(self.losses)

    @property
    def gradient_range(self) -> tuple[float, float]:
        """The smallest and the largest change of the gradient: "gradient predictiveness", small where it is good."""
        return _range(self.gradient_changes)

    @property
    def beta(self) -> float:
        """The largest change of the gradient for a unit of distance: "effective beta-smoothness".

        It is nan where the gradient is 0, from which no step leads away.
        """
        if self.gradient_norm == 0:
            return math.nan
        changes = zip(self.gradient_changes, self.steps, strict=True)
        return _range([change / (step * self.gradient_norm) for change, step in changes])[1]


def smoothness(
    model: nn.Module, loss: Callable[[], Tensor], *, lr: float, multiples: Sequence[float] = MULTIPLES
) -> Smoothness:
    r"""Take steps along the gradient of one minibatch, and see how loss and gradient change.

    $$g = \nabla L(\theta), \quad \theta_\eta = \theta - \eta g: \qquad L(\theta_\eta), \qquad
    \|\nabla L(\theta_\eta) - g\|_2, \qquad
    \beta = \max_\eta \frac{\|\nabla L(\theta_\eta) - g\|_2}{\|\eta g\|_2}$$

    Args:
        model: with the parameters theta, those that require a gradient; it is run in the mode it is in.
        loss: computes the loss of the minibatch, always of the same one: ``lambda: criterion(model(x), y)``.
        lr: the learning rate of plain gradient descent; eta is a multiple of it.
        multiples: which ones.

    Each run sees the same buffers and the same random numbers, so that it is one function that is looked at.
    Afterwards parameters, buffers, gradients and random numbers are what they were, bit for bit; modes are not
    touched. It costs a forward and a backward pass for each multiple and one more.

    Raises MeasureError for an `lr` or multiples that are not positive, a model without parameters that require a
    gradient, and a loss that is no single number.
    Santurkar et al. 2018, "How Does Batch Normalization Help Optimization?" (arXiv:1805.11604).

    >>> model = nn.Linear(3, 1, bias=False)
    >>> _ = nn.init.ones_(model.weight)
    >>> curvature = torch.tensor([1.0, 10.0, 100.0])
    >>> found = smoothness(model, lambda: (curvature * model.weight ** 2).sum() / 2, lr=1e-3)
    >>> f"{found.loss:.1f} {found.beta:.4f}"
    '55.5 99.5038'
    """
    if not multiples or not all(math.isfinite(lr * multiple) and lr * multiple > 0 for multiple in multiples):
        raise MeasureError(f"lr and multiples must be positive; got {lr!r} and {tuple(multiples)!r}")
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise MeasureError("smoothness is by the parameters that require a gradient; this model has none")
    start = [p.detach().clone() for p in parameters]
    losses, changes = [], []
    with _unchanged(model, parameters, start) as rewind, torch.enable_grad():
        here, gradient = _gradient(loss, parameters)
        for multiple in multiples:
            rewind()
            with torch.no_grad():
                for p, value, direction in zip(parameters, start, gradient, strict=True):
                    p.copy_(value - lr * multiple * direction)
            there, changed = _gradient(loss, parameters)
            losses.append(there)
            changes.append(_norm([new - old for new, old in zip(changed, gradient, strict=True)]))
    steps = tuple(float(lr * multiple) for multiple in multiples)
    return Smoothness(here, _norm(gradient), steps, tuple(losses), tuple(changes))


def _gradient(loss: Callable[[], Tensor], parameters: list[nn.Parameter]) -> tuple[float, list[Tensor]]:
    value = loss()
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        came = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise MeasureError(f"loss() must return one number that depends on the model's parameters; got {came}")
    gradients = torch.autograd.grad(value.reshape(()), parameters, allow_unused=True)
    # One the loss does not depend on has gradient 0; that of an embedding may be sparse.
    found = [torch.zeros_like(p) if g is None else g.to_dense() for g, p in zip(gradients, parameters, strict=True)]
    return value.item(), found


def _norm(tensors: list[Tensor]) -> float:
    # hypot of the parameters' norms, in Python's float64; float32 at least in each
    wide = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
    norms = [torch.linalg.vector_norm(t, dtype=wide.get(t.dtype)).item() for t in tensors]
    return math.hypot(*norms)


def _range(values: Sequence[float]) -> tuple[float, float]:
    # NumPy's, because Python's min and max hide a NaN
    return float(np.min(values)), float(np.max(values))


@contextmanager
def _unchanged(model: nn.Module, parameters: list[nn.Parameter], start: list[Tensor]) -> Iterator[Callable[[], None]]:
    """Put back the parameters, buffers and random numbers at the end; what it gives does so for the latter two."""
    buffers = [
        (owner, name, buffer, None if buffer is None else buffer.detach().clone())
        for owner in model.modules()
        for name, buffer in owner._buffers.items()
    ]
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    cuda = sorted({device.index or 0 for device in devices if device.type == "cuda"})

    @torch.no_grad()
    def rewind() -> None:
        for owner, name, buffer, value in buffers:
            owner._buffers[name] = buffer
            if buffer is not None and value is not None:
                buffer.copy_(value)
        torch.set_rng_state(random)
        for index, state in zip(cuda, cuda_random, strict=True):
            torch.cuda.set_rng_state(state, index)

    random, cuda_random = torch.get_rng_state(), [torch.cuda.get_rng_state(index) for index in cuda]
    try:
        yield rewind
    finally:
        rewind()
        with torch.no_grad():
            for p, value in zip(parameters, start, strict=True):
                p.copy_(value)
