"""The progress of a run: a bar with the time left on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from renorm.comparison.forecast import BASELINES
from renorm.comparison.spec import TrialResult, TrialSpec
from renorm.comparison.study import num_steps

__all__ = ["Clock", "duration", "progress"]

LINES = 10  # how many lines a log gets for a phase


class Clock:
    """The time left, from the share of the work that is done; trials differ in work, not only in number.

    A step's work is taken as 64 + batch size: its fixed cost is about that of 64 samples of a small model.
    """

    def __init__(self, specs: Sequence[TrialSpec], num_train: int, now: Callable[[], float] = time.monotonic) -> None:
        self.num_train = num_train
        self.work = sum(map(self.work_of, specs))  # of all trials that are to be run
        self.done = 0  # of those that have ended
        self._now = now
        self._start = now()
        self._end: float | None = None  # when the run is expected to end

    def work_of(self, spec: TrialSpec) -> int:
        """The work of a trial, in no unit but comparable."""
        if spec.norm in BASELINES:
            return 1
        return num_steps(spec, self.num_train) * (64 + spec.batch_size)

    def advance(self, spec: TrialSpec) -> None:
        """Count a trial that has ended."""
        self.done += self.work_of(spec)
        elapsed = self._now() - self._start
        self._end = self._start + elapsed * self.work / self.done

    @property
    def left(self) -> float | None:
        """Seconds left; None before the first trial has ended."""
        return None if self._end is None else max(0.0, self._end - self._now())


@contextmanager
def progress(
    console: Console, label: str, todo: Sequence[TrialSpec], num_kept: int, num_train: int
) -> Iterator[Callable[[TrialResult], None]]:
    """Show how far the trials of ``todo`` are; yields what to call with each result."""
    clock = Clock(todo, num_train)
    total = num_kept + len(todo)
    if console.is_terminal or console.is_jupyter:
        with _bar(console, clock) as bar:
            task = bar.add_task(label, total=total, completed=num_kept)

            def show(result: TrialResult) -> None:
                clock.advance(result.spec)
                bar.advance(task)

            yield show
    else:
        yield _Lines(console, label, clock, num_kept, total)


class _Lines:
    """One line for about each tenth of the trials, for logs."""

    def __init__(self, console: Console, label: str, clock: Clock, done: int, total: int) -> None:
        self.console, self.label, self.clock = console, label, clock
        self.done, self.total = done, total
        self._every = max(1, -(-(total - done) // LINES))
        self._first = done

    def __call__(self, result: TrialResult) -> None:
        self.clock.advance(result.spec)
        self.done += 1
        if (self.done - self._first) % self._every == 0 or self.done == self.total:
            left = f", {duration(self.clock.left)} left" if self.clock.left else ""
            self.console.print(f"{self.label}: {self.done} of {self.total} trials{left}", markup=False)


def _bar(console: Console, clock: Clock) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:.0f} of {task.total:.0f} trials"),
        _TimeLeft(clock),
        console=console,
        transient=True,
    )


class _TimeLeft(ProgressColumn):
    """The time left, counting down between results."""

    max_refresh = 0.5

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def render(self, task: Task) -> Text:
        """The time left, or that it is not known yet."""
        left = self.clock.left
        return Text("time left: not known yet" if left is None else f"{duration(left)} left")


def duration(seconds: float | None) -> str:
    """A time span in words.

    >>> duration(0.4), duration(75), duration(7300)
    ('under 1 s', '1 min 15 s', '2 h 1 min')
    """
    whole = round(seconds or 0)
    if whole < 1:
        return "under 1 s"
    minutes, rest = divmod(whole, 60)
    if minutes < 1:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
