"""The paths of a study's optimizers on two test functions, as pictures for its report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
import torch

from renorm.choices.optimizers import FUNCTIONS, NAMES, draw_trajectory, trajectory
from renorm.comparison.study import RATES

__all__ = ["path_pictures"]

SHOWN = ("ravine", "rosenbrock")
STEPS = 100


def path_pictures(optimizers: Iterable[str]) -> tuple[str, ...]:
    """A picture as SVG for each function, each optimizer at its best of `RATES`; none of fewer than two optimizers."""
    names = tuple(dict.fromkeys(name for name in optimizers if name in NAMES))
    return tuple(_picture(names, function) for function in SHOWN) if len(names) > 1 else ()


@cache
def _picture(names: Sequence[str], function: str) -> str:
    rates = {name: min(RATES, key=lambda rate: _height(name, function, rate)) for name in names}
    return draw_trajectory(names, function, STEPS, rates).svg


def _height(name: str, function: str, rate: float) -> float:
    """Where a path ends; infinite where it left all bounds."""
    end = torch.from_numpy(trajectory(name, function, STEPS, rate)[-1])
    return float(np.nan_to_num(float(FUNCTIONS[function].value(*end)), nan=np.inf, posinf=np.inf))
