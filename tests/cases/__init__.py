"""The cases that `test_zoo.py` puts through every check: a file for each family of norms, each with a list `CASES`."""

from cases import plain

ALL = [*plain.CASES]
