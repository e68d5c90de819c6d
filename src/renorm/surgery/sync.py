"""Let the norms of a model share their statistics between processes, or no longer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm

from renorm.errors import SwapError
from renorm.norms import zoo
from renorm.surgery.find import Site, norms

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["sync", "unsync"]

_RANKED = {"1d": zoo.BatchNorm1d, "2d": zoo.BatchNorm2d, "3d": zoo.BatchNorm3d}


def sync(model: nn.Module, process_group: ProcessGroup | None = None) -> nn.Module:
    """Make every norm of `model` that averages over the batch average over the batches of all processes.

    In place, and returns the model. Renorm's layers take `process_group` (None: all processes); torch's batch norms,
    SyncBatchNorm among them, are replaced by renorm's with the same parameters and buffers: these need no GPU, take
    unequal and empty batches and have a second derivative. Norms with statistics for each sample are left alone.

    Raises SwapError where no process group was initialized, where the model has nothing to synchronize, and for a
    subclass of torch's batch norm, which may do more than normalize.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise SwapError(
            "norms are synchronized between the processes of a group, and there is none: first call "
            "torch.distributed.init_process_group(...)"
        )
    model, found = _ours(model, (TorchBatchNorm,))
    if not found:
        raise SwapError("the model has no norm that averages over the batch: there is nothing to synchronize")
    for layer in found:
        layer.process_group = process_group or dist.group.WORLD
    return model


def unsync(model: nn.Module) -> nn.Module:
    """Undo `sync`, in place, and return the model; torch's SyncBatchNorm becomes `renorm.BatchNorm`.

    >>> unsync(nn.SyncBatchNorm(3)).process_group is None
    True
    """
    model, found = _ours(model, (nn.SyncBatchNorm,))
    for layer in found:
        layer.process_group = None
    return model


def _ours(model: nn.Module, replaced: tuple[type[nn.Module], ...]) -> tuple[nn.Module, list[Any]]:
    """The layers that can be synchronized, those of torch's classes `replaced` first made renorm's."""
    made: dict[nn.Module, nn.Module] = {}  # a norm in two places stays one
    for site in list(norms(model)):
        if isinstance(site.module, replaced) and not hasattr(site.module, "couples_batch"):
            if site.module not in made:
                made[site.module] = _replacement(site)
            if site.name:
                model.set_submodule(site.name, made[site.module])
            else:
                model = made[site.module]
    return model, [module for module in model.modules() if getattr(module, "couples_batch", False)]


def _replacement(site: Site) -> nn.Module:
    old: Any = site.module
    if not site.exact:
        raise SwapError(
            f"{site.name or 'the model'} is a {type(old).__name__}, which may do more than normalize: replace it "
            "first, by renorm.swap with a function of (name, norm)"
        )
    made = _RANKED.get(site.rank, zoo.BatchNorm)
    new = made(old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats, device="meta")
    # The very tensors: an optimizer that knows them goes on.
    new._parameters.update(old._parameters)
    new._buffers.update(old._buffers)
    return new.train(old.training)
