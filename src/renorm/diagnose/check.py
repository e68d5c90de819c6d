"""`check`: one batch, before training, and everything that is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from renorm.diagnose import rules as _rules  # noqa: F401 (fills the catalogue)
from renorm.diagnose.catalogue import RULES
from renorm.diagnose.evidence import gather, preserved
from renorm.diagnose.finding import Finding, Report, ordered
from renorm.diagnose.rules.words import came, no_optimizer
from renorm.errors import RuleError

__all__ = ["check"]

SYMPTOMS = ("C00", "C11", "C11b")  # told behind what causes them


def check(
    model: nn.Module,
    loss: Callable[..., Tensor] | None = None,
    optimizer: Optimizer | None = None,
    batch: Any = None,
    loader: Iterable[Any] | None = None,
    *,
    ignore: Collection[str] = (),
    include: Collection[str] = (),
) -> Report:
    """Look for mistakes on one batch, before training: values first, then the module to blame.

    Args:
        model: any module, as it will be trained: in training mode.
        loss: of (output, target), or of the output alone where the batch has no target. None where the model returns
            its loss, as a number or in ``output.loss``.
        optimizer: as it will be used.
        batch: what the loader gives: (x, y); (x1, x2, ..., y) or ((x1, x2), y) for several inputs; a dict of the
            model's arguments, and of the target, named "label", "target", "y" or alike. A model that returns its loss
            may take all of it.
        loader: gives the batch where there is none, and the size of the last one.
        ignore: ids or slugs of rules to leave out.
        include: ids or slugs of rules that are left out otherwise, since they take long: ``include=("C29",)`` trains
            200 steps on the batch.

    Nothing stays changed: parameters, buffers, gradients, modes and random numbers are put back bit for bit. What the
    model or the loss raises is a finding. A rule that fails itself is named in ``report.failures``.

    Raises RuleError without a batch, for an unknown rule in `ignore` or `include`, for a loss or an optimizer that is a
    class, an optimizer that is none, and for a model with lazy layers that were not run yet.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.Softmax(1))
    >>> report = check(model, nn.CrossEntropyLoss(), batch=(torch.randn(8, 4), torch.randint(3, (8,))))
    >>> [finding.slug for finding in report.errors]
    ['softmax-before-cross-entropy']
    """
    unknown = {*ignore, *include} - {name for rule in RULES.values() for name in (rule.id, rule.slug)}
    if unknown:
        raise RuleError(f"there is no rule {', '.join(sorted(unknown))}: see renorm.diagnose.RULES")
    if isinstance(loss, type):
        raise RuleError(f"loss must be a function of (output, target); got {came(loss)}: write {loss.__name__}()")
    if optimizer is not None and (isinstance(optimizer, type) or not hasattr(optimizer, "param_groups")):
        batches = "" if isinstance(optimizer, type) else ", and a batch as batch=(x, y)"
        raise RuleError(f"optimizer must be a torch.optim.Optimizer; {no_optimizer(optimizer)}{batches}")
    inner = _unwrapped(model)
    if any(nn.parameter.is_lazy(tensor) for tensor in (*inner.parameters(), *inner.buffers())):
        raise RuleError("check needs a model whose layers have their shapes: run it once on a batch, model(x), before")
    findings: list[Finding] = []
    failures: list[str] = []
    with preserved(inner, loss, batch), _rewound(loader):
        evidence = gather(inner, loss, optimizer, batch, loader)
        for rule in sorted(RULES.values(), key=lambda rule: (rule.id in SYMPTOMS, rule.id)):
            names = {rule.id, rule.slug}
            if rule.when == "check" and not names & set(ignore) and (not rule.opt_in or names & set(include)):
                try:
                    findings += [Finding.of(rule, found) for found in rule.find(evidence)]
                except (Exception, SystemExit) as error:  # one rule's bug must not cost the others' findings
                    said = " ".join(str(error).split())[:300]
                    failures.append(f"rule {rule.id} ({rule.slug}) failed: {type(error).__name__}: {said}")
    return Report(ordered(findings), tuple(failures), inner, optimizer)


@contextmanager
def _rewound(loader: Any) -> Iterator[None]:
    """A loader with a generator of its own shuffles afterwards as it would have."""
    own = (getattr(part, "generator", None) for part in (loader, getattr(loader, "sampler", None)))
    states = [(generator, generator.get_state()) for generator in own if isinstance(generator, torch.Generator)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and DistributedDataParallel's wrappers, which a check goes around."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model
