"""Measurements that a folder lacks, made in parallel, each kept as it arrives."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import joblib
import torch

import renorm
from renorm.comparison.atomic import writing
from renorm.comparison.run import num_jobs
from renorm.comparison.strict import decode, encode
from renorm.errors import StudyError
from renorm.studies import catalogue
from renorm.studies.replication import Replication
from renorm.studies.rows import Condition, Row, Rows

__all__ = ["Results", "run"]


@dataclass(frozen=True)
class Results:
    """The rows of a finished run and where they come from; kept as ``results.json``."""

    name: str  # of the replication
    scale: str  # "quick" or "full"
    rows: Rows
    seconds: float  # of all measurements together, in one thread each
    versions: dict[str, str] = field(default_factory=dict)  # Python, torch, renorm, machine

    def save(self, path: Path) -> None:
        """Write the results as JSON, whole or not at all."""
        rows = ",\n  ".join(map(_line, self.rows))  # a line for each: a diff shows what moved
        head = {"name": self.name, "scale": self.scale, "seconds": self.seconds, "versions": self.versions}
        with writing(path) as file:
            file.write(f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n'.encode())

    @classmethod
    def load(cls, path: Path) -> Results:
        """What `save` wrote.

        Raises StudyError for a file that is missing or damaged.
        """
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
            rows = Rows(tuple(Row(**decode(row)) for row in read.pop("rows")))
            return cls(**read, rows=rows)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise StudyError(f"{path} must be the results of a study; run it again to write them ({error!r})") from None


def run(
    name: str,
    *,
    quick: bool = False,
    out: str | Path = "renorm-runs",
    jobs: int | None = None,
    on_row: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Results, Path]:
    """Run a replication; its results, and the folder that holds ``results.json`` and a file for each measurement.

    Measurements that the folder has already, made by the same code, are not made again: an interrupted run goes on.

    Args:
        name: one of `renorm.studies.catalogue.NAMES`.
        quick: the small plan, of minutes.
        out: the folder for the study's folder.
        jobs: measurements at the same time, one thread each; None for one a core.
        on_row: called with how many are done, of how many.

    Raises StudyError for a name that is unknown, jobs below 1, and where a measurement fails; those made before stay.
    """
    replication = catalogue.get(name)
    plan = replication.quick if quick else replication.full
    folder = Path(out) / f"study-{name}"
    kept = folder / "measurements"
    kept.mkdir(parents=True, exist_ok=True)
    todo = [(condition, seed) for seed in range(plan.seeds) for condition in plan.conditions]
    files = [kept / f"{_key(replication, *one)}.json" for one in todo]
    rows = {path: row for path in files if (row := _read(path)) is not None}
    on_row(len(rows), len(files))
    missing = [(one, path) for one, path in zip(todo, files, strict=True) if path not in rows]
    for path, row in _measured(name, missing, num_jobs(jobs)):
        with writing(path) as file:
            file.write(_line(row).encode())
        rows[path] = row
        on_row(len(rows), len(files))
    ordered = Rows(tuple(rows[path] for path in files))
    seconds = round(sum(row.seconds for row in ordered), 1)
    results = Results(name, "quick" if quick else "full", ordered, seconds, _versions())
    results.save(folder / "results.json")
    return results, folder


def _measured(name: str, missing: list[tuple[tuple[Condition, int], Path]], jobs: int) -> Iterator[tuple[Path, Row]]:
    tasks = (joblib.delayed(_measure)(name, condition, seed, path) for (condition, seed), path in missing)
    parallel = joblib.Parallel(n_jobs=min(jobs, len(missing) or 1), batch_size=1, return_as="generator_unordered")
    yield from parallel(tasks)


def _measure(name: str, condition: Condition, seed: int, path: Path) -> tuple[Path, Row]:
    """One measurement; in a process of its own, or in this one where there is one job."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of a sum depends on the number of threads
    start = time.process_time()  # what else the machine does is not counted
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            values = dict(catalogue.get(name).measure(condition, seed))
    except Exception as error:
        raise StudyError(
            f"study {name}, {dict(condition)}, seed {seed}: {type(error).__name__}: {error}; what was measured before "
            "is kept"
        ) from error
    finally:
        torch.set_num_threads(threads)
    return path, Row(dict(condition), seed, values, round(time.process_time() - start, 2))


def _key(replication: Replication, condition: Condition, seed: int) -> str:
    """Of the condition, the seed, and the code that measures."""
    shared = (Path(__file__).with_name(f"{name}.py") for name in ("training", "corpus", "household"))
    files = [Path(sys.modules[replication.measure.__module__].__file__ or ""), *shared]
    code = b"".join(file.read_bytes() for file in files)
    what: list[Any] = [replication.name, sorted(condition.items()), seed, hashlib.sha256(code).hexdigest()]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def _line(row: Row) -> str:
    return json.dumps(encode(asdict(row)), allow_nan=False)


def _read(path: Path) -> Row | None:
    """The row of a file; None where there is none, or a damaged one, which is measured again."""
    try:
        return Row(**decode(json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError, TypeError):
        return None


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "renorm": renorm.__version__,
        "machine": platform.machine(),
    }
