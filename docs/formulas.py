"""A MkDocs hook: formulas become MathML while the site is built, so that pages need no script and no network."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(?P<tag>div|span) class="arithmatex">\\[\[(](?P<latex>.*?)\\[\])]</(?P=tag)>', re.DOTALL)


def on_page_content(html: str, **_: Any) -> str:
    """Replace what the arithmatex extension has marked."""
    return _FORMULA.sub(_mathml, html)


def _mathml(match: re.Match[str]) -> str:
    display = "block" if match["tag"] == "div" else "inline"
    return str(convert(unescape(match["latex"]).strip(), display=display))
