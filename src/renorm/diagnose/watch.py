"""`watch`: look at every so many steps of a training loop that is not ours, and say what is wrong as it appears.

A step is one call of ``optimizer.step()``. Steps that are not sampled cost nothing but a counter: the forward hooks are
there only while a step is sampled. A sampled step computes all its numbers on the device and fetches them at once.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from renorm.diagnose import rules as _rules  # noqa: F401 (fills the catalogue)
from renorm.diagnose.catalogue import RULES
from renorm.diagnose.finding import Finding, Report, ordered
from renorm.diagnose.fit import compared, fetched
from renorm.diagnose.history import FIRST, Counts, History, Layer, Sample, Validation
from renorm.diagnose.layers import Layers, is_compiled, unwrapped
from renorm.diagnose.readings import entries_of, fetch, local_of, norms_of, rows_of, steps_over
from renorm.diagnose.writer import Writer, counts
from renorm.diagnose.writer import readings as written
from renorm.errors import DiagnosisError, RuleError

__all__ = ["Watch", "watch"]

PATIENCE = 8  # steps of other optimizers for which the hooks wait for one that is to be sampled
RECENT = 50  # training losses that a validation loss is compared with
NO_STEP = 50  # losses after which an optimizer should have stepped
OnError = Literal["print", "raise", "silent"]
Key = tuple[str, str]  # what a number is, and of which parameter


@dataclasses.dataclass
class _Draft:
    """A sample whose numbers are not fetched yet."""

    step: int
    numbers: dict[Key, Tensor | float]
    layers: dict[str, tuple[str, dict[str, Tensor | float]]]
    sample: dict[str, Any]  # what is known of it already
    comparison: tuple[str, Tensor] | None = None


class _Track:
    """What is under way for one optimizer."""

    def __init__(self, optimizer: Optimizer, history: History, label: str) -> None:
        self.optimizer, self.history, self.label = optimizer, history, label
        self.owned: list[tuple[str, Tensor]] = []  # parameters, while a sampled step is under way
        self.before: list[Tensor] | None = None  # copies of them, or of rows of large ones
        self.numbers: dict[Key, Tensor | float] = {}
        self.waiting: _Draft | None = None  # for its loss
        self.losses: list[tuple[int, Tensor | float]] = []  # not fetched yet
        self.unasked = 0  # losses since the rules were asked
        self.looks = 0
        self.stepped = 0  # when it stepped last, in steps of all
        self.listener: Any = None  # the hook that sees gradients before a backward pass adds to them
        self.found: list[Tensor | None] = []  # what it saw
        self.counts: tuple[int, Tensor] | None = None  # step, and what a batch norm counted, without validation since
        self.each: Tensor | None = None  # batches that it counts in a step

    @property
    def partly(self) -> list[str]:
        """The parameters of which only rows are copied."""
        return [name for name, p in self.owned if steps_over(local_of(p)) > 1]


class Watch:
    """A training run under observation; see `watch`."""

    def __init__(
        self,
        models: dict[str, nn.Module],
        optimizers: tuple[Optimizer, ...],
        loader: Iterable[Any] | None,
        every: int,
        dense: int,
        on_error: OnError,
        ignore: Collection[str],
        log: str | Path | None,
        writer: Any = None,
    ) -> None:
        self.every, self.dense, self.on_error = every, dense, on_error
        self.models = models
        inner = {label: unwrapped(model) for label, model in models.items()}
        self.model = inner[""] if "" in inner else nn.ModuleDict(inner)
        self._tracks = [
            _Track(
                optimizer,
                History(self.model, optimizer, optimizers, loader),
                f"optimizer {i}" if len(optimizers) > 1 else "",
            )
            for i, optimizer in enumerate(optimizers)
        ]
        self._rules = [r for r in RULES.values() if r.when == "watch" and not {r.id, r.slug} & set(ignore)]
        self._failures: list[str] = []
        self._found: dict[tuple[str, str, str], Finding] = {}  # by rule, module or other key, and optimizer
        self._suspected: dict[tuple[str, str, str], int] = {}  # warnings seen once, and in which look
        self._log = None if log is None else Path(log)
        self._writer = None if writer is None else Writer(writer)
        self._names: dict[Tensor, str] = {}
        self._handles: list[Any] = []
        self._layers = Layers(models, self._fail)
        self._off = False  # after a failure of our own
        self._total = 0  # steps of all optimizers
        self._last = self._tracks[0]  # whose optimizer stepped last
        self._locating = 0  # steps for which values that are not finite are searched
        self._told = 0  # losses
        self._start: list[Tensor] = []  # norms of the parameters
        self._norms: list[nn.modules.batchnorm._BatchNorm] = []

    # ---- what the user calls

    @property
    def history(self) -> History:
        """What was seen of the first optimizer's steps."""
        return self._tracks[0].history

    @property
    def report(self) -> Report:
        """What was found so far."""
        return Report(ordered(self._found.values()), tuple(self._failures), self.model)

    def step(self, loss: Tensor | float, outputs: Tensor | None = None, targets: Tensor | None = None) -> None:
        """Say what the loss of the step was, behind ``optimizer.step()``.

        With several optimizers it counts for the one that stepped last. `outputs` and `targets` are the model's and the
        batch's: with them, predictions are looked at, too.
        """
        track = self._last
        with self._safely():
            if "loss" not in track.history.events:
                track.history.events["loss"] = _made_by(loss)
            value = _number(loss)
            track.losses.append((max(0, track.history.step - 1), value))
            track.unasked += 1
            self._told += 1
            if self._told == NO_STEP and self._total == 0 and self._unmoved():
                track.history.events["unmoved"] = self._told
                track.unasked += self.every
            if track.waiting is not None and outputs is not None and targets is not None:
                track.waiting.comparison = compared(outputs, targets)
            lost = isinstance(value, float) and not math.isfinite(value) and "lost" not in track.history.events
            if lost or track.waiting is not None or track.unasked > self.every:
                self._look()

    def validate(self, loss: Tensor | float, outputs: Tensor | None = None, targets: Tensor | None = None) -> None:
        """Say what the loss on validation data is; `outputs` and `targets` as those of `step`, of all or of a part."""
        with self._safely():
            made = None if outputs is None or targets is None else compared(outputs, targets)
            value, *rest = fetch([torch.as_tensor(_number(loss)), *([made[1]] if made else [])])
            for track in self._settle():
                track.unasked += self.every + 1
            with_losses = [track for track in self._tracks if track.history.losses]
            track = with_losses[0] if with_losses else self._tracks[0]
            history = track.history
            recent = history.latest(RECENT) if len(with_losses) == 1 else []
            training = math.fsum(recent) / len(recent) if recent else math.nan
            history.validations.append(Validation(history.step, value[0], training))
            self._write({"renorm/validation loss": value[0]}, history.step)
            if made is not None:
                _keep(history, made[0], rest[0], history.step, validation=True)
            self._count(track, validation=True)
            track.unasked += 1  # the rules are asked with the next sample, which they confirm it by

    def gather(self) -> Report:
        """The findings of all processes of torch.distributed, each once; every process must call it."""
        found: list[Any] = [None]
        if _distributed():
            found = [None] * torch.distributed.get_world_size()
            mine = [(key, dataclasses.replace(finding, mend=None)) for key, finding in self._found.items()]
            torch.distributed.all_gather_object(found, (mine, self._failures))
        else:
            found = [(list(self._found.items()), self._failures)]
        merged: dict[tuple[str, str, str], Finding] = {}
        for theirs, _ in found:
            for key, finding in theirs:
                known = merged.get(key)
                count = finding.count + (0 if known is None else known.count)
                merged[key] = dataclasses.replace(known or finding, count=count)
        failures = dict.fromkeys(failure for _, theirs in found for failure in theirs)
        return Report(ordered(merged.values()), tuple(failures), self.model)

    def __enter__(self) -> Watch:
        if self._handles:
            raise RuleError("this watch is under way already: leave its `with` block first, or call renorm.watch again")
        for track in self._tracks:
            before = functools.partial(self._guarded, self._before_step, track)
            after = functools.partial(self._guarded, self._after_step, track)
            self._handles.append(track.optimizer.register_step_pre_hook(before))
            self._handles.append(track.optimizer.register_step_post_hook(after))
            track.stepped = self._total
        with self._safely():
            self._start = self._sizes()
            self._norms = [m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
            self._arm()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.close(quiet=error is not None)

    def close(self, *, quiet: bool = False) -> None:
        """Stop watching; the report stays. `quiet`: raise nothing, whatever `on_error` says."""
        self._layers.detach()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for track in self._tracks:
            track.before = None
            if track.listener is not None:
                track.listener.remove()
        with self._safely():
            self._located()
            self._look(last=True, quiet=quiet)

    def _sizes(self) -> list[Tensor]:
        return norms_of(local_of(p) for p in self._named() if not nn.parameter.is_lazy(p))

    def _unmoved(self) -> bool:
        """Whether all parameters are what they were, by their norms: a compiled step is not seen by hooks."""
        now = self._sizes()
        return bool(now) and len(now) == len(self._start) and fetch(now) == fetch(self._start)

    def _count(self, track: _Track, *, validation: bool = False) -> None:
        """How many batches a batch norm took in besides those of the steps, at a validation."""
        norms = (m.num_batches_tracked for m in self._norms if m.training)
        counter = next((count for count in norms if count is not None), None)
        step, before = track.history.step, track.counts
        if counter is None or len(self._tracks) > 1:
            track.counts = None
            return
        if validation and before is not None and track.each is not None:
            more = counter - before[1] - track.each * (step - before[0])
            track.history.events.setdefault("counted", []).append(fetch([more.float()])[0][0])
        elif not validation and before is not None and step > before[0]:
            track.each = (counter - before[1]) / (step - before[0])
        track.counts = step, counter.clone()

    # ---- around a step

    def _is_sampled(self, track: _Track) -> bool:
        step = track.history.step
        return not self._off and (step < self.dense or step % self.every == 0)

    def _guarded(self, call: Callable[..., None], track: _Track, optimizer: Any, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():  # an optimizer's step may be compiled, and a hook with it
            return
        with self._safely():
            call(track, args, kwargs)

    def _safely(self) -> _Safely:
        return _Safely(self)

    @torch.no_grad()
    def _before_step(self, track: _Track, args: Any, kwargs: Any) -> None:
        if track.waiting is not None:  # the user does not say what the loss is
            self._look()
        if not self._is_sampled(track):
            return
        params = [p for group in track.optimizer.param_groups for p in group["params"]]
        if len(track.history.sizes) < len(self._names) or any(p not in self._names for p in params):  # layers are new
            self._names = self._named()
        track.owned = [(self._names[p], p) for p in params if p in self._names and not nn.parameter.is_lazy(p)]
        track.numbers = _keyed("weight", track.owned, norms_of(local_of(p) for _, p in track.owned))
        if not _closure(args, kwargs):
            self._weigh_gradients(track)
        rows = [rows_of(p) for _, p in track.owned]
        if track.partly:
            track.numbers |= _keyed("rows", track.owned, norms_of(rows))
        track.before = [row.clone(memory_format=torch.preserve_format) for row in rows]

    def _weigh_gradients(self, track: _Track) -> None:
        scale = getattr(track.optimizer, "grad_scale", None)  # a fused optimizer under a scaler divides by it itself
        learning = [(name, p.grad) for name, p in track.owned if p.grad is not None]
        norms = norms_of(entries_of(local_of(grad)) for _, grad in learning)
        if isinstance(scale, Tensor):
            norms = [norm / scale for norm in norms]
        track.numbers |= _keyed("gradient", learning, norms)

    @torch.no_grad()
    def _after_step(self, track: _Track, args: Any, kwargs: Any) -> None:
        history = track.history
        seen = self._layers.take()
        if track.before is not None:
            before, track.before = track.before, None
            if _closure(args, kwargs):  # the gradients came with it
                self._weigh_gradients(track)
            changes = torch._foreach_sub([rows_of(p) for _, p in track.owned], before) if before else []
            track.numbers |= _keyed("update", track.owned, norms_of(changes))
            short = [
                (name, change) for (name, _), change in zip(track.owned, changes, strict=True) if change.itemsize == 2
            ]
            track.numbers |= {("moved", name): change.count_nonzero() / change.numel() for name, change in short}
            if track.found:
                found = [0.0 if norm is None else norm for norm in track.found]
                track.numbers |= {("left", str(i)): norm for i, norm in enumerate(found)}
            track.numbers |= {("input", str(i)): most for i, most in enumerate(seen.inputs)}
            missed = getattr(track.optimizer, "found_inf", None)
            if isinstance(missed, Tensor):
                track.numbers["skipped", ""] = missed
            # A rate may be a tensor on the device, which is not waited for here.
            track.numbers |= {
                ("rate", self._names[p]): rate.detach() if isinstance(rate, Tensor) else float(rate)
                for group in track.optimizer.param_groups
                if (rate := group.get("lr")) is not None
                for p in group["params"]
                if p in self._names
            }
            facts = {
                "outputs": tuple(dict.fromkeys(seen.shapes)),
                "modes": {label: unwrapped(model).training for label, model in self.models.items()},
                "partly": frozenset(track.partly),
            }
            track.waiting = _Draft(history.step, track.numbers, seen.layers, facts)
        if seen.outputs:
            self._located(seen.outputs)
        history.step += 1
        self._total += 1
        if track.waiting is not None:
            self._count(track)
        track.stepped = self._total
        self._last = track
        self._arm()

    def _arm(self) -> None:
        """Put the hooks where the next step needs them, or take them away."""
        sampled = [track for track in self._tracks if self._is_sampled(track)]
        if self._locating or any(self._total - track.stepped <= PATIENCE for track in sampled):
            if not self._layers.attached:
                self._names = self._named()
            self._layers.attach(locating=self._locating > 0)
        elif self._layers.attached:
            self._layers.detach()
        track = self._last
        if track.listener is not None:
            track.listener.remove()
            track.listener = None
        track.found = []
        if self._is_sampled(track) and not any(map(is_compiled, self.models.values())):
            self._listen(track)

    def _listen(self, track: _Track) -> None:
        """See what the next backward passes find in the place of a gradient."""
        params = [p for group in track.optimizer.param_groups for p in group["params"]]
        chosen = next((p for p in reversed(params) if p.requires_grad and p.grad is not None), None)
        if chosen is None:
            return

        def arrives(_: Tensor) -> None:
            grad = chosen.grad
            with torch.no_grad():
                track.found.append(None if grad is None else norms_of([entries_of(local_of(grad))])[0])

        track.listener = chosen.register_hook(arrives)

    def _named(self) -> dict[Tensor, str]:
        names: dict[Tensor, str] = {
            p: name.replace("_orig_mod.", "")
            for label, model in self.models.items()
            for name, p in unwrapped(model).named_parameters(prefix=label)
        }
        sizes = {name: tuple(p.shape) for p, name in names.items() if not nn.parameter.is_lazy(p)}
        for track in self._tracks:
            track.history.sizes = sizes
        return names

    # ---- numbers

    def _settle(self) -> list[_Track]:
        """Fetch all that waits, once; the optimizers that have a new sample, or the first loss that is not finite."""
        tensors: list[Tensor] = []
        news: list[_Track] = []
        for track in self._tracks:
            draft = track.waiting
            if draft is not None:
                tensors += [value for value in draft.numbers.values() if isinstance(value, Tensor)]
                tensors += [v for _, made in draft.layers.values() for v in made.values() if isinstance(v, Tensor)]
                tensors += [draft.comparison[1]] if draft.comparison else []
            tensors += [value for _, value in track.losses if isinstance(value, Tensor)]
        values = iter(fetch(tensors))
        for track in self._tracks:
            history, draft, track.waiting = track.history, track.waiting, None
            if draft is not None:
                numbers = {k: next(values)[0] if isinstance(v, Tensor) else v for k, v in draft.numbers.items()}
                layers = {
                    name: Layer(kind, {k: next(values)[0] if isinstance(v, Tensor) else v for k, v in made.items()})
                    for name, (kind, made) in draft.layers.items()
                }
                if draft.comparison is not None:
                    _keep(history, draft.comparison[0], next(values), draft.step, validation=False)
            for step, value in track.losses:
                history.losses.append((step, next(values)[0] if isinstance(value, Tensor) else value))
                if len(history.start) < FIRST:
                    history.start.append(history.losses[-1][1])
            lost = any(not math.isfinite(history.losses[i][1]) for i in range(-len(track.losses), 0))
            if lost and "lost" not in history.events:
                self._lose(history)
                news.append(track)
            elif draft is not None:
                news.append(track)
            track.losses.clear()
            if draft is not None:
                history.samples.append(_sample(draft, numbers, layers, history))
                if self._writer is not None:
                    self._write(written(history.samples[-1], track.label), draft.step)
                if history.first is None and history.samples[-1].gradients:
                    history.first = history.samples[-1]
        return news

    def _lose(self, history: History) -> None:
        """The loss is not finite any more: which parameters are not, and where does it come from?"""
        named = [(name, p) for p, name in self._named().items() if not nn.parameter.is_lazy(p)]
        norms = fetch(norms_of(local_of(p) for _, p in named))
        history.events["lost"] = [n for (n, _), (norm,) in zip(named, norms, strict=True) if not math.isfinite(norm)]
        if len(history.events["lost"]) < len(named) / 2:  # else they make everything behind them so
            self._locating = PATIENCE
            self._layers.attach(locating=True)

    def _located(self, outputs: list[tuple[str, Tensor]] | None = None) -> None:
        """Which layer was the first whose output is not finite."""
        if not self._locating:
            return
        outputs = self._layers.take().outputs if outputs is None else outputs
        values = zip(outputs, fetch([most for _, most in outputs]), strict=True)
        first = next((name for (name, _), (most,) in values if not math.isfinite(most)), None)
        self._locating -= 1
        if first is not None:
            self._locating = 0
            for track in self._tracks:
                if "lost" in track.history.events:
                    track.history.events["located"] = first
                    track.unasked += self.every + 1

    # ---- rules

    def _look(self, *, last: bool = False, quiet: bool = False) -> None:
        """Fetch what waits, and ask the rules about the optimizers of which something is new."""
        news = self._settle()
        new: list[Finding] = []
        for track in self._tracks:
            validated = last and track.history.validations and track.unasked
            if track in news or track.unasked > self.every or validated:
                new += self._ask(track)
        for finding in new:
            self._tell(finding)
        if news or new:
            self._write(counts(self._found.values()), max(track.history.step for track in self._tracks))
        errors = [finding for finding in new if finding.severity == "error"]
        if self.on_error == "raise" and errors and not quiet:
            raise DiagnosisError(str(errors[0]), self.report)

    def _ask(self, track: _Track) -> list[Finding]:
        track.unasked = 0
        track.looks += 1
        new: list[Finding] = []
        broken = track.history.broken
        for rule in list(self._rules):
            if broken and rule.slug != "non-finite":  # all else follows from that
                continue
            try:
                founds = list(rule.find(track.history))
            except Exception as error:  # a diagnosis must not stop a training run by its own bugs
                self._rules.remove(rule)
                self._fail(f"rule {rule.id} ({rule.slug})", error)
                continue
            for found in founds:
                finding = Finding.of(rule, found, track.history.step)
                if track.label:
                    finding = dataclasses.replace(finding, message=f"{track.label}: {finding.message}")
                if self._is_new(
                    track, (rule.id, found.module if found.key is None else found.key, track.label), finding
                ):
                    new.append(finding)
        return new

    def _is_new(self, track: _Track, key: tuple[str, str, str], finding: Finding) -> bool:
        """Whether the finding is to be told now: once, and a warning only when it was seen in two looks running."""
        known = self._found.get(key)
        if known is not None and (known.severity == finding.severity or finding.severity != "error"):
            self._found[key] = dataclasses.replace(known, count=known.count + 1)
            return False
        if finding.severity != "error" and self._suspected.get(key) != track.looks - 1:
            self._suspected[key] = track.looks
            return False
        self._found[key] = finding
        return True

    def _tell(self, finding: Finding) -> None:
        if not _speaks():
            return
        if self.on_error != "silent":
            print(finding, file=sys.stderr)
        if self._log is not None:
            with self._log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finding.to_dict()) + "\n")
        self._write(finding, finding.step or 0)

    def _write(self, what: Mapping[str, float] | Finding, step: int) -> None:
        """Give numbers or a finding to the user's writer, whose failures are its own."""
        if self._writer is None or not _speaks():
            return
        try:
            if isinstance(what, Finding):
                self._writer.finding(what, step)
            else:
                self._writer.numbers(what, step)
        except Exception as error:
            self._writer = None
            self._fail("the writer", error)

    def _fail(self, what: str, error: Exception) -> None:
        """Something of ours failed: it is off from now on, and named once."""
        failure = f"{what} failed and is off: {type(error).__name__}: {error}"
        if failure not in self._failures:
            self._failures.append(failure)
            if self.on_error != "silent" and _speaks():
                print(f"note: {failure}", file=sys.stderr)


class _Safely:
    """Failures of our own are noted, and end the observation of steps; they do not stop the training."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if error is None or isinstance(error, DiagnosisError) or not isinstance(error, Exception):
            return False
        watch = self.watch
        watch._off = True
        watch._layers.detach()
        for track in watch._tracks:
            track.before, track.waiting = None, None
            track.losses.clear()
        watch._fail("watching", error)
        return True


def _sample(draft: _Draft, numbers: dict[Key, float], layers: dict[str, Layer], history: History) -> Sample:
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


def _keep(history: History, kind: str, values: list[float], step: int, *, validation: bool) -> None:
    made = fetched(kind, values, step, validation)
    if isinstance(made, Counts):
        history.counts.append(made)
    elif made is not None:
        history.fits.append(made)


def _number(loss: Tensor | float) -> Tensor | float:
    """The loss as a number, or as a tensor of its own on a device that one would have to wait for."""
    if not isinstance(loss, Tensor):
        return float(loss)
    loss = local_of(loss.detach())
    mean = loss if loss.dim() == 0 else loss.float().mean()
    return float(mean) if mean.device.type == "cpu" else mean.clone()


def _made_by(loss: Any) -> frozenset[str]:
    """The operations a loss comes from, the next few behind it; none of a mere number."""
    names: set[str] = set()
    reached = [getattr(loss, "grad_fn", None)]
    while reached and len(names) < 30 and len(reached) < 200:
        node = reached.pop(0)
        if node is not None:
            names.add(str(node.name()).removesuffix("0").removesuffix("Backward"))
            reached += [one for one, _ in node.next_functions]
    return frozenset(names)


def _closure(args: Any, kwargs: Any) -> bool:
    return (args[1] if len(args) > 1 else kwargs.get("closure")) is not None  # args[0] is the optimizer


def _inner(optimizer: Optimizer) -> Optimizer:
    """The optimizer that runs, inside those of other libraries that only pass on."""
    inner = getattr(optimizer, "optimizer", None)
    while not hasattr(optimizer, "_optimizer_step_pre_hooks") and isinstance(inner, Optimizer):
        optimizer, inner = inner, getattr(inner, "optimizer", None)
    return optimizer


def _keyed(what: str, owned: list[tuple[str, Tensor]], norms: list[Tensor]) -> dict[Key, Tensor | float]:
    return {(what, name): norm for (name, _), norm in zip(owned, norms, strict=True)}


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _speaks() -> bool:
    """Whether this process prints: of several only the first does."""
    return not _distributed() or torch.distributed.get_rank() == 0


def _labelled(model: Any) -> dict[str, nn.Module]:
    """The models by what the names of their layers begin with: "" for one, their class or place for several."""
    if isinstance(model, nn.Module):
        return {"": model}
    if isinstance(model, Mapping):
        models = dict(model)
    else:
        several = list(model)
        labels = [type(unwrapped(m)).__name__ for m in several if isinstance(m, nn.Module)]
        distinct = len(set(labels)) == len(several)
        models = {labels[i] if distinct else str(i): m for i, m in enumerate(several)}
    if not models or not all(isinstance(m, nn.Module) and isinstance(n, str) and n for n, m in models.items()):
        raise RuleError("watch takes a model, several in a list or tuple, or a dict of them by name")
    return models


def watch(
    model: nn.Module | Iterable[nn.Module] | Mapping[str, nn.Module],
    optimizer: Optimizer | Iterable[Optimizer],
    loader: Iterable[Any] | None = None,
    *,
    every: int = 25,
    dense: int = 10,
    on_error: OnError = "print",
    ignore: Collection[str] = (),
    log: str | Path | None = None,
    writer: Any = None,
) -> Watch:
    """Watch a training loop: a context manager around it.

        with rn.watch(model, optimizer) as w:
            for x, y in loader:
                optimizer.zero_grad()
                loss = criterion(model(x), y)
                loss.backward()
                optimizer.step()
                w.step(loss)

    Args:
        model: what is trained; several models as a tuple, or a dict that names them.
        optimizer: or several, as for a GAN; each has steps, samples and findings of its own.
        loader: of the training data, for rules about batches.
        every: how many steps lie between two that are sampled.
        dense: so many first steps are all sampled.
        on_error: ``"print"`` tells each finding once, on standard error; ``"raise"`` raises DiagnosisError at the first
            error; ``"silent"`` leaves all to ``w.report``.
        ignore: ids or slugs of rules to leave out.
        log: a file to which findings are appended, a JSON object a line.
        writer: what findings and the numbers of sampled steps are written to: TensorBoard's ``SummaryWriter``, the
            module ``mlflow``, or anything with their ``add_scalar`` or ``log_metrics``. It stays open.

    ``w.step(loss)`` and ``w.validate(loss)`` may be left out, and with them the rules about losses; with
    ``w.step(loss, outputs, targets)`` predictions are looked at, too. The results of the training are the same, bit for
    bit, with and without. Of several processes only the first prints; ``w.gather()`` has the findings of all.

    Raises RuleError for settings that cannot be, an unknown rule in `ignore`, and a `writer` that cannot write.
    """
    several = (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer)
    optimizers = tuple(map(_inner, several))
    if not optimizers or not all(isinstance(one, Optimizer) for one in optimizers):
        raise RuleError("watch takes a torch.optim.Optimizer, or several of them")
    if every < 1 or dense < 0 or on_error not in ("print", "raise", "silent"):
        raise RuleError(
            f"every is 1 or more, dense 0 or more and on_error print, raise or silent; got {every}, {dense}, "
            f"{on_error!r}"
        )
    unknown = set(ignore) - {name for rule in RULES.values() for name in (rule.id, rule.slug)}
    if unknown:
        raise RuleError(f"there is no rule {', '.join(sorted(unknown))}: see renorm.diagnose.RULES")
    return Watch(_labelled(model), optimizers, loader, every, dense, on_error, ignore, log, writer)
