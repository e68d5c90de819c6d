"""The comparison from Python, and what the command line calls."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from torch import nn

from renorm.comparison import data, forecast, panel, tuning
from renorm.comparison.comparison import Comparison
from renorm.comparison.data import Splits
from renorm.comparison.given import Builder, Given, GivenModel
from renorm.comparison.panel import Panel
from renorm.comparison.progress import progress as show_progress
from renorm.comparison.reference import Reference
from renorm.comparison.run import check_backend, missing, num_jobs, run
from renorm.comparison.series import Layout
from renorm.comparison.series import read as read_series
from renorm.comparison.spec import StudyRecord, TrialResult, TrialSpec, varying_fields
from renorm.comparison.store import Store
from renorm.comparison.study import FORECAST_ONLY, Study, grid
from renorm.comparison.trial import check_model
from renorm.comparison.verdict import model_title
from renorm.errors import DataError, RenormError, StudyError

__all__ = ["FOLDER", "compare", "run_study"]

FOLDER = "renorm-runs"

Names = str | Sequence[str]
Numbers = float | Sequence[float]


def compare(
    model: str | GivenModel | Sequence[str],
    train: Any,
    valid: Any = None,
    test: Any = None,
    *,
    norm: Names | None = None,
    batch_size: int | str | Sequence[int | str] = (32,),
    lr: Numbers | None = None,
    lr_scale: str = "linear",
    tune_lr: bool = False,
    optimizer: Names | None = None,
    activation: Names = ("relu",),
    loss: Names = ("auto",),
    dropout: Numbers = (0.0,),
    seeds: int | Sequence[int] = 3,
    epochs: int | None = None,
    target: str | None = None,
    task: str = "auto",
    time: str | None = None,
    series: str | None = None,
    columns: Sequence[str] = (),
    static: Sequence[str] = (),
    window: int | None = None,
    horizon: int | None = None,
    season: int | None = None,
    stride: int | None = None,
    gaps: str | None = None,
    missing: str | None = None,
    aggregate: Mapping[str, str] | None = None,
    pooling: Names = ("pooled",),
    bar: int | Sequence[int] = (1,),
    replace: str = "any",
    name: str | None = None,
    folder: str | Path | None = None,
    jobs: int | None = None,
    backend: str = "loky",
    progress: bool = True,
) -> Comparison:
    """Train ``model`` with each norm, from the same weights on the same samples, and say what that shows.

    Results are kept in ``folder/name`` as they arrive: the same call after an interruption goes on from
    there, and reads what is kept. Trials run in processes of their own, which need not import your script
    again.

    Args:
        model: a module, a function without arguments that builds one, or one or several names: built-in ones ("mlp",
            "cnn", "resnet", "lstm", "tcn", "transformer") or "module:function". The norms of a module are replaced by
            :func:`renorm.swap`; its other weights are where every trial starts from. A builder gives new
            weights for each seed.
        train: the training part: (x, y) as arrays or tensors, or a torch Dataset; or all data as a source for
            :func:`renorm.comparison.data.load`: "digits", "table.csv", a folder of images. For a forecast a long table,
            as a DataFrame, a file or a name: "parking", "household".
        valid: the validation part; it draws the learning curves and chooses the learning rate.
        test: the test part, which is read once, at the end. Without one the validation part gives the scores.
        norm: norms by name: "none", "batch", "layer", "instance", "group", "group(32)", "rms", "switch"; around a
            forecaster "revin", with another norm inside "revin+layer". If left out none, batch, layer, group, rms and
            switch, in a forecast none, batch, layer and revin.
        batch_size: samples a step; "all" for the whole training part: batch gradient descent, as 1 is stochastic and
            what is between is mini-batch gradient descent. It takes one step an epoch, at a rate that linear scaling
            makes large: give it more epochs, and ``tune_lr`` or ``lr_scale="none"``.
        lr: learning rates at batch size 32 (if left out 0.1, in a regression 0.01, in a forecast 0.001); with
            ``tune_lr`` the rates that are tried.
        lr_scale: "linear" scales the rate by batch_size / 32; "none" takes it as it is.
        tune_lr: choose the rate for each norm and batch size by the validation part.
        optimizer: optimizers by name: "sgd", "momentum", "adam", "adamw", ...; if left out sgd, in a forecast adam.
        activation: activations by name; for built-in models only.
        loss: losses by name: in a classification "cross_entropy", "label_smoothing", "focal",
            "binary_cross_entropy", "multi_margin", "mse"; else "mse", "mae", "huber"; "auto" is the first one.
        dropout: shares of the activations that are set to 0 in training; for built-in models only.
        seeds: how many seeds, or the seeds themselves.
        epochs: passes over the training part; if left out 15, in a forecast 8.
        target: the column to predict, where ``train`` names a table.
        task: "classification", "regression", "forecast", or "auto" to see the first two from the targets.
        time: of a forecast, as all down to `bar`: the column of the times; see `renorm.comparison.series.Layout`.
        series: the column that names the series.
        columns: the columns of values.
        static: the columns of features that do not change.
        gaps: what is made of missing times.
        missing: what is made of missing values.
        window: steps of the past that a model sees; see `renorm.comparison.panel.divide`.
        horizon: steps to come that it predicts.
        season: steps after which the series repeats.
        stride: steps from one window to the next.
        aggregate: how a bar is made of each column.
        pooling: "local", a model for each series; "pooled", one for all; "static", one for all that sees
            static features.
        bar: how many steps an entry of the past holds.
        replace: which of the module's norms give way: the left side of a rule of :func:`renorm.swap`.
        name: the study's name, and its folder's.
        folder: where studies are kept; ``renorm-runs`` in the current folder if left out.
        jobs: how many trials run at the same time; one for each core if left out.
        backend: joblib's backend: "loky", "dask" or "ray".
        progress: show how far it is, and the time left.

    Raises:
        StudyError: a setting is wrong, or the model cannot take the data.
        DataError: the data cannot be used.
        SwapError: the module has no norm that ``replace`` names.
        Interrupted: at Ctrl-C (a KeyboardInterrupt); what has arrived is kept.
        OSError: the folder cannot be written; what has arrived is kept.
    """
    named = isinstance(model, (str, list, tuple))
    given = None if named else Given(cast(GivenModel, model), replace)
    settings: dict[str, Any] = {
        "data": train if isinstance(train, str) else "python",
        "model": f"python:{given.name}" if given else model,
        "batch_size": batch_size, "lr_scale": lr_scale, "tune_lr": tune_lr, "activation": activation, "loss": loss,
        "dropout": dropout, "seeds": seeds,
        "target": target, "task": task, "name": name or "", "time": time, "series": series, "columns": columns,
        "static": static, "window": window, "horizon": horizon, "season": season, "stride": stride, "gaps": gaps,
        "missing": missing, "aggregate": aggregate or {}, "pooling": pooling, "bar": bar,
    }  # fmt: skip
    by_task = {"norm": norm, "lr": lr, "optimizer": optimizer, "epochs": epochs}
    study = Study(**settings, **{key: value for key, value in by_task.items() if value is not None})
    splits = _from_parts(study, train, valid, test)
    return run_study(
        study, splits=splits, given=given, out=folder or FOLDER, jobs=jobs, backend=backend, progress=progress
    )


def run_study(
    study: Study,
    *,
    splits: Splits | Panel | None = None,
    given: Given | None = None,
    out: str | Path = FOLDER,
    jobs: int | None = None,
    backend: str = "loky",
    progress: bool = True,
) -> Comparison:
    """Run what a study still lacks and give back the comparison; its folder is ``out/study.name``.

    ``splits`` and ``given`` stand for ``study.data`` and ``study.model`` where these are Python objects. All
    that can be wrong with the settings, the data and the model is seen before anything is written.

    Raises:
        As :func:`compare` does.
    """
    check_backend(backend)
    num_jobs(jobs)
    prepared = _load(study) if splits is None else splits
    study = study.for_task(prepared.task)
    command = study.command() if splits is None and given is None else _call(study)
    own = {name: given or Given(Reference(name)) for name in study.model if given or ":" in name}
    for key in ("activation", "dropout") if own else ():
        if getattr(study, key) != Study.model_fields[key].default:
            raise StudyError(f"{key} is for built-in models: a model of your own brings its own; leave it out")
    models = {name: own[name].identify() if name in own else name for name in study.model}
    build = Builder({models[name]: model for name, model in own.items()})
    console = Console(stderr=True, quiet=not progress, emoji=False)
    work = _Work(study, prepared, build, tuple(models.values()), command, jobs, backend, console)
    first = work.grid(test=not study.tune_lr)
    record = work.record(first)
    with Store(Path(out) / study.name).open() as store:
        work.announce(record, len(first))
        store.write_data(prepared)
        store.write_record(record)
        if not study.tune_lr:
            results = work.run("training", first, store)
        else:
            record, results = _tuned(work, record, first, store)
        return Comparison(record, results, store.folder, tuple(store.notes))


def _tuned(
    work: _Work, record: StudyRecord, candidates: tuple[TrialSpec, ...], store: Store
) -> tuple[StudyRecord, tuple[TrialResult, ...]]:
    """Two phases: every rate without the test part, then the chosen rates with it."""
    learnt = [spec for spec in candidates if spec.norm not in forecast.BASELINES]
    choices = tuning.choose(work.run("tuning the learning rate", learnt, store))
    chosen = tuple(
        spec
        for spec in work.grid(test=True)
        if any(choice.covers(spec) and choice.base_lr == spec.base_lr for choice in choices)
        or (spec.norm in forecast.BASELINES and spec.base_lr == work.study.lr[0])
    )
    varying = varying_fields(choice.setting for choice in choices)
    settings = {**record.settings, "tuning": [choice.text(varying) for choice in choices]}
    record = changed(record, settings=settings, keys=tuple(spec.key for spec in chosen))
    store.write_record(record)
    return record, work.run("training", chosen, store)


@dataclass(frozen=True)
class _Work:
    """What every phase of a study needs."""

    study: Study
    splits: Splits | Panel
    build: Builder
    models: tuple[str, ...]  # what the specs call them
    command: str  # what to type to run it again
    jobs: int | None  # trials at the same time; None for one a core
    backend: str  # joblib's
    console: Console  # where progress is shown

    def grid(self, *, test: bool) -> tuple[TrialSpec, ...]:
        return grid(self.study, self.splits, models=self.models, test=test)

    def run(self, label: str, specs: Sequence[TrialSpec], store: Store) -> tuple[TrialResult, ...]:
        todo = missing(specs, store)
        num_train = self.splits.num("train")
        with show_progress(self.console, label, todo, len(specs) - len(todo), num_train) as show:
            return run(specs, store, jobs=self.jobs, backend=self.backend, build=self.build, on_result=show)

    def announce(self, record: StudyRecord, num_trials: int) -> None:
        numbers = "{num_train} training, {num_valid} validation and {num_test} test samples"
        where = numbers.format_map(record.data)
        lines = [f"{record.name}: {where}; {num_trials} trials, {num_jobs(self.jobs)} at a time"]
        lines += [f"note: {note}" for note in record.data["notes"]]
        self.console.print("\n".join(lines), markup=False, highlight=False)

    def record(self, specs: Sequence[TrialSpec]) -> StudyRecord:
        described = self.splits.describe()
        model, notes = _in_words(self.build, self.models, specs, self.splits)
        notes = [*described.get("notes", ()), *self.build.notes(self.study.norm), *notes]
        return StudyRecord(
            name=self.study.name,
            task=self.splits.task,
            settings=self.study.settings(),
            data={**described, "notes": notes},
            model=model,
            versions=_versions(),
            command=self.command,
            keys=tuple(spec.key for spec in specs),
        )


def _load(study: Study) -> Splits | Panel:
    if study.task == "forecast":
        return _panel(study, study.data)
    dataset = data.load(study.data, target=study.target, task=study.task)
    return data.split(dataset, seed=study.split_seed, valid=study.valid, test=study.test)


def _panel(study: Study, source: Any) -> Panel:
    layout = Layout(study.time, study.series, study.target, study.columns, study.static, study.gaps, study.missing)
    return panel.divide(
        read_series(source, layout),
        window=study.window,
        horizon=study.horizon,
        season=study.season,
        stride=study.stride,
        bars=study.bar,
        aggregate=dict(pair.rsplit("=", 1) for pair in study.aggregate),
        valid=study.valid,
        test=study.test,
    )


def _from_parts(study: Study, train: Any, valid: Any, test: Any) -> Splits | Panel | None:
    """The parts that were given as objects; None where ``train`` names all data."""
    if isinstance(train, pd.DataFrame):
        if study.task != "forecast" or valid is not None or test is not None:
            raise DataError(
                "a DataFrame is a long table of time series, split by time: write task='forecast' and leave valid and "
                "test out; or pass parts as (x, y)"
            )
        return _panel(study, train)
    if isinstance(train, str):
        if valid is not None or test is not None:
            raise DataError(
                "valid and test must be left out where train is a data source, which is split by itself; "
                "to bring your own parts, pass each as (x, y)"
            )
        return None
    if valid is None:
        raise DataError("valid must be given where train is no data source: pass a part that is held out")
    return data.from_parts(train, valid, test, task=study.task)


def _in_words(
    build: Builder, models: Sequence[str], specs: Sequence[TrialSpec], splits: Splits | Panel
) -> tuple[str, list[str]]:
    """Each model, several with their names, and notes on them."""
    words = {name: _model_in_words(build, [spec for spec in specs if spec.model == name], splits) for name in models}
    several = len(words) > 1
    text = "\n\n".join(f"{model_title(name)}\n{layers}" if several else layers for name, (layers, _) in words.items())
    notes = [f"{model_title(name)}: {note}" if several else note for name, (_, note) in words.items() if note]
    return text, notes


def _model_in_words(build: Builder, specs: Sequence[TrialSpec], splits: Splits | Panel) -> tuple[str, str]:
    """The first model that can be built and takes the data, one line a layer, and a note on it where there is one.

    A norm that the model cannot take will be a row that says so; an error is raised if none can be built.
    """
    errors: list[RenormError] = []
    learnt = [spec for spec in reversed(specs) if spec.norm not in forecast.BASELINES]
    for spec in {spec.norm: spec for spec in learnt}.values():
        with torch.random.fork_rng(devices=[]):
            try:
                seen = (
                    splits.windows(spec.bar, static=spec.pooling == "static") if isinstance(splits, Panel) else splits
                )
                model = build(spec, seen)
                return _layers(model), check_model(model, spec, seen) if spec.model in build.given else ""
            except RenormError as error:
                errors.append(error)
            except Exception as error:
                return f"cannot be built with {spec.norm}: {type(error).__name__}: {error}", ""
    raise errors[-1]


def _layers(model: nn.Module) -> str:
    leaves = [(name, module) for name, module in model.named_modules() if not any(module.children())]
    return "\n".join(f"{name}: {module!r}" if name else repr(module) for name, module in leaves)


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "renorm": importlib.metadata.version("renorm"),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def _call(study: Study) -> str:
    """What to write in Python; the objects themselves cannot be written down."""
    plain = type(study).model_fields
    always = ("norm", "batch_size", "lr", "tune_lr", "optimizer", "seeds", "epochs", "name")
    changed = (key for key in ("activation", "loss", "dropout") if getattr(study, key) != plain[key].default)
    settings = ", ".join(f"{key}={getattr(study, key)!r}" for key in (*always, *changed))
    if study.task == "forecast":
        more = ("target", *FORECAST_ONLY)
        told = [key for key in more if getattr(study, key) != plain[key].default]
        values = {key: getattr(study, key) for key in told}
        if study.aggregate:
            values["aggregate"] = dict(pair.rsplit("=", 1) for pair in study.aggregate)
        settings = ", ".join([settings, "task='forecast'", *(f"{key}={value!r}" for key, value in values.items())])
        return f"renorm.compare(model, table, {settings})"
    return f"renorm.compare(model, train, valid, test, {settings})"
