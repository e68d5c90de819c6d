"""The report in a real browser: it draws what the store has, asks nothing of a network, and can be read by all."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from made_up import Study, edited, large, record, regression, result, spec, stopped, study_of, typical

from renorm.comparison.analysis import analyse

Open = Callable[..., Any]

HOSTILE = "</script><script>window.hacked = true</script><img src=x onerror='window.hacked = true'>"

# The points of a chart as Plotly holds them.
POINTS = """(name) => document.getElementById(name).data.map((trace) => ({
    norm: trace.meta, mode: trace.mode, x: [...trace.x], y: [...trace.y], axis: trace.yaxis,
    sizes: trace.customdata && trace.customdata.map((entry) => entry[0]),
    up: trace.error_y && [...trace.error_y.array], down: trace.error_y && [...trace.error_y.arrayminus],
    colour: trace.line.color, dash: trace.line.dash, symbol: trace.marker && trace.marker.symbol,
}))"""


def single_seed() -> Study:
    return study_of({(norm, size): [0.1] for norm in ("batch", "layer") for size in (2, 32)})


def one_batch_size() -> Study:
    return study_of({(norm, 32): [0.1, 0.2, 0.11] for norm in ("batch", "layer")})


def all_failed() -> Study:
    return edited(typical(), lambda item: stopped(item.spec, "failed", "RuntimeError: boom"))


def nothing() -> Study:
    return typical()[0], []


def zero_errors() -> Study:
    return study_of({("batch", 2): [0.0, 0.0, 0.0], ("batch", 32): [0.3, 0.2, 0.1]})


@pytest.mark.parametrize(
    "study",
    [typical, regression, single_seed, one_batch_size, all_failed, nothing, zero_errors],
    ids=lambda f: f.__name__,
)
def test_it_draws_without_a_complaint_and_without_a_network(opened: Open, study: Callable[[], Study]) -> None:
    shown = opened(study())
    assert shown.problems == []
    assert len(shown.requests) == 1
    assert shown.requests[0].startswith("file:")
    assert shown.evaluate("[...document.querySelectorAll('.plot')].every((plot) => plot.querySelector('.main-svg'))")


def test_the_score_chart_has_the_points_of_the_store(typical_page: Any) -> None:
    study = typical()
    rows = {(row.norm, row.setting.batch_size): row.score for row in analyse(*study).rows if row.score.num}
    found = {}
    for trace in typical_page.evaluate(POINTS, "score-0"):
        for size, y, up, down in zip(trace["sizes"], trace["y"], trace["up"], trace["down"], strict=True):
            found[trace["norm"], size] = (y, y - down, y + up)
    assert found.keys() == rows.keys()
    for key, score in rows.items():
        expected = (100 * score.mean, 100 * max(score.low, 0), 100 * min(score.high, 1))
        assert found[key] == pytest.approx(expected, rel=1e-4)


def test_points_of_one_batch_size_stand_apart_but_near_it(typical_page: Any) -> None:
    traces = typical_page.evaluate(POINTS, "score-0")
    places = [x for trace in traces for x, size in zip(trace["x"], trace["sizes"], strict=True) if size == 32]
    assert len(set(places)) == len(places) == 6
    assert all(32 / math.sqrt(2) < x < 32 * math.sqrt(2) for x in places)


def test_the_learning_curves_have_the_points_of_the_store(typical_page: Any) -> None:
    study = typical()
    traces = typical_page.evaluate(POINTS, "curves-1")
    for part, axis in (("train_loss", "y"), ("valid_loss", "y2")):
        for norm in ("batch", "none"):
            trials = [r for r in study[1] if (r.spec.norm, r.spec.batch_size) == (norm, 32)]
            (thin,) = [t for t in traces if t["norm"] == norm and t["axis"] == axis and t["dash"] is None]
            values = [value for value in thin["y"] if value is not None]
            losses = [getattr(point, part) for trial in trials for point in trial.curve]
            assert values == pytest.approx([loss for loss in losses if math.isfinite(loss)], rel=1e-5)
            (mean,) = [t for t in traces if t["norm"] == norm and t["axis"] == axis and t["dash"] is not None]
            done = [trial for trial in trials if trial.status == "ok"]
            ends = [getattr(trial.curve[-1], part) for trial in done]
            assert mean["y"][-1] == pytest.approx(sum(ends) / len(ends), rel=1e-5)
            assert mean["x"] == [point.step for point in done[0].curve]


@pytest.mark.parametrize(("epochs", "mode"), [(1, "markers"), (2, "lines")])
def test_a_curve_of_one_point_can_be_seen(opened: Open, epochs: int, mode: str) -> None:
    results = [result(spec("batch", 32, seed), 0.1, epochs=epochs) for seed in range(2)]
    traces = opened((record(results), results)).evaluate(POINTS, "curves-0")
    assert {trace["mode"] for trace in traces} == {mode}


def test_a_seed_that_diverged_ends_where_it_did(typical_page: Any) -> None:
    traces = typical_page.evaluate(POINTS, "curves-1")
    (thin,) = [t for t in traces if t["norm"] == "none" and t["axis"] == "y" and t["dash"] is None]
    assert thin["x"][9:13] == [33, 66, 99, None]
    assert thin["y"][11] is None


def test_time_and_memory_are_drawn(typical_page: Any) -> None:
    times = {trace["norm"]: trace["y"] for trace in typical_page.evaluate(POINTS, "time-0")}
    assert times["layer"] == pytest.approx([0.4 * (1 + 2 / 64) * 1.1, 0.66], rel=1e-4)
    memory = {trace["norm"]: trace["y"] for trace in typical_page.evaluate(POINTS, "memory-0")}
    assert memory["switch"] == [None, None]


def test_norms_differ_by_more_than_colour(typical_page: Any) -> None:
    traces = typical_page.evaluate(POINTS, "score-0")
    assert len({trace["colour"] for trace in traces}) == 6
    assert len({trace["symbol"] for trace in traces}) == 6


def test_text_from_outside_is_shown_and_never_run(opened: Open) -> None:
    def spoil(item: Any) -> Any:
        return stopped(item.spec, "failed", HOSTILE) if item.spec.norm == "none" else item

    study, results = edited(regression(), spoil)
    hostile = record(results, name=HOSTILE, task="regression", data={**study.data, "target": HOSTILE})
    shown = opened((hostile, results))
    assert shown.problems == []
    assert shown.evaluate("window.hacked") is None
    assert shown.page.locator("h1").inner_text() == HOSTILE
    assert shown.page.locator("#unfinished td", has_text="window.hacked").first.inner_text() == HOSTILE
    assert HOSTILE in shown.page.locator("#batch-size figcaption").inner_text()


def test_the_scheme_switches_while_the_page_is_open(opened: Open) -> None:
    shown = opened(typical(), color_scheme="light")
    paper = "getComputedStyle(document.body).backgroundColor"
    light = shown.evaluate(paper), shown.evaluate(POINTS, "score-0")
    shown.page.emulate_media(color_scheme="dark")
    shown.wait(f"document.getElementById('score-0').data[0].line.color !== '{light[1][0]['colour']}'")
    dark = shown.evaluate(paper), shown.evaluate(POINTS, "score-0")
    assert light[0] != dark[0]
    assert all(before["colour"] != after["colour"] for before, after in zip(light[1], dark[1], strict=True))
    assert [trace["y"] for trace in light[1]] == [trace["y"] for trace in dark[1]]


def luminance(colour: str) -> float:
    """WCAG's relative luminance of "rgb(r, g, b)" or "#rrggbb"."""
    found = re.findall(r"[\d.]+", colour)[:3] if "(" in colour else [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (float(v) / 255 for v in found)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    dim, bright = sorted((luminance(one), luminance(other)))
    return (bright + 0.05) / (dim + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_have_the_contrast_that_wcag_asks_for(opened: Open, scheme: str) -> None:
    shown = opened(typical(), color_scheme=scheme)
    tokens = ["paper", "raised", "ink", "quiet", "accent", "warn", *(f"norm-{i}" for i in range(8))]
    style = "getComputedStyle(document.documentElement)"
    read = f"names => names.map((name) => {style}.getPropertyValue('--' + name).trim())"
    colour = dict(zip(tokens, shown.evaluate(read, tokens), strict=True))
    for text in ("ink", "quiet", "accent", "warn"):
        assert contrast(colour[text], colour["paper"]) >= 4.5, text
    for place in range(8):
        assert contrast(colour[f"norm-{place}"], colour["paper"]) >= 3, place


def test_print_is_light_with_charts_and_all_tables(opened: Open) -> None:
    shown = opened(typical(), color_scheme="dark")
    tables = shown.page.locator("table")
    closed = shown.page.locator("details:not([open])").count()
    assert closed > 0
    shown.page.emulate_media(media="print", color_scheme="dark")
    shown.page.wait_for_selector("html.printing")
    assert all(tables.nth(place).is_visible() for place in range(tables.count()))
    assert shown.page.locator(".plot .main-svg").first.is_visible()
    assert not shown.page.locator("nav").is_visible()
    assert luminance(shown.evaluate("getComputedStyle(document.body).color")) < 0.05
    assert shown.evaluate("document.getElementById('score-0')._fullLayout.width") < 700
    shown.page.emulate_media(media="screen", color_scheme="dark")
    shown.page.wait_for_selector("html:not(.printing)")
    assert shown.page.locator("details:not([open])").count() == closed


def test_it_prints_to_pdf(opened: Open) -> None:
    shown = opened(typical(), color_scheme="dark")
    assert shown.page.pdf(format="A4")[:5] == b"%PDF-"
    assert shown.problems == []


@pytest.mark.parametrize("width", [360, 768, 1400])
def test_it_fits_the_window(opened: Open, width: int) -> None:
    shown = opened(typical(), viewport={"width": width, "height": 800})
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    outside = "plot => { const box = plot.getBoundingClientRect(); return box.left < 0 || box.right > innerWidth; }"
    assert not shown.evaluate(f"[...document.querySelectorAll('.plot')].some({outside})")


def test_charts_follow_the_window(opened: Open) -> None:
    shown = opened(typical())
    shown.page.set_viewport_size({"width": 500, "height": 800})
    shown.wait("document.getElementById('score-0')._fullLayout.width < 500")
    shown.wait("document.getElementById('curves-0')._fullLayout.yaxis.domain[0] > 0.5")


def test_the_page_does_not_jump_while_charts_are_drawn(opened: Open) -> None:
    shown = opened(typical())
    heights = "[...document.querySelectorAll('.plot')].map((plot) => plot.offsetHeight)"
    drawn = shown.evaluate(heights)
    shown.evaluate("document.querySelectorAll('.plot').forEach((plot) => Plotly.purge(plot))")
    assert shown.evaluate(heights) == drawn
    assert min(drawn) > 300


def test_a_norm_can_be_hidden_by_keyboard_in_every_chart(opened: Open) -> None:
    shown = opened(typical())
    button = shown.page.get_by_role("button", name="batch norm").first
    button.focus()
    shown.page.keyboard.press("Enter")
    shown.wait("document.getElementById('score-0').data.every((trace) => trace.meta !== 'batch')")
    assert {trace["norm"] for trace in shown.evaluate(POINTS, "curves-0")}.isdisjoint({"batch"})
    pressed = shown.page.locator('.legend button[data-norm="batch"]').evaluate_all(
        "buttons => buttons.map((button) => button.getAttribute('aria-pressed'))"
    )
    assert pressed == ["false"] * 3
    shown.page.keyboard.press("Enter")
    shown.wait("document.getElementById('score-0').data.some((trace) => trace.meta === 'batch')")


def test_the_scale_can_be_switched(opened: Open) -> None:
    shown = opened(typical())
    kind = "document.getElementById('score-0')._fullLayout.yaxis.type"
    assert shown.evaluate(kind) == "log"
    button = shown.page.get_by_role("button", name="Logarithmic scale")
    assert button.get_attribute("aria-pressed") == "true"
    button.click()
    shown.wait(f"{kind} === 'linear'")
    assert button.get_attribute("aria-pressed") == "false"


def test_scores_of_zero_stay_on_a_linear_scale(opened: Open) -> None:
    assert opened(zero_errors()).evaluate("document.getElementById('score-0')._fullLayout.yaxis.type") == "linear"


def test_a_reader_that_does_not_see_gets_names_for_everything(typical_page: Any) -> None:
    unnamed = """[...document.querySelectorAll('img, [role=img], [role=region], [role=group], nav, button, summary')]
        .filter((e) => !(e.ariaLabel || e.getAttribute('alt') || e.textContent.trim())).map((e) => e.outerHTML)"""
    assert typical_page.evaluate(unnamed) == []
    svgs = "[...document.querySelectorAll('main svg')].filter((e) => !e.closest('.plot'))"
    assert typical_page.evaluate(f"{svgs}.filter((e) => e.ariaHidden !== 'true' && !e.ariaLabel).length") == 0
    assert typical_page.evaluate("document.documentElement.lang") == "en"
    assert typical_page.evaluate("document.title") == "digits-mlp – renorm compare"
    assert typical_page.evaluate("document.querySelectorAll('th:not([scope])').length") == 0
    levels = typical_page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map((e) => Number(e.tagName[1]))")
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_the_first_tab_stop_skips_to_the_answer(opened: Open) -> None:
    shown = opened(typical())
    shown.page.keyboard.press("Tab")
    assert shown.evaluate("document.activeElement.textContent") == "Skip to the answer"
    assert shown.evaluate("document.activeElement.getBoundingClientRect().left") >= 0


def test_without_scripts_the_numbers_can_be_read(opened: Open, browser: Any, tmp_path: Any) -> None:
    opened(typical())
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((tmp_path / "report.html").as_uri())
    assert page.locator("table.answer").is_visible()
    page.locator("#batch-size summary").click()
    assert page.locator("#batch-size table").is_visible()
    context.close()


def test_many_settings_are_drawn(opened: Open) -> None:
    results = [
        result(spec(norm, size, seed, optimizer=optimizer), 0.1 + 0.01 * seed)
        for norm in ("batch", "layer")
        for size in (2, 8, 32)
        for optimizer in ("sgd", "adam")
        for seed in range(3)
    ]
    shown = opened((record(results), results))
    assert shown.problems == []
    assert shown.evaluate("document.querySelectorAll('.plot').length") == 2 + 6 + 4


def test_five_hundred_trials_are_drawn(opened: Open) -> None:
    shown = opened(large())
    assert shown.problems == []
    points = shown.evaluate("""[...document.querySelectorAll('.curves .plot')].flatMap((plot) => plot.data)
        .filter((trace) => trace.line.dash === undefined && trace.yaxis === 'y').flatMap((trace) => trace.y)
        .filter((value) => value !== null).length""")
    assert points == 500 * 50
