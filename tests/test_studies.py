"""The replications: rows and intervals, runs that go on, pages that are what the results give."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from renorm.cli import main
from renorm.errors import StudyError
from renorm.studies import catalogue
from renorm.studies.page import contents, page, write
from renorm.studies.replication import Claim, verdict
from renorm.studies.rows import Row, Rows, geometric, interval
from renorm.studies.run import Results, run

PAGES = Path(__file__).parent.parent / "docs" / "studies"


def test_an_interval_is_that_of_a_t_test():
    x = [1.0, 2.5, 2.0, 4.0]
    found, expected = interval(x), stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert math.isnan(interval([3.0]).low)
    assert interval([3.0]).text(1) == "3.0"
    assert interval([3.0, math.inf]).text(1) == "inf"


def test_a_ratio_has_the_interval_of_its_logarithm():
    found = geometric([2.0, 8.0])
    assert found.mean == pytest.approx(4)
    assert found.low * found.high == pytest.approx(16)


def rows():
    return Rows(tuple(Row({"b": b}, seed, {"y": b + seed, "curve": [1.0, b]}, 0.1) for b in (2, 8) for seed in (1, 0)))


def test_rows_are_paired_by_seed():
    found = rows()
    assert found.values("y", b=8).tolist() == [8, 9]
    assert found.values("curve", b=2).tolist() == [[1, 2], [1, 2]]
    assert found.levels("b") == [2, 8]
    assert found.difference("y", {"b": 8}, {"b": 2}).low == pytest.approx(6)
    ratio = found.ratio("y", {"b": 8}, {"b": 2})
    assert ratio.mean == pytest.approx(np.sqrt(8 / 2 * 9 / 3))


def test_the_verdict():
    good, bad = Claim("", "", True), Claim("", "", False)
    assert [verdict(c) for c in ((good,), (good, bad), (bad,))] == [
        "reproduced",
        "reproduced in part",
        "not reproduced",
    ]


@pytest.fixture
def small(monkeypatch):
    """A study of two measurements, each of which is counted."""
    made = []

    def measure(condition, seed):
        made.append((condition["n"], seed))
        return original.measure({"n": 30, "repeats": 2}, seed)

    original = catalogue.get("model-selection")
    measure.__module__ = original.measure.__module__
    plan = replace(original.quick, conditions=({"n": 1},), seeds=2)
    monkeypatch.setattr(catalogue, "get", lambda name: replace(original, quick=plan, measure=measure))
    return made


def test_a_run_goes_on_where_it_stopped(small, tmp_path):
    first, folder = run("model-selection", quick=True, out=tmp_path, jobs=1)
    files = sorted((folder / "measurements").glob("*.json"))
    assert len(small) == len(files) == 2
    files[0].write_text("{half")
    again, _ = run("model-selection", quick=True, out=tmp_path, jobs=1)
    assert len(small) == 3
    assert [row.values for row in again.rows] == [row.values for row in first.rows]
    assert Results.load(folder / "results.json") == again


def test_what_is_not_finite_is_kept_in_json_that_is_valid(tmp_path):
    row = Row({"b": 2}, 0, {"loss": math.inf, "curve": [1.0, math.nan]}, 0.1)
    Results("divergences", "quick", Rows((row,)), 0.1).save(tmp_path / "results.json")
    strictly(tmp_path / "results.json")
    (found,) = Results.load(tmp_path / "results.json").rows
    assert found.values["loss"] == math.inf
    assert np.isnan(found.values["curve"]).tolist() == [False, True]


@pytest.mark.parametrize("path", sorted(PAGES.glob("results/*.json")), ids=lambda path: path.stem)
def test_the_results_are_valid_json(path):
    strictly(path)


def strictly(path):
    def not_json(name):
        raise ValueError(f"{path.name} has {name}")

    json.loads(path.read_text(encoding="utf-8"), parse_constant=not_json)


def test_a_measurement_that_fails_is_named_and_the_others_stay(small, tmp_path, monkeypatch):
    broken = replace(catalogue.get("model-selection"))

    def fails(condition, seed):
        if seed == 1:
            raise ZeroDivisionError("no luck")
        return {"y": 1.0}

    fails.__module__ = broken.measure.__module__
    monkeypatch.setattr(catalogue, "get", lambda name: replace(broken, measure=fails))
    with pytest.raises(StudyError, match="'n': 1}, seed 1: ZeroDivisionError: no luck"):
        run("model-selection", quick=True, out=tmp_path, jobs=1)
    assert len(list(tmp_path.glob("*/measurements/*.json"))) == 1


def test_errors(tmp_path):
    with pytest.raises(StudyError, match=r"did you mean 'model-selection'"):
        catalogue.get("model-selecton")
    damaged = tmp_path / "results.json"
    damaged.write_text(json.dumps({"rows": [{}]}))
    with pytest.raises(StudyError, match="run it again"):
        Results.load(damaged)


def test_the_command_line(small, tmp_path):
    listed = CliRunner().invoke(main, ["study", "list"])
    assert all(name in listed.stdout for name in catalogue.NAMES)


@pytest.mark.parametrize("name", catalogue.NAMES)
def test_every_study_is_complete(name):
    study = catalogue.get(name)
    assert study.name == name
    assert study.published
    assert 1 <= study.minutes <= 3
    for plan in (study.quick, study.full):
        assert plan.seeds >= 2
        assert len({json.dumps(condition, sort_keys=True) for condition in plan.conditions}) == len(plan.conditions)


@pytest.mark.parametrize("name", catalogue.NAMES)
def test_pages_are_what_the_results_give(name, tmp_path):
    """Written by: python -m renorm.studies docs/studies."""
    results = Results.load(PAGES / "results" / f"{name}.json")
    write(results, tmp_path)
    for path in (f"{name}.md", f"pictures/{name}.svg"):
        assert (PAGES / path).read_text(encoding="utf-8") == (tmp_path / path).read_text(encoding="utf-8")
    assert page(results, "p.svg").startswith("# ")


def test_the_list_of_studies_is_that_of_the_results():
    found = {path.stem: Results.load(path) for path in (PAGES / "results").glob("*.json")}
    assert (PAGES / "index.md").read_text(encoding="utf-8") == contents(found)
