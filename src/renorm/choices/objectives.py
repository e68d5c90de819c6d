"""What training can minimize, by name: torch's losses of class indices and of real numbers.

Outputs are raw, without a softmax. What a model and a batch call for is seen by :func:`renorm.loss_for`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from renorm.choices.registry import look_up
from renorm.errors import StudyError

__all__ = ["AUTO", "OBJECTIVES", "Objective", "find"]

AUTO = "auto"  # the first one of the task


@dataclass(frozen=True)
class Objective:
    """A loss to train with."""

    formula: str  # of one sample; the loss is the mean over samples
    value: Callable[[Tensor, Tensor], Tensor]  # of raw outputs and targets
    noise: Literal["categorical", "gaussian"] | None = None  # it is minus the log-likelihood of this, up to constants


def _label_smoothing(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, label_smoothing=0.1)


def _focal(output: Tensor, target: Tensor) -> Tensor:
    logarithm = output.log_softmax(1).gather(1, target[:, None])
    return -((1 - logarithm.exp()) ** 2 * logarithm).mean()


def _one_hot(output: Tensor, target: Tensor) -> Tensor:
    return F.one_hot(target, output.shape[1]).to(output.dtype)


def _binary(output: Tensor, target: Tensor) -> Tensor:
    units = F.binary_cross_entropy_with_logits(output, _one_hot(output, target), reduction="none")
    return units.sum(1).mean()


def _brier(output: Tensor, target: Tensor) -> Tensor:
    return ((output - _one_hot(output, target)) ** 2).sum(1).mean()


_CLASSES: Mapping[str, Objective] = {
    "cross_entropy": Objective(r"-\ln p_t", F.cross_entropy, "categorical"),
    "label_smoothing": Objective(r"-0.9 \ln p_t - \tfrac{0.1}{K} \sum_c \ln p_c", _label_smoothing),
    "focal": Objective(r"-(1 - p_t)^2 \ln p_t", _focal),
    "binary_cross_entropy": Objective(r"-\ln \sigma(z_t) - \sum_{c \ne t} \ln(1 - \sigma(z_c))", _binary),
    "multi_margin": Objective(r"\tfrac1K \sum_{c \ne t} \max(0, 1 - z_t + z_c)", F.multi_margin_loss),
    "mse": Objective(r"(z_t - 1)^2 + \sum_{c \ne t} z_c^2", _brier),
}
_NUMBERS: Mapping[str, Objective] = {
    "mse": Objective(r"(z - t)^2", F.mse_loss, "gaussian"),
    "mae": Objective(r"|z - t|", F.l1_loss),
    "huber": Objective(r"\tfrac12 d^2 \text{ where } d = |z - t| \le 1, \text{ else } d - \tfrac12", F.huber_loss),
}
# By task. z are the outputs, p = softmax(z), t the class or the number; in a regression in standard deviations.
# Sources: label smoothing C. Szegedy et al. 2016 (arXiv:1512.00567), focal T.-Y. Lin et al. 2017 (arXiv:1708.02002),
# squares of classes L. Hui, M. Belkin 2021 (arXiv:2006.07322), Huber P. J. Huber 1964.
OBJECTIVES: Mapping[str, Mapping[str, Objective]] = {
    "classification": _CLASSES,
    "regression": _NUMBERS,
    "forecast": _NUMBERS,
}


def find(task: str, name: str) -> str:
    """The name as :data:`OBJECTIVES` has it for a task; of "auto" the task's first.

    Raises:
        StudyError: there is no such loss, or it is one of another task.

    >>> find("classification", "auto"), find("regression", "Huber")
    ('cross_entropy', 'huber')
    """
    known = OBJECTIVES[task]
    if name == AUTO:
        return next(iter(known))
    wanted = name.strip().lower()
    others = [other for other, names in OBJECTIVES.items() if wanted in names]
    if wanted not in known and others:
        raise StudyError(
            f"loss {wanted!r} is for a {' or a '.join(others)}; this is a {task}: write one of {', '.join(known)}"
        )
    look_up(known, wanted, "loss")
    return wanted
