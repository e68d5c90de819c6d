"""The Wasserstein distance: exact on a line and by POT in space, and sliced; see `renorm.measures.divergences`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from renorm.errors import BackendError, MeasureError
from renorm.kernels.moments import statistics_dtype
from renorm.measures.reading import Kind, both_finite, check_given, check_samples, floating, read, result_dtype

__all__ = ["sliced_wasserstein", "wasserstein"]


def wasserstein(p: Any, q: Any, *, given: Kind, order: float = 1.0, support: Any = None, dim: int = -1) -> Tensor:
    r"""The Wasserstein distance of order r: the least cost of moving the mass of p to where q has it.

    $$W_r(p, q) = \Big( \inf_{\gamma \in \Pi(p, q)} \mathbb{E}_{(x, y) \sim \gamma} \|x - y\|_2^r \Big)^{1/r}
    \qquad \text{in one dimension} \qquad
    \Big( \int_0^1 |F_p^{-1}(u) - F_q^{-1}(u)|^r \, du \Big)^{1/r}$$

    Args:
        p: one distribution, as `given` says: samples (n,) or (n, d); probabilities or logits of the points in
            `support`; a torch distribution of one dimension that has ``icdf``.
        q: the other one; its number of samples may differ.
        given: what both are, see the module.
        order: r, at least 1.
        support: the points (K,) or (K, d) that probabilities or logits belong to; 0 to K - 1 for a Categorical.
        dim: along which the probabilities or logits of one distribution lie.

    Its unit is that of the points. Exact in one dimension (for densities up to the quadrature over u, about 1e-6 of
    it, 1e-5 where the tails are heavy) and, by POT's network simplex, in more: O(n^3), see `sliced_wasserstein`.
    Differentiable by points, probabilities and parameters, also between disjoint supports; where the distance is 0 the
    gradient is.

    Raises MeasureError for what is no distribution, points that are not finite, an order below 1, a missing `support`,
    and tails so heavy that the integral is infinite or cannot be told from it: of Cauchy's, for one, unless only their
    places differ. BackendError without POT where it is needed. Villani 2009, "Optimal Transport: Old and New".

    >>> wasserstein(torch.tensor([0.0, 1.0]), torch.tensor([5.0, 6.0]), given="samples")
    tensor(5.)
    >>> x = torch.tensor([0.0, 1.0, 3.0])
    >>> wasserstein(torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.0, 0.5, 0.5]), given="probs", support=x)
    tensor(1.5000)
    """
    (kind,) = check_given(given, 1)
    _check_order(order)
    if kind == "samples":
        x, y, dtype = _points(p, q)
        weights = [torch.full((len(points),), 1 / len(points), dtype=x.dtype, device=x.device) for points in (x, y)]
        return _transport(x, weights[0], y, weights[1], order).to(dtype)
    if kind == "distribution" and not both_finite(p, q):
        return _quantile_distance(p, q, order)
    ((p_mass, _), (q_mass, _)), dtype = read([p, q], (kind, kind), dim)
    if support is None and isinstance(p, Distribution):
        support = torch.arange(p_mass.shape[-1], device=p_mass.device)
    if support is None:
        raise MeasureError(f"the Wasserstein distance of {kind} needs the points they belong to: write support=points")
    points, _, points_dtype = _points(support, support)
    if len(points) != p_mass.shape[-1]:
        raise MeasureError(
            f"support must have one point for each of the {p_mass.shape[-1]} probabilities; it has {len(points)}"
        )
    points = points.to(p_mass.dtype)
    p_mass, q_mass = torch.broadcast_tensors(p_mass, q_mass)  # type: ignore[no-untyped-call]
    return _transport(points, p_mass, points, q_mass, order).to(torch.promote_types(dtype, points_dtype))


def sliced_wasserstein(
    x: Any, y: Any, *, order: float = 1.0, num_projections: int = 128, generator: torch.Generator | None = None
) -> Tensor:
    r"""The sliced Wasserstein distance of samples: the mean over directions of the distance along each.

    $$SW_r(p, q) = \Big( \mathbb{E}_{\theta} \, W_r(\theta^\top x, \theta^\top y)^r \Big)^{1/r}, \qquad
    \theta \text{ uniform on the unit sphere}$$

    Args:
        x: samples (n, d).
        y: samples (m, d).
        order: r, at least 1.
        num_projections: how many directions are drawn.
        generator: draws them; torch's global one where there is none.

    O(n log n) for each direction, differentiable; in one dimension equal to `wasserstein`, otherwise at most that.
    Raises MeasureError as `wasserstein` does. Bonneel et al. 2015, "Sliced and Radon Wasserstein Barycenters".

    >>> x = torch.zeros(10, 3)
    >>> sliced_wasserstein(x, x + 2, order=2, generator=torch.Generator().manual_seed(0)) < 2 * 3 ** 0.5
    tensor(True)
    """
    _check_order(order)
    if num_projections < 1:
        raise MeasureError(f"num_projections must be at least 1; got {num_projections}")
    x, y, dtype = _points(x, y)
    x, y = x.reshape(len(x), -1), y.reshape(len(y), -1)
    directions = torch.randn(x.shape[1], num_projections, generator=generator, dtype=torch.float64)
    directions = (directions / torch.linalg.vector_norm(directions, dim=0)).to(x)
    sides = [(points @ directions).T for points in (x, y)]
    weights = [torch.full_like(side, 1 / side.shape[1]) for side in sides]
    along = _along_a_line(sides[0], weights[0], sides[1], weights[1], order)
    return _power_mean(along, torch.full_like(along, 1 / num_projections), order).to(dtype)


def _check_order(order: float) -> None:
    if not (order >= 1 and math.isfinite(order)):
        raise MeasureError(f"the order of a Wasserstein distance must be at least 1 and finite; got {order!r}")


def _points(x: Any, y: Any) -> tuple[Tensor, Tensor, torch.dtype]:
    """Two sets of points in the dtype to compute with, and the dtype of the result."""
    x, y = floating(x), floating(y)
    for points in (x, y):
        check_samples(points)
    if x.shape[1:] != y.shape[1:]:
        raise MeasureError(f"samples must have equally many dimensions; got {tuple(x.shape)} and {tuple(y.shape)}")
    dtype = torch.promote_types(x.dtype, y.dtype)
    wide = statistics_dtype(x.to(dtype))
    return x.to(wide), y.to(wide), result_dtype(dtype)


def _transport(x: Tensor, x_weight: Tensor, y: Tensor, y_weight: Tensor, order: float) -> Tensor:
    """The distance of points (n,) or (n, d) with weights (..., n)."""
    x_weight, y_weight = (weight / weight.sum(-1, keepdim=True) for weight in (x_weight, y_weight))
    if x.dim() == 1 or x.shape[1] == 1:
        x, y = x.reshape(-1), y.reshape(-1)
        return _along_a_line(x.expand_as(x_weight), x_weight, y.expand_as(y_weight), y_weight, order)
    rows = zip(x_weight.reshape(-1, len(x)), y_weight.reshape(-1, len(y)), strict=True)
    return torch.stack([_in_space(x, one, y, other, order) for one, other in rows]).reshape(x_weight.shape[:-1])


def _along_a_line(x: Tensor, x_weight: Tensor, y: Tensor, y_weight: Tensor, order: float) -> Tensor:
    """The integral over the quantiles, all (..., n) and (..., m): constant between the steps of either side."""
    sides = []
    for points, weight in ((x, x_weight), (y, y_weight)):
        ordered, index = points.sort(-1)
        sides.append((ordered, weight.gather(-1, index).cumsum(-1)))
    steps = torch.cat([upto for _, upto in sides], -1).sort(-1).values
    width = steps.diff(dim=-1, prepend=torch.zeros_like(steps[..., :1]))
    at = [
        ordered.gather(-1, torch.searchsorted(upto.detach(), steps.detach()).clamp(max=ordered.shape[-1] - 1))
        for ordered, upto in sides
    ]
    return _power_mean((at[0] - at[1]).abs(), width, order)


def _in_space(x: Tensor, x_weight: Tensor, y: Tensor, y_weight: Tensor, order: float) -> Tensor:
    try:
        import ot
    except ImportError as error:
        raise BackendError(
            "the Wasserstein distance in more than one dimension needs POT: pip install 'renorm[measures]', "
            "or write sliced_wasserstein(x, y)"
        ) from error
    size = _or_one(torch.cat([x, y]).detach().abs().max())  # whose square may overflow
    distance = torch.cdist(x / size, y / size, compute_mode="donot_use_mm_for_euclid_dist")
    scale = _or_one(distance.detach().max())  # powers of what is at most 1 do not overflow
    cost = (distance / scale) ** order
    total = ot.emd2(*(tensor.cpu().double() for tensor in (x_weight, y_weight, cost)), numItermax=10_000_000)
    return size * scale * _root(total.to(cost).clamp(min=0), order)


def _power_mean(distance: Tensor, weight: Tensor, order: float) -> Tensor:
    """(sum w d^r)^(1/r) along the last dimension; nothing overflows, and where it is 0 so is its gradient."""
    scale = _or_one(distance.detach().amax(-1))
    return scale * _root((weight * (distance / scale[..., None]) ** order).sum(-1), order)


def _or_one(scale: Tensor) -> Tensor:
    """A scale to divide by."""
    return torch.where(scale > 0, scale, 1)


def _root(total: Tensor, order: float) -> Tensor:
    some = total > 0
    return torch.where(some, torch.where(some, total, 1) ** (1 / order), 0)


def _quantile_distance(p: Distribution, q: Distribution, order: float) -> Tensor:
    """The integral over u of the distance of the quantiles, by the trapezoidal rule in the log-odds of u.

    There the weight u (1 - u) falls off exponentially on both sides, whatever the tails of p and q: the rule converges
    faster than any power of the step, but for corners, where the two quantiles are equal.
    """
    odds = torch.linspace(-36, 36, 14401, dtype=torch.float64)  # at 36, 1 - u is the last bit of a float64
    levels = torch.sigmoid(odds)
    weight = levels * torch.sigmoid(-odds) * (odds[1] - odds[0])
    weight = weight / weight.sum()
    (x, x_dtype), (y, y_dtype) = (_quantiles(distribution, levels) for distribution in (p, q))
    apart, weight = (x - y).abs(), weight.to(x.device)
    distance = _power_mean(apart, weight, order)
    # Nothing is seen of what the tails have beyond 36; it is less than what they have from 30, 1e-13 of the mass, on.
    outer = _power_mean(apart, weight * (odds.abs() > 30).to(weight), order)
    if (outer > 1e-4 ** (1 / order) * distance).any():
        raise MeasureError(
            f"the tails must be lighter for a Wasserstein distance of order {order:g}; between {type(p).__name__} and "
            f"{type(q).__name__} it is infinite, or cannot be told from that: write a lower order, or "
            "js(p, q, given='distribution', num_samples=100_000), which is finite"
        )
    return distance.to(result_dtype(x_dtype, y_dtype))


def _quantiles(p: Distribution, levels: Tensor) -> tuple[Tensor, torch.dtype]:
    """Those of all levels along the last dimension, and the dtype of the distribution itself."""
    missing = MeasureError(
        f"the Wasserstein distance needs distributions of one dimension that have icdf; {type(p).__name__} has none: "
        "draw from both, wasserstein(p.rsample((n,)), q.rsample((n,)), given='samples')"
    )
    if p.event_shape:
        raise missing
    try:
        median = p.icdf(torch.tensor(0.5))
        levels = levels.to(median.device).reshape(-1, *[1] * len(p.batch_shape))
        return p.icdf(levels).movedim(0, -1), median.dtype
    except NotImplementedError:  # of torch, where a distribution has none
        raise missing from None
