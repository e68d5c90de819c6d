"""One trial: what it trains, what it scores, how it ends, and what it leaves alone."""

from __future__ import annotations

import copy
import math
import random
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from sklearn import metrics
from torch import Tensor, nn

from renorm.choices import objectives
from renorm.comparison import memory as memory_module
from renorm.comparison import trial as trial_module
from renorm.comparison.data import Splits, from_parts, load, split
from renorm.comparison.memory import PeakMemory
from renorm.comparison.spec import TrialResult, TrialSpec
from renorm.comparison.trial import build_model, run_trial, sample_order
from renorm.norms.norm import Norm


@pytest.fixture(scope="module")
def digits() -> Splits:
    return split(load("digits"))


@pytest.fixture(scope="module")
def small() -> Splits:
    """Three classes of 5 features, 47 samples to train on."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(107, 5))
    y = np.argmax(x[:, :3] + 0.1 * rng.normal(size=(107, 3)), 1)
    return from_parts((x[:47], y[:47]), (x[47:77], y[47:77]), (x[77:], y[77:]))


@pytest.fixture(scope="module")
def numbers() -> Splits:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(90, 4))
    y = 50 + 7 * (x[:, 0] - x[:, 1]) + rng.normal(size=90)
    return from_parts((x[:50], y[:50]), (x[50:70], y[50:70]), (x[70:], y[70:]))


def spec_of(splits: Splits, **changes: object) -> TrialSpec:
    spec = TrialSpec(
        data=splits.fingerprint,
        model="mlp",
        norm="batch",
        batch_size=8,
        lr=0.05,
        base_lr=0.05,
        optimizer="sgd",
        activation="relu",
        loss=objectives.find(splits.task, "auto"),
        dropout=0.0,
        epochs=3,
        seed=0,
    )
    return replace(spec, **changes)  # type: ignore[arg-type]


def without_measurements(result: TrialResult) -> TrialResult:
    return replace(result, seconds_per_step=0.0, peak_memory_mb=0.0)


# What is trained


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_trial_is_the_training_loop_of_its_docstring(small: Splits, optimizer: str) -> None:
    spec = spec_of(small, optimizer=optimizer, seed=5)
    result = run_trial(spec, small)

    torch.manual_seed(5)
    model = build_model(spec, small)
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]
    update = kind(model.parameters(), lr=spec.lr)
    x, y = torch.tensor(small.x_train), torch.tensor(small.y_train)
    losses = []
    for epoch in range(3):
        order = np.random.default_rng([5, epoch]).permutation(47)
        for step in range(5):  # 47 samples are five full batches of 8
            rows = order[8 * step : 8 * step + 8]
            update.zero_grad()
            loss = F.cross_entropy(model(x[rows]), y[rows])
            loss.backward()
            update.step()
            losses.append(loss.item())
    model.eval()
    output = model(torch.tensor(small.x_test)).detach()

    assert result.status == "ok"
    assert result.num_steps == 15
    assert [point.step for point in result.curve] == [5, 10, 15]
    means = np.mean(np.reshape(losses, (3, 5)), 1)
    np.testing.assert_allclose([point.train_loss for point in result.curve], means, rtol=1e-5)
    assert result.test["loss"] == pytest.approx(metrics.log_loss(small.y_test, output.double().softmax(1)), rel=1e-5)
    assert result.test["error"] == pytest.approx(metrics.zero_one_loss(small.y_test, output.argmax(1)))
    assert result.curve[-1].valid_score == result.valid["error"]
    assert result.curve[-1].valid_loss == result.valid["loss"]
    assert result.num_parameters == sum(value.numel() for value in model.parameters())


def test_it_learns_digits(digits: Splits) -> None:
    result = run_trial(spec_of(digits, batch_size=32, lr=0.1, epochs=8), digits)
    assert result.test["error"] < 0.06
    assert result.curve[0].train_loss > 5 * result.curve[-1].train_loss


def test_batches_of_two_hurt_batch_norm_and_not_group_norm(digits: Splits) -> None:
    errors = {
        (norm, size): run_trial(spec_of(digits, norm=norm, batch_size=size, lr=0.1 * size / 32, epochs=4), digits).test[
            "error"
        ]
        for norm in ("batch", "group")
        for size in (2, 32)
    }
    assert errors["batch", 2] > errors["batch", 32] + 0.1
    assert errors["group", 2] < errors["batch", 2] - 0.1


@pytest.mark.parametrize("norm", ["none", "batch", "layer", "group", "rms", "switch"])
def test_every_norm_of_the_default_study_learns(digits: Splits, norm: str) -> None:
    result = run_trial(spec_of(digits, norm=norm, batch_size=32, lr=0.1, epochs=8), digits)
    assert result.status == "ok"
    assert result.test["error"] < 0.15


@pytest.mark.parametrize("model", ["cnn", "resnet", "transformer"])
def test_every_model_can_be_trained(digits: Splits, model: str) -> None:
    few = replace(digits, x_train=digits.x_train[:64], y_train=digits.y_train[:64])
    result = run_trial(spec_of(few, model=model, norm="group", batch_size=16, epochs=2, optimizer="adam", lr=1e-3), few)
    assert result.status == "ok"
    assert result.curve[1].train_loss < result.curve[0].train_loss


def test_the_order_depends_on_seed_and_epoch_alone(small: Splits) -> None:
    seen: dict[tuple[str, int], list[float]] = {}

    class Spy(nn.Module):
        def __init__(self, key: tuple[str, int]) -> None:
            super().__init__()
            self.key = key
            self.linear = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                seen[self.key] += x[:, 0].tolist()
            return self.linear(x)  # type: ignore[no-any-return]

    def build(spec: TrialSpec, splits: Splits) -> nn.Module:
        seen[spec.norm, spec.batch_size] = []  # forgets what the rehearsal saw
        return Spy((spec.norm, spec.batch_size))

    for norm, size in (("batch", 8), ("group", 8), ("group", 2), ("group", 45)):
        run_trial(spec_of(small, norm=norm, batch_size=size, lr=0.01 * size, epochs=2), small, build)
    first, second = (small.x_train[sample_order(47, 0, epoch), 0].tolist() for epoch in (0, 1))
    assert seen["batch", 8] == seen["group", 8] == first[:40] + second[:40]
    assert seen["group", 2] == first[:46] + second[:46]
    assert seen["group", 45] == first[:45] + second[:45]
    assert first != second
    assert first != small.x_train[sample_order(47, 1, 0), 0].tolist()


def test_equal_specs_give_equal_results(small: Splits) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(5, 16), nn.Dropout(), nn.Linear(16, 3))

        def forward(self, x: Tensor) -> Tensor:
            noise = np.random.normal() + random.random()  # noqa: NPY002
            return self.layers(x) + (0.01 * noise if self.training else 0)  # type: ignore[no-any-return]

    def build(spec: TrialSpec, splits: Splits) -> nn.Module:
        return Noisy()

    first = run_trial(spec_of(small), small, build)
    torch.manual_seed(99)
    random.seed(99)
    assert without_measurements(run_trial(spec_of(small), small, build)) == without_measurements(first)
    assert run_trial(spec_of(small, seed=1), small, build).curve != first.curve


# What is scored


def test_regression_scores_are_in_the_targets_units(numbers: Splits) -> None:
    kept: list[nn.Module] = []

    def build(spec: TrialSpec, splits: Splits) -> nn.Module:
        kept.append(build_model(spec, splits))
        return kept[-1]

    result = run_trial(spec_of(numbers, norm="layer", epochs=20, lr=0.02), numbers, build)
    output = kept[-1].eval()(torch.tensor(numbers.x_test)).detach().numpy()[:, 0]
    predicted = output * numbers.target_std + numbers.target_mean
    y = numbers.y_test * numbers.target_std + numbers.target_mean
    expected = {
        "rmse": metrics.root_mean_squared_error(y, predicted),
        "mae": metrics.mean_absolute_error(y, predicted),
        "r2": metrics.r2_score(y, predicted),
        "correlation": scipy.stats.pearsonr(y, predicted).statistic,
        "loss": metrics.mean_squared_error(numbers.y_test, output),
    }
    assert result.test == pytest.approx(expected, rel=1e-4)
    assert result.valid["rmse"] == result.curve[-1].valid_score
    assert 0.5 < result.test["rmse"] < 5
    assert result.test["r2"] > 0.8


class Constant(nn.Module):
    """Predicts its one weight for every sample, in an output of the shape that is asked for."""

    def __init__(self, *shape: int, train: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1), requires_grad=train)
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.expand(len(x), *self.shape) + 0 * x.sum()


def test_scores_that_are_not_defined_are_nan(numbers: Splits) -> None:
    flat = replace(numbers, y_test=np.zeros_like(numbers.y_test))
    result = run_trial(spec_of(flat), flat, lambda spec, splits: Constant())
    assert result.status == "ok"
    assert math.isnan(result.valid["correlation"])
    assert math.isfinite(result.valid["r2"])
    assert math.isnan(result.test["r2"])


@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_output_may_have_an_axis_or_not(numbers: Splits, shape: tuple[int, ...]) -> None:
    result = run_trial(spec_of(numbers), numbers, lambda spec, splits: Constant(*shape))
    # the best constant is the mean, which the standardized target has at 0
    assert result.test["loss"] == pytest.approx(float((numbers.y_test**2).mean()), rel=0.05)


def test_evaluation_does_not_depend_on_how_it_is_batched(small: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_trial(spec_of(small), small)
    monkeypatch.setattr(trial_module, "EVALUATION_BATCH", 7)
    assert run_trial(spec_of(small), small).test == pytest.approx(whole.test, rel=1e-6)


def test_the_test_part_is_read_at_the_end_and_only_if_asked(small: Splits) -> None:
    reads: list[str] = []

    class Counted(Splits):
        def __getattribute__(self, name: str) -> object:
            if name == "x_test":
                reads.append(name)
            return super().__getattribute__(name)

    counted = Counted(**{name: getattr(small, name) for name in Splits.__dataclass_fields__})
    reads.clear()
    tuning = run_trial(spec_of(small, test=False), counted)
    assert reads == []
    assert tuning.test == {}
    result = run_trial(spec_of(small), counted)
    assert reads == ["x_test", "x_test"]  # for the scores and for the worst cases
    assert result.valid == tuning.valid


def test_data_without_a_test_part_has_no_test_scores(small: Splits) -> None:
    without = replace(small, x_test=small.x_test[:0], y_test=small.y_test[:0])
    result = run_trial(spec_of(without), without)
    assert result.status == "ok"
    assert result.test == {}


# How it ends


@pytest.mark.parametrize("size", [2, 16])
def test_a_norm_of_one_value_is_refused(small: Splits, size: int) -> None:
    result = run_trial(spec_of(small, norm="instance", batch_size=size), small)
    assert result.status == "refused"
    shape = f"({size}, 128)"
    assert result.reason == (
        f"instance norm averages over one value on inputs of shape {shape}: it would return its bias"
    )
    assert (result.curve, result.num_steps, result.valid) == ((), 0, {})
    assert math.isnan(result.seconds_per_step)


@pytest.mark.parametrize(
    ("norm", "size", "status"),
    [
        ("batch", 1, "refused"),
        ("batch", 2, "ok"),
        ("group(128)", 8, "refused"),
        ("group(64)", 8, "ok"),
        ("layer", 1, "ok"),
        ("switch", 1, "ok"),
        ("none", 1, "ok"),
    ],
)
def test_only_single_values_are_refused(small: Splits, norm: str, size: int, status: str) -> None:
    result = run_trial(spec_of(small, norm=norm, batch_size=size, lr=1e-4), small)
    assert result.status == status, result.reason


def test_torchs_own_refusal_is_one_too(small: Splits) -> None:
    def build(spec: TrialSpec, splits: Splits) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))

    result = run_trial(spec_of(small, batch_size=1), small, build)
    assert result.status == "refused"
    assert "cannot train on this batch: Expected more than 1 value per channel" in result.reason


def test_a_frozen_norm_needs_no_batch(small: Splits) -> None:
    def build(spec: TrialSpec, splits: Splits) -> nn.Module:
        model = build_model(spec, splits)
        for layer in model.modules():
            if isinstance(layer, Norm):
                layer.frozen = True
        return model

    assert run_trial(spec_of(small, batch_size=1), small, build).status == "ok"


def test_a_loss_that_is_not_finite_ends_the_trial(small: Splits) -> None:
    result = run_trial(spec_of(small, norm="none", lr=1e9), small)
    assert result.status == "diverged"
    assert result.reason == f"the training loss is nan at step {result.num_steps + 1}"
    assert 0 < result.num_steps < 5
    assert result.test == {}


def test_the_curve_up_to_divergence_is_kept(small: Splits) -> None:
    class Bomb(Constant):
        steps = 0

        def forward(self, x: Tensor) -> Tensor:
            self.steps += self.training
            return super().forward(x) * (math.inf if self.steps > 7 else 1)

    result = run_trial(spec_of(small), small, lambda spec, splits: Bomb(3))
    assert result.status == "diverged"
    assert result.num_steps == 7
    assert [point.step for point in result.curve] == [5]


def test_a_validation_loss_that_is_not_finite_ends_the_trial(small: Splits) -> None:
    class Late(Constant):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1 if self.training else math.nan)

    result = run_trial(spec_of(small), small, lambda spec, splits: Late(3))
    assert result.status == "diverged"
    assert result.reason == "the validation loss is nan after epoch 1"
    assert len(result.curve) == 1


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2,), r"must have the shape \(8, 3\) .* it has \(8, 2\)"),
        ((), r"it has \(8,\)"),
        ((3, 1), r"it has \(8, 3, 1\)"),
    ],
)
def test_an_output_of_another_shape_fails(small: Splits, shape: tuple[int, ...], message: str) -> None:
    result = run_trial(spec_of(small), small, lambda spec, splits: Constant(*shape))
    assert result.status == "failed"
    assert re.search(message, result.reason)


def test_one_number_is_not_two(numbers: Splits) -> None:
    result = run_trial(spec_of(numbers), numbers, lambda spec, splits: Constant(2))
    assert result.reason.startswith("StudyError: the model's output must have the shape (8, 1)")


class Raising(Constant):
    def __init__(self, error: BaseException) -> None:
        super().__init__(3)
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


@pytest.mark.parametrize("error", [ValueError("no such layer"), RuntimeError("boom"), MemoryError("too big")])
def test_an_exception_of_the_model_is_a_result(small: Splits, error: Exception) -> None:
    result = run_trial(spec_of(small), small, lambda spec, splits: Raising(error))
    assert result.status == "failed"
    assert result.reason == f"{type(error).__name__}: {error}"


def test_a_builder_that_raises_is_a_result(small: Splits) -> None:
    result = run_trial(spec_of(small, model="resnet"), small)
    assert result.status == "failed"
    assert "takes images" in result.reason


def test_an_interrupt_passes_through(small: Splits) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_trial(spec_of(small), small, lambda spec, splits: Raising(KeyboardInterrupt()))


@pytest.mark.parametrize("size", [0, 48])
def test_a_batch_must_fit_into_the_training_part(small: Splits, size: int) -> None:
    result = run_trial(spec_of(small, batch_size=size), small)
    assert result.status == "failed"
    assert result.reason == f"batch size {size} needs as many samples; the training part has 47"


# What it leaves alone


def test_global_state_is_left_as_it_was(small: Splits) -> None:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    threads = torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            result = run_trial(spec_of(small), small)
            assert not torch.is_grad_enabled()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert result.status == "ok"
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    np.testing.assert_array_equal(np.random.get_state()[1], before[2])  # noqa: NPY002
    assert torch.get_num_threads() == threads


def test_a_model_that_works_in_place_does_not_change_the_data(small: Splits) -> None:
    def build(spec: TrialSpec, splits: Splits) -> nn.Module:
        return nn.Sequential(nn.ReLU(inplace=True), nn.Linear(5, 3))

    before = copy.deepcopy(small)
    run_trial(spec_of(small), small, build)
    assert replace(small).fingerprint == before.fingerprint


# Time and memory


def test_the_first_steps_are_not_timed(small: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, *np.cumsum([100.0] * 5 + [1.0, 2.0, 3.0, 2.0]), *range(10**6)])
    monkeypatch.setattr("renorm.comparison.trial.time.perf_counter", partial(next, clock))
    assert run_trial(spec_of(small, batch_size=5, epochs=1), small).seconds_per_step == 2.0


def test_memory_is_the_rise_to_the_peak() -> None:
    memory = PeakMemory()
    assert math.isnan(memory.peak_mb())
    memory.start()
    before = memory.peak_mb()
    if math.isnan(before):
        pytest.skip("this system does not say what is resident")
    torch.ones(64 * 2**18)  # 64 MiB, touched and freed
    assert memory.peak_mb() - before == pytest.approx(64, abs=8)
    memory.start()
    assert memory.peak_mb() < 8


@pytest.mark.parametrize("attribute", ["_CLEAR", "_STATUS"])
def test_memory_is_nan_where_the_system_cannot_say(attribute: str, monkeypatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(memory_module, attribute, tmp_path / "absent" / "file")
    memory = PeakMemory()
    memory.start()
    assert math.isnan(memory.peak_mb())


def test_memory_is_nan_where_freed_memory_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("renorm.comparison.memory.sys.platform", "darwin")
    memory = PeakMemory()
    memory.start()
    assert math.isnan(memory.peak_mb())
