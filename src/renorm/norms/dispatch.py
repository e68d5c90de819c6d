"""Dispatch: from an input to the pattern at its rank and the kernel that runs, found out once for each shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from renorm.errors import ShapeError
from renorm.kernels import aten, extension, fused, native, select
from renorm.kernels.nest import Nest
from renorm.norms.axes import Bound, bind
from renorm.norms.running import Tracking, recomputing
from renorm.pattern import parse

__all__ = ["Dispatching", "Way"]

_MAX_WAYS = 64  # remembered by a layer: shapes, mostly


@dataclass(frozen=True)
class Way:
    """How a layer runs on inputs of one shape, strides and dtype: found out once."""

    kernel: str
    bound: Bound
    eps: float
    made: Nest | None = None  # for the native kernels
    direct: aten.Direct | None = None  # torch's function on the input as it is; neither: the general way
    moves: tuple[Tensor, Tensor, Tensor | None] | None = None  # mean, variance, count: what torch's batch norm may move


def _refuse_unreal(x: Tensor) -> None:
    """Raise ShapeError where `x` is of integers or complex numbers: a result in its dtype would lose most of it."""
    if not x.is_floating_point():
        instead = "torch.view_as_real(x)" if x.is_complex() else "x.float()"
        raise ShapeError(f"a norm takes floating-point numbers; got {x.dtype}: write {instead}")


def _kind(parameter: Any) -> Any:
    """What a way depends on of a parameter: of most the dtype alone, found in a tenth of a microsecond."""
    if parameter is None:
        return None
    if type(parameter) is torch.nn.Parameter and parameter.is_cpu:
        return parameter.dtype
    return type(parameter), parameter.dtype, parameter.device


class Dispatching(Tracking):
    """A layer with a pattern: it chooses its kernel by the input, and runs at once what it has met before."""

    pattern: str
    sizes: dict[str, int]
    # Any where torch's classes, which the zoo inherits from too, disagree among themselves.
    eps: Any  # float, or None
    weight: Any  # Parameter, or None
    bias: Any  # Parameter, or None
    center: bool
    backend: str
    _weight_axes: tuple[str, ...]
    _running_axes: tuple[str, ...]
    _applies_other: bool = False  # than weight and bias as they are, see `_applied`
    _plain: bool  # the moments of each set, as they are, standardize it: nothing is to be solved
    _bounds: dict[int, Bound]  # by rank
    _ways: dict[Any, Way]

    def _bound(self, x: Tensor) -> Bound:
        _refuse_unreal(x)
        bound = self._bounds.get(x.dim())
        if bound is None:
            bound = self._bounds[x.dim()] = self._bind(self.pattern, x.dim())
        bound.part.check(x.shape)
        return bound

    def _bind_ahead(self, pattern: str | Mapping[int, str]) -> None:
        """Bind the pattern at the usual ranks before the first call, so that a compiler meets finished plans only."""
        if isinstance(pattern, str):
            read = parse(pattern)
            least = read.least_rank
            pattern = dict.fromkeys(range(least, least + 5 if read.has_ellipsis else least + 1), pattern)
        self._bounds = {rank: self._bind(text, rank) for rank, text in pattern.items() if rank > 0}

    def _bind(self, pattern: str, rank: int) -> Bound:
        return bind(pattern, rank, self.sizes, self._weight_axes, self._running_axes)

    def _eps(self, x: Tensor) -> float:
        if self.eps is not None:
            return float(self.eps)
        return torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps

    def _applied(self) -> tuple[Any, Any]:
        """The weight and bias that are applied behind `solve`; a layer that overrides it sets `_applies_other`."""
        return self.weight, self.bias

    def _choose(self, x: Tensor, bound: Bound, mask: Tensor | None) -> str:
        weight, bias = self._applied()
        return select.choose(
            x,
            bound.part,
            bound.op,
            weight,
            bias,
            about_zero=not self.center,
            mask=mask,
            obstacle=self._obstacle(x, bound),
            backend=self.backend,
        )

    def _obstacle(self, x: Tensor, bound: Bound) -> str | None:
        """What in this layer keeps torch's kernels from computing it."""
        if not self._plain:
            return select.OWN_SOLVE
        if bound.op != "batch_norm" and self._running() is not None:
            return "torch's kernel does not hand out the moments that running statistics need"
        if bound.op in ("batch_norm", "group_norm") and bound.part.set_size(x) == 1:
            return "torch's kernel wants more than one value"
        return None

    def _choose_fixed(self, x: Tensor, bound: Bound, mask: Tensor | None) -> str:
        """The kernel that normalizes by running statistics."""
        op = "batch_norm" if bound.channels_second and self.center and x.dim() >= 2 else None
        return select.choose(x, bound.part, op, self.weight, self.bias, mask=mask, fixed=True, backend=self.backend)

    def _remember(self, kernel: str) -> None:
        if not torch.compiler.is_compiling():
            self.__dict__["_kernel"] = kernel  # around Module.__setattr__, which costs a microsecond

    def _quickly(self, x: Tensor) -> Tensor | None:
        """The norm of `x` where its shape has been met before and nothing needs to be worked out; None otherwise."""
        parameters, buffers = self._parameters, self._buffers  # attributes of a module cost a microsecond
        if "weight" not in parameters or "bias" not in parameters:  # parametrized
            return None
        weight, bias = parameters["weight"], parameters["bias"]
        if self._applies_other:
            weight, bias = self._applied()
        mean = buffers["running_mean"]
        fixed = mean is not None and not (self.training and not self.frozen)
        learns = native.learns(x, weight, bias)
        key = (x.shape, x.stride(), x.dtype, x.is_cpu or x.device, learns, fixed, _kind(weight), _kind(bias), self.eps)
        way = self._ways.get(key)
        if way is None:
            if len(self._ways) == _MAX_WAYS:
                self._ways.clear()
            way = self._ways[key] = self._way(x, fixed)
        y: Tensor
        stats = None
        if fixed:
            if way.direct is None:
                return None
            y = torch.batch_norm(x, weight, bias, mean, buffers["running_var"], False, 0.0, way.eps, True)
        elif way.made is not None:
            if native.why_not(x, way.made.backend) is not None:
                return None
            tracked = mean is not None and self.track_running_stats
            y, stats = fused.normalize(
                x, way.bound.part, way.made, weight, bias, way.eps, about_zero=not self.center, wants_stats=tracked
            )
            if tracked:
                assert stats is not None
                self._track_natively(stats, way.made, way.bound)
        elif way.direct is None:
            return None
        elif mean is None or not self.track_running_stats:
            y = way.direct(x, weight, bias, way.eps)
        elif (
            (moves := way.moves) is not None
            and moves[0] is mean
            and moves[1] is buffers["running_var"]
            and moves[2] is buffers["num_batches_tracked"]
            and not recomputing()
        ):
            y = extension.batch_norm_in_training(x, weight, bias, moves[:2], moves[2], self.momentum, way.eps)
        else:
            return None
        self._remember(way.kernel)
        return y

    def _way(self, x: Tensor, fixed: bool) -> Way:
        bound = self._bound(x)
        part, eps = bound.part, self._eps(x)
        general = Way("", bound, eps)
        if fixed:
            kernel = self._choose_fixed(x, bound, None)
            if kernel != "torch.batch_norm":
                return general
            return Way(kernel, bound, eps, direct=aten.direct(x, part, "batch_norm", None, None))
        if self._uses_running(part, x):
            return general
        kernel = self._choose(x, bound, None)
        if kernel in select.OWN:
            made = native.fit(x, part, self.weight, self.bias, None, kernel)
            return general if isinstance(made, str) else Way(kernel, bound, eps, made=made)
        if not kernel.startswith("torch.") or kernel == "torch.rms_norm":
            return general
        direct = aten.direct(x, part, kernel.removeprefix("torch."), self.weight, self.bias)
        running, batches = self._running(), self.num_batches_tracked
        moves = (
            running is not None and extension.tracks(running, batches) and self.unbiased and bound.running == part.kept
        )
        moves = moves and (self.momentum is not None or batches is not None)
        return Way(kernel, bound, eps, direct=direct, moves=(*running, batches) if running and moves else None)
