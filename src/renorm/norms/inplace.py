"""In-place activated batch norm: batch norm and an activation, of which only the output is kept for backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from renorm.errors import BackendError, ShapeError, UnknownNormError
from renorm.kernels import extension, native, reference, select
from renorm.kernels.moments import Affine, Moments
from renorm.norms import sync
from renorm.norms.axes import Bound
from renorm.norms.masks import expand_mask
from renorm.norms.running import OneValue
from renorm.norms.zoo import BatchNorm2d, Device
from renorm.pattern import Partition

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["InPlaceBatchNorm2d"]

Invertible = Literal["leaky_relu", "elu", "identity"]


class InPlaceBatchNorm2d(BatchNorm2d):
    r"""Batch norm of images and an activation, written over the input; backward recovers the input from the output.

    $$z = \text{act}(u), \qquad u = \hat x \cdot \text{weight} + \text{bias}, \qquad
    \hat x = \frac{x - \text{E}[x]}{\sqrt{\text{Var}[x] + \text{eps}}}
    = \frac{\text{act}^{-1}(z) - \text{bias}}{\text{weight}}$$

    A convolution keeps z, its input, anyway; batch norm and an activation apart keep x, and u or z again. `activation`
    is ``"leaky_relu"``, ``"elu"`` or ``"identity"``; `slope` is leaky ReLU's below 0 (0.01 by default), or ELU's at 0
    from below (torch's alpha, 1 by default). The other arguments, `state_dict` and running statistics are those of
    `BatchNorm2d`; the weight may have any sign and size.

    The inversion multiplies the rounding error of z by up to 1 + abs(bias / weight). Of channels where the ratio is 8
    or more, or the weight too small for the dtype, x is kept: one digit is lost at most. ELU costs exp(-u) more; x is
    kept where that is more than half of the digits, at u = -8 in float32 and -2.4 in bfloat16.

    z is written over x, by the native kernels, where x was computed by an operation that autograd recorded; it must not
    be needed by anything else then: write ``layer(x.clone())`` in front of a shortcut, or `add`. A leaf, a view, a
    result that its own backward needs (as ReLU's) and what is computed under saved-tensor hooks (checkpointing) are
    left as they are, and z has memory of its own. In evaluation, frozen, and in graphs and transforms this is batch
    norm and the activation. A second derivative recovers x once more, and goes through plain torch.

    Shapes: (N, C, H, W). Raises ShapeError for a slope that is not positive, UnknownNormError for another activation.
    Rota Bulo, Porzi & Kontschieder 2018, arXiv:1712.02616.

    >>> layer = InPlaceBatchNorm2d(1, slope=0.5)
    >>> layer(torch.tensor([0.0, 2.0]).view(2, 1, 1, 1)).flatten()
    tensor([-0.5000,  1.0000], grad_fn=<ViewBackward0>)
    """

    activation: str
    slope: float

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Invertible = "leaky_relu",
        slope: float | None = None,
        bias: bool = True,
        unbiased: bool = True,
        one_value: OneValue = "raise",
        process_group: ProcessGroup | None = None,
        backend: str = "auto",
    ) -> None:
        if activation not in _ACTIVATIONS:
            raise UnknownNormError(
                f"an activation that can be inverted is one of {', '.join(_ACTIVATIONS)}; got {activation!r}: write "
                f"BatchNorm2d(activation={activation!r}), which keeps its input"
            )
        if slope is None:
            slope = _ACTIVATIONS[activation].slope
        if not 0 < slope < math.inf:
            raise ShapeError(f"an activation can be inverted if its slope is positive; got {slope}")
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            bias=bias,
            unbiased=unbiased,
            one_value=one_value,
            process_group=process_group,
            backend=backend,
        )
        self.activation = activation
        self.slope = slope

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize and activate `x`, in its own memory where it may be; see `Norm`."""
        self._check_input_dim(x)
        return self._activated(x, mask, over=_may_be_overwritten(x))

    def add(self, x: Tensor, residual: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The activated norm of ``x + residual``, and that sum, which is not written over."""
        total = x + residual
        self._check_input_dim(total)
        return self._activated(total, mask, over=False), total

    def _activated(self, x: Tensor, mask: Tensor | None, *, over: bool) -> Tensor:
        bound, eager = self._bound(x), _is_eager(x)
        if not eager or self._uses_running(bound.part, x):
            y = self._normalize(x, mask)
            return _ACTIVATIONS[self.activation].forward(y, self.slope, eager)
        real = None if mask is None else expand_mask(mask, x)
        kernel = self._choose(x, bound, real)
        self._remember(kernel)
        with torch.no_grad():
            moments = self.batch_moments(self.measure(x, mask))
        call = _Call(
            bound.part, kernel == "native", moments, self._eps(x), self.activation, self.slope, self.process_group, over
        )
        learns = native.learns(x, self.weight, self.bias)
        origin = native.run(_Origin, x) if learns and x.requires_grad else None
        z: Tensor = native.run(_InPlace, x, origin, self.weight, self.bias, real, call, learns)
        return z

    def _choose(self, x: Tensor, bound: Bound, mask: Tensor | None) -> str:
        kernel = super()._choose(x, bound, mask)
        if kernel != "triton":
            return kernel
        if select.resolve(self.backend) == "triton":
            raise BackendError(
                "backend='triton' cannot run here: there is no Triton kernel that works in place; write "
                "backend='auto' or 'reference'"
            )
        return "reference"

    def _obstacle(self, x: Tensor, bound: Bound) -> str | None:
        return super()._obstacle(x, bound) or "torch's kernel keeps its input"

    def extra_repr(self) -> str:
        """That of batch norm, and the slope."""
        return super().extra_repr() + ("" if self.activation == "identity" else f", slope={self.slope}")


class _Activation(NamedTuple):
    slope: float  # by default
    code: int  # in the native kernels; 0 where they have none
    forward: Callable[[Tensor, float, bool], Tensor]  # (u, slope, in place) -> z
    inverse: Callable[[Tensor, float], Tensor]  # (z, slope) -> u
    backward: Callable[[Tensor, Tensor, float], Tensor]  # (dz, z, slope) -> du


_ACTIVATIONS = {
    "leaky_relu": _Activation(
        native.SLOPE,
        native.ACTIVATIONS["leaky_relu"][0],
        lambda u, slope, inplace: F.leaky_relu(u, slope, inplace),
        lambda z, slope: F.leaky_relu(z, 1 / slope),
        lambda dz, z, slope: torch.ops.aten.leaky_relu_backward(dz, z, slope, True),
    ),
    "elu": _Activation(
        1.0,
        0,
        lambda u, slope, inplace: F.elu(u, slope, inplace),
        lambda z, slope: torch.where(z > 0, z, torch.log1p(z / slope)),
        lambda dz, z, slope: torch.ops.aten.elu_backward(dz, slope, 1.0, 1.0, True, z),
    ),
    "identity": _Activation(1.0, 0, lambda u, slope, inplace: u, lambda z, slope: z, lambda dz, z, slope: dz),
}

_RATIO = 8.0  # of bias to weight, at which a channel's x is kept


@dataclass(frozen=True)
class _Call:
    """What forward leaves for backward besides tensors."""

    part: Partition
    natively: bool
    moments: Moments  # of the whole batch
    eps: float
    activation: str
    slope: float
    group: ProcessGroup | None
    over: bool  # z is written over x

    @property
    def act(self) -> _Activation:
        return _ACTIVATIONS[self.activation]

    def standard(self) -> Affine:
        return select.standardize(self.moments, self.eps)

    def along(self, parameter: Tensor | None, default: float) -> Tensor:
        """A parameter beside the statistics."""
        if parameter is None:
            return torch.full_like(self.moments.mean, default)
        return parameter.detach().to(self.moments.mean.dtype).view_as(self.moments.mean)


class _InPlace(torch.autograd.Function):
    """`origin` is x without its memory: what a second derivative flows back to."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        origin: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        call: _Call,
        learns: bool,
    ) -> Tensor:
        index = kept = None
        if learns:
            thin = _thin(x, weight, bias, call).flatten()
            if thin.any():
                index = thin.nonzero().flatten()
                kept = x.index_select(1, index)
        z = _write(x, weight, bias, mask, call)
        if z is x:
            ctx.mark_dirty(x)
        ctx.save_for_backward(z, origin, weight, bias, mask, index, kept)
        ctx.call = call
        return z

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> Any:
        z, origin, weight, bias, mask, index, kept = ctx.saved_tensors
        call, needs = ctx.call, ctx.needs_input_grad
        wants = (needs[0], needs[2], needs[3])
        kept_x = None if index is None else (index, kept)
        with torch.no_grad():
            line = _line(weight, bias, index, call)
        # Every process goes the same way, one with an empty batch too: collectives must meet.
        if call.group is not None or not call.natively or native.needs_a_graph(dz):
            dx, dw, db = _gradients_by_torch(z, kept_x, line, dz, origin, weight, bias, mask, call, wants)
        else:
            dx, dw, db = _gradients(z, kept_x, line, dz, weight, bias, mask, call, wants)
        return dx, None, dw, db, None, None, None


def _thin(x: Tensor, weight: Tensor | None, bias: Tensor | None, call: _Call) -> Tensor:
    """Which channels cannot be recovered from z to within the digits that are promised."""
    w, b, finfo = call.along(weight, 1), call.along(bias, 0), torch.finfo(x.dtype)
    # Beside a huge bias; or where slope * weight leaves only subnormal numbers.
    thick = w.abs() > torch.clamp(b.abs() / _RATIO, min=finfo.tiny / call.slope)
    if call.activation == "elu" and x.numel():
        dims = (0, 2, 3)
        standard = call.standard()
        scale = standard.scale * w
        extreme = torch.where(scale > 0, x.amin(dims, keepdim=True), x.amax(dims, keepdim=True))
        low = (extreme - call.moments.mean) * scale + b
        thick = thick & (low > math.log(finfo.eps) / 2)
    return ~thick  # NaN is thin


def _write(x: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None, call: _Call) -> Tensor:
    """z, over x where that is allowed and x is dense."""
    part, standard, act = call.part, call.standard(), call.act
    made = native.fit(x, part, weight, bias, mask) if call.natively else ""
    if isinstance(made, str):
        z = reference.apply(x, part, standard, weight, bias, mask=mask)
        return act.forward(z, call.slope, True)
    assert standard.center is not None
    z = x if call.over and x.stride() == made.y_strides else native.output(x, made)
    laid, w, b = (
        native.lying(x, made.x_strides),
        native.to_kernel(weight, made, part),
        native.to_kernel(bias, made, part),
    )
    parameter = w if w is not None else b
    mask = native.mask_for(mask, made)
    moments = call.moments
    stats = native.stats_to_kernel([moments.mean, moments.var, moments.count, standard.scale], made, part)
    extension.module().forward(
        made.packed,
        extension.DTYPES[x.dtype],
        0 if parameter is None else extension.DTYPES[parameter.dtype],
        torch.get_num_threads(),
        False,
        act.code,
        call.slope,
        call.eps,
        laid.data_ptr(),
        0,
        0,
        z.data_ptr(),
        native.address(mask),
        native.address(w),
        native.address(b),
        stats.data_ptr(),
        True,
        0,
    )
    return z if act.code else act.forward(z, call.slope, True)


class _Line(NamedTuple):
    """``x_hat = (t - center) * scale`` of each channel, where t is u, or x if that was kept."""

    center: Tensor
    scale: Tensor


_Kept = tuple[Tensor, Tensor] | None  # channels, and their x


def _line(weight: Tensor | None, bias: Tensor | None, index: Tensor | None, call: _Call) -> _Line:
    center, scale = call.along(bias, 0), 1 / call.along(weight, 1)
    if index is None:
        return _Line(center, scale)
    standard = call.standard()
    assert standard.center is not None
    return _Line(
        center.index_copy(1, index, standard.center.index_select(1, index)),
        scale.index_copy(1, index, standard.scale.index_select(1, index)),
    )


def _recover(z: Tensor, kept: _Kept, call: _Call) -> Tensor:
    t = call.act.inverse(z, call.slope)
    return t if kept is None else t.index_copy(1, *kept) if t is z else t.index_copy_(1, *kept)


_CHUNK = 1 << 20  # entries of t and du: less memory for a moment, and no slower than all at once


def _gradients(
    z: Tensor,
    kept: _Kept,
    line: _Line,
    dz: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    call: _Call,
    wants: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """By the native kernels, a few samples at a time: sums of du and du * x_hat over each channel, then dx."""
    part, samples = call.part, max(1, _CHUNK // z[0].numel())
    center, scale = line
    one, zero = torch.ones_like(center), torch.zeros_like(center)

    def visit(affine: list[Tensor], combine: list[Tensor] | None, out: Tensor | None) -> Tensor:
        total = torch.zeros_like(torch.stack([center, center, center]))
        for i in range(0, len(z), samples):
            rows = slice(i, i + samples)
            some = None if kept is None else (kept[0], kept[1][rows])
            t, real = _recover(z[rows], some, call), None if mask is None else mask[rows]
            made = native.fit(t, part, None, None, real)
            assert not isinstance(made, str)
            du = native.lying(call.act.backward(dz[rows], z[rows], call.slope), made.y_strides)
            sums = native.new_stats(made, t.device)
            dx, _, _ = native.backward(
                native.lying(t, made.x_strides),
                du,
                made,
                native.stats_to_kernel([center, one, call.moments.count, one], made, part),
                None,
                None,
                mask=native.mask_for(real, made),
                fixed=True,
                affine=native.stats_to_kernel(affine, made, part),
                combine=None if combine is None else native.stats_to_kernel(combine, made, part),
                wants=(out is not None, False, False),
                affine_gradient=sums if out is None else None,
            )
            if out is None or dx is None:
                total += native.stats_to_view(sums[:3], made, part)
            else:
                out[rows] = dx
        return total

    along, _, total = visit([one, center, zero], None, None)
    along = along * scale
    dw = along.view_as(weight).to(weight.dtype) if wants[1] and weight is not None else None
    db = total.view_as(bias).to(bias.dtype) if wants[2] and bias is not None else None
    if not wants[0]:
        return None, dw, db
    # dx = factor * (du - mean of du - x_hat * mean of du * x_hat), in terms of t about the center as the kernel has it.
    factor, n = call.standard().scale * call.along(weight, 1), call.moments.count.clamp(min=1)
    slope = -factor * along / n * scale
    rounded = center.to(torch.float64 if z.dtype == torch.float64 else torch.float32).to(center.dtype)
    dx = torch.empty_like(z)
    visit([factor, center, zero], [slope, slope * (rounded - center) - factor * total / n], dx)
    return dx, dw, db


def _gradients_by_torch(
    z: Tensor,
    kept: _Kept,
    line: _Line,
    dz: Tensor,
    origin: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    call: _Call,
    wants: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """By autograd, through the definition on what x was; differentiable itself where that is asked for."""
    again = torch.is_grad_enabled()
    wide = torch.float32 if z.dtype in (torch.float16, torch.bfloat16) else z.dtype
    with torch.no_grad():
        t, factor = _recover(z, kept, call).to(wide), line.scale / call.standard().scale
        # Without its mean, on which nothing depends: no digits are spent on it.
        x = (t - line.center.to(wide)) * factor.to(wide)
    with torch.enable_grad():
        x = native.run(_Recovered, origin, x) if again and wants[0] else x.requires_grad_(wants[0])
        x, weight, bias = native.aliases(x, weight, bias)
        moments = reference.measure(x, call.part, mask=mask)
        if call.group is not None:
            moments = sync.merge(moments, call.group)
        u = reference.apply(x, call.part, select.standardize(moments, call.eps), weight, bias, mask=mask)
        y = call.act.forward(u, call.slope, False)
    dx, dw, db = native.gradients_by_torch(y, dz.to(wide), (x, weight, bias), wants)
    return None if dx is None else dx.to(z.dtype), dw, db


class _Origin(torch.autograd.Function):
    """A place in the graph for what x was, with memory for one entry."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.new_zeros(()).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Tensor:
        return dx


class _Recovered(torch.autograd.Function):
    """`value` at the place of `origin`."""

    @staticmethod
    def forward(ctx: Any, origin: Tensor, value: Tensor) -> Tensor:
        ctx.dtype = origin.dtype
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return dx.to(ctx.dtype), None


# ---- when


def _is_eager(x: Tensor) -> bool:
    """Whether operations run one by one on a plain tensor, and nothing but autograd looks on."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, nn.Parameter)
        and not x.is_meta
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
    )


def _may_be_overwritten(x: Tensor) -> bool:
    """Whether x is a result that autograd recorded and, as far as can be told from here, needs no more."""
    made_by = x.grad_fn
    return (
        made_by is not None
        and torch.is_grad_enabled()  # a reentrant checkpoint, which needs x again, is not
        and not x._is_view()
        and not x.retains_grad
        and not hasattr(type(made_by), "_saved_result")
        and not isinstance(made_by, torch.autograd.function.BackwardCFunction)
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    )
