"""What measure hands to solve, and solve to apply: tensors the size of the statistics."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Affine", "Moments", "statistics_dtype"]


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype of statistics: one wider than `x`, where the device has it.

    float32 for half precision, float64 for the others. A float32 mean is off by up to 6e-8 of itself, which is
    6e-4 standard deviations when the mean is 1e4 of them; these tensors are small, so the wider one is free.
    """
    if x.device.type == "cpu":
        return torch.float64
    if x.dtype in (torch.float16, torch.bfloat16) or x.device.type == "mps":
        return torch.float32
    return torch.float64


@dataclass(frozen=True)
class Moments:
    r"""Count, mean and biased variance of each set.

    $$\text{mean} = \frac1n \sum_i x_i, \qquad \text{var} = \frac1n \sum_i (x_i - \text{mean})^2$$

    Each tensor has the split view's shape with 1 on every reduced axis. A set without a real entry has count
    0, mean 0 and variance 1, so that nothing divides by zero and it weighs nothing in a merge.
    """

    count: Tensor  # real entries in each set; one number where there is no mask
    mean: Tensor
    var: Tensor  # biased: divided by count
    names: tuple[str, ...]  # of the axes

    def merge(self, *names: str) -> Moments:
        """Moments of the union of the sets along the axes `names` (Chan, Golub & LeVeque 1983), exactly.

        The layer-norm moments of ``n c [...]`` are ``merge("c")``, the batch-norm moments ``merge("n")``.
        """
        dims = tuple(self.names.index(name) for name in names)
        sets = math.prod([self.mean.shape[dim] for dim in dims])
        if self.count.numel() == 1 and sets != 0:  # without a mask every set has the same count
            mean = self.mean.mean(dims, keepdim=True)
            var = (self.var + (self.mean - mean).square()).mean(dims, keepdim=True)
            return Moments(self.count * sets, mean, var, self.names)
        count = self.count.expand(self.mean.shape)
        total = count.sum(dims, keepdim=True)
        weight = count / total.clamp(min=1)
        mean = (weight * self.mean).sum(dims, keepdim=True)
        var = (weight * (self.var + (self.mean - mean).square())).sum(dims, keepdim=True)
        return Moments(total, mean, torch.where(total > 0, var, 1), self.names)


@dataclass(frozen=True)
class Affine:
    """What is applied to each set: ``y = (x - center) * scale + shift``; None stands for 0."""

    scale: Tensor
    center: Tensor | None = None  # kept apart from the shift: subtracting it first loses no digits
    shift: Tensor | None = None
