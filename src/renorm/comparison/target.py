"""What is predicted: a class or a number, recognised from the values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from renorm.errors import DataError, StudyError

__all__ = ["MAX_CLASSES", "Target", "Task", "recognise"]

Task = Literal["classification", "regression"]
Place = Callable[[int], str]
Values = npt.NDArray[Any]

MAX_CLASSES = 20  # whole numbers with more different values are quantities, unless the user says otherwise


@dataclass(frozen=True, eq=False)
class Target:
    """The values to predict, as the task needs them."""

    name: str  # what the values are called: the column's name, or a word such as "class"
    task: Task
    y: Values  # (N,): int64 indices into `classes`, or float64 numbers in the target's own units
    classes: tuple[str, ...]  # the labels in sorted order; empty in a regression
    note: str  # how the task was decided, in a sentence


def recognise(
    values: Values, name: str, task: str = "auto", *, where: str = "the data", place: Place | None = None
) -> Target:
    """The target in `values`, one for each sample.

    With task "auto", text and true/false are classes, and so are whole numbers that take at most
    :data:`MAX_CLASSES` different values, each three times on average; all else is a regression.

    Args:
        values: bool, integers, floats or text, of shape (N,).
        name: what the values are called in messages.
        task: "auto", "classification" or "regression".
        where: the file or object that the values come from, for messages.
        place: from the index of a sample to words for its place in there.

    Raises:
        StudyError: no task is called that.
        DataError: fewer than two different values, classes of one sample each, or text where a regression needs
            numbers.

    >>> recognise(np.array(["b", "a", "b"]), "kind").classes
    ('a', 'b')
    >>> recognise(np.array([1.5, 2.0, 7.25]), "length").task
    'regression'
    """
    if task not in ("auto", "classification", "regression"):
        raise StudyError(f"the task must be auto, classification or regression; got {task!r}")
    place = place or (lambda row: f"sample {row} (counted from 0)")
    values = _plain(values)
    distinct = np.unique(values)
    what, is_class = _kind(values, distinct)
    asked = task != "auto"
    note = f"{name!r} is {what}" + (f"; taken as a {task} because that was asked for" if asked else "")
    # checked for a recognised task only: a user who asks for classification has looked at the labels
    if task == "regression" or (not asked and values.dtype.kind in "UT"):
        _refuse_text(values, name, where, place, required=task == "regression")
    if len(distinct) < 2:
        raise DataError(
            f"{where}: a target needs at least two different values; {name!r} is {distinct[0]!s} in all "
            f"{len(values)} samples; choose another target"
        )
    if task == "classification" or (not asked and is_class):
        text = values.dtype.kind in "UT"
        # of text that was asked for, as folders of images, the drawing of parts names the class that is too small
        if len(distinct) == len(values) and not (asked and text):
            instead = "choose another target" if text else "write --task regression"
            raise DataError(
                f"{where}: classes must have several samples each; {name!r} has {len(distinct)} different values in "
                f"{len(values)} samples, which are no classes; {instead}"
            )
        y = np.searchsorted(distinct, values).astype(np.int64)
        note = note if asked else f"{note}: a classification (--task regression overrides)"
        return Target(name, "classification", y, tuple(map(_label, distinct.tolist())), note)
    note = note if asked else f"{note}: a regression (--task classification overrides)"
    return Target(name, "regression", values.astype(np.float64), (), note)


def _plain(values: Values) -> Values:
    """The values as bool, integers, floats or fixed-width text, which sort."""
    if values.dtype.kind not in "biuf":
        return np.array([str(value) for value in values.tolist()])
    return values


def _kind(values: Values, distinct: Values) -> tuple[str, bool]:
    """What the values are, in words, and whether that makes them classes."""
    count = len(distinct)
    if values.dtype.kind == "b":
        return "true or false", True
    if values.dtype.kind not in "iuf":
        return f"text with {count} different values", True
    if values.dtype.kind == "f" and not np.equal(np.mod(distinct, 1), 0).all():
        return "fractional numbers", False
    few = count <= min(MAX_CLASSES, max(2, len(values) // 3))
    return f"whole numbers with {count} different values", few


def _refuse_text(values: Values, name: str, where: str, place: Place, *, required: bool) -> None:
    """Raise at the first value that is no number, if all must be numbers or nearly all are."""
    if values.dtype.kind in "biuf":
        return
    numbers = pd.to_numeric(pd.Series(values), errors="coerce")
    wrong = numbers.isna().to_numpy(dtype=bool)
    if wrong.any() and (required or (wrong.mean() < 0.5 and numbers.nunique() > MAX_CLASSES)):
        row = int(wrong.argmax())
        hint = "" if required else "; if they are classes, write --task classification"
        raise DataError(
            f"{where}: the target {name!r} must hold numbers; it has {values[row]!s:.60} in {place(row)} and "
            f"{int(wrong.sum()) - 1} more such values; correct or drop those rows{hint}"
        )


def _label(value: object) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
