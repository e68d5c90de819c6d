"""A replication's results for people: a page of the documentation, and a text for the terminal."""

from __future__ import annotations

from pathlib import Path

from renorm.studies import catalogue
from renorm.studies.replication import Table, verdict
from renorm.studies.run import Results

__all__ = ["contents", "page", "summary", "write"]


def page(results: Results, picture: str) -> str:
    """The Markdown page of a run; `picture` is the path of its picture, as the page sees it."""
    replication = catalogue.get(results.name)
    claims = replication.judge(results.rows)
    seeds = len({row.seed for row in results.rows})
    ran = f"{len(results.rows.rows)} measurements, {seeds} seeds, one thread each"
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    parts = [
        f"# {replication.title}",
        f"*{replication.question}*",
        f"**{verdict(claims).capitalize()}**, in the {results.scale} form.",
        _markdown(Table("", ("must hold", "measured", "holds"), tuple(_row(c.text, c.found, c.holds) for c in claims))),
        f"![{replication.title}]({picture})",
        *(f"{table.caption}\n\n{_markdown(table)}" for table in replication.tables(results.rows)),
        replication.reading(results.rows),
        "## What was published",
        "\n".join(f"- {one.found} ({one.source})" for one in replication.published),
        "## Protocol",
        replication.protocol,
        f"- **Quick**: {replication.quick.scale}; about {replication.minutes} min on two cores\n"
        f"- **Full**: {replication.full.scale}",
        f"Run here: {ran} ({versions}). Means are over seeds, with 95% intervals of Student's t. Again:",
        f"```sh\nrenorm study {results.name}{' --quick' * (results.scale == 'quick')}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def summary(results: Results) -> str:
    """What a terminal shows of a run, as text."""
    replication = catalogue.get(results.name)
    claims = replication.judge(results.rows)
    lines = [replication.question, ""]
    for table in replication.tables(results.rows):
        lines += [table.caption, *_aligned(table), ""]
    lines += [f"{'✓' if claim.holds else '✗'} {claim.text}: {claim.found}" for claim in claims]
    return "\n".join([*lines, "", f"{verdict(claims).capitalize()} ({results.scale} form)."])


def write(results: Results, folder: Path) -> Path:
    """Write ``<name>.md`` and ``pictures/<name>.svg``; the path of the page."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    picture = Path("pictures") / f"{results.name}.svg"
    (folder / picture).write_text(catalogue.get(results.name).draw(results.rows) + "\n", encoding="utf-8")
    path = folder / f"{results.name}.md"
    path.write_text(page(results, picture.as_posix()), encoding="utf-8")
    return path


def contents(found: dict[str, Results]) -> str:
    """The Markdown page that lists the replications with their verdicts; `found` holds those with results."""
    rows = []
    for name in catalogue.NAMES:
        replication = catalogue.get(name)
        said = verdict(replication.judge(found[name].rows)) if name in found else "not run"
        title = f"[{replication.title}]({name}.md)" if name in found else replication.title
        rows.append((title, said, found[name].scale if name in found else ""))
    return (
        "# Studies\n\nPublished findings about normalization and the choices around it, run again in minutes: "
        "`renorm study list` names them, `renorm study NAME --quick` runs one. What must hold was written before the "
        "run that is shown; trial runs have set rates and sizes, and after how many steps batch renorm is judged "
        "([decisions](../decisions.md) 82 and 85). A threshold (*at least 10 points*) is held against the mean, and "
        "its interval may reach below. What did not come out stays here.\n\n"
        f"{_markdown(Table('', ('study', 'result', 'form'), tuple(rows)))}\n"
    )


def _row(text: str, found: str, holds: bool) -> tuple[str, str, str]:
    return text, found, "yes" if holds else "**no**"


def _markdown(table: Table) -> str:
    lines = [table.head, tuple("---" for _ in table.head), *table.rows]
    return "\n".join(f"| {' | '.join(entry.replace('|', chr(92) + '|') for entry in line)} |" for line in lines)


def _aligned(table: Table) -> list[str]:
    lines = (table.head, *table.rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(e.ljust(w) for e, w in zip(line, widths, strict=True)).rstrip() for line in lines]
