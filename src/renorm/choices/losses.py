"""Which loss goes with which output and target.

Outputs are logits: what the last layer gives, without a sigmoid or a softmax. Logarithms are natural, losses in nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from renorm.choices.torch_losses import BCEWithLogitsLoss, CrossEntropyLoss, HuberLoss, MSELoss
from renorm.errors import LossError

__all__ = ["LossChoice", "loss_for"]

# Keras's name of each, and torch's
TORCH_NAMES = {
    "categorical_crossentropy": "CrossEntropyLoss",
    "sparse_categorical_crossentropy": "CrossEntropyLoss",
    "binary_crossentropy": "BCEWithLogitsLoss",
}
SOFT, SPARSE, BINARY = (f"torch.nn.{torchs}() / Keras {name}(from_logits=True)" for name, torchs in TORCH_NAMES.items())
REAL = "torch.nn.MSELoss() / Keras mean_squared_error"

_IGNORED = -100  # torch's ignore_index: a label that counts for nothing

_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # for which torch has hardly any operators
_LEAST_VALUES = 8  # from which on values that all lie in [0, 1] are taken for probabilities
_FAR = 5.0  # robust standard deviations, times 1 + 32 / N since their estimate from N values may be small:
_FEW = 32.0  # measured on normal targets, one batch in 150 of 6 or 8, in 5,000 of 256, has a value farther out
_LEAST_FAR = 5  # values: of fewer none is called far
_HUBER_DELTA = 1.345  # standard deviations: 95% of the mean's efficiency if the noise is normal


@dataclass(frozen=True)
class LossChoice:
    """A loss that fits, and why; see :func:`loss_for`."""

    loss: nn.Module  # torch's, to be called with (output, target)
    reason: str  # what of the output and the target decided it
    keras: str  # what Keras calls it


def loss_for(output: Tensor, target: Tensor) -> LossChoice:
    r"""The loss that fits a model's raw output and a target, seen from their shapes, dtypes and values.

    | output | target | loss |
    |---|---|---|
    | one unit, (N,) or (N, 1) | as the output, 0 and 1 | binary cross-entropy with logits |
    | K units, (N, K, ...) | whole numbers from 0 to K - 1, (N, ...) | cross-entropy |
    | K units | as the output, rows that sum to 1 | cross-entropy with soft targets |
    | K units | as the output, 0 and 1 | binary cross-entropy with logits, one for each unit |
    | any | as the output, other real numbers | mean squared error, Huber's where some are far out |

    The cross-entropy, in nats, of the classes c (dimension 1) and of a unit's yes or no:
    $$-\frac1N \sum_n \sum_c t_{nc} \ln \operatorname{softmax}(z_n)_c, \qquad
    -\frac1N \sum_n \left[ t_n \ln \sigma(z_n) + (1 - t_n) \ln(1 - \sigma(z_n)) \right]$$
    Both are minus the mean log-likelihood of the targets, so the minimum is the maximum of the likelihood; the squared
    error is that of normal noise. Huber's loss is chosen where one of N numbers lies more than 5 (1 + 32 / N) robust
    standard deviations (1.4826 times the median distance from the median) from the median, both of all numbers and of
    those of its unit; its delta is 1.345 of the unit's, in the target's units (P. J. Huber, 1964; the constant gives
    95% efficiency for normal noise).

    Args:
        output: what the model returns: logits, of any floating dtype.
        target: what the loader gives, of any real dtype; the loss casts it where torch would refuse. A label of -100
            is torch's for "leave it out".

    The loss that is chosen computes in float32 where the output is of half precision, and gives the output's dtype.

    Raises:
        LossError: nothing fits, or more than one thing could be meant: (N, 1) beside (N,), labels out of range or as
            floats, probabilities in place of logits, targets that are not finite, outputs of NaN or inf (-inf is a
            class that cannot be), what is no tensor, an empty batch, no label that counts. The message says what to
            write, and the names of the loss that would then fit in torch and in Keras.

    >>> choice = loss_for(torch.zeros(4, 3), torch.tensor([0, 2, 1, 1]))
    >>> choice.loss, choice.keras
    (CrossEntropyLoss(), 'sparse_categorical_crossentropy(from_logits=True)')
    >>> choice.reason
    '3 units and whole numbers from 0 to 2, one for each sample: each is the index of a class'
    """
    _check_values(output, target)
    output, target = output.detach(), target.detach()
    if target.dtype in _UNSIGNED:
        target = target.long()
    if output.shape == target.shape:
        return _same_shape(output, target)
    return _class_indices(output, target)


def _check_values(output: Tensor, target: Tensor) -> None:
    hints = (("output", output, "output[0], or what holds the logits"), ("target", target, "torch.as_tensor(target)"))
    for name, value, hint in hints:
        if not isinstance(value, Tensor):
            raise LossError(
                f"the {name} must be a tensor; got {type(value).__name__}: write {hint}, for example for {SPARSE}"
            )
    if not output.is_floating_point():
        raise LossError(
            f"the output must be floating: the logits of the last layer; got {output.dtype}, as argmax gives: take the "
            f"loss of what goes into it, for classes {SPARSE}"
        )
    if target.is_complex():
        raise LossError(f"the target must be real; got {target.dtype}: write torch.view_as_real(target) for {REAL}")
    if not output.dim():
        raise LossError(f"the output must have a batch dimension; got a single number: write output.view(1) for {REAL}")
    if not output.numel() or not target.numel():
        raise LossError(
            f"an empty batch shows no loss; got output {_shape(output)} and target {_shape(target)}: take a batch that "
            f"has samples, for example for {SPARSE}"
        )
    if not bool(target.isfinite().all()):
        raise LossError(f"the target must be finite; got nan or inf: leave those samples out, then for example {REAL}")
    if bool((output.isnan() | (output == math.inf)).any()):
        raise LossError(
            f"the output must be numbers; got nan or inf: mend the model or its input, then for example {SPARSE}"
        )


def _same_shape(output: Tensor, target: Tensor) -> LossChoice:
    """Yes and no, rows of probabilities, or real numbers."""
    whole, binary = not target.is_floating_point(), _binary(target)
    if _classes(output) > 1 and _rows_sum_to_one(target):
        _check_logits(output, SOFT)
        kind = "rows of 0 and 1 with a single 1" if binary else "rows of probabilities that sum to 1"
        also = "; if they are yes or no each for itself, take torch.nn.BCEWithLogitsLoss()" if binary else ""
        return LossChoice(
            CrossEntropyLoss(),
            f"{_classes(output)} units and {kind}: each row is a distribution over classes{also}",
            "categorical_crossentropy(from_logits=True)",
        )
    if binary:
        _check_logits(output, BINARY)
        several = _classes(output) > 1
        reason = (
            f"{_classes(output)} units and 0 or 1 for each, several or none of them 1: yes or no each for itself"
            if several
            else "one unit and a target of 0 or 1: yes or no"
        )
        return LossChoice(BCEWithLogitsLoss(), reason, "binary_crossentropy(from_logits=True)")
    if whole:
        raise _whole_numbers(output, target)
    return _real(target)


def _whole_numbers(output: Tensor, target: Tensor) -> LossError:
    low, high = int(target.min()), int(target.max())
    if _classes(output) == 1:
        if low < high and bool(((target == low) | (target == high)).all()):
            write = f"for a yes or no write (target == {high}).float() for {BINARY}"
        else:
            write = f"for {high + 1} classes give the model {high + 1} outputs and write {SPARSE}"
        return LossError(
            f"one unit tells 0 from 1; got whole numbers from {low} to {high}: {write}; for a quantity write "
            f"target.float() for {REAL}"
        )
    return LossError(
        f"whole numbers in the output's shape {_shape(output)} must be 0 or 1; got {low} to {high}: write indices of "
        f"classes of the shape {_without_classes(output)} for {SPARSE}, or target.float() for {REAL}"
    )


def _real(target: Tensor) -> LossChoice:
    values = target.double()
    low, high = float(values.min()), float(values.max())
    also = "; if they are probabilities, take torch.nn.BCEWithLogitsLoss()" if low >= 0 and high <= 1 else ""
    if low < high and bool(((values == low) | (values == high)).all()):
        also = "; if they are a yes or no, write (target == target.max()).float() for torch.nn.BCEWithLogitsLoss()"
    farthest, spread = _far_out(values)
    if farthest:
        delta = float(f"{_HUBER_DELTA * spread:.4g}")
        return LossChoice(
            HuberLoss(delta=delta),
            f"real numbers, one {farthest:.3g} robust standard deviations from the median: squared, it would outweigh "
            f"the others; delta is 1.345 of these deviations{also}",
            f"Huber(delta={delta:g})",
        )
    far = "none far from the others" if spread or low == high else "half of them equal, so that none is called far"
    return LossChoice(
        MSELoss(),
        f"real numbers from {low:.4g} to {high:.4g}, {far}: normal noise{also}",
        "mean_squared_error",
    )


def _far_out(values: Tensor) -> tuple[float, float]:
    """How many robust standard deviations the farthest value is out, 0 where that is not far, and the deviation.

    It must be far among all and among those of its unit: units of other scales make heavy tails of normal ones.
    """
    far, spread = _farthest(values.reshape(1, -1))
    units = values.transpose(0, 1).flatten(1) if values.dim() > 1 else values[None]
    if far and units.shape[1] >= _LEAST_FAR:
        far, spread = _farthest(units)
    return far, spread


def _farthest(rows: Tensor) -> tuple[float, float]:
    """The same of the row in which it is the most."""
    apart = (rows - rows.median(1, keepdim=True).values).abs()
    spread = 1.4826 * apart.median(1).values
    farthest = torch.where(spread > 0, apart.amax(1) / spread, 0)
    row, number = int(farthest.argmax()), rows.shape[1]
    most = float(farthest[row])
    far = number >= _LEAST_FAR and most > _FAR * (1 + _FEW / number)
    return (most if far else 0.0), float(spread[row])


def _class_indices(output: Tensor, target: Tensor) -> LossChoice:
    """Targets of another shape than the output: only indices of classes fit, one for each sample or place."""
    classes, without = _classes(output), _without_classes(output)
    if classes == 1 or output.dim() == 1:
        raise _one_unit(output, target)
    if tuple(target.shape) != without:
        raise _misshapen(output, target)
    if target.is_floating_point():
        if bool((target == target.round()).all()) and _between(target, 0, classes - 1):
            raise LossError(
                f"indices of classes must be whole numbers; got {target.dtype}: write target.long() for {SPARSE}"
            )
        raise LossError(
            f"{classes} units need {classes} real numbers for each sample; got a target of shape {_shape(target)}, "
            f"which would be broadcast: write a target of shape {_shape(output)}, or a model with one output, for "
            f"{REAL}"
        )
    labels = target[target != _IGNORED]
    if not labels.numel():
        raise LossError(
            f"some label must count; got {_IGNORED} only, which torch leaves out, and the mean of none is nan: take a "
            f"batch that has labels, for {SPARSE}"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise _out_of_range(labels, low, high, classes)
    _check_logits(output, SPARSE)
    place = "sample" if output.dim() == 2 else "place"
    either = output.dim() > 2 and target.shape == output.shape[:-1]
    also = "; the classes are dimension 1, as torch has them, though the last one would fit as well" if either else ""
    return LossChoice(
        CrossEntropyLoss(),
        f"{classes} units and whole numbers from {low} to {high}, one for each {place}: each is the index of a "
        f"class{also}",
        "sparse_categorical_crossentropy(from_logits=True)",
    )


def _out_of_range(labels: Tensor, low: int, high: int, classes: int) -> LossError:
    outside = torch.unique(labels[(labels < 0) | (labels >= classes)]).tolist()
    if low == 1 and high == classes:
        hints = ["target - 1 if they begin with 1"]
    elif len(outside) == 1:
        hints = [f"torch.nn.CrossEntropyLoss(ignore_index={outside[0]}) if {outside[0]} means to leave it out"]
    else:
        hints = ["labels in that range"]
    if low >= 0:
        hints.append(f"a model with {high + 1} outputs")
    return LossError(
        f"{classes} units have the classes 0 to {classes - 1}; got labels from {low} to {high}: write "
        f"{', or '.join(hints)}, for {SPARSE}"
    )


def _one_unit(output: Tensor, target: Tensor) -> LossError:
    fits = BINARY if _binary(target) else REAL
    if output.numel() == target.numel():
        write = f"target.view({', '.join(map(str, output.shape))}), or output.view({', '.join(map(str, target.shape))})"
    else:
        write = f"a target of shape {_shape(output)}"
    return LossError(
        f"with one unit, output and target must have one shape; got {_shape(output)} and {_shape(target)}, which a "
        f"loss would broadcast or refuse: write {write}, for {fits}"
    )


def _misshapen(output: Tensor, target: Tensor) -> LossError:
    without = _without_classes(output)
    if tuple(target.shape) == (len(output), 1, *without[1:]):
        hint = f"write target.squeeze(1) for {SPARSE}"
    elif output.dim() > 2 and target.shape == output.shape[:-1]:
        hint = f"the classes are last, as in Keras; torch has them second: write output.movedim(-1, 1) for {SPARSE}"
    else:
        indices = f"write indices of classes of the shape {without} for {SPARSE}"
        hint = f"{indices}, or a target of shape {_shape(output)} for {SOFT}"
    return LossError(f"output {_shape(output)} and target {_shape(target)} do not fit together: {hint}")


def _check_logits(output: Tensor, fits: str) -> None:
    """See that the output is no probability: the loss would take the sigmoid or softmax of it again."""
    values = output.double()
    if not _between(values, 0, 1):
        return
    rows = _classes(output) > 1 and _rows_sum_to_one(output)
    many = output.numel() >= _LEAST_VALUES and float(values.max()) > float(values.min())
    if rows or many:
        what = "rows that sum to 1, as softmax gives" if rows else "values in [0, 1] only, as sigmoid gives"
        raise LossError(
            f"the output must be logits; got {what}: return what goes into the {'softmax' if rows else 'sigmoid'}, for "
            f"{fits}; or keep the probabilities for Keras's losses with from_logits=False, as renorm.loss has them"
        )


def _rows_sum_to_one(rows: Tensor) -> bool:
    """Whether rows, along dimension 1, are distributions, up to the rounding of their dtype."""
    tolerance = max(1e-4, 2 * torch.finfo(rows.dtype).eps) if rows.is_floating_point() else 0.0
    values = rows.double()
    return bool((values >= 0).all() and ((values.sum(1) - 1).abs() <= tolerance).all())


def _binary(target: Tensor) -> bool:
    return bool(((target == 0) | (target == 1)).all())


def _between(values: Tensor, low: float, high: float) -> bool:
    return bool(((values >= low) & (values <= high)).all())


def _classes(output: Tensor) -> int:
    return output.shape[1] if output.dim() > 1 else 1


def _without_classes(output: Tensor) -> tuple[int, ...]:
    return (output.shape[0], *output.shape[2:])


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
