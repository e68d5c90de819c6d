"""Scores against scikit-learn, torchmetrics and SciPy; intervals by their coverage and against drawing for real."""

import math

import numpy as np
import pytest
import torch
import torchmetrics.functional as tm
from scipy import stats
from sklearn import metrics

from renorm.errors import MeasureError
from renorm.measures.scores import Score, classification_scores, forecasting_scores, regression_scores


def classified(n=400, k=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(k, (n,), generator=generator)
    logits = torch.randn(n, k, generator=generator) + 1.5 * torch.nn.functional.one_hot(target, k)
    return target, logits


def value(scores):
    return {name: score.value for name, score in scores.values.items()}


# Classification


@pytest.mark.parametrize("k", [2, 4])
def test_classification_is_scikit_learns(k):
    target, logits = classified(k=k)
    probs, predicted = logits.double().softmax(1), logits.argmax(1)
    expected = {
        "accuracy": metrics.accuracy_score(target, predicted),
        "balanced_accuracy": metrics.balanced_accuracy_score(target, predicted),
        "f1": metrics.f1_score(target, predicted, average="macro"),
    }
    found = classification_scores(target, predicted, given="labels", num_resamples=0)
    assert value(found) == pytest.approx(expected, rel=1e-12)
    of_class = np.array(metrics.precision_recall_fscore_support(target, predicted))
    for index, names in enumerate(("precision", "recall", "f1", "support")):
        assert [found.parts[str(c)][names].value for c in range(k)] == pytest.approx(of_class[index], rel=1e-12)
    expected["log_loss"] = metrics.log_loss(target, probs.numpy())
    expected["ece"] = float(tm.calibration_error(probs, target, task="multiclass", num_classes=k, n_bins=15))
    for output, given in ((logits, "logits"), (probs, "probs"), (probs.numpy(), "probs")):
        assert value(classification_scores(target, output, given=given, num_resamples=0)) == pytest.approx(
            expected, rel=1e-5
        )


def test_torchmetrics_agrees():
    target, logits = classified()
    found = classification_scores(target, logits, given="logits", num_resamples=0)
    options = {"task": "multiclass", "num_classes": 4}
    assert found["accuracy"].value == pytest.approx(float(tm.accuracy(logits, target, **options)))
    assert found["balanced_accuracy"].value == pytest.approx(
        float(tm.recall(logits, target, average="macro", **options))
    )
    assert found["f1"].value == pytest.approx(float(tm.f1_score(logits, target, average="macro", **options)))


def test_two_classes_by_one_number():
    target, logits = classified(k=2)
    single = logits[:, 1] - logits[:, 0]
    both = value(classification_scores(target, logits, given="logits", num_resamples=0))
    assert value(classification_scores(target, single, given="logits", num_resamples=0)) == pytest.approx(both)
    assert value(classification_scores(target, single.sigmoid(), given="probs", num_resamples=0)) == pytest.approx(
        both, rel=1e-5
    )


def test_classes_that_do_not_occur():
    found = classification_scores([0, 0, 1], [0, 1, 1], given="labels", classes=["a", "b", "c", "d"], num_resamples=50)
    assert list(found.parts) == ["a", "b", "c", "d"]
    for name in ("recall", "precision", "f1"):
        assert math.isnan(found.parts["c"][name].value)
        assert math.isnan(found.parts["c"][name].low)
    assert found["balanced_accuracy"].value == 0.75
    assert found["f1"].value == pytest.approx(metrics.f1_score([0, 0, 1], [0, 1, 1], average="macro"))
    never = classification_scores([0, 1], [0, 0], given="labels", num_resamples=0)
    assert math.isnan(never.parts["1"]["precision"].value)
    assert never.parts["1"]["f1"].value == 0


def test_a_certain_mistake():
    probs = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5]])
    found = classification_scores([0, 1, 0], probs, given="probs", num_resamples=100)
    assert found["log_loss"].value == math.inf
    assert math.isfinite(found["log_loss"].low)  # some draws are without it
    assert found["log_loss"].high == math.inf
    assert found["ece"].value == pytest.approx((abs(1 - 2) + abs(1 - 0.5)) / 3)


def test_bfloat16_is_read():
    target, logits = classified()
    found = classification_scores(target, logits.bfloat16(), given="logits", num_resamples=0)
    assert found["log_loss"].value == pytest.approx(metrics.log_loss(target, logits.softmax(1).numpy()), rel=1e-2)


# Regression


def series(n=300, seed=0):
    generator = np.random.default_rng(seed)
    y = generator.normal(size=n).round(1) + 3
    return y, 0.6 * y + generator.normal(size=n).round(1) * 0.5


def test_regression_is_scikit_learns_and_scipys():
    y, p = series()
    expected = {
        "mse": metrics.mean_squared_error(y, p),
        "rmse": metrics.root_mean_squared_error(y, p),
        "mae": metrics.mean_absolute_error(y, p),
        "r2": metrics.r2_score(y, p),
        "correlation": stats.pearsonr(y, p).statistic,
        "rank_correlation": stats.spearmanr(y, p).statistic,
        "bias": np.mean(p - y),
        "target_std": np.std(y),
        "prediction_std": np.std(p),
    }
    for target, prediction in ((y, p), (torch.tensor(y), torch.tensor(p)[:, None]), (list(y), list(p))):
        found = regression_scores(target, prediction, num_resamples=0)
        assert value(found) == pytest.approx(expected, rel=1e-10)
    matrix = regression_scores(y.reshape(-1, 3), p.reshape(-1, 3), num_resamples=0)
    assert matrix.num_samples == 100
    assert value(matrix) == pytest.approx(expected, rel=1e-10)


def test_the_parts_of_the_mean_squared_error():
    found = value(regression_scores(*series(), num_resamples=0))
    spreads = found["prediction_std"], found["target_std"]
    parts = found["bias"] ** 2 + (spreads[0] - spreads[1]) ** 2 + 2 * (1 - found["correlation"]) * math.prod(spreads)
    assert found["mse"] == pytest.approx(parts)
    assert found["r2"] == pytest.approx(1 - found["mse"] / found["target_std"] ** 2)


def test_a_lower_error_with_a_lower_correlation():
    generator = np.random.default_rng(0)
    noise = generator.normal(size=(2, 2000))
    y = generator.normal(size=(2, 2000)) * [[3.0], [0.5]]  # the later part varies less
    training, validation = (
        regression_scores(y[i], y[i] + noise[i] * scale, num_resamples=0) for i, scale in ((0, 1.0), (1, 0.8))
    )
    assert validation["mse"].value < training["mse"].value
    assert validation["correlation"].value < training["correlation"].value


def test_a_large_mean_costs_no_digits():
    y, p = series()
    small, large = (value(regression_scores(y + shift, p + shift, num_resamples=0)) for shift in (0, 1e8))
    for name in ("mse", "r2", "correlation", "target_std"):
        assert large[name] == pytest.approx(small[name], rel=1e-6)


def test_what_is_constant():
    found = regression_scores([0.1] * 3, [0.1, 0.2, 0.3], num_resamples=0)
    assert found["target_std"].value == 0
    assert all(math.isnan(found[name].value) for name in ("r2", "correlation", "rank_correlation"))
    found = regression_scores([0.1, 0.2, 0.3], [0.7] * 3, num_resamples=20)
    assert found["prediction_std"].value == 0
    assert math.isnan(found["correlation"].value)
    assert math.isnan(found["correlation"].low)
    single = regression_scores([1.0], [2.0])
    assert (single["mse"].value, str(single["mse"])) == (1.0, "1")


# Forecasting


def test_forecasts_of_several_series():
    generator = np.random.default_rng(0)
    past = {"a": generator.normal(size=50).cumsum(), "b": 100 * generator.normal(size=70)}
    ids = np.array(["a", "b"]).repeat([30, 20])
    y, p = generator.normal(size=(2, 50, 4)) * np.where(ids == "a", 1, 100)[:, None]
    found = forecasting_scores(y, p, series=ids, history=past, season=7, num_resamples=0)
    errors = []
    for name in "ab":
        rows = ids == name
        alone = value(regression_scores(y[rows], p[rows], num_resamples=0))
        naive = np.mean([abs(past[name][t] - past[name][t - 7]) for t in range(7, len(past[name]))])
        errors.append(np.mean(abs(y[rows] - p[rows])) / naive)
        got = {key: score.value for key, score in found.parts[name].items()}
        assert got == pytest.approx(alone | {"mase": errors[-1]})
    assert found["mase"].value == pytest.approx(np.mean(errors))
    expected = np.mean([found.parts[name]["correlation"].value for name in "ab"])
    assert found["correlation"].value == pytest.approx(expected)


def test_the_naive_forecast_of_its_own_past_has_mase_1():
    y = np.random.default_rng(0).normal(size=101).cumsum()
    found = forecasting_scores(y[1:], y[:-1], series=[3] * 100, history={3: torch.tensor(y)}, num_resamples=10)
    assert found["mase"].value == pytest.approx(1)
    assert found.values == found.parts["3"]


def test_a_past_that_never_changed():
    past = {"flat": [1.0, 1.0], "met": [1.0, 1.0], "other": [1.0, 2.0]}
    y, p = [1.0, 2.0, 1.0, 1.0, 1.0, 3.0], [1.0, 1.0, 1.0, 1.0, 1.0, 2.0]
    ids = ["flat", "flat", "met", "met", "other", "other"]
    found = forecasting_scores(y, p, series=ids, history=past, num_resamples=50)
    assert found.parts["flat"]["mase"].value == math.inf
    assert math.isnan(found.parts["met"]["mase"].value)
    assert found["mase"].value == math.inf
    assert found["mase"].low == 0.5  # draws without the flat one
    assert found["mse"].value == pytest.approx((0.5 + 0 + 0.5) / 3)
    assert found["correlation"].value == 1  # of the only series that has one


# Intervals


def test_intervals_are_those_of_drawing_rows():
    y, p = series(40)
    found = regression_scores(y, p, num_resamples=4000)
    generator = np.random.default_rng(1)
    draws = generator.integers(40, size=(4000, 40))
    for name, score in (
        ("mse", lambda a, b: np.mean((a - b) ** 2)),
        ("correlation", lambda a, b: stats.pearsonr(a, b).statistic),
        ("rank_correlation", lambda a, b: stats.spearmanr(a, b).statistic),
    ):
        expected = np.quantile([score(y[rows], p[rows]) for rows in draws], [0.025, 0.975])
        width = expected[1] - expected[0]
        assert [found[name].low, found[name].high] == pytest.approx(expected, abs=0.05 * width)


def test_every_resampled_score_is_that_of_the_drawn_rows():
    target, logits = classified(50)
    found = classification_scores(target, logits, given="logits", num_resamples=1, seed=7)
    rows = np.random.default_rng(7).integers(50, size=50)
    again = classification_scores(target[rows], logits[rows], given="logits", num_resamples=0)
    for name, score in found.values.items():
        assert (score.low, score.high) == pytest.approx((again[name].value,) * 2)
    y, p = series(50)
    found = regression_scores(y, p, num_resamples=1, seed=7)
    again = regression_scores(y[rows], p[rows], num_resamples=0)
    for name, score in found.values.items():
        assert score.low == pytest.approx(again[name].value), name


def test_an_interval_covers():
    generator = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        right = generator.random(80) < 0.7
        score = classification_scores(right * 0, 1 - right, given="labels", num_resamples=200, seed=seed)["accuracy"]
        hits += score.low <= 0.7 <= score.high
    assert 0.9 <= hits / 200 <= 0.99


def test_blocks_widen_the_interval_of_a_series_that_stays():
    generator = np.random.default_rng(0)
    slow = generator.normal(size=50).repeat(20)
    widths = []
    for block in (1, 20):
        score = regression_scores(np.zeros(1000), slow, block=block)["bias"]
        widths.append(score.high - score.low)
    expected = 2 * 1.96 * slow.std() / np.sqrt([1000, 50])
    assert widths[0] == pytest.approx(expected[0], rel=0.1)
    assert expected[1] * 0.7 < widths[1] < expected[1] * 1.05  # blocks that begin within a run know it in part


def test_equal_seeds_give_equal_intervals():
    y, p = series(50)
    one, same, other = (regression_scores(y, p, num_resamples=50, seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one["mse"].low != other["mse"].low


def test_as_text():
    found = classification_scores([0, 1], [0, 1], given="labels", classes=["cat", "dog"], num_resamples=20)
    lines = str(found).splitlines()
    assert lines[0] == "accuracy           1 (1 to 1)"
    assert lines[3].startswith("recall of cat      1")
    assert str(Score(0.123456, 0.1, 0.2)) == "0.1235 (0.1 to 0.2)"


@pytest.mark.parametrize("given", ["probs", "logits"])
def test_a_column_is_of_class_1(given):
    """What a model with one unit gives: its softmax would be 1."""
    p = np.array([0.2, 0.9, 0.6, 0.4])
    values = torch.tensor(p if given == "probs" else np.log(p / (1 - p)))
    found = classification_scores([0, 1, 0, 1], values[:, None], given=given, num_resamples=0)
    assert found["log_loss"].value == pytest.approx(metrics.log_loss([0, 1, 0, 1], p))
    assert found["accuracy"].value == 0.5


# What is refused

REFUSED = {
    "given": (lambda: classification_scores([0], [0], given="scores"), "given must be 'labels'"),
    "one-hot": (lambda: classification_scores([[0, 1]], [0], given="labels"), r"target must be class indices \(n,\)"),
    "real labels": (lambda: classification_scores([0.5], [0], given="labels"), "target must be class indices"),
    "negative": (lambda: classification_scores([0], [-1], given="labels"), "output must be class indices"),
    "empty": (lambda: classification_scores(torch.zeros(0).long(), [], given="labels"), "one at least"),
    "lengths": (lambda: classification_scores([0, 1], [0], given="labels"), "equally many samples; got 2 and 1"),
    "names": (
        lambda: classification_scores([0, 1], [0, 2], given="labels", classes="ab"),
        "got 2 different names, 3 classes",
    ),
    "equal names": (
        lambda: classification_scores([0, 1], [0, 1], given="labels", classes="aa"),
        "got 1 different names",
    ),
    "label": (lambda: classification_scores([2], [[0.5, 0.5]], given="probs"), "labels up to 2"),
    "probs": (lambda: classification_scores([1], [[0.5, 0.6]], given="probs"), "must sum to 1"),
    "nan": (lambda: classification_scores([1], [[0.5, math.nan]], given="logits"), "logits must be numbers"),
    "rank": (lambda: classification_scores([1], torch.ones(1, 1, 1), given="probs"), r"shape \(n, K\)"),
    "bins": (lambda: classification_scores([1], [[0.5, 0.5]], given="probs", num_bins=0), "num_bins must be"),
    "shapes": (lambda: regression_scores([1.0, 2.0], [[1.0, 2.0]]), "same shape"),
    "three axes": (lambda: regression_scores(np.ones((2, 2, 2)), np.ones((2, 2, 2))), r"\(n,\) or \(n, m\)"),
    "no number": (lambda: regression_scores([1.0], [math.nan]), "prediction must be finite real numbers"),
    "complex": (lambda: regression_scores([1j], [1.0]), "must be finite real numbers.*complex128"),
    "text": (lambda: regression_scores(["a"], [1.0]), "must be finite real numbers"),
    "seed": (lambda: regression_scores([1.0, 2.0], [1.0, 2.0], seed=-1), "seed must not be negative.*got 1000, -1"),
    "no sample": (lambda: regression_scores([], []), "target must be finite real numbers"),
    "resamples": (lambda: regression_scores([1.0], [1.0], num_resamples=-1), "must not be negative"),
    "block": (lambda: regression_scores([1.0], [1.0], block=2), "from 1 to the 1 samples"),
    "season": (
        lambda: forecasting_scores([1.0], [1.0], series=["a"], history={"a": [1, 2]}, season=0),
        "season must be",
    ),
    "no past": (lambda: forecasting_scores([1.0], [1.0], series=["a"], history={}), "that of 'a' is not there"),
    "short past": (lambda: forecasting_scores([1.0], [1.0], series=[1], history={1: [1.0]}), "longer than the season"),
    "series": (lambda: forecasting_scores([1.0], [1.0], series=[], history={}), "each of the 1 rows"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    call, message = REFUSED[case]
    with pytest.raises(MeasureError, match=message):
        call()
