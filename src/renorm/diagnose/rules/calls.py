"""What the rules about losses share: the values of a call, who made them, and repairs for it."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from renorm.diagnose.catalogue import Mended
from renorm.diagnose.evidence import Evidence
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


def kind_of(node: Node | None) -> str:
    """The kind of a call; empty where there is none."""
    return "" if node is None else node.kind


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


HEAD = """
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5){})
loss = {}
batch = torch.randn(32, 8), {}
"""


CLASSES = "torch.randint(5, (32,))"
BINARY = """
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1){})
loss = {}
batch = torch.randn(32, 8), {}
"""


YES_NO = "torch.randint(2, (32, 1)).float()"
