"""What a module holds without registering it: layers in lists and dicts, tensors that want a gradient."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

__all__ = ["TORCH", "Hidden", "attributes", "hidden", "modules_of"]

# What torch keeps in every module. The mode, `training`, counts as an attribute.
TORCH = frozenset(nn.Module().__dict__) - {"training"}
_DEPTH = 3  # of lists in lists


@dataclass(frozen=True)
class Hidden:
    """One attribute that holds modules or tensors which are not registered."""

    owner: str  # the module's name, as in named_modules()
    attribute: str
    value: Any  # of the attribute
    modules: tuple[nn.Module, ...]
    tensors: tuple[Tensor, ...]  # that are in no module

    @property
    def name(self) -> str:
        """The attribute's name from the model."""
        return f"{self.owner}.{self.attribute}" if self.owner else self.attribute


def attributes(module: nn.Module) -> dict[str, Any]:
    """A module's attributes but parameters, buffers, submodules and hooks."""
    return {name: value for name, value in module.__dict__.items() if name not in TORCH}


def hidden(model: nn.Module) -> Iterator[Hidden]:
    """The attributes of all modules of the model with something in them that is not registered anywhere in it."""
    registered = {id(module) for module in model.modules()}
    known = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    for owner, module in model.named_modules():
        for attribute, value in attributes(module).items():
            found = list(_inside(value))
            modules = tuple(one for one in found if isinstance(one, nn.Module) and id(one) not in registered)
            tensors = tuple(one for one in found if isinstance(one, Tensor) and id(one) not in known)
            if modules or tensors:
                yield Hidden(owner, attribute, value, modules, tensors)


def modules_of(model: nn.Module) -> list[nn.Module]:
    """All modules that belong to a model, those it does not register among them."""
    found = {id(module): module for module in model.modules()}
    waiting = [model]
    while waiting:
        for item in hidden(waiting.pop()):
            for module in item.modules:
                if id(module) not in found:
                    found.update((id(inner), inner) for inner in module.modules())
                    waiting.append(module)
    return list(found.values())


def _inside(value: Any, depth: int = _DEPTH) -> Iterator[nn.Module | Tensor]:
    if isinstance(value, (nn.Module, Tensor)):
        yield value
    elif depth and isinstance(value, dict):
        for item in value.values():
            yield from _inside(item, depth - 1)
    elif depth and isinstance(value, (list, tuple, set, frozenset, deque)):
        for item in value:
            yield from _inside(item, depth - 1)
