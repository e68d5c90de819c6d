"""EvoNorms: norm and activation in one expression, found by a search."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from renorm.errors import ShapeError
from renorm.kernels.moments import Moments
from renorm.norms.norm import Norm
from renorm.pattern import Partition

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["EvoNormB0", "EvoNormS0"]


class _EvoNorm(Norm):
    """The moments come from the kernels; what stands beside each entry, not only beside its set, is plain torch."""

    v: Any  # Parameter, or None

    def _activate(self, num_features: int, activate: bool, device: Any, dtype: torch.dtype | None) -> None:
        self.num_features = num_features
        self.activate = activate
        self.v = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype)) if activate else None

    @property
    def _own_solve(self) -> bool:
        return True

    def _solved(self, x: Tensor, part: Partition, kernel: str, mask: Tensor | None, *context: Any) -> Tensor:
        split = part.view(x)
        wide = split.float() if x.dtype in (torch.float16, torch.bfloat16) else split
        real = None if mask is None else part.view(mask)
        if real is not None:
            wide = torch.where(real, wide, 0)
        along = [size if i in part.weighted else 1 for i, size in enumerate(split.shape)]
        weight, bias = (parameter.to(wide.dtype).reshape(along) for parameter in (self.weight, self.bias))
        y = wide
        if self.activate:
            y = self._respond(wide, self.v.to(wide.dtype).reshape(along), self.measure(x, mask))
        y = torch.addcmul(bias, y, weight)
        if real is not None:
            y = torch.where(real, y, 0)
        return y.reshape(x.shape).to(x.dtype)

    @abstractmethod
    def _respond(self, x: Tensor, v: Tensor, moments: Moments) -> Tensor:
        """The activation that is divided by what `moments` has; `v` as it broadcasts over `x`."""

    def extra_repr(self) -> str:
        """That of `Norm`, and whether there is an activation."""
        return super().extra_repr() + ("" if self.activate else ", activate=False")


class EvoNormB0(_EvoNorm):
    r"""EvoNorm-B0: norm and activation in one, by the variance of the batch or of the instance, whichever is more.

    $$y = \frac{x}{\max\bigl(\sqrt{\text{Var}_b[x] + \text{eps}},\; v \cdot x + \sqrt{\text{Var}_i[x] + \text{eps}}
    \bigr)} \cdot \text{weight} + \text{bias}$$

    Var_b is over batch and positions ``[n] c [...]``, the running one in evaluation, Var_i over the positions of one
    sample ``n c [...]``. Both are biased, the running one too, as in the paper. No activation goes behind it.

    Args:
        num_features: channels C.
        eps: added to the variances.
        momentum: weight of the new batch in the running variance; None averages all batches.
        activate: False leaves weight and bias only, which is what the authors put where a block has no activation.
        process_group: as `Norm`.
        backend: as `Norm`.

    Shapes: (N, C, ...) in and out, (N, C) alone too; v, weight and bias (C,). Mask and errors as `Norm`. Liu et al.
    2020, arXiv:2004.02967.

    >>> EvoNormB0(1)(torch.tensor([[-1.0], [3.0]])).detach()
    tensor([[-0.5000],
            [ 0.9989]])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activate: bool = True,
        process_group: ProcessGroup | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            "n c [...]",
            eps=eps,
            running="c" if activate else None,
            momentum=momentum,
            unbiased=False,
            one_value="allow",
            process_group=process_group,
            backend=backend,
            device=device,
            dtype=dtype,
            c=num_features,
        )
        self._activate(num_features, activate, device, dtype)

    @property
    def couples_batch(self) -> bool:
        """It does, though the pattern is that of its instances."""
        return True

    def _respond(self, x: Tensor, v: Tensor, moments: Moments) -> Tensor:
        batch = self.batch_moments(moments.merge("n"))
        deviations = [(var + self._eps(var)).sqrt().to(x.dtype) for var in (batch.var, moments.var)]
        return x / torch.maximum(deviations[0], v * x + deviations[1])


class EvoNormS0(_EvoNorm):
    r"""EvoNorm-S0: a group norm that does not center, of a swish: ``n (g [c]) [...]``. It needs no batch.

    $$y = \frac{x \cdot \text{sigmoid}(v \cdot x)}{\sqrt{\text{Var}_g[x] + \text{eps}}} \cdot \text{weight}
    + \text{bias}$$

    The variance of x is biased and about its mean. No activation goes behind it.

    Args:
        num_features: channels C.
        num_groups: they divide the channels.
        eps: added to the variance.
        activate: False leaves weight and bias only, which is what the authors put where a block has no activation.
        backend: as `Norm`.

    Shapes: (N, C, ...) in and out; v, weight and bias (C,). Mask as `Norm`.

    Raises ShapeError where the groups do not divide the channels, and what `Norm` raises. Liu et al. 2020,
    arXiv:2004.02967.

    >>> EvoNormS0(2, 1)(torch.tensor([[-1.0, 3.0]])).detach()
    tensor([[-0.1345,  1.4289]])
    """

    def __init__(
        self,
        num_features: int,
        num_groups: int = 32,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activate: bool = True,
        backend: str = "auto",
    ) -> None:
        if num_groups < 1 or num_features % num_groups:
            raise ShapeError(
                f"the groups must divide the channels; got num_features={num_features} and num_groups={num_groups}: "
                "write EvoNormS0(num_features, num_groups=...)"
            )
        super().__init__(
            "n (g [c]) [...]",
            eps=eps,
            backend=backend,
            device=device,
            dtype=dtype,
            g=num_groups,
            c=num_features // num_groups,
        )
        self._activate(num_features, activate, device, dtype)
        self.num_groups = num_groups

    def _respond(self, x: Tensor, v: Tensor, moments: Moments) -> Tensor:
        return x * torch.sigmoid(v * x) * torch.rsqrt(moments.var + self._eps(moments.var)).to(x.dtype)
