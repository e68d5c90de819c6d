"""One household's power, minute by minute, for the studies of time series."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from renorm.comparison.series import Layout, read

__all__ = ["household", "windows"]

Array = npt.NDArray[np.float64]


@functools.lru_cache(maxsize=1)
def household() -> tuple[Array, ...]:
    """The four series, (259200,) each: 180 days at one minute; a missing value is nan."""
    return tuple(values[0] for values in read("household", Layout()).values)


def windows(series: Array, length: int, step: int = 1) -> Array:
    """Every `step`-th piece of the series that has no missing value: (pieces, length).

    >>> windows(np.array([1.0, 2.0, np.nan, 4.0, 5.0, 6.0]), 2)
    array([[1., 2.],
           [4., 5.],
           [5., 6.]])
    """
    every = np.lib.stride_tricks.sliding_window_view(series, length)[::step]
    holes = np.lib.stride_tricks.sliding_window_view(np.isnan(series), length)[::step]
    return every[~holes.any(1)]
