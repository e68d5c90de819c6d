"""Made-up studies: records and results as a store would hold them, without training anything."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from renorm.comparison.spec import EpochRecord, StudyRecord, TrialResult, TrialSpec

NORMS = ("none", "batch", "layer", "group", "rms", "switch")
NUM_TEST = 360

Study = tuple[StudyRecord, list[TrialResult]]


def spec(norm: str = "batch", batch_size: int = 32, seed: int = 0, **changes: Any) -> TrialSpec:
    base = TrialSpec(
        data="0123456789abcdef",
        model="mlp",
        norm=norm,
        batch_size=batch_size,
        lr=0.1 * batch_size / 32,
        base_lr=0.1,
        optimizer="sgd",
        activation="relu",
        loss="cross_entropy",
        dropout=0.0,
        epochs=8,
        seed=seed,
    )
    return replace(base, **changes)


def result(trial: TrialSpec, score: float, *, rmse: bool = False, epochs: int = 8, **changes: Any) -> TrialResult:
    rng = np.random.default_rng([trial.seed, trial.batch_size, len(trial.norm)])
    speed = 1.5 + 0.6 * (sum(map(ord, trial.norm)) % 5)
    decay = np.exp(-np.arange(1, epochs + 1) / speed) * (1 + 0.3 * rng.random(epochs))
    curve = tuple(
        EpochRecord(step=(i + 1) * (1078 // trial.batch_size), train_loss=float(2 * d + 0.01),
                    valid_loss=float(2 * d + 0.05 + score / 10), valid_score=float(score + d))
        for i, d in enumerate(decay)
    )  # fmt: skip
    key = "rmse" if rmse else "error"
    base = TrialResult(
        spec=trial,
        status="ok",
        valid={key: score * 1.1, "loss": 0.3},
        test={key: score, "loss": 0.3},
        curve=curve,
        num_parameters=42_000 + 128 * len(trial.norm),
        num_steps=curve[-1].step if curve else 0,
        seconds_per_step=4e-4 * (1 + trial.batch_size / 64) * (1 + 0.1 * trial.seed),
        peak_memory_mb=30.0 + trial.batch_size / 4,
    )
    return replace(base, **changes)


def stopped(trial: TrialSpec, status: Any, reason: str, curve: tuple[EpochRecord, ...] = ()) -> TrialResult:
    return TrialResult(spec=trial, status=status, reason=reason, curve=curve)


def record(results: Sequence[TrialResult], *, task: Any = "classification", **changes: Any) -> StudyRecord:
    base = StudyRecord(
        name="digits-mlp",
        task=task,
        settings={"data": "digits", "model": "mlp", "norm": list(NORMS), "batch_size": [2, 32], "seeds": [0, 1, 2],
                  "lr": [0.1], "lr_scale": "linear", "tune_lr": False, "epochs": 8},
        data={"name": "digits", "source": "scikit-learn's digits", "num_train": 1078, "num_valid": 359,
              "num_test": NUM_TEST, "shape": [1, 8, 8], "classes": [str(i) for i in range(10)],
              "target": "" if task == "classification" else "progression", "notes": ["pixels divided by 16"]},
        model="(0): Flatten()\n(1): Linear(64, 128)\n(2): BatchNorm1d(128)\n(3): ReLU()",
        versions={"python": "3.11.2", "renorm": "0.1.0", "torch": "2.13.0", "numpy": "2.2.0", "machine": "x86_64"},
        command="renorm compare --epochs 8",
        keys=tuple(item.spec.key for item in results),
    )  # fmt: skip
    return replace(base, **changes)


def study_of(scores: dict[tuple[str, int], Iterable[float]], **changes: Any) -> Study:
    """A study from (norm, batch size) -> the score of each seed; the order of the keys is the grid's."""
    rmse = changes.get("task") == "regression"
    results = [
        result(spec(norm, size, seed), value, rmse=rmse)
        for (norm, size), values in scores.items()
        for seed, value in enumerate(values)
    ]
    return record(results, **changes), results


def edited(study: Study, edit: Callable[[TrialResult], TrialResult | None]) -> Study:
    """The same study with some results changed or, where `edit` gives None, not run yet."""
    results = [changed for item in study[1] if (changed := edit(item)) is not None]
    return study[0], results


def typical() -> Study:
    """Six norms, two batch sizes, three seeds; instance norm refused, one diverged seed, times that are unknown."""
    means = {"none": 0.053, "batch": 0.014, "layer": 0.018, "group": 0.021, "rms": 0.022, "switch": 0.019}
    scores = {
        (norm, size): [
            round((0.36 if (norm, size) == ("batch", 2) else mean) * NUM_TEST + shift) / NUM_TEST
            for shift in ((0, 1, 2) if norm != "rms" else (3, 0, 1))
        ]
        for norm, mean in means.items()
        for size in (2, 32)
    }
    _, results = study_of(scores)
    reason = "instance norm averages over one value on inputs of shape (2, 128): it would return its bias"
    results += [stopped(spec("instance", size, seed), "refused", reason) for size in (2, 32) for seed in range(3)]
    results = [_typical_edit(item) for item in results]
    return record(results), results


def _typical_edit(item: TrialResult) -> TrialResult:
    if item.spec.norm == "none" and item.spec.batch_size == 32 and item.spec.seed == 1:
        spoilt = replace(item.curve[2], train_loss=math.nan, valid_loss=math.inf)
        return stopped(item.spec, "diverged", "the loss was nan after 99 steps", (*item.curve[:2], spoilt))
    if item.spec.norm == "switch":
        return replace(item, peak_memory_mb=math.nan)
    return item


def regression() -> Study:
    """The regression twin: an RMSE near 54 in the target's units."""
    scores = {
        (norm, size): [54.0 + 2 * place + 3 * seed + (9 if size == 2 else 0) for seed in range(3)]
        for place, norm in enumerate(NORMS)
        for size in (2, 32)
    }
    return study_of(scores, task="regression")


def large(num_trials: int = 500, epochs: int = 50) -> Study:
    """Many trials with long curves: six norms over batch sizes and optimizers."""
    results = []
    for index in range(num_trials):
        trial = spec(
            NORMS[index % 6],
            2 ** (1 + index // 30 % 6),
            index // 6 % 5,
            optimizer=("sgd", "momentum", "adam")[index // 180],
        )
        results.append(result(trial, 0.02 + 0.001 * (index % 7), epochs=epochs))
    return record(results), results
