"""Curves over a plane as SVG text, without a plotting library; readable on light and on dark pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import numpy.typing as npt

__all__ = ["Line", "Panel", "chart", "colour", "contours", "ticks"]

Floats = npt.NDArray[np.float64]
Range = tuple[float, float]

_WIDTH, _HEIGHT = 300.0, 220.0  # px of the plane inside a panel
_LEFT, _TOP, _RIGHT, _BOTTOM = 44.0, 28.0, 14.0, 26.0  # px around it
_ROW = 18.0  # px for a line of the legend
_FAR = 1e4  # px: what lies farther out is drawn there, since renderers compute in float32


@dataclass(frozen=True)
class Line:
    """One curve; it is interrupted where a point is not finite."""

    points: Floats  # (n, 2): x and y
    colour: str = "currentColor"
    width: float = 2.0  # px
    opacity: float = 1.0
    mark: bool = False  # a dot on its last finite point


@dataclass(frozen=True)
class Panel:
    """One plane with its curves."""

    title: str
    x: Range  # what is shown of each axis; curves are cut off there
    y: Range
    lines: tuple[Line, ...]


def chart(panels: Sequence[Panel], legend: Sequence[tuple[str, str]], label: str) -> str:
    """The panels side by side, above a legend of (name, colour), as SVG text; `label` says in words what they show."""
    each = _LEFT + _WIDTH + _RIGHT
    places, height = _legend(legend, each * len(panels))
    body = "".join(_panel(panel, index * each) for index, panel in enumerate(panels))
    width = each * len(panels)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" aria-label="{escape(label)}" font-family="ui-sans-serif, DejaVu Sans, '
        f'sans-serif" font-size="12" fill="currentColor">{body}{places}</svg>'
    )


def colour(index: int) -> str:
    """A colour for each number; steps of the golden angle keep neighbours far apart, 50% shows on black and white.

    >>> colour(0), colour(1)
    ('hsl(212 70% 50%)', 'hsl(350 70% 50%)')
    """
    return f"hsl({(212 + 137.508 * index) % 360:.0f} 70% 50%)"


def ticks(low: float, high: float) -> list[float]:
    """Three to eight round numbers in [low, high], a step of 1, 2 or 5 times a power of ten apart.

    >>> ticks(-5, 5)
    [-4.0, -2.0, 0.0, 2.0, 4.0]
    """
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(factor * power for factor in (1, 2, 5, 10) if (high - low) / (factor * power) < 7)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def contours(x: Floats, y: Floats, z: Floats, level: float) -> Floats:
    """Where z, given at (len(y), len(x)) grid points, crosses `level`: the ends of line pieces, of shape (m, 2, 2).

    Each cell is cut into two triangles, in which a plane through the corners crosses a level on one straight piece.

    >>> contours(np.array([0.0, 1.0]), np.array([0.0, 1.0]), np.array([[0.0, 1.0], [0.0, 1.0]]), 0.25)[:, :, 0]
    array([[0.25, 0.25],
           [0.25, 0.25]])
    """
    corners = np.stack([*np.meshgrid(x, y), z - level], -1)
    a, b, c, d = corners[:-1, :-1], corners[:-1, 1:], corners[1:, :-1], corners[1:, 1:]
    halves = [np.stack(three, 2).reshape(-1, 3, 3) for three in ((a, b, c), (d, b, c))]
    triangles = np.concatenate(halves)  # (triangle, corner, (x, y, height))
    above = triangles[:, :, 2] > 0
    cut = above.any(1) & ~above.all(1)
    triangles, above = triangles[cut], above[cut]
    # The corner that is alone on its side of the level; the piece goes between the two edges that meet in it.
    alone = np.argmax(above == (above.sum(1) == 1)[:, None], axis=1)
    row = np.arange(len(alone))
    tip = triangles[row, alone]
    pieces = []
    for step in (1, 2):
        other = triangles[row, (alone + step) % 3]
        share = tip[:, 2] / (tip[:, 2] - other[:, 2])
        pieces.append(tip[:, :2] + share[:, None] * (other[:, :2] - tip[:, :2]))
    return np.stack(pieces, 1)


def _panel(panel: Panel, left: float) -> str:
    (x0, x1), (y0, y1) = panel.x, panel.y

    def place(points: Floats) -> Floats:
        scaled = (points - (x0, y1)) * (_WIDTH / (x1 - x0), -_HEIGHT / (y1 - y0))
        return np.clip(scaled, -_FAR, _FAR)

    marks, grid = [], []
    for value in ticks(x0, x1):
        at = (value - x0) / (x1 - x0) * _WIDTH
        grid.append(f"M{at:.1f} 0V{_HEIGHT:g}")
        marks.append(_text(left + _LEFT + at, _TOP + _HEIGHT + 16, f"{value:g}", "middle"))
    for value in ticks(y0, y1):
        at = (y1 - value) / (y1 - y0) * _HEIGHT
        grid.append(f"M0 {at:.1f}H{_WIDTH:g}")
        marks.append(_text(left + _LEFT - 6, _TOP + at + 4, f"{value:g}", "end"))
    # A nested svg cuts its content off at its edges, without an id that two pictures on one page could share.
    return (
        f"{_text(left + _LEFT + _WIDTH / 2, 18, panel.title, 'middle')}{''.join(marks)}"
        f'<svg x="{left + _LEFT:g}" y="{_TOP:g}" width="{_WIDTH:g}" height="{_HEIGHT:g}" overflow="hidden" fill="none">'
        f'<path d="{"".join(grid)}" stroke="currentColor" stroke-opacity="0.12"/>'
        f"{''.join(_line(line, place(line.points)) for line in panel.lines)}"
        f'<rect width="{_WIDTH:g}" height="{_HEIGHT:g}" stroke="currentColor" stroke-opacity="0.5"/></svg>'
    )


def _line(line: Line, places: Floats) -> str:
    path, pen = [], "M"
    last = None
    for x, y in places:
        if not (math.isfinite(x) and math.isfinite(y)):
            pen = "M"
            continue
        path.append(f"{pen}{x:.1f} {y:.1f}")
        pen, last = "L", (x, y)
    dot = f'<circle cx="{last[0]:.1f}" cy="{last[1]:.1f}" r="4" fill="{line.colour}"/>' if line.mark and last else ""
    look = f'stroke="{line.colour}" stroke-width="{line.width:g}" stroke-opacity="{line.opacity:g}"'
    return f'<path d="{"".join(path)}" {look} stroke-linejoin="round"/>{dot}'


def _legend(legend: Sequence[tuple[str, str]], width: float) -> tuple[str, float]:
    """The entries, as many to a row as fit, and the height of the whole picture."""
    parts, x, y = [], _LEFT, _TOP + _HEIGHT + _BOTTOM + 10
    for name, shade in legend:
        needed = 36 + 7.2 * len(name) + 4 * name.count("m")  # px: a stroke, and letters of the font at 12 px
        if x > _LEFT and x + needed > width:
            x, y = _LEFT, y + _ROW
        parts.append(f'<path d="M{x:g} {y - 4:g}h18" stroke="{shade}" stroke-width="3"/>{_text(x + 24, y, name)}')
        x += needed
    return "".join(parts), y + 10


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'
