"""Data ready for training: split into parts, prepared with statistics of the training part only."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.preprocessing import StandardScaler

from renorm.comparison import arrays, table
from renorm.comparison.atomic import writing
from renorm.comparison.read import BUILT_IN, Dataset, from_pairs, load
from renorm.comparison.target import Task
from renorm.errors import DataError, StudyError

__all__ = ["BUILT_IN", "Dataset", "Splits", "from_parts", "load", "split"]

Floats = npt.NDArray[np.float32]
Array = npt.NDArray[Any]

_ARRAYS = ("x_train", "y_train", "x_valid", "y_valid", "x_test", "y_test")


@dataclass(frozen=True, eq=False)
class Splits:
    """A data set in three parts, as models take it; a part that does not exist has no samples."""

    name: str  # a short name, such as "digits"
    source: str  # what the user wrote to name the data
    task: Task
    classes: tuple[str, ...]  # what the class indices mean; empty in a regression
    target: str  # what is predicted, such as the column's name
    target_mean: float  # of the training part, in the target's units; 0 in a classification
    target_std: float  # of the training part, in the target's units; 1 in a classification
    notes: tuple[str, ...]  # what was seen and decided while reading and splitting, in sentences
    x_train: Floats  # (N, ...): one sample is a vector, (C, L), (C, H, W) or (C, D, H, W)
    y_train: Array  # (N,): int64 class indices, or float32 (target - target_mean) / target_std
    x_valid: Floats
    y_valid: Array
    x_test: Floats
    y_test: Array

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of what training sees: the arrays, the task, the classes and the target's scale."""
        digest = hashlib.sha256()
        facts = [self.task, self.classes, self.target_mean, self.target_std]
        digest.update(json.dumps(facts).encode())
        for name in _ARRAYS:
            values = np.ascontiguousarray(getattr(self, name))
            digest.update(f"{name}{values.dtype.str}{values.shape}".encode())
            digest.update(values.data)
        return digest.hexdigest()[:16]

    def num(self, part: str) -> int:
        """How many samples a part has."""
        return len(getattr(self, f"y_{part}"))

    @property
    def num_outputs(self) -> int:
        """How many numbers a model gives for a sample: one for each class, or 1 in a regression."""
        return len(self.classes) or 1

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one sample; images are (C, H, W)."""
        return self.x_train.shape[1:]

    def constant_score(self, part: str) -> float:
        """What a model scores that gives the training part's most frequent class, or its mean, for every sample.

        An error rate (0 to 1), or a root mean squared error in the target's units.
        """
        y = getattr(self, f"y_{part}")
        if self.task == "classification":
            return float(np.mean(y != np.bincount(self.y_train).argmax()))
        return self.target_std * float(np.sqrt(np.mean(np.square(y, dtype=np.float64))))

    def describe(self) -> dict[str, Any]:
        """The data in plain JSON values, for the study's record and the report."""
        return {
            "name": self.name,
            "source": self.source,
            "task": self.task,
            "fingerprint": self.fingerprint,
            "num_train": len(self.y_train),
            "num_valid": len(self.y_valid),
            "num_test": len(self.y_test),
            "shape": list(self.input_shape),
            "classes": list(self.classes),
            "target": self.target,
            "target_mean": self.target_mean,
            "target_std": self.target_std,
            "constant": {part: self.constant_score(part) for part in ("valid", "test") if self.num(part)},
            "notes": list(self.notes),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to an .npz file that appears at `path` whole or not at all; it holds no pickle."""
        facts = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _ARRAYS}
        facts["fingerprint"] = self.fingerprint
        values = {name: getattr(self, name) for name in _ARRAYS}
        with writing(Path(path)) as file:
            np.savez(file, facts=np.array(json.dumps(facts)), **values)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Splits:
        """The inverse of :meth:`save`.

        Raises:
            DataError: the file is damaged, or is no such file.
        """
        try:
            # opened here, since np.load leaves the file open when it is broken
            with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
                facts = json.loads(str(file["facts"]))
                values = {name: file[name] for name in _ARRAYS}
            expected = facts.pop("fingerprint")
            facts |= {"classes": tuple(facts["classes"]), "notes": tuple(facts["notes"])}
            splits = cls(**facts, **values)
        except FileNotFoundError:
            raise
        except (ValueError, OSError, EOFError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise DataError(f"{path}: must be data that renorm has saved; it cannot be read: {error}") from error
        if splits.fingerprint != expected:
            raise DataError(f"{path}: the arrays are not those that were saved; remove the file to prepare it again")
        return splits


def split(dataset: Dataset, *, seed: int = 0, valid: float = 0.2, test: float = 0.2) -> Splits:
    """The data set in parts, each sample prepared with statistics of the training part only.

    Parts that the data names are kept; a missing validation part is drawn from its training part, and a
    test part only if it names no parts at all. What is drawn is fixed by `seed`; in a classification every
    class is divided by itself, so that each drawn part has its share of it, one sample at least.

    Vectors are standardized feature by feature and images channel by channel, `(x - mean) / std`, where a
    constant feature is only shifted; see :func:`renorm.comparison.table.encode` for tables. The target of a
    regression is standardized too.

    Args:
        dataset: what :func:`load` read.
        seed: which samples are drawn.
        valid: the share of the samples to be drawn for validation, above 0.
        test: the share of the samples to be drawn for the test; 0 for no test part.

    Raises:
        StudyError: shares that leave nothing to train on.
        DataError: too few samples of a class, or a part with classes that the training part lacks.

    >>> splits = split(load("digits"))
    >>> len(splits.x_train), len(splits.x_valid), len(splits.x_test), splits.input_shape
    (1079, 359, 359, (1, 8, 8))
    """
    if not (0 < valid < 1 and 0 <= test < 1 and valid + test < 1):
        raise StudyError(
            "the validation share must be above 0, the test share at least 0, and both together below 1; "
            f"got valid={valid} and test={test}"
        )
    part, notes = _draw(dataset, seed, valid, test)
    rows = {name: np.flatnonzero(part == name) for name in ("train", "valid", "test")}
    _check_parts(dataset, rows)
    x, prepared = _prepare(dataset, rows["train"])
    y, mean, std = _scale_target(dataset, rows["train"])
    values = {f"x_{name}": x[at] for name, at in rows.items()} | {f"y_{name}": y[at] for name, at in rows.items()}
    target = dataset.target
    return Splits(
        name=dataset.name,
        source=dataset.source,
        task=target.task,
        classes=target.classes,
        target=target.name,
        target_mean=mean,
        target_std=std,
        notes=(*dataset.notes, *notes, *prepared),
        **values,
    )


def from_parts(
    train: object, valid: object, test: object | None = None, *, task: str = "auto", name: str = "python"
) -> Splits:
    """Parts that the caller has made: each a pair (x, y) of arrays or tensors, or a torch Dataset of such pairs.

    x is used as it is, as float32; the target of a regression is standardized with the training part's
    statistics.

    Raises:
        DataError: a part cannot be used; the message says which and why.
        StudyError: no task is called that.

    >>> x = np.linspace(-1, 1, 20)[:, None]
    >>> splits = from_parts((x, x[:, 0] ** 2 + 0.5), (x[::2], x[::2, 0] ** 2 + 0.5))
    >>> splits.task, splits.x_train.shape, len(splits.x_test)
    ('regression', (20, 1), 0)
    """
    given = {"train": train, "valid": valid} | ({} if test is None else {"test": test})
    pairs = {part: arrays.collect(samples, f"{name}, {part}") for part, samples in given.items()}
    return split(from_pairs(pairs, name, name, task, prepare=False))


def _draw(dataset: Dataset, seed: int, valid: float, test: float) -> tuple[npt.NDArray[np.str_], tuple[str, ...]]:
    """The part of each sample, after drawing those parts that the data does not name."""
    part = dataset.part.astype("<U5")
    given = set(part.tolist())
    shares = {"test": test, "valid": valid} if given == {"train"} else {} if "valid" in given else {"valid": valid}
    shares = {name: share for name, share in shares.items() if share > 0}
    if not shares:
        return part, ("the parts are those that the data names",)
    generator = np.random.default_rng(seed)
    target = dataset.target
    pool = np.flatnonzero(part == "train")
    groups = target.y[pool] if target.classes else np.zeros(len(pool), np.int64)
    for group in np.unique(groups):
        rows = generator.permutation(pool[groups == group])
        label = f"class {target.classes[group]!r} of {target.name!r}" if target.classes else "the data"
        for name, count in _counts(len(rows), shares, f"{dataset.source}: {label}").items():
            part[rows[:count]] = name
            rows = rows[count:]
    drawn = " and ".join(f"{share:.0%} for the {name} part" for name, share in shares.items())
    how = "in each class, " if target.classes else ""
    return part, (f"drawn at random, {how}seed {seed}: {drawn}",)


def _counts(size: int, shares: dict[str, float], what: str) -> dict[str, int]:
    """How many of `size` samples go to each drawn part: one at least, and one at least is left to train on."""
    least = len(shares) + 1
    if size < least:
        raise DataError(
            f"{what} needs {least} samples or more, one for each of training, {' and '.join(shares)}; it has "
            f"{size}; add samples or drop the class"
        )
    counts: dict[str, int] = {}
    for name, share in shares.items():
        still_needed = least - len(counts) - 1
        counts[name] = min(max(1, round(share * size)), size - sum(counts.values()) - still_needed)
    return counts


def _check_parts(dataset: Dataset, rows: dict[str, npt.NDArray[np.intp]]) -> None:
    target = dataset.target
    trained = np.unique(target.y[rows["train"]])
    if len(trained) < 2:
        raise DataError(
            f"{dataset.source}: the training part needs two different values of {target.name!r} at least; "
            f"its {len(rows['train'])} samples have one"
        )
    for name in ("valid", "test") if target.classes else ():
        unknown = np.setdiff1d(target.y[rows[name]], trained)
        if len(unknown):
            raise DataError(
                f"{dataset.source}: each class must be in the training part; class {target.classes[unknown[0]]!r} "
                f"is only in the {name} part; add samples of it or drop it"
            )


def _prepare(dataset: Dataset, train: npt.NDArray[np.intp]) -> tuple[Floats, tuple[str, ...]]:
    x = dataset.x
    if isinstance(x, pd.DataFrame):
        return table.encode(x, train)
    if not dataset.prepare:
        return x.astype(np.float32), ("x is used as it comes",)
    if x.ndim == 2:
        scaled = StandardScaler().fit(x[train]).transform(x)
        return scaled.astype(np.float32), ("x is standardized feature by feature",)
    out = np.empty(x.shape, np.float32)
    for channel in range(x.shape[1]):
        values = x[train, channel].astype(np.float64)
        # a constant's computed deviation may be a rounding error, and dividing by that blows it up
        scale = values.std() if values.min() < values.max() else 1.0
        out[:, channel] = (x[:, channel] - values.mean()) / scale
    return out, ("x is standardized channel by channel",)


def _scale_target(dataset: Dataset, train: npt.NDArray[np.intp]) -> tuple[Array, float, float]:
    y = dataset.target.y
    if dataset.target.classes:
        return y, 0.0, 1.0
    mean, std = float(y[train].mean()), float(y[train].std())
    return ((y - mean) / std).astype(np.float32), mean, std
