"""What `watch` found: the rules are asked, and what is new is told once, on the screen, in a file, to a writer."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from renorm.diagnose import rules as _rules  # noqa: F401 (fills the catalogue)
from renorm.diagnose.catalogue import RULES
from renorm.diagnose.finding import Finding, Report, ordered
from renorm.diagnose.history import History, Sample
from renorm.diagnose.writer import Writer, counts, readings
from renorm.errors import DiagnosisError

__all__ = ["OnError", "Reporter"]

OnError = Literal["print", "raise", "silent"]
Key = tuple[str, str, str]  # a rule, a module or what the rule has for one, and the optimizer's label


class Reporter:
    """The rules, what they found so far, and what the user was told of it."""

    def __init__(
        self, model: nn.Module, on_error: OnError, ignore: Collection[str], log: str | Path | None, writer: Any
    ) -> None:
        self.model, self.on_error = model, on_error
        self._rules = [r for r in RULES.values() if r.when == "watch" and not {r.id, r.slug} & set(ignore)]
        self._found: dict[Key, Finding] = {}
        self._suspected: dict[Key, int] = {}  # warnings seen once, and in which look
        self._failures: list[str] = []
        self._log = None if log is None else Path(log)
        self._writer = None if writer is None else Writer(writer)

    def report(self, note: str) -> Report:
        """What was found so far, with a `note` where there is one."""
        return Report(ordered(self._found.values()), self._notes(note), self.model)

    def _notes(self, note: str) -> tuple[str, ...]:
        return (*self._failures, note) if note else tuple(self._failures)

    def gather(self, note: str) -> Report:
        """The findings and notes of all processes, each once."""
        found: list[Any] = [None]
        if _distributed():
            found = [None] * torch.distributed.get_world_size()
            mine = [(key, dataclasses.replace(finding, mend=None)) for key, finding in self._found.items()]
            torch.distributed.all_gather_object(found, (mine, self._notes(note)))
        else:
            found = [(list(self._found.items()), self._notes(note))]
        merged: dict[Key, Finding] = {}
        for theirs, _ in found:
            for key, finding in theirs:
                known = merged.get(key)
                count = finding.count + (0 if known is None else known.count)
                merged[key] = dataclasses.replace(known or finding, count=count)
        failures = dict.fromkeys(failure for _, theirs in found for failure in theirs)
        return Report(ordered(merged.values()), tuple(failures), self.model)

    def ask(self, history: History, label: str, look: int) -> list[Finding]:
        """What the rules find that is to be told; `look` numbers the questions about one optimizer."""
        new: list[Finding] = []
        broken = history.broken
        for rule in list(self._rules):
            if broken and rule.slug != "non-finite":  # all else follows from that
                continue
            try:
                founds = list(rule.find(history))
            except Exception as error:  # a diagnosis must not stop a training run by its own bugs
                self._rules.remove(rule)
                self.fail(f"rule {rule.id} ({rule.slug})", error)
                continue
            for found in founds:
                finding = Finding.of(rule, found, history.step)
                if label:
                    finding = dataclasses.replace(finding, message=f"{label}: {finding.message}")
                if self._is_new((rule.id, found.module if found.key is None else found.key, label), finding, look):
                    new.append(finding)
        return new

    def _is_new(self, key: Key, finding: Finding, look: int) -> bool:
        """Whether the finding is to be told now: once, and a warning only when it was seen in two looks running."""
        known = self._found.get(key)
        if known is not None and (known.severity == finding.severity or finding.severity != "error"):
            self._found[key] = dataclasses.replace(known, count=known.count + 1)
            return False
        if finding.severity != "error" and self._suspected.get(key) != look - 1:
            self._suspected[key] = look
            return False
        self._found[key] = finding
        return True

    def tell(self, new: list[Finding], step: int, *, quiet: bool) -> None:
        """Tell what is new, and how many there are; raises DiagnosisError where that was asked for and not `quiet`."""
        for finding in new:
            self._tell(finding)
        self.write(counts(self._found.values()), step)
        errors = [finding for finding in new if finding.severity == "error"]
        if self.on_error == "raise" and errors and not quiet:
            raise DiagnosisError(str(errors[0]), self.report(""))

    def _tell(self, finding: Finding) -> None:
        if not _speaks():
            return
        if self.on_error != "silent":
            print(finding, file=sys.stderr)
        if self._log is not None:
            with self._log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finding.to_dict()) + "\n")
        self.write(finding, finding.step or 0)

    def sampled(self, sample: Sample, label: str) -> None:
        """Write the numbers of a step."""
        if self._writer is not None:
            self.write(readings(sample, label), sample.step)

    def write(self, what: Mapping[str, float] | Finding, step: int) -> None:
        """Give numbers or a finding to the user's writer, whose failures are its own."""
        if self._writer is None or not _speaks():
            return
        try:
            if isinstance(what, Finding):
                self._writer.finding(what, step)
            else:
                self._writer.numbers(what, step)
        except Exception as error:
            self._writer = None
            self.fail("the writer", error)

    def fail(self, what: str, error: Exception) -> None:
        """Something of ours failed: it is off from now on, and named once."""
        failure = f"{what} failed and is off: {type(error).__name__}: {error}"
        if failure not in self._failures:
            self._failures.append(failure)
            if self.on_error != "silent" and _speaks():
                print(f"note: {failure}", file=sys.stderr)


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _speaks() -> bool:
    """Whether this process prints: of several only the first does."""
    return not _distributed() or torch.distributed.get_rank() == 0
