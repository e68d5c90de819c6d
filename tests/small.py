"""A small classification study for tests that train: two features, two classes, a few dozen samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from renorm.comparison.data import Splits, from_parts
from renorm.comparison.spec import TrialResult, TrialSpec
from renorm.comparison.store import Store
from renorm.comparison.study import Study, grid


def parts(num_samples: int = 48) -> tuple[tuple[Any, Any], tuple[Any, Any], tuple[Any, Any]]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, num_samples, 2)).astype(np.float32)
    y = (x.sum(2) > 0).astype(np.int64)
    return (x[0], y[0]), (x[1], y[1]), (x[2], y[2])


def splits() -> Splits:
    return from_parts(*parts())


def study(**settings: Any) -> Study:
    return Study(**{"norm": "batch,layer", "batch_size": 8, "seeds": 2, "epochs": 2, **settings})


def specs(**settings: Any) -> tuple[TrialSpec, ...]:
    return grid(study(**settings), splits())


def store(folder: Path) -> Store:
    """A store that holds the data."""
    made = Store(folder)
    with made.open():
        made.write_data(splits())
    return made


def scores(result: TrialResult) -> tuple[Any, ...]:
    """All of a result that does not depend on the machine's speed."""
    return result.spec, result.status, result.reason, result.valid, result.test, result.curve, result.num_steps


def csv(path: Path, num_rows: int = 60) -> Path:
    """A table with the columns a, b and the target kind."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(num_rows, 2))
    rows = (f"{a:.4f},{b:.4f},{'up' if a + b > 0 else 'down'}" for a, b in x)
    path.write_text("\n".join(["a,b,kind", *rows]) + "\n")
    return path
