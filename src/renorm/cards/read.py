"""Cards from their data files: found by any name people use, read when they are asked for."""

from __future__ import annotations

import difflib
import re
import sys
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from renorm.cards import layout
from renorm.cards.card import LABELS, Card, Claim, Cost, Elsewhere, Paper, State
from renorm.errors import RenormError, UnknownNormError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from torch import nn

__all__ = ["contents", "explain", "families", "names"]

_BENCHMARK = "kernels.csv"  # in benchmarks/results
_SPEED = "kernels.md#speed"  # the page that the rows are in
_WAYS = {"forward": "Forward", "both": "Forward and backward"}
_WAYS_ZH = {"forward": "前向", "both": "前向加反向"}
_AGAINST_ZH = {"the formula in plain torch": "纯 torch 公式"}
_PLACES = {"table": "表 {}", "figure": "图 {}", "section": "第 {} 节"}


def explain(name: str | nn.Module | type[nn.Module], lang: str = "en") -> Card:
    """The card of a norm: what it computes and costs, strong and weak sides with their sources, its relatives.

    `name` is a norm in words ("group", "GroupNorm", "gn"), a layer or its class, torch's included; `lang` is "en" or
    "zh". The card prints itself, and shows itself in a notebook.

    Raises UnknownNormError for a norm without a card, RenormError for another language.

    >>> explain("group").title
    'Group norm'
    >>> explain("gruop")
    Traceback (most recent call last):
    renorm.errors.UnknownNormError: there is no card for 'gruop'; did you mean 'group'? ...
    """
    if lang not in LABELS:
        raise RenormError(f"cards are written in {' and '.join(LABELS)}; got lang={lang!r}")
    known = _known()
    if isinstance(name, str):
        asked = [name]
    else:
        asked = [parent.__name__ for parent in (name if isinstance(name, type) else type(name)).__mro__]
    for word in asked:
        found = known.get(_key(word)) or known.get(_key(re.sub(r"\(.*\)\s*$", "", word)))
        if found is not None:
            return _card(found, lang)
    close = difflib.get_close_matches(_key(asked[0]), known, 1, 0.7)
    hint = f"; did you mean {known[close[0]]!r}?" if close else "."
    raise UnknownNormError(f"there is no card for {asked[0]!r}{hint} There are: {', '.join(names())}")


def names() -> tuple[str, ...]:
    """The names of all cards, in the order of their families."""
    return tuple(name for _, members in families("en") for name in members)


@cache
def families(lang: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The titles of the families and the names of the cards in each."""
    return tuple((family[lang], tuple(family["cards"])) for family in _load("index")["family"])


def contents(lang: str = "en", width: int = 96) -> str:
    """All cards in a table: name, pattern and a line, one family after the other."""
    explain(names()[0], lang)  # raises for another language
    blocks: list[layout.Block] = []
    wide = max(map(len, names()))
    for title, members in families(lang):
        cards = [_card(name, lang) for name in members]
        rows = tuple((card.name.ljust(wide), card.patterns[0] if card.patterns else "-", card.line) for card in cards)
        blocks += [layout.Section(title), layout.Table(("", "", ""), rows)]
    return layout.text(blocks, width)


def _key(word: str) -> str:
    return re.sub(r"[\W_]+", "", word).lower()


@cache
def _known() -> dict[str, str]:
    """Each way to ask for a card, and the card's name."""
    known: dict[str, str] = {}
    for name in names():
        data = _load(name)
        for word in (name, *data["aliases"], *data["layers"], *data["title"].values()):
            if known.setdefault(_key(word), name) != name:
                raise RuntimeError(f"both {known[_key(word)]} and {name} are asked for by {word!r}")
    return known


@cache
def _load(name: str) -> dict[str, Any]:
    text = resources.files("renorm.cards").joinpath("data", f"{name}.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


@cache
def _card(name: str, lang: str) -> Card:
    data = _load(name)
    cost = data["cost"]
    return Card(
        name=name,
        lang=lang,
        title=data["title"][lang],
        line=data["line"][lang],
        aliases=tuple(data["aliases"]),
        layers=tuple(data["layers"]),
        call=data["call"],
        inputs=tuple(data["inputs"].items()),
        on=data.get("on", "x"),
        patterns=tuple(data["patterns"]),
        sizes=tuple(data.get("sizes", {}).items()),
        formula=data["formula"].strip(),
        code=data["code"].strip(),
        state=tuple(State(**entry) for entry in data.get("state", ())),
        cost=Cost(
            tuple(cost["forward"]),
            tuple(cost["backward"]),
            cost["flops"],
            cost["bytes"],
            cost["note"][lang] if "note" in cost else "",
            tuple(_measured(*row, lang=lang) for row in cost.get("measured", ())),
        ),
        strong=tuple(_claim(claim, lang) for claim in data["strong"]),
        weak=tuple(_claim(claim, lang) for claim in data["weak"]),
        used=data["used"][lang],
        watch=tuple(line[lang] for line in data["watch"]),
        papers=tuple(Paper(**paper) for paper in data["paper"]),
        elsewhere=tuple(
            Elsewhere(entry["name"], entry.get("defaults", ""), entry.get(lang, ""))
            for entry in data.get("elsewhere", ())
        ),
        see=tuple(data["see"]),
    )


def _claim(data: dict[str, Any], lang: str) -> Claim:
    if "rows" in data:  # of the benchmark's results
        return Claim(data[lang], _ours(data["rows"], lang), _SPEED)
    return Claim(data[lang], _in_chinese(data["source"]) if lang == "zh" else data["source"], data["url"])


def _measured(case: str, what: str, ratio: float, against: str, *, lang: str) -> Claim:
    if lang == "zh":
        text = f"{_WAYS_ZH[what]}速度是 {_AGAINST_ZH.get(against, against)} 的 {ratio} 倍"
    else:
        text = f"{_WAYS[what]}, {ratio} times the speed of {against}"
    return Claim(text, _ours([case], lang), _SPEED)


def _ours(cases: list[str], lang: str) -> str:
    ours = {"en": "measured by us", "zh": "本项目实测"}[lang]
    return ("，" if lang == "zh" else ", ").join([ours, f"{_BENCHMARK}: {'; '.join(cases)}"])


def _in_chinese(source: str) -> str:
    """The place in a paper in Chinese: "table 1" is 表 1."""
    source = re.sub(r"\b(table|figure|section) ([\w.]+)", lambda match: _PLACES[match[1]].format(match[2]), source)
    return source.replace("abstract", "摘要").replace(", code", ", 代码").replace(", ", "，")
