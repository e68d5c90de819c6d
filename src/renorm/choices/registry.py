"""A choice by its name: the entry of a table, or an error that names what there is."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

from renorm.errors import StudyError

__all__ = ["look_up"]

Entry = TypeVar("Entry")


def look_up(table: Mapping[str, Entry], name: str, kind: str) -> Entry:
    """The entry called `name`; `kind` is what the error message calls it.

    Raises:
        StudyError: there is no such name; the message suggests the closest one.

    >>> look_up({"relu": 1, "gelu": 2}, "Relu", "activation")
    1
    """
    key = str(name).strip().lower()
    if key in table:
        return table[key]
    close = difflib.get_close_matches(key, table, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise StudyError(f"{kind} must be one of {', '.join(table)}; got {name!r}{hint}")
