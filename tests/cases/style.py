"""Cases of a family of norms."""

from checks import Case

CASES: list[Case] = []
