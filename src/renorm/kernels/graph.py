"""The native and the Triton kernels as operators of a traced graph: what `torch.compile` sees in place of raw pointers.

Functional, with shapes for tracing and a backward that is an operator too. The partition travels as text, so that
a graph can be stored and run by another process.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from renorm.kernels import fused, native, reference
from renorm.kernels.moments import Affine, Moments
from renorm.pattern import Partition, partition

__all__ = ["normalize", "to_text"]


def to_text(part: Partition) -> str:
    """The partition as an argument of the operators."""
    sizes = {name: size for name, size in zip(part.names, part.sizes, strict=True) if size is not None}
    return json.dumps([part.pattern.text, part.rank, sizes, [part.names[i] for i in part.weighted]])


@lru_cache(maxsize=1024)
def _from_text(text: str) -> Partition:
    pattern, rank, sizes, weighted = json.loads(text)
    return partition(pattern, rank, sizes, tuple(weighted))


def _stat_shape(x: Tensor, part: Partition) -> list[int]:
    split = part.view(x).shape
    return [split[i] if i in part.kept else 1 for i in range(len(split))]


@torch.library.custom_op("renorm::normalize", mutates_args=())
def _normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    part: str,
    eps: float,
    about_zero: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    read = _from_text(part)
    made = native.fit(x, read, weight, bias, mask, backend)
    if isinstance(made, str):
        moments = reference.measure(x, read, mask=mask, about_zero=about_zero)
        scale = torch.rsqrt(moments.var + eps)
        y = reference.apply(x, read, Affine(scale, None if about_zero else moments.mean), weight, bias, mask=mask)
        rows = (moments.mean, moments.var, moments.count.expand(moments.mean.shape), scale)
        return _like(y, x), torch.stack(rows).to(torch.float64)
    y, stats = fused.normalize(x, read, made, weight, bias, eps, about_zero=about_zero, mask=mask)
    assert stats is not None
    return _like(y, x), native.stats_to_view(stats, made, read).contiguous()


def _like(y: Tensor, x: Tensor) -> Tensor:
    """`y` with the strides that tracing was told."""
    expected = torch.empty_like(x)
    return y if y.stride() == expected.stride() else expected.copy_(y)


@_normalize.register_fake
def _(
    x: Tensor, weight: Any, bias: Any, mask: Any, part: str, eps: float, about_zero: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty([4, *_stat_shape(x, _from_text(part))], dtype=torch.float64)


@torch.library.custom_op("renorm::normalize_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    stats: Tensor,
    part: str,
    eps: float,
    about_zero: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    read = _from_text(part)
    made = native.fit(x, read, weight, bias, mask, backend)
    empty = x.new_empty(0)
    if isinstance(made, str):
        leaf = x.detach().requires_grad_()
        others = [None if t is None else t.detach().requires_grad_() for t in (weight, bias)]
        with torch.enable_grad():
            y = fused.by_reference(leaf, read, others[0], others[1], eps, about_zero, mask)
            found = torch.autograd.grad(y, [leaf, *(t for t in others if t is not None)], dy)
        rest = iter(found[1:])
        dw, db = (empty.clone() if t is None else next(rest).contiguous() for t in others)
        return _like(found[0], x), dw, db
    inner = native.stats_to_kernel(list(stats), made, read)
    wants = (True, True, True)
    dx, *others = fused.gradients(x, dy, made, read, inner, weight, bias, eps, about_zero, mask, wants)
    assert dx is not None
    dw, db = (empty.clone() if t is None else t.contiguous() for t in others)
    return _like(dx, x), dw, db


@_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Any,
    bias: Any,
    mask: Any,
    stats: Tensor,
    part: str,
    eps: float,
    about_zero: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    empty = x.new_empty(0)
    dw = empty if weight is None else weight.new_empty(weight.shape)
    db = empty.clone() if bias is None else bias.new_empty(bias.shape)
    return torch.empty_like(x), dw, db


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, bias, mask, part, eps, about_zero, backend = inputs
    ctx.save_for_backward(x, weight, bias, mask, output[1])
    ctx.rest = part, eps, about_zero, backend


def _differentiate(ctx: Any, dy: Tensor, _: Tensor) -> Any:
    x, weight, bias, mask, stats = ctx.saved_tensors
    dx, dw, db = _backward(dy, x, weight, bias, mask, stats, *ctx.rest)
    needs = ctx.needs_input_grad
    return (
        dx if needs[0] else None,
        dw if needs[1] else None,
        db if needs[2] else None,
        *(None,) * 5,
    )


_normalize.register_autograd(_differentiate, setup_context=_keep)


def normalize(
    x: Tensor,
    part: Partition,
    text: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    about_zero: bool = False,
    mask: Tensor | None = None,
    backend: str = "native",
) -> tuple[Tensor, Moments]:
    """`fused.normalize` inside a graph, `text` being `to_text(part)`; and the moments, without a gradient."""
    y, stats = _normalize(x, weight, bias, mask, text, eps, about_zero, backend)
    mean, var, count, _ = stats.detach()
    return y, Moments(count, mean, var, part.names)
