"""Tables: a CSV, TSV or Parquet file read and checked, and its columns turned into numbers."""

from __future__ import annotations

import codecs
import csv
import difflib
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from pandas.api import types
from sklearn.compose import ColumnTransformer
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from renorm.comparison.arrays import MAX_VALUE
from renorm.errors import DataError

__all__ = [
    "MAX_FEATURES", "MAX_LEVELS", "SUFFIXES", "Table", "encode", "has_decimal_commas", "notation", "read", "read_frame",
]  # fmt: skip

SUFFIXES = (".csv", ".tsv", ".parquet")
MAX_LEVELS = 50  # a text column with more different values is not a category
MAX_FEATURES = 50_000  # more columns than this is a file lying on its side

_THOUSANDS = r"[+-]?\d{1,3}(,\d{3})+(\.\d*)?"
_ID_NAME = re.compile(r"(?i:(.*[_\s-])?(id|uuid|guid|index|rownames)|unnamed: \d+)|.*[a-z]I[dD]")


@dataclass(frozen=True, eq=False)
class Table:
    """A table that has passed the checks: no missing value, every feature a number or a category."""

    path: Path  # where it was read from
    columns: pd.DataFrame  # the features: numeric columns as float64, categories as text
    target: pd.Series[Any]  # the target as it was read
    notes: tuple[str, ...]  # what was seen and decided, in sentences

    def place(self, row: int) -> str:
        """Where the row with this 0-based index stands in the file, in words."""
        return _place(self.path, row)


def read(path: Path, target: str | None) -> Table:
    """A table from a file; `target` is the name of the column to predict.

    The first line of a text file names the columns. Values may not be missing or infinite. A text column
    may have up to :data:`MAX_LEVELS` different values. A column that is an id by its name and its values is
    left out, with a note.

    Raises:
        DataError: the file cannot be read or a rule above is broken; the message names column, row and value.
    """
    frame = read_frame(path)
    if not len(frame):
        raise DataError(f"{path}: a table needs rows; this one has column names and nothing below them")
    if frame.shape[1] > MAX_FEATURES:
        raise DataError(
            f"{path}: a table may have at most {MAX_FEATURES} columns; this one has {frame.shape[1]} columns "
            f"and {len(frame)} rows; if it lies on its side, write it transposed"
        )
    name = _target_name(path, frame, target)
    _refuse_missing(path, frame)
    labels, features, notes = frame[name], frame.drop(columns=name), []
    for column in features.columns:
        reason = _why_id(str(column), features[column])
        if reason:
            features = features.drop(columns=column)
            notes.append(f"column {column!r} is left out: {reason}")
    if not features.shape[1]:
        raise DataError(f"{path}: a table needs a feature beside the target {name!r}; this one has none left")
    columns = {str(column): _tidy(path, str(column), features[column]) for column in features.columns}
    features = pd.DataFrame(columns)
    return Table(path, features, labels, (*notes, *_remarks(features, labels)))


def encode(columns: pd.DataFrame, train: npt.NDArray[np.intp]) -> tuple[npt.NDArray[np.float32], tuple[str, ...]]:
    """The columns as numbers, and notes: all statistics and levels come from the rows `train`.

    A numeric column is standardized, `(x - mean) / std` (a constant one is only shifted). A text column
    becomes one column of 0 and 1 for each level; a level that the training rows lack is all zeros. A text
    column with one level is a constant one: zeros.
    """
    columns = columns.copy()
    for name in columns.columns:
        if not types.is_float_dtype(columns[name].dtype) and columns[name].iloc[train].nunique() == 1:
            columns[name] = 0.0
    numeric = [name for name in columns.columns if types.is_float_dtype(columns[name].dtype)]
    text = [name for name in columns.columns if name not in set(numeric)]
    encoder = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
    steps = ColumnTransformer([("numbers", StandardScaler(), numeric), ("levels", encoder, text)])
    steps.fit(columns.iloc[train])
    x = np.asarray(steps.transform(columns), np.float32)
    notes = [f"one-hot encoded: column {name!r} ({columns[name].nunique()} levels)" for name in text]
    spread = columns[numeric].iloc[train].nunique() if numeric else pd.Series(dtype=int)
    constant = [repr(name) for name in numeric if spread[name] == 1]
    if constant:
        notes.append(f"constant in the training part: column {', '.join(constant)}")
    return x, tuple(notes)


def has_decimal_commas(column: pd.Series[Any]) -> bool:
    """Whether a column is text, and numbers once each comma is a point."""
    text = _different(column)
    return bool(text.str.contains(",").any()) and _are_numbers(text.str.replace(",", "."))


def notation(path: Path, name: str, column: pd.Series[Any]) -> str:
    """How the numbers in a column of text are written, and how to read them; empty where it is no such column."""
    text, fix = _different(column), f"frame[{name!r}]"
    if not len(text):
        return ""
    thousands = text.str.fullmatch(_THOUSANDS)
    grouped = bool(thousands.any()) and _are_numbers(text.where(~thousands, text.str.replace(",", "")))
    if has_decimal_commas(column):
        what, fix = "a decimal comma", f'{fix}.str.replace(",", ".").astype(float)'
        if path.suffix.lower() in (".csv", ".tsv"):
            fix = f'pandas.read_csv(path, sep={_header(path)[1]!r}, decimal=",").to_csv("new.csv", index=False)'
            # 1,250 may be either
            fix += ', or thousands="," in place of decimal="," if they part thousands' if grouped else ""
    elif grouped:
        what, fix = "commas between thousands", f'{fix}.str.replace(",", "").astype(float)'
    elif text.str.endswith("%").any() and _are_numbers(text.str.rstrip("% ").str.replace(",", ".")):
        what, fix = "a percent sign", f'{fix}.str.rstrip("% ").str.replace(",", ".").astype(float)'
    else:
        return ""
    return f"; the column looks like numbers with {what}: write them plainly, for example with {fix}"


def _different(column: pd.Series[Any]) -> pd.Series[Any]:
    """The different values of a column of text, without blanks at their ends; none of another column."""
    known = column.dropna()
    return pd.Series(known.unique() if types.is_string_dtype(known) else [], dtype=object).astype(str).str.strip()


def _are_numbers(text: pd.Series[Any]) -> bool:
    return bool(np.isfinite(pd.to_numeric(text, errors="coerce").to_numpy(dtype=np.float64)).all())


def read_frame(path: Path) -> pd.DataFrame:
    """A file as it is, its first line the names of the columns.

    Raises:
        DataError: it is no such file, has no names or has a name twice.
    """
    try:
        if path.suffix.lower() == ".parquet":
            return pd.read_parquet(path)
        separator = _check_header(path)
        with warnings.catch_warnings():
            # pandas only warns when rows are longer than the header, and then drops the rest of each row
            warnings.simplefilter("error", pd.errors.ParserWarning)
            return pd.read_csv(path, sep=separator, encoding="utf-8-sig", index_col=False, low_memory=False)
    except (DataError, FileNotFoundError):
        raise
    # pyarrow's errors are ValueErrors and OSErrors; a broken file can raise most of these
    except (pd.errors.ParserWarning, ValueError, OSError, csv.Error) as error:
        reason = " ".join(str(error).split())
        kind = path.suffix.lower().lstrip(".")
        if isinstance(error, UnicodeDecodeError):
            wide = error.object[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
            reason += f"; the file must be in UTF-8: iconv -f {'utf-16' if wide else 'latin1'} -t utf-8 IN > OUT"
        raise DataError(f"{path}: cannot be read as {kind} (in UTF-8, one line a row): {reason}") from error


def _header(path: Path) -> tuple[str, str]:
    """The first line of a text table that is not blank, and the separator it uses."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        first = next((line for line in file if line.strip()), "")
    if path.suffix.lower() == ".tsv":
        return first, "\t"
    # by cells, not by characters: a quoted name may hold commas. Of equals the comma counts.
    return first, max(",;\t", key=lambda separator: len(_names(first, separator)))


def _names(first: str, separator: str) -> list[str]:
    return [name.strip() for name in next(csv.reader([first], delimiter=separator), [])]


def _check_header(path: Path) -> str:
    """The separator of a text table, once its first line is known to name the columns."""
    first, separator = _header(path)
    if not first:
        raise DataError(f"{path}: a table needs a line of column names and rows below it; the file is empty")
    names = _names(first, separator)
    # numbers that count up are names: a frame without names was written
    counted = names == [str(index) for index in range(len(names))]
    if all(_is_number(name) for name in names) and not counted:
        raise DataError(
            f"{path}: the first line must name the columns; it holds the numbers {first.strip()[:60]!r}; "
            "write a line of names above it"
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(
            f"{path}: column names must differ; {twice[0]!r} comes {names.count(twice[0])} times; rename or drop it"
        )
    return separator


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _target_name(path: Path, frame: pd.DataFrame, target: str | None) -> str:
    frame.columns = pd.Index([str(name) for name in frame.columns])
    names = [str(name) for name in frame.columns]
    listed = ", ".join(repr(name) for name in names[:20]) + (", ..." if len(names) > 20 else "")
    if target is None:
        raise DataError(
            f"{path}: say which column to predict; the columns are {listed}; "
            f"for the last one, write --target {_quoted(names[-1])}"
        )
    if target in names:
        return target
    close = difflib.get_close_matches(target, names, n=1, cutoff=0.5)
    close = close or [name for name in names if name.strip().lower() == target.strip().lower()]
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise DataError(f"{path}: there is no column {target!r}{hint or '.'} The columns are {listed}")


def _quoted(name: str) -> str:
    return f'"{name}"' if re.search(r"[^\w.-]", name) else name


def _refuse_missing(path: Path, frame: pd.DataFrame) -> None:
    for name in frame.columns:
        column = frame[name]
        missing = column.isna().to_numpy(dtype=bool)
        if missing.any():
            row = int(missing.argmax())
            raise DataError(
                f"{path}: values must not be missing (empty, NA or NaN); column {name!r} lacks "
                f"{int(missing.sum())} of {len(column)}, the first in {_place(path, row)}; fill them or drop "
                "those rows first, for example with pandas: frame.dropna()"
            )
        if types.is_float_dtype(column.dtype):
            wild = ~(np.abs(column.to_numpy(dtype=np.float64)) < MAX_VALUE)
            if wild.any():
                row = int(wild.argmax())
                raise DataError(
                    f"{path}: numbers must be finite and below {MAX_VALUE:g}; column {name!r} has "
                    f"{column.iloc[row]} in {_place(path, row)} ({int(wild.sum())} such values)"
                )


def _why_id(name: str, column: pd.Series[Any]) -> str:
    """Why the column is an id and not a feature; empty when it is not."""
    named = _ID_NAME.fullmatch(name) and not types.is_float_dtype(column.dtype)
    if not named or column.nunique() <= len(column) / 2:
        return ""
    copies = int(column.duplicated().sum())
    if not copies:
        return "by its name an id, and no value comes twice"
    return (
        f"by its name an id; {copies} rows repeat one, and rows of one id may fall into different parts, "
        "which flatters the scores"
    )


def _tidy(path: Path, name: str, column: pd.Series[Any]) -> pd.Series[Any]:
    """The column as float64, or as text with few levels."""
    kind = column.dtype
    if types.is_bool_dtype(kind) or (types.is_numeric_dtype(kind) and not types.is_complex_dtype(kind)):
        return column.astype(np.float64)
    if isinstance(kind, pd.CategoricalDtype):
        return column.astype(str).astype(object)
    if not (types.is_string_dtype(kind) and all(isinstance(value, str) for value in column)):
        raise DataError(
            f"{path}: column {name!r} must hold numbers, true and false, or text; it holds {kind} "
            f"({column.iloc[0]!r} in {_place(path, 0)}); turn it into numbers or drop it"
        )
    return _text(path, name, column)


def _text(path: Path, name: str, column: pd.Series[Any]) -> pd.Series[Any]:
    numbers = pd.to_numeric(column, errors="coerce").astype(np.float64)
    if numbers.notna().all():
        return numbers
    row = int(numbers.isna().to_numpy().argmax())
    cell = f"{str(column.iloc[row])[:60]!r} in {_place(path, row)}"
    hint = notation(path, name, column)
    if has_decimal_commas(column):
        raise DataError(
            f"{path}: numbers must have a decimal point; column {name!r} has {cell}{hint}; if they are no numbers, "
            "put another sign in place of the comma"
        )
    if numbers.notna().mean() > 0.5:
        raise DataError(
            f"{path}: column {name!r} must hold numbers, as {int(numbers.notna().sum())} of its {len(column)} "
            f"values are; it has {cell}{hint or '; correct or drop such rows'}"
        )
    levels = column.nunique()
    if levels > MAX_LEVELS or (levels > 10 and levels > len(column) / 2):
        raise DataError(
            f"{path}: a text column is taken as a category, with at most {MAX_LEVELS} different values that "
            f"repeat; column {name!r} has {levels} in {len(column)} rows, the first {cell}"
            f"{hint or '; turn it into numbers or drop the column'}"
        )
    return column.astype(object)


def _remarks(features: pd.DataFrame, target: pd.Series[Any]) -> list[str]:
    """Notes on what is suspicious but allowed."""
    notes = []
    for name in features.columns:
        values = features[name]
        if len(values) > 2 and types.is_float_dtype(values.dtype) and bool((values.diff().iloc[1:] == 1).all()):
            notes.append(f"column {name!r} counts the rows one by one: if it is an id, drop it")
    for values in (*(features[name] for name in features.columns), target):
        text = _different(values)
        if text.nunique() < len(text):
            notes.append(
                f"column {values.name!r} has {len(text)} different values, {text.nunique()} without blanks at their "
                f"ends: if they are the same, write frame[{values.name!r}].str.strip()"
            )
    copies = int(pd.concat([features, target], axis=1).duplicated().sum())
    if copies:
        notes.append(f"{copies} of {len(target)} rows repeat another one: copies may fall into different parts")
    return notes


def _place(path: Path, row: int) -> str:
    """ "row 3 (line 4 of the file)": rows are counted from 1, without the header."""
    if path.suffix.lower() == ".parquet":
        return f"row {row + 1}"
    separator = _header(path)[1]
    with path.open(encoding="utf-8-sig", newline="") as file:
        # csv.reader, because a quoted cell may hold line breaks; blank lines are no rows
        reader = csv.reader(file, delimiter=separator)
        for index, _ in enumerate(cells for cells in reader if cells):
            if index == row + 1:
                return f"row {row + 1} (line {reader.line_num} of the file)"
    return f"row {row + 1}"
