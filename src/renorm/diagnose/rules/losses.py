"""Rules about what goes into a loss: outputs that were normalized twice, or not at all, or cut off."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

from renorm.diagnose.catalogue import Found, rule
from renorm.diagnose.evidence import Evidence
from renorm.diagnose.rules.calls import (
    BINARY,
    CLASSES,
    HEAD,
    RANGES,
    REGRESSION,
    YES_NO,
    between,
    drop,
    kind_of,
    normalized_logs,
    sums_to_one,
    without,
)
from renorm.diagnose.rules.words import said, shown


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
                "their logarithm",
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


@rule(
    "C04",
    "sigmoid-before-bce-with-logits",
    "error",
    title="Probabilities go into a loss that applies a sigmoid itself",
    why="The sigmoid of a probability is between 0.5 and 0.73: the loss cannot fall below 0.31 where the target is 1 "
    "and 0.69 where it is 0.",
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
    "batch hides it until then.",
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
                f"to {high:.3g})",
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
                f"cross_entropy over 1 class, input {shown(tuple(call.input.shape))}: the loss is constant, nothing "
                "is learnt",
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
                f"{node.where} is over a dimension of size 1, output {shown(tuple(values.shape))}: it gives "
                f"{constant:g} for every sample",
                module=node.name,
                fix=f'model.set_submodule("{node.name}", torch.nn.Sigmoid())'
                if node.module is not None
                else "# torch.sigmoid instead of softmax",
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
