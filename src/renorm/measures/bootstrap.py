"""The bootstrap: how much a score moves with the choice of samples.

Its interval is the 95 % percentile interval over draws of the samples with replacement (Efron 1979). Samples that
follow each other in time are drawn in blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from renorm.errors import MeasureError

__all__ = ["Array", "Score", "Values", "bootstrapped"]

Array = npt.NDArray[np.float64]
# Names to values, of all samples ("") and of each class or series.
Values = dict[tuple[str, str], float]

_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Score:
    """A score and its interval."""

    value: float  # nan where it is not defined
    low: float = math.nan  # lower end of the interval; nan without one
    high: float = math.nan  # upper end; nan without one

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.value:.4g}"
        return f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g})"


def bootstrapped(
    measure: Callable[[Array], Values], num: int, num_resamples: int, block: int, seed: int
) -> dict[tuple[str, str], Score]:
    """What `measure` gives for all samples, and the interval of what it gives for draws of them.

    It is told how often each sample was drawn. Blocks may begin anywhere and go on at the first sample behind the last
    one (Politis & Romano 1992), so that all samples are drawn equally often.
    """
    if num_resamples < 0 or seed < 0 or not 1 <= block <= num:
        raise MeasureError(
            f"num_resamples and seed must not be negative and block must be from 1 to the {num} samples there are; "
            f"got {num_resamples}, {seed} and {block}"
        )
    values = measure(np.ones(num))
    if num_resamples == 0 or num == 1:
        return {key: Score(value) for key, value in values.items()}
    generator = np.random.default_rng(seed)
    draws = np.empty((num_resamples, len(values)))
    for row in draws:
        starts = generator.integers(num, size=math.ceil(num / block))
        drawn = ((starts[:, None] + np.arange(block)) % num).ravel()[:num]
        row[:] = list(measure(np.bincount(drawn, minlength=num).astype(np.float64)).values())
    found = {}
    for (key, value), column in zip(values.items(), draws.T, strict=True):
        known = column[~np.isnan(column)]
        tail = (1 - _CONFIDENCE) / 2
        # An observed value, since between finite and infinite ones there is none.
        ends = np.quantile(known, [tail, 1 - tail], method="closest_observation") if len(known) else [np.nan] * 2
        found[key] = Score(value, float(ends[0]), float(ends[1]))
    return found
