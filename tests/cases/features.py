"""Norms of single feature maps, of single positions, by a root mean square, and their foils."""

import math

import scipy.special
import torch
from checks import Case, moments

import renorm as rn
from cases.plain import IMAGE, SEQUENCE, VECTOR, VOLUME, standardize
from renorm.norms.channels import LayerNorm2d, PositionalNorm, ScaleNorm
from renorm.norms.evo import EvoNormB0, EvoNormS0
from renorm.norms.pointwise import TLU, Derf, DyT
from renorm.norms.response import FRN, GlobalResponseNorm


def along(parameter, x, axis=1):
    """A parameter as it broadcasts over the dimension `axis` of x."""
    shape = [1] * x.dim()
    shape[axis] = -1
    return parameter.double().reshape(shape)


def real(x, mask):
    return torch.ones_like(x, dtype=torch.bool) if mask is None else mask


def filter_response(eps):
    """Filter response norm (arXiv:1911.09737, equations 1 and 2), a map at a time."""

    def formula(layer, x, mask):
        mask = real(x, mask)
        y = torch.zeros_like(x)
        for i in range(x.shape[0]):
            for c in range(x.shape[1]):
                kept = mask[i, c]
                n = kept.sum()
                if n:
                    nu2 = x[i, c][kept].square().sum() / n
                    e = eps + (0 if layer.learnt_eps is None else layer.learnt_eps[c].double().abs())
                    y[i, c] = x[i, c] / (nu2 + e).sqrt()
        return y if layer.weight is None else y * along(layer.weight, x) + along(layer.bias, x)

    return formula


def thresholded(axis):
    return lambda layer, x, mask: torch.maximum(x, along(layer.tau, x, axis))


def dynamic_tanh(axis):
    return lambda layer, x, mask: (
        (layer.alpha.double() * x).tanh() * along(layer.weight, x, axis) + along(layer.bias, x, axis)
    )


def dynamic_erf(axis):
    """Derf (arXiv:2512.10938), with SciPy's erf."""

    def formula(layer, x, mask):
        inner = layer.alpha.double() * x + layer.shift.double()
        y = torch.from_numpy(scipy.special.erf(inner.detach().cpu().numpy())).to(x.device)
        return y * along(layer.weight, x, axis) + along(layer.bias, x, axis)

    return formula


def global_response(axis, eps=1e-6):
    """Global response norm (arXiv:2301.00808, algorithm 1), a sample at a time."""

    def formula(layer, x, mask):
        axis_ = axis % x.dim()
        mask = real(x, mask)
        y = torch.empty_like(x)
        for i in range(x.shape[0]):
            channels, kept = x[i].movedim(axis_ - 1, 0), mask[i].movedim(axis_ - 1, 0)
            lengths = torch.stack([c[k].square().sum().sqrt() for c, k in zip(channels, kept, strict=True)])
            there = [c for c in range(len(lengths)) if kept[c].any()]
            mean = lengths[there].mean() if there else 0
            share = lengths / (mean + eps)
            parameters = zip(channels, layer.weight.double(), layer.bias.double(), share, strict=True)
            y[i] = torch.stack([c + w * (c * s) + b for c, w, b, s in parameters]).movedim(0, axis_ - 1)
        return y

    return formula


def evolved_b0(eps=1e-5):
    """EvoNorm-B0 (arXiv:2004.02967, table 1), with biased variances."""

    def formula(layer, x, mask):
        weight, bias = along(layer.weight, x), along(layer.bias, x)
        if not layer.activate:
            return x * weight + bias
        inner = tuple(range(2, x.dim()))
        batch = moments(x, (0, *inner), mask)[1]
        if not layer.training:
            batch = along(layer.running_var, x)
        instance = moments(x, inner, mask)[1] if inner else torch.zeros_like(x)
        most = torch.maximum((batch + eps).sqrt(), along(layer.v, x) * x + (instance + eps).sqrt())
        return x / most * weight + bias

    return formula


def evolved_s0(groups, eps=1e-5):
    """EvoNorm-S0 (arXiv:2004.02967, table 1), a group at a time."""

    def formula(layer, x, mask):
        weight, bias = along(layer.weight, x), along(layer.bias, x)
        if not layer.activate:
            return x * weight + bias
        size = x.shape[1] // groups
        parts = []
        for i in range(groups):
            part = slice(i * size, (i + 1) * size)
            var = moments(x[:, part], tuple(range(1, x.dim())), None if mask is None else mask[:, part])[1]
            xv = x[:, part] * along(layer.v[part], x)
            parts.append(x[:, part] / (1 + (-xv).exp()) / (var + eps).sqrt())
        return torch.cat(parts, 1) * weight + bias

    return formula


def by_length(layer, x, mask):
    """Scale norm (arXiv:1910.05895, equation 3): over the last dimension."""
    length = torch.where(real(x, mask), x, 0).square().sum(-1, keepdim=True).sqrt()
    return layer.g.double() * x / length.clamp(min=1e-5)


def root_mean_square(partial=1.0, *, offset=False, eps=1e-6):
    """RMS norm and pRMSNorm (arXiv:1910.07467, section 4), a row at a time; the weight as in Gemma."""

    def formula(layer, x, mask):
        rows, kept = x.flatten(0, -2), real(x, mask).flatten(0, -2)
        count = math.ceil(partial * x.shape[-1])
        out = []
        for row, k in zip(rows, kept, strict=True):
            measured = row[:count][k[:count]]
            square = measured.square().mean() if len(measured) else torch.ones(())
            out.append(row / (square + eps).sqrt())
        weight = layer.weight.double()
        return torch.stack(out).view(x.shape) * (1 + weight if offset else weight)

    return formula


POINTWISE = {"mask_in_evaluation": "there are no statistics: a mask does the same in both modes"}
BESIDE = {"mask_in_evaluation": "the instance is measured in evaluation too: test_features.py"}
IDENTITY = {
    "magnitudes": "the output is as large as the input, and the check's tolerance is absolute: test_features.py"
}

CASES = [
    Case("FRN", lambda: FRN(6), IMAGE, filter_response(1e-6)),
    Case("FRN-NC", lambda: FRN(6, learn_eps=True), VECTOR, filter_response(1e-6)),
    Case("FRN-NCL-learnt-eps", lambda: FRN(6, learn_eps=True), SEQUENCE, filter_response(1e-6)),
    Case("FRN-plain", lambda: FRN(6, affine=False), VOLUME, filter_response(1e-6)),
    Case("TLU", lambda: TLU(6), IMAGE, thresholded(1), exempt=POINTWISE),
    Case("TLU-last", lambda: TLU(9, axis=-1), SEQUENCE, thresholded(-1), exempt=POINTWISE),
    Case("DyT", lambda: DyT(9), SEQUENCE, dynamic_tanh(-1), exempt=POINTWISE),
    Case("DyT-second", lambda: DyT(6, axis=1), IMAGE, dynamic_tanh(1), exempt=POINTWISE),
    Case("Derf", lambda: Derf(9), SEQUENCE, dynamic_erf(-1), exempt=POINTWISE),
    Case("Derf-second", lambda: Derf(6, axis=1), IMAGE, dynamic_erf(1), exempt=POINTWISE),
    Case("GlobalResponseNorm", lambda: GlobalResponseNorm(7), IMAGE, global_response(-1), exempt=IDENTITY),
    Case(
        "GlobalResponseNorm-second", lambda: GlobalResponseNorm(6, axis=1), IMAGE, global_response(1), exempt=IDENTITY
    ),
    Case("GlobalResponseNorm-NC", lambda: GlobalResponseNorm(6), VECTOR, global_response(-1), exempt=IDENTITY),
    Case("EvoNormB0", lambda: EvoNormB0(6), IMAGE, evolved_b0(), None, True, BESIDE),
    Case("EvoNormB0-NC", lambda: EvoNormB0(6), VECTOR, evolved_b0(), None, True, BESIDE),
    Case("EvoNormB0-cumulative", lambda: EvoNormB0(6, momentum=None), SEQUENCE, evolved_b0(), None, True, BESIDE),
    Case("EvoNormB0-affine-only", lambda: EvoNormB0(6, activate=False), IMAGE, evolved_b0(), exempt=IDENTITY),
    Case("EvoNormS0", lambda: EvoNormS0(6, 3), IMAGE, evolved_s0(3)),
    Case("EvoNormS0-NC", lambda: EvoNormS0(24, 3), (7, 24), evolved_s0(3)),
    Case("LayerNorm2d", lambda: LayerNorm2d(6), IMAGE, standardize((1,), eps=1e-6)),
    Case("LayerNorm2d-NC", lambda: LayerNorm2d(6, bias=False), VECTOR, standardize((1,), eps=1e-6)),
    Case("LayerNorm2d-3d", lambda: LayerNorm2d(6, 1e-5, affine=False), VOLUME, standardize((1,))),
    Case("PositionalNorm", PositionalNorm, IMAGE, standardize((1,))),
    Case("ScaleNorm", lambda: ScaleNorm(9), SEQUENCE, by_length),
    Case("ScaleNorm-NC", lambda: ScaleNorm(6), VECTOR, by_length),
    Case("RMSNorm-offset", lambda: rn.RMSNorm(9, 1e-6, offset=True), SEQUENCE, root_mean_square(offset=True)),
    Case("RMSNorm-partial", lambda: rn.RMSNorm(9, 1e-6, partial=0.4), SEQUENCE, root_mean_square(0.4)),
    Case(
        "RMSNorm-partial-offset",
        lambda: rn.RMSNorm(6, 1e-6, partial=0.5, offset=True),
        VECTOR,
        root_mean_square(0.5, offset=True),
    ),
]
