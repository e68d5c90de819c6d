"""Write the tables of docs/choices.md from the registries; with ``--check``, only say whether they are up to date."""

from __future__ import annotations

import math
import sys
from pathlib import Path

from renorm.choices.activations import ACTIVATIONS, Activation
from renorm.choices.objectives import OBJECTIVES
from renorm.choices.optimizers import OPTIMIZERS, Optimizer

PAGE = Path(__file__).parent / "choices.md"


def written(page: str) -> str:
    """The page with its tables as they should be, each between its two marks."""
    for name, lines in (("objectives", objectives()), ("activations", activations()), ("optimizers", optimizers())):
        begin, end = f"<!-- {name} begin -->\n", f"<!-- {name} end -->"
        before, after = page[: page.index(begin) + len(begin)], page[page.index(end) :]
        page = before + "\n" + "\n".join(lines) + "\n\n" + after
    return page


def objectives() -> list[str]:
    """A row for each loss that a comparison trains with."""
    rows = ["| task | name | of one sample |", "|---|---|---|"]
    for task, losses in OBJECTIVES.items():
        rows += [f"| {task} | `{name}` | {_formula(loss.formula)} |" for name, loss in losses.items()]
    return rows


def activations() -> list[str]:
    """A row for each activation."""
    rows = ["| name | f(x) | f'(x) | range | saturates | gain |", "|---|---|---|---|---|---|"]
    for entry in ACTIVATIONS.values():
        cells = [f"`{entry.name}`", _formula(entry.formula), _formula(entry.derivative)]
        cells += [" to ".join(map(_number, entry.range)), _saturates(entry), f"{entry.gain:.4g}, {_source(entry)}"]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def optimizers() -> list[str]:
    """A section for each optimizer: the method, torch's where it differs, and the difference in words."""
    lines: list[str] = []
    for entry in OPTIMIZERS.values():
        lines += [f"### `{entry.name}`", "", f"{entry.source}.", "", f"$${entry.formula}$$", ""]
        if entry.torch != entry.formula:
            lines += ["torch.optim computes", "", f"$${entry.torch}$$", ""]
        lines += [f"Difference: {entry.difference}.{_settings(entry)}", ""]
    return lines[:-1]


def _formula(latex: str) -> str:
    bars = latex.replace("|", r"\vert ")  # a bar would end the cell
    return f"${bars}$"


def _number(value: float) -> str:
    return f"{value:.6g}".replace("inf", "∞")


def _saturates(entry: Activation) -> str:
    low, high = entry.saturates
    if low > high:
        return "everywhere"
    parts = [f"below {_number(low)}"] * (low > -math.inf) + [f"above {_number(high)}"] * (high < math.inf)
    return ", ".join(parts) or "nowhere"


def _source(entry: Activation) -> str:
    if entry.gain_source.startswith("torch"):
        return "torch's"
    return "second moment" if entry.gain_source.startswith("1 /") else "as linear"


def _settings(entry: Optimizer) -> str:
    given = getattr(entry.make, "keywords", {})
    return f" Built with {', '.join(f'`{key}={value}`' for key, value in given.items())}." if given else ""


def main(arguments: list[str]) -> int:
    """Write the tables, or compare them with what is there; the exit code says whether they agree."""
    page = PAGE.read_text(encoding="utf-8")
    if arguments == ["--check"]:
        print(
            f"{PAGE.name}: {'up to date' if written(page) == page else 'out of date, run python docs/make_tables.py'}"
        )
        return int(written(page) != page)
    PAGE.write_text(written(page), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
