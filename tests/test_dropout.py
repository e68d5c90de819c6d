"""MC dropout: the mean and the interval of what a model says with dropout on."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import renorm as rn
from renorm.choices import models
from renorm.choices.dropout import mc_dropout
from renorm.errors import StudyError


def drawn(model: nn.Module, x: Tensor, samples: int = 30):
    torch.manual_seed(0)
    return mc_dropout(model, x, samples)


def test_mean_and_interval_are_those_of_the_formula() -> None:
    """One weight that is dropped with p: the output is 0 or w / (1 - p); many runs show how often."""
    model = nn.Sequential(nn.Dropout(0.25), nn.Flatten())
    result = drawn(model, torch.full((1, 4000), 3.0), 40)
    assert set(result.samples.unique().tolist()) == {0.0, 4.0}
    assert result.mean.mean().item() == pytest.approx(3, abs=0.02)
    assert result.samples.var(0).mean().item() == pytest.approx(16 * 0.25 * 0.75, rel=0.02)


@pytest.mark.parametrize("samples", [2, 3, 30, 41])
def test_the_interval_is_numpys_quantiles(samples: int) -> None:
    model = nn.Sequential(nn.Linear(3, 32), nn.Dropout(0.5), nn.Linear(32, 2))
    result = drawn(model, torch.randn(5, 3), samples)
    assert result.samples.shape == (samples, 5, 2)
    low, high = np.quantile(result.samples.numpy(), [0.025, 0.975], axis=0)
    np.testing.assert_allclose(result.low, low, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result.high, high, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result.mean, result.samples.numpy().mean(0), rtol=1e-5, atol=1e-6)


def test_norms_are_in_evaluation_mode() -> None:
    model = nn.Sequential(nn.Linear(3, 8), rn.BatchNorm1d(8), nn.Dropout(0.5), nn.BatchNorm1d(8))
    model(torch.randn(64, 3))
    before = copy.deepcopy(model.state_dict())
    both = drawn(model, torch.cat([torch.ones(1, 3), torch.full((1, 3), 50.0)]))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    # with batch statistics a sample would depend on the one beside it
    alone = drawn(nn.Sequential(*model[:2]).append(nn.Dropout(1e-9)), torch.ones(1, 3), 2)
    torch.testing.assert_close(alone.mean, model[:2].eval()(torch.ones(1, 3)))
    assert both.mean.isfinite().all()


class Encoder(nn.Module):
    """A block whose fast path leaves its dropout out."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class Recurrent(nn.Module):
    """Dropout between the layers of an LSTM, and nowhere else."""

    def __init__(self, **options: float) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 6, num_layers=2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class Attention(nn.Module):
    """Dropout of the attention's weights only."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize("model", [Encoder(), Recurrent(dropout=0.4), Attention()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("training", [True, False])
def test_dropout_inside_torchs_layers_is_on(model: nn.Module, training: bool) -> None:
    model.train(training)
    modes = [module.training for module in model.modules()]
    result = drawn(model, torch.randn(2, 5, 8))
    assert (result.high > result.low).any()
    assert len(result.samples.flatten(1).unique(dim=0)) == 30
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("name", models.NAMES)
def test_every_built_in_model_gives_an_interval(name: str) -> None:
    model = models.build(name, (1, 8, 8), 3, norm="batch", dropout=0.2)
    result = drawn(model, torch.randn(4, 1, 8, 8), 10)
    assert result.mean.shape == (4, 3)
    assert (result.low < result.high).all()
    assert ((result.low <= result.mean) & (result.mean <= result.high)).float().mean() > 0.9


def test_a_forecast_has_an_interval() -> None:
    model = models.forecaster("tcn", (2, 16), 5, norm="layer", dropout=0.2)
    assert drawn(model, torch.randn(3, 2, 16)).low.shape == (3, 1, 5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(3, 32), nn.Dropout(0.5), nn.Linear(32, 1)).to(dtype)
    result = drawn(model, torch.ones(2, 3, dtype=dtype))
    assert result.mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (result.low < result.high).all()


def test_the_output_needs_no_gradient_and_modes_come_back_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))
    assert not drawn(model, torch.ones(1, 3)).mean.requires_grad
    with pytest.raises(RuntimeError):
        mc_dropout(model, torch.ones(1, 9))
    assert model.training
    assert model[0].training


def test_an_lstm_of_one_layer_drops_nothing() -> None:
    """Torch warns of it when it is built; with its share looked at alone, the interval would have no width."""
    with pytest.warns(UserWarning, match="num_layers"):
        lstm = nn.LSTM(3, 4, dropout=0.5)
    with pytest.warns(UserWarning, match="num_layers"):
        ours = rn.LayerNormLSTM(3, 4, dropout=0.5)
    for model in (lstm, ours):
        with pytest.raises(StudyError, match="no dropout to keep on"):
            mc_dropout(model, torch.ones(1, 1, 3))


class Classes(nn.Module):
    """The index of the largest entry."""

    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(-1)


@pytest.mark.parametrize(
    ("model", "samples", "message"),
    [
        (nn.Linear(3, 4), 30, "no dropout to keep on: .*write torch.nn.Dropout"),
        (nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.0)), 30, "no dropout to keep on"),
        (Recurrent(), 30, "no dropout to keep on"),
        (nn.Sequential(nn.Dropout(0.5), Classes()), 2, "got torch.int64: write a model that gives what goes into"),
        (nn.Dropout(0.5), 1, "at least 2 samples; got 1"),
        (nn.MultiheadAttention(3, 1, dropout=0.1), 2, "must give a tensor; got tuple"),
    ],
)
def test_what_gives_no_interval_is_refused(model: nn.Module, samples: int, message: str) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(*[x] * (3 if isinstance(model, nn.MultiheadAttention) else 1))

    with pytest.raises(StudyError, match=message):
        mc_dropout(Wrapped(), torch.ones(1, 3), samples)
