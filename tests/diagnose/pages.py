"""The documentation of the rules, from the catalogue: an index and a page for each rule.

    python tests/diagnose/pages.py

writes docs/diagnose/rules/; `test_rules.py` fails where a page is not what this gives.
"""

from pathlib import Path

from renorm.diagnose import RULES

FOLDER = Path(__file__).parents[2] / "docs" / "diagnose" / "rules"


def page(rule):
    """One rule."""
    lines = [
        f"# {rule.id}: {rule.title}",
        "",
        f"`{rule.slug}` · {rule.severity} · found by `{rule.when}`",
        "",
        f"**Why it matters.** {rule.why}",
        "",
        f"**What to do.** {rule.fix}",
        "",
        f"**Source.** {rule.source}.",
    ]
    for title, code in (("With the fault", rule.bad), ("Without", rule.good)):
        if code:
            lines += ["", f"## {title}", "", "```python", code.strip(), "```"]
    return "\n".join(lines) + "\n"


def pages():
    """File names and texts."""
    index = [
        "# Rules",
        "",
        "What `check` and `watch` look for. An *error* was confirmed with numbers on the batch, a *warning* of `watch`",
        "was seen in two samples running. The severity is the usual one: some rules are milder or more severe by what",
        "was measured. `ignore=` takes an id or a name.",
        "",
        "| | rule | severity | found by |",
        "|---|---|---|---|",
    ]
    index += [
        f"| [{rule.id}]({rule.id}.md) | {rule.title} (`{rule.slug}`) | {rule.severity} | `{rule.when}` |"
        for rule in sorted(RULES.values(), key=lambda rule: rule.id)
    ]
    return {"index.md": "\n".join(index) + "\n", **{f"{rule.id}.md": page(rule) for rule in RULES.values()}}


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
