"""Norms by the response of whole feature maps: each map by its own root mean square, or beside the other maps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from renorm.errors import ShapeError
from renorm.kernels.moments import Affine, Moments
from renorm.norms.norm import Norm

__all__ = ["FRN", "GlobalResponseNorm"]

_LEARNT = 1e-4  # the paper's start of a learnt eps


class FRN(Norm):
    r"""Filter response norm: divide each channel of each sample by its root mean square, ``n c [...]`` about zero.

    $$y = \frac{x}{\sqrt{\text{E}[x^2] + \text{eps}}} \cdot \text{weight} + \text{bias}$$

    over the positions. It goes with a `TLU` behind it: nothing is centered, so a ReLU could cut off a whole map.

    Args:
        num_features: channels C.
        eps: the paper's value where maps have many positions is 1e-6.
        affine: False leaves weight and bias out.
        learn_eps: True learns what is added to `eps` for each channel, the absolute value of `learnt_eps`, from 1e-4
            on. For maps of one position, vectors too: there a small constant makes the norm a sign function.
        activation: as `Norm`.
        backend: as `Norm`.

    Shapes: (N, C, ...) in and out, (N, C) alone too; weight, bias and learnt_eps (C,). Mask and errors as `Norm`.

    Singh & Krishnan 2020, arXiv:1911.09737.

    >>> FRN(1)(torch.tensor([[[1.0, 7.0]]]))
    tensor([[[0.2000, 1.4000]]], grad_fn=...)
    """

    learn_eps: bool

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-6,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        learn_eps: bool = False,
        activation: str | None = None,
        backend: str = "auto",
    ) -> None:
        # Plain attributes have to wait for Module.__init__, and _own_solve is asked before it returns.
        self.__dict__["learn_eps"] = learn_eps
        super().__init__(
            "n c [...]",
            eps=eps,
            weight="c" if affine else None,
            center=False,
            activation=activation,
            backend=backend,
            device=device,
            dtype=dtype,
            c=num_features,
        )
        self.num_features = num_features
        start = torch.full((num_features,), _LEARNT, device=device, dtype=dtype) if learn_eps else None
        self.learnt_eps = None if start is None else nn.Parameter(start)

    @property
    def _own_solve(self) -> bool:
        return self.learn_eps

    def solve(self, moments: Moments) -> Affine:
        """Divide by the root mean square, with an eps for each channel where it is learnt."""
        if self.learnt_eps is None:
            return super().solve(moments)
        eps = self._eps(moments.mean) + _over_channels(self.learnt_eps, moments).abs()
        return Affine(torch.rsqrt(moments.var + eps))

    def extra_repr(self) -> str:
        """That of `Norm`, and whether eps is learnt."""
        return super().extra_repr() + ", learn_eps=True" * self.learn_eps


class GlobalResponseNorm(Norm):
    r"""Global response norm: channels compete, each is scaled by its share of the response of all.

    $$y = x + \text{weight} \cdot x \cdot \frac{G}{\text{E}_c[G] + \text{eps}} + \text{bias},
    \qquad G = \sqrt{\textstyle\sum x^2}$$

    G is the L2 norm of one channel of one sample over the positions, its mean $\text{E}_c$ is over the sample's
    channels. Weight and bias are zero at first, where the layer is the identity.

    Args:
        num_features: channels C.
        eps: added to the mean of the norms.
        axis: the dimension of the channels, -1 as in the paper's network, or 1.
        backend: as `Norm`.

    Shapes: (N, ..., C) for axis -1 and (N, C, ...) for axis 1, in and out; weight and bias (C,). State of timm's
    layer, (1, 1, 1, C), and of the authors' (gamma and beta) loads. A channel without a real entry under the mask is
    left out of the mean.

    Raises ShapeError for another axis, and what `Norm` raises. Woo et al. 2023, arXiv:2301.00808.

    >>> layer = GlobalResponseNorm(2)
    >>> _ = nn.init.ones_(layer.weight)
    >>> layer(torch.tensor([[[3.0, 0.0], [4.0, 5.0]]])).detach()
    tensor([[[ 6.0000,  0.0000],
             [ 8.0000, 10.0000]]])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        axis: int = -1,
        backend: str = "auto",
    ) -> None:
        patterns = {1: "n c [...]", -1: "n [...] c"}
        if axis not in patterns:
            raise ShapeError(f"the channels of a global response norm are on axis 1 or -1; got axis={axis}")
        super().__init__(
            patterns[axis], eps=eps, center=False, backend=backend, device=device, dtype=dtype, c=num_features
        )
        self.num_features = num_features
        self.axis = axis
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The identity."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    _applies_other = True

    def _applied(self) -> tuple[None, None]:
        return None, None  # they are in `solve`

    def solve(self, moments: Moments) -> Affine:
        """Scale by 1 + weight * share."""
        square = moments.var * moments.count
        some = square > 0
        # The derivative of a root at 0 is infinite: there it is taken to be 0, as torch's norm does.
        response = torch.where(some, torch.where(some, square, 1).sqrt(), 0)
        channels = [moments.names.index("c")]
        real = (moments.count > 0).expand(response.shape).sum(channels, keepdim=True).clamp(min=1)
        share = response / (response.sum(channels, keepdim=True) / real + self._eps(moments.mean))
        weight, bias = (_over_channels(parameter, moments) for parameter in (self.weight, self.bias))
        return Affine(1 + weight * share, shift=bias.expand(share.shape))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for ours, theirs in (("weight", "gamma"), ("bias", "beta")):
            found = state_dict.pop(prefix + theirs, state_dict.get(prefix + ours))
            if found is not None:
                state_dict[prefix + ours] = found.flatten()
        super()._load_from_state_dict(state_dict, prefix, *args)


def _over_channels(parameter: Tensor, moments: Moments) -> Tensor:
    """A parameter along the axis c of the statistics, in their dtype."""
    return parameter.to(moments.mean.dtype).reshape([-1 if name == "c" else 1 for name in moments.names])
