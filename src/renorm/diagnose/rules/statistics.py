"""What the calls of norms in a trace have in common, torch's and renorm's layers and functions alike."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from renorm.diagnose.trace import Node, Trace
from renorm.norms.channels import LayerNorm2d
from renorm.norms.norm import Norm

__all__ = ["NORMS", "NormCall", "is_norm", "norm_call", "norm_calls", "over_channels"]

NORMS = ("batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm", "norm")
_SIGNATURES = {
    "batch_norm": inspect.signature(F.batch_norm),
    "instance_norm": inspect.signature(F.instance_norm),
    "group_norm": inspect.signature(F.group_norm),
    "layer_norm": inspect.signature(F.layer_norm),
    "rms_norm": inspect.signature(F.rms_norm),
}
# torch.batch_norm and torch.instance_norm are called by the same words with other arguments.
_OF_TORCH = (
    "input",
    "weight",
    "bias",
    "running_mean",
    "running_var",
    "training",
    "momentum",
    "eps",
    "cudnn_enabled",
)


@dataclass(frozen=True)
class NormCall:
    """One call of a norm."""

    node: Node
    kind: str  # of NORMS; "norm" is a pattern of renorm
    values: int  # that one mean and variance come from, on this process
    couples_batch: bool  # whether samples share statistics
    measures: bool  # whether its statistics are the input's; else running ones
    tracks: bool  # whether running statistics are kept
    axis: int  # of the channels
    shared: bool  # whether other processes' batches count too
    centered: bool  # whether the mean is subtracted
    plain: bool = True  # whether it standardizes by these moments; not where they are mixed, whitened or corrected

    @property
    def input(self) -> Tensor:
        """What is normalized."""
        return self.node.inputs[0]

    @property
    def channels(self) -> int:
        """The size of the channel dimension."""
        return self.input.shape[self.axis]

    def standardized(self) -> Tensor:
        """The output without weight and bias, of a norm over the batch, each sample or groups of channels."""
        x = self.input.detach().float()
        if self.kind == "group_norm":
            groups = self.node.module.num_groups if isinstance(self.node.module, nn.GroupNorm) else None
            groups = int(_bound(self.node).get("num_groups", 1)) if groups is None else groups
            sets = x.reshape(x.shape[0] * groups, -1)
        elif self.couples_batch:
            sets = x.movedim(self.axis, 0).reshape(self.channels, -1)
        else:
            sets = x.reshape(-1, self.values)
        var, mean = torch.var_mean(sets, 1, correction=0, keepdim=True)
        deviation = torch.where(var > 0, var, 1).sqrt()
        return (sets - mean if self.centered else sets) / deviation


def is_norm(node: Node | None) -> bool:
    """Whether this call is a norm's."""
    return node is not None and node.kind in NORMS


def norm_calls(trace: Trace) -> Iterator[NormCall]:
    """The calls of norms, in their order."""
    return (call for call in map(norm_call, trace.of_kind(*NORMS)) if call is not None)


def norm_call(node: Node) -> NormCall | None:
    """This call as that of a norm; None where it is none."""
    if node.kind not in NORMS or not node.inputs or node.inputs[0].numel() == 0:
        return None
    x, module = node.inputs[0], node.module
    if isinstance(module, Norm):
        return _of_renorm(node, module)
    if module is None:
        return _of_function(node)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        sync = isinstance(module, nn.SyncBatchNorm)
        measures = module.training or module.running_mean is None
        values = x.numel() // x.shape[1]
        return NormCall(node, node.kind, values, True, measures, module.running_mean is not None, 1, sync, True)
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        unbatched = x.dim() == module._get_no_batch_dim()  # type: ignore[no-untyped-call]
        values = math.prod(x.shape[1 if unbatched else 2 :])
        measures, tracks = module.training or not module.track_running_stats, module.running_mean is not None
        return NormCall(node, node.kind, values, False, measures, tracks, 0 if unbatched else 1, False, True)
    if isinstance(module, nn.GroupNorm):
        values = x.numel() // (x.shape[0] * module.num_groups)
        return NormCall(node, node.kind, values, False, True, False, 1, False, True)
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        centered = isinstance(module, nn.LayerNorm)
        return NormCall(node, node.kind, math.prod(module.normalized_shape), False, True, False, -1, False, centered)
    return None


def _of_renorm(node: Node, module: Norm) -> NormCall:
    x = node.inputs[0]
    values = module.values_per_set(tuple(x.shape))
    mask = node.kwargs.get("mask", node.args[1] if len(node.args) > 1 else None)
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        values = max(1, round(values * float(mask.expand(x.shape).float().mean())))
    axis = getattr(module, "axis", None)
    if axis is None:
        last = isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and not isinstance(module, LayerNorm2d)
        weighted = [i for i, d in enumerate(module._bound(x).part.dims) if i in module._bound(x).part.weighted]
        axis = -1 if last else next(iter(weighted), 1)
    tracks = module.running_mean is not None
    measures = module._learns() or not tracks
    shared = module.process_group is not None
    plain = not module._own_solve or hasattr(module, "_whole")  # ghost batch norm: each part of the batch for itself
    couples, centered = bool(module.couples_batch), module.center
    return NormCall(node, node.kind, values, couples, measures, tracks, int(axis), shared, centered, plain)


def _bound(node: Node) -> dict[str, Any]:
    if len(node.args) == len(_OF_TORCH):
        return dict(zip(_OF_TORCH, node.args, strict=True))
    try:
        bound = _SIGNATURES[node.kind].bind(*node.args, **node.kwargs)
    except (KeyError, TypeError):
        return {}
    bound.apply_defaults()
    return dict(bound.arguments)


def _of_function(node: Node) -> NormCall | None:
    given, x = _bound(node), node.inputs[0]
    if not given or x.dim() < 2:
        return None
    if node.kind == "batch_norm":
        tracks = given["running_mean"] is not None
        measures = bool(given["training"])
        return NormCall(node, node.kind, x.numel() // x.shape[1], True, measures, tracks, 1, False, True)
    if node.kind == "instance_norm":
        measures = bool(given.get("use_input_stats", given.get("training", True)))
        tracks = given["running_mean"] is not None
        return NormCall(node, node.kind, math.prod(x.shape[2:]), False, measures, tracks, 1, False, True)
    if node.kind == "group_norm":
        values = x.numel() // (x.shape[0] * int(given["num_groups"]))
        return NormCall(node, node.kind, values, False, True, False, 1, False, True)
    values = math.prod(given["normalized_shape"])
    return NormCall(node, node.kind, values, False, True, False, -1, False, node.kind == "layer_norm")


def over_channels(call: NormCall, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Variance and mean of a tensor over everything but the channels of this call."""
    axis = call.axis % tensor.dim()
    var, mean = torch.var_mean(tensor.detach().float(), [i for i in range(tensor.dim()) if i != axis], correction=0)
    return var, mean
