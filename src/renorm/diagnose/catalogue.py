"""The catalogue of rules: what each looks for, how bad it is, why, what to do about it, and who says so."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from renorm.errors import RuleError

__all__ = ["RULES", "Found", "Mend", "Mended", "Rule", "Severity", "rule"]

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")  # the worst first


@dataclass(frozen=True)
class Mended:
    """What a mechanical fix made of a copy of the model and of its optimizer."""

    model: nn.Module
    optimizer: Optimizer | None
    said: str  # what it did, in a few words


Mend = Callable[[nn.Module, Optimizer | None], Mended]


@dataclass(frozen=True)
class Found:
    """What a rule saw here; the catalogue entry adds the rest."""

    message: str  # what is wrong here, with the numbers seen
    module: str = ""  # as in named_modules(); "" where no module is to blame
    fix: str = ""  # code for this model; "" for the entry's
    severity: Severity | None = None  # None for the entry's
    mend: Mend | None = None  # where the fix is mechanical
    key: str | None = None  # what `watch` tells once, the layers it names may change; None for the module


@dataclass(frozen=True)
class Rule:
    """One entry of the catalogue."""

    id: str  # "C01"; ids stay
    slug: str  # "softmax-before-cross-entropy"
    severity: Severity  # of what it finds, unless a finding says otherwise
    title: str  # what is wrong, in one line
    why: str  # what it does to training
    fix: str  # what to do, in general
    source: str  # where condition and threshold come from
    find: Callable[[Any], Iterable[Found]]  # of the evidence: of one batch (check), or of the steps so far (watch)
    when: Literal["check", "watch"]
    bad: str = ""  # a program with the fault: it defines model, loss and batch, and what else `check` shall be given
    good: str = ""  # the same without it
    opt_in: bool = False  # left out unless `include` names it


RULES: dict[str, Rule] = {}


def rule(
    id: str,
    slug: str,
    severity: Severity,
    *,
    title: str,
    why: str,
    fix: str,
    source: str,
    when: Literal["check", "watch"] = "check",
    bad: str = "",
    good: str = "",
    opt_in: bool = False,
) -> Callable[[Callable[[Any], Iterable[Found]]], Callable[[Any], Iterable[Found]]]:
    """Put the decorated function into the catalogue: it takes the evidence and yields what it found.

    A rule of your own, in five lines:

    >>> @rule("X01", "too-few-samples", "warning", title="Fewer than 4 samples a batch", why="Noisy gradients.",
    ...       fix="Use larger batches.", source="house rule")
    ... def too_few_samples(evidence):
    ...     if evidence.batch_size < 4:
    ...         yield Found(f"the batch has {evidence.batch_size} samples")
    >>> del RULES["X01"]

    Raises RuleError where id or slug is taken or the severity is none.
    """
    if severity not in SEVERITIES:
        raise RuleError(f"a severity is one of {', '.join(SEVERITIES)}; got {severity!r}")
    for other in RULES.values():
        if id == other.id or slug == other.slug:
            raise RuleError(
                f"rule {id} ({slug}) is registered already, as {other.id} ({other.slug}): choose other names"
            )

    def register(find: Callable[[Any], Iterable[Found]]) -> Callable[[Any], Iterable[Found]]:
        RULES[id] = Rule(id, slug, severity, title, why, fix, source, find, when, bad, good, opt_in)
        return find

    return register
