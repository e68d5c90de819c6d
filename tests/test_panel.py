"""Panels: parts one after the other in time, scalers of the first one alone, and windows that do not leak."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from renorm.comparison.panel import Panel, Windows, divide
from renorm.comparison.series import Layout, Series, read
from renorm.errors import DataError, StudyError

LAYOUT = Layout("time", "id", "y", ("y", "volume"), ("size",))


def table(seed: int = 0, *, holes: bool = True) -> pd.DataFrame:
    """Three series of different lengths and scales; the second begins late, the third has a constant column."""
    rng = np.random.default_rng(seed)
    parts = []
    for name, begin, end, level in (("a", 0, 200, 10.0), ("b", 60, 200, 1e4), ("c", 0, 190, -5.0)):
        steps = np.arange(begin, end)
        y = level * (1 + 0.2 * np.sin(steps / 3) + 0.05 * rng.normal(size=len(steps)))
        volume = np.full(len(steps), 3.3) if name == "c" else rng.gamma(2, size=len(steps))
        parts.append(pd.DataFrame({"time": steps, "id": name, "y": y, "volume": volume, "size": level}))
    made = pd.concat(parts, ignore_index=True)
    if holes:
        made.loc[[20, 21, 230, 290], "y"] = np.nan
        made.loc[40, "volume"] = np.nan
    return made


def panel(frame: pd.DataFrame | None = None, layout: Layout = LAYOUT, **options: Any) -> Panel:
    return divide(read(table() if frame is None else frame, layout), **{"window": 12, "horizon": 4, **options})


def same(one: Windows, other: Windows, names: tuple[str, ...]) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)


# ---- no leakage


@pytest.mark.parametrize("missing", ["drop", "last"])
@pytest.mark.parametrize("poison", [1e9, np.nan])
@pytest.mark.parametrize(("bar", "static"), [(1, False), (3, True)])
def test_the_future_changes_nothing_of_the_training(missing: Any, poison: float, bar: int, static: bool) -> None:
    """Every value from the first validation step on is another one: what is trained on is the same to the last bit."""
    layout, options = replace(LAYOUT, missing=missing), {"bars": (1, 3), "season": 6}
    frame = table()
    clean = panel(frame, layout, **options)
    spoilt = frame.copy()
    future = spoilt["time"] >= 120  # 60% of 200 steps
    assert 0.3 < future.mean() < 0.6
    rng = np.random.default_rng(1)
    values = poison * rng.normal(size=(int(future.sum()), 2))
    kept = future & (spoilt["time"] % 29 < 24)  # where all were nan there were no windows, and no panel
    spoilt.loc[future, ["y", "volume"]] = values if np.isfinite(poison) else rng.normal(size=values.shape)
    if not np.isfinite(poison):
        spoilt.loc[future & ~kept, ["y", "volume"]] = np.nan
    dirty = panel(spoilt, layout, **options)
    assert not np.array_equal(clean.windows().x_test, dirty.windows().x_test)
    assert (clean.names, clean.stride, clean.season, clean.num("train")) == (
        dirty.names, dirty.stride, dirty.season, dirty.num("train")
    )  # fmt: skip
    before, after = (one.windows(bar, static=static) for one in (clean, dirty))
    assert same(before, after, ("x_train", "y_train", "means", "stds"))
    assert np.array_equal(before.of["train"], after.of["train"])
    assert all(np.array_equal(before.history[name], after.history[name], equal_nan=True) for name in before.names)
    # and the test part changes nothing of the validation part
    late = frame.copy()
    late.loc[late["time"] >= 160, ["y", "volume"]] = 1e9
    last = panel(late, layout, **options).windows(bar, static=static)
    assert same(before, last, ("x_train", "y_train", "x_valid", "y_valid", "means", "stds"))


def test_no_window_forecasts_across_a_border_and_each_sees_its_own_past_only() -> None:
    """The values are their own times, so that every number says where it is from."""
    steps = np.arange(100.0)
    frame = pd.DataFrame({"time": steps.astype(int), "y": steps})
    found = divide(read(frame, Layout()), window=10, horizon=3, stride=1).windows()
    mean, std = found.means[0], found.stds[0]
    assert (mean, std) == (np.arange(60).mean(), np.arange(60).std())
    for part, begin, end in (("train", 0, 60), ("valid", 60, 80), ("test", 80, 100)):
        x, y = (np.rint(getattr(found, f"{axis}_{part}") * std + mean).astype(int) for axis in "xy")
        assert np.array_equal(x[:, 0], y[:, :1] + np.arange(-10, 0))
        assert np.array_equal(y, y[:, :1] + np.arange(3))
        assert (y.min(), y.max()) == (max(begin, 10), end - 1)
        assert len(y) == end - max(begin, 10) - 2


def test_the_parts_are_of_the_time_that_all_series_cover_together() -> None:
    found = panel()
    assert found.cuts.tolist() == [[120, 160], [60, 100], [120, 160]]
    assert found.lengths.tolist() == [200, 140, 190]


# ---- scalers


def test_each_series_is_scaled_by_its_own_training_part() -> None:
    found = panel(table(holes=False))
    frame = table(holes=False)
    windows = found.windows()
    for at, name in enumerate(found.names):
        own = frame[(frame["id"] == name) & (frame["time"] < 120)]["y"]
        assert windows.means[at] == pytest.approx(own.mean(), rel=1e-12)
        assert windows.stds[at] == pytest.approx(own.std(ddof=0), rel=1e-12)
        first = windows.y_train[windows.of["train"] == at][0]
        expected = (own.to_numpy()[12:16] - own.mean()) / own.std(ddof=0)
        assert np.abs(first - expected).max() < 1e-5


def test_a_constant_column_is_only_shifted() -> None:
    """Divided by the deviation that rounding gives it, or by that plus 1e-6, it would be of any size later."""
    frame = table(holes=False)
    frame.loc[(frame["id"] == "c") & (frame["time"] >= 120), "volume"] = 4.3
    windows = panel(frame).windows()
    rows = windows.of["train"] == 2
    assert np.abs(windows.x_train[rows][:, 1]).max() == 0
    assert np.abs(windows.x_test[windows.of["test"] == 2][:, 1, -1] - 1).max() < 1e-6


def test_static_features_are_scaled_over_the_series() -> None:
    found = panel().windows(static=True)
    assert found.num_static == 3  # size, and the target's mean and deviation
    assert found.input_shape == (5, 12)
    first = np.stack([found.x_train[found.of["train"] == at][0, 2:] for at in range(3)])
    assert np.array_equal(first, np.repeat(first[:, :, :1], 12, 2))
    size = np.array([10.0, 1e4, -5.0])
    assert np.abs(first[:, 0, 0] - (size - size.mean()) / size.std()).max() < 1e-6
    alone = panel(table()[lambda frame: frame["id"] == "a"]).windows(static=True)
    assert np.abs(alone.x_train[:, 2:]).max() == 0  # constant over one series


# ---- missing values


def test_windows_that_touch_a_missing_value_are_left_out() -> None:
    windows = panel(stride=1).windows()
    assert np.isfinite(windows.x_train).all()
    assert np.isfinite(windows.y_train).all()
    whole = panel(table(holes=False), stride=1).windows()
    gone = (whole.of["train"] == 0).sum() - (windows.of["train"] == 0).sum()
    # y at 20 and 21: starts 17 to 33; volume at 40, which is only seen: starts 41 to 52
    assert gone == 17 + 12


def test_the_last_value_is_carried_into_the_past_but_never_forecast() -> None:
    windows = panel(layout=replace(LAYOUT, missing="last"), stride=1).windows()
    whole = panel(table(holes=False), stride=1).windows()
    gone = (whole.of["train"] == 0).sum() - (windows.of["train"] == 0).sum()
    assert gone == 5  # starts 17 to 21
    frame = table()
    y = frame[frame["id"] == "a"]["y"].ffill().to_numpy()
    mine = windows.x_train[windows.of["train"] == 0][:, 0] * windows.stds[0] + windows.means[0]
    assert np.abs(mine[17 - 12] - y[10:22]).max() < 1e-4  # starts 12 to 16, then 22


# ---- bars


def test_bars_have_what_their_columns_ask_for() -> None:
    rng = np.random.default_rng(0)
    names = ("Open", "High", "btc_low", "close", "Volume", "depth", "last trade")
    frame = pd.DataFrame({"time": np.arange(80), **{name: rng.normal(size=80) for name in names}})
    found = divide(
        read(frame, Layout(target="close")), window=12, horizon=2, bars=(4,), stride=1, aggregate={"last trade": "last"}
    )
    assert dict(zip(found.columns, found.rules, strict=True)) == {
        "close": "last", "Open": "first", "High": "max", "btc_low": "min", "Volume": "sum", "depth": "mean",
        "last trade": "last",
    }  # fmt: skip
    windows = found.windows(4)
    assert windows.input_shape == (7, 3)
    by_hand = {"first": lambda x: x[0], "last": lambda x: x[-1], "max": max, "min": min}
    for at, (column, rule) in enumerate(zip(found.columns, found.rules, strict=True)):
        past = frame[column].to_numpy()[:48]
        mean, std = past.mean(), past.std()
        for row in (0, 7):
            bars = frame[column].to_numpy()[row : row + 12].reshape(3, 4)
            expected = [(by_hand.get(rule, np.mean)(bar) - mean) / std for bar in bars]
            assert np.abs(windows.x_train[row, at] - expected).max() < 1e-5
    assert np.array_equal(windows.y_train, found.windows(1).y_train)  # whatever the bar, the same is forecast


# ---- what a study keeps


def test_a_panel_comes_back_from_its_file(tmp_path: Path) -> None:
    found = panel()
    found.save(tmp_path / "data.npz")
    back = Panel.load(tmp_path / "data.npz")
    assert back.fingerprint == found.fingerprint
    assert back.describe() == found.describe()
    for field in fields(Panel):
        one, other = (getattr(each, field.name) for each in (found, back))
        assert np.array_equal(one, other, equal_nan=True) if isinstance(one, np.ndarray) else one == other


def test_what_training_sees_decides_the_fingerprint() -> None:
    found = panel()
    changes = [{"horizon": 5}, {"window": 15}, {"season": 2}, {"stride": 2}]
    changed = [panel(**change).fingerprint for change in changes] + [panel(table(1)).fingerprint]
    assert len({found.fingerprint, *changed}) == 6
    assert replace(found, name="other", notes=()).fingerprint == found.fingerprint


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    with pytest.raises(FileNotFoundError):
        Panel.load(path)
    panel().save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match="must be data that renorm has saved"):
        Panel.load(path)
    other = replace(panel(), horizon=3)
    other.__dict__["fingerprint"] = panel().fingerprint
    other.save(path)
    with pytest.raises(DataError, match="not those that were saved"):
        Panel.load(path)


# ---- defaults and refusals


def test_the_window_is_two_seasons_and_a_multiple_of_each_bar() -> None:
    series = read(table(), LAYOUT)
    assert divide(series, season=7).window == 14
    assert divide(series, season=7, bars=(1, 4)).window == 16
    assert divide(series, season=1).window == 24


def test_the_stride_leaves_a_number_of_windows_that_can_be_trained_on() -> None:
    found = divide(read("household", Layout()), window=30, horizon=5)
    assert found.num("train") <= 6000 < found.num("train") * 2
    assert found.stride > 50


def test_a_series_that_cannot_be_learnt_from_is_left_out_and_told() -> None:
    frame = table()
    short = pd.DataFrame({"time": np.arange(150, 200), "id": "new", "y": 1.0, "volume": 1.0, "size": 2.0})
    flat = pd.DataFrame({"time": np.arange(200), "id": "flat", "y": 1.0, "volume": 1.0, "size": 2.0})
    found = panel(pd.concat([frame, short, flat]))
    assert found.names == ("a", "b", "c")
    assert "left out, since the training part is too short or constant: flat, new" in found.notes
    assert found.fingerprint == panel().fingerprint


def test_a_series_that_ends_early_is_trained_on_and_not_scored() -> None:
    frame = table()
    found = panel(frame[(frame["id"] != "c") | (frame["time"] < 130)])
    assert found.names == ("a", "b", "c")
    assert set(found.windows().of["test"]) == {0, 1}
    assert "1 series end before the test part and are not scored" in found.notes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"valid": 0.5, "test": 0.5}, "both together below 1; got valid=0.5 and test=0.5"),
        ({"window": 10, "bars": (1, 3)}, "window must be a multiple of each bar, 1, 3; got 10"),
        ({"aggregate": {"prize": "last"}}, "aggregate gives columns one of first, .*got prize=last; the columns are y"),
        ({"aggregate": {"y": "median"}}, "got y=median"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        panel(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 150}, "no series has a training window: .*window 150.*the longest series has 120 training steps"),
        ({"season": 150}, "season 150"),
        ({"horizon": 45, "valid": 0.3, "test": 0.2}, "the test part has no window"),
        ({"horizon": 45, "valid": 0.1, "test": 0.3}, "the validation part has no window"),
    ],
)
def test_a_part_without_a_window_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        panel(table(holes=False), **options)


def test_days_without_trading_are_said_to_take_the_windows() -> None:
    days = pd.DataFrame({"time": pd.bdate_range("2024-01-01", periods=300), "close": np.arange(300.0) % 11})
    with pytest.raises(DataError, match=r"\(118 of 418 steps lack a value.*or write --gaps join, as for days without"):
        panel(days, Layout())
    panel(days, Layout(gaps="join"))


def test_scores_are_in_the_units_of_each_series() -> None:
    found = panel(table(holes=False), season=6)
    windows = found.windows()
    scores = windows.scores("test", np.zeros_like(windows.y_test))
    assert scores is not None
    y = windows.y_test * windows.stds[windows.of["test"]][:, None] + windows.means[windows.of["test"]][:, None]
    for at, name in enumerate(found.names):
        rows = windows.of["test"] == at
        past = windows.history[name]
        mae = np.abs(y[rows] - windows.means[at]).mean()
        assert scores.parts[name]["mae"].value == pytest.approx(mae, rel=1e-5)
        assert scores.parts[name]["mase"].value == pytest.approx(mae / np.abs(past[6:] - past[:-6]).mean(), rel=1e-5)
    assert scores["mase"].value == pytest.approx(np.mean([part["mase"].value for part in scores.parts.values()]))
    assert windows.scores("test", np.full_like(windows.y_test, np.nan)) is None


def test_the_last_value_and_the_last_season() -> None:
    frame = pd.DataFrame({"time": np.arange(100), "y": np.r_[np.arange(70.0), [np.nan], np.arange(71.0, 100)]})
    found = divide(read(frame, Layout(missing="last")), window=10, horizon=5, season=3, stride=1)
    starts = np.rint(found.windows().y_test[:, 0] * found.windows().stds + found.windows().means).astype(int)
    assert np.array_equal(found.repeated("test", 1), np.repeat(starts[:, None] - 1.0, 5, 1))
    assert np.array_equal(found.repeated("test", 3), starts[:, None] + np.array([-3.0, -2, -1, -3, -2]))
    assert 69.0 in found.repeated("valid", 3)[:, 0]  # for 70, which is not known
    assert not np.isnan(found.repeated("valid", 3)).any()


def test_a_table_read_by_name_is_divided(tmp_path: Path) -> None:
    series: Series = read("parking", Layout())
    found = divide(series)
    assert (found.season, found.window, found.horizon, len(found.names)) == (18, 36, 6, 29)
    assert found.static_names == ("capacity",)
