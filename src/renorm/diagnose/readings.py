"""Numbers of tensors for `watch`: computed where the tensors are, and fetched with one wait for each device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["MAX_COPIED", "entries_of", "fetch", "local_of", "norms_of", "rows_of", "steps_over"]

MAX_COPIED = 2**22  # entries of a parameter that are copied to see how it changes; rows of larger ones


def local_of(x: Tensor) -> Tensor:
    """The part of a distributed tensor that is here."""
    return x.to_local() if hasattr(x, "to_local") else x


def entries_of(grad: Tensor) -> Tensor:
    """All values of a gradient, or those of a sparse one that are there."""
    return grad.coalesce().values() if grad.is_sparse else grad


def steps_over(p: Tensor) -> int:
    """Of how many rows of a parameter one is copied."""
    step = -(-p.numel() // MAX_COPIED)
    return step if p.dim() and len(p) >= step else 1


def rows_of(p: Tensor) -> Tensor:
    """All of a parameter, or rows of a large one."""
    p = local_of(p.detach())
    step = steps_over(p)
    return p[::step] if step > 1 else p


def norms_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Their L2 norms, in float32 at least."""
    plain = [torch.view_as_real(t.detach()) if t.is_complex() else t.detach() for t in tensors]
    found: list[Tensor] = [torch.tensor(0.0)] * len(plain)
    for places in grouped(plain):
        dtype = torch.promote_types(plain[places[0]].dtype, torch.float32)
        for i, norm in zip(places, torch._foreach_norm([plain[i] for i in places], 2, dtype=dtype), strict=True):
            found[i] = norm
    return found


def grouped(tensors: list[Tensor]) -> Iterable[list[int]]:
    groups: dict[Any, list[int]] = {}
    for i, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype), []).append(i)
    return groups.values()


def fetch(tensors: list[Tensor]) -> list[list[float]]:
    """Their values, with one wait for each device."""
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    parts: dict[torch.device, list[tuple[list[int], Tensor]]] = {}
    for places in grouped(flat):
        device = flat[places[0]].device
        wide = torch.float32 if device.type == "mps" else torch.float64
        parts.setdefault(device, []).append((places, torch.cat([flat[i] for i in places]).to(wide)))
    values: list[list[float]] = [[]] * len(tensors)
    for groups in parts.values():
        fetched_values = iter(torch.cat([whole for _, whole in groups]).tolist())
        for places, _ in groups:
            for i in places:
                values[i] = [next(fetched_values) for _ in range(flat[i].numel())]
    return values
