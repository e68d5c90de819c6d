"""Studies of forecasts: settings, trials of models and baselines, what they show, and the same from a shell."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

import renorm as rn
from renorm.choices import models
from renorm.choices.reversible import Reversible
from renorm.cli import main
from renorm.comparison import Comparison, Study, run_study
from renorm.comparison.api import _panel
from renorm.comparison.forecast import BASELINES, run_forecast
from renorm.comparison.panel import Panel, Windows
from renorm.comparison.progress import Clock
from renorm.comparison.spec import TrialResult
from renorm.comparison.study import RATES, grid
from renorm.comparison.terminal import TerminalTable
from renorm.errors import DataError, StudyError


def table(lengths: tuple[int, ...] = (160, 160, 120), seed: int = 0) -> pd.DataFrame:
    """Noisy waves of period 8 at three levels; the third series ends early, the rows are shuffled."""
    rng = np.random.default_rng(seed)
    parts = []
    for at, length in enumerate(lengths):
        steps = np.arange(length)
        y = 10.0 ** (at + 1) * (2 + np.sin(2 * np.pi * steps / 8 + at) + 0.1 * rng.normal(size=length))
        parts.append(pd.DataFrame({"t": steps, "which one": f"s{at}", "y": y, "w": rng.normal(size=length), "k": at}))
    return pd.concat(parts).sample(frac=1, random_state=seed)


SETTINGS: dict[str, Any] = {
    "task": "forecast", "data": "made", "time": "t", "series": "which one", "target": "y", "static": "k", "season": 8,
    "window": 16, "horizon": 4, "norm": "none,revin", "model": "mlp", "seeds": 2, "epochs": 2, "batch_size": 16,
}  # fmt: skip


def study(**changes: Any) -> Study:
    return Study(**{**SETTINGS, **changes})


def panel(settings: Study | None = None) -> Panel:
    return _panel(settings or study(), table())


def trial(settings: Study | None = None, **changes: Any) -> TrialResult:
    settings = settings or study()
    found = panel(settings)
    return run_forecast(replace(grid(settings, found)[0], **changes), found)


def compare(folder: Path, **changes: Any) -> Comparison:
    given = {key: value for key, value in SETTINGS.items() if key not in ("data", "model")}
    options = {"folder": folder, "jobs": 1, "progress": False, "name": "made", **given, **changes}
    return rn.compare(changes.pop("model", "mlp"), table(), **{key: options[key] for key in options if key != "model"})


def scores(result: TrialResult) -> tuple[Any, ...]:
    return result.status, result.reason, result.valid, result.test, result.series, result.curve, result.num_steps


# ---- settings


def test_the_defaults_are_those_of_a_forecast() -> None:
    found = Study(data="parking")
    assert found == Study(task="forecast") == Study(data="parking", task="forecast")
    assert (found.task, found.model, found.norm, found.pooling, found.bar) == (
        "forecast", ("cnn",), ("none", "batch", "layer", "revin"), ("pooled",), (1,)
    )  # fmt: skip
    assert (found.batch_size, found.optimizer, found.lr, found.epochs) == ((32,), ("adam",), (0.001,), 8)
    assert found.for_task("forecast") is found
    assert Study(data="household", tune_lr=True).lr == RATES


def test_settings_and_command_give_the_study_back() -> None:
    found = study(aggregate={"w": "last"}, pooling="local,static", bar="1,2", norm="revin+group(8), REVIN ,revin+none")
    assert found.norm == ("revin+group(8)", "revin")
    assert found.aggregate == ("w=last",)
    assert Study(**found.settings()) == found
    command = found.command()
    assert command.startswith("renorm compare --task forecast --data made --target y --model mlp")
    assert "--series 'which one'" in command
    assert "--pooling local,static --bar 1,2" in command
    assert "--aggregate w=last" in command
    assert Study(data="parking", bar="1,3").command() == "renorm compare --data parking --bar 1,3"


def test_columns_in_a_list_may_have_commas() -> None:
    found = study(columns=["y", "a, b"], aggregate={"a, b": "last"}, static="k, m")
    assert (found.columns, found.aggregate, found.static) == (("y", "a, b"), ("a, b=last",), ("k", "m"))
    words = shlex.split(found.command())
    given = {key: words[words.index(f"--{key}") + 1] for key in ("columns", "aggregate", "static")}
    assert study(**given) == found
    assert Study(**found.settings()) == found


def test_other_studies_do_not_speak_of_forecasts() -> None:
    assert "horizon" not in Study().settings()
    assert "horizon" in study().settings()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"horizon": 3}, "horizon is for forecasts"),
        ({"norm": "revin"}, "norm revin is for forecasts"),
        ({"task": "forecast", "pooling": "global"}, "pooling: .*got 'global'; write local, pooled or static"),
        ({"task": "forecast", "bar": 0}, "bar: .*got 0; write whole numbers"),
        ({"task": "forecast", "gaps": "fill"}, "gaps: .*got 'fill'; write cut or join"),
        ({"task": "forecast", "missing": "mean"}, "missing: .*write drop or last"),
        ({"task": "forecast", "aggregate": "last"}, "aggregate: must be column=rule; got 'last'"),
        ({"task": "forecast", "batch_size": "all"}, "batch_size all is not for forecasts"),
        ({"task": "forecast", "model": "resnet"}, "a forecast is made by mlp, .*got resnet"),
        ({"task": "forecast", "norm": "revin+bach"}, "did you mean 'batch'"),
        ({"task": "forecast", "window": 0}, "window: .*got 0"),
    ],
)
def test_a_wrong_setting_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((StudyError, rn.errors.UnknownNormError), match=message):
        Study(**settings)


def test_the_grid_has_the_baselines_and_every_pooling_and_bar() -> None:
    settings = study(pooling="local,pooled", bar="1,2")
    specs = grid(settings, panel(settings))
    assert len(specs) == 2 * 2 * (2 + 2) * 2
    assert {spec.norm for spec in specs} == {"none", "revin", *BASELINES}
    assert len({spec.key for spec in specs}) == len(specs)
    assert {spec.norm for spec in grid(study(season=1), panel(study(season=1)))} == {"none", "revin", "naive"}


# ---- trials


@pytest.mark.parametrize("model", ["mlp", "cnn", "tcn", "lstm", "transformer"])
@pytest.mark.parametrize("pooling", ["local", "static"])
def test_every_model_forecasts(model: str, pooling: str) -> None:
    result = trial(model=model, pooling=pooling, norm="revin+layer", epochs=1, bar=2)
    assert (result.status, result.reason) == ("ok", "")
    assert set(result.test) == {"mase", "mse", "mae", "correlation", "loss"}
    assert all(np.isfinite(value) for value in result.test.values())
    assert set(result.series) == {"s0", "s1"}
    assert result.curve[0].valid_score == result.valid["mase"]


def test_a_trial_learns_what_repeats() -> None:
    result = trial(study(epochs=40), lr=0.003)
    assert result.test["mase"] < 0.9
    assert result.test["correlation"] > 0.9
    value, low, high = result.series["s0"]["mase"]
    assert low < value < high


def test_equal_specs_give_equal_results() -> None:
    one, other = trial(pooling="local", norm="revin"), trial(pooling="local", norm="revin")
    assert scores(one) == scores(other)
    assert scores(one) != scores(trial(pooling="local", norm="none"))


def test_a_local_model_is_that_of_its_series_alone() -> None:
    """Whatever the other series hold, and the scores are means over the series."""
    settings = study(norm="none", pooling="local")
    together = trial(settings)
    frame = table()
    frame.loc[frame["which one"] != "s0", "y"] *= -3.0
    other = _panel(settings, frame)
    alone = run_forecast(grid(settings, other)[0], other)
    assert together.series["s0"] == alone.series["s0"]
    assert together.test["mase"] == pytest.approx(np.mean([of["mase"][0] for of in together.series.values()]))
    pooled = trial(settings, pooling="pooled")
    assert together.num_parameters == 3 * pooled.num_parameters


def test_a_series_with_fewer_windows_than_a_batch_is_one_batch() -> None:
    result = trial(pooling="local", batch_size=1000)
    assert (result.status, result.num_steps) == ("ok", 2 * 3)
    assert result.spec.batch_size == 1000


def test_baselines_are_the_value_before_and_a_season_before() -> None:
    found = panel()
    windows = found.windows()
    for norm, season in (("naive", 1), ("seasonal naive", 8)):
        result = trial(norm=norm)
        assert (result.num_parameters, result.num_steps, result.curve) == (0, 0, ())
        frame = table().sort_values("t")
        for at, name in enumerate(("s0", "s1")):
            y = frame[frame["which one"] == name]["y"].to_numpy()
            rows = windows.of["test"] == at
            truth = windows.y_test[rows] * windows.stds[at] + windows.means[at]
            starts = [int(np.abs(y[:-3] - first).argmin()) for first in truth[:, 0]]
            forecast = np.array([[y[t - 1] if season == 1 else y[t + h - 8] for h in range(4)] for t in starts])
            scale = np.abs(y[8:96] - y[:88]).mean()
            assert result.series[name]["mase"][0] == pytest.approx(np.abs(forecast - truth).mean() / scale, rel=1e-4)


def test_without_a_test_part_the_validation_part_is_scored() -> None:
    settings = study(test=0)
    result = trial(settings)
    assert result.test == {}
    assert set(result.series) == {"s0", "s1"}
    assert result.valid["mase"] == pytest.approx(np.mean([of["mase"][0] for of in result.series.values()]))


def test_the_part_that_is_held_out_is_not_read_while_a_rate_is_tuned() -> None:
    settings = study(tune_lr=True)
    found = panel(settings)
    spec = grid(settings, found, test=False)[0]
    values = found.values.copy()
    for end, (_, cut), length in zip(np.cumsum(found.lengths), found.cuts, found.lengths, strict=True):
        values[:, end - length + cut : end] *= 1e6
    one, other = run_forecast(spec, found), run_forecast(spec, replace(found, values=values))
    assert scores(one) == scores(other)


def test_a_trial_that_diverges_or_is_refused_says_of_which_series() -> None:
    diverged = trial(pooling="local", lr=1e30)
    assert diverged.status == "diverged"
    assert diverged.reason.startswith("series 's0': the ")
    assert diverged.spec.pooling == "local"
    refused = trial(study(norm="instance"), pooling="local")
    assert (refused.status, refused.reason[:12]) == ("refused", "series 's0':")
    assert trial(lr=1e30).status == "diverged"


def test_a_model_of_the_wrong_shape_is_told() -> None:
    found = panel()
    spec = grid(study(), found)[0]
    result = run_forecast(spec, found, lambda *_: nn.Sequential(nn.Flatten(), nn.Linear(32, 3)))
    assert result.status == "failed"
    assert "the model's output must have the shape (16, 1, 4)" in result.reason


def test_the_forecast_of_revin_is_denormalized() -> None:
    """A model that forecasts 0 forecasts each window's mean, in the units of the target, whatever the bar."""
    for bar in (1, 4):
        windows = panel(study(bar="1,4")).windows(bar)
        model = Reversible(nn.Sequential(nn.Flatten(), nn.LazyLinear(4), nn.Unflatten(1, (1, 4))), 2)
        x = torch.tensor(windows.x_test)
        model(x)
        for parameter in model.model.parameters():
            nn.init.zeros_(parameter)
        means = x[:, :1].mean(2, keepdim=True).expand(-1, -1, 4)
        assert (model(x) - means).abs().max() < 1e-5


def test_a_result_comes_back_from_json() -> None:
    result = trial(norm="naive")
    again = TrialResult.from_json(json.loads(json.dumps(result.to_json())))
    assert scores(again) == scores(result)
    old = result.to_json()
    del old["series"]
    assert TrialResult.from_json(old).series == {}


def test_the_time_left_does_not_count_what_learns_nothing() -> None:
    specs = grid(study(), panel())
    clock = Clock([spec for spec in specs if spec.norm in BASELINES], 100)
    clock.advance(specs[-1])
    assert clock.left is not None


# ---- the comparison


def test_a_study_has_a_table_series_and_a_report(tmp_path: Path) -> None:
    found = compare(tmp_path, pooling=("pooled", "static"), bar=(1, 2), seeds=3)
    frame = found.table()
    assert len(frame) == 4 * 4
    assert set(frame["norm"]) == {"none", "revin", "naive", "seasonal naive"}
    assert frame.attrs["score"] == "test MASE (mase)"
    assert frame[["mean", "mse", "correlation"]].notna().all().all()
    by_series = found.series()
    assert len(by_series) == 16 * 2
    one = by_series[(by_series["norm"] == "revin") & (by_series["pooling"] == "static") & (by_series["bar"] == 2)]
    row = frame[(frame["norm"] == "revin") & (frame["pooling"] == "static") & (frame["bar"] == 2)]
    assert one["mase"].mean() == pytest.approx(row["mean"].item())
    assert (one["mase_low"] < one["mase"]).all()
    assert "test MASE" in found.sentence
    page = found.report().read_text()
    for words in (
        "RevIN series by series",
        "Between poolings and bars",
        "the last season",
        "static, bars of 2",
        "n c [t]",
    ):
        assert words in page
    assert Comparison.load(tmp_path / "made").series().equals(by_series)
    console = Console(width=120)
    with console.capture() as capture:
        console.print(TerminalTable(found.analysis))
    assert capture.get().count("3 of 3") == 4 * 4
    assert found.best().norm in frame["norm"].tolist()


def test_a_study_from_a_model_of_ones_own(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv1d(2, 8, 3),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8 * 14, 4),
            nn.Unflatten(1, (1, 4)),
        )

    found = compare(tmp_path, model=build, norm=("batch", "revin+layer"))
    assert {row.norm: row.status for row in found.analysis.rows} == {
        "batch": "2 of 2", "revin+layer": "2 of 2", "naive": "2 of 2", "seasonal naive": "2 of 2"
    }  # fmt: skip
    assert any("norms of the model give way" in note for note in found.record.data["notes"])
    assert found.record.command.startswith("renorm.compare(model, table, norm=('batch', 'revin+layer')")
    assert "task='forecast', target='y'" in found.record.command
    assert "series='which one'" in found.record.command


def test_a_rate_is_tuned_for_each_pooling(tmp_path: Path) -> None:
    found = compare(tmp_path, pooling=("local", "pooled"), tune_lr=True, lr=(0.001, 0.01), seeds=1, norm="none")
    tuning = found.record.settings["tuning"]
    assert len(tuning) == 2
    assert ", local: lr" in tuning[0]
    assert {row.norm for row in found.analysis.rows} == {"none", *BASELINES}
    assert len(found.analysis.cells) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "auto"}, "a DataFrame is a long table of time series"),
        ({"valid": (1, 2)}, "leave valid and test out"),
    ],
)
def test_a_table_is_for_forecasts(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        rn.compare("mlp", table(), folder=tmp_path, **options)


def test_a_batch_must_fit(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="a batch must fit into the training part of 231 samples; got batch_size 1000"):
        compare(tmp_path, batch_size=1000)


# ---- from a shell


def write(path: Path) -> Path:
    frame = table().rename(columns={"y": "Umsatz, €", "t": "tick"})
    frame["tick"] = (pd.Timestamp("2024-05-06") + pd.to_timedelta(frame["tick"], unit="h")).astype(str)
    frame.to_csv(path, index=False)
    return path


def arguments(path: Path, out: Path) -> list[str]:
    return [
        "compare", "--task", "forecast", "--data", str(path), "--time", "tick", "--series", "which one",
        "--target", "Umsatz, €", "--static", "k", "--season", "8", "--horizon", "4", "--model", "mlp", "--norm",
        "none,revin", "--pooling", "local,static", "--epochs", "2", "--seeds", "2", "--out", str(out), "--jobs", "1",
    ]  # fmt: skip


def test_a_file_with_odd_names_from_a_shell(tmp_path: Path) -> None:
    path = write(tmp_path / "Läden.csv")
    ran = CliRunner().invoke(main, arguments(path, tmp_path))
    assert ran.exit_code == 0, ran.output
    assert "MASE" in ran.output
    assert "3 series, 440 rows, a step of 01:00:00" in " ".join(ran.output.split())
    (study_folder,) = [item for item in tmp_path.iterdir() if item.is_dir()]
    record = Comparison.load(study_folder).record
    assert record.data["target"] == "Umsatz, €"
    again = CliRunner().invoke(main, arguments(path, tmp_path))
    assert again.exit_code == 0
    missing = CliRunner().invoke(main, [*arguments(path, tmp_path), "--target", "Umsaz"])
    assert missing.exit_code == 2
    assert "there is no column 'Umsaz'" in missing.output


def test_a_killed_study_goes_on_where_it_was(tmp_path: Path) -> None:
    path = write(tmp_path / "shops.csv")
    command = [sys.executable, "-m", "renorm.cli", *arguments(path, tmp_path)]
    command[1:3] = ["-c", "import sys; from renorm.cli import main; main(sys.argv[1:])"]
    trials = tmp_path / "shops-mlp" / "trials"
    process = subprocess.Popen(command, env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(trials.glob("*.json"))) < 3:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {item.name: item.stat().st_mtime_ns for item in trials.glob("*.json")}
    assert len(kept) >= 3
    ran = CliRunner().invoke(main, arguments(path, tmp_path))
    assert ran.exit_code == 0, ran.output
    found = {item.name: item.stat().st_mtime_ns for item in trials.glob("*.json")}
    assert len(found) == 2 * 4 * 2
    assert kept.items() <= found.items()


def test_the_data_that_comes_with_it_needs_no_options(tmp_path: Path) -> None:
    found = run_study(
        Study(data="parking", epochs=1, seeds=1, norm="revin", stride=60), out=tmp_path, jobs=1, progress=False
    )
    assert found.record.name == "parking-cnn"
    assert {row.norm for row in found.analysis.rows} == {"revin", *BASELINES}
    assert found.record.data["series"] == 29


def test_a_forecaster_is_what_is_trained() -> None:
    windows = panel().windows()
    assert isinstance(windows, Windows)
    torch.manual_seed(0)
    model = models.forecaster("mlp", windows.input_shape, 4, norm="none")
    assert model(torch.tensor(windows.x_test)).shape == (len(windows.y_test), 1, 4)
