"""Numbers that are not finite, in JSON, which has none: as strings."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["decode", "encode"]

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def encode(value: Any) -> Any:
    """Plain JSON values of nested dicts, lists and tuples.

    >>> encode({"loss": (1.5, float("inf"))})
    {'loss': [1.5, 'Infinity']}
    """
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def decode(value: Any) -> Any:
    """What `encode` was given, with lists for tuples; a text that reads like such a number becomes one."""
    if isinstance(value, dict):
        return {key: decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [decode(item) for item in value]
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value
