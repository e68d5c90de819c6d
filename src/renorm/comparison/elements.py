"""The elements the report's sections are made of; text is escaped here, once."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from renorm.comparison.charts import Chart, Table

__all__ = ["facts", "figure", "scrolling", "swatch", "table"]


def swatch(style: int) -> str:
    """A norm's line and marker as they are in the charts; report.js draws the marker's shape."""
    return f'<svg class="swatch" data-style="{style}" viewBox="0 0 28 12" aria-hidden="true"></svg>'


def figure(chart: Chart) -> str:
    """A chart with its title, its text alternative and its numbers."""
    axis = chart.points.get("axis", "")
    title = " · ".join(part for part in (axis, chart.title) if part)
    return (
        f'<figure class="chart {chart.points["kind"]}"><figcaption>{escape(title)}</figcaption>'
        f'<div class="plot" id="{chart.name}" role="img" aria-label="{escape(chart.alt)}"></div>'
        f"<details><summary>The numbers</summary>{table(chart.table)}</details></figure>"
    )


def facts(values: Mapping[str, Any]) -> str:
    """Names and values, as a description list."""
    items = "".join(
        f"<div><dt>{escape(str(name).replace('_', ' '))}</dt><dd>{escape(_value(value))}</dd></div>"
        for name, value in values.items()
    )
    return f'<dl class="facts">{items}</dl>'


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name}: {_value(item)}" for name, item in value.items()) or "–"
    if isinstance(value, (list, tuple)):
        return ", ".join(_value(item) for item in value) or "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "–" if value is None or value == "" else str(value)


def table(content: Table) -> str:
    """A table with its caption; the first entry of a row is its head."""
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in content.head)
    rows = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(text)}</td>" for text in rest)}</tr>'
        for first, *rest in content.rows
    )
    return scrolling(
        content.caption,
        f"<table><caption>{escape(content.caption)}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>",
    )


def scrolling(label: str, table: str) -> str:
    """A table that scrolls sideways where the window is narrow, by touch and by keyboard."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">{table}</div>'
