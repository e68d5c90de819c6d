"""Entropy and divergences against SciPy and POT; limits and gradients at zeros and between disjoint supports."""

import math
import sys

import numpy as np
import ot
import pytest
import torch
from hypothesis import given as over
from hypothesis import strategies as st
from scipy import integrate, special, stats
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import (
    Bernoulli,
    Beta,
    Categorical,
    Cauchy,
    Exponential,
    Gamma,
    Laplace,
    MultivariateNormal,
    Normal,
    OneHotCategorical,
    Pareto,
    Poisson,
    Uniform,
)

from renorm.errors import BackendError, MeasureError
from renorm.measures.divergences import (
    cross_entropy,
    entropy,
    js,
    kl,
    moving_apart,
    sliced_wasserstein,
    wasserstein,
)

INF, LOG2 = math.inf, math.log(2)
rows = st.lists(st.integers(0, 5), min_size=6, max_size=6).filter(any)


def mass(counts):
    return torch.tensor(counts, dtype=torch.float64) / sum(counts)


def random_rows(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def near(actual, expected, tolerance=1e-12):
    np.testing.assert_allclose(np.asarray(actual.detach()), expected, rtol=tolerance, atol=tolerance)


# Values


@over(rows, rows, st.sampled_from([2, math.e, 10]))
def test_probabilities_with_zeros_give_what_scipy_gives(first, second, base):
    p, q = mass(first), mass(second)
    a, b, unit, given = p.numpy(), q.numpy(), math.log(base), "probs"
    near(entropy(p, given=given, base=base), stats.entropy(a, base=base))
    near(kl(p, q, given=given, base=base), special.rel_entr(a, b).sum() / unit)
    near(cross_entropy(p, q, given=given, base=base), -special.xlogy(a, b).sum() / unit)
    expected = (special.rel_entr(a, (a + b) / 2) + special.rel_entr(b, (a + b) / 2)).sum() / 2 / unit
    near(js(p, q, given=given, base=base), expected)
    assert 0 <= js(p, q, given=given, base=base) <= LOG2 / unit


def test_logits_give_what_their_softmax_gives():
    z, w = random_rows(3, 4, 5), random_rows(3, 4, 5, seed=1)
    z[0, 1, 2], w[0, 1, 2] = -INF, -INF
    p, q = z.softmax(1), w.softmax(1)
    for measure in (kl, js, cross_entropy):
        found = measure(z, w, given="logits", dim=1)
        assert found.shape == (3, 5)
        near(found, measure(p, q, given="probs", dim=1))
        near(measure(p, w, given=("probs", "logits"), dim=1), found)
        near(measure(z, q, given=("logits", "probs"), dim=1), found)
    near(entropy(z, given="logits", dim=1), entropy(p, given="probs", dim=1))


def test_logits_far_apart_do_not_overflow():
    z, w = torch.tensor([1e30, 0.0, -1e30]), torch.tensor([0.0, 1e4, 0.0])
    assert entropy(z, given="logits") == 0
    assert kl(z, w, given="logits") == cross_entropy(z, w, given="logits") == 1e4
    near(js(z, w, given="logits"), LOG2, 1e-7)


def test_cross_entropy_is_torchs_loss():
    z, labels = random_rows(6, 4, dtype=torch.float32), torch.tensor([0, 1, 2, 3, 0, 1])
    hot = torch.nn.functional.one_hot(labels)
    expected = torch.nn.functional.cross_entropy(z, labels, reduction="none")
    near(cross_entropy(hot, z, given=("probs", "logits")), expected, 1e-6)


def test_integers_lists_and_arrays_are_taken():
    assert entropy([1, 0], given="probs") == 0
    assert kl(np.array([1, 0]), np.array([0.25, 0.75]), given="probs", base=2).dtype == torch.float64
    assert js([1, 0], [0, 1], given="probs", base=2).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_more(dtype):
    z, w = (random_rows(50, 1000, seed=seed, dtype=dtype) for seed in (0, 1))
    for measure in (kl, js, cross_entropy):
        found = measure(z, w, given="logits")
        assert found.dtype == torch.float32
        near(found, measure(z.double(), w.double(), given="logits"), 1e-6)
    p = z.softmax(-1)
    near(entropy(p, given="probs"), entropy(p.double() / p.double().sum(-1, keepdim=True), given="probs"), 0.02)


def test_samples_are_their_empirical_distribution():
    x, y = torch.tensor([1, 1, 2, 5]), torch.tensor([1, 2, 2, 2, 2, 5])
    p, q = mass([2, 1, 1]), mass([1, 4, 1])
    near(entropy(x, given="samples"), entropy(p, given="probs"), 1e-6)
    for measure in (kl, js, cross_entropy):
        near(measure(x, y, given="samples"), measure(p, q, given="probs"), 1e-6)
    points = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    near(entropy(points, given="samples", base=2), stats.entropy([1 / 3, 2 / 3], base=2), 1e-6)
    continuous = random_rows(20), random_rows(30, seed=1)
    assert kl(*continuous, given="samples") == INF
    near(js(*continuous, given="samples", base=2), 1)


def test_one_outcome_and_no_row():
    one = torch.tensor([1.0])
    assert [entropy(one, given="probs"), kl(one, one, given="probs"), js(one, one, given="probs")] == [0, 0, 0]
    assert math.copysign(1, entropy(one, given="probs")) == 1
    assert entropy(torch.zeros(0, 3), given="probs").shape == (0,)
    assert kl(torch.zeros(0, 3), torch.ones(3) / 3, given="probs").shape == (0,)


def test_distributions_broadcast():
    p, q = random_rows(7, 1, 4).softmax(-1), random_rows(5, 4, seed=1).softmax(-1)
    assert kl(p, q, given="probs").shape == js(p, q, given="probs").shape == (7, 5)
    near(kl(p, q, given="probs")[3, 2], stats.entropy(p[3, 0], q[2]))


# Limits


def test_disjoint_supports():
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.0, 0.0, 1.0])
    assert kl(p, q, given="probs") == cross_entropy(p, q, given="probs") == INF
    assert js(p, q, given="probs", base=2) == 1
    z, w = p.log(), q.log()
    assert kl(z, w, given="logits") == cross_entropy(z, w, given="logits") == INF
    assert js(z, w, given="logits", base=2) == 1
    assert js(p, w, given=("probs", "logits"), base=2) == 1


@over(rows, rows)
def test_gradients_are_never_nan(first, second):
    for kind, z in (("probs", lambda m: m), ("logits", torch.log)):
        p, q = (z(mass(m)).requires_grad_() for m in (first, second))
        for measure in (kl, js, cross_entropy):
            value = measure(p, q, given=kind)
            assert not value.isnan()
            for gradient in torch.autograd.grad(value, (p, q)):
                assert gradient.isfinite().all()
                assert value != INF or (gradient == 0).all()
        (gradient,) = torch.autograd.grad(entropy(p, given=kind), p)
        assert gradient.isfinite().all()


def test_gradients_at_zero_where_they_are_defined():
    p = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64, requires_grad=True)
    of_p, of_q = torch.autograd.grad(cross_entropy(p, q, given="probs"), (p, q))
    near(of_p, -q.detach().log())  # linear in p: defined at p = 0, too
    near(of_q, -(p / q).detach())
    (of_q,) = torch.autograd.grad(kl(p, q, given="probs"), q)
    near(of_q, -(p / q).detach())


def test_gradients_behind_a_softmax_are_the_limit():
    for measure in (kl, js):
        gradients = []
        for low in (-INF, -60.0):
            z = torch.tensor([0.3, -1.0, low], dtype=torch.float64, requires_grad=True)
            w = torch.tensor([1.0, low, 0.5], dtype=torch.float64, requires_grad=True)
            pair = (z, w) if measure is js else (z, torch.tensor([1.0, 0.1, 0.5]).double().requires_grad_())
            through = measure(pair[0].softmax(-1), pair[1].softmax(-1), given="probs")
            gradients.append(torch.cat(torch.autograd.grad(through, pair)))
            near(torch.cat(torch.autograd.grad(measure(*pair, given="logits"), pair)), gradients[-1])
        near(gradients[0], gradients[1], 1e-10)


def test_derivatives_against_differences():
    z, w = random_rows(2, 4).requires_grad_(), random_rows(2, 4, seed=1).requires_grad_()
    for measure in (kl, js, cross_entropy):
        for check in (gradcheck, gradgradcheck):
            assert check(lambda a, b, m=measure: m(a, b, given="logits"), (z, w))
            assert check(lambda a, b, m=measure: m(a.softmax(-1), b.softmax(-1), given="probs"), (z, w))
    assert gradcheck(lambda a: entropy(a, given="logits", base=2), z)


# torch.distributions


def test_finite_distributions_are_read_as_probabilities():
    p, q = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    for made in (Categorical, OneHotCategorical):
        assert kl(made(p), made(q), given="distribution") == INF
        assert cross_entropy(made(p), made(q), given="distribution") == INF
        assert js(made(p), made(q), given="distribution", base=2) == 1
        assert entropy(made(p), given="distribution") == 0
    near(kl(Bernoulli(0.2), Bernoulli(0.7), given="distribution"), stats.entropy([0.8, 0.2], [0.3, 0.7]), 1e-6)
    assert js(Bernoulli(0.0), Bernoulli(1.0), given="distribution", base=2) == 1
    z = torch.tensor([0.5, -INF, 1.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(entropy(Categorical(logits=z), given="distribution"), z)
    assert gradient.isfinite().all()
    assert wasserstein(Categorical(p), Categorical(q), given="distribution") == 1


def test_closed_forms_and_draws_agree():
    p, q = Normal(torch.tensor([0.0, 1.0]), 1.0), Normal(0.5, 2.0)
    exact = kl(p, q, given="distribution")
    near(exact, LOG2 + (1 + np.array([0.25, 0.25])) / 8 - 0.5, 1e-6)
    near(cross_entropy(p, q, given="distribution"), p.entropy() + exact, 1e-6)
    assert kl(Uniform(0.0, 1.0), Uniform(2.0, 3.0), given="distribution") == INF
    torch.manual_seed(0)
    value = js(p, q, given="distribution", num_samples=200_000)
    densities = stats.norm(0, 1).pdf, stats.norm(0.5, 2).pdf

    def integrand(x):
        a, b = (f(x) for f in densities)
        return (special.rel_entr(a, (a + b) / 2) + special.rel_entr(b, (a + b) / 2)) / 2

    near(value[0], integrate.quad(integrand, -20, 20)[0], 5e-3)


def test_draws_where_torch_has_no_formula():
    torch.manual_seed(0)
    x = np.arange(100)
    poisson = stats.poisson(3.0).pmf(x)
    near(entropy(Poisson(3.0), given="distribution", num_samples=200_000), stats.entropy(poisson), 0.01)
    assert kl(Cauchy(0.0, 1.0), Normal(0.0, 1.0), given="distribution", num_samples=1000) > 1
    beta, gamma = Beta(2.0, 3.0), Gamma(2.0, 3.0)
    expected = -integrate.quad(lambda t: stats.beta(2, 3).pdf(t) * stats.gamma(2, scale=1 / 3).logpdf(t), 0, 1)[0]
    near(cross_entropy(beta, Laplace(0.0, 1.0), given="distribution", num_samples=200_000), LOG2 + 0.4, 0.01)
    near(kl(beta, gamma, given="distribution") + beta.entropy(), expected, 1e-5)


def test_draws_between_disjoint_densities():
    torch.manual_seed(0)
    low = torch.tensor(0.0, requires_grad=True)
    value = js(Uniform(low, low + 1), Uniform(2.0, 3.0), given="distribution", base=2, num_samples=1000)
    near(value, 1)
    assert torch.autograd.grad(value, low)[0] == 0
    # A draw at the upper end has density 0 for torch; it is left out.
    narrow = Uniform(torch.tensor(1.0), torch.tensor(1.0) + 2**-22)
    near(js(narrow, narrow, given="distribution", num_samples=100), 0)


def test_draws_are_differentiable_where_they_can_be():
    torch.manual_seed(0)
    shift = torch.tensor(0.3, requires_grad=True)
    value = kl(Laplace(shift, 1.0), Normal(0.0, 1.0), given="distribution", num_samples=100_000)
    near(torch.autograd.grad(value, shift)[0], 0.3, 0.02)  # d/dm of E[x^2]/2
    rate = torch.tensor(3.0, requires_grad=True)
    assert not entropy(Poisson(rate), given="distribution", num_samples=10).requires_grad


# Wasserstein


@over(
    st.lists(st.integers(-9, 9), min_size=1, max_size=9),
    st.lists(st.integers(-9, 9), min_size=1, max_size=9),
    st.sampled_from([1, 1.5, 2, 3]),
)
def test_samples_on_a_line(x, y, order):
    x, y = np.array(x, dtype=float), np.array(y, dtype=float)
    found = wasserstein(x, y, given="samples", order=order)
    if order == 1:
        near(found, stats.wasserstein_distance(x, y), 1e-9)
    near(found**order, ot.emd2_1d(x, y, metric="minkowski", p=order), 1e-9)


@over(rows, rows, st.sampled_from([1, 2]))
def test_probabilities_on_a_line(first, second, order):
    p, q = mass(first), mass(second)
    points = torch.tensor([3.0, -1.0, 0.5, 0.5, 7.0, 2.0], dtype=torch.float64)
    found = wasserstein(p, q, given="probs", support=points, order=order)
    if order == 1:
        near(found, stats.wasserstein_distance(points, points, p, q), 1e-9)
    cost = (points[:, None] - points).abs() ** order
    near(found**order, ot.emd2(p.numpy(), q.numpy(), cost.numpy()), 1e-9)
    near(wasserstein(p.log(), q.log(), given="logits", support=points, order=order), found.item(), 1e-9)


@pytest.mark.parametrize("order", [1, 2, 3.5])
def test_samples_in_space(order):
    x, y = random_rows(12, 3), random_rows(17, 3, seed=1) + 1
    found = wasserstein(x, y, given="samples", order=order)
    cost = np.linalg.norm(x.numpy()[:, None] - y.numpy(), axis=-1) ** order
    near(found**order, ot.emd2([], [], cost), 1e-9)
    if order == 1:
        near(found, stats.wasserstein_distance_nd(x, y), 1e-9)


def test_probabilities_in_space_and_in_batches():
    points = random_rows(5, 2)
    p, q = random_rows(3, 5, seed=1).softmax(-1), random_rows(5, seed=2).softmax(-1)
    for support in (points, points[:, 0]):
        together = wasserstein(p, q, given="probs", support=support, order=2)
        assert together.shape == (3,)
        for row, value in zip(p, together, strict=True):
            near(wasserstein(row, q, given="probs", support=support, order=2), value)
    near(
        wasserstein(p, q, given="probs", support=points[:, :1]),
        wasserstein(p, q, given="probs", support=points[:, 0]),
    )


def test_densities_on_a_line():
    p, q = Normal(torch.tensor([0.0, 1.0]), 1.0), Normal(3.0, 2.0)
    near(wasserstein(p, q, given="distribution", order=2), np.sqrt([9 + 1, 4 + 1]), 1e-6)
    # Exponentials are ordered: the distance of order 1 is that of the means, and a scale enters linearly.
    fast, slow = Exponential(torch.tensor(2.0).double()), Exponential(torch.tensor(0.5).double())
    near(wasserstein(fast, slow, given="distribution"), 1.5, 1e-9)
    near(wasserstein(fast, slow, given="distribution", order=2), 1.5 * math.sqrt(2), 1e-9)
    near(wasserstein(Uniform(0.0, 1.0), Uniform(0.0, 4.0), given="distribution", order=2), math.sqrt(3), 1e-6)
    crossing = integrate.quad(lambda u: abs(stats.norm.ppf(u)), 0, 1)[0]
    near(wasserstein(Normal(0.0, 1.0), Normal(0.0, 2.0), given="distribution"), crossing, 1e-5)
    assert wasserstein(Normal(0.0, 1.0), Normal(0.0, 1.0), given="distribution") == 0


@pytest.mark.parametrize("order", [1, 1.5, 2])
def test_transport_is_differentiable(order):
    x, y = random_rows(5).requires_grad_(), random_rows(7, seed=1).requires_grad_()
    assert gradcheck(lambda a, b: wasserstein(a, b, given="samples", order=order), (x, y))
    x, y = random_rows(4, 2).requires_grad_(), random_rows(5, 2, seed=1).requires_grad_()
    assert gradcheck(lambda a, b: wasserstein(a, b, given="samples", order=order), (x, y))
    z, w = random_rows(4).requires_grad_(), random_rows(4, seed=1).requires_grad_()
    for points in (random_rows(4, seed=2), random_rows(4, 2, seed=2)):
        assert gradcheck(lambda a, b, at=points: wasserstein(a, b, given="logits", support=at, order=order), (z, w))
    mean = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda m: wasserstein(Normal(m, 1), Normal(2, m), given="distribution", order=order), mean)


@pytest.mark.parametrize("shape", [(6,), (6, 2)])
@pytest.mark.parametrize("order", [1, 2])
def test_where_the_distance_is_zero_so_is_its_gradient(shape, order):
    x = random_rows(*shape).requires_grad_()
    value = wasserstein(x, x.detach().flip(0), given="samples", order=order)
    assert value == 0
    assert (torch.autograd.grad(value, x)[0] == 0).all()


@pytest.mark.parametrize("shape", [(4,), (4, 2)])
def test_powers_do_not_overflow(shape):
    x = torch.full(shape, -1e30)
    near(wasserstein(x, -x, given="samples", order=3), 2e30 * math.sqrt(len(shape)), 1e-6 * 2e30)
    small = torch.full(shape, -1e-30)
    near(wasserstein(small, -small, given="samples", order=3) * 1e30, 2 * math.sqrt(len(shape)), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_transport_in_other_dtypes(dtype):
    for shape in ((200,), (30, 2)):
        x, y = random_rows(*shape, dtype=dtype), random_rows(*shape, seed=1, dtype=dtype) + 2
        found = wasserstein(x, y, given="samples")
        assert found.dtype == torch.float32
        near(found, wasserstein(x.double(), y.double(), given="samples"), 1e-6)


def test_one_sample():
    near(wasserstein([1.0], [4.0], given="samples", order=2), 3)
    near(wasserstein([[1.0, 2.0]], [[4.0, 6.0]], given="samples"), 5)


def test_sliced():
    x, y = random_rows(50, 3), random_rows(60, 3, seed=1) + 1
    for order in (1, 2):
        generator = torch.Generator().manual_seed(0)
        found = sliced_wasserstein(x, y, order=order, num_projections=400, generator=generator)
        expected = ot.sliced_wasserstein_distance(x.numpy(), y.numpy(), n_projections=4000, p=order, seed=0)
        near(found, expected, 0.05)
        assert found <= wasserstein(x, y, given="samples", order=order)
        near(
            sliced_wasserstein(x[:, 0], y[:, 0], order=order),
            wasserstein(x[:, 0], y[:, 0], given="samples", order=order),
        )
    # A shift by s is seen along a direction as s times its cosine.
    shifted = sliced_wasserstein(x, x + torch.tensor([3.0, 0, 0]), order=2, num_projections=20_000)
    near(shifted, 3 / math.sqrt(3), 0.03)
    a = x[:5].clone().requires_grad_()
    assert gradcheck(lambda t: sliced_wasserstein(t, y, generator=torch.Generator().manual_seed(0)), a)


# Between disjoint distributions


def test_moving_apart():
    shifts = [-2.5, -0.25, 0.0, 0.25, 0.75, 1.5, 40.0]
    s = np.array(shifts)
    for base in (2, math.e):
        found = moving_apart(shifts, base=base)
        near(found.shift, s)
        unit = LOG2 / math.log(base)
        near(found.distance["js"], np.minimum(abs(s), 1) * unit, 1e-9)
        near(found.distance["wasserstein"], abs(s), 1e-9)
        near(found.distance["kl"], np.where(s == 0, 0, INF))
        near(found.gradient["js"], np.where(abs(s) < 1, np.sign(s), 0) * unit, 1e-9)
        near(found.gradient["wasserstein"], np.sign(s), 1e-9)
        near(found.gradient["kl"], 0 * s)


# What is refused

HALF = torch.tensor([0.5, 0.5])
REFUSED = {
    "unknown kind": (lambda: entropy(HALF, given="prob"), "given must be one of 'probs'"),
    "triple": (lambda: kl(HALF, HALF, given=("probs",) * 3), "or a pair of them"),
    "mixed": (lambda: kl(HALF, HALF, given=("probs", "samples")), "go together"),
    "base": (lambda: entropy(HALF, given="probs", base=1), "base of the logarithm must be above 1"),
    "sum": (lambda: entropy(HALF * 2, given="probs"), "must sum to 1; got 1 at least, and sums off by up to 1:"),
    "nan": (lambda: entropy(torch.tensor([math.nan, 0.5]), given="probs"), "got nan at least"),
    "negative": (
        lambda: entropy(torch.tensor([-0.5, 1.5]), given="probs"),
        "got -0.5 at least, and sums off by up to 0:",
    ),
    "weights": (lambda: entropy(torch.tensor([3.0, 1.0]), given="probs"), r"off by up to 3: write p / p.sum\(dim"),
    "complex": (lambda: entropy(torch.tensor([0.5j, 0.5]), given="probs"), "must be real; got torch.complex64"),
    "infinite": (
        lambda: wasserstein(Cauchy(0.0, 1.0), Cauchy(0.0, 2.0), given="distribution"),
        "tails must be lighter",
    ),
    "nearly infinite": (
        lambda: wasserstein(Pareto(1.0, 1.2), Pareto(2.0, 1.2), given="distribution"),
        "between Pareto and Pareto it is infinite, or cannot be told from that: write",
    ),
    "no outcome": (lambda: entropy(torch.zeros(2, 0), given="probs"), "must sum to 1"),
    "nan logits": (lambda: entropy(torch.tensor([math.nan, 0.5]), given="logits"), "logits must be numbers"),
    "infinite logits": (lambda: entropy(torch.tensor([INF, 0.5]), given="logits"), "logits must be numbers"),
    "no finite logit": (lambda: entropy(torch.tensor([-INF, -INF]), given="logits"), "logits must be numbers"),
    "no logit": (lambda: entropy(torch.zeros(2, 0), given="logits"), "logits must be numbers"),
    "dim": (lambda: entropy(HALF, given="probs", dim=1), "dim=1 is not a dimension"),
    "sizes": (lambda: kl(HALF, torch.ones(3) / 3, given="probs"), r"equally many outcomes; got \[2, 3\]"),
    "no object": (lambda: entropy(HALF, given="distribution"), "an object of torch.distributions; got Tensor"),
    "an object": (lambda: entropy(Normal(0.0, 1.0), given="probs"), "write given='distribution'"),
    "empty samples": (lambda: entropy([], given="samples"), "not be empty"),
    "nan samples": (lambda: entropy([math.nan], given="samples"), "must be finite"),
    "dimensions": (lambda: kl(torch.ones(3), torch.ones(3, 2), given="samples"), "equally many dimensions"),
    "no formula": (lambda: entropy(Poisson(1.0), given="distribution"), "the entropy of Poisson: write num_samples"),
    "no draws": (lambda: entropy(Poisson(1.0), given="distribution", num_samples=0), "at least 1; got 0"),
    "events": (
        lambda: js(Normal(0.0, 1.0), MultivariateNormal(torch.zeros(2), torch.eye(2)), given="distribution"),
        "equal event shapes",
    ),
    "order": (lambda: wasserstein(HALF, HALF, given="samples", order=0.5), "at least 1 and finite; got 0.5"),
    "order of slices": (lambda: sliced_wasserstein(HALF, HALF, order=INF), "at least 1 and finite"),
    "no support": (lambda: wasserstein(HALF, HALF, given="probs"), "write support=points"),
    "short support": (lambda: wasserstein(HALF, HALF, given="probs", support=[1.0]), "each of the 2 probabilities"),
    "infinite points": (lambda: wasserstein([INF], [0.0], given="samples"), "must be finite"),
    "points": (lambda: wasserstein(torch.ones(3), torch.ones(3, 2), given="samples"), "equally many dimensions"),
    "no icdf": (lambda: wasserstein(Gamma(1.0, 1.0), Gamma(1.0, 1.0), given="distribution"), "Gamma has none: draw"),
    "no line": (
        lambda: wasserstein(*[MultivariateNormal(torch.zeros(2), torch.eye(2))] * 2, given="distribution"),
        "MultivariateNormal has none",
    ),
    "projections": (lambda: sliced_wasserstein(HALF, HALF, num_projections=0), "at least 1; got 0"),
    "shifts": (lambda: moving_apart([math.nan]), "finite numbers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    call, message = REFUSED[case]
    with pytest.raises(MeasureError, match=message):
        call()


def test_heavy_tails_are_right_where_they_are_taken():
    """Of scale s and index a the mean is s a / (a - 1); the distance of two scales is that of the means."""
    for a in (1.5, 2.5, 4.0):
        p, q = (Pareto(torch.tensor(s, dtype=torch.float64), a) for s in (1.0, 2.0))
        assert wasserstein(p, q, given="distribution").item() == pytest.approx(a / (a - 1), rel=1e-5)
    moved = wasserstein(Cauchy(0.0, 1.0), Cauchy(torch.tensor(2.0, dtype=torch.float64), 1.0), given="distribution")
    assert moved.item() == pytest.approx(2, rel=1e-6)  # each quantile moves by 2


def test_far_points_in_space_do_not_overflow():
    x = torch.tensor([[1e200, 0.0], [0.0, 0.0]], dtype=torch.float64)
    assert wasserstein(x, -x, given="samples", order=2).item() == pytest.approx(1e200)


def test_without_pot(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    assert wasserstein([1.0], [2.0], given="samples") == 1
    with pytest.raises(BackendError, match=r"pip install 'renorm\[measures\]'"):
        wasserstein([[1.0, 2.0]], [[2.0, 3.0]], given="samples")
