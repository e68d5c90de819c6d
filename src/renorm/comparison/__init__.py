"""The comparison of norms on one model and data set: trials, the store that keeps them, what they show.

A study (`study`) becomes a grid of trial specs (`spec`); each is trained by itself (`trial`) on data that was prepared
once (`data`) and kept as one file (`store`, `run`); what they show (`analysis`) goes into a table (`terminal`) and a
report (`report`), which read the store and nothing else. `api` ties these together.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from renorm.comparison.api import compare, run_study
    from renorm.comparison.comparison import Best, Comparison
    from renorm.comparison.study import Study

__all__ = ["Best", "Comparison", "Study", "compare", "run_study"]

_HOMES = {"Best": "comparison", "Comparison": "comparison", "Study": "study", "compare": "api", "run_study": "api"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
