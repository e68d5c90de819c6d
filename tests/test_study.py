"""The study: what its settings accept and refuse, and the grid they mean."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import small

from renorm.comparison.study import RATES, Study, grid, num_steps
from renorm.errors import StudyError, UnknownNormError


def test_the_default_study_is_the_one_the_command_line_promises() -> None:
    study = Study()
    assert (study.name, study.data, study.model) == ("digits-mlp", "digits", ("mlp",))
    assert study.norm == ("none", "batch", "layer", "group", "rms", "switch")
    assert (study.batch_size, study.seeds, study.lr) == ((2, 32), (0, 1, 2), (0.1,))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("batch,group(8)", ("batch", "group(8)")),
        (["batch, layer", "rms"], ("batch", "layer", "rms")),
        (("batch", "batch"), ("batch",)),
        ("group,group(32)", ("group",)),
        (" Batch ", ("batch",)),
        (["n (g [c]) [...] g=8"], ("n (g [c]) [...] g=8",)),
    ],
)
def test_norms_are_read_from_text_and_lists(given: object, expected: tuple[str, ...]) -> None:
    assert Study(norm=given).norm == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [(3, (0, 1, 2)), ("3", (0, 1, 2)), ([7, 9], (7, 9)), ("7,9", (7, 9)), ("7,", (7,))],
)
def test_seeds_are_a_number_or_the_seeds(given: object, expected: tuple[int, ...]) -> None:
    assert Study(seeds=given).seeds == expected


def test_numbers_may_come_as_text() -> None:
    study = Study(batch_size="2, 32", lr=["0.1", "1"], epochs="4")
    assert (study.batch_size, study.lr, study.epochs) == ((2, 32), (0.1, 1.0), 4)


@pytest.mark.parametrize(
    ("data", "model", "name"),
    [
        ("digits", "resnet", "digits-resnet"),
        ("some/where/my prices.csv", "mlp", "my-prices-mlp"),
        ("package.module:load", "nets.py:build", "load-build"),
        ("../..", "mlp", "study-mlp"),
    ],
)
def test_the_name_comes_from_data_and_model(data: str, model: str, name: str) -> None:
    assert Study(data=data, model=model).name == name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nrom": "batch"}, "unknown setting 'nrom': did you mean 'norm'"),
        ({"zzz": 1}, "unknown setting 'zzz': known are data, target"),
        ({"norm": "bach"}, "did you mean 'batch'"),
        ({"norm": ""}, "norm: .*got nothing; write for example batch"),
        ({"batch_size": 0}, r"batch_size: .*greater than or equal to 1; got 0; write whole numbers"),
        ({"batch_size": "2,al"}, "batch_size: .*valid integer.*got 'al'; write whole numbers.* or all for the whole"),
        ({"batch_size": "two"}, "batch_size: .*valid integer.*got 'two'"),
        ({"lr": -0.1}, "lr: .*greater than 0; got -0.1"),
        ({"lr": float("inf")}, "lr: .*finite number; got inf"),
        ({"optimizer": "adm"}, "optimizer must be one of .*; got 'adm'; did you mean 'adam'"),
        ({"activation": "rleu"}, "activation must be one of .*did you mean 'relu'"),
        ({"model": "mpl"}, "model .*must be one of .*did you mean 'mlp'"),
        ({"seeds": 0}, "seeds: must be at least one; got 0; write a number of seeds"),
        ({"seeds": -1}, "seeds: .*got -1"),
        ({"dropout": 1}, "^dropout: .*less than 1; got 1; write shares from 0 on and below 1, for example 0,0.2$"),
        ({"tune_lr": True, "lr": "0.1,0.10"}, "at least two learning rates"),
        ({"seeds": "-1,2"}, "seeds: .*got '-1'"),
        ({"epochs": 0}, "epochs: .*got 0"),
        ({"task": "ranking"}, "task: .*'classification'.*got 'ranking'"),
        ({"valid": 0}, "valid: .*got 0; write a share between"),
        ({"test": 1}, "test: .*less than 1; got 1"),
        ({"name": "../up"}, "name: .*got '../up'; write a folder's name"),
        ({"lr_scale": "sqrt"}, "lr_scale: .*got 'sqrt'"),
        ({"tune_lr": True, "lr": 0.1}, "at least two learning rates.*got lr = 0.1"),
    ],
)
def test_a_wrong_setting_is_refused_with_what_to_write(settings: dict[str, object], message: str) -> None:
    with pytest.raises((StudyError, UnknownNormError), match=message):
        Study(**settings)


def test_a_number_that_is_written_twice_is_one_value() -> None:
    assert Study(dropout="0,0.0,0.5").dropout == (0.0, 0.5)


def test_tuning_without_rates_tries_the_default_ones() -> None:
    assert Study(tune_lr=True).lr == RATES
    assert Study(tune_lr=True, lr="0.1,1").lr == (0.1, 1.0)


def test_a_study_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Study().epochs = 3  # type: ignore[misc]


def test_settings_give_the_study_back() -> None:
    study = Study(norm="batch,group(8)", seeds="4,5", lr=[0.01, 0.1], tune_lr=True, name="mine")
    assert Study(**study.settings()) == study


# the study file


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_says_the_same_as_arguments(tmp_path: Path) -> None:
    file = write(tmp_path / "s.toml", 'data = "wine"\nnorm = ["batch", "rms"]\nbatch-size = 4\nseeds = [1, 2]\n')
    assert Study.from_toml(file) == Study(data="wine", norm="batch,rms", batch_size=4, seeds=[1, 2])


def test_arguments_override_a_file(tmp_path: Path) -> None:
    file = write(tmp_path / "s.toml", 'epochs = 3\nnorm = "rms"\n')
    assert Study.from_toml(file, epochs=7) == Study(epochs=7, norm="rms")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('nrom = "batch"', r"s\.toml: unknown setting 'nrom': did you mean 'norm'"),
        ("norm = = 1", r"s\.toml is not valid TOML: .*line 1"),
        ("epochs = 0", "epochs: .*got 0"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(StudyError, match=message):
        Study.from_toml(write(tmp_path / "s.toml", text))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"no study file at .*none\.toml"):
        Study.from_toml(tmp_path / "none.toml")
    with pytest.raises(StudyError, match="cannot be read as a study file"):
        Study.from_toml(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    with pytest.raises(StudyError, match="cannot be read as a study file"):
        Study.from_toml(tmp_path / "latin.toml")


# the grid


def test_the_grid_is_every_combination_once_seeds_innermost() -> None:
    study = small.study(norm="batch,layer", batch_size=[4, 8], optimizer="sgd,adam", lr=[0.1, 1], seeds=2)
    specs = grid(study, small.splits())
    expected = itertools.product(study.norm, study.batch_size, study.optimizer, study.lr, study.seeds)
    assert [(s.norm, s.batch_size, s.optimizer, s.base_lr, s.seed) for s in specs] == list(expected)
    assert len({spec.key for spec in specs}) == len(specs)


@pytest.mark.parametrize(("scale", "rates"), [("linear", [0.1 * 4 / 32, 0.1]), ("none", [0.1, 0.1])])
def test_the_rate_is_scaled_to_the_batch_size(scale: str, rates: list[float]) -> None:
    specs = grid(small.study(norm="batch", batch_size=[4, 32], seeds=1, lr_scale=scale), small.splits())
    assert [spec.lr for spec in specs] == pytest.approx(rates)
    assert {spec.base_lr for spec in specs} == {0.1}


def test_the_grid_names_data_and_model() -> None:
    splits = small.splits()
    (spec,) = grid(small.study(norm="rms", seeds=[5]), splits, models=["python:abc"], test=False)
    assert (spec.data, spec.model, spec.seed, spec.test) == (splits.fingerprint, "python:abc", 5, False)


def test_a_batch_larger_than_the_training_part_is_refused() -> None:
    with pytest.raises(
        StudyError, match=r"training part of 48 samples; got batch_size 49; write .* at most 48, or all"
    ):
        grid(small.study(batch_size=[8, 49]), small.splits())


@pytest.mark.parametrize("given", ["all,16,1", ["all", 16, 1], ("all", "16", 1, 48)])
def test_the_whole_training_part_is_one_batch(given: object) -> None:
    """Batch, mini-batch and stochastic gradient descent; a size that is all by number too is kept once."""
    study = small.study(norm="rms", seeds=1, batch_size=given, epochs=3)
    specs = grid(study, small.splits())
    assert [spec.batch_size for spec in specs] == [48, 16, 1]
    assert [num_steps(spec, 48) for spec in specs] == [3, 9, 144]
    assert Study(**study.settings()) == study


def test_all_is_written_as_all() -> None:
    study = Study(batch_size="all,32,1")
    assert study.batch_size == ("all", 32, 1)
    assert study.command() == "renorm compare --batch-size all,32,1"


def test_the_number_of_steps_drops_incomplete_batches() -> None:
    (spec,) = grid(small.study(norm="rms", seeds=1, batch_size=10, epochs=3), small.splits())
    assert num_steps(spec, 48) == 3 * 4


def test_a_regression_has_a_learning_rate_of_its_own_unless_one_is_named() -> None:
    assert Study().for_task("classification").lr == (0.1,)
    assert Study().for_task("regression").lr == (0.01,)
    assert Study(lr=0.3).for_task("regression").lr == (0.3,)
    assert Study(tune_lr=True).for_task("regression").lr == RATES
    assert "--lr 0.01" in Study().for_task("regression").command()
