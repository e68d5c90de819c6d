"""The parts a page is made of, and three ways to set them: for a terminal, in Markdown and in HTML."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

__all__ = ["Block", "Code", "Formula", "Items", "Picture", "Section", "Table", "Text", "html", "markdown", "text"]


@dataclass(frozen=True)
class Section:
    """A heading, under which the following blocks stand."""

    title: str


@dataclass(frozen=True)
class Text:
    """A paragraph; code is in backticks."""

    text: str


@dataclass(frozen=True)
class Formula:
    """A displayed formula."""

    latex: str


@dataclass(frozen=True)
class Code:
    """Lines of Python."""

    code: str


@dataclass(frozen=True)
class Items:
    """A list of (text, source, address of the source); the last two may be empty."""

    items: tuple[tuple[str, str, str], ...]
    brackets: tuple[str, str] = (" (", ")")  # around a source


@dataclass(frozen=True)
class Table:
    """Rows of cells under a head, which is left out where all its cells are empty."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Picture:
    """A picture, and the letters that stand for it in a terminal."""

    svg: str
    letters: str
    captions: tuple[str, str]  # of the picture, and of the letters
    path: str = ""  # of the picture's file, for Markdown


Block = Section | Text | Formula | Code | Items | Table | Picture

_EAST = "\u2e80-\u9fff\uff00-\uffef"
# What a line is not broken within: one East Asian character or a run of others without blanks, and the marks beside it.
_UNIT = re.compile(rf"[（【《“]*(?:[^\s{_EAST}]+|[{_EAST}])[，。；：、！？）】》”]*|\s+")


def columns(line: str) -> int:
    """How many columns of a terminal the line takes: East Asian characters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in line)


def wrap(line: str, width: int, first: str = "", rest: str = "") -> str:
    """Break into lines of at most `width` columns, the first behind `first`, the others behind `rest`."""
    lines, now, start = [], first, first
    for unit in _UNIT.findall(line):
        if columns(now + unit.rstrip()) > width and now != start:
            lines.append(now.rstrip())
            now = start = rest
        now += "" if unit.isspace() and now == start else unit
    return "\n".join([*lines, now.rstrip()])


def text(blocks: Iterable[Block], width: int) -> str:
    """For a terminal of `width` columns."""
    return "\n".join(part for block in blocks for part in _plain(block, width)).strip("\n")


def _plain(block: Block, width: int) -> list[str]:
    if isinstance(block, Section):
        return ["", block.title, "-" * columns(block.title)]
    if isinstance(block, Text):
        return [wrap(block.text, width)]
    if isinstance(block, Formula):
        return ["    " + line for line in block.latex.splitlines()]
    if isinstance(block, Code):
        return ["    " + line for line in block.code.splitlines()]
    if isinstance(block, Picture):
        return [wrap(block.captions[1], width), *("    " + line for line in block.letters.splitlines())]
    if isinstance(block, Items):
        left, right = block.brackets
        return [
            wrap(item + (left + source + right) * bool(source), width, "- ", "  ") for item, source, _ in block.items
        ]
    return _plain_table(block, width)


def _plain_table(table: Table, width: int) -> list[str]:
    """Columns as wide as they need to be; the last one is broken into lines."""
    rows = [table.head, *table.rows] if any(table.head) else list(table.rows)
    widths = [max(columns(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    left = sum(widths) + 2 * len(widths)
    return [
        wrap(
            row[-1],
            max(width, left + 24),
            "".join(cell + " " * (wide - columns(cell) + 2) for cell, wide in zip(row, widths, strict=False)),
            " " * left,
        )
        for row in rows
    ]


def markdown(blocks: Iterable[Block], level: int = 2) -> str:
    """In Markdown, with formulas between dollars, and headings from `level` on."""
    return "\n\n".join(_marked(block, level) for block in blocks) + "\n"


def _marked(block: Block, level: int) -> str:
    if isinstance(block, Section):
        return "#" * level + " " + block.title
    if isinstance(block, Text):
        return block.text
    if isinstance(block, Formula):
        return f"$$\n{block.latex.strip()}\n$$"
    if isinstance(block, Code):
        return f"```python\n{block.code.strip()}\n```"
    if isinstance(block, Picture):
        if not block.path:
            return f"{block.captions[1]}\n\n```text\n{block.letters}\n```"
        return f"{block.captions[0]}\n\n![{block.captions[0].rstrip(':：')}]({block.path})"
    if isinstance(block, Items):
        left, right = block.brackets
        return "\n".join(
            f"- {item}" + (left + (f"[{source}]({url})" if url else source) + right) * bool(source)
            for item, source, url in block.items
        )
    rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (block.head, *block.rows)]
    return "\n".join([rows[0], "|" + "---|" * len(block.head), *rows[1:]])


def html(blocks: Iterable[Block]) -> str:
    """In HTML; formulas stay in dollars, which notebooks set."""
    return "".join(map(_tagged, blocks))


def _tagged(block: Block) -> str:
    if isinstance(block, Section):
        return f"<h4>{_inline(block.title)}</h4>"
    if isinstance(block, Text):
        return f"<p>{_inline(block.text)}</p>"
    if isinstance(block, Formula):
        return f"<div>$${escape(block.latex)}$$</div>"
    if isinstance(block, Code):
        return f"<pre><code>{escape(block.code.strip())}</code></pre>"
    if isinstance(block, Picture):
        return f"<p>{_inline(block.captions[0])}</p>{block.svg}"
    if isinstance(block, Items):
        left, right = block.brackets
        return (
            "<ul>"
            + "".join(
                f"<li>{_inline(item)}" + (left + _link(source, url) + right) * bool(source) + "</li>"
                for item, source, url in block.items
            )
            + "</ul>"
        )
    head = "".join(f"<th>{_inline(cell)}</th>" for cell in block.head)
    rows = "".join("<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>" for row in block.rows)
    return f"<table>{f'<tr>{head}</tr>' if any(block.head) else ''}{rows}</table>"


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))


def _link(source: str, url: str) -> str:
    return f'<a href="{escape(url)}">{escape(source)}</a>' if url.startswith("http") else escape(source)
