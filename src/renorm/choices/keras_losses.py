"""Keras's three cross-entropies by their names, with Keras's conventions.

Classes are the last dimension. Logarithms are natural, losses in nats.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from renorm.choices.losses import BINARY, REAL, SOFT, SPARSE, TORCH_NAMES
from renorm.choices.registry import look_up
from renorm.choices.torch_losses import wide
from renorm.errors import LossError

__all__ = ["KERAS_NAMES", "KerasCrossEntropy", "loss"]

KERAS_NAMES = tuple(TORCH_NAMES)
_EPSILON = 1e-7  # keras.config.epsilon(): probabilities are clipped to [this, 1 - this]
_ROUNDING = 1e-2  # how far above 1 a probability may be: a sum of several, in bfloat16


class KerasCrossEntropy(nn.Module):
    """One of Keras's three cross-entropies, in nats, with its conventions; made by :func:`loss`.

    Classes are the last dimension; probabilities are divided by their sum (not those of a yes or no) and clipped to
    [1e-7, 1 - 1e-7]; the result is the mean over all other dimensions.
    """

    def __init__(self, name: str, *, from_logits: bool = False) -> None:
        super().__init__()
        self.name = name
        self.from_logits = from_logits

    def extra_repr(self) -> str:
        """The name and what it takes."""
        return f"{self.name!r}, from_logits={self.from_logits}"

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss of what the model gives and what the loader gives: torch's order, not Keras's.

        Half precision is computed in float32, and the loss has the output's dtype. Values are not checked under
        torch.compile and torch.func.

        Raises:
            LossError: outputs that are not floating, shapes that do not fit, a single class, labels that are no
                classes, outputs that are no probabilities, and a yes or no that is not in [0, 1].
        """
        if not output.is_floating_point():
            raise LossError(
                f"the output of {self.name} must be floating; got {output.dtype}, as argmax gives: write the loss of "
                "what goes into it"
            )
        return self._loss(wide(output), target).to(output.dtype)

    def _loss(self, output: Tensor, target: Tensor) -> Tensor:
        self._check_probabilities(output)
        if self.name == "binary_crossentropy":
            return self._binary(output, target)
        if not output.dim() or output.shape[-1] == 1:
            raise LossError(
                f"{self.name} needs two classes or more in the last dimension; got an output of shape "
                f"{tuple(output.shape)}, whose softmax is 1: write renorm.loss('binary_crossentropy'), {BINARY}"
            )
        logarithms = output.log_softmax(-1) if self.from_logits else self._logarithms(output)
        if self.name == "categorical_crossentropy":
            self._check(output.shape == target.shape, output, target, "the output's shape, rows of 0 and 1")
            return -(target * logarithms).sum(-1).mean()
        if target.dim() == output.dim() and target.shape[-1] == 1:
            target = target.squeeze(-1)  # as Keras does: labels are often a column
        self._check(target.shape == output.shape[:-1], output, target, "the output's shape without the classes")
        labels, classes = target.long(), output.shape[-1]
        part = target.frac() != 0 if target.is_floating_point() else False
        if _any((labels < 0) | (labels >= classes) | part):
            raise LossError(
                f"{classes} classes have the labels 0 to {classes - 1}; got {_span(target)}: write whole numbers in "
                f"that range, or a model with more outputs, for {SPARSE}"
            )
        return -logarithms.gather(-1, labels.unsqueeze(-1)).mean()

    def _binary(self, output: Tensor, target: Tensor) -> Tensor:
        self._check(output.shape == target.shape, output, target, "the output's shape")
        target = target.to(output.dtype)
        if _any((target < 0) | (target > 1)):
            raise LossError(
                f"targets of {self.name} must be from 0 to 1; got {_span(target)}: write (target > 0).float() for a "
                f"yes or no, {BINARY}, or {REAL}"
            )
        if self.from_logits:
            return F.binary_cross_entropy_with_logits(output, target)
        return F.binary_cross_entropy(self._clipped(output), target)

    def _check(self, fits: bool, output: Tensor, target: Tensor, must: str) -> None:
        if not fits:
            other = SPARSE if self.name == "categorical_crossentropy" else SOFT
            other = REAL if self.name == "binary_crossentropy" else other
            raise LossError(
                f"the target of {self.name} must have {must}; got output {tuple(output.shape)} and target "
                f"{tuple(target.shape)}: reshape one of them, or write {other}"
            )

    def _check_probabilities(self, output: Tensor) -> None:
        most = 1 + _ROUNDING if self.name == "binary_crossentropy" else math.inf  # the others are divided by their sum
        if not self.from_logits and _any((output < 0) | (output > most)):
            raise LossError(
                f"{self.name} takes probabilities; got {_span(output)}: write renorm.loss({self.name!r}, "
                "from_logits=True) for what goes into the softmax or sigmoid"
            )

    def _logarithms(self, output: Tensor) -> Tensor:
        return self._clipped(output / output.sum(-1, keepdim=True)).log()

    def _clipped(self, probabilities: Tensor) -> Tensor:
        return probabilities.clamp(_EPSILON, 1 - _EPSILON)


def _any(wrong: Tensor) -> bool:
    """Whether some are; unknown, and so no, while the values cannot be looked at."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return not traced and bool(wrong.any())


def _span(values: Tensor) -> str:
    values = values.double()
    return f"{float(values.min()):g} to {float(values.max()):g}"


def loss(name: str, *, from_logits: bool = False) -> nn.Module:
    r"""A Keras cross-entropy by its name: the same numbers, to be called with (output, target) as torch's losses are.

    $$-\sum_c t_c \ln p_c, \qquad -\ln p_t, \qquad -t \ln p - (1 - t) \ln(1 - p)$$
    for "categorical_crossentropy" (targets as the output, (..., K)), "sparse_categorical_crossentropy" (labels 0 to
    K - 1, (...) or (..., 1)) and "binary_crossentropy" (targets as the output), each averaged over all samples, in
    nats. Classes are last. The output is p, or with `from_logits` what a softmax or sigmoid makes p of, which is
    exact where p rounds to 0 or 1.

    Raises:
        StudyError: there is no such name.

    Source: keras.losses, of Keras 3.

    >>> crossentropy = loss("sparse_categorical_crossentropy")
    >>> crossentropy(torch.tensor([[0.05, 0.95, 0.0], [0.1, 0.8, 0.1]]), torch.tensor([1, 2]))
    tensor(1.1769)
    """
    look_up(TORCH_NAMES, name, "loss")
    return KerasCrossEntropy(name.strip().lower(), from_logits=from_logits)
