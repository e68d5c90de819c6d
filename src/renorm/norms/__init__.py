"""The layers."""

from renorm.norms.norm import Norm
from renorm.norms.zoo import (
    BatchNorm,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
    RMSNorm,
    SwitchNorm,
    SwitchNorm1d,
    SwitchNorm2d,
    SwitchNorm3d,
)

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "Norm",
    "RMSNorm",
    "SwitchNorm",
    "SwitchNorm1d",
    "SwitchNorm2d",
    "SwitchNorm3d",
]
