"""Read norms of Keras: the same numbers by renorm's layers, with Keras's conventions translated.

| | torch and renorm | Keras |
|---|---|---|
| momentum | of the new batch: 0.1 | of what is kept: 0.99 |
| eps | 1e-5 | 1e-3 (RMS 1e-6) |
| running variance | unbiased | biased |
| channels | dimension 1 | the last dimension |
| frozen | an eval() that the next train() undoes; `renorm.freeze` | `trainable = False` |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from renorm.errors import SwapError
from renorm.norms.norm import Norm
from renorm.norms.zoo import BatchNorm, GroupNorm, LayerNorm, RMSNorm

__all__ = ["from_keras"]

# Ours and theirs
_NAMES = {
    "weight": ("gamma", "scale"),
    "bias": ("beta",),
    "running_mean": ("moving_mean",),
    "running_var": ("moving_variance",),
}


def from_keras(layer: Any, *, channels_first: bool = False) -> nn.Module:
    r"""The renorm layer that computes what a built Keras layer does, with its weights and moving statistics.

    `BatchNormalization`, `LayerNormalization`, `GroupNormalization` and `RMSNormalization` of Keras 2 and 3 are read,
    whatever the backend; Keras is not imported. Momentum becomes 1 - momentum, the running variance stays biased, and
    a batch norm with ``trainable = False`` is frozen (:func:`renorm.freeze`).

    Masks differ: Keras leaves masked steps out of the statistics and normalizes them; renorm gives 0 there.

    Args:
        layer: the Keras layer.
        channels_first: the channels are Keras's last dimension; they will be dimension 1 of the ported model's tensors.

    Raises:
        SwapError: it is another layer or a subclass with a ``call`` of its own, has no weights yet, or normalizes over
            axes that `channels_first` would move.

    >>> class BatchNormalization:  # as a Keras layer shows itself
    ...     axis, momentum, epsilon, trainable, built = -1, 0.99, 1e-3, True, False
    >>> from_keras(BatchNormalization())
    Traceback (most recent call last):
    renorm.errors.SwapError: BatchNormalization has no weights yet: build it, or call it on a batch first
    """
    bases: list[Any] = [kind for kind in type(layer).__mro__ if kind.__name__ in _MAKERS]
    if not bases:
        raise SwapError(f"a Keras norm is one of {', '.join(_MAKERS)}; got {type(layer).__name__}")
    base = bases[-1]
    if getattr(type(layer), "call", None) is not getattr(base, "call", None):
        raise SwapError(f"{type(layer).__name__} is a {base.__name__} with a call of its own: port that by hand")
    read = _Read.of(layer)
    made: Any = _MAKERS[base.__name__](read, channels_first)
    if any(value.dtype == torch.float64 for value in read.values.values()):
        made.double()
    with torch.no_grad():
        for name, theirs in _NAMES.items():
            value = next((read.values[key] for key in theirs if key in read.values), None)
            target = getattr(made, name, None)
            if value is not None and target is not None:
                target.copy_(value.reshape(target.shape))
            elif isinstance(target, nn.Parameter):  # Keras's scale=False or center=False
                target.requires_grad_(False)
    if not layer.trainable:
        made.frozen = True
        made.requires_grad_(False)
    return made  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Read:
    """A Keras layer's facts."""

    layer: Any
    values: dict[str, Tensor]  # its weights by their last name: "gamma"
    axis: tuple[int, ...]  # as Keras has it
    inputs: tuple[int | None, ...]  # the shape it was built for; empty where it does not say

    @classmethod
    def of(cls, layer: Any) -> _Read:
        if not layer.built:
            raise SwapError(f"{type(layer).__name__} has no weights yet: build it, or call it on a batch first")
        names = [str(weight.name).split("/")[-1].split(":")[0] for weight in layer.weights]
        arrays = [_tensor(weight) for weight in layer.weights]
        axis = (layer.axis,) if isinstance(layer.axis, int) else tuple(layer.axis)
        inputs = (layer.get_build_config() or {}).get("input_shape") or ()
        return cls(layer, dict(zip(names, arrays, strict=True)), axis, tuple(inputs))

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of its axes."""
        known = next(iter(self.values.values()), None)
        return tuple(int(self.inputs[axis] or 0) for axis in self.axis) if known is None else tuple(known.shape)

    @property
    def affine(self) -> bool:
        """Whether it has any weight of its own."""
        return bool({"gamma", "scale", "beta"} & set(self.values))

    @property
    def last(self) -> bool:
        """Whether it is about the last dimension alone."""
        return self.axis in ((-1,), (len(self.inputs) - 1,))

    def refuse(self, must: str) -> SwapError:
        """An error about its axes."""
        return SwapError(
            f"{type(self.layer).__name__} {must}; this one has axis {self.axis if len(self.axis) > 1 else self.axis[0]}"
        )


def _tensor(weight: Any) -> Tensor:
    """A weight of any backend, on the CPU in float32 or, where it is that, float64."""
    value = getattr(weight, "value", weight)
    value = value() if callable(value) else value  # a method of TensorFlow's variables
    if not isinstance(value, Tensor):
        array = np.array(value)
        value = torch.from_numpy(array if array.dtype == np.float64 else array.astype(np.float32))
    return (value if value.dtype == torch.float64 else value.float()).detach().cpu()


def _batch(read: _Read, channels_first: bool) -> nn.Module:
    layer = read.layer
    if getattr(layer, "renorm", False):
        raise SwapError("a BatchNormalization with renorm=True is renorm.BatchRenorm: write it with your schedule")
    if not read.last and read.axis != (1,):
        raise read.refuse("must have its channels on the last axis or on axis 1")
    return BatchNorm(
        read.shape[0],
        axis=1 if channels_first or not read.last else -1,
        eps=layer.epsilon,
        momentum=round(1 - layer.momentum, 12),  # 1 - 0.99 is not 0.01
        affine=read.affine,
        unbiased=False,
    )


def _layer(read: _Read, channels_first: bool) -> nn.Module:
    eps, affine = read.layer.epsilon, read.affine
    if getattr(read.layer, "rms_scaling", False):
        raise SwapError("a LayerNormalization with rms_scaling=True divides by the deviation: write renorm.Norm for it")
    if channels_first:
        if not read.last:
            raise read.refuse("must be over the last axis where the channels move to dimension 1")
        return Norm("n [c] ...", eps=eps, weight="c" if affine else None, c=read.shape[0])
    rank = len(read.inputs)
    reduced = sorted(axis % rank for axis in read.axis)
    if reduced == list(range(rank - len(reduced), rank)):
        return LayerNorm(read.shape, eps=eps, elementwise_affine=affine)
    names = [f"d{at}" for at in range(rank)]
    pattern = " ".join(f"[{name}]" if at in reduced else name for at, name in enumerate(names))
    sizes: dict[str, Any] = {names[at]: size for at, size in zip(reduced, read.shape, strict=True)}
    return Norm(pattern, eps=eps, weight=" ".join(sizes) if affine else None, running=None, **sizes)


def _group(read: _Read, channels_first: bool) -> nn.Module:
    if not read.last and read.axis != (1,):
        raise read.refuse("must have its channels on the last axis or on axis 1")
    (channels,), groups, eps = read.shape, read.layer.groups, read.layer.epsilon
    if channels_first or not read.last:
        return GroupNorm(groups, channels, eps=eps, affine=read.affine)
    weight = "g c" if read.affine else None
    return Norm("n [...] (g [c])", g=groups, c=channels // groups, eps=eps, weight=weight)


def _rms(read: _Read, channels_first: bool) -> nn.Module:
    if not read.last:
        raise read.refuse("must be over the last axis")
    if channels_first:
        return Norm("n [c] ...", center=False, bias=False, c=read.shape[0], eps=read.layer.epsilon)
    return RMSNorm(read.shape[0], eps=read.layer.epsilon)


_MAKERS: dict[str, Callable[[_Read, bool], Any]] = {
    "BatchNormalization": _batch,
    "LayerNormalization": _layer,
    "GroupNormalization": _group,
    "RMSNormalization": _rms,
}
