"""Layers whose outputs are cosines, between an input and each weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from renorm.errors import ShapeError
from renorm.norms.weight import rsqrt, to_range, to_unit

__all__ = ["CosineConv1d", "CosineConv2d", "CosineConv3d", "CosineLinear"]


class CosineLinear(nn.Linear):
    r"""A linear layer whose outputs are the cosines between its input and its weights.

    $$y = \text{scale} \cdot \frac{w \cdot x}{\|w\| \, \|x\|} + \text{bias}$$

    Args:
        in_features: size of each input.
        out_features: size of each output.
        bias: whether to learn one; the paper's units have none, and are bounded by 1.
        device: of the parameters.
        dtype: of the parameters.
        scale: where the factor of the cosines starts, which is learnt; None for none, which is the paper's.

    Shapes: input (..., in_features), output (..., out_features), weight as in `torch.nn.Linear`, scale (). No
    cosine is above 1 in magnitude, in any dtype. An input or weight of 0 gives 0, with gradients of 0. Lengths are
    computed in float32 at least, and do not overflow.

    Raises ShapeError for an input of another size. Luo et al. 2017, "Cosine Normalization" (arXiv:1702.05870).

    >>> layer = CosineLinear(2, 1)
    >>> layer.weight.data = torch.tensor([[3.0, 4.0]])
    >>> layer(torch.tensor([[1e30, 0.0], [-6.0, -8.0], [0.0, 0.0]])).T
    tensor([[ 0.6000, -1.0000,  0.0000]], grad_fn=<PermuteBackward0>)
    """

    scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        scale: float | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.scale = None if scale is None else nn.Parameter(torch.full_like(self.weight[0, 0], scale))

    def forward(self, input: Tensor) -> Tensor:
        """The cosine of each input with each row of the weight."""
        if input.dim() < 1 or input.shape[-1] != self.in_features:
            raise ShapeError(
                f"the last dimension of the input must be in_features={self.in_features}; got {tuple(input.shape)}"
            )
        scaled, _ = to_range(input, (-1,))
        dots = F.linear(scaled.to(input.dtype), to_unit(self.weight, (1,)).to(self.weight.dtype))
        cosines = _bounded(dots * rsqrt(scaled.square().sum(-1, keepdim=True)))
        return _recover(cosines, self.scale, self.bias).to(dots.dtype)


class _CosineConv(nn.modules.conv._ConvNd):
    """What the convolutions share; a base of each before torch's."""

    scale: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        scale: float | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,  # type: ignore[arg-type]
            stride,  # type: ignore[arg-type]
            padding,  # type: ignore[arg-type]
            dilation,  # type: ignore[arg-type]
            groups,  # type: ignore[arg-type]
            bias,  # type: ignore[arg-type]
            padding_mode,  # type: ignore[arg-type]
            device,  # type: ignore[arg-type]
            dtype,  # type: ignore[arg-type]
        )
        self.scale = None if scale is None else nn.Parameter(torch.full_like(self.weight.flatten()[0], scale))

    def forward(self, input: Tensor) -> Tensor:
        """The cosine of each patch with each kernel."""
        rank = len(self.kernel_size)
        channels = -rank - 1
        if input.dim() not in (rank + 1, rank + 2) or input.shape[channels] != self.in_channels:
            raise ShapeError(
                f"the input is (N, C, ...) or (C, ...) with C={self.in_channels} and {rank} more dimensions; got "
                f"{tuple(input.shape)}"
            )
        scaled, _ = to_range(input, tuple(range(channels, 0)))
        unit = to_unit(self.weight, tuple(range(1, rank + 2))).to(self.weight.dtype)
        dots = self._conv_forward(scaled.to(input.dtype), unit, None)
        squares = self._patches(_grouped(scaled.square(), channels, self.groups).sum(channels))
        cosines = _grouped(dots, channels, self.groups) * rsqrt(squares).unsqueeze(channels)
        bias = None if self.bias is None else self.bias.view(-1, *[1] * rank)
        return _recover(_bounded(cosines.flatten(channels - 1, channels)), self.scale, bias).to(dots.dtype)

    def _patches(self, squares: Tensor) -> Tensor:
        """Sums over the patches, one axis after the other: only added up, so that none is below 0."""
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        squares = F.pad(squares, self._reversed_padding_repeated_twice, mode=mode)
        for axis in range(-len(self.kernel_size), 0):
            size, step, gap = self.kernel_size[axis], self.stride[axis], self.dilation[axis]
            squares = squares.unfold(axis, (size - 1) * gap + 1, step)[..., ::gap].sum(-1)
        return squares


class CosineConv1d(_CosineConv, nn.Conv1d):
    r"""As `CosineConv2d`, on inputs (N, C, L) or (C, L).

    $$y_o = \text{scale} \cdot \frac{w_o \cdot x_p}{\|w_o\| \, \|x_p\|} + \text{bias}_o$$

    Raises ShapeError for an input of another rank or number of channels. Luo et al. 2017 (arXiv:1702.05870).

    >>> CosineConv1d(2, 4, 3, padding=1)(torch.randn(5, 2, 7)).shape
    torch.Size([5, 4, 7])
    """


class CosineConv2d(_CosineConv, nn.Conv2d):
    r"""A convolution whose outputs are the cosines between patches of its input and its kernels.

    $$y_o = \text{scale} \cdot \frac{w_o \cdot x_p}{\|w_o\| \, \|x_p\|} + \text{bias}_o$$

    where x_p are the entries under the kernel at position p, those of the output's group; padding counts as what it
    is, zeros by default.

    Arguments as `torch.nn.Conv2d`, except that there is no bias by default (the paper's units have none, and are
    bounded by 1); then `scale`: where the factor of the cosines starts, which is learnt; None for none.

    Shapes: input and output (N, C, H, W) or (C, H, W), weight as in `torch.nn.Conv2d`, scale (). No cosine is above
    1 in magnitude, in any dtype. A patch or kernel of 0 gives 0, with gradients of 0. Lengths are computed in
    float32 at least, and do not overflow.

    Raises ShapeError for an input of another rank or number of channels. Luo et al. 2017, "Cosine Normalization"
    (arXiv:1702.05870).

    >>> layer = CosineConv2d(3, 4, 3, padding=1)
    >>> y = layer(100 * torch.randn(2, 3, 5, 5))
    >>> y.shape, y.abs().max() <= 1
    (torch.Size([2, 4, 5, 5]), tensor(True))
    """


class CosineConv3d(_CosineConv, nn.Conv3d):
    r"""As `CosineConv2d`, on inputs (N, C, D, H, W) or (C, D, H, W).

    $$y_o = \text{scale} \cdot \frac{w_o \cdot x_p}{\|w_o\| \, \|x_p\|} + \text{bias}_o$$

    Raises ShapeError for an input of another rank or number of channels. Luo et al. 2017 (arXiv:1702.05870).

    >>> CosineConv3d(2, 4, 3, padding=1)(torch.randn(2, 2, 4, 4, 4)).shape
    torch.Size([2, 4, 4, 4, 4])
    """


def _grouped(x: Tensor, channels: int, groups: int) -> Tensor:
    y: Tensor = x.unflatten(channels, (groups, -1))  # type: ignore[no-untyped-call]
    return y


def _bounded(cosines: Tensor) -> Tensor:
    """Rounding may take a cosine beyond 1."""
    return cosines.clamp(-1, 1)


def _recover(cosines: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    y = cosines if scale is None else cosines * scale
    return y if bias is None else y + bias
