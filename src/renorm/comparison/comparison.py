"""What a comparison gives back: the table, the best norm, the sentence, the report."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from renorm.comparison import report
from renorm.comparison.analysis import Analysis, analyse
from renorm.comparison.by_series import series_columns
from renorm.comparison.cells import Cell, Row
from renorm.comparison.criteria import NAMES, criteria_means
from renorm.comparison.spec import StudyRecord, TrialResult
from renorm.comparison.store import Store
from renorm.errors import StudyError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Best", "Comparison"]


@dataclass(frozen=True, repr=False)
class Best:
    """The norm with the lowest mean score at one setting, and those it is not shown to be better than."""

    row: Row  # the best one
    not_different: tuple[Row, ...]  # no difference to the best is shown, or there are too few seeds to test it

    @property
    def norm(self) -> str:
        """The best norm, as the study writes it: "group(32)"."""
        return self.row.norm

    def __repr__(self) -> str:
        others = ", ".join(row.norm for row in self.not_different) or "none"
        mean = f"{self.row.score.mean:.4g}"
        return (
            f"<Best {self.norm!r}: {mean} at batch size {self.row.setting.batch_size}; not shown to differ: {others}>"
        )


@dataclass(frozen=True, repr=False)
class Comparison:
    """The trials of a comparison and what they show."""

    record: StudyRecord  # what was compared, on what data, with which settings and versions
    results: tuple[TrialResult, ...]  # one for each trial, in the grid's order
    folder: Path  # where the trials are kept
    notes: tuple[str, ...] = ()  # what a user should know of this run

    @classmethod
    def load(cls, folder: str | Path) -> Comparison:
        """The comparison that a study's folder holds, as far as its trials have been run.

        Raises:
            StudyError: the folder holds no study.
        """
        store = Store(folder)
        record = store.read_record()
        results = store.read(record.keys)
        return cls(record, tuple(results.values()), store.folder, tuple(store.notes))

    @cached_property
    def analysis(self) -> Analysis:
        """Means, intervals and paired differences; see :func:`renorm.comparison.analysis.analyse`."""
        return analyse(self.record, self.results)

    @property
    def sentence(self) -> str:
        """What the evidence supports, and what it does not."""
        return self.analysis.sentence

    def table(self) -> pd.DataFrame:
        """One row for each norm and setting.

        The score's columns are ``mean``, ``low`` and ``high`` (95% t-interval over seeds) and ``num_seeds``;
        its name and unit stand in ``frame.attrs["score"]``. ``log_likelihood``, ``aic``, ``aicc`` and ``bic`` are
        means over the seeds, of the fit to the training part; see
        :mod:`renorm.measures.criteria` for what they are worth.
        """
        import pandas as pd

        frame = pd.DataFrame(
            [
                _columns(row) | {name: means.get(name, math.nan) for name in NAMES}
                for row in self.analysis.rows
                for means in [criteria_means(row)]
            ]
        )
        frame.attrs["score"] = f"{self.analysis.score.title} ({self.analysis.score.key})"
        return frame

    def series(self) -> pd.DataFrame:
        """Of a study of forecasts one row for each norm, setting and series.

        Its scores ``mase``, ``mse``, ``mae`` and ``correlation`` are means over seeds, each with the ends of its
        interval over time, ``mase_low`` and ``mase_high``: see :func:`renorm.measures.scores.forecasting_scores`.
        """
        import pandas as pd

        return pd.DataFrame(series_columns(self.analysis))

    def best(self, batch_size: int | None = None) -> Best:
        """The best norm at ``batch_size``, or over all settings; with those it is not shown to differ from.

        Norms are tested against each other within one setting only.

        Raises:
            StudyError: no trial has that batch size, or none finished.
        """
        cells = [cell for cell in self.analysis.cells if batch_size in (None, cell.setting.batch_size)]
        finished = [cell for cell in cells if cell.best is not None]
        if not finished:
            sizes = ", ".join(map(str, self.analysis.batch_sizes))
            why = "no trial finished" if cells else f"the batch sizes are {sizes}; got {batch_size}"
            raise StudyError(f"there is no best norm: {why}")
        return _best(min(finished, key=_mean))

    def report(self, path: str | Path | None = None) -> Path:
        """Write the report, one HTML file without outside parts; by default into the study's folder."""
        splits = None
        if len(self.record.data.get("shape", ())) == 3 and any(trial.worst for trial in self.results):
            splits = Store(self.folder).read_data(str(self.record.data.get("fingerprint")))
        return Path(report.write(self.record, self.results, path or self.folder / "report.html", splits))

    def __repr__(self) -> str:
        return f"<Comparison {self.record.name!r}, {len(self.results)} trials: {self.sentence}>"

    def _repr_html_(self) -> str:
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        table = self.table().to_html(escape=True, index=False, float_format="{:.4g}".format)
        return f"<p><b>{html.escape(self.sentence)}</b></p>{table}{notes}"


def _mean(cell: Cell) -> float:
    assert cell.best is not None
    return cell.best.score.mean


def _best(cell: Cell) -> Best:
    assert cell.best is not None
    return Best(cell.best, tuple(row for row in cell.rows if row.place in ("open", "untested")))


def _columns(row: Row) -> dict[str, Any]:
    return {
        **row.identity,
        "mean": row.score.mean,
        "low": row.score.low,
        "high": row.score.high,
        "num_seeds": row.score.num,
        "place": row.place,
        "status": row.status,
        "reason": "; ".join(row.reasons),
        "seconds_per_step": row.seconds_per_step,
        "peak_memory_mb": row.peak_memory_mb,
        "num_parameters": row.num_parameters,
        **{key: value.mean for key, value in row.others.items()},
    }
