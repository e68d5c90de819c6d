"""Norms over the channels of each position."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from renorm.kernels import apart, native, reference
from renorm.kernels.moments import Affine, Moments
from renorm.norms.masks import expand_mask
from renorm.norms.norm import Norm
from renorm.pattern import Partition, partition

__all__ = ["LayerNorm2d", "PositionalNorm", "ScaleNorm", "by_first_entries"]


class LayerNorm2d(Norm, nn.LayerNorm):
    r"""Layer norm over the channels of each position of an image, channels second: ``n [c] ...``.

    $$y = \frac{x - \text{E}[x]}{\sqrt{\text{Var}[x] + \text{eps}}} \cdot \text{weight} + \text{bias}$$

    What ConvNeXt calls its layer norm; no permuting to channels last and back.

    Args:
        num_channels: channels C.
        eps: ConvNeXt's 1e-6, not torch's 1e-5.
        affine: False leaves weight and bias out.
        bias: False leaves the bias out.
        activation: as `Norm`.
        backend: as `Norm`.

    Shapes: (N, C, ...) of any rank from 2 on, in and out; weight and bias (C,), so that the state of an nn.LayerNorm
    and of torchvision's and timm's LayerNorm2d loads. Mask and errors as `Norm`. Ba et al. 2016, arXiv:1607.06450;
    Liu et al. 2022, arXiv:2201.03545.

    >>> LayerNorm2d(2, affine=False)(torch.tensor([[[[1.0, 2.0]], [[3.0, 8.0]]]]))
    tensor([[[[-1.0000, -1.0000]],
    <BLANKLINE>
             [[ 1.0000,  1.0000]]]])
    """

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-6,
        affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        backend: str = "auto",
    ) -> None:
        super(Norm, self).__init__(num_channels, eps, affine, bias, device=device, dtype=dtype)
        self._define(
            "n [c] ...",
            {"c": num_channels},
            weight=("c",) if affine else (),
            activation=activation,
            backend=backend,
        )


class PositionalNorm(Norm):
    r"""Positional norm: standardize over the channels of each position, and hand out the moments: ``n [c] ...``.

    $$y = \frac{x - \text{mean}}{\text{std}}, \qquad \text{std} = \sqrt{\text{Var}[x] + \text{eps}}$$

    Mean and std of an early layer draw the outlines of an image. A generator takes them out in its encoder with
    `split` and puts them into its decoder with `restore` (the moment shortcut). Nothing is learnt. The variance is
    biased, as in the paper; the authors' code divides by C - 1.

    Args:
        eps: added to the variance.
        activation: as `Norm`; not part of `split`.
        backend: as `Norm`.

    Shapes: (N, C, ...) in and out; mean and std (N, 1, ...). Mask and errors as `Norm`. Li et al. 2019,
    arXiv:1907.04312.

    >>> norm = PositionalNorm()
    >>> y, mean, std = norm.split(torch.tensor([[1.0, 3.0], [2.0, 8.0]]))
    >>> mean, std
    (tensor([[2.],
            [5.]]), tensor([[1.0000],
            [3.0000]]))
    >>> norm.restore(y, mean, std)
    tensor([[1.0000, 3.0000],
            [2.0000, 8.0000]])
    """

    def __init__(self, eps: float = 1e-5, *, activation: str | None = None, backend: str = "auto") -> None:
        super().__init__("n [c] ...", eps=eps, weight=None, activation=activation, backend=backend)

    def split(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The standardized `x`, and mean and std of each position, in x's dtype.

        A position without a real entry has mean 0 and variance 1.
        """
        moments = self.measure(x, mask)
        std = (moments.var + self._eps(moments.var)).sqrt()
        return self._normalize(x, mask), moments.mean.to(x.dtype), std.to(x.dtype)

    def restore(self, y: Tensor, mean: Tensor, std: Tensor, mask: Tensor | None = None) -> Tensor:
        """Give each position of `y`, which may have other channels, this mean and std: ``y * std + mean``."""
        x = torch.addcmul(mean, y, std)
        return x if mask is None else torch.where(expand_mask(mask, x), x, 0)


class ScaleNorm(Norm):
    r"""Scale norm: divide by the length over the channels, times one learnt number: ``... [c]``.

    $$y = g \cdot \frac{x}{\max(\lVert x \rVert_2, \text{eps})}$$

    An RMS norm with one weight for all channels.

    Args:
        num_features: channels C; g is sqrt(C) at first, where this is an RMS norm.
        eps: the least length that is divided by.
        activation: as `Norm`.
        backend: as `Norm`.

    Shapes: (..., C) in and out, g a single number. With a mask the length is that of the real entries. Mask and errors
    as `Norm`. Nguyen & Salazar 2019, arXiv:1910.05895.

    >>> ScaleNorm(2)(torch.tensor([[3.0, 4.0]])).detach()
    tensor([[0.8485, 1.1314]])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            "... [c]", eps=eps, weight=None, center=False, activation=activation, backend=backend, c=num_features
        )
        self.num_features = num_features
        self.g = nn.Parameter(torch.full((), math.sqrt(num_features), device=device, dtype=dtype))

    def solve(self, moments: Moments) -> Affine:
        """Divide g by the length."""
        # The bound is under the root, whose derivative at 0 is infinite.
        square = (moments.var * moments.count).clamp(min=self._eps(moments.var) ** 2)
        return Affine(self.g.to(square.dtype) * torch.rsqrt(square))


def by_first_entries(
    x: Tensor, part: Partition, kernel: str, weight: Tensor | None, eps: float, share: float, mask: Tensor | None
) -> Tensor:
    """RMS norm by the mean square of the first `share` of the last dimension, rounded up: pRMSNorm."""
    # 100 * 0.07 is a little more than 7.
    count = max(1, math.ceil(x.shape[-1] * share - 1e-9))
    first, some = x[..., :count], None if mask is None else mask[..., :count]
    if kernel == "reference":
        var = reference.measure(first, part, mask=some, about_zero=True).var
        return reference.apply(x, part, Affine(torch.rsqrt(var + eps)), weight, mask=mask)
    first_part = partition("... [c]", x.dim())
    made = native.fit(x, part, weight, None, mask, kernel)
    first_made = native.fit(first, first_part, None, None, some, kernel)
    assert not isinstance(made, str)
    assert not isinstance(first_made, str)
    moments, _ = apart.measure(first, first_part, first_made, mask=some, about_zero=True)
    measured = apart.given(moments.mean, moments.var, part, made, mask)
    return apart.apply(x, part, measured, Affine(torch.rsqrt(moments.var + eps)), weight, None)
