"""Scores of predictions: classification, regression and forecasting, each with an interval of 95 %.

An interval is by `renorm.measures.bootstrap`: how much the score moves with the choice of test samples, not with the
training run. What is not defined, such as the recall of a class that does not occur, is nan; draws in which it is not
are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from renorm.errors import MeasureError
from renorm.measures.bootstrap import Array, Score, Values, bootstrapped
from renorm.measures.reading import read

__all__ = ["Score", "Scores", "classification_scores", "forecasting_scores", "regression_scores"]

Labels = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Scores:
    """All scores of a task by their names: ``scores["accuracy"].value``; as text, a table."""

    task: Literal["classification", "regression", "forecasting"]
    num_samples: int  # rows of the target
    values: dict[str, Score]  # of all samples
    parts: dict[str, dict[str, Score]]  # of each class or series, by its name

    def __getitem__(self, name: str) -> Score:
        return self.values[name]

    def __str__(self) -> str:
        lines = [(name, str(score)) for name, score in self.values.items()]
        lines += [(f"{name} of {part}", str(score)) for part in self.parts for name, score in self.parts[part].items()]
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:<{width}}  {score}" for name, score in lines)


def classification_scores(
    target: Any,
    output: Any,
    *,
    given: Literal["labels", "probs", "logits"],
    classes: Sequence[str] | None = None,
    num_bins: int = 15,
    num_resamples: int = 1000,
    block: int = 1,
    seed: int = 0,
) -> Scores:
    r"""How well classes are predicted, and how well the probabilities are calibrated.

    $$\text{balanced accuracy} = \frac1K \sum_k \frac{TP_k}{TP_k + FN_k}, \qquad
    F_1 = \frac1K \sum_k \frac{2 TP_k}{2 TP_k + FP_k + FN_k}, \qquad
    ECE = \sum_b \frac{n_b}{n} |\text{acc}_b - \text{conf}_b|$$

    Args:
        target: (n,), class indices.
        output: predicted class indices (n,), or probabilities or logits: (n, K), or of class 1 of two: (n,) or (n, 1).
        given: what `output` is.
        classes: their names, in order; their indices where there are none.
        num_bins: of equal width, for the calibration error.
        num_resamples: draws of the bootstrap; 0 for no intervals.
        block: how many samples in a row are drawn together; more than 1 for a time series.
        seed: of the bootstrap.

    values: accuracy; balanced_accuracy, the mean recall of the classes that occur in the target; f1, the mean over the
    classes that occur in target or prediction; for probabilities and logits log_loss, in nats, and ece, the expected
    calibration error of the most probable class's probability. parts: recall, precision, f1 and support, the number of
    samples, of each class. All equal scikit-learn's and torchmetrics'.

    Raises MeasureError for other shapes, labels that are no class indices, no probabilities, no sample, and options out
    of range. ECE: Guo et al. 2017, "On Calibration of Modern Neural Networks" (arXiv:1706.04599).

    >>> found = classification_scores([0, 0, 0, 1], [0, 0, 0, 0], given="labels", num_resamples=0)
    >>> found["accuracy"].value, found["balanced_accuracy"].value, found.parts["1"]["recall"].value
    (0.75, 0.5, 0.0)
    """
    if given not in ("labels", "probs", "logits"):
        raise MeasureError(f"given must be 'labels', 'probs' or 'logits'; got {given!r}")
    truth = _labels("target", target)
    if given == "labels":
        log, predicted = None, _labels("output", output)
        num_classes = max(int(max(truth.max(), predicted.max())) + 1, len(classes or ()))
    else:
        log = _log_probabilities(output, given)
        predicted, num_classes = log.argmax(1), log.shape[1]
    if len(predicted) != len(truth):
        raise MeasureError(f"target and output must have equally many samples; got {len(truth)} and {len(predicted)}")
    names = [str(name) for name in (classes if classes is not None else range(num_classes))]
    if len(set(names)) != num_classes or int(truth.max()) >= num_classes:
        raise MeasureError(
            "there must be a name of its own for each class and a class for each label; got "
            f"{len(set(names))} different names, {num_classes} classes and labels up to {int(truth.max())}"
        )
    if num_bins < 1:
        raise MeasureError(f"num_bins must be at least 1; got {num_bins}")
    measure = _classification(truth, predicted, log, names, num_bins)
    return _scores("classification", len(truth), bootstrapped(measure, len(truth), num_resamples, block, seed))


def regression_scores(
    target: Any, prediction: Any, *, num_resamples: int = 1000, block: int = 1, seed: int = 0
) -> Scores:
    r"""How far predictions are from real targets, and how far they go along with them: two questions.

    $$MSE = \underbrace{(\bar p - \bar y)^2}_{\text{bias}^2} + (s_p - s_y)^2 + 2 (1 - r) s_p s_y, \qquad
    R^2 = 1 - \frac{MSE}{s_y^2}$$

    with p the predictions, y the targets, s their standard deviations (of n, not n - 1) and r their correlation. So a
    part of the data where the targets vary less can have the lower MSE and the lower correlation: no bug.

    Args:
        target: (n,) or (n, m): numbers.
        prediction: numbers of the same shape; (n, 1) and (n,) fit each other.
        num_resamples: draws of the bootstrap over the n rows; 0 for no intervals.
        block: how many rows in a row are drawn together; more than 1 for a time series.
        seed: of the bootstrap.

    values, over all n m numbers: mse, rmse and mae in the target's unit (mse: squared), bias, target_std and
    prediction_std in it; r2; correlation (Pearson's) and rank_correlation (Spearman's), nan where either side is
    constant, as is r2 where the targets are.

    Raises MeasureError for other shapes, numbers that are NaN or infinite, no sample, and options out of range.
    Murphy 1988, "Skill Scores Based on the Mean Square Error".

    >>> found = regression_scores([1.0, 2.0, 3.0, 4.0], [11.0, 12.0, 13.0, 14.0], num_resamples=0)
    >>> found["mse"].value, round(found["correlation"].value, 9), found["r2"].value
    (100.0, 1.0, -79.0)
    """
    y, p = _numbers(target, prediction)
    values = bootstrapped(_regression(y, p), len(y), num_resamples, block, seed)
    return _scores("regression", len(y), values)


def forecasting_scores(
    target: Any,
    prediction: Any,
    *,
    series: Sequence[Any] | npt.NDArray[Any],
    history: Mapping[Any, Any],
    season: int = 1,
    num_resamples: int = 1000,
    block: int = 1,
    seed: int = 0,
) -> Scores:
    r"""How good forecasts of several series are, each on its own and on average.

    $$MASE = \frac{\text{mean} |y - p|}{\text{mean}_t |h_t - h_{t - m}|}$$

    with h the past that the model was trained on and m the season: below 1 the forecast is nearer than the (seasonal)
    naive one was on that past.

    Args:
        target: (n,) or (n, horizon): what came, in order of time.
        prediction: forecasts of the same shape.
        series: (n,), which series each row is of.
        history: for each of them its past, in order of time, nan where it is not known.
        season: m, in steps; 1 for the last value.
        num_resamples: draws of the bootstrap; 0 for no intervals.
        block: how many rows of a series are drawn together; at least the horizon where windows overlap.
        seed: of the bootstrap.

    values: the scores of `regression_scores` and mase, each a mean over the series in which it is defined, all of equal
    weight; the interval is over the choice of series. Of one series they are its own. parts: those of each series, with
    the interval over its rows. mase is inf where the past never changed, and nan where the forecasts hit besides.

    Raises MeasureError as `regression_scores` does, and for series without a past longer than the season.
    Hyndman & Koehler 2006, "Another Look at Measures of Forecast Accuracy".

    >>> found = forecasting_scores([5.0, 7.0], [4.0, 7.0], series=["a", "a"], history={"a": [1, 3, 5]}, num_resamples=0)
    >>> found["mase"].value, found["mse"].value
    (0.25, 0.5)
    """
    y, p = _numbers(target, prediction)
    ids = np.asarray(series)
    if ids.shape != (len(y),):
        raise MeasureError(f"series must have one entry for each of the {len(y)} rows; got shape {ids.shape}")
    parts: dict[str, dict[str, Score]] = {}
    for name in np.unique(ids):
        scale = _naive_error(history, name.item() if isinstance(name, np.generic) else name, season)
        rows = ids == name
        measure = _forecast(y[rows], p[rows], scale)
        found = bootstrapped(measure, int(rows.sum()), num_resamples, block, seed)
        parts[str(name)] = {key: score for (_, key), score in found.items()}
    first = next(iter(parts.values()))
    if len(parts) == 1:
        return Scores("forecasting", len(y), first, parts)
    table = np.array([[scores[key].value for key in first] for scores in parts.values()])

    def average(weight: Array) -> Values:
        known = ~np.isnan(table) & (weight > 0)[:, None]
        weights = weight[:, None] * known
        means = _ratio((np.where(known, table, 0) * weights).sum(0), weights.sum(0))
        return {("", key): float(value) for key, value in zip(first, means, strict=True)}

    overall = bootstrapped(average, len(parts), num_resamples, 1, seed)
    return Scores("forecasting", len(y), {key: score for (_, key), score in overall.items()}, parts)


def _classification(
    truth: Labels, predicted: Labels, log: Array | None, names: list[str], num_bins: int
) -> Callable[[Array], Values]:
    """The scores of a classification by the weights of its samples."""
    hit = (predicted == truth).astype(np.float64)
    if log is not None:
        losses, confidence = -log[np.arange(len(truth)), truth], np.exp(log.max(1))
        # Bins are open on the left: (0, 1/15], (1/15, 2/15], ...
        bins = np.clip(np.ceil(confidence * num_bins).astype(np.intp) - 1, 0, num_bins - 1)

    def measure(weight: Array) -> Values:
        right, true, claimed = (
            np.bincount(of, by, len(names)).astype(np.float64)
            for of, by in ((truth, weight * hit), (truth, weight), (predicted, weight))
        )
        recall, precision, f1 = _ratio(right, true), _ratio(right, claimed), _ratio(2 * right, true + claimed)
        found = {
            ("", "accuracy"): right.sum() / weight.sum(),
            ("", "balanced_accuracy"): np.nanmean(recall),
            ("", "f1"): np.nanmean(f1),
        }
        if log is not None:
            drawn = weight > 0  # a loss can be infinite, and 0 times that is NaN
            found["", "log_loss"] = np.sum(losses[drawn] * weight[drawn]) / weight.sum()
            gap = np.bincount(bins, weight * (hit - confidence), num_bins)
            found["", "ece"] = np.abs(gap).sum() / weight.sum()
        for k, name in enumerate(names):
            found |= {(name, "recall"): recall[k], (name, "precision"): precision[k], (name, "f1"): f1[k]}
            found[name, "support"] = true[k]
        return {key: float(value) for key, value in found.items()}

    return measure


def _regression(y: Array, p: Array) -> Callable[[Array], Values]:
    """The scores of a regression by the weights of its rows."""
    columns = y.shape[1]
    y, p = y.ravel(), p.ravel()
    ranks = _ranks(y), _ranks(p)
    wrong = p - y

    def measure(weight: Array) -> Values:
        weight = np.repeat(weight, columns)
        share = weight / weight.sum()
        y_var, p_var, correlation = _correlation(share, y, p)
        mse = float(share @ wrong**2)
        found = {
            "mse": mse,
            "rmse": math.sqrt(mse),
            "mae": float(share @ np.abs(wrong)),
            "r2": 1 - mse / y_var if y_var else math.nan,
            "correlation": correlation,
            "rank_correlation": _correlation(share, *[rank(weight) for rank in ranks])[2],
            "bias": float(share @ wrong),
            "target_std": math.sqrt(y_var),
            "prediction_std": math.sqrt(p_var),
        }
        return {("", key): value for key, value in found.items()}

    return measure


def _forecast(y: Array, p: Array, scale: float) -> Callable[[Array], Values]:
    regression = _regression(y, p)

    def measure(weight: Array) -> Values:
        found = regression(weight)
        mae = found["", "mae"]
        found["", "mase"] = mae / scale if scale else math.inf if mae else math.nan
        return found

    return measure


def _naive_error(history: Mapping[Any, Any], name: Any, season: int) -> float:
    if season < 1:
        raise MeasureError(f"season must be at least 1; got {season}")
    if name not in history:
        raise MeasureError(f"history must have the past of every series; that of {name!r} is not there")
    past = _numpy(history[name]).astype(np.float64)
    if past.ndim != 1 or len(past) <= season or np.isinf(past).any():
        raise MeasureError(
            f"the past of {name!r} must be longer than the season of {season}, and finite or, where it is not known, "
            f"nan; got shape {past.shape}"
        )
    apart = np.abs(past[season:] - past[:-season])
    if np.isnan(apart).all():
        raise MeasureError(f"the past of {name!r} must have two known values a season of {season} apart; it has none")
    return float(np.nanmean(apart))


def _correlation(share: Array, y: Array, p: Array) -> tuple[float, float, float]:
    """Both variances, exactly 0 where there is none, and Pearson's correlation."""
    apart = []
    for values in (y, p):
        drawn = values[share > 0]
        apart.append(np.zeros_like(values) if drawn.min() == drawn.max() else values - share @ values)
    y_var, p_var, both = (float(share @ (a * b)) for a, b in ((apart[0],) * 2, (apart[1],) * 2, apart))
    if not (y_var and p_var):
        return y_var, p_var, math.nan
    correlation = both / math.sqrt(y_var) / math.sqrt(p_var)
    return y_var, p_var, max(-1.0, min(1.0, correlation))  # rounding can take it past 1


def _ranks(values: Array) -> Callable[[Array], Array]:
    """The mean ranks of the values when each is there as often as its weight says; what is equal has the same."""
    _, which = np.unique(values, return_inverse=True)

    def rank(weight: Array) -> Array:
        count = np.bincount(which, weight)
        return (np.cumsum(count) - (count - 1) / 2)[which]

    return rank


def _ratio(over: Array, under: Array) -> Array:
    """Nan where it is not defined."""
    return np.divide(over, under, out=np.full_like(over, np.nan), where=under > 0)


def _scores(task: Literal["classification", "regression"], num: int, found: dict[tuple[str, str], Score]) -> Scores:
    parts: dict[str, dict[str, Score]] = {}
    for (part, name), score in found.items():
        parts.setdefault(part, {})[name] = score
    return Scores(task, num, parts.pop(""), parts)


def _numpy(values: Any) -> npt.NDArray[Any]:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.double() if values.is_floating_point() else values  # NumPy has no bfloat16
    return np.asarray(values)


def _array(name: str, values: Any) -> Array:
    array = _numpy(values)
    if array.size == 0 or array.dtype.kind not in "iufb" or not np.isfinite(array).all():
        raise MeasureError(
            f"{name} must be finite real numbers, one at least; got shape {array.shape} of {array.dtype}, empty or "
            "with NaN or inf: leave these samples out of target and prediction"
        )
    return array.astype(np.float64)


def _numbers(target: Any, prediction: Any) -> tuple[Array, Array]:
    """Both as (n, m)."""
    y, p = _array("target", target), _array("prediction", prediction)
    if y.shape != p.shape and {y.shape, p.shape} != {(len(y),), (len(y), 1)}:
        raise MeasureError(f"target and prediction must have the same shape; got {y.shape} and {p.shape}")
    if y.ndim not in (1, 2):
        raise MeasureError(f"targets must have the shape (n,) or (n, m); got {y.shape}")
    return y.reshape(len(y), -1), p.reshape(len(y), -1)


def _labels(name: str, values: Any) -> Labels:
    labels = _numpy(values)
    if labels.ndim != 1 or labels.size == 0 or labels.dtype.kind not in "iub" or labels.min() < 0:
        raise MeasureError(
            f"{name} must be class indices (n,), whole numbers from 0 and one at least; got shape {labels.shape} of "
            f"{labels.dtype}: write .argmax(1) for one-hot rows, .long() for floats"
        )
    return labels.astype(np.intp)


def _log_probabilities(output: Any, given: Literal["probs", "logits"]) -> Array:
    """(n, K), in nats."""
    values = torch.as_tensor(output)
    values = values if values.is_floating_point() else values.float()
    if values.dim() == 2 and values.shape[1] == 1:
        values = values.squeeze(1)  # of one class nothing is to be told: it is a column
    if values.dim() == 1:  # of class 1
        values = torch.stack([1 - values, values] if given == "probs" else [torch.zeros_like(values), values], 1)
    if values.dim() != 2:
        raise MeasureError(
            f"{given} must have the shape (n, K), or (n,) or (n, 1) for two classes; got {tuple(values.shape)}"
        )
    ((_, log),), _ = read([values], (given,), -1)
    result: Array = log.detach().cpu().double().numpy()
    return result
