"""Rules about what goes into a loss: outputs that were normalized twice, targets outside their range, shapes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from renorm.diagnose.catalogue import Found, Mended, rule
from renorm.diagnose.evidence import Evidence, mapped
from renorm.diagnose.trace import LossCall, Node, tensors_in

TOLERANCE = 1e-4  # of a sum of probabilities from 1, in float32
REGRESSION = ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")
# What an activation can give, and so what a target behind it may be.
RANGES = {
    "sigmoid": (0.0, 1.0),
    "softmax": (0.0, 1.0),
    "hardsigmoid": (0.0, 1.0),
    "tanh": (-1.0, 1.0),
    "relu": (0.0, math.inf),
    "softplus": (0.0, math.inf),
    "exp": (0.0, math.inf),
}


def drop(node: Node | None) -> partial[Mended] | None:
    """The mechanical fix that takes a layer out of the model; None where it is a function."""
    return None if node is None or node.module is None or not node.name else partial(_drop, name=node.name)


def _drop(model: nn.Module, optimizer: Optimizer | None, *, name: str) -> Mended:
    was = type(model.get_submodule(name)).__name__
    model.set_submodule(name, nn.Identity())
    return Mended(model, optimizer, f"{name}: {was} -> Identity")


def without(node: Node | None, what: str) -> str:
    """How to take this call out, as code."""
    if node is None or node.module is None:
        return f"# return the values that go into {what}, not what comes out of it"
    return f'model.set_submodule("{node.name}", torch.nn.Identity())  # was {type(node.module).__name__}'


def said(node: Node | None) -> str:
    """Who made a tensor, as the subject of a sentence."""
    return "the model" if node is None else node.where


def kind_of(node: Node | None) -> str:
    """The kind of a call; empty where there is none."""
    return "" if node is None else node.kind


def linear(shape: tuple[int, ...]) -> str:
    """A shape in words."""
    return "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"


def between(values: Tensor, low: float, high: float) -> bool:
    """Whether all values are in [low, high], up to rounding."""
    values = values.detach().float()
    return values.numel() > 0 and bool((values >= low - 1e-6).all() and (values <= high + 1e-6).all())


def sums_to_one(rows: Tensor) -> bool:
    """Whether every row of (N, K, ...) is a distribution over K."""
    if rows.dim() < 2 or rows.shape[1] < 2 or rows.numel() == 0:
        return False
    rows = rows.detach().float()
    return bool((rows >= 0).all() and ((rows.sum(1) - 1).abs() < TOLERANCE).all())


@rule(
    "C01",
    "softmax-before-cross-entropy",
    "error",
    title="Probabilities go into a cross-entropy that expects logits",
    why="cross_entropy applies log_softmax itself. On probabilities the loss cannot fall below ln(1 + (K-1)/e), "
    "1.46 for 10 classes, and gradients are small from the start.",
    fix="Return the logits and leave the softmax to the loss; apply softmax where you want probabilities to look at.",
    source="torch.nn.CrossEntropyLoss; the floor follows from its formula",
    bad="""
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5), nn.Softmax(dim=1))
loss = nn.CrossEntropyLoss()
batch = torch.randn(32, 8), torch.randint(5, (32,))
""",
    good="""
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))
loss = nn.CrossEntropyLoss()
batch = torch.randn(32, 8), torch.randint(5, (32,))
""",
)
def softmax_before_cross_entropy(evidence: Evidence) -> Iterator[Found]:
    """Confirmed on the inputs times 3: logits that happen to sum to 1 would not do so again."""
    for call in evidence.losses:
        if call.kind != "cross_entropy" or not sums_to_one(call.input):
            continue
        again = evidence.again(evidence.each_input(lambda x: 3 * x if x.is_floating_point() else x))
        if not any(other.kind == call.kind and sums_to_one(other.input) for other in again.trace.losses()):
            continue
        classes = call.input.shape[1]
        node = evidence.blame(call.input)
        by = f"{node.where} makes" if node is not None else "the model returns"
        floor = math.log(1 + (classes - 1) / math.e)
        yield Found(
            f"{by} probabilities, and cross_entropy takes their softmax again: the loss cannot fall below {floor:.3f} "
            f"for {classes} classes (here {float(torch.as_tensor(evidence.loss or 0)):.3f})",
            module=node.name if node is not None else "",
            fix=without(node, "the softmax"),
            mend=drop(node),
        )


HEAD = """
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5){})
loss = {}
batch = torch.randn(32, 8), {}
"""
CLASSES = "torch.randint(5, (32,))"


@rule(
    "C02",
    "log-softmax-before-cross-entropy",
    "info",
    title="Log-probabilities go into a cross-entropy, which takes their log-softmax again",
    why="The loss is the same, since the log-softmax of log-probabilities is themselves; it costs a pass over the "
    "logits.",
    fix="Return the logits, or use NLLLoss.",
    source="the identity log_softmax(log_softmax(z)) = log_softmax(z)",
    bad=HEAD.format(", nn.LogSoftmax(dim=1)", "nn.CrossEntropyLoss()", CLASSES),
    good=HEAD.format(", nn.LogSoftmax(dim=1)", "nn.NLLLoss()", CLASSES),
)
def log_softmax_before_cross_entropy(evidence: Evidence) -> Iterator[Found]:
    """The log-sum-exp of every row is 0."""
    for call in evidence.losses:
        if call.kind == "cross_entropy" and normalized_logs(call.input):
            node = evidence.blame(call.input)
            if kind_of(node) in ("log_softmax", "logsigmoid", "log", ""):
                yield Found(
                    f"{said(node)} makes log-probabilities, of which cross_entropy takes the log-softmax again: "
                    f"harmless",
                    module=node.name if node else "",
                    fix=without(node, "the log-softmax"),
                    mend=drop(node),
                )


def counted(evidence: Evidence, call: LossCall) -> Tensor | None:
    """Which entries of a loss without reduction the user's loss depends on; None where that is all of them.

    Masks and weights of 0 take entries out behind the call: what stands there does not matter.
    """
    loss = evidence.run.loss
    if call.options.get("reduction") != "none" or loss is None or loss.numel() != 1 or not call.input.requires_grad:
        return None
    try:
        (gradient,) = torch.autograd.grad(loss, call.input, retain_graph=True, allow_unused=True)
    except RuntimeError:  # no way back from this loss
        return None
    return None if gradient is None else gradient != 0


def given(evidence: Evidence, target: Tensor) -> bool:
    """Whether these values came with the batch, and were not made by the model or the loss."""
    known = tensors_in((evidence.inputs, evidence.target))
    flat = target.detach().flatten()
    return any(
        t is target or (t.numel() == flat.numel() and torch.equal(t.detach().flatten().to(flat), flat)) for t in known
    )


def normalized_logs(rows: Tensor) -> bool:
    """Whether the exponentials of every row of (N, K, ...) sum to 1."""
    if rows.dim() < 2 or rows.shape[1] < 2 or rows.numel() == 0:
        return False
    return bool((rows.detach().float().logsumexp(1).abs() < TOLERANCE).all())


@rule(
    "C02b",
    "bounded-logits",
    "error",
    title="A sigmoid or tanh bounds the logits of a cross-entropy",
    why="Logits in [0, 1] or [-1, 1] keep every probability near 1/K: the loss cannot fall far below ln K.",
    fix="Return the values in front of the activation.",
    source="10 of 109 faulty programs in the corpus of UMLAUT and deepmufl have it; the bound follows from the formula",
    bad=HEAD.format(", nn.Sigmoid()", "nn.CrossEntropyLoss()", CLASSES),
    good=HEAD.format("", "nn.CrossEntropyLoss()", CLASSES),
)
def bounded_logits(evidence: Evidence) -> Iterator[Found]:
    """The last operation is the activation, and the values are in its range."""
    for call in evidence.losses:
        node = evidence.blame(call.input)
        binary = call.kind == "binary_cross_entropy_with_logits" and kind_of(node) == "tanh"
        known = kind_of(node) in ("sigmoid", "tanh", "hardsigmoid")
        if not (binary or (call.kind == "cross_entropy" and known and call.input.dim() > 1)):
            continue
        low, high = RANGES[kind_of(node)]
        if not between(call.input, low, high):
            continue
        if binary:
            yield Found(
                f"{said(node)} bounds the logits to [-1, 1]: no probability is below 0.27 or above 0.73",
                module=node.name if node else "",
                fix=without(node, "the tanh"),
                mend=drop(node),
            )
            continue
        classes = call.input.shape[1]
        floor = math.log(1 + (classes - 1) * math.exp(low - high))
        yield Found(
            f"{said(node)} bounds the logits to [{low:g}, {high:g}]: cross_entropy cannot fall below {floor:.3f} for "
            f"{classes} classes",
            module=node.name if node else "",
            fix=without(node, f"the {kind_of(node)}"),
            mend=drop(node),
        )


@rule(
    "C03",
    "nll-without-log-softmax",
    "error",
    title="NLLLoss gets values that are no log-probabilities",
    why="NLLLoss only picks the entry of the right class. On logits it has no lower bound: training makes that entry "
    "large and learns nothing about the others.",
    fix="Put log_softmax in front of the loss, or use CrossEntropyLoss on the logits.",
    source="torch.nn.NLLLoss: the input is expected to contain log-probabilities",
    bad=HEAD.format("", "nn.NLLLoss()", CLASSES),
    good=HEAD.format(", nn.LogSoftmax(dim=1)", "nn.NLLLoss()", CLASSES),
)
def nll_without_log_softmax(evidence: Evidence) -> Iterator[Found]:
    """Exponentials of a row sum to something else than 1."""
    for call in evidence.losses:
        if call.kind != "nll_loss" or call.input.dim() < 2 or call.input.numel() == 0:
            continue
        off = float(call.input.detach().float().logsumexp(1).abs().max())
        if off > 1e-2:
            node = evidence.blame(call.input)
            fix = "loss = torch.nn.CrossEntropyLoss()"
            if kind_of(node) == "softmax":
                fix = "# NLLLoss wants the logarithm: use log_softmax instead of softmax\n" + without(node, "it")
            yield Found(
                f"nll_loss gets values from {said(node)} whose exponentials do not sum to 1 (log-sum-exp up to "
                f"{off:.3g})",
                module=node.name if node else "",
                fix=fix,
            )


@rule(
    "C03b",
    "not-logarithms",
    "error",
    title="A loss of logarithms gets something else",
    why="kl_div and ctc_loss take log-probabilities, and poisson_nll_loss the logarithm of the rate. On probabilities, "
    "logits or rates they give a number all the same, with its minimum in the wrong place or nowhere.",
    fix="log_softmax in front of kl_div and ctc_loss; log_input=False, or a linear head, for poisson_nll_loss.",
    source="torch.nn.KLDivLoss, torch.nn.CTCLoss, torch.nn.PoissonNLLLoss: the expected inputs",
    bad=HEAD.format(", nn.Softmax(dim=1)", 'nn.KLDivLoss(reduction="batchmean")', "torch.rand(32, 5).softmax(1)"),
    good=HEAD.format(", nn.LogSoftmax(dim=1)", 'nn.KLDivLoss(reduction="batchmean")', "torch.rand(32, 5).softmax(1)"),
)
def not_logarithms(evidence: Evidence) -> Iterator[Found]:
    """Log-probabilities are at most 0 and those of a row have exponentials that sum to 1."""
    for call in evidence.losses:
        values, node = call.input.detach().float(), evidence.blame(call.input)
        if values.numel() == 0 or not bool(values.isfinite().any()):
            continue
        most = float(values[values.isfinite()].max())
        if call.kind == "kl_div" and not call.options.get("log_target") and bool((call.target < -1e-3).any()):
            yield Found(
                f"kl_div gets targets down to {float(call.target.min()):.3g}; they are probabilities, and it takes "
                "their "
                "logarithm",
                fix="F.kl_div(log_probabilities, log_targets, log_target=True)",
            )
            continue
        if call.kind == "kl_div" and most > 1e-3:
            yield Found(
                f"kl_div gets values up to {most:.3g} from {said(node)}; logarithms of probabilities are 0 and below",
                module=node.name if node else "",
                fix="# log_softmax instead of softmax"
                if kind_of(node) == "softmax"
                else "F.log_softmax(output, dim=1)",
            )
        elif call.kind == "ctc_loss":
            off = float(values.logsumexp(-1).abs().max())
            if off > 1e-2:
                yield Found(
                    f"ctc_loss gets values from {said(node)} whose exponentials do not sum to 1 over the classes "
                    f"(log-sum-exp up to {off:.3g})",
                    module=node.name if node else "",
                    fix="F.log_softmax(output, dim=-1)",
                )
        elif (
            call.kind == "poisson_nll_loss"
            and call.options.get("log_input", True)
            and kind_of(node) in ("exp", "softplus", "relu")
            and bool((values >= 0).all())
        ):
            yield Found(
                f"{said(node)} makes rates, and poisson_nll_loss takes them for logarithms: no rate is below 1",
                module=node.name if node else "",
                fix="loss = torch.nn.PoissonNLLLoss(log_input=False)",
                severity="warning",
            )


BINARY = """
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1){})
loss = {}
batch = torch.randn(32, 8), {}
"""
YES_NO = "torch.randint(2, (32, 1)).float()"


@rule(
    "C04",
    "sigmoid-before-bce-with-logits",
    "error",
    title="Probabilities go into a loss that applies a sigmoid itself",
    why="The sigmoid of a probability is between 0.5 and 0.73: the loss cannot fall below 0.31 where the target is 1 "
    "and "
    "0.69 where it is 0.",
    fix="Return the logits, or use BCELoss.",
    source="torch.nn.BCEWithLogitsLoss combines a sigmoid with the loss",
    bad=BINARY.format(", nn.Sigmoid()", "nn.BCEWithLogitsLoss()", YES_NO),
    good=BINARY.format("", "nn.BCEWithLogitsLoss()", YES_NO),
)
def sigmoid_before_bce_with_logits(evidence: Evidence) -> Iterator[Found]:
    """The last operation makes probabilities, and the values are some."""
    for call in evidence.losses:
        node = evidence.blame(call.input)
        if call.kind not in ("binary_cross_entropy_with_logits", "multilabel_soft_margin_loss"):
            continue
        if kind_of(node) not in ("sigmoid", "softmax", "hardsigmoid"):
            continue
        if between(call.input, 0, 1):
            yield Found(
                f"{said(node)} makes probabilities, and {call.kind} applies a sigmoid to them again",
                module=node.name if node else "",
                fix=without(node, f"the {kind_of(node)}"),
                mend=drop(node),
            )


@rule(
    "C04b",
    "bce-without-sigmoid",
    "error",
    title="BCELoss gets values that are not bounded to [0, 1]",
    why="BCELoss takes logarithms of probabilities. Torch raises once a value is outside [0, 1]; a ReLU or a lucky "
    "batch "
    "hides it until then.",
    fix="Use BCEWithLogitsLoss on the logits.",
    source="torch.nn.BCELoss",
    bad=BINARY.format("", "nn.BCELoss()", YES_NO),
    good=BINARY.format(", nn.Sigmoid()", "nn.BCELoss()", YES_NO),
)
def bce_without_sigmoid(evidence: Evidence) -> Iterator[Found]:
    """The last operation is unbounded, or a value is outside the range."""
    unbounded = ("linear", "conv", "conv_transpose", "matmul", "relu", "leaky_relu", "tanh", "batch_norm", "layer_norm")
    for call in evidence.losses:
        if call.kind != "binary_cross_entropy":
            continue
        node = evidence.blame(call.input)
        outside = not between(call.input, 0, 1) and bool(call.input.isfinite().all())
        # Of two tensors that were computed, such as weights that sum to 1 and probabilities, the product is bounded.
        mixed = kind_of(node) == "matmul" and not any(
            isinstance(x, nn.Parameter) for x in (node.inputs if node else ())
        )
        if outside or (kind_of(node) in unbounded and not mixed):
            low, high = (float(value) for value in call.input.detach().float().aminmax())
            yield Found(
                f"binary_cross_entropy gets values from {said(node)}, which are not bounded to [0, 1] (here {low:.3g} "
                f"to "
                f"{high:.3g})",
                module=node.name if node else "",
                fix="loss = torch.nn.BCEWithLogitsLoss()  # on the values as they are",
            )


@rule(
    "C05",
    "cross-entropy-of-one-class",
    "error",
    title="A cross-entropy over a single class",
    why="The softmax of one value is 1, whatever it is: the loss is 0 and so is every gradient.",
    fix="Use BCEWithLogitsLoss for one unit, or two units.",
    source="softmax over one class is the constant 1",
    bad=BINARY.format("", "nn.CrossEntropyLoss()", "torch.zeros(32, dtype=torch.long)"),
    good=BINARY.format("", "nn.BCEWithLogitsLoss()", YES_NO),
)
def cross_entropy_of_one_class(evidence: Evidence) -> Iterator[Found]:
    """The class dimension is 1."""
    for call in evidence.losses:
        if call.kind == "cross_entropy" and call.input.dim() >= 2 and call.input.shape[1] == 1:
            node = evidence.blame(call.input)
            yield Found(
                f"cross_entropy over 1 class, input {linear(tuple(call.input.shape))}: the loss is constant, nothing "
                f"is "
                "learnt",
                module=node.name if node else "",
                fix="loss = torch.nn.BCEWithLogitsLoss()  # targets as floats, of the shape of the output",
            )


@rule(
    "C06",
    "softmax-over-one",
    "error",
    title="A softmax over a dimension of size 1",
    why="Its output is the constant 1 (0 for a log-softmax): no gradient passes it.",
    fix="Use a sigmoid for one unit.",
    source="26 of 109 faulty programs in the corpus of UMLAUT and deepmufl have it",
    bad=BINARY.format(", nn.Softmax(dim=1)", "nn.MSELoss()", YES_NO),
    good=BINARY.format(", nn.Sigmoid()", "nn.MSELoss()", YES_NO),
)
def softmax_over_one(evidence: Evidence) -> Iterator[Found]:
    """Every output is the constant, and more than one was computed."""
    for node in evidence.trace.of_kind("softmax", "log_softmax"):
        constant = 1.0 if node.kind == "softmax" else 0.0
        values = node.outputs[0].detach().float()
        # Attention over a single key is a softmax over one, too, and nothing is wrong with it: only heads are blamed.
        into_loss = any(evidence.blame(call.input) is node for call in evidence.losses)
        outputs = evidence.run.outputs  # of several, this may be weights of attention to look at
        returned = len(outputs) == 1 and evidence.blame(outputs[0]) is node
        if values.numel() > 1 and 1 in values.shape and (into_loss or returned) and bool((values == constant).all()):
            yield Found(
                f"{node.where} is over a dimension of size 1, output {linear(tuple(values.shape))}: it gives "
                f"{constant:g} "
                "for every sample",
                module=node.name,
                fix=f'model.set_submodule("{node.name}", torch.nn.Sigmoid())'
                if node.module is not None
                else "# torch.sigmoid instead of softmax",
            )


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
        if shapes[0] == shapes[1] or one.numel() <= 1 or other.numel() <= 1:
            continue
        try:
            together = tuple(torch.empty(shapes[0], device="meta").add(torch.empty(shapes[1], device="meta")).shape)
        except RuntimeError:
            continue
        if math.prod(together) > max(one.numel(), other.numel()):
            axis = next((i for i, size in enumerate(shapes[0]) if size == 1), -1)
            yield Found(
                f"{what} of output {linear(shapes[0])} and target {linear(shapes[1])}: broadcast to "
                f"{linear(together)}, every output against every target",
                fix=f"loss(output.squeeze({axis}), target)"
                if len(shapes[0]) > len(shapes[1])
                else f"loss(output, target.view{linear(shapes[0])})",
            )


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
    "labels "
    "at once, and the negative samples teach nothing.",
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


LOWEST = {"relu": 0.0, "relu6": 0.0, "softplus": 0.0, "gelu": -0.17, "silu": -0.28, "mish": -0.31, "elu": -1.0}


@rule(
    "C10",
    "activation-before-cross-entropy",
    "warning",
    title="A ReLU cuts off the negative logits",
    why="All classes whose logits would be negative are alike, and their gradients are 0.",
    fix="Return the values in front of the activation.",
    source="6 and more of 109 faulty programs in the corpus of UMLAUT and deepmufl",
    bad=HEAD.format(", nn.ReLU()", "nn.CrossEntropyLoss()", CLASSES),
    good=HEAD.format("", "nn.CrossEntropyLoss()", CLASSES),
)
def activation_before_cross_entropy(evidence: Evidence) -> Iterator[Found]:
    """A head that ends in a ReLU, with zeros among its outputs, or in front of targets that ask for negative logits."""
    for call in evidence.losses:
        node = evidence.blame(call.input)
        low = LOWEST.get(kind_of(node).lower())
        if call.kind == "binary_cross_entropy_with_logits" and low is not None and bool((call.target < 0.5).any()):
            share, least = float((call.target < 0.5).float().mean()), 1 / (1 + math.exp(-low))
            yield Found(
                f"{said(node)} leaves no logit below {low:g} in front of {call.kind}: no probability can be below "
                f"{least:.2g}, and {share:.0%} of the targets are",
                module=node.name if node else "",
                fix=without(node, "the activation"),
                mend=drop(node),
            )
        elif call.kind == "cross_entropy" and kind_of(node) == "relu":
            zeros = float((call.input.detach() == 0).float().mean())
            if zeros > 0.1:
                yield Found(
                    f"{said(node)} makes {zeros:.0%} of the logits 0 in front of {call.kind}",
                    module=node.name if node else "",
                    fix=without(node, "the ReLU"),
                    mend=drop(node),
                )


@rule(
    "C10b",
    "regression-loss-for-classes",
    "warning",
    title="Softmax with a squared error, for classes",
    why="Where the softmax is sure and wrong, the gradient of the squared error vanishes; the cross-entropy's does "
    "not.",
    fix="Return logits and use CrossEntropyLoss.",
    source="Golik, Doetsch & Ney 2013, Cross-entropy vs. squared error training, Interspeech",
    bad=HEAD.format(", nn.Softmax(dim=1)", "nn.MSELoss()", "nn.functional.one_hot(torch.randint(5, (32,)), 5).float()"),
    good=HEAD.format("", "nn.CrossEntropyLoss()", CLASSES),
)
def regression_loss_for_classes(evidence: Evidence) -> Iterator[Found]:
    """Probabilities against one-hot rows."""
    for call in evidence.losses:
        node = evidence.blame(call.input)
        if call.kind not in REGRESSION or kind_of(node) != "softmax" or not sums_to_one(call.input):
            continue
        target = call.target.detach()
        if target.shape == call.input.shape and bool(((target == 0) | (target == 1)).all()) and sums_to_one(target):
            yield Found(
                f"{call.kind} of the probabilities of {said(node)} against one-hot targets",
                module=node.name if node else "",
                fix="loss = torch.nn.CrossEntropyLoss()\n" + without(node, "the softmax"),
            )


@rule(
    "C12",
    "summed-loss",
    "warning",
    title="The loss is a sum over the batch",
    why="Gradients grow with the batch size, and with them the step: a learning rate that suits one batch size does "
    "not "
    "suit another.",
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
            f"is a "
            "sum",
            fix='reduction="mean"',
            severity="info" if scaled or likelihood else "warning",
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
    "one "
    "class teaches to answer it always.",
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
                f"cross_entropy gets an output {linear(tuple(call.input.shape))} and a target "
                f"{linear(tuple(target.shape))} "
                f"of {str(target.dtype).removeprefix('torch.')}",
                fix="target.float()  # one-hot rows" if rows else "target.long()  # class indices",
            )
