"""The scores of a forecast, series by series."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from renorm.comparison.analysis import Analysis
from renorm.comparison.cells import Cell, Row
from renorm.comparison.charts import Table
from renorm.comparison.forecast import BASELINES
from renorm.comparison.score import rounded
from renorm.comparison.spec import TrialResult
from renorm.comparison.verdict import norm_title, setting_title

__all__ = ["series_columns", "series_tables"]

MOST_SERIES = 200  # in a table of the report
_ENDS = ("", "_low", "_high")
Ends = tuple[float, float, float]


def series_columns(analysis: Analysis) -> list[dict[str, Any]]:
    """One dict for each norm, setting and series: its scores, means over seeds, with their intervals over time."""
    return [
        {
            **row.identity,
            "series": name,
            **{key + end: value for key, of in scores.items() for end, value in zip(_ENDS, of, strict=True)},
        }
        for row in analysis.rows
        for name, scores in _scores(row).items()
    ]


def series_tables(analysis: Analysis) -> list[Table]:
    """A table for each setting: every series by the model with the lowest mean, and the MASE of the other rows."""
    tables = [_series_table(cell, setting_title(cell.setting, analysis.varying)) for cell in analysis.cells]
    return [table for table in tables if table is not None]


def _series_table(cell: Cell, title: str) -> Table | None:
    found = [(row, scores) for row in cell.rows if (scores := _scores(row))]
    best = next((at for at, (row, _) in enumerate(found) if row.norm not in BASELINES), None)
    if best is None:
        return None
    row, scores = found.pop(best)
    name = norm_title(row.norm)
    shown = sorted(scores)[:MOST_SERIES]
    part = "" if len(shown) == len(scores) else f"; {len(shown)} of {len(scores)} series"
    return Table(
        caption=f"{title.capitalize()}: {name} series by series, and the MASE of the others; means over seeds, "
        f"intervals by a block bootstrap over time{part}",
        head=("Series", f"MASE of {name}", "MSE", "Correlation", *(norm_title(other.norm) for other, _ in found)),
        rows=tuple(
            (
                series,
                *(_with_interval(scores[series][key]) for key in ("mase", "mse", "correlation")),
                *(_alone(of[series]["mase"]) if series in of else "–" for _, of in found),
            )
            for series in shown
        ),
    )


def _scores(row: Row) -> dict[str, dict[str, Ends]]:
    """Of each series; the ends of an interval are the means of the seeds' ends."""
    trials = [trial for trial in row.trials if trial.status == "ok" and trial.series]
    names = trials[0].series if trials else {}
    return {
        name: {
            key: (_mean(trials, name, key, 0), _mean(trials, name, key, 1), _mean(trials, name, key, 2))
            for key in names[name]
        }
        for name in names
    }


def _mean(trials: Sequence[TrialResult], name: str, key: str, end: int) -> float:
    return math.fsum(trial.series[name][key][end] for trial in trials) / len(trials)


def _with_interval(ends: Ends) -> str:
    value, low, high = ends
    half = (high - low) / 2
    if not math.isfinite(half):
        return _alone(ends)
    return f"{rounded(value, half)} ({rounded(low, half)} to {rounded(high, half)})"


def _alone(ends: Ends) -> str:
    return rounded(ends[0], math.nan)
