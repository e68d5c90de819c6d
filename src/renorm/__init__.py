"""renorm: the workbench for normalization in deep networks, for PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from renorm import errors, kernels
from renorm.norms.batch import BatchRenorm, GhostBatchNorm, PowerNorm, Ramp
from renorm.norms.channels import LayerNorm2d, PositionalNorm, ScaleNorm
from renorm.norms.condition import SPADE, ConditionalNorm, FiLM
from renorm.norms.cosine import CosineConv1d, CosineConv2d, CosineConv3d, CosineLinear
from renorm.norms.evo import EvoNormB0, EvoNormS0
from renorm.norms.gradient import centralize_gradients, clip_gradients_adaptively, normalize_gradients
from renorm.norms.inplace import InPlaceBatchNorm2d
from renorm.norms.local import LocalResponseNorm
from renorm.norms.norm import Norm
from renorm.norms.pointwise import TLU, Derf, DyT
from renorm.norms.recurrent import LayerNormGRU, LayerNormLSTM
from renorm.norms.response import FRN, GlobalResponseNorm
from renorm.norms.reversible import RevIN
from renorm.norms.style import AdaIN, CrossNorm, SelfNorm
from renorm.norms.weight import (
    initialize_weight_norm,
    spectral_norm,
    weight_norm,
    weight_standardization,
)
from renorm.norms.whiten import BatchWhitening, IterNorm
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
from renorm.surgery import fold, freeze, from_keras, recalibrate, swap, sync, unfreeze, unsync

if TYPE_CHECKING:
    from renorm import diagnose
    from renorm.cards import explain
    from renorm.choices.activations import draw_activation
    from renorm.choices.dropout import mc_dropout
    from renorm.choices.keras_losses import loss
    from renorm.choices.losses import loss_for
    from renorm.choices.optimizers import draw_trajectory, trajectory
    from renorm.choices.summary import summary
    from renorm.comparison import Comparison, compare
    from renorm.diagnose import check, watch, worst_cases
    from renorm.drawing import draw

__version__ = "0.1.0.dev0"

__all__ = [
    "FRN",
    "SPADE",
    "TLU",
    "AdaIN",
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm",
    "BatchWhitening",
    "Comparison",
    "ConditionalNorm",
    "CosineConv1d",
    "CosineConv2d",
    "CosineConv3d",
    "CosineLinear",
    "CrossNorm",
    "Derf",
    "DyT",
    "EvoNormB0",
    "EvoNormS0",
    "FiLM",
    "GhostBatchNorm",
    "GlobalResponseNorm",
    "GroupNorm",
    "InPlaceBatchNorm2d",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "IterNorm",
    "LayerNorm",
    "LayerNorm2d",
    "LayerNormGRU",
    "LayerNormLSTM",
    "LocalResponseNorm",
    "Norm",
    "PositionalNorm",
    "PowerNorm",
    "RMSNorm",
    "Ramp",
    "RevIN",
    "ScaleNorm",
    "SelfNorm",
    "SwitchNorm",
    "SwitchNorm1d",
    "SwitchNorm2d",
    "SwitchNorm3d",
    "centralize_gradients",
    "check",
    "clip_gradients_adaptively",
    "compare",
    "diagnose",
    "draw",
    "draw_activation",
    "draw_trajectory",
    "errors",
    "explain",
    "fold",
    "freeze",
    "from_keras",
    "initialize_weight_norm",
    "kernels",
    "loss",
    "loss_for",
    "mc_dropout",
    "normalize_gradients",
    "recalibrate",
    "spectral_norm",
    "summary",
    "swap",
    "sync",
    "trajectory",
    "unfreeze",
    "unsync",
    "watch",
    "weight_norm",
    "weight_standardization",
    "worst_cases",
]

# Names whose modules import plotting, tables or process pools: loaded at first use.
_LAZY = {
    "Comparison": "renorm.comparison",
    "check": "renorm.diagnose",
    "compare": "renorm.comparison",
    "draw": "renorm.drawing",
    "draw_activation": "renorm.choices.activations",
    "draw_trajectory": "renorm.choices.optimizers",
    "explain": "renorm.cards",
    "loss": "renorm.choices.keras_losses",
    "loss_for": "renorm.choices.losses",
    "mc_dropout": "renorm.choices.dropout",
    "summary": "renorm.choices.summary",
    "trajectory": "renorm.choices.optimizers",
    "watch": "renorm.diagnose",
    "worst_cases": "renorm.diagnose",
}


def __getattr__(name: str) -> object:
    if name == "diagnose":
        return importlib.import_module("renorm.diagnose")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'renorm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
