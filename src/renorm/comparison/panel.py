"""Time series divided for forecasts: three parts one after the other in time, scalers of the first, windows in each."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from renorm.comparison.atomic import writing
from renorm.comparison.series import Series
from renorm.errors import DataError, StudyError
from renorm.measures.scores import Scores, forecasting_scores

__all__ = ["RULES", "Panel", "Windows", "divide"]

Array = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]
Whole = npt.NDArray[np.int64]
Part = Literal["train", "valid", "test"]

PARTS: tuple[Part, ...] = ("train", "valid", "test")
HORIZON = 6  # steps, where none is asked for
MAX_TRAIN = 6_000  # training windows, where no stride is asked for
NUM_RESAMPLES = 200  # of the bootstrap of each series' scores
LISTED = 5  # names of series in a note

RULES: Mapping[str, str] = {"open": "first", "high": "max", "low": "min", "close": "last", "volume": "sum"}
# Scaled by the statistics of single steps a bar's sum is its mean.
_BAR = {
    "first": lambda steps: steps[..., 0],
    "last": lambda steps: steps[..., -1],
    "max": lambda steps: steps.max(-1),
    "min": lambda steps: steps.min(-1),
    "mean": lambda steps: steps.mean(-1),
    "sum": lambda steps: steps.mean(-1),
}
_ARRAYS = ("values", "lengths", "cuts", "static")


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows of each part, as models take them: the past of every channel, and the target's next steps."""

    names: tuple[str, ...]  # of the series
    input_shape: tuple[int, ...]  # (channels, bars); the target's channel is the first
    num_static: int  # how many of the last channels repeat a static feature
    horizon: int
    season: int
    block: int  # windows in a row that the bootstrap draws together
    means: Array  # (series,): of the target's training part
    stds: Array
    history: Mapping[str, Array]  # the target's training part of each series, in its units
    x_train: Floats  # (N, channels, bars)
    y_train: Floats  # (N, horizon), (target - mean) / std of its series
    x_valid: Floats
    y_valid: Floats
    x_test: Floats
    y_test: Floats
    of: Mapping[Part, Whole]  # (N,) for each part: the index of each window's series

    task: ClassVar[Literal["forecast"]] = "forecast"
    classes: ClassVar[tuple[str, ...]] = ()

    def only(self, series: int) -> Windows:
        """The windows of one series."""
        rows = {part: self.of[part] == series for part in PARTS}
        arrays = {f"{axis}_{part}": getattr(self, f"{axis}_{part}")[rows[part]] for part in PARTS for axis in "xy"}
        return replace(self, **arrays, of={part: self.of[part][rows[part]] for part in PARTS})

    def scores(self, part: Part, forecast: npt.NDArray[Any], *, intervals: bool = False) -> Scores | None:
        """The scores of scaled forecasts in each series' units; None where they are not finite or there are none."""
        of = self.of[part]
        if not len(of) or not np.isfinite(forecast).all():
            return None
        y, p = (self._in_units(values, of) for values in (getattr(self, f"y_{part}"), forecast))
        names = np.array(self.names)[of]
        block = min(self.block, int(np.unique(of, return_counts=True)[1].min()))
        return forecasting_scores(
            y, p, series=names, history=self.history, season=self.season,
            num_resamples=NUM_RESAMPLES if intervals else 0, block=block if intervals else 1,
        )  # fmt: skip

    def _in_units(self, values: npt.NDArray[Any], of: Whole) -> Array:
        return np.asarray(values, np.float64) * self.stds[of, None] + self.means[of, None]


@dataclass(frozen=True, eq=False)
class Panel:
    """Time series with everything that decides their windows; what a study keeps as its data."""

    name: str  # a short name, such as "parking"
    source: str  # what the user wrote to name the data
    names: tuple[str, ...]  # of the series
    columns: tuple[str, ...]  # what the model sees of the past, the target first
    rules: tuple[str, ...]  # what a bar of several steps has of each column
    static_names: tuple[str, ...]
    missing: str  # "drop" or "last", see series.Layout
    window: int  # steps of the past that a model sees
    horizon: int  # steps that it forecasts
    stride: int  # steps from a window to the next
    season: int  # steps
    notes: tuple[str, ...]
    values: Array  # (columns, steps of all series)
    lengths: Whole  # (series,)
    cuts: Whole  # (series, 2): the first step of the validation and of the test part
    static: Array  # (series, K)

    task: ClassVar[Literal["forecast"]] = "forecast"

    @property
    def target(self) -> str:
        """The column that is forecast."""
        return self.columns[0]

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of what training sees."""
        digest = hashlib.sha256()
        facts = {name: value for name, value in self._facts().items() if name not in ("name", "source", "notes")}
        digest.update(json.dumps(facts).encode())
        for name in _ARRAYS:
            array = np.ascontiguousarray(getattr(self, name))
            digest.update(f"{name}{array.dtype.str}{array.shape}".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()[:16]

    def num(self, part: Part) -> int:
        """How many windows a part has."""
        return sum(len(starts) for starts in self._starts[part])

    def describe(self) -> dict[str, Any]:
        """The data in plain JSON values, for the study's record and the report."""
        return {
            "name": self.name,
            "source": self.source,
            "task": self.task,
            "fingerprint": self.fingerprint,
            "num_train": self.num("train"),
            "num_valid": self.num("valid"),
            "num_test": self.num("test"),
            "series": len(self.names),
            "shape": [len(self.columns), self.window],
            "classes": [],
            "target": self.target,
            "columns": [f"{name} ({rule})" for name, rule in zip(self.columns, self.rules, strict=True)],
            "static": list(self.static_names),
            "window": self.window,
            "horizon": self.horizon,
            "stride": self.stride,
            "season": self.season,
            "notes": list(self.notes),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to an .npz file that appears at `path` whole or not at all; it holds no pickle."""
        facts = {**self._facts(), "fingerprint": self.fingerprint}
        with writing(Path(path)) as file:
            np.savez(file, facts=np.array(json.dumps(facts)), **{name: getattr(self, name) for name in _ARRAYS})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Panel:
        """The inverse of :meth:`save`.

        Raises:
            DataError: the file is damaged, or is no such file.
        """
        try:
            # opened here, since np.load leaves the file open when it is broken
            with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
                facts = json.loads(str(file["facts"]))
                arrays = {name: file[name] for name in _ARRAYS}
            expected = facts.pop("fingerprint")
            facts = {name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()}
            panel = cls(**facts, **arrays)
        except FileNotFoundError:
            raise
        except (ValueError, OSError, EOFError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise DataError(f"{path}: must be data that renorm has saved; it cannot be read: {error}") from error
        if panel.fingerprint != expected:
            raise DataError(f"{path}: the arrays are not those that were saved; remove the file to prepare it again")
        return panel

    def windows(self, bar: int = 1, *, static: bool = False) -> Windows:
        """All windows with the past in bars of `bar` steps; with `static` features as channels behind the columns.

        Statistics of a series are those of its training part: a column is scaled by the mean and standard deviation
        of its steps, a constant one is only shifted. The static features are those of the data, and the mean and the
        standard deviation of the target, scaled in the same way over the series.
        """
        past = [self._past(at) for at in range(len(self.names))]
        scales = [_scale(values[:, : self.cuts[at, 0]]) for at, values in enumerate(self._series)]
        x: dict[str, list[Floats]] = {part: [] for part in PARTS}
        y: dict[str, list[Floats]] = {part: [] for part in PARTS}
        features = self._features(scales) if static else np.zeros((len(self.names), 0))
        for at, (mean, std) in enumerate(scales):
            seen = (past[at] - mean[:, None]) / std[:, None]
            to_come = (self._series[at][0] - mean[0]) / std[0]
            for part in PARTS:
                starts = self._starts[part][at]
                bars = self._in_bars(seen, starts, bar)
                shape = (len(starts), features.shape[1], bars.shape[2])
                repeated = np.broadcast_to(features[at][None, :, None], shape)
                x[part].append(np.concatenate([bars, repeated], 1).astype(np.float32))
                y[part].append(to_come[starts[:, None] + np.arange(self.horizon)].astype(np.float32))
        arrays = {f"{axis}_{part}": np.concatenate(of[part]) for axis, of in (("x", x), ("y", y)) for part in PARTS}
        return Windows(
            names=self.names,
            input_shape=arrays["x_train"].shape[1:],
            num_static=features.shape[1],
            horizon=self.horizon,
            season=self.season,
            block=math.ceil(max(self.horizon, self.season) / self.stride),
            means=np.array([mean[0] for mean, _ in scales]),
            stds=np.array([std[0] for _, std in scales]),
            history={name: self._history(at) for at, name in enumerate(self.names)},
            of={part: np.repeat(np.arange(len(self.names)), list(map(len, self._starts[part]))) for part in PARTS},
            **arrays,
        )

    def repeated(self, part: Part, season: int) -> Array:
        """(N, horizon): each step's value a season before it, the newest one that is known; with 1 the last value."""
        found = []
        for at, starts in enumerate(self._starts[part]):
            ahead = np.arange(self.horizon)
            place = starts[:, None] + ahead - season * (1 + ahead // season)
            known = _carried(self._series[at][:1])[0]
            found.append(known[place])
        return np.concatenate(found)

    def _facts(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _ARRAYS}

    @cached_property
    def _series(self) -> list[Array]:
        return np.split(self.values, np.cumsum(self.lengths)[:-1], axis=1)

    def _past(self, at: int) -> Array:
        return _carried(self._series[at]) if self.missing == "last" else self._series[at]

    def _history(self, at: int) -> Array:
        return self._series[at][0, : self.cuts[at, 0]]

    @cached_property
    def _starts(self) -> dict[Part, list[Whole]]:
        """For each part and series the first step of each window's forecast."""
        found: dict[Part, list[Whole]] = {part: [] for part in PARTS}
        for at, values in enumerate(self._series):
            first, second = self.cuts[at].tolist()
            least = max(self.window, self.season)  # the seasonal naive forecast must have its value, too
            spans = {"train": (0, first), "valid": (first, second), "test": (second, values.shape[1])}
            holes = np.r_[0, np.cumsum(np.isnan(self._past(at)).any(0))]
            unknown = np.r_[0, np.cumsum(np.isnan(values[0]))]
            empty = np.isnan(values[0]).cumprod().sum()  # steps before the target's first value
            for part in PARTS:
                begin, end = spans[part]
                starts = np.arange(max(begin, least + int(empty)), end - self.horizon + 1, self.stride, dtype=np.int64)
                whole = holes[starts] == holes[starts - self.window]
                whole &= unknown[starts + self.horizon] == unknown[starts]
                found[part].append(starts[whole])
        return found

    def _in_bars(self, seen: Array, starts: Whole, bar: int) -> Array:
        """(N, columns, bars) of the steps before each start."""
        steps = seen[:, starts[:, None] - self.window + np.arange(self.window)].transpose(1, 0, 2)
        cut = steps.reshape(len(starts), len(self.columns), self.window // bar, bar)
        return np.stack([_BAR[rule](cut[:, at]) for at, rule in enumerate(self.rules)], 1)

    def _features(self, scales: Sequence[tuple[Array, Array]]) -> Array:
        own = np.array([[mean[0], std[0]] for mean, std in scales])
        raw = np.concatenate([self.static, own], 1)
        mean, std = _scale(raw.T)
        return (raw - mean) / std


def divide(
    series: Series,
    *,
    window: int | None = None,
    horizon: int | None = None,
    season: int | None = None,
    stride: int | None = None,
    bars: Sequence[int] = (1,),
    aggregate: Mapping[str, str] | None = None,
    valid: float = 0.2,
    test: float = 0.2,
) -> Panel:
    """Divide time series into parts and windows.

    The validation and the test part are the last shares of the time that all series cover together; a window belongs
    to the part in which all steps of its forecast are, and none if they are in two. Its past may reach back into the
    part before, which is known by then.

    Args:
        series: what :func:`renorm.comparison.series.read` read.
        window: steps of the past; by default two seasons where these are 12 to 96 steps, and 24 where not, made a
            multiple of each bar.
        horizon: steps to forecast; 6 by default.
        season: steps; by default by the length of a step. 1 for none.
        stride: from a window to the next; by default as small as leaves at most 6000 training windows.
        bars: the sizes of bars that are to be had, which must divide the window.
        aggregate: for columns by name what a bar has of them: first, last, max, min, mean or sum. By default open,
            high, low, close and volume (as the last word of the name) have the first, max, min, last and sum, all
            others the mean.
        valid: share of the time.
        test: share of the time; 0 for no test part.

    Raises:
        StudyError: a setting does not fit another or the data.
        DataError: no series has a training window.
    """
    if not (0 < valid < 1 and 0 <= test < 1 and valid + test < 1):
        raise StudyError(
            "the validation share must be above 0, the test share at least 0, and both together below 1; "
            f"got valid={valid} and test={test}"
        )
    season = series.season if season is None else season
    common = math.lcm(*bars)
    if window is None:
        window = 2 * season if 12 <= 2 * season <= 96 else 24
        window = -(-window // common) * common
    if window % common:
        raise StudyError(f"the window must be a multiple of each bar, {', '.join(map(str, bars))}; got {window}")
    times = np.unique(np.concatenate(series.times))
    edges = [math.floor(len(times) * share + 1e-9) for share in (1 - valid - test, 1 - test)]
    cuts = np.array([
        [np.searchsorted(own, times[edge]) if edge < len(times) else len(own) for edge in edges]
        for own in series.times
    ])  # fmt: skip
    panel = Panel(
        name=series.name,
        source=series.source,
        names=series.names,
        columns=series.columns,
        rules=_rules(series, aggregate or {}),
        static_names=series.static_names,
        missing=series.missing,
        window=window,
        horizon=HORIZON if horizon is None else horizon,
        stride=stride or 1,
        season=season,
        notes=series.notes,
        values=np.concatenate(series.values, 1),
        lengths=np.array([values.shape[1] for values in series.values]),
        cuts=cuts,
        static=series.static,
    )
    _refuse_empty(panel, test)
    panel = _without_short(panel)
    if stride is None:
        panel = replace(panel, stride=max(1, -(-panel.num("train") // MAX_TRAIN)))
    _refuse_empty(panel, test)
    return replace(panel, notes=(*panel.notes, *_remarks(panel, valid, test)))


def _refuse_empty(panel: Panel, test: float) -> None:
    needed: dict[Part, str] = {"valid": "validation", **({"test": "test"} if test else {})}
    for part, word in needed.items():
        if not panel.num(part):
            holes = int(np.isnan(panel.values).any(0).sum())
            lacking = f" ({holes} of {panel.values.shape[1]} steps lack a value, which takes each window that has one)"
            raise DataError(
                f"{panel.source}: the {word} part has no window of {panel.horizon} steps to forecast, with window "
                f"{panel.window} and season {panel.season} before it{lacking if holes else ''}; shorten them, give the "
                "part a larger share"
                + (", or write --gaps join, as for days without trading, or --missing last" if holes else "")
            )


def _without_short(panel: Panel) -> Panel:
    """The panel without the series that cannot be learnt from or scored."""
    keep = [
        at for at, starts in enumerate(panel._starts["train"])
        if len(starts) and _naive_error(panel._history(at), panel.season) > 0
        and (len(panel._starts["valid"][at]) or not len(panel._starts["test"][at]))
    ]  # fmt: skip
    if not keep:
        raise DataError(
            f"{panel.source}: no series has a training window: its training part must be longer than window "
            f"{panel.window} (or season {panel.season}) and horizon {panel.horizon}, without missing values between, "
            f"and not constant; the longest series has {int(panel.cuts[:, 0].max())} training steps"
        )
    left = [name for at, name in enumerate(panel.names) if at not in set(keep)]
    if not left:
        return panel
    shown = ", ".join(left[:LISTED]) + (f" and {len(left) - LISTED} more" if len(left) > LISTED else "")
    return replace(
        panel,
        names=tuple(panel.names[at] for at in keep),
        values=np.concatenate([panel._series[at] for at in keep], 1),
        lengths=panel.lengths[keep],
        cuts=panel.cuts[keep],
        static=panel.static[keep],
        notes=(*panel.notes, f"left out, since the training part is too short or constant: {shown}"),
    )


def _remarks(panel: Panel, valid: float, test: float) -> list[str]:
    shares = f"{1 - valid - test:.0%} for training, then {valid:.0%} for validation" + (
        f", then {test:.0%} for the test" if test else ""
    )
    notes = [
        f"split by time: {shares}; all statistics are of the training part of each series",
        f"a window is {panel.window} steps of the past and {panel.horizon} to forecast; "
        f"{'every step begins one' if panel.stride == 1 else f'one begins every {panel.stride} steps'}",
        f"a season is {panel.season} steps: MASE divides by the error of the value that long before, in the training "
        "part",
    ]
    untested = [name for name, starts in zip(panel.names, panel._starts["test"], strict=True) if not len(starts)]
    if test and untested:
        notes.append(f"{len(untested)} series end before the test part and are not scored")
    return notes


def _rules(series: Series, aggregate: Mapping[str, str]) -> tuple[str, ...]:
    for column, rule in aggregate.items():
        if column not in series.columns or rule not in _BAR:
            raise StudyError(
                f"aggregate gives columns one of {', '.join(_BAR)}; got {column}={rule}; the columns are "
                f"{', '.join(series.columns)}"
            )
    last_words = [re.split(r"[^a-z]+", name.strip().lower())[-1] for name in series.columns]
    return tuple(
        aggregate.get(name, RULES.get(word, "mean")) for name, word in zip(series.columns, last_words, strict=True)
    )


def _scale(values: Array) -> tuple[Array, Array]:
    """Mean and standard deviation of each row; 1 for a constant one, whose own may be a rounding error."""
    low, high = np.nanmin(values, 1), np.nanmax(values, 1)
    constant = low == high
    mean = np.where(constant, low, np.nanmean(values, 1))
    return mean, np.where(constant, 1.0, np.nanstd(values, 1))


def _carried(values: Array) -> Array:
    """Each missing value replaced by the one before it; those before the first stay missing."""
    places = np.where(np.isnan(values), 0, np.arange(values.shape[1]))
    return np.take_along_axis(values, np.maximum.accumulate(places, 1), 1)


def _naive_error(history: Array, season: int) -> float:
    """MASE's denominator; 0 where there is none."""
    apart = np.abs(history[season:] - history[:-season])
    return float(np.nanmean(apart)) if not np.isnan(apart).all() else 0.0
