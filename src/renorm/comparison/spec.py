"""What the stages of a comparison hand to each other: a trial's spec, its result, and the study's record."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from renorm.comparison.strict import decode, encode

__all__ = [
    "PRIMARY",
    "CaseRecord",
    "EpochRecord",
    "Setting",
    "StudyRecord",
    "TrialResult",
    "TrialSpec",
    "varying_fields",
]

# The score that trials are ranked by, by task.
PRIMARY = {"classification": "error", "regression": "rmse", "forecast": "mase"}

Status = Literal["ok", "diverged", "refused", "failed"]


@dataclass(frozen=True)
class TrialSpec:
    """Everything that decides the outcome of one training run; two equal specs give equal results."""

    data: str  # fingerprint of the prepared data, see data.Splits.fingerprint
    model: str  # built-in name, "module:function@<fingerprint>", or "python:<fingerprint>"
    norm: str  # "batch", "group(32)", "none", ...: what norms.named.parse reads; of a forecast see forecast.BASELINES
    batch_size: int  # samples a step; the last incomplete batch of an epoch is dropped
    lr: float  # the learning rate the optimizer gets, already scaled to the batch size
    base_lr: float  # the learning rate the study names, before that scaling
    optimizer: str  # "sgd", "momentum", "adam", "adamw"
    activation: str  # "relu", "gelu", ...
    loss: str  # what training minimizes, see choices.objectives
    dropout: float  # share of entries that are set to 0 in training
    epochs: int  # passes over the training part
    seed: int  # decides the initial weights and the order of the samples
    test: bool = True  # read the test part at the end; False while a learning rate is being tuned
    pooling: str = ""  # of a forecast: "local", "pooled" or "static"
    bar: int = 0  # of a forecast: steps that an entry of the past holds

    @property
    def key(self) -> str:
        """16 hex digits that name this spec: the file name of its result."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, order=True)
class Setting:
    """All choices of a trial but its norm, in the order in which a report goes through them."""

    model: str
    optimizer: str
    activation: str
    loss: str
    dropout: float
    base_lr: float | None  # None where each norm has its own, tuned one
    pooling: str
    bar: int
    batch_size: int

    @classmethod
    def of(cls, spec: TrialSpec, *, tuned: bool = False) -> Setting:
        """The setting of a trial; `tuned`: the learning rate is no part of it."""
        values = {choice.name: getattr(spec, choice.name) for choice in fields(cls)}
        return cls(**(values | {"base_lr": None} if tuned else values))


def varying_fields(settings: Iterable[Setting]) -> tuple[str, ...]:
    """The names of the choices in which settings differ."""
    found = set(settings)
    return tuple(choice.name for choice in fields(Setting) if len({getattr(one, choice.name) for one in found}) > 1)


@dataclass(frozen=True)
class EpochRecord:
    """One point of a learning curve."""

    step: int  # optimizer steps taken so far
    train_loss: float  # mean training loss over the epoch's steps, in training mode
    valid_loss: float  # loss on the validation part, in evaluation mode
    valid_score: float  # error rate (0 to 1), RMSE (target's units) or MASE on the validation part


@dataclass(frozen=True)
class CaseRecord:
    """One of the samples that a trial's model was worst at."""

    index: int  # row of the test part, or of the validation part where there is no test part
    loss: float
    prediction: float  # a class index, or a number in the target's units
    confidence: float | None  # the probability of the predicted class; None in a regression
    target: float  # as prediction
    neighbors: tuple[tuple[int, float], ...] = ()  # nearest in the last hidden layer: row of the training part, target


@dataclass(frozen=True)
class TrialResult:
    """What one trial gave; it is one JSON file in the store."""

    spec: TrialSpec
    status: Status  # "refused": the norm makes no sense for this model and batch, nothing was trained
    reason: str = ""  # why a trial that is not "ok" is not, in a sentence
    valid: dict[str, float] = field(default_factory=dict)  # final scores on the validation part
    test: dict[str, float] = field(default_factory=dict)  # final scores on the test part
    curve: tuple[EpochRecord, ...] = ()
    num_parameters: int = 0
    num_steps: int = 0
    seconds_per_step: float = math.nan  # median over the steps: data, forward, backward, update
    peak_memory_mb: float = math.nan  # peak resident memory above that before the trial's model was built
    criteria: dict[str, float] = field(default_factory=dict)  # log_likelihood, k, n, aic, aicc, bic: closer.py
    worst: tuple[CaseRecord, ...] = ()  # the highest losses first
    # Of a forecast, for each series of the part that gives the scores: score -> (value, low, high).
    series: dict[str, dict[str, tuple[float, float, float]]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values; nan and inf are written as strings."""
        encoded: dict[str, Any] = encode(asdict(self))
        return encoded

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> TrialResult:
        """The inverse of :meth:`to_json`."""
        values = decode(raw)
        values["spec"] = TrialSpec(**values["spec"])
        values["curve"] = tuple(EpochRecord(**point) for point in values["curve"])
        values["worst"] = tuple(
            CaseRecord(**{**case, "neighbors": tuple(map(tuple, case["neighbors"]))})
            for case in values.get("worst", ())
        )
        series = values.get("series", {})
        values["series"] = {name: {key: tuple(ends) for key, ends in of.items()} for name, of in series.items()}
        return cls(**values)


@dataclass(frozen=True)
class StudyRecord:
    """What a study folder says of itself; written before the first trial, read by the report."""

    name: str  # the folder's name under renorm-runs/
    task: Literal["classification", "regression", "forecast"]
    settings: dict[str, Any]  # the study file's values, defaults filled in
    data: dict[str, Any]  # name, source, num_train, num_valid, num_test, shape, classes, target, notes
    model: str  # the model in words, one line a layer, for the first norm
    versions: dict[str, str]  # python, renorm, torch, numpy, machine
    command: str  # what to type to run it again
    keys: tuple[str, ...]  # TrialSpec.key of each trial of the grid, in the grid's order

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        encoded: dict[str, Any] = encode(asdict(self))
        return encoded

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> StudyRecord:
        """The inverse of :meth:`to_json`."""
        values = decode(raw)
        values["keys"] = tuple(values["keys"])
        return cls(**values)
