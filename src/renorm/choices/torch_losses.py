"""Torch's losses for targets of any dtype; half precision is computed in float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["BCEWithLogitsLoss", "CrossEntropyLoss", "HuberLoss", "MSELoss", "wide"]


def wide(values: Tensor) -> Tensor:
    """At least float32: a target of 40,001 is 40,000 in float16, and the square of 300 is infinite."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """Torch's, for labels of any whole dtype (torch takes int64 and uint8) and soft targets of any dtype."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The mean over the labels, in nats."""
        logits, soft = wide(input), input.shape == target.shape
        return super().forward(logits, target.to(logits.dtype) if soft else target.long()).to(input.dtype)


class BCEWithLogitsLoss(nn.BCEWithLogitsLoss):
    """Torch's, for targets of any dtype: torch refuses whole numbers."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The mean over the units, in nats."""
        return super().forward(wide(input), target.to(wide(input).dtype)).to(input.dtype)


class MSELoss(nn.MSELoss):
    """Torch's, for targets of any dtype: torch's own gives float64 beside a float64 target."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The mean of the squares, in the target's units squared."""
        return super().forward(wide(input), target.to(wide(input).dtype)).to(input.dtype)


class HuberLoss(nn.HuberLoss):
    """Torch's, for targets of any dtype."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The mean, in the target's units squared."""
        return super().forward(wide(input), target.to(wide(input).dtype)).to(input.dtype)
