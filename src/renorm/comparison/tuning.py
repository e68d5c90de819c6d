"""The tuning of the learning rate: each norm gets the rate that is best for it on the validation part."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from renorm.comparison.spec import PRIMARY, TrialResult, TrialSpec

__all__ = ["Choice", "choose"]


@dataclass(frozen=True)
class Tried:
    """One learning rate that was tried, over its seeds."""

    base_lr: float  # the rate the study names, before it is scaled to the batch size
    score: float  # mean error rate, RMSE or MASE on the validation part; inf if a seed did not finish
    loss: float  # mean loss on the validation part; decides between equal scores
    statuses: tuple[str, ...]  # how each seed ended


@dataclass(frozen=True)
class Choice:
    """The learning rate chosen for one norm at one batch size, optimizer and activation."""

    norm: str
    batch_size: int
    optimizer: str
    activation: str
    pooling: str  # of a forecast, as in TrialSpec
    bar: int
    tried: tuple[Tried, ...]  # ascending by rate

    @property
    def base_lr(self) -> float:
        """The rate with the best mean score; among equals the lower loss decides, then the lower rate."""
        return min(self.tried, key=lambda rate: (rate.score, rate.loss, rate.base_lr)).base_lr

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the lowest or highest one tried: a better one may lie outside."""
        return self.base_lr in (self.tried[0].base_lr, self.tried[-1].base_lr)

    def covers(self, spec: TrialSpec) -> bool:
        """Whether `spec` is a trial of this choice's norm, batch size, optimizer and activation."""
        return _group(spec) == (
            self.norm, self.batch_size, self.optimizer, self.activation, self.pooling, self.bar
        )  # fmt: skip

    def text(self) -> str:
        """One line that says what was tried and chosen."""
        rates = ", ".join(f"{rate.base_lr:g} ({_shown(rate)})" for rate in self.tried)
        edge = "; it is at the edge of the range, a better one may lie outside" if self._doubtful else ""
        return (
            f"{self.norm}, batch size {self.batch_size}, {self.optimizer}, {self.activation}"
            f"{f', {self.pooling}, bar {self.bar}' if self.bar else ''}: "
            f"lr {self.base_lr:g} of {rates}{edge}"
        )

    @property
    def _doubtful(self) -> bool:
        return self.at_edge and any(math.isfinite(rate.score) for rate in self.tried)


def choose(results: Sequence[TrialResult]) -> tuple[Choice, ...]:
    """The best learning rate of each norm, batch size, optimizer and activation.

    The best has the best mean score over seeds on the validation part.

    A rate at which a seed diverged or failed is taken only if no rate is better.
    """
    groups = dict.fromkeys(_group(result.spec) for result in results)
    return tuple(
        Choice(*group, tried=_tried([result for result in results if _group(result.spec) == group])) for group in groups
    )


def _group(spec: TrialSpec) -> tuple[str, int, str, str, str, int]:
    return spec.norm, spec.batch_size, spec.optimizer, spec.activation, spec.pooling, spec.bar


def _tried(results: Sequence[TrialResult]) -> tuple[Tried, ...]:
    rates = sorted({result.spec.base_lr for result in results})
    return tuple(_at(rate, [result for result in results if result.spec.base_lr == rate]) for rate in rates)


def _at(rate: float, results: Sequence[TrialResult]) -> Tried:
    return Tried(
        base_lr=rate,
        score=_mean(_value(result, *PRIMARY.values()) for result in results),
        loss=_mean(_value(result, "loss") for result in results),
        statuses=tuple(result.status for result in results),
    )


def _value(result: TrialResult, *names: str) -> float:
    found = [result.valid[name] for name in names if name in result.valid]
    return found[0] if result.status == "ok" and found and math.isfinite(found[0]) else math.inf


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers)


def _shown(rate: Tried) -> str:
    if math.isfinite(rate.score):
        return f"{rate.score:.4g}"
    return next(status for status in (*rate.statuses, "no finite score") if status != "ok")
