"""What the measurements of a replication gave, and intervals of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

__all__ = ["Condition", "Interval", "Row", "Rows", "Value", "geometric", "interval", "percent", "percent_points"]

Condition = Mapping[str, str | int | float]  # the settings of a measurement, by name
Value = float | list[float]  # a number, or a curve
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Row:
    """One measurement: a condition with one seed."""

    condition: Condition
    seed: int
    values: Mapping[str, Value]  # what was measured, by name
    seconds: float  # that it took


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95% confidence interval (Student's t); one seed has none, nor has what is infinite."""

    mean: float
    low: float
    high: float
    num: int  # seeds

    def share(self) -> Interval:
        """That of a share, which is between 0 and 1."""
        return Interval(self.mean, max(self.low, 0.0), min(self.high, 1.0), self.num)

    def text(self, digits: int = 2, factor: float = 1.0, unit: str = "") -> str:
        """In words: ``2.70 (2.31 to 3.09)``.

        >>> interval([1.0, 2.0, 3.0]).text(1, unit=" s")
        '2.0 s (-0.5 to 4.5)'
        """
        mean, low, high = (f"{value * factor:.{digits}f}" for value in (self.mean, self.low, self.high))
        return f"{mean}{unit} ({low} to {high})" if math.isfinite(self.low) else f"{mean}{unit}"


def interval(values: Iterable[float]) -> Interval:
    """The mean of the values, one for each seed, with its interval."""
    x = np.asarray(list(values), dtype=np.float64)
    mean = float(x.mean()) if len(x) else math.nan
    if len(x) < 2 or not np.isfinite(x).all():
        return Interval(mean, math.nan, math.nan, len(x))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
    return Interval(mean, mean - half, mean + half, len(x))


def percent(share: Interval) -> str:
    """A share in words: ``2.7% (2.3 to 3.1)``."""
    return share.share().text(1, 100, "%")


def percent_points(difference: Interval) -> str:
    """A difference of shares in words: ``2.7 points (2.3 to 3.1)``."""
    return difference.text(1, 100, " points")


def geometric(ratios: Iterable[float]) -> Interval:
    """The geometric mean of ratios, one for each seed, with the interval of their logarithms."""
    log = interval(np.log(np.asarray(list(ratios), dtype=np.float64)))
    return Interval(math.exp(log.mean), math.exp(log.low), math.exp(log.high), log.num)


@dataclass(frozen=True)
class Rows:
    """All measurements of a run, in the order of the protocol."""

    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def where(self, **condition: object) -> Rows:
        """Those whose condition has these values."""
        return Rows(tuple(r for r in self.rows if all(r.condition.get(key) == v for key, v in condition.items())))

    def levels(self, name: str) -> list[str | int | float]:
        """The values that a setting takes, each once, in order of appearance."""
        return list(dict.fromkeys(row.condition[name] for row in self.rows if name in row.condition))

    def values(self, name: str, **condition: object) -> npt.NDArray[np.float64]:
        """What was measured under this name: (rows,), or (rows, points) for curves of one length; seeds in order."""
        rows = sorted(self.where(**condition).rows, key=lambda row: row.seed)
        return np.array([row.values[name] for row in rows], dtype=np.float64)

    def mean(self, name: str, **condition: object) -> Interval:
        """Mean over seeds, with its interval, of one condition."""
        return interval(self.values(name, **condition))

    def curve(self, name: str, **condition: object) -> list[Interval]:
        """The mean over seeds at each point of a curve, of one condition."""
        return [interval(column) for column in self.values(name, **condition).T]

    def best(self, name: str, **condition: object) -> dict[str, object]:
        """The condition with the learning rate of the lowest mean, of those that were tried."""

        def mean(one: Mapping[str, object]) -> float:
            found = self.mean(name, **one).mean
            return math.inf if math.isnan(found) else found  # a training that diverged

        return min(({**condition, "lr": lr} for lr in self.where(**condition).levels("lr")), key=mean)

    def difference(self, name: str, first: Mapping[str, object], second: Mapping[str, object]) -> Interval:
        """First less second, seed by seed."""
        return interval(self.values(name, **first) - self.values(name, **second))

    def ratio(self, name: str, first: Mapping[str, object], second: Mapping[str, object]) -> Interval:
        """First over second, seed by seed: the geometric mean, and the interval of the logarithms."""
        return geometric(self.values(name, **first) / self.values(name, **second))
