"""Keras's norms by renorm's layers, against Keras itself on its torch backend."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras")

import renorm as rn  # noqa: E402
from renorm.errors import SwapError  # noqa: E402

RNG = np.random.default_rng(0)
L = keras.layers


def built(layer: Any, shape: tuple[int, ...]) -> Any:
    """A Keras layer with random weights, as after training."""
    layer.build((None, *shape[1:]))
    layer.set_weights([RNG.uniform(0.5, 2, size=weight.shape) for weight in layer.weights])
    return layer


def draw(shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
    return (RNG.normal(size=shape) * 2 + 1).astype("float32")


LAYERS = {
    "batch": (lambda: L.BatchNormalization(), (6, 5, 4, 3)),
    "batch of vectors": (lambda: L.BatchNormalization(momentum=0.9, epsilon=1e-2), (6, 3)),
    "batch without scale": (lambda: L.BatchNormalization(scale=False), (6, 5, 3)),
    "batch without both": (lambda: L.BatchNormalization(scale=False, center=False), (6, 5, 3)),
    "batch on axis 1": (lambda: L.BatchNormalization(axis=1), (6, 3, 5, 4)),
    "batch on axis 3": (lambda: L.BatchNormalization(axis=3), (6, 5, 4, 3)),
    "layer": (lambda: L.LayerNormalization(), (6, 5, 4, 3)),
    "layer without center": (lambda: L.LayerNormalization(center=False), (6, 3)),
    "layer without both": (lambda: L.LayerNormalization(center=False, scale=False), (6, 5, 3)),
    "layer over the last axes": (lambda: L.LayerNormalization(axis=[-2, -1]), (6, 5, 4, 3)),
    "layer over all axes": (lambda: L.LayerNormalization(axis=[1, 2, 3]), (6, 5, 4, 3)),
    "group": (lambda: L.GroupNormalization(groups=2), (6, 5, 4, 6)),
    "group of one channel": (lambda: L.GroupNormalization(groups=-1), (6, 5, 4, 6)),
    "group on axis 1": (lambda: L.GroupNormalization(groups=3, axis=1), (6, 6, 5, 4)),
    "group without both": (lambda: L.GroupNormalization(groups=3, center=False, scale=False), (6, 5, 6)),
    "rms": (lambda: L.RMSNormalization(), (6, 5, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_values_in_both_modes(name: str) -> None:
    make, shape = LAYERS[name]
    theirs = built(make(), shape)
    ours = rn.from_keras(theirs)
    for training in (False, True, True, False):  # the last one by moving statistics that have moved
        x = draw(shape)
        y = ours.train(training)(torch.from_numpy(x))
        np.testing.assert_allclose(y.detach(), theirs(x, training=training).detach(), atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["batch", "batch without scale", "layer", "layer without both", "group", "rms"])
def test_values_with_channels_first(name: str) -> None:
    make, shape = LAYERS[name]
    theirs = built(make(), shape)
    ours = rn.from_keras(theirs, channels_first=True)
    for training in (True, False):
        x = draw(shape)
        y = ours.train(training)(torch.from_numpy(x).movedim(-1, 1)).movedim(1, -1)
        np.testing.assert_allclose(y.detach(), theirs(x, training=training).detach(), atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("axis", [[1, 2], 1, -2])
def test_layer_norm_over_inner_axes(axis: int | list[int]) -> None:
    """By the formula: Keras itself runs it on its other backends only."""
    theirs = built(L.LayerNormalization(axis=axis), (6, 5, 4, 3))
    x, axes = draw((6, 5, 4, 3)).astype(float), tuple(np.atleast_1d(axis))
    shape = [size if at in {one % 4 for one in axes} else 1 for at, size in enumerate(x.shape)]
    gamma, beta = (weight.value.detach().double().numpy().reshape(shape) for weight in theirs.weights)
    expected = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-3) * gamma + beta
    y = rn.from_keras(theirs)(torch.from_numpy(x).float())
    np.testing.assert_allclose(y.detach(), expected, atol=2e-6, rtol=1e-5)


def test_a_fixed_scale_stays_fixed() -> None:
    layer = rn.from_keras(built(L.BatchNormalization(scale=False), (4, 3)))
    assert [name for name, value in layer.named_parameters() if value.requires_grad] == ["bias"]
    assert rn.from_keras(built(L.BatchNormalization(scale=False, center=False), (4, 3))).weight is None


def test_a_layer_that_is_not_trainable_is_frozen() -> None:
    theirs = built(L.BatchNormalization(), (6, 3))
    theirs.trainable = False
    ours = rn.from_keras(theirs).train()
    x = draw((6, 3))
    np.testing.assert_allclose(ours(torch.from_numpy(x)).detach(), theirs(x, training=True).detach(), atol=2e-6)
    assert not any(value.requires_grad for value in ours.parameters())
    np.testing.assert_allclose(ours.running_mean, theirs.moving_mean.value.detach(), rtol=1e-6)


def test_a_whole_model() -> None:
    inputs = keras.Input((8, 8, 3))
    x = L.Conv2D(4, 3, name="conv")(inputs)
    x = L.BatchNormalization(name="norm")(x)
    model = keras.Model(inputs, L.GlobalAveragePooling2D()(L.ReLU()(x)))
    for weight in model.weights:
        weight.assign(RNG.uniform(0.1, 1, size=weight.shape))
    conv, norm = model.get_layer("conv"), model.get_layer("norm")
    ours = nn.Sequential(nn.Conv2d(3, 4, 3), rn.from_keras(norm, channels_first=True), nn.ReLU()).eval()
    ours[0].weight.data = conv.kernel.value.detach().permute(3, 2, 0, 1)
    ours[0].bias.data = conv.bias.value.detach()
    x = draw((2, 8, 8, 3))
    y = ours(torch.from_numpy(x).permute(0, 3, 1, 2)).mean((2, 3))
    np.testing.assert_allclose(y.detach(), model(x, training=False).detach(), rtol=1e-5, atol=1e-5)


def test_a_bfloat16_policy() -> None:
    theirs = L.LayerNormalization(dtype="mixed_bfloat16")
    assert rn.from_keras(built(theirs, (2, 3))).weight.dtype == torch.float32  # Keras keeps the weights in float32


@pytest.mark.parametrize(
    ("layer", "shape", "options", "message"),
    [
        (lambda: L.Dense(3), (2, 3), {}, "a Keras norm is one of BatchNormalization, .*; got Dense"),
        (lambda: L.BatchNormalization(axis=2), (2, 3, 4, 5), {}, "on the last axis or on axis 1; this one has axis 2"),
        (lambda: L.GroupNormalization(2, axis=2), (2, 3, 4, 5), {}, "on the last axis or on axis 1"),
        (lambda: L.RMSNormalization(axis=[1, 2]), (2, 3, 4), {}, r"over the last axis; this one has axis \(1, 2\)"),
        (lambda: L.LayerNormalization(axis=1), (2, 3, 4), {"channels_first": True}, "where the channels move"),
        (lambda: L.BatchNormalization(renorm=True), (2, 3), {}, "renorm=True is renorm.BatchRenorm"),
    ],
)
def test_what_cannot_be_read(layer: Any, shape: tuple[int, ...], options: dict[str, bool], message: str) -> None:
    made = layer()
    made.build((None, *shape[1:]))
    with pytest.raises(SwapError, match=message):
        rn.from_keras(made, **options)


def test_rms_scaling_is_no_layer_norm() -> None:
    with pytest.warns(UserWarning, match="rms_scaling"):
        made = L.LayerNormalization(rms_scaling=True)
    made.build((None, 3))
    with pytest.raises(SwapError, match="rms_scaling=True divides by the deviation"):
        rn.from_keras(made)


def test_a_layer_that_is_not_built() -> None:
    with pytest.raises(SwapError, match="LayerNormalization has no weights yet"):
        rn.from_keras(L.LayerNormalization())


class Doubled(L.BatchNormalization):
    def call(self, *args: Any, **options: Any) -> Any:
        return 2 * super().call(*args, **options)


class Renamed(L.BatchNormalization):
    """Another name for the same."""


def test_a_subclass_that_computes_something_else() -> None:
    with pytest.raises(SwapError, match="Doubled is a BatchNormalization with a call of its own"):
        rn.from_keras(built(Doubled(), (6, 3)))
    assert isinstance(rn.from_keras(built(Renamed(), (6, 3))), rn.BatchNorm)


def test_float64_stays() -> None:
    """By the formula: Keras itself computes in float32."""
    theirs = built(L.BatchNormalization(dtype="float64"), (6, 3))
    gamma, beta, mean, var = (weight.value.detach().numpy() for weight in theirs.weights)
    ours, x = rn.from_keras(theirs).eval(), draw((6, 3)).astype(float)
    expected = (x - mean) / np.sqrt(var + 1e-3) * gamma + beta
    np.testing.assert_allclose(ours(torch.from_numpy(x)).detach(), expected, rtol=1e-12)
    assert ours.momentum == 0.01
