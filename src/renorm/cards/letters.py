"""The picture of a pattern in letters: one row for each sample and position, one column for each channel."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from string import ascii_lowercase, ascii_uppercase

from renorm.pattern import Axis, parse

__all__ = ["letters"]

_LETTERS = ascii_uppercase + ascii_lowercase


def letters(pattern: str, sizes: Mapping[str, int]) -> str:
    """Entries with the same letter share statistics. Sizes that name no axis spell out the ellipsis.

    >>> print(letters("n (g [c]) [...]", {"n": 2, "g": 2, "c": 2, "h": 2}))
             g0 c0  g0 c1  g1 c0  g1 c1
    n0 h0  A      A      B      B
    n0 h1  A      A      B      B
    n1 h0  C      C      D      D
    n1 h1  C      C      D      D
    """
    read = parse(pattern)
    dims: list[list[Axis]] = []
    for dim in read.dims:
        if dim[0].name == "...":
            dims += [[Axis(name, dim[0].reduced, 0)] for name in sizes if name not in read.names]
        else:
            dims.append(list(dim))
    across = next((dim for dim in dims if any(axis.name == "c" for axis in dim)), dims[-1])
    down = [axis for dim in dims if dim is not across for axis in dim]
    kept = [axis.name for axis in (*down, *across) if not axis.reduced]
    seen: dict[tuple[int, ...], str] = {}
    columns = _places(across, sizes)
    heads = [" ".join(f"{name}{i}" for name, i in column.items()) for column in columns]
    rows = [("", heads)]
    for row in _places(down, sizes):
        cells = []
        for column in columns:
            index = {**row, **column}
            key = tuple(index[name] for name in kept)
            cells.append(seen.setdefault(key, _LETTERS[len(seen) % len(_LETTERS)]))
        rows.append((" ".join(f"{name}{i}" for name, i in row.items()), cells))
    first = max(len(name) for name, _ in rows)
    width = max(map(len, heads))
    return "\n".join(
        "  ".join([name.ljust(first), *(cell.ljust(width) for cell in cells)]).rstrip() for name, cells in rows
    )


def _places(axes: list[Axis], sizes: Mapping[str, int]) -> list[dict[str, int]]:
    names = [axis.name for axis in axes]
    return [dict(zip(names, place, strict=True)) for place in product(*(range(sizes[name]) for name in names))]
