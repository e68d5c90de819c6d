"""Where data comes from: a built-in name, a file, a folder of images, or a function of the user's."""

from __future__ import annotations

import difflib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn import datasets
from torch.utils.data import Dataset as TorchDataset

from renorm.comparison import arrays, images, table
from renorm.comparison.reference import Reference
from renorm.comparison.target import MAX_CLASSES, Target, recognise
from renorm.errors import DataError, StudyError

__all__ = ["BUILT_IN", "Dataset", "from_pairs", "load"]

Array = npt.NDArray[Any]

_BUILT_IN: dict[str, tuple[Callable[..., Any], str]] = {
    "digits": (datasets.load_digits, "digit"),
    "wine": (datasets.load_wine, "cultivar"),
    "breast_cancer": (datasets.load_breast_cancer, "diagnosis"),
    # unscaled: scikit-learn scales with statistics of all rows, those of the test part among them
    "diabetes": (partial(datasets.load_diabetes, scaled=False), "disease progression"),
}

BUILT_IN: tuple[str, ...] = tuple(_BUILT_IN)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples and their targets as they were read, before they are split and prepared."""

    name: str  # a short name: "digits", or the file's or function's
    source: str  # what the user wrote
    x: Array | pd.DataFrame  # (N, ...): arrays, or a table's checked columns
    target: Target
    part: npt.NDArray[np.str_]  # (N,): "train", "valid" or "test", as the data says; else all "train"
    prepare: bool  # standardize and encode; False for data whose parts a function of the user's made
    notes: tuple[str, ...]  # what was seen and decided, in sentences


def load(source: str, *, target: str | None = None, task: str = "auto") -> Dataset:
    """A data set from `source`.

    | source | what it is |
    |---|---|
    | digits, wine, breast_cancer, diabetes | real data that comes with scikit-learn |
    | a .csv, .tsv or .parquet file | a table with the column `target`; see :func:`renorm.comparison.table.read` |
    | an .npz file | arrays x and y, or x_train, y_train and, optional, x_valid, ..., x_test, ... |
    | a folder | images by class; see :func:`renorm.comparison.images.read` |
    | module:function, file.py:function | what the function returns, called without arguments |

    Arrays x have the shape (N, features), (N, channels, length) or (N, channels, height, width). Bytes of
    shape (N, height, width), and images whose channels are last, are recognised and rearranged, with a
    note.

    A function returns (x, y), or one torch Dataset, which is split and standardized; or (train, valid) or
    (train, valid, test), each a pair (x, y) or a torch Dataset, which are used as they are.

    Args:
        source: one of the above.
        target: the name of a table's column to predict.
        task: "classification", "regression", or "auto": see :func:`renorm.comparison.target.recognise`.

    Raises:
        DataError: there is no such data, or it cannot be used; the message says where and what to do.
        StudyError: no task is called that.

    >>> digits = load("digits")
    >>> digits.x.shape, digits.target.classes[:3]
    ((1797, 1, 8, 8), ('0', '1', '2'))
    """
    dataset = _read(source, target, task)
    _refuse_leak(dataset)
    return dataset


def _read(source: str, target: str | None, task: str) -> Dataset:
    path = Path(source).expanduser()
    if source not in BUILT_IN and path.is_file() and path.suffix.lower() in table.SUFFIXES:
        return _from_table(path, source, target, task)
    reader = _reader(source, path)
    if target is not None:
        raise DataError(f"only a table ({', '.join(table.SUFFIXES)}) has a target to name; {source!r} is none")
    return reader(source, task)


def _reader(source: str, path: Path) -> Callable[[str, str], Dataset]:
    """What reads a source that is no table."""
    if source in BUILT_IN:
        return _from_built_in
    if path.is_dir():
        return _from_folder
    if path.is_file() and path.suffix.lower() == ".npz":
        return _from_npz
    if _is_reference(source):
        return _from_function
    raise _no_such(source, path)


def _no_such(source: str, path: Path) -> DataError:
    if path.is_file():
        kinds = ", ".join((*table.SUFFIXES, ".npz"))
        return DataError(f"{source}: a data file must be one of {kinds}; convert it, or write a file.py:function")
    near = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, (*BUILT_IN, *near), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return DataError(
        f"data must be {', '.join(BUILT_IN)}, a file, a folder, or module:function; there is no {source!r}{hint}"
    )


def _from_built_in(name: str, task: str) -> Dataset:
    reader, word = _BUILT_IN[name]
    bunch = reader()
    x, y = bunch.data.astype(np.float64), bunch.target
    if name == "digits":
        x = bunch.images[:, None].astype(np.float64)
    if "target_names" in bunch and name != "digits":
        y = np.asarray(bunch.target_names)[y]
    found = recognise(np.asarray(y), word, task, where=name)
    part = np.full(len(x), "train")
    return Dataset(name, name, x, found, part, True, (found.note,))


def _from_table(path: Path, source: str, target: str | None, task: str) -> Dataset:
    read = table.read(path, target)
    _refuse_notation(read, task)
    values = read.target.to_numpy()
    found = recognise(values, str(read.target.name), task, where=str(path), place=read.place)
    part = np.full(len(values), "train")
    return Dataset(path.stem, source, read.columns, found, part, True, (found.note, *read.notes))


def _refuse_notation(read: table.Table, task: str) -> None:
    """Raise if the target is numbers in a notation that is taken for text, which would be classes."""
    labels = read.target
    hint = table.notation(read.path, str(labels.name), labels)
    many = table.has_decimal_commas(labels) or labels.nunique() > MAX_CLASSES
    if hint and (task == "regression" or (task == "auto" and many)):
        row = int(pd.to_numeric(labels, errors="coerce").isna().to_numpy().argmax())
        otherwise = "; if they are classes, write --task classification" if task == "auto" else ""
        raise DataError(
            f"{read.path}: the target {labels.name!r} must hold numbers; it has {labels.iloc[row]!r} in "
            f"{read.place(row)}{hint}{otherwise}"
        )


def _from_folder(source: str, task: str) -> Dataset:
    path = Path(source).expanduser()
    pictures = images.read(path)
    if task == "regression":
        raise DataError(f"{source}: the folders of images are classes; --task must be auto or classification")
    found = recognise(pictures.labels, "class", "classification", where=source)
    found = replace(found, note=f"the {len(found.classes)} folders are classes: a classification")
    name = path.resolve().name
    return Dataset(name, source, pictures.x, found, pictures.part, True, (found.note, *pictures.notes))


def _from_npz(source: str, task: str) -> Dataset:
    path = Path(source).expanduser()
    try:
        # opened here, since np.load leaves the file open when it is broken
        with path.open("rb") as opened:
            if not zipfile.is_zipfile(path):  # np.load would take it for a pickle
                raise zipfile.BadZipFile("it is no .npz file; write one with numpy.savez(path, x=x, y=y)")
            with np.load(opened, allow_pickle=False) as file:
                stored = {name.lower(): file[name] for name in file.files}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read as an .npz file of plain arrays: {error}") from error
    endings = {"": "train", "_train": "train", "_valid": "valid", "_val": "valid", "_test": "test"}
    pairs = {
        part: arrays.collect((stored[f"x{end}"], stored[f"y{end}"]), f"{path}, {part}")
        for end, part in endings.items()
        if f"x{end}" in stored and f"y{end}" in stored
    }
    if "train" not in pairs:
        raise DataError(
            f"{path}: an .npz file must hold the arrays x and y, or x_train and y_train (and x_valid, y_valid, "
            f"x_test, y_test); it holds {', '.join(stored) or 'nothing'}"
        )
    return from_pairs(pairs, path.stem, source, task, prepare=True)


def from_pairs(
    pairs: Mapping[str, tuple[Array, Array]], name: str, source: str, task: str, *, prepare: bool
) -> Dataset:
    """A data set of parts that :func:`renorm.comparison.arrays.collect` gave, keyed "train", "valid", "test"."""
    x, y, part = arrays.join(pairs, source)
    x, notes = arrays.channels_first(x) if prepare else (x, arrays.remarks(x))
    found = recognise(y, "y", task, where=source)
    return Dataset(name, source, x, found, part, prepare, (found.note, *notes))


def _is_reference(source: str) -> bool:
    module, _, function = source.rpartition(":")
    return bool(module) and function.isidentifier()


def _from_function(source: str, task: str) -> Dataset:
    returned = _call(source)
    name = source.rpartition(":")[2]
    if isinstance(returned, TorchDataset) or not _is_parts(returned):
        pairs = {"train": arrays.collect(returned, source)}
        return from_pairs(pairs, name, source, task, prepare=True)
    parts = zip(("train", "valid", "test"), returned, strict=False)
    pairs = {part: arrays.collect(samples, f"{source}, {part}") for part, samples in parts}
    return from_pairs(pairs, name, source, task, prepare=False)


def _is_parts(returned: Any) -> TypeGuard[tuple[object, ...]]:
    """Whether a function returned (train, valid[, test]) rather than (x, y)."""
    if not (isinstance(returned, tuple) and len(returned) in (2, 3)):
        return False
    return all(isinstance(part, (tuple, TorchDataset)) for part in returned)


def _call(source: str) -> Any:
    """What the function called "module:function" or "file.py:function" returns."""
    try:
        function = Reference(source).resolve()
    except StudyError as error:
        raise DataError(str(error)) from error
    try:
        return function()
    except DataError:
        raise
    # the user's code may raise anything
    except (Exception, SystemExit) as error:
        raise DataError(f"{source}: the function raised {type(error).__name__}: {error}") from error


def _refuse_leak(dataset: Dataset) -> None:
    """Raise if a feature is the target under another name."""
    if isinstance(dataset.x, np.ndarray) and dataset.x.ndim != 2:
        return
    for name, values in _features(dataset.x):
        if _tells(values, dataset.target):
            raise DataError(
                f"{dataset.source}: a feature must not give the target away; {name} is the target "
                f"{dataset.target.name!r} itself or a relabelling of it, one to one; remove it"
            )


def _features(x: Array | pd.DataFrame) -> Iterator[tuple[str, Array]]:
    if isinstance(x, pd.DataFrame):
        yield from ((f"column {name!r}", x[name].to_numpy()) for name in x.columns)
    else:
        yield from ((f"x[:, {index}]", x[:, index]) for index in range(x.shape[1]))


def _tells(values: Array, target: Target) -> bool:
    if target.task == "regression":
        return values.dtype != object and bool((values == target.y).all())
    first = np.unique(target.y, return_index=True)[1]
    if len(first) == len(values):  # every column without a repeated value is then a relabelling
        return False
    of_class = values[first]
    return bool((values == of_class[target.y]).all()) and len(set(of_class.tolist())) == len(first)
