"""Layers that act on each entry alone and stand where a norm or its activation does: they have no statistics."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from renorm.errors import ShapeError
from renorm.norms.masks import expand_mask

__all__ = ["TLU", "Derf", "DyT"]


class _Pointwise(nn.Module):
    """Parameters along the channels, which are on `axis`, and entries that a mask takes out."""

    def __init__(self, num_features: int, axis: int) -> None:
        super().__init__()
        if axis not in (1, -1):
            raise ShapeError(f"the channels of {type(self).__name__} are on axis 1 or -1; got axis={axis}")
        self.num_features = num_features
        self.axis = axis

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Entries where `mask` is False come out as 0."""
        if x.dim() <= max(self.axis, 0) or x.shape[self.axis] != self.num_features:
            raise ShapeError(
                f"dimension {self.axis} must have {self.num_features} entries; the input has shape {tuple(x.shape)}: "
                f"write {type(self).__name__}(channels, axis=1) for (N, C, ...) and axis=-1 for (..., C)"
            )
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        real = None if mask is None else expand_mask(mask, x)
        y = self._act(wide if real is None else torch.where(real, wide, 0))
        if real is not None:
            y = torch.where(real, y, 0)
        return y.to(x.dtype)

    @abstractmethod
    def _act(self, x: Tensor) -> Tensor:
        """What is done to each entry, in float32 or more."""

    def _along(self, parameter: Tensor, x: Tensor) -> Tensor:
        """`parameter` as it broadcasts over `x`, in its dtype."""
        return parameter.to(x.dtype).reshape([-1] + [1] * (x.dim() - 2) * (self.axis == 1))

    def extra_repr(self) -> str:
        """The channels, and where they are."""
        return f"{self.num_features}, axis={self.axis}"


class TLU(_Pointwise):
    r"""Thresholded linear unit: a ReLU with a learnt threshold for each channel, the activation behind `FRN`.

    $$y = \max(x, \text{tau})$$

    Args:
        num_features: channels C.
        axis: the dimension of the channels, 1 or -1.

    Shapes: (N, C, ...) for axis 1, (..., C) for axis -1, in and out; tau (C,), zero at first, which is a ReLU. In the
    call `mask` is as in `renorm.Norm`: entries where it is False come out as 0.

    Raises ShapeError for another axis, and for an input with other channels. Singh & Krishnan 2020, arXiv:1911.09737.

    >>> layer = TLU(2)
    >>> _ = nn.init.constant_(layer.tau, -1.0)
    >>> layer(torch.tensor([[-3.0, 2.0]])).detach()
    tensor([[-1.,  2.]])
    """

    def __init__(
        self,
        num_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        axis: int = 1,
    ) -> None:
        super().__init__(num_features, axis)
        self.tau = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))

    def _act(self, x: Tensor) -> Tensor:
        return torch.maximum(x, self._along(self.tau, x))


class DyT(_Pointwise):
    r"""Dynamic tanh: the foil of the norms, which squashes each entry by a learnt slope and measures nothing.

    $$y = \tanh(\text{alpha} \cdot x) \cdot \text{weight} + \text{bias}$$

    Args:
        num_features: channels C.
        alpha: the slope at first, one for all channels. The paper has 0.5, and less for wide language models.
        axis: the dimension of the channels, -1 (tokens) or 1 (images).

    Shapes: (..., C) for axis -1, (N, C, ...) for axis 1, in and out; alpha (1,), weight and bias (C,). In the call
    `mask` is as in `renorm.Norm`: entries where it is False come out as 0.

    Raises ShapeError for another axis, and for an input with other channels. Zhu et al. 2025, arXiv:2503.10622.

    >>> DyT(2)(torch.tensor([[-1.0, 100.0]])).detach()
    tensor([[-0.4621,  1.0000]])
    """

    def __init__(
        self,
        num_features: int,
        alpha: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        axis: int = -1,
    ) -> None:
        super().__init__(num_features, axis)
        self.alpha = nn.Parameter(torch.full((1,), alpha, device=device, dtype=dtype))
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))

    def _act(self, x: Tensor) -> Tensor:
        return torch.addcmul(self._along(self.bias, x), self._squash(x), self._along(self.weight, x))

    def _squash(self, x: Tensor) -> Tensor:
        return torch.tanh(self.alpha.to(x.dtype) * x)


class Derf(DyT):
    r"""Dynamic erf: `DyT` with the error function for the tanh, and a learnt shift in it.

    $$y = \text{erf}(\text{alpha} \cdot x + \text{shift}) \cdot \text{weight} + \text{bias}$$

    Args:
        num_features: channels C.
        alpha: the slope at first, one for all channels.
        shift: what is added before the erf at first, one for all channels; the paper's s.
        axis: the dimension of the channels, -1 (tokens) or 1 (images).

    Shapes: (..., C) for axis -1, (N, C, ...) for axis 1, in and out; alpha and shift (1,), weight and bias (C,). In the
    call `mask` is as in `renorm.Norm`: entries where it is False come out as 0.

    Raises ShapeError for another axis, and for an input with other channels. Chen et al. 2025, arXiv:2512.10938.

    >>> Derf(2)(torch.tensor([[-1.0, 100.0]])).detach()
    tensor([[-0.5205,  1.0000]])
    """

    def __init__(
        self,
        num_features: int,
        alpha: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        shift: float = 0.0,
        axis: int = -1,
    ) -> None:
        super().__init__(num_features, alpha, device, dtype, axis=axis)
        self.shift = nn.Parameter(torch.full((1,), shift, device=device, dtype=dtype))

    def _squash(self, x: Tensor) -> Tensor:
        return torch.erf(self.alpha.to(x.dtype) * x + self.shift.to(x.dtype))
