"""Cases of the batch family: ghost batch norm, batch renorm and power norm."""

import torch
from checks import Case, moments

from renorm.norms.batch import BatchRenorm, GhostBatchNorm, PowerNorm

from .plain import IMAGE, SEQUENCE, VECTOR, VOLUME, ghost

__all__ = ["CASES", "ghost_last", "powered", "renormed"]


def along(layer, x, channels):
    """Weight and bias of a layer, in float64, to be multiplied with x."""
    shape = [1] * x.dim()
    shape[channels] = -1
    return [1 if p is None else p.double().reshape(shape) for p in (layer.weight, layer.bias)]


def dims_but(x, channels):
    return tuple(d for d in range(x.dim()) if d != channels % x.dim())


def ghost_last(size):
    """Ghost batch norm with the channels last: that of the tensor with them second."""
    second = ghost(size)

    def formula(layer, x, mask):
        mask = None if mask is None else mask.expand(x.shape).movedim(-1, 1)
        return second(layer, x.movedim(-1, 1), mask).movedim(1, -1)

    return formula


def renormed(rmax, dmax, channels=1, eps=1e-5):
    """Batch renorm's formula (arXiv:1702.03275, Algorithm 1)."""

    def formula(layer, x, mask):
        shape = [1] * x.dim()
        shape[channels] = -1
        mean, var = moments(x, dims_but(x, channels), mask)
        mu, sigma = layer.running_mean.double().view(shape), (layer.running_var.double().view(shape) + eps).sqrt()
        sigma_b = (var + eps).sqrt()
        r = (sigma_b / sigma).clamp(1 / rmax, rmax)
        d = ((mean - mu) / sigma).clamp(-dmax, dmax)
        weight, bias = along(layer, x, channels)
        return ((x - mean) / sigma_b * r + d) * weight + bias

    return formula


def powered(channels=1, eps=1e-5, warm=False):
    """Power norm's forward (arXiv:2003.07845, Algorithm 2), or that of its warm-up."""

    def formula(layer, x, mask):
        shape = [1] * x.dim()
        shape[channels] = -1
        mean, var = moments(x, dims_but(x, channels), mask)
        square = var + mean.square() if warm else layer.running_var.double().view(shape)
        weight, bias = along(layer, x, channels)
        return x / (square + eps).sqrt() * weight + bias

    return formula


def known(layer, mean, var):
    """`layer` with running statistics that are not the first ones."""
    channels = torch.arange(layer.num_features) / layer.num_features
    layer.running_mean += mean + (0 if mean == 0 else channels)
    layer.running_var += var * (1 + channels) - 1
    return layer


NOT_ITS_DERIVATIVE = {"gradients": "no gradient flows through r and d, which depend on the input"}
APPROXIMATE = {
    "gradients": "the paper's backward is not the derivative of its forward: see test_batch.py",
    "magnitudes": "earlier batches scale this one, so that the output grows with the input",
}

CASES = [
    Case("GhostBatchNorm", lambda: GhostBatchNorm(6, 2), (6, 6, 4, 7), ghost(2), None, True),
    Case("GhostBatchNorm-remainder", lambda: GhostBatchNorm(6, 3), IMAGE, ghost(3), None, True),
    Case("GhostBatchNorm-one-ghost", lambda: GhostBatchNorm(6, 8), VOLUME, ghost(8), None, True),
    Case("GhostBatchNorm-vectors", lambda: GhostBatchNorm(6, 4), VECTOR, ghost(4), None, True),
    Case("GhostBatchNorm-last", lambda: GhostBatchNorm(9, 2, axis=-1), SEQUENCE, ghost_last(2), None, True),
    Case("BatchRenorm", lambda: BatchRenorm(6), IMAGE, renormed(1.0, 0.0), None, True),
    # All channels at both limits, where r and d are constants and the gradient is a derivative.
    Case(
        "BatchRenorm-at-its-limits",
        lambda: known(BatchRenorm(6, rmax=1.5, dmax=2.0), -1.0, 0.2),
        IMAGE,
        renormed(1.5, 2.0),
        None,
        True,
    ),
    Case(
        "BatchRenorm-last",
        lambda: known(BatchRenorm(9, axis=-1, rmax=3.0, dmax=5.0), 0.6, 1.3),
        SEQUENCE,
        renormed(3.0, 5.0, -1),
        None,
        True,
        NOT_ITS_DERIVATIVE,
    ),
    Case(
        "BatchRenorm-vectors",
        lambda: known(BatchRenorm(6, rmax=1.1, dmax=0.2), 1.4, 0.9),
        VECTOR,
        renormed(1.1, 0.2),
        None,
        True,
        NOT_ITS_DERIVATIVE,
    ),
    Case("PowerNorm", lambda: known(PowerNorm(6), 0.0, 1.8), IMAGE, powered(), None, True, APPROXIMATE),
    Case(
        "PowerNorm-last", lambda: known(PowerNorm(9, axis=-1), 0.0, 1.8), SEQUENCE, powered(-1), None, True, APPROXIMATE
    ),
    Case("PowerNorm-warm", lambda: PowerNorm(6, warmup=9), VECTOR, powered(warm=True), None, True),
]
