"""Distances of batch and running statistics: by their formulas, and on data for which the null is known."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import renorm as rn
from renorm.errors import MeasureError
from renorm.measures.stability import Instability, instability, record_instability


def statistics(d=7, seed=0):
    generator = np.random.default_rng(seed)
    mean, known_mean = generator.normal(size=(2, d))
    var, known_var = generator.gamma(2.0, size=(2, d))
    return mean, var, known_mean, known_var


def tensors(*arrays):
    return [torch.tensor(array) for array in arrays]


def test_formulas():
    mean, var, known_mean, known_var = statistics()
    found = instability(*tensors(mean, var, known_mean, known_var), num_values=50)
    deviation, known_deviation = np.sqrt(var), np.sqrt(known_var)
    expected = {
        "mean_distance": np.linalg.norm(mean - known_mean) / 7,
        "var_distance": np.linalg.norm(var - known_var) / 7,
        "mean_tid": np.mean(np.abs((known_mean - mean) / deviation)),
        "var_tid": np.mean(np.abs(known_deviation / deviation - 1)),
        "mean_shift": np.sqrt(np.mean(((known_mean - mean) / deviation) ** 2)),
        "var_shift": np.sqrt(np.mean(np.log(known_var / var) ** 2)),
        "num_values": 50,
    }
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-12), name


def test_equal_statistics_have_no_distance():
    mean, var, *_ = tensors(*statistics())
    var[0] = 0
    found = instability(mean, var, mean, var, num_values=2)
    assert (found.mean_distance, found.var_distance, found.mean_tid, found.var_tid) == (0, 0, 0, 0)
    assert (found.mean_shift, found.var_shift) == (0, 0)


def test_a_constant_channel():
    zero, one = torch.zeros(1), torch.ones(1)
    found = instability(one, zero, zero, one, num_values=8)
    assert (found.mean_tid, found.var_tid, found.mean_shift, found.var_shift) == (math.inf,) * 4
    assert (found.mean_distance, found.var_distance) == (1, 1)
    found = instability(zero, one, zero, zero, num_values=8)
    assert (found.mean_tid, found.var_tid, found.var_shift) == (0, 1, math.inf)


@pytest.mark.parametrize("n", [32, 500])
def test_the_null_is_what_independent_values_give(n):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 20_000, generator=generator, dtype=torch.float64) * 3 + 5
    var, mean = torch.var_mean(x, 0)
    found = instability(mean, var, torch.full_like(mean, 5), torch.full_like(var, 9), num_values=n)
    # Of first order in 1 / n; the mean of 20,000 channels adds half a percent.
    tolerance = 2 / n + 0.02
    assert found.mean_shift == pytest.approx(found.null_mean_shift, rel=tolerance)
    assert found.var_shift == pytest.approx(found.null_var_shift, rel=tolerance)
    assert found.mean_tid == pytest.approx(found.null_mean_tid, rel=tolerance)
    assert found.var_tid == pytest.approx(found.null_var_tid, rel=tolerance)
    assert found.null_mean_shift == 1 / math.sqrt(n)
    assert found.null_var_shift == math.sqrt(2 / n)


def test_scale_matters_to_powernorms_distance_only():
    arrays = statistics()
    small = instability(*tensors(*arrays), num_values=50)
    large = instability(*tensors(*(a * f for a, f in zip(arrays, (10, 100, 10, 100), strict=True))), num_values=50)
    wide = instability(*tensors(*(np.tile(a, 4) for a in arrays)), num_values=50)
    assert large.mean_distance == pytest.approx(10 * small.mean_distance)
    assert large.var_distance == pytest.approx(100 * small.var_distance)
    assert wide.mean_distance == pytest.approx(small.mean_distance / 2)
    for name in ("mean_tid", "var_tid", "mean_shift", "var_shift"):
        assert getattr(large, name) == pytest.approx(getattr(small, name))
        assert getattr(wide, name) == pytest.approx(getattr(small, name))


def expected_of(x, dims, known, correction=1):
    x = x.double()
    values = x.numel() // known[0].numel()
    return instability(x.mean(dims), x.var(dims, correction=correction), *known, num_values=values)


LAYERS = {
    "torch": (lambda: nn.BatchNorm2d(3), (0, 2, 3), 1),
    "batch": (lambda: rn.BatchNorm2d(3), (0, 2, 3), 1),
    "last axis": (lambda: rn.BatchNorm(5, axis=-1), (0, 1, 2), 1),
    "pattern": (lambda: rn.Norm("[n] c [...]", running="c", c=3), (0, 2, 3), 1),
    "ghost": (lambda: rn.GhostBatchNorm(3, size=4), (0, 2, 3), 1),
    "switch": (lambda: rn.SwitchNorm2d(3), (0, 2, 3), 0),
    "renorm": (lambda: rn.BatchRenorm(3), (0, 2, 3), 1),
}


@pytest.mark.parametrize("name", LAYERS)
def test_recorded_from_a_layer(name):
    make, dims, correction = LAYERS[name]
    torch.manual_seed(0)
    model = nn.Sequential(make())
    layer, batches = model[0], [torch.randn(6, 3, 4, 5) * 2 + 1 for _ in range(3)]
    correction = 0 if getattr(layer, "unbiased", True) is False else correction
    with record_instability(model) as records:
        for x in batches:
            known = layer.running_mean.clone(), layer.running_var.clone()
            model(x)
            expected = expected_of(x, dims, known, correction)
            for field in Instability.__dataclass_fields__:
                assert getattr(records["0"][-1], field) == pytest.approx(getattr(expected, field), rel=1e-6), field
        model.eval()(x)
    model.train()(x)
    assert [*records] == ["0"]
    assert len(records["0"]) == 3
    assert not layer._forward_pre_hooks


def test_masked_entries_do_not_count():
    layer, x = rn.BatchNorm1d(3), torch.randn(4, 3, 6)
    mask = torch.ones(4, 1, 6, dtype=torch.bool)
    mask[:, :, 4:] = False
    with record_instability(layer) as records:
        layer(x.masked_fill(~mask, math.nan), mask=mask)
        layer.running_mean.zero_(), layer.running_var.fill_(1)
        layer(x=x[..., :4])
    masked, cut = records[""]
    assert masked.num_values == cut.num_values == 16
    assert masked.mean_shift == pytest.approx(cut.mean_shift)
    assert masked.var_shift == pytest.approx(cut.var_shift)


def test_what_is_not_recorded():
    model = nn.ModuleList(
        [
            nn.BatchNorm1d(3, track_running_stats=False),
            nn.InstanceNorm1d(3, track_running_stats=True),
            rn.InstanceNorm1d(3, track_running_stats=True),
            rn.PowerNorm(3),
            rn.BatchWhitening(3),
            nn.LayerNorm(3),
            nn.BatchNorm1d(3),
        ]
    )
    with record_instability(model) as records:
        model[6].eval()(torch.randn(1, 3))
    assert records == {"6": []}
    single = rn.Norm("[n] c [...]", running="c", one_value="running", c=3)
    with record_instability(single) as records:
        single(torch.randn(1, 3))
    assert records == {"": []}
    frozen = rn.BatchNorm1d(3)
    frozen.frozen = True
    with record_instability(frozen) as records:
        frozen(torch.randn(8, 3))
    assert records == {"": []}


def test_hooks_are_removed_after_an_error():
    layer = nn.BatchNorm1d(3)
    with pytest.raises(ValueError, match="more than 1"), record_instability(layer) as records:
        layer(torch.randn(1, 3))
    assert not layer._forward_pre_hooks
    assert records[""] == []


def test_a_training_that_diverges_is_recorded():
    layer = nn.BatchNorm1d(3)
    with record_instability(layer) as records:
        for _ in range(2):
            layer(torch.full((4, 3), math.nan))
    assert all(math.isnan(value) for value in (records[""][1].mean_tid, records[""][1].var_shift))


def test_half_precision():
    x = torch.randn(64, 3).half() + 100
    layer = nn.BatchNorm1d(3)
    with record_instability(layer) as records:
        layer(x.float())
        layer.running_mean.zero_(), layer.running_var.fill_(1)
        layer.half()(x)
    assert records[""][1].mean_tid == pytest.approx(records[""][0].mean_tid, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.ones(3)}, "equally many channels"),
        ({0: torch.ones(2, 1)}, "equally many channels"),
        ({1: torch.tensor([-1.0, 1.0])}, "must not be negative"),
        ({3: torch.tensor([1.0, -1.0])}, "must not be negative"),
    ],
)
def test_refused(change, message):
    given = [change.get(i, torch.ones(2)) for i in range(4)]
    with pytest.raises(MeasureError, match=message):
        instability(*given, num_values=4)


def test_refused_counts():
    with pytest.raises(MeasureError, match="num_values must be at least 1; got 0"):
        instability(*[torch.ones(2)] * 4, num_values=0)
    with pytest.raises(MeasureError, match="equally many channels"):
        instability(*[torch.ones(0)] * 4, num_values=1)
