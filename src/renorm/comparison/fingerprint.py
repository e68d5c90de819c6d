"""The fingerprint of a model: it changes when the model's layers, weights or code change."""

from __future__ import annotations

import hashlib
import inspect
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from renorm.surgery.find import refuse_lazy

__all__ = ["fingerprint"]


def fingerprint(model: nn.Module | Callable[[], nn.Module], code: object = None) -> str:
    """16 hex digits of the layers, their weights, and the source files of all classes that are not torch's.

    A builder is taken for the model that it builds at seed 0, and for its own source file. ``code`` is one
    more thing whose source file counts. Modules that these files import are not followed. Raises SwapError for a lazy
    layer.

    >>> torch.manual_seed(0)
    <torch._C.Generator object at ...>
    >>> layer = nn.Linear(2, 3)
    >>> fingerprint(layer) == fingerprint(lambda: nn.Linear(2, 3))
    False
    """
    digest = hashlib.sha256()
    for part in _contents(model if isinstance(model, nn.Module) else _build(model)):
        digest.update(hashlib.sha256(part).digest())
    for thing in (model, code):
        if thing is not None and not isinstance(thing, nn.Module):
            digest.update(_code(thing))
    return digest.hexdigest()[:16]


def _build(builder: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return builder()


def _contents(model: nn.Module) -> Iterator[bytes]:
    refuse_lazy(model)
    yield repr(model).encode()
    for name, value in model.state_dict().items():
        yield name.encode()
        yield _bytes(value) if isinstance(value, torch.Tensor) else repr(value).encode()
    kinds = {type(module) for module in model.modules()}
    for kind in sorted(kinds, key=lambda kind: f"{kind.__module__}.{kind.__qualname__}"):
        if not kind.__module__.startswith("torch."):
            yield _code(kind)


def _bytes(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().cpu().contiguous()
    return f"{plain.dtype}{tuple(plain.shape)}".encode() + plain.flatten().view(torch.uint8).numpy().tobytes()


def _code(thing: object) -> bytes:
    """The source file's contents; without one (a notebook, a prompt) the functions' bytecode."""
    try:
        return Path(inspect.getsourcefile(thing) or "").read_bytes()  # type: ignore[arg-type]
    except (TypeError, OSError):
        members = vars(thing).values() if isinstance(thing, type) else [thing]
        return b"".join(_bytecode(member.__code__) for member in members if inspect.isfunction(member))


def _bytecode(code: types.CodeType) -> bytes:
    return code.co_code + repr(code.co_names).encode() + b"".join(map(_constant, code.co_consts))


def _constant(value: object) -> bytes:
    if isinstance(value, types.CodeType):
        return _bytecode(value)
    # A frozenset's order differs from process to process.
    return repr(sorted(map(repr, value)) if isinstance(value, frozenset) else value).encode()
