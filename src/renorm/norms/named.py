"""Norms by name: what ``"batch"``, ``"group(32)"`` or a pattern with sizes stands for in swap and in a study."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from renorm.errors import PatternError, UnknownNormError
from renorm.norms import zoo
from renorm.norms.norm import Norm
from renorm.pattern import parse as parse_pattern

__all__ = ["KINDS", "NormName", "build", "divisor", "parse", "pattern_of"]

KINDS = ("none", "batch", "layer", "instance", "group", "rms", "switch")

# Statistics by kind, channels second and channels last. Layer and RMS norm of an image are over (C, H, W) of one
# sample; of a sequence, whose channels are last, over the channels of one token.
_PATTERNS = {
    1: {
        "batch": "[n] c [...]",
        "layer": "n [c ...]",
        "instance": "n c [...]",
        "group": "n (g [c]) [...]",
        "rms": "n [c ...]",
        "switch": "n c [...]",
    },
    -1: {
        "batch": "[...] c",
        "layer": "... [c]",
        "instance": "n [...] c",
        "group": "... (g [c])",
        "rms": "... [c]",
        "switch": "n [...] c",
    },
}
_CALL = re.compile(r"([a-z]+)\s*(?:\(\s*(\d+)\s*\))?\Z")
_SIZE = re.compile(r"([A-Za-z_]\w*)\s*=\s*(\d+)")


@dataclass(frozen=True)
class NormName:
    """A norm in words, read."""

    kind: str  # one of KINDS, or "pattern"
    groups: int = 32  # asked for; see `divisor` for what becomes of it
    pattern: str = ""  # of the kind "pattern"
    sizes: tuple[tuple[str, int], ...] = ()  # of the kind "pattern"

    def __str__(self) -> str:
        if self.kind == "pattern":
            return " ".join([self.pattern, *(f"{name}={size}" for name, size in self.sizes)])
        return f"group({self.groups})" if self.kind == "group" else self.kind


def parse(text: str) -> NormName:
    """Read a norm's name: a kind, ``group(G)``, or a pattern followed by sizes.

    Raises UnknownNormError, or PatternError for a pattern that cannot be read.

    >>> parse("group")
    NormName(kind='group', groups=32, pattern='', sizes=())
    >>> str(parse("n (g [c]) [...] g=8"))
    'n (g [c]) [...] g=8'
    """
    text = text.strip()
    if "[" in text or "]" in text:
        pattern = _SIZE.sub("", text).strip()
        sizes = tuple((name, int(size)) for name, size in _SIZE.findall(text))
        parse_pattern(pattern).check_sizes(
            {**dict(sizes), "c": 1} if "c" in parse_pattern(pattern).names else dict(sizes)
        )
        return NormName("pattern", pattern=pattern, sizes=sizes)
    match = _CALL.match(text.lower())
    kind, argument = match.groups() if match else (text.lower(), None)
    if kind not in KINDS:
        close = difflib.get_close_matches(kind, KINDS, 1, 0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UnknownNormError(
            f"a norm is one of {', '.join(KINDS)}, group(G), or a pattern such as 'n (g [c]) [...] g=8'; "
            f"got {text!r}{hint}"
        )
    if argument is None:
        return NormName(kind)
    if kind != "group" or int(argument) < 1:
        raise UnknownNormError(f"only group takes a number, of groups, from 1 on; got {text!r}")
    return NormName(kind, groups=int(argument))


def divisor(channels: int, groups: int) -> int:
    """The largest number of groups up to `groups` that divides `channels`.

    >>> divisor(48, 32)
    24
    """
    return max(g for g in range(1, min(groups, channels) + 1) if channels % g == 0)


def pattern_of(name: NormName, axis: int = 1) -> str:
    """The pattern of a named norm with channels on `axis`, ``""`` for none."""
    return name.pattern or _PATTERNS[axis].get(name.kind, "")


def build(
    name: str | NormName,
    num_features: int,
    *,
    axis: int = 1,
    positions: bool = True,
    affine: bool = True,
    bias: bool = True,
    eps: float | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Make the norm of this name for `num_features` channels on `axis` (1 or -1); no random numbers are drawn.

    `positions` is False where the input has channels only, (N, C): switchable norm then mixes layer and batch. Norms
    with a bias of their own have one only if `bias`; eps None is the norm's default.

    >>> build("group(32)", 48)
    GroupNorm(24, 48, eps=1e-05, affine=True, bias=True, pattern='n (g [c]) [...]')
    """
    name = parse(name) if isinstance(name, str) else name
    if name.kind == "none":
        return nn.Identity()
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    if eps is not None:
        options["eps"] = eps
    if name.kind == "pattern":
        return _build_pattern(name, num_features, affine, bias, options)
    if name.kind == "batch":
        return zoo.BatchNorm(num_features, axis=axis, affine=affine, bias=bias, **options)
    if name.kind == "switch":
        partitions = ("instance", "layer", "batch") if positions else ("layer", "batch")
        return zoo.SwitchNorm(num_features, axis=axis, affine=affine, partitions=partitions, **options)
    if name.kind in ("group", "layer") and axis == 1:
        groups = divisor(num_features, name.groups) if name.kind == "group" else 1
        return zoo.GroupNorm(groups, num_features, affine=affine, bias=bias, **options)
    if name.kind == "layer":
        return zoo.LayerNorm(num_features, elementwise_affine=affine, bias=bias, **options)
    if name.kind == "rms" and axis == -1:
        return zoo.RMSNorm(num_features, elementwise_affine=affine, **options)
    return _build_general(name, num_features, axis, affine, bias, options)


def _build_general(
    name: NormName, num_features: int, axis: int, affine: bool, bias: bool, options: dict[str, Any]
) -> Norm:
    """The kinds that have no class of their own for any rank: instance, RMS on images, group on tokens."""
    sizes: dict[str, Any] = {"c": num_features}
    if name.kind == "group":
        groups = divisor(num_features, name.groups)
        sizes = {"g": groups, "c": num_features // groups}
    return Norm(
        _PATTERNS[axis][name.kind],
        weight="auto" if affine else None,
        bias=bias and name.kind != "rms",
        center=name.kind != "rms",
        one_value="raise" if name.kind == "instance" else "allow",
        **options,
        **sizes,
    )


def _build_pattern(name: NormName, num_features: int, affine: bool, bias: bool, options: dict[str, Any]) -> Norm:
    sizes: dict[str, Any] = dict(name.sizes)
    pattern = parse_pattern(name.pattern)
    beside = pattern.beside("c")
    known = math.prod(sizes.get(axis, 1) for axis in beside)
    if "c" in beside and "c" not in sizes:
        if num_features % known:
            raise PatternError(f"{num_features} channels cannot be split by {name}", name.pattern, 0, len(name.pattern))
        sizes["c"] = num_features // known
    return Norm(name.pattern, weight="auto" if affine else None, bias=bias, **options, **sizes)
