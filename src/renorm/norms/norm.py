"""The one layer: a pattern, what is learnt, and what is remembered. Every norm of the zoo is this one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from renorm.errors import PatternError, UnknownNormError
from renorm.kernels import apart, aten, fused, graph, native, reference, select
from renorm.kernels.moments import Affine, Moments
from renorm.norms import axes, sync
from renorm.norms import recover as recovery
from renorm.norms import running as running_statistics
from renorm.norms.axes import Bound
from renorm.norms.dispatch import Dispatching
from renorm.norms.masks import expand_mask
from renorm.norms.running import OneValue
from renorm.pattern import Partition, parse
from renorm.plan import Plan, plan

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Norm"]

_Bound = Bound  # its name in layers that were pickled when it was defined here


class Norm(Dispatching):
    r"""Normalize over the axes in brackets.

    $$y = \frac{x - \text{mean}}{\sqrt{\text{var} + \text{eps}}} \cdot \text{weight} + \text{bias}$$

    Mean and biased variance are those of each set of entries the pattern makes; see `renorm.pattern`.

    Args:
        pattern: such as ``"n (g [c]) [...]"``.
        eps: added to the variance; None is the smallest number the computing dtype tells from 1.
        weight: names of the axes that `weight` and `bias` run along, None for neither. By default those of the
            dimension that holds the axis ``c``.
        bias: False leaves the bias out.
        recover: what stands behind the standardized values: ``"affine"``, weight and bias; ``"none"``; ``"linear"``, a
            matrix and a bias over the channels; ``"mlp"``, two of these with a GELU between; or a module of your own.
        center: False divides by the root mean square and subtracts nothing (RMS norm).
        running: names of the kept axes along which running statistics are kept for evaluation, None for no such
            statistics. By default the kept axes that are weighted, if the first dimension is averaged over.
        momentum: weight of the new batch in the running statistics (torch's sense); None averages all batches.
        unbiased: whether the running variance is divided by n - 1, as torch does, or n, as Keras does.
        one_value: a set of one entry has no variance. ``"raise"`` refuses it (the default with running
            statistics), ``"running"`` uses the running statistics for this batch, ``"allow"`` gives `bias`.
        process_group: processes whose batches are one batch (``torch.distributed.group.WORLD`` for all of them): the
            moments of all are merged exactly, whatever the sizes. For norms that average over the first dimension.
        activation: ``"relu"``, ``"leaky_relu"`` (slope 0.01), ``"gelu"`` or ``"silu"`` behind the norm, in one pass
            where a kernel can.
        backend: ``"auto"``, ``"native"``, ``"triton"``, ``"torch"`` or ``"reference"``; the environment's
            RENORM_BACKEND where it is auto.
        sizes: of the axes, by name. Weighted and running axes need theirs; one part of a split may be open.

    Shapes: input and output (any that fits the pattern), weight and bias (the weighted axes' sizes, those of one
    dimension multiplied). `mask` in the call is boolean, True on real entries, broadcastable to the input: the
    others count for nothing and come out as 0; a set without a real entry gives zeros and zero gradients.

    Raises PatternError for a pattern or sizes that do not fit each other, ShapeError for an input that does not
    fit them.

    >>> layer = Norm("n (g [c]) [...]", g=4, c=2)
    >>> layer(torch.arange(32.0).view(2, 8, 2)).mean().abs() < 1e-6
    tensor(True)
    >>> Norm("n [c] [...", c=8)
    Traceback (most recent call last):
    renorm.errors.PatternError: this [ is never closed: write ] after the axes to average over
        n [c] [...
              ^
    """

    activation: str | None = None
    _recovers: bool = False
    by_running: ClassVar[bool] = False  # a solve of one's own is left out where running statistics are used

    def __init__(
        self,
        pattern: str,
        *,
        eps: float | None = 1e-5,
        weight: str | None = "auto",
        bias: bool = True,
        recover: str | nn.Module = "affine",
        center: bool = True,
        running: str | None = "auto",
        momentum: float | None = 0.1,
        unbiased: bool = True,
        one_value: OneValue | None = None,
        activation: str | None = None,
        process_group: ProcessGroup | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **sizes: int,
    ) -> None:
        super().__init__()
        read = parse(pattern)
        channels = axes.weighted_axes(read, weight)
        kept = axes.running_axes(read, channels, running)
        weighted = channels if recover == "affine" else ()
        axes.check_sizes(read, sizes, (() if recover == "none" else channels) + kept)
        self.eps = eps
        self.momentum = momentum
        self.track_running_stats = bool(kept)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        shape = axes.parameter_shape(read, weighted, sizes)
        self.weight = nn.Parameter(torch.ones(shape, **factory)) if weighted else None
        self.bias = nn.Parameter(torch.zeros(shape, **factory)) if weighted and bias else None
        if kept:
            shape = axes.parameter_shape(read, kept, sizes)
            self.register_buffer("running_mean", torch.zeros(shape, **factory))
            self.register_buffer("running_var", torch.ones(shape, **factory))
            self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long, device=device))
        self._define(
            pattern,
            sizes,
            weight=weighted,
            running=kept,
            center=center,
            unbiased=unbiased,
            one_value=one_value or ("raise" if kept else "allow"),
            activation=activation,
            process_group=process_group,
            backend=backend,
        )
        self.recover = recovery.build(recover, math.prod(sizes.get(name, 1) for name in channels), **factory)
        self._channels = channels
        self._recovers = self.recover is not None
        self._given_recovery = isinstance(recover, nn.Module)

    def _define(
        self,
        pattern: str | Mapping[int, str],
        sizes: Mapping[str, int],
        *,
        weight: tuple[str, ...] = ("c",),
        running: tuple[str, ...] = (),
        center: bool = True,
        unbiased: bool = True,
        one_value: OneValue = "allow",
        activation: str | None = None,
        process_group: ProcessGroup | None = None,
        backend: str = "auto",
    ) -> None:
        """Say which norm this is; a mapping gives a pattern for each rank (torch's unbatched inputs)."""
        select.resolve(backend)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            if name not in self._buffers:
                self.register_buffer(name, None)
        self.pattern = pattern if isinstance(pattern, str) else pattern[max(pattern)]
        self.center = center
        self.unbiased = unbiased
        self.one_value = one_value
        if activation is not None and activation not in native.ACTIVATIONS:
            raise UnknownNormError(
                f"an activation that a norm may end in is one of {', '.join(native.ACTIVATIONS)}; got {activation!r}: "
                "write any other as a layer of its own behind the norm"
            )
        self.activation = activation
        self.backend = backend
        self.sizes = dict(sizes)
        self._weight_axes = weight
        self._running_axes = running
        self._kernel = ""  # that ran last, for repr
        self._ways = {}
        self.process_group = process_group
        self._bind_ahead(pattern)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize `x`; entries where `mask` is False count for nothing and come out as 0."""
        if self.activation is not None or self._recovers:
            return self._with_neighbours(x, None, mask)[0]
        return self._normalize(x, mask)

    def add(self, x: Tensor, residual: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The norm of ``x + residual``, and that sum for the next residual: in one pass where a kernel can.

        >>> y, total = Norm("... [c]", c=2).add(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]]))
        >>> total
        tensor([[2., 6.]])
        """
        return self._with_neighbours(x, residual, mask)

    def _with_neighbours(self, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        bound = self._bound(x)
        weight, bias = self._applied()
        alike = residual is None or (residual.shape, residual.dtype, residual.device) == (x.shape, x.dtype, x.device)
        together = (
            self._plain
            and not self._recovers
            and not torch.compiler.is_compiling()
            and not self._uses_running(bound.part, x)
            and alike
        )
        real = None if mask is None else expand_mask(mask, x)
        kernel = self._choose(x, bound, real) if together else ""
        if kernel in select.OWN:
            made = native.fit(x, bound.part, weight, bias, real, kernel)
            assert not isinstance(made, str)
            y, total, stats = fused.normalize_with_neighbours(
                x,
                residual,
                bound.part,
                made,
                weight,
                bias,
                self._eps(x),
                about_zero=not self.center,
                mask=real,
                activation=self.activation,
            )
            self._remember(kernel)
            if self._running() is not None:
                self._track_natively(stats, made, bound)
            return y, total
        total = x if residual is None else x + residual
        y = self._normalize(total, mask)
        if self._recovers:
            y = self._recovered(y, bound.part, real)
        return native.activate(y, self.activation), total

    def _recovered(self, y: Tensor, part: Partition, mask: Tensor | None) -> Tensor:
        assert self.recover is not None
        if self._given_recovery:
            y = self.recover(y)
        else:
            y = recovery.over_channels(self.recover, y, part.dims[part.names.index(self._channels[0])])
        return y if mask is None else torch.where(mask, y, 0)

    @property
    def process_group(self) -> ProcessGroup | None:
        """The processes whose batches are one batch to this layer; None for this process alone."""
        return self._process_group

    @process_group.setter
    def process_group(self, group: ProcessGroup | None) -> None:
        if group is not None and not self.couples_batch:
            raise PatternError(
                "a process group merges batches, and this norm has statistics for each sample: leave process_group out",
                self.pattern,
                0,
                len(self.pattern),
            )
        self._process_group = group
        self._plain = not self._own_solve and group is None
        self._by_running = not self._own_solve or self.by_running
        self._ways.clear()

    @property
    def couples_batch(self) -> bool:
        """Whether samples of a batch share statistics, so that it matters which other samples are in it."""
        return any(axis.reduced for axis in parse(self.pattern).dims[0])

    def _normalize(self, x: Tensor, mask: Tensor | None, *context: Any) -> Tensor:
        """`context` is handed to `solve`, behind the moments."""
        if mask is None and self._plain and not torch.compiler.is_compiling():
            y = self._quickly(x)
            if y is not None:
                return y
        bound = self._bound(x)
        part = bound.part
        if mask is not None:
            mask = expand_mask(mask, x)
        (weight, bias), eps, about_zero = self._applied(), self._eps(x), not self.center
        if self._by_running and self._uses_running(part, x):
            return self._normalize_by_running(x, bound, mask)
        kernel = self._choose(x, bound, mask)
        self._remember(kernel)
        if not self._plain:
            return self._solved(x, part, kernel, mask, *context)
        running = self._running()
        if kernel in select.OWN and torch.compiler.is_compiling():
            y, found = graph.normalize(
                x, part, bound.text, weight, bias, eps, about_zero=about_zero, mask=mask, backend=kernel
            )
            if running is not None:
                self._track(running, found, bound)
            return y
        if kernel in select.OWN:
            made = native.fit(x, part, weight, bias, mask, kernel)
            assert not isinstance(made, str)
            y, stats = fused.normalize(x, part, made, weight, bias, eps, about_zero=about_zero, mask=mask)
            if running is not None:
                assert stats is not None
                self._track_natively(stats, made, bound)
            return y
        # In the common case torch's batch norm moves the running statistics as this layer would.
        by_torch = kernel == "torch.batch_norm" and self.unbiased and bound.running == part.kept
        if running is None:
            y, _ = select.normalize(x, part, kernel, weight, bias, eps, about_zero=about_zero, mask=mask)
        elif by_torch and self.momentum is not None:
            y, *new = aten.batch_norm_in_training(x, part, weight, bias, eps, running, self.momentum)
            if not running_statistics.recomputing():
                running_statistics.commit(running, (new[0], new[1]), self.num_batches_tracked)
        else:
            y, batch = select.normalize(x, part, kernel, weight, bias, eps, about_zero=about_zero, mask=mask)
            assert batch is not None
            self._track(running, batch, bound)
        return y

    def _normalize_by_running(self, x: Tensor, bound: Bound, mask: Tensor | None) -> Tensor:
        kernel = self._choose_fixed(x, bound, mask)
        self._remember(kernel)
        if kernel == "torch.batch_norm":
            assert self.running_mean is not None
            assert self.running_var is not None
            return aten.fixed_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self._eps(x))
        mean, var = self._running_moments(bound, x.dtype)
        affine = Affine(torch.rsqrt(var + self._eps(x)), mean if self.center else None)
        if kernel in select.OWN:
            made = native.fit(x, bound.part, self.weight, self.bias, mask, kernel)
            assert not isinstance(made, str)
            measured = apart.given(mean, var, bound.part, made, mask)
            return apart.apply(x, bound.part, measured, affine, self.weight, self.bias)
        return reference.apply(x, bound.part, affine, self.weight, self.bias, mask=mask)

    def _solved(self, x: Tensor, part: Partition, kernel: str, mask: Tensor | None, *context: Any) -> Tensor:
        (weight, bias), about_zero = self._applied(), not self.center
        if kernel in select.OWN:
            made = native.fit(x, part, weight, bias, mask, kernel)
            assert not isinstance(made, str)
            moments, measured = apart.measure(x, part, made, mask=mask, about_zero=about_zero)
            return apart.apply(x, part, measured, self.solve(moments, *context), weight, bias, about_zero=about_zero)
        moments = reference.measure(x, part, mask=mask, about_zero=about_zero)
        return reference.apply(x, part, self.solve(moments, *context), weight, bias, mask=mask)

    def measure(self, x: Tensor, mask: Tensor | None = None) -> Moments:
        """The moments of each set of `x`, differentiable, with 1 on the averaged axes."""
        bound, about_zero = self._bound(x), not self.center
        real = None if mask is None else expand_mask(mask, x)
        backend = select.resolve(self.backend)
        if backend != "reference":
            own = "triton" if backend == "triton" else "native"
            made = native.fit(x, bound.part, None, None, real, own)
            if not isinstance(made, str):
                return apart.measure(x, bound.part, made, mask=real, about_zero=about_zero)[0]
        return reference.measure(x, bound.part, mask=real, about_zero=about_zero)

    @property
    def _own_solve(self) -> bool:
        """Whether more is done with the moments than to standardize."""
        return type(self).solve is not Norm.solve

    def solve(self, moments: Moments, *context: Any) -> Affine:
        """From the moments of each set to the scale, center and shift that are applied to it.

        A norm of your own overrides this: ordinary differentiable torch code on tensors the size of the
        statistics. `batch_moments` brings in running statistics, and the other processes' batches.
        """
        if self.process_group is not None:  # Else the statistics are tracked by the kernels' side.
            moments = self.batch_moments(moments)
        return select.standardize(moments, self._eps(moments.mean), about_zero=not self.center)

    def batch_moments(self, batch: Moments) -> Moments:
        """The moments of the whole batch, remembered, in training; the running moments in evaluation.

        The whole batch is that of all processes where there is a `process_group`.
        """
        bound = next(bound for bound in self._bounds.values() if bound.part.names == batch.names)
        if self.running_mean is None or self._learns():
            if self.process_group is not None:
                batch = sync.merge(batch, self.process_group)
            running = self._running()
            if running is not None:
                self._track(running, batch, bound)
            return batch
        mean, var = self._running_moments(bound, batch.mean.dtype)
        return Moments(batch.count, mean, var, batch.names)

    def values_per_set(self, shape: tuple[int, ...]) -> int:
        """How many entries one mean and variance of this layer come from, for an input of this shape."""
        bound = self._bounds.get(len(shape)) or self._bind(self.pattern, len(shape))
        split = bound.part.split_shape(shape)
        return math.prod([split[i] for i in bound.part.reduced])

    def kernel(self, x: Tensor, mask: Tensor | None = None) -> str:
        """The name of the kernel that runs for this input, in the mode the layer is in."""
        bound = self._bound(x)
        if mask is not None:
            mask = expand_mask(mask, x)
        if self._by_running and self._uses_running(bound.part, x):
            return self._choose_fixed(x, bound, mask)
        return self._choose(x, bound, mask)

    def plan(self, x: Tensor) -> Plan:
        """The loops over x's memory that measure and apply come down to."""
        return plan(self._bound(x).part, x.shape, x.stride())

    def __getstate__(self) -> dict[str, Any]:
        group = self._process_group  # goes by its name
        return {**self.__dict__, "_ways": {}, "_process_group": None if group is None else group.group_name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.process_group = sync.named(state["_process_group"])

    def extra_repr(self) -> str:
        """The pattern, what is particular to this layer, and the kernel that ran last."""
        inherited = super().extra_repr()
        words = [inherited] if inherited else []
        words.append(f"pattern={self.pattern!r}")
        if not inherited:
            words += [f"{name}={size}" for name, size in self.sizes.items()]
            words.append(f"eps={self.eps}")
            words += [] if self.center else ["center=False"]
            words += ["weight=None"] if self.weight is None else ["bias=False"] if self.bias is None else []
            words += [f"running={' '.join(self._running_axes)!r}"] if self._running_axes else []
        words += [f"activation={self.activation!r}"] if self.activation else []
        words += ["frozen=True"] if self.frozen else []
        words += [f"backend={self.backend!r}"] if self.backend != "auto" else []
        words += [f"kernel={self._kernel}"] if self._kernel else []
        return ", ".join(words)
