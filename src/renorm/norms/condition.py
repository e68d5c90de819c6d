"""Recovery by a condition: scale and shift come from a class, a vector or a map in place of weight and bias."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from renorm.errors import ShapeError
from renorm.norms import named
from renorm.norms.masks import expand_mask
from renorm.norms.norm import Norm

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["SPADE", "ConditionalNorm", "FiLM", "along_channels", "instance_pattern"]

Device = torch.device | str | None

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class FiLM(nn.Module):
    r"""Feature-wise linear modulation: scale and shift each channel of a sample as its condition says.

    $$y = x \cdot \gamma(z) + \beta(z), \qquad (\gamma - 1, \beta) = W z + b$$

    The bare recovery: nothing is measured. W and b start at 0, so that the layer starts as the identity.

    Args:
        num_features: channels C.
        num_conditions: numbers K in a condition, or with `embedding` the number of classes.
        embedding: whether a condition is the index of a class, with a row of an `nn.Embedding` for each, and not a
            vector for an `nn.Linear`.
        axis: the dimension of the channels, 1 or -1.

    Shapes: input and output (N, C, ...); condition (N, K), or (N) of integers with `embedding`. `mask` in the call is
    as in `Norm`.

    Raises ShapeError for another axis, number of channels, or shape or kind of condition.

    Perez et al. 2017, arXiv:1709.07871.

    >>> film = FiLM(1, 3, embedding=True)
    >>> _ = film.project.weight.data.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 5.0]]))
    >>> film(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([0, 1, 2])).flatten()
    tensor([1., 4., 8.], grad_fn=...)
    """

    def __init__(
        self,
        num_features: int,
        num_conditions: int,
        *,
        embedding: bool = False,
        axis: int = 1,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        instance_pattern(axis)
        self.num_features = num_features
        self.num_conditions = num_conditions
        self.axis = axis
        kind: Any = nn.Embedding if embedding else nn.Linear
        self.project: nn.Embedding | nn.Linear = kind(num_conditions, 2 * num_features, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make the layer the identity."""
        for parameter in self.project.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scale and shift the channels of `x`; entries where `mask` is False come out as 0."""
        if x.dim() < 2 or x.shape[self.axis] != self.num_features:
            raise ShapeError(f"the input must have {self.num_features} channels on axis {self.axis}; got {_size(x)}")
        embeds = isinstance(self.project, nn.Embedding)
        if embeds:
            fits = condition.shape == (x.shape[0],) and not (condition.is_floating_point() or condition.is_complex())
        else:
            fits = condition.shape == (x.shape[0], self.num_conditions)
        if not fits:
            wanted = "integers (N,), the class of" if embeds else f"(N, {self.num_conditions}), a vector for"
            raise ShapeError(
                f"the condition must be {wanted} each of the {x.shape[0]} samples; got {_size(condition)} of "
                f"{condition.dtype}: embedding=True takes classes, embedding=False vectors"
            )
        if not embeds:
            condition = condition.to(self.project.weight.dtype)
        gain, shift = self.project(condition).chunk(2, -1)
        gain, shift = (along_channels(value, x.dim(), self.axis) for value in (gain, shift))
        return _modulate(x, gain, shift, None if mask is None else expand_mask(mask, x))

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{self.num_features}, {self.num_conditions}, axis={self.axis}"


class ConditionalNorm(nn.Module):
    r"""Conditional batch, instance, layer or group norm: any statistics, recovered by FiLM.

    $$y = \frac{x - \text{mean}}{\sqrt{\text{var} + \text{eps}}} \cdot \gamma(z) + \beta(z)$$

    Args:
        norm: where the statistics come from: ``"batch"``, ``"instance"``, ``"layer"``, ``"group(8)"``, a pattern (see
            `renorm.norms.named`), made without weight and bias; or any layer of renorm. Layer norm with channels second
            is over all entries of a sample.
        num_features: as `FiLM`, which see for shapes and errors, too.
        num_conditions: as `FiLM`.
        embedding: as `FiLM`.
        axis: as `FiLM`.
        eps: of a norm by name, None for its default.
        process_group: of a norm by name: see `Norm`.

    de Vries et al. 2017, arXiv:1707.00683 (batch); Dumoulin et al. 2016, arXiv:1610.07629 (instance).

    >>> norm = ConditionalNorm("instance", 8, 10, embedding=True)
    >>> norm(torch.randn(2, 8, 4, 4), torch.tensor([3, 9])).shape
    torch.Size([2, 8, 4, 4])
    """

    def __init__(
        self,
        norm: str | nn.Module,
        num_features: int,
        num_conditions: int,
        *,
        embedding: bool = False,
        axis: int = 1,
        eps: float | None = None,
        process_group: ProcessGroup | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.film = FiLM(num_features, num_conditions, embedding=embedding, axis=axis, device=device, dtype=dtype)
        self.norm = _build(norm, num_features, axis, eps, process_group, device, dtype)

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize `x` and recover it by `condition`; see `FiLM`, and `Norm` for the mask."""
        y: Tensor = self.film(_normalize(self.norm, x, mask), condition, mask)
        return y


class SPADE(nn.Module):
    r"""Spatially adaptive norm: scale and shift each position as a map, such as a segmentation, says.

    $$y = \frac{x - \text{mean}}{\sqrt{\text{var} + \text{eps}}} \cdot (1 + \gamma(m)) + \beta(m)$$

    where gamma and beta are convolutions of relu(shared(m)), and the map m is resized to x's size by the nearest
    neighbour.

    Args:
        norm: where the statistics come from, as in `ConditionalNorm`; the authors' is ``"batch"``.
        num_features: channels C.
        num_conditions: channels K of the map, such as one for each class.
        hidden: channels between the convolutions.
        kernel_size: of all three, odd.
        dims: spatial dimensions, 1, 2 or 3.
        eps: of a norm by name, None for its default.
        process_group: of a norm by name: see `Norm`.

    Shapes: input and output (N, C, ...); map (N, K, ...) of any size and dtype. `mask` in the call is as in `Norm`.

    Raises ShapeError for other shapes, and for an even kernel_size or other dims.

    Park et al. 2019, arXiv:1903.07291.

    >>> spade = SPADE("instance", 8, 3)
    >>> spade(torch.randn(2, 8, 16, 16), torch.ones(2, 3, 4, 4)).shape
    torch.Size([2, 8, 16, 16])
    """

    def __init__(
        self,
        norm: str | nn.Module,
        num_features: int,
        num_conditions: int,
        hidden: int = 128,
        kernel_size: int = 3,
        *,
        dims: int = 2,
        eps: float | None = None,
        process_group: ProcessGroup | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dims not in _CONV:
            raise ShapeError(f"a map has 1, 2 or 3 spatial dimensions; got dims={dims}")
        if kernel_size % 2 == 0:
            raise ShapeError(f"a kernel in the middle of which is a position has an odd size; got {kernel_size}")
        self.num_features = num_features
        self.num_conditions = num_conditions

        def conv(inputs: int, outputs: int) -> Any:
            return _CONV[dims](inputs, outputs, kernel_size, padding=kernel_size // 2, device=device, dtype=dtype)

        self.norm = _build(norm, num_features, 1, eps, process_group, device, dtype)
        self.shared = conv(num_conditions, hidden)
        self.gamma = conv(hidden, num_features)
        self.beta = conv(hidden, num_features)

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize `x` and recover it by the map `condition`; see `Norm` for the mask."""
        rank = self.shared.weight.dim()
        if x.dim() != rank or x.shape[1] != self.num_features:
            raise ShapeError(f"the input must have {rank} dimensions and {self.num_features} channels; got {_size(x)}")
        # Not as slices: dynamo makes constants of the sizes in them.
        if condition.dim() != rank or condition.shape[0] != x.shape[0] or condition.shape[1] != self.num_conditions:
            raise ShapeError(
                f"the map must have {rank} dimensions, the first two {(x.shape[0], self.num_conditions)}; "
                f"got {_size(condition)}: write F.one_hot(labels, {self.num_conditions}).movedim(-1, 1) for labels"
            )
        m = condition.to(self.shared.weight.dtype)
        if m.shape[2:] != x.shape[2:]:
            m = F.interpolate(m, size=x.shape[2:], mode="nearest")
        m = F.relu(self.shared(m))
        real = None if mask is None else expand_mask(mask, x)
        return _modulate(_normalize(self.norm, x, real), self.gamma(m), self.beta(m), real)


def instance_pattern(axis: int) -> str:
    """The pattern of one set for each channel of each sample; raises ShapeError for another axis than 1 and -1."""
    if axis not in (1, -1):
        raise ShapeError(f"the channels are on axis 1 or -1; got axis={axis}")
    return named.pattern_of(named.NormName("instance"), axis)


def along_channels(values: Tensor, rank: int, axis: int) -> Tensor:
    """(N, C) -> N, C and 1s, of `rank` dimensions, with C on `axis`."""
    shape: list[int] = [1] * rank
    shape[0], shape[axis] = values.shape
    return values.reshape(shape)


def _modulate(x: Tensor, gain: Tensor, shift: Tensor, mask: Tensor | None) -> Tensor:
    """``x * (1 + gain) + shift``, in float32 at least, in x's dtype and layout; 0 where `mask` is False."""
    wide = torch.promote_types(torch.promote_types(x.dtype, gain.dtype), torch.float32)
    v = x if mask is None else torch.where(mask, x, 0)
    y = v.to(wide) * (1 + gain.to(wide)) + shift.to(wide)
    return (y if mask is None else torch.where(mask, y, 0)).to(x.dtype)


def _normalize(norm: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    y: Tensor = norm(x) if mask is None or isinstance(norm, nn.Identity) else norm(x, mask)
    return y


def _build(
    norm: str | nn.Module,
    num_features: int,
    axis: int,
    eps: float | None,
    process_group: ProcessGroup | None,
    device: Device,
    dtype: torch.dtype | None,
) -> nn.Module:
    if isinstance(norm, nn.Module):
        return norm
    made = named.build(norm, num_features, axis=axis, affine=False, eps=eps, device=device, dtype=dtype)
    if isinstance(made, Norm):
        made.process_group = process_group
    return made


def _size(x: Tensor) -> Sequence[int]:
    return tuple(x.shape)
