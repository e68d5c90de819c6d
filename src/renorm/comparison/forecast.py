"""A trial of a forecast: one model for all series or one for each, or a baseline that learns nothing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from renorm.choices.objectives import OBJECTIVES
from renorm.comparison.panel import Panel, Part, Windows
from renorm.comparison.spec import EpochRecord, TrialResult, TrialSpec
from renorm.comparison.trial import Build, build_model, forecast_scores, run_trial, series_scores

__all__ = ["BASELINES", "POOLINGS", "baselines", "run_forecast"]

POOLINGS = ("local", "pooled", "static")
BASELINES = ("naive", "seasonal naive")  # the last value, and that of a season before: norms of a study without one


def baselines(panel: Panel) -> tuple[str, ...]:
    """Those that differ: without a season the seasonal one is the other."""
    return BASELINES if panel.season > 1 else BASELINES[:1]


def run_forecast(spec: TrialSpec, panel: Panel, build: Build = build_model) -> TrialResult:
    """Train and score as `spec` says; see :func:`renorm.comparison.trial.run_trial`.

    With the pooling "local" each series has a model of its own, from the same weights, and where it has fewer windows
    than a batch all of them at each step; the trial ends as the first of them that does not end well. Scores are means
    over series of equal weight: "mase", and "mse", "mae" and "correlation" in the units of each series; "loss" is that
    of the scaled target over all windows.
    """
    windows = panel.windows(spec.bar, static=spec.pooling == "static")
    if spec.norm in BASELINES:
        return _baseline(spec, panel, windows)
    if spec.pooling != "local":
        return run_trial(spec, windows, build)
    results = []
    for at in np.unique(windows.of["valid"]).tolist():  # the others end before, and there is nothing to score
        name = panel.names[at]
        own = windows.only(at)
        size = min(spec.batch_size, len(own.y_train))
        result = run_trial(replace(spec, batch_size=size), own, build)
        if result.status != "ok":
            return replace(result, spec=spec, reason=f"series {name!r}: {result.reason}")
        results.append(result)
    return _together(spec, windows, results)


def _baseline(spec: TrialSpec, panel: Panel, windows: Windows) -> TrialResult:
    season = 1 if spec.norm == BASELINES[0] else panel.season
    parts: tuple[Part, ...] = ("valid", "test") if spec.test and len(windows.y_test) else ("valid",)
    found: dict[str, dict[str, float]] = {}
    for part in parts:
        of = windows.of[part]
        forecast = (panel.repeated(part, season) - windows.means[of, None]) / windows.stds[of, None]
        target = torch.from_numpy(getattr(windows, f"y_{part}"))
        loss = OBJECTIVES["forecast"][spec.loss].value(torch.from_numpy(forecast), target)
        found[part] = forecast_scores(windows, part, forecast) | {"loss": loss.item()}
        series = series_scores(windows, part, forecast)
    return TrialResult(spec, "ok", valid=found["valid"], test=found.get("test", {}), series=series)


def _together(spec: TrialSpec, windows: Windows, results: Sequence[TrialResult]) -> TrialResult:
    """The trial of all series from those of single ones."""
    curve = [
        EpochRecord(
            step=sum(point.step for point in points),
            train_loss=_mean([point.train_loss for point in points]),
            valid_loss=_mean([point.valid_loss for point in points]),
            valid_score=_mean([point.valid_score for point in points]),
        )
        for points in zip(*(result.curve for result in results), strict=True)
    ]
    return TrialResult(
        spec,
        "ok",
        valid=_mean_scores([result.valid for result in results], windows, "valid"),
        test=_mean_scores([result.test for result in results], windows, "test"),
        curve=tuple(curve),
        num_parameters=sum(result.num_parameters for result in results),
        num_steps=sum(result.num_steps for result in results),
        seconds_per_step=statistics.median(result.seconds_per_step for result in results),
        peak_memory_mb=max(result.peak_memory_mb for result in results),
        series={name: scores for result in results for name, scores in result.series.items()},
    )


def _mean_scores(scores: Sequence[dict[str, float]], windows: Windows, part: Part) -> dict[str, float]:
    """Series of equal weight, but for the loss, which is the mean over windows."""
    keys = dict.fromkeys(key for of in scores for key in of)
    found = {key: _mean([of[key] for of in scores if key in of]) for key in keys}
    counts = np.bincount(windows.of[part], minlength=len(windows.names))[np.unique(windows.of["valid"])]
    if "loss" in found:
        found["loss"] = math.fsum(n * of["loss"] for n, of in zip(counts, scores, strict=True) if n) / int(counts.sum())
    return found


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan
