"""What `check` and `watch` hand to the user: findings, and a report of them."""

from __future__ import annotations

import ast
import copy
import html
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from renorm.diagnose.catalogue import SEVERITIES, Found, Mend, Mended, Rule, Severity

__all__ = ["Finding", "Fixed", "Part", "Report"]

Part = Literal["head", "message", "why", "fix"]  # of a finding that is told in lines
WIDTH = 100  # of plain text

# The badges' colours carry white text, on the page of a light and of a dark notebook; the text has the page's own.
_COLOURS = {"error": "#b3261e", "warning": "#8a5a00", "info": "#3b5b92"}
_FINDING = "border-left:4px solid {colour};margin:1em 0;padding:0 0 0 .8em;max-width:58em;overflow-wrap:anywhere"
_BADGE = "background:{colour};color:#fff;border-radius:3px;padding:.1em .45em;font-weight:600"
_CODE = (
    "margin:.4em 0 0;padding:.5em .7em;background:rgba(127,127,127,.15);color:inherit;white-space:pre-wrap;"
    "overflow-wrap:anywhere"
)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, here."""

    id: str  # of the rule
    slug: str  # of the rule
    severity: Severity
    message: str  # what is wrong here, with the numbers seen
    module: str  # as in named_modules(); "" where no module is to blame
    why: str  # what it does to training
    fix: str  # code for this model where there is some
    source: str  # who says so
    count: int = 1  # how often it was seen
    step: int | None = None  # of training, where it was seen first
    mend: Mend | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, rule: Rule, found: Found, step: int | None = None) -> Finding:
        """What `rule` found, with its entry in the catalogue."""
        return cls(
            rule.id,
            rule.slug,
            found.severity or rule.severity,
            found.message,
            found.module,
            rule.why,
            found.fix or rule.fix,
            rule.source,
            step=step,
            mend=found.mend,
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it but the mechanical fix, as plain values."""
        names = ("id", "slug", "severity", "message", "module", "why", "fix", "source", "count", "step")
        return {name: getattr(self, name) for name in names}

    @property
    def fix_is_code(self) -> bool:
        """Whether the fix is Python rather than a sentence."""
        if "\n" in self.fix or "#" in self.fix:
            return True
        try:
            ast.parse(self.fix)
        except SyntaxError:
            return False
        return True

    def lines(self, width: int = WIDTH) -> Iterator[tuple[Part, str]]:
        """The finding for people, line by line, and what each line is a part of; code is not broken."""
        where = f" at {self.module}" if self.module else ""
        often = f" ({self.count} times, first in step {self.step})" if self.count > 1 else ""
        yield "head", f"{self.severity} {self.id} {self.slug}{where}{often}"
        for line in _wrapped(self.message, "  ", width):
            yield "message", line
        for line in _wrapped(self.why, "  why: ", width):
            yield "why", line
        broken = self.fix.splitlines() if self.fix_is_code else _wrapped(self.fix, "", width - 7)
        for number, line in enumerate(broken):
            yield "fix", f"{'       ' if number else '  fix: '}{line}".rstrip()

    def __str__(self) -> str:
        return "\n".join(line for _, line in self.lines())

    def _repr_html_(self) -> str:
        colour, escape = _COLOURS[self.severity], html.escape
        where = f" at <code>{escape(self.module)}</code>" if self.module else ""
        often = f" ({self.count} times, first in step {self.step})" if self.count > 1 else ""
        fix = f'<pre style="{_CODE}">{escape(self.fix)}</pre>' if self.fix_is_code else f"{escape(self.fix)}"
        return (
            f'<div style="{_FINDING.format(colour=colour)}">'
            f'<div><span style="{_BADGE.format(colour=colour)}">{self.severity}</span> {escape(self.id)} '
            f"{escape(self.slug)}{where}{often}</div>"
            f'<div style="margin:.35em 0"><b>{escape(self.message)}</b></div>'
            f"<div>{escape(self.why)}</div>"
            f'<div style="margin:.35em 0"><i>Fix:</i> {fix}</div>'
            f'<div style="font-size:.85em;opacity:.75">Source: {escape(self.source)}</div></div>'
        )


def _wrapped(text: str, start: str, width: int) -> list[str]:
    """`text` behind `start`, in lines of `width` that begin below where it does."""
    below = " " * len(start)
    long = max(width, len(start) + 20)  # a column of a few letters can be read by nobody
    return textwrap.wrap(
        text, long, initial_indent=start, subsequent_indent=below, break_long_words=False, break_on_hyphens=False
    )


@dataclass(frozen=True)
class Fixed:
    """What `Report.fix` made."""

    model: nn.Module
    optimizer: Optimizer | None
    said: tuple[str, ...]  # what was done, a line each


@dataclass(frozen=True)
class Report:
    """The findings, the worst first."""

    findings: tuple[Finding, ...]
    failures: tuple[str, ...] = ()  # rules that failed themselves, and with what; that nothing was looked at
    model: nn.Module | None = field(default=None, repr=False)
    optimizer: Optimizer | None = field(default=None, repr=False)

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Those that are certainly wrong."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return not self.errors

    def fix(self) -> Fixed:
        """A copy of the model, and its optimizer, with every mechanical fix made; the originals are untouched.

        The copied optimizer holds the copied model's parameters and the same state.
        """
        if self.model is None:
            raise ValueError("this report has no model: only what renorm.check returns can be fixed")
        model, optimizer = copy.deepcopy((self.model, self.optimizer))
        said = []
        for finding in self.findings:
            if finding.mend is not None:
                mended: Mended = finding.mend(model, optimizer)
                model, optimizer = mended.model, mended.optimizer
                said.append(f"{finding.id} {finding.slug}: {mended.said}")
        return Fixed(model, optimizer, tuple(said))

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return {"findings": [finding.to_dict() for finding in self.findings], "failures": list(self.failures)}

    @property
    def summary(self) -> str:
        """How many there are of each severity, in words."""
        counts = {severity: sum(f.severity == severity for f in self.findings) for severity in SEVERITIES}
        plural = {"error": "errors", "warning": "warnings", "info": "infos"}
        return ", ".join(f"{n} {s if n == 1 else plural[s]}" for s, n in counts.items() if n) or "no findings"

    def __str__(self) -> str:
        parts = [self.summary, *map(str, self.findings)]
        return "\n\n".join(parts + [f"note: {failure}" for failure in self.failures])

    def _repr_html_(self) -> str:
        findings = "".join(finding._repr_html_() for finding in self.findings)
        notes = "".join(f"<p>Note: {html.escape(failure)}</p>" for failure in self.failures)
        return f"<div><b>renorm: {self.summary}</b>{findings}{notes}</div>"


def ordered(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The worst first, within a severity as they came."""
    return tuple(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)))
