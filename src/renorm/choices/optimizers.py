"""Optimizers by name, each one of torch.optim with a stated setting."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial

from torch import nn, optim

from renorm.choices.registry import look_up
from renorm.errors import StudyError

__all__ = ["NAMES", "build"]

_OPTIMIZERS: dict[str, Callable[..., optim.Optimizer]] = {
    "sgd": optim.SGD,
    "momentum": partial(optim.SGD, momentum=0.9),
    "nesterov": partial(optim.SGD, momentum=0.9, nesterov=True),
    "adagrad": optim.Adagrad,
    "adadelta": optim.Adadelta,
    "rmsprop": optim.RMSprop,
    "adam": optim.Adam,
    "adamw": optim.AdamW,
}

NAMES: tuple[str, ...] = tuple(_OPTIMIZERS)


def build(name: str, parameters: Iterable[nn.Parameter], lr: float) -> optim.Optimizer:
    """An optimizer of `parameters` at learning rate `lr`, all else at torch's defaults.

    "sgd" has no momentum; "momentum" and "nesterov" have 0.9 of it. Only "adamw" has weight decay, 0.01.

    Raises:
        StudyError: no optimizer is called that, or `lr` is not a positive finite number.

    >>> import torch
    >>> weight = nn.Parameter(torch.zeros(2))
    >>> build("momentum", [weight], lr=0.1).defaults["momentum"]
    0.9
    """
    if not (math.isfinite(lr) and lr > 0):
        raise StudyError(f"the learning rate must be a positive finite number; got {lr!r}")
    return look_up(_OPTIMIZERS, name, "optimizer")(parameters, lr=lr)
