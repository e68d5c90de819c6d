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
from collections import deque
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from renorm.diagnose import rules as _rules  # noqa: F401 (fills the catalogue)
from renorm.diagnose.catalogue import RULES
from renorm.diagnose.finding import Finding, Report, ordered
from renorm.diagnose.history import History, Layer, Sample
from renorm.diagnose.trace import kind_of_module
from renorm.errors import DiagnosisError, RuleError

__all__ = ["Watch", "watch"]

MAX_ENTRIES = 65536  # of an activation that are looked at; a strided choice of more
OnError = Literal["print", "raise", "silent"]


class Watch:
    """A training run under observation; see `watch`."""

    def __init__(
        self,
        model: nn.Module,
        optimizers: tuple[Optimizer, ...],
        loader: Iterable[Any] | None,
        every: int,
        dense: int,
        on_error: OnError,
        ignore: Collection[str],
        log: str | Path | None,
    ) -> None:
        self.history = History(model, optimizers, loader)
        self.every, self.dense, self.on_error = every, dense, on_error
        self._rules = [r for r in RULES.values() if r.when == "watch" and not {r.id, r.slug} & set(ignore)]
        self._failures: list[str] = []
        self._found: dict[tuple[str, str], Finding] = {}  # by rule and module
        self._suspected: dict[tuple[str, str], int] = {}  # warnings seen once, and in which look
        self._looks = 0
        self._log = None if log is None else Path(log)
        self._names: dict[Tensor, str] = {}
        self._handles: list[Any] = []
        self._hooks: list[Any] = []  # of the forward pass, while a step is sampled
        self._pending: dict[str, tuple[str, dict[str, Tensor]]] = {}  # of this step's layers: kind, numbers
        self._before: list[Tensor] = []  # copies of the parameters, while the optimizer steps
        self._owned: list[Tensor] = []  # parameters of the optimizer that steps
        self._learning: list[Tensor] = []  # those with a gradient
        self._norms: dict[str, list[Tensor]] = {}
        self._memory: dict[str, dict[str, Any]] = {}  # of the measures, by module
        self._losses: list[tuple[int, Tensor | float]] = []  # not fetched yet
        self._waiting: Sample | None = None  # for its loss

    # ---- what the user calls

    @property
    def report(self) -> Report:
        """What was found so far."""
        return Report(ordered(self._found.values()), tuple(self._failures), self.history.model)

    def step(self, loss: Tensor | float) -> None:
        """Say what the loss of the step was, behind ``optimizer.step()``."""
        self._losses.append((self.history.step, loss.detach() if isinstance(loss, Tensor) else float(loss)))
        on_device = isinstance(loss, Tensor) and loss.device.type != "cpu"
        if not on_device or self._waiting is not None or len(self._losses) >= self.every:
            self._look()

    def validate(self, loss: Tensor | float) -> None:
        """Say what the loss on validation data is."""
        self._fetch_losses()
        recent = [value for _, value in list(self.history.losses)[-100:]]
        training = sum(recent) / len(recent) if recent else math.nan
        self.history.validations.append((self.history.step, float(loss), training))
        self._look(validated=True)

    def __enter__(self) -> Watch:
        self._names = {p: name for name, p in self.history.model.named_parameters()}
        for optimizer in self.history.optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))
            self._handles.append(optimizer.register_step_post_hook(self._after_step))
        if self._is_sampled():
            self._attach()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.close()

    def close(self) -> None:
        """Stop watching; the report stays."""
        self._detach()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._waiting is not None or self._losses:
            self._look(last=True)

    # ---- around a step

    def _is_sampled(self) -> bool:
        return self.history.step < self.dense or self.history.step % self.every == 0

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if self._waiting is not None:  # the user does not say what the loss is
            self._look()
        if not self._is_sampled():
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        if closure is None:
            self._weigh(optimizer)
            return None

        def weighed() -> Any:  # the gradients come with the closure, which some optimizers call several times
            result = closure()
            if not self._before:
                self._weigh(optimizer)
            return result

        return ((args[0], weighed, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": weighed})

    def _weigh(self, optimizer: Optimizer) -> None:
        """What is to be known of gradients and weights before the optimizer changes them."""
        owned = [p for group in optimizer.param_groups for p in group["params"] if p in self._names]
        learning = [p for p in owned if p.grad is not None and not p.grad.is_sparse]
        self._norms = {
            "gradients": _norms([p.grad for p in learning if p.grad is not None]),
            "weights": _norms([p.detach() for p in owned]),
        }
        self._owned, self._learning = owned, learning
        self._before = [p.detach().clone() for p in owned]

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._is_sampled() and self._before:
            changes = torch._foreach_sub([p.detach() for p in self._owned], self._before)
            names, learning = ([self._names[p] for p in ps] for ps in (self._owned, self._learning))
            layers = [(name, kind, key) for name, (kind, made) in self._pending.items() for key in made]
            numbers = [self._pending[name][1][key] for name, _, key in layers]
            fetched = _fetch([*self._norms["gradients"], *self._norms["weights"], *_norms(list(changes)), *numbers])
            cut = len(learning), len(learning) + len(names), len(learning) + 2 * len(names)
            found: dict[str, Layer] = {}
            for (name, kind, key), value in zip(layers, fetched[cut[2] :], strict=True):
                found.setdefault(name, Layer(kind, {})).numbers[key] = value
            groups = [(float(g["lr"]), p) for g in optimizer.param_groups for p in g["params"] if p in self._names]
            self._waiting = Sample(
                self.history.step,
                None,
                dict(zip(learning, fetched[: cut[0]], strict=True)),
                dict(zip(names, fetched[cut[0] : cut[1]], strict=True)),
                dict(zip(names, fetched[cut[1] : cut[2]], strict=True)),
                found,
                {self._names[p]: rate for rate, p in groups},
            )
            self._before, self._pending = [], {}
        self.history.step += 1
        self._detach()
        if self._is_sampled():
            self._attach()

    # ---- layers

    def _attach(self) -> None:
        if torch.compiler.is_compiling():
            return
        for name, module in self.history.model.named_modules():
            kind = kind_of_module(module)
            if kind in MEASURES:
                hook = functools.partial(self._measure, name=name, kind=kind)
                self._hooks.append(module.register_forward_hook(hook))

    def _detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @torch.no_grad()
    def _measure(self, module: nn.Module, inputs: Any, output: Any, *, name: str, kind: str) -> None:
        if torch.compiler.is_compiling() or not module.training or not isinstance(output, Tensor) or not inputs:
            return
        made = MEASURES[kind](module, inputs[0].detach(), output.detach(), self._memory.setdefault(name, {}))
        if made:
            self._pending[name] = kind, made

    # ---- rules

    def _fetch_losses(self) -> None:
        tensors = [value for _, value in self._losses if isinstance(value, Tensor)]
        fetched = iter(_fetch([value.float().mean() for value in tensors]))
        for step, value in self._losses:
            self.history.losses.append((step, next(fetched) if isinstance(value, Tensor) else value))
        self._losses.clear()

    def _look(self, *, last: bool = False, validated: bool = False) -> None:
        """Finish the sample that is waiting, and ask the rules."""
        self._fetch_losses()
        if self._waiting is not None:
            loss = self.history.losses[-1][1] if self.history.losses else None
            self.history.samples.append(dataclasses.replace(self._waiting, loss=loss))
            self._waiting = None
            self._looks += 1
        elif (
            not last
            and not self.history.validations
            and (not self.history.losses or math.isfinite(self.history.losses[-1][1]))
        ):
            return
        new: list[Finding] = []
        for rule in list(self._rules):
            try:
                founds = list(rule.find(self.history))
            except Exception as error:  # a diagnosis must not stop a training run by its own bugs
                self._failures.append(
                    f"rule {rule.id} ({rule.slug}) failed and is off: {type(error).__name__}: {error}"
                )
                self._rules.remove(rule)
                continue
            for found in founds:
                finding = self._count(Finding.of(rule, found, self.history.step))
                if finding is not None:
                    new.append(finding)
        for finding in new:
            self._tell(finding)
        if self.on_error == "raise":
            errors = [finding for finding in new if finding.severity == "error"]
            if errors:
                raise DiagnosisError(str(errors[0]), self.report)

    def _count(self, finding: Finding) -> Finding | None:
        """The finding where it is to be told for the first time: a warning only once it was seen in two looks "
        "running."""
        key = finding.id, finding.module
        known = self._found.get(key)
        if known is not None:
            self._found[key] = dataclasses.replace(known, count=known.count + 1)
            return None
        if finding.severity != "error" and self._suspected.get(key) != self._looks - 1:
            self._suspected[key] = self._looks
            return None
        self._found[key] = finding
        return finding

    def _tell(self, finding: Finding) -> None:
        if self.on_error != "silent":
            print(finding, file=sys.stderr)
        if self._log is not None:
            with self._log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finding.to_dict()) + "\n")


Measure = Callable[[nn.Module, Tensor, Tensor, dict[str, Any]], dict[str, Tensor]]


def _some(x: Tensor) -> Tensor:
    """A flat choice of at most MAX_ENTRIES entries, in float32."""
    flat = x.reshape(-1)
    return flat[:: max(1, flat.numel() // MAX_ENTRIES)].float()


def _units(module: nn.Module, x: Tensor, y: Tensor, memory: dict[str, Any]) -> dict[str, Tensor]:
    """`dead`: the share of units (features, channels) that were 0 on all entries of the last samples; `samples`."""
    if y.dim() < 2:
        return {}
    axis = 1 if y.dim() in (2, 4, 5) else -1
    over = [i for i in range(y.dim()) if i != axis % y.dim()]
    alive = memory.setdefault("alive", deque(maxlen=5))
    alive.append(y.amax(over) > 0)
    if len({tuple(mask.shape) for mask in alive}) > 1:
        alive.clear()
        return {}
    dead = ~torch.stack(tuple(alive)).any(0)
    return {"dead": dead.float().mean(), "samples": torch.tensor(float(len(alive)))}


def _saturated(limit: float) -> Measure:
    def measure(module: nn.Module, x: Tensor, y: Tensor, memory: dict[str, Any]) -> dict[str, Tensor]:
        return {"saturated": (_some(x).abs() > limit).float().mean()}

    return measure


def _batch_statistics(module: nn.Module, x: Tensor, y: Tensor, memory: dict[str, Any]) -> dict[str, Tensor]:
    """Batch against running statistics, in units of the batch's own deviation (arXiv:2210.05153).

    `mean`: root mean square over channels of (running mean - batch mean) / batch deviation; `var`: that of the
    logarithm of running over batch variance; `values`: entries of a channel; `small`: the share of channels whose
    running variance is below 10 eps.
    """
    mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    if mean is None or var is None or x.dim() < 2 or getattr(module, "axis", 1) != 1 or x.shape[1] != mean.numel():
        return {}
    over = [i for i in range(x.dim()) if i != 1]
    batch_var, batch_mean = torch.var_mean(x.float(), over, correction=0)
    eps = float(getattr(module, "eps", None) or 1e-5)
    deviation = (batch_var + eps).sqrt()
    return {
        "mean": ((mean.float() - batch_mean) / deviation).square().mean().sqrt(),
        "var": ((var.float() + eps) / (batch_var + eps)).log().square().mean().sqrt(),
        "values": torch.tensor(float(x.numel() // x.shape[1])),
        "small": (var < 10 * eps).float().mean(),
    }


MEASURES: dict[str, Measure] = {
    "relu": _units,
    "tanh": _saturated(3.0),
    "sigmoid": _saturated(6.0),
    "batch_norm": _batch_statistics,
}


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    return list(torch._foreach_norm([t.float() if t.dtype != torch.float64 else t for t in tensors])) if tensors else []


def _fetch(tensors: list[Tensor]) -> list[float]:
    """The numbers, with one wait for each device."""
    values: list[float] = [0.0] * len(tensors)
    for device in {tensor.device for tensor in tensors}:
        places = [i for i, tensor in enumerate(tensors) if tensor.device == device]
        fetched = torch.stack([tensors[i].detach().double().reshape(()) for i in places]).tolist()
        for i, value in zip(places, fetched, strict=True):
            values[i] = value
    return values


def watch(
    model: nn.Module,
    optimizer: Optimizer | Iterable[Optimizer],
    loader: Iterable[Any] | None = None,
    *,
    every: int = 25,
    dense: int = 10,
    on_error: OnError = "print",
    ignore: Collection[str] = (),
    log: str | Path | None = None,
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
        model: what is trained.
        optimizer: or several, as for a GAN; a step is a step of any.
        loader: of the training data, for rules about batches.
        every: how many steps lie between two that are sampled.
        dense: so many first steps are all sampled.
        on_error: ``"print"`` tells each finding once, on standard error; ``"raise"`` raises DiagnosisError at the first
            error; ``"silent"`` leaves all to ``w.report``.
        ignore: ids or slugs of rules to leave out.
        log: a file to which findings are appended, a JSON object a line.

    ``w.step(loss)`` and ``w.validate(loss)`` may be left out, and with them the rules about losses. The results of the
    training are the same, bit for bit, with and without.

    Raises RuleError for settings that cannot be.
    """
    optimizers = (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer)
    if every < 1 or dense < 0 or on_error not in ("print", "raise", "silent"):
        raise RuleError(
            f"every is 1 or more, dense 0 or more and on_error print, raise or silent; got {every}, {dense}, "
            f"{on_error!r}"
        )
    return Watch(model, optimizers, loader, every, dense, on_error, ignore, log)
