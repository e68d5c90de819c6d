"""The samples that a model is worst at, each with the training examples that look most like it to the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from renorm.diagnose.cases import Case, Neighbor, WorstCases, png
from renorm.diagnose.evidence import Run, forward, mapped, parted
from renorm.diagnose.rules.calls import REGRESSION
from renorm.diagnose.rules.labels import broadcast, of_one_shape
from renorm.diagnose.rules.words import shown
from renorm.diagnose.trace import Node, tensors_in
from renorm.errors import RuleError

__all__ = ["Case", "Neighbor", "WorstCases", "png", "worst_cases"]

Task = Literal["classes", "labels", "numbers"]
Metric = Literal["cosine", "euclidean"]
_BATCH = 256
# What compares entry by entry, and broadcasts.
ELEMENTWISE = (*REGRESSION, "kl_div", "poisson_nll_loss", "gaussian_nll_loss", "soft_margin_loss")
DIFFERENCES = ("sub", "__sub__", "rsub", "__rsub__")


def worst_cases(
    model: nn.Module,
    loss_per_sample: Callable[..., Tensor],
    data: Any,
    k: int = 10,
    train: Any = None,
    *,
    neighbors: int = 3,
    metric: Metric = "cosine",
    classes: Sequence[str] = (),
    batch_size: int = _BATCH,
) -> WorstCases:
    """The `k` samples with the highest loss, and the training examples that are nearest to each.

    Args:
        model: as it was trained; it runs in evaluation mode, and is in its own modes again afterwards.
        loss_per_sample: of (output, target), a loss for each sample, such as
            ``torch.nn.CrossEntropyLoss(reduction="none")``; of further dimensions the mean is taken.
        data: a loader, a data set, (x, y) as tensors, or batches as the loader gives them. A loader that shuffles is
            gone through in order, so that ``index`` is that of its data set.
        k: how many.
        train: the training data, in any of these forms; None for no neighbours.
        neighbors: how many of each case. Where `train` is `data`, a sample is no neighbour of itself.
        metric: ``"cosine"`` or ``"euclidean"``, between the inputs of the last linear layer that runs (of a sequence or
            an image, their means), or between the outputs of a model without one.
        classes: names, for the text.
        batch_size: of data that comes without.

    Raises RuleError where the loss is one number for all or broadcasts outputs against the targets of other samples,
    the model or the loss fails, `classes` are fewer than the model's, or there is no sample.

    >>> import torch
    >>> x, y = torch.tensor([[-2.0], [-1.0], [1.0], [3.0]]), torch.tensor([0, 0, 1, 0])
    >>> model = nn.Linear(1, 2)
    >>> _ = model.load_state_dict({"weight": torch.tensor([[-1.0], [1.0]]), "bias": torch.zeros(2)})
    >>> loss = nn.CrossEntropyLoss(reduction="none")
    >>> print(worst_cases(model, loss, (x, y), k=1, train=(x[:3], y[:3]), neighbors=2, metric="euclidean"))
    1 worst of 4 samples, 96% of the loss of all (mean loss 1.569)
      3: loss 6.002: predicted 1 with confidence 1.00, target 0
          nearest in training: 1 (2, 2), 0 (1, 4)
          1 of the 2 nearest training examples have its class: between classes
    """
    if k < 1 or neighbors < 0 or metric not in ("cosine", "euclidean"):
        raise RuleError(
            f"k is 1 or more, neighbors 0 or more and metric cosine or euclidean; got {k}, {neighbors}, {metric!r}"
        )
    wanted = neighbors if train is not None else 0
    with _evaluating(model):
        worst = _worst(model, loss_per_sample, data, k, batch_size, len(classes))
        if not worst.num:
            raise RuleError("worst_cases needs at least one sample; the data is empty")
        cases = [case for case, _ in worst.found]
        if wanted:
            near = _nearest(model, train, worst, wanted, metric, batch_size, same=train is data)
            cases = [replace(case, neighbors=tuple(known)) for case, known in zip(cases, near, strict=True)]
    return WorstCases(tuple(cases), worst.num, worst.total / worst.num, tuple(classes))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _batches(data: Any, size: int) -> Iterator[Any]:
    """The data in its order, in batches as a loader gives them."""
    if isinstance(data, (tuple, list)) and data and all(isinstance(part, Tensor) for part in data):
        if len({len(part) for part in data}) > 1:
            sizes = " and ".join(str(len(part)) for part in data)
            raise RuleError(f"tensors of data must have the same number of samples; got {sizes}")
        data = TensorDataset(*data)
    alone = torch.Generator().manual_seed(0)  # a loader draws a seed, from the user's random numbers otherwise
    if isinstance(data, DataLoader):
        if isinstance(data.dataset, IterableDataset) or data.batch_size is None:
            yield from data
            return
        collate, workers = data.collate_fn, data.num_workers
        yield from DataLoader(data.dataset, data.batch_size, collate_fn=collate, num_workers=workers, generator=alone)
    elif isinstance(data, Dataset):
        yield from DataLoader(data, size, generator=alone)
    else:
        yield from data


@dataclass(frozen=True)
class _Seen:
    """A batch, and what the model made of it."""

    run: Run
    num: int  # of samples
    output: Tensor  # (N, ...), the classes in dimension 1
    targets: Tensor | None  # (N, ...)
    task: Task

    @property
    def num_classes(self) -> int:
        """How many classes there are; 0 where the output means something else."""
        if self.task == "classes":
            return self.output.shape[1] if self.output.dim() > 1 else 0
        return 2 if self.task == "labels" and self.output[0].numel() == 1 else 0

    def input(self, i: int) -> Any:
        """One sample, without the batch dimension."""

        def of(tensor: Tensor) -> Tensor:
            return tensor[i].detach().cpu() if tensor.dim() > 0 and len(tensor) == self.num else tensor.detach().cpu()

        found = mapped(self.run.inputs, of)
        return found[0] if isinstance(found, list) and len(found) == 1 else found

    def target(self, i: int) -> Any:
        """One target: a class, the list of labels, a number, or a tensor."""
        if self.targets is None:
            return None
        target = self.targets[i].detach().cpu()
        if self.task == "classes" and target.is_floating_point() and target.shape == self.output.shape[1:]:
            return _plain(target.argmax(0))  # probabilities of the classes
        if self.task == "labels" and target.numel() == 1:
            return int(target.reshape(()) > 0.5)
        if self.task == "labels" and target.dim() == 1:
            return torch.nonzero(target > 0.5).flatten().tolist()
        return _plain(target)


@dataclass(frozen=True)
class _Worst:
    """The worst samples with their representations."""

    found: list[tuple[Case, Tensor]]
    task: Task
    num: int  # of samples that were looked at
    total: float  # of their losses


def _see(model: nn.Module, loss: Callable[..., Tensor] | None, batch: Any, task: Task | None = None) -> _Seen:
    """The model on a batch, on the model's device."""
    weight = next(iter([*model.parameters(), *model.buffers()]), None)
    inputs, target = parted(batch)
    if target is None and isinstance(inputs, Mapping):  # of the model's arguments, as transformers write it
        target = inputs.get("labels")
    if weight is not None:
        inputs, target = (mapped(part, lambda tensor: tensor.to(weight.device)) for part in (inputs, target))
    run = forward(model, loss, inputs, target)
    if run.error is not None:
        what = "the model" if run.stage == "model" else "loss_per_sample"
        raise RuleError(
            f"{what} must run on the data; it raised {type(run.error).__name__}: {run.error}"
        ) from run.error
    num = len(next((tensor for tensor in tensors_in(inputs) if tensor.dim() > 0), ()))
    # What the loss was given has its classes in dimension 1, whatever the model calls its output.
    calls = [call.input for call in run.trace.losses()]
    output = next((x for x in (*calls, *run.outputs) if x.dim() > 0 and len(x) == num), None)
    if output is None:
        raise RuleError(f"the model must return a tensor with a row for each of the {num} samples")
    targets = next((x for x in tensors_in(target) if x.dim() > 0 and len(x) == num), None)
    of_the_model = all(output is not x for x in calls)
    if of_the_model and targets is not None and output.dim() > 2 and output.shape[:-1] == targets.shape:
        output = output.movedim(-1, 1)
    return _Seen(run, num, output.detach().float(), targets, task or _task(run, output, targets))


def _task(run: Run, output: Tensor, targets: Tensor | None) -> Task:
    """What the output means: from the loss that was called, else from the target."""
    kinds = {call.kind for call in run.trace.losses()}
    if kinds & {"cross_entropy", "nll_loss", "multi_margin_loss"}:
        return "classes"
    if kinds & {"binary_cross_entropy", "binary_cross_entropy_with_logits", "multilabel_soft_margin_loss"}:
        return "labels"
    if kinds or targets is None or targets.is_floating_point():
        return "numbers"
    return "classes" if output.dim() == targets.dim() + 1 else "numbers"


def _worst(model: nn.Module, loss: Callable[..., Tensor], data: Any, k: int, size: int, named: int) -> _Worst:
    found: list[tuple[Case, Tensor]] = []
    task: Task | None = None
    num, total = 0, 0.0
    for batch in _batches(data, size):
        seen = _see(model, loss, batch, task)
        task = seen.task
        if 0 < named < seen.num_classes:
            raise RuleError(f"classes must name all {seen.num_classes} classes of the model; got {named}")
        losses = seen.run.loss
        if losses is None or losses.dim() == 0 or len(losses) % seen.num:
            nothing = seen.run.untensored or "nothing"
            shape = nothing if losses is None else "one number" if losses.dim() == 0 else f"{tuple(losses.shape)}"
            raise RuleError(
                f"loss_per_sample must return a loss for each of the {seen.num} samples; it returned {shape}: write "
                'reduction="none"'
            )
        _each_its_own(seen)
        losses = losses.detach().double().reshape(seen.num, -1).mean(1)
        # A sample whose loss is no number is worse than any.
        order = losses.nan_to_num(nan=float("inf")).argsort(descending=True, stable=True)[:k].tolist()
        hidden = _hidden(seen)
        found += [(_case(seen, i, num + i, float(losses[i])), hidden[i].float().cpu()) for i in order]
        found.sort(key=lambda pair: float("-inf") if math.isnan(pair[0].loss) else -pair[0].loss)
        found = found[:k]
        num, total = num + seen.num, total + float(losses.sum())
    return _Worst(found, task or "numbers", num, total)


def _each_its_own(seen: _Seen) -> None:
    """Raise where an output is compared with the targets of other samples, whose losses the mean would hide."""
    trace, targets = seen.run.trace, {id(x) for x in tensors_in(seen.run.target)}
    pairs = [(call.input, call.target) for call in trace.losses() if call.kind in ELEMENTWISE]
    for node in trace.of_kind(*DIFFERENCES):
        one, other = node.inputs if len(node.inputs) == 2 else (None, None)
        if one is None or other is None or one.numel() != other.numel():
            continue
        if id(one) in targets:
            one, other = other, one
        if id(other) in targets and trace.maker(one) is not None:
            pairs.append((one, other))
    for output, target in pairs:
        shapes = tuple(output.shape), tuple(target.shape)
        together = broadcast(*shapes)
        if together is not None:
            raise RuleError(
                f"loss_per_sample must compare each output with its own target; output {shown(shapes[0])} and target "
                f"{shown(shapes[1])} are broadcast to {shown(together)}: write {of_one_shape(*shapes)}"
            )


def _case(seen: _Seen, i: int, index: int, loss: float) -> Case:
    output, target = seen.output[i].cpu(), seen.target(i)
    confidence: float | None = None
    error: float | None = None
    prediction: Any
    if seen.task == "classes":
        p = output if _is_distribution(output) else output.softmax(0)
        prediction, confidence = _plain(p.argmax(0)), float(p.amax(0).mean())
    elif seen.task == "labels":
        probabilities = "binary_cross_entropy" in {call.kind for call in seen.run.trace.losses()}
        p = output if probabilities else output.sigmoid()
        confidence = float(torch.maximum(p, 1 - p).mean())
        prediction = (p > 0.5).long()
        if p.numel() == 1:
            prediction = int(prediction.reshape(()))
        elif p.dim() == 1:
            prediction = torch.nonzero(prediction).flatten().tolist()
    else:
        prediction = _plain(output)
        targets = None if seen.targets is None else seen.targets[i].detach().cpu()
        if targets is not None and targets.numel() == output.numel():
            error = float((output.reshape(-1) - targets.reshape(-1).float()).abs().mean())
    return Case(index, loss, confidence, error, prediction, target, seen.input(i))


def _is_distribution(p: Tensor) -> bool:
    return bool((p >= 0).all() and ((p.sum(0) - 1).abs() < 1e-4).all())


def _plain(value: Any) -> Any:
    """A number for a tensor with one entry."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        return value
    number = value.reshape(()).item()
    return int(number) if isinstance(number, bool) else number


# Neighbours


def _hidden(seen: _Seen) -> Tensor:
    """What went into the last linear layer, (N, D); without one, what came out of the model."""
    outputs = [x for x in seen.run.outputs if x.dim() > 0 and len(x) == seen.num]
    head = _head(seen.run.trace.maker(outputs[0])) if outputs else None
    x = head.inputs[0].detach() if head is not None else seen.output
    if x.dim() == 0 or len(x) % seen.num:  # the samples cannot be told apart
        x, head = seen.output, None
    if len(x) != seen.num:  # the tokens of all samples in one dimension
        x = x.reshape(seen.num, len(x) // seen.num, -1)
    if x.dim() < 3:
        return x.reshape(seen.num, -1)
    return x.flatten(2).mean(2) if head is not None and head.kind == "conv" else x.flatten(1, -2).mean(1)


def _head(node: Node | None) -> Node | None:
    """The last linear layer or convolution on the way to the output."""
    waiting, seen = [node], set[int]()
    while waiting:
        current = waiting.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if current.kind in ("linear", "conv") and current.inputs:
            return current
        waiting += current.sources
    return None


def _nearest(
    model: nn.Module, train: Any, worst: _Worst, count: int, metric: Metric, size: int, *, same: bool
) -> list[list[Neighbor]]:
    """The `count` nearest training examples of each case; only these are kept on the way."""
    queries = _placed(torch.stack([hidden for _, hidden in worst.found]), metric)
    indices = torch.tensor([case.index for case, _ in worst.found])
    nearest: list[list[Neighbor]] = [[] for _ in worst.found]
    num = 0
    for batch in _batches(train, size):
        seen = _see(model, None, batch, worst.task)
        distances = torch.cdist(queries, _placed(_hidden(seen).float().cpu(), metric))
        if metric == "cosine":
            distances = distances.square() / 2  # of vectors of length 1: 1 - cosine
        if same:
            distances = distances.masked_fill(indices[:, None] == torch.arange(num, num + seen.num), float("inf"))
        close, places = distances.topk(min(count, seen.num), largest=False)
        for known, near, of in zip(nearest, close.tolist(), places.tolist(), strict=True):
            for distance, i in zip(near, of, strict=True):
                if distance < (known[count - 1].distance if len(known) >= count else float("inf")):
                    known.append(Neighbor(num + i, distance, seen.target(i), seen.input(i)))
                    known.sort(key=lambda neighbor: neighbor.distance)
                    del known[count:]
        num += seen.num
    return nearest


def _placed(hidden: Tensor, metric: Metric) -> Tensor:
    return nn.functional.normalize(hidden, dim=1) if metric == "cosine" else hidden
