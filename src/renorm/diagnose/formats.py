"""A report for a terminal, for programs (JSON), for code scanning (SARIF) and for GitHub's annotations."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from renorm.diagnose.catalogue import RULES, SEVERITIES
from renorm.diagnose.finding import Finding, Report
from renorm.diagnose.program import Place

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["FORMATS", "Checked", "github", "in_json", "sarif", "show", "text"]

_SARIF_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_LEVELS = {"error": "error", "warning": "warning", "info": "note"}  # SARIF's words
_COMMANDS = {"error": "error", "warning": "warning", "info": "notice"}  # GitHub's
_STYLES = {"error": "bold red", "warning": "bold yellow", "info": "bold blue"}


@dataclass(frozen=True)
class Checked:
    """A report, and where in the program its findings are."""

    report: Report
    program: str  # what was checked, such as "train.py:build"
    places: tuple[Place, ...]  # of the findings, one each

    @property
    def located(self) -> list[tuple[Finding, Place]]:
        """The findings with their places."""
        return list(zip(self.report.findings, self.places, strict=True))


def text(checked: Checked) -> str:
    """What `print(report)` shows, and a line that says where each finding is.

    >>> print(text(Checked(Report(()), "train.py:build", ())))
    train.py:build: no findings
    """
    blocks = [f"{checked.program}: {checked.report.summary}"]
    blocks += [f"{finding}\n   at: {place.file}:{place.line}" for finding, place in checked.located]
    return "\n\n".join([*blocks, *(f"note: {failure}" for failure in checked.report.failures)])


def show(checked: Checked, console: Console) -> None:
    """The same with colours, as wide as the console is."""
    from rich.markup import escape
    from rich.text import Text

    report = checked.report
    worst = report.findings[0].severity if report.findings else None
    console.print(
        f"[bold]{escape(checked.program)}[/bold]: [{_STYLES.get(worst or '', 'bold green')}]{report.summary}",
        highlight=False,
        soft_wrap=True,
    )
    styles = {"message": "bold", "why": "", "fix": "cyan"}
    for finding, place in checked.located:
        console.print()
        for part, line in finding.lines(console.width):
            shown = Text(line)
            if part == "head":
                shown.stylize(_STYLES[finding.severity], 0, len(finding.severity))
            else:
                shown.stylize(styles[part], len(line) - len(line.lstrip()))
            if part in ("why", "fix") and line[:7].strip() in ("why:", "fix:"):
                shown.stylize("not bold dim default", 0, 7)
            console.print(shown, soft_wrap=True, highlight=False)
        console.print(Text(f"   at: {place.file}:{place.line}", "dim"), soft_wrap=True, highlight=False)
    for failure in report.failures:
        console.print(Text(f"\nnote: {failure}", "dim"), soft_wrap=True, highlight=False)


def in_json(checked: Checked) -> str:
    """The report as JSON: the version, what was checked, how many findings of each severity, and all of each."""
    findings = [{**finding.to_dict(), "file": place.file, "line": place.line} for finding, place in checked.located]
    made = {
        "renorm": importlib.metadata.version("renorm"),
        "program": checked.program,
        "counts": {name: sum(f.severity == name for f in checked.report.findings) for name in SEVERITIES},
        "findings": findings,
        "failures": list(checked.report.failures),
    }
    return json.dumps(made, indent=2, ensure_ascii=False)


def sarif(checked: Checked) -> str:
    """SARIF 2.1.0: the rules that found something with their help, a result with a location for each finding.

    A rule that failed itself is a notification, and the run is one that succeeded all the same.
    """
    ids = list(dict.fromkeys(finding.id for finding in checked.report.findings))
    driver = {
        "name": "renorm",
        "version": importlib.metadata.version("renorm"),
        "rules": [_sarif_rule(id, checked.report) for id in ids],
    }
    notes = [{"level": "warning", "message": {"text": failure}} for failure in checked.report.failures]
    run = {
        "tool": {"driver": driver},
        "invocations": [{"executionSuccessful": True, "toolExecutionNotifications": notes}],
        "columnKind": "unicodeCodePoints",
        "results": [_sarif_result(finding, place, ids) for finding, place in checked.located],
    }
    return json.dumps({"$schema": _SARIF_SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2, ensure_ascii=False)


def _sarif_rule(id: str, report: Report) -> dict[str, Any]:
    finding = next(finding for finding in report.findings if finding.id == id)
    rule = RULES.get(id)  # a report outlives a rule that a program took out of the catalogue
    title = rule.title if rule is not None else finding.slug
    fix = rule.fix if rule is not None else finding.fix
    severity = rule.severity if rule is not None else finding.severity
    help = {
        "text": f"{finding.why}\n\nWhat to do: {fix}\n\nSource: {finding.source}",
        "markdown": f"{finding.why}\n\n**What to do.** {fix}\n\n*Source: {finding.source}*",
    }
    return {
        "id": id,
        "name": finding.slug,
        "shortDescription": {"text": title},
        "fullDescription": {"text": f"{title}. {finding.why}"},
        "help": help,
        "defaultConfiguration": {"level": _LEVELS[severity]},
        "properties": {"tags": ["pytorch", "training"]},
    }


def _sarif_result(finding: Finding, place: Place, ids: list[str]) -> dict[str, Any]:
    location: dict[str, Any] = {
        "physicalLocation": {
            "artifactLocation": {"uri": _uri(place.file)},
            "region": {"startLine": place.line},
        }
    }
    if finding.module:
        location["logicalLocations"] = [{"fullyQualifiedName": finding.module, "kind": "member"}]
    fix = f"Fix:\n{finding.fix}" if finding.fix_is_code else f"Fix: {finding.fix}"
    return {
        "ruleId": finding.id,
        "ruleIndex": ids.index(finding.id),
        "level": _LEVELS[finding.severity],
        "message": {"text": f"{finding.message}\n\n{fix}"},
        "locations": [location],
        # Lines and numbers in the message change from run to run; rule and module say whether it is the same finding.
        "partialFingerprints": {"ruleAndModule/v1": f"{finding.id}:{finding.module}"},
    }


def _uri(file: str) -> str:
    return Path(file).as_uri() if Path(file).is_absolute() else quote(file)


def github(checked: Checked) -> str:
    """Workflow commands: GitHub shows each as an annotation of its line.

    >>> print(github(Checked(Report((), ("rule X01 failed",)), "train.py:build", ())))
    ::warning title=renorm::rule X01 failed
    train.py:build: no findings
    """
    lines = []
    for finding, place in checked.located:
        where = f" at {finding.module}" if finding.module else ""
        title = f"{finding.id} {finding.slug}{where}"
        properties = f"file={_property(place.file)},line={place.line},title={_property(title)}"
        told = _data(f"{finding.message}\n{finding.why}\nfix: {finding.fix}")
        lines.append(f"::{_COMMANDS[finding.severity]} {properties}::{told}")
    lines += [f"::warning title=renorm::{_data(failure)}" for failure in checked.report.failures]
    return "\n".join([*lines, f"{checked.program}: {checked.report.summary}"])


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


FORMATS: dict[str, Callable[[Checked], str]] = {"text": text, "json": in_json, "sarif": sarif, "github": github}
