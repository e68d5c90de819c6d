"""Samples as arrays: taken from pairs or torch Datasets, checked, and put in torch's axis order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset

from renorm.errors import DataError

__all__ = ["MAX_VALUE", "channels_first", "collect", "join", "remarks"]

Array = npt.NDArray[Any]

MAX_VALUE = 1e30  # float32 ends at 3.4e38, and a variance needs squares


def collect(samples: object, where: str) -> tuple[Array, Array]:
    """The arrays (x, y) in a pair of arrays or tensors, or in a torch Dataset of pairs.

    x comes back with the shape (N, ...), y with the shape (N,); a vector x is taken as one feature.

    Raises:
        DataError: it is neither, holds no sample, or its values are not finite numbers; `where` begins the
        message.

    >>> x, y = collect(([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], [0, 1, 1]), "mine")
    >>> x.shape, y.shape
    ((3, 2), (3,))
    """
    if isinstance(samples, TorchDataset):
        samples = _read_all(samples, where)
    if not (isinstance(samples, tuple) and len(samples) == 2):
        raise DataError(
            f"{where}: samples must be a tuple (x, y) of arrays or tensors, or a torch Dataset of such "
            f"pairs; got {_named(samples)}"
        )
    x, y = (_array(values, f"{where}: {name}") for values, name in zip(samples, "xy", strict=True))
    return _checked(x, y, where)


def join(parts: Mapping[str, tuple[Array, Array]], where: str) -> tuple[Array, Array, npt.NDArray[np.str_]]:
    """The parts of a data set one below the other, and the name of the part that each sample came from.

    Raises:
        DataError: the samples of two parts differ in shape.
    """
    first = parts["train"][0].shape[1:]
    for name, (x, _) in parts.items():
        if x.shape[1:] != first:
            raise DataError(
                f"{where}: samples of all parts must have one shape; those of the training part have "
                f"{first}, those of the {name} part {x.shape[1:]}"
            )
    part = np.concatenate([np.full(len(y), name) for name, (_, y) in parts.items()])
    x, y = (np.concatenate([pair[index] for pair in parts.values()]) for index in (0, 1))
    return x, y, part


def channels_first(x: Array) -> tuple[Array, tuple[str, ...]]:
    """Images with their channels on the second axis, and a note where that axis had to be made or moved.

    >>> channels_first(np.zeros((5, 28, 28), np.uint8))[0].shape
    (5, 1, 28, 28)
    >>> channels_first(np.zeros((5, 32, 32, 3)))[0].shape
    (5, 3, 32, 32)
    """
    if x.ndim == 3 and x.dtype == np.uint8:
        return x[:, None], (f"x of shape {x.shape} is bytes: taken as grey images",)
    if x.ndim == 4 and x.shape[3] in (1, 3, 4) and x.shape[1] not in (1, 3, 4):
        note = f"x of shape {x.shape} has its channels last: moved to the second axis"
        return np.ascontiguousarray(np.moveaxis(x, 3, 1)), (note,)
    return x, ()


def remarks(x: Array) -> tuple[str, ...]:
    """A note where x, which is used as it comes, looks like images with their channels last.

    >>> remarks(np.zeros((5, 32, 32, 3)))[0][:43]
    'x of shape (5, 32, 32, 3) looks like images'
    """
    if x.ndim == 4 and x.shape[3] in (1, 3, 4) and x.shape[3] < x.shape[1] == x.shape[2]:
        return (
            f"x of shape {x.shape} looks like images with their channels last, but the second axis is taken for them: "
            "if so, write x.transpose(0, 3, 1, 2), or x.permute(0, 3, 1, 2) of a tensor",
        )
    return ()


def _read_all(dataset: TorchDataset[Any], where: str) -> object:
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise DataError(f"{where}: a torch Dataset must have a length and an index; got {_named(dataset)}")
    items = [dataset[index] for index in range(len(dataset))]
    if not items:
        raise DataError(f"{where}: there must be samples; the torch Dataset is empty")
    if not all(isinstance(item, (tuple, list)) and len(item) == 2 for item in items):
        raise DataError(f"{where}: a torch Dataset must give pairs (x, y); got {_named(items[0])}")
    return tuple([_array(item[index], where) for item in items] for index in (0, 1))


def _array(values: Any, where: str) -> Array:
    if isinstance(values, torch.Tensor):
        # a tensor may need a gradient, and NumPy has no bfloat16
        values = values.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()  # type: ignore[no-any-return]
    try:
        return np.asarray(values)
    except ValueError as error:
        raise DataError(f"{where}: all samples must have one shape; they differ ({error})") from error


def _checked(x: Array, y: Array, where: str) -> tuple[Array, Array]:
    if x.ndim == 0 or len(x) == 0:
        raise DataError(f"{where}: there must be samples; x has the shape {x.shape}")
    x = x[:, None] if x.ndim == 1 else x
    if x.dtype.kind not in "biuf" or 0 in x.shape:
        raise DataError(
            f"{where}: x must be numbers of shape (N, ...) without an empty axis; got {x.dtype} of shape {x.shape}"
        )
    if y.ndim == 2 and y.shape[1] > 1 and y.dtype.kind in "biuf" and _is_one_hot(y):
        raise DataError(f"{where}: y must hold one label for each sample; it is one-hot: write y.argmax(1)")
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if y.shape != (len(x),):
        raise DataError(f"{where}: y must have the shape ({len(x)},), one value for each x; got {y.shape}")
    _refuse_wild(x, f"{where}: x")
    _refuse_wild(y, f"{where}: y")
    return x, y


def _is_one_hot(y: Array) -> bool:
    return bool(((y == 0) | (y == 1)).all() and (y.sum(1) == 1).all())


def _refuse_wild(values: Array, where: str) -> None:
    """Raise at the first value that is missing, infinite or too large."""
    if values.dtype.kind == "f":
        # half precision ends below that limit, which is infinite to it
        wrong = ~(np.abs(values) < (np.inf if values.dtype == np.float16 else MAX_VALUE))
    elif values.dtype.kind == "O":
        wrong = np.array([value is None or value != value for value in values])
    else:
        return
    if wrong.any():
        at = [int(index) for index in np.unravel_index(int(wrong.argmax()), wrong.shape)]
        raise DataError(
            f"{where} must hold finite values below {MAX_VALUE:g}; it has {values[tuple(at)]} at index {at} "
            f"and {int(wrong.sum()) - 1} more; fill or drop them"
        )


def _named(thing: object) -> str:
    return f"{type(thing).__name__}" + (f" of {len(thing)}" if isinstance(thing, (tuple, list)) else "")
