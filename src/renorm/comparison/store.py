"""The store: one folder for a study, one JSON file for a trial, written so that no crash damages it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from renorm.comparison.atomic import writing
from renorm.comparison.spec import StudyRecord, TrialResult
from renorm.errors import DataError, StudyError

if TYPE_CHECKING:
    from renorm.comparison.data import Splits
    from renorm.comparison.panel import Panel

__all__ = ["Store"]


class Store:
    """A study's folder: ``study.json``, ``data.npz`` and ``trials/<key>.json``.

    Every file is written beside its place, flushed to the disk and then renamed: it is whole or absent,
    whatever kills the process. A trial's file that is damaged all the same is treated as absent and named in
    :attr:`notes`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.notes: list[str] = []  # what a user should know of the folder, a sentence each

    @property
    def data(self) -> Path:
        """The prepared data, as :meth:`data.Splits.save` writes it."""
        return self.folder / "data.npz"

    @contextmanager
    def open(self) -> Iterator[Store]:
        """The store for writing: its folder exists, leftovers of killed runs are gone, nobody else writes.

        Raises:
            StudyError: another process has the same study open.
        """
        self._trials.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("a+b") as file:
            self._lock(file)
            for leftover in (*self.folder.glob("*.tmp"), *self._trials.glob("*.tmp")):
                leftover.unlink()
            yield self

    def write_record(self, record: StudyRecord) -> None:
        """Keep what the study says of itself, in place of what an earlier run said."""
        _write_json(self.folder / "study.json", record.to_json())

    def read_record(self) -> StudyRecord:
        """What the study says of itself.

        Raises:
            StudyError: the folder holds no study, or its ``study.json`` is damaged.
        """
        path = self.folder / "study.json"
        try:
            return StudyRecord.from_json(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise StudyError(f"{self.folder} must be the folder of a study; it has no study.json") from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise StudyError(f"{path} is damaged ({error!r}): run the study again to write it") from None

    def write_data(self, splits: Splits | Panel) -> None:
        """Keep the prepared data for the processes that run trials."""
        splits.save(self.data)

    def read_data(self, fingerprint: str) -> Splits | None:
        """The prepared data; None where the file is absent, damaged, or holds other data than `fingerprint` says."""
        from renorm.comparison.data import Splits

        try:
            splits = Splits.load(self.data)
        except (FileNotFoundError, DataError):
            return None
        return splits if splits.fingerprint == fingerprint else None

    def write(self, result: TrialResult) -> None:
        """Keep a trial's result."""
        _write_json(self._path(result.spec.key), result.to_json())

    def read(self, keys: Iterable[str]) -> dict[str, TrialResult]:
        """The results that are kept, of those named; each key whose file is absent or damaged is left out."""
        found = ((key, self._read(key)) for key in keys)
        return {key: result for key, result in found if result is not None}

    @property
    def _trials(self) -> Path:
        return self.folder / "trials"

    def _path(self, key: str) -> Path:
        return self._trials / f"{key}.json"

    def _read(self, key: str) -> TrialResult | None:
        path = self._path(key)
        try:
            result = TrialResult.from_json(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            self._note(f"{path} is damaged ({type(error).__name__}: {error}); the trial counts as not run")
            return None
        if result.spec.key != key:
            self._note(f"{path} holds another trial than its name says; the trial counts as not run")
            return None
        return result

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _lock(self, file: IO[bytes]) -> None:
        try:
            _try_lock(file)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                raise StudyError(
                    f"one process at a time can write a study; {self.folder} is in use by another one; "
                    "wait for it to end, or give this study another name"
                ) from None
            self._note(f"{self.folder} is on a file system without locks: run this study once at a time")


def _try_lock(file: IO[bytes]) -> None:
    """Take the file for this process, or raise OSError; the system gives it back when the process ends."""
    if os.name == "nt":
        import msvcrt

        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _write_json(path: Path, value: object) -> None:
    with writing(path) as file:
        file.write(json.dumps(value, indent=1, allow_nan=False).encode() + b"\n")
