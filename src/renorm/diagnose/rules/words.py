"""How calls, modules, names and shapes are written in what a rule says."""

from __future__ import annotations

from collections.abc import Iterable

from torch.optim import Optimizer

from renorm.diagnose.trace import Node

__all__ = ["called", "came", "listed", "no_optimizer", "path", "said", "shown"]


def said(node: Node | None) -> str:
    """Who made a tensor, as the subject of a sentence."""
    return "the model" if node is None else node.where


def called(node: Node) -> str:
    """The call in a sentence: the name of its layer, which may be a bare number, with what it is."""
    if node.module is None:
        return node.where
    return f"{node.name} ({type(node.module).__name__})" if node.name else f"the model ({type(node.module).__name__})"


def path(name: str) -> str:
    """A module as code: ``model.stages[0].norm``."""
    return "model" + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in name.split(".") if part)


def listed(names: Iterable[str], most: int = 3) -> str:
    """Names in a sentence, the first few of many."""
    known = list(dict.fromkeys(names))
    if len(known) <= most:
        return ", ".join(known)
    return f"{', '.join(known[:most])} and {len(known) - most} more"


def shown(shape: tuple[int, ...]) -> str:
    """A shape in a sentence."""
    return "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"


def came(given: object) -> str:
    """What was given in the place of something else."""
    return f"the class {given.__name__}" if isinstance(given, type) else type(given).__name__


def no_optimizer(given: object) -> str:
    """What was given in the place of an optimizer, and what to write."""
    name = given.__name__ if isinstance(given, type) and issubclass(given, Optimizer) else "torch.optim.SGD"
    return f"got {came(given)}: write {name}(model.parameters(), lr=0.01)"
