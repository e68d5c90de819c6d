"""The notation: text such as ``n (g [c]) [...]`` is read into a `Pattern`; at a rank it becomes a `Partition`.

A pattern names a tensor's dimensions in their logical order, separated by spaces. Axes in brackets are
averaged over ("reduced"), the others are kept: each combination of kept indices is one set of entries that
share statistics. Parentheses split one dimension into several axes, ``...`` stands for any number of
dimensions. The bracket notation is einx's (https://einx.readthedocs.io).
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NoReturn

from torch import Tensor

from renorm.errors import PatternError, ShapeError

__all__ = ["Axis", "Partition", "Pattern", "parse", "partition"]

_TOKEN = re.compile(r"\.\.\.|->|[A-Za-z_][A-Za-z_0-9]*|\d+|\S")
_NAME = re.compile(r"[A-Za-z_][A-Za-z_0-9]*\Z")
_HINTS = {
    ",": "axes are separated by spaces: leave the comma out",
    "->": "a norm keeps the shape, so a pattern has no arrow: write the input's axes only",
    "…": "write three dots, ...",
    ".": "write three dots, ..., for any number of dimensions",
    "*": "write ... for any number of dimensions",
}


@dataclass(frozen=True)
class Axis:
    """One axis of a pattern: a whole dimension, a part of a split one, or the ellipsis."""

    name: str  # an identifier, or "..."
    reduced: bool  # in brackets: averaged over
    column: int  # where it stands in the text, for error messages


@dataclass(frozen=True)
class Pattern:
    """A pattern that has been read.

    >>> parse("n (g [c]) [...]")
    Pattern('n (g [c]) [...]')
    """

    text: str  # as the user wrote it
    dims: tuple[tuple[Axis, ...], ...]  # one entry for each dimension (or the ellipsis); several axes: it is split

    def __repr__(self) -> str:
        return f"Pattern({self.text!r})"

    def __hash__(self) -> int:
        return hash(self.text)

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Every axis from left to right, the ellipsis included."""
        return tuple(axis for dim in self.dims for axis in dim)

    @property
    def names(self) -> tuple[str, ...]:
        """The names from left to right, without the ellipsis."""
        return tuple(axis.name for axis in self.axes if axis.name != "...")

    @property
    def has_ellipsis(self) -> bool:
        """Whether ``...`` occurs."""
        return any(axis.name == "..." for axis in self.axes)

    @property
    def least_rank(self) -> int:
        """Dimensions of the smallest tensor it fits: the ellipsis may stand for none."""
        return len(self.dims) - self.has_ellipsis

    def fail(self, name: str, message: str) -> NoReturn:
        """Raise a PatternError with the caret under the axis called `name`."""
        axis = next(axis for axis in self.axes if axis.name == name)
        raise PatternError(message, self.text, axis.column, len(name))

    def beside(self, name: str) -> tuple[str, ...]:
        """The axes of the dimension that holds the axis `name`: ``("g", "c")`` for c in ``n (g [c])``."""
        for dim in self.dims:
            if any(axis.name == name for axis in dim):
                return tuple(axis.name for axis in dim)
        return ()

    def select(self, names: str, what: str) -> tuple[str, ...]:
        """Split `names` at spaces and check that each is an axis of this pattern; `what` is for the error."""
        chosen = tuple(names.split())
        for name in chosen:
            if name not in self.names:
                raise PatternError(
                    f"{what} names the axis {name!r}, which the pattern does not have{_closest(name, self.names)}",
                    self.text,
                    0,
                    len(self.text),
                )
        return tuple(name for name in self.names if name in chosen)

    def check_sizes(self, sizes: Mapping[str, int]) -> None:
        """Every size must belong to an axis and be a positive integer."""
        for name, size in sizes.items():
            if name not in self.names:
                raise PatternError(
                    f"there is a size {name}={size!r} but no axis {name!r}{_closest(name, self.names)}",
                    self.text,
                    0,
                    len(self.text),
                )
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                self.fail(name, f"the size of an axis must be a positive integer; got {name}={size!r}")
        for dim in self.dims:
            unknown = [axis for axis in dim if axis.name not in sizes]
            if len(dim) > 1 and len(unknown) > 1:
                names = " or ".join(f"{axis.name}=" for axis in unknown)
                self.fail(unknown[1].name, f"a split dimension can leave only one size open; pass also {names}")


def _closest(name: str, names: Iterable[str]) -> str:
    known = list(names)
    match = difflib.get_close_matches(name, known, 1, 0.5)
    hint = f"; did you mean {match[0]!r}?" if match else ""
    return f" (it has {', '.join(known) or 'no named axis'}){hint}"


@lru_cache(maxsize=1024)
def parse(text: str) -> Pattern:
    """Read a pattern.

    A dimension is an axis name, ``(...)`` around the axes it is split into, or ``...``; brackets go around
    whatever is averaged over, inside or outside parentheses, and do not nest.

    Raises PatternError, with a caret under the place, for anything else.

    >>> [axis.name for axis in parse("n (g [c]) [...]").axes if axis.reduced]
    ['c', '...']
    """
    if not isinstance(text, str):
        raise PatternError(f"a pattern is text such as 'n (g [c]) [...]'; got {type(text).__name__}")
    reader = _Reader(text)
    for match in _TOKEN.finditer(text):
        reader.take(match.group(), match.start())
    return reader.finish()


class _Reader:
    """The state of reading one pattern from left to right."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.dims: list[tuple[Axis, ...]] = []
        self.split: list[Axis] = []
        self.seen: dict[str, int] = {}
        self.bracket: int | None = None  # column of the open [
        self.paren: int | None = None  # column of the open (
        self.count_at_bracket = 0

    def fail(self, message: str, column: int, width: int = 1) -> NoReturn:
        raise PatternError(message, self.text, column, width)

    def take(self, token: str, column: int) -> None:
        if token in "[]":
            self.take_bracket(token, column)
        elif token in "()":
            self.take_paren(token, column)
        elif token == "..." or _NAME.match(token):
            self.take_axis(token, column)
        elif token.isdigit():
            self.fail("an axis has a name; write one, and pass its size: g=" + token, column, len(token))
        else:
            self.fail(
                _HINTS.get(token, f"{token!r} has no meaning in a pattern: use names, ( ), [ ] and ..."),
                column,
            )

    def take_bracket(self, token: str, column: int) -> None:
        if token == "[":
            if self.bracket is not None:
                self.fail("brackets do not nest: close the first [ before this one", column)
            self.bracket, self.count_at_bracket = column, len(self.seen)
            self.bracket_in_paren = self.paren is not None
            return
        if self.bracket is None:
            self.fail("this ] has no [ before it", column)
        if self.bracket_in_paren != (self.paren is not None):
            self.fail("brackets and parentheses overlap: close the inner one first", column)
        if len(self.seen) == self.count_at_bracket:
            self.fail("these brackets are empty: write the axes to average over", self.bracket, 2)
        self.bracket = None

    def take_paren(self, token: str, column: int) -> None:
        if token == "(":
            if self.paren is not None:
                self.fail("parentheses do not nest: write all parts in one pair, (a b c)", column)
            self.paren = column
            return
        if self.paren is None:
            self.fail("this ) has no ( before it", column)
        if self.bracket is not None and self.bracket > self.paren:
            self.fail("brackets and parentheses overlap: close the inner one first", column)
        if not self.split:
            self.fail("these parentheses are empty: write the axes the dimension is split into", self.paren, 2)
        self.dims.append(tuple(self.split))
        self.split, self.paren = [], None

    def take_axis(self, name: str, column: int) -> None:
        if name in self.seen:
            what = "the ellipsis" if name == "..." else f"the axis {name!r}"
            self.fail(f"{what} occurs twice: each axis once", column, len(name))
        if name == "..." and self.paren is not None:
            self.fail("... stands for whole dimensions and cannot be a part of a split one", column, 3)
        self.seen[name] = column
        axis = Axis(name, self.bracket is not None, column)
        if self.paren is not None:
            self.split.append(axis)
        else:
            self.dims.append((axis,))

    def finish(self) -> Pattern:
        if self.bracket is not None:
            self.fail("this [ is never closed: write ] after the axes to average over", self.bracket)
        if self.paren is not None:
            self.fail("this ( is never closed: write )", self.paren)
        pattern = Pattern(self.text, tuple(self.dims))
        if not pattern.axes:
            self.fail("the pattern is empty: write the axes, such as '[n] c [...]'", 0)
        if not any(axis.reduced for axis in pattern.axes):
            self.fail("no axis is in brackets: put [ ] around those that share statistics", 0, len(self.text))
        return pattern


@dataclass(frozen=True)
class Partition:
    """A pattern at a rank: which entries of a tensor share statistics, whatever its sizes and strides.

    Its axes are the dimensions of the *split view*: the tensor with every split dimension unflattened.
    Statistics have the split view's shape with 1 on each reduced axis.
    """

    pattern: Pattern
    rank: int  # dimensions of the tensor
    names: tuple[str, ...]  # of the split view's axes; those of the ellipsis are "...0", "...1", ...
    dims: tuple[int, ...]  # for each axis of the split view, the dimension it comes from
    sizes: tuple[int | None, ...]  # for each axis, its size where it was given
    reduced: tuple[int, ...]  # axes averaged over
    kept: tuple[int, ...]  # the other axes: they number the sets
    weighted: tuple[int, ...]  # axes the parameters run along
    demands: tuple[tuple[int, int, bool], ...]  # (dimension, size, exactly or as a multiple) that must hold
    splits: tuple[tuple[int, tuple[int, ...]], ...]  # (dimension, sizes of its axes, -1 for the open one), last first

    def __hash__(self) -> int:
        return hash((self.pattern.text, self.rank, self.sizes, self.weighted))

    @property
    def roles(self) -> str:
        """One letter an axis: k kept, r reduced; upper case where the parameters run along it."""
        letters = ("r" if i in self.reduced else "k" for i in range(len(self.names)))
        return "".join(c.upper() if i in self.weighted else c for i, c in enumerate(letters))

    def check(self, shape: Sequence[int]) -> None:
        """Raise ShapeError where `shape` does not fit the sizes that were given."""
        if len(shape) != self.rank:
            raise ShapeError(f"the pattern {self.pattern.text!r} is bound to {self.rank} dimensions; got {len(shape)}")
        for dim, known, exact in self.demands:
            if shape[dim] != known if exact else shape[dim] % known != 0:
                self._misfit(dim, known, exact, shape)

    def _misfit(self, dim: int, known: int, exact: bool, shape: Sequence[int]) -> NoReturn:
        axes = [i for i, d in enumerate(self.dims) if d == dim]
        given = ", ".join(f"{self.names[i]}={self.sizes[i]}" for i in axes if self.sizes[i] is not None)
        axis = next(axis for axis in self.pattern.axes if axis.name == self.names[axes[0]])
        must = f"{known}" if exact else f"a multiple of {known}"
        caret = PatternError(
            f"dimension {dim} must have {must} entries ({given}); the input has shape {tuple(shape)}",
            self.pattern.text,
            axis.column,
            len(axis.name),
        )
        raise ShapeError(str(caret))

    def split_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the split view; raises ShapeError where `shape` does not fit."""
        self.check(shape)
        known = [
            math.prod(s or 1 for s, d in zip(self.sizes, self.dims, strict=True) if d == dim)
            for dim in range(self.rank)
        ]
        return tuple(
            shape[dim] // known[dim] if size is None else size for size, dim in zip(self.sizes, self.dims, strict=True)
        )

    def view(self, x: Tensor) -> Tensor:
        """The split view of `x`: never a copy."""
        for dim, sizes in self.splits:
            x = x.unflatten(dim, sizes)  # type: ignore[no-untyped-call]
        return x

    def set_size(self, x: Tensor) -> int:
        """How many entries of `x` share statistics, those that a mask leaves out among them."""
        split = self.view(x).shape
        return math.prod([split[i] for i in self.reduced])


@lru_cache(maxsize=4096)
def _partition(pattern: Pattern, rank: int, sizes: tuple[tuple[str, int], ...], weighted: tuple[str, ...]) -> Partition:
    given = dict(sizes)
    ellipsis = rank - pattern.least_rank
    if ellipsis < 0 or (ellipsis > 0 and not pattern.has_ellipsis):
        least = "at least " if pattern.has_ellipsis else ""
        raise ShapeError(
            f"the pattern {pattern.text!r} is for {least}{pattern.least_rank} dimensions; the tensor has {rank}"
            + ("" if least else " (write ... for any number of further ones)")
        )
    axes: list[tuple[str, int, bool]] = []
    demands: list[tuple[int, int, bool]] = []
    splits: list[tuple[int, tuple[int, ...]]] = []
    dim = 0
    for parts in pattern.dims:
        if parts[0].name == "...":
            axes += [(f"...{i}", dim + i, parts[0].reduced) for i in range(ellipsis)]
            dim += ellipsis
            continue
        axes += [(axis.name, dim, axis.reduced) for axis in parts]
        known = [given[axis.name] for axis in parts if axis.name in given]
        if known:
            demands.append((dim, math.prod(known), len(known) == len(parts)))
        if len(parts) > 1:
            splits.append((dim, tuple(given.get(axis.name, -1) for axis in parts)))
        dim += 1
    reduced = [is_reduced for _, _, is_reduced in axes]
    return Partition(
        pattern=pattern,
        rank=rank,
        names=tuple(name for name, _, _ in axes),
        dims=tuple(d for _, d, _ in axes),
        sizes=tuple(given.get(name) for name, _, _ in axes),
        reduced=tuple(i for i in range(len(axes)) if reduced[i]),
        kept=tuple(i for i in range(len(axes)) if not reduced[i]),
        weighted=tuple(i for i, (name, _, _) in enumerate(axes) if name in weighted),
        demands=tuple(demands),
        splits=tuple(reversed(splits)),
    )


def partition(
    pattern: str | Pattern, rank: int, sizes: Mapping[str, int] | None = None, weighted: Sequence[str] = ()
) -> Partition:
    """Bind a pattern to a number of dimensions; `weighted` are the axes the parameters run along.

    Raises ShapeError where the rank does not fit, PatternError where a size or name does not.

    >>> partition("n (g [c]) [...]", 4, {"g": 2}).roles
    'kkrrr'
    """
    pattern = parse(pattern) if isinstance(pattern, str) else pattern
    pattern.check_sizes(sizes or {})
    return _partition(pattern, rank, tuple(sorted((sizes or {}).items())), tuple(weighted))
