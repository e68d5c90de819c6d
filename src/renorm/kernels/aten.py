"""Torch's own fused kernels, for the partitions they compute exactly.

`recognize` reads a partition's roles; the other functions reshape to what torch wants and call it. Reshaping
is free where the memory allows it; `select` decides whether it does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from renorm.kernels.moments import Moments
from renorm.pattern import Partition

__all__ = [
    "Direct",
    "batch_norm",
    "batch_norm_in_training",
    "direct",
    "fixed_norm",
    "group_norm",
    "layer_norm",
    "recognize",
    "rms_norm",
]

# Roles of the split view's axes, see Partition.roles. The first that fits is the fastest.
_FORMS = (
    ("layer_norm", re.compile(r"k*(r+|R+)\Z")),  # whole trailing axes, parameters along all of them or none
    ("group_norm", re.compile(r"k*K*R*r*\Z")),  # samples, groups, channels of a group, positions
    ("batch_norm", re.compile(r"r*(k+|K+)r*\Z")),  # everything but the channels
    ("layer_norm", re.compile(r"k*(r+|R+)k*\Z")),  # axes in the middle, moved to the end and back
)


def recognize(part: Partition) -> str | None:
    """The name of the torch kernel that computes this partition, or None."""
    return next((name for name, form in _FORMS if form.match(part.roles)), None)


Direct = Callable[[Tensor, Tensor | None, Tensor | None, float], Tensor]


def direct(x: Tensor, part: Partition, op: str, weight: Tensor | None, bias: Tensor | None) -> Direct | None:
    """The kernel as a function of (x, weight, bias, eps) where neither input nor output needs a new shape or layout.

    For inputs of this shape and these strides; it goes around the checks in torch.nn.functional, which cost as
    much as a small tensor's norm.
    """
    if any(p is not None and p.dim() != 1 and op != "layer_norm" for p in (weight, bias)):
        return None
    if op == "batch_norm":
        if _channels_second(x, part) is not x:
            return None
        return lambda x, weight, bias, eps: torch.batch_norm(x, weight, bias, None, None, True, 0.0, eps, True)
    if not x.is_contiguous():
        return None
    if op == "layer_norm" and part.reduced[-1] == len(part.names) - 1 and len(part.names) == x.dim():
        shape = list(x.shape[part.reduced[0] :])
        if any(p is not None and list(p.shape) != shape for p in (weight, bias)):
            return None
        return lambda x, weight, bias, eps: torch.layer_norm(x, shape, weight, bias, eps, True)
    if op == "group_norm":
        samples, groups, channels, _ = _group_sizes(x, part)
        if x.shape[:2] == (samples, groups * channels):
            return lambda x, weight, bias, eps: torch.group_norm(x, groups, weight, bias, eps, True)
    return None


def layer_norm(x: Tensor, part: Partition, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`F.layer_norm` over the reduced axes."""
    v, shape = _reduced_last(part.view(x), part)
    y = F.layer_norm(v, shape, _shaped(weight, shape), _shaped(bias, shape), eps)
    return _like(_reduced_back(y, part), x)


def rms_norm(x: Tensor, part: Partition, weight: Tensor | None, eps: float) -> Tensor:
    """`F.rms_norm` over the reduced axes."""
    v, shape = _reduced_last(part.view(x), part)
    return _like(_reduced_back(F.rms_norm(v, shape, _shaped(weight, shape), eps), part), x)


def group_norm(x: Tensor, part: Partition, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`F.group_norm` on (samples, channels, positions)."""
    samples, groups, channels, positions = _group_sizes(x, part)
    as_it_is = x.shape[:2] == (samples, groups * channels)
    v = x.contiguous() if as_it_is else x.reshape(samples, groups * channels, positions)
    return _like(F.group_norm(v, groups, _flat(weight), _flat(bias), eps), x)


def _group_sizes(x: Tensor, part: Partition) -> list[int]:
    """Samples, groups, channels of a group, positions."""
    split = zip(part.view(x).shape, part.roles, strict=True)
    sizes = [(size, letter) for size, letter in split]
    return [math.prod([size for size, letter in sizes if letter == role]) for role in "kKRr"]


def batch_norm(
    x: Tensor, part: Partition, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Moments]:
    """`F.batch_norm` in training mode, and the moments it computed on the way."""
    v, split = _channels_second(x, part), part.view(x).shape
    channels = v.shape[1]
    # Torch wants its statistics in the parameters' dtype; without parameters half precision takes float32.
    half = x.dtype in (torch.float16, torch.bfloat16)
    dtype = weight.dtype if weight is not None else torch.float32 if half else x.dtype
    # Momentum 1 turns torch's running statistics into this batch's own: exact, without a pass of our own.
    mean, unbiased = v.new_zeros(channels, dtype=dtype), v.new_zeros(channels, dtype=dtype)
    y = F.batch_norm(v, mean, unbiased, _flat(weight), _flat(bias), True, 1.0, eps)
    n = math.prod([split[i] for i in part.reduced])
    shape = [1 if i in part.reduced else size for i, size in enumerate(split)]
    count = mean.new_full([1] * len(split), n, dtype=torch.float32)
    var = unbiased * ((n - 1) / max(n, 1))
    return _like(y, x), Moments(count, mean.reshape(shape), var.reshape(shape), part.names)


def batch_norm_in_training(
    x: Tensor,
    part: Partition,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    running: tuple[Tensor, Tensor],
    momentum: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`F.batch_norm` with running mean and variance, and what these would become; they themselves are not touched."""
    # Clones: autograd keeps what torch is given here, and a later change of it would be an error in backward.
    mean, var = running[0].clone(), running[1].clone()
    v = _channels_second(x, part)
    y = F.batch_norm(v, mean.view(-1), var.view(-1), _flat(weight), _flat(bias), True, momentum, eps)
    return _like(y, x), mean, var


def fixed_norm(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`F.batch_norm` in evaluation mode: given statistics for each entry of dimension 1."""
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)


def _channels_second(x: Tensor, part: Partition) -> Tensor:
    """`x` itself where dimension 1 is the kept one, so that channels_last and deployment tools see through."""
    if [part.dims[i] for i in part.kept] == [1] and part.dims.count(1) == 1:
        return x
    roles = part.roles.lower()
    first, last = roles.index("k"), roles.rindex("k") + 1
    split = part.view(x).shape
    shape = [math.prod(split[:first]), math.prod(split[first:last]), math.prod(split[last:])]
    return x.reshape(shape if last < len(split) else shape[:2])


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _reduced_last(v: Tensor, part: Partition) -> tuple[Tensor, torch.Size]:
    """A split view with its reduced axes, which are neighbours, moved to the end; and their sizes."""
    if part.reduced[-1] != v.dim() - 1:
        v = v.movedim(part.reduced, tuple(range(-len(part.reduced), 0)))
    return v, v.shape[-len(part.reduced) :]


def _reduced_back(y: Tensor, part: Partition) -> Tensor:
    if part.reduced[-1] == y.dim() - 1:
        return y
    return y.movedim(tuple(range(-len(part.reduced), 0)), part.reduced)


def _flat(parameter: Tensor | None) -> Tensor | None:
    """Parameters along several dimensions as the vector torch wants."""
    return parameter if parameter is None or parameter.dim() == 1 else parameter.flatten()


def _shaped(parameter: Tensor | None, shape: torch.Size) -> Tensor | None:
    return parameter if parameter is None or parameter.shape == shape else parameter.reshape(shape)


def _like(y: Tensor, x: Tensor) -> Tensor:
    """`y` in x's shape, dtype (autocast may have widened it) and memory format."""
    # Each of these is a node in the graph of the backward pass: only where something changes.
    if y.shape != x.shape:
        y = y.reshape(x.shape)
    if y.dtype != x.dtype:
        y = y.to(x.dtype)
    if x.is_contiguous():
        return y.contiguous()
    layout = _CHANNELS_LAST.get(x.dim())
    if layout is None or not x.is_contiguous(memory_format=layout):
        return y
    return y.contiguous(memory_format=layout)
