"""Replace the norms of a model by others: ``swap(model, "batch -> group(32)")``."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from renorm.errors import SwapError
from renorm.norms import named, zoo
from renorm.norms.named import NormName
from renorm.surgery.find import Site, describe, norms, refuse_lazy, refuse_parallel

__all__ = ["Change", "SwapReport", "swap"]

Rule = str | Mapping[str, str] | Callable[[str, nn.Module], nn.Module | None]

_RANKED: dict[str, dict[str, type[nn.Module]]] = {
    "batch": {"1d": zoo.BatchNorm1d, "2d": zoo.BatchNorm2d, "3d": zoo.BatchNorm3d},
    "instance": {"1d": zoo.InstanceNorm1d, "2d": zoo.InstanceNorm2d, "3d": zoo.InstanceNorm3d},
    "switch": {"1d": zoo.SwitchNorm1d, "2d": zoo.SwitchNorm2d, "3d": zoo.SwitchNorm3d},
}
_STATE = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Change:
    """What became of one norm."""

    name: str  # where it is in the model, as in named_modules()
    before: str  # the norm that was there
    after: str  # the one that is there now; "" where it was left alone
    note: str = ""  # what is worth knowing: groups that do not divide, a subclass left alone

    def __str__(self) -> str:
        done = f"{self.before} -> {self.after}" if self.after else f"{self.before} left alone"
        return f"{self.name or '(the model)'}: {done}" + (f" ({self.note})" if self.note else "")


@dataclass(frozen=True)
class SwapReport:
    """What `swap` did."""

    changes: tuple[Change, ...]  # the norms that were replaced
    left: tuple[Change, ...]  # the norms that the rule names and that were not

    def __str__(self) -> str:
        head = f"{len(self.changes)} replaced, {len(self.left)} left alone"
        return "\n".join([head, *(f"  {change}" for change in self.changes + self.left)])


def swap(model: nn.Module, rule: Rule) -> tuple[nn.Module, SwapReport]:
    """A copy of `model` with its norms replaced, and what changed where; `model` itself is untouched.

    Args:
        model: any module; the norms of torch.nn and of renorm are found in it.
        rule: ``"batch -> group(32)"``, several separated by ``;``; the same as a mapping, ``{"batch": "group(32)"}``;
            or a function of (name, norm) that returns the new module, or None to leave the norm. On the left stands
            batch, layer, instance, group, rms, switch or any, on the right what `renorm.norms.named` reads.

    Learnt weight and bias are carried over where both norms have them, running statistics between norms that keep
    them; eps, device, dtype, training mode and requires_grad stay. A number of groups that does not divide the
    channels becomes the largest smaller one that does, and the report says so. A subclass, which may do more than
    normalize (timm's BatchNormAct2d also activates), is left alone and reported: replace it with a function.

    Raises SwapError where the rule cannot be read, matches nothing, a norm has no shape yet, or the model is
    DistributedDataParallel; UnknownNormError and PatternError for its right side.

    >>> model, report = swap(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), "batch -> group(3)")
    >>> print(report)
    1 replaced, 0 left alone
      1: BatchNorm2d -> GroupNorm(2, 8) (3 groups do not divide 8 channels: 2 instead)
    """
    if not isinstance(model, nn.Module):
        raise SwapError(f"norms are swapped in a torch.nn.Module; got {model!r}")
    refuse_lazy(model)
    refuse_parallel(model)
    model = copy.deepcopy(model)
    sites = list(norms(model))
    choose = _by_function(rule) if callable(rule) else _by_name(_read(rule))
    changes: list[Change] = []
    left: list[Change] = []
    made: dict[nn.Module, tuple[nn.Module, str] | None] = {}  # a norm in two places stays one
    for site in sites:
        if site.module not in made:
            made[site.module] = choose(site)
        chosen = made[site.module]
        if chosen is None:
            continue
        new, note = chosen
        if new is site.module:
            left.append(Change(site.name, describe(new), "", note))
            continue
        note = "; ".join(filter(None, [note, _leave_fast_path(model, site.name, new)]))
        changes.append(Change(site.name, describe(site.module), describe(new), note))
        model = _put(model, site.name, new.train(site.module.training))
    if not changes:
        raise SwapError(_nothing(rule, sites, left))
    return model, SwapReport(tuple(changes), tuple(left))


_Choice = Callable[[Site], tuple[nn.Module, str] | None]


def _by_function(rule: Callable[[str, nn.Module], nn.Module | None]) -> _Choice:
    def choose(site: Site) -> tuple[nn.Module, str] | None:
        new = rule(site.name, site.module)
        if new is not None and not isinstance(new, nn.Module):
            raise SwapError(f"a rule must return a module or None; for {site.name!r} it returned {new!r}")
        return None if new is None or new is site.module else (new, "")

    return choose


def _by_name(rules: tuple[tuple[str, NormName], ...]) -> _Choice:
    def choose(site: Site) -> tuple[nn.Module, str] | None:
        for source, target in rules:
            if source in ("any", site.kind):
                if not site.exact:
                    return site.module, f"{type(site.module).__name__} may do more than normalize"
                return _build(site, target)
        return None

    return choose


def _read(rule: str | Mapping[str, str]) -> tuple[tuple[str, NormName], ...]:
    if isinstance(rule, str):
        parts = [part.split("->") for part in rule.split(";") if part.strip()]
        if not parts or any(len(part) != 2 for part in parts):
            raise SwapError(f"a rule reads 'batch -> group(32)', several separated by ';'; got {rule!r}")
        pairs = [(left.strip(), right.strip()) for left, right in parts]
    elif isinstance(rule, Mapping):
        pairs = list(rule.items())
    else:
        raise SwapError(
            "a rule is text such as 'batch -> group(32)', a mapping of such pairs, or a function of (name, norm); got "
            f"{rule!r}"
        )
    sources = ("any", *named.KINDS[1:])
    for source, _ in pairs:
        if source not in sources:
            close = difflib.get_close_matches(str(source), sources, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise SwapError(f"the left side of a rule is one of {', '.join(sources)}; got {source!r}{hint}")
    return tuple((source, named.parse(target)) for source, target in pairs)


def _build(site: Site, target: NormName) -> tuple[nn.Module, str]:
    """The norm called `target` for the place of `site`, with what the old one has learnt, and a note."""
    old = site.module
    if not site.num_features and target.kind != "none":
        raise SwapError(
            f"{site.name or 'the model'} ({describe(old)}) does not say how many channels it has: give a function of "
            "(name, norm) for a pattern without an axis c"
        )
    tensors = [t for t in (*old.parameters(recurse=False), *old.buffers(recurse=False)) if t.is_floating_point()]
    has_weight, has_bias = (getattr(old, name, None) is not None for name in ("weight", "bias"))
    options = {
        "affine": has_weight,
        "bias": has_bias,
        "eps": getattr(old, "eps", None),
        "device": tensors[0].device if tensors else None,
        "dtype": tensors[0].dtype if tensors else None,
    }
    options = {name: value for name, value in options.items() if value is not None}
    ranked = _RANKED.get(target.kind, {}).get(site.rank)
    if ranked is None:
        new = named.build(target, site.num_features, axis=site.axis, positions=site.rank != "1d", **options)  # type: ignore[arg-type]
    else:
        if target.kind == "switch":
            del options["bias"]
        new = ranked(site.num_features, **options)
    return new, _carry(old, new) or _group_note(site, target)


def _carry(old: nn.Module, new: nn.Module) -> str:
    """Put what `old` has learnt into `new`; what could not go is said."""
    lost = []
    for name in ("weight", "bias"):
        here, there = getattr(old, name, None), getattr(new, name, None)
        if here is not None and there is not None and here.shape == there.shape:
            setattr(new, name, here)  # the parameter itself: ties and requires_grad stay
        elif here is not None and not isinstance(new, nn.Identity):
            lost.append(name)
    if all(getattr(module, "running_mean", None) is not None for module in (old, new)):
        with torch.no_grad():
            for name in _STATE:
                getattr(new, name).copy_(getattr(old, name))
    if hasattr(old, "momentum") and hasattr(new, "momentum"):
        new.momentum = old.momentum
    return f"{' and '.join(lost)} not carried over" if lost else ""


def _group_note(site: Site, target: NormName) -> str:
    groups = named.divisor(site.num_features, target.groups)
    if target.kind != "group" or groups == target.groups:
        return ""
    return f"{target.groups} groups do not divide {site.num_features} channels: {groups} instead"


def _leave_fast_path(model: nn.Module, name: str, new: nn.Module) -> str:
    """Keep torch's fused encoder layer from reading a new norm's weights as a layer norm's.

    In evaluation `nn.TransformerEncoderLayer` passes norm1 and norm2's weights to a kernel that computes layer norm,
    whatever those modules are.
    """
    parent = model.get_submodule(name.rpartition(".")[0])
    if not isinstance(parent, nn.TransformerEncoderLayer) or isinstance(new, nn.LayerNorm):
        return ""
    parent.activation_relu_or_gelu = 0  # the one of the fast path's conditions that changes nothing else
    return "torch's fused encoder layer switched off: it computes layer norm whatever stands here"


def _put(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    if not name:
        return new
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)
    return model


def _nothing(rule: Rule, sites: list[Site], left: list[Change]) -> str:
    if left:
        names = ", ".join(f"{change.name} ({change.before})" for change in left)
        return f"nothing was replaced: {names} may do more than normalize; give a function of (name, norm) for those"
    what = f"the rule {rule!r} matches no norm" if not callable(rule) else "the function replaced no norm"
    there = ", ".join(f"{site.name or '(the model)'} ({site.kind})" for site in sites)
    return f"{what} of the model; it has {there or 'no norms at all'}"
