"""`check` on the pinned programs: silent on the healthy ones, and right about the faulty ones."""

import accuracy
import clean
import faulty
import pytest
import torch
from accuracy import loud, report_of, verdict
from program import diagnosed

from renorm.diagnose import RULES

CLEAN, FAULTY = list(clean.ALL.values()), list(faulty.ALL.values())


def name_of(build):
    return f"{accuracy.family(build)}.{build.__name__}"


def test_there_are_enough():
    assert len(CLEAN) >= 64
    assert len(FAULTY) >= 64
    expected = {id for build in FAULTY for id in build.fault.expects}
    assert not {rule.id for rule in RULES.values() if rule.when == "check"} - expected
    assert not {id for build in FAULTY for id in build.fault.expects | build.fault.also} - set(RULES)
    assert all(build.__doc__ for build in FAULTY)


@pytest.mark.parametrize("build", CLEAN, ids=name_of)
def test_no_error_on_a_healthy_program(build):
    report = report_of(build)
    assert not report.failures
    assert not [str(finding) for finding in report.errors]


def test_hardly_a_warning_on_healthy_programs():
    warned = {name_of(build): loud(build, "warning") for build in CLEAN if loud(build, "warning")}
    assert len(warned) <= 0.05 * len(CLEAN), warned


@pytest.mark.parametrize("build", FAULTY, ids=name_of)
def test_nothing_false_is_said_of_a_faulty_program(build):
    assert not report_of(build).failures
    assert not verdict(build).false_errors


def test_faults_are_found():
    """What is missed is in the table; fewer than these would be a step back."""
    missed = [name_of(build) for build in FAULTY if not verdict(build).detected]
    strange = [name_of(build) for build in FAULTY if not verdict(build).diagnosed]
    assert len(missed) <= 0.05 * len(FAULTY), missed
    assert len(strange) <= 0.05 * len(FAULTY), strange


@pytest.mark.parametrize("name", ["resnet", "gpt", "variational_autoencoder", "regression_with_batch_norm"])
def test_another_start_says_the_same(name):
    for seed in (1, 2):
        assert not [str(f) for f in diagnosed(clean.ALL[name], seed).findings if f.severity != "info"]


def test_programs_leave_the_random_numbers_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    diagnosed(clean.ALL["lenet"])
    assert torch.equal(before, torch.get_rng_state())


def test_the_page_is_up_to_date():
    assert accuracy.PAGE.read_text(encoding="utf-8") == accuracy.page(), "run python tests/diagnose/accuracy.py"
