"""Data from every source, split and prepared; and every message for data that cannot be used."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import datasets
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.metrics import root_mean_squared_error
from sklearn.preprocessing import StandardScaler
from torch.utils.data import IterableDataset, TensorDataset

from renorm.comparison.data import BUILT_IN, Splits, from_parts, load, split
from renorm.comparison.read import from_pairs
from renorm.comparison.target import recognise
from renorm.errors import DataError, StudyError


def arrays(n: int = 60, features: int = 3, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(5, 2, (n, features)), np.arange(n) % classes


def all_rows(splits: Splits) -> np.ndarray:
    return np.concatenate([splits.x_train, splits.x_valid, splits.x_test])


# Built-in data


def test_digits_are_all_there_as_standardized_images() -> None:
    splits = split(load("digits"))
    raw = datasets.load_digits()
    assert splits.input_shape == (1, 8, 8)
    assert splits.num_outputs == 10
    assert splits.x_train.dtype == np.float32
    assert splits.y_train.dtype == np.int64
    assert len(all_rows(splits)) == 1797
    np.testing.assert_allclose(splits.x_train.mean(), 0, atol=1e-5)
    np.testing.assert_allclose(splits.x_train.std(), 1, atol=1e-5)
    # undone, every image is one of scikit-learn's with its own label
    scale = np.unique(np.diff(np.unique(splits.x_train))).min() ** -1
    pixels = np.rint((splits.x_test - splits.x_train.min()) * scale).astype(int)
    known = {image.astype(int).tobytes(): label for image, label in zip(raw.images, raw.target, strict=True)}
    assert [known[image[0].tobytes()] for image in pixels] == splits.y_test.tolist()


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_data_is_recognised(name: str) -> None:
    splits = split(load(name))
    assert splits.task == ("regression" if name == "diabetes" else "classification")
    assert np.isfinite(all_rows(splits)).all()
    assert splits.name == name


def test_diabetes_keeps_the_scale_of_its_target() -> None:
    splits = split(load("diabetes"))
    y = datasets.load_diabetes().target
    back = np.concatenate([splits.y_train, splits.y_valid, splits.y_test]) * splits.target_std + splits.target_mean
    np.testing.assert_allclose(np.sort(back), np.sort(y), atol=1e-3)
    np.testing.assert_allclose([splits.y_train.mean(), splits.y_train.std()], [0, 1], atol=1e-6)


# Splitting


def test_features_are_standardized_with_the_training_part_only(tmp_path: Path) -> None:
    x, _ = arrays(200)
    x[:, 1] = 7.3  # constant: dividing by its rounding error would blow it up
    x[:, 2] *= 1e6
    np.savez(tmp_path / "mine.npz", x=x, y=np.arange(200) + 0.5)  # the target tells the row
    splits = split(load(str(tmp_path / "mine.npz")), seed=3)
    parts = [splits.y_train, splits.y_valid, splits.y_test]
    rows = [np.rint(part * splits.target_std + splits.target_mean - 0.5).astype(int) for part in parts]
    assert sorted(np.concatenate(rows)) == list(range(200))
    expected = StandardScaler().fit(x[rows[0]]).transform(x[np.concatenate(rows)])
    np.testing.assert_allclose(all_rows(splits), expected, rtol=1e-5, atol=1e-6)
    assert np.abs(all_rows(splits)[:, 1]).max() < 1e-12


def test_image_channels_are_standardized_each_by_itself(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal([[[[10]], [[-3]]]], [[[[5]], [[0.1]]]], (50, 2, 4, 5))
    np.savez(tmp_path / "a.npz", x_train=x[:40], y_train=np.arange(40) % 2, x_test=x[40:], y_test=np.arange(10) % 2)
    splits = split(load(str(tmp_path / "a.npz")))
    np.testing.assert_allclose(splits.x_train.mean((0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(splits.x_train.std((0, 2, 3)), 1, atol=1e-5)
    assert len(splits.x_test) == 10
    assert len(splits.x_valid) == 8


@given(
    counts=st.lists(st.integers(3, 40), min_size=2, max_size=5),
    valid=st.floats(0.05, 0.6),
    test=st.floats(0.0, 0.35),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_a_split_is_a_partition_that_holds_every_class(counts: list[int], valid: float, test: float, seed: int) -> None:
    y = np.repeat(np.arange(len(counts)), counts)
    x = np.arange(len(y), dtype=float)
    dataset = from_pairs({"train": (x[:, None], y)}, "made", "made", "classification", prepare=False)
    splits = split(dataset, seed=seed, valid=valid, test=test)
    parts = [splits.y_train, splits.y_valid] + ([splits.y_test] if test else [])
    assert sorted(all_rows(splits)[:, 0]) == sorted(x)
    for label, count in enumerate(counts):
        members = [int((part == label).sum()) for part in parts]
        assert min(members) >= 1
        assert sum(members) == count
        if min(valid, 1 - valid - test) * count >= 2 and (test == 0 or test * count >= 2):
            assert abs(members[1] - valid * count) <= 0.5 + 1e-9
    again = split(dataset, seed=seed, valid=valid, test=test)
    assert again.fingerprint == splits.fingerprint


def test_another_seed_gives_another_split() -> None:
    digits = load("digits")
    assert split(digits, seed=0).fingerprint == split(digits, seed=0).fingerprint
    assert split(digits, seed=0).fingerprint != split(digits, seed=1).fingerprint


def test_no_test_part_on_request() -> None:
    splits = split(load("wine"), test=0)
    assert splits.x_test.shape == (0, 13)
    assert splits.y_test.shape == (0,)


@pytest.mark.parametrize(("valid", "test"), [(0, 0.2), (0.2, -0.1), (0.5, 0.5), (float("nan"), 0.2)])
def test_shares_must_leave_something_to_train_on(valid: float, test: float) -> None:
    with pytest.raises(StudyError, match="both together below 1"):
        split(load("wine"), valid=valid, test=test)


def test_a_class_needs_a_member_for_each_part(tmp_path: Path) -> None:
    x, y = arrays(30)
    y[y == 2] = 0
    y[5] = 2
    np.savez(tmp_path / "a.npz", x=x, y=y)
    with pytest.raises(
        DataError, match=r"class '2' of 'y' needs 3 samples or more.*training, test and valid; it has 1"
    ):
        split(load(str(tmp_path / "a.npz")))


def test_a_class_must_be_in_the_training_part() -> None:
    x, y = arrays(12)
    with pytest.raises(DataError, match="class '2' is only in the valid part"):
        from_parts((x[y < 2], y[y < 2]), (x, y))


def test_a_training_part_of_one_value_is_refused() -> None:
    x, y = arrays(12)
    with pytest.raises(DataError, match=r"training part needs two different values of 'y'.*its 4 samples have one"):
        from_parts((x[y == 0], y[y == 0]), (x, y), task="regression")


# What a study keeps of its data


def test_saved_splits_come_back_whole(tmp_path: Path) -> None:
    splits = split(load("diabetes"))
    splits.save(tmp_path / "data.npz")
    back = Splits.load(tmp_path / "data.npz")
    assert back.fingerprint == splits.fingerprint
    assert back.describe() == splits.describe()
    np.testing.assert_array_equal(back.x_test, splits.x_test)
    assert [path.name for path in tmp_path.iterdir()] == ["data.npz"]


@pytest.mark.parametrize("name", ["wine", "diabetes"])
def test_the_constant_score_is_that_of_a_dummy(name: str) -> None:
    parts = split(load(name), seed=0, valid=0.2, test=0.3)
    x, y = np.zeros((len(parts.y_train), 1)), parts.y_train * parts.target_std + parts.target_mean
    if parts.classes:
        expected = float(np.mean(DummyClassifier().fit(x, y).predict(parts.x_test) != parts.y_test))
    else:
        truth = parts.y_test * parts.target_std + parts.target_mean
        expected = root_mean_squared_error(truth, DummyRegressor().fit(x, y).predict(parts.x_test))
    assert parts.constant_score("test") == pytest.approx(expected, rel=1e-5)
    assert set(split(load(name), seed=0, valid=0.2, test=0.0).describe()["constant"]) == {"valid"}


def test_the_description_is_plain_json() -> None:
    described = split(load("wine")).describe()
    assert json.loads(json.dumps(described)) == described
    assert described["num_train"] + described["num_valid"] + described["num_test"] == 178
    assert described["classes"] == ["class_0", "class_1", "class_2"]


@pytest.mark.parametrize("field", ["x_train", "y_valid", "x_test"])
def test_the_fingerprint_is_of_the_contents(field: str) -> None:
    splits = split(load("wine"))
    before = splits.fingerprint
    assert len(before) == 16
    values = {name: getattr(splits, name) for name in splits.__dataclass_fields__}
    values[field] = values[field].copy()
    values[field].flat[0] += 1
    assert Splits(**values).fingerprint != before


@pytest.mark.parametrize("damage", ["cut", "other", "changed"])
def test_damaged_splits_are_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "data.npz"
    splits = split(load("wine"))
    splits.save(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:2000])
    elif damage == "other":
        np.savez(path, x=np.zeros(3))
    else:
        with np.load(path) as file:
            stored = {name: file[name] for name in file.files}
        stored["y_test"] = stored["y_test"][::-1]
        np.savez(path, **stored)
    with pytest.raises(DataError, match=r"cannot be read|not those that were saved"):
        Splits.load(path)


def test_missing_splits_are_no_damage(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Splits.load(tmp_path / "none.npz")


# The task


@pytest.mark.parametrize(
    ("values", "task", "classes"),
    [
        (np.array(["b", "a", "b"]), "classification", ("a", "b")),
        (np.array([True, False, True]), "classification", ("False", "True")),
        (np.array([0, 1, 2] * 4), "classification", ("0", "1", "2")),
        (np.array([10.0, 2.0] * 4), "classification", ("2", "10")),
        (np.array([0.5, 1.5] * 4), "regression", ()),
        (np.arange(12), "regression", ()),
        (np.arange(900) % 21, "regression", ()),
        (np.arange(900) % 20, "classification", tuple(str(label) for label in range(20))),
    ],
)
def test_the_task_is_recognised(values: np.ndarray, task: str, classes: tuple[str, ...]) -> None:
    target = recognise(values, "kind")
    assert target.task == task
    assert target.classes == classes
    assert "overrides" in target.note
    if classes:
        assert [classes[index] for index in target.y] == [str(value).removesuffix(".0") for value in values]


def test_the_task_can_be_said() -> None:
    grades = np.array([1, 2, 3, 4] * 6)
    assert recognise(grades, "grade", "regression").y.dtype == np.float64
    assert len(recognise(np.resize(np.arange(12), 30), "id", "classification").classes) == 12
    with pytest.raises(StudyError, match="got 'classify'"):
        recognise(grades, "grade", "classify")


def test_text_in_a_numeric_target_is_named() -> None:
    values = np.array([f"{number / 4}" for number in range(30)] + ["n/k"])
    with pytest.raises(DataError, match=r"'y' must hold numbers; it has n/k in sample 30 .* --task classification"):
        recognise(values, "y")
    with pytest.raises(DataError, match="it has low in sample 1 "):
        recognise(np.array(["1", "low", "2"]), "y", "regression")


@pytest.mark.parametrize("y", [np.linspace(0, 1, 60), np.arange(60)])
def test_numbers_that_never_repeat_are_no_classes(tmp_path: Path, y: np.ndarray) -> None:
    np.savez(tmp_path / "a.npz", x=arrays()[0], y=y)
    with pytest.raises(DataError, match=r"'y' has 60 different values in 60 samples.*no classes; write --task regr"):
        load(str(tmp_path / "a.npz"), task="classification")


def test_text_that_never_repeats_is_no_class() -> None:
    with pytest.raises(DataError, match=r"'name' has 3 different values in 3 samples.*choose another target"):
        recognise(np.array(["a", "b", "c"]), "name")


def test_a_target_of_one_value_is_refused() -> None:
    with pytest.raises(DataError, match="'y' is 1 in all 3 samples"):
        recognise(np.array([1, 1, 1]), "y")


# Arrays


def test_npz_parts_are_kept(tmp_path: Path) -> None:
    x, y = arrays(60)
    path = tmp_path / "parts.npz"
    np.savez(path, X_train=x[:30], Y_train=y[:30], x_val=x[30:45], y_val=y[30:45], x_test=x[45:], y_test=y[45:])
    splits = split(load(str(path)))
    np.testing.assert_array_equal(splits.y_train, y[:30])
    np.testing.assert_array_equal(splits.y_valid, y[30:45])
    np.testing.assert_array_equal(splits.y_test, y[45:])
    np.testing.assert_allclose(splits.x_test, StandardScaler().fit(x[:30]).transform(x[45:]), rtol=1e-5, atol=1e-6)


def test_images_get_their_channels_second(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (20, 5, 6), dtype=np.uint8)
    colour = rng.normal(size=(20, 5, 6, 3))
    for name, x, shape in (("grey", grey, (1, 5, 6)), ("colour", colour, (3, 5, 6))):
        np.savez(tmp_path / f"{name}.npz", x=x, y=np.arange(20) % 2)
        splits = split(load(str(tmp_path / f"{name}.npz")))
        assert splits.input_shape == shape
        assert any(str(x.shape) in note for note in splits.notes)
    values = split(load(str(tmp_path / "colour.npz")), test=0, valid=0.1)
    middle = np.sort(colour[..., 1].ravel())
    got = np.sort(all_rows(values)[:, 1].ravel())
    assert np.corrcoef(middle, got)[0, 1] > 0.999999


@pytest.mark.parametrize("shape", [(60, 5, 5, 3), (60, 3, 5, 5), (60, 5, 6, 3), (60, 3, 3, 3), (60, 5, 5, 2)])
def test_images_of_ready_parts_with_channels_last_are_noted_and_left(shape: tuple[int, ...]) -> None:
    x, y = np.zeros(shape), np.arange(60) % 2
    splits = from_parts((x, y), (x, y))
    assert splits.input_shape == shape[1:]
    noted = [note for note in splits.notes if "channels last" in note and "x.transpose(0, 3, 1, 2)" in note]
    assert len(noted) == (shape == (60, 5, 5, 3))


def test_npz_needs_x_and_y(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", inputs=np.zeros(3), y=np.zeros(3))
    with pytest.raises(DataError, match=r"must hold the arrays x and y.*it holds inputs, y"):
        load(str(tmp_path / "a.npz"))


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut"])
def test_a_broken_npz_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.npz: cannot be read"):
        load(str(tmp_path / "a.npz"))


@pytest.mark.parametrize("content", ["text", "npy"])
def test_what_is_no_npz_is_not_called_a_pickle(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.npz"
    if content == "npy":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    else:
        path.write_text("x")
    with pytest.raises(DataError, match=r"a\.npz: .*it is no \.npz file; write one with numpy\.savez"):
        load(str(path))


def test_npz_with_objects_is_not_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.array([{"a": 1}], dtype=object), y=np.zeros(1))
    with pytest.raises(DataError, match="plain arrays"):
        load(str(tmp_path / "a.npz"))


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((0, 2)), np.zeros(0), r"there must be samples; x has the shape \(0, 2\)"),
        (np.zeros((4, 0)), np.zeros(4), "without an empty axis"),
        (np.array([["a"], ["b"]]), np.zeros(2), "x must be numbers"),
        (np.zeros((4, 2)), np.zeros(3), r"y must have the shape \(4,\).*got \(3,\)"),
        (np.zeros((3, 2)), np.eye(3), r"y\.argmax\(1\)"),
        (np.zeros((3, 2)), np.full((3, 2), 0.5), r"got \(3, 2\)"),
        (np.array([[1.0, 2.0], [3.0, np.nan]]), np.arange(2), r"x must hold finite values.*nan at index \[1, 1\]"),
        (np.array([[1.0, -np.inf], [3.0, 4]]), np.arange(2), r"-inf at index \[0, 1\] and 0 more"),
        (np.array([[1.0, 1e31], [3.0, 4]]), np.arange(2), r"1e\+31 at index \[0, 1\]"),
        (np.zeros((2, 1)), np.array([1.0, np.nan]), r"y must hold finite values.*index \[1\]"),
        (np.zeros((2, 1)), np.array(["a", None]), r"y must hold finite values.*None at index \[1\]"),
        ([[1.0], [2.0, 3.0]], np.zeros(2), "all samples must have one shape"),
    ],
)
def test_arrays_that_cannot_be_used(x: object, y: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_parts((x, y), (np.zeros((2, 1)), np.arange(2)))


def test_parts_must_have_one_shape() -> None:
    with pytest.raises(DataError, match=r"training part have \(3,\), those of the valid part \(2,\)"):
        from_parts(arrays(), arrays(features=2))


@pytest.mark.parametrize("samples", [np.zeros((3, 2)), "text", (1, 2, 3), None, [np.zeros(3), np.zeros(3)]])
def test_samples_must_be_a_pair_or_a_dataset(samples: object) -> None:
    with pytest.raises(DataError, match="must be a tuple \\(x, y\\)"):
        from_parts(samples, arrays())


def test_half_precision_is_read_without_a_warning_and_its_infinity_refused(tmp_path: Path) -> None:
    x, y = arrays()
    half = x.astype(np.float16)
    np.savez(tmp_path / "half.npz", x=half, y=y)
    np.testing.assert_array_equal(load(str(tmp_path / "half.npz")).x, half)
    half[1] = np.inf
    np.savez(tmp_path / "half.npz", x=half, y=y)
    with pytest.raises(DataError, match="it has inf at index"):
        load(str(tmp_path / "half.npz"))


def test_tensors_and_torch_datasets_are_taken_as_they_are() -> None:
    x, y = arrays()
    tensors = (torch.tensor(x, requires_grad=True), torch.tensor(y))
    half = (tensors[0].bfloat16(), tensors[1][:, None])
    splits = from_parts(TensorDataset(*tensors), tensors, half)
    for part in (splits.x_train, splits.x_valid):
        np.testing.assert_array_equal(part, x.astype(np.float32))
    np.testing.assert_allclose(splits.x_test, x, rtol=2**-8)
    np.testing.assert_array_equal(splits.y_test, y)
    assert splits.classes == ("0", "1", "2")


def test_a_regression_target_is_standardized_with_the_training_part() -> None:
    x, _ = arrays()
    y = 100 + 3 * x[:, 0]
    splits = from_parts((x[:40], y[:40]), (x[40:], y[40:]))
    assert splits.num_outputs == 1
    np.testing.assert_allclose(splits.y_valid, (y[40:] - y[:40].mean()) / y[:40].std(), rtol=1e-5)


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self):  # type: ignore[no-untyped-def]
        yield from ()


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Stream(), "must have a length and an index; got Stream"),
        (TensorDataset(torch.zeros(0, 2), torch.zeros(0)), "the torch Dataset is empty"),
        (TensorDataset(torch.zeros(3, 2)), "must give pairs"),
    ],
)
def test_torch_datasets_that_cannot_be_used(dataset: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_parts(dataset, arrays())


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_a_feature_that_is_the_target_is_refused(tmp_path: Path, task: str) -> None:
    x, y = arrays()
    x[:, 1] = y if task == "regression" else np.array([4.5, -1, 7])[y]
    np.savez(tmp_path / "a.npz", x=x, y=y)
    with pytest.raises(DataError, match=r"x\[:, 1\] is the target 'y' itself or a relabelling"):
        load(str(tmp_path / "a.npz"), task=task)


def test_no_column_is_accused_where_each_sample_is_a_class_of_its_own(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=arrays()[0], y=[f"name {index}" for index in range(60)])
    with pytest.raises(DataError, match=r"class 'name 0' of 'y' needs 3 samples or more"):
        split(load(str(tmp_path / "a.npz"), task="classification"))


def test_a_feature_that_only_helps_is_allowed(tmp_path: Path) -> None:
    x, y = arrays()
    x[:, 1] = y == 1  # two classes share a value
    np.savez(tmp_path / "a.npz", x=x, y=y)
    assert load(str(tmp_path / "a.npz")).target.classes == ("0", "1", "2")


# Functions

CODE = """
from dataclasses import dataclass
import numpy as np
import torch
from torch.utils.data import TensorDataset
import beside

def pair():
    return beside.X, beside.Y

def parts():
    return (beside.X[:40], beside.Y[:40]), TensorDataset(torch.tensor(beside.X[40:]), torch.tensor(beside.Y[40:]))

def three():
    return parts()[0], parts()[0], parts()[0]

def whole():
    return TensorDataset(torch.tensor(beside.X), torch.tensor(beside.Y))

def late():
    import later
    return later.value

def fails():
    raise KeyError("gone")

def nothing():
    return None

number = 3
"""
BESIDE = "import numpy as np\nX = np.random.default_rng(0).normal(5, 2, (60, 3))\nY = np.arange(60) % 3\n"


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "made_data.py").write_text(CODE)
    (tmp_path / "beside.py").write_text(BESIDE)
    (tmp_path / "later.py").write_text("from beside import X, Y\nvalue = (X, Y)\n")
    monkeypatch.chdir(tmp_path)
    # so that each test imports its own copies
    for name in ("made_data", "beside", "later"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


@pytest.mark.parametrize("function", ["pair", "whole", "late"])
@pytest.mark.parametrize("module", ["made_data", "made_data.py"])
def test_a_function_that_gives_all_samples(code: Path, module: str, function: str) -> None:
    splits = split(load(f"{module}:{function}"))
    assert splits.name == function
    assert [len(splits.y_train), len(splits.y_valid), len(splits.y_test)] == [36, 12, 12]
    np.testing.assert_allclose(splits.x_train.mean(0), 0, atol=1e-6)


def test_a_function_that_gives_parts(code: Path) -> None:
    splits = split(load(f"{code / 'made_data.py'}:parts"))
    x = np.random.default_rng(0).normal(5, 2, (60, 3)).astype(np.float32)
    np.testing.assert_array_equal(splits.x_train, x[:40])
    np.testing.assert_array_equal(splits.x_valid, x[40:])
    assert len(splits.x_test) == 0
    assert len(split(load("made_data:three")).x_test) == 40


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("made_data:fails", "the function raised KeyError: 'gone'"),
        ("made_data:nothing", "got NoneType"),
        ("made_data:absent", "it has no function 'absent'"),
        ("made_data:number", "it has no function 'number'"),
        ("not_there:f", "No module named 'not_there'"),
        ("not_there.py:f", r"there is no file 'not_there\.py'"),
    ],
)
def test_functions_that_cannot_be_used(code: Path, source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(source)


def test_code_that_does_not_parse_is_named(code: Path) -> None:
    (code / "wrong.py").write_text("def f(:\n")
    with pytest.raises(DataError, match=r"'wrong\.py' must be importable; it raised SyntaxError"):
        load("wrong.py:f")


# Sources that are not there


def test_unknown_sources_get_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did you mean 'digits'"):
        load("digit")
    (tmp_path / "houses.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"did you mean 'houses\.csv'"):
        load(str(tmp_path / "house.csv"), target="b")


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_text("")
    with pytest.raises(DataError, match=r"must be one of \.csv, \.tsv, \.parquet, \.npz"):
        load(str(tmp_path / "a.xlsx"))


def test_only_a_table_has_a_target() -> None:
    with pytest.raises(DataError, match="'digits' is none"):
        load("digits", target="digit")
