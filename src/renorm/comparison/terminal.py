"""The result of a comparison as a table for the terminal."""

from __future__ import annotations

import math

from rich import box
from rich.table import Table
from rich.text import Text

from renorm.comparison.analysis import Analysis
from renorm.comparison.cells import Cell, Row
from renorm.comparison.score import OTHER_TITLES, rounded
from renorm.comparison.verdict import norm_title, setting_title

__all__ = ["table"]

_WORDS = {
    "best": "★ lowest",
    "open": "no difference shown",
    "worse": "worse",
    "survivor": "lower in some seeds",
    "untested": "not tested",
    "unfinished": "–",
}


def table(analysis: Analysis) -> Table:
    """The rows of an analysis, setting by setting, the lowest mean first and marked with a star.

    Below it stands why trials did not finish. Texts from outside are shown as they are, not read as markup.
    """
    score = analysis.score
    shown = Table(
        title=Text(f"{score.title[:1].upper()}{score.title[1:]}, mean over seeds with its 95% interval"),
        title_justify="left",
        caption=_reasons(analysis),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    # A pattern may be long; the other names must not give way to the words beside them.
    longest = max((len(norm_title(row.norm)) for row in analysis.rows), default=0)
    shown.add_column("Norm", no_wrap=longest <= 22, overflow="fold")
    shown.add_column("Error %" if score.is_rate else score.name, justify="right", no_wrap=True)
    shown.add_column("95% interval", no_wrap=True)
    for key in score.other_keys:
        shown.add_column(OTHER_TITLES[key], justify="right", no_wrap=True)
    shown.add_column("Against the lowest", no_wrap=not score.other_keys)
    shown.add_column("Seeds", min_width=6 if score.other_keys else 8, max_width=10)
    if not score.other_keys:  # they take its place
        shown.add_column("ms/step", justify="right", no_wrap=True)
    for cell in analysis.cells:
        _add(shown, analysis, cell)
    return shown


def _add(shown: Table, analysis: Analysis, cell: Cell) -> None:
    varying = analysis.varying
    title = setting_title(cell.setting, varying, batch_size="pooling" not in varying or "batch_size" in varying)
    shown.add_row(Text(title.capitalize(), style="bold"))
    for row in cell.rows:
        shown.add_row(*_entries(analysis, row), style="bold" if row.place == "best" else None)
    shown.add_section()


def _entries(analysis: Analysis, row: Row) -> list[Text]:
    score = analysis.score
    rate = "" if row.setting.base_lr is not None else f", lr {row.base_lr:g}"
    return [
        Text(f" {norm_title(row.norm)}{rate}"),
        Text(score.text(row.score).removesuffix("%")),
        Text(score.interval(row.score)),
        *(Text(rounded(row.others[key].mean, row.others[key].half_width)) for key in score.other_keys),
        Text(_WORDS[row.place]),
        Text(row.status),
        *([] if score.other_keys else [Text(rounded(row.seconds_per_step * 1e3, math.nan))]),
    ]


def _reasons(analysis: Analysis) -> Text | None:
    """Why trials did not finish, each reason once with the norm and settings it is of."""
    places: dict[tuple[str, str], list[str]] = {}
    for cell in analysis.cells:
        for row in cell.rows:
            for reason in row.reasons:
                places.setdefault((row.norm, reason), []).append(setting_title(cell.setting, analysis.varying))
    lines = [f"{norm_title(norm)}, {' and '.join(where)}: {reason}" for (norm, reason), where in places.items()]
    return Text("\n".join(lines), style="dim") if lines else None
