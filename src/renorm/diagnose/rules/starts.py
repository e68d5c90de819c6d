"""Rules about gradients at the first weights: units that stay equal, ends that are far apart."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from renorm.diagnose.catalogue import Found, rule
from renorm.diagnose.evidence import Evidence, entries
from renorm.diagnose.rules.gradients import DEEP, called_leaves, is_zero
from renorm.diagnose.rules.parameters import owner_of
from renorm.diagnose.rules.words import listed
from renorm.diagnose.trace import WEIGHTED


@rule(
    "C25c",
    "symmetric-units",
    "error",
    title="Units that start equal and stay equal",
    why="Units with the same weights that get the same gradient are one unit, however wide the layer is.",
    fix="Initialize weights at random; zeros are fine for biases, for last layers and for the scale of a residual "
    "branch.",
    source="Goodfellow, Bengio & Courville 2016, Deep Learning, 8.4; confirmed by the gradients on the batch",
    bad=DEEP.format("for p in model.parameters():\n    nn.init.constant_(p, 0.1)"),
    good=DEEP.format("for p in model.parameters():\n    nn.init.normal_(p, std=0.3)"),
)
def symmetric_units(evidence: Evidence) -> Iterator[Found]:
    """The rows of a weight are equal, and so are the rows of its gradient, which is not zero."""
    found = []
    for name, gradient in evidence.gradients.items():
        module = evidence.model.get_submodule(owner_of(name))
        if gradient is None or gradient.layout is not torch.strided or name.rpartition(".")[2][:6] != "weight":
            continue
        weight = module.get_parameter(name.rpartition(".")[2])
        for units, slopes in zip(_units(module, weight), _units(module, gradient), strict=True):
            if units.shape[0] > 1 and _equal(units, 1e-6) and _equal(slopes, 1e-4) and not is_zero(slopes):
                found.append((owner_of(name), units))
                break
    if found:
        owner, units = found[0]
        of_one = units[0].detach().float()
        yield Found(
            f"all {units.shape[0]} units of {owner or 'the model'} have the same weights (mean "
            f"{float(of_one.mean()):.3g}) and get the same gradient: they stay one unit"
            + (f"; so in {listed(name for name, _ in found[1:])}" if len(found) > 1 else ""),
            module=owner,
            fix="\n".join(
                f'torch.nn.init.kaiming_normal_(model.get_submodule("{name}").weight, nonlinearity="relu")'
                if hasattr(evidence.model.get_submodule(name), "weight")
                else f'model.get_submodule("{name}").reset_parameters()'
                for name in dict.fromkeys(name for name, _ in found)
            ),
        )


def _units(module: nn.Module, weight: Tensor) -> list[Tensor]:
    """A weight as units by their incoming weights; the gates of a recurrent layer apart."""
    if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return [weight.flatten(1)]
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return [weight.transpose(0, 1).flatten(1)] if module.groups == 1 else []
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and weight.shape[0] % module.hidden_size == 0:
        return list(torch.split(weight, module.hidden_size))
    return []


def _equal(rows: Tensor, tolerance: float) -> bool:
    """Whether rows are equal, up to a part of the largest entry."""
    rows = rows.detach().float()
    largest = float(rows.abs().max()) if rows.numel() else 0.0
    return rows.numel() > 0 and float((rows - rows[0]).abs().max()) <= tolerance * largest


@rule(
    "C25e",
    "vanishing-at-the-start",
    "warning",
    title="Gradients of the first layer that are a tiny or huge part of the last layer's",
    why="With plain steps only one end of the model learns; with Adam small gradients drown in rounding and in eps.",
    fix="Initialize for the activation (kaiming_normal_ for ReLU, xavier_normal_ for tanh), use ReLU-like activations "
    "instead of sigmoids, and put norms or residual connections between.",
    source="Glorot & Bengio 2010, AISTATS 9; threshold calibrated on the clean programs of tests/diagnose",
    bad="""
model = nn.Sequential(*[part for _ in range(10) for part in (nn.Linear(16, 16), nn.Sigmoid())], nn.Linear(16, 5))
loss = nn.CrossEntropyLoss()
batch = torch.randn(32, 16), torch.randint(5, (32,))
""",
    good="""
model = nn.Sequential(*[part for _ in range(10) for part in (nn.Linear(16, 16), nn.ReLU())], nn.Linear(16, 5))
loss = nn.CrossEntropyLoss()
batch = torch.randn(32, 16), torch.randint(5, (32,))
""",
)
def vanishing_at_the_start(evidence: Evidence) -> Iterator[Found]:
    """Root mean squares of the gradients of the first and of the last weight matrix that were called.

    Or a sigmoid or tanh between weights with nine in ten of its inputs where it is flat.
    """
    yield from _flat(evidence)
    ends = []
    for name in called_leaves(evidence):
        gradient = evidence.gradients.get(f"{name}.weight")
        if gradient is None or gradient.layout is not torch.strided or gradient.dim() < 2:
            continue
        module = evidence.model.get_submodule(name)
        size = float(entries(gradient).square().mean().sqrt())
        # Weights at zero pass nothing on, and that changes with the first step.
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or size == 0 or is_zero(module.get_parameter("weight")):
            continue
        ends.append((name, size))
    if len(ends) < 3 or not all(math.isfinite(size) for _, size in ends):
        return
    (first, low), (last, high) = ends[0], ends[-1]
    ratio = low / high
    if ratio < 1e-6 or ratio > 1e6:
        yield Found(
            f"the gradient of {first} is {ratio:.1g} times that of {last} (root mean squares {low:.2g} and {high:.2g})",
            module=first,
        )


# Where the slope is a hundredth of that at 0.
FLAT = {"sigmoid": 6.0, "tanh": 3.0}


def _flat(evidence: Evidence) -> Iterator[Found]:
    for node in evidence.trace.of_kind(*FLAT):
        values = entries(node.inputs[0]).abs() if node.inputs else torch.empty(0)
        share = float((values > FLAT[node.kind]).float().mean()) if values.numel() >= 64 else 0.0
        # A head may be sure of itself, a gate closed: between two layers nothing passes back.
        between = any(after.kind in WEIGHTED for after in evidence.trace.consumers(node))
        before = evidence.trace.maker(node.inputs[0]) if node.inputs else None
        if share > 0.9 and between and before is not None and before.kind in WEIGHTED:
            yield Found(
                f"{share:.0%} of the inputs of {node.where} are beyond {FLAT[node.kind]:g} (mean size "
                f"{float(values.mean()):.3g}), where it is flat: hardly a gradient comes back to {before.where}",
                module=before.name,
                fix="# smaller initial weights, scaled inputs, or a norm in front of it",
            )
