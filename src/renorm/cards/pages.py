"""The documentation's pages of the zoo: one for each card, in each language, and the tables of all."""

from __future__ import annotations

from pathlib import Path

from renorm.cards import layout
from renorm.cards.card import Card
from renorm.cards.layout import Block, Section, Table, Text
from renorm.cards.read import explain, families, names

__all__ = ["pages", "write"]

_GREY = "#767676"  # readable on white and on black: a page's colours do not reach into an <img>
_INDEX = {
    "en": {
        "title": "The zoo",
        "text": (
            "A card for each norm: what it computes and costs, its strong and weak sides with a source for each. "
            '`renorm explain group` prints the same in a terminal, `rn.explain("group")` shows it in a notebook. '
            "[中文版](zh/index.md)."
        ),
        "head": ("norm", "statistics over", "in a sentence"),
        "cost": (
            "How to read a card. The forward pass is plain torch that defines the layer: the tests run it and "
            "compare. A *pass* reads or writes every entry once; FLOPs are additions, multiplications and "
            "comparisons for each entry in the forward pass, and work on tensors of the statistics' size is not "
            "counted. N, C, H, W, L, D are sizes of batch, channels, height, width, length and features."
        ),
        "checks": "Which norm passes which check: [the table](checks.md).",
    },
    "zh": {
        "title": "归一化方法一览",
        "text": (
            "每种归一化方法一张卡片：算什么、开销多大、长处和短处，每条结论都注明出处。终端里用 "
            '`renorm explain group --lang zh`，笔记本里用 `rn.explain("group", lang="zh")`。'
            "[English](../index.md)。"
        ),
        "head": ("方法", "统计量的范围", "一句话"),
        "cost": (
            "怎样读卡片：前向计算用纯 torch 写成，就是该层的定义，测试会运行它并与实现比对。"
            "访存一趟指把每个元素读或写一次；"
            "浮点运算数是前向中每个元素的加、乘、比较次数，与统计量同样大小的张量上的运算不计。"
            "N、C、H、W、L、D 分别是批量、通道、高、宽、长度和特征数。"
        ),
        "checks": "各方法通过了哪些检查：[表](../checks.md)。",
    },
}


def pages(folder: Path) -> dict[str, str]:
    """The text of each file below `folder`, by its path there; `folder` is looked at for the table of checks."""
    made: dict[str, str] = {}
    pictures: dict[str, str] = {}  # those that are there already, and where
    for lang, below in (("en", ""), ("zh", "zh/")):
        up = "../" * (1 + below.count("/"))
        for name in names():
            card = explain(name, lang)
            path = ""
            if card.svg:
                path = pictures.setdefault(card.svg, f"pictures/{name}.svg")
                made[path] = card.svg.replace("currentColor", _GREY) + "\n"
            made[f"{below}{name}.md"] = card.to_markdown(path and "../" * below.count("/") + path, up) + _other(card)
        made[f"{below}index.md"] = _index(lang, (folder / "checks.md").exists())
    return made


def write(folder: Path) -> None:
    """Write the pages, and remove those of cards that are no more."""
    made = pages(folder)
    for old in (*folder.glob("*.md"), *folder.glob("zh/*.md"), *folder.glob("pictures/*.svg")):
        if old.relative_to(folder).as_posix() not in (*made, "checks.md"):
            old.unlink()
    for name, text in made.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def _other(card: Card) -> str:
    """A link to the page in the other language."""
    return f"\n[中文](zh/{card.name}.md)\n" if card.lang == "en" else f"\n[English](../{card.name}.md)\n"


def _index(lang: str, checked: bool) -> str:
    say = _INDEX[lang]
    blocks: list[Block] = [Text(str(say["text"])), Text(str(say["cost"]))]
    blocks += [Text(str(say["checks"]))] * checked
    for title, members in families(lang):
        cards = [explain(name, lang) for name in members]
        rows = tuple(
            (f"[{card.title}]({card.name}.md)", ", ".join(f"`{p}`" for p in card.patterns) or "-", card.line)
            for card in cards
        )
        blocks += [Section(title), Table(tuple(say["head"]), rows)]
    return f"# {say['title']}\n\n" + layout.markdown(blocks)
