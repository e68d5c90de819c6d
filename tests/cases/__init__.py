"""The cases that `test_zoo.py` puts through every check: a file for each family of norms, each with a list `CASES`."""

from cases import batch, features, inplace, plain, style, whiten

ALL = [*plain.CASES, *batch.CASES, *whiten.CASES, *style.CASES, *features.CASES, *inplace.CASES]
