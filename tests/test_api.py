"""The comparison from Python: on the user's own model and data, and on sources by name."""

from __future__ import annotations

import copy
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import torch
from torch import nn

import renorm.comparison
from renorm.comparison import Comparison, Study, run_study
from renorm.comparison.api import run_study as run_study_itself
from renorm.comparison.spec import TrialSpec
from renorm.errors import DataError, StudyError, SwapError
from renorm.norms.norm import Norm


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))


def quick(model: Any, *data: Any, folder: Path, **settings: Any) -> Comparison:
    given = {"norm": "batch,layer", "batch_size": 8, "seeds": 2, "epochs": 2, "jobs": 1, "progress": False}
    # The package is called, as users do who write rn.compare(...).
    return renorm.compare(model, *(data or small.parts()), folder=folder, **{**given, **settings})


def first_losses(comparison: Comparison) -> list[float]:
    return [result.curve[0].valid_loss for result in comparison.results]


def test_a_module_is_compared_with_each_norm_and_left_as_it_was(tmp_path: Path) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    comparison = quick(model, folder=tmp_path)
    assert [(r.spec.norm, r.spec.seed, r.status) for r in comparison.results] == [
        ("batch", 0, "ok"), ("batch", 1, "ok"), ("layer", 0, "ok"), ("layer", 1, "ok"),
    ]  # fmt: skip
    assert type(model[1]) is nn.BatchNorm1d  # type: ignore[index]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert comparison.folder == tmp_path / "python-Sequential"
    assert any("the given model's own weights" in note for note in comparison.record.data["notes"])
    assert "1 norms of the model give way to each norm" in comparison.record.data["notes"]


def test_a_module_gives_its_weights_to_every_trial_and_a_builder_new_ones_to_each_seed(tmp_path: Path) -> None:
    # A step that changes nothing: the losses are those of the initial weights.
    still: dict[str, Any] = {"norm": "batch", "lr": 1e-30, "epochs": 1, "batch_size": 48}
    of_module = first_losses(quick(net(), folder=tmp_path / "module", **still))
    of_builder = first_losses(quick(net, folder=tmp_path / "builder", **still))
    assert of_module[0] == pytest.approx(of_module[1])
    assert of_builder[0] != pytest.approx(of_builder[1])


def test_the_norms_that_give_way_can_be_chosen(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    comparison = quick(model, folder=tmp_path, norm="rms,none", replace="layer", seeds=1)
    assert {result.status for result in comparison.results} == {"ok"}
    assert "BatchNorm1d(8" in comparison.record.model
    assert "LayerNorm" not in comparison.record.model
    with pytest.raises(SwapError):
        quick(model, folder=tmp_path, replace="instance")


def test_the_same_call_reads_what_is_kept_and_another_model_does_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = net()
    first = quick(model, folder=tmp_path)
    files = {path: path.stat().st_mtime_ns for path in (first.folder / "trials").iterdir()}
    again = quick(copy.deepcopy(model), folder=tmp_path)
    assert again.results == first.results
    assert {path: path.stat().st_mtime_ns for path in (first.folder / "trials").iterdir()} == files
    with torch.no_grad():
        model[0].weight[0, 0] += 1  # type: ignore[index,operator]
    quick(model, folder=tmp_path)
    assert len(list((first.folder / "trials").iterdir())) == 2 * len(files)


def test_a_class_from_the_main_script_reaches_the_workers(tmp_path: Path) -> None:
    class Local(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x)  # type: ignore[no-any-return]

    comparison = quick(Local, folder=tmp_path, jobs=2)
    assert {(result.status, result.reason) for result in comparison.results} == {("ok", "")}


def test_a_model_from_a_module_that_workers_cannot_import_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("only_in_this_process")
    exec("from torch import nn\ndef build(): return nn.BatchNorm1d(2)", module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    comparison = quick(module.build, folder=tmp_path, jobs=2, seeds=1)
    assert {result.status for result in comparison.results} == {"failed"}
    assert "No module named 'only_in_this_process'" in comparison.results[0].reason


def test_a_built_in_model_takes_a_data_source(tmp_path: Path) -> None:
    data = small.csv(tmp_path / "table.csv")
    comparison = quick("mlp", str(data), folder=tmp_path, target="kind", seeds=1)
    assert comparison.record.name == "table-mlp"
    assert comparison.record.data["classes"] == ["down", "up"]
    assert comparison.record.command.startswith(f"renorm compare --data {data} --target kind")


def test_without_a_test_part_the_validation_part_gives_the_scores(tmp_path: Path) -> None:
    comparison = quick("mlp", *small.parts()[:2], folder=tmp_path, seeds=1)
    assert comparison.record.data["num_test"] == 0
    assert all(result.test == {} and not result.spec.test for result in comparison.results)
    expected = [result.valid["error"] for result in comparison.results]
    assert sorted(comparison.table()["mean"]) == pytest.approx(sorted(expected))


def test_a_regression_is_seen_from_the_target(tmp_path: Path) -> None:
    pairs = [(x, x[:, 0] * 3 + 0.5) for x, _ in small.parts()]
    comparison = quick("mlp", *pairs, folder=tmp_path, seeds=1)
    assert comparison.record.task == "regression"
    assert {"rmse", "r2"} <= set(comparison.results[0].test)


def test_the_table_has_the_mean_over_seeds_of_each_norm(tmp_path: Path) -> None:
    comparison = quick(net, folder=tmp_path, seeds=3)
    table = comparison.table().set_index("norm")
    for norm in ("batch", "layer"):
        errors = [r.test["error"] for r in comparison.results if r.spec.norm == norm]
        assert table.loc[norm, "mean"] == pytest.approx(np.mean(errors))
        assert table.loc[norm, "num_seeds"] == 3
    assert comparison.table().attrs["score"] == "test error (error)"


def test_the_best_is_the_lowest_mean_with_those_not_shown_to_differ(tmp_path: Path) -> None:
    comparison = quick(net, folder=tmp_path, batch_size=[4, 8])
    table = comparison.table()
    assert comparison.best().row.score.mean == table["mean"].min()
    at_8 = comparison.best(8)
    assert at_8.row.setting.batch_size == 8
    assert at_8.row.score.mean == table[table["batch_size"] == 8]["mean"].min()
    # Two seeds are too few to show a difference.
    assert {at_8.norm, *(row.norm for row in at_8.not_different)} == {"batch", "layer"}
    with pytest.raises(StudyError, match="the batch sizes are 4, 8; got 16"):
        comparison.best(16)


def test_there_is_no_best_where_nothing_finished(tmp_path: Path) -> None:
    comparison = quick("mlp", folder=tmp_path, norm="instance", seeds=1)
    assert comparison.results[0].status == "refused"
    with pytest.raises(StudyError, match="no trial finished"):
        comparison.best()


def test_the_report_is_one_file(tmp_path: Path) -> None:
    comparison = quick(net, folder=tmp_path, seeds=1)
    assert comparison.report() == comparison.folder / "report.html"
    assert comparison.report(tmp_path / "mine.html").read_text(encoding="utf-8").startswith("<!")


def test_a_notebook_shows_the_sentence_and_the_table_escaped(tmp_path: Path) -> None:
    pairs = [(x, np.where(y, "<b>up", "down")) for x, y in small.parts()]
    shown = quick("mlp", *pairs, folder=tmp_path, seeds=1)._repr_html_()
    assert "<table" in shown
    assert "<b>up" not in shown


def test_a_folder_gives_the_comparison_back(tmp_path: Path) -> None:
    comparison = quick(net, folder=tmp_path)
    back = Comparison.load(comparison.folder)
    assert (back.record, back.results) == (comparison.record, comparison.results)
    (comparison.folder / "trials" / f"{comparison.results[0].spec.key}.json").write_text("{")
    back = Comparison.load(comparison.folder)
    assert back.results == comparison.results[1:]
    assert "is damaged" in back.notes[0]


# tuning


def test_tuning_chooses_on_the_validation_part_and_reads_the_test_part_for_the_chosen_only(tmp_path: Path) -> None:
    rates = (1e-6, 0.5, 1.0)
    comparison = quick(net, folder=tmp_path, lr=rates, tune_lr=True, epochs=4)
    kept = [json.loads(path.read_text()) for path in (comparison.folder / "trials").iterdir()]
    tried = [raw for raw in kept if not raw["spec"]["test"]]
    assert len(tried) == 2 * 3 * 2
    assert all(raw["test"] == {} for raw in tried)
    assert len(kept) - len(tried) == len(comparison.results) == 2 * 2
    for norm in ("batch", "layer"):

        def badness(rate: float, norm: str = norm) -> tuple[float, float, float]:
            trials = [r for r in tried if r["spec"]["norm"] == norm and r["spec"]["base_lr"] == rate]
            return (*(math.fsum(trial["valid"][key] for trial in trials) for key in ("error", "loss")), rate)

        chosen = {r.spec.base_lr for r in comparison.results if r.spec.norm == norm}
        assert chosen == {min(rates, key=badness)}
    assert [line.partition(",")[0] for line in comparison.record.settings["tuning"]] == ["batch", "layer"]


# bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "bach"}, "did you mean 'batch'"),
        ({"batch_size": 1000}, "a batch must fit into the training part of 48 samples"),
        ({"jobs": 0}, "jobs must be at least 1"),
        ({"backend": "threading"}, "backend 'threading' cannot run trials"),
        ({"activation": "gelu"}, "activation is for built-in models"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_written(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        quick(net, folder=tmp_path, **settings)
    assert list(tmp_path.iterdir()) == []


def test_arrays_need_a_validation_part(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="valid must be given"):
        quick(net, small.parts()[0], folder=tmp_path)


def test_parts_beside_a_data_source_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="valid and test must be left out where train is a data source"):
        quick("mlp", "wine", small.parts()[1], folder=tmp_path)


def test_a_model_that_no_norm_fits_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="model 'resnet' takes images"):
        quick("resnet", folder=tmp_path)
    with pytest.raises(SwapError):
        quick(nn.Linear(2, 2), folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def breaks() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def test_a_model_that_cannot_take_the_data_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"must take samples of the shape \(2,\); it raised RuntimeError: mat1"):
        quick(breaks, folder=tmp_path, seeds=1)
    assert not list(tmp_path.iterdir())


def test_the_package_is_what_the_public_function_is() -> None:
    assert run_study is run_study_itself
    assert callable(renorm.compare)
    assert sorted(renorm.comparison.__all__) == dir(renorm.comparison)
    with pytest.raises(AttributeError, match="no attribute 'zzz'"):
        _ = renorm.comparison.zzz
    with pytest.raises(StudyError, match="unknown setting"):
        Study(zzz=1)


def test_a_swapped_model_has_the_norm_of_its_spec() -> None:
    from renorm.comparison.given import Given

    (spec,) = small.specs(norm="group(4)", seeds=1)
    model = Given(net())(spec, small.splits())
    assert isinstance(spec, TrialSpec)
    assert [type(module).__name__ for module in model.modules() if isinstance(module, Norm)] == ["GroupNorm"]
