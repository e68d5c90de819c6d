"""Measure and apply in two calls of the kernels, with a solve of one's own between them.

The backward of apply leaves dy to that of measure, which writes dx once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from renorm.kernels import native, reference
from renorm.kernels.moments import Affine, Moments
from renorm.kernels.nest import Nest
from renorm.pattern import Partition

__all__ = ["Measured", "apply", "given", "measure"]


class _Upstream:
    """What the backward of apply leaves for that of measure, so that dx is written once."""

    def __init__(self) -> None:
        self.task = -1  # of the backward pass it belongs to
        self.left: tuple[Any, ...] = ()


class _Measure(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mask: Tensor | None,
        part: Partition,
        made: Nest,
        about_zero: bool,
        stats: Tensor,
        upstream: _Upstream,
    ) -> tuple[Tensor, Tensor]:
        native.forward(
            native.lying(x, made.x_strides), made, stats, about_zero=about_zero, mask=mask, only_measure=True
        )
        ctx.save_for_backward(x, mask)
        ctx.rest = part, made, about_zero, stats, upstream
        mean, var = native.stats_to_view(stats[:2].clone(), made, part)
        return mean, var

    @staticmethod
    def backward(ctx: Any, dmean: Tensor, dvar: Tensor) -> Any:
        x, mask = ctx.saved_tensors
        part, made, about_zero, stats, upstream = ctx.rest
        left = upstream.left if upstream.task == torch._C._current_graph_task_id() else ()
        upstream.left = ()
        if not left:  # the gradient is to be differentiated again, or only the moments were used
            with torch.enable_grad():
                found = reference.measure(x, part, mask=mask, about_zero=about_zero)
            pairs = [(m, d) for m, d in ((found.mean, dmean), (found.var, dvar)) if m.requires_grad]
            (dx,) = torch.autograd.grad(
                [m for m, _ in pairs], x, [d for _, d in pairs], create_graph=torch.is_grad_enabled()
            )
            return dx, None, None, None, None, None, None
        dy, weight, bias, affine = left
        mean, _, count = native.stats_to_view(stats[:3], made, part)
        n = count.clamp(min=1)
        square = torch.where(count > 0, 2 * dvar / n, 0)
        pivot = mean.to(torch.float64 if x.dtype == torch.float64 else torch.float32).to(torch.float64)
        constant = torch.where(count > 0, (0 if about_zero else dmean / n) - square * (mean - pivot), 0)
        combine = native.stats_to_kernel([square, constant], made, part)
        dx, _, _ = native.backward(
            native.lying(x, made.x_strides),
            dy,
            made,
            stats,
            weight,
            bias,
            about_zero=about_zero,
            mask=native.mask_for(mask, made),
            affine=affine,
            combine=combine,
            wants=(True, False, False),
        )
        return dx, None, None, None, None, None, None


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor | None,
        scale: Tensor,
        center: Tensor | None,
        shift: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        part: Partition,
        made: Nest,
        about_zero: bool,
        stats: Tensor,
        upstream: _Upstream | None,
    ) -> Tensor:
        affine = _affine_to_kernel(scale, center, shift, made, part)
        w, b = native.to_kernel(weight, made, part), native.to_kernel(bias, made, part)
        y = native.forward(native.lying(x, made.x_strides), made, stats, w, b, mask=mask, measured=True, affine=affine)
        ctx.save_for_backward(x, mean, scale, center, shift, weight, bias, mask)
        ctx.rest = part, made, about_zero, stats, upstream, affine
        assert y is not None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, mean, scale, center, shift, weight, bias, mask = ctx.saved_tensors
        part, made, about_zero, stats, upstream, affine = ctx.rest
        needs = ctx.needs_input_grad
        zero = torch.zeros_like(mean) if needs[1] else None
        if native.needs_a_graph(dy):
            with torch.enable_grad():
                x, scale, center, shift, weight, bias = native.aliases(x, scale, center, shift, weight, bias)
                y = reference.apply(x, part, Affine(scale, center, shift), weight, bias, mask=mask)
            wants = (needs[0], *needs[2:7])
            dx, *rest = native.gradients_by_torch(y, dy, (x, scale, center, shift, weight, bias), wants)
            return dx, zero, *rest, None, None, None, None, None, None
        w, b = native.to_kernel(weight, made, part), native.to_kernel(bias, made, part)
        dy = native.lying(dy, made.y_strides)
        daffine = native.new_stats(made, x.device)
        dx, dw, db = native.backward(
            native.lying(x, made.x_strides),
            dy,
            made,
            stats,
            w,
            b,
            about_zero=about_zero,
            mask=native.mask_for(mask, made),
            fixed=True,
            affine=affine,
            wants=(needs[0] and upstream is None, needs[5], needs[6]),
            affine_gradient=daffine,
        )
        if upstream is not None and needs[0]:
            upstream.task, upstream.left = torch._C._current_graph_task_id(), (dy, w, b, affine)
        dw = None if dw is None else native.from_kernel(dw, weight, made, part)
        db = None if db is None else native.from_kernel(db, bias, made, part)
        dscale, dcenter, dshift = native.stats_to_view(daffine[:3], made, part)
        return (
            dx,
            zero,
            dscale if needs[2] else None,
            dcenter if needs[3] else None,
            dshift if needs[4] else None,
            dw,
            db,
            *(None,) * 6,
        )


def _affine_to_kernel(
    scale: Tensor, center: Tensor | None, shift: Tensor | None, made: Nest, part: Partition
) -> Tensor:
    zero = scale.new_zeros(()) if center is None or shift is None else scale
    rows = [scale, zero if center is None else center, zero if shift is None else shift]
    return native.stats_to_kernel(rows, made, part)


@dataclass(frozen=True)
class Measured:
    """What `measure` hands to `apply` besides the moments."""

    made: Nest
    mask: Tensor | None
    stats: Tensor  # mean, biased variance, count, 1 / sqrt(var + eps): (4, sets)
    mean: Tensor | None  # the moments' own, which leads the gradient back to measure; None for given statistics
    upstream: _Upstream | None


def measure(
    x: Tensor, part: Partition, made: Nest, *, mask: Tensor | None = None, about_zero: bool = False
) -> tuple[Moments, Measured]:
    """Moments of each set, differentiable, and what `apply` needs of this call."""
    stats, upstream = native.new_stats(made, x.device), _Upstream()
    mask = native.mask_for(mask, made)
    mean, var = native.run(_Measure, x, mask, part, made, about_zero, stats, upstream)
    count = stats[2:3] if mask is not None else stats[2:3, :1]
    count = native.stats_to_view(count, made, part)[0] if mask is not None else count.view([1] * len(made.split))
    return Moments(count, mean, var, part.names), Measured(made, mask, stats, mean, upstream)


def given(mean: Tensor, var: Tensor, part: Partition, made: Nest, mask: Tensor | None) -> Measured:
    """The same for statistics that do not come from the input."""
    one = torch.ones((), dtype=torch.float64, device=mean.device)
    with torch.no_grad():
        stats = native.stats_to_kernel([mean, var, one, one], made, part)
    return Measured(made, native.mask_for(mask, made), stats, None, None)


def apply(
    x: Tensor,
    part: Partition,
    measured: Measured,
    affine: Affine,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    about_zero: bool = False,
) -> Tensor:
    """``((x - center) * scale + shift) * weight + bias``, as `reference.apply`."""
    shape = measured.made.stat_shape
    scale, center, shift = (
        None if value is None else value.to(torch.float64).expand(shape)
        for value in (affine.scale, affine.center, affine.shift)
    )
    y: Tensor = native.run(
        _Apply,
        x,
        measured.mean,
        scale,
        center,
        shift,
        weight,
        bias,
        measured.mask,
        part,
        measured.made,
        about_zero,
        measured.stats,
        measured.upstream,
    )
    return y
