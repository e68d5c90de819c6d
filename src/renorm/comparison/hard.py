"""The samples that most trials are worst at, from what each trial kept, and their section of the report."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import torch

from renorm.comparison.analysis import Analysis
from renorm.comparison.elements import scrolling
from renorm.comparison.spec import CaseRecord, StudyRecord, TrialResult
from renorm.diagnose.worst import Case, Neighbor, png

if TYPE_CHECKING:
    from renorm.comparison.data import Splits

__all__ = ["HardCase", "cases_table", "hard_cases"]

MOST_SHOWN = 12


@dataclass(frozen=True)
class HardCase:
    """One sample, over the trials that have it among their worst."""

    index: int  # row of the test part, or of the validation part where there is no test part
    target: float  # a class index, or a number in the target's units
    num_trials: int  # that have it among their worst
    norms: tuple[str, ...]  # of these trials, in the study's order
    loss: float  # mean over these trials
    predictions: tuple[tuple[float, int, float | None], ...]  # class, trials, mean confidence; in a regression the mean
    nearest: CaseRecord  # as the trial saw it whose neighbors are shown: of the best norm where it has the sample


def hard_cases(analysis: Analysis, results: Sequence[TrialResult], most: int = MOST_SHOWN) -> tuple[HardCase, ...]:
    """The samples that are among the worst of the most trials; of equally many, those with the highest mean loss."""
    best = [cell.best.norm for cell in analysis.cells if cell.best is not None]
    finished = [trial for trial in results if trial.worst]
    # Shown are the neighbors that the norm sees which is best in the most settings.
    finished.sort(key=lambda trial: (-best.count(trial.spec.norm), trial.spec.seed))
    seen: dict[int, list[tuple[str, CaseRecord]]] = {}
    for trial in finished:
        for case in trial.worst:
            seen.setdefault(case.index, []).append((trial.spec.norm, case))
    made = [_hard(analysis, index, found) for index, found in seen.items()]
    made.sort(key=lambda case: (-case.num_trials, -case.loss, case.index))
    return tuple(made[:most])


def _hard(analysis: Analysis, index: int, found: Sequence[tuple[str, CaseRecord]]) -> HardCase:
    norms = {norm for norm, _ in found}
    cases = [case for _, case in found]
    if cases[0].confidence is None:
        predictions: list[tuple[float, int, float | None]] = [
            (sum(case.prediction for case in cases) / len(cases), len(cases), None)
        ]
    else:
        often = Counter(case.prediction for case in cases).most_common()
        predictions = [
            (value, num, sum(case.confidence or 0.0 for case in cases if case.prediction == value) / num)
            for value, num in often
        ]
    return HardCase(
        index,
        cases[0].target,
        len(cases),
        tuple(norm for norm in analysis.norms if norm in norms),
        sum(case.loss for case in cases) / len(cases),
        tuple(predictions),
        cases[0],
    )


def cases_table(
    cases: Sequence[HardCase], record: StudyRecord, num_trials: int, most_kept: int, splits: Splits | None
) -> str:
    """The cases as HTML, with pictures where the data are images and their file is there."""
    classes = record.data.get("classes") or ()
    part = "test" if int(record.data.get("num_test", 1)) else "validation"
    x = None if splits is None else splits.x_test if part == "test" else splits.x_valid

    def picture(values: Any, index: int) -> str:
        return "" if values is None or index >= len(values) else _picture(values[index])

    def near(case: HardCase) -> str:
        return "".join(
            f'<div class="near">{picture(None if splits is None else splits.x_train, index)}'
            f"<span>{_name(target, classes)}</span><small>{index}</small></div>"
            for index, target in case.nearest.neighbors
        )

    rows = "".join(
        f'<tr><th scope="row"><div class="near">{picture(x, case.index)}<small>{case.index}</small></div></th>'
        f"<td>{_name(case.target, classes)}</td><td>{_predicted(case, classes)}</td>"
        f'<td class="number">{case.loss:.3g}</td><td>{case.num_trials} of {num_trials}<br>'
        f"<small>{_norms(case)}</small></td><td>{near(case)}</td>{_hint(case) if classes else ''}</tr>"
        for case in cases
    )
    head = "".join(
        f'<th scope="col"{style}>{title}</th>'
        for title, style in (
            (f"{part.capitalize()} sample", ""), ("Truth", ""), ("Predicted", ""), ("Loss", ' class="number"'),
            (f"Among the {most_kept} worst of", ""), ("Nearest in training", ""),
            *([("Look at", "")] if classes else []),
        )
    )  # fmt: skip
    caption = "Samples that the most trials are worst at, with the mean loss in these trials"
    return scrolling(
        caption,
        f'<table class="cases"><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>',
    )


def _norms(case: HardCase) -> str:
    return f"{len(case.norms)} norm{'s' if len(case.norms) != 1 else ''}: {escape(', '.join(case.norms))}"


def _name(value: float, classes: Sequence[str]) -> str:
    return escape(str(classes[int(value)])) if classes else f"{value:.4g}"


def _predicted(case: HardCase, classes: Sequence[str]) -> str:
    if not classes:
        return _name(case.predictions[0][0], classes)
    return "<br>".join(
        f"{_name(value, classes)} <small>{num}×, confidence {confidence:.2f}</small>"
        for value, num, confidence in case.predictions[:3]
    )


def _hint(case: HardCase) -> str:
    """What `renorm.worst_cases` would say of it."""
    seen = case.nearest
    near = tuple(Neighbor(index, 0.0, int(target), None) for index, target in seen.neighbors)
    found = Case(seen.index, seen.loss, seen.confidence, None, int(seen.prediction), int(seen.target), None, near)
    return f'<td class="hint">{escape(found.hint)}</td>'


def _picture(values: Any) -> str:
    """An image element of (C, H, W), its values stretched from black to white; nothing of other data."""
    image = torch.tensor(values)
    if image.dim() != 3 or image.shape[0] not in (1, 3) or min(image.shape[1:]) < 4 or max(image.shape[1:]) > 256:
        return ""
    return f'<img src="data:image/png;base64,{base64.b64encode(png(image)).decode()}" alt="">'
