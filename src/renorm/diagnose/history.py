"""What `watch` remembers of a training run: numbers of the sampled steps, the losses, the validations."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

__all__ = ["History", "Layer", "Sample"]

MAX_SAMPLES = 64
MAX_LOSSES = 4096


@dataclass(frozen=True)
class Layer:
    """What the sampled steps showed of one activation or norm."""

    kind: str  # as in trace.py: "relu", "tanh", "batch_norm" ...
    numbers: dict[str, float]  # by name; see watch.MEASURES


@dataclass(frozen=True)
class Sample:
    """One sampled step."""

    step: int
    loss: float | None
    gradients: dict[str, float]  # norm of the gradient, by parameter; those without a gradient are left out
    weights: dict[str, float]  # norm, by parameter, before the step
    updates: dict[str, float]  # norm of the change, by parameter
    layers: dict[str, Layer]  # by module
    rates: dict[str, float]  # learning rate, by parameter

    def ratio(self, name: str) -> float:
        """‖change‖ / ‖weight‖ of a parameter; 0 for a weight of zeros."""
        weight = self.weights.get(name, 0.0)
        return self.updates.get(name, 0.0) / weight if weight else 0.0


@dataclass
class History:
    """What the rules of `watch` look at."""

    model: nn.Module
    optimizers: tuple[Optimizer, ...]
    loader: Iterable[Any] | None
    samples: deque[Sample] = field(default_factory=lambda: deque(maxlen=MAX_SAMPLES))
    losses: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=MAX_LOSSES))  # (step, loss)
    validations: list[tuple[int, float, float]] = field(default_factory=list)  # (step, loss, training loss then)
    step: int = 0  # optimizer steps so far
    events: dict[str, Any] = field(default_factory=dict)  # what hooks saw besides: see watch.py

    @property
    def last(self) -> Sample | None:
        """The newest sample."""
        return self.samples[-1] if self.samples else None

    def recent(self, count: int) -> list[Sample]:
        """The last `count` samples, or fewer."""
        return list(self.samples)[-count:]
