"""The picture of a pattern: the tensor as a box of cells, cells that share statistics in one colour.

After figure 2 of Wu & He 2018 (arXiv:1803.08494), for any pattern of up to five axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from itertools import product
from pathlib import Path

from renorm.errors import PatternError, RenormError
from renorm.pattern import Pattern, parse

__all__ = ["Drawing", "draw"]

_CELL, _SLANT, _GAP = (
    16.0,
    8.0,
    3.0,
)  # px: a cell's edge, its edge along the depth, the space between split parts
_LEFT, _TOP, _BOTTOM, _RIGHT = 72.0, 26.0, 50.0, 20.0  # px around the box
_MOST_CELLS = 100_000
_DEFAULTS = {"n": 4, "g": 3, "k": 2, "h": 3, "w": 3, "l": 5, "t": 5, "d": 3}


@dataclass(frozen=True)
class Drawing:
    """A picture as SVG text; notebooks show it by themselves."""

    svg: str

    def _repr_svg_(self) -> str:
        return self.svg

    def save(self, path: str | Path) -> Path:
        """Write the picture as SVG or PNG, by the path's ending; PNG needs ``pip install "renorm[compare]"``.

        Raises RenormError for another ending.
        """
        path = Path(path)
        if path.suffix == ".svg":
            path.write_text(self.svg, encoding="utf-8")
        elif path.suffix == ".png":
            path.write_bytes(_png(self.svg))
        else:
            raise RenormError(f"a picture is saved as .svg or .png; got {path.name!r}")
        return path


@dataclass(frozen=True)
class _Axis:
    name: str
    size: int
    reduced: bool


@dataclass(frozen=True)
class _Edge:
    """One direction of the box: the axes laid out along it, the last one running fastest."""

    axes: tuple[_Axis, ...]

    @property
    def size(self) -> int:
        return math.prod(axis.size for axis in self.axes)

    @property
    def label(self) -> str:
        text = " ".join(f"[{axis.name}]" if axis.reduced else axis.name for axis in self.axes)
        return text.replace("] [", " ")

    def indices(self, position: int) -> dict[str, int]:
        result = {}
        for axis in reversed(self.axes):
            position, result[axis.name] = divmod(position, axis.size)
        return result

    def offset(self, position: int, step: float) -> float:
        """Where a cell begins, with a gap wherever an outer axis of a split moves on."""
        block = math.prod(axis.size for axis in self.axes[1:])
        return position * step + (position // block) * _GAP if len(self.axes) > 1 else position * step

    def length(self, step: float) -> float:
        return self.offset(self.size - 1, step) + step


def draw(pattern: str, **sizes: int) -> Drawing:
    """The picture of `pattern` for axes of these sizes: entries of one colour share mean and variance.

    The first dimension runs into the depth, the second to the right, the others down; a tensor of two dimensions runs
    down and to the right. Sizes that name no axis spell out the ellipsis (``h=4, w=4``); those left out are small.

    Raises PatternError for a pattern that cannot be read, more than five axes, or sizes that do not fit.

    >>> draw("n (g [c]) [...]", n=2, g=2, c=3, h=4, w=4).svg[:4]
    '<svg'
    """
    dims = _sized(parse(pattern), sizes)
    edges = _edges(dims)
    if math.prod(edge.size for edge in edges) > _MOST_CELLS:
        raise PatternError(f"a picture has at most {_MOST_CELLS} cells; give smaller sizes", pattern, 0, len(pattern))
    return Drawing(_svg(pattern, *edges))


def _sized(pattern: Pattern, sizes: dict[str, int]) -> list[list[_Axis]]:
    spare = {name: size for name, size in sizes.items() if name not in pattern.names}
    if spare and not pattern.has_ellipsis:
        pattern.check_sizes(sizes)
    if any(not isinstance(size, int) or isinstance(size, bool) or size < 1 for size in sizes.values()):
        raise PatternError(f"the size of an axis must be a positive integer; got {sizes}", pattern.text, 0, 1)
    if not spare:
        leading = pattern.dims[0][0].name == "..."
        spare = {name: _DEFAULTS[name] for name in (("n", "l") if leading else ("h", "w")) if name not in pattern.names}
    dims: list[list[_Axis]] = []
    for parts in pattern.dims:
        if parts[0].name == "...":
            dims += [[_Axis(name, size, parts[0].reduced)] for name, size in spare.items()]
        else:
            default = 2 if len(parts) > 1 else 6
            dims.append([_Axis(a.name, sizes.get(a.name, _DEFAULTS.get(a.name, default)), a.reduced) for a in parts])
    if sum(map(len, dims)) > 5:
        raise PatternError("a picture has at most five axes", pattern.text, 0, len(pattern.text))
    return dims


def _edges(dims: list[list[_Axis]]) -> tuple[_Edge, _Edge, _Edge]:
    """Depth, right, down."""
    if len(dims) == 1:
        return _Edge(()), _Edge(tuple(dims[0])), _Edge(())
    if len(dims) == 2:
        return _Edge(()), _Edge(tuple(dims[1])), _Edge(tuple(dims[0]))
    return (
        _Edge(tuple(dims[0])),
        _Edge(tuple(dims[1])),
        _Edge(tuple(axis for dim in dims[2:] for axis in dim)),
    )


_Point = tuple[float, float]


def _svg(pattern: str, depth: _Edge, right: _Edge, down: _Edge) -> str:
    width = _LEFT + right.length(_CELL) + depth.length(_SLANT) * bool(depth.axes) + _RIGHT
    height = _TOP + down.length(_CELL) + depth.length(_SLANT) * bool(depth.axes) + _BOTTOM
    top = _TOP + depth.length(_SLANT) * bool(depth.axes)
    every = depth.axes + right.axes + down.axes
    num_sets = math.prod(axis.size for axis in every if not axis.reduced)
    set_size = math.prod(axis.size for axis in every if axis.reduced)
    words = f"{num_sets} set{'s' * (num_sets != 1)} of {set_size} entr{'y' if set_size == 1 else 'ies'}"
    body = "".join(_faces(depth, right, down, (_LEFT, top)))
    labels = [
        _text(_LEFT + right.length(_CELL) / 2, top + down.length(_CELL) + 16, right.label),
        _text(_LEFT - 8, top + down.length(_CELL) / 2 + 4, down.label, "end"),
        _text(_LEFT + depth.length(_SLANT) / 2 - 10, top - depth.length(_SLANT) / 2 - 4, depth.label, "end"),
        _text(_LEFT, height - 12, f"{pattern}: {words}", "start"),
    ]
    caption = 7.3 * len(f"{pattern}: {words}") + _LEFT + _RIGHT  # px, of the monospaced font at 12 px
    width = max(width, caption)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" aria-label="{escape(f"{pattern}: {words}")}" '
        f'font-family="ui-monospace, DejaVu Sans Mono, monospace" font-size="12" fill="currentColor">'
        f"{body}{''.join(labels)}</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>' if text else ""


def _faces(depth: _Edge, right: _Edge, down: _Edge, origin: _Point) -> list[str]:
    """The three sides one sees: front, top and right, each set one path, the farther sides a little darker."""
    x0, y0 = origin
    right_end, slant = right.length(_CELL), 1.0 if depth.axes else 0.0

    def front(i: int, j: int) -> list[_Point]:
        x, y = x0 + right.offset(i, _CELL), y0 + down.offset(j, _CELL)
        return [(x, y), (x + _CELL, y), (x + _CELL, y + _CELL), (x, y + _CELL)]

    def upper(i: int, k: int) -> list[_Point]:
        x, z = x0 + right.offset(i, _CELL), depth.offset(k, _SLANT)
        return [
            (x + z, y0 - z),
            (x + _CELL + z, y0 - z),
            (x + _CELL + z + _SLANT, y0 - z - _SLANT),
            (x + z + _SLANT, y0 - z - _SLANT),
        ]

    def side(j: int, k: int) -> list[_Point]:
        x, y, z = x0 + right_end, y0 + down.offset(j, _CELL), depth.offset(k, _SLANT)
        return [
            (x + z, y - z),
            (x + z + _SLANT, y - z - _SLANT),
            (x + z + _SLANT, y - z - _SLANT + _CELL),
            (x + z, y - z + _CELL),
        ]

    last = right.size - 1
    paths = _paint(right, down, front, (depth, 0), 62)
    if slant:
        paths += _paint(right, depth, upper, (down, 0), 72)
        paths += _paint(down, depth, side, (right, last), 50)
    return paths


def _paint(
    first: _Edge,
    second: _Edge,
    corners: Callable[[int, int], list[_Point]],
    fixed: tuple[_Edge, int],
    lightness: int,
) -> list[str]:
    """One path for each set that shows on a side; `fixed` is the direction that leads away from it."""
    paths: dict[tuple[tuple[str, int], ...], list[str]] = {}
    every = (*first.axes, *second.axes, *fixed[0].axes)
    kept = sorted((axis.name, axis.size) for axis in every if not axis.reduced)
    for i, j in product(range(first.size), range(second.size)):
        index = {**first.indices(i), **second.indices(j), **fixed[0].indices(fixed[1])}
        key = tuple((name, index[name]) for name, _ in kept)
        points = " L".join(f"{x:g} {y:g}" for x, y in corners(i, j))
        paths.setdefault(key, []).append(f"M{points}Z")
    return [
        f'<path d="{"".join(cells)}" fill="{_colour(key, kept, lightness)}" stroke="#fff" stroke-width="0.8">'
        f"<title>{escape(', '.join(f'{name}={i}' for name, i in key) or 'one set')}</title></path>"
        for key, cells in paths.items()
    ]


def _colour(key: tuple[tuple[str, int], ...], kept: list[tuple[str, int]], lightness: int) -> str:
    """A hue for each set: steps of the golden angle keep neighbouring numbers far apart."""
    number = 0
    for (_, i), (_, size) in zip(key, kept, strict=True):
        number = number * size + i
    return f"hsl({(212 + 137.508 * number) % 360:.0f} 58% {lightness}%)"


def _png(svg: str) -> bytes:
    try:
        import resvg_py
    except ImportError:
        raise RenormError('a PNG needs the package resvg-py: pip install "renorm[compare]"') from None
    return bytes(resvg_py.svg_to_bytes(svg_string=svg.replace("currentColor", "#222"), background="white", zoom=2))
