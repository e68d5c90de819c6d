"""The sections of the report as HTML, the answer first; every text from outside is escaped here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from renorm.comparison.analysis import Analysis
from renorm.comparison.areas import Area, areas_of
from renorm.comparison.by_series import series_tables
from renorm.comparison.cells import Cell, Row, ending
from renorm.comparison.charts import Chart, Table
from renorm.comparison.criteria import CAVEAT, criteria_means
from renorm.comparison.differences import between_batch_sizes, between_choices, between_norms
from renorm.comparison.elements import facts, figure, scrolling, swatch, table
from renorm.comparison.forecast import BASELINES
from renorm.comparison.hard import cases_table, hard_cases
from renorm.comparison.paths import STEPS, path_pictures
from renorm.comparison.score import OTHER_TITLES, Estimate, rounded
from renorm.comparison.spec import Setting, StudyRecord, TrialResult
from renorm.comparison.verdict import model_title, norm_title, setting_title

if TYPE_CHECKING:
    from renorm.comparison.data import Splits

__all__ = ["Page", "body"]


@dataclass(frozen=True)
class Page:
    """Everything the report shows."""

    record: StudyRecord
    results: tuple[TrialResult, ...]
    analysis: Analysis
    norms: tuple[dict[str, Any], ...]  # each norm's title and the place of its colour
    scores: tuple[Chart, ...]  # score against batch size
    curves: tuple[Chart, ...]  # losses by step
    costs: tuple[Chart, ...]  # time and memory against batch size
    splits: Splits | None = None  # the data, for pictures of samples; None where its file is not there


@dataclass(frozen=True)
class Section:
    """One section: what the contents list calls it, its heading, and how its inside is made."""

    name: str  # the id of its element, and the target of the contents list
    short: str  # its name in the contents list
    title: str  # its heading
    inside: Callable[[Page], str]  # an empty string leaves the section out


def body(page: Page) -> str:
    """The inside of the body element."""
    made = [(section, section.inside(page)) for section in _SECTIONS]
    shown = [(section, inside) for section, inside in made if inside]
    links = "".join(f'<li><a href="#{section.name}">{section.short}</a></li>' for section, _ in shown)
    return (
        '<a class="skip" href="#answer">Skip to the answer</a>'
        f"<header>{_header(page)}</header>"
        f'<nav aria-label="Contents"><ul>{links}</ul></nav>'
        f"<main>{''.join(_section(section, inside) for section, inside in shown)}</main>"
        f"<footer><p>Made by renorm {escape(page.record.versions.get('renorm', ''))}. "
        "This file is complete in itself and loads nothing from a network.</p></footer>"
    )


def _section(section: Section, inside: str) -> str:
    return f'<section id="{section.name}"><h2>{section.title}</h2>{inside}</section>'


def _header(page: Page) -> str:
    record, analysis = page.record, page.analysis
    words = [
        record.task,
        f"{sum(norm not in BASELINES for norm in analysis.norms)} norms",
        f"{len(analysis.batch_sizes)} batch size{'s' if len(analysis.batch_sizes) != 1 else ''}",
        f"{len(page.results)} trials",
    ]
    return (
        f'<p class="eyebrow">renorm compare</p><h1>{escape(record.name)}</h1><p class="facts">{" · ".join(words)}</p>'
    )


def _norm_cell(page: Page, norm: str) -> str:
    style = next((entry["style"] for entry in page.norms if entry["norm"] == norm), 0)
    return f"{swatch(style)}{escape(norm_title(norm))}"


# The answer


def _answer(page: Page) -> str:
    analysis = page.analysis
    notes = "".join(f"<li>{escape(note)}</li>" for note in analysis.notes)
    return (
        f'<p class="sentence">{escape(analysis.sentence)}</p>'
        + (_answer_table(page) if analysis.rows else "")
        + (f'<ul class="notes">{notes}</ul>' if notes else "")
    )


def _answer_table(page: Page) -> str:
    score = page.analysis.score
    varying = page.analysis.varying
    head = f"{score.title[:1].upper()}{score.title[1:]} <small>({escape(score.unit)})</small>"
    groups = "".join(_answer_group(page, cell, setting_title(cell.setting, varying)) for cell in page.analysis.cells)
    return scrolling(
        "Scores of every norm and setting",
        '<table class="answer"><caption>Mean over seeds with its 95% t-interval; lower is better. '
        "The bars of one setting share a scale.</caption>"
        f'<thead><tr><th scope="col">Norm</th><th scope="col" class="number">{head}</th>'
        '<th scope="col" class="interval">95% interval</th>'
        '<th scope="col" class="range"><span class="hidden">Bar</span></th>'
        + "".join(f'<th scope="col" class="interval">{OTHER_TITLES[key]}</th>' for key in score.other_keys)
        + '<th scope="col">Against the lowest mean</th><th scope="col">Seeds finished</th></tr></thead>'
        f"{groups}</table>",
    )


def _answer_group(page: Page, cell: Cell, title: str) -> str:
    rows = "".join(_answer_row(page, cell, row) for row in cell.rows)
    width = 6 + len(page.analysis.score.other_keys)
    head = f'<tr class="group"><th scope="rowgroup" colspan="{width}">{escape(title.capitalize())}</th></tr>'
    return f"<tbody>{head}{rows}</tbody>"


def _answer_row(page: Page, cell: Cell, row: Row) -> str:
    score = page.analysis.score
    rate = "" if cell.setting.base_lr is not None else f" <small>learning rate {row.base_lr:g}</small>"
    reasons = "".join(f'<br><small class="reason">{escape(reason)}</small>' for reason in row.reasons)
    mean = score.text(row.score).removesuffix("%")
    others = "".join(f'<td class="interval">{_other(row.others[key])}</td>' for key in score.other_keys)
    return (
        f'<tr class="{row.place}"><th scope="row">{_norm_cell(page, row.norm)}{rate}</th>'
        f'<td class="number">{mean}</td><td class="interval">{score.interval(row.score)}</td>'
        f'<td class="range">{_range_bar(page, cell, row)}</td>'
        f"{others}<td>{_verdict(page, cell, row)}</td><td>{escape(row.status)}{reasons}</td></tr>"
    )


def _other(value: Estimate) -> str:
    return rounded(value.mean, value.half_width)


def _range_bar(page: Page, cell: Cell, row: Row) -> str:
    """The interval as a bar with the mean as a dot, on the scale of its setting."""
    if not row.score.num:
        return ""
    clipped = [page.analysis.score.clipped(other.score) for other in cell.rows]
    ends = [other.score.mean for other in cell.rows] + [end for pair in clipped for end in pair]
    finite = [end for end in ends if math.isfinite(end)]
    low, high = min(finite), max(finite)
    low = 0.0 if low < 0.3 * high else low
    scale = 112 / (high - low) if high > low else 0.0
    left, right = page.analysis.score.clipped(row.score)
    place = 4 + scale * (row.score.mean - low)
    bar = ""
    if math.isfinite(left) and math.isfinite(right):
        bar = f'<rect x="{4 + scale * (left - low):.1f}" y="4" width="{scale * (right - left):.1f}" height="4" rx="2"/>'
    return f'<svg viewBox="0 0 120 12" aria-hidden="true">{bar}<circle cx="{place:.1f}" cy="6" r="3.5"/></svg>'


def _verdict(page: Page, cell: Cell, row: Row) -> str:
    found = next((item for item in cell.comparisons if item.other == row.norm), None)
    if row.place == "best":
        return '<strong class="badge">lowest mean</strong>'
    if found is None or row.place == "unfinished":
        return "–"
    words = {
        "open": "no difference shown",
        "worse": "worse",
        "survivor": "lower where it finished",
        "untested": f"not tested ({found.difference.num} pair{'s' if found.difference.num != 1 else ''})",
    }[row.place]
    return f'<span class="verdict">{words}</span>'


# The charts


def _scores(page: Page) -> str:
    if not page.analysis.rows:
        return ""
    return (
        "<p>Each point is the mean over seeds, each bar its 95% t-interval. Points of one batch size are drawn side by "
        "side so that the bars can be seen.</p>" + _legend(page) + '<p class="switches">'
        '<button type="button" class="log" aria-pressed="false" hidden>Logarithmic scale</button></p>'
        + _charts(page.scores, wide=len(page.scores) == 1)
    )


def _curves(page: Page) -> str:
    shown = [chart for chart in page.curves if chart.points["series"]]
    if not shown:
        return ""
    return (
        "<p>Mean over the seeds that finished (bold) and every seed (thin); training loss is measured in training "
        "mode, validation loss in evaluation mode. A gap between the two that opens is over-fitting, or statistics "
        "that differ between the modes.</p>" + _legend(page) + _charts(shown, wide=True)
    )


def _costs(page: Page) -> str:
    if not any(row.score.num for row in page.analysis.rows):
        return ""
    return (
        "<p>Median over seeds; the bars go from the lowest to the highest. Time covers data, forward, backward and "
        "update; memory is the resident memory of the process above that before the model was built. Trials run in "
        "parallel, so read differences of a few percent as noise.</p>" + _legend(page) + _charts(page.costs)
    )


def _legend(page: Page) -> str:
    buttons = "".join(
        f'<button type="button" aria-pressed="true" data-norm="{escape(entry["norm"])}">'
        f"{swatch(entry['style'])}{escape(entry['title'])}</button>"
        for entry in page.norms
    )
    return f'<div class="legend" role="group" aria-label="Norms shown in the charts">{buttons}</div>'


def _charts(charts: Iterable[Chart], wide: bool = False) -> str:
    figures = "".join(figure(chart) for chart in charts)
    return f'<div class="charts{" wide" if wide else ""}">{figures}</div>'


def _areas(page: Page) -> str:
    figures = "".join(_area(page, area) for area in areas_of(page.analysis.norms, _models(page)))
    if not figures:
        return ""
    return (
        "<p>A small tensor as each norm sees it: entries of one colour share one mean and one variance (RMS norm: one "
        "mean square). Brackets mark the axes that are averaged over; n are the samples, c the channels."
        f'</p><div class="areas">{figures}</div>'
    )


def _area(page: Page, area: Area) -> str:
    users = [_norm_cell(page, norm) for norm in area.norms]
    users += [f"{_norm_cell(page, norm)} <small>(mixes several)</small>" for norm in area.mixed_by]
    lines = "".join(f"<li>{user}</li>" for user in users)
    return f"<figure>{area.svg}<figcaption><code>{escape(area.pattern)}</code><ul>{lines}</ul></figcaption></figure>"


def _models(page: Page) -> list[str]:
    names = [cell.setting.model for cell in page.analysis.cells]
    if page.record.task == "forecast":  # the activations of any other forecaster have the axes of a TCN's
        names = [name if name in ("mlp", "lstm", "transformer") else "tcn" for name in names]
    return list(dict.fromkeys(names))


def _paths(page: Page) -> str:
    pictures = path_pictures(trial.spec.optimizer for trial in page.results)
    if not pictures:
        return ""
    figures = "".join(f"<figure>{picture}</figure>" for picture in pictures)
    return (
        f"<p>The study’s optimizers on two functions of two numbers: {STEPS} steps with the exact gradient, at the one "
        "of seven learning rates (0.001 to 1) at which the path ends lowest. They show how the methods move, not how "
        f'they train this model: its scores are above.</p><div class="paths">{figures}</div>'
    )


# The differences


def _differences(page: Page) -> str:
    analysis = page.analysis
    choices = between_choices(analysis)
    tables = [
        ("norms", between_norms(analysis)),
        ("batch sizes", between_batch_sizes(analysis)),
        *([choices] if choices else []),
    ]
    shown = "".join(f"<h3>Between {title}</h3>{table(found)}" for title, found in tables if found)
    if not shown:
        return ""
    return (
        "<p>Differences are taken between trials of the same seed, which start from the same weights and see the "
        "samples in the same order. p is that of the paired t-test (of log-odds, for error rates), corrected by "
        "Holm’s method; a difference counts as shown when at least three pairs give a corrected p below 0.05. The "
        "lowest mean is picked by the same trials that test it, which makes p a little too small: among six equal "
        "norms with three seeds, some difference is claimed in about 7 of 100 studies instead of 5.</p>" + shown
    )


def _series(page: Page) -> str:
    tables = [table(found) for found in series_tables(page.analysis)]
    others = "".join(tables[1:])
    return "".join(tables[:1]) + (f"<details><summary>The other settings</summary>{others}</details>" if others else "")


# Single samples, and the fit


def _cases(page: Page) -> str:
    trials = [trial for trial in page.results if trial.worst]
    cases = hard_cases(page.analysis, trials)
    if not cases:
        return ""
    most = max(len(trial.worst) for trial in trials)
    return (
        f"<p>Every trial that finished kept the {most} samples with its highest losses; these are in the most of these "
        "lists, whatever the norm. A sample that all models get wrong, surely, is often one whose label is wrong, or "
        "unlike all that training has. Nearest is what is closest in the last hidden layer of a model with the norm "
        "that is best in the most settings. A sample’s number is its row in <code>data.npz</code>.</p>"
        + cases_table(cases, page.record, len(trials), most, page.splits)
    )


def _criteria(page: Page) -> str:
    found = [(row, means) for row in page.analysis.rows if (means := criteria_means(row))]
    if not found:
        return ""
    content = Table(
        caption="Mean over the seeds that finished; n training samples, ln L in nats; lower is better",
        head=("Norm", "Setting", "k", "n", "−2 ln L", "AIC", "AICc", "BIC"),
        rows=tuple(
            (
                norm_title(row.norm),
                setting_title(row.setting, page.analysis.varying).capitalize(),
                f"{means['k']:,.0f}",
                f"{means['n']:,.0f}",
                _thousands(-2 * means["log_likelihood"]),
                *(_thousands(means[name]) for name in ("aic", "aicc", "bic")),
            )
            for row, means in found
        ),
    )
    return f"<p>{CAVEAT}</p><details><summary>The numbers</summary>{table(content)}</details>"


def _thousands(value: float) -> str:
    return f"{value:,.1f}".replace("-", "−") if math.isfinite(value) else "–"


# What did not finish, and the study itself


def _unfinished(page: Page) -> str:
    analysis = page.analysis
    missing = f"<p>{analysis.num_missing} trials of the study have not run yet.</p>" if analysis.num_missing else ""
    if not analysis.unfinished:
        return missing
    seeds: dict[tuple[str, ...], list[str]] = {}
    for trial in analysis.unfinished:
        seeds.setdefault(_unfinished_row(analysis, trial), []).append(str(trial.spec.seed))
    rows = tuple((*row[:-2], ", ".join(found), *row[-2:]) for row, found in seeds.items())
    head = ("Norm", "Setting", "Learning rate of the step", "Seeds", "Status", "Reason")
    return missing + table(Table("Trials without a score", head, rows))


def _unfinished_row(analysis: Analysis, trial: TrialResult) -> tuple[str, ...]:
    spec = trial.spec
    setting = setting_title(Setting.of(spec), analysis.varying).capitalize()
    return norm_title(spec.norm), setting, f"{spec.lr:g}", *ending(analysis.score, trial)


def _study(page: Page) -> str:
    record = page.record
    return (
        f"<h3>Run it again</h3><pre><code>{escape(record.command)}</code></pre>"
        f"<h3>Data</h3>{_data(record.data)}"
        f"<h3>Settings</h3>{facts(record.settings)}"
        f"<h3>Model</h3><pre>{escape(record.model)}</pre>{_parameters(page)}"
        f"<h3>Versions</h3>{facts(record.versions)}"
    )


def _data(data: dict[str, Any]) -> str:
    notes = "".join(f"<li>{escape(str(note))}</li>" for note in data.get("notes", ()))
    rest = {name: value for name, value in data.items() if name != "notes"}
    return facts(rest) + (f'<ul class="notes">{notes}</ul>' if notes else "")


def _parameters(page: Page) -> str:
    counts = {
        (row.setting.model, row.norm): row.num_parameters for row in page.analysis.rows if row.num_parameters
    }  # fmt: skip
    several = "model" in page.analysis.varying
    rows = tuple(
        (norm_title(norm) + (f", {model_title(model)}" if several else ""), f"{num:,}")
        for (model, norm), num in counts.items()
    )
    return table(Table("Parameters of the model with each norm", ("Norm", "Parameters"), rows)) if rows else ""


_SECTIONS = (
    Section("answer", "Answer", "The answer", _answer),
    Section("batch-size", "Batch size", "Score against batch size", _scores),
    Section("curves", "Learning curves", "Learning curves", _curves),
    Section("cost", "Time and memory", "Time and memory", _costs),
    Section("areas", "Areas", "What each norm averages over", _areas),
    Section("paths", "Optimizers", "How the optimizers move", _paths),
    Section("series", "Series", "Series by series", _series),
    Section("differences", "Differences", "The differences, and how sure they are", _differences),
    Section("cases", "Worst cases", "The samples that models are worst at", _cases),
    Section("criteria", "Criteria", "Information criteria", _criteria),
    Section("unfinished", "Not finished", "Trials that did not finish", _unfinished),
    Section("study", "The study", "The study", _study),
)
