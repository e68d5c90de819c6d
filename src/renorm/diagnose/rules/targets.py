"""Rules about how outputs and targets belong together: the sign, an answer in the input, what trains towards them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from renorm.diagnose.catalogue import Found, rule
from renorm.diagnose.evidence import Evidence, entries, mapped
from renorm.diagnose.rules.calls import REGRESSION, drop, given, without
from renorm.diagnose.rules.parameters import held_by
from renorm.diagnose.rules.words import listed, said
from renorm.diagnose.trace import LossCall, tensors_in

SIGN = """
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
batch = torch.randn(32, 8), torch.randint(3, (32,))
def loss(output, target):
    return {}F.log_softmax(output, 1)[torch.arange(len(target)), target].mean()
"""


@rule(
    "C37",
    "loss-rises-towards-the-target",
    "error",
    title="The loss gets larger as outputs come nearer to the targets",
    why="The sign is wrong: a log-likelihood or a score of overlap that is minimized. Training then works against the "
    "targets, and the loss falls nicely.",
    fix="Minimize the negative log-likelihood; 1 - score for an overlap such as Dice.",
    source="measured: the slope of the loss from each output towards its target",
    bad=SIGN.format(""),
    good=SIGN.format("-"),
)
def loss_rises_towards_the_target(evidence: Evidence) -> Iterator[Found]:
    """For every sample; of class scores and single numbers only where the loss is negative, which no distance is."""
    loss, target = evidence.run.loss, evidence.target
    if loss is None or evidence.loss is None or not loss.requires_grad:
        return
    against = [call.kind for call in evidence.losses if opposed(loss, call)]
    if evidence.loss < 0 and against and len(against) == len(evidence.losses):
        yield Found(
            f"the loss, {evidence.loss:.3g}, falls where {listed(against)} rises: its sign is wrong", fix="loss = -loss"
        )
        return
    outputs = [y for y in evidence.run.outputs if y.is_floating_point() and y.requires_grad]
    if len(outputs) != 1 or not isinstance(target, Tensor):
        return
    output = outputs[0]
    if output.dim() == 0 or len(output) < 4 or target.dim() == 0 or len(target) != len(output):
        return
    try:
        (slope,) = torch.autograd.grad(loss, output, retain_graph=True, allow_unused=True)
    except RuntimeError:  # no way back from this loss
        return
    towards = None if slope is None else approach(output.detach(), target.detach())
    if slope is None or towards is None:
        return
    rises = (slope * towards).flatten(1).sum(1) if slope.dim() > 1 else slope * towards
    masks = output.dim() > 2 and target.is_floating_point()  # an overlap is positive with either sign
    if bool((rises > 0).all()) and (evidence.loss < 0 or masks):
        yield Found(
            f"the loss, {evidence.loss:.3g}, rises for each of the {len(rises)} samples as its output comes nearer to "
            "the target: its sign is wrong",
            fix="loss = 1 - score" if masks and evidence.loss >= 0 else "loss = -loss",
        )


def opposed(loss: Tensor, call: LossCall) -> bool:
    """Whether the whole loss falls, for each sample, in the direction in which this call's value rises."""
    value = call.node.outputs[0] if call.node.outputs else None
    if value is None or not value.requires_grad or not call.input.requires_grad or call.input.dim() == 0:
        return False
    try:
        (whole,) = torch.autograd.grad(loss, call.input, retain_graph=True, allow_unused=True)
        (own,) = torch.autograd.grad(value.sum(), call.input, retain_graph=True, allow_unused=True)
    except RuntimeError:  # no way back
        return False
    if whole is None or own is None or not bool(own.any()):
        return False
    return bool(((whole * own).reshape(len(own), -1).sum(1) < 0).all())


def approach(output: Tensor, target: Tensor) -> Tensor | None:
    """The direction from outputs to their targets; None where targets say nothing of the kind."""
    if not target.is_floating_point() and target.dtype != torch.bool:
        if output.dim() < 2 or target.shape != output.shape[:1] + output.shape[2:] or output.shape[1] < 2:
            return None
        if int(target.min()) < 0 or int(target.max()) >= output.shape[1]:
            return None
        return torch.zeros_like(output).scatter_(1, target.long().unsqueeze(1), 1.0)
    if target.shape != output.shape:
        return None
    target = target.to(output.dtype)
    if not bool(target.isfinite().all()) or bool((target.abs() == 1).all() and (target < 0).any()):
        return None  # signs, such as a critic's: which is which is a matter of taste
    binary = bool(((target == 0) | (target == 1)).all())
    if output.dim() > 2 and not binary:
        return None
    return 2 * target - 1 if binary else target - output


ANSWERS = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(30, 16), nn.Linear({size}, 30)
        self.rnn = nn.GRU(16, 16, batch_first=True, bidirectional={both})

    def forward(self, tokens):
        return self.head(self.rnn(self.embed(tokens))[0])

def loss(output, target):
    return F.cross_entropy(output.flatten(0, 1), target.flatten())

model = Net()
text = torch.randint(30, (16, 13))
batch = text[:, :-1], text[:, 1:]
"""


@rule(
    "C38",
    "answer-in-the-input",
    "error",
    title="Each position sees the token it is to predict",
    why="The loss falls to nearly 0 by copying, and the model has learnt nothing that it can use when the answer is "
    "not there.",
    fix="Shift the targets by one, x = text[:, :-1] and y = text[:, 1:]; a causal mask, and no second direction.",
    source="measured: tokens are replaced, and the outputs that are to predict them change",
    bad=ANSWERS.format(both=True, size=32),
    good=ANSWERS.format(both=False, size=16),
)
def answer_in_the_input(evidence: Evidence) -> Iterator[Found]:
    """Targets are the tokens of an input, in place or moved by one, and a token changes the output that predicts it.

    In place only where no earlier output changes: an autoencoder sees all, and has a bottleneck.
    """
    target = evidence.target
    if not isinstance(target, Tensor) or target.is_floating_point() or evidence.run.error is not None:
        return
    for tokens in tensors_in(evidence.inputs):
        if tokens.dim() != 2 or tokens.is_floating_point() or tokens.shape[1] < 4 or tokens.shape[0] < 2:
            continue
        if target.numel() != tokens.numel() or len(torch.unique(tokens)) < 5:
            continue
        answers = target.view_as(tokens)
        matters = answers >= 0
        in_place = share(answers == tokens, matters) > 0.99
        ahead = share(answers[:, :-1] == tokens[:, 1:], matters[:, :-1]) > 0.99
        if in_place == ahead:
            continue
        at = tokens.shape[1] // 2
        seen = positions(evidence, tokens, at)
        if seen is None:
            continue
        if in_place and bool(seen[at]) and not bool(seen[:at].any()):
            yield Found(
                "the targets are the input tokens themselves, and the output of each position depends on its own: "
                "copying is enough",
                fix="x, y = text[:, :-1], text[:, 1:]",
            )
        elif ahead and bool(seen[at - 1]):
            yield Found(
                f"the target of position {at - 1} is the token in position {at}, and the output of position {at - 1} "
                "changes with it: the model sees what it is to predict",
                fix="# a causal mask (is_causal=True), or one direction only",
            )


def share(which: Tensor, of: Tensor) -> float:
    """How many of some entries are so."""
    return float(which[of].float().mean()) if bool(of.any()) else 0.0


def positions(evidence: Evidence, tokens: Tensor, at: int) -> Tensor | None:
    """Which positions' outputs change when the tokens in position `at` are those of other samples."""
    other = tokens.clone()
    other[:, at] = tokens[:, at].roll(1)
    if torch.equal(other, tokens):
        return None
    one = evidence.again(training=False)
    two = evidence.again(mapped(evidence.fresh, lambda x: other if x is tokens else x), training=False)
    if one.error is not None or two.error is not None:
        return None
    size, length = tokens.shape
    for a, b in zip(one.outputs, two.outputs, strict=False):
        if a.shape != b.shape or not a.is_floating_point() or a.numel() % tokens.numel() or a.dim() < 2:
            continue
        change = (a.detach() - b.detach()).abs()
        if a.dim() == 3 and a.shape[:2] != tokens.shape and a.shape[0] == size and a.shape[2] == length:
            change = change.transpose(1, 2)
        elif a.shape[0] != tokens.numel() and a.shape[:2] != tokens.shape:
            continue
        by_position = change.reshape(size, length, -1).amax((0, 2))
        return by_position > 1e-5 * float(entries(a).abs().mean())
    return None


@rule(
    "C42",
    "batch-norm-on-the-output",
    "warning",
    title="A batch norm behind the last layer of a regression",
    why="In training each prediction is that of its sample relative to the batch: its level is lost, and comes back "
    "only through the norm's own weight and bias. In evaluation running statistics stand in for it.",
    fix="Leave the norm out; scale the targets instead.",
    source="Ioffe & Szegedy 2015, Batch normalization: between layers; mean and variance of the output are the batch's",
    bad="""
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1), nn.BatchNorm1d(1))
loss = nn.MSELoss()
batch = torch.randn(32, 8), torch.randn(32, 1) + 3
""",
    good="""
model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))
loss = nn.MSELoss()
batch = torch.randn(32, 8), torch.randn(32, 1) + 3
""",
)
def batch_norm_on_the_output(evidence: Evidence) -> Iterator[Found]:
    """What a regression loss compares with the batch's targets comes out of a batch norm that measures."""
    for call in evidence.losses:
        node = evidence.blame(call.input)
        if call.kind in REGRESSION and node is not None and node.kind == "batch_norm" and given(evidence, call.target):
            yield Found(
                f"{said(node)} standardizes the outputs over the batch in front of {call.kind}, whose targets have "
                f"mean {float(entries(call.target).mean()):.3g}",
                module=node.name,
                fix=without(node, "the batch norm"),
                mend=drop(node),
            )


TAUGHT = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.student, self.teacher = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x):
        return self.student(x), self.teacher(x){}

model = Net()
optimizer = torch.optim.Adam(model.parameters())
batch = torch.randn(32, 8), torch.randint(3, (32,))
def loss(output, target):
    student, teacher = output
    return F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="batchmean")
"""


@rule(
    "C43",
    "teacher-is-trained",
    "warning",
    title="The loss trains the teacher towards its student",
    why="The two meet where it is easiest, at a constant: the teacher forgets what it knows, and the loss falls to 0.",
    fix="with torch.no_grad(): around the teacher, teacher.requires_grad_(False), and an optimizer without it.",
    source="Hinton, Vinyals & Dean 2015, Distilling the knowledge in a neural network (1503.02531): the teacher is "
    "fixed",
    bad=TAUGHT.format(""),
    good=TAUGHT.format(".detach()"),
)
def teacher_is_trained(evidence: Evidence) -> Iterator[Found]:
    """Of a module that is called so, with gradients that are not zero, in the optimizer."""
    held = held_by(evidence)
    if held is None:
        return
    parameters = dict(evidence.model.named_parameters())
    names = [
        name
        for name, gradient in evidence.gradients.items()
        if any(map(is_teacher, name.split(".")))
        and gradient is not None
        and id(parameters[name]) in held
        and bool(entries(gradient).any())
    ]
    if names and len(names) < len(evidence.gradients):
        parts = names[0].split(".")
        root = next(".".join(parts[: i + 1]) for i in range(len(parts)) if is_teacher(parts[i]))
        yield Found(
            f"{len(names)} tensors of the teacher get gradients and are in the optimizer ({listed(names)})",
            module=names[0].rpartition(".")[0],
            fix=f"model.{root}.requires_grad_(False)",
        )


def is_teacher(part: str) -> bool:
    """Whether a module's name says that it teaches."""
    return "teacher" in part.lower() or part.lower() in ("ema", "momentum_encoder", "key_encoder")
