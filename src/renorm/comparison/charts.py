"""What the report's charts draw: their points as plain numbers, a text for those who cannot see them, and a table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from renorm.comparison.analysis import Analysis
from renorm.comparison.cells import Cell, Row, ending
from renorm.comparison.score import rounded
from renorm.comparison.spec import TrialResult
from renorm.comparison.verdict import joined, norm_title, setting_title

__all__ = ["Chart", "Table", "cost_charts", "curve_charts", "norms_shown", "score_charts"]

MOST_TABLE_ROWS = 20


@dataclass(frozen=True)
class Table:
    """The rows of an HTML table, as plain text."""

    caption: str  # what the table holds, with units
    head: tuple[str, ...]  # a title for each column
    rows: tuple[tuple[str, ...], ...]  # the first entry of a row names it


@dataclass(frozen=True)
class Chart:
    """One chart of the report."""

    name: str  # unique in the report; the id of its element
    title: str  # the heading above it: the setting it shows; may be empty
    alt: str  # what it shows, in a sentence or two
    table: Table  # the same numbers
    points: dict[str, Any]  # what report.js draws, JSON values only; a number that is not finite is None


def norms_shown(analysis: Analysis) -> list[dict[str, Any]]:
    """The norms with a name each and the place of their colour; no norm is always the first, grey one."""
    others = [norm for norm in analysis.norms if norm != "none"]
    return [
        {"norm": norm, "title": norm_title(norm), "style": 0 if norm == "none" else 1 + others.index(norm)}
        for norm in analysis.norms
    ]


def score_charts(analysis: Analysis) -> list[Chart]:
    """The mean score against the batch size with its interval, one chart for each of the other settings."""
    score = analysis.score
    title = f"{score.title[:1].upper()}{score.title[1:]} ({score.unit})"

    def point(row: Row) -> tuple[float, float, float, str]:
        low, high = score.clipped(row.score)
        text = f"{score.text(row.score)}, 95% interval {score.interval(row.score)}, seeds: {row.status}"
        return row.score.mean * score.factor, low * score.factor, high * score.factor, text

    return _by_batch_size(analysis, "score", title, point, may_be_log=True)


def cost_charts(analysis: Analysis) -> list[Chart]:
    """The time of a step and the peak memory against the batch size; the bars go from the lowest to the highest."""

    def cost(name: str, factor: float, unit: str) -> Callable[[Row], tuple[float, float, float, str]]:
        def point(row: Row) -> tuple[float, float, float, str]:
            values = [getattr(trial, name) * factor for trial in row.trials]
            finite = [value for value in values if math.isfinite(value)]
            if not finite:
                return math.nan, math.nan, math.nan, "–"
            middle, low, high = statistics.median(finite), min(finite), max(finite)
            text = f"{_short(middle)} {unit} ({_short(low)} to {_short(high)})"
            return middle, low, high, text

        return point

    time = _by_batch_size(analysis, "time", "Time of a step (ms)", cost("seconds_per_step", 1e3, "ms"))
    memory = _by_batch_size(analysis, "memory", "Peak memory (MB)", cost("peak_memory_mb", 1.0, "MB"))
    return [chart for pair in zip(time, memory, strict=True) for chart in pair]


def curve_charts(analysis: Analysis) -> list[Chart]:
    """Training and validation loss against the step, one chart for each setting."""
    return [
        _curves(analysis, cell, index, setting_title(cell.setting, analysis.varying).capitalize())
        for index, cell in enumerate(analysis.cells)
    ]


def _by_batch_size(
    analysis: Analysis,
    name: str,
    axis: str,
    point: Callable[[Row], tuple[float, float, float, str]],
    may_be_log: bool = False,
) -> list[Chart]:
    """One chart for each of the other settings: `point` gives a row's value, its bar's ends, and both as text."""
    groups: dict[str, list[Cell]] = {}
    for cell in analysis.cells:
        groups.setdefault(setting_title(cell.setting, analysis.varying, batch_size=False), []).append(cell)
    charts = []
    for index, (title, cells) in enumerate(groups.items()):
        series = [_series(norm, cells, point) for norm in analysis.norms]
        values = [value for one in series for value in one["y"] if value is not None]
        points = {
            "kind": "batch",
            "axis": axis,
            "ticks": list(analysis.batch_sizes),
            "series": series,
            "log": may_be_log and bool(values) and min(values) > 0 and max(values) / min(values) > 8,
        }
        charts.append(
            Chart(
                name=f"{name}-{index}",
                title=title,
                alt=_alt_by_batch_size(axis, title, series),
                table=_table_by_batch_size(axis, series, analysis.batch_sizes),
                points=points,
            )
        )
    return charts


def _series(
    norm: str, cells: Iterable[Cell], point: Callable[[Row], tuple[float, float, float, str]]
) -> dict[str, Any]:
    rows = [row for cell in cells for row in cell.rows if row.norm == norm and row.score.num]
    found = [point(row) for row in rows]
    return {
        "norm": norm,
        "x": [row.setting.batch_size for row in rows],
        "y": [_finite(value) for value, _, _, _ in found],
        "low": [_finite(low) for _, low, _, _ in found],
        "high": [_finite(high) for _, _, high, _ in found],
        "text": [text for _, _, _, text in found],
    }


def _alt_by_batch_size(axis: str, title: str, series: Sequence[dict[str, Any]]) -> str:
    words = []
    for one in series:
        pairs = [f"{_short(y)} at batch size {x}" for x, y in zip(one["x"], one["y"], strict=True) if y is not None]
        if pairs:
            words.append(f"{norm_title(one['norm'])} {joined(pairs)}")
    setting = f", {title}" if title else ""
    return f"{axis} against the batch size{setting}. {'; '.join(words) or 'No trial finished'}."


def _table_by_batch_size(axis: str, series: Sequence[dict[str, Any]], sizes: Sequence[int]) -> Table:
    rows = []
    for one in series:
        texts = dict(zip(one["x"], one["text"], strict=True))
        rows.append((norm_title(one["norm"]), *(texts.get(size, "–") for size in sizes)))
    return Table(axis, ("Norm", *(f"Batch size {size}" for size in sizes)), tuple(rows))


def _curves(analysis: Analysis, cell: Cell, index: int, title: str) -> Chart:
    rows = sorted(cell.rows, key=lambda row: analysis.norms.index(row.norm))
    series = [one for row in rows if (one := _curve_series(analysis, row))["steps"]]
    return Chart(
        name=f"curves-{index}",
        title=title,
        alt=_alt_curves(title, series),
        table=_table_curves(series),
        points={"kind": "curves", "series": series},
    )


def _curve_series(analysis: Analysis, row: Row) -> dict[str, Any]:
    """Each seed's curve, and at each step the mean over the seeds that finished."""
    trials = row.trials
    done = [trial for trial in trials if ending(analysis.score, trial)[0] == "ok"]
    steps = sorted({point.step for trial in trials for point in trial.curve})
    return {
        "norm": row.norm,
        "steps": steps,
        "train": [_mean_at(done, step, "train_loss") for step in steps],
        "valid": [_mean_at(done, step, "valid_loss") for step in steps],
        "seeds": [
            {
                "seed": trial.spec.seed,
                "steps": [point.step for point in trial.curve],
                "train": [_finite(point.train_loss) for point in trial.curve],
                "valid": [_finite(point.valid_loss) for point in trial.curve],
            }
            for trial in trials
        ],
    }


def _mean_at(trials: Sequence[TrialResult], step: int, name: str) -> float | None:
    values = [getattr(point, name) for trial in trials for point in trial.curve if point.step == step]
    return _finite(math.fsum(values) / len(values)) if values else None


def _alt_curves(title: str, series: Sequence[dict[str, Any]]) -> str:
    words = []
    for one in series:
        ends = [(t, v) for t, v in zip(one["train"], one["valid"], strict=True) if t is not None and v is not None]
        if ends:
            words.append(f"{norm_title(one['norm'])} {_short(ends[-1][0])} and {_short(ends[-1][1])}")
    last = "; ".join(words) or "none finished"
    return f"Training and validation loss by step, {title}. At the last step: {last}."


def _table_curves(series: Sequence[dict[str, Any]]) -> Table:
    steps = sorted({step for one in series for step in one["steps"]})
    kept = _evenly(steps, MOST_TABLE_ROWS)
    lookup = [
        {
            step: f"{_short(t)} / {_short(v)}"
            for step, t, v in zip(one["steps"], one["train"], one["valid"], strict=True)
        }
        for one in series
    ]
    return Table(
        caption="Training / validation loss, mean over the seeds that finished"
        + ("" if len(kept) == len(steps) else f"; {len(kept)} of {len(steps)} points"),
        head=("Step", *(norm_title(one["norm"]) for one in series)),
        rows=tuple((str(step), *(texts.get(step, "–") for texts in lookup)) for step in kept),
    )


def _evenly(items: Sequence[int], most: int) -> list[int]:
    """At most `most` items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def _finite(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _short(value: float | None) -> str:
    return "–" if value is None else rounded(value, math.nan)
