"""Time series: a long table read, checked and put on a regular grid, series by series."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
from pandas.api import types

from renorm.comparison import table
from renorm.comparison.arrays import MAX_VALUE
from renorm.errors import DataError

__all__ = ["EXTRACTS", "Layout", "Series", "read"]

Array = npt.NDArray[np.float64]
Steps = npt.NDArray[np.int64]

Gaps = Literal["cut", "join"]
Missing = Literal["drop", "last"]

MAX_ROWS = 50_000_000  # of the regular grid, all series together
_TIME_NAMES = ("time", "date", "datetime", "timestamp")
_DAY = 86_400_000_000_000  # ns
_MONTH = 2_419_200_000_000_000  # ns in 28 days
# Steps of a season by the step's length in ns.
_SEASONS = {
    _DAY // 1440: 1440, _DAY // 288: 288, _DAY // 144: 144, _DAY // 96: 96, _DAY // 48: 48, _DAY // 24: 24,
    _DAY: 7, 7 * _DAY: 52,
}  # fmt: skip
_MONTHLY_SEASONS = {1: 12, 3: 4}


@dataclass(frozen=True)
class Layout:
    """Which column of a long table is what, and what is made of its holes."""

    time: str | None = None  # the column of times; None: the one called time, date, datetime or timestamp
    series: str | None = None  # the column that says which series a row is of; None: all rows are one series
    target: str | None = None  # the column to forecast
    columns: tuple[str, ...] = ()  # what the model sees of the past; the target is among them; empty: every number
    static: tuple[str, ...] = ()  # columns that are constant in each series
    gaps: Gaps | None = None  # rows that are not there: "cut": missing values; "join": time that does not count
    missing: Missing | None = None  # "drop" windows with missing values; "last": carry the last value forward


@dataclass(frozen=True, eq=False)
class Series:
    """A checked table: every series on its grid, in order of time."""

    name: str  # a short name, such as the file's
    source: str  # what the user wrote
    names: tuple[str, ...]  # of the series, sorted
    columns: tuple[str, ...]  # what is seen of the past
    target: str  # the one of `columns` that is forecast
    values: tuple[Array, ...]  # (columns, steps) for each series; missing values are nan
    times: tuple[Steps, ...]  # (steps,) for each series: the time of each step as a number all series share
    static: Array  # (series, K): what is constant in each series
    static_names: tuple[str, ...]
    missing: Missing
    season: int  # steps of a season, by the length of a step; 1 where it is not known
    notes: tuple[str, ...]


def read(source: str | pd.DataFrame, layout: Layout) -> Series:
    """Time series from a built-in name, a long table in a .csv, .tsv or .parquet file, or a DataFrame.

    A row holds the values of one series at one time; rows may come in any order. Times are numbers or ISO dates
    (2024-05-31, 2024-05-31 13:00); months, quarters and years of the calendar count as equal steps. The step is the
    most frequent difference of neighbouring times. With gaps "cut" all times of a series must be whole steps apart, and
    what is not there is missing; with "join" rows follow each other whatever the time between them, as bars of a market
    do that closes. Any value may be missing.

    Raises:
        DataError: a column is not there, a time comes twice in a series, times are irregular, a static column changes,
            or values are no finite numbers; the message says where.
    """
    if isinstance(source, pd.DataFrame):
        return _from_frame(source.copy(), "python", "python", layout)
    if source in EXTRACTS:
        frame, usual = EXTRACTS[source]()
        named = {key: value for key, value in vars(layout).items() if value}
        return _from_frame(frame, source, source, replace(usual, **named))
    path = Path(source).expanduser()
    if not path.exists() and path.suffix.lower() in table.SUFFIXES:
        near = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, near, 1)
        hint = f"did you mean {close[0]!r}?" if close else "write the path of one"
        raise DataError(f"a table must be a file; there is no file {source!r}; {hint}")
    if not path.is_file() or path.suffix.lower() not in table.SUFFIXES:
        close = difflib.get_close_matches(source, EXTRACTS, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise DataError(
            f"a forecast is made from {', '.join(EXTRACTS)}, or a long table in a {', '.join(table.SUFFIXES)} file; "
            f"got {source!r}{hint}"
        )
    return _from_frame(table.read_frame(path), path.stem, source, layout)


def _from_frame(frame: pd.DataFrame, name: str, source: str, layout: Layout) -> Series:
    frame.columns = pd.Index([str(column) for column in frame.columns])
    if not len(frame):
        raise DataError(f"{source}: a table of time series needs rows; it has none")
    if frame.columns.has_duplicates:
        twice = frame.columns[frame.columns.duplicated()][0]
        raise DataError(f"{source}: column names must differ; {twice!r} comes more than once; rename or drop it")
    time = _time_column(frame, layout, source)
    for column in (layout.series, layout.target, *layout.columns, *layout.static):
        if column is not None:
            _refuse_unknown(frame, column, source)
    columns, target = _value_columns(frame, time, layout, source)
    ids = _ids(frame, layout.series, name, source)
    stamps, calendar = _stamps(frame[time], time, source)
    order = np.lexsort((stamps, ids))
    names = tuple(dict.fromkeys(ids[order].tolist()))
    values = np.stack([_numbers(frame[column], column, source)[order] for column in columns])
    starts: list[int] = np.flatnonzero(np.r_[True, ids[order][1:] != ids[order][:-1]]).tolist()
    bounds = list(zip(starts, [*starts[1:], len(order)], strict=True))
    sorted_stamps, shown = stamps[order], frame[time].to_numpy()[order]
    for (begin, end), series in zip(bounds, names, strict=True):
        _refuse_twice(sorted_stamps[begin:end], shown[begin:end], series, source)
    gaps = layout.gaps or "cut"
    step = _step(sorted_stamps, bounds, source)
    if gaps == "cut":
        _refuse_sparse(sorted_stamps, bounds, step, _in_words(step, calendar), source)
    grids: list[tuple[Steps, Array]] = []
    for (begin, end), series in zip(bounds, names, strict=True):
        one = sorted_stamps[begin:end], values[:, begin:end]
        grids.append(one if gaps == "join" else _regular(*one, step, shown[begin:end], series, source))
    static, static_names = _static(frame, layout.static, ids, names, source)
    missing = layout.missing or "drop"
    return Series(
        name=name,
        source=source,
        names=names,
        columns=columns,
        target=target,
        values=tuple(found for _, found in grids),
        times=tuple(times for times, _ in grids),
        static=static,
        static_names=static_names,
        missing=missing,
        season=_season(step, calendar, gaps, grids),
        notes=tuple(_notes(names, frame, layout, step, calendar, gaps, missing, grids)),
    )


# Columns


def _refuse_unknown(frame: pd.DataFrame, column: str, source: str) -> None:
    names = list(frame.columns)
    if column not in names:
        close = difflib.get_close_matches(column, names, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise DataError(f"{source}: there is no column {column!r}{hint or '.'} The columns are {_listed(names)}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names[:20]) + (", ..." if len(names) > 20 else "")


def _time_column(frame: pd.DataFrame, layout: Layout, source: str) -> str:
    if layout.time is not None:
        _refuse_unknown(frame, layout.time, source)
        return layout.time
    found = [name for name in frame.columns if name.strip().lower() in _TIME_NAMES]
    if len(found) != 1:
        raise DataError(
            f"{source}: say which column holds the time, with --time; the columns are {_listed(list(frame.columns))}"
        )
    return str(found[0])


def _value_columns(frame: pd.DataFrame, time: str, layout: Layout, source: str) -> tuple[tuple[str, ...], str]:
    """What is seen of the past, the target first, and the target."""
    others = {time, layout.series, *layout.static}
    numeric = [
        name for name in frame.columns
        if name not in others and (types.is_numeric_dtype(frame[name].dtype) or table.has_decimal_commas(frame[name]))
    ]  # fmt: skip
    columns = list(layout.columns) or numeric
    target = layout.target
    if target is None:
        if len(columns) != 1:
            raise DataError(f"{source}: say which column to forecast, with --target; there are {_listed(columns)}")
        target = columns[0]
    if doubled := [name for name in (target, *layout.columns) if name in others]:
        raise DataError(
            f"{source}: column {doubled[0]!r} is both a value and the time, the series or static; name it once"
        )
    return (target, *[name for name in dict.fromkeys(columns) if name != target]), target


def _ids(frame: pd.DataFrame, column: str | None, name: str, source: str) -> npt.NDArray[np.str_]:
    if column is None:
        return np.full(len(frame), name)
    if frame[column].isna().any():
        row = int(frame[column].isna().to_numpy().argmax())
        raise DataError(f"{source}: every row must name its series; column {column!r} is empty in row {row + 1}")
    return frame[column].astype(str).to_numpy(dtype=np.str_)


def _numbers(column: pd.Series[Any], name: str, source: str) -> Array:
    """The column as float64 with nan where it is empty."""
    numbers: Array = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64)
    wrong = (np.isnan(numbers) & ~column.isna().to_numpy(dtype=bool)) | (np.abs(numbers) >= MAX_VALUE)
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(
            f"{source}: column {name!r} must hold finite numbers below {MAX_VALUE:g}, or nothing where one is missing; "
            f"it has {str(column.iloc[row])[:60]!r} in row {row + 1} and {int(wrong.sum()) - 1} more such values"
            + table.notation(Path(source).expanduser(), name, column)
        )
    return numbers


def _static(
    frame: pd.DataFrame, columns: Sequence[str], ids: npt.NDArray[np.str_], names: Sequence[str], source: str
) -> tuple[Array, tuple[str, ...]]:
    """(series, K): numbers as they are, text as one column of 0 and 1 for each level."""
    found: dict[str, Array] = {}
    for column in columns:
        grouped = frame[column].groupby(ids)
        changing = grouped.nunique(dropna=False)
        if (changing > 1).any():
            series = changing.index[changing > 1][0]
            raise DataError(
                f"{source}: a static column is constant in each series; {column!r} changes in series {series!r}: name "
                "it in --columns instead"
            )
        values = grouped.first().reindex(list(names))
        if values.isna().any():
            raise DataError(
                f"{source}: a static value may not be missing; {column!r} is, in {values.index[values.isna()][0]!r}"
            )
        if types.is_numeric_dtype(values.dtype):
            found[column] = values.to_numpy(dtype=np.float64)
        else:
            levels = sorted(set(values.astype(str)))
            if len(levels) > table.MAX_LEVELS:
                raise DataError(
                    f"{source}: static text has at most {table.MAX_LEVELS} different values; {column!r} has "
                    f"{len(levels)}: leave it out"
                )
            texts = values.astype(str).to_numpy()
            found |= {f"{column}={level}": (texts == level).astype(np.float64) for level in levels}
    stacked = np.stack(list(found.values()), 1) if found else np.zeros((len(names), 0))
    return stacked, tuple(found)


# Times


def _stamps(column: pd.Series[Any], name: str, source: str) -> tuple[Steps, str]:
    """Each time as a whole number, and what one of them is: "ns", "months" or "number"."""
    if column.isna().any():
        row = int(column.isna().to_numpy().argmax())
        raise DataError(f"{source}: every row must have a time; column {name!r} is empty in row {row + 1}")
    if types.is_integer_dtype(column.dtype):
        return column.to_numpy(dtype=np.int64), "number"
    if types.is_numeric_dtype(column.dtype) and not types.is_bool_dtype(column.dtype):
        numbers = column.to_numpy(dtype=np.float64)
        wrong = (numbers % 1 != 0) | (np.abs(numbers) >= 2**53)  # from there on floats skip whole numbers
        if wrong.any():
            row = int(wrong.argmax())
            raise DataError(
                f"{source}: times that are numbers must be whole and below 2^53, such as steps or seconds; column "
                f"{name!r} has {numbers[row]} in row {row + 1}"
            )
        return numbers.astype(np.int64), "number"
    words = column if types.is_datetime64_any_dtype(column.dtype) else column.astype(str)
    try:
        dates = pd.to_datetime(words, format="ISO8601", utc=True)
    except ValueError:
        bad = pd.to_datetime(words, format="ISO8601", utc=True, errors="coerce").isna().to_numpy()
        row = int(bad.argmax())
        raise DataError(
            f"{source}: times must be whole numbers or ISO dates, such as 2024-05-31 or 2024-05-31 13:00; column "
            f"{name!r} has {str(column.iloc[row])[:40]!r} in row {row + 1}"
        ) from None
    ordered = dates.drop_duplicates().sort_values()
    at_ends = (dates.dt.normalize() == dates).all() and (dates.dt.is_month_end.all() or dates.dt.is_month_start.all())
    if at_ends and len(ordered) > 1 and int(ordered.diff().min().value) >= _MONTH:
        months: Steps = np.asarray(dates.dt.year * 12 + dates.dt.month, np.int64)
        return months, "months"
    return dates.to_numpy(dtype="datetime64[ns]").astype(np.int64), "ns"


def _refuse_twice(stamps: Steps, shown: npt.NDArray[Any], series: str, source: str) -> None:
    twice = stamps[1:] == stamps[:-1]
    if twice.any():
        raise DataError(
            f"{source}: a series has one row for each time; {series!r} has {_time(shown[int(twice.argmax())])} twice"
            + (f", and {int(twice.sum()) - 1} more such rows" if twice.sum() > 1 else "")
            + "; drop them, or name the column that tells series apart with --series"
        )


def _time(value: object) -> str:
    return str(value).removesuffix("T00:00:00.000000000").removesuffix(".000000000")


def _step(stamps: Steps, bounds: Sequence[tuple[int, int]], source: str) -> int:
    """The most frequent difference of neighbouring times in a series, the smallest of equally frequent ones."""
    apart = np.concatenate([np.diff(stamps[begin:end]) for begin, end in bounds])
    if not len(apart):
        raise DataError(f"{source}: a series needs rows at several times; each has one")
    found, counts = np.unique(apart, return_counts=True)
    return int(found[counts.argmax()])


def _refuse_sparse(stamps: Steps, bounds: Sequence[tuple[int, int]], step: int, words: str, source: str) -> None:
    rows = sum(int(stamps[end - 1] - stamps[begin]) // step + 1 for begin, end in bounds)
    if rows > MAX_ROWS:
        raise DataError(
            f"{source}: a regular grid may have {MAX_ROWS} rows; with a step of {words} it would have {rows}; write "
            "--gaps join if the time between the rows does not count"
        )


def _regular(
    stamps: Steps, values: Array, step: int, shown: npt.NDArray[Any], series: str, source: str
) -> tuple[Steps, Array]:
    """The series with a column for every step from its first to its last time."""
    at, off = np.divmod(stamps - stamps[0], step)
    if off.any():
        row = int(off.astype(bool).argmax())
        raise DataError(
            f"{source}: the times of a series must be whole steps apart; {series!r} has {_time(shown[row])}, which is "
            f"not a whole number of steps after {_time(shown[0])}, where a step is what most rows are apart; round the "
            "times, or write --gaps join to count rows instead of time"
        )
    length = int(at[-1]) + 1
    grid = np.full((len(values), length), np.nan)
    grid[:, at] = values
    return stamps[0] + step * np.arange(length), grid


def _season(step: int, calendar: str, gaps: Gaps, grids: Sequence[tuple[Steps, Array]]) -> int:
    if calendar == "months":
        return _MONTHLY_SEASONS.get(step, 1)
    if calendar == "number":
        return 1
    if gaps == "join" and step < _DAY:  # a day is as long as most days are
        days = np.concatenate([np.unique(times // _DAY, return_counts=True)[1] for times, _ in grids])
        return int(np.bincount(days).argmax())
    return _SEASONS.get(step, 1)


def _in_words(step: int, calendar: str) -> str:
    if calendar == "months":
        return f"{step} month{'s' if step > 1 else ''}"
    return str(step) if calendar == "number" else str(pd.Timedelta(step, "ns")).removeprefix("0 days ")


def _notes(
    names: Sequence[str], frame: pd.DataFrame, layout: Layout, step: int, calendar: str, gaps: Gaps, missing: Missing,
    grids: Sequence[tuple[Steps, Array]],
) -> Iterator[str]:  # fmt: skip
    yield f"{len(names)} series, {len(frame)} rows, a step of {_in_words(step, calendar)}"
    unused = sorted(
        name for name in frame.columns
        if types.is_string_dtype(frame[name].dtype)
        and name not in (layout.time, layout.series, *layout.static, *layout.columns)
        and name.strip().lower() not in _TIME_NAMES
    )  # fmt: skip
    if unused:
        yield f"text columns are left out: {', '.join(unused)}"
    if gaps == "join":
        yield "rows follow each other whatever the time between them"
    holes = sum(int(np.isnan(values).any(0).sum()) for _, values in grids)
    if holes:
        total = sum(values.shape[1] for _, values in grids)
        rule = {
            "drop": "windows that touch them are left out",
            "last": "the past has the last known value in their place, windows that would forecast them are left out",
        }[missing]
        yield f"{holes} of {total} steps lack a value: {rule}"


# What comes with the package


def _stored(name: str) -> dict[str, npt.NDArray[Any]]:
    with resources.files(__package__).joinpath("extracts", name).open("rb") as opened, np.load(opened) as file:
        return {key: file[key] for key in file.files}


def _parking() -> tuple[pd.DataFrame, Layout]:
    """Car parks on a grid of 18 half hours a day, 8:00 to 16:30: readings are rounded to it, the last one counts."""
    stored = _stored("parking.npz")
    slot = np.rint(stored["minute"] / 30).astype(np.int64)
    day, slot = np.divmod(slot, 48)
    occupied, capacity = (stored[name].astype(np.float64) for name in ("occ", "cap"))
    park = stored["names"][stored["id"]]
    frame = pd.DataFrame({"park": park, "day": day, "slot": slot - 16, "occupied": occupied, "capacity": capacity})
    frame = frame[frame["slot"].between(0, 17)].drop_duplicates(["park", "day", "slot"], keep="last")
    open_days = frame[["park", "day", "capacity"]].drop_duplicates()
    grid = open_days.merge(pd.DataFrame({"slot": np.arange(18)}), how="cross")
    frame = grid.merge(frame, on=["park", "day", "capacity", "slot"], how="left")
    minutes = frame["day"] * 1440 + (frame["slot"] + 16) * 30
    frame["time"] = pd.Timestamp("2016-10-04") + pd.to_timedelta(minutes, unit="min")
    usual = Layout("time", "park", "occupied", ("occupied",), ("capacity",), gaps="join", missing="last")
    return frame[["time", "park", "occupied", "capacity"]], usual


def _household() -> tuple[pd.DataFrame, Layout]:
    """One household's power by minutes, in watts: the whole house and three of its circuits, each a series."""
    power = _stored("household_180d.npz")["w"].astype(np.float64)
    power[power < 0] = np.nan
    power[1:] *= 60  # stored as watt-hours in each minute
    time = pd.date_range("2007-01-01", periods=power.shape[1], freq="min")
    names = ("house", "kitchen", "laundry", "water heater and air conditioning")
    frame = pd.DataFrame({"time": np.tile(time, 4), "channel": np.repeat(names, len(time)), "power": power.ravel()})
    return frame, Layout("time", "channel", "power", ("power",), missing="drop")


EXTRACTS: Mapping[str, Callable[[], tuple[pd.DataFrame, Layout]]] = {"parking": _parking, "household": _household}
