"""Time series: what a long table may look like, what becomes of it, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from renorm.comparison.series import EXTRACTS, Layout, Series, read
from renorm.errors import DataError

LAYOUT = Layout("when", "shop", "sold")


def frame(**columns: Any) -> pd.DataFrame:
    """Two shops, hour by hour, of different lengths, the rows shuffled."""
    hours = [pd.Timestamp("2024-03-01") + pd.Timedelta(hours=h) for h in (*range(6), *range(2, 12))]
    made = pd.DataFrame(
        {"when": hours, "shop": ["b"] * 6 + ["a"] * 10, "sold": np.arange(16.0), "price": np.arange(16.0) ** 2}
    ).assign(**columns)
    return made.sample(frac=1, random_state=0)


def of(table: pd.DataFrame, **changes: Any) -> Series:
    return read(table, Layout(**{**vars(LAYOUT), **changes}))


def test_rows_in_any_order_become_series_in_order_of_time() -> None:
    found = of(frame())
    assert found.names == ("a", "b")
    assert (found.columns, found.target, found.season) == (("sold", "price"), "sold", 24)
    assert found.values[0][0].tolist() == list(range(6, 16))
    assert found.values[1].tolist() == [list(range(6)), [x**2 for x in range(6)]]
    assert found.times[0][0] - found.times[1][0] == 2 * 3600 * 10**9
    assert "2 series, 16 rows, a step of 01:00:00" in found.notes


def test_a_file_reads_as_the_frame_it_was_written_from(tmp_path: Path) -> None:
    table = frame(**{"Größe, m²": np.arange(16.0)})
    table.to_csv(tmp_path / "odd.csv", index=False)
    table.to_parquet(tmp_path / "odd.parquet")
    for name in ("odd.csv", "odd.parquet"):
        found = read(str(tmp_path / name), LAYOUT)
        assert found.columns == ("sold", "price", "Größe, m²")
        assert found.name == "odd"
        for got, expected in zip(found.values, of(table).values, strict=True):
            assert np.array_equal(got, expected)


def test_one_series_needs_no_id_and_a_column_called_time_no_name() -> None:
    found = read(pd.DataFrame({"Date": ["2024-01-01", "2024-01-02", "2024-01-03"], "x": [1, 2, 4]}), Layout())
    assert (found.names, found.target, found.season) == (("python",), "x", 7)
    assert found.values[0].tolist() == [[1, 2, 4]]


def test_steps_that_are_not_there_are_missing() -> None:
    table = frame()
    gone = table[(table["shop"] == "a") & (table["sold"].isin([8.0, 9.0]))].index
    found = of(table.drop(gone))
    assert np.isnan(found.values[0][0]).nonzero()[0].tolist() == [2, 3]
    assert np.array_equal(found.times[0], of(table).times[0])
    assert any("2 of 16 steps lack a value: windows that touch them are left out" in note for note in found.notes)
    joined = of(table.drop(gone), gaps="join", missing="last")
    assert joined.values[0][0].tolist() == [6, 7, *range(10, 16)]
    assert joined.missing == "last"


@pytest.mark.parametrize(
    ("dates", "season"),
    [
        (pd.date_range("2020-01-31", periods=30, freq="ME"), 12),
        (pd.date_range("2020-01-01", periods=30, freq="MS"), 12),
        (pd.date_range("2020-01-01", periods=30, freq="QS"), 4),
        (pd.date_range("2020-01-01", periods=30, freq="YS"), 1),
        (pd.date_range("2020-01-01", periods=30, freq="W"), 52),
        (pd.date_range("2020-01-01", periods=30, freq="15min"), 96),
        (pd.date_range("2020-01-01", periods=30, freq="7min"), 1),
        (np.arange(30) * 5, 1),
    ],
)
def test_calendar_steps_are_equal_and_have_a_season(dates: Any, season: int) -> None:
    found = read(pd.DataFrame({"time": dates, "x": np.arange(30.0)}), Layout())
    assert found.values[0].shape == (1, 30)
    assert not np.isnan(found.values[0]).any()
    assert found.season == season


def test_a_day_of_joined_rows_is_as_long_as_most_days_are() -> None:
    days = pd.date_range("2024-01-01", periods=10)
    times = [day + pd.Timedelta(hours=9, minutes=30 * slot) for day in days for slot in range(13)]
    found = read(pd.DataFrame({"time": times[:-4], "x": np.arange(126.0)}), Layout(gaps="join"))
    assert found.season == 13
    assert found.values[0].shape == (1, 126)


def test_static_columns_are_numbers_or_levels() -> None:
    found = of(frame(size=[3] * 6 + [7] * 10, kind=["old"] * 6 + ["new"] * 10), static=("size", "kind"))
    assert found.static_names == ("size", "kind=new", "kind=old")
    assert found.static.tolist() == [[7, 1, 0], [3, 0, 1]]
    assert found.columns == ("sold", "price")


def test_text_columns_that_are_not_used_are_told() -> None:
    found = of(frame(remark=["x"] * 16))
    assert "text columns are left out: remark" in found.notes


def spoilt(column: str, row: int, value: object) -> pd.DataFrame:
    table = frame().sort_values(["shop", "when"]).reset_index(drop=True).astype({column: object})
    table.loc[row, column] = value
    return table


@pytest.mark.parametrize(
    ("table", "layout", "message"),
    [
        (frame().iloc[:0], LAYOUT, "needs rows; it has none"),
        (frame(), Layout("wen", "shop", "sold"), "no column 'wen'; did you mean 'when'"),
        (frame(), Layout("when", "shp", "sold"), "no column 'shp'; did you mean 'shop'"),
        (frame(), Layout("when", "shop", "sold", ("prize",)), "no column 'prize'; did you mean 'price'"),
        (frame(), Layout(None, "shop", "sold"), "say which column holds the time, with --time"),
        (frame(), Layout("when", "shop"), "say which column to forecast, with --target; there are 'sold', 'price'"),
        (frame(), Layout("when", "shop", "shop"), "column 'shop' is both a value and"),
        (frame(), Layout("when", None, "sold"), "'python' has 2024-03-01T02.* twice, and 3 more"),
        (pd.concat([frame(), frame().iloc[:1]]), LAYOUT, "twice; drop them"),
        (frame().assign(when=np.arange(16) * 1e30), LAYOUT, "whole and below 2.53.*'when' has 1e.30 in row 2"),
        (pd.concat([frame(), frame()[["sold"]]], axis=1), LAYOUT, "names must differ; 'sold' comes more than once"),
        (
            spoilt("when", 3, pd.Timestamp("2024-03-01 05:20")),
            LAYOUT,
            "'a' has 2024-03-01.05:20.*whole number",
        ),
        (spoilt("when", 3, "31/05/2024"), LAYOUT, r"ISO dates.*has '31/05/2024' in row 4"),
        (frame().assign(when=True), LAYOUT, "ISO dates.*has 'True' in row 1"),
        (spoilt("when", 3, None), LAYOUT, "every row must have a time; column 'when' is empty in row 4"),
        (spoilt("shop", 3, None), LAYOUT, "every row must name its series; column 'shop' is empty in row 4"),
        (spoilt("sold", 3, "n/k"), LAYOUT, "column 'sold' must hold finite numbers.*it has 'n/k' in row 4 and 0 more"),
        (spoilt("sold", 3, np.inf), LAYOUT, "column 'sold' must hold finite numbers.*has 'inf'"),
        (frame(size=range(16)), Layout("when", "shop", "sold", static=("size",)), "'size' changes in series 'a'"),
        (frame(size=[None] * 16), Layout("when", "shop", "sold", static=("size",)), "static value may not be missing"),
        (pd.DataFrame({"time": [0.5, 1.5], "x": [1, 2]}), Layout(), "must be whole.*has 0.5 in row 1"),
        (pd.DataFrame({"time": [0, 1], "id": ["a", "b"], "x": [1, 2]}), Layout(series="id"), "rows at several times"),
        (pd.DataFrame({"time": [0, 1, 2, 10**9], "x": [1, 2, 3, 4]}), Layout(), "may have 50000000 rows.*gaps join"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(table: pd.DataFrame, layout: Layout, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(table, layout)


def test_whole_times_are_exact() -> None:
    since = 2**60 + np.array([0, 1, 2, 3, 4])  # floats near there are 256 apart
    found = read(pd.DataFrame({"time": since, "x": np.arange(5.0)}), Layout())
    assert found.times[0].tolist() == since.tolist()


def test_static_text_with_too_many_levels_is_refused() -> None:
    shops = [f"s{i}" for i in range(60) for _ in range(2)]
    table = pd.DataFrame({"time": [0, 1] * 60, "shop": shops, "x": np.arange(120.0), "boss": shops})
    with pytest.raises(DataError, match="at most 50 different values; 'boss' has 60"):
        read(table, Layout(series="shop", static=("boss",)))


def test_a_name_that_is_no_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="got 'parkin'; did you mean 'parking'"):
        read("parkin", Layout())


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file '.*sold\.csv'; write the path of one"):
        read(str(tmp_path / "sold.csv"), Layout())
    (tmp_path / "sales.csv").write_text("time,x\n0,1\n")
    with pytest.raises(DataError, match=r"there is no file '.*sale\.csv'; did you mean 'sales\.csv'"):
        read(str(tmp_path / "sale.csv"), Layout())
    with pytest.raises(DataError, match=r"there is no file '.*sale\.csv'; write the path of one"):
        read(str(tmp_path / "none" / "sale.csv"), Layout())


@pytest.mark.parametrize("layout", [Layout(target="x"), Layout(target="n"), Layout(target="n", columns=("x",))])
def test_decimal_commas_are_told(tmp_path: Path, layout: Layout) -> None:
    (tmp_path / "a.csv").write_text("time;x;n\n" + "".join(f"{i};{i},5;\n" for i in range(5)) + "5;;\n")
    with pytest.raises(DataError, match=r"'x' must hold finite .*'0,5' in row 1.*a decimal comma.*sep=';', decimal"):
        read(str(tmp_path / "a.csv"), layout)


def test_a_column_of_decimal_commas_is_not_left_out() -> None:
    table = frame(cost=["1,5"] * 15 + [None], code=["1,2,3"] * 16)
    with pytest.raises(DataError, match=r"'cost' must hold finite numbers.*frame\['cost'\]\.str\.replace"):
        of(table)
    assert "text columns are left out: code" in of(table.drop(columns="cost")).notes


def test_parking_is_what_was_stored() -> None:
    """Every reading that the grid has is one of the stored readings of that park, at most a quarter hour away."""
    frame, layout = EXTRACTS["parking"]()
    assert len(frame["park"].unique()) == 30
    assert (frame.groupby(["park", frame["time"].dt.date]).size() == 18).all()
    stored = np.load(Path(str(read.__code__.co_filename)).parent / "extracts" / "parking.npz")
    park = "Broad Street"
    mine = stored["id"] == stored["names"].tolist().index(park)
    minutes, occupied = stored["minute"][mine], stored["occ"][mine]
    rows = frame[(frame["park"] == park) & frame["occupied"].notna()]
    since = (rows["time"] - pd.Timestamp("2016-10-04")).dt.total_seconds().to_numpy() / 60
    for at, value in zip(since, rows["occupied"], strict=True):
        near = np.abs(minutes - at) <= 15
        assert value in occupied[near]
    assert len(rows) > 0.98 * len(np.unique(np.rint(minutes / 30)))
    assert layout.static == ("capacity",)


def test_household_has_a_row_for_every_minute() -> None:
    found = read("household", Layout())
    assert [values.shape for values in found.values] == [(1, 259_200)] * 4
    assert int(np.isnan(found.values[0]).sum()) == 3771
    house, *circuits = (values[0] for values in found.values)
    known = ~np.isnan(house)
    assert (house >= sum(circuits))[known].mean() > 0.9999  # all in watts, and the circuits are parts of the house
    assert found.season == 1440
