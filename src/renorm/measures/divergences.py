"""Entropy and the distances of two distributions: cross-entropy, Kullback-Leibler, Jensen-Shannon, Wasserstein.

What is handed over is said by the keyword `given`, once for both or as a pair such as ``("probs", "logits")``:

| given | a distribution is |
|---|---|
| probs | a tensor that sums to 1 along `dim` |
| logits | a tensor whose softmax along `dim` is meant; an entry of minus infinity has probability 0 |
| samples | a tensor (n,) or (n, d) of n observations, each with probability 1/n |
| distribution | an object of `torch.distributions` |

Logarithms are to the `base`: e gives nats, 2 gives bits. Limits are taken, 0 log 0 = 0, so that a value is inf where
the quantity is and NaN nowhere. Gradients are finite, too: an infinite value has gradient 0, and so has an entry of
probability 0 where its derivative is infinite: behind a softmax, whose own derivative is 0 there, it is the limit.

Sums are in float64 where the device has it. The result has the dtype of the input, float32 for half precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Uniform, kl_divergence

from renorm.errors import MeasureError
from renorm.measures.reading import Kind, both_finite, check_given, read
from renorm.measures.transport import sliced_wasserstein, wasserstein

__all__ = [
    "Apart",
    "cross_entropy",
    "entropy",
    "js",
    "kl",
    "moving_apart",
    "sliced_wasserstein",
    "wasserstein",
]


def entropy(p: Any, *, given: Kind, base: float = math.e, dim: int = -1, num_samples: int | None = None) -> Tensor:
    r"""The entropy H(p): how much an outcome of p tells, on average.

    $$H(p) = -\sum_i p_i \log p_i$$

    Args:
        p: one distribution or many, as `given` says.
        given: what `p` is, see the module.
        base: of the logarithm; e for nats, 2 for bits.
        dim: of `p` along which the probabilities or logits of one distribution lie.
        num_samples: to draw from a torch distribution whose entropy torch does not know, for an estimate.

    For samples it is the entropy of the values seen, at most log n: bin continuous ones first. For a density it is
    the differential entropy, which can be negative. Raises MeasureError for what is no distribution, and where draws
    are needed and `num_samples` is not given. Shannon 1948, "A Mathematical Theory of Communication".

    >>> entropy(torch.tensor([0.5, 0.5, 0.0]), given="probs", base=2)
    tensor(1.)
    """
    (kind,), unit = check_given(given, 1), _unit(base)
    if kind == "distribution" and not both_finite(p, p):
        return _density_entropy(p, num_samples) / unit
    ((p_mass, p_log),), dtype = read([p], (kind,), dim)
    return (_expected(_positive(p_mass), -p_log) / unit).clamp(min=0).to(dtype)  # -0 and rounding


def cross_entropy(
    p: Any,
    q: Any,
    *,
    given: Kind | tuple[Kind, Kind],
    base: float = math.e,
    dim: int = -1,
    num_samples: int | None = None,
) -> Tensor:
    r"""The cross-entropy H(p, q): the length of a code for p that was made for q.

    $$H(p, q) = -\sum_i p_i \log q_i = H(p) + D_{KL}(p \| q)$$

    Args:
        p: the true distribution, as `given` says; broadcast against `q`.
        q: the predicted one.
        given: what `p` and `q` are, see the module; a pair where they differ.
        base: of the logarithm; e for nats, 2 for bits.
        dim: along which the probabilities or logits of one distribution lie.
        num_samples: to draw from torch distributions without a closed form, for an estimate.

    It is inf where q is 0 and p is not. Raises MeasureError as `entropy` does, and for sizes that do not match.
    Shannon 1948, "A Mathematical Theory of Communication".

    >>> p, q = torch.tensor([1.0, 0.0]), torch.tensor([0.25, 0.75])
    >>> cross_entropy(p, q, given="probs", base=2)
    tensor(2.)
    >>> cross_entropy(p, torch.tensor([0.0, 0.0]), given=("probs", "logits"), base=2)
    tensor(1.)
    """
    kinds, unit = check_given(given, 2), _unit(base)
    if kinds[0] == "distribution" and not both_finite(p, q):
        return _density_cross_entropy(p, q, num_samples) / unit
    ((p_mass, _), (_, q_log)), dtype = read([p, q], kinds, dim)
    return (_expected(p_mass, -q_log) / unit).to(dtype)


def kl(
    p: Any,
    q: Any,
    *,
    given: Kind | tuple[Kind, Kind],
    base: float = math.e,
    dim: int = -1,
    num_samples: int | None = None,
) -> Tensor:
    r"""The Kullback-Leibler divergence of p from q, also called relative entropy; not symmetric.

    $$D_{KL}(p \| q) = \sum_i p_i \log \frac{p_i}{q_i}$$

    Args:
        p: the true distribution, as `given` says; broadcast against `q`.
        q: the predicted one.
        given: what `p` and `q` are, see the module; a pair where they differ.
        base: of the logarithm; e for nats, 2 for bits.
        dim: along which the probabilities or logits of one distribution lie.
        num_samples: to draw from torch distributions without a closed form, for an estimate.

    It is inf where q is 0 and p is not: between disjoint supports, and so between most samples of densities. Raises
    MeasureError as `cross_entropy` does. Kullback & Leibler 1951, "On Information and Sufficiency".

    >>> p, q = torch.tensor([1.0, 0.0]), torch.tensor([0.25, 0.75])
    >>> kl(p, q, given="probs", base=2), kl(q, p, given="probs", base=2)
    (tensor(2.), tensor(inf))
    """
    kinds, unit = check_given(given, 2), _unit(base)
    if kinds[0] == "distribution" and not both_finite(p, q):
        return _density_kl(p, q, num_samples) / unit
    ((p_mass, p_log), (_, q_log)), dtype = read([p, q], kinds, dim)
    ratio = _finite(p_log) - q_log
    return (_expected(_positive(p_mass), ratio) / unit).clamp(min=0).to(dtype)  # rounding alone takes it below


def js(
    p: Any,
    q: Any,
    *,
    given: Kind | tuple[Kind, Kind],
    base: float = math.e,
    dim: int = -1,
    num_samples: int | None = None,
) -> Tensor:
    r"""The Jensen-Shannon divergence: symmetric, between 0 and log 2; its square root is a metric.

    $$JS(p, q) = \tfrac12 D_{KL}(p \| m) + \tfrac12 D_{KL}(q \| m), \qquad m = \tfrac12 (p + q)$$

    Args:
        p: one distribution, as `given` says; broadcast against `q`.
        q: the other one.
        given: what `p` and `q` are, see the module; a pair where they differ.
        base: of the logarithm; e for nats, 2 for bits, in which it is at most 1.
        dim: along which the probabilities or logits of one distribution lie.
        num_samples: to draw from each of two torch distributions, for an estimate.

    It is log 2 between disjoint supports. Raises MeasureError as `cross_entropy` does.
    Lin 1991, "Divergence Measures Based on the Shannon Entropy".

    >>> js(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), given="probs", base=2)
    tensor(1.)
    """
    kinds, unit = check_given(given, 2), _unit(base)
    if kinds[0] == "distribution" and not both_finite(p, q):
        return (_density_js(p, q, num_samples) / unit).clamp(0, math.log(2) / unit)
    ((p_mass, p_log), (q_mass, q_log)), dtype = read([p, q], kinds, dim)
    p_mass, q_mass = _positive(p_mass), _positive(q_mass)
    middle = (p_mass + q_mass) / 2
    middle_log = torch.where(middle > 0, middle, 1).log()  # where it is 0, so are both masses
    apart = [
        (mass * torch.where(mass > 0, log - middle_log, 0)).sum(-1)
        for mass, log in ((p_mass, _finite(p_log)), (q_mass, _finite(q_log)))
    ]
    return ((apart[0] + apart[1]) / 2 / unit).clamp(0, math.log(2) / unit).to(dtype)


@dataclass(frozen=True)
class Apart:
    """How far two equal uniform distributions are from each other, and which way each distance pulls."""

    shift: Tensor  # (n,): by how much the second one is moved, in widths of one
    distance: dict[str, Tensor]  # "kl", "js" (in the unit of the base) and "wasserstein" (in widths), each (n,)
    gradient: dict[str, Tensor]  # the derivative of each by the shift, (n,); 0 where the distance is infinite


def moving_apart(shifts: Sequence[float] | Tensor, *, base: float = math.e) -> Apart:
    r"""Why KL and JS do not pull disjoint distributions together and Wasserstein does, as numbers to plot.

    $$p = U(0, 1), \quad q = U(s, 1 + s): \qquad
    KL = \infty \;(s \ne 0), \qquad JS = \min(|s|, 1) \log 2, \qquad W_1 = |s|$$

    Args:
        shifts: the values of s.
        base: of the logarithm; e for nats, 2 for bits.

    The distances are what `kl`, `js` and `wasserstein` of this module give, the gradients autograd's: that of JS ends
    where the two no longer overlap, |s| > 1. Raises MeasureError for shifts that are not finite.
    Arjovsky et al. 2017, "Wasserstein GAN" (arXiv:1701.07875), example 1, has the same for two points.

    >>> found = moving_apart([0.5, 2.0], base=2)
    >>> {name: values.round(decimals=6).tolist() for name, values in found.distance.items()}
    {'kl': [inf, inf], 'js': [0.5, 1.0], 'wasserstein': [0.5, 2.0]}
    >>> {name: values.round(decimals=6).tolist() for name, values in found.gradient.items()}
    {'kl': [0.0, 0.0], 'js': [1.0, 0.0], 'wasserstein': [1.0, 1.0]}
    """
    s = torch.as_tensor(shifts, dtype=torch.float64).detach().clone().requires_grad_()
    if s.dim() != 1 or not s.isfinite().all():
        raise MeasureError(f"shifts must be a list of finite numbers; got {shifts!r}")
    # Both densities are constant between two of these edges, so the masses there say all that KL and JS depend on.
    zero = torch.zeros_like(s)
    edges = torch.stack([zero, zero + 1, s, s + 1], -1).sort(-1).values
    left, right = edges[:, :-1], edges[:, 1:]
    masses = [torch.where((left >= low[:, None]) & (right <= low[:, None] + 1), right - left, 0) for low in (zero, s)]
    distance = {
        "kl": kl(*masses, given="probs", base=base),
        "js": js(*masses, given="probs", base=base),
        "wasserstein": wasserstein(Uniform(zero, zero + 1), Uniform(s, s + 1), given="distribution"),
    }
    gradient = {name: torch.autograd.grad(value.sum(), s, retain_graph=True)[0] for name, value in distance.items()}
    return Apart(s.detach(), {name: value.detach() for name, value in distance.items()}, gradient)


def _unit(base: float) -> float:
    if not (base > 1 and math.isfinite(base)):
        raise MeasureError(f"the base of the logarithm must be above 1; got {base!r}: write base=math.e or base=2")
    return math.log(base)


def _positive(mass: Tensor) -> Tensor:
    """The same, without a gradient where it is 0."""
    return torch.where(mass > 0, mass, 0)


def _finite(log: Tensor) -> Tensor:
    """The same, 0 where it is infinite: for logarithms that a mass of 0 is multiplied with."""
    return torch.where(log.isinf(), 0, log)


def _expected(mass: Tensor, cost: Tensor) -> Tensor:
    """The mean of a cost that can be inf, where only what has a mass counts."""
    total = (mass * _finite(cost)).sum(-1)
    return torch.where(((mass > 0) & cost.isinf()).any(-1), math.inf, total)


# Distributions by their densities.


def _density_entropy(p: Distribution, num_samples: int | None) -> Tensor:
    try:
        return p.entropy()
    except NotImplementedError:
        return _estimated(p, lambda x, log: -log, num_samples, f"the entropy of {type(p).__name__}")


def _density_kl(p: Distribution, q: Distribution, num_samples: int | None) -> Tensor:
    try:
        return kl_divergence(p, q)
    except NotImplementedError:
        p, q = _same_batch(p, q)
        what = f"the divergence of {type(p).__name__} from {type(q).__name__}"
        return _estimated(p, lambda x, log: log - _log_density(q, x), num_samples, what)


def _density_cross_entropy(p: Distribution, q: Distribution, num_samples: int | None) -> Tensor:
    try:
        return p.entropy() + kl_divergence(p, q)
    except NotImplementedError:
        p, q = _same_batch(p, q)
        what = f"the cross-entropy of {type(p).__name__} and {type(q).__name__}"
        return _estimated(p, lambda x, log: -_log_density(q, x), num_samples, what)


def _density_js(p: Distribution, q: Distribution, num_samples: int | None) -> Tensor:
    p, q = _same_batch(p, q)
    what = f"the Jensen-Shannon divergence of {type(p).__name__} and {type(q).__name__}"

    def from_middle(own: Distribution, other: Distribution) -> Tensor:
        def cost(x: Tensor, log: Tensor) -> Tensor:
            return math.log(2) + log - torch.logaddexp(log, _log_density(other, x))

        return _estimated(own, cost, num_samples, what)

    return (from_middle(p, q) + from_middle(q, p)) / 2


def _same_batch(p: Distribution, q: Distribution) -> tuple[Distribution, Distribution]:
    if p.event_shape != q.event_shape:
        raise MeasureError(f"p and q must have equal event shapes; got {p.event_shape} and {q.event_shape}")
    shape = torch.broadcast_shapes(p.batch_shape, q.batch_shape)  # type: ignore[no-untyped-call]
    return p.expand(shape), q.expand(shape)


def _estimated(p: Distribution, cost: Callable[[Tensor, Tensor], Tensor], num_samples: int | None, what: str) -> Tensor:
    """The mean over draws x of p of a cost of (x, log p(x))."""
    if num_samples is None:
        raise MeasureError(f"torch has no formula for {what}: write num_samples=100_000 to estimate it from draws")
    if num_samples < 1:
        raise MeasureError(f"num_samples must be at least 1; got {num_samples}")
    x = p.rsample((num_samples,)) if p.has_rsample else p.sample((num_samples,))
    log = _log_density(p, x)
    real = log > -math.inf  # rounding takes a draw of Uniform to its upper end, where torch's density is 0
    mean = torch.where(real, cost(x, torch.where(real, log, 0)), 0).sum(0) / real.sum(0)
    # Draws without a gradient lack a part of that of the mean.
    return mean if p.has_rsample else mean.detach()


def _log_density(p: Distribution, x: Tensor) -> Tensor:
    """log p(x), -inf outside of the support, where torch raises."""
    inside = p.support.check(x)  # type: ignore[union-attr]
    entries = inside.reshape(inside.shape + (1,) * len(p.event_shape))
    known = p.sample(x.shape[:1])
    return torch.where(inside, p.log_prob(torch.where(entries, x, known)), -math.inf)
