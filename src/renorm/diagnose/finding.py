"""What `check` and `watch` hand to the user: findings, and a report of them."""

from __future__ import annotations

import copy
import html
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

from renorm.diagnose.catalogue import SEVERITIES, Found, Mend, Mended, Rule, Severity

__all__ = ["Finding", "Fixed", "Report"]


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

    def __str__(self) -> str:
        where = f" at {self.module}" if self.module else ""
        often = f" ({self.count} times, first in step {self.step})" if self.count > 1 else ""
        head = f"{self.severity}: {self.message}{often}  [{self.id} {self.slug}{where}]"
        wrapped = textwrap.fill(self.why, 100, initial_indent="  why: ", subsequent_indent="       ")
        fix = textwrap.indent(self.fix, "       ").lstrip()
        return f"{head}\n{wrapped}\n  fix: {fix}"


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
    failures: tuple[str, ...] = ()  # rules that failed themselves, and with what
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

    def __str__(self) -> str:
        if not self.findings and not self.failures:
            return "no findings"
        counts = {severity: sum(f.severity == severity for f in self.findings) for severity in SEVERITIES}
        plural = {"error": "errors", "warning": "warnings", "info": "infos"}
        head = ", ".join(f"{n} {s if n == 1 else plural[s]}" for s, n in counts.items() if n) or "no findings"
        parts = [head, *(str(finding) for finding in self.findings)]
        return "\n\n".join(parts + [f"note: {failure}" for failure in self.failures])

    def _repr_html_(self) -> str:
        colors = {"error": "#b3261e", "warning": "#8a5a00", "info": "#3b5b92"}
        rows = []
        for f in self.findings:
            where = f"<br><code>{html.escape(f.module)}</code>" if f.module else ""
            rows.append(
                f'<tr><td style="color:{colors[f.severity]};vertical-align:top"><b>{f.severity}</b><br>{f.id}{where}'
                f'</td><td style="text-align:left"><b>{html.escape(f.message)}</b><br>{html.escape(f.why)}'
                f"<pre>{html.escape(f.fix)}</pre></td></tr>"
            )
        notes = "".join(f"<p>{html.escape(failure)}</p>" for failure in self.failures)
        return f"<table>{''.join(rows)}</table>{notes}" if rows else f"<p>no findings</p>{notes}"


def ordered(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The worst first, within a severity as they came."""
    return tuple(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)))
