"""What is under way for one optimizer that is watched: its sampled step, from numbers on the device to the history."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.optim import Optimizer

from renorm.diagnose.fit import Comparison, fetched
from renorm.diagnose.history import FIRST, History, Layer, Sample
from renorm.diagnose.layers import Seen
from renorm.diagnose.readings import entries_of, fetch, local_of, norms_of, rows_of, steps_over

__all__ = ["Draft", "Track"]

Key = tuple[str, str]  # what a number is, and of which parameter


@dataclass
class Draft:
    """A sample whose numbers are not fetched yet."""

    step: int
    numbers: dict[Key, Tensor | float]
    layers: dict[str, tuple[str, dict[str, Tensor | float]]]
    sample: dict[str, Any]  # what is known of it already
    comparison: Comparison | None = None

    def tensors(self) -> Iterator[Tensor]:
        """What is to be fetched, in the order in which `Track.settle` takes its values."""
        yield from (value for value in self.numbers.values() if isinstance(value, Tensor))
        yield from (v for _, made in self.layers.values() for v in made.values() if isinstance(v, Tensor))
        if self.comparison is not None:
            yield self.comparison[1]


class Track:
    """One optimizer: what was seen of its steps, and what is not in the history yet."""

    def __init__(self, optimizer: Optimizer, history: History, label: str) -> None:
        self.optimizer, self.history, self.label = optimizer, history, label
        self.owned: list[tuple[str, Tensor]] = []  # parameters, while a sampled step is under way
        self.before: list[Tensor] | None = None  # copies of them, or of rows of large ones
        self.numbers: dict[Key, Tensor | float] = {}
        self.waiting: Draft | None = None  # for its loss
        self.losses: list[tuple[int, Tensor | float]] = []  # not fetched yet
        self.unasked = 0  # losses since the rules were asked
        self.looks = 0
        self.stepped = 0  # when it stepped last, in steps of all
        self.listener: Any = None  # the hook that sees gradients before a backward pass adds to them
        self.found: list[Tensor | None] = []  # what it saw
        self.counts: tuple[int, Tensor] | None = None  # step, and what a batch norm counted, without validation since
        self.each: Tensor | None = None  # batches that it counts in a step

    @property
    def params(self) -> list[Tensor]:
        """What the optimizer has."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    # ---- a step that is sampled

    def begin(self, names: dict[Tensor, str], *, gradients: bool) -> None:
        """Look at the parameters before the step, and at their gradients where they are there."""
        self.owned = [(names[p], p) for p in self.params if p in names and not nn.parameter.is_lazy(p)]
        self.numbers = _keyed("weight", self.owned, norms_of(local_of(p) for _, p in self.owned))
        if gradients:
            self.weigh_gradients()
        rows = [rows_of(p) for _, p in self.owned]
        if self._partly:
            self.numbers |= _keyed("rows", self.owned, norms_of(rows))
        self.before = [row.clone(memory_format=torch.preserve_format) for row in rows]

    @property
    def _partly(self) -> list[str]:
        """The parameters of which only rows are copied."""
        return [name for name, p in self.owned if steps_over(local_of(p)) > 1]

    def weigh_gradients(self) -> None:
        """Their norms."""
        scale = getattr(self.optimizer, "grad_scale", None)  # a fused optimizer under a scaler divides by it itself
        learning = [(name, p.grad) for name, p in self.owned if p.grad is not None]
        norms = norms_of(entries_of(local_of(grad)) for _, grad in learning)
        if isinstance(scale, Tensor):
            norms = [norm / scale for norm in norms]
        self.numbers |= _keyed("gradient", learning, norms)

    def end(self, seen: Seen, names: dict[Tensor, str], modes: dict[str, bool], *, gradients: bool) -> None:
        """Look at what the step changed; the sample waits for its loss. `gradients`: they came with the step."""
        before, self.before = self.before or [], None
        if gradients:
            self.weigh_gradients()
        changes = torch._foreach_sub([rows_of(p) for _, p in self.owned], before) if before else []
        self.numbers |= _keyed("update", self.owned, norms_of(changes))
        short = [(name, change) for (name, _), change in zip(self.owned, changes, strict=True) if change.itemsize == 2]
        self.numbers |= {("moved", name): change.count_nonzero() / change.numel() for name, change in short}
        found = [0.0 if norm is None else norm for norm in self.found]
        self.numbers |= {("left", str(i)): norm for i, norm in enumerate(found)}
        self.numbers |= {("input", str(i)): most for i, most in enumerate(seen.inputs)}
        missed = getattr(self.optimizer, "found_inf", None)
        if isinstance(missed, Tensor):
            self.numbers["skipped", ""] = missed
        # A rate may be a tensor on the device, which is not waited for here.
        self.numbers |= {
            ("rate", names[p]): rate.detach() if isinstance(rate, Tensor) else float(rate)
            for group in self.optimizer.param_groups
            if (rate := group.get("lr")) is not None
            for p in group["params"]
            if p in names
        }
        facts = {"outputs": tuple(dict.fromkeys(seen.shapes)), "modes": modes, "partly": frozenset(self._partly)}
        self.waiting = Draft(self.history.step, self.numbers, seen.layers, facts)

    def listen(self) -> None:
        """See what the next backward passes find in the place of a gradient."""
        chosen = next((p for p in reversed(self.params) if p.requires_grad and p.grad is not None), None)
        if chosen is None:
            return

        def arrives(_: Tensor) -> None:
            grad = chosen.grad
            with torch.no_grad():
                self.found.append(None if grad is None else norms_of([entries_of(local_of(grad))])[0])

        self.listener = chosen.register_hook(arrives)  # type: ignore[no-untyped-call]

    def stop_listening(self) -> None:
        """Look at no more backward passes, and forget what was seen of the last ones."""
        if self.listener is not None:
            self.listener.remove()
            self.listener = None
        self.found = []

    def drop(self) -> None:
        """Forget what is under way."""
        self.before, self.waiting = None, None
        self.losses.clear()

    def count_batches(self, norms: Iterable[BatchNorm], *, validation: bool = False) -> None:
        """How many batches a batch norm took in besides those of the steps, at a validation."""
        counters = (m.num_batches_tracked for m in norms if m.training)
        counter = next((count for count in counters if count is not None), None)
        step, before = self.history.step, self.counts
        if counter is None:
            self.counts = None
            return
        if validation and before is not None and self.each is not None:
            more = counter - before[1] - self.each * (step - before[0])
            self.history.events.setdefault("counted", []).append(fetch([more.float()])[0][0])
        elif not validation and before is not None and step > before[0]:
            self.each = (counter - before[1]) / (step - before[0])
        self.counts = step, counter.clone()

    # ---- into the history

    def pending(self) -> Iterator[Tensor]:
        """What is to be fetched, in the order in which `settle` takes its values."""
        if self.waiting is not None:
            yield from self.waiting.tensors()
        yield from (value for _, value in self.losses if isinstance(value, Tensor))

    def settle(self, values: Iterator[list[float]]) -> tuple[Sample | None, bool]:
        """Put what waits into the history: the sample, and whether one of the losses is not finite."""
        history, draft, self.waiting = self.history, self.waiting, None

        def floats(made: dict[Any, Tensor | float]) -> dict[Any, float]:
            return {key: next(values)[0] if isinstance(v, Tensor) else v for key, v in made.items()}

        if draft is not None:
            numbers = floats(draft.numbers)
            layers = {name: Layer(kind, floats(made)) for name, (kind, made) in draft.layers.items()}
            if draft.comparison is not None:
                history.keep(fetched(draft.comparison[0], next(values), draft.step, validation=False))
        losses = [(step, next(values)[0] if isinstance(value, Tensor) else value) for step, value in self.losses]
        self.losses.clear()
        history.losses.extend(losses)
        history.start += [loss for _, loss in losses[: FIRST - len(history.start)]]
        lost = any(not math.isfinite(loss) for _, loss in losses)
        if draft is None:
            return None, lost
        sample = _sample(draft, numbers, layers, history)
        history.samples.append(sample)
        if history.first is None and sample.gradients:
            history.first = sample
        return sample, lost


def _sample(draft: Draft, numbers: dict[Key, float], layers: dict[str, Layer], history: History) -> Sample:
    def of(what: str) -> dict[str, float]:
        return {name: value for (key, name), value in numbers.items() if key == what}

    weights, updates, rows = of("weight"), of("update"), of("rows")
    for name in draft.sample["partly"]:  # what changed, as a share of the rows that were copied, holds for all
        updates[name] = updates[name] / rows[name] * weights[name] if rows.get(name) else 0.0
    step, loss = history.losses[-1] if history.losses else (-1, None)
    left, inputs = of("left").values(), list(of("input").values())
    return Sample(
        draft.step,
        loss if step == draft.step else None,
        of("gradient"),
        weights,
        updates,
        layers,
        of("rate"),
        inputs=(math.nan if any(map(math.isnan, inputs)) else max(inputs)) if inputs else None,
        moved=of("moved"),
        left=min(left) if left else None,
        skipped=any(of("skipped").values()),
        **draft.sample,
    )


def _keyed(what: str, owned: list[tuple[str, Tensor]], norms: list[Tensor]) -> dict[Key, Tensor | float]:
    return {(what, name): norm for (name, _), norm in zip(owned, norms, strict=True)}
