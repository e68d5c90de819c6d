"""The pictures of what each norm of a study averages over, one for each pattern."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from renorm.choices.reversible import parted
from renorm.comparison.forecast import BASELINES
from renorm.drawing import draw
from renorm.errors import PatternError
from renorm.norms.named import parse, pattern_of
from renorm.pattern import parse as parse_pattern

__all__ = ["Area", "areas_of"]

_MIXED = ("instance", "layer", "batch")  # the norms whose areas switchable norm mixes, where they have one
_REVIN = "n c [t]"
_SMALL = {"n": 4, "g": 3, "k": 2, "b": 2, "t": 5}


@dataclass(frozen=True)
class Area:
    """One pattern, its picture, and the norms of a study that use it."""

    pattern: str  # in renorm's notation
    norms: tuple[str, ...]  # those whose only pattern it is
    mixed_by: tuple[str, ...]  # those that mix it with others: switchable norm
    svg: str  # empty for a pattern of more axes than a picture has


def areas_of(norms: Sequence[str], models: Sequence[str]) -> tuple[Area, ...]:
    """A picture for each pattern that the norms have in built-in models; other models are taken to be for images.

    >>> [(area.pattern, area.norms, area.mixed_by) for area in areas_of(["none", "batch", "switch"], ["mlp"])]
    [('[n] c', ('batch',), ('switch',)), ('n [c]', (), ('switch',))]
    """
    users: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    drawn: dict[str, str] = {}
    for norm, model in itertools.product(norms, models):
        if norm in BASELINES:
            continue
        inside = _patterns(norm, model)
        around = (_REVIN,) if parted(norm)[0] else ()
        for pattern in (*around, *inside):
            mixes = len(inside) > 1 and pattern not in around
            users.setdefault(pattern, ({}, {}))[mixes][norm] = None
            drawn[pattern] = drawn.get(pattern) or _picture(pattern, model)
    return tuple(Area(pattern, tuple(alone), tuple(mixed), drawn[pattern]) for pattern, (alone, mixed) in users.items())


def _patterns(norm: str, model: str) -> tuple[str, ...]:
    name = parse(parted(norm)[1])
    names = [parse(kind) for kind in _MIXED] if name.kind == "switch" else [name]
    found = [_on_model(pattern_of(name, _axis(model)), model) for name in names]
    return tuple(pattern for pattern in found if "[" in pattern)  # no norm has none, instance norm none on vectors


def _axis(model: str) -> int:
    return -1 if model in ("lstm", "transformer") else 1


def _on_model(pattern: str, model: str) -> str:
    """The pattern as it stands on the model's activations: an MLP's have no axes but samples and channels."""
    if model != "mlp":
        return pattern
    return pattern.replace(" [...]", "").replace(" ...", "")


def _picture(pattern: str, model: str) -> str:
    names = parse_pattern(pattern).names
    sizes = {"c": 2 if "g" in names else 6, **_SMALL}
    sizes = {name: size for name, size in sizes.items() if name in names}
    if "..." in pattern and model != "mlp":
        sizes |= {"n": 4, "t": 5} if model in ("lstm", "tcn", "transformer") else {"h": 4, "w": 4}
    try:
        return draw(pattern, **sizes).svg
    except PatternError:  # more than five axes: the pattern's text has to do
        return ""
