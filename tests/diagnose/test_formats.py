"""`renorm check`: what it accepts, what it prints in each format, and with what it ends."""

import importlib.metadata
import json
import os
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from renorm.cli import main
from renorm.comparison import reference
from renorm.diagnose import RULES, Finding, Found, Report, formats, rule
from renorm.diagnose.formats import FORMATS, Checked, show
from renorm.diagnose.program import Place, arguments, place_of
from renorm.errors import RuleError

PROGRAM = """\
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner: nn.Module = nn.Linear(4, 4)
        self.rest = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x):
        return self.inner(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Sequential(nn.Linear(4, 3), nn.Softmax(1))

    def forward(self, x):
        return self.head(self.blocks(x))


def batch(num=32):
    return torch.randn(num, 4), torch.randint(3, (num,))


def bad():
    print("loading")
    return {"model": Net(), "loss": nn.CrossEntropyLoss(), "batch": batch()}


def good():
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    return model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), 0.1), [batch()]


def fails():
    raise ValueError("no data here")


def nothing():
    return 7


def breaks():
    def batches():
        raise OSError("no disk")
        yield

    return good()[0], None, None, batches()


def lacks():
    return good()[0]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    reference._load_file.cache_clear()
    (tmp_path / "train.py").write_text(PROGRAM)
    yield tmp_path
    reference._load_file.cache_clear()


@pytest.fixture
def warned():
    """A rule of our own that warns of everything."""

    @rule("X01", "warned", "warning", title="A title", why="A reason.", fix="Do, or: do not.", source="us")
    def find(evidence):
        yield Found("50% are\nwrong, or: not", module="0")

    yield
    del RULES["X01"]


def run(*words, **options):
    return CliRunner(env={"COLUMNS": "80", **options}).invoke(main, ["check", *words])


def test_errors_end_with_1(folder):
    shown = run("train.py:bad")
    assert shown.exit_code == 1
    assert "error C01 softmax-before-cross-entropy" in shown.stdout
    assert re.search(r"at: train.py:\d+", shown.stdout)
    assert "loading" not in shown.stdout  # it goes to standard error, since standard output may be read by a program
    assert "loading" in shown.stderr
    assert max(map(len, shown.stdout.splitlines())) <= 110


def test_no_finding_ends_with_0(folder, monkeypatch):
    shown = run("train.py:good")
    assert (shown.exit_code, shown.stdout) == (0, "train.py:good: no findings\n")
    assert run("train:good").exit_code == 0  # a module of the current folder


def test_strict_counts_warnings(folder, warned):
    assert run("train.py:good").exit_code == 0
    assert run("train.py:good", "--strict").exit_code == 1
    assert run("train.py:good", "--strict", "--ignore", "warned").exit_code == 0
    assert run("train.py:bad", "--ignore", "X01, C01", "--ignore", "C10").exit_code in (0, 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.py"], "a program is module:function or file.py:function"),
        (["train.py:missing"], "no function 'missing'"),
        (["nowhere.py:build"], "there is no file"),
        (["train.py:fails"], "train.py:fails must return what is to be checked; it raised ValueError: no data here"),
        (["train.py:fails"], 'raise ValueError("no data here")'),
        (["train.py:breaks"], "train.py:breaks must give a batch that can be looked at; it raised OSError: no disk"),
        (["train.py:lacks"], "check needs a batch"),
        (["train.py:nothing"], "train.py:nothing must return a model, (model, loss, optimizer, loader)"),
        (["train.py:good", "--ignore", "C99"], "there is no rule C99"),
        (["train.py:good", "--format", "xml"], "--format is one of text, json, sarif, github; got 'xml'"),
    ],
)
def test_bad_usage_ends_with_2(folder, words, message):
    shown = run(*words, COLUMNS="300")
    assert shown.exit_code == 2
    assert message in shown.stderr
    assert shown.stdout == ""


def test_the_same_seed_gives_the_same_batch(folder):
    first, again, other = (run("train.py:bad", "--format", "json", "--seed", s).stdout for s in "001")
    assert first == again
    assert first != other


def test_json(folder):
    made = json.loads(run("train.py:bad", "--format", "json").stdout)
    assert made["renorm"] == importlib.metadata.version("renorm")
    assert made["program"] == "train.py:bad"
    assert made["counts"]["error"] == sum(f["severity"] == "error" for f in made["findings"]) > 0
    finding = made["findings"][0]
    assert set(finding) >= {"id", "slug", "severity", "message", "module", "why", "fix", "source", "file", "line"}
    assert made["failures"] == []


def test_a_file(folder):
    shown = run("train.py:bad", "--format", "sarif", "--output", "out.sarif")
    assert shown.exit_code == 1
    assert re.fullmatch(r"train.py:bad: .* written to out.sarif\n", shown.stdout)
    assert json.loads(Path("out.sarif").read_text())["version"] == "2.1.0"
    assert run("train.py:bad", "--output", "missing/out.txt").exit_code == 2


# The formats, of findings made up.


def finding(severity, module="", *, id="X01", message="50% are\nwrong, or: not", fix="x = 1\ny = 2"):
    return Finding(id, "a-slug", severity, message, module, "A reason.", fix, "us")


def checked(*findings, failures=()):
    places = tuple(Place(f"a b/f,{i}.py", i + 1) for i in range(len(findings)))
    return Checked(Report(findings, failures), "train.py:build", places)


def test_sarif():
    given = checked(
        finding("error", "head"),
        finding("warning"),
        finding("info", id="C01"),
        finding("error", "tail"),
        failures=("rule X02 failed",),
    )
    made = json.loads(formats.sarif(given))
    assert made["version"] == "2.1.0"
    (one,) = made["runs"]
    rules, results = one["tool"]["driver"]["rules"], one["results"]
    assert [r["id"] for r in rules] == ["X01", "C01"]
    assert rules[1]["shortDescription"]["text"] == RULES["C01"].title
    assert rules[1]["defaultConfiguration"]["level"] == "error"
    assert all(r["help"]["text"] and r["help"]["markdown"] and r["fullDescription"]["text"] for r in rules)
    assert [r["level"] for r in results] == ["error", "warning", "note", "error"]
    assert all(rules[r["ruleIndex"]]["id"] == r["ruleId"] for r in results)
    physical = results[0]["locations"][0]["physicalLocation"]
    assert physical == {"artifactLocation": {"uri": "a%20b/f%2C0.py"}, "region": {"startLine": 1}}
    assert results[0]["locations"][0]["logicalLocations"] == [{"fullyQualifiedName": "head", "kind": "member"}]
    assert "logicalLocations" not in results[1]["locations"][0]
    fingerprints = {r["partialFingerprints"]["ruleAndModule/v1"] for r in results}
    assert len(fingerprints) == 4
    (invocation,) = one["invocations"]
    assert invocation["executionSuccessful"] is True
    assert invocation["toolExecutionNotifications"][0]["message"]["text"] == "rule X02 failed"


def test_sarif_of_a_file_outside():
    given = Checked(Report((finding("error"),)), "m:f", (Place("/else where/net.py", 3),))
    location = json.loads(formats.sarif(given))["runs"][0]["results"][0]["locations"][0]
    assert location["physicalLocation"]["artifactLocation"]["uri"] == "file:///else%20where/net.py"


def test_github():
    lines = formats.github(checked(finding("error", "a.b"), finding("warning"), finding("info"))).splitlines()
    assert lines[0] == (
        "::error file=a b/f%2C0.py,line=1,title=X01 a-slug at a.b::50%25 are%0Awrong, or: not%0AA reason.%0A"
        "fix: x = 1%0Ay = 2"
    )
    assert [line.split(" ")[0] for line in lines[:3]] == ["::error", "::warning", "::notice"]
    assert lines[3] == "train.py:build: 1 error, 1 warning, 1 info"
    assert "::warning title=renorm::a%0Ab" in formats.github(checked(failures=("a\nb",)))


def test_text_is_what_the_terminal_shows():
    given = checked(finding("error", "a.b"), finding("warning", fix="Do, or: do not."), failures=("rule X02 failed",))
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115 (closed with the process)
    with console.file:
        show(given, console)
    assert console.export_text().rstrip() == formats.text(given).rstrip()
    assert "[bold]" not in formats.text(given)


@pytest.mark.parametrize("width", [30, 40, 80, 200])
def test_lines_keep_to_the_width(width):
    long = finding("error", message="word " * 40, fix="Some words. " * 20)
    lines = list(long.lines(width))
    assert max(len(line) for part, line in lines if part != "head") <= width
    assert [part for part, _ in lines] == sorted([p for p, _ in lines], key=["head", "message", "why", "fix"].index)
    code = finding("error", fix="model.head = torch.nn.Linear(16, 3)  # " + "long " * 40)
    assert sum(part == "fix" for part, _ in code.lines(width)) == 1


def test_the_fix_is_code_or_a_sentence():
    assert finding("error", fix="x = 1").fix_is_code
    assert finding("error", fix="model.blocks.0.conv  # bias=False").fix_is_code
    assert not finding("error", fix="Do, or: do not.").fix_is_code


def test_html_escapes_and_counts():
    shown = Report((finding("error", "<m>", message="<x> & y", fix="<z>"),), ("<f>",))._repr_html_()
    assert not re.search("<[xzmf]>", shown)
    assert "&lt;x&gt; &amp; y" in shown
    assert "renorm: 1 error" in shown
    assert "no findings" in Report(())._repr_html_()


def test_every_format_of_no_finding():
    for make in FORMATS.values():
        assert make(checked())
    assert json.loads(formats.sarif(checked()))["runs"][0]["results"] == []


# Where things are.


def place(folder, module):
    namespace = reference._load("train.py")
    model = namespace.Net()
    found = place_of(finding("error", module), model, namespace.bad)
    assert found.file == "train.py"
    return PROGRAM.splitlines()[found.line - 1].strip()


def test_places(folder):
    assert place(folder, "blocks.0.inner") == "self.inner: nn.Module = nn.Linear(4, 4)"
    assert place(folder, "blocks.1.rest.0") == "self.rest = nn.ModuleList([nn.Linear(4, 4)])"
    assert place(folder, "blocks.1") == "class Block(nn.Module):"
    assert place(folder, "head.1") == "self.head = nn.Sequential(nn.Linear(4, 3), nn.Softmax(1))"
    assert place(folder, "head.1.weight") == "self.head = nn.Sequential(nn.Linear(4, 3), nn.Softmax(1))"
    assert place(folder, "") == "def bad():"
    assert place(folder, "not.there") == "class Net(nn.Module):"


def test_the_place_of_a_library_model_is_where_it_is_built():
    def build():
        return nn.Sequential(nn.Linear(1, 1))

    found = place_of(finding("error", "0"), build(), build)
    assert Path(__file__).read_text().splitlines()[found.line - 1].strip() == "def build():"
    assert Path(found.file).name == Path(__file__).name
    assert place_of(finding("error"), build(), len) == Place(".", 1)


def test_arguments():
    model, loss = nn.Linear(1, 1), nn.MSELoss()
    assert arguments(model, "f") == {"model": model}
    assert arguments((model, loss), "f") == {"model": model, "loss": loss}
    assert arguments({"model": model, "batch": 1}, "f") == {"model": model, "batch": 1}
    for wrong, said in (
        ((loss.forward, model), r"it returned \(method, Linear\)"),
        ((model, loss, 1, 2, 3), "it returned .Linear, MSELoss, int, int, int"),
        ({"model": model, "net": 1}, "it returned a dict with net"),
        ({}, "it returned a dict with nothing"),
        ("model", "it returned str"),
    ):
        with pytest.raises(RuleError, match=said):
            arguments(wrong, "f")
