"""Measure running statistics again: those of the whole data as the finished weights see it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm as TorchInstanceNorm

from renorm.errors import SwapError
from renorm.norms.batch import BatchRenorm, PowerNorm
from renorm.norms.masks import expand_mask
from renorm.norms.norm import Norm
from renorm.surgery.find import describe, norms, refuse_lazy

__all__ = ["Recalibration", "Remeasured", "recalibrate"]

_STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}


@dataclass(frozen=True)
class Remeasured:
    """A norm whose running statistics were measured again."""

    name: str  # as in named_modules()
    norm: str  # its class
    mean_shift: float  # the largest move of a mean, in new standard deviations
    var_ratio: tuple[float, float]  # the smallest and the largest new variance over the old one

    def __str__(self) -> str:
        low, high = self.var_ratio
        moved = f"mean moved by up to {self.mean_shift:.3g} deviations, variance by {low:.3g} to {high:.3g} times"
        return f"{self.name or '(the model)'} ({self.norm}): {moved}"


@dataclass(frozen=True)
class Recalibration:
    """What `recalibrate` did."""

    num_batches: int
    norms: tuple[Remeasured, ...]
    left: tuple[str, ...]  # norms with running statistics that keep them, and why

    def __str__(self) -> str:
        head = f"{len(self.norms)} norms measured on {self.num_batches} batches, {len(self.left)} left alone"
        return "\n".join([head, *(f"  {one}" for one in (*self.norms, *self.left))])


def recalibrate(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], object] | None = None
) -> Recalibration:
    r"""Replace the running statistics of a model's norms by those of `batches`, in place.

    $$\mu = \frac1N \sum_b n_b \mu_b, \qquad \sigma^2 = \frac1N \sum_b n_b \left(\sigma_b^2 + (\mu_b - \mu)^2\right)$$
    with the biased moments of each batch b and its n_b values a channel: mean and variance of all values together,
    where a moving average has those of the last batches, measured while the weights still moved. N - 1 divides where
    the layer's own running variance is unbiased. A batch reaches a norm as in training, through the batch statistics
    of the norms before it; everything else (dropout) is in evaluation mode. Statistics of single samples (instance
    norm) are averaged, as the layer does. Use it after weights were averaged (EMA, SWA), for other data, or after
    training with small batches.

    Args:
        model: any module; its weights, gradients and modes stay.
        batches: what the loader gives, some hundreds of batches as large as they can be: more change little.
        forward: calls the model on a batch. If left out the first of a tuple or list, a dict as keyword arguments,
            anything else as it is, on the device of the model's first parameter.

    Compiled models run eagerly meanwhile. Norms that `sync` joined measure what all processes give them, and end up
    the same everywhere; without it each process has the statistics of its own batches.

    A batch in which a norm meets values that are not finite does not count for it. Frozen norms, `BatchRenorm` and
    `PowerNorm`, which normalize by running statistics in training as well, and norms that remember more than mean and
    variance (whitening) keep what they have and are reported.

    Raises:
        SwapError: no norm can be measured again, there is no batch, a norm met none, `batches` is a tensor, or a layer
            has no shape or no values yet. Whatever is raised, by a model or a loader too, the statistics are then as
            they were.

    Source: Y. Wu, J. Johnson: Rethinking "Batch" in BatchNorm, 2021 (arXiv:2105.07576).

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
    >>> print(recalibrate(model, [torch.randn(50, 2) + 3 for _ in range(4)]))
    1 norms measured on 4 batches, 0 left alone
      0 (BatchNorm1d): mean moved by up to 3.27 deviations, variance by 0.941 to 1.33 times
    """
    if isinstance(batches, Tensor):
        raise SwapError("batches is a loader or a list of batches; got a tensor: write [x] for a single batch")
    refuse_lazy(model)
    if any(buffer.is_meta for buffer in model.buffers()):
        raise SwapError("the model is on the meta device, which holds no values: load its weights first")
    meters, left = _meters(model)
    if not meters:
        raise SwapError("; ".join(["the model has no norm whose running statistics can be measured again", *left]))
    call = forward or _call
    num_batches = 0
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), _measuring(model, meters):
        for batch in batches:
            call(model, batch)
            num_batches += 1
        if not num_batches:
            raise SwapError("there is no batch to measure on: give a loader or a list of batches")
        unseen = [meter.name for meter in meters if not meter.num_calls]
        if unseen:
            raise SwapError(
                f"{', '.join(unseen)} met no finite batch: give a forward that runs them, or freeze what is not used"
            )
        done = tuple(meter.finish() for meter in meters)
    return Recalibration(num_batches, done, left)


@dataclass
class _Meter:
    """One norm while its statistics are measured: moments of all values so far, in float64."""

    name: str
    norm: Any
    unbiased: bool
    couples_batch: bool  # a channel's values are one set; else the statistics of single samples are averaged
    momentum: Any  # as it was
    kept: dict[str, Tensor] = field(default_factory=dict)  # the statistics as they were
    num_calls: int = 0
    weight: float = 0.0
    mean: Tensor | float = 0.0
    square: Tensor | float = 0.0  # weight times biased variance

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Let the batch's moments be all that the norm remembers of it."""
        self.norm.momentum = 1.0
        for name, value in self.kept.items():
            getattr(self.norm, name).copy_(value)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        """Merge what the norm remembers of the batch."""
        x, *rest = args if args else (kwargs["input"] if "input" in kwargs else kwargs["x"],)
        mask = rest[0] if rest else kwargs.get("mask")
        entries = x.numel() if mask is None else int(expand_mask(mask, x).sum())
        group = _group(self.norm)
        if group is not None:
            total = torch.tensor(entries, device=x.device)
            dist.all_reduce(total, group=group)
            entries = int(total)
        mean, var = self.norm.running_mean.double(), self.norm.running_var.double()
        # Renorm's layers leave their statistics as they are where a batch is not finite.
        moved = not isinstance(self.norm, Norm) or bool(
            self.norm.num_batches_tracked != self.kept["num_batches_tracked"]
        )
        if not (entries and moved and bool(mean.isfinite().all() & var.isfinite().all())):
            return
        count = entries / (mean.numel() if self.couples_batch else 1)
        weight = self.weight + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / weight)
        if self.couples_batch:
            biased = var * (count - 1) / count if self.unbiased else var
            self.square = self.square + count * biased + delta.square() * (self.weight * count / weight)
        else:
            self.square = self.square + count * var
        self.weight = weight
        self.num_calls += 1

    def finish(self) -> Remeasured:
        """Give the norm its new statistics."""
        divisor = self.weight - 1 if self.unbiased and self.couples_batch else self.weight
        assert isinstance(self.mean, Tensor)
        assert isinstance(self.square, Tensor)
        mean, var = self.mean, self.square / divisor
        old_mean, old_var = self.kept["running_mean"].double(), self.kept["running_var"].double()
        self.norm.running_mean.copy_(mean)
        self.norm.running_var.copy_(var)
        if self.norm.num_batches_tracked is not None:
            self.norm.num_batches_tracked.fill_(self.num_calls)
        eps = self.norm.eps or 0.0
        shift = (mean - old_mean).abs() / (var + eps).sqrt()
        ratio = (var + eps) / (old_var + eps)
        return Remeasured(self.name, describe(self.norm), float(shift.max()), (float(ratio.min()), float(ratio.max())))


def _meters(model: nn.Module) -> tuple[list[_Meter], tuple[str, ...]]:
    meters, left = [], []
    found = {site.module for site in norms(model)}
    for name, module in model.named_modules():
        if module not in found or getattr(module, "running_mean", None) is None:
            continue
        why = _why_left(module)
        if why:
            left.append(f"{name or 'the model'} ({type(module).__name__}) {why}")
            continue
        couples = module.couples_batch if isinstance(module, Norm) else not isinstance(module, TorchInstanceNorm)
        meters.append(_Meter(name, module, getattr(module, "unbiased", True), couples, module.momentum))
    return meters, tuple(left)


def _group(norm: nn.Module) -> Any:
    """The processes that a norm measures together with; None for this one alone."""
    if isinstance(norm, nn.SyncBatchNorm) and dist.is_available() and dist.is_initialized():
        return norm.process_group or dist.group.WORLD
    return getattr(norm, "process_group", None)


def _why_left(module: nn.Module) -> str:
    if getattr(module, "frozen", False):
        return "is frozen"
    if not getattr(module, "track_running_stats", True):
        return "does not track statistics"
    if isinstance(module, (BatchRenorm, PowerNorm)):
        return "normalizes by its running statistics in training"
    if set(dict(module.named_buffers(recurse=False))) - _STATISTICS:
        return "remembers more than mean and variance"
    return ""


@contextmanager
def _measuring(model: nn.Module, meters: list[_Meter]) -> Iterator[None]:
    """Only the norms are in training mode; modes, momentum and, after an error, statistics are put back."""
    modes = {module: module.training for module in model.modules()}
    handles = []
    try:
        model.eval()
        for meter in meters:
            norm = meter.norm
            norm.training = True
            meter.kept = {
                name: value.clone() for name, value in norm.named_buffers(recurse=False) if name in _STATISTICS
            }
            handles.append(norm.register_forward_pre_hook(meter.before, with_kwargs=True))
            handles.append(norm.register_forward_hook(meter.after, with_kwargs=True))
        yield
    except BaseException:
        for meter in meters:
            for name, value in meter.kept.items():
                getattr(meter.norm, name).copy_(value)
        raise
    finally:
        for handle in handles:
            handle.remove()
        for meter in meters:
            meter.norm.momentum = meter.momentum
        for module, training in modes.items():
            module.training = training


def _call(model: nn.Module, batch: Any) -> object:
    device = next((parameter.device for parameter in model.parameters()), None)

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) and device is not None else value

    if isinstance(batch, dict):
        return model(**{name: moved(value) for name, value in batch.items()})
    return model(moved(batch[0] if isinstance(batch, (tuple, list)) else batch))
