"""A model of the user's own, and how each norm is put into it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from renorm.choices.reversible import Reversible, parted
from renorm.comparison.fingerprint import fingerprint
from renorm.comparison.panel import Windows
from renorm.comparison.reference import Reference
from renorm.comparison.spec import TrialSpec
from renorm.comparison.trial import build_model
from renorm.errors import StudyError, SwapError
from renorm.surgery.find import norms
from renorm.surgery.swap import SwapReport, swap

if TYPE_CHECKING:
    from renorm.comparison.data import Splits

__all__ = ["Builder", "Given", "GivenModel"]

GivenModel = nn.Module | Callable[[], nn.Module]


@dataclass(frozen=True)
class Given:
    """A module, or a function that builds one; called with a spec it gives a copy that has the spec's norm.

    A builder is called under the trial's seed, so each seed has its own initial weights. A module brings its
    own: then the seeds differ in the order of the samples, and in dropout, only.
    """

    model: GivenModel  # it is never changed
    replace: str = "any"  # which of its norms give way: the left side of a rule of renorm.swap

    def __post_init__(self) -> None:
        if not callable(self.model):
            raise StudyError(
                "a model must be a torch.nn.Module, a function that builds one, or a name; "
                f"got {type(self.model).__name__}"
            )

    @property
    def name(self) -> str:
        """The class's or the builder's name."""
        thing = type(self.model) if isinstance(self.model, nn.Module) else self.model
        return str(getattr(thing, "__name__", type(thing).__name__)).strip("<>")

    def identify(self) -> str:
        """What a spec calls this model: "python:<fingerprint>" or "module:function@<fingerprint>".

        Another choice of the norms that give way is another model.
        """
        rule = "" if self.replace == "any" else f" {self.replace}"
        if isinstance(self.model, Reference):
            return f"{self.model.text}@{fingerprint(self.model, self.model.resolve())}{rule}"
        return f"python:{fingerprint(self.model)}{rule}"

    def notes(self, names: Iterable[str]) -> tuple[str, ...]:
        """What a reader should know of the results: whose the initial weights are, and what was replaced."""
        reports = {norm: report for norm in names if (report := self._report(parted(norm)[1])) is not None}
        weights = (
            "every trial starts from the given model's own weights: the seeds differ in the order of the "
            "samples (and dropout) only"
            if isinstance(self.model, nn.Module)
            else "every seed has initial weights of its own, the same for all norms"
        )
        return (weights, *_replaced(reports), *_remarks(reports))

    def __call__(self, spec: TrialSpec, splits: Splits | Windows) -> nn.Module:
        """A new model whose norms are the spec's; a forecaster between RevIN's halves where it names that."""
        if not isinstance(splits, Windows):
            return self._swap(spec.norm)[0]
        reversible, norm = parted(spec.norm)
        model = self._swap(norm)[0]
        return Reversible(model, splits.input_shape[0] - splits.num_static) if reversible else model

    def _swap(self, norm: str) -> tuple[nn.Module, SwapReport]:
        model = self.model if isinstance(self.model, nn.Module) else self.model()
        if not any(norms(model)):
            raise SwapError(
                f"{self.name} must have norms, which give way to those that are compared; it has none: put one in, "
                "such as torch.nn.BatchNorm1d, wherever a norm may stand"
            )
        return swap(model, f"{self.replace} -> {norm}")

    def _report(self, norm: str) -> SwapReport | None:
        try:
            return self._swap(norm)[1]
        except SwapError:
            return None  # its trials say why


@dataclass(frozen=True)
class Builder:
    """Builds the model that a spec names: a built-in one, or one of the user's own."""

    given: Mapping[str, Given]  # by what specs call it

    def __call__(self, spec: TrialSpec, splits: Splits | Windows) -> nn.Module:
        """A new model."""
        given = self.given.get(spec.model)
        return build_model(spec, splits) if given is None else given(spec, splits)

    def notes(self, norms: Sequence[str]) -> tuple[str, ...]:
        """What a reader should know of the user's models; of several with their names."""
        return tuple(
            f"{given.name}: {note}" if len(self.given) > 1 else note
            for given in self.given.values()
            for note in given.notes(norms)
        )


def _replaced(reports: dict[str, SwapReport]) -> tuple[str, ...]:
    if not reports:
        return ()
    report = next(iter(reports.values()))
    left = "; ".join(str(change) for change in report.left)
    return (f"{len(report.changes)} norms of the model give way to each norm" + (f"; {left}" if left else ""),)


def _remarks(reports: dict[str, SwapReport]) -> tuple[str, ...]:
    """What swap remarks on single replacements, the same remark once with how many it stands for."""
    places: dict[tuple[str, str], list[str]] = defaultdict(list)
    for norm, report in reports.items():
        for change in report.changes:
            if change.note:
                places[norm, change.note].append(change.name)
    return tuple(
        f"{norm} at {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {note}"
        for (norm, note), names in places.items()
    )
