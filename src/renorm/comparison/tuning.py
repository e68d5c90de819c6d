"""The tuning of the learning rate: each norm gets the rate that is best for it on the validation part."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from renorm.comparison.spec import PRIMARY, Setting, TrialResult, TrialSpec
from renorm.comparison.verdict import setting_title

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
    """The learning rate chosen for one norm in one setting."""

    norm: str
    setting: Setting  # without a rate
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
        """Whether `spec` is a trial of this choice's norm and setting."""
        return _group(spec) == (self.norm, self.setting)

    def text(self, varying: Sequence[str] = ()) -> str:
        """One line that says what was tried and chosen; the setting by its fields that vary, and its batch size."""
        rates = ", ".join(f"{rate.base_lr:g} ({_shown(rate)})" for rate in self.tried)
        edge = "; it is at the edge of the range, a better one may lie outside" if self._doubtful else ""
        return f"{self.norm}, {setting_title(self.setting, varying)}: lr {self.base_lr:g} of {rates}{edge}"

    @property
    def _doubtful(self) -> bool:
        return self.at_edge and any(math.isfinite(rate.score) for rate in self.tried)


def choose(results: Sequence[TrialResult]) -> tuple[Choice, ...]:
    """The best learning rate of each norm in each setting.

    The best has the best mean score over seeds on the validation part.

    A rate at which a seed diverged or failed is taken only if no rate is better.
    """
    groups = dict.fromkeys(_group(result.spec) for result in results)
    return tuple(
        Choice(*group, tried=_tried([result for result in results if _group(result.spec) == group])) for group in groups
    )


def _group(spec: TrialSpec) -> tuple[str, Setting]:
    return spec.norm, Setting.of(spec, tuned=True)


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
