"""The replications by name."""

from __future__ import annotations

import importlib
from difflib import get_close_matches

from renorm.errors import StudyError
from renorm.studies.replication import Replication

__all__ = ["NAMES", "get"]

# In the order of the documentation. The name is that of the module, with hyphens.
NAMES: tuple[str, ...] = (
    "small-batches",
    "text-statistics",
    "smoothness",
    "style",
    "robustness",
    "batch-renorm",
    "switch-weights",
    "lstm-layer-norm",
    "pooling",
    "mse-and-correlation",
    "model-selection",
    "optimizers",
    "divergences",
)


def get(name: str) -> Replication:
    """The replication of this name.

    Raises StudyError for another name.
    """
    if name not in NAMES:
        near = get_close_matches(name, NAMES, 1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise StudyError(f"a study is one of {', '.join(NAMES)}; got {name!r}{meant}")
    found: Replication = importlib.import_module(f"renorm.studies.{name.replace('-', '_')}").REPLICATION
    return found
