"""The documentation says what is there: pictures, names, commands and settings. Its examples run as doctests."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

import renorm as rn
from renorm.choices import activations, models, optimizers
from renorm.norms import named

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_what_draw_draws() -> None:
    assert text("docs/pictures/norms.svg") == script("make_pictures").strip(), "run python docs/make_pictures.py"


def test_the_tables_of_choices_are_the_registries() -> None:
    page = text("docs/choices.md")
    assert page == script("make_tables").written(page), "run python docs/make_tables.py"
    for name in (*activations.ACTIVATIONS, *optimizers.OPTIMIZERS):
        assert f"`{name}`" in page


@pytest.mark.parametrize("name", [name for name in rn.__all__ if name not in ("diagnose", "errors", "kernels")])
def test_every_public_name_is_in_the_api(name: str) -> None:
    assert re.search(rf"^::: renorm\.(\w+\.)*{name}$", text("docs/api.md"), re.MULTILINE)


def test_ci_runs_the_second_command_of_the_readme() -> None:
    command = next(line for line in text("README.md").splitlines() if line.endswith("&& pytest"))
    assert f"    {command}\n" in text(".ci/run")


def test_the_choices_of_a_study_are_all_named() -> None:
    page = text("docs/compare.md")
    for name in (*named.KINDS, *activations.NAMES, *optimizers.NAMES, *models.NAMES):
        assert re.search(rf"[`,]{re.escape(name)}[`,]", page), f"docs/compare.md does not name {name!r}"


def test_links_between_pages_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_page_is_in_the_navigation() -> None:
    shown = re.findall(r"^  - .*: (\S+\.md)$", text("mkdocs.yml"), re.MULTILINE)
    assert sorted(shown) == sorted(page.name for page in DOCS.glob("*.md"))
