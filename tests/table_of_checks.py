"""The table in docs/zoo/checks.md: which norm goes through which check of `checks.py`.

    python tests/table_of_checks.py

writes it; `test_zoo.py` runs every pair that is in it, and fails where the page is not what this gives.
"""

from pathlib import Path

import cases
import checks

PAGE = Path(__file__).parent.parent / "docs" / "zoo" / "checks.md"


def applies(case, name):
    """Whether this check is run on this case."""
    return name not in case.exempt and (case.twin is not None or name != "torch_twin")


def table():
    """The page."""
    lines = [
        "# What every norm is held to",
        "",
        "Each norm of the zoo goes through the same checks, twice: as it chooses its kernels, and with the native ones",
        "wherever they can run. The references are float64 formulas written from the papers.",
        "",
        "| check | every norm |",
        "|---|---|",
    ]
    lines += [f"| `{name}` | {check.__doc__.splitlines()[0]} |" for name, check in checks.CHECKS.items()]
    lines += [
        "",
        "Where a check does not apply, the reason stands beside it.",
        "",
        "| norm | input | checks passed | does not apply |",
        "|---|---|---|---|",
    ]
    for case in cases.ALL:
        passed = sum(applies(case, name) for name in checks.CHECKS)
        without = [f"`{name}`: {reason}" for name, reason in case.exempt.items()]
        without += ["`torch_twin`: torch has no such layer"] * (case.twin is None)
        shape = "x".join(map(str, case.shape))
        lines.append(f"| {case.name} | {shape} | {passed} | {'; '.join(without)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(table(), encoding="utf-8")
