"""What training can minimize, against formulas in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.special import expit, log_softmax

from renorm.choices.objectives import OBJECTIVES, find
from renorm.errors import StudyError

Array = npt.NDArray[np.float64]
RNG = np.random.default_rng(0)
Z, T = 3 * RNG.normal(size=(7, 4)), np.array([0, 3, 1, 1, 2, 0, 3])
ROWS, ONE_HOT = np.arange(7), np.eye(4)[T]
P = log_softmax(Z, axis=1)
X, Y = 2 * RNG.normal(size=9), RNG.normal(size=9)

CLASSES: dict[str, Callable[[], Array]] = {
    "cross_entropy": lambda: -P[ROWS, T],
    "label_smoothing": lambda: -((0.9 * ONE_HOT + 0.1 / 4) * P).sum(1),
    "focal": lambda: -((1 - np.exp(P[ROWS, T])) ** 2) * P[ROWS, T],
    "binary_cross_entropy": lambda: -np.log(np.where(ONE_HOT == 1, expit(Z), expit(-Z))).sum(1),
    "multi_margin": lambda: (np.maximum(0, 1 - Z[ROWS, T][:, None] + Z) * (1 - ONE_HOT)).sum(1) / 4,
    "mse": lambda: ((Z - ONE_HOT) ** 2).sum(1),
}
NUMBERS: dict[str, Callable[[], Array]] = {
    "mse": lambda: (X - Y) ** 2,
    "mae": lambda: np.abs(X - Y),
    "huber": lambda: np.where(np.abs(X - Y) <= 1, (X - Y) ** 2 / 2, np.abs(X - Y) - 0.5),
}


def test_every_objective_has_a_formula_here() -> None:
    assert list(CLASSES) == list(OBJECTIVES["classification"])
    assert list(NUMBERS) == list(OBJECTIVES["regression"]) == list(OBJECTIVES["forecast"])


@pytest.mark.parametrize("name", CLASSES)
def test_losses_of_classes(name: str) -> None:
    value = OBJECTIVES["classification"][name].value
    output = torch.tensor(Z, requires_grad=True)
    assert value(output, torch.tensor(T)).item() == pytest.approx(CLASSES[name]().mean(), rel=1e-12)
    assert torch.autograd.gradcheck(value, (output, torch.tensor(T)))
    assert value(output.detach().float(), torch.tensor(T)).dtype == torch.float32


@pytest.mark.parametrize("name", NUMBERS)
def test_losses_of_numbers(name: str) -> None:
    value = OBJECTIVES["regression"][name].value
    assert value(torch.tensor(X), torch.tensor(Y)).item() == pytest.approx(NUMBERS[name]().mean(), rel=1e-12)


@pytest.mark.parametrize("name", CLASSES)
def test_losses_of_sure_outputs_are_finite(name: str) -> None:
    sure = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    for target in (0, 1):
        value = OBJECTIVES["classification"][name].value(sure, torch.tensor([target]))
        (gradient,) = torch.autograd.grad(value, sure)
        assert value.isfinite()
        assert gradient.isfinite().all()


def test_names_by_task() -> None:
    assert [find(task, "auto") for task in OBJECTIVES] == ["cross_entropy", "mse", "mse"]
    assert find("classification", " Focal ") == "focal"
    with pytest.raises(StudyError, match=r"loss must be one of cross_entropy, .*; got 'foc'; did you mean 'focal'"):
        find("classification", "foc")
    with pytest.raises(StudyError, match="'mae' is for a regression or a forecast; this is a classification: write"):
        find("classification", "mae")
