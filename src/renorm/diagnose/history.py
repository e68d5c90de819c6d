"""What `watch` remembers of a training run: numbers of the sampled steps, the losses, the validations."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

__all__ = ["Counts", "Fit", "History", "Layer", "Sample", "Validation"]

MAX_SAMPLES = 64
MAX_LOSSES = 4096
FIRST = 10  # losses that say where training started
RECENT = 20  # losses that say where it is


@dataclass(frozen=True)
class Layer:
    """What the sampled steps showed of one activation or norm."""

    kind: str  # as in trace.py: "relu", "tanh", "batch_norm" ...
    numbers: dict[str, float]  # by name; see layers.MEASURES


@dataclass(frozen=True)
class Sample:
    """One sampled step of one optimizer."""

    step: int
    loss: float | None
    gradients: dict[str, float]  # norm of the gradient, by parameter; those without a gradient are left out
    weights: dict[str, float]  # norm, by parameter, before the step
    updates: dict[str, float]  # norm of the change, by parameter
    layers: dict[str, Layer]  # by module, or by function and the module that calls it
    rates: dict[str, float]  # learning rate, by parameter
    inputs: float | None = None  # the largest magnitude in what the model was given
    outputs: tuple[tuple[int, ...], ...] = ()  # shapes of what the model returned
    modes: dict[str, bool] = field(default_factory=dict)  # `training` of each model when the optimizer stepped
    left: float | None = None  # the smallest gradient that a backward pass of this step found in place
    skipped: bool = False  # whether the gradient scaler let the optimizer skip the step
    moved: dict[str, float] = field(default_factory=dict)  # share of entries that changed; of 16 bits only
    partly: frozenset[str] = frozenset()  # parameters too large to be copied: their change is estimated

    def ratio(self, name: str) -> float:
        """‖change‖ / ‖weight‖ of a parameter; 0 for a weight of zeros."""
        weight = self.weights.get(name, 0.0)
        return self.updates.get(name, 0.0) / weight if weight else 0.0

    @property
    def gradient(self) -> float:
        """The norm of all gradients together."""
        return math.sqrt(sum(norm * norm for norm in self.gradients.values()))


@dataclass(frozen=True)
class Counts:
    """How a classifier's predictions fit the labels, by class."""

    step: int
    validation: bool
    labels: tuple[int, ...]  # how often a class is the label
    predicted: tuple[int, ...]  # how often it is predicted
    right: tuple[int, ...]  # how often both
    spread: float  # of the outputs over the samples, as a share of their size


@dataclass(frozen=True)
class Fit:
    """How a regression's outputs fit the targets."""

    step: int
    validation: bool
    error: float  # mean squared
    variance: float  # of the targets
    spread: float  # variance of the outputs
    shift: float  # mean of the outputs - mean of the targets
    correlation: float  # nan where one of both is constant


@dataclass(frozen=True)
class Validation:
    """One call of `Watch.validate`."""

    step: int
    loss: float
    training: float  # mean of the last training losses then; nan where there is none


@dataclass
class History:
    """What the rules of `watch` look at: the steps of one optimizer."""

    model: nn.Module  # a ModuleDict of them where several are watched
    optimizer: Optimizer
    optimizers: tuple[Optimizer, ...]  # all that are watched
    loader: Iterable[Any] | None
    samples: deque[Sample] = field(default_factory=lambda: deque(maxlen=MAX_SAMPLES))
    losses: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=MAX_LOSSES))  # (step, loss)
    start: list[float] = field(default_factory=list)  # the first FIRST losses
    first: Sample | None = None  # the first sample that had gradients
    validations: list[Validation] = field(default_factory=list)
    counts: deque[Counts] = field(default_factory=lambda: deque(maxlen=MAX_SAMPLES))
    fits: deque[Fit] = field(default_factory=lambda: deque(maxlen=MAX_SAMPLES))
    step: int = 0  # steps so far
    sizes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # shapes, by parameter
    # What was seen besides: "loss", the operations it comes from; "lost", what is not finite; see watch.py.
    events: dict[str, Any] = field(default_factory=dict)

    def keep(self, made: Counts | Fit | None) -> None:
        """Add how predictions fit the targets, where that can be said."""
        if isinstance(made, Counts):
            self.counts.append(made)
        elif made is not None:
            self.fits.append(made)

    @property
    def last(self) -> Sample | None:
        """The newest sample."""
        return self.samples[-1] if self.samples else None

    def recent(self, count: int) -> list[Sample]:
        """The last `count` samples, or fewer."""
        return list(self.samples)[-count:]

    def latest(self, count: int) -> list[float]:
        """The last `count` losses, or fewer."""
        return [self.losses[i][1] for i in range(-min(count, len(self.losses)), 0)]

    @property
    def progress(self) -> float:
        """By what share of itself the loss has fallen since the start; nan where that says nothing.

        It does not for several optimizers, whose losses play against each other.
        """
        if len(self.losses) < FIRST + RECENT or len(self.optimizers) > 1:
            return math.nan
        then, now = math.fsum(self.start) / len(self.start), math.fsum(self.latest(RECENT)) / RECENT
        return (then - now) / max(abs(then), 1e-30)

    @property
    def broken(self) -> bool:
        """Whether the last loss, gradients or weights are not finite."""
        if self.losses and not math.isfinite(self.losses[-1][1]):
            return True
        sample = self.last
        numbers = () if sample is None or sample.skipped else (*sample.gradients.values(), *sample.weights.values())
        return not all(map(math.isfinite, numbers))

    def matrices(self, sample: Sample) -> list[str]:
        """The parameters of two dimensions and more that had a gradient, in the model's order."""
        return [name for name in self.sizes if name in sample.gradients and len(self.sizes[name]) > 1]
