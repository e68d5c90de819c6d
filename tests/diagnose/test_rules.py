"""Each rule fires on its example with the fault, and nothing fires on the one without."""

import subprocess
import sys

import pages
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import renorm
from renorm.diagnose import RULES, Found, check, rule, watch
from renorm.errors import RuleError

CHECKED = [r for r in RULES.values() if r.when == "check"]
WATCHED = [r for r in RULES.values() if r.when == "watch"]


def report_of(rule, program):
    """What `check` or `watch` says of an example program."""
    torch.manual_seed(0)
    names = {"torch": torch, "nn": nn, "F": F, "rn": renorm, "watch": watch}
    exec(program, names)
    if rule.when == "watch":
        return names["report"]
    return check(
        *(names.get(name) for name in ("model", "loss", "optimizer", "batch", "loader")), **names.get("options", {})
    )


@pytest.mark.parametrize("one", RULES.values(), ids=lambda r: r.id)
def test_examples(one):
    with_fault, without = report_of(one, one.bad), report_of(one, one.good)
    assert one.id in {finding.id for finding in with_fault.findings}
    assert not with_fault.failures
    assert not without.failures
    assert not [str(f) for f in without.findings if f.severity != "info" or f.id == one.id]


@pytest.mark.parametrize("one", CHECKED, ids=lambda r: r.id)
def test_mechanical_fixes_mend(one):
    """Where a finding says it can be fixed by itself, the rule is silent on what the fix made."""
    report = report_of(one, one.bad)
    mending = [finding for finding in report.findings if finding.id == one.id and finding.mend is not None]
    if not mending:
        pytest.skip("nothing mechanical")
    fixed = report.fix()
    assert any(said.startswith(one.id) for said in fixed.said)
    torch.manual_seed(0)
    names = {"torch": torch, "nn": nn, "F": F, "rn": renorm}
    exec(one.bad, names)
    optimizer = fixed.optimizer if names.get("optimizer") is not None else None
    again = check(
        fixed.model, names.get("loss"), optimizer, names.get("batch"), names.get("loader"), **names.get("options", {})
    )
    assert one.id not in {finding.id for finding in again.findings if finding.mend is not None}


def test_entries_are_complete():
    for one in RULES.values():
        assert one.title
        assert one.why.endswith(".")
        assert one.fix
        assert one.source
        assert one.bad
        assert one.good
        assert one.find.__doc__


def test_pages_are_what_the_catalogue_says():
    written = {path.name: path.read_text(encoding="utf-8") for path in pages.FOLDER.glob("*.md")}
    assert written == pages.pages(), "write them again: python tests/diagnose/pages.py"


def test_a_rule_of_ones_own():
    @rule("X01", "tiny-batch", "warning", title="t", why="w", fix="f", source="s")
    def tiny_batch(evidence):
        if evidence.batch_size < 4:
            yield Found(f"{evidence.batch_size} samples")

    try:
        report = check(nn.Linear(2, 1), nn.MSELoss(), batch=(torch.randn(3, 2), torch.randn(3, 1)))
        assert [f.message for f in report.findings if f.id == "X01"] == ["3 samples"]
        with pytest.raises(RuleError, match=r"rule X01 \(other\) is registered already"):
            rule("X01", "other", "info", title="t", why="w", fix="f", source="s")
    finally:
        del RULES["X01"]
    with pytest.raises(RuleError, match="a severity is one of error, warning, info; got 'bad'"):
        rule("X02", "x", "bad", title="t", why="w", fix="f", source="s")


def test_importing_renorm_does_not_load_the_rules():
    code = "import sys, renorm; print('renorm.diagnose' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
