"""The cards: complete in both languages, true to the layers and to the benchmark's rows, and found by any name."""

from __future__ import annotations

import copy
import csv
import importlib
import inspect
import os
import pkgutil
import re
import runpy
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from typer.testing import CliRunner

import renorm
import renorm.norms
import renorm.surgery
from renorm import cards
from renorm.cards import layout, pages, read
from renorm.cards.letters import letters
from renorm.cli import main
from renorm.errors import RenormError, UnknownNormError
from renorm.norms import named

ROOT = Path(__file__).parents[1]
NAMES = cards.names()
SIZES = {"N": 4, "C": 6, "H": 5, "W": 4, "L": 7, "D": 8, "O": 3, "K": 5, "G": 3, "size": 2}


@cache
def public(name):
    """What renorm calls by this name, also ahead of its place in `renorm.__all__`."""
    if hasattr(renorm, name):
        return getattr(renorm, name)
    for package in (renorm.norms, renorm.surgery):
        for info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            module = importlib.import_module(info.name)
            if name in getattr(module, "__all__", ()):
                return getattr(module, name)
    raise AttributeError(name)


class _Renorm:
    """`rn` in the calls that cards give."""

    def __getattr__(self, name):
        return public(name)


def on_gradients(call):
    """A layer-like thing: the gradient after a step's hooks."""

    def run(*tensors):
        weight = nn.Parameter(tensors[0].clone())
        weight.grad = tensors[-1].clone()
        optimizer = torch.optim.SGD([weight], lr=1.0)
        eval(call, {"rn": _Renorm(), "optimizer": optimizer})
        optimizer.step()
        return tensors[0] - weight.detach()

    return run


def made(card):
    """The layer as its card writes it, in float64 and with random state."""
    torch.manual_seed(0)
    call = "rn.BatchNorm2d(C)" if card.name == "sync" else card.call
    layer = eval(call, {"rn": _Renorm(), "nn": nn, **SIZES})
    for name, tensor in layer.state_dict().items():
        if tensor.is_floating_point() and not re.search(r"\._[uv]$", name):
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    return layer.double()


def inputs_of(card):
    torch.manual_seed(1)
    return {name: torch.randn(eval(shape, {}, SIZES), dtype=torch.float64) + 0.3 for name, shape in card.inputs}


def shown(entry, layer):
    value = eval(entry.shape, {}, SIZES)
    return tuple(value), layer.state_dict()[entry.name]


# ---- what cards say


@pytest.mark.parametrize("name", NAMES)
def test_every_text_is_in_both_languages(name):
    def walk(value, path):
        if isinstance(value, dict):
            if {"en", "zh"} & value.keys():
                check(value, path)
            for key, inner in value.items():
                walk(inner, f"{path}.{key}")
        elif isinstance(value, list):
            for i, inner in enumerate(value):
                walk(inner, f"{path}[{i}]")

    def check(value, path):
        en, zh = value["en"], value["zh"]
        assert en.strip(), path
        assert zh.strip(), path
        assert not re.search(r"[\u4e00-\u9fff，。；：]", en), f"{path}: Chinese in the English text"
        assert en == zh or re.search(r"[\u4e00-\u9fff]", zh), f"{path}: no Chinese in the Chinese text"
        assert not re.search(r"[\u4e00-\u9fff] ?[,;:!?](\s|$)", zh), f"{path}: a Latin comma in Chinese"
        assert not re.search(r"[\u4e00-\u9fff][A-Za-z0-9`]|[A-Za-z0-9`%][\u4e00-\u9fff]", zh), f"{path}: wants a space"
        figures = [sorted(re.findall(r"\d[\d,.]*\d", text)) for text in (en, zh)]
        assert figures[0] == figures[1], f"{path}: the languages do not give the same figures"

    walk(read._load(name), name)


@pytest.mark.parametrize("name", NAMES)
def test_every_claim_has_a_source(name):
    for lang in ("en", "zh"):
        card = cards.explain(name, lang)
        assert card.strong
        assert card.weak
        assert card.watch
        assert card.papers
        for claim in (*card.strong, *card.weak):
            assert claim.source
            assert claim.url.startswith("https://") or (ROOT / "docs" / claim.url.partition("#")[0]).exists()
        for paper in card.papers:
            assert re.fullmatch(
                r"https://(arxiv\.org/abs/\d{4}\.\d{4,5}|papers\.nips\.cc/paper/\S+|openreview\.net/forum\?id=\w+)",
                paper.url,
            )
            assert 1990 < paper.year < 2030


@cache
def benchmark():
    with (ROOT / "benchmarks" / "results" / "kernels.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", NAMES)
def test_our_figures_are_those_of_the_benchmark(name):
    data = read._load(name)
    for case, what, ratio, against in data["cost"].get("measured", ()):
        (row,) = [row for row in benchmark() if (row["case"], row["what"]) == (case, what)]
        assert float(row["ratio"]) == ratio, f"{name}: {case}, {what} is now {row['ratio']}"
        assert row["against"] == against
    for claim in (*data["strong"], *data["weak"]):
        if "rows" in claim:
            rows = [row for row in benchmark() if row["case"] in claim["rows"]]
            assert {row["case"] for row in rows} == set(claim["rows"])
            known = [float(row[key]) for row in rows for key in ("ratio", "renorm_us", "torch_us")]
            figures = re.findall(r"(?<!x)\b\d+\.\d+\b|\b\d+(?= µs)", claim["en"])
            assert figures
            for figure in figures:
                digits = len(figure.partition(".")[2])
                assert any(round(value, digits) == float(figure) for value in known), f"{name}: {figure}"


def test_the_data_files_are_those_of_the_index():
    files = {path.stem for path in (Path(cards.__file__).parent / "data").glob("*.toml")}
    assert files == {*NAMES, "index"}
    assert len(NAMES) == len(set(NAMES))


@pytest.mark.parametrize("name", NAMES)
def test_related_cards_exist(name):
    see = cards.explain(name).see
    assert set(see) <= set(NAMES) - {name}


def test_every_norm_has_a_card():
    known = {layer for name in NAMES for layer in cards.explain(name).layers}
    for name in renorm.__all__:
        thing = getattr(renorm, name)
        is_layer = inspect.isclass(thing) and issubclass(thing, nn.Module) and thing is not renorm.Norm
        assert not is_layer or name in known, f"{name} has no card: write src/renorm/cards/data/"
    assert all(public(layer) for layer in known)


@pytest.mark.parametrize("name", NAMES)
def test_formulas_can_be_set(name):
    converter = pytest.importorskip("latex2mathml.converter", reason="of the extra docs")
    assert "<math" in converter.convert(cards.explain(name).formula)


# ---- cards against layers


@pytest.mark.parametrize("name", NAMES)
def test_the_forward_is_that_of_the_layer(name, monkeypatch):
    card = cards.explain(name)
    inputs = inputs_of(card)
    if card.on == "gradient":
        space = {"torch": torch, **inputs}
        exec(card.code, space)
        torch.testing.assert_close(space["grad"], on_gradients(card.call)(*inputs.values()), atol=1e-12, rtol=1e-12)
        return
    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.arange(n).roll(1))
    layer = made(card)
    twin = copy.deepcopy(layer).requires_grad_(False)
    plain = {key: value for key, value in vars(twin).items() if isinstance(value, (int, float))}
    own = {key: value for key, value in (*twin._parameters.items(), *twin._buffers.items()) if value is not None}
    space = {"torch": torch, "F": F, "nn": nn, **plain, **SIZES, **own, **dict(twin.named_children())}
    space |= {key: value.clone() for key, value in inputs.items()}
    space["batches"] = inputs["x"].tensor_split((1,))
    exec(card.code, space)
    with torch.no_grad():
        y = layer(*inputs.values())
    torch.testing.assert_close(space["y"], y[0] if isinstance(y, tuple) else y, atol=1e-9, rtol=1e-9)
    for buffer in re.findall(r"^(\w+) \+=", card.code, re.MULTILINE):
        torch.testing.assert_close(space[buffer], layer.state_dict()[buffer], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", [name for name in NAMES if cards.explain(name).on != "gradient"])
def test_the_state_is_that_of_the_layer(name):
    card, layer = cards.explain(name), made(cards.explain(name))
    tensors = layer.state_dict()
    assert [entry.name for entry in card.state if entry.name not in tensors] == []
    assert {entry.name for entry in card.state} == set(tensors)
    parameters = dict(layer.named_parameters())
    for entry in card.state:
        shape, tensor = shown(entry, layer)
        assert tensor.shape == shape, entry.name
        parameter = parameters.get(entry.name)
        kind = "buffer" if parameter is None else "parameter" if parameter.requires_grad else "fixed"
        assert entry.kind == kind, entry.name
    # In float32; here floating-point numbers are float64.
    held = sum(t.numel() * (4 if t.is_floating_point() else t.element_size()) for t in tensors.values())
    assert eval(card.cost.bytes, {}, SIZES) == held


@pytest.mark.parametrize("name", [name for name in NAMES if cards.explain(name).on == "gradient"])
def test_hooks_on_gradients_have_no_state(name):
    assert cards.explain(name).state == ()
    assert cards.explain(name).cost.bytes == "0"


@pytest.mark.parametrize("name", NAMES)
def test_the_patterns_are_those_of_the_layer(name):
    card = cards.explain(name)
    if card.on != "x":
        return
    layer = made(card)
    pattern = getattr(layer, "pattern", None) or getattr(getattr(layer, "norm", None), "pattern", None)
    if card.patterns and pattern:
        assert pattern in card.patterns


def defaults(thing):
    return {key: parameter.default for key, parameter in inspect.signature(thing).parameters.items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_equivalents_exist_and_have_these_defaults(name):
    os.environ.setdefault("KERAS_BACKEND", "torch")
    for entry in cards.explain(name).elsewhere:
        library, *path = entry.name.split(".")
        assert library in ("torch", "torchvision", "keras", "flax")
        if library not in ("torch", "keras"):
            continue  # not installed with the tests
        thing = pytest.importorskip(library)
        for part in path:
            thing = getattr(thing, part)
        found = defaults(thing)
        for key, value in re.findall(r"(\w+)=([^,]+)", entry.defaults):
            assert found[key] == eval(value), f"{entry.name}: {key} is {found[key]}"


def test_the_equivalents_in_flax():
    linen = pytest.importorskip("flax.linen")
    for name in NAMES:
        for entry in cards.explain(name).elsewhere:
            if entry.name.startswith("flax.linen."):
                found = defaults(getattr(linen, entry.name.rpartition(".")[2]))
                assert all(found[k] == eval(v) for k, v in re.findall(r"(\w+)=([^,]+)", entry.defaults)), entry.name


# ---- finding them


@pytest.mark.parametrize("name", NAMES)
def test_a_card_is_found_by_any_of_its_names(name):
    data = read._load(name)
    words = (name, *data["aliases"], *data["layers"], *data["title"].values(), name.upper(), name.replace("-", " "))
    for word in words:
        assert cards.explain(word).name == name


def test_a_card_is_found_by_layer_and_class():
    class Mine(renorm.GroupNorm):
        pass

    assert cards.explain(renorm.GroupNorm(2, 4)).name == "group"
    assert cards.explain(Mine).name == cards.explain(Mine(2, 4)).name == "group"
    assert cards.explain(nn.LayerNorm).name == "layer"
    assert cards.explain(nn.SyncBatchNorm).name == "sync"
    assert cards.explain("group(8)").name == "group"
    assert {cards.explain(kind).name for kind in named.KINDS if kind != "none"} == {*named.KINDS} - {"none"}


@pytest.mark.parametrize(
    ("asked", "hint"), [("gruop", "did you mean 'group'"), (nn.Conv2d, "no card for 'Conv2d'"), ("", "no card for ''")]
)
def test_what_has_no_card(asked, hint):
    with pytest.raises(UnknownNormError, match=re.escape(hint)):
        cards.explain(asked)


@pytest.mark.parametrize("ask", [lambda lang: cards.explain("group", lang), cards.contents])
def test_a_language_without_cards(ask):
    with pytest.raises(RenormError, match="cards are written in en and zh; got lang='de'"):
        ask("de")


def test_two_cards_of_one_name_are_our_mistake(monkeypatch):
    both = {"aliases": ["same"], "layers": [], "title": {"en": "t", "zh": "t"}}
    monkeypatch.setattr(read, "_load", lambda name: both)
    monkeypatch.setattr(read, "names", lambda: ("a", "b"))
    with pytest.raises(RuntimeError, match="both a and b are asked for by 'same'"):
        read._known.__wrapped__()


def test_importing_renorm_reads_no_card():
    code = (
        "import sys, renorm; assert 'tomllib' not in sys.modules and 'renorm.cards.read' not in sys.modules;"
        "from renorm.cards import read; assert read._load.cache_info().misses == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- showing them


def test_a_card_is_frozen_and_prints_itself():
    card = cards.explain("gn")
    with pytest.raises(FrozenInstanceError):
        card.title = "mine"
    assert str(card).startswith("Group norm\n==========\nStandardizes groups")
    for expected in ("n (g [c]) [...]", "24.1%", "(Wu & He 2018, table 2)", "rn.GroupNorm(G, C)", "arXiv:1803.08494"):
        assert expected in str(card)
    zh = str(cards.explain("gn", lang="zh"))
    assert zh.startswith("组归一化\n========\n")
    for expected in ("长处", "24.1%", "（Wu & He 2018，表 2）", "rn.GroupNorm(G, C)"):
        assert expected in zh


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("name", NAMES)
def test_a_card_keeps_to_the_width(name, lang):
    card = cards.explain(name, lang)
    as_it_is = {f"    {line}" for line in (*card.code.splitlines(), *card.formula.splitlines())}
    for line in card.to_text(80).splitlines():
        if line not in as_it_is and len(line.split()) > 1:  # one word may be too long
            assert layout.columns(line) <= 80, line


def test_lines_are_broken_between_words_and_between_chinese_characters():
    assert layout.wrap("one two three", 8, "- ", "  ") == "- one\n  two\n  three"
    assert layout.wrap("批量归一化，层归一化", 10) == "批量归一\n化，层归一\n化"  # no line begins with a comma
    assert layout.wrap("批量（归一化）", 6) == "批量\n（归一\n化）"
    assert layout.wrap("用 GroupNorm 层", 8) == "用\nGroupNorm\n层"
    assert layout.wrap("", 10, "- ") == "-"


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_notebooks_get_html_and_markdown(lang):
    card = cards.explain("group", lang)
    html = card._repr_html_()
    assert "<svg" in html
    assert "$$" in html
    assert html.count("<ul>") == html.count("</ul>") >= 4
    assert '<a href="https://arxiv.org/abs/1803.08494">' in html
    assert "<code>rn.GroupNorm(G, C)</code>" in html
    assert "kernels.md" not in html
    assert card._repr_markdown_() == card.to_markdown()
    assert "```text\n" in card.to_markdown()
    assert "](pictures/group.svg)" in card.to_markdown("pictures/group.svg", "../")
    assert "](../kernels.md#speed)" in card.to_markdown(root="../")
    assert "](batch.md)" in card.to_markdown(root="../")


def test_what_could_be_markup_is_text():
    card = replace(cards.explain("group"), line="a < b & `c < d`")
    assert "<p>a &lt; b &amp; <code>c &lt; d</code></p>" in card._repr_html_()
    table = layout.Table(("a", "b"), (("x|y", "z"),))
    assert layout.markdown([table]) == "| a | b |\n|---|---|\n| x\\|y | z |\n"


def test_the_letters_are_the_sets():
    picture = letters("n (g [c]) [...]", {"n": 2, "g": 2, "c": 1, "h": 1})
    assert picture.splitlines() == ["       g0 c0  g1 c0", "n0 h0  A      B", "n1 h0  C      D"]
    assert letters("... [c]", {"l": 2, "c": 2}).splitlines() == ["    c0  c1", "l0  A   A", "l1  B   B"]
    assert letters("o [...]", {"o": 2, "d": 2}).splitlines() == ["    d0  d1", "o0  A   A", "o1  B   B"]
    assert letters("[n] c", {"n": 2, "c": 2}).splitlines() == ["    c0  c1", "n0  A   B", "n1  A   B"]


# ---- the command


@pytest.fixture
def runner():
    return CliRunner(env={"COLUMNS": "100"})


def test_the_command_prints_a_card(runner):
    result = runner.invoke(main, ["explain", "group"])
    assert result.exit_code == 0
    assert result.stdout == cards.explain("group").to_text(100) + "\n"
    result = runner.invoke(main, ["explain", "GroupNorm", "--lang", "zh"])
    assert result.stdout == cards.explain("group", "zh").to_text(100) + "\n"


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_command_lists_all_cards(runner, lang):
    result = runner.invoke(main, ["explain", "--lang", lang])
    assert result.exit_code == 0
    listed = [line.split()[0] for line in result.stdout.splitlines() if line and not line.startswith((" ", "-"))]
    assert [word for word in listed if word in NAMES] == list(NAMES)


@pytest.mark.parametrize(
    ("arguments", "message"), [(["gruop"], "did you mean 'group'?"), (["group", "--lang", "de"], "got lang='de'")]
)
def test_the_command_says_what_is_wrong(runner, arguments, message):
    result = runner.invoke(main, ["explain", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


# ---- the documentation


def test_the_pages_are_what_the_cards_say():
    folder = ROOT / "docs" / "zoo"
    wanted = pages.pages(folder)
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in (".md", ".svg")}
    assert there - {"checks.md"} == set(wanted), "run python -m renorm.cards docs/zoo"
    for name, text in wanted.items():
        assert (folder / name).read_text(encoding="utf-8") == text, f"{name}: run python -m renorm.cards docs/zoo"


def test_every_page_is_in_the_navigation():
    shown = re.findall(r": (zoo/\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    pages_there = [f"zoo/{below}{name}.md" for below in ("", "zh/") for name in ("index", *NAMES)]
    assert sorted(set(shown) - {"zoo/checks.md"}) == sorted(pages_there)


def test_pages_are_written_and_removed(tmp_path, monkeypatch):
    (tmp_path / "zh").mkdir()
    (tmp_path / "zh" / "gone.md").touch()
    (tmp_path / "checks.md").touch()
    monkeypatch.setattr(sys, "argv", ["renorm.cards", str(tmp_path)])
    runpy.run_module("renorm.cards", run_name="__main__")
    assert not (tmp_path / "zh" / "gone.md").exists()
    assert "(checks.md)" in (tmp_path / "index.md").read_text(encoding="utf-8")
    assert "(../checks.md)" in (tmp_path / "zh" / "index.md").read_text(encoding="utf-8")
    (tmp_path / "checks.md").unlink()
    assert not any("checks.md" in text for text in pages.pages(tmp_path).values())
    monkeypatch.setattr(sys, "argv", ["renorm.cards"])
    with pytest.raises(SystemExit, match=r"usage: python -m renorm\.cards FOLDER"):
        runpy.run_module("renorm.cards", run_name="__main__")


def test_links_between_the_pages_lead_somewhere():
    for page in (ROOT / "docs" / "zoo").rglob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_data_is_packaged():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '"cards/data/*.toml"' in text
