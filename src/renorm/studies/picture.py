"""Pictures of means over seeds: lines against a setting or a step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from renorm.choices.picture import Line, Panel, chart, colour
from renorm.studies.rows import Interval

__all__ = ["Plot", "draw", "points"]


@dataclass(frozen=True)
class Plot:
    """One plane: named curves of (x, y) points, in the units of the title."""

    title: str
    curves: Mapping[str, Sequence[tuple[float, float]]]  # by the name in the legend
    log_x: bool = False  # the axis shows log10 of x; say so in the title
    log_y: bool = False
    joined: bool = True  # False: dots without lines between them


def points(x: Sequence[float], found: Sequence[Interval]) -> list[tuple[float, float]]:
    """The means against x."""
    return [(a, one.mean) for a, one in zip(x, found, strict=True)]


def draw(plots: Sequence[Plot], label: str) -> str:
    """The planes side by side with one legend, as SVG text; a curve has the same colour in all of them."""
    names = list(dict.fromkeys(name for plot in plots for name in plot.curves))
    colours = {name: colour(index) for index, name in enumerate(names)}
    return chart([_panel(plot, colours) for plot in plots], list(colours.items()), label)


def _panel(plot: Plot, colours: Mapping[str, str]) -> Panel:
    lines = []
    for name, curve in plot.curves.items():
        xy = np.array(curve, dtype=np.float64).reshape(-1, 2)
        with np.errstate(divide="ignore", invalid="ignore"):
            for column, log in enumerate((plot.log_x, plot.log_y)):
                xy[:, column] = np.log10(xy[:, column]) if log else xy[:, column]
        lines += [Line(part, colours[name], mark=True) for part in ([xy] if plot.joined else xy[:, None])]
    every = np.concatenate([line.points for line in lines])
    every = every[np.isfinite(every).all(1)]
    return Panel(plot.title, _range(every[:, 0], 0.02), _range(every[:, 1], 0.06), tuple(lines))


def _range(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]], margin: float) -> tuple[float, float]:
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    space = (high - low) * margin or max(1.0, abs(low)) * margin
    return low - space, high + space if math.isfinite(high) else low + 1.0
