"""Cases of whitening: the formulas by a loop over groups, with numpy and SciPy."""

from dataclasses import dataclass

import mpmath
import numpy as np
import scipy.linalg
import torch
from checks import Case
from torch import Tensor

from renorm.norms.whiten import BatchWhitening, IterNorm

from .plain import IMAGE, NO_STATISTICS, SEQUENCE, VOLUME

__all__ = ["CASES", "cholesky", "newton_schulz", "pca", "whitened", "zca"]


@dataclass(frozen=True)
class Whitening(Case):
    """Positions are masked, as a covariance is of channels that are there together; variances are far apart."""

    axis: int = 1

    def input(self, dtype: torch.dtype = torch.float32, *, mean: float = 1.5, seed: int = 1) -> Tensor:
        x = super().input(torch.float64, mean=0.0, seed=seed)
        shape = [1] * x.dim()
        shape[self.axis] = -1
        return (x * torch.linspace(0.5, 2, x.shape[self.axis], dtype=torch.float64).view(shape) + mean).to(dtype)

    def mask(self, seed: int = 2) -> Tensor:
        return super().mask(seed).narrow(self.axis, 0, 1).expand(self.shape)


def zca(cov):
    """arXiv:1804.08450, section 3.1: D Lambda^(-1/2) D^T, in 30 digits: SciPy's sqrtm loses two in float64."""
    with mpmath.workdps(30):
        values, vectors = mpmath.eigsy(mpmath.matrix(cov.tolist()))
        scaled = mpmath.diag([1 / mpmath.sqrt(value) for value in values])
        return np.array((vectors * scaled * vectors.T).tolist(), dtype=float)


def pca(cov):
    """Lambda^(-1/2) D^T, principal components first, the largest entry of each eigenvector positive."""
    values, vectors = np.linalg.eigh(cov)
    rows = []
    for value, vector in sorted(zip(values, vectors.T, strict=True), key=lambda pair: -pair[0]):
        largest = vector[np.argmax(np.abs(vector))]
        rows.append(np.sign(largest) * vector / np.sqrt(value))
    return np.stack(rows)


def cholesky(cov):
    """arXiv:1806.00420, section 3: the inverse of L, where L L^T is the covariance."""
    return scipy.linalg.solve_triangular(np.linalg.cholesky(cov), np.eye(len(cov)), lower=True)


def newton_schulz(steps):
    """arXiv:1904.03441, equations 4 to 6."""

    def matrix(cov):
        part = cov / np.trace(cov)
        p = np.eye(len(cov))
        for _ in range(steps):
            p = (3 * p - p @ p @ p @ part) / 2
        return p / np.sqrt(np.trace(cov))

    return matrix


def whitened(matrix, groups=1, axis=1, eps=1e-5):
    """The formula for one way to the matrix."""

    def formula(layer, x, mask):
        rows = x.double().movedim(axis, -1)
        real = torch.ones(rows.shape[:-1], dtype=torch.bool) if mask is None else mask.movedim(axis, -1)[..., 0]
        y = torch.zeros_like(rows)
        size = x.shape[axis] // groups
        for group in range(groups):
            part = slice(group * size, (group + 1) * size)
            values = rows[real][:, part].numpy()
            centred = values - values.mean(0)
            cov = centred.T @ centred / len(values) + eps * np.eye(size)
            y[..., part][real] = torch.from_numpy(centred @ matrix(cov).T)
        if layer.weight is not None:
            y = y * layer.weight.double()
            y = y + layer.bias.double()
        return y.movedim(-1, axis)

    return formula


CASES = [
    Whitening("BatchWhitening", lambda: BatchWhitening(6), IMAGE, whitened(zca), None, True),
    Whitening("BatchWhitening-groups", lambda: BatchWhitening(6, groups=2), IMAGE, whitened(zca, 2), None, True),
    Whitening("BatchWhitening-NC", lambda: BatchWhitening(6, groups=3), (13, 6), whitened(zca, 3), None, True),
    Whitening(
        "BatchWhitening-last",
        lambda: BatchWhitening(9, groups=3, axis=-1),
        SEQUENCE,
        whitened(zca, 3, -1),
        None,
        True,
        axis=-1,
    ),
    Whitening("BatchWhitening-cumulative", lambda: BatchWhitening(6, momentum=None), VOLUME, whitened(zca), None, True),
    Whitening(
        "BatchWhitening-plain",
        lambda: BatchWhitening(6, affine=False, track_running_stats=False),
        IMAGE,
        whitened(zca),
        None,
        True,
        NO_STATISTICS,
    ),
    Whitening(
        "BatchWhitening-few-samples",
        lambda: BatchWhitening(6, 0.1),
        (5, 6),
        whitened(zca, eps=0.1),
        None,
        True,
        {"magnitudes": "eps is nothing beside 5 samples of 1e15 in 6 channels: a variance is the rounding of others"},
    ),
    Whitening(
        "BatchWhitening-pca", lambda: BatchWhitening(6, groups=2, method="pca"), IMAGE, whitened(pca, 2), None, True
    ),
    Whitening(
        "BatchWhitening-cholesky",
        lambda: BatchWhitening(6, groups=2, method="cholesky"),
        IMAGE,
        whitened(cholesky, 2),
        None,
        True,
    ),
    Whitening("IterNorm", lambda: IterNorm(6, groups=2), IMAGE, whitened(newton_schulz(5), 2), None, True),
    Whitening("IterNorm-one-step", lambda: IterNorm(6, iterations=1), SEQUENCE, whitened(newton_schulz(1)), None, True),
]
