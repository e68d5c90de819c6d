"""From trials to what they show: a row for each norm and setting, and the differences that hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from renorm.comparison.cells import (
    SIGNIFICANCE,
    Cell,
    Row,
    cells_of,
    corrected,
    ending,
    paired,
)
from renorm.comparison.score import Estimate, Score
from renorm.comparison.spec import Setting, StudyRecord, TrialResult, varying_fields
from renorm.comparison.verdict import notes, sentence

__all__ = ["Analysis", "Change", "analyse"]


@dataclass(frozen=True)
class Change:
    """One norm at the smallest batch size against itself at the largest, by differences of the same seed."""

    norm: str
    setting: Setting  # of the smallest batch size
    small: int  # the smallest batch size
    large: int  # the largest batch size
    difference: Estimate  # score at the smallest minus score at the largest
    p_corrected: float  # by Holm's method over the norms; nan where not tested
    shown: bool  # as in Contrast

    @property
    def verdict(self) -> str:
        """What the test says, in words."""
        if not self.shown:
            return "not tested" if math.isnan(self.p_corrected) else "no change shown"
        return "worse at the small batch" if self.difference.mean > 0 else "better at the small batch"


@dataclass(frozen=True)
class Analysis:
    """What a comparison's trials show, and how sure it is."""

    score: Score
    cells: tuple[Cell, ...]  # in the order of their settings
    changes: tuple[Change, ...]  # each norm from the largest to the smallest batch size
    unfinished: tuple[TrialResult, ...]  # trials without a score, in the grid's order
    num_missing: int  # trials of the grid that have no result yet
    norms: tuple[str, ...]  # in the grid's order
    notes: tuple[str, ...]  # what a reader must know to read the numbers rightly
    sentence: str  # what the evidence supports and what it does not

    @property
    def rows(self) -> tuple[Row, ...]:
        """Every row, cell by cell."""
        return tuple(row for cell in self.cells for row in cell.rows)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The batch sizes compared, ascending."""
        return tuple(sorted({cell.setting.batch_size for cell in self.cells}))

    @cached_property
    def varying(self) -> tuple[str, ...]:
        """The fields in which the settings differ."""
        return varying_fields(cell.setting for cell in self.cells)


def analyse(record: StudyRecord, results: Sequence[TrialResult]) -> Analysis:
    """What the trials of a study show about its norms.

    For each norm and setting the mean score over seeds with its 95% t-interval; for each setting the norm
    with the lowest mean against each other one by a paired t-test over seeds, of log-odds for error rates (the same
    seed means the same initial weights and sample order), corrected by Holm's method; for each norm its change
    between the largest and the smallest batch size.

    The best norm is picked by the same trials that then test it, which Holm's method does not know of:
    simulated with six equal norms and three seeds, some difference is claimed in 7% of the studies, not 5%.

    Results that are no trial of the record's grid, and those of a learning rate's tuning, are left out.

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statistics 6 (1979).
    """
    score = Score.of(record)
    trials = _trials(record, results)
    tuned = bool(record.settings.get("tune_lr"))
    cells = cells_of(score, trials, tuned=tuned)
    missing = len(set(record.keys) - {result.spec.key for result in results})
    return Analysis(
        score=score,
        cells=cells,
        changes=_changes(score, cells),
        unfinished=tuple(trial for trial in trials if ending(score, trial)[0] != "ok"),
        num_missing=missing,
        norms=tuple(dict.fromkeys(trial.spec.norm for trial in trials)),
        notes=notes(record, score, cells, missing),
        sentence=sentence(score, cells, missing),
    )


def _trials(record: StudyRecord, results: Sequence[TrialResult]) -> list[TrialResult]:
    """The results to show, in the grid's order, each trial once."""
    by_key = {result.spec.key: result for result in results}
    final = {key: result for key, result in by_key.items() if result.spec.test} or by_key
    order = {key: place for place, key in enumerate(record.keys)}
    if any(key in order for key in final):
        return [final[key] for key in sorted(final.keys() & order.keys(), key=order.__getitem__)]
    return list(final.values())


def _changes(score: Score, cells: Sequence[Cell]) -> tuple[Change, ...]:
    """Each norm at its smallest batch size minus at its largest, everything else equal."""
    lines: dict[tuple[str, Setting], list[Row]] = {}
    for row in (row for cell in cells for row in cell.rows if row.score.num):
        lines.setdefault((row.norm, replace(row.setting, batch_size=0)), []).append(row)
    ends = [(rows[0], rows[-1]) for rows in lines.values() if len(rows) > 1]
    differences = [paired(score, small, large) for small, large in ends]
    return tuple(
        Change(
            norm=small.norm,
            setting=small.setting,
            small=small.setting.batch_size,
            large=large.setting.batch_size,
            difference=difference,
            p_corrected=p,
            shown=p < SIGNIFICANCE,
        )
        for (small, large), difference, p in zip(ends, differences, corrected(differences), strict=True)
    )
