"""Keras 3's conventions, against Keras itself on its torch backend: what somebody who ports a model must write."""

import os

import numpy as np
import pytest
import torch

os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras")

import renorm as rn  # noqa: E402


def both(layer, theirs, x, **call):
    """Outputs of ours and of Keras' on the same array."""
    return layer(torch.from_numpy(x)).detach().numpy(), theirs(x, **call).detach().numpy()


def test_batch_normalization():
    """Keras: channels last, momentum is what is kept, eps 1e-3, biased variance in the moving average."""
    ours = rn.BatchNorm(5, axis=-1, eps=1e-3, momentum=0.01, unbiased=False)
    theirs = keras.layers.BatchNormalization(momentum=0.99, epsilon=1e-3)
    generator = np.random.default_rng(0)
    for _ in range(4):
        x = (generator.normal(size=(6, 4, 3, 5)) * 2 + 1).astype("float32")
        np.testing.assert_allclose(*both(ours, theirs, x, training=True), atol=2e-6)
    np.testing.assert_allclose(ours.running_mean, theirs.moving_mean.value.numpy(), atol=1e-6)
    np.testing.assert_allclose(ours.running_var, theirs.moving_variance.value.numpy(), atol=1e-6)
    np.testing.assert_allclose(*both(ours.eval(), theirs, x, training=False), atol=2e-6)


def test_masked_batch_normalization():
    """Keras normalizes masked steps too and leaves them out of the statistics; we give 0 there."""
    ours = rn.BatchNorm(5, axis=-1, eps=1e-3)
    theirs = keras.layers.BatchNormalization(epsilon=1e-3)
    x = np.random.default_rng(1).normal(size=(6, 7, 5)).astype("float32")
    mask = np.random.default_rng(2).random((6, 7)) > 0.3
    y = ours(torch.from_numpy(x), torch.from_numpy(mask)[..., None]).detach().numpy()
    z = theirs(x, training=True, mask=keras.ops.convert_to_tensor(mask)).detach().numpy()
    np.testing.assert_allclose(y[mask], z[mask], atol=2e-6)


def test_layer_normalization():
    ours, theirs = rn.LayerNorm(5, eps=1e-3), keras.layers.LayerNormalization(epsilon=1e-3)
    x = np.random.default_rng(0).normal(size=(6, 4, 5)).astype("float32") + 3
    np.testing.assert_allclose(*both(ours, theirs, x), atol=2e-6)


def test_group_normalization():
    ours = rn.Norm("n [...] (g [c])", g=3, c=2, eps=1e-3)
    theirs = keras.layers.GroupNormalization(groups=3, epsilon=1e-3)
    x = np.random.default_rng(0).normal(size=(4, 5, 3, 6)).astype("float32") + 3
    np.testing.assert_allclose(*both(ours, theirs, x), atol=5e-6)


def test_rms_normalization():
    ours, theirs = rn.RMSNorm(5, eps=1e-6), keras.layers.RMSNormalization(epsilon=1e-6)
    x = np.random.default_rng(0).normal(size=(6, 4, 5)).astype("float32") + 3
    np.testing.assert_allclose(*both(ours, theirs, x), atol=2e-6)
