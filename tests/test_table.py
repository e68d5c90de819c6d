"""Tables from files: what is read, how it is encoded, and every message for a table that cannot be used."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from renorm.comparison import table
from renorm.comparison.data import load, split
from renorm.errors import DataError


def frame(n: int = 60) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "length": rng.normal(5, 2, n),
            "count": rng.integers(0, 90, n),
            "colour": rng.choice(["red", "green", "blue"], n),
            "ripe": rng.choice([True, False], n),
            "kind": np.resize(["apple", "pear"], n),
        }
    )


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def write_csv(folder: Path, content: pd.DataFrame, name: str = "fruit.csv") -> str:
    content.to_csv(folder / name, index=False)
    return str(folder / name)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".CSV"])
def test_every_format_gives_the_same_numbers(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"fruit{suffix}"
    if suffix == ".parquet":
        frame().to_parquet(path)
    else:
        frame().to_csv(path, index=False, sep="\t" if suffix == ".tsv" else ",")
    splits = split(load(str(path), target="kind"))
    reference = split(load(write_csv(tmp_path, frame(), "plain.csv"), target="kind"))
    np.testing.assert_allclose(splits.x_train, reference.x_train, rtol=1e-6)
    assert splits.classes == ("apple", "pear")
    assert splits.target == "kind"
    assert splits.name == "fruit"


@pytest.mark.parametrize("separator", [";", ","])
def test_a_name_with_a_comma_does_not_decide_the_separator(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "fruit.csv"
    frame().rename(columns={"length": "length, in cm; dry"}).to_csv(path, index=False, sep=separator)
    assert list(table.read(path, "kind").columns) == ["length, in cm; dry", "count", "colour", "ripe"]


def test_columns_are_encoded_with_the_training_rows_only(tmp_path: Path) -> None:
    columns = table.read(Path(write_csv(tmp_path, frame())), "kind").columns
    train = np.arange(0, 60, 2)
    x, notes = table.encode(columns, train)
    raw = frame()
    numbers = raw[["length", "count", "ripe"]].astype(float)
    fitted = numbers.iloc[train]
    expected = np.column_stack(
        [
            (numbers - fitted.mean()) / fitted.std(ddof=0),
            pd.get_dummies(raw["colour"])[["blue", "green", "red"]],
        ]
    )
    np.testing.assert_allclose(x, expected.astype(float), rtol=1e-5, atol=1e-6)
    assert notes == ("one-hot encoded: column 'colour' (3 levels)",)


def test_a_level_that_was_not_trained_on_is_all_zeros() -> None:
    columns = pd.DataFrame({"colour": np.array(["red", "blue", "green"], dtype=object)})
    x, _ = table.encode(columns, np.array([0, 1]))
    np.testing.assert_array_equal(x, [[0, 1], [1, 0], [0, 0]])


def test_a_constant_column_stays_harmless() -> None:
    columns = pd.DataFrame({"a": [1e8 + 0.1] * 3 + [1e8 + 0.2], "b": [1.0, 2, 3, 4]})
    x, notes = table.encode(columns, np.array([0, 1, 2]))
    np.testing.assert_allclose(x[:, 0], [0, 0, 0, 0.1], atol=1e-6)
    assert notes == ("constant in the training part: column 'a'",)


def test_a_text_column_with_one_level_is_a_constant() -> None:
    text = {"kind": ["x", "x", "x", "y"], "self": ["z"] * 4}
    columns = pd.DataFrame(text, dtype=object).assign(b=[1.0, 2, 3, 4])
    x, notes = table.encode(columns, np.array([0, 1, 2]))
    np.testing.assert_array_equal(x[:, :2], np.zeros((4, 2)))
    np.testing.assert_allclose(x[:3, 2], np.array([-1, 0, 1]) * 1.5**0.5, rtol=1e-6)
    assert notes == ("constant in the training part: column 'kind', 'self'",)
    assert columns["self"].tolist() == ["z"] * 4


def test_a_categorical_and_a_nullable_column_of_parquet(tmp_path: Path) -> None:
    content = frame()
    content["colour"] = content["colour"].astype("category")
    content["count"] = content["count"].astype("Int64")
    content["ripe"] = content["ripe"].astype("boolean")
    content["kind"] = content["kind"].astype("category")
    content["text"] = content["length"].map(str)
    content.to_parquet(tmp_path / "a.parquet")
    splits = split(load(str(tmp_path / "a.parquet"), target="kind"))
    assert splits.input_shape == (7,)
    np.testing.assert_allclose(splits.x_train[:, 0], splits.x_train[:, 3], rtol=1e-6)


def test_a_number_is_predicted_in_its_own_units(tmp_path: Path) -> None:
    splits = split(load(write_csv(tmp_path, frame()), target="length"))
    assert splits.task == "regression"
    assert splits.target_mean == pytest.approx(5, abs=1)
    assert any("fractional numbers" in note for note in splits.notes)


@pytest.mark.parametrize("separator", [";", "\t"])
def test_another_separator_is_recognised(tmp_path: Path, separator: str) -> None:
    frame().to_csv(tmp_path / "a.csv", index=False, sep=separator, encoding="utf-8-sig")
    assert split(load(str(tmp_path / "a.csv"), target="kind")).input_shape == (6,)


# Notes


def test_an_id_is_left_out_with_a_note(tmp_path: Path) -> None:
    content = frame()
    content.insert(0, "Unnamed: 0", range(60))
    content["plant_id"] = [f"p{number}" for number in range(60)]
    content["user id"] = [*range(50), *range(10)]
    content["region_id"] = np.arange(60) % 4
    content["grid"] = np.random.default_rng(0).permutation(60)
    read = table.read(Path(write_csv(tmp_path, content)), "kind")
    assert list(read.columns) == ["length", "count", "colour", "ripe", "region_id", "grid"]
    assert read.notes[0].startswith("column 'Unnamed: 0' is left out")
    assert "no value comes twice" in read.notes[1]
    assert "10 rows repeat one" in read.notes[2]


def test_blanks_that_make_levels_are_noted(tmp_path: Path) -> None:
    content = frame()
    content.loc[[1, 3], "kind"] = "pear "
    content.loc[5, "colour"] = f" {content['colour'][5]}"
    read = table.read(Path(write_csv(tmp_path, content)), "kind")
    assert read.notes == (
        "column 'colour' has 4 different values, 3 without blanks at their ends: if they are the same, write "
        "frame['colour'].str.strip()",
        "column 'kind' has 3 different values, 2 without blanks at their ends: if they are the same, write "
        "frame['kind'].str.strip()",
    )


def test_a_column_that_counts_the_rows_is_noted(tmp_path: Path) -> None:
    content = frame().assign(day=range(10, 70))
    read = table.read(Path(write_csv(tmp_path, content)), "kind")
    assert "day" in read.columns
    assert read.notes == ("column 'day' counts the rows one by one: if it is an id, drop it",)


def test_repeated_rows_are_noted(tmp_path: Path) -> None:
    content = pd.concat([frame(), frame().head(5)])
    notes = table.read(Path(write_csv(tmp_path, content)), "kind").notes
    assert notes == ("5 of 65 rows repeat another one: copies may fall into different parts",)


# Errors


def test_the_target_must_be_said(tmp_path: Path) -> None:
    path = write_csv(tmp_path, frame().rename(columns={"kind": "which kind"}))
    with pytest.raises(DataError, match=r"columns are 'length', 'count'.*write --target \"which kind\""):
        load(path)


@pytest.mark.parametrize(("wrong", "right"), [("knid", "kind"), ("LENGTH", "length"), ("color", "colour")])
def test_an_unknown_target_gets_a_suggestion(tmp_path: Path, wrong: str, right: str) -> None:
    with pytest.raises(DataError, match=f"no column {wrong!r}; did you mean {right!r}"):
        load(write_csv(tmp_path, frame()), target=wrong)


def test_a_missing_value_is_named_by_column_row_and_line(tmp_path: Path) -> None:
    text = 'note;n;y\n"two\nlines";1;a\n\nx;;b\nx;;a\n'
    with pytest.raises(DataError, match=r"column 'n' lacks 2 of 3, the first in row 2 \(line 5 of the file\).*dropna"):
        load(write(tmp_path / "a.csv", text), target="y")


def test_a_missing_value_in_parquet_is_named_by_row(tmp_path: Path) -> None:
    content = frame()
    content.loc[3, "colour"] = None
    content.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="column 'colour' lacks 1 of 60, the first in row 4;"):
        load(str(tmp_path / "a.parquet"), target="kind")


def test_a_missing_target_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"column 'y' lacks 1 of 2, the first in row 2 \(line 3 of the file\)"):
        load(write(tmp_path / "a.csv", "x,y\n1,2\n2,\n"), target="y")


@pytest.mark.parametrize("value", ["inf", "-inf", "1e300"])
def test_an_infinite_value_is_named(tmp_path: Path, value: str) -> None:
    with pytest.raises(DataError, match=r"column 'x' has -?(inf|1e\+300) in row 2 \(line 3 of the file\)"):
        load(write(tmp_path / "a.csv", f"x,y\n1,2\n{value},3\n"), target="y")


def test_text_where_numbers_belong_is_named(tmp_path: Path) -> None:
    content = frame().astype({"count": object})
    content.loc[7, "count"] = "12 kg"
    with pytest.raises(
        DataError, match=r"column 'count' must hold numbers, as 59 of its 60 .* '12 kg' in row 8 \(line 9"
    ):
        load(write_csv(tmp_path, content), target="kind")


def test_text_in_a_numeric_target_is_named_by_line(tmp_path: Path) -> None:
    content = frame().astype({"length": object})
    content.loc[7, "length"] = "long"
    with pytest.raises(
        DataError, match=r"fruit\.csv: the target 'length' must hold numbers; it has long in row 8 \(line 9"
    ):
        load(write_csv(tmp_path, content), target="length")


def rows(values: list[str], kinds: list[str], separator: str = ";") -> str:
    lines = [separator.join(pair) for pair in zip(np.resize(values, 90), np.resize(kinds, 90), strict=True)]
    return "\n".join([f"x{separator}y", *lines]) + "\n"


@pytest.mark.parametrize("values", [["8", "4,0"], ["-0,5", ",25", "1e3", "3,"], ["1,250", "17"]])
def test_decimal_commas_are_refused_with_the_way_out(tmp_path: Path, values: list[str]) -> None:
    first = next(value for value in values if "," in value)
    line = 2 + values.index(first)
    told = rf"'{first}' in row {line - 1} \(line {line} of the file\); .*decimal comma.*read_csv\(path, sep='(;|\\t)'"
    path = write(tmp_path / "a.csv", rows(values, ["a", "b", "c", "d"]))
    for task in ("auto", "classification"):
        with pytest.raises(DataError, match=f"decimal point; column 'x' has {told}.*another sign in place"):
            load(path, target="y", task=task)
    path = write(tmp_path / "b.tsv", rows(["1", "3", "2"], values, "\t"))
    for task, otherwise in (("auto", "; if they are classes, write --task classification"), ("regression", "")):
        with pytest.raises(DataError, match=f"target 'y' must hold numbers; it has {told}.*{otherwise}$") as raised:
            load(path, target="y", task=task)
        assert ('thousands=","' in str(raised.value)) == (first == "1,250")
    assert set(load(path, target="y", task="classification").target.classes) == set(values)


def test_the_way_out_of_decimal_commas_is_one(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", rows(["0,5", "-2,0", "7"], ["a", "b"]))
    pd.read_csv(path, sep=";", decimal=",").to_csv(tmp_path / "new.csv", index=False)
    assert sorted(set(table.read(tmp_path / "new.csv", "y").columns["x"])) == [-2, 0.5, 7]


def test_decimal_commas_of_parquet_are_replaced_in_the_frame(tmp_path: Path) -> None:
    frame().assign(x=["0,5", "1"] * 30).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"'x' has '0,5' in row 1; .*frame\['x'\]\.str\.replace\(\",\", \"\.\"\)"):
        load(str(tmp_path / "a.parquet"), target="kind")


@pytest.mark.parametrize(
    "values", [["1,2,3", "1,2", "3"], ["a,b", "1,5"], ["1,5", "-"], ["10%", "50%"], ["1,inf", "2"]]
)
def test_text_with_commas_stays_text(tmp_path: Path, values: list[str]) -> None:
    path = write(tmp_path / "a.csv", rows([*values, "none"], values))
    dataset = load(path, target="y")
    assert dataset.target.classes == tuple(sorted(values))
    assert set(dataset.x["x"]) == {*values, "none"}


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (
            [f"{i},304.50" for i in range(1, 61)],
            r"commas between thousands.*frame\['.'\]\.str\.replace\(\",\", \"\"\)\.as",
        ),
        ([f"{i},000,000" for i in range(1, 61)], "commas between thousands"),
        (["17.5", "2,000.25", *map(str, range(30))], "commas between thousands"),
        ([f"{i / 4}%" for i in range(60)], r"a percent sign.*frame\['.'\]\.str\.rstrip\(\"% \"\)"),
        ([f"{i},5 %" for i in range(60)], "a percent sign"),
    ],
)
def test_numbers_in_another_notation_get_a_hint(tmp_path: Path, values: list[str], told: str) -> None:
    path = write(tmp_path / "a.csv", rows(values, ["a", "b"]))
    with pytest.raises(DataError, match=rf"column 'x' .*{told}"):
        load(path, target="y")
    path = write(tmp_path / "b.csv", rows(["1", "3", "2"], values))
    for task in ("auto", "regression"):
        with pytest.raises(DataError, match=rf"the target 'y' must hold numbers; .*{told}"):
            load(path, target="y", task=task)
    assert len(load(path, target="y", task="classification").target.classes) == len(values)


def test_free_text_is_named(tmp_path: Path) -> None:
    content = frame(200).assign(remark=[f"fruit number {number}" for number in range(200)])
    message = r"column 'remark' has 200 in 200 rows, the first 'fruit number 0' in row 1 \(line 2"
    with pytest.raises(DataError, match=message):
        load(write_csv(tmp_path, content), target="kind")


@pytest.mark.parametrize("values", [pd.date_range("2020", periods=60), [Decimal(1)] * 60, [[1, 2]] * 60])
def test_other_types_are_named(tmp_path: Path, values: object) -> None:
    frame().assign(odd=values).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="column 'odd' must hold numbers, true and false, or text; it holds"):
        load(str(tmp_path / "a.parquet"), target="kind")


@pytest.mark.parametrize("values", ["apple pear", "1.5 -2", "True False"])
def test_a_copy_of_the_target_is_refused(tmp_path: Path, values: str) -> None:
    content = frame().assign(leak=np.resize(values.split(), 60))
    with pytest.raises(DataError, match="column 'leak' is the target 'kind' itself or a relabelling of it"):
        load(write_csv(tmp_path, content), target="kind")


def test_a_copy_of_a_numeric_target_is_refused(tmp_path: Path) -> None:
    content = frame().assign(again=frame()["length"])
    with pytest.raises(DataError, match="column 'again' is the target 'length'"):
        load(write_csv(tmp_path, content), target="length")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("\n\n", "the file is empty"),
        ("x,y\n", "a table needs rows"),
        ("5.1,3.5,0\n4.9,3.0,1\n", "the first line must name the columns; it holds the numbers '5.1,3.5,0'"),
        ("x,x,y\n1,2,3\n", "'x' comes 2 times"),
        ("x,y\n1,2\n3,4,5\n", "cannot be read as csv.*line 3"),
        ("x,y\n1,2,9\n3,4,5\n", "cannot be read as csv"),
        ("y\n1\n2\n", "needs a feature beside the target 'y'"),
        ("id,y\n1,a\n2,b\n", "needs a feature beside the target 'y'"),
        ("x,y\n1,a\n2,a\n", "'y' is a in all 2 samples"),
        ("x,y\n1,a\n2,a\n3,a\n3,a\n1,b\n", r"class 'b' of 'y' needs 3 samples or more.*it has 1"),
    ],
)
def test_text_tables_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        split(load(write(tmp_path / "a.csv", text), target="y"))


def test_a_frame_written_without_names_is_read(tmp_path: Path) -> None:
    rows = "\n".join(f"{number * 0.5},{number % 2}" for number in range(12))
    assert load(write(tmp_path / "a.csv", f"0,1\n{rows}\n"), target="1").target.classes == ("0", "1")


def test_a_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("x,y\n1,für\n".encode("latin-1"))
    with pytest.raises(
        DataError, match=r"cannot be read as csv \(in UTF-8.*in UTF-8: iconv -f latin1 -t utf-8 IN > OUT"
    ):
        load(str(tmp_path / "a.csv"), target="y")
    (tmp_path / "a.csv").write_text("x,y\n1,2\n", encoding="utf-16")
    with pytest.raises(DataError, match="iconv -f utf-16 -t utf-8 IN > OUT"):
        load(str(tmp_path / "a.csv"), target="y")


def test_a_broken_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read as parquet"):
        load(str(tmp_path / "a.parquet"), target="y")


def test_a_table_on_its_side_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "MAX_FEATURES", 4)
    with pytest.raises(DataError, match="has 5 columns and 60 rows; if it lies on its side"):
        load(write_csv(tmp_path, frame()), target="kind")
