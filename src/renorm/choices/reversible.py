"""A forecaster between the two halves of a reversible instance norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from renorm.norms.reversible import RevIN

__all__ = ["REVERSIBLE", "Reversible", "parted"]

REVERSIBLE = "revin"


def parted(norm: str) -> tuple[bool, str]:
    """Whether a norm's name asks for RevIN around the model, and the norm inside it.

    >>> parted("revin"), parted("revin+batch"), parted("layer")
    ((True, 'none'), (True, 'batch'), (False, 'layer'))
    """
    head, plus, inner = norm.partition("+")
    return (True, inner if plus else "none") if head == REVERSIBLE else (False, norm)


class Reversible(nn.Module):
    """`model` on a past that :class:`renorm.RevIN` normalized, its forecast of the first channel denormalized.

    Args:
        model: (N, C, L) to (N, 1, horizon).
        num_series: how many of the channels, from the first on, change in time; the others are passed as they are.

    >>> model = Reversible(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Unflatten(1, (1, 3))), 1)
    >>> model(torch.zeros(2, 1, 4)).shape
    torch.Size([2, 1, 3])
    """

    def __init__(self, model: nn.Module, num_series: int) -> None:
        super().__init__()
        self.norm = RevIN(num_series)
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, L) -> (N, 1, horizon)."""
        past, static = x[:, : self.norm.num_features], x[:, self.norm.num_features :]
        past, statistics = self.norm.normalize(past)
        return self.norm.denormalize(self.model(torch.cat([past, static], 1)), statistics, channels=[0])
