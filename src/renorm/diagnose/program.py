"""The program that `renorm check` is pointed at: what its function returned, and the lines that findings are about."""

from __future__ import annotations

import inspect
import re
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from renorm.diagnose.finding import Finding
from renorm.errors import RuleError

__all__ = ["Place", "arguments", "place_of"]

_ORDER = ("model", "loss", "optimizer", "loader")
_NAMES = (*_ORDER, "batch")


@dataclass(frozen=True)
class Place:
    """A line of the user's code."""

    file: str  # from the current folder where it is inside of it, with forward slashes
    line: int  # from 1


def arguments(returned: Any, name: str) -> dict[str, Any]:
    """`check`'s arguments in what the function called `name` returned.

    A model alone, (model, loss, optimizer, loader) or a beginning of it, or a dict of the arguments.

    Raises RuleError for anything else.

    >>> model, loss = nn.Linear(2, 2), nn.MSELoss()
    >>> sorted(arguments((model, loss), "train.py:build"))
    ['loss', 'model']
    """
    if isinstance(returned, Mapping):
        found = dict(returned)
    elif isinstance(returned, (tuple, list)) and len(returned) <= len(_ORDER):
        found = dict(zip(_ORDER, returned, strict=False))
    else:
        found = {"model": returned}
    unknown = [str(key) for key in found if key not in _NAMES]
    if unknown or not isinstance(found.get("model"), nn.Module):
        what = f"a dict with {', '.join(unknown)}" if unknown else _described(returned)
        raise RuleError(
            f"{name} must return a model, (model, loss, optimizer, loader), or a dict of {', '.join(_NAMES)}; it "
            f"returned {what}"
        )
    return found


def _described(returned: Any) -> str:
    if isinstance(returned, (tuple, list)):
        return f"({', '.join(type(item).__name__ for item in returned)})"
    if isinstance(returned, Mapping):
        return f"a dict with {', '.join(map(str, returned)) or 'nothing'}"
    return type(returned).__name__


def place_of(finding: Finding, model: nn.Module, build: Callable[..., Any]) -> Place:
    """The line where the module to blame is made, in the class of the user's that has it, or the class; else `build`.

    A layer of a library or of torch is found in the module of the user's that holds it.
    """
    name, attribute = finding.module, ""
    while finding.module:
        try:
            found = _place_in(type(model.get_submodule(name)), attribute)
        except AttributeError:  # not a module's name: a function, a parameter
            found = None
        if found is not None:
            return found
        if not name:
            break
        name, _, attribute = name.rpartition(".")
    return _place_in(build, "") or Place(_relative(Path(inspect.getfile(build))) if _has_file(build) else ".", 1)


def _place_in(thing: Any, attribute: str) -> Place | None:
    """The line of a class or function of the user's, or in it that of ``self.attribute = ...``."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(thing))
        lines, first = inspect.getsourcelines(inspect.unwrap(thing))
    except (TypeError, OSError):
        return None
    if file is None or _is_library(Path(file)):
        return None
    assigned = re.compile(rf"\s*self\.{re.escape(attribute)}\s*(:[^=]*)?=[^=]") if attribute else None
    for number, line in enumerate(lines):
        if assigned is not None and assigned.match(line):
            return Place(_relative(Path(file)), first + number)
    return Place(_relative(Path(file)), max(first, 1))


def _has_file(thing: Any) -> bool:
    try:
        return bool(inspect.getfile(thing))
    except TypeError:
        return False


def _is_library(file: Path) -> bool:
    paths = sysconfig.get_paths()
    ours = Path(__file__).parents[1]
    return any(file.is_relative_to(folder) for folder in (paths["stdlib"], paths["purelib"], paths["platlib"], ours))


def _relative(file: Path) -> str:
    full = file.resolve()
    here = Path.cwd().resolve()
    return (full.relative_to(here) if full.is_relative_to(here) else full).as_posix()
