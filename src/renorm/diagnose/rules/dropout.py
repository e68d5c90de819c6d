"""Rules about dropout: where it stands, how much it drops, and when."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator

from torch import nn

from renorm.diagnose.catalogue import Found, rule
from renorm.diagnose.evidence import Evidence
from renorm.diagnose.rules.calls import drop, without
from renorm.diagnose.rules.statistics import is_norm, norm_calls, over_channels
from renorm.diagnose.rules.words import called
from renorm.diagnose.trace import Node
from renorm.norms.norm import Norm

DROPOUTS = (nn.modules.dropout._DropoutNd,)
STANDARD = (
    *("cross_entropy", "nll_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits"),
    *("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"),
)


def probability(node: Node) -> float:
    """Of dropping, in this call; 0 where it does nothing."""
    if node.kind != "dropout":
        return 0.0
    if node.module is not None:
        return float(getattr(node.module, "p", 0.5)) if node.module.training else 0.0
    p = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
    active = node.kwargs.get("training", node.kwargs.get("train", node.args[2] if len(node.args) > 2 else True))
    return float(p) if active else 0.0


DROPPED = """
model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), {}nn.BatchNorm1d(64), {}nn.Linear(64, 4))
loss = nn.CrossEntropyLoss()
batch = torch.randn(64, 8), torch.randint(4, (64,))
"""


@rule(
    "C19",
    "dropout-before-batch-norm",
    "warning",
    title="Dropout in front of a batch norm",
    why="Dropout raises the variance of its output in training only. The running variance is that of training; in "
    "evaluation the batch norm divides by too much, and every layer behind it sees smaller values than it learnt from.",
    fix="Put the dropout behind the last batch norm, or in front of the head.",
    source="Li et al. 2019, arXiv:1801.05134, which finds wide networks to be an exception; the ratio of 1.5 is "
    "calibrated on the clean programs of tests/diagnose",
    bad=DROPPED.format("nn.Dropout(0.5), ", ""),
    good=DROPPED.format("", "nn.Dropout(0.5), "),
)
def dropout_before_batch_norm(evidence: Evidence) -> Iterator[Found]:
    """The variance that the norm sees, with dropout over without, on this batch.

    A warning where nothing with weights is between and the norm has fewer than 512 channels; else an info.
    """
    places = []
    for i, call in enumerate(norm_calls(evidence.trace)):
        if call.plain and call.couples_batch and call.measures and call.tracks:
            dropout, between = dropout_before(call.node)
            if dropout is not None:
                places.append((i, call, dropout, between))
    if not places:
        return
    quiet = evidence.again(change=without_dropout)
    others = list(norm_calls(quiet.trace))
    if quiet.error is not None or len(others) != len(list(norm_calls(evidence.trace))):
        return
    for i, call, dropout, between in places:
        other = others[i]
        if other.node.name != call.node.name or other.input.shape != call.input.shape:
            continue
        noisy, still = (over_channels(c, c.input)[0] for c in (call, other))
        real = still > 1e-8
        if not bool(real.any()):
            continue
        ratio = float((noisy[real] / still[real]).median())
        if ratio >= 1.5:
            mild = between > 0 or call.channels >= 512
            yield Found(
                f"{called(dropout)} (p={probability(dropout):g}) {'two layers ' if between else ''}in front of "
                f"{called(call.node)} makes the variance there {ratio:.2g} times what it is in evaluation: "
                f"there its output will be {1 / math.sqrt(ratio):.2g} times as large as in training",
                module=call.node.name,
                fix=without(dropout, "the dropout") + "\n# and put it behind the last batch norm",
                severity="info" if mild else "warning",
            )


def dropout_before(node: Node) -> tuple[Node | None, int]:
    """The dropout in front of this call, and how many layers with weights are between: none or one."""
    between, source = 0, node.sources[0] if node.sources else None
    while source is not None:
        if probability(source) >= 0.1:
            return source, between
        between += source.kind in ("linear", "conv", "conv_transpose")
        joined = sum(s is not None for s in source.sources) > 1
        if between > 1 or is_norm(source) or joined or source.kind in ("matmul", "rnn", "attention", "embedding"):
            break
        source = source.sources[0] if source.sources else None
    return None, 0


def without_dropout(model: nn.Module) -> None:
    """Evaluation mode for everything but norms."""
    for module in model.modules():
        norm = isinstance(
            module,
            (Norm, nn.modules.batchnorm._NormBase),  # batch and instance norms
        )
        if not norm:
            module.training = False


@rule(
    "C19b",
    "dropout-on-output",
    "warning",
    title="Dropout on the outputs that the loss compares",
    why="It sets logits or predictions to 0 at random and scales up the rest: the loss is that of other outputs than "
    "evaluation gives, and cannot be fitted.",
    fix="Put the dropout in front of the last layer.",
    source="torch.nn.Dropout: zeroes elements with probability p, scales the others by 1/(1-p)",
    bad=DROPPED.format("", "").replace("nn.Linear(64, 4)", "nn.Linear(64, 4), nn.Dropout(0.3)"),
    good=DROPPED.format("", "").replace("nn.Linear(64, 4)", "nn.Dropout(0.3), nn.Linear(64, 4)"),
)
def dropout_on_output(evidence: Evidence) -> Iterator[Found]:
    """Zeros among what goes into a loss, or into the softmax or sigmoid in front of it."""
    for call in evidence.losses:
        node = evidence.blame(call.input)
        while node is not None and node.kind in ("softmax", "log_softmax", "sigmoid", "tanh") and node.sources:
            node = node.sources[0]
            while node is not None and node.is_view and node.sources:
                node = node.sources[0]
        if call.kind not in STANDARD or node is None or probability(node) <= 0:
            continue
        zeros = float((node.outputs[0].detach() == 0).float().mean())
        if zeros > 0.25 * probability(node):
            yield Found(
                f"{called(node)} (p={probability(node):g}) sets {zeros:.0%} of the outputs to 0 in front of "
                f"{call.kind}",
                module=node.name,
                fix=without(node, "the dropout") + "\n# and put it in front of the last layer with weights",
                mend=drop(node),
            )


@rule(
    "C19c",
    "most-is-dropped",
    "warning",
    title="A dropout that drops nearly everything",
    why="Torch's p is the probability to drop. Some libraries take that to keep: 0.9 of those is 0.1 here.",
    fix="p = 1 - (probability to keep).",
    source="torch.nn.Dropout; tf.nn.dropout of TensorFlow 1 took keep_prob. The threshold is ours",
    bad=DROPPED.format("", "nn.Dropout(0.9), "),
    good=DROPPED.format("", "nn.Dropout(0.1), "),
)
def most_is_dropped(evidence: Evidence) -> Iterator[Found]:
    """p of 0.8 and more, and as many zeros in the output."""
    found: dict[str, tuple[Node, float]] = {}
    for node in evidence.trace.of_kind("dropout"):
        p = probability(node)
        if p >= 0.8 and node.inputs and node.outputs[0].shape == node.inputs[0].shape:
            live = node.inputs[0].detach() != 0
            dropped = float((live & (node.outputs[0].detach() == 0)).sum()) / max(1, int(live.sum()))
            if dropped > 0.9 * p - 0.1 and "alpha" not in type(node.module).__name__.lower():
                found.setdefault(called(node), (node, dropped))
    for where, (node, dropped) in found.items():
        p = probability(node)
        yield Found(
            f"{where} drops {dropped:.0%} of what comes in (p={p:g})",
            module=node.name,
            fix=f"p={round(1 - p, 6):g}  # if {p:g} was the probability to keep",
        )


AWAKE = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 64), nn.Linear(64, 4)

    def forward(self, x):
        return self.b(F.dropout(F.relu(self.a(x)), 0.5{}))

model = Net()
loss = nn.CrossEntropyLoss()
batch = torch.randn(64, 8), torch.randint(4, (64,))
"""
MEANT = re.compile(r"\bdropout\w*\([^\n]*\btraining\s*=\s*True", re.IGNORECASE)
BAYESIAN = re.compile(r"MC(?![a-z])|monte_?carlo|bayes", re.IGNORECASE)


@rule(
    "C31",
    "dropout-in-evaluation",
    "warning",
    title="Dropout that evaluation mode does not switch off",
    why="F.dropout has training=True by default, and so has an nn.Dropout that is made in the forward pass or kept in "
    "a Python list: predictions and validation are as noisy as training, and no two are alike.",
    fix="F.dropout(x, p, self.training), or an nn.Dropout in __init__.",
    source="torch.nn.functional.dropout: training=True; measured in evaluation mode on the batch",
    bad=AWAKE.format(""),
    good=AWAKE.format(", self.training"),
)
def dropout_in_evaluation(evidence: Evidence) -> Iterator[Found]:
    """A call that is no layer of the model, with zeros in its output; those who write training=True mean it."""
    if evidence.run.error is not None or not any(True for _ in evidence.trace.of_kind("dropout", "attention")):
        return
    run = evidence.again(training=False)
    found: dict[str, tuple[Node, float]] = {}
    for node in run.trace.of_kind("dropout", "attention"):
        p = attention_dropout(node) if node.kind == "attention" else probability(node)
        if node.module is not None or p <= 0 or not node.inputs or says_so(evidence, node):
            continue
        dropped = (node.outputs[0].detach() == 0) & (node.inputs[0].detach() != 0) if node.kind == "dropout" else None
        if dropped is None or float(dropped.float().mean()) > 0.25 * p * float((node.inputs[0] != 0).float().mean()):
            found.setdefault(node.name, (node, p))
    for name, (node, p) in found.items():
        module = evidence.model.get_submodule(name)
        at = f" of {name}" if name else ""
        yield Found(
            f"{node.where} (p={p:g}) is at work in evaluation mode, too"
            if node.kind == "dropout"
            else f"{node.where} drops weights of attention (dropout_p={p:g}) in evaluation mode, too",
            module=name,
            fix=f"F.dropout(x, {p:g}, self.training)  # in the forward of {type(module).__name__}{at}"
            if node.kind == "dropout"
            else f"dropout_p={p:g} if self.training else 0.0  # in the forward of {type(module).__name__}{at}",
        )


def attention_dropout(node: Node) -> float:
    """The probability that a call of scaled_dot_product_attention drops a weight with."""
    p = node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0)
    # multi_head_attention_forward has the number of heads in that place.
    return float(p) if node.module is None and isinstance(p, float) else 0.0


def says_so(evidence: Evidence, node: Node) -> bool:
    """Whether the module around a call means to drop in evaluation: by its name, or as training=True in its code."""
    kind = type(evidence.model.get_submodule(node.name))
    if any(BAYESIAN.search(word) for word in (kind.__name__, type(evidence.model).__name__, node.name)):
        return True
    try:
        return bool(MEANT.search(inspect.getsource(kind)))
    except (OSError, TypeError):  # no source, such as of a class from a prompt
        return False
