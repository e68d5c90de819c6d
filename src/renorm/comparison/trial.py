"""One trial: a model trained as its spec says, and what came of it."""

from __future__ import annotations

import contextlib
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from renorm.choices import models, optimizers
from renorm.choices.objectives import OBJECTIVES, Objective
from renorm.choices.reversible import Reversible, parted
from renorm.comparison.closer import criteria_of, worst_of
from renorm.comparison.data import Splits
from renorm.comparison.memory import PeakMemory
from renorm.comparison.panel import Part, Windows
from renorm.comparison.spec import PRIMARY, EpochRecord, TrialResult, TrialSpec
from renorm.errors import StudyError
from renorm.measures.scores import regression_scores
from renorm.norms.norm import Norm

__all__ = [
    "FORECAST_SCORES",
    "Build",
    "Data",
    "build_model",
    "check_model",
    "forecast_scores",
    "run_trial",
    "sample_order",
    "series_scores",
]

Data = Splits | Windows
Build = Callable[[TrialSpec, Data], nn.Module]

FORECAST_SCORES = ("mase", "mse", "mae", "correlation")
EVALUATION_BATCH = 1024  # samples at once in evaluation: no result depends on it, memory does
CHECKED = 32  # samples on which a model is tried
WARM_UP_STEPS = 5  # not counted in the time per step: the first ones allocate and plan


def build_model(spec: TrialSpec, splits: Data) -> nn.Module:
    """The built-in model that the spec names, for samples of the data's shape; see :mod:`renorm.choices.models`.

    Raises:
        StudyError: no built-in model is called that, or it cannot take the data.
    """
    reversible, norm = parted(spec.norm)
    choices: dict[str, Any] = {"norm": norm, "activation": spec.activation, "dropout": spec.dropout}
    if not isinstance(splits, Windows):
        return models.build(spec.model, splits.input_shape, splits.num_outputs, **choices)
    model = models.forecaster(spec.model, splits.input_shape, splits.horizon, **choices)
    return Reversible(model, splits.input_shape[0] - splits.num_static) if reversible else model


def run_trial(spec: TrialSpec, splits: Data, build: Build = build_model) -> TrialResult:
    """Train one model as `spec` says and score it; equal arguments give equal results, but for times and memory.

    The model and everything random in it (weights, dropout) come from torch's, NumPy's and Python's
    generators, seeded with `spec.seed`; the order of the samples is :func:`sample_order`. An epoch is as
    many full batches as the training part has; the incomplete one at its end is dropped. The loss is
    `spec.loss`, of the standardized target in a regression; the learning rate is constant. The
    test part is read after training, and only if `spec.test`.

    A result that is not "ok" says why in `reason`: "refused" if a norm would compute a statistic from a single value,
    "diverged" at the first loss that is not finite (the curve up to there is kept), "failed" if the model raised an
    exception or there is no full batch. It runs in one thread; random number generators, the default dtype and the
    thread count are left as they were.

    Args:
        spec: what to train.
        splits: the prepared data; `spec.data` should be its fingerprint.
        build: makes the model; it is called twice, since a model that only tries the shapes is thrown away.

    Scores: "error" (0 to 1) and "loss" in a classification; "rmse" and "mae" in the target's units, "r2",
    "correlation" and "loss" in a regression. "r2" and "correlation" are nan where they are not defined. Of a forecast
    see :mod:`renorm.comparison.forecast`.
    """
    memory = PeakMemory()
    run = _Run(spec, splits, TrialResult(spec, "failed"))
    with _isolated():
        try:
            run.check_batch_size()
            _seed(spec.seed)
            run.rehearse(build(spec, splits))
            _seed(spec.seed)
            memory.start()
            model = build(spec, splits)
            run.train(model)
            run.result = replace(run.result, peak_memory_mb=memory.peak_mb())
            run.look_closer(model)
        except _Stop as stop:
            run.result = replace(run.result, status=stop.status, reason=stop.reason)
        # a user's model may raise anything, and one trial must not end the study
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {error}"
            run.result = replace(run.result, status="failed", reason=reason)
    if math.isnan(run.result.peak_memory_mb):  # it ended before training did
        run.result = replace(run.result, peak_memory_mb=memory.peak_mb())
    return replace(
        run.result,
        curve=tuple(run.curve),
        num_steps=len(run.step_seconds),
        seconds_per_step=_typical(run.step_seconds),
    )


@torch.no_grad()
def check_model(model: nn.Module, spec: TrialSpec, splits: Data) -> str:
    """See that a model takes the data, in evaluation mode, and gives what the task needs; a note where there is one.

    Raises:
        StudyError: it raises something, or its output has another shape.
    """
    x, y = (torch.tensor(values[:CHECKED]) for values in (splits.x_train, splits.y_train))
    try:
        output = model.eval()(x)
    except (Exception, SystemExit) as error:
        raise StudyError(
            f"the model must take samples of the shape {tuple(x.shape[1:])}; it raised {type(error).__name__}: {error}"
        ) from error
    _Run(spec, splits, TrialResult(spec, "failed"))._loss(output, y)
    if splits.classes and bool((output >= 0).all()) and bool(((output.sum(1) - 1).abs() < 1e-4).all()):
        return (
            "the model's outputs are probabilities, and the loss takes what goes into a softmax: leave the softmax out"
        )
    return ""


def sample_order(num_samples: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order of the training samples in an epoch (from 0): the same for all norms, batch sizes and rates.

    >>> sample_order(5, seed=0, epoch=0)
    array([...])
    """
    return np.random.default_rng([seed, epoch]).permutation(num_samples)


class _Stop(Exception):
    """Training ends here with a result that is not "ok"."""

    def __init__(self, status: Literal["refused", "diverged", "failed"], reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


@dataclass
class _Run:
    """A trial while it runs."""

    spec: TrialSpec
    splits: Data
    result: TrialResult
    curve: list[EpochRecord] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)

    @property
    def _objective(self) -> Objective:
        return OBJECTIVES[self.splits.task][self.spec.loss]

    def check_batch_size(self) -> None:
        """Stop if the training part has no full batch."""
        num_train, size = len(self.splits.y_train), self.spec.batch_size
        if not 0 < size <= num_train:
            raise _Stop("failed", f"batch size {size} needs as many samples; the training part has {num_train}")

    def rehearse(self, model: nn.Module) -> None:
        """Take one step with a model that is thrown away; stop if a norm computes a statistic from one value.

        It is a whole step, because the first one in a process also loads parts of torch, and neither its
        time nor its memory is the model's.
        """

        def check(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            shape = tuple(inputs[0].shape)
            if isinstance(layer, Norm) and _takes_one_value(layer, shape):
                what = f"{self.spec.norm} norm averages over one value on inputs of shape {shape}"
                raise _Stop("refused", f"{what}: it would return its bias")

        for layer in model.modules():
            if isinstance(layer, Norm):
                layer.register_forward_pre_hook(check)
        optimizer = optimizers.build(self.spec.optimizer, model.parameters(), self.spec.lr)
        x, y = next(self._batches(0))
        try:
            self._loss(model.train()(x), y).backward()  # type: ignore[no-untyped-call]
        except ValueError as error:
            # torch's own layers in a user's model say so themselves
            if not str(error).startswith("Expected more than 1"):
                raise
            raise _Stop("refused", f"{self.spec.norm} norm cannot train on this batch: {error}") from error
        optimizer.step()

    def train(self, model: nn.Module) -> None:
        """All epochs, then the scores."""
        spec, splits = self.spec, self.splits
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.result = replace(self.result, num_parameters=num_parameters)
        optimizer = optimizers.build(spec.optimizer, model.parameters(), spec.lr)
        valid: dict[str, float] = {}
        for epoch in range(spec.epochs):
            train_loss = self._train_epoch(model.train(), optimizer, epoch)
            valid, output = self._score(model.eval(), "valid")
            score = valid[PRIMARY[splits.task]]
            self.curve.append(EpochRecord(len(self.step_seconds), train_loss, valid["loss"], score))
            if not math.isfinite(valid["loss"]):
                raise _Stop("diverged", f"the validation loss is {valid['loss']} after epoch {epoch + 1}")
        test: dict[str, float] = {}
        series: dict[str, dict[str, tuple[float, float, float]]] = {}
        if spec.test and len(splits.y_test):
            test, output = self._score(model.eval(), "test")
        if isinstance(splits, Windows) and (test or not spec.test):
            series = series_scores(splits, "test" if test else "valid", output)
        self.result = replace(self.result, status="ok", valid=valid, test=test, series=series)

    def look_closer(self, model: nn.Module) -> None:
        """Keep worst cases and information criteria of the trained model, but for a rate that is being tuned."""
        if isinstance(self.splits, Splits) and (self.spec.test or not len(self.splits.y_test)):
            criteria = criteria_of(model.eval(), self.splits, self._objective.noise)
            worst = worst_of(model, self.splits)
            self.result = replace(self.result, criteria=criteria, worst=worst)

    def _train_epoch(self, model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> float:
        """One pass over the training part; returns the mean loss."""
        total, begin = 0.0, len(self.step_seconds)
        start = time.perf_counter()
        for x, y in self._batches(epoch):
            optimizer.zero_grad()
            loss = self._loss(model(x), y)
            value = loss.item()
            if not math.isfinite(value):
                raise _Stop("diverged", f"the training loss is {value} at step {len(self.step_seconds) + 1}")
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += value
            end = time.perf_counter()
            self.step_seconds.append(end - start)
            start = end
        return total / (len(self.step_seconds) - begin)

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The epoch's full batches, in its order."""
        size, splits = self.spec.batch_size, self.splits
        order = sample_order(len(splits.y_train), self.spec.seed, epoch)
        order = order[: len(order) // size * size]
        # gathered once an epoch: at two samples a step, gathering each batch would cost as much as its layers
        x, y = torch.from_numpy(splits.x_train[order]), torch.from_numpy(splits.y_train[order])
        return zip(torch.split(x, size), torch.split(y, size), strict=True)

    def _loss(self, output: Tensor, y: Tensor) -> Tensor:
        if self.splits.classes:
            self._check_output(output, (len(y), len(self.splits.classes)))
        elif not isinstance(output, Tensor) or output.shape != y.shape:
            # (N, 1) against (N,) would broadcast to (N, N) without an error
            self._check_output(output, (len(y), 1, *y.shape[1:]))
            output = output.reshape(y.shape)
        return self._objective.value(output, y)

    def _check_output(self, output: Tensor, expected: tuple[int, ...]) -> None:
        if not isinstance(output, Tensor):
            raise StudyError(f"the model must return one tensor; it returned a {type(output).__name__}")
        if tuple(output.shape) != expected:
            raise StudyError(
                f"the model's output must have the shape {expected} for {expected[0]} samples of this data; "
                f"it has {tuple(output.shape)}"
            )

    @torch.no_grad()
    def _score(self, model: nn.Module, part: Part) -> tuple[dict[str, float], npt.NDArray[Any]]:
        """The scores of a part, from a model in evaluation mode, and its output."""
        x, y = getattr(self.splits, f"x_{part}"), getattr(self.splits, f"y_{part}")
        # copied batch by batch: a model may work in place, and the data is not its to change
        rows = range(0, len(y), EVALUATION_BATCH)
        output = torch.cat([model(torch.tensor(x[row : row + EVALUATION_BATCH])) for row in rows])
        loss = self._loss(output, torch.tensor(y)).item()
        values = output.numpy()
        if isinstance(self.splits, Windows):
            return forecast_scores(self.splits, part, values.reshape(y.shape)) | {"loss": loss}, values.reshape(y.shape)
        if self.splits.classes:
            return {"error": float(np.mean(values.argmax(1) != y)), "loss": loss}, values
        return _regression_scores(values.reshape(-1), y, self.splits.target_std) | {"loss": loss}, values


def _typical(step_seconds: list[float]) -> float:
    """The median step, without the first ones where there are others."""
    counted = step_seconds[WARM_UP_STEPS:] or step_seconds
    return statistics.median(counted) if counted else math.nan


def _takes_one_value(layer: Norm, shape: tuple[int, ...]) -> bool:
    if type(layer).solve is not Norm.solve or layer.one_value == "running":
        # what one set lacks, it takes from others or from the running statistics
        return False
    from_batch = layer.running_mean is None or (layer.training and not layer.frozen)
    return from_batch and layer.values_per_set(shape) == 1


def _regression_scores(predicted: npt.NDArray[Any], y: npt.NDArray[Any], target_std: float) -> dict[str, float]:
    """Scores of standardized predictions, in the target's units where they have any."""
    units = {"rmse": target_std, "mae": target_std, "r2": 1.0, "correlation": 1.0}
    if not np.isfinite(predicted).all():
        return dict.fromkeys(units, math.nan)
    scores = regression_scores(y, predicted, num_resamples=0)
    return {name: scores[name].value * unit for name, unit in units.items()}


def forecast_scores(windows: Windows, part: Part, forecast: npt.NDArray[Any]) -> dict[str, float]:
    """Means over the series of a part, nan where a forecast is not finite; empty for an empty part."""
    if not len(windows.of[part]):
        return {}
    scores = windows.scores(part, forecast)
    return {name: scores[name].value if scores else math.nan for name in FORECAST_SCORES}


def series_scores(
    windows: Windows, part: Part, forecast: npt.NDArray[Any]
) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Each series' scores with their intervals over time."""
    scores = windows.scores(part, forecast, intervals=True)
    if scores is None:
        return {}
    return {
        name: {key: (of[key].value, of[key].low, of[key].high) for key in FORECAST_SCORES}
        for name, of in scores.parts.items()
    }


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    # a user's model may draw from NumPy's global generator
    np.random.seed(seed % 2**32)  # noqa: NPY002


@contextlib.contextmanager
def _isolated() -> Iterator[None]:
    """Whatever is done to torch's, NumPy's and Python's global state in here is undone at the end."""
    dtype, threads, python_state = torch.get_default_dtype(), torch.get_num_threads(), random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(1)  # the order of a sum depends on it, and so does a trial of many steps
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_default_dtype(dtype)
            np.random.set_state(numpy_state)  # noqa: NPY002
            random.setstate(python_state)
