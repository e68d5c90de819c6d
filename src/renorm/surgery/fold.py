"""Fold batch norms into the convolution or linear layer before them, for inference."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm as TorchInstanceNorm

from renorm.errors import SwapError
from renorm.norms.batch import BatchRenorm, GhostBatchNorm, PowerNorm
from renorm.norms.norm import Norm
from renorm.surgery.find import describe, norms, refuse_lazy, refuse_parallel

__all__ = ["FoldReport", "fold"]

# Exactly these: a subclass may compute its weight, or more.
_LAYERS = {
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    nn.Linear,
}
_WHOLE = (Norm, TorchBatchNorm, TorchInstanceNorm, _ConvNd, nn.Linear)  # not traced into, nor are subclasses
_ACTIVATIONS = {
    "relu": nn.ReLU(),
    "leaky_relu": nn.LeakyReLU(0.01),
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
}


@dataclass(frozen=True)
class FoldReport:
    """What `fold` did."""

    folded: tuple[tuple[str, str], ...]  # (layer, the norm that is now in it), as in named_modules()
    left: tuple[tuple[str, str], ...]  # (norm with running statistics, why it stands where it stood)

    def __str__(self) -> str:
        lines = [f"  {norm} into {layer}" for layer, norm in self.folded]
        lines += [f"  {norm or '(the model)'} left alone: {why}" for norm, why in self.left]
        return "\n".join([f"{len(self.folded)} folded, {len(self.left)} left alone", *lines])


def fold(model: nn.Module, example: Tensor | tuple[Any, ...] | None = None) -> tuple[nn.Module, FoldReport]:
    r"""A copy of `model` for inference, with its batch norms folded into the layers before them, and what was folded.

    $$W'_c = s_c W_c, \quad b'_c = s_c (b_c - \mu_c) + \beta_c, \quad s_c = \gamma_c / \sqrt{\sigma_c^2 + \text{eps}}$$
    computed in float64. Each norm that normalizes by running statistics and stands right behind a convolution (1-D to
    3-D, grouped or not, transposed or not) or a linear layer whose output nothing else reads becomes an identity, or
    its activation; the copy is in evaluation mode and gives the same up to rounding. Which layer stands before which
    is read from a symbolic trace (torch.fx), or from `nn.Sequential` where the model cannot be traced and there is an
    `example`.

    Args:
        model: any module; it is untouched.
        example: an input, or a tuple of inputs: the copy's output is compared on it with the model's. Give it where
            the model cannot be traced, and where a `BatchNorm1d` stands behind a linear layer on sequences, whose
            channels are ambiguous.

    Left alone and reported are norms behind something else (the next layer's padding keeps them from being folded
    forwards), layers that are used twice, whose weight is shared, read by itself or computed (weight norm), layers
    that have hooks, and subclasses, which may do more.

    Raises:
        SwapError: the model has no norm with running statistics, has a lazy layer or is DistributedDataParallel, or
            outputs on `example` differ by more than rounding or hold no tensor.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    >>> folded, report = fold(model, torch.randn(1, 3, 9, 9))
    >>> print(report)
    1 folded, 0 left alone
      1 into 0
    """
    refuse_lazy(model)
    refuse_parallel(model)
    sites = [site for site in norms(model) if getattr(site.module, "running_mean", None) is not None]
    if not sites:
        raise SwapError("the model has no norm with running statistics: there is nothing to fold")
    made = copy.deepcopy(model).eval()
    order = _Order.of(made, example is not None)
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    uses.update(id(weight) for module in model.modules() for weight in module._parameters.values())
    folded, left = [], []
    for site in sites:
        layer = order.before.get(site.name, "")
        why = _why_not(model, site.module, site.exact, layer, uses) if layer else order.nothing
        why = why or next(
            (f"{name} is read by itself" for name in order.reads if _owner(name) in (layer, site.name)), ""
        )
        if why:
            left.append((site.name, why))
            continue
        norm = made.get_submodule(site.name)
        _fold(made.get_submodule(layer), norm)
        parent, _, last = site.name.rpartition(".")
        setattr(made.get_submodule(parent), last, copy.deepcopy(_ACTIVATIONS.get(_activation(norm), nn.Identity())))
        folded.append((layer, site.name))
    if example is not None:
        _compare(model, made, example if isinstance(example, tuple) else (example,))
    return made, FoldReport(tuple(folded), tuple(left))


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # a buffer that is read shows in the graph

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _WHOLE) or super().is_leaf_module(m, module_qualified_name)


@dataclass(frozen=True)
class _Order:
    """What a model's modules read."""

    before: dict[str, str]  # a module's name: that of the one whose output it alone reads
    reads: tuple[str, ...]  # parameters and buffers that something beside their module reads
    nothing: str  # why a norm that is not in `before` stays

    @classmethod
    def of(cls, model: nn.Module, compared: bool) -> _Order:
        try:
            graphs = list(_graphs(model))
        except Exception:  # control flow, unpacked arguments: tracing may raise anything
            if not compared:  # parts of an nn.Sequential may be called apart
                return cls({}, (), "torch.fx cannot trace the model: give an example, on which outputs are compared")
            graphs, pairs = [], set(_in_sequentials(model))
        else:
            pairs = set.intersection(*(set(_neighbours(graph)) for graph in graphs))
        reads = tuple(str(node.target) for graph in graphs for node in graph.nodes if node.op == "get_attr")
        return cls(dict(pairs), reads, "nothing that could take it in stands right before it alone")


def _graphs(model: nn.Module) -> Iterator[fx.Graph]:
    """The model with its optional arguments given and, where it has some, left out."""
    yield _Tracer().trace(model)
    optional = {
        name: parameter.default
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if isinstance(parameter.default, (bool, int, float, type(None)))
    }
    if optional:
        yield _Tracer().trace(model, concrete_args=optional)


def _neighbours(graph: fx.Graph) -> Iterator[tuple[str, str]]:
    """(module, the module whose output it alone reads), by their names."""
    calls = [node for node in graph.nodes if node.op == "call_module"]
    counts = Counter(node.target for node in calls)
    for node in calls:
        first = node.args[0] if len(node.all_input_nodes) == len(node.args) == 1 else None
        if not isinstance(first, fx.Node) or first.op != "call_module" or len(first.users) > 1:
            continue
        if counts[node.target] == counts[first.target] == 1:
            yield str(node.target), str(first.target)


def _in_sequentials(model: nn.Module) -> Iterator[tuple[str, str]]:
    for name, module in model.named_modules():
        if type(module) is nn.Sequential:
            names = [f"{name}.{child}" if name else child for child in module._modules]
            yield from zip(names[1:], names[:-1], strict=True)


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _why_not(model: nn.Module, norm: Any, exact: bool, name: str, uses: Counter[int]) -> str:
    """What keeps `norm` from being folded into the layer called `name`; empty where nothing does."""
    layer: Any = model.get_submodule(name)
    if not isinstance(layer, (_ConvNd, nn.Linear)):
        return f"it stands behind {type(layer).__name__}, which multiplies by no weight"
    if "weight" not in layer._parameters or "bias" not in layer._parameters:
        return f"the weight of {name} is computed (by a parametrization)"
    if type(layer) not in _LAYERS:
        return f"it stands behind {type(layer).__name__}, which may do more than torch.nn's layer"
    if not _fixed(norm) or not (exact or type(norm) in (BatchRenorm, GhostBatchNorm)):
        return f"{describe(norm)} may do more than normalize by running statistics"
    for module in (layer, norm):
        if uses[id(module)] > 1:
            return f"{type(module).__name__} is used in several places"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{type(module).__name__} has hooks"
    if any(value is not None and uses[id(value)] > 1 for value in (layer.weight, layer.bias)):
        return f"{name} shares a parameter with another layer"
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if norm.running_mean.numel() != channels or not _along_channels(norm, layer):
        return f"its statistics are not those of the {channels} channels of {name}"
    return ""


def _fixed(norm: Any) -> bool:
    """Whether in evaluation it only scales and shifts each channel."""
    if not isinstance(norm, Norm):
        return bool(norm.track_running_stats)
    plain = not norm._own_solve or norm.by_running
    return plain and norm.center and not norm._recovers and not norm._applies_other and not isinstance(norm, PowerNorm)


def _along_channels(norm: nn.Module, layer: Any) -> bool:
    """Whether its statistics run along the dimension in which the layer has its outputs."""
    rank = 2 if isinstance(layer, nn.Linear) else layer.weight.dim()
    if not isinstance(norm, Norm):
        return rank > 2 or not isinstance(norm, (nn.BatchNorm2d, nn.BatchNorm3d))
    bound = norm._bounds.get(rank)
    return bound is not None and bound.running == tuple(i for i, dim in enumerate(bound.part.dims) if dim == 1)


def _activation(norm: nn.Module) -> str:
    return getattr(norm, "activation", None) or ""


@torch.no_grad()
def _fold(layer: Any, norm: Any) -> None:
    dtype = layer.weight.dtype
    eps = norm._eps(layer.weight) if isinstance(norm, Norm) else norm.eps
    scale = (norm.running_var.double().flatten() + eps).rsqrt()
    shift = -norm.running_mean.double().flatten()
    if layer.bias is not None:
        shift = shift + layer.bias.double()
    weight, bias = (None if value is None else value.double().flatten() for value in (norm.weight, norm.bias))
    scale = scale if weight is None else scale * weight
    shift = scale * shift if bias is None else scale * shift + bias
    layer.weight.copy_(_scaled(layer, scale).to(dtype))
    if layer.bias is None:
        layer.bias = nn.Parameter(shift.to(dtype), requires_grad=layer.weight.requires_grad)
    else:
        layer.bias.copy_(shift.to(dtype))


def _scaled(layer: Any, scale: Tensor) -> Tensor:
    """The weight times the scale of each output."""
    weight: Tensor = layer.weight.double()
    if not isinstance(layer, _ConvTransposeNd):
        return weight * scale.view(-1, *[1] * (weight.dim() - 1))
    # (inputs, outputs of a group, ...): the inputs of a group make the outputs of that group
    groups = weight.view(layer.groups, -1, *weight.shape[1:])
    return (groups * scale.view(layer.groups, 1, -1, *[1] * (weight.dim() - 2))).view_as(weight)


def _compare(model: nn.Module, made: nn.Module, example: tuple[Any, ...]) -> None:
    plain = copy.deepcopy(model).eval()
    with torch.no_grad():
        outputs = [list(_tensors(one(*example))) for one in (plain, made)]
    if not outputs[0]:
        raise SwapError("no tensor was found in the output on `example`: give the part of the model that makes tensors")
    for before, after in zip(*outputs, strict=True):
        exact, near = before.double(), after.double()
        same = (exact == near) | (exact.isnan() & near.isnan())  # two infinities, too
        error = float((exact - near).abs().masked_fill(same, 0.0).max()) if same.numel() else 0.0
        scale = float(exact.nan_to_num(0.0, 0.0, 0.0).abs().max()) if same.numel() else 0.0
        rounding = min(1e3 * torch.finfo(before.dtype).eps, 0.1) if before.is_floating_point() else 0.0
        if not error <= rounding * max(scale, 1.0):
            raise SwapError(
                f"the folded model's output differs by {error:.3g} from the model's, of at most {scale:.3g}: fold its "
                "parts one by one to see where, and leave that part as it is"
            )


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from _tensors(list(output.values()))
    elif isinstance(output, (list, tuple)):
        for part in output:
            yield from _tensors(part)
    elif is_dataclass(output):
        yield from _tensors(list(vars(output).values()))
