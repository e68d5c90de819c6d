"""`watch`: look at every so many steps of a training loop that is not ours, and say what is wrong as it appears.

A step is one call of ``optimizer.step()``. Steps that are not sampled cost nothing but a counter: the forward hooks are
there only while a step is sampled. A sampled step computes all its numbers on the device and fetches them at once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.optim import Optimizer

from renorm.diagnose.catalogue import RULES
from renorm.diagnose.finding import Finding, Report
from renorm.diagnose.fit import compared, fetched
from renorm.diagnose.history import History, Validation
from renorm.diagnose.layers import Layers, is_compiled, unwrapped
from renorm.diagnose.readings import fetch, local_of, norms_of
from renorm.diagnose.reporter import OnError, Reporter
from renorm.diagnose.rules.words import no_optimizer
from renorm.diagnose.track import Track
from renorm.errors import DiagnosisError, RuleError

__all__ = ["Watch", "watch"]

PATIENCE = 8  # steps of other optimizers for which the hooks wait for one that is to be sampled
RECENT = 50  # training losses that a validation loss is compared with
NO_STEP = 50  # losses after which an optimizer should have stepped


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
        self.every, self.dense = every, dense
        self.models = models
        inner = {label: unwrapped(model) for label, model in models.items()}
        self.model = inner[""] if "" in inner else nn.ModuleDict(inner)
        self._tracks = [
            Track(
                optimizer,
                History(self.model, optimizer, optimizers, loader),
                f"optimizer {i}" if len(optimizers) > 1 else "",
            )
            for i, optimizer in enumerate(optimizers)
        ]
        self._reporter = Reporter(self.model, on_error, ignore, log, writer)
        self._names: dict[Tensor, str] = {}
        self._handles: list[Any] = []
        self._layers = Layers(models, self._reporter.fail)
        self._off = False  # after a failure of our own
        self._total = 0  # steps of all optimizers
        self._last = self._tracks[0]  # whose optimizer stepped last
        self._locating = 0  # steps for which values that are not finite are searched
        self._told = 0  # losses
        self._start: list[Tensor] = []  # norms of the parameters
        self._norms: list[BatchNorm] = []  # whose batches are counted

    # ---- what the user calls

    @property
    def history(self) -> History:
        """What was seen of the first optimizer's steps."""
        return self._tracks[0].history

    @property
    def report(self) -> Report:
        """What was found so far."""
        return self._reporter.report(self._unseen)

    @property
    def on_error(self) -> OnError:
        """What is done with a finding, as `watch` has it."""
        return self._reporter.on_error

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
            self._reporter.write({"renorm/validation loss": value[0]}, history.step)
            if made is not None:
                history.keep(fetched(made[0], rest[0], history.step, validation=True))
            track.count_batches(self._norms, validation=True)
            track.unasked += 1  # the rules are asked with the next sample, which they confirm it by

    def gather(self) -> Report:
        """The findings of all processes of torch.distributed, each once; every process must call it."""
        return self._reporter.gather(self._unseen)

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
            if len(self._tracks) == 1:
                self._norms = [m for m in self.model.modules() if isinstance(m, BatchNorm)]
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
            track.stop_listening()
        with self._safely():
            self._located()
            self._look(last=True, quiet=quiet)

    def _sizes(self) -> list[Tensor]:
        return norms_of(local_of(p) for p in self._named() if not nn.parameter.is_lazy(p))

    def _unmoved(self) -> bool:
        """Whether all parameters are what they were, by their norms: a compiled step is not seen by hooks."""
        now = self._sizes()
        return bool(now) and len(now) == len(self._start) and fetch(now) == fetch(self._start)

    @property
    def _unseen(self) -> str:
        """Why a report without findings says nothing; empty where steps were seen."""
        if self._total or self._off:
            return ""
        return (
            "no weight, gradient or layer was looked at: optimizer.step() was never seen inside of the `with` block, "
            f"w.step(loss) {self._told or 'neither'}{' times' * (self._told > 1)}"
        )

    # ---- around a step

    def _is_sampled(self, track: Track) -> bool:
        step = track.history.step
        return not self._off and (step < self.dense or step % self.every == 0)

    def _guarded(self, call: Callable[..., None], track: Track, optimizer: Any, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():  # an optimizer's step may be compiled, and a hook with it
            return
        with self._safely():
            call(track, args, kwargs)

    def _safely(self) -> _Safely:
        return _Safely(self)

    @torch.no_grad()
    def _before_step(self, track: Track, args: Any, kwargs: Any) -> None:
        if track.waiting is not None:  # the user does not say what the loss is
            self._look()
        if not self._is_sampled(track):
            return
        known = self._names
        if len(track.history.sizes) < len(known) or any(p not in known for p in track.params):  # layers are new
            self._names = self._named()
        track.begin(self._names, gradients=not _closure(args, kwargs))

    @torch.no_grad()
    def _after_step(self, track: Track, args: Any, kwargs: Any) -> None:
        history = track.history
        seen = self._layers.take()
        if track.before is not None:
            modes = {label: unwrapped(model).training for label, model in self.models.items()}
            track.end(seen, self._names, modes, gradients=_closure(args, kwargs))
        if seen.outputs:
            self._located(seen.outputs)
        history.step += 1
        self._total += 1
        if track.waiting is not None:
            track.count_batches(self._norms)
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
        track.stop_listening()
        if self._is_sampled(track) and not any(map(is_compiled, self.models.values())):
            track.listen()

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

    def _settle(self) -> list[Track]:
        """Fetch all that waits, once; the optimizers that have a new sample, or the first loss that is not finite."""
        values = iter(fetch([tensor for track in self._tracks for tensor in track.pending()]))
        news: list[Track] = []
        for track in self._tracks:
            sample, lost = track.settle(values)
            if sample is not None:
                self._reporter.sampled(sample, track.label)
            if lost and "lost" not in track.history.events:
                self._lose(track.history)
                news.append(track)
            elif sample is not None:
                news.append(track)
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
                track.unasked = 0
                track.looks += 1
                new += self._reporter.ask(track.history, track.label, track.looks)
        if news or new:
            self._reporter.tell(new, max(track.history.step for track in self._tracks), quiet=quiet)


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
            track.drop()
        watch._reporter.fail("watching", error)
        return True


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

    Raises RuleError for settings that cannot be, an optimizer that is none, an unknown rule in `ignore`, and a `writer`
    that cannot write.
    """
    several = tuple(optimizer) if isinstance(optimizer, Iterable) else (optimizer,)
    optimizers = tuple(map(_inner, several))
    if not optimizers or not all(isinstance(one, Optimizer) for one in optimizers):
        wrong = next((one for one in optimizers if not isinstance(one, Optimizer)), optimizer)
        raise RuleError(f"watch takes a torch.optim.Optimizer, or several of them; {no_optimizer(wrong)}")
    if every < 1 or dense < 0 or on_error not in ("print", "raise", "silent"):
        raise RuleError(
            f"every is 1 or more, dense 0 or more and on_error print, raise or silent; got {every}, {dense}, "
            f"{on_error!r}"
        )
    unknown = set(ignore) - {name for rule in RULES.values() for name in (rule.id, rule.slug)}
    if unknown:
        raise RuleError(f"there is no rule {', '.join(sorted(unknown))}: see renorm.diagnose.RULES")
    return Watch(_labelled(model), optimizers, loader, every, dense, on_error, ignore, log, writer)
