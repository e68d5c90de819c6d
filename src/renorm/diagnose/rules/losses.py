"""Rules about what goes into a loss: outputs that were normalized twice, targets outside their range, shapes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from renorm.diagnose.catalogue import Found, Mended, rule
from renorm.diagnose.evidence import Evidence
from renorm.diagnose.trace import Node

TOLERANCE = 1e-4  # of a sum of probabilities from 1, in float32


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
