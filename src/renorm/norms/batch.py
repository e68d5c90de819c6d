"""Norms that lean on the statistics of the batch: in smaller parts, corrected by running ones, or by these alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from renorm.errors import ShapeError
from renorm.kernels import native
from renorm.kernels.moments import Affine, Moments
from renorm.norms import running as running_statistics
from renorm.norms import sync
from renorm.norms.axes import Bound
from renorm.norms.masks import expand_mask
from renorm.norms.norm import Norm
from renorm.norms.running import OneValue
from renorm.norms.zoo import BatchNorm, Device
from renorm.plan import Plan

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["BatchRenorm", "GhostBatchNorm", "PowerNorm", "Ramp"]


class GhostBatchNorm(BatchNorm):
    r"""Batch norm of each `size` samples of a batch on their own: ``(k [b]) c [...]``, or ``(k [b]) [...] c``.

    $$y_i = \frac{x_i - \text{mean}_{g(i)}}{\sqrt{\text{var}_{g(i)} + \text{eps}}} \cdot \text{weight} + \text{bias},
    \qquad g(i) = \lfloor i / \text{size} \rfloor$$

    with the mean and biased variance of ghost g over its samples and all positions, one of each for a channel. All
    ghosts are normalized in one call. Where `size` does not divide the batch, the last ghost is smaller; such a batch
    is copied once, to fill that ghost up with masked samples.

    In evaluation the running statistics normalize, whatever the size of the batch. They move once for each batch, with
    `momentum` (torch's), towards the statistics of the whole of it: the mean of the ghosts' means, weighted by their
    counts, and the variance within and between them. So they are what `BatchNorm` keeps of the same batches. The
    authors' code moves them once for each ghost: its k steps of momentum m forget as much as one step of
    1 - (1 - m)^k, and weigh later ghosts more.

    Arguments as `torch.nn.BatchNorm1d`, with `size`, the samples in a ghost, and `axis`, the dimension of the channels,
    1 or -1; then as `BatchNorm`. With `process_group` the running statistics are of all processes' batches; ghosts
    stay in theirs.

    Raises ShapeError where a ghost has one value for each channel (`one_value`: ``"running"`` normalizes it by the
    running statistics, ``"allow"`` gives `bias`), and for other axes and sizes. Hoffer et al. 2017, arXiv:1705.08741.

    >>> GhostBatchNorm(1, size=2, affine=False)(torch.tensor([[0.0], [2.0], [10.0], [50.0]])).flatten()
    tensor([-1.0000,  1.0000, -1.0000,  1.0000])
    """

    by_running = True
    size: int
    _whole: Norm

    def __init__(
        self,
        num_features: int,
        size: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        axis: int = 1,
        bias: bool = True,
        unbiased: bool = True,
        one_value: OneValue = "raise",
        activation: str | None = None,
        process_group: ProcessGroup | None = None,
        backend: str = "auto",
    ) -> None:
        _check_axis("ghost batch norm", axis)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ShapeError(f"a ghost batch has 1 sample or more; got size={size!r}")
        self.__dict__["size"] = size
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            axis=axis,
            bias=bias,
            unbiased=unbiased,
            one_value=one_value,
            activation=activation,
            process_group=process_group,
            backend=backend,
        )

    def _define(self, pattern: Any, sizes: Any, **options: Any) -> None:
        # Binds the pattern of a batch that is not divided; around Module.__setattr__, as it is no part of the model.
        self.__dict__["_whole"] = Norm(pattern, running="c", device="meta", **sizes)
        super()._define({1: "(k [b]) c [...]", -1: "(k [b]) [...] c"}[self.axis], {**sizes, "b": self.size}, **options)

    def _bound(self, x: Tensor) -> Bound:
        return super()._bound(x) if self._divides() else self._whole._bound(x)

    def _divides(self) -> bool:
        """Whether ghosts are measured, as there are no running statistics or this is training."""
        return self.running_mean is None or self._learns()

    def _lacking(self, x: Tensor) -> int:
        """How many samples the last ghost lacks."""
        return -x.shape[0] % self.size if self._divides() else 0

    def _fill(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """`x` with masked samples behind it, as many as the last ghost lacks."""
        count, lacking = x.shape[0], self._lacking(x)
        if lacking == 0:
            return x, mask
        behind = [0, 0] * (x.dim() - 1) + [0, lacking]
        if mask is not None:
            return F.pad(x, behind), F.pad(expand_mask(mask, x), behind)
        real = torch.arange(count + lacking, device=x.device) < count
        return F.pad(x, behind), real.view([-1] + [1] * (x.dim() - 1))

    def _normalize(self, x: Tensor, mask: Tensor | None, *context: Any) -> Tensor:
        if self._lacking(x) == 0:
            return super()._normalize(x, mask, *context)
        lonely = x.shape[0] % self.size == 1 and x.shape[1:].numel() == self.num_features
        if not lonely or self.one_value == "allow":
            return super()._normalize(*self._fill(x, mask), *context)[: x.shape[0]]
        if self.one_value == "running" and self.running_mean is not None:
            real = None if mask is None else expand_mask(mask, x)
            first, last = (None, None) if real is None else (real[:-1], real[-1:])
            known = self._normalize_by_running(x[-1:], self._whole._bound(x), last)
            return torch.cat([super()._normalize(x[:-1], first, *context), known])
        raise ShapeError(
            f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}: the last ghost "
            f"of {self.size} samples has one, whose variance is 0. Use drop_last=True in the data loader, another "
            "size, or one_value='running' to normalize that sample by what is known"
        )

    def _with_neighbours(self, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if self._lacking(x) == 0:
            return super()._with_neighbours(x, residual, mask)
        total = x if residual is None else x + residual
        return native.activate(self._normalize(total, mask), self.activation), total

    def batch_moments(self, batch: Moments) -> Moments:
        """Remember the whole batch, of all processes where there is a `process_group`; its ghosts stay as they are."""
        with torch.no_grad():
            super().batch_moments(_merge_ghosts(batch))
        return batch

    def _track(self, running: tuple[Tensor, Tensor], batch: Moments, bound: Bound) -> None:
        super()._track(running, _merge_ghosts(batch), bound)

    def measure(self, x: Tensor, mask: Tensor | None = None) -> Moments:
        """The moments of each ghost; in evaluation, of the whole batch."""
        return super().measure(*self._fill(x, mask))

    def kernel(self, x: Tensor, mask: Tensor | None = None) -> str:
        """The name of the kernel that runs for this input, in the mode the layer is in."""
        return super().kernel(*self._fill(x, mask))

    def plan(self, x: Tensor) -> Plan:
        """The loops over x's memory that measure and apply come down to."""
        return super().plan(self._fill(x, None)[0])

    def values_per_set(self, shape: tuple[int, ...]) -> int:
        """How many entries one mean and variance come from: those of the smallest ghost."""
        samples = shape[0] % self.size or min(self.size, shape[0])
        return super().values_per_set((self.size, *shape[1:])) // self.size * samples

    def extra_repr(self) -> str:
        """As `BatchNorm`, with the size of the ghosts."""
        return f"{super().extra_repr()}, size={self.size}"


def _merge_ghosts(batch: Moments) -> Moments:
    # With a count for each ghost, a batch without any has moments too.
    return replace(batch, count=batch.count.expand(batch.mean.shape)).merge("k")


def _check_axis(what: str, axis: int) -> None:
    if axis not in (1, -1):
        raise ShapeError(f"the channels of a {what} are on axis 1 or -1; got axis={axis}")


@dataclass(frozen=True)
class Ramp:
    """A number that depends on how many batches a layer has seen: `start`, then a straight line, then `end`.

    >>> Ramp(1.0, 3.0, first=5_000, last=40_000)(torch.tensor([0, 5_000, 22_500, 90_000]))
    tensor([1., 1., 2., 3.])
    """

    start: float  # for the first `first` batches
    end: float  # from batch number `last` on
    first: int  # batches
    last: int  # batches

    def __call__(self, batches: Tensor) -> Tensor:
        """The number at each of `batches`, tensors of counts."""
        share = ((batches - self.first) / (self.last - self.first)).clamp(0.0, 1.0)
        return self.start + (self.end - self.start) * share


Limit = float | Callable[[Tensor], Tensor]


class _ByKnown(Norm):
    """A norm that normalizes a batch in training by the running statistics of those before it."""

    by_running = True
    _before: tuple[Tensor, Tensor, Tensor] | None = None

    def _known(self, moments: Moments) -> tuple[Tensor, Tensor, Tensor]:
        """Running mean, running variance and number of batches, as they are before this one.

        Activation checkpointing runs a forward a second time when they have moved on: it gets what the last one had.
        """
        if running_statistics.recomputing() and self._before is not None:
            return self._before
        assert self.num_batches_tracked is not None
        bound = next(bound for bound in self._bounds.values() if bound.part.names == moments.names)
        mean, var = self._running_moments(bound, moments.mean.dtype)
        known = mean.clone(), var.clone(), self.num_batches_tracked.clone()
        if not torch.compiler.is_compiling():
            self.__dict__["_before"] = known
        return known

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_before": None}


class BatchRenorm(_ByKnown, BatchNorm):
    r"""Batch renorm: batch norm, corrected towards what the running statistics would give: ``[n] c [...]``.

    $$y = \Bigl(\frac{x - \mu_B}{\sigma_B} r + d\Bigr) \cdot \text{weight} + \text{bias}, \quad
    r = \text{clip}\Bigl(\frac{\sigma_B}{\sigma}, \frac1{r_\max}, r_\max\Bigr), \quad
    d = \text{clip}\Bigl(\frac{\mu_B - \mu}{\sigma}, -d_\max, d_\max\Bigr)$$

    with the batch's mean $\mu_B$ and deviation $\sigma_B = \sqrt{\text{var}_B + \text{eps}}$ (biased) and the running
    ones $\mu$ and $\sigma$ from before this batch. No gradient flows through r and d. With r_max = 1 and d_max = 0 it
    is batch norm; without limits it normalizes as in evaluation, by the running statistics alone.

    `rmax` and `dmax` are numbers, or functions of the number of batches seen, a tensor, such as a `Ramp`. By default
    they are the paper's (section 4): batch norm for 5,000 batches, then r_max grows to 3 at 40,000 and d_max to 5 at
    25,000. Runs of fewer batches want a shorter ramp.

    As in the paper the running deviation is averaged, not the variance; `running_var` holds its square less eps, so
    that parameters and buffers are batch norm's. `momentum` is torch's, the weight of the new batch (the paper's alpha,
    0.01). The other arguments are as `BatchNorm`'s; `axis` is the dimension of the channels.

    Raises ShapeError for a batch of one value for each channel (see `one_value`). Ioffe 2017, arXiv:1702.03275.

    >>> norm = BatchRenorm(1, rmax=3.0, dmax=5.0, affine=False)
    >>> norm(torch.tensor([[3.0], [5.0]])).flatten()  # the running mean is still 0, the running deviation 1
    tensor([3.0000, 5.0000])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        axis: int = 1,
        rmax: Limit = Ramp(1.0, 3.0, 5_000, 40_000),
        dmax: Limit = Ramp(0.0, 5.0, 5_000, 25_000),
        bias: bool = True,
        one_value: OneValue = "raise",
        process_group: ProcessGroup | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            device=device,
            dtype=dtype,
            axis=axis,
            bias=bias,
            unbiased=False,
            one_value=one_value,
            process_group=process_group,
            backend=backend,
        )
        self.rmax = rmax
        self.dmax = dmax

    def limits(self, batches: Tensor) -> tuple[Tensor, Tensor]:
        """r_max and d_max after that many batches."""
        rmax, dmax = (
            limit(batches) if callable(limit) else torch.full_like(batches, limit, dtype=torch.float64)
            for limit in (self.rmax, self.dmax)
        )
        return rmax, dmax

    def solve(self, moments: Moments) -> Affine:
        """Standardize by the batch, then scale by r and shift by d."""
        mean, var, batches = self._known(moments)
        batch = self.batch_moments(moments)
        eps = self._eps(moments.mean)
        rstd = torch.rsqrt(batch.var + eps)
        with torch.no_grad():
            rmax, dmax = (limit.to(var.dtype) for limit in self.limits(batches))
            deviation = torch.sqrt(var + eps)
            r = (1 / (rstd * deviation)).clamp(1 / rmax, rmax)
            d = ((batch.mean - mean) / deviation).clamp(-dmax, dmax)
        return Affine(rstd * r, batch.mean, d)

    @torch.no_grad()
    def _track(self, running: tuple[Tensor, Tensor], batch: Moments, bound: Bound) -> None:
        mean, var = running
        eps = self._eps(batch.mean)
        old = torch.sqrt(var.to(batch.var.dtype) + eps)
        new = old.clone()
        super()._track((mean, new), replace(batch, var=torch.sqrt(batch.var + eps)), bound)
        var.copy_(torch.where(new == old, var, (new.square() - eps).clamp(min=0)))

    def extra_repr(self) -> str:
        """As `BatchNorm`, with the limits."""
        return f"{super().extra_repr()}, rmax={self.rmax}, dmax={self.dmax}"


class PowerNorm(_ByKnown):
    r"""Power norm: divide by the running quadratic mean, in training too: ``[n] c [...]``, or ``[...] c`` for axis -1.

    $$\hat x = \frac{x}{\psi}, \qquad y = \hat x \cdot \text{weight} + \text{bias}, \qquad
    \psi^2 \leftarrow (1 - m) \psi^2 + m \frac1n \sum_i x_i^2$$

    with $\psi$ from before this batch, and as gradient, in place of a derivative, the paper's approximation

    $$\frac{\partial L}{\partial x} = \frac1\psi \Bigl(\frac{\partial L}{\partial \hat x} - \nu \hat x\Bigr), \qquad
    \nu \leftarrow \nu (1 - m \Gamma) + m \Lambda, \quad
    \Gamma = \frac1n \sum_i \hat x_i^2, \; \Lambda = \frac1n \sum_i \frac{\partial L}{\partial \hat x_i} \hat x_i$$

    with $\nu$ from before this backward pass, which moves it, once for each forward. This is Algorithm 2 of the paper,
    whose alpha is 1 - m; `momentum` m is torch's, the weight of the new batch. eps is added to $\psi^2$ under the root.
    Sums are over the n real entries of a channel: padding that is masked does not count.

    The first `warmup` batches are divided by their own quadratic mean, with the exact gradient (the paper's PN-V),
    while $\psi$ and $\nu$ move as above; Algorithm 2 has no such batches. The authors' code differs from it: it has
    10,000 of them, with the approximate gradient and a $\psi$ that is their plain mean, and divides every gradient by
    the batch's own quadratic mean in place of $\psi$. It also has an RMS norm over the channels in front: write
    ``nn.Sequential(RMSNorm(c, eps=1e-5, elementwise_affine=False), PowerNorm(c, axis=-1))``.

    The buffers: `running_var` is $\psi^2$, 1 at first, `nu` is $\nu$, 0 at first, and `running_mean` stays 0. A second
    derivative is that of the approximate gradient. Other arguments as `BatchNorm`. Shen et al. 2020, arXiv:2003.07845.

    >>> norm = PowerNorm(1, affine=False)
    >>> norm(torch.tensor([[3.0], [5.0]])).flatten(), norm.running_var  # 0.9 * 1 + 0.1 * (9 + 25) / 2
    (tensor([3.0000, 5.0000]), tensor([2.6000]))
    """

    momentum: float
    nu: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        axis: int = 1,
        warmup: int = 0,
        process_group: ProcessGroup | None = None,
        backend: str = "auto",
    ) -> None:
        _check_axis("power norm", axis)
        super().__init__(
            {1: "[n] c [...]", -1: "[...] c"}[axis],
            eps=eps,
            weight="c" if affine else None,
            center=False,
            running="c",
            momentum=momentum,
            unbiased=False,
            one_value="allow",
            process_group=process_group,
            backend=backend,
            device=device,
            dtype=dtype,
            c=num_features,
        )
        self.num_features = num_features
        self.affine = affine
        self.warmup = warmup
        self.register_buffer("nu", torch.zeros(num_features, device=device, dtype=dtype))

    def solve(self, moments: Moments) -> Affine:
        """Divide by the root of the running quadratic mean; the gradient's mean takes its way back with it."""
        _, known, batches = self._known(moments)
        batch = self.batch_moments(moments)
        warm = batches < self.warmup
        scale = torch.rsqrt(torch.where(warm, batch.var, known) + self._eps(moments.mean)).detach()
        if not moments.var.requires_grad:
            return Affine(scale)
        square = batch.var.detach() * scale.square()
        share = -0.5 * moments.count  # an entry's share of a gradient of var is 2 x / count
        scale, shift = _Approximate.apply(  # type: ignore[no-untyped-call]
            moments.var, scale, share, batch.count, square, warm, self.nu, self.momentum, self.process_group
        )
        return Affine(scale, shift=shift)


class _Approximate(torch.autograd.Function):
    """The scale, and 0 as shift; their gradient becomes that of var which power norm wants, and moves nu.

    Only y depends on the shift, and not what a second derivative is made of: the shift has a gradient where dx is
    asked for, and there nu has its part in it.
    """

    @staticmethod
    def forward(
        var: Tensor,
        scale: Tensor,
        share: Tensor,
        count: Tensor,
        square: Tensor,
        warm: Tensor,
        nu: Tensor,
        momentum: float,
        group: ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        return scale.clone(), torch.zeros_like(scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        _, _, share, count, square, warm, ctx.nu, ctx.momentum, ctx.group = inputs
        ctx.save_for_backward(output[0], share, count, square, warm)  # not nu, which may move on meanwhile
        ctx.set_materialize_grads(False)
        ctx.old = None

    @staticmethod
    def backward(ctx: Any, dscale: Tensor | None, dshift: Tensor | None) -> Any:
        scale, share, count, square, warm = ctx.saved_tensors
        if dscale is None:
            return (None,) * 9
        if ctx.group is not None:
            dscale = sync.gather(dscale, ctx.group).sum(0)
        scale = torch.where(warm, scale, scale.detach())
        cross = dscale * scale / count.clamp(min=1)  # the paper's Lambda: dscale is the sum of dy_hat * x
        nu, again = ctx.nu, ctx.old is not None
        if not again:
            ctx.old = nu.to(scale.dtype).view(scale.shape).clone()
        part = torch.zeros_like(scale) if dshift is None else ctx.old
        dvar = torch.where(warm, cross, part) * scale.square() * share
        if not again:
            with torch.no_grad():
                new = ctx.old * (1 - ctx.momentum * square) + ctx.momentum * cross
                counts = (count > 0) & new.isfinite().all()
                nu.copy_(torch.where(counts, new, ctx.old).view_as(nu))
        return dvar, *(None,) * 8
