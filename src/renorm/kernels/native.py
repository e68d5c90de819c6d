"""Measure and apply in C++ (csrc/), for CPU tensors: the wrappers, and when they may run.

The extension is optional: it is compiled where renorm is installed with a compiler, or comes in a wheel. Forward
saves the input and the small statistics; a second derivative goes through the reference kernels.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from renorm.errors import ShapeError
from renorm.kernels import reference
from renorm.kernels.moments import Affine, Moments
from renorm.kernels.nest import Nest, nest
from renorm.pattern import Partition

__all__ = [
    "ACTIVATIONS",
    "DTYPES",
    "Measured",
    "activate",
    "apply",
    "batch_norm_in_training",
    "by_reference",
    "fit",
    "given",
    "gradients",
    "measure",
    "moments_of",
    "native_module",
    "normalize",
    "normalize_with_neighbours",
    "stats_to_kernel",
    "stats_to_view",
    "status",
    "traceable",
    "track",
    "tracks",
    "usable",
]

_INTERFACE = 1  # of csrc/module.cpp
_PARALLEL = 32768  # entries from which on a second thread may help; csrc/driver.h has the last word

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def _load() -> tuple[ModuleType | None, str]:
    try:
        # After torch, whose OpenMP pool it shares: two pools in one process wait for each other's cores.
        module = importlib.import_module("renorm.kernels._native")
    except ModuleNotFoundError:
        return None, (
            "renorm was installed without them, because no C++ compiler was found or RENORM_NATIVE was 0; "
            "RENORM_NATIVE=1 pip install ... says what is missing"
        )
    except ImportError as error:
        return None, f"they cannot be loaded: {error}"
    if module.interface != _INTERFACE:
        return None, "they were built from other sources: install renorm again"
    return module, ""


_MODULE: Any
_MODULE, _MISSING = _load()


def native_module() -> Any:
    """The extension, or None."""
    return _MODULE


def missing() -> str:
    """Why there is no extension; empty where there is one."""
    return _MISSING


def status() -> str:
    """Which kernels this installation has, and why.

    >>> print(status())
    native: ...
    torch: ...
    reference: plain torch operations, for everything else
    """
    if _MODULE is None:
        native = f"not available: {_MISSING}"
    else:
        threads = "torch's threads" if _MODULE.openmp else "one thread"
        native = f"{_MODULE.instructions} kernels for CPU tensors, on {threads}"
    return (
        f"native: {native}\ntorch: {torch.__version__}, where its kernels are exact\n"
        "reference: plain torch operations, for everything else"
    )


def usable(x: Tensor) -> bool:
    """Whether a raw pointer to `x` may be taken here: a plain CPU tensor in eager mode that nothing looks through."""
    return why_not(x) is None


def why_not(x: Tensor) -> str | None:
    """The reason against it."""
    if _MODULE is None:
        return _MISSING
    if torch.compiler.is_compiling():
        return "a graph is being traced"
    kind = type(x)
    if kind is not Tensor and kind is not torch.nn.Parameter:
        return f"the input is a {kind.__name__}"
    if not x.is_cpu:
        return f"the input is on {x.device.type}"
    if x.dtype not in DTYPES:
        return f"the input is {x.dtype}"
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or x.is_neg()
    ):
        return "a transform, a mode or a tracer looks at every operation"
    return None


def traceable(x: Tensor) -> bool:
    """Whether the operators of graph.py may stand for the kernels in the graph that is being traced."""
    return _MODULE is not None and not torch.compiler.is_exporting() and x.device.type == "cpu" and x.dtype in DTYPES


def fit(
    x: Tensor, part: Partition, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None = None
) -> Nest | str:
    """The nest for this call, or the reason why the native kernels cannot run it."""
    reason = why_not(x)
    if reason is not None:
        return reason
    parameter = weight if weight is not None else bias
    if parameter is not None:
        if parameter.dtype not in DTYPES or not parameter.is_cpu:
            return f"the parameters are {parameter.dtype} on {parameter.device.type}"
        if bias is not None and bias.dtype != parameter.dtype:
            return "weight and bias differ in dtype"
    return nest(part, x.shape, x.stride(), None if mask is None else mask.stride())


def _lying(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """`x` itself where it has these strides, a copy that has them otherwise."""
    if x.stride() == strides:
        return x
    # A mask may be expanded: what lies in one place is written once.
    once = x[tuple([slice(0, 1) if step == 0 else slice(None) for step in strides])] if 0 in strides else x
    return torch.empty_strided(once.shape, strides, dtype=x.dtype, device=x.device).copy_(once).expand(x.shape)


def _empty(x: Tensor, made: Nest) -> Tensor:
    return torch.empty_strided(x.shape, made.y_strides, dtype=x.dtype, device=x.device)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


# ---- parameters and statistics in the kernel's order


def _to_kernel(parameter: Tensor | None, made: Nest, part: Partition) -> Tensor | None:
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


def _from_kernel(parameter: Tensor, like: Tensor, made: Nest, part: Partition) -> Tensor:
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


# ---- the two calls


def _forward(
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
) -> Tensor | None:
    y = None if only_measure else _empty(x, made)
    parameter = weight if weight is not None else bias
    _MODULE.forward(
        made.packed,
        DTYPES[x.dtype],
        0 if parameter is None else DTYPES[parameter.dtype],
        torch.get_num_threads(),
        about_zero,
        0,
        0.0,
        eps,
        x.data_ptr(),
        0,
        0,
        _address(y),
        _address(mask),
        _address(weight),
        _address(bias),
        stats.data_ptr(),
        measured,
        _address(affine),
    )
    return y


def _backward(
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
    dx = _empty(x, made) if wants[0] else None
    dweight = torch.empty_like(weight) if wants[1] and weight is not None else None
    dbias = torch.empty_like(bias) if wants[2] and bias is not None else None
    parameter = weight if weight is not None else bias
    _MODULE.backward(
        made.packed,
        DTYPES[x.dtype],
        0 if parameter is None else DTYPES[parameter.dtype],
        torch.get_num_threads(),
        about_zero,
        0 if activation is None else ACTIVATIONS[activation][0],
        _SLOPE,
        eps,
        x.data_ptr(),
        _address(mask),
        _address(weight),
        _address(bias),
        stats.data_ptr(),
        fixed,
        _address(affine),
        dy.data_ptr(),
        _address(dsum),
        _address(dx),
        _address(affine_gradient),
        _address(combine),
        _address(dweight),
        _address(dbias),
    )
    return dx, dweight, dbias


def _new_stats(made: Nest) -> Tensor:
    return torch.empty((4, made.sets), dtype=torch.float64, device="cpu")


# ---- the norm in one call


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
        if _needs_a_graph(dy):
            with torch.enable_grad():
                x, weight, bias = _apart(x, weight, bias)
                y = by_reference(x, part, weight, bias, eps, about_zero, mask)
            return *_gradients(y, dy, (x, weight, bias), wants), None, None, None, None, None, None
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
    dx, dw, db = _backward(
        _lying(x, made.x_strides),
        _lying(dy, made.y_strides),
        made,
        stats,
        _to_kernel(weight, made, part),
        _to_kernel(bias, made, part),
        eps=eps,
        about_zero=about_zero,
        mask=mask if mask is None else _mask_for(mask, made),
        wants=wants,
        dsum=None if dsum is None else _lying(dsum, made.y_strides),
        activation=activation,
    )
    if not made.in_order:
        dw = None if dw is None or weight is None else _from_kernel(dw, weight, made, part)
        db = None if db is None or bias is None else _from_kernel(db, bias, made, part)
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
    x, w, b = _lying(x, made.x_strides), _to_kernel(weight, made, part), _to_kernel(bias, made, part)
    parameter = w if w is not None else b
    # Asking torch for its threads costs more than a small tensor needs.
    threads = torch.get_num_threads() if made.entries >= _PARALLEL else 1
    y = torch.empty_like(x) if made.y_strides == made.x_strides else _empty(x, made)
    _MODULE.forward(
        made.packed,
        DTYPES[x.dtype],
        0 if parameter is None else DTYPES[parameter.dtype],
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


def _apart(*inputs: Tensor | None) -> list[Any]:
    """Aliases, so that a gradient by one of them leaves out the ways to it that lead through another.

    A scale comes from x, weight and bias may be one tensor.
    """
    return [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]


# ---- with its neighbours: an addition before it, an activation after it


def activate(z: Tensor, activation: str | None) -> Tensor:
    """The activation in plain torch."""
    return z if activation is None else ACTIVATIONS[activation][1](z)


ACTIVATIONS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "relu": (1, F.relu),
    "leaky_relu": (2, F.leaky_relu),
    "gelu": (3, F.gelu),
    "silu": (4, F.silu),
}
_SLOPE = 0.01  # of leaky ReLU, torch's default


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
        y = _empty(x, made)
        total = None if residual is None else _empty(x, made)
        added = None if residual is None else _lying(residual, made.y_strides)
        laid, w, b = _lying(x, made.x_strides), _to_kernel(weight, made, part), _to_kernel(bias, made, part)
        parameter = w if w is not None else b
        _MODULE.forward(
            made.packed,
            DTYPES[x.dtype],
            0 if parameter is None else DTYPES[parameter.dtype],
            torch.get_num_threads(),
            about_zero,
            0 if activation is None else ACTIVATIONS[activation][0],
            _SLOPE,
            eps,
            laid.data_ptr(),
            _address(added),
            _address(total),
            y.data_ptr(),
            _address(mask),
            _address(w),
            _address(b),
            stats.data_ptr(),
            False,
            0,
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
        if _needs_a_graph(dy) or (dtotal is not None and _needs_a_graph(dtotal)):
            with torch.enable_grad():
                x, weight, bias = _apart(x, weight, bias)
                y = activate(by_reference(x, part, weight, bias, eps, about_zero, mask), activation)
            dx, dw, db = _gradients(y, dy, (x, weight, bias), wants)
            if dtotal is not None and dx is not None:
                dx = dx + dtotal
        else:
            if added:  # the sum lies as y does
                back = nest(part, x.shape, x.stride(), None if mask is None else mask.stride())
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
    stats = _new_stats(made)
    mask = _mask_for(mask, made)
    found = _run(_Neighbours, x, residual, weight, bias, mask, part, made, eps, about_zero, activation, stats)
    y, total = (found, x) if residual is None else found
    return y, total, stats


def _needs_a_graph(dy: Tensor) -> bool:
    """Whether a gradient is to be differentiated again, or is a batch of gradients: then torch works it out."""
    return torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(dy) or why_not(dy) is not None


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


def _run(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    return function.apply(*arguments)  # type: ignore[no-untyped-call]


def _gradients(
    y: Tensor, dy: Tensor, inputs: tuple[Tensor | None, ...], wants: tuple[bool, ...]
) -> list[Tensor | None]:
    """Gradients of y by the wanted inputs, with a graph of their own where one is asked for."""
    wanted = [tensor for tensor, want in zip(inputs, wants, strict=True) if want and tensor is not None]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=torch.is_grad_enabled(), allow_unused=True))
    return [next(found) if want and tensor is not None else None for tensor, want in zip(inputs, wants, strict=True)]


def _mask_for(mask: Tensor | None, made: Nest) -> Tensor | None:
    return None if mask is None or made.mask_strides is None else _lying(mask, made.mask_strides)


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
        mask = _mask_for(mask, made)
    if learns(x, weight, bias):
        stats = _new_stats(made)
        return _run(_Normalize, x, weight, bias, mask, part, made, eps, about_zero, stats), stats
    found = _new_stats(made) if wants_stats else None
    return _normalized(x, made, part, weight, bias, eps, about_zero, mask, found), found


def learns(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether a gradient will be asked for."""
    return torch.is_grad_enabled() and (
        x.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
    )


def moments_of(stats: Tensor, part: Partition, made: Nest) -> Moments:
    """What `normalize` measured, as moments."""
    mean, var, count = stats_to_view(stats[:3], made, part)
    return Moments(count, mean, var, part.names)


# ---- measure and apply apart, with a solve of one's own between them


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
        _forward(_lying(x, made.x_strides), made, stats, about_zero=about_zero, mask=mask, only_measure=True)
        ctx.save_for_backward(x, mask)
        ctx.rest = part, made, about_zero, stats, upstream
        mean, var = stats_to_view(stats[:2].clone(), made, part)
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
        mean, _, count = stats_to_view(stats[:3], made, part)
        n = count.clamp(min=1)
        square = torch.where(count > 0, 2 * dvar / n, 0)
        pivot = mean.to(torch.float64 if x.dtype == torch.float64 else torch.float32).to(torch.float64)
        constant = torch.where(count > 0, (0 if about_zero else dmean / n) - square * (mean - pivot), 0)
        combine = stats_to_kernel([square, constant], made, part)
        dx, _, _ = _backward(
            _lying(x, made.x_strides),
            dy,
            made,
            stats,
            weight,
            bias,
            about_zero=about_zero,
            mask=_mask_for(mask, made),
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
        w, b = _to_kernel(weight, made, part), _to_kernel(bias, made, part)
        y = _forward(_lying(x, made.x_strides), made, stats, w, b, mask=mask, measured=True, affine=affine)
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
        if _needs_a_graph(dy):
            with torch.enable_grad():
                x, scale, center, shift, weight, bias = _apart(x, scale, center, shift, weight, bias)
                y = reference.apply(x, part, Affine(scale, center, shift), weight, bias, mask=mask)
            wants = (needs[0], *needs[2:7])
            dx, *rest = _gradients(y, dy, (x, scale, center, shift, weight, bias), wants)
            return dx, zero, *rest, None, None, None, None, None, None
        w, b = _to_kernel(weight, made, part), _to_kernel(bias, made, part)
        dy = _lying(dy, made.y_strides)
        daffine = _new_stats(made)
        dx, dw, db = _backward(
            _lying(x, made.x_strides),
            dy,
            made,
            stats,
            w,
            b,
            about_zero=about_zero,
            mask=_mask_for(mask, made),
            fixed=True,
            affine=affine,
            wants=(needs[0] and upstream is None, needs[5], needs[6]),
            affine_gradient=daffine,
        )
        if upstream is not None and needs[0]:
            upstream.task, upstream.left = torch._C._current_graph_task_id(), (dy, w, b, affine)
        dw = None if dw is None else _from_kernel(dw, weight, made, part)
        db = None if db is None else _from_kernel(db, bias, made, part)
        dscale, dcenter, dshift = stats_to_view(daffine[:3], made, part)
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
    return stats_to_kernel(rows, made, part)


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
    stats, upstream = _new_stats(made), _Upstream()
    mask = _mask_for(mask, made)
    mean, var = _run(_Measure, x, mask, part, made, about_zero, stats, upstream)
    count = stats[2:3] if mask is not None else stats[2:3, :1]
    count = stats_to_view(count, made, part)[0] if mask is not None else count.view([1] * len(made.split))
    return Moments(count, mean, var, part.names), Measured(made, mask, stats, mean, upstream)


def given(mean: Tensor, var: Tensor, part: Partition, made: Nest, mask: Tensor | None) -> Measured:
    """The same for statistics that do not come from the input."""
    one = torch.ones((), dtype=torch.float64, device="cpu")
    with torch.no_grad():
        stats = stats_to_kernel([mean, var, one, one], made, part)
    return Measured(made, _mask_for(mask, made), stats, None, None)


def tracks(running: tuple[Tensor, Tensor], num_batches_tracked: Tensor | None) -> bool:
    """Whether `track` and `batch_norm_in_training` can move these."""
    return (
        running[0].dtype == running[1].dtype
        and running[0].dtype in (torch.float32, torch.float64)
        and all(why_not(t) is None and t.is_contiguous() for t in running)
        and (num_batches_tracked is None or num_batches_tracked.is_cpu)
    )


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
    y: Tensor = _run(
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


def track(
    stats: Tensor,
    running: tuple[Tensor, Tensor],
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    *,
    unbiased: bool,
) -> None:
    """Move running statistics, one for each set and in the sets' order, as `running.update` does.

    As in torch's batch norm, autograd does not learn of it: two forward passes may precede their backward passes.
    """
    mean, var = running
    _MODULE.track(
        DTYPES[mean.dtype],
        stats.shape[1],
        stats.data_ptr(),
        -1.0 if momentum is None else momentum,
        unbiased,
        mean.data_ptr(),
        var.data_ptr(),
        _address(num_batches_tracked),
    )


def batch_norm_in_training(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: tuple[Tensor, Tensor],
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """Torch's own batch norm, which moves `running` itself; put back where the batch was not finite. See `tracks`."""
    mean, var = running
    where = DTYPES[mean.dtype], mean.numel(), mean.data_ptr(), var.data_ptr()
    if momentum is None:
        assert num_batches_tracked is not None
        momentum = 1.0 / (int(num_batches_tracked) + 1)
    _MODULE.guard(*where)
    y = torch.batch_norm(x, weight, bias, mean, var, True, momentum, eps, True)
    _MODULE.settle(*where, _address(num_batches_tracked))
    return y
