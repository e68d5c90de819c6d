"""Activation functions by name, each a layer of torch.nn."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from renorm.choices.registry import look_up

__all__ = ["NAMES", "build"]

_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "softplus": nn.Softplus,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "identity": nn.Identity,
}

NAMES: tuple[str, ...] = tuple(_LAYERS)


def build(name: str) -> nn.Module:
    """An activation layer with torch's default settings; it has no weights and draws no random numbers.

    Raises:
        StudyError: no activation is called that.

    >>> build("gelu")
    GELU(approximate='none')
    """
    return look_up(_LAYERS, name, "activation")()
