"""The report's file: complete, safe, and the same numbers as the store."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from made_up import Study, edited, large, record, regression, result, spec, stopped, study_of, typical

from renorm.comparison import report
from renorm.comparison.analysis import analyse
from renorm.comparison.areas import areas_of
from renorm.comparison.charts import cost_charts, curve_charts, score_charts

HOSTILE = "</script><script>alert(1)</script><!-- & \"quoted\" 'text' \u2028 <img src=x onerror=alert(1)>"


class Reader(HTMLParser):
    """The elements and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}  # tag -> the text of each such element that holds text
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def text(self) -> str:
        return " ".join(
            " ".join(
                part for tag, parts in self.texts.items() if tag not in ("script", "style") for part in parts
            ).split()
        )


def page(study: Study) -> Reader:
    return Reader(report.html(*study))


def data_of(study: Study) -> Any:
    found = re.search(r'<script type="application/json" id="study-data">(.*?)</script>', report.html(*study), re.S)
    assert found
    return json.loads(found[1])


def hostile() -> Study:
    """A study in which every text that comes from outside tries to be HTML."""
    _, results = typical()
    results = [replace(item, reason=HOSTILE) if item.reason else item for item in results]
    results = [replace(item, spec=replace(item.spec, optimizer=HOSTILE)) for item in results]
    study = record(results, name=HOSTILE, task="regression", command=HOSTILE, model=HOSTILE)
    study = replace(
        study,
        settings={HOSTILE: HOSTILE, "model": HOSTILE},
        data={**study.data, "target": HOSTILE, "notes": [HOSTILE], "classes": [HOSTILE]},
        versions={HOSTILE: HOSTILE},
    )
    return study, [replace(r, test={"rmse": r.test["error"]} if r.test else {}) for r in results]


# The file


def test_the_report_is_written_whole_and_nothing_else(tmp_path: Path) -> None:
    path = report.write(*typical(), tmp_path / "deep" / "report.html")
    assert path == tmp_path / "deep" / "report.html"
    assert path.read_text(encoding="utf-8") == report.html(*typical())
    assert os.listdir(path.parent) == ["report.html"]


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        report.write(*typical(), path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.html"]


def test_a_name_that_utf8_cannot_hold_is_written_with_question_marks(tmp_path: Path) -> None:
    study, results = typical()
    path = report.write(replace(study, name="file-\udcff"), results, tmp_path / "report.html")
    assert "<h1>file-?</h1>" in path.read_text(encoding="utf-8")


def test_the_same_study_gives_the_same_file() -> None:
    assert report.html(*typical()) == report.html(*typical())


def test_a_large_study_fits(tmp_path: Path) -> None:
    path = report.write(*large(), tmp_path / "report.html")
    assert path.stat().st_size < 12e6


# Safety


def test_the_policy_allows_exactly_the_scripts_and_styles_in_the_file() -> None:
    text = report.html(*typical())
    reader = Reader(text)
    policy = next(str(attrs["content"]) for attrs in reader.named("meta") if "http-equiv" in attrs)
    rules = {rule.split()[0]: rule.split()[1:] for rule in policy.split("; ")}
    assert rules["default-src"] == ["'none'"]
    assert rules["img-src"] == ["data:"]
    assert not any("unsafe" in word or "http" in word or word == "*" for words in rules.values() for word in words)
    bodies = {
        kind: [
            body for attrs, body in re.findall(rf"<{kind}\b([^>]*)>(.*?)</{kind}>", text, re.S) if "json" not in attrs
        ]
        for kind in ("script", "style")
    }
    for kind, found in bodies.items():
        hashes = {f"'sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}'" for body in found}
        assert hashes == set(rules[f"{kind}-src"])


def test_nothing_in_the_file_points_outside() -> None:
    reader = page(typical())
    attributes = [(tag, name, value or "") for tag, attrs in reader.tags for name, value in attrs.items()]
    assert {tag for tag, _ in reader.tags}.isdisjoint({"link", "iframe", "object", "embed", "base", "form"})
    assert [value for _, name, value in attributes if name in ("src", "srcset")] == []
    assert all(value.startswith("#") for _, name, value in attributes if name == "href")
    assert [name for _, name, _ in attributes if name.startswith("on") or name == "style"] == []


def test_text_from_outside_stays_text() -> None:
    reader = page(hostile())
    assert len(reader.named("script")) == 3
    assert reader.named("img") == []
    assert [attrs for tag, attrs in reader.tags if any(name.startswith("on") for name in attrs)] == []
    shown = reader.text
    assert shown.count("<script>alert(1)</script>") >= 10
    assert reader.texts["h1"] == [HOSTILE]


def test_text_from_outside_cannot_end_the_data() -> None:
    found = re.search(r'id="study-data">(.*?)</script>', report.html(*hostile()), re.S)
    assert found
    assert not set("<>&\u2028").intersection(found[1])
    json.loads(found[1])


# The contents


def test_the_answer_comes_first_and_headings_are_in_order() -> None:
    reader = page(typical())
    levels = [int(tag[1]) for tag, _ in reader.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert reader.texts["h2"] == [
        "The answer", "Score against batch size", "Learning curves", "Time and memory", "What each norm averages over",
        "The differences, and how sure they are", "Trials that did not finish", "The study",
    ]  # fmt: skip
    assert analyse(*typical()).sentence in reader.text


def test_the_contents_list_points_at_the_sections() -> None:
    reader = page(typical())
    names = [attrs["id"] for attrs in reader.named("section")]
    assert [f"#{name}" for name in names] == [attrs["href"] for attrs in reader.named("a")][1:]


def test_every_table_has_a_caption_and_scoped_heads() -> None:
    reader = page(typical())
    assert len(reader.named("caption")) == len(reader.named("table")) > 8
    assert all(attrs.get("scope") in ("col", "row", "rowgroup") for attrs in reader.named("th"))


def test_ids_are_unique() -> None:
    ids = [attrs["id"] for _, attrs in page(typical()).tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_it_shows_the_study_and_how_to_run_it_again() -> None:
    text = page(typical()).text
    for fact in ("renorm compare --epochs 8", "pixels divided by 16", "BatchNorm1d(128)", "2.13.0", "x86_64", "1078"):
        assert fact in text


def test_it_says_which_trials_did_not_finish_and_why() -> None:
    text = page(typical()).text
    assert "the loss was nan after 99 steps" in text
    assert "it would return its bias" in text


def test_a_trial_that_has_not_run_is_counted() -> None:
    study = edited(typical(), lambda item: item if item.spec.seed else None)
    assert "14 trials of the study have not run yet." in page(study).text


def test_a_regression_has_its_unit() -> None:
    text = page(regression()).text
    assert "units of progression" in text
    assert "percentage points" not in text


@pytest.mark.parametrize("kept", [0, 1])
def test_a_study_without_results_or_with_one_is_a_report_all_the_same(kept: int) -> None:
    study, results = typical()
    reader = page((study, results[:kept]))
    assert ("No trial has finished" in reader.text) == (kept == 0)


def test_a_study_whose_trials_all_failed_says_so() -> None:
    study = edited(typical(), lambda item: stopped(item.spec, "failed", "RuntimeError: boom"))
    text = page(study).text
    assert "No trial has finished" in text
    assert "RuntimeError: boom" in text


# The charts' numbers


def test_the_score_chart_has_the_rows_means_and_intervals() -> None:
    analysis = analyse(*typical())
    (chart,) = score_charts(analysis)
    rows = [row for row in analysis.rows if row.score.num]
    expected = {
        (row.norm, row.setting.batch_size): (row.score.mean, max(row.score.low, 0), min(row.score.high, 1))
        for row in rows
    }
    found = {
        (one["norm"], x): (y / 100, low / 100, high / 100)
        for one in chart.points["series"]
        for x, y, low, high in zip(one["x"], one["y"], one["low"], one["high"], strict=True)
    }
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, rel=1e-5)
    assert chart.points["log"] is True


def test_a_score_without_an_interval_has_a_point_and_no_bar() -> None:
    (chart,) = score_charts(analyse(*study_of({("batch", 2): [0.1], ("batch", 32): [0.2]})))
    assert chart.points["series"][0]["y"] == [10.0, 20.0]
    assert chart.points["series"][0]["low"] == [None, None]


def test_the_curves_are_those_of_the_trials_and_their_mean() -> None:
    study, results = typical()
    charts = {chart.title: chart.points["series"] for chart in curve_charts(analyse(study, results))}
    series = {one["norm"]: one for one in charts["Batch size 32"]}
    assert "instance" not in series
    for norm, one in series.items():
        trials = [r for r in results if (r.spec.norm, r.spec.batch_size) == (norm, 32)]
        done = [r for r in trials if r.status == "ok"]
        assert one["steps"] == [point.step for point in done[0].curve]
        mean = [
            sum(losses) / len(done) for losses in zip(*([p.valid_loss for p in r.curve] for r in done), strict=True)
        ]
        assert one["valid"] == pytest.approx(mean, rel=1e-5)
        assert [seed["steps"] for seed in one["seeds"]] == [[p.step for p in r.curve] for r in trials]
    diverged = series["none"]["seeds"][1]
    assert diverged["train"][-1] is None
    assert diverged["valid"][-1] is None


def test_time_and_memory_are_medians_with_their_range() -> None:
    study, results = typical()
    time_chart, memory_chart = cost_charts(analyse(study, results))
    layer = next(one for one in time_chart.points["series"] if one["norm"] == "layer")
    assert layer["y"] == pytest.approx([0.4 * (1 + 2 / 64) * 1.1, 0.6 * 1.1], rel=1e-5)
    assert layer["low"] == pytest.approx([0.4 * (1 + 2 / 64), 0.6], rel=1e-5)
    switch = next(one for one in memory_chart.points["series"] if one["norm"] == "switch")
    assert switch["y"] == [None, None]


def test_other_axes_get_a_chart_each() -> None:
    results = [
        result(spec("batch", size, seed, optimizer=optimizer), 0.1)
        for size in (2, 32)
        for optimizer in ("adam", "sgd")
        for seed in range(3)
    ]
    analysis = analyse(record(results), results)
    assert [chart.title for chart in score_charts(analysis)] == ["adam", "sgd"]
    assert [chart.title for chart in curve_charts(analysis)] == [
        "Batch size 2, adam", "Batch size 32, adam", "Batch size 2, sgd", "Batch size 32, sgd",
    ]  # fmt: skip


def test_long_curves_are_thinned_in_the_table_only() -> None:
    results = [result(spec("batch", 32, seed), 0.1, epochs=50) for seed in range(3)]
    (chart,) = curve_charts(analyse(record(results), results))
    assert len(chart.points["series"][0]["steps"]) == 50
    assert len(chart.table.rows) == 20
    assert "20 of 50 points" in chart.table.caption
    assert [chart.table.rows[0][0], chart.table.rows[-1][0]] == ["33", str(50 * 33)]


def test_every_chart_has_a_text_alternative_with_its_numbers() -> None:
    study, results = typical()
    analysis = analyse(study, results)
    (score,) = score_charts(analysis)
    assert "batch norm 36.4 at batch size 2 and 1.67 at batch size 32" in score.alt
    for chart in (*curve_charts(analysis), *cost_charts(analysis)):
        assert len(chart.alt) > 40
        assert "nan" not in chart.alt


def test_the_data_in_the_page_is_what_the_charts_hold() -> None:
    data = data_of(typical())
    assert [norm["title"] for norm in data["norms"]][:2] == ["no norm", "batch norm"]
    assert set(data["charts"]) == {"score-0", "curves-0", "curves-1", "time-0", "memory-0"}
    (chart,) = score_charts(analyse(*typical()))
    assert data["charts"]["score-0"] == json.loads(json.dumps(chart.points))


def test_norms_have_different_styles() -> None:
    styles = [norm["style"] for norm in data_of(typical())["norms"]]
    assert len(set(styles)) == len(styles)
    assert styles[0] == 0


# The areas


@pytest.mark.parametrize(
    ("norm", "model", "patterns"),
    [
        ("batch", "mlp", ["[n] c"]), ("instance", "mlp", []), ("none", "cnn", []),
        ("group(8)", "cnn", ["n (g [c]) [...]"]), ("layer", "transformer", ["... [c]"]), ("layer", "lstm", ["... [c]"]),
        ("batch", "tcn", ["[n] c [...]"]),
        ("layer", "resnet", ["n [c ...]"]), ("batch", "mine:net@1", ["[n] c [...]"]),
        ("switch", "resnet", ["n c [...]", "n [c ...]", "[n] c [...]"]), ("n [c] h w", "cnn", ["n [c] h w"]),
    ],
)  # fmt: skip
def test_each_norm_has_the_areas_of_its_model(norm: str, model: str, patterns: list[str]) -> None:
    areas = areas_of([norm], [model])
    assert [area.pattern for area in areas] == patterns
    assert all(area.svg.startswith("<svg") for area in areas)


def test_norms_of_one_area_share_a_picture() -> None:
    areas = areas_of(["layer", "rms", "switch"], ["cnn"])
    assert [(area.norms, area.mixed_by) for area in areas] == [
        (("layer", "rms"), ("switch",)), ((), ("switch",)), ((), ("switch",)),
    ]  # fmt: skip


def test_a_pattern_of_too_many_axes_has_no_picture() -> None:
    (area,) = areas_of(["[n] c a b d e f"], ["cnn"])
    assert area.svg == ""
    assert "[n] c a b d e f" in page(study_of({("[n] c a b d e f", 2): [0.1, 0.2]})).text


def test_numbers_of_the_data_are_finite_or_null() -> None:
    def finite(value: Any) -> bool:
        if isinstance(value, dict):
            return all(map(finite, value.values()))
        if isinstance(value, list):
            return all(map(finite, value))
        return not isinstance(value, float) or math.isfinite(value)

    assert finite(data_of(typical()))
