"""The two calls on tensors, of the extension or Triton: layouts, parameters and statistics in the kernels' order.

And who works out gradients.

`fused` and `apart` are built on them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from renorm.errors import ShapeError
from renorm.kernels import extension
from renorm.kernels.moments import Moments
from renorm.kernels.nest import Nest, nest
from renorm.kernels.triton import available
from renorm.pattern import Partition

__all__ = [
    "ACTIVATIONS",
    "SLOPE",
    "address",
    "aliases",
    "backward",
    "fit",
    "forward",
    "from_kernel",
    "gradients_by_torch",
    "learns",
    "lying",
    "mask_for",
    "moments_of",
    "needs_a_graph",
    "new_stats",
    "output",
    "run",
    "stats_to_kernel",
    "stats_to_view",
    "to_kernel",
    "why_not",
]


def why_not(x: Tensor, backend: str = "native") -> str | None:
    """The reason against these kernels for `x`."""
    return available.why_not(x) if backend == "triton" else extension.why_not(x)


def fit(
    x: Tensor,
    part: Partition,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None = None,
    backend: str = "native",
) -> Nest | str:
    """The nest for this call, or the reason why the kernels of `backend`, native or Triton's, cannot run it."""
    reason = why_not(x, backend)
    if reason is not None:
        return reason
    dtypes = available.DTYPES if backend == "triton" else extension.DTYPES
    for parameter in (weight, bias):
        if parameter is None:
            continue
        if parameter.dtype not in dtypes or parameter.device != x.device:
            return f"the parameters are {parameter.dtype} on {parameter.device.type}"
        if type(parameter) not in (Tensor, torch.nn.Parameter, type(x)):
            return f"a parameter is a {type(parameter).__name__}"
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        return "weight and bias differ in dtype"
    if mask is not None and mask.device != x.device:
        return f"the mask is on {mask.device.type}"
    return nest(part, x.shape, x.stride(), None if mask is None else mask.stride(), backend)


def lying(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """`x` itself where it has these strides, a copy that has them otherwise."""
    if x.stride() == strides:
        return x
    # A mask may be expanded: what lies in one place is written once.
    once = x[tuple([slice(0, 1) if step == 0 else slice(None) for step in strides])] if 0 in strides else x
    return torch.empty_strided(once.shape, strides, dtype=x.dtype, device=x.device).copy_(once).expand(x.shape)


def output(x: Tensor, made: Nest) -> Tensor:
    """Memory for y or dx."""
    return torch.empty_strided(x.shape, made.y_strides, dtype=x.dtype, device=x.device)


def address(x: Tensor | None) -> int:
    """A pointer for the extension, 0 for None."""
    return 0 if x is None else x.data_ptr()


def mask_for(mask: Tensor | None, made: Nest) -> Tensor | None:
    """`mask` as the nest walks it."""
    return None if mask is None or made.mask_strides is None else lying(mask, made.mask_strides)


# ---- parameters and statistics in the kernel's order


def to_kernel(parameter: Tensor | None, made: Nest, part: Partition) -> Tensor | None:
    """A parameter flat and in the kernel's order; raises ShapeError where its size does not fit."""
    if parameter is None:
        return None
    if parameter.numel() != made.params:
        raise ShapeError(
            f"weight and bias must have {made.params} entries for this input; got shape {tuple(parameter.shape)}: "
            "give them the sizes of the axes they run along"
        )
    if made.in_order:
        return parameter.contiguous()
    canonical = parameter.detach().reshape([made.split[i] for i in part.weighted])
    return canonical.permute([part.weighted.index(i) for i in made.weighted]).contiguous()


def from_kernel(parameter: Tensor, like: Tensor, made: Nest, part: Partition) -> Tensor:
    """A parameter's gradient in the shape and order of `like`."""
    if not made.in_order:
        laid = parameter.view([made.split[i] for i in made.weighted])
        parameter = laid.permute([made.weighted.index(i) for i in part.weighted])
    return parameter.reshape(like.shape)


def stats_to_view(stats: Tensor, made: Nest, part: Partition) -> Tensor:
    """(rows, sets) in the kernel's order -> (rows, *split view with 1 on averaged axes)."""
    if not made.in_order:
        laid = stats.view([len(stats), *(made.split[i] for i in made.kept)])
        stats = laid.permute([0, *(made.kept.index(i) + 1 for i in part.kept)])
    return stats.reshape(len(stats), *made.stat_shape)


def stats_to_kernel(rows: list[Tensor], made: Nest, part: Partition) -> Tensor:
    """Tensors of the split view with 1 on averaged axes -> (rows, sets) in the kernel's order, contiguous."""
    stats = torch.stack([row.expand(made.stat_shape).to(torch.float64) for row in rows])
    if not made.in_order:
        laid = stats.view([len(rows), *(made.split[i] for i in part.kept)])
        stats = laid.permute([0, *(part.kept.index(i) + 1 for i in made.kept)])
    return stats.reshape(len(rows), made.sets)


def moments_of(stats: Tensor, part: Partition, made: Nest) -> Moments:
    """What `normalize` measured, as moments."""
    mean, var, count = stats_to_view(stats[:3], made, part)
    return Moments(count, mean, var, part.names)


# ---- the two calls


def forward(
    x: Tensor,
    made: Nest,
    stats: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 0.0,
    about_zero: bool = False,
    mask: Tensor | None = None,
    measured: bool = False,
    affine: Tensor | None = None,
    only_measure: bool = False,
    residual: Tensor | None = None,
    total: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | None:
    """Measure into `stats` and write y; with `measured` only write it, with `only_measure` only measure.

    A `residual`, which lies as y, is added before, and the sum written to `total`.
    """
    y = None if only_measure else output(x, made)
    kind = 0 if activation is None else ACTIVATIONS[activation][0]
    if made.backend == "triton":
        from renorm.kernels.triton import calls  # imports Triton

        calls.forward(
            x,
            made,
            stats,
            weight,
            bias,
            y,
            eps=eps,
            about_zero=about_zero,
            mask=mask,
            residual=residual,
            total=total,
            measured=measured,
            affine=affine,
            activation=kind,
            slope=SLOPE,
        )
        return y
    parameter = weight if weight is not None else bias
    extension.module().forward(
        made.packed,
        extension.DTYPES[x.dtype],
        0 if parameter is None else extension.DTYPES[parameter.dtype],
        torch.get_num_threads(),
        about_zero,
        kind,
        SLOPE,
        eps,
        x.data_ptr(),
        address(residual),
        address(total),
        address(y),
        address(mask),
        address(weight),
        address(bias),
        stats.data_ptr(),
        measured,
        address(affine),
    )
    return y


def backward(
    x: Tensor,
    dy: Tensor,
    made: Nest,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = 0.0,
    about_zero: bool = False,
    mask: Tensor | None = None,
    fixed: bool = False,
    affine: Tensor | None = None,
    combine: Tensor | None = None,
    wants: tuple[bool, bool, bool] = (True, True, True),
    affine_gradient: Tensor | None = None,
    dsum: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, those that are wanted, the parameters' in the kernel's order."""
    dx = output(x, made) if wants[0] else None
    kind = 0 if activation is None else ACTIVATIONS[activation][0]
    if made.backend == "triton":
        from renorm.kernels.triton import calls  # imports Triton

        dweight, dbias = calls.backward(
            x,
            dy,
            made,
            stats,
            weight,
            bias,
            dx,
            about_zero=about_zero,
            mask=mask,
            fixed=fixed,
            affine=affine,
            combine=combine,
            wants=wants[1:],
            affine_gradient=affine_gradient,
            dsum=dsum,
            activation=kind,
            slope=SLOPE,
        )
        return dx, dweight, dbias
    dweight = torch.empty_like(weight) if wants[1] and weight is not None else None
    dbias = torch.empty_like(bias) if wants[2] and bias is not None else None
    parameter = weight if weight is not None else bias
    extension.module().backward(
        made.packed,
        extension.DTYPES[x.dtype],
        0 if parameter is None else extension.DTYPES[parameter.dtype],
        torch.get_num_threads(),
        about_zero,
        kind,
        SLOPE,
        eps,
        x.data_ptr(),
        address(mask),
        address(weight),
        address(bias),
        stats.data_ptr(),
        fixed,
        address(affine),
        dy.data_ptr(),
        address(dsum),
        address(dx),
        address(affine_gradient),
        address(combine),
        address(dweight),
        address(dbias),
    )
    return dx, dweight, dbias


def new_stats(made: Nest, device: torch.device) -> Tensor:
    """For mean, biased variance, count and 1 / sqrt(var + eps) of each set."""
    return torch.empty((4, made.sets), dtype=torch.float64, device=device)


# ---- activations behind a norm


def activate(z: Tensor, activation: str | None) -> Tensor:
    """The activation in plain torch."""
    return z if activation is None else ACTIVATIONS[activation][1](z)


ACTIVATIONS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "relu": (1, F.relu),
    "leaky_relu": (2, F.leaky_relu),
    "gelu": (3, F.gelu),
    "silu": (4, F.silu),
}
SLOPE = 0.01  # of leaky ReLU, torch's default


# ---- gradients


def learns(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether a gradient will be asked for."""
    return torch.is_grad_enabled() and (
        x.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
    )


def needs_a_graph(dy: Tensor) -> bool:
    """Whether a gradient is to be differentiated again, or is a batch of gradients: then torch works it out."""
    return (
        torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(dy) or extension.observed(dy) is not None
    )


def aliases(*inputs: Tensor | None) -> list[Any]:
    """Aliases, so that a gradient by one of them leaves out the ways to it that lead through another.

    A scale comes from x, weight and bias may be one tensor.
    """
    return [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]


def run(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """A typed `apply`."""
    return function.apply(*arguments)  # type: ignore[no-untyped-call]


def gradients_by_torch(
    y: Tensor, dy: Tensor, inputs: tuple[Tensor | None, ...], wants: tuple[bool, ...]
) -> list[Tensor | None]:
    """Gradients of y by the wanted inputs, with a graph of their own where one is asked for."""
    wanted = [tensor for tensor, want in zip(inputs, wants, strict=True) if want and tensor is not None]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=torch.is_grad_enabled(), allow_unused=True))
    return [next(found) if want and tensor is not None else None for tensor, want in zip(inputs, wants, strict=True)]
