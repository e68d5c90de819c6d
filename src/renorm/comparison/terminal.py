"""The result of a comparison as a table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from renorm.comparison.analysis import Analysis
from renorm.comparison.cells import Cell, Row
from renorm.comparison.score import OTHER_TITLES, Score, rounded
from renorm.comparison.verdict import norm_title, setting_title

__all__ = ["TerminalTable"]

_WORDS = {
    "best": "★ lowest",
    "open": "no difference shown",
    "worse": "worse",
    "survivor": "lower in some seeds",
    "untested": "not tested",
    "unfinished": "–",
}
_GAP = 2  # between columns


@dataclass(frozen=True)
class _Column:
    head: str
    least: int | None = None  # it may be broken down to this width where the terminal is narrow
    right: bool = False  # numbers


@dataclass(frozen=True)
class TerminalTable:
    """The rows of an analysis, setting by setting, the lowest mean first and marked with a star.

    Below it stands why trials did not finish. Texts from outside are shown as they are, not read as markup.
    """

    analysis: Analysis

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """A title for each setting over the whole width, and rows in columns that stand below each other."""
        analysis, score = self.analysis, self.analysis.score
        columns = _columns(score)
        lines = {id(row): _entries(score, row) for row in analysis.rows}
        widths = _widths(columns, lines.values(), options.max_width)
        yield Text(f"{score.title[:1].upper()}{score.title[1:]}, mean over seeds with its 95% interval", "italic")
        yield _grid(columns, widths, [([column.head for column in columns], "bold")])
        yield Text("─" * min(options.max_width, sum(widths) + _GAP * (len(widths) - 1)))
        for cell in analysis.cells:
            yield Text(_title(analysis, cell), "bold")
            yield _grid(columns, widths, [(lines[id(row)], _style(row)) for row in cell.rows])
            yield Text()
        yield from _reasons(analysis)


def _columns(score: Score) -> list[_Column]:
    return [
        _Column("Norm", least=16),
        _Column("Error %" if score.is_rate else score.name, right=True),
        _Column("95% interval"),
        *(_Column(OTHER_TITLES[key], right=True) for key in score.other_keys),
        _Column("Against the lowest", least=12),
        _Column("Seeds", least=7),
        *([] if score.other_keys else [_Column("ms/step", right=True)]),  # they take its place
    ]


def _entries(score: Score, row: Row) -> list[str]:
    rate = "" if row.setting.base_lr is not None else f", lr {row.base_lr:g}"
    return [
        f" {norm_title(row.norm)}{rate}",
        score.text(row.score).removesuffix("%"),
        score.interval(row.score),
        *(rounded(row.others[key].mean, row.others[key].half_width) for key in score.other_keys),
        _WORDS[row.place],
        row.status,
        *([] if score.other_keys else [rounded(row.seconds_per_step * 1e3, math.nan)]),
    ]


def _widths(columns: Sequence[_Column], lines: Iterable[Sequence[str]], most: int) -> list[int]:
    """As wide as the longest entry; columns that may be broken give way, the last first."""
    widths = [max(map(len, entries)) for entries in zip([column.head for column in columns], *lines, strict=True)]
    excess = sum(widths) + _GAP * (len(widths) - 1) - most
    for at, column in reversed(list(enumerate(columns))):
        if column.least is not None and excess > 0:
            cut = min(excess, max(0, widths[at] - column.least))
            widths[at] -= cut
            excess -= cut
    return widths


def _grid(
    columns: Sequence[_Column], widths: Sequence[int], lines: Iterable[tuple[Sequence[str], str | None]]
) -> Table:
    grid = Table.grid(padding=(0, _GAP, 0, 0), pad_edge=False)
    for column, width in zip(columns, widths, strict=True):
        grid.add_column(width=width, justify="right" if column.right else "left", overflow="fold")
    for entries, style in lines:
        grid.add_row(*map(Text, entries), style=style)
    return grid


def _style(row: Row) -> str | None:
    return "bold" if row.place == "best" else None


def _title(analysis: Analysis, cell: Cell) -> str:
    varying = analysis.varying
    sizes = "pooling" not in varying or "batch_size" in varying
    return setting_title(cell.setting, varying, batch_size=sizes).capitalize()


def _reasons(analysis: Analysis) -> list[Text]:
    """Why trials did not finish, each reason once with the norm and settings it is of."""
    places: dict[tuple[str, str], list[str]] = {}
    for cell in analysis.cells:
        for row in cell.rows:
            for reason in row.reasons:
                places.setdefault((row.norm, reason), []).append(setting_title(cell.setting, analysis.varying))
    return [
        Text(f"{norm_title(norm)}, {' and '.join(where)}: {reason}", "dim") for (norm, reason), where in places.items()
    ]
