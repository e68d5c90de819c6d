"""Style norms: the mean and deviation of each channel are its style, which these give, swap or weigh anew."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from renorm.errors import ShapeError
from renorm.kernels.moments import Affine, Moments
from renorm.norms.condition import along_channels, instance_pattern
from renorm.norms.masks import expand_mask
from renorm.norms.norm import Norm
from renorm.norms.zoo import BatchNorm

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["AdaIN", "CrossNorm", "SelfNorm"]

Device = torch.device | str | None
Style = tuple[Tensor, Tensor]

_CROPS = ("none", "content", "style", "both")
_MODES = {"2-instance": "n", "1-instance": "c"}  # the axis of the statistics that is shuffled


class AdaIN(Norm):
    r"""Adaptive instance norm: the content's channels with the style's mean and deviation.

    $$y = \text{std}(s) \cdot \frac{x - \text{mean}(x)}{\text{std}(x)} + \text{mean}(s), \qquad
    \text{std} = \sqrt{\text{var} + \text{eps}}$$

    over the positions of one channel of one sample, with biased variances: a style of one position has one, too.
    There is nothing to learn. `axis` is the dimension of the channels, 1 or -1.

    Shapes: content x (N, C, ...), which is the output's; style s (N or 1, C, ...) of any rank and size, or a pair
    (mean, std), each (N or 1, C). `mask` and `style_mask` in the call are as in `Norm`: a channel whose style has no
    real entry keeps its own. `alpha` in the call goes from the content, 0, to the style, 1.

    Raises ShapeError for another axis, for a style that does not fit, and for a mask of a pair.

    Huang & Belongie 2017, arXiv:1703.06868.

    >>> content, style = torch.tensor([[[0.0, 2.0]]]), torch.tensor([[[10.0, 14.0, 18.0, 14.0]]])
    >>> AdaIN()(content, style)
    tensor([[[11.1716, 16.8284]]])
    >>> AdaIN()(content, style, alpha=0.0)
    tensor([[[0., 2.]]])
    """

    def __init__(self, eps: float = 1e-5, *, axis: int = 1, backend: str = "auto") -> None:
        super().__init__(instance_pattern(axis), eps=eps, weight=None, backend=backend)
        self.axis = axis

    def forward(  # type: ignore[override]  # a norm of two inputs
        self,
        content: Tensor,
        style: Tensor | Style,
        mask: Tensor | None = None,
        style_mask: Tensor | None = None,
        *,
        alpha: float = 1.0,
    ) -> Tensor:
        """Give `content` the style of `style`; entries where `mask` is False count for nothing and come out as 0."""
        self._bound(content)
        wanted = (content.shape[0], content.shape[self.axis])
        real = None
        if isinstance(style, Tensor):
            self._bound(style)
            got = (style.shape[0], style.shape[self.axis])
            moments = self.measure(style, style_mask)
            std = (moments.var + self._eps(style)).sqrt()
            real = (moments.count > 0).expand(moments.mean.shape)
            found = [value.reshape(got) for value in (moments.mean, std, real)]
        else:
            if style_mask is not None:
                raise ShapeError("a style_mask belongs to a style tensor; got one with (mean, std): leave it out")
            found = [*style, torch.ones_like(style[0], dtype=torch.bool)]
        for value in found:
            if value.dim() != 2 or value.shape[0] not in (1, wanted[0]) or value.shape[1] != wanted[1]:
                raise ShapeError(
                    f"the style of a content {tuple(content.shape)} must have {wanted[0]} samples, or 1 for all, and "
                    f"{wanted[1]} channels; its statistics are {tuple(value.shape)}: a style is a tensor with channels "
                    f"on axis {self.axis}, or a pair of mean and std, each (N, C)"
                )
        found = [along_channels(value, content.dim(), self.axis) for value in found]
        return self._normalize(content, mask, *found, alpha)

    def solve(self, moments: Moments, mean: Tensor, std: Tensor, real: Tensor, alpha: float) -> Affine:
        """Divide by the content's deviation, multiply by the style's."""
        eps, dtype = self._eps(moments.mean), moments.mean.dtype
        mean = torch.where(real, mean.to(dtype), moments.mean)
        ratio = torch.where(real, std.to(dtype) * torch.rsqrt(moments.var + eps), 1)
        return Affine(alpha * ratio + (1 - alpha), moments.mean, alpha * mean + (1 - alpha) * moments.mean)


class CrossNorm(Norm):
    r"""Swap the channels' means and deviations between the samples of a batch: an augmentation by style.

    $$y_a = \text{std}_b \cdot \frac{x_a - \text{mean}_a}{\text{std}_a} + \text{mean}_b, \qquad
    \text{std} = \sqrt{\text{var} + \text{eps}}$$

    In training, with probability `p` for a batch, where b is a random permutation of a; otherwise, and in evaluation,
    y is x. The random numbers are torch's global ones. Variances are biased. There is nothing to learn.

    Args:
        p: the probability.
        crop: ``"style"`` takes the statistics b from a random box of the sample, ``"content"`` restyles only a random
            box of it, ``"both"`` does both, ``"none"`` neither. One box serves the batch: it covers a share of
            [min_area, 1] of the map, uniformly drawn, at a place uniformly drawn. (The authors draw its middle, cut
            off what is outside the map, and draw again where less than min_area is left.)
        mode: ``"2-instance"`` swaps between samples, ``"1-instance"`` between the channels, alike in all samples.
        axis: the dimension of the channels, 1 or -1.

    Shapes: input and output (N, C, ...). `mask` in the call is as in `Norm`: what has no real entry, be it a whole
    channel or a box, lends no style.

    Raises ShapeError for another p, crop, mode, min_area or axis.

    Tang et al. 2021, arXiv:2102.02811.

    >>> x = torch.tensor([[[1.0, 3.0]], [[10.0, 30.0]]])
    >>> _ = torch.manual_seed(0)
    >>> CrossNorm(p=1.0)(x).round()
    tensor([[[10., 30.]],
    <BLANKLINE>
            [[ 1.,  3.]]])
    """

    def __init__(
        self,
        p: float = 0.5,
        crop: str = "none",
        eps: float = 1e-5,
        *,
        mode: str = "2-instance",
        min_area: float = 0.1,
        axis: int = 1,
        backend: str = "auto",
    ) -> None:
        if not 0 <= p <= 1:
            raise ShapeError(f"p is a probability, from 0 to 1; got {p}")
        if crop not in _CROPS:
            raise ShapeError(f"crop is one of {', '.join(_CROPS)}; got {crop!r}")
        if mode not in _MODES:
            raise ShapeError(f"mode is one of {', '.join(_MODES)}; got {mode!r}")
        if not 0 < min_area <= 1:
            raise ShapeError(f"min_area is the smallest share of a map that a box covers, above 0 to 1; got {min_area}")
        super().__init__(instance_pattern(axis), eps=eps, weight=None, backend=backend)
        self.p = p
        self.crop = crop
        self.mode = mode
        self.min_area = min_area
        self.axis = axis

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Restyle `x`; entries where `mask` is False count for nothing and come out as 0."""
        self._bound(x)
        real = None if mask is None else expand_mask(mask, x)
        as_it_is = x if real is None else torch.where(real, x, 0)
        if not self.training:
            return as_it_is
        swaps = torch.rand((), device="cpu") < self.p
        # A graph has both ways; elsewhere the number is on the CPU, where a look at it costs nothing.
        traced = torch.compiler.is_compiling() or torch._C._functorch.is_batchedtensor(swaps)
        if not traced and not swaps:
            return as_it_is
        order = self._order(x)
        inside = self._box(x) if self.crop in ("content", "both") else None
        style = self._box(x) if self.crop in ("style", "both") else None
        lent = None if self.crop == "none" else self.measure(x, _both(real, style))
        y = self._normalize(x, _both(real, inside), swaps.to(x.device), order, lent)
        return y if inside is None else torch.where(inside, y, as_it_is)

    def solve(self, moments: Moments, swaps: Tensor, order: Tensor, lent: Moments | None) -> Affine:
        """Divide by a set's own deviation, multiply by that of the set it is paired with."""
        lent = moments if lent is None else lent
        along = moments.names.index(_MODES[self.mode])
        count = lent.count.expand(lent.mean.shape)
        mean, var, count = (value.index_select(along, order) for value in (lent.mean, lent.var, count))
        eps, takes = self._eps(moments.mean), swaps & (count > 0)
        scale = torch.sqrt((var + eps) / (moments.var + eps))
        # About 0 where nothing is swapped, so that x comes out to the last bit.
        return Affine(*(torch.where(takes, value, rest) for value, rest in ((scale, 1), (moments.mean, 0), (mean, 0))))

    def _order(self, x: Tensor) -> Tensor:
        """Which set lends its style to each."""
        size = x.shape[0] if self.mode == "2-instance" else x.shape[self.axis]
        return torch.randperm(size, device=x.device)

    def _box(self, x: Tensor) -> Tensor:
        """True inside a random box of the spatial dimensions."""
        channels = self.axis % x.dim()
        spatial = [dim for dim in range(1, x.dim()) if dim != channels]
        share = self.min_area + (1 - self.min_area) * torch.rand((), device=x.device)
        box = torch.ones([1] * x.dim(), dtype=torch.bool, device=x.device)
        for dim in spatial:
            length = (x.shape[dim] * share ** (1 / len(spatial))).ceil()
            start = (torch.rand((), device=x.device) * (x.shape[dim] - length + 1)).floor()
            at = torch.arange(x.shape[dim], device=x.device)
            inside = (at >= start) & (at < start + length)
            box = box & inside.view([-1 if i == dim else 1 for i in range(x.dim())])
        return box

    def extra_repr(self) -> str:
        """The arguments, and what every norm says."""
        return f"p={self.p}, crop={self.crop!r}, mode={self.mode!r}, {super().extra_repr()}"


class SelfNorm(Norm):
    r"""Self norm: weigh each channel's mean and deviation by attention to both.

    $$y = \text{std}' \cdot \frac{x - \text{mean}}{\text{std}} + \text{mean}', \qquad
    \text{mean}' = f(\text{mean}, \text{std}) \cdot \text{mean}, \quad \text{std}' = g(\text{mean}, \text{std})
    \cdot \text{std}$$

    over the positions of one channel of one sample, with biased variances and std = sqrt(var + eps). f and g are, for
    each channel, the sigmoid of a linear function of (mean, std) that is batch-normalized, as the authors have it
    (their code takes g = f unless it is told otherwise, unbiased variances and an eps of 1e-12).
    A batch of one sample is normalized by the running statistics of f and g. `batch_norm=False` has a bias in its
    place, so that samples do not depend on each other in training either: in evaluation both compute the same
    functions. `axis` is the dimension of the channels, 1 or -1.

    Shapes: input and output (N, C, ...); the weights of f and g (C, 2), for mean and std. `mask` in the call is as in
    `Norm`, and a channel without a real entry has no share in the statistics of f and g.

    Tang et al. 2021, arXiv:2102.02811.

    >>> norm = SelfNorm(1, batch_norm=False)
    >>> _ = norm.f.weight.data.copy_(torch.tensor([[-100.0, 0.0]]))  # the mean is taken out
    >>> _ = norm.g.weight.data.copy_(torch.tensor([[0.0, 100.0]]))  # the deviation is kept
    >>> norm(torch.tensor([[[2.0, 4.0]]])).round()
    tensor([[[-1.,  1.]]], grad_fn=...)
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        batch_norm: bool = True,
        axis: int = 1,
        process_group: ProcessGroup | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(instance_pattern(axis), eps=eps, weight=None, backend=backend, c=num_features)
        self.num_features = num_features
        self.axis = axis
        self.f, self.g = (_Attention(num_features, batch_norm, process_group, device, dtype) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Weigh the mean and deviation of `x`; entries where `mask` is False count for nothing and come out as 0."""
        return self._normalize(x, mask, mask is not None)

    def solve(self, moments: Moments, masked: bool) -> Affine:
        """y = (x - mean) * g + f * mean: the deviation itself is not divided by."""
        rank, shape = moments.mean.dim(), moments.mean.shape
        pair = (moments.mean, (moments.var + self._eps(moments.mean)).sqrt())
        mean, std = (value.reshape(shape[0], self.num_features) for value in pair)
        real = (moments.count > 0).expand(shape).reshape(mean.shape) if masked else None
        f, g = (along_channels(layer(mean, std, real), rank, self.axis) for layer in (self.f, self.g))
        return Affine(g, moments.mean, f * moments.mean)


class _Attention(nn.Module):
    """A number between 0 and 1 for each channel of each sample, from its mean and deviation, each (N, C)."""

    def __init__(
        self,
        num_features: int,
        batch_norm: bool,
        process_group: ProcessGroup | None,
        device: Device,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_features, 2, device=device, dtype=dtype))
        self.norm: BatchNorm | None = None
        self.bias: nn.Parameter | None = None
        if batch_norm:
            self.norm = BatchNorm(num_features, one_value="running", device=device, dtype=dtype)
            self.norm.process_group = process_group
        else:
            self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as torch does those of a convolution with two inputs."""
        nn.init.uniform_(self.weight, -1 / math.sqrt(2), 1 / math.sqrt(2))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, mean: Tensor, std: Tensor, real: Tensor | None) -> Tensor:
        by_mean, by_std = self.weight.to(mean.dtype).unbind(1)
        z = mean * by_mean + std * by_std
        if self.norm is not None:
            z = self.norm(z, real)
        elif self.bias is not None:
            z = z + self.bias.to(z.dtype)
        return z.sigmoid()


def _both(mask: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if mask is None else mask if other is None else mask & other
