"""The norm in one call of the kernels: measured, standardized and recovered, alone or with its neighbours.

Forward saves the input and the small statistics; a second derivative goes through the reference kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from renorm.kernels import extension, native, reference
from renorm.kernels.moments import Affine
from renorm.kernels.nest import Nest, nest
from renorm.pattern import Partition

__all__ = ["by_reference", "gradients", "normalize", "normalize_with_neighbours"]

_PARALLEL = 32768  # entries from which on a second thread may help; csrc/driver.h has the last word


def normalize(
    x: Tensor,
    part: Partition,
    made: Nest,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    about_zero: bool = False,
    mask: Tensor | None = None,
    wants_stats: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Measure, standardize and recover in one call; and the statistics, (4, sets), where they are wanted."""
    if mask is not None:
        mask = native.mask_for(mask, made)
    if native.learns(x, weight, bias):
        stats = native.new_stats(made, x.device)
        return native.run(_Normalize, x, weight, bias, mask, part, made, eps, about_zero, stats), stats
    found = native.new_stats(made, x.device) if wants_stats or made.backend == "triton" else None
    return _normalized(x, made, part, weight, bias, eps, about_zero, mask, found), found


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        part: Partition,
        made: Nest,
        eps: float,
        about_zero: bool,
        stats: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, mask)
        ctx.rest = part, made, eps, about_zero, stats
        return _normalized(x, made, part, weight, bias, eps, about_zero, mask, stats)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, bias, mask = ctx.saved_tensors
        part, made, eps, about_zero, stats = ctx.rest
        wants = ctx.needs_input_grad[:3]
        if native.needs_a_graph(dy):
            with torch.enable_grad():
                x, weight, bias = native.aliases(x, weight, bias)
                y = by_reference(x, part, weight, bias, eps, about_zero, mask)
            return *native.gradients_by_torch(y, dy, (x, weight, bias), wants), None, None, None, None, None, None
        found = gradients(x, dy, made, part, stats, weight, bias, eps, about_zero, mask, wants)
        return *found, None, None, None, None, None, None


def gradients(
    x: Tensor,
    dy: Tensor,
    made: Nest,
    part: Partition,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    about_zero: bool,
    mask: Tensor | None,
    wants: tuple[bool, bool, bool],
    dsum: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of x, weight and bias that are wanted, from the statistics that `normalize` measured."""
    dx, dw, db = native.backward(
        native.lying(x, made.x_strides),
        native.lying(dy, made.y_strides),
        made,
        stats,
        native.to_kernel(weight, made, part),
        native.to_kernel(bias, made, part),
        eps=eps,
        about_zero=about_zero,
        mask=mask if mask is None else native.mask_for(mask, made),
        wants=wants,
        dsum=None if dsum is None else native.lying(dsum, made.y_strides),
        activation=activation,
    )
    if not made.in_order:
        dw = None if dw is None or weight is None else native.from_kernel(dw, weight, made, part)
        db = None if db is None or bias is None else native.from_kernel(db, bias, made, part)
    return dx, dw, db


def _normalized(
    x: Tensor,
    made: Nest,
    part: Partition,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    about_zero: bool,
    mask: Tensor | None,
    stats: Tensor | None,
) -> Tensor:
    x, w, b = native.lying(x, made.x_strides), native.to_kernel(weight, made, part), native.to_kernel(bias, made, part)
    if made.backend == "triton":
        assert stats is not None
        y_or_none = native.forward(x, made, stats, w, b, eps=eps, about_zero=about_zero, mask=mask)
        assert y_or_none is not None
        return y_or_none
    parameter = w if w is not None else b
    # Asking torch for its threads costs more than a small tensor needs.
    threads = torch.get_num_threads() if made.entries >= _PARALLEL else 1
    y = torch.empty_like(x) if made.y_strides == made.x_strides else native.output(x, made)
    extension.module().forward(
        made.packed,
        extension.DTYPES[x.dtype],
        0 if parameter is None else extension.DTYPES[parameter.dtype],
        threads,
        about_zero,
        0,
        0.0,
        eps,
        x.data_ptr(),
        0,
        0,
        y.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        0 if w is None else w.data_ptr(),
        0 if b is None else b.data_ptr(),
        0 if stats is None else stats.data_ptr(),
        False,
        0,
    )
    return y


def by_reference(
    x: Tensor,
    part: Partition,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    about_zero: bool,
    mask: Tensor | None,
) -> Tensor:
    """What `normalize` computes, in plain torch."""
    moments = reference.measure(x, part, mask=mask, about_zero=about_zero)
    affine = Affine(torch.rsqrt(moments.var + eps), None if about_zero else moments.mean)
    return reference.apply(x, part, affine, weight, bias, mask=mask)


# ---- with its neighbours: an addition before it, an activation after it


class _Neighbours(torch.autograd.Function):
    """y = activation(norm(s)) and s = x + residual; without a residual s is x and does not come out."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        part: Partition,
        made: Nest,
        eps: float,
        about_zero: bool,
        activation: str | None,
        stats: Tensor,
    ) -> Any:
        total = None if residual is None else native.output(x, made)
        y = native.forward(
            native.lying(x, made.x_strides),
            made,
            stats,
            native.to_kernel(weight, made, part),
            native.to_kernel(bias, made, part),
            eps=eps,
            about_zero=about_zero,
            mask=mask,
            residual=None if residual is None else native.lying(residual, made.y_strides),
            total=total,
            activation=activation,
        )
        ctx.save_for_backward(x if total is None else total, weight, bias, mask)
        ctx.rest = part, made, eps, about_zero, activation, stats, total is not None
        ctx.set_materialize_grads(False)
        return y if total is None else (y, total)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None = None) -> Any:
        x, weight, bias, mask = ctx.saved_tensors
        part, made, eps, about_zero, activation, stats, added = ctx.rest
        nothing = (None,) * 7
        needs = ctx.needs_input_grad
        wants = (needs[0] or needs[1], needs[2], needs[3])
        if dy is None:
            return dtotal if needs[0] else None, dtotal if needs[1] else None, None, None, *nothing
        if native.needs_a_graph(dy) or (dtotal is not None and native.needs_a_graph(dtotal)):
            with torch.enable_grad():
                x, weight, bias = native.aliases(x, weight, bias)
                y = native.activate(by_reference(x, part, weight, bias, eps, about_zero, mask), activation)
            dx, dw, db = native.gradients_by_torch(y, dy, (x, weight, bias), wants)
            if dtotal is not None and dx is not None:
                dx = dx + dtotal
        else:
            if added:  # the sum lies as y does
                back = nest(part, x.shape, x.stride(), None if mask is None else mask.stride(), made.backend)
                assert not isinstance(back, str)
                made = back
            dx, dw, db = gradients(
                x, dy, made, part, stats, weight, bias, eps, about_zero, mask, wants, dtotal, activation
            )
        return dx if needs[0] else None, dx if needs[1] else None, dw, db, *nothing


def normalize_with_neighbours(
    x: Tensor,
    residual: Tensor | None,
    part: Partition,
    made: Nest,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    about_zero: bool = False,
    mask: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``activation(norm(x + residual))``, the sum, and the statistics."""
    stats = native.new_stats(made, x.device)
    mask = native.mask_for(mask, made)
    found = native.run(_Neighbours, x, residual, weight, bias, mask, part, made, eps, about_zero, activation, stats)
    y, total = (found, x) if residual is None else found
    return y, total, stats
