"""Rules about what a loss compares with: targets out of range, labels, shapes that are broadcast, sums."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from renorm.diagnose.catalogue import Found, rule
from renorm.diagnose.evidence import Evidence, mapped
from renorm.diagnose.rules.calls import (
    BINARY,
    CLASSES,
    HEAD,
    RANGES,
    REGRESSION,
    YES_NO,
    counted,
    drop,
    given,
    kind_of,
    without,
)
from renorm.diagnose.rules.words import said, shown
from renorm.diagnose.trace import Node, tensors_in


@rule(
    "C07",
    "broadcast-loss",
    "error",
    title="Output and target of a loss differ in shape and are broadcast against each other",
    why="(N, 1) against (N,) compares every output with every target: the best the model can do is their mean.",
    fix="Give both the same shape, as in loss(output.squeeze(1), target).",
    source="torch's UserWarning in mse_loss, which names it likely incorrect",
    bad=BINARY.format("", "nn.MSELoss()", "torch.randn(32)"),
    good=BINARY.format(", nn.Flatten(0)", "nn.MSELoss()", "torch.randn(32)"),
)
def broadcast_loss(evidence: Evidence) -> Iterator[Found]:
    """A regression loss, or a difference of output and target written by hand."""
    pairs = [(call.kind, call.input, call.target) for call in evidence.losses if call.kind in REGRESSION]
    targets = {id(tensor) for tensor in tensors_in(evidence.target)}
    differences = evidence.trace.of_kind("sub", "__sub__", "rsub", "__rsub__")
    pairs += [
        ("a difference", *d.inputs) for d in differences if len(d.inputs) == 2 and targets & set(map(id, d.inputs))
    ]
    pairs += column_and_row(evidence, {id(tensor) for pair in pairs for tensor in pair[1:]})
    for what, one, other in pairs:
        shapes = tuple(one.shape), tuple(other.shape)
        together = broadcast(*shapes)
        if together is not None:
            yield Found(
                f"{what} of output {shown(shapes[0])} and target {shown(shapes[1])}: broadcast to "
                f"{shown(together)}, every output against every target",
                fix=of_one_shape(*shapes),
            )


def broadcast(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of two that are broadcast against each other, where it has more entries than either."""
    if one == other or math.prod(one) <= 1 or math.prod(other) <= 1:
        return None
    try:
        together = tuple(torch.empty(one, device="meta").add(torch.empty(other, device="meta")).shape)
    except RuntimeError:
        return None
    return together if math.prod(together) > max(math.prod(one), math.prod(other)) else None


def of_one_shape(output: tuple[int, ...], target: tuple[int, ...]) -> str:
    """A loss that does not broadcast, as code."""
    axis = next((i for i, size in enumerate(output) if size == 1), -1)
    if len(output) > len(target):
        return f"loss(output.squeeze({axis}), target)"
    return f"loss(output, target.view{shown(output)})"


BY_HAND = ("sub", "__sub__", "rsub", "__rsub__", "mul", "__mul__", "__rmul__")


def column_and_row(evidence: Evidence, known: set[int]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Differences and products of an output (N, 1) and of numbers (N,) of the batch, wherever they are computed."""
    size = evidence.batch_size
    for node in evidence.trace.of_kind(*BY_HAND):
        if len(node.inputs) != 2 or size < 2 or known & set(map(id, node.inputs)):
            continue
        for (one, source), (other, _) in (both := [*zip(node.inputs, node.sources, strict=True)], both[::-1]):
            if tuple(one.shape) != (size, 1) or tuple(other.shape) != (size,):
                continue
            on_purpose = source is not None and source.kind in ("unsqueeze", "__getitem__")  # each with each
            if one.requires_grad and not other.requires_grad and not on_purpose and evidence.blame(other) is None:
                yield ("a product" if "mul" in node.kind else "a difference"), one, other
                return


@rule(
    "C08",
    "target-out-of-range",
    "error",
    title="Targets that the output cannot reach",
    why="What the last activation cannot give is never learnt: its units saturate, and their gradients vanish.",
    fix="Use a linear head, or scale the targets into the activation's range.",
    source="17 of 109 faulty programs in the corpus of UMLAUT and deepmufl; torch takes such targets silently",
    bad=BINARY.format(", nn.Sigmoid()", "nn.MSELoss()", "5 * torch.randn(32, 1)"),
    good=BINARY.format("", "nn.MSELoss()", "5 * torch.randn(32, 1)"),
)
def target_out_of_range(evidence: Evidence) -> Iterator[Found]:
    """More than 1 % of the targets are outside, by more than rounding: an outlier is no mistake."""
    for call in evidence.losses:
        node = evidence.blame(call.input)
        if call.kind in ("binary_cross_entropy_with_logits", "binary_cross_entropy"):
            low, high, by = 0.0, 1.0, call.kind
        elif call.kind in REGRESSION and reach(node) is not None:
            (low, high), by = reach(node) or (0.0, 0.0), said(node)
        else:
            continue
        target = call.target.detach().float()
        margin = 1e-3 * (
            high - low if math.isfinite(high - low) else max(1.0, float(target.abs().max() if target.numel() else 1))
        )
        outside = (target < low - margin) | (target > high + margin)
        matters = counted(evidence, call)
        if matters is not None and matters.shape == outside.shape:
            outside &= matters
        if target.numel() and float(outside.float().mean()) > 0.01:
            a, b = (float(value) for value in target.aminmax())
            inside = f"[{low:g}, {high:g}]" if math.isfinite(high - low) else f"{low:g} and above"
            inside = f"{high:g} and below" if math.isinf(low) else inside
            logits = call.kind not in REGRESSION
            yield Found(
                f"{int(outside.sum())} of {target.numel()} targets are outside of {inside}, which is all that {by} "
                f"{'is made for' if logits else 'gives'} (targets from {a:.3g} to {b:.3g})",
                module=node.name if node and not logits else "",
                fix="# scale the targets to 0 and 1; for real values use torch.nn.MSELoss on the outputs as they are"
                if logits
                else without(node, f"the {kind_of(node)}"),
                mend=None if logits else drop(node),
            )


def reach(node: Node | None) -> tuple[float, float] | None:
    """What a call can give; None where that is everything."""
    if node is None or node.kind not in ("clamp", "clip", "hardtanh", "Hardtanh"):
        return RANGES.get(kind_of(node))
    names = ("min_val", "max_val") if node.kind.lower() == "hardtanh" else ("min", "max")
    if node.module is not None:
        return float(node.module.min_val), float(node.module.max_val)  # type: ignore[arg-type]
    given = [node.kwargs.get(n, node.args[i] if len(node.args) > i else None) for i, n in enumerate(names, 1)]
    if any(isinstance(limit, Tensor) for limit in given) or given == [None, None]:
        return None
    return -math.inf if given[0] is None else float(given[0]), math.inf if given[1] is None else float(given[1])


SIGNED = ("cosine_embedding_loss", "hinge_embedding_loss", "margin_ranking_loss", "soft_margin_loss")


@rule(
    "C08b",
    "labels-not-plus-and-minus-one",
    "error",
    title="Labels 0 and 1 for a loss that takes -1 and 1",
    why="These losses multiply by the label or compare it with -1: for a 0 the loss is constant, or that of both "
    "labels at once, and the negative samples teach nothing.",
    fix="2 * target - 1.",
    source="torch.nn.CosineEmbeddingLoss, HingeEmbeddingLoss, MarginRankingLoss, SoftMarginLoss: labels of 1 and -1",
    bad=BINARY.format("", "nn.SoftMarginLoss()", YES_NO),
    good=BINARY.format("", "nn.SoftMarginLoss()", "2 * torch.randint(2, (32, 1)).float() - 1"),
)
def labels_not_plus_and_minus_one(evidence: Evidence) -> Iterator[Found]:
    """Nothing but zeros and ones, and a zero among them: ties that are 0 beside -1 and 1 are no mistake."""
    for call in evidence.losses:
        if call.kind not in SIGNED:
            continue
        target = call.options.get("target", call.target)
        if not isinstance(target, Tensor) or target.numel() < 2:
            continue
        zeros = target.detach() == 0
        if bool(zeros.any()) and bool((zeros | (target.detach() == 1)).all()):
            yield Found(
                f"{call.kind} gets labels of 0 and 1, {int(zeros.sum())} of {target.numel()} are 0; it takes -1 and 1",
                fix="loss(..., 2 * target - 1)",
            )


@rule(
    "C09",
    "unbatched-cross-entropy",
    "error",
    title="The batch is taken for the classes of one sample",
    why="cross_entropy reads a one-dimensional output with a float target as one sample with N classes: the loss is a "
    "number, and compares samples of the batch with each other.",
    fix="One unit with a 0/1 target: BCEWithLogitsLoss. K classes: output (N, K), target (N,) of integers.",
    source="torch.nn.CrossEntropyLoss: input of shape (C), target probabilities of shape (C)",
    bad="""
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1), nn.Flatten(0))
loss = nn.CrossEntropyLoss()
batch = torch.randn(32, 8), torch.randint(2, (32,)).float()
""",
    good="""
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1), nn.Flatten(0))
loss = nn.BCEWithLogitsLoss()
batch = torch.randn(32, 8), torch.randint(2, (32,)).float()
""",
)
def unbatched_cross_entropy(evidence: Evidence) -> Iterator[Found]:
    """Input and float target are vectors, as long as the batch."""
    for call in evidence.losses:
        if call.kind == "cross_entropy" and call.input.dim() == 1 and call.target.is_floating_point():
            n = call.input.shape[0]
            ranking = bool((call.target >= 0).all()) and abs(float(call.target.sum()) - 1) < 1e-3
            if n == evidence.batch_size and n > 1 and not ranking:  # scores of one list, and a distribution over it
                yield Found(
                    f"cross_entropy gets ({n},) and a float target ({n},): it takes the {n} samples for {n} classes "
                    f"of one",
                    fix="loss = torch.nn.BCEWithLogitsLoss()",
                )


@rule(
    "C12",
    "summed-loss",
    "warning",
    title="The loss is a sum over the batch",
    why="Gradients grow with the batch size, and with them the step: a learning rate that suits one batch size does "
    "not suit another.",
    fix="Use reduction='mean', or divide the learning rate by the batch size.",
    source="the loss-reduction check of TheDeepChecker (Ben Braiek & Khomh 2023)",
    bad=HEAD.format("", 'nn.CrossEntropyLoss(reduction="sum")', CLASSES),
    good=HEAD.format("", "nn.CrossEntropyLoss()", CLASSES),
)
def summed_loss(evidence: Evidence) -> Iterator[Found]:
    """The loss of the batch and a copy of it is twice that of the batch, without dropout."""
    if evidence.loss is None or not math.isfinite(evidence.loss) or evidence.loss == 0 or evidence.target is None:
        return
    size = evidence.batch_size
    if size < 2 or not all(len(t) == size for t in tensors_in((evidence.inputs, evidence.target)) if t.dim()):
        return

    def quiet(model: nn.Module) -> None:
        for module in model.modules():
            if "dropout" in type(module).__name__.lower():
                module.eval()

    def twice(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor]) if tensor.dim() else tensor

    once = evidence.again(change=quiet)
    both = evidence.again(mapped(evidence.fresh, twice), mapped(evidence.target, twice), change=quiet)
    if once.error is not None or both.error is not None or once.loss is None or both.loss is None:
        return
    if once.loss.numel() != 1 or both.loss.numel() != 1 or float(once.loss.detach()) == 0:
        return
    ratio = float(both.loss.detach()) / float(once.loss.detach())
    if abs(ratio - 2) < 0.02:
        # Adam and its like divide by the gradients' size; a bound on the likelihood of the input is a sum by habit.
        scaled = any(word in type(evidence.optimizer).__name__.lower() for word in SCALE_FREE)
        likelihood = evidence.optimizer is None and reconstructs(evidence)
        yield Found(
            f"the loss of the batch and a copy of it, {2 * size} samples, is {ratio:.2f} times that of the batch: it "
            "is a sum",
            fix='reduction="mean"',
            severity="info" if scaled or likelihood else "warning",
        )


@rule(
    "C45",
    "loss-not-scalar",
    "warning",
    title="The loss has several entries",
    why="loss.backward() raises for more than one entry. A loop that takes the mean is fine, but without it check has "
    "no gradient to look at: the rules about gradients and steps are silent.",
    fix="Take the mean inside of the loss, or use reduction='mean'.",
    source="torch.Tensor.backward: grad can be implicitly created only for scalar outputs",
    bad=HEAD.format("", 'nn.CrossEntropyLoss(reduction="none")', CLASSES),
    good=HEAD.format("", "lambda output, y: F.cross_entropy(output, y, reduction='none').mean()", CLASSES),
)
def loss_not_scalar(evidence: Evidence) -> Iterator[Found]:
    """A tensor with another number of entries than 1."""
    loss = evidence.run.loss
    if loss is not None and loss.numel() != 1:
        yield Found(
            f"the loss has shape {shown(tuple(loss.shape))}, and loss.backward() needs a single number: no gradient "
            "was looked at",
            fix="loss(output, target).mean()",
        )


SCALE_FREE = ("adam", "rmsprop", "adagrad", "adadelta", "rprop", "lion", "lamb", "adafactor", "sign")


def reconstructs(evidence: Evidence) -> bool:
    """Whether the target is the input."""
    inputs, targets = tensors_in(evidence.inputs), tensors_in(evidence.target)
    return any(x is t or (x.shape == t.shape and torch.equal(x, t)) for x in inputs for t in targets)


@rule(
    "C15",
    "labels",
    "error",
    title="Labels that do not fit the output",
    why="A class index outside of the output's classes raises, on a GPU as an assertion that says nothing; a batch of "
    "one class teaches to answer it always.",
    fix="Count the classes from 0, and give the head as many units as there are.",
    source="torch.nn.CrossEntropyLoss: targets in [0, C)",
    bad=HEAD.format("", "nn.CrossEntropyLoss()", "torch.randint(1, 6, (32,))"),
    good=HEAD.format("", "nn.CrossEntropyLoss()", CLASSES),
)
def labels(evidence: Evidence) -> Iterator[Found]:
    """Out of range is an error, one class alone or far too many units a warning."""
    for call in evidence.losses:
        if call.kind not in ("cross_entropy", "nll_loss") or call.target.is_floating_point() or call.input.dim() < 1:
            continue
        classes = call.input.shape[1] if call.input.dim() > 1 else call.input.shape[0]
        target = call.target.detach()
        real = target[target != call.options.get("ignore_index", -100)]
        if real.numel() == 0:
            yield Found("every label is the one that is ignored: the loss is 0 / 0", severity="error")
            continue
        low, high = (int(value) for value in real.aminmax())
        weight = call.options.get("weight")
        if isinstance(weight, Tensor) and low >= 0 and high < len(weight) and int((weight > 0).sum()) == 1 < classes:
            yield Found(
                f"the weights of all classes but {int(weight.argmax())} are 0: always answering that is a loss of 0",
                fix="weight=count.sum() / count  # a rare class gets the large weight",
            )
        if low < 0 or high >= classes:
            counted = "; they seem to count from 1" if low == 1 and high == classes else ""
            yield Found(
                f"labels from {low} to {high} for {classes} classes, which are 0 to {classes - 1}{counted}",
                fix="target - 1" if counted else f"# {high + 1} units in the last layer, or other labels",
            )
        elif low == high and real.numel() >= 16 and classes > 1 and target.dim() == 1 and given(evidence, target):
            yield Found(
                f"all {real.numel()} labels of the batch are class {low}",
                severity="warning",
                fix="# shuffle: DataLoader(..., shuffle=True)",
            )
        elif classes >= 20 and (
            (real.numel() >= 1000 and (high + 1) / classes < 0.1)
            or (real.numel() >= 32 and target.dim() == 1 and classes >= 100 and (high + 1) / classes <= 0.02)
        ):
            yield Found(
                f"{classes} classes in the output, and no label above {high} among {real.numel()}",
                severity="warning",
                fix=f"# as many units in the last layer as there are classes, {high + 1}?",
            )


@rule(
    "C15b",
    "labels-as-floats",
    "error",
    title="Class indices as floats, or one-hot rows as integers",
    why="cross_entropy reads a float target as probabilities, of the output's shape; indices have to be integers.",
    fix="target.long() for indices, target.float() for one-hot rows.",
    source="torch.nn.CrossEntropyLoss",
    bad=HEAD.format("", "nn.CrossEntropyLoss()", "torch.randint(5, (32,)).float()"),
    good=HEAD.format("", "nn.CrossEntropyLoss()", CLASSES),
)
def labels_as_floats(evidence: Evidence) -> Iterator[Found]:
    """What torch raises for, said so that it helps."""
    if evidence.run.error is None or evidence.run.stage != "loss":
        return
    for call in evidence.losses:
        if call.kind != "cross_entropy" or evidence.trace.failed is not call.node:
            continue
        target = call.target
        rows = target.shape == call.input.shape and not target.is_floating_point()
        indices = target.is_floating_point() and target.dim() == call.input.dim() - 1
        if rows or indices:
            yield Found(
                f"cross_entropy gets an output {shown(tuple(call.input.shape))} and a target "
                f"{shown(tuple(target.shape))} of {str(target.dtype).removeprefix('torch.')}",
                fix="target.float()  # one-hot rows" if rows else "target.long()  # class indices",
            )
