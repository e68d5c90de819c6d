"""The choices beside the norm: models, losses and dropout as axes of a study, and what differs between them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_up import record, result, spec, stopped
from sklearn.datasets import load_digits
from small import parts, splits, study
from torch import nn
from typer.testing import CliRunner

import renorm as rn
from renorm.cli import main
from renorm.comparison import Study, report
from renorm.comparison.analysis import analyse
from renorm.comparison.differences import between_choices
from renorm.comparison.spec import Setting, varying_fields
from renorm.comparison.study import grid
from renorm.comparison.trial import build_model, run_trial
from renorm.errors import StudyError


def test_every_combination_is_a_trial() -> None:
    plan = study(model="mlp,lstm", loss="auto,focal", dropout=[0, 0.5], seeds=1)
    specs = grid(plan, splits())
    assert len({spec.key for spec in specs}) == len(specs) == 2 * 2 * 2 * 2
    assert {spec.loss for spec in specs} == {"cross_entropy", "focal"}
    assert varying_fields(map(Setting.of, specs)) == ("model", "loss", "dropout")
    assert len(grid(study(loss="auto,cross_entropy", seeds=1), splits())) == 2  # the same loss by two names


def test_names_of_settings() -> None:
    assert Study(model="mlp,cnn").name == "digits-mlp-cnn"
    assert Study(model=["nets.py:wide", "nets.py:deep"]).model == ("nets.py:wide", "nets.py:deep")
    plan = Study(model="mlp,cnn", loss="focal", dropout="0,0.2")
    assert plan.command() == "renorm compare --model mlp,cnn --loss focal --dropout 0.0,0.2"
    assert Study(**plan.settings()) == plan


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "hubr"}, "loss must be one of auto, .*got 'hubr'; did you mean 'huber'"),
        ({"dropout": 1}, "dropout: .*got 1; write shares from 0 on and below 1"),
        ({"model": "mlp,resnt"}, r"model \(or module:function for your own\) must be one of .*did you mean 'resnet'"),
        ({"task": "forecast", "model": "tcn,resnet"}, "got resnet"),
    ],
)
def test_what_is_no_setting(settings: dict[str, object], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        Study(**settings)


def test_a_loss_of_another_task(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="'huber' is for a regression or a forecast"):
        rn.compare("mlp", *parts(), loss="huber", folder=tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def test_a_model_of_ones_own_brings_its_dropout(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="dropout is for built-in models"):
        rn.compare(nn.Linear(2, 2), *parts(), dropout=0.1, folder=tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def trained(**changes: object) -> dict[str, float]:
    (first, *_) = grid(study(seeds=1, norm="none"), splits())
    return run_trial(replace(first, **changes), splits()).valid  # type: ignore[arg-type]


def test_dropout_reaches_the_model() -> None:
    (first, *_) = grid(study(seeds=1, norm="none", dropout=0.3), splits())
    found = [module.p for module in build_model(first, splits()).modules() if isinstance(module, nn.Dropout)]
    assert found == [0.3, 0.3, 0.3]
    assert trained(dropout=0.3) == trained(dropout=0.3) != trained()


def test_the_loss_is_what_is_trained_with() -> None:
    (first, *_) = grid(study(seeds=1, norm="none", loss="focal", epochs=1, batch_size=48), splits())
    data = splits()
    torch.manual_seed(first.seed)
    model = build_model(first, data)
    order = np.random.default_rng([0, 0]).permutation(48)
    x, y = torch.tensor(data.x_train[order]), torch.tensor(data.y_train[order])
    logarithm = model(x).double().log_softmax(1)[torch.arange(48), y]
    loss = -((1 - logarithm.exp()) ** 2 * logarithm).mean()
    assert run_trial(first, data).curve[0].train_loss == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("loss", ["mse", "label_smoothing", "binary_cross_entropy", "multi_margin"])
def test_classes_are_learnt_with_any_loss(loss: str) -> None:
    found = trained(loss=loss, epochs=20, lr=0.05)
    assert found["error"] < 0.15


@pytest.mark.parametrize("loss", ["mae", "huber"])
def test_numbers_are_learnt_with_any_loss(tmp_path: Path, loss: str) -> None:
    x = np.linspace(-2, 2, 90)[:, None]
    y = 3 * x[:, 0] + 1
    one, two = (x[::3], y[::3]), (x[1::3], y[1::3])
    found = rn.compare(
        "mlp",
        one,
        two,
        norm="none",
        loss=loss,
        lr=0.1,
        batch_size=10,
        epochs=40,
        seeds=1,
        folder=tmp_path,
        progress=False,
    )
    (row,) = found.analysis.rows
    assert row.score.mean < 0.5  # of a deviation of 3.5
    assert found.table()["aic"].isna().all()


def test_a_comparison_of_choices(tmp_path: Path) -> None:
    digits = load_digits()
    x, y = digits.images[:300, None] / 16, digits.target[:300]
    found = rn.compare(
        ["mlp", "cnn"],
        (x[:200], y[:200]),
        (x[200:], y[200:]),
        norm=["none", "batch"],
        loss=["cross_entropy", "label_smoothing"],
        dropout=[0, 0.2],
        epochs=2,
        seeds=3,
        jobs=1,
        folder=tmp_path,
        progress=False,
    )
    frame = found.table()
    assert len(frame) == len(frame[["model", "loss", "dropout", "norm"]].drop_duplicates()) == 16
    assert frame[frame["loss"] == "cross_entropy"]["aic"].notna().all()
    assert frame[frame["loss"] == "label_smoothing"]["aic"].isna().all()
    assert found.record.model.startswith("mlp\n")
    assert "\n\ncnn\n" in found.record.model
    page = found.report().read_text()
    for words in (
        "Between models, losses and shares of dropout",
        "cnn, label smoothing loss, dropout 0.2",
        "batch norm, cnn",
        "[n] c [...]",
        "<code>[n] c</code>",
    ):
        assert words in page
    assert "loss=('cross_entropy', 'label_smoothing')" in found.record.command


def test_models_of_ones_own_beside_a_built_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = "nn.Sequential(nn.Linear(4, {0}), nn.BatchNorm1d({0}), nn.ReLU(), nn.Linear({0}, 2))"
    functions = [f"def {name}(): return {layers.format(width)}" for name, width in (("narrow", 3), ("wide", 9))]
    (tmp_path / "nets.py").write_text("\n".join(["from torch import nn", *functions]))
    rows = ["a,b,c,d,kind", *(f"{i},{i % 7},{i % 3},{i % 5},{'up' if i % 7 > 3 else 'down'}" for i in range(60))]
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    monkeypatch.chdir(tmp_path)
    arguments = (
        "compare --data t.csv --target kind --model mlp,nets.py:narrow --model nets.py:wide --seeds 1 --epochs 1"
    )
    done = CliRunner().invoke(main, [*arguments.split(), "--norm", "batch", "--batch-size", "8", "--jobs", "1"])
    assert done.exit_code == 0, done.output
    found = rn.comparison.Comparison.load("renorm-runs/t-mlp-narrow-wide")
    assert [row.setting.model.partition("@")[0] for row in found.analysis.rows] == [
        "mlp",
        "nets.py:narrow",
        "nets.py:wide",
    ]
    assert len({row.num_parameters for row in found.analysis.rows}) == 3
    assert any(note.startswith("narrow: ") for note in found.record.data["notes"])


# What differs


def test_choices_are_compared_norm_by_norm() -> None:
    results = [
        result(spec(norm, size, seed, loss=loss, optimizer=optimizer), 0.1 + 0.1 * at + 0.001 * seed)
        for norm in ("batch", "layer")
        for size in (2, 32)
        for seed in range(3)
        for at, (loss, optimizer) in enumerate([("focal", "adam"), ("focal", "sgd"), ("mse", "adam")])
    ]
    analysis = analyse(record(results), results)
    found = between_choices(analysis)
    assert found is not None
    title, table = found
    assert title == "optimizers and losses"
    assert [row[:3] for row in table.rows[:4]] == [
        ("batch norm, batch size 2", "adam, focal loss", "sgd, focal loss"),
        ("batch norm, batch size 2", "adam, focal loss", "adam, mse loss"),
        ("layer norm, batch size 2", "adam, focal loss", "sgd, focal loss"),
        ("layer norm, batch size 2", "adam, focal loss", "adam, mse loss"),
    ]
    assert {row[3].split(" ")[0] for row in table.rows} == {"+10.00", "+20.00"}
    assert {row[-1] for row in table.rows} == {"yes"}
    assert "<h3>Between optimizers and losses</h3>" in report.html(record(results), results)


def test_a_choice_that_finished_fewer_seeds_is_none_to_compare_with() -> None:
    results = [result(spec("batch", 32, seed, loss="mse"), 0.2 + 0.01 * seed) for seed in range(3)]
    results += [result(spec("batch", 32, seed, loss="focal"), 0.1) for seed in range(2)]
    results.append(stopped(spec("batch", 32, 2, loss="focal"), "diverged", "the loss was nan"))
    found = between_choices(analyse(record(results), results))
    assert found is not None
    assert [row[1:3] for row in found[1].rows] == [("mse loss", "focal loss")]


def test_rates_are_not_chosen_by_the_test_part() -> None:
    results = [result(spec("batch", 32, seed, base_lr=rate, lr=rate), rate) for rate in (0.1, 0.2) for seed in range(3)]
    assert between_choices(analyse(record(results), results)) is None
