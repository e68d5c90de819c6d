"""The execution: trials the store lacks, run in parallel processes, each result kept as it arrives."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import joblib

from renorm.comparison.data import Splits
from renorm.comparison.forecast import run_forecast
from renorm.comparison.panel import Panel
from renorm.comparison.spec import TrialResult, TrialSpec
from renorm.comparison.store import Store
from renorm.comparison.trial import Build, build_model, run_trial
from renorm.errors import StudyError

__all__ = ["Interrupted", "check_backend", "missing", "num_jobs", "run"]

_REFUSED = {
    "threading": "trials seed torch's random numbers, which threads share",
    "multiprocessing": "it forks a process that may already have threads, which can hang",
    "sequential": "it is what jobs = 1 does",
}


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a study; it says how many trials are kept."""


def missing(specs: Sequence[TrialSpec], store: Store) -> tuple[TrialSpec, ...]:
    """The specs whose trials are still to be run; a trial that failed with an exception is run again."""
    kept = store.read([spec.key for spec in specs])
    return tuple(spec for spec in specs if spec.key not in kept or kept[spec.key].status == "failed")


def num_jobs(jobs: int | None) -> int:
    """How many trials run at the same time: ``jobs``, or one for each core this process may use.

    Raises:
        StudyError: ``jobs`` is below 1.
    """
    if jobs is not None and jobs < 1:
        raise StudyError(f"jobs must be at least 1; got {jobs}; leave it out to use every core")
    return int(joblib.cpu_count()) if jobs is None else jobs


def check_backend(backend: str) -> None:
    """See that joblib has a backend of this name which runs processes of their own.

    Raises:
        StudyError: there is none, it cannot run here, or it shares or forks processes.
    """
    if backend in _REFUSED:
        raise StudyError(f"backend {backend!r} cannot run trials: {_REFUSED[backend]}; write loky, dask or ray")
    try:
        if backend == "ray":
            from ray.util.joblib import register_ray  # type: ignore[import-not-found,unused-ignore]

            register_ray()
        with joblib.parallel_config(backend=backend):
            pass
    except (ImportError, ValueError) as error:
        raise StudyError(f"backend {backend!r} cannot run here: {error}") from None


def run(
    specs: Sequence[TrialSpec],
    store: Store,
    *,
    jobs: int | None = None,
    backend: str = "loky",
    build: Build = build_model,
    on_result: Callable[[TrialResult], None] = lambda result: None,
) -> tuple[TrialResult, ...]:
    """The results of all specs, in their order; those that the store lacks are run and kept.

    The store is open and holds the data. Each trial runs with one torch thread, in a process that is spawned,
    never forked (for one job: in this process); with the backends "dask" and "ray" the store's folder must be
    one that the workers see. A trial whose process dies is run again alone, and if it dies again its result
    says "failed".

    Raises:
        Interrupted: at Ctrl-C; what has arrived is kept.
        OSError: a result cannot be written; what has arrived before is kept.
        StudyError: the model cannot be sent to another process.
    """
    pool = _Pool(store.data, num_jobs(jobs), backend, build)
    todo = sorted(missing(specs, store), key=lambda spec: spec.batch_size)  # the longest trials first
    try:
        with _quietly_closing(pool.results(todo)) as arriving:
            for result in arriving:
                store.write(result)
                on_result(result)
    except KeyboardInterrupt:
        raise Interrupted(_kept(specs, store)) from None
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error}; {_kept(specs, store)}", error.filename) from error
    results = store.read([spec.key for spec in specs])
    return tuple(results[spec.key] for spec in specs)


@contextmanager
def _quietly_closing(results: Generator[TrialResult]) -> Iterator[Generator[TrialResult]]:
    try:
        yield results
    finally:
        with warnings.catch_warnings():
            # joblib warns that running trials are given up; the Interrupted that follows says so better.
            warnings.simplefilter("ignore", UserWarning)
            results.close()


def _kept(specs: Sequence[TrialSpec], store: Store) -> str:
    kept = len(specs) - len(missing(specs, store))
    return f"{kept} of {len(specs)} trials are kept; run the same command to go on"


class _Pool:
    """Worker processes that run trials on one data file."""

    def __init__(self, data: Path, jobs: int, backend: str, build: Build) -> None:
        self.data = str(data.resolve())
        self.jobs = jobs
        self.backend = backend
        self.build = build

    def results(self, specs: Sequence[TrialSpec]) -> Generator[TrialResult]:
        """Each trial's result as it arrives; the death of a worker costs only the trial that killed it."""
        pending = {spec.key: spec for spec in specs}
        while pending:
            with closing(self._until_broken(list(pending.values()))) as results:
                for result in results:
                    del pending[result.spec.key]
                    yield result
            # Trials start in order: one that killed its process is among the first that are pending.
            for spec in list(pending.values())[: self.jobs]:
                del pending[spec.key]
                yield self._alone(spec)

    def _until_broken(self, specs: Sequence[TrialSpec]) -> Generator[TrialResult]:
        with suppress(BrokenProcessPool):
            yield from self._stream(specs, min(self.jobs, len(specs)))

    def _alone(self, spec: TrialSpec) -> TrialResult:
        try:
            # Two jobs, because joblib runs a single one in this process.
            (result,) = self._stream([spec], 2)
            return result
        except BrokenProcessPool as error:
            return TrialResult(spec, "failed", _why_broken(error))

    def _stream(self, specs: Sequence[TrialSpec], jobs: int) -> Generator[TrialResult]:
        options: dict[str, Any] = {"n_jobs": jobs, "backend": self.backend, "batch_size": 1}
        if self.backend == "loky" and jobs > 1:
            # Ctrl-C reaches every process of a terminal; the parent decides what becomes of its workers.
            options |= {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}
        tasks = (joblib.delayed(_trial)(spec, self.data, self.build) for spec in specs)
        try:
            with closing(joblib.Parallel(return_as="generator_unordered", **options)(tasks)) as results:
                yield from results
        except pickle.PicklingError as error:
            why = str(error.__cause__ or error).strip('"\n').splitlines()[-1]  # its last line, of a traceback
            raise StudyError(
                f"the model must be picklable to be trained in another process: {why}; "
                "make it picklable, or write jobs = 1"
            ) from error


def _why_broken(error: BrokenProcessPool) -> str:
    if "un-serialize" in str(error):  # loky's word for what the worker could not import or rebuild
        last = str(error.__cause__).strip('"\n').splitlines()[-1]
        return f"the model could not be rebuilt in another process: {last}; put it into a module that can be imported"
    return "its process died twice without a Python exception, most likely for lack of memory"


def _trial(spec: TrialSpec, data: str, build: Build) -> TrialResult:
    _end_with_parent()
    if spec.bar:
        return run_forecast(spec, _panel(data, spec.data), build)
    return run_trial(spec, _splits(data, spec.data), build)


@lru_cache(maxsize=1)
def _splits(data: str, fingerprint: str) -> Splits:
    return Splits.load(Path(data))


@lru_cache(maxsize=1)
def _panel(data: str, fingerprint: str) -> Panel:
    return Panel.load(Path(data))


@lru_cache(maxsize=1)
def _end_with_parent() -> None:
    """Let a worker process end when the process that started it is gone, even by kill -9.

    A worker of joblib waits for work for minutes after its parent's death. Windows does not change a
    process's parent; there the worker ends by that wait.
    """
    if multiprocessing.parent_process() is None:
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
