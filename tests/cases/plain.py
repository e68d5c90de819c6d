"""Norms of the zoo that are a pattern, and the formulas of plain norms for the other families."""

import torch
from checks import Case, moments
from torch import nn

import renorm as rn


def standardize(dims, *, eps=1e-5, along=None, about_zero=False):
    """The formula of a plain norm over the dimensions `dims`, parameters along `along` (default: dimension 1)."""

    def formula(layer, x, mask):
        mean, var = moments(x, tuple(d % x.dim() for d in dims), mask)
        if about_zero:
            mean, var = torch.zeros_like(mean), var + mean.square()
        y = (x - mean) / (var + eps).sqrt()
        shape = [1] * x.dim()
        for d in (1,) if along is None else along:
            shape[d] = x.shape[d]
        weight, bias = (getattr(layer, name, None) for name in ("weight", "bias"))
        y = y if weight is None else y * weight.double().reshape(shape)
        return y if bias is None else y + bias.double().reshape(shape)

    return formula


def grouped(groups, eps=1e-5):
    """Group norm's formula, by a loop over groups."""

    def formula(layer, x, mask):
        size = x.shape[1] // groups
        parts = []
        for i in range(groups):
            part = slice(i * size, (i + 1) * size)
            mean, var = moments(x[:, part], tuple(range(1, x.dim())), None if mask is None else mask[:, part])
            parts.append((x[:, part] - mean) / (var + eps).sqrt())
        shape = [1, -1] + [1] * (x.dim() - 2)
        return torch.cat(parts, 1) * layer.weight.double().reshape(shape) + layer.bias.double().reshape(shape)

    return formula


def ghost(size, eps=1e-5):
    """Ghost batch norm's formula, by a loop over parts of the batch."""

    def formula(layer, x, mask):
        masks = [None] * len(x) if mask is None else mask.split(size)
        whole = standardize((0, *range(2, x.dim())), eps=eps)
        return torch.cat([whole(layer, part, m) for part, m in zip(x.split(size), masks, strict=False)])

    return formula


def switched(names, eps=1e-5):
    """Switchable norm's formula (arXiv:1806.10779, equation 3), each partition measured on its own."""

    def formula(layer, x, mask):
        inner = tuple(range(2, x.dim()))
        dims = {"instance": inner, "layer": (1, *inner), "batch": (0, *inner)}
        a, b = layer.mean_weight.double().softmax(0), layer.var_weight.double().softmax(0)
        measured = [moments(x, dims[name], mask) if dims[name] else (x, torch.zeros_like(x)) for name in names]
        mean = sum(a[k] * m for k, (m, _) in enumerate(measured))
        var = sum(b[k] * v for k, (_, v) in enumerate(measured))
        shape = [1, -1] + [1] * (x.dim() - 2)
        y = (x - mean) / (var + eps).sqrt()
        return y * layer.weight.double().reshape(shape) + layer.bias.double().reshape(shape)

    return formula


def about_the_last(layer, x, mask):
    """RevIN's formula with the last real step of each channel in the place of the mean, by a loop."""
    _, var = moments(x, (2,), mask)
    last = torch.zeros_like(var)
    for n, c in torch.cartesian_prod(torch.arange(x.shape[0]), torch.arange(x.shape[1])).tolist():
        real = x[n, c] if mask is None else x[n, c][mask[n, c]]
        last[n, c] = real[-1] if len(real) else 0
    y = (x - last) / (var + 1e-5).sqrt()
    return y * layer.weight.double()[:, None] + layer.bias.double()[:, None]


def recovered(dims, recovery):
    """The formula of a norm over `dims` with `recovery` of (channels last, the layer's module) behind it."""

    def formula(layer, x, mask):
        mean, var = moments(x, dims, mask)
        y = (x - mean) / (var + 1e-5).sqrt()
        return recovery(y if mask is None else torch.where(mask, y, 0), layer.recover).movedim(-1, 1)

    return formula


def two_layers(y, mlp):
    hidden = y.movedim(1, -1) @ mlp[0].weight.double().T + mlp[0].bias.double()
    hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    return hidden @ mlp[2].weight.double().T + mlp[2].bias.double()


IMAGE, VOLUME, SEQUENCE, VECTOR = (5, 6, 4, 7), (4, 6, 2, 3, 5), (5, 6, 9), (7, 6)
ALL = {"instance": (2, 3), "batch": (0, 2, 3)}
NO_STATISTICS = {"evaluation": "without running statistics the batch decides, in evaluation too"}

CASES = [
    Case("BatchNorm1d-NC", lambda: rn.BatchNorm1d(6), VECTOR, standardize((0,)), lambda: nn.BatchNorm1d(6), True),
    Case("BatchNorm1d-NCL", lambda: rn.BatchNorm1d(6), SEQUENCE, standardize((0, 2)), lambda: nn.BatchNorm1d(6), True),
    Case("BatchNorm2d", lambda: rn.BatchNorm2d(6), IMAGE, standardize((0, 2, 3)), lambda: nn.BatchNorm2d(6), True),
    Case("BatchNorm3d", lambda: rn.BatchNorm3d(6), VOLUME, standardize((0, 2, 3, 4)), lambda: nn.BatchNorm3d(6), True),
    Case(
        "BatchNorm2d-cumulative",
        lambda: rn.BatchNorm2d(6, momentum=None),
        IMAGE,
        standardize((0, 2, 3)),
        lambda: nn.BatchNorm2d(6, momentum=None),
        True,
    ),
    Case(
        "BatchNorm2d-plain",
        lambda: rn.BatchNorm2d(6, affine=False, track_running_stats=False),
        IMAGE,
        standardize((0, 2, 3)),
        lambda: nn.BatchNorm2d(6, affine=False, track_running_stats=False),
        True,
        NO_STATISTICS,
    ),
    Case(
        "BatchNorm2d-no-bias",
        lambda: rn.BatchNorm2d(6, bias=False),
        IMAGE,
        standardize((0, 2, 3)),
        lambda: nn.BatchNorm2d(6, bias=False),
        True,
    ),
    Case("BatchNorm-last", lambda: rn.BatchNorm(7, axis=-1), IMAGE, standardize((0, 1, 2), along=(3,)), None, True),
    Case("BatchNorm-axis-2", lambda: rn.BatchNorm(4, axis=2), IMAGE, standardize((0, 1, 3), along=(2,)), None, True),
    Case("InstanceNorm1d", lambda: rn.InstanceNorm1d(6), SEQUENCE, standardize((2,)), lambda: nn.InstanceNorm1d(6)),
    Case("InstanceNorm2d", lambda: rn.InstanceNorm2d(6), IMAGE, standardize((2, 3)), lambda: nn.InstanceNorm2d(6)),
    Case("InstanceNorm3d", lambda: rn.InstanceNorm3d(6), VOLUME, standardize((2, 3, 4)), lambda: nn.InstanceNorm3d(6)),
    Case("RevIN", lambda: rn.RevIN(6), SEQUENCE, standardize((2,))),
    Case("RevIN-last-axis", lambda: rn.RevIN(9, axis=-1), SEQUENCE, standardize((1,), along=(2,))),
    Case("RevIN-subtract-last", lambda: rn.RevIN(6, subtract_last=True), SEQUENCE, about_the_last),
    Case(
        "InstanceNorm2d-tracked",
        lambda: rn.InstanceNorm2d(6, affine=True, track_running_stats=True),
        IMAGE,
        standardize((2, 3)),
        lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
    ),
    Case("LayerNorm", lambda: rn.LayerNorm(9), SEQUENCE, standardize((2,), along=(2,)), lambda: nn.LayerNorm(9)),
    Case(
        "LayerNorm-CHW",
        lambda: rn.LayerNorm((6, 4, 7)),
        IMAGE,
        standardize((1, 2, 3), along=(1, 2, 3)),
        lambda: nn.LayerNorm((6, 4, 7)),
    ),
    Case(
        "LayerNorm-no-bias",
        lambda: rn.LayerNorm(9, bias=False),
        SEQUENCE,
        standardize((2,), along=(2,)),
        lambda: nn.LayerNorm(9, bias=False),
    ),
    Case(
        "RMSNorm",
        lambda: rn.RMSNorm(9, eps=1e-6),
        SEQUENCE,
        standardize((2,), eps=1e-6, along=(2,), about_zero=True),
        lambda: nn.RMSNorm(9, eps=1e-6),
    ),
    Case("GroupNorm", lambda: rn.GroupNorm(3, 6), IMAGE, grouped(3), lambda: nn.GroupNorm(3, 6)),
    Case("GroupNorm-1", lambda: rn.GroupNorm(1, 6), IMAGE, standardize((1, 2, 3)), lambda: nn.GroupNorm(1, 6)),
    Case("GroupNorm-C", lambda: rn.GroupNorm(6, 6), IMAGE, standardize((2, 3)), lambda: nn.GroupNorm(6, 6)),
    Case("GroupNorm-NC", lambda: rn.GroupNorm(3, 24), (7, 24), grouped(3), lambda: nn.GroupNorm(3, 24)),
    Case("GroupNorm-3d", lambda: rn.GroupNorm(2, 6), VOLUME, grouped(2), lambda: nn.GroupNorm(2, 6)),
    Case("SwitchNorm1d", lambda: rn.SwitchNorm1d(6), VECTOR, switched(("layer", "batch")), None, True),
    Case("SwitchNorm2d", lambda: rn.SwitchNorm2d(6), IMAGE, switched(("instance", "layer", "batch")), None, True),
    Case("SwitchNorm3d", lambda: rn.SwitchNorm3d(6), VOLUME, switched(("instance", "layer", "batch")), None, True),
    Case("Norm-layer-over-channels", lambda: rn.Norm("n [c] ...", c=6), IMAGE, standardize((1,))),
    Case("Norm-layer-of-images", lambda: rn.Norm("n [c ...]", c=6), IMAGE, standardize((1, 2, 3))),
    Case(
        "Norm-rms-of-images",
        lambda: rn.Norm("n [c ...]", center=False, bias=False, c=6),
        IMAGE,
        standardize((1, 2, 3), about_zero=True),
    ),
    Case(
        "Norm-batch-per-step",
        lambda: rn.Norm("t [n] c", c=9, t=5, running="t c"),
        SEQUENCE,
        standardize((1,), along=(2,)),
        None,
        True,
        {
            "empty": "the steps have running statistics of their own, so there must be 5",
            "evaluation": "the first dimension is time, not samples",
            "compile_dynamic": "the number of steps is fixed",
            "export": "the number of steps is fixed",
        },
    ),
    Case(
        "Norm-ghost",
        lambda: rn.Norm("(k [b]) c [...]", b=2, c=6),
        (6, 6, 4, 7),
        ghost(2),
        None,
        True,
        {
            "evaluation": "one sample is not a multiple of the ghost batch",
            "compile_dynamic": "not every batch size is a multiple of the ghost batch",
            "export": "not every batch size is a multiple of the ghost batch",
        },
    ),
    Case(
        "Norm-instance-linear",
        lambda: rn.Norm("n c [...]", c=6, recover="linear"),
        IMAGE,
        recovered((2, 3), lambda y, r: y.movedim(1, -1) @ r.weight.double().T + r.bias.double()),
    ),
    Case(
        "Norm-layer-mlp",
        lambda: rn.Norm("n [c] ...", c=6, recover="mlp"),
        IMAGE,
        recovered((1,), two_layers),
    ),
    Case(
        "Norm-group-linear",
        lambda: rn.Norm("n (g [c]) [...]", g=1, c=6, recover="linear"),
        IMAGE,
        recovered((1, 2, 3), lambda y, r: y.movedim(1, -1) @ r.weight.double().T + r.bias.double()),
    ),
    Case(
        "Norm-batch-module",
        lambda: rn.Norm("[n] c [...]", c=6, recover=nn.PReLU(6)),
        IMAGE,
        recovered((0, 2, 3), lambda y, r: torch.where(y > 0, y, y * r.weight.double().view(-1, 1, 1)).movedim(1, -1)),
        None,
        True,
        {"half_with_float32_parameters": "the module decides, and torch's PReLU refuses mixed dtypes"},
    ),
]
