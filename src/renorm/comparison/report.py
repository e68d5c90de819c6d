"""The report of a comparison: one HTML file that needs nothing else and asks nothing of a network."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from functools import cache
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs

from renorm.comparison.analysis import analyse
from renorm.comparison.atomic import writing
from renorm.comparison.charts import Chart, cost_charts, curve_charts, norms_shown, score_charts
from renorm.comparison.data import Splits
from renorm.comparison.sections import Page, body
from renorm.comparison.spec import StudyRecord, TrialResult

__all__ = ["html", "write"]


def write(record: StudyRecord, results: Sequence[TrialResult], path: str | Path, splits: Splits | None = None) -> Path:
    """Write the report of a study to `path` and return it; the file is whole or absent, never half written.

    With the study's data as `splits` it shows pictures of samples that are images.

    Raises:
        OSError: the file cannot be written; a report that was there before is kept.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # A name read from a broken file name can hold what UTF-8 cannot: it becomes a question mark.
    content = html(record, results, splits).encode("utf-8", errors="replace")
    with writing(target) as file:
        file.write(content)
    return target


def html(record: StudyRecord, results: Sequence[TrialResult], splits: Splits | None = None) -> str:
    """The report as text; the same study gives the same text."""
    analysis = analyse(record, results)
    page = Page(
        record=record,
        results=tuple(results),
        analysis=analysis,
        norms=tuple(norms_shown(analysis)),
        scores=tuple(score_charts(analysis)),
        curves=tuple(curve_charts(analysis)),
        costs=tuple(cost_charts(analysis)),
        splits=splits,
    )
    style, script, plotly = _part("report.css"), _part("report.js"), _plotly()
    return Template(_part("report.html")).substitute(
        title=escape(record.name),
        policy=escape(_policy(scripts=(plotly, script), styles=(style, ""))),
        style=style,
        placeholders="".join(f'<style id="{name}"></style>' for name in _unwanted_styles(plotly)),
        body=body(page),
        data=_json({"norms": page.norms, "charts": _points((*page.scores, *page.curves, *page.costs))}),
        plotly=plotly,
        script=script,
    )


def _points(charts: Sequence[Chart]) -> dict[str, dict[str, Any]]:
    return {chart.name: chart.points for chart in charts}


def _policy(scripts: Sequence[str], styles: Sequence[str]) -> str:
    """The content security policy: these scripts and styles by their hashes, images within the file, nothing else.

    Plotly fills an empty style element through the object model, which is why the empty style is among them.
    """
    return "; ".join([
        "default-src 'none'",
        f"script-src {' '.join(map(_hash, scripts))}",
        f"style-src {' '.join(map(_hash, styles))}",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
    ])  # fmt: skip


def _unwanted_styles(plotly: str) -> list[str]:
    """The ids of the style elements Plotly adds for maps unless they are there; the policy would refuse them."""
    return re.findall(r'getElementById\("([0-9a-f]{64})"\)', plotly)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json(value: object) -> str:
    """JSON that is safe inside a script element: nothing in it can end the element or open a comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # ASCII only: U+2028 arrives escaped
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@cache
def _part(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8").strip()


@cache
def _plotly() -> str:
    # Browsers hash a script after turning its line ends into \n.
    return str(get_plotlyjs()).replace("\r\n", "\n").replace("\r", "\n")
