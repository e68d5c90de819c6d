"""The rules, a file for each family; importing this package fills the catalogue."""

from renorm.diagnose.rules import (
    activations,
    curves,
    data,
    depth,
    gradients,
    loops,
    losses,
    modes,
    norms,
    optimizer,
    parameters,
    settings,
    state,
    steps,
    structure,
    targets,
)

__all__ = [
    "activations",
    "curves",
    "data",
    "depth",
    "gradients",
    "loops",
    "losses",
    "modes",
    "norms",
    "optimizer",
    "parameters",
    "settings",
    "state",
    "steps",
    "structure",
    "targets",
]
