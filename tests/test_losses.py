"""Losses: the one that fits, the ones that do not, Keras's names against Keras, and likelihood."""

from __future__ import annotations

import math
import os
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import optimize, stats
from torch import Tensor, nn

os.environ.setdefault("KERAS_BACKEND", "torch")

from renorm.choices.keras_losses import KERAS_NAMES, loss
from renorm.choices.losses import LossChoice, loss_for
from renorm.errors import LossError, RenormError, StudyError

GENERATOR = torch.Generator().manual_seed(0)


def logits(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(*shape, generator=GENERATOR)).to(dtype)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    return F.one_hot(labels, classes).movedim(-1, 1) if labels.dim() > 1 else F.one_hot(labels, classes)


LABELS = torch.tensor([0, 2, 1, 1, 2, 0, 0, 2, 1])
YES = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1])
MANY = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 1, 1], [1, 0, 0]])
SOFT = torch.tensor([[0.2, 0.5, 0.3], [0.0, 1.0, 0.0], [0.1, 0.1, 0.8], [0.0, 0.4, 0.6]])
BINARY, SPARSE, ONE_HOT = ("binary_crossentropy", "sparse_categorical_crossentropy", "categorical_crossentropy")

# output's shape, target, torch's loss, Keras's name
FITS = {
    "one unit": ((9,), YES.float(), nn.BCEWithLogitsLoss, BINARY),
    "one unit, a column": ((9, 1), YES[:, None].float(), nn.BCEWithLogitsLoss, BINARY),
    "one unit, whole numbers": ((9, 1), YES[:, None], nn.BCEWithLogitsLoss, BINARY),
    "one unit, bool": ((9,), YES.bool(), nn.BCEWithLogitsLoss, BINARY),
    "one unit, uint8": ((9,), YES.to(torch.uint8), nn.BCEWithLogitsLoss, BINARY),
    "one unit, float64": ((9,), YES.double(), nn.BCEWithLogitsLoss, BINARY),
    "one unit, one sample": ((1, 1), torch.ones(1, 1), nn.BCEWithLogitsLoss, BINARY),
    "a mask": ((2, 1, 3, 3), torch.ones(2, 1, 3, 3), nn.BCEWithLogitsLoss, BINARY),
    "classes": ((9, 3), LABELS, nn.CrossEntropyLoss, SPARSE),
    "classes, uint16": ((9, 3), LABELS.to(torch.uint16), nn.CrossEntropyLoss, SPARSE),
    "one unit, uint32": ((9,), YES.to(torch.uint32), nn.BCEWithLogitsLoss, BINARY),
    "classes, int32": ((9, 3), LABELS.int(), nn.CrossEntropyLoss, SPARSE),
    "two classes": ((9, 2), YES, nn.CrossEntropyLoss, SPARSE),
    "two classes, bool": ((9, 2), YES.bool(), nn.CrossEntropyLoss, SPARSE),
    "classes, one left out": ((9, 3), LABELS.where(LABELS != 2, -100), nn.CrossEntropyLoss, SPARSE),
    "a map of classes": ((2, 3, 4, 5), torch.randint(3, (2, 4, 5)), nn.CrossEntropyLoss, SPARSE),
    "one-hot": ((9, 3), one_hot(LABELS, 3).float(), nn.CrossEntropyLoss, ONE_HOT),
    "one-hot, whole numbers": ((9, 3), one_hot(LABELS, 3), nn.CrossEntropyLoss, ONE_HOT),
    "one-hot, bool": ((9, 3), one_hot(LABELS, 3).bool(), nn.CrossEntropyLoss, ONE_HOT),
    "one-hot, a map": ((2, 3, 4), one_hot(torch.randint(3, (2, 4)), 3), nn.CrossEntropyLoss, ONE_HOT),
    "soft": ((4, 3), SOFT, nn.CrossEntropyLoss, ONE_HOT),
    "soft, half": ((4, 3), SOFT.half(), nn.CrossEntropyLoss, ONE_HOT),
    "soft, bfloat16": ((4, 3), SOFT.bfloat16(), nn.CrossEntropyLoss, ONE_HOT),
    "many labels": ((4, 3), MANY.float(), nn.BCEWithLogitsLoss, BINARY),
    "many labels, whole numbers": ((4, 3), MANY, nn.BCEWithLogitsLoss, BINARY),
    "real": ((9, 1), torch.linspace(-2, 3, 9)[:, None], nn.MSELoss, "mean_squared_error"),
    "real, float64": ((9,), torch.linspace(-2, 3, 9).double(), nn.MSELoss, "mean_squared_error"),
    "real, several": ((4, 3), torch.linspace(-2, 3, 12).view(4, 3), nn.MSELoss, "mean_squared_error"),
    "real, all the same": ((9,), torch.full((9,), 7.0), nn.MSELoss, "mean_squared_error"),
    "real, one far": ((9,), torch.tensor([0.1, -1, 0.5, 1, -0.7, 0.3, 90, 0, -0.2]), nn.HuberLoss, "Huber"),
}
FITTING = pytest.mark.parametrize(("shape", "target", "kind", "keras"), FITS.values(), ids=FITS)


@FITTING
def test_what_fits_is_found_and_runs(shape: tuple[int, ...], target: Tensor, kind: type, keras: str) -> None:
    output = logits(*shape).requires_grad_()
    choice = loss_for(output, target)
    assert isinstance(choice.loss, kind)
    assert choice.keras.startswith(f"{keras}(" if "entropy" in keras else keras)
    assert choice.reason
    value = choice.loss(output, target)
    assert value.dtype == output.dtype
    value.backward()
    assert output.grad.isfinite().all()


@FITTING
def test_it_is_torchs_own_number(shape: tuple[int, ...], target: Tensor, kind: type, keras: str) -> None:
    output = logits(*shape)
    choice = loss_for(output, target)
    cast = target.long() if keras == SPARSE else target.float()
    reference = kind(delta=choice.loss.delta) if kind is nn.HuberLoss else kind()
    assert torch.equal(choice.loss(output, target), reference(output, cast))
    assert repr(choice.loss) == repr(reference)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_outputs_of_any_dtype(dtype: torch.dtype) -> None:
    for shape, target, kind, _ in FITS.values():
        output = logits(*shape, dtype=dtype)
        choice = loss_for(output, target)
        assert isinstance(choice.loss, kind)
        assert choice.loss(output, target).dtype == dtype


def test_a_class_that_cannot_be_is_no_mistake() -> None:
    output = logits(9, 3).index_fill(1, torch.tensor([2]), -math.inf)
    assert loss_for(output, YES).loss(output, YES).isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    """A target rounded to half precision would be another target: 1001 is 1000 in bfloat16."""
    output, target = torch.full((4,), 1000, dtype=dtype), torch.tensor([1001.0, 1003, 999, 997])
    assert loss_for(output, target).loss(output, target).item() == 5.0
    p, yes = torch.tensor([1, 0], dtype=dtype), torch.tensor([0.0, 1.0])
    assert loss(BINARY)(p, yes).item() == pytest.approx(-math.log(1e-7), rel=0.02)  # as Keras clips it
    assert loss(BINARY)(p, yes).dtype == dtype


def test_the_choice_is_frozen_and_pickles() -> None:
    choice = loss_for(logits(9, 3), LABELS)
    again = pickle.loads(pickle.dumps(choice))
    assert isinstance(again, LossChoice)
    assert again.reason == choice.reason
    with pytest.raises(AttributeError):
        choice.reason = "?"  # type: ignore[misc]


def test_reasons_name_what_decided() -> None:
    assert "3 units and whole numbers from 0 to 2" in loss_for(logits(9, 3), LABELS).reason
    assert "a single 1" in loss_for(logits(9, 3), one_hot(LABELS, 3)).reason
    assert "BCEWithLogitsLoss" in loss_for(logits(9, 3), one_hot(LABELS, 3)).reason  # the other reading
    assert "yes or no each for itself" in loss_for(logits(4, 3), MANY).reason
    assert "normal noise" in loss_for(logits(9), torch.linspace(-2, 3, 9)).reason
    assert "(target == target.max()).float() for torch.nn.BCE" in loss_for(logits(9), 2.0 * YES - 1).reason
    assert "half of them equal" in loss_for(logits(9), torch.tensor([3.0] * 8 + [90.0])).reason
    assert "the last one would fit" in loss_for(logits(2, 5, 5), torch.randint(5, (2, 5))).reason
    assert "the last one would fit" not in loss_for(logits(2, 5, 4), torch.randint(5, (2, 4))).reason
    assert "if they are probabilities" in loss_for(logits(9), torch.linspace(0, 1, 9)).reason


def test_hubers_delta_is_in_the_targets_units() -> None:
    normal = torch.randn(2000, generator=torch.Generator().manual_seed(1))
    for unit in (1e-3, 1.0, 1e5):
        target = unit * torch.cat([normal, torch.tensor([40.0])])
        choice = loss_for(torch.zeros(2001), target)
        assert isinstance(choice.loss, nn.HuberLoss)
        assert choice.loss.delta == pytest.approx(1.345 * unit, rel=0.05)
    assert isinstance(loss_for(torch.zeros(2000), normal).loss, nn.MSELoss)


def test_units_of_other_scales_are_not_far_out() -> None:
    """Among metres, kilometres look like outliers; an outlier is one among its own."""
    target = torch.randn(500, 2, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 1000.0])
    assert isinstance(loss_for(torch.zeros(500, 2), target).loss, nn.MSELoss)
    target[7, 1] = 90_000
    choice = loss_for(torch.zeros(500, 2), target)
    assert isinstance(choice.loss, nn.HuberLoss)
    assert choice.loss.delta == pytest.approx(1345, rel=0.1)
    assert "one 84 robust" in choice.reason  # 90,000 by the deviation that delta is 1.345 of
    assert choice.loss.delta * 84 / 1.345 == pytest.approx(90_000, rel=0.01)


@pytest.mark.parametrize("size", [2, 4, 8, 32, 256])
def test_normal_targets_of_a_small_batch_are_seldom_taken_for_far_out(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(size, generator=generator) for _ in range(500)]
    hubers = sum(isinstance(loss_for(torch.zeros(size), batch).loss, nn.HuberLoss) for batch in batches)
    assert hubers <= 5  # measured: one in 150 at worst


def test_untrained_outputs_are_logits() -> None:
    """A last layer of zeros, as some initialize it, lies in [0, 1] too."""
    loss_for(torch.zeros(32, 1), YES.repeat(4)[:32, None].float())
    loss_for(torch.zeros(32, 4), torch.randint(4, (32,)))
    loss_for(torch.tensor([[0.3]]), torch.ones(1, 1))  # one value says nothing


# refused: output, target, what the message says
REFUSED = {
    "(N, 1) beside (N,)": (logits(9, 1), YES.float(), r"\(9, 1\) and \(9,\).*target.view\(9, 1\).*BCEWithLogits"),
    "(N,) beside (N, 1)": (logits(9), YES[:, None].float(), r"output.view\(9, 1\).*binary_crossentropy"),
    "(N, 1) beside (N,), real": (logits(9, 1), torch.linspace(0, 5, 9), "MSELoss.*mean_squared_error"),
    "another number of samples": (logits(9), YES[:4].float(), r"a target of shape \(9,\)"),
    "a column of labels": (logits(9, 3), LABELS[:, None], r"write target.squeeze\(1\) for .*CrossEntropyLoss.*sparse"),
    "labels from 1": (logits(9, 3), LABELS + 1, "write target - 1"),
    "a label too large": (logits(9, 3), LABELS.where(LABELS < 2, 7), "from 0 to 7.*8 outputs.*Cross.*sparse"),
    "a negative label": (logits(9, 3), LABELS - 1, "from -1 to 1"),
    "labels as floats": (logits(9, 3), LABELS.float(), r"got torch.float32: write target.long\(\) for .*sparse_cat"),
    "K units, one real number": (logits(9, 3), torch.linspace(-2, 3, 9), r"3 units need 3 real.*broadcast.*MSELoss"),
    "ten classes, one unit": (logits(9, 1), 3 * LABELS[:, None], "one unit tells 0 from 1; got .*0 to 6.*7 outputs"),
    "counts, K units": (logits(4, 3), MANY * 2, r"must be 0 or 1; got 0 to 2.*shape \(4,\)"),
    "classes last": (logits(2, 5, 3), torch.randint(3, (2, 5)), r"write output.movedim\(-1, 1\) for"),
    "another shape": (logits(9, 3), torch.zeros(9, 4), r"\(9, 3\) and target \(9, 4\) do not fit"),
    "softmax": (logits(9, 3).softmax(1), LABELS, "must be logits; got rows that sum to 1.*CrossEntropyLoss.*sparse"),
    "softmax, half": (logits(9, 3).softmax(1).half(), LABELS, "must be logits"),
    "softmax, one-hot": (logits(9, 3).softmax(1), one_hot(LABELS, 3), "from_logits=False"),
    "sigmoid": (logits(9, 1).sigmoid(), YES[:, None], r"values in \[0, 1\] only.*sigmoid.*BCEWithLogitsLoss.*binary"),
    "sigmoid, many labels": (logits(4, 3).sigmoid(), MANY, "must be logits"),
    "predicted classes": (LABELS, LABELS, "must be floating.*argmax.*CrossEntropyLoss"),
    "complex": (logits(9), torch.ones(9, dtype=torch.complex64), "target must be real"),
    "nan": (logits(9), torch.full((9,), math.nan), "must be finite"),
    "inf": (logits(9, 3), torch.full((9,), math.inf), "must be finite"),
    "nobody": (logits(0, 3), torch.zeros(0, dtype=torch.long), "empty batch"),
    "labels, all left out": (logits(9, 3), torch.full((9,), -100), "some label must count; got -100 only"),
    "void is -1": (logits(9, 3), LABELS.where(LABELS < 2, -1), r"ignore_index=-1\) if -1 means to leave it out, for"),
    "void is 255": (logits(9, 3), LABELS.where(LABELS < 2, 255), "ignore_index=255.*, or a model with 256 outputs"),
    "yes and no are -1 and 1": (logits(9), 2 * YES - 1, r"-1 to 1: for a yes or no write \(target == 1\).float"),
    "an output of nan": (torch.full((9, 3), math.nan), LABELS, "the output must be numbers"),
    "an output of inf": (logits(9).where(YES == 0, math.inf), logits(9), "the output must be numbers"),
    "a list": (logits(9, 3), LABELS.tolist(), r"the target must be a tensor; got list: write torch.as_tensor\("),
    "an array": (logits(9, 3), LABELS.numpy(), "the target must be a tensor; got ndarray"),
    "several outputs": ((logits(9, 3), logits(9)), LABELS, r"the output must be a tensor; got tuple: write output\[0"),
    "a number": (torch.tensor(1.0), torch.tensor(1.0), "batch dimension"),
}  # fmt: skip


@pytest.mark.parametrize(("output", "target", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_and_says_what_would(output: Tensor, target: Tensor, message: str) -> None:
    with pytest.raises(LossError, match=message) as raised:
        loss_for(output, target)
    assert isinstance(raised.value, ValueError)
    assert isinstance(raised.value, RenormError)
    # the torch and the Keras name of what would fit
    assert "torch.nn." in str(raised.value)
    assert "Keras " in str(raised.value)


# Keras

EXTREME = torch.tensor([[-1e4, 0.0, 1e4], [80.0, -80.0, 0.0], [0.0, 0.0, 0.0], [1e-3, 1.0, -1.0]])


def keras_loss(name: str, from_logits: bool, output: Tensor, target: Tensor) -> float:
    keras = pytest.importorskip("keras")
    classes = {
        ONE_HOT: keras.losses.CategoricalCrossentropy,
        SPARSE: keras.losses.SparseCategoricalCrossentropy,
        BINARY: keras.losses.BinaryCrossentropy,
    }
    return float(classes[name](from_logits=from_logits)(target, output))


def keras_cases() -> dict[str, tuple[str, bool, Tensor, Tensor]]:
    x, places = logits(9, 3), logits(2, 5, 3)
    p = torch.tensor([[0.0, 1.0, 0.0], [0.2, 0.3, 0.4], [1.0, 1.0, 2.0], [1e-9, 1e-8, 1.0]])  # rows need not sum to 1
    units = torch.tensor([[0.0, 1.0, 0.5], [1e-9, 1 - 1e-9, 0.3], [0.9, 1.0, 0.0], [0.2, 0.4, 0.6]])
    labels, rows = torch.tensor([0, 1, 2, 0]), torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 1], [1, 0, 0]])
    return {
        "logits, one-hot": (ONE_HOT, True, x, one_hot(LABELS, 3)),
        "logits, soft": (ONE_HOT, True, EXTREME / 100, SOFT),
        "logits, soft, places": (ONE_HOT, True, places, torch.softmax(logits(2, 5, 3), -1)),
        "logits, labels": (SPARSE, True, x, LABELS),
        "logits, a column of labels": (SPARSE, True, x, LABELS[:, None]),
        "logits, labels as floats": (SPARSE, True, x, LABELS.float()),
        "logits, labels, places": (SPARSE, True, places, torch.randint(3, (2, 5), generator=GENERATOR)),
        "logits, far": (SPARSE, True, EXTREME, labels),
        "logits, yes": (BINARY, True, logits(9, 1), YES[:, None]),
        "logits, many": (BINARY, True, EXTREME, MANY),
        "probabilities, one-hot": (ONE_HOT, False, p, rows),
        "probabilities, soft": (ONE_HOT, False, p, SOFT),
        "probabilities, labels": (SPARSE, False, p, labels),
        "probabilities, places": (SPARSE, False, places.softmax(-1), torch.randint(3, (2, 5), generator=GENERATOR)),
        "probabilities, yes": (BINARY, False, logits(9, 1).sigmoid(), YES[:, None]),
        "probabilities, many": (BINARY, False, units, MANY),
        "probabilities, soft yes": (BINARY, False, units, SOFT),
    }  # fmt: skip


KERAS = keras_cases()


@pytest.mark.parametrize(("name", "from_logits", "output", "target"), KERAS.values(), ids=KERAS)
def test_the_names_give_keras_numbers(name: str, from_logits: bool, output: Tensor, target: Tensor) -> None:
    expected = keras_loss(name, from_logits, output, target)
    assert math.isfinite(expected)
    value = loss(name, from_logits=from_logits)(output, target)
    assert value.item() == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", KERAS_NAMES)
def test_probabilities_and_their_logits_agree(name: str) -> None:
    x = logits(9, 3, dtype=torch.float64)
    target = {ONE_HOT: one_hot(LABELS, 3), SPARSE: LABELS, BINARY: one_hot(LABELS, 3)}[name]
    p = x.sigmoid() if name == BINARY else x.softmax(-1)
    torch.testing.assert_close(loss(name)(p, target), loss(name, from_logits=True)(x, target), rtol=1e-6, atol=1e-6)


def test_the_choice_and_the_name_it_gives_agree() -> None:
    for shape, target, _, keras in FITS.values():
        if keras in KERAS_NAMES and len(shape) == 2 and not bool((target == -100).any()):
            output = logits(*shape, dtype=torch.float64)
            choice = loss_for(output, target)
            assert choice.keras == f"{keras}(from_logits=True)"
            torch.testing.assert_close(choice.loss(output, target), loss(keras, from_logits=True)(output, target))


@pytest.mark.parametrize(
    ("name", "output", "target", "message"),
    [
        (ONE_HOT, logits(9, 1), YES[:, None], "two classes or more.*binary_crossentropy"),
        (SPARSE, logits(9, 1), YES, "two classes or more"),
        (ONE_HOT, logits(9, 3), LABELS, r"\(9, 3\) and target \(9,\).*Keras sparse_categorical_crossentropy"),
        (SPARSE, logits(9, 3), one_hot(LABELS, 3), "without the classes.*Keras categorical_crossentropy"),
        (BINARY, logits(9, 1), YES, "the output's shape.*mean_squared_error"),
        (SPARSE, logits(9, 3), LABELS + 1, "labels 0 to 2; got 1 to 3"),
        (SPARSE, logits(9, 3), LABELS / 2, "labels 0 to 2; got 0 to 1: write whole numbers"),
        (BINARY, YES, YES, "must be floating; got torch.int64, as argmax gives"),
        (BINARY, logits(9), 2 * YES, r"must be from 0 to 1; got 0 to 2: write \(target > 0\)"),
    ],
)
def test_the_names_refuse_what_does_not_fit(name: str, output: Tensor, target: Tensor, message: str) -> None:
    with pytest.raises(LossError, match=message):
        loss(name, from_logits=True)(output, target)


@pytest.mark.parametrize("name", KERAS_NAMES)
def test_logits_are_not_taken_for_probabilities(name: str) -> None:
    target = LABELS if name == SPARSE else one_hot(LABELS, 3)
    with pytest.raises(LossError, match=rf"takes probabilities; got .* write renorm.loss\('{name}', from_logits=True"):
        loss(name)(logits(9, 3), target)
    if name != BINARY:  # torch's own raises
        assert loss(name)(torch.full((9, 3), math.nan), target).isnan()


@pytest.mark.parametrize("name", KERAS_NAMES)
def test_the_names_compile_and_map(name: str) -> None:
    x, target = logits(9, 3), LABELS if name == SPARSE else one_hot(LABELS, 3)
    p = x.sigmoid() if name == BINARY else x.softmax(-1)
    compiled = torch.compile(loss(name), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(p, target), loss(name)(p, target))
    torch.testing.assert_close(torch.vmap(loss(name))(p, target).mean(), loss(name)(p, target))


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(StudyError, match="did you mean 'categorical_crossentropy'"):
        loss("categorial_crossentropy")
    assert repr(loss(" Binary_Crossentropy ")) == "KerasCrossEntropy('binary_crossentropy', from_logits=False)"


# minimizing a cross-entropy maximizes the likelihood


def minimized(parameters: list[Tensor], value: object) -> float:
    optimizer = torch.optim.LBFGS(
        parameters, lr=1, max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        result = value()
        result.backward()
        return result

    optimizer.step(closure)
    return value().item()


def test_the_minimum_of_cross_entropy_is_the_closed_form_of_the_likelihood() -> None:
    """Without inputs the most likely probabilities are the shares of the classes, and the minimum is their entropy."""
    labels = torch.tensor([0] * 5 + [1] * 2 + [2] * 13)
    z = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    choice = loss_for(z.expand(20, 3), labels)
    least = minimized([z], lambda: choice.loss(z.expand(20, 3), labels))
    shares = np.array([5, 2, 13]) / 20
    np.testing.assert_allclose(z.softmax(0).detach().numpy(), shares, atol=1e-7)
    assert least == pytest.approx(stats.entropy(shares), rel=1e-10)
    likelihood = stats.multinomial(20, shares).logpmf([5, 2, 13])
    count = math.lgamma(21) - sum(math.lgamma(n + 1) for n in (5, 2, 13))  # of the orders these labels can have
    assert -20 * least == pytest.approx(likelihood - count, rel=1e-10)


@pytest.mark.parametrize("units", [1, 3])
def test_the_minimum_of_cross_entropy_is_scipys_maximum_of_the_likelihood(units: int) -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=(200, 2))
    if units == 1:
        y = rng.binomial(1, 1 / (1 + np.exp(-(0.5 + x @ [1.0, -2.0]))))
    else:
        y = (x @ rng.normal(size=(2, 3)) + rng.gumbel(size=(200, 3))).argmax(1)

    def log_likelihood(flat: np.ndarray) -> float:
        z = x @ flat.reshape(3, units)[1:] + flat.reshape(3, units)[0]
        if units == 1:
            return stats.bernoulli.logpmf(y, 1 / (1 + np.exp(-z[:, 0]))).sum()
        p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        return np.log(p[np.arange(200), y]).sum()

    best = optimize.minimize(lambda w: -log_likelihood(w), np.zeros(3 * units), method="BFGS")
    layer = nn.Linear(2, units, dtype=torch.float64)
    inputs, target = torch.from_numpy(x), torch.from_numpy(y)
    target = target[:, None] if units == 1 else target
    choice = loss_for(layer(inputs), target)
    least = minimized(list(layer.parameters()), lambda: choice.loss(layer(inputs), target))
    assert -200 * least == pytest.approx(-best.fun, rel=1e-8)
    ours = torch.cat([layer.bias[None], layer.weight.T]).detach().numpy()
    theirs = best.x.reshape(3, units)
    # a softmax does not change when all logits move alike
    centre = (lambda w: w - w.mean(1, keepdims=True)) if units > 1 else (lambda w: w)
    np.testing.assert_allclose(centre(ours), centre(theirs), atol=1e-4)


def test_mean_squared_error_is_the_likelihood_of_normal_noise() -> None:
    y = torch.linspace(-2, 3, 11, dtype=torch.float64)
    z = torch.zeros((), dtype=torch.float64, requires_grad=True)
    choice = loss_for(z.expand(11), y)
    minimized([z], lambda: choice.loss(z.expand(11), y))
    assert z.item() == pytest.approx(stats.norm.fit(y.numpy())[0])
