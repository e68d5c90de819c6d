"""Find the norms of a model, torch's and renorm's, and say of each what another norm would need to know."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm as TorchInstanceNorm
from torch.nn.parameter import is_lazy

from renorm.errors import SwapError
from renorm.norms import named, zoo
from renorm.norms.channels import LayerNorm2d
from renorm.norms.norm import Norm
from renorm.pattern import parse

__all__ = ["Site", "describe", "norms", "refuse_lazy", "refuse_parallel"]

# In this order: a renorm layer is an instance of torch's class too.
_KINDS: tuple[tuple[str, tuple[type[nn.Module], ...]], ...] = (
    ("switch", (zoo.SwitchNorm,)),
    ("batch", (TorchBatchNorm, zoo.BatchNorm)),
    ("instance", (TorchInstanceNorm,)),
    ("group", (nn.GroupNorm,)),
    ("rms", (nn.RMSNorm,)),
    ("layer", (nn.LayerNorm,)),
)
_EXACT = {
    *(
        nn.BatchNorm1d,
        nn.BatchNorm2d,
        nn.BatchNorm3d,
        nn.SyncBatchNorm,
        nn.GroupNorm,
        nn.LayerNorm,
        nn.RMSNorm,
    ),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, Norm),
    *(getattr(zoo, name) for name in zoo.__all__),
}


@dataclass(frozen=True)
class Site:
    """One norm of a model, and what another needs to take its place."""

    name: str  # as in named_modules(); "" where the model is the norm
    module: nn.Module
    kind: str  # "batch", "layer", "instance", "group", "rms", "switch", or "pattern"
    exact: bool  # one of torch's or renorm's own classes; a subclass of them may do more than normalize
    num_features: int  # channels; 0 where it is not known: a lazy layer, a pattern without an axis c
    axis: int  # the dimension of the channels: 1 or -1
    rank: str  # "1d", "2d" or "3d" where the class says it, else ""


def norms(model: nn.Module) -> Iterator[Site]:
    """Every norm of `model`, in the order of named_modules; one that is used in two places comes twice.

    >>> [(site.name, site.kind) for site in norms(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))]
    [('1', 'batch')]
    """
    for name, module in model.named_modules(remove_duplicate=False):
        kind = _kind(module)
        if kind is not None:
            num_features, axis = _channels(module)
            rank = next((r for r in ("1d", "2d", "3d") if type(module).__name__.endswith(r)), "")
            yield Site(name, module, kind, _is_exact(module), num_features, axis, rank)


def refuse_lazy(model: nn.Module) -> None:
    """Raise SwapError where a layer has no shape yet."""
    for name, module in model.named_modules():
        if any(is_lazy(tensor) for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
            raise SwapError(f"{name or 'the model'} has no shape yet: run a lazy layer on a batch first")


def refuse_parallel(model: nn.Module) -> None:
    """Raise SwapError where the model is wrapped for data parallelism."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise SwapError(
            "DistributedDataParallel goes on with the parameters it was given, not with those of new layers: pass "
            "model.module, and wrap the copy"
        )


def describe(module: nn.Module) -> str:
    """A norm in a few words, for reports: ``GroupNorm(2, 8)``."""
    name = type(module).__name__
    if isinstance(module, nn.GroupNorm):
        return f"{name}({module.num_groups}, {module.num_channels})"
    return f"{name}({module.pattern!r})" if type(module) is Norm else name


def _is_exact(module: nn.Module) -> bool:
    # Of a class that is known, and none of its variants: they do more with moments or weights than its kind says.
    variant = getattr(module, "_applies_other", False) or getattr(module, "partial", 1) != 1
    return type(module) in _EXACT and not variant


def _kind(module: nn.Module) -> str | None:
    for kind, classes in _KINDS:
        if isinstance(module, classes):
            return kind
    if not isinstance(module, Norm):
        return None
    if module._own_solve:
        return "pattern"
    for kind in named.KINDS[1:]:
        if module.pattern in (named.pattern_of(named.NormName(kind), axis) for axis in (1, -1)):
            centered = {"rms": False}.get(kind, True)
            if module.center == centered:
                return kind
    return "pattern"


def _channels(module: nn.Module) -> tuple[int, int]:
    """The number of channels, 0 where it is not known, and the dimension they are on."""
    if isinstance(module, LayerNorm2d):
        return module.normalized_shape[0], 1
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        shape = module.normalized_shape
        # Over (C, H, W) of an image the channels are second; over one axis they are the last.
        return (shape[0], 1) if len(shape) > 1 else (shape[0], -1)
    if isinstance(module, nn.GroupNorm):
        return module.num_channels, 1
    if type(module) is Norm:
        pattern = parse(module.pattern)
        dims = [[axis.name for axis in dim] for dim in pattern.dims]
        second = len(dims) > 1 and "c" in dims[1] and dims[0] != ["..."]
        sizes = [module.sizes.get(name, 0) for name in pattern.beside("c")]
        return math.prod(sizes) if sizes else 0, 1 if second else -1
    return getattr(module, "num_features", 0), getattr(module, "axis", 1)
