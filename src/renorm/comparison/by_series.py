"""What a study of forecasts shows besides its norms: each series' scores, and poolings and bars against each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from renorm.comparison.analysis import Analysis
from renorm.comparison.cells import SIGNIFICANCE, Cell, Row, corrected, paired
from renorm.comparison.charts import Table
from renorm.comparison.forecast import BASELINES
from renorm.comparison.score import Estimate, rounded
from renorm.comparison.spec import TrialResult
from renorm.comparison.verdict import norm_title, setting_title, varying_fields

__all__ = ["frame_table", "series_columns", "series_tables"]

MOST_SERIES = 200  # in a table of the report
_ENDS = ("", "_low", "_high")
Ends = tuple[float, float, float]


def series_columns(analysis: Analysis, results: Sequence[TrialResult]) -> list[dict[str, Any]]:
    """One dict for each norm, setting and series: its scores, means over seeds, with their intervals over time."""
    return [
        {
            "norm": row.norm, "batch_size": row.setting.batch_size, "pooling": row.setting.pooling,
            "bar": row.setting.bar, "lr": row.base_lr, "series": name,
            **{key + end: value for key, of in scores.items() for end, value in zip(_ENDS, of, strict=True)},
        }
        for row in analysis.rows
        for name, scores in _scores(row, results).items()
    ]  # fmt: skip


def series_tables(analysis: Analysis, results: Sequence[TrialResult]) -> list[Table]:
    """A table for each setting: every series by the model with the lowest mean, and the MASE of the other rows."""
    varying = varying_fields(analysis.cells)
    tables = [_series_table(cell, setting_title(cell, varying), results) for cell in analysis.cells]
    return [table for table in tables if table is not None]


def _series_table(cell: Cell, title: str, results: Sequence[TrialResult]) -> Table | None:
    found = [(row, scores) for row in cell.rows if (scores := _scores(row, results))]
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


def _scores(row: Row, results: Sequence[TrialResult]) -> dict[str, dict[str, Ends]]:
    """Of each series; the ends of an interval are the means of the seeds' ends."""
    setting = row.setting
    trials = [
        trial for trial in results
        if trial.status == "ok" and trial.series and (trial.spec.norm, trial.spec.base_lr) == (row.norm, row.base_lr)
        and (trial.spec.batch_size, trial.spec.optimizer, trial.spec.activation, trial.spec.pooling, trial.spec.bar)
        == (setting.batch_size, setting.optimizer, setting.activation, setting.pooling, setting.bar)
    ]  # fmt: skip
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


def frame_table(analysis: Analysis) -> Table | None:
    """The pooling and bar with the lowest mean against each other one, norm by norm; None where there is one only."""
    lines: dict[tuple[object, ...], list[Row]] = {}
    for row in (row for row in analysis.rows if row.score.num and row.norm not in BASELINES):
        setting = row.setting
        line = (setting.optimizer, setting.activation, setting.base_lr, setting.batch_size, row.norm)
        lines.setdefault(line, []).append(row)
    varying = varying_fields(analysis.cells)
    fields = [name for name in varying if name in ("pooling", "bar")]
    others = [name for name in varying if name not in ("pooling", "bar", "batch_size")]
    sizes = "batch_size" in varying
    found = []
    for rows in lines.values():
        best, *rest = sorted(rows, key=lambda row: row.score.mean)
        differences = [paired(analysis.score, row, best) for row in rest]
        where = setting_title(Cell(best.setting, (), ()), others, batch_size=sizes)
        for row, difference, p in zip(rest, differences, corrected(differences), strict=True):
            found.append((
                norm_title(best.norm) + (f", {where}" if where else ""),
                *(setting_title(Cell(one.setting, (), ()), fields, batch_size=False) for one in (best, row)),
                *_evidence(analysis, difference, p),
            ))  # fmt: skip
    if not found or not fields:
        return None
    return Table(
        caption=f"The lowest mean over poolings and bars against each other one ({analysis.score.unit})",
        head=("Norm", "Lowest mean", "Other", "Other − lowest (95% interval)", "Pairs", "Corrected p", "Shown"),
        rows=tuple(found),
    )


def _evidence(analysis: Analysis, difference: Estimate, p: float) -> tuple[str, str, str, str]:
    shown = "yes" if p < SIGNIFICANCE else "no"
    told = "–" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"
    return analysis.score.difference(difference), str(difference.num), told, shown
