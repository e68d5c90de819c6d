"""What a card says, and how it shows itself: in a terminal, a notebook and the documentation."""

from __future__ import annotations

import re
from dataclasses import dataclass

from renorm.cards import layout
from renorm.cards.layout import Block, Code, Formula, Items, Picture, Section, Table, Text
from renorm.cards.letters import letters
from renorm.drawing import draw

__all__ = ["LABELS", "Card", "Claim", "Cost", "Elsewhere", "Paper", "State"]

LABELS = {
    "en": {
        "pattern": "Which entries share statistics",
        "colours": "Entries of one colour share statistics:",
        "letters": "Entries of one letter share statistics:",
        "on": "of {}",
        "first": "of which the first is drawn",
        "comma": ", ",
        "x": "the activation",
        "weight": "the weight",
        "gates": "the gates of each step",
        "gradient": "the gradient",
        "strong": "Strong",
        "weak": "Weak",
        "used": "Used in",
        "watch": "Watch for",
        "formula": "Formula",
        "forward": "Forward in plain torch",
        "state": "Parameters and state",
        "write": "Write",
        "inputs": "with",
        "parameter": "learnt",
        "fixed": "fixed",
        "buffer": "buffer",
        "none": "Nothing is learnt or kept.",
        "cost": "Cost",
        "elsewhere": "Elsewhere",
        "same": "the same",
        "name": "name",
        "shape": "shape",
        "kind": "kind",
        "differs": "defaults, and what differs",
        "measured": "Measured on CPU",
        "paper": "Paper",
        "see": "See also",
    },
    "zh": {
        "pattern": "哪些元素共用统计量",
        "colours": "同一颜色的元素共用统计量：",
        "letters": "同一字母的元素共用统计量：",
        "on": "作用于{}",
        "first": "图中画的是第一个",
        "comma": "，",
        "x": "激活",
        "weight": "权重",
        "gates": "每一步的门",
        "gradient": "梯度",
        "strong": "长处",
        "weak": "短处",
        "used": "用在哪里",
        "watch": "注意",
        "formula": "公式",
        "forward": "前向计算（纯 torch）",
        "state": "参数与状态",
        "write": "写法",
        "inputs": "输入",
        "parameter": "可学习",
        "fixed": "固定",
        "buffer": "缓冲区",
        "none": "没有可学习的参数，也不保存状态。",
        "cost": "开销",
        "elsewhere": "其他框架",
        "same": "相同",
        "name": "名称",
        "shape": "形状",
        "kind": "种类",
        "differs": "默认值与差别",
        "measured": "CPU 实测",
        "paper": "论文",
        "see": "另见",
    },
}


@dataclass(frozen=True)
class Claim:
    """A strong or a weak side, and who says so."""

    text: str
    source: str  # a paper and the place in it, or one of our own measurements
    url: str  # of the paper, or a page of this documentation


@dataclass(frozen=True)
class State:
    """A parameter or a buffer."""

    name: str
    shape: str  # in letters, such as (C,)
    kind: str  # parameter, fixed parameter or buffer


@dataclass(frozen=True)
class Cost:
    """What a step costs; a pass reads or writes every entry once."""

    forward: tuple[int, int]  # passes that read, that write
    backward: tuple[int, int]
    flops: str  # of the forward, for each entry
    bytes: str  # of parameters and buffers in float32
    note: str
    measured: tuple[Claim, ...]  # speed against torch's, of renorm on CPU


@dataclass(frozen=True)
class Elsewhere:
    """The same in another library."""

    name: str  # dotted
    defaults: str  # arguments whose defaults differ between libraries, as name=value
    differs: str  # what else is different; empty where nothing is


@dataclass(frozen=True)
class Paper:
    """Where it comes from."""

    authors: str
    year: int
    title: str
    url: str


@dataclass(frozen=True)
class Card:
    """What there is to know about a norm before one uses it, in one language.

    `str` of it is the card for a terminal; notebooks show it by themselves; `to_markdown` is its page of the
    documentation.
    """

    name: str  # what it is asked for by
    lang: str  # en or zh
    title: str
    line: str  # in a sentence
    aliases: tuple[str, ...]  # other names that are understood
    layers: tuple[str, ...]  # renorm's public names
    call: str  # how to make it, sizes in letters
    inputs: tuple[tuple[str, str], ...]  # of the forward: name and shape
    on: str  # x, weight or gradient: what is normalized
    patterns: tuple[str, ...]  # the sets it takes statistics from; none where there are no such sets
    sizes: tuple[tuple[str, int], ...]  # of the picture's axes
    formula: str  # in LaTeX
    code: str  # the forward in training, in plain torch: y from the inputs and the state
    state: tuple[State, ...]
    cost: Cost
    strong: tuple[Claim, ...]
    weak: tuple[Claim, ...]
    used: str
    watch: tuple[str, ...]
    papers: tuple[Paper, ...]
    elsewhere: tuple[Elsewhere, ...]
    see: tuple[str, ...]  # names of other cards

    def __str__(self) -> str:
        return self.to_text()

    def _repr_markdown_(self) -> str:
        return self.to_markdown()

    def _repr_html_(self) -> str:
        return f"<h3>{self.title}</h3>" + layout.html(self.blocks())

    def to_text(self, width: int = 96) -> str:
        """The card for a terminal of `width` columns."""
        return "\n".join([self.title, "=" * layout.columns(self.title), layout.text(self.blocks(), width)])

    def to_markdown(self, picture: str = "", root: str = "") -> str:
        """The card as a page of the documentation.

        `picture` is the path of its picture, without which that is set in letters, `root` that of the folder with
        the other pages, without which these are not linked.
        """
        return f"# {self.title}\n\n" + layout.markdown(self.blocks(picture, root))

    @property
    def svg(self) -> str:
        """The picture of the first pattern, empty where there is none."""
        return draw(self.patterns[0], **dict(self.sizes)).svg if self.patterns else ""

    def blocks(self, picture: str = "", root: str = "") -> list[Block]:
        """What the card is made of, what one decides by first; see `to_markdown`."""
        say = LABELS[self.lang]
        claims = (" (", ")") if self.lang == "en" else ("（", "）")
        blocks: list[Block] = [Text(self.line)]
        if self.patterns:
            words = " + ".join(f"`{pattern}`" for pattern in self.patterns)
            about = [say["on"].format(say[self.on])] * (self.on != "x") + [say["first"]] * (len(self.patterns) > 1)
            # One axis of positions is enough in letters.
            sizes = {axis: size for axis, size in self.sizes if axis != "w"}
            blocks += [
                Section(say["pattern"]),
                Text(say["comma"].join([words, *about])),
                Picture(self.svg, letters(self.patterns[0], sizes), (say["colours"], say["letters"]), picture),
            ]
        for title, side in (("strong", self.strong), ("weak", self.weak)):
            items = tuple((claim.text, claim.source, _link(claim.url, root)) for claim in side)
            blocks += [Section(say[title]), Items(items, claims)]
        blocks += [Section(say["used"]), Text(self.used)]
        blocks += [Section(say["watch"]), Items(tuple((line, "", "") for line in self.watch))]
        blocks += [Section(say["formula"]), Formula(self.formula.strip())]
        blocks += [Section(say["forward"]), Code(self.code.strip())]
        blocks += [Section(say["state"]), *self._state(say)]
        blocks += [Section(say["cost"]), Text(self._cost())]
        if self.cost.measured:
            items = tuple((claim.text, claim.source, _link(claim.url, root)) for claim in self.cost.measured)
            blocks += [Text(say["measured"] + (":" if self.lang == "en" else "：")), Items(items, claims)]
        if self.elsewhere:
            blocks += [Section(say["elsewhere"]), self._elsewhere(say)]
        papers = tuple((f"{p.authors} {p.year}, {p.title}", _address(p.url), p.url) for p in self.papers)
        blocks += [Section(say["paper"]), Items(papers, claims)]
        if self.see:
            links = [f"[{name}]({name}.md)" if root else f"`{name}`" for name in self.see]
            blocks += [Section(say["see"]), Text(("、" if self.lang == "zh" else ", ").join(links))]
        return blocks

    def _state(self, say: dict[str, str]) -> list[Block]:
        inputs = ", ".join(f"`{name}` {shape}" for name, shape in self.inputs)
        write = Text(f"{say['write']} `{self.call}`{say['comma']}{say['inputs']} {inputs}")
        if not self.state:
            return [write, Text(say["none"])]
        rows = tuple((f"`{entry.name}`", entry.shape, say[entry.kind]) for entry in self.state)
        return [write, Table((say["name"], say["shape"], say["kind"]), rows)]

    def _cost(self) -> str:
        cost, on = self.cost, LABELS[self.lang][self.on]
        if self.lang == "zh":
            passes = [f"{way}读 {read} 次、写 {write} 次" for way, (read, write) in self._ways("前向", "反向")]
            facts = f"访存趟数（{on}）：{'；'.join(passes)}。" if passes else ""
            facts += f"前向每个元素约 `{cost.flops}` 次浮点运算。参数与状态占 `{cost.bytes}` 字节（float32）。"
        else:
            passes = [
                f"{way} {read} read and {write} written" for way, (read, write) in self._ways("forward", "backward")
            ]
            facts = f"Passes over {on}: {'; '.join(passes)}. " if passes else ""
            facts += (
                f"About `{cost.flops}` FLOPs per entry forward. Parameters and state: `{cost.bytes}` bytes in float32. "
            )
        return (facts + cost.note).strip()

    def _ways(self, *words: str) -> list[tuple[str, tuple[int, int]]]:
        return [way for way in zip(words, (self.cost.forward, self.cost.backward), strict=True) if any(way[1])]

    def _elsewhere(self, say: dict[str, str]) -> Table:
        rows = []
        for entry in self.elsewhere:
            parts = [f"`{entry.defaults}`"] * bool(entry.defaults) + [entry.differs] * bool(entry.differs)
            rows.append((f"`{entry.name}`", ("; " if self.lang == "en" else "；").join(parts) or say["same"]))
        return Table((say["name"], say["differs"]), tuple(rows))


def _link(url: str, root: str) -> str:
    """A page of the documentation seen from the folder of the cards."""
    return url if url.startswith("http") or not url else root and root + url


def _address(url: str) -> str:
    arxiv = re.search(r"arxiv\.org/abs/(.+)", url)
    return f"arXiv:{arxiv[1]}" if arxiv else re.sub(r"^https?://(www\.)?", "", url)
