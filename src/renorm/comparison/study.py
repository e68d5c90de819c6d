"""The study: what is compared with what, as a file, flags or arguments, and the grid of trials it means."""

from __future__ import annotations

import csv
import difflib
import io
import itertools
import re
import shlex
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from renorm.choices import objectives
from renorm.choices.registry import look_up
from renorm.comparison.spec import TrialSpec
from renorm.errors import RenormError, StudyError

if TYPE_CHECKING:
    from renorm.comparison.data import Splits
    from renorm.comparison.panel import Panel

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["RATES", "Study", "grid", "num_steps"]

SERIES = ("parking", "household")  # names of data that is forecast
# What a forecast has where nothing else is said.
FORECAST: Mapping[str, Any] = {
    "data": "parking", "model": "cnn", "norm": "none,batch,layer,revin", "batch_size": 32, "lr": 0.001,
    "optimizer": "adam", "epochs": 8,
}  # fmt: skip
RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # what tuning tries when the study names no rates
REGRESSION_RATE = 0.01
REFERENCE_BATCH = 32  # the batch size at which linear scaling leaves a learning rate as it is


def _axis(value: object) -> list[object]:
    """One value, "a,b" or a list of these -> a list; a value named twice is kept once."""
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    parts = [part for item in items for part in (_parts(item) if isinstance(item, str) else [item])]
    return list(dict.fromkeys(parts))


def _parts(text: str) -> list[str]:
    """The parts between the commas that stand outside parentheses."""
    return [part for part in (part.strip() for part in re.split(r",(?![^(]*\))", text)) if part]


def _seeds(value: object) -> object:
    """3 -> 0, 1, 2; a list, or text with a comma, is the seeds themselves."""
    if isinstance(value, str) and value.strip().isdigit():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 1:
            raise StudyError(f"seeds: must be at least one; got {value}; write {_HINTS['seeds']}")
        return list(range(value))
    return _axis(value)


def _norms(names: tuple[str, ...]) -> tuple[str, ...]:
    from renorm.choices.reversible import REVERSIBLE, parted
    from renorm.norms import named

    standard = named.parse("group")
    found = []
    for name in names:
        reversible, inner = parted(name.strip().lower() if name.strip().lower().startswith(REVERSIBLE) else name)
        parsed = named.parse(inner)
        words = ([REVERSIBLE] if reversible else []) + (
            [] if reversible and parsed.kind == "none" else ["group" if parsed == standard else str(parsed)]
        )
        found.append("+".join(words))
    return tuple(dict.fromkeys(found))


def _optimizers(names: tuple[str, ...]) -> tuple[str, ...]:
    from renorm.choices import optimizers

    return tuple(_known(name, optimizers.NAMES, "optimizer") for name in names)


def _activations(names: tuple[str, ...]) -> tuple[str, ...]:
    from renorm.choices import activations

    return tuple(_known(name, activations.NAMES, "activation") for name in names)


def _losses(names: tuple[str, ...]) -> tuple[str, ...]:
    known = dict.fromkeys([objectives.AUTO, *(name for of in objectives.OBJECTIVES.values() for name in of)])
    return tuple(_known(name, tuple(known), "loss") for name in names)


def _models(names: tuple[str, ...]) -> tuple[str, ...]:
    from renorm.choices import models

    known, kind = models.NAMES, "model (or module:function for your own)"
    return tuple(name if ":" in name else _known(name, known, kind) for name in names)


def _columns(value: object) -> object:
    """Names as a list, or as a line of a CSV: a name with a comma stands in double quotes."""
    if not isinstance(value, str):
        return value
    names = (name.strip() for name in next(csv.reader([value], skipinitialspace=True), []))
    return list(dict.fromkeys(name for name in names if name))


def _line(names: Iterable[object]) -> str:
    """What :func:`_columns` reads as these names."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(map(str, names))
    return line.getvalue()


def _rules(value: object) -> object:
    """A mapping, "close=last,amount=sum" or a list of "column=rule" -> that list, sorted."""
    if isinstance(value, Mapping):
        value = [f"{column}={rule}" for column, rule in value.items()]
    pairs: Any = _columns(value)
    for pair in pairs:
        if "=" not in str(pair):
            raise StudyError(f"aggregate: must be column=rule; got {pair!r}; write for example price=last,amount=sum")
    return sorted(map(str, pairs))


def _once(values: tuple[float, ...]) -> tuple[float, ...]:
    """Each number once: 0.1 and 0.10 are two texts and one trial."""
    return tuple(dict.fromkeys(values))


def _known(name: str, names: tuple[str, ...], kind: str) -> str:
    return look_up({known: known for known in names}, name, kind)


Finite = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Names = Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(_axis)]
Norms = Annotated[Names, AfterValidator(_norms)]
Optimizers = Annotated[Names, AfterValidator(_optimizers)]
Activations = Annotated[Names, AfterValidator(_activations)]
Losses = Annotated[Names, AfterValidator(_losses)]
Models = Annotated[Names, AfterValidator(_models)]
Shares = Annotated[
    tuple[Annotated[float, Field(ge=0, lt=1)], ...], Field(min_length=1), BeforeValidator(_axis), AfterValidator(_once)
]
# A tag for each of the two, so that what is neither gets the complaint about whole numbers only.
BatchSize = Annotated[
    Annotated[int, Field(ge=1), Tag("number")] | Annotated[Literal["all"], Tag("all")],
    Discriminator(lambda value: "all" if value == "all" else "number"),
]
BatchSizes = Annotated[tuple[BatchSize, ...], Field(min_length=1), BeforeValidator(_axis)]
Rates = Annotated[tuple[Finite, ...], Field(min_length=1), BeforeValidator(_axis), AfterValidator(_once)]
Columns = Annotated[tuple[str, ...], BeforeValidator(_columns)]
Count = Annotated[int, Field(ge=1)]
Pooling = Literal["local", "pooled", "static"]
Poolings = Annotated[tuple[Pooling, ...], Field(min_length=1), BeforeValidator(_axis)]
Bars = Annotated[tuple[Count, ...], Field(min_length=1), BeforeValidator(_axis)]
Rules = Annotated[tuple[str, ...], BeforeValidator(_rules)]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), BeforeValidator(_seeds)]


class Study(BaseModel):
    """What is compared with what: the data, the model, one list of values for each axis, and the budget.

    Every axis takes one value, a list, or text with commas. A setting that is unknown or out of range raises
    :class:`~renorm.errors.StudyError`.

    >>> study = Study(data="wine", norm="batch, group(8)", batch_size=[2, 32], seeds=2)
    >>> study.name, study.norm, study.seeds
    ('wine-mlp', ('batch', 'group(8)'), (0, 1))
    >>> study.command()
    "renorm compare --data wine --norm 'batch,group(8)' --seeds 2"
    >>> Study(nrom="batch")
    Traceback (most recent call last):
        ...
    renorm.errors.StudyError: unknown setting 'nrom': did you mean 'norm'?
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str = "digits"  # what data.load reads: a built-in name, a file, a folder, "module:function"
    target: str | None = None  # the column to predict, where the data is a table
    task: Literal["auto", "classification", "regression", "forecast"] = "auto"
    model: Models = ("mlp",)  # built-in names or "module:function"
    norm: Norms = ("none", "batch", "layer", "group", "rms", "switch")
    batch_size: BatchSizes = (2, 32)  # "all": the whole training part, one step an epoch
    lr: Rates = (0.1,)  # at batch size 32 if scaled; with tune_lr, the rates that are tried
    lr_scale: Literal["linear", "none"] = "linear"  # linear: lr * batch_size / 32
    optimizer: Optimizers = ("sgd",)
    activation: Activations = ("relu",)
    loss: Losses = (objectives.AUTO,)  # cross-entropy, or the mean squared error
    dropout: Shares = (0.0,)
    seeds: Seeds = (0, 1, 2)  # a number n means the seeds 0 to n - 1
    epochs: Annotated[int, Field(ge=1)] = 15
    tune_lr: bool = False  # choose lr for each norm in each setting on the validation part
    valid: Annotated[float, Field(gt=0, lt=1)] = 0.2  # share of the samples, unless the data brings this part
    test: Annotated[float, Field(ge=0, lt=1)] = 0.2  # likewise; 0 for no test part
    split_seed: Annotated[int, Field(ge=0)] = 0
    # Of a forecast only; None is the choice of series.read and panel.divide.
    time: str | None = None  # the column of times
    series: str | None = None  # the column that tells series apart
    columns: Columns = ()  # what the model sees of the past; empty: every column of numbers
    static: Columns = ()  # columns that are constant in each series
    window: Count | None = None  # steps of the past
    horizon: Count | None = None  # steps to forecast
    season: Count | None = None  # steps
    stride: Count | None = None  # steps from a window to the next
    gaps: Literal["cut", "join"] | None = None
    missing: Literal["drop", "last"] | None = None
    aggregate: Rules = ()  # "column=rule": what a bar has of a column
    pooling: Poolings = ("pooled",)  # a model for each series, one for all, or one that has static features too
    bar: Bars = (1,)  # steps that an entry of the past holds
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)] = ""

    def __init__(self, **settings: Any) -> None:
        unknown = [key for key in settings if key not in type(self).model_fields]
        if unknown:
            raise StudyError(_unknown("setting", unknown[0], type(self).model_fields))
        try:
            super().__init__(**settings)
        except ValidationError as error:
            details = error.errors()
            wrong = {detail["loc"][:1] for detail in details if detail["type"] != "too_short"}
            # an axis whose only value is wrong is said to be empty as well
            told = [each for each in details if each["type"] != "too_short" or each["loc"][:1] not in wrong]
            raise StudyError("; ".join(map(_explain, told))) from None

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, raw: dict[str, Any]) -> dict[str, Any]:
        filled = dict(raw)
        if filled.get("task", "auto") == "auto" and filled.get("data") in SERIES:
            filled["task"] = "forecast"
        if filled.get("task") == "forecast":
            filled = {**FORECAST, **({"lr": RATES} if filled.get("tune_lr") else {}), **filled}
        if not filled.get("name"):
            data, models = (filled.get(key, cls.model_fields[key].default) for key in ("data", "model"))
            filled["name"] = "-".join(map(_slug, map(str, (data, *_axis(models)))))[:80].rstrip("-._")
        if filled.get("tune_lr") and "lr" not in filled:
            filled["lr"] = RATES
        return filled

    @model_validator(mode="after")
    def _check(self) -> Study:
        if self.tune_lr and len(self.lr) < 2:
            raise StudyError(
                f"tune_lr needs at least two learning rates to choose from; got lr = {self.lr[0]:g}; "
                "name more rates, or leave lr out to try the default ones"
            )
        if self.task == "forecast":
            self._check_forecast()
            return self
        given = [key for key in FORECAST_ONLY if getattr(self, key) != type(self).model_fields[key].default]
        if given or any(name.startswith("revin") for name in self.norm):
            what = given[0] if given else "norm revin"
            raise StudyError(f"{what} is for forecasts; write task = forecast, or leave it out")
        return self

    def _check_forecast(self) -> None:
        if "all" in self.batch_size:
            raise StudyError("batch_size all is not for forecasts, whose series differ in length; write a number")
        if "resnet" in self.model:
            raise StudyError(
                "a forecast is made by mlp, cnn, lstm, tcn, transformer or a model of your own; got resnet"
            )

    @classmethod
    def from_toml(cls, path: str | Path, **overrides: Any) -> Study:
        """The study that a TOML file describes; ``overrides`` take the place of the file's values.

        Paths inside the file are relative to the current folder, as they are on the command line.

        Raises:
            StudyError: the file is missing or no TOML, or a setting in it is wrong.
        """
        return cls(**{**_read_toml(Path(path)), **overrides})

    def settings(self) -> dict[str, Any]:
        """Every setting with its value, as plain JSON values; ``Study(**settings)`` gives the study back."""
        return self.model_dump(mode="json", exclude=set() if self.task == "forecast" else set(FORECAST_ONLY))

    def for_task(self, task: str) -> Study:
        """The study with the task's learning rate, 0.01 for a regression, where none was named.

        At 0.1, which suits a cross-entropy, the squared error behind a layer or group norm diverges: its curvature
        grows with the number of normalized features that the last layer sums.
        """
        if task != "regression" or "lr" in self.model_fields_set or self.tune_lr:
            return self
        return Study(**{**self.settings(), "lr": REGRESSION_RATE})

    def command(self) -> str:
        """What to type in a shell to run this study: only what differs from the defaults is written."""
        words = ["renorm", "compare"]
        for key, value in self._changed().items():
            words.append("--" + key.replace("_", "-"))
            if value is not True:
                write = _line if key in ("columns", "static", "aggregate") else lambda items: ",".join(map(str, items))
                words.append(write(value) if isinstance(value, tuple) else str(value))
        return shlex.join(words)

    def _changed(self) -> dict[str, Any]:
        derived = Study(data=self.data, model=self.model, tune_lr=self.tune_lr, task=self.task)
        plain = Study(task=self.task) if self.task == "forecast" else Study()
        keep_derived = {"name", "lr"}
        changed = {
            key: value for key, value in self if value != getattr(derived if key in keep_derived else plain, key)
        }
        if self.task == "forecast":  # said by the name of the data, or by itself
            changed = ({"data": self.data} if self.data in SERIES else {"task": self.task}) | changed
        if "seeds" in changed and self.seeds == tuple(range(len(self.seeds))):
            changed["seeds"] = len(self.seeds)
        elif len(self.seeds) == 1 and "seeds" in changed:
            changed["seeds"] = f"{self.seeds[0]},"
        return changed


FORECAST_ONLY = (
    "time", "series", "columns", "static", "window", "horizon", "season", "stride", "gaps", "missing", "aggregate",
    "pooling", "bar",
)  # fmt: skip


def num_steps(spec: TrialSpec, num_train: int) -> int:
    """How many optimizer steps a trial takes: the last incomplete batch of an epoch is dropped."""
    return spec.epochs * (num_train // spec.batch_size)


def grid(
    study: Study, splits: Splits | Panel, *, models: Sequence[str] | None = None, test: bool = True
) -> tuple[TrialSpec, ...]:
    """One spec for each combination of the study's axes, seeds innermost; of a forecast the baselines, too.

    ``models`` is what the specs call the study's models, where some are the user's own
    (:meth:`renorm.comparison.given.Given.identify`). ``test=False`` gives the trials of the tuning phase, which leave
    the test part alone.

    Raises:
        StudyError: a batch size is larger than the training part, or a loss is one of another task.
    """
    from renorm.comparison.forecast import baselines
    from renorm.comparison.panel import Panel

    num_train = splits.num("train")
    norms, frames = study.norm, [("", 0)]
    if isinstance(splits, Panel):
        norms, frames = (*norms, *baselines(splits)), list(itertools.product(study.pooling, study.bar))
    sizes = tuple(dict.fromkeys(num_train if size == "all" else size for size in study.batch_size))
    too_large = [size for size in sizes if size > num_train]
    if too_large:
        raise StudyError(
            f"a batch must fit into the training part of {num_train} samples; got batch_size {too_large[0]}; "
            f"write a batch size of at most {num_train}{'' if isinstance(splits, Panel) else ', or all'}"
        )
    losses = dict.fromkeys(objectives.find(splits.task, name) for name in study.loss)
    models = study.model if models is None else models
    choices = itertools.product(models, study.optimizer, study.activation, losses, study.dropout, study.lr)
    axes = itertools.product(frames, norms, sizes, choices)
    return tuple(
        TrialSpec(
            data=splits.fingerprint,
            model=model,
            norm=norm,
            batch_size=batch_size,
            lr=rate * _scale(study, batch_size),
            base_lr=rate,
            optimizer=optimizer,
            activation=activation,
            loss=loss,
            dropout=dropout,
            epochs=study.epochs,
            seed=seed,
            test=test and splits.num("test") > 0,
            pooling=pooling,
            bar=bar,
        )
        for (pooling, bar), norm, batch_size, (model, optimizer, activation, loss, dropout, rate) in axes
        for seed in study.seeds
    )


def _scale(study: Study, batch_size: int) -> float:
    return batch_size / REFERENCE_BATCH if study.lr_scale == "linear" else 1.0


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StudyError(f"no study file at {path}: write the path of a TOML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"{path} cannot be read as a study file: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise StudyError(f"{path} is not valid TOML: {error}") from None
    settings = {key.replace("-", "_"): value for key, value in raw.items()}
    unknown = [key for key in settings if key not in Study.model_fields]
    if unknown:
        raise StudyError(f"{path}: {_unknown('setting', unknown[0], Study.model_fields)}")
    return settings


def _slug(text: str) -> str:
    """The name of a file, function or model without what a folder's name should not have."""
    stem = Path(text.rpartition(":")[2]).stem
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._") or "study"


def _unknown(noun: str, name: str, known: Iterable[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(names)}"
    return f"unknown {noun} {name!r}: {hint}"


_HINTS: Mapping[str, str] = {
    "norm": "for example batch,group(32)",
    "batch_size": "whole numbers from 1, for example 2,32, or all for the whole training part",
    "lr": "numbers above 0, for example 0.01,0.1",
    "optimizer": "for example sgd,adam",
    "activation": "for example relu,gelu",
    "loss": "for example cross_entropy,label_smoothing",
    "dropout": "shares from 0 on and below 1, for example 0,0.2",
    "seeds": "a number of seeds, for example 3, or the seeds themselves, for example 7,8,9",
    "epochs": "a whole number from 1",
    "valid": "a share between 0 and 1, for example 0.2",
    "test": "a share between 0 and 1, for example 0.2",
    "split_seed": "a whole number from 0",
    "name": "a folder's name: letters, digits, '.', '_' and '-'",
    "pooling": "local, pooled or static, or several with commas",
    "bar": "whole numbers from 1, for example 1,2,3",
    "gaps": "cut or join",
    "missing": "drop or last",
}


def _explain(detail: ErrorDetails) -> str:
    """One of pydantic's complaints in this package's words."""
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, RenormError):
        return str(cause)
    key = str(detail["loc"][0])
    came = detail["input"]
    shown = "nothing" if came in ([], (), "", None) else textwrap.shorten(repr(came), 80, placeholder=" ...")
    must = detail["msg"][0].lower() + detail["msg"][1:]
    hint = f"; write {_HINTS[key]}" if key in _HINTS else ""
    return f"{key}: {must}; got {shown}{hint}"
