"""A real browser for the report: Debian's chromium, driven by Playwright."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # the made-up studies

from made_up import Study, typical

from renorm.comparison import report

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
    "--disable-sync",
)


@dataclass
class Opened:
    """A report in a page, with everything that went wrong on the way."""

    page: Any
    problems: list[str] = field(default_factory=list)  # console errors and warnings, page errors
    requests: list[str] = field(default_factory=list)  # every address that was asked for

    def evaluate(self, script: str, argument: Any = None) -> Any:
        """The value of a JavaScript expression in the page."""
        return self.page.evaluate(script, argument)

    def wait(self, condition: str) -> None:
        """Wait until a JavaScript expression is true; Playwright's own waiting uses eval, which the policy refuses."""
        self.evaluate(
            f"""() => new Promise((resolve, reject) => {{
                const look = () => {{
                    if ({condition}) resolve();
                    else if (performance.now() > end) reject(new Error("still false after 20 s"));
                    else requestAnimationFrame(look);
                }};
                const end = performance.now() + 20000;
                look();
            }})"""
        )


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("there is no chromium on this machine: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(FLAGS))
        yield browser
        browser.close()


def open_study(browser: Any, folder: Path, study: Study, **options: Any) -> Opened:
    """Write the report of a study, open it and wait until its charts are drawn."""
    path = report.write(*study, folder / "report.html")
    page = browser.new_page(**{"viewport": {"width": 1400, "height": 900}, **options})
    found = Opened(page)
    page.on("console", lambda message: found.problems.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: found.problems.append(f"error: {error}"))
    page.on("request", lambda request: found.requests.append(request.url))
    page.add_init_script(
        "addEventListener('securitypolicyviolation', (e) => console.error('refused', e.violatedDirective))"
    )
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]")
    return found


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Opened]]:
    """A function that opens the report of a study in a page of its own."""
    found: list[Opened] = []

    def open_one(study: Study, **options: Any) -> Opened:
        found.append(open_study(browser, tmp_path, study, **options))
        return found[-1]

    yield open_one
    for one in found:
        one.page.close()


@pytest.fixture(scope="session")
def typical_page(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """The typical study's report, shared by the tests that only look."""
    return open_study(browser, tmp_path_factory.mktemp("typical"), typical())
