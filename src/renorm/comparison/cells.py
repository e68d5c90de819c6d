"""The trials of a comparison by setting: a row for each norm, and the best norm against each other one."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from renorm.comparison.score import Estimate, Score, estimate
from renorm.comparison.spec import Setting, TrialResult

__all__ = ["Cell", "Contrast", "Row", "cells_of", "ending", "paired"]

SIGNIFICANCE = 0.05
LEAST_PAIRS = 3

# "open": no difference to the best is shown; "untested": fewer than three pairs; "survivor": lower than the
# best in the seeds it finished, but it did not finish them all; "unfinished": no score at all.
Place = Literal["best", "open", "worse", "survivor", "untested", "unfinished"]


@dataclass(frozen=True)
class Row:
    """One norm in one setting, over its seeds."""

    norm: str  # as the study writes it: "group(32)"
    setting: Setting
    trials: tuple[TrialResult, ...]  # by seed
    base_lr: float  # the rate the study names, or the one tuning chose for this norm
    score: Estimate  # over the seeds that finished
    by_seed: dict[int, float]  # seed -> score, of the seeds that finished
    counts: dict[str, int]  # status -> how many seeds
    reasons: tuple[str, ...]  # why the others did not finish, each reason once
    seconds_per_step: float  # median over the seeds that finished
    peak_memory_mb: float  # median over the seeds that finished
    num_parameters: int  # of the model with this norm; 0 where none was built
    place: Place  # against the best of its setting
    others: dict[str, Estimate] = field(default_factory=dict)  # other scores of the same part over the same seeds

    @property
    def identity(self) -> dict[str, Any]:
        """What tells it from other rows, by name: norm, setting, learning rate."""
        left_out = {"base_lr"} if self.setting.bar else {"base_lr", "pooling", "bar"}
        setting = {name: value for name, value in asdict(self.setting).items() if name not in left_out}
        return {"norm": self.norm, **setting, "lr": self.base_lr}

    @property
    def num_trials(self) -> int:
        """How many seeds have a result of any kind."""
        return len(self.trials)

    @property
    def status(self) -> str:
        """How its trials ended, in words: "3 of 3", "2 of 3, 1 diverged", "refused"."""
        others = {name: num for name, num in self.counts.items() if name != "ok"}
        if not self.score.num and len(others) == 1:
            return next(iter(others))
        words = [f"{num} {name}" for name, num in others.items()]
        return ", ".join([f"{self.score.num} of {self.num_trials}", *words])


@dataclass(frozen=True)
class Contrast:
    """The best norm of a setting against another one, by differences between trials of the same seed."""

    setting: Setting
    best: str  # the norm with the lowest mean
    other: str  # the norm it is compared with
    difference: Estimate  # other minus best, over the seeds both finished; see paired
    p_corrected: float  # by Holm's method over the setting's comparisons; nan where not tested
    shown: bool  # whether a difference is shown: at least three pairs and a corrected p below 0.05


@dataclass(frozen=True)
class Cell:
    """All norms in one setting: norms are compared within one."""

    setting: Setting
    rows: tuple[Row, ...]  # the best first; those without a score last
    comparisons: tuple[Contrast, ...]  # the best row against each other one that has a score

    @property
    def best(self) -> Row | None:
        """The row with the lowest mean; None where no trial finished."""
        return next((row for row in self.rows if row.place == "best"), None)


def cells_of(score: Score, trials: Sequence[TrialResult], *, tuned: bool = False) -> tuple[Cell, ...]:
    """The trials by setting, in order.

    `tuned`: each norm has a learning rate of its own, so the rate is no part of the setting.
    """
    groups: dict[Setting, dict[tuple[str, float], list[TrialResult]]] = {}
    for trial in trials:
        setting = Setting.of(trial.spec, tuned=tuned)
        rows = groups.setdefault(setting, {})
        rows.setdefault((trial.spec.norm, trial.spec.base_lr), []).append(trial)
    return tuple(
        _cell(score, setting, [_row(score, setting, group) for group in groups[setting].values()])
        for setting in sorted(groups)
    )


def paired(score: Score, one: Row, other: Row) -> Estimate:
    """`one` minus `other` over the seeds both finished, with the paired t-test's p.

    The mean and its interval are in the score's unit. Error rates are tested by their log-odds: the rate that is ten
    times as large also varies several times as much over seeds, which the t-test takes for doubt; log-odds of the two
    vary about alike.
    """
    seeds = [seed for seed in one.by_seed if seed in other.by_seed]
    pairs = [(one.by_seed[seed], other.by_seed[seed]) for seed in seeds]
    # A number rounded to a step is uncertain by step / sqrt(12), a difference of two by step / sqrt(6).
    difference = estimate([a - b for a, b in pairs], least_spread=score.step / math.sqrt(6))
    if not score.step or len(pairs) < 2:
        return difference
    odds = [score.log_odds(a) - score.log_odds(b) for a, b in pairs]
    slopes = [score.log_odds_slope(rate) for pair in pairs for rate in pair]
    rounding = score.step / math.sqrt(6) * math.fsum(slopes) / len(slopes)
    return replace(difference, p=estimate(odds, least_spread=rounding).p)


def ending(score: Score, trial: TrialResult) -> tuple[str, str]:
    """A trial's status and reason; one that ended "ok" without a finite score has failed all the same."""
    if trial.status == "ok" and math.isnan(score.read(trial)):
        return "failed", f"its {score.title} is not a finite number"
    return trial.status, trial.reason


def corrected(differences: Sequence[Estimate]) -> list[float]:
    """Holm's corrected p of each difference; nan for one of fewer than three pairs, which is not tested."""
    tested = sorted((d.p, index) for index, d in enumerate(differences) if d.num >= LEAST_PAIRS)
    out, largest = [math.nan] * len(differences), 0.0
    for rank, (p, index) in enumerate(tested):
        largest = max(largest, min(1.0, p * (len(tested) - rank)))
        out[index] = largest
    return out


def _row(score: Score, setting: Setting, group: Sequence[TrialResult]) -> Row:
    trials = sorted(group, key=lambda trial: trial.spec.seed)
    endings = [ending(score, trial) for trial in trials]
    done = [trial for trial, (status, _) in zip(trials, endings, strict=True) if status == "ok"]
    by_seed = {trial.spec.seed: score.read(trial) for trial in done}
    return Row(
        norm=trials[0].spec.norm,
        setting=setting,
        trials=tuple(trials),
        base_lr=trials[0].spec.base_lr,
        score=estimate(list(by_seed.values()), least_spread=score.step / math.sqrt(12)),
        by_seed=by_seed,
        counts=dict(Counter(status for status, _ in endings)),
        reasons=tuple(dict.fromkeys(reason for _, reason in endings if reason)),
        seconds_per_step=_median(trial.seconds_per_step for trial in done),
        peak_memory_mb=_median(trial.peak_memory_mb for trial in done),
        num_parameters=max((trial.num_parameters for trial in trials), default=0),
        place="unfinished",
        others={key: estimate(score.others(done, key)) for key in score.other_keys},
    )


def _median(values: Iterable[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.median(finite) if finite else math.nan


def _cell(score: Score, setting: Setting, rows: Sequence[Row]) -> Cell:
    ranked = sorted((row for row in rows if row.score.num), key=lambda row: row.score.mean)
    if not ranked:
        return Cell(setting, tuple(rows), ())
    # A norm that finished fewer seeds than others has a mean of the easier seeds: never call it the best.
    most = max(row.score.num for row in ranked)
    best = next(row for row in ranked if row.score.num == most)
    others = [row for row in ranked if row is not best]
    comparisons = _comparisons(score, best, others)
    placed = [replace(best, place="best")]
    placed += [replace(row, place=_place(c)) for row, c in zip(others, comparisons, strict=True)]
    unfinished = [row for row in rows if not row.score.num]
    return Cell(setting, (*placed, *unfinished), comparisons)


def _comparisons(score: Score, best: Row, others: Sequence[Row]) -> tuple[Contrast, ...]:
    differences = [paired(score, other, best) for other in others]
    return tuple(
        Contrast(best.setting, best.norm, other.norm, difference, p, p < SIGNIFICANCE)
        for other, difference, p in zip(others, differences, corrected(differences), strict=True)
    )


def _place(comparison: Contrast) -> Place:
    if math.isnan(comparison.p_corrected):
        return "untested"
    if not comparison.shown:
        return "open"
    return "worse" if comparison.difference.mean > 0 else "survivor"
