"""The report's tables of differences: between norms, between batch sizes, and between the other choices of a study."""

from __future__ import annotations

import math
from collections.abc import Sequence

from renorm.comparison.analysis import Analysis, Change
from renorm.comparison.cells import SIGNIFICANCE, Row, corrected, paired
from renorm.comparison.charts import Table
from renorm.comparison.forecast import BASELINES
from renorm.comparison.verdict import joined, norm_title, setting_title

__all__ = ["between_batch_sizes", "between_choices", "between_norms"]

# The learning rate is none of them: the better of two is for tuning, which leaves the test part alone.
CHOICES = {
    "model": "models", "optimizer": "optimizers", "activation": "activations", "loss": "losses",
    "dropout": "shares of dropout", "pooling": "poolings", "bar": "bars",
}  # fmt: skip


def between_norms(analysis: Analysis) -> Table | None:
    """The norm with the lowest mean against each other one, setting by setting."""
    contrasts = [item for cell in analysis.cells for item in cell.comparisons]
    if not contrasts:
        return None
    return Table(
        caption=f"The lowest mean against each other norm ({_unit(analysis)})",
        head=("Setting", "Lowest mean", "Other norm", "Other − lowest (95% interval)", "Pairs", "Corrected p", "Shown"),
        rows=tuple(
            (
                setting_title(item.setting, analysis.varying).capitalize(),
                norm_title(item.best),
                norm_title(item.other),
                analysis.score.difference(item.difference),
                str(item.difference.num),
                _p(item.p_corrected),
                "yes" if item.shown else "no",
            )
            for item in contrasts
        ),
    )


def between_batch_sizes(analysis: Analysis) -> Table | None:
    """Each norm at the smallest batch size against itself at the largest."""
    if not analysis.changes:
        return None
    return Table(
        caption=f"Each norm from the largest to the smallest batch size ({_unit(analysis)})",
        head=("Norm", "Batch sizes", "Small − large (95% interval)", "Pairs", "Corrected p", "Verdict"),
        rows=tuple(_change(analysis, change) for change in analysis.changes),
    )


def _change(analysis: Analysis, change: Change) -> tuple[str, ...]:
    setting = setting_title(change.setting, analysis.varying, batch_size=False)
    return (
        norm_title(change.norm) + (f", {setting}" if setting else ""),
        f"{change.large} to {change.small}",
        analysis.score.difference(change.difference),
        str(change.difference.num),
        _p(change.p_corrected),
        change.verdict,
    )


def between_choices(analysis: Analysis) -> tuple[str, Table] | None:
    """The choice with the lowest mean against each other one, norm by norm, and what is chosen; None of one choice."""
    choices = [name for name in analysis.varying if name in CHOICES]
    if not choices:
        return None
    rows = [row for line in _lines(analysis, choices) for row in _choices(analysis, line, choices)]
    title = joined([CHOICES[name] for name in choices])
    table = Table(
        caption=f"The lowest mean over {title} against each other one ({_unit(analysis)})",
        head=("Norm", "Lowest mean", "Other", "Other − lowest (95% interval)", "Pairs", "Corrected p", "Shown"),
        rows=tuple(rows),
    )
    return (title, table) if rows else None


def _lines(analysis: Analysis, choices: Sequence[str]) -> list[list[Row]]:
    """The rows that differ in nothing but the choices, the lowest mean first of those that finished the most seeds."""
    fixed = [name for name in analysis.varying if name not in choices]
    lines: dict[tuple[object, ...], list[Row]] = {}
    for row in analysis.rows:
        if row.score.num and row.norm not in BASELINES:
            lines.setdefault((row.norm, *(getattr(row.setting, name) for name in fixed)), []).append(row)
    return [sorted(line, key=lambda row: (-row.score.num, row.score.mean)) for line in lines.values()]


def _choices(analysis: Analysis, line: Sequence[Row], choices: Sequence[str]) -> list[tuple[str, ...]]:
    best, *others = line
    differences = [paired(analysis.score, row, best) for row in others]
    fixed = [name for name in analysis.varying if name not in choices]
    where = setting_title(best.setting, fixed, batch_size="batch_size" in fixed)
    return [
        (
            norm_title(best.norm) + (f", {where}" if where else ""),
            setting_title(best.setting, choices, batch_size=False),
            setting_title(row.setting, choices, batch_size=False),
            analysis.score.difference(difference),
            str(difference.num),
            _p(p),
            "yes" if p < SIGNIFICANCE else "no",
        )
        for row, difference, p in zip(others, differences, corrected(differences), strict=True)
    ]


def _unit(analysis: Analysis) -> str:
    return "percentage points" if analysis.score.is_rate else analysis.score.unit


def _p(p: float) -> str:
    if math.isnan(p):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
