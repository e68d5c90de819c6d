"""The score a comparison ranks by, its estimate over seeds, and how many of its digits mean something."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from renorm.comparison.spec import PRIMARY, StudyRecord, TrialResult

__all__ = ["OTHER_TITLES", "Estimate", "Score", "estimate", "rounded"]

CONFIDENCE = 0.95
OTHER_TITLES = {"mse": "MSE", "correlation": "Corr."}  # of the scores that are shown beside a MASE


@dataclass(frozen=True)
class Score:
    """What the norms are ranked by: an error rate, a root mean squared error, or a MASE; lower is better."""

    key: str  # "error", "rmse" or "mase": the name in TrialResult.test and .valid
    part: str  # "test", or "validation" for a study without a test part
    target: str  # the target column's name, the unit of an RMSE; may be empty
    step: float  # the smallest amount the score can change by: 1 / samples for an error rate, else 0

    @classmethod
    def of(cls, record: StudyRecord) -> Score:
        """The score of a study: of its test part, or of the validation part where there is no test part."""
        part = "test" if int(record.data.get("num_test", 1)) else "validation"
        classifies = record.task == "classification"
        size = int(record.data.get("num_test" if part == "test" else "num_valid", 0))
        return cls(
            key=PRIMARY[record.task],
            part=part,
            target=str(record.data.get("target") or ""),
            step=1 / size if classifies and size else 0.0,
        )

    def read(self, result: TrialResult) -> float:
        """The score of one trial; nan where it has none that is finite."""
        value = (result.test if self.part == "test" else result.valid).get(self.key, math.nan)
        return value if math.isfinite(value) else math.nan

    @property
    def other_keys(self) -> tuple[str, ...]:
        """The scores that are shown beside it, which do not rank."""
        return tuple(OTHER_TITLES) if self.key == "mase" else ()

    def others(self, results: Sequence[TrialResult], key: str) -> list[float]:
        """One of these of each trial, without those in which it is not defined."""
        values = [(result.test if self.part == "test" else result.valid).get(key, math.nan) for result in results]
        return [value for value in values if math.isfinite(value)]

    def log_odds(self, rate: float) -> float:
        """log(errors / successes) of an error rate, half an error and half a success added so that it is finite."""
        return math.log((rate + self.step / 2) / (1 - rate + self.step / 2))

    def log_odds_slope(self, rate: float) -> float:
        """By how much :meth:`log_odds` grows for a small change of the rate."""
        return 1 / (rate + self.step / 2) + 1 / (1 - rate + self.step / 2)

    @property
    def is_rate(self) -> bool:
        """Whether the score is a share between 0 and 1, shown in percent."""
        return self.key == "error"

    @property
    def title(self) -> str:
        """Its name in a sentence: "test error", "validation RMSE"."""
        return f"{self.part} {self.name}"

    @property
    def name(self) -> str:
        """Its name alone: "error", "RMSE", "MASE"."""
        return self.key if self.is_rate else self.key.upper()

    @property
    def unit(self) -> str:
        """Its unit in a table's head: "%", or "units of price"."""
        if self.key == "mase":
            return "naive errors"
        return "%" if self.is_rate else f"units of {self.target or 'the target'}"

    @property
    def factor(self) -> float:
        """From the stored value to the shown one."""
        return 100.0 if self.is_rate else 1.0

    def text(self, value: Estimate) -> str:
        """The mean, rounded to its uncertainty: "1.1%" or "54.1"."""
        shown = rounded(value.mean * self.factor, value.half_width * self.factor)
        return shown + "%" if self.is_rate and shown != "–" else shown

    def interval(self, value: Estimate) -> str:
        """The interval as "0.8 to 1.5", in the unit of :meth:`text`; a dash where there is none.

        It is the mean's t-interval, which does not know that a rate ends at 0 and 1: it is shown cut there.
        """
        if not math.isfinite(value.half_width):
            return "–"
        low, high = self.clipped(value)
        half = value.half_width * self.factor
        return f"{rounded(low * self.factor, half)} to {rounded(high * self.factor, half)}"

    def clipped(self, value: Estimate) -> tuple[float, float]:
        """The interval's ends as they are shown: a rate cannot leave [0, 1], an RMSE cannot be negative."""
        return max(value.low, 0.0), min(value.high, 1.0) if self.is_rate else value.high

    def difference(self, value: Estimate) -> str:
        """A difference with its interval: "+0.9 (0.2 to 1.6)", in percentage points or the target's unit."""
        if not value.num:
            return "–"
        mean, low, high, half = (
            number * self.factor for number in (value.mean, value.low, value.high, value.half_width)
        )
        text = rounded(mean, half, signed=True)
        return f"{text} ({rounded(low, half)} to {rounded(high, half)})" if math.isfinite(half) else text


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its 95% t-interval."""

    mean: float  # nan when there is nothing to average
    low: float  # lower end of the interval; nan for fewer than two values
    high: float  # upper end of the interval; nan for fewer than two values
    num: int  # how many values were averaged
    p: float  # of "the mean is zero", two-sided t-test; nan for fewer than two values

    @property
    def half_width(self) -> float:
        """Half the interval's length."""
        return (self.high - self.low) / 2


def estimate(values: Sequence[float], least_spread: float = 0.0) -> Estimate:
    """The mean of `values` with its 95% t-interval and the t-test against zero.

    ``mean +- t(0.975, n - 1) * s / sqrt(n)``, where s is the standard deviation (n - 1), but at least
    `least_spread`: scores that move in steps can agree by rounding, and no spread would then claim certainty.

    >>> e = estimate([1.0, 2.0, 3.0])
    >>> f"{e.mean:.2f} {e.low:.2f} {e.high:.2f} p={e.p:.3f}"
    '2.00 -0.48 4.48 p=0.074'
    """
    num = len(values)
    if num == 0:
        return Estimate(math.nan, math.nan, math.nan, 0, math.nan)
    mean = math.fsum(values) / num
    if num == 1:
        return Estimate(mean, math.nan, math.nan, 1, math.nan)
    deviation = max(_deviation(values, mean), least_spread)
    error = deviation / math.sqrt(num)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, num - 1)) * error
    return Estimate(mean, mean - half, mean + half, num, _p(mean, error, num))


def _deviation(values: Sequence[float], mean: float) -> float:
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    # Equal differences of rounded numbers differ in their last bits; that is no spread.
    return 0.0 if deviation <= 1e-12 * max(abs(value) for value in values) else deviation


def _p(mean: float, error: float, num: int) -> float:
    if error == 0.0:
        return 1.0 if mean == 0.0 else 0.0
    return float(2 * stats.t.sf(abs(mean) / error, num - 1))


def rounded(value: float, half_width: float, *, signed: bool = False) -> str:
    """`value` with as many digits as its uncertainty allows.

    It ends at the first digit of `half_width`, at the second where the first is 1 or 2; without an uncertainty
    (nan or 0) it has three significant digits.

    >>> rounded(1.0934, 0.4321), rounded(61.23, 12.7), rounded(5432.1, 230.0)
    ('1.1', '61', '5430')
    >>> rounded(0.0178, float("nan"))
    '0.0178'
    """
    if not math.isfinite(value):
        return "–"
    known = math.isfinite(half_width) and half_width > 0
    scale = half_width if known else abs(value)
    if scale == 0:
        return "0"
    exponent = math.floor(math.log10(scale))
    digits = 3 if not known else 2 if scale < 3 * 10**exponent else 1
    decimals = digits - 1 - exponent
    number = round(value, decimals)
    if number == 0:
        return f"{0:.{max(decimals, 0)}f}" if decimals <= 6 else "0"
    return ("−" if value < 0 else "+" if signed else "") + _digits(abs(number), decimals)


def _digits(number: float, decimals: int) -> str:
    """A positive number to so many decimals, as 1.3e10 where its zeros would hide its size."""
    if 1e-6 <= number < 1e7:
        return f"{number:.{max(decimals, 0)}f}"
    mantissa, exponent = f"{number:.{max(decimals + math.floor(math.log10(number)), 0)}e}".split("e")
    return f"{mantissa}e{int(exponent)}"
