"""How the measures read a distribution: as the masses of finitely many outcomes, and their logarithms."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, OneHotCategorical

from renorm.errors import MeasureError
from renorm.kernels.moments import statistics_dtype

__all__ = [
    "FINITE",
    "Kind",
    "both_finite",
    "check_given",
    "check_samples",
    "floating",
    "read",
    "result_dtype",
]

Kind = Literal["probs", "logits", "samples", "distribution"]
KINDS = ("probs", "logits", "samples", "distribution")
FINITE = (Bernoulli, Categorical, OneHotCategorical)  # read as probabilities: torch's log_prob is never -inf


def check_given(given: Any, number: int) -> tuple[Any, ...]:
    """What each argument is."""
    kinds = tuple(given) if isinstance(given, (tuple, list)) else (given,) * number
    if len(kinds) != number or any(kind not in KINDS for kind in kinds):
        pair = "" if number == 1 else " or a pair of them"
        raise MeasureError(f"given must be one of {', '.join(map(repr, KINDS))}{pair}; got {given!r}")
    if len(set(kinds)) > 1 and not set(kinds) <= {"probs", "logits"}:
        raise MeasureError(f"only 'probs' and 'logits' go together in one pair; got {given!r}")
    return kinds


# Distributions over finitely many outcomes, as pairs of masses and their logarithms along the last dimension.


def read(given: Sequence[Any], kinds: tuple[Kind, ...], dim: int) -> tuple[list[tuple[Tensor, Tensor]], torch.dtype]:
    """(mass, log) of each, of sizes that match, and the dtype of the result."""
    if kinds[0] == "samples":
        dtype = _common([floating(values) for values in given])
        return [(mass, _log(mass)) for mass in _counted(given)], dtype
    tensors = [_tensor(values, kind, dim) for values, kind in zip(given, kinds, strict=True)]
    found = [
        _of_logits(values) if kind == "logits" else _of_probs(values)
        for values, kind in zip(tensors, kinds, strict=True)
    ]
    if len({mass.shape[-1] for mass, _ in found}) > 1:
        raise MeasureError(
            f"p and q must have equally many outcomes; got {[mass.shape[-1] for mass, _ in found]}: write a "
            "probability of 0 (a logit of -inf) for what one of them cannot give"
        )
    return found, _common(tensors)


def floating(values: Any) -> Tensor:
    """A tensor of floating point numbers."""
    if isinstance(values, Distribution):
        raise MeasureError(f"got a {type(values).__name__}: write given='distribution'")
    made = torch.as_tensor(values)
    if made.is_complex():
        raise MeasureError(f"probabilities, logits and points must be real; got {made.dtype}: write torch.view_as_real")
    return made if made.is_floating_point() else made.to(torch.get_default_dtype())


def result_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype that holds all of these, float32 at least."""
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


def both_finite(p: Any, q: Any) -> bool:
    """Whether two torch distributions are of one kind, over finitely many outcomes."""
    return isinstance(_checked(p), FINITE) and type(p) is type(_checked(q))


def _checked(values: Any) -> Distribution:
    if not isinstance(values, Distribution):
        raise MeasureError(f"given='distribution' means an object of torch.distributions; got {type(values).__name__}")
    return values


def _common(tensors: list[Tensor]) -> torch.dtype:
    return result_dtype(*[values.dtype for values in tensors])


def _tensor(values: Any, kind: Kind, dim: int) -> Tensor:
    """Probabilities or logits, with those of one distribution along the last dimension."""
    if kind == "distribution":
        probs: Tensor = values.probs
        return torch.stack([1 - probs, probs], -1) if isinstance(values, Bernoulli) else probs
    made = floating(values)
    if not -made.dim() <= dim < made.dim():
        raise MeasureError(f"dim={dim} is not a dimension of a tensor of shape {tuple(made.shape)}")
    return made.movedim(dim, -1)


def _of_probs(probs: Tensor) -> tuple[Tensor, Tensor]:
    mass = probs.to(statistics_dtype(probs))
    off = (mass.sum(-1) - 1).abs()
    # A row of a softmax in half precision is off by that precision.
    allowed = max(1e-5, 8 * torch.finfo(probs.dtype).eps)
    if not ((mass >= 0).all() and (off <= allowed).all()):  # NaN fails both
        came = ""
        if mass.numel():
            came = f"; got {mass.min().item():.3g} at least, and sums off by up to {off.max().item():.3g}"
        raise MeasureError(
            f"probabilities must not be negative and must sum to 1{came}: write p / p.sum(dim, keepdim=True) for "
            "weights, given='logits' for logits, or another dim"
        )
    return mass, _log(mass)


def _of_logits(logits: Tensor) -> tuple[Tensor, Tensor]:
    log = logits.to(statistics_dtype(logits)).log_softmax(-1)
    if logits.shape[-1] == 0 or log.isnan().any():
        raise MeasureError(
            "logits must be numbers or -inf, one of each row at least a number; got NaN, inf or no entry"
        )
    return log.exp(), log


def _log(mass: Tensor) -> Tensor:
    """The logarithm, -inf without a gradient where the mass is 0."""
    return torch.where(mass > 0, torch.where(mass > 0, mass, 1).log(), -math.inf)


def _counted(given: Sequence[Any]) -> list[Tensor]:
    """The share of each value that occurs in any of the samples, in each of them."""
    samples = [torch.as_tensor(values) for values in given]
    for values in samples:
        check_samples(values)
    if len({values.shape[1:] for values in samples}) > 1:
        raise MeasureError(f"samples must have equally many dimensions; got {[tuple(v.shape) for v in samples]}")
    _, which = torch.unique(torch.cat(samples), dim=0, return_inverse=True)
    sizes = [len(values) for values in samples]
    counts = [torch.bincount(part, minlength=int(which.max()) + 1) for part in which.split(sizes)]
    return [count.to(statistics_dtype(count)) / size for count, size in zip(counts, sizes, strict=True)]


def check_samples(values: Tensor) -> None:
    """Refuse what is not one finite point or more."""
    if values.dim() not in (1, 2) or values.numel() == 0:
        raise MeasureError(f"samples must have the shape (n,) or (n, d) and not be empty; got {tuple(values.shape)}")
    if values.is_floating_point() and not values.isfinite().all():
        raise MeasureError("samples and points must be finite; some are NaN or infinite: leave these out")
