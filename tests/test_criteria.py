"""AIC, AICc and BIC against statsmodels: ordinary least squares, logistic and multinomial regression."""

import math

import numpy as np
import pytest
import statsmodels.api as sm
import torch
from statsmodels.tools import eval_measures
from torch import nn

from renorm.errors import MeasureError
from renorm.measures.criteria import Criteria, information_criteria, log_likelihood


def data(n=60, d=3, seed=0):
    generator = np.random.default_rng(seed)
    return generator.normal(size=(n, d)), generator.normal(size=n), generator


def linear(weights, bias):
    layer = nn.Linear(weights.shape[-1], len(weights), dtype=torch.float64)
    layer.weight.data, layer.bias.data = torch.tensor(weights), torch.tensor(bias)
    return layer


def same(found, fit):
    assert found.log_likelihood == pytest.approx(fit.llf, rel=1e-10)
    assert found.aic == pytest.approx(fit.aic, rel=1e-10)
    assert found.bic == pytest.approx(fit.bic, rel=1e-10)
    assert found.aicc == pytest.approx(eval_measures.aicc(fit.llf, fit.nobs, found.num_parameters), rel=1e-10)


@pytest.mark.parametrize("n", [6, 7, 60, 3000])
def test_least_squares(n):
    x, noise, _ = data(n)
    y = x @ [1.0, -2.0, 0.5] + 3 + noise
    fit = sm.OLS(y, sm.add_constant(x)).fit()
    model = linear(fit.params[None, 1:], fit.params[:1])
    x, y = torch.tensor(x), torch.tensor(y)
    found = information_criteria(model, x, y, noise="gaussian")
    assert (found.num_parameters, found.num_samples) == (4, n)
    same(found, fit)
    assert found == information_criteria(model, x, y[:, None], noise="gaussian")
    counted = information_criteria(model, x, y, noise="gaussian", count_variance=True)
    assert counted.aic == pytest.approx(found.aic + 2)
    assert counted.bic == pytest.approx(found.bic + math.log(n))


def test_logistic_regression():
    x, noise, _ = data()
    y = (x @ [1.0, -2.0, 0.5] + noise > 0.3).astype(float)
    fit = sm.Logit(y, sm.add_constant(x)).fit(disp=0, tol=1e-12)
    model = linear(fit.params[None, 1:], fit.params[:1])
    for target in (torch.tensor(y), torch.tensor(y)[:, None].long(), torch.tensor(y).bool()):
        same(information_criteria(model, torch.tensor(x), target, noise="bernoulli"), fit)
    with_variance = information_criteria(model, torch.tensor(x), target, noise="bernoulli", count_variance=True)
    assert with_variance.num_parameters == 4  # there is none


def test_multinomial_regression():
    x, _, generator = data(200)
    y = np.argmax(x @ generator.normal(size=(3, 4)) + generator.gumbel(size=(200, 4)), 1)
    fit = sm.MNLogit(y, sm.add_constant(x)).fit(disp=0, tol=1e-12)
    weights = np.concatenate([np.zeros((4, 1)), fit.params], 1).T
    model = linear(weights[:, 1:].copy(), weights[:, 0].copy())
    found = information_criteria(model, torch.tensor(x), torch.tensor(y), noise="categorical", num_parameters=3 * 4)
    same(found, fit)
    assert information_criteria(model, torch.tensor(x), torch.tensor(y), noise="categorical").num_parameters == 16


def test_too_few_samples_for_the_correction():
    assert Criteria(-1.0, num_parameters=4, num_samples=5).aicc == math.inf
    assert Criteria(-1.0, num_parameters=4, num_samples=4).aicc == math.inf
    assert Criteria(-1.0, num_parameters=4, num_samples=6).aicc == 2 + 8 + 40


def test_a_parameter_costs_more_in_bic_from_8_samples_on():
    for n in range(2, 200):
        found = Criteria(0.0, 1, n)
        assert (found.bic >= found.aic) == (n >= 8)


def test_free_parameters_are_counted_once():
    shared = nn.Linear(3, 3)
    frozen = nn.Linear(3, 1).requires_grad_(False)
    model = nn.Sequential(shared, nn.BatchNorm1d(3), shared, frozen).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model[1].eval()
    found = information_criteria(model, torch.randn(2000, 3), torch.randn(2000), noise="gaussian")
    assert found.num_parameters == 12 + 6
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_modes_are_put_back_after_an_error():
    model = nn.Sequential(nn.Linear(3, 1)).train()
    with pytest.raises(RuntimeError):
        information_criteria(model, torch.ones(2, 4), torch.ones(2), noise="gaussian")
    assert model.training


def test_limits():
    y = torch.tensor([1.0, 2.0])
    assert log_likelihood(y, y, noise="gaussian") == math.inf
    inf = torch.tensor([math.inf, -math.inf])
    assert log_likelihood(inf, torch.tensor([1, 0]), noise="bernoulli") == 0
    assert log_likelihood(inf, torch.tensor([0, 0]), noise="bernoulli") == -math.inf
    assert log_likelihood(torch.tensor([1e4]), torch.tensor([0]), noise="bernoulli") == -1e4
    logits = torch.tensor([[0.0, -math.inf], [1e4, 0.0]])
    assert log_likelihood(logits, torch.tensor([0, 0]), noise="categorical") == 0
    assert log_likelihood(logits, torch.tensor([0, 1]), noise="categorical") == -1e4
    assert log_likelihood(logits, torch.tensor([1, 0]), noise="categorical") == -math.inf


def test_several_targets_share_one_variance():
    output, y = torch.randn(20, 3), torch.randn(20, 3)
    deviation = (output - y).double().square().mean().sqrt()
    expected = torch.distributions.Normal(output.double(), deviation).log_prob(y.double()).sum()
    assert log_likelihood(output, y, noise="gaussian") == pytest.approx(float(expected))


def test_half_precision_is_summed_in_more():
    output, y = torch.randn(5000).half(), torch.randn(5000).half()
    expected = log_likelihood(output.double(), y.double(), noise="gaussian")
    assert log_likelihood(output, y, noise="gaussian") == pytest.approx(expected, rel=1e-12)


ONE, TWO = torch.zeros(3), torch.zeros(3, 2)
REFUSED = {
    "noise": (ONE, ONE, "poisson", "noise must be"),
    "empty": (ONE[:0], ONE[:0], "gaussian", r"one sample at least; got the shapes \(0,\)"),
    "a number": (ONE[0], ONE[0], "gaussian", r"got the shapes \(\) and \(\): write output.view\(1\)"),
    "shapes": (TWO, TWO[:, :1], "gaussian", r"same shape; got \(3, 2\) and \(3, 1\)"),
    "lengths": (ONE, ONE[:2], "gaussian", "same shape"),
    "nan": (ONE / 0, ONE, "gaussian", "must be numbers"),
    "infinite target": (ONE, ONE + math.inf, "gaussian", "must be numbers"),
    "target": (ONE, ONE + 0.5, "bernoulli", "must be 0 or 1; got 0.5 to 0.5: write"),
    "one logit": (ONE, ONE.long(), "categorical", r"logits \(n, K\)"),
    "one-hot": (TWO, TWO.long(), "categorical", r"class indices \(n,\)"),
    "class": (TWO, ONE.long() + 2, "categorical", "whole numbers from 0 to 1"),
    "float class": (TWO, ONE, "categorical", "whole numbers.*torch.float32.*write y.long"),
    "nan logits": (TWO / 0, ONE.long(), "categorical", "must be numbers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    output, y, noise, message = REFUSED[case]
    with pytest.raises(MeasureError, match=message):
        log_likelihood(output, y, noise=noise)


def test_a_column_of_classes_is_taken():
    """(n, 1) and (n,) fit each other."""
    logits, classes = torch.tensor([[0.0, 1.0], [2.0, 0.0]], dtype=torch.float64), torch.tensor([1, 0])
    expected = -math.log1p(math.exp(-1)) - math.log1p(math.exp(-2))
    assert log_likelihood(logits, classes, noise="categorical") == pytest.approx(expected)
    assert log_likelihood(logits, classes[:, None], noise="categorical") == pytest.approx(expected)


def test_no_sample_has_no_criterion():
    with pytest.raises(MeasureError, match="num_samples at least 1; got 2 and 0"):
        Criteria(log_likelihood=0.0, num_parameters=2, num_samples=0)


def test_a_negative_count_is_refused():
    with pytest.raises(MeasureError, match=r"must not be negative.*got -1 and 2"):
        information_criteria(nn.Linear(1, 1), torch.ones(2, 1), torch.ones(2), noise="gaussian", num_parameters=-1)
