"""Reversible instance norm: the level and spread of a series' past are taken out, and given back to its forecast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from renorm.errors import ShapeError
from renorm.kernels.moments import Affine, Moments
from renorm.norms.masks import expand_mask
from renorm.norms.norm import Norm

__all__ = ["RevIN"]

Statistics = tuple[Tensor, Tensor]

_PATTERNS = {1: "n c [t]", -1: "n [t] c"}


class RevIN(Norm):
    r"""Reversible instance norm: standardize each channel of each sample over time, and undo it on the output.

    $$y = \frac{x - \text{center}}{\text{std}} \cdot \text{weight} + \text{bias}, \qquad
    \hat x = \frac{\hat y - \text{bias}}{\text{weight}} \cdot \text{std} + \text{center}, \qquad
    \text{std} = \sqrt{\text{var} + \text{eps}}$$

    with the biased variance over the time steps of the input, and as center their mean, or with `subtract_last` the
    last step. `norm(x)` is the first half; `normalize` gives the statistics besides, which `denormalize` takes with the
    forecast. Nothing is kept in the layer between the two, and gradients go through the statistics; the authors' code
    keeps them, and cuts their gradients. A weight of 0 cannot be undone. `axis` is the dimension of the channels, 1 or
    -1 (the authors').

    Shapes: input (N, C, time), weight and bias (C,), center and std (N, C, 1); a forecast (N, C, steps) of any number
    of steps. With ``axis=-1`` (N, time, C) and (N, 1, C). `mask` in the call is as in `Norm`: the last step is then the
    last real one.

    Raises ShapeError for another axis and for a forecast whose samples or channels do not fit the statistics.

    Kim et al., ICLR 2022, "Reversible Instance Normalization for Accurate Time-Series Forecasting against Distribution
    Shift".

    >>> norm = RevIN(1, subtract_last=True)
    >>> y, statistics = norm.normalize(torch.tensor([[[10.0, 12.0, 14.0]]]))
    >>> y[..., -1]
    tensor([[0.]], grad_fn=...)
    >>> norm.denormalize(torch.zeros(1, 1, 2), statistics)  # a forecast of 0 stays where the past ended
    tensor([[[14., 14.]]], grad_fn=...)
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        subtract_last: bool = False,
        *,
        axis: int = 1,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if axis not in _PATTERNS:
            raise ShapeError(f"the channels are on axis 1 or -1; got axis={axis}")
        super().__init__(
            _PATTERNS[axis],
            eps=eps,
            weight="auto" if affine else None,
            backend=backend,
            device=device,
            dtype=dtype,
            c=num_features,
        )
        self.num_features = num_features
        self.affine = affine
        self.subtract_last = subtract_last
        self.axis = axis

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize `x`; entries where `mask` is False count for nothing and come out as 0."""
        self._bound(x)
        return self._normalize(x, mask, self._last(x, mask) if self.subtract_last else None)

    def solve(self, moments: Moments, last: Tensor | None) -> Affine:
        """Divide by the deviation, about the mean or the last step."""
        affine = super().solve(moments)
        return affine if last is None else replace(affine, center=last.to(affine.scale.dtype))

    def normalize(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Statistics]:
        """`x` normalized, and the center and the std that :meth:`denormalize` gives back."""
        moments = self.measure(x, mask)
        center = self._last(x, mask).to(moments.mean.dtype) if self.subtract_last else moments.mean
        return self(x, mask), (center, (moments.var + self._eps(x)).sqrt())

    def denormalize(self, y: Tensor, statistics: Statistics, channels: Sequence[int] | None = None) -> Tensor:
        """Undo :meth:`normalize` on a forecast of all channels, or of those that are named, in their order."""
        center, std = statistics
        weight, bias = self.weight, self.bias
        if channels is not None:
            at = torch.tensor(list(channels), device=y.device)
            center, std = center.index_select(self.axis, at), std.index_select(self.axis, at)
            weight, bias = (None if value is None else value[at] for value in (weight, bias))
        wanted = (center.shape[0], center.shape[self.axis])
        if y.dim() != 3 or (y.shape[0], y.shape[self.axis]) != wanted:
            raise ShapeError(
                f"a forecast must have 3 dimensions, and the {wanted[0]} samples and {wanted[1]} channels (axis "
                f"{self.axis}) of the statistics; got {tuple(y.shape)}: name its channels where it has not all"
            )
        wide = y.to(std.dtype)
        if weight is not None and bias is not None:
            shape = (-1, 1) if self.axis == 1 else (-1,)
            wide = (wide - bias.view(shape)) / weight.view(shape)
        return (wide * std + center).to(y.dtype)

    def _last(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The newest real step of each channel of each sample; 0 where there is none."""
        time = 2 if self.axis == 1 else 1
        if mask is None:
            return x.narrow(time, x.shape[time] - 1, 1)
        real = expand_mask(mask, x)
        steps = torch.arange(x.shape[time], device=x.device).view((-1,) if time == 2 else (-1, 1))
        newest = torch.where(real, steps, -1).amax(time, keepdim=True)
        return torch.where(newest < 0, 0, x.gather(time, newest.clamp(min=0)))

    def extra_repr(self) -> str:
        """The arguments, and what every norm says."""
        last = ", subtract_last=True" if self.subtract_last else ""
        return f"{self.num_features}{last}, {super().extra_repr()}"
