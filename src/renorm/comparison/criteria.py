"""Information criteria of a comparison's norms: means over the seeds that finished."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from renorm.comparison.cells import Row

__all__ = ["CAVEAT", "NAMES", "criteria_means"]

NAMES = ("log_likelihood", "aic", "aicc", "bic")
CAVEAT = (
    "AIC, AICc and BIC weigh the fit to the training part against the number k of parameters. They are derived for "
    "models of few parameters at the maximum of their likelihood, with far more samples n than parameters. A deep "
    "network is none: k and n are not what they were, training stops before the maximum, and where k is near n or "
    "above, the penalty exceeds any gain (AICc is not defined there). Between networks of nearly the same k they "
    "order by training loss. They stand only where the loss is a likelihood: cross-entropy, or the squared error of "
    "numbers. Go by the scores on held-out data."
)


def criteria_means(row: Row) -> Mapping[str, float]:
    """The mean of each criterion over the seeds of `row` that have it; empty where none has."""
    found = [trial.criteria for trial in row.trials if trial.criteria]
    return {name: statistics.fmean(one[name] for one in found) for name in ("k", "n", *NAMES)} if found else {}
