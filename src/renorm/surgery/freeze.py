"""Freeze norms: running statistics used and never moved, whatever `.train()` says."""

from __future__ import annotations

from torch import nn

from renorm.errors import SwapError
from renorm.norms.norm import Norm
from renorm.surgery.find import norms

__all__ = ["freeze", "unfreeze"]


def freeze(model: nn.Module, *, parameters: bool = True) -> nn.Module:
    """Freeze every renorm norm in `model`, in place, and return it.

    A frozen norm with running statistics normalizes by them and leaves them alone, also after `model.train()`, which
    torch's ``bn.eval()`` does not survive (pytorch#66073). With `parameters`, weight and bias stop learning too: both
    together are Keras' ``trainable = False``.

    Raises SwapError where the model has a torch.nn norm with running statistics, which has no frozen state (swap it
    first), or no norm at all.

    >>> from renorm.norms.zoo import BatchNorm1d
    >>> freeze(BatchNorm1d(4)).train().frozen
    True
    """
    return _set(model, frozen=True, parameters=parameters)


def unfreeze(model: nn.Module, *, parameters: bool = True) -> nn.Module:
    """Undo `freeze`, in place, and return the model."""
    return _set(model, frozen=False, parameters=parameters)


def _set(model: nn.Module, *, frozen: bool, parameters: bool) -> nn.Module:
    sites = list(norms(model))
    for site in sites:
        if not isinstance(site.module, Norm) and getattr(site.module, "running_mean", None) is not None:
            raise SwapError(
                f"{site.name or 'the model'} is torch's {type(site.module).__name__}, which cannot be frozen: "
                f"first write model, _ = renorm.swap(model, '{site.kind} -> {site.kind}')"
            )
    found = [site.module for site in sites if isinstance(site.module, Norm)]
    if not found:
        raise SwapError("the model has no renorm norm to freeze")
    for module in found:
        module.frozen = frozen
        if parameters:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(not frozen)
    return model
