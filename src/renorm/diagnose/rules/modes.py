"""Rules about training and evaluation mode."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from renorm.diagnose.catalogue import Found, Mended, rule
from renorm.diagnose.evidence import Evidence, Run
from renorm.diagnose.rules.dropout import (
    DROPOUTS,
    without_dropout,
)
from renorm.diagnose.rules.parameters import apart
from renorm.diagnose.rules.statistics import norm_calls, over_channels
from renorm.diagnose.rules.words import called, listed, path
from renorm.diagnose.trace import Node
from renorm.norms.norm import Norm

MODES = """
model = nn.Sequential(nn.Linear(8, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 4)){}
loss = nn.CrossEntropyLoss()
batch = torch.randn(64, 8), torch.randint(4, (64,))
"""


@rule(
    "C23",
    "training-in-eval-mode",
    "warning",
    title="Layers that are trained, in evaluation mode",
    why="In evaluation mode dropout does nothing and batch norms use running statistics that never move: of a fresh "
    "model 0 and 1, so that nothing is normalized. A validation loop or from_pretrained leaves models so.",
    fix="model.train() in front of the training loop.",
    source="Lightning #20105, chemprop #952: modules left in evaluation mode",
    bad=MODES.format(".eval()"),
    good=MODES.format(""),
)
def training_in_eval_mode(evidence: Evidence) -> Iterator[Found]:
    """The outputs differ in training mode, and gradients reach what is there.

    Batch norms that were put into evaluation mode one by one, with statistics to go by, are frozen on purpose, and so
    is dropout.
    """
    if evidence.run.error is not None or (evidence.loss_function is None and evidence.optimizer is None):
        return
    learnt = learning(evidence)
    found: list[tuple[str, list[str]]] = []
    for name, module in outermost(evidence.model):
        single = next(module.children(), None) is None and name != ""
        inside = [
            f"{name}.{inner}" if name and inner else name or inner
            for inner, leaf in module.named_modules()
            if differs(leaf) and not leaf.training and (not single or unmoved(leaf))
        ]
        if inside and any(id(p) in learnt for p in module.parameters()):
            found.append((name, inside))
    if not found:
        return
    names = [name for name, _ in found]

    def wake(model: nn.Module) -> None:
        for name in names:
            model.get_submodule(name).train()

    as_given, awake = evidence.again(), evidence.again(change=wake)
    if as_given.error is not None or awake.error is not None or same(as_given, awake):
        return
    for name, inside in found:
        whole = f"{path(name)}.train()"
        yield Found(
            f"{name or 'the model'} is in evaluation mode, and its parameters are trained: {listed(inside)} "
            f"{'behaves' if len(inside) == 1 else 'behave'} otherwise in training",
            module=name,
            fix=whole,
            mend=partial(_awake, name=name),
        )


def _awake(model: nn.Module, optimizer: Optimizer | None, *, name: str) -> Mended:
    model.get_submodule(name).train()
    return Mended(model, optimizer, f"{name or 'the model'}: .train()")


def outermost(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules in evaluation mode that are in none, and are so throughout."""
    if not model.training and not any(module.training for module in model.modules()):
        yield name, model
        return
    for inner, child in model.named_children():
        yield from outermost(child, f"{name}.{inner}" if name else inner)


def differs(module: nn.Module) -> bool:
    """Whether a layer does something else in training mode."""
    if isinstance(module, Norm):
        return module.running_mean is not None and not module.frozen
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return module.running_mean is not None
    dropout = getattr(module, "dropout", 0.0)  # of an RNN or an attention
    if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
        return isinstance(dropout, float) and dropout > 0
    return isinstance(module, DROPOUTS) and module.p > 0


def unmoved(module: nn.Module) -> bool:
    """Whether running statistics are where they start."""
    batches = getattr(module, "num_batches_tracked", None)
    mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    if not isinstance(mean, Tensor) or not isinstance(var, Tensor):
        return False
    fresh = bool((mean == 0).all()) and bool((var == 1).all())
    return fresh and (batches is None or int(batches) == 0)


def learning(evidence: Evidence) -> set[int]:
    """The ids of the parameters that are trained: in the optimizer and with a gradient, where there are any."""
    owned: set[int] | None = None
    if evidence.optimizer is not None:
        owned = {id(p) for group in evidence.optimizer.param_groups for p in group["params"]}
    gradients = evidence.gradients
    return {
        id(p)
        for name, p in evidence.model.named_parameters()
        if p.requires_grad and (owned is None or id(p) in owned) and (not gradients or gradients.get(name) is not None)
    }


def same(one: Run, other: Run) -> bool:
    """Whether two runs gave the same, but for rounding."""
    if len(one.outputs) != len(other.outputs) or not one.outputs:
        return False
    return all(distance(x, y) < 1e-4 for x, y in zip(one.outputs, other.outputs, strict=True))


def distance(x: Tensor, y: Tensor) -> float:
    """The difference's norm over that of `y`."""
    if x.shape != y.shape:
        return math.inf
    if not x.is_floating_point():
        return 0.0 if torch.equal(x, y) else math.inf
    x, y = x.detach().float(), y.detach().float()
    return float((x - y).norm() / y.norm().clamp(min=1e-12))


@rule(
    "C23b",
    "frozen-norm-still-moves",
    "warning",
    title="A frozen batch norm whose statistics still move",
    why="requires_grad=False stops weight and bias. In training mode the layer still normalizes by each batch, and "
    "its running statistics follow the new data: the frozen part is not the one that was trained.",
    fix="renorm.freeze(part) for renorm's norms, or part.eval() behind every model.train().",
    source="measured: running_mean of a batch norm with frozen parameters changes with every forward pass",
    bad=MODES.format("\nmodel[:2].requires_grad_(False)"),
    good=MODES.format("\nmodel[:2].requires_grad_(False).eval()\nmodel[1].num_batches_tracked += 100"),
)
def frozen_norm_still_moves(evidence: Evidence) -> Iterator[Found]:
    """Batch norms by batch statistics with frozen parameters, where something else in the model is trained.

    Where gradients pass through a wholly frozen part on their way to others, as through a discriminator that is not
    being trained just now, it is an info.
    """
    if not any(p.requires_grad for p in evidence.model.parameters()):
        return
    frozen: dict[bool, list[str]] = {}
    for call in norm_calls(evidence.trace):
        module = call.node.module
        own = [] if module is None else list(module.parameters(recurse=False))
        if not own or not (call.couples_batch and call.measures and call.tracks):
            continue
        if any(p.requires_grad for p in own):
            continue
        source = evidence.trace.maker(call.input)
        before = [] if source is None or source.module is None else list(source.module.parameters(recurse=False))
        alone = bool(before) and all(p.requires_grad for p in before)
        if follows(evidence, call.node.name):
            continue
        frozen.setdefault(call.input.requires_grad and not alone, []).append(call.node.name)
    for passing, names in frozen.items():
        first = names[0]
        ours = all(isinstance(evidence.model.get_submodule(name), Norm) for name in names)
        yield Found(
            f"{listed(names)} {'is' if len(set(names)) == 1 else 'are'} frozen (requires_grad=False) but in training "
            f"mode: normalized by each batch, and running statistics move",
            module=first,
            fix=f"renorm.freeze({path(first)})" if ours else f"{path(first)}.eval()  # behind every model.train()",
            severity="info" if passing else "warning",
            mend=partial(_frozen, names=tuple(dict.fromkeys(names))) if ours else None,
        )


def follows(evidence: Evidence, name: str) -> bool:
    """Whether a module is in a frozen twin of one that learns: a moving average of it has statistics of its own."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        whole = evidence.model.get_submodule(".".join(parts[: i + 1]))
        shapes = [p.shape for p in whole.parameters()]
        for other_name, other in evidence.model.get_submodule(".".join(parts[:i])).named_children():
            twin = list(other.parameters())
            if other is whole or [p.shape for p in twin] != shapes or not any(p.requires_grad for p in twin):
                continue
            same = all(torch.equal(p, q) for p, q in zip(whole.parameters(), twin, strict=True))
            if same or apart(part) or apart(other_name):
                return True
    return False


def _frozen(model: nn.Module, optimizer: Optimizer | None, *, names: tuple[str, ...]) -> Mended:
    for name in names:
        model.get_submodule(name).frozen = True  # type: ignore[assignment]
    return Mended(model, optimizer, f"{listed(names)}: frozen")


@rule(
    "C33",
    "train-eval-gap",
    "warning",
    title="The model is another one in evaluation mode",
    why="Running statistics do not describe this batch: another distribution than they were collected on, a momentum "
    "or batch size that makes them noise, or weights that changed since. Validation is then worse, or better, than "
    "what was trained.",
    fix="Collect the statistics again: torch.optim.swa_utils.update_bn(loader, model) with momentum=None; look at how "
    "training and validation data are prepared.",
    source="TheDeepChecker (Ben Braiek & Khomh 2023): loss within 50 % of each other after 100 steps",
    bad=MODES.format("\nmodel[1].running_mean -= 20\nmodel[1].num_batches_tracked += 100"),
    good=MODES.format("\nfor _ in range(100): model(torch.randn(64, 8))"),
)
def train_eval_gap(evidence: Evidence) -> Iterator[Found]:
    """Loss and outputs differ by more than half, without dropout, with statistics of 100 batches and more."""
    calls = [call for call in norm_calls(evidence.trace) if call.couples_batch and call.measures and call.tracks]
    warmed = [call for call in calls if int(getattr(call.node.module, "num_batches_tracked", None) or 0) >= 100]
    if not warmed or len(warmed) < len(calls) or evidence.loss is None or evidence.run.error is not None:
        return
    if min(call.values for call in warmed) < 16:  # noise, of which few-values-per-channel tells
        return
    by_batch, by_running = evidence.again(change=without_dropout), evidence.again(training=False)
    if by_batch.loss is None or by_running.loss is None or not by_batch.outputs or not by_running.outputs:
        return
    trained, evaluated = float(by_batch.loss), float(by_running.loss)
    apart = distance(by_running.outputs[0], by_batch.outputs[0])
    if not math.isfinite(trained + evaluated) or apart < 0.5:
        return
    if abs(evaluated - trained) <= 0.5 * max(abs(trained), 1e-3):
        return
    worst, shift = worst_shift((call.node, *over_channels(call, call.input)) for call in warmed)
    yield Found(
        f"the loss of this batch is {trained:.4g} by its own statistics and {evaluated:.4g} by running ones; furthest "
        f"apart in {called(worst)}, where the means differ by {shift:.2g} standard deviations",
        module=worst.name,
    )


def worst_shift(layers: Iterable[tuple[Node, Tensor, Tensor]]) -> tuple[Node, float]:
    """The norm whose running mean is furthest from the batch's, in deviations of the batch."""
    found = []
    for node, var, mean in layers:
        running = getattr(node.module, "running_mean", None)
        if isinstance(running, Tensor) and running.shape == mean.shape:
            found.append((node, float(((running - mean) / (var + 1e-5).sqrt()).square().mean().sqrt())))
        else:
            found.append((node, 0.0))
    return max(found, key=lambda pair: pair[1])
