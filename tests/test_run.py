"""The execution: trials run once, in processes of their own, and nothing that can happen to one loses others."""

from __future__ import annotations

import errno
import io
import os
import signal
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from rich.console import Console
from torch import nn

from renorm.comparison.data import Splits
from renorm.comparison.progress import Clock, duration, progress
from renorm.comparison.run import Interrupted, check_backend, missing, num_jobs, run
from renorm.comparison.spec import TrialResult, TrialSpec
from renorm.comparison.store import Store
from renorm.comparison.trial import build_model, run_trial
from renorm.errors import StudyError


def must_not_build(spec: TrialSpec, splits: Splits) -> nn.Module:
    raise AssertionError("this trial was kept and must not be run")


@pytest.mark.parametrize("jobs", [1, 2])
def test_parallel_trials_give_what_each_gives_alone(tmp_path: Path, jobs: int) -> None:
    specs = small.specs(norm="none,batch", seeds=2, batch_size=[4, 8])
    with small.store(tmp_path).open() as store:
        results = run(specs, store, jobs=jobs)
    alone = [run_trial(spec, small.splits()) for spec in specs]
    assert [small.scores(result) for result in results] == [small.scores(result) for result in alone]
    assert {result.status for result in results} == {"ok"}
    assert len(list((tmp_path / "trials").iterdir())) == len(specs)


def test_kept_trials_are_not_run_again(tmp_path: Path) -> None:
    specs = small.specs()
    with small.store(tmp_path).open() as store:
        first = run(specs, store, jobs=1)
        assert run(specs, store, jobs=1, build=must_not_build) == first


def test_a_damaged_result_is_run_again(tmp_path: Path) -> None:
    specs = small.specs(norm="batch")
    with small.store(tmp_path).open() as store:
        first = run(specs, store, jobs=1)
        path = tmp_path / "trials" / f"{specs[0].key}.json"
        path.write_text(path.read_text()[:50])
        assert missing(specs, store) == specs[:1]
        again = run(specs, store, jobs=1)
    assert [small.scores(result) for result in again] == [small.scores(result) for result in first]
    assert len(store.notes) == 1


def fail_layer(spec: TrialSpec, splits: Splits) -> nn.Module:
    if spec.norm == "layer":
        raise RuntimeError("no layer norm today")
    return build_model(spec, splits)


def test_a_failed_trial_is_a_row_and_is_tried_again(tmp_path: Path) -> None:
    specs = small.specs(seeds=1)
    with small.store(tmp_path).open() as store:
        results = run(specs, store, jobs=1, build=fail_layer)
        assert [result.status for result in results] == ["ok", "failed"]
        assert "no layer norm today" in results[1].reason
        assert [result.status for result in run(specs, store, jobs=1)] == ["ok", "ok"]


def die_with_batch(spec: TrialSpec, splits: Splits) -> nn.Module:
    if spec.norm == "batch":
        os.kill(os.getpid(), signal.SIGKILL)
    return build_model(spec, splits)


def test_the_death_of_a_worker_costs_its_trial_only(tmp_path: Path) -> None:
    specs = small.specs(norm="none,batch,layer,rms", seeds=1)
    with small.store(tmp_path).open() as store:
        results = run(specs, store, jobs=2, build=die_with_batch)
    assert [result.status for result in results] == ["ok", "failed", "ok", "ok"]
    assert "its process died twice" in results[1].reason


def look_at_process(parent: int, spec: TrialSpec, splits: Splits) -> nn.Module:
    if torch.get_num_threads() != 1 or os.getpid() == parent:
        raise AssertionError("a trial has one thread in a process of its own")
    return build_model(spec, splits)


def test_trials_run_in_other_processes_with_one_thread(tmp_path: Path) -> None:
    with small.store(tmp_path).open() as store:
        results = run(small.specs(), store, jobs=2, build=partial(look_at_process, os.getpid()))
    assert [result.status for result in results] == ["ok"] * 4, results


def test_one_job_leaves_the_callers_threads_as_they_were(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with small.store(tmp_path).open() as store:
            run(small.specs(seeds=1), store, jobs=1)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_keeps_what_has_arrived(tmp_path: Path, jobs: int) -> None:
    specs = small.specs()
    arrived: list[TrialResult] = []

    def interrupt(result: TrialResult) -> None:
        arrived.append(result)
        if len(arrived) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with small.store(tmp_path).open() as store:
        with pytest.raises(Interrupted, match=r"^2 of 4 trials are kept; run the same command to go on$"):
            run(specs, store, jobs=jobs, on_result=interrupt)
        kept = [result.spec for result in arrived]
        assert set(missing(specs, store)) == set(specs) - set(kept)
        run(specs, store, jobs=jobs)
        assert missing(specs, store) == ()


def test_a_full_disk_ends_the_run_and_says_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = Store.write, []

    def full(store: Store, result: TrialResult) -> None:
        if written:
            raise OSError(errno.ENOSPC, "No space left on device", "trials/0123.json")
        written.append(result)
        write(store, result)

    monkeypatch.setattr(Store, "write", full)
    with small.store(tmp_path).open() as store, pytest.raises(OSError, match="1 of 4 trials are kept") as raised:
        run(small.specs(), store, jobs=1)
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, "trials/0123.json")


class Locked:
    """A build function that cannot be sent to another process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __call__(self, spec: TrialSpec, splits: Splits) -> nn.Module:
        with self.lock:
            return build_model(spec, splits)


def test_a_model_that_cannot_be_pickled_is_refused_or_run_here(tmp_path: Path) -> None:
    specs = small.specs(seeds=1)
    with small.store(tmp_path).open() as store:
        with pytest.raises(StudyError, match=r"must be picklable .*; make it picklable, or write jobs = 1"):
            run(specs, store, jobs=2, build=Locked())
        assert [result.status for result in run(specs, store, jobs=1, build=Locked())] == ["ok", "ok"]


def test_the_number_of_jobs() -> None:
    assert num_jobs(3) == 3
    assert num_jobs(None) >= 1
    with pytest.raises(StudyError, match="jobs must be at least 1; got 0"):
        num_jobs(0)


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("threading", "random numbers, which threads share; write loky, dask or ray"),
        ("multiprocessing", "it forks a process"),
        ("lokee", "cannot run here: Invalid backend: lokee"),
        ("ray", "backend 'ray' cannot run here: No module named 'ray'"),
    ],
)
def test_a_backend_that_cannot_run_trials_is_refused(backend: str, message: str) -> None:
    with pytest.raises(StudyError, match=message):
        check_backend(backend)


def test_the_standard_backend_can_run() -> None:
    check_backend("loky")


# progress


def test_the_time_left_is_in_proportion_to_the_work_left() -> None:
    now = [0.0]
    slow, fast = small.specs(norm="batch", seeds=1, batch_size=[2, 16])
    clock = Clock([slow, fast], num_train=48, now=lambda: now[0])
    assert clock.left is None
    now[0] = 10.0
    clock.advance(slow)
    # 24 steps of 64 + 2 took 10 s; 3 steps of 64 + 16 are left.
    assert clock.left == pytest.approx(10 * (3 * 80) / (24 * 66))
    now[0] = 10.5
    assert clock.left == pytest.approx(10 * (3 * 80) / (24 * 66) - 0.5)
    now[0] = 60.0
    assert clock.left == 0
    clock.advance(fast)
    assert clock.left == 0


def shown(console: Console, num_trials: int, num_kept: int) -> None:
    specs = small.specs(norm="batch", seeds=num_trials)
    with progress(console, "training [b]", specs, num_kept, num_train=48) as show:
        for spec in specs:
            show(TrialResult(spec, "ok"))


def test_a_log_gets_a_line_for_each_tenth() -> None:
    out = io.StringIO()
    shown(Console(file=out, width=200), num_trials=40, num_kept=5)
    lines = out.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("training [b]: 9 of 45 trials")
    assert lines[-1] == "training [b]: 45 of 45 trials"


def test_a_terminal_gets_a_bar() -> None:
    out = io.StringIO()
    shown(Console(file=out, width=120, force_terminal=True), num_trials=3, num_kept=1)
    assert "training [b]" in out.getvalue()
    assert "1 of 4 trials" in out.getvalue()
    assert "left" in out.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "under 1 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3600, "1 h 0 min"), (86400, "24 h 0 min")],
)
def test_durations_are_words(seconds: Any, text: str) -> None:
    assert duration(seconds) == text
