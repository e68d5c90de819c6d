"""Recovery: what is learnt behind the standardized values, where it is more than a weight and a bias."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from renorm.errors import UnknownNormError

__all__ = ["RECOVERIES", "build", "over_channels"]

RECOVERIES = ("affine", "none", "linear", "mlp")


def build(recover: str | nn.Module, num_features: int, **factory: Any) -> nn.Module | None:
    """The module behind the norm; None where there is none, or weight and bias do it.

    ``"linear"`` is a square matrix and a bias over the channels, at first the identity; ``"mlp"`` two such layers with
    a GELU between them, as wide as the channels.
    """
    if isinstance(recover, nn.Module):
        return recover
    if recover not in RECOVERIES:
        raise UnknownNormError(f"recover is one of {', '.join(RECOVERIES)}, or a module; got {recover!r}")
    if recover in ("affine", "none"):
        return None
    if recover == "linear":
        linear = nn.Linear(num_features, num_features, **factory)
        nn.init.eye_(linear.weight)
        nn.init.zeros_(linear.bias)
        return linear
    return nn.Sequential(
        nn.Linear(num_features, num_features, **factory),
        nn.GELU(),
        nn.Linear(num_features, num_features, **factory),
    )


def over_channels(layer: nn.Module, x: Tensor, axis: int) -> Tensor:
    """`layer`, which is over the last dimension, over dimension `axis`; dtype and memory layout stay those of `x`."""
    y: Tensor = layer(x.movedim(axis, -1).to(next(layer.parameters()).dtype)).movedim(-1, axis).to(x.dtype)
    return y.contiguous() if x.is_contiguous() else y
