"""What a comparison shows, in words: names of norms, the one sentence, and the notes beside the numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from renorm.choices.reversible import parted
from renorm.comparison.cells import LEAST_PAIRS, SIGNIFICANCE, Cell, Row, corrected, paired
from renorm.comparison.forecast import BASELINES
from renorm.comparison.score import Estimate, Score, estimate
from renorm.comparison.spec import Setting, StudyRecord, varying_fields

__all__ = ["joined", "model_title", "norm_title", "notes", "sentence", "setting_title"]

_TUNED = "Each norm has its own learning rate, chosen on the validation part."
_SHARED = "All norms share one learning rate, which favours whoever it suits; --tune-lr gives each its own."
_MASE = (
    "Norms are ranked by MASE, the mean over series of the mean absolute error in units of the naive error in the "
    "training part: 1 is as far off as the value of a season before was there. MSE and correlation are means over "
    "series, too, each in its own units; the correlation of levels is high wherever the level lasts."
)
_TITLES = {
    "none": "no norm", "rms": "RMS norm", "switch": "switchable norm", "revin": "RevIN",
    "naive": "the last value", "seasonal naive": "the last season",
}  # fmt: skip
_FIELDS: Mapping[str, Callable[[Any], str]] = {
    "model": lambda model: model_title(model),
    "pooling": str,
    "bar": "bars of {}".format,
    "optimizer": str,
    "activation": str,
    "loss": lambda loss: f"{loss.replace('_', ' ')} loss",
    "dropout": "dropout {:g}".format,
    "base_lr": "learning rate {:g}".format,
}
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def norm_title(norm: str) -> str:
    """A norm's name as people say it.

    >>> norm_title("batch"), norm_title("group(8)"), norm_title("none")
    ('batch norm', 'group norm (8 groups)', 'no norm')
    """
    if norm.startswith("revin+"):
        return f"RevIN and {norm_title(parted(norm)[1])}"
    if "[" in norm:  # a pattern names itself
        return norm
    groups = re.fullmatch(r"(\w+)\((\d+)\)", norm)
    if groups:
        return f"{groups[1]} norm ({groups[2]} groups)"
    return _TITLES.get(norm, f"{norm} norm")


def _spoken_title(norm: str) -> str:
    return "the model without a norm" if norm == "none" else norm_title(norm)


def joined(words: Sequence[str]) -> str:
    """Words as a list in a sentence: "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def setting_title(setting: Setting, varying: Sequence[str], *, batch_size: bool = True) -> str:
    """A setting by what varies in the study: "batch size 32, adam, learning rate 0.1"."""
    words = [f"batch size {setting.batch_size}"] if batch_size else []
    words += [_FIELDS[name](getattr(setting, name)) for name in _FIELDS if name in varying]
    return ", ".join(words)


def model_title(model: str) -> str:
    """A model as the study names it: what its specs call it, without the fingerprint."""
    return model.partition("@")[0]


def sentence(score: Score, cells: Sequence[Cell], num_missing: int = 0) -> str:
    """The best norm at either end of the batch sizes, its setting against the other ones, and how far that goes."""
    spoken = _spoken(cells)
    missing = f"{num_missing} trials have not run yet." if num_missing else ""
    if not spoken:
        return f"No trial has finished, so there is nothing to compare. {missing}".strip()
    varying = varying_fields(cell.setting for cell in cells)
    words = [_of_cell(score, cell, setting_title(cell.setting, varying) + _rank(cell, cells)) for cell in spoken]
    return " ".join([*words, *_of_choices(score, spoken[0], cells), _reach(spoken, num_missing)])


def _spoken(cells: Sequence[Cell]) -> list[Cell]:
    """The cell with the lowest mean at the largest and at the smallest batch size, of those with a score."""
    scored = [cell for cell in cells if cell.best]
    sizes = {cell.setting.batch_size for cell in scored}
    ends = sorted({max(sizes), min(sizes)}, reverse=True) if sizes else []
    # by the best norm, then by the next ones: a forecast that learns nothing is the same in every setting
    by_mean = sorted(scored, key=lambda cell: [row.score.mean for row in cell.rows if row.score.num])
    return [next(cell for cell in by_mean if cell.setting.batch_size == size) for size in ends]


def _rank(cell: Cell, cells: Sequence[Cell]) -> str:
    """Among how many settings of its batch size a cell has the lowest mean; empty where it is the only one."""
    num = sum(other.setting.batch_size == cell.setting.batch_size and other.best is not None for other in cells)
    return f" (the lowest of {num} settings)" if num > 1 else ""


def _of_choices(score: Score, cell: Cell, cells: Sequence[Cell]) -> list[str]:
    """A sentence on the best norm in its setting against itself with other choices, where these are tested."""
    best = cell.rows[0]
    fixed = (best.norm, best.setting.batch_size, best.setting.base_lr)  # rates are chosen by tuning, not by the test
    others = [
        row for other in cells if other is not cell for row in other.rows
        if row.score.num and (row.norm, row.setting.batch_size, row.setting.base_lr) == fixed
    ]  # fmt: skip
    differences = [paired(score, row, best) for row in others]
    tested = [(p, difference.mean) for p, difference in zip(corrected(differences), differences, strict=True) if p == p]
    if not tested or best.norm in BASELINES:
        return []
    shown = sum(p < SIGNIFICANCE and mean > 0 for p, mean in tested)
    which = f"{shown or 'any'} of the {len(tested)} other settings" if len(tested) > 1 else "the other setting"
    verb = "is" if shown else "is not"
    return [
        f"With {norm_title(best.norm)} at batch size {best.setting.batch_size}, that setting {verb} shown to be below "
        f"{which}."
    ]


def _of_cell(score: Score, cell: Cell, title: str) -> str:
    best = cell.rows[0]
    value = _value(score, best.score)
    tied = [row for row in cell.rows[1:] if row.place != "unfinished" and row.score.mean == best.score.mean]
    names = joined([_spoken_title(row.norm) for row in (best, *tied)])
    if len(cell.rows) == 1:
        return f"At {title}, {names} has a mean {score.title} of {value}."
    if sum(bool(row.score.num) for row in cell.rows) == 1:
        return f"At {title} only {names} finished, with a {score.title} of {value}."
    verb = "have" if tied else "has"
    return f"At {title}, {names} {verb} the lowest mean {score.title} ({value}){_against(score, cell)}."


def _value(score: Score, value: Estimate) -> str:
    """With its unit: "2.7%", "54.1 in units of price"."""
    return score.text(value) + ("" if score.is_rate else f" in {score.unit}")


def _against(score: Score, cell: Cell) -> str:
    """What is and is not shown about the other norms, as the end of a sentence."""
    worse = [row for row in cell.rows if row.place == "worse"]
    undecided = [row for row in cell.rows if row.place in ("open", "untested", "survivor")]
    tested = any(row.place in ("open", "worse", "survivor") for row in cell.rows)
    if not tested:
        return ""
    if not undecided:
        return f", shown to be below {_names(worse, 'every other norm', score)}"
    if not worse:
        return f"; no difference is shown to {_names(undecided, 'any other norm')}"
    lower = f", shown to be below {_names(worse, score=score)}"
    return f"{lower}; no difference is shown to {_names(undecided)}"


def _names(rows: Sequence[Row], many: str = "", score: Score | None = None) -> str:
    """The rows' norms, with their scores if `score` is given; more than three go by `many` if that is given."""
    if many and len(rows) > 3:
        return many
    values = [f" ({score.text(row.score)})" if score else "" for row in rows]
    return joined([_spoken_title(row.norm) + value for row, value in zip(rows, values, strict=True)])


def _reach(spoken: Sequence[Cell], num_missing: int) -> str:
    """How far the evidence goes: how many seeds, one data set, and what has not run."""
    num = min(cell.rows[0].score.num for cell in spoken)
    seeds = f"{_NUMBERS[num] if num < len(_NUMBERS) else num} seed{'s' if num > 1 else ''}"
    if num < LEAST_PAIRS:
        words = f"With {seeds} no difference can be shown; it takes at least {_NUMBERS[LEAST_PAIRS]}"
    else:
        words = f"{seeds.capitalize()} on one split of one data set: other data may order the norms differently"
    return words + (f"; {num_missing} trials have not run yet." if num_missing else ".")


def notes(record: StudyRecord, score: Score, cells: Sequence[Cell], num_missing: int = 0) -> tuple[str, ...]:
    """What a reader must know to read the numbers rightly."""
    found = [
        _note_of_part(score),
        _note_of_constant(record, score),
        _note_of_survivors(cells),
        f"{num_missing} of {len(record.keys)} trials have not run yet." if num_missing else "",
        _note_of_rates(record, cells),
        _MASE if score.key == "mase" else "",
    ]
    return tuple(note for note in found if note)


def _note_of_part(score: Score) -> str:
    if score.part == "test":
        return ""
    return "There is no test part: the scores are of the validation part."


def _note_of_rates(record: StudyRecord, cells: Sequence[Cell]) -> str:
    if record.settings.get("tune_lr"):
        return _TUNED
    rows = [row for cell in cells for row in cell.rows]
    if any(row.score.num for row in rows):
        return _SHARED
    diverged = any(row.counts.get("diverged") for row in rows)
    return "Every trial diverged or failed: write a lower --lr, or let --tune-lr find one." if diverged else ""


def _note_of_constant(record: StudyRecord, score: Score) -> str:
    """What the least of models scores, so that one sees whether anything was learnt."""
    value = record.data.get("constant", {}).get("test" if score.part == "test" else "valid")
    if value is None:  # of a forecast, which has its naive ones
        return ""
    what, shown = "most frequent class" if score.is_rate else "mean", _value(score, estimate([value]))
    return f"Always predicting the {what} of the training part gives a {score.title} of {shown}."


def _note_of_survivors(cells: Sequence[Cell]) -> str:
    survivors = {row.norm for cell in cells for row in cell.rows if 0 < row.score.num < row.num_trials}
    if not survivors:
        return ""
    names = joined([_spoken_title(norm) for norm in sorted(survivors)])
    return (
        f"Not every seed of {names} finished; the mean is of those that did, and is likely too good. "
        "Such a row is never called the best while another one finished more seeds."
    )
