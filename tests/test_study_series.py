"""The parts of the studies on time series that have an exact answer."""

import numpy as np
import pytest
import torch
from sklearn.metrics import mean_squared_error

from renorm.studies import mse_and_correlation, pooling
from renorm.studies.household import windows

RANDOM = np.random.default_rng(0)


def test_the_parts_of_an_mse_add_up():
    forecast, truth = RANDOM.normal(3, 2, 51), RANDOM.normal(0, 1, 51)
    found = mse_and_correlation.parts(forecast, truth)
    assert found.mse == pytest.approx(mean_squared_error(truth, forecast), rel=1e-14)
    assert found.bias + found.spread + found.shape == pytest.approx(found.mse, rel=1e-13)
    assert found.correlation == pytest.approx(np.corrcoef(forecast, truth)[0, 1], rel=1e-12)
    assert found.share == pytest.approx(found.mse / truth.var(), rel=1e-14)


def test_a_constant_forecast_correlates_with_nothing():
    assert mse_and_correlation.parts(np.zeros(3), np.array([1.0, 2.0, 3.0])).correlation == 0


def test_resamples_keep_neighbours_together():
    truth = np.arange(100.0)
    mse, correlation = mse_and_correlation.resampled(truth + 2, truth, RANDOM)
    np.testing.assert_allclose(mse, 4)
    np.testing.assert_allclose(correlation, 1)
    alternating = np.tile([1.0, -1.0], 50)  # every block has both, so that each resample has all of the variance
    mse, correlation = mse_and_correlation.resampled(0 * alternating, alternating, RANDOM)
    np.testing.assert_allclose(mse, 1)
    np.testing.assert_allclose(correlation, 0, atol=1e-12)


def test_a_calm_validation_has_the_same_correlation_and_a_smaller_mse():
    usual, calm = (
        mse_and_correlation.measure({"part": "made", "signal": 0.5, "deviation": d, "sets": 2}, 3) for d in (1, 1 / 3)
    )
    assert calm["training_mse"] == usual["training_mse"]
    assert calm["validation_correlation"] == pytest.approx(usual["validation_correlation"], abs=0.02)
    assert calm["validation_mse"] == pytest.approx(usual["validation_mse"] / 9, rel=0.1)


def test_windows_with_a_hole_are_left_out():
    series = np.arange(10.0)
    series[4] = np.nan
    assert windows(series, 3, 2).tolist() == [[0, 1, 2], [6, 7, 8]]


def test_a_constant_column_is_not_divided_by_almost_nothing():
    x = np.stack([RANDOM.normal(size=50), np.full(50, 0.1)], 1)
    assert pooling.scale(x).tolist() == [x[:, 0].std(), 1.0]
    forecast = pooling.fit("ridge", x, x[:, 0], 0)
    new = np.array([[0.5, 7.0]])
    np.testing.assert_allclose(forecast(new), 0.5, atol=1e-3)


def test_an_mlp_learns_a_line():
    torch.manual_seed(0)
    x = RANDOM.normal(size=(300, 2))
    forecast = pooling.fit("mlp", x, 100 + 10 * x[:, 0], 300)
    truth = 100 + 10 * x[:, 0]
    assert np.sqrt(np.mean((forecast(x) - truth) ** 2)) < 1


@pytest.mark.parametrize("seed", [0, 1])
def test_a_test_follows_its_training_and_no_other_seed_has_it(seed, monkeypatch):
    day = np.repeat(np.arange(80), 18)
    monkeypatch.setattr(pooling, "_parking", lambda: ((day + 0.01 * np.arange(18 * 80), day >= 0, day, 500.0),))
    (park,) = pooling._cut(14, seed)
    trained = np.arange(80)[(day[::18] > 79 - 7 * (seed + 1) - 14) & (day[::18] <= 79 - 7 * (seed + 1))]
    assert len(park.y) == 14 * 18
    assert len(park.y_test) == 7 * 18
    assert park.y.max() < park.y_test.min()
    values = (day + 0.01 * np.arange(18 * 80))[np.isin(day, trained)]
    np.testing.assert_allclose(park.y * values.std() + values.mean(), values)


def test_what_a_park_does_later_changes_nothing_of_its_training(monkeypatch):
    day = np.repeat(np.arange(80), 18)
    found = []
    for later in (0.0, 1e6):
        occupied = np.sin(np.arange(18 * 80.0)) + later * (day > 72)
        monkeypatch.setattr(pooling, "_parking", lambda values=occupied: ((values, day >= 0, day, 500.0),))
        (park,) = pooling._cut(14, 0)
        found.append(park)
    for name in ("x", "y", "static"):
        np.testing.assert_array_equal(getattr(found[0], name), getattr(found[1], name))
    assert not np.array_equal(found[0].y_test, found[1].y_test)


def test_bars_are_means_and_the_naive_forecast_is_the_last_one():
    power = RANDOM.normal(size=pooling._TRAINED_ON + 5000)
    error, naive = pooling._bars(power, "ridge", 5, 500, 0)
    assert error < naive < 1  # of white noise the mean is the better forecast, of five minutes than of one
