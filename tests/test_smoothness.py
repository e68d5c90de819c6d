"""Smoothness on functions with a known Hessian; nothing is changed by looking."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import renorm as rn
from renorm.errors import MeasureError
from renorm.measures.smoothness import MULTIPLES, Smoothness, smoothness

CURVATURE = np.array([1.0, 10.0, 100.0])


class Point(nn.Module):
    def __init__(self, *values, dtype=torch.float64):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values, dtype=dtype))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        rn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.utils.parametrizations.spectral_norm(nn.Linear(16, 8)),
        nn.BatchNorm1d(8),
        nn.Linear(8, 3),
    )


def test_steps():
    assert len(MULTIPLES) == 8
    np.testing.assert_allclose(MULTIPLES, np.geomspace(0.5, 4, 8), rtol=1e-15)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("lr", [1e-4, 1e-2])
def test_a_quadratic(dtype, tolerance, lr):
    w = np.array([1.0, 1.0, 1.0])
    point, curvature = Point(*w, dtype=dtype), torch.tensor(CURVATURE, dtype=dtype)
    found = smoothness(point, lambda: (curvature * point.w**2).sum() / 2, lr=lr)
    g, steps = CURVATURE * w, lr * np.array(MULTIPLES)
    after = w - steps[:, None] * g
    losses, changes = (CURVATURE * after**2).sum(1) / 2, steps * np.linalg.norm(CURVATURE * g)
    np.testing.assert_allclose(found.steps, steps)
    np.testing.assert_allclose(found.loss, 55.5)
    np.testing.assert_allclose(found.gradient_norm, np.linalg.norm(g), tolerance)
    np.testing.assert_allclose(found.losses, losses, 20 * tolerance)
    np.testing.assert_allclose(found.gradient_changes, changes, 20 * tolerance)
    np.testing.assert_allclose(found.loss_range, (losses.min(), losses.max()), 20 * tolerance)
    np.testing.assert_allclose(found.gradient_range, (changes.min(), changes.max()), 20 * tolerance)
    # || H g || / || g || whatever the step; rounding of the gradients' difference is worst for the shortest one.
    beta = np.linalg.norm(CURVATURE * g) / np.linalg.norm(g)
    assert f"{beta:.4f}" == "99.5038"
    np.testing.assert_allclose(found.beta, beta, 1e3 * tolerance)


def test_the_largest_ratio_counts():
    point = Point(1.0)
    found = smoothness(point, lambda: (point.w**4).sum(), lr=0.01, multiples=(1, 10))
    # w^4 at 1: g = 4; after steps of .04 and .4 the gradient is 4 (.96)^3 and 4 (.6)^3
    assert found.beta == pytest.approx(4 * (1 - 0.96**3) / 0.04)
    assert found.loss_range == pytest.approx((0.6**4, 0.96**4))


def test_nothing_is_changed():
    model, x, y = network(), torch.randn(6, 2, 4, 4), torch.randint(3, (6,))
    loss = nn.CrossEntropyLoss()
    loss(model(x), y).backward()
    model[6].eval()
    before = copy.deepcopy(model)
    gradients = [p.grad.clone() for p in model.parameters()]
    buffers = dict(model.named_buffers())
    random = torch.get_rng_state()
    found = smoothness(model, lambda: loss(model(x), y), lr=0.1)
    assert found.beta > 0
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert all(p.requires_grad for p in model.parameters())


def test_odd_bits_are_put_back():
    point = Point(math.nan, -0.0, 5e-324, math.inf)
    point.register_buffer("seen", torch.tensor([math.nan, -0.0]))
    point.register_buffer("none", None)
    bits = [t.view(torch.int32).clone() for t in (point.w.detach(), point.seen)]

    def loss():
        point.seen = point.seen + 1  # another tensor in its place
        point.none = torch.ones(1)
        return point.w.sum()

    smoothness(point, loss, lr=1.0)
    assert all(torch.equal(t.view(torch.int32), b) for t, b in zip((point.w.detach(), point.seen), bits, strict=True))
    assert point.none is None


def test_every_run_is_of_the_same_function():
    point = Point(1.0)
    point.register_buffer("runs", torch.zeros(()))

    def loss():
        point.runs += 1
        return (point.w * (point.runs + torch.rand(()))).sum()

    found = smoothness(point, loss, lr=0.1)
    assert found.gradient_changes == (0.0,) * 8
    assert found.beta == 0


def test_put_back_after_an_error():
    model, count = Point(1.0), [0]

    def loss():
        count[0] += 1
        if count[0] == 3:
            raise RuntimeError("out of memory")
        return (model.w**2).sum()

    with pytest.raises(RuntimeError, match="out of memory"):
        smoothness(model, loss, lr=0.1)
    assert model.w.item() == 1


def test_a_frozen_and_an_unused_parameter():
    model = Point(1.0)
    model.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    model.unused = nn.Parameter(torch.ones(2))
    with torch.no_grad():
        found = smoothness(model, lambda: (3 * model.w**2 * model.frozen.sum()).sum(), lr=0.01)
    assert found.beta == pytest.approx(12)


def test_a_sparse_gradient():
    loss = {}
    for sparse in (False, True):
        model = nn.Embedding(5, 2, sparse=sparse)
        nn.init.constant_(model.weight, 2.0)
        loss[sparse] = smoothness(model, lambda model=model: (model(torch.tensor([1, 3])) ** 4).sum(), lr=1e-3)
    assert loss[True] == loss[False]
    assert loss[True].gradient_norm == pytest.approx(2 * 4 * 2**3)  # four entries with 4 x^3 each


def test_half_precision():
    model, x = nn.Linear(2000, 4, bias=False).bfloat16(), torch.randn(8, 2000).bfloat16() * 100
    found = smoothness(model, lambda: model(x).float().square().mean(), lr=1e-7)
    assert math.isfinite(found.beta)
    assert found.beta > 0


def test_where_it_is_not_defined():
    model = Point(0.0)
    found = smoothness(model, lambda: (model.w**2).sum(), lr=1.0)
    assert found.gradient_norm == 0
    assert math.isnan(found.beta)
    assert math.isnan(Smoothness(1.0, 1.0, (1.0, 2.0), (1.0, math.nan), (1.0, math.nan)).beta)
    assert math.isnan(Smoothness(1.0, 1.0, (1.0, 2.0), (1.0, math.nan), (1.0, math.nan)).loss_range[1])


def test_refused():
    model = Point(1.0, 2.0)

    def loss():
        return model.w.sum()

    for lr, multiples in ((0.0, (1,)), (-1.0, (1,)), (math.nan, (1,)), (1.0, ()), (1.0, (0,))):
        with pytest.raises(MeasureError, match="must be positive"):
            smoothness(model, loss, lr=lr, multiples=multiples)
    for value, came in ((lambda: model.w, "shape"), (lambda: 1.0, "float"), (lambda: torch.ones(()), "shape")):
        with pytest.raises(MeasureError, match=f"one number that depends on the model's parameters; got .*{came}"):
            smoothness(model, value, lr=1.0)
    with pytest.raises(MeasureError, match="this model has none"):
        smoothness(nn.ReLU(), loss, lr=1.0)
