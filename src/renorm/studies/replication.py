"""A published finding, how it is run again, and what the run must show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from renorm.studies.rows import Condition, Rows, Value

__all__ = ["Claim", "Plan", "Published", "Replication", "Table", "verdict"]


@dataclass(frozen=True)
class Published:
    """What a paper reports."""

    found: str  # a sentence, with its figures where they were read in the source
    source: str  # authors, year, title or venue, arXiv number, place in the text


@dataclass(frozen=True)
class Plan:
    """Which measurements are made."""

    conditions: tuple[Condition, ...]
    seeds: int  # each condition runs with the seeds 0 to seeds - 1
    scale: str  # in words: data, model, steps, and what is smaller than in the other plan


@dataclass(frozen=True)
class Claim:
    """One thing that the run had to show, decided before it."""

    text: str  # what must hold, with its threshold
    found: str  # what was measured, with an interval
    holds: bool


@dataclass(frozen=True)
class Table:
    """What was measured, for people."""

    caption: str  # with units
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Replication:
    """A published finding and how it is run again.

    `measure` is called with torch's seed set to the seed it is given, and one thread; it must be reproducible from its
    arguments alone. All else is computed from the rows that it gave.
    """

    name: str  # in the command line
    title: str
    question: str  # as people ask it
    published: tuple[Published, ...]
    protocol: str  # Markdown: data, model, training, what is measured
    quick: Plan
    minutes: int  # that it takes on two cores, about: at most 3
    full: Plan
    measure: Callable[[Condition, int], Mapping[str, Value]]  # of a condition and a seed
    judge: Callable[[Rows], tuple[Claim, ...]]
    tables: Callable[[Rows], tuple[Table, ...]]
    draw: Callable[[Rows], str]  # SVG text, readable on light and dark pages
    reading: Callable[[Rows], str]  # Markdown: what follows for somebody who chooses, and what does not


def verdict(claims: tuple[Claim, ...]) -> str:
    """In words, whether the finding came out.

    >>> verdict((Claim("a", "1", True), Claim("b", "0", False)))
    'reproduced in part'
    """
    held = sum(claim.holds for claim in claims)
    return "reproduced" if held == len(claims) else "reproduced in part" if held else "not reproduced"
