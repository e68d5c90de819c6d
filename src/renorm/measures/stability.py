"""How far the statistics of a batch are from the running ones that a batch norm uses in evaluation.

For independent Gaussian values there is a null to compare with: what differs by sampling alone. Values that go
together, the pixels of an image or the words of a document, count for fewer than they are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from renorm.errors import MeasureError
from renorm.kernels.moments import statistics_dtype
from renorm.norms.batch import GhostBatchNorm
from renorm.norms.masks import expand_mask
from renorm.norms.norm import Norm

__all__ = ["Instability", "instability", "record_instability"]


@dataclass(frozen=True)
class Instability:
    r"""Distances of a batch's statistics from the running ones, over the d channels of one layer.

    $$\text{mean\_distance} = \tfrac1d \|\mu_B - \mu\|_2, \qquad \text{mean\_tid} = \tfrac1d \sum_i
    \frac{|\mu_i - \mu_{B,i}|}{\sigma_{B,i}}, \qquad \text{mean\_shift}^2 = \tfrac1d \sum_i
    \frac{(\mu_i - \mu_{B,i})^2}{\sigma_{B,i}^2}$$

    $$\text{var\_distance} = \tfrac1d \|\sigma_B^2 - \sigma^2\|_2, \qquad \text{var\_tid} = \tfrac1d \sum_i
    \Big| \frac{\sigma_i}{\sigma_{B,i}} - 1 \Big|, \qquad \text{var\_shift}^2 = \tfrac1d \sum_i
    \Big( \ln \frac{\sigma_i^2}{\sigma_{B,i}^2} \Big)^2$$

    The distances are PowerNorm's: in the units of the values and of their squares, and smaller by the square root of d
    in a wider layer. TID's are free of both, and so are the shifts, whose nulls are the simplest.

    PowerNorm: Shen et al. 2020 (arXiv:2003.07845), section 3. TID: Wang et al. 2022 (arXiv:2210.05153).
    """

    mean_distance: float  # PowerNorm's, in the unit of the values
    var_distance: float  # PowerNorm's, in that unit squared
    mean_tid: float  # mean of the absolute shift of the mean, in standard deviations
    var_tid: float  # mean of the absolute relative shift of the standard deviation
    mean_shift: float  # root mean square of the shift of the mean, in standard deviations
    var_shift: float  # root mean square of the shift of the variance's natural logarithm
    num_values: int  # n, that a batch's mean and variance come from

    @property
    def null_mean_shift(self) -> float:
        """What `mean_shift` is about for n independent values, running statistics without error: 1 / sqrt(n)."""
        return 1 / math.sqrt(self.num_values)

    @property
    def null_var_shift(self) -> float:
        """What `var_shift` is about for n independent Gaussian values: sqrt(2 / n)."""
        return math.sqrt(2 / self.num_values)

    @property
    def null_mean_tid(self) -> float:
        """That of `mean_tid`, a mean of absolute values: sqrt(2 / (pi n))."""
        return math.sqrt(2 / math.pi) * self.null_mean_shift

    @property
    def null_var_tid(self) -> float:
        """That of `var_tid`, which is half the shift of the logarithm: sqrt(1 / (pi n))."""
        return math.sqrt(2 / math.pi) * self.null_var_shift / 2


def instability(
    batch_mean: Tensor, batch_var: Tensor, running_mean: Tensor, running_var: Tensor, *, num_values: int
) -> Instability:
    """The distances of statistics that are at hand, see `Instability`.

    Args:
        batch_mean: (d,), of the batch.
        batch_var: (d,), of the batch; unbiased, as the running one is.
        running_mean: (d,), before the batch moved it.
        running_var: (d,), likewise.
        num_values: how many values a batch's mean comes from: its size times that of the other averaged axes.

    Where a variance is 0 what divides by it is inf, or 0 where nothing moved; NaN stays NaN, so that a training that
    diverges can be recorded. Raises MeasureError for other shapes, negative variances, and a `num_values` below 1.

    >>> one, two = torch.ones(2), torch.full((2,), 2.0)
    >>> found = instability(two, one, one, 4 * one, num_values=100)
    >>> found.mean_tid, found.var_tid, round(found.var_shift, 4), found.null_mean_shift
    (1.0, 1.0, 1.3863, 0.1)
    """
    given = (batch_mean, batch_var, running_mean, running_var)
    if batch_mean.dim() != 1 or len(batch_mean) == 0 or any(t.shape != batch_mean.shape for t in given):
        raise MeasureError(f"statistics must be of equally many channels, (d,); got {[tuple(t.shape) for t in given]}")
    mean, var, known_mean, known_var = (t.detach().to(statistics_dtype(t)) for t in given)
    if (var < 0).any() or (known_var < 0).any():
        raise MeasureError("variances must not be negative; some are")
    if num_values < 1:
        raise MeasureError(f"num_values must be at least 1; got {num_values}")
    moved = (mean - known_mean).abs()
    shift = torch.where(moved == 0, 0, moved / var.sqrt())
    ratio = torch.where(var == known_var, 1, known_var / var)
    values = [
        torch.linalg.vector_norm(moved) / len(mean),
        torch.linalg.vector_norm(var - known_var) / len(mean),
        shift.mean(),
        (ratio.sqrt() - 1).abs().mean(),
        shift.square().mean().sqrt(),
        ratio.log().square().mean().sqrt(),
    ]
    numbers = torch.stack(values).tolist()  # fetched from the device at once
    return Instability(numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], num_values)


@contextmanager
def record_instability(model: nn.Module) -> Iterator[dict[str, list[Instability]]]:
    """Record, while the model trains, how far each batch is from the running statistics of each batch norm.

    Args:
        model: any module; the layers looked at are torch's batch norms and those of renorm that keep running
            statistics of the batch.

    Gives lists by the layers' names, one entry for each of its forward passes in training mode, computed from its
    input and the running statistics before they move. The first 1 / momentum of them say how far the running
    statistics are from where they will be, rather than how stable the batches are. Nothing is recorded of batches
    with fewer than two values in a channel, which have no variance, nor by a compiled model. Of several processes each
    records its own batches.

    >>> model = nn.Sequential(nn.BatchNorm1d(4))
    >>> with record_instability(model) as records:
    ...     _ = [model(torch.randn(64, 4)) for _ in range(100)]
    >>> len(records["0"]), records["0"][-1].mean_shift < 3 * records["0"][-1].null_mean_shift
    (100, True)
    """
    layers = {name: layer for name, layer in model.named_modules() if _keeps_batch_statistics(layer)}
    records: dict[str, list[Instability]] = {name: [] for name in layers}
    handles = []
    try:
        for name, layer in layers.items():
            hook = functools.partial(_look, records[name])
            handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        yield records
    finally:
        for handle in handles:
            handle.remove()


def _keeps_batch_statistics(layer: nn.Module) -> bool:
    if getattr(layer, "running_mean", None) is None or getattr(layer, "running_var", None) is None:
        return False
    return layer.couples_batch and layer.center if isinstance(layer, Norm) else isinstance(layer, _BatchNorm)


@torch.no_grad()
def _look(found: list[Instability], layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not layer.training or getattr(layer, "frozen", False) or torch.compiler.is_compiling():
        return
    named = dict(zip(("x", "mask"), args, strict=False)) | kwargs
    x, mask = named.get("x", named.get("input")), named.get("mask")
    assert isinstance(x, Tensor)
    channels: tuple[int, ...] = (1,)
    unbiased = True
    if isinstance(layer, Norm):
        if isinstance(layer, GhostBatchNorm):
            x, mask = layer._fill(x, mask)
        bound, unbiased = layer._bound(x), layer.unbiased
        channels = bound.running
        mask = None if mask is None else bound.part.view(expand_mask(mask, x).expand(x.shape))
        x = bound.part.view(x)
    mean, var, count = _moments(x, mask, channels, unbiased)
    if count > 1:
        known = [buffer.flatten() for buffer in (layer.running_mean, layer.running_var) if isinstance(buffer, Tensor)]
        found.append(instability(mean, var, *known, num_values=count))


def _moments(x: Tensor, mask: Tensor | None, channels: tuple[int, ...], unbiased: bool) -> tuple[Tensor, Tensor, int]:
    """Mean, variance and the least count of values, over all axes but the channels."""
    x = x.to(statistics_dtype(x))
    real = torch.ones((), dtype=torch.bool, device=x.device) if mask is None else mask
    axes = [axis for axis in range(x.dim()) if axis not in channels]
    count = real.expand(x.shape).sum(axes, keepdim=True)
    mean = torch.where(real, x, 0).sum(axes, keepdim=True) / count
    var = torch.where(real, x - mean, 0).square().sum(axes) / (count.view(mean.flatten().shape) - int(unbiased))
    return mean.flatten(), var.flatten(), int(count.min())
