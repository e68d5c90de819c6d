"""Rules about dimensions: which one a loss takes for the classes, and views where they were to change places."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from renorm.diagnose.catalogue import Found, rule
from renorm.diagnose.evidence import Evidence
from renorm.diagnose.rules.words import said, shown
from renorm.diagnose.trace import Node

# Views that can be done again on numbers of the features.
# fmt: off
AGAIN = frozenset((
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "swapaxes", "movedim",
    "contiguous", "clone", "t", "T", "mT",
))
# fmt: on
SAME = frozenset(("to", "float", "half", "bfloat16", "double", "type", "type_as", "detach", "cpu", "cuda"))

TAGGER = """
class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(8, 16, batch_first=True), nn.Linear(16, 12)

    def forward(self, x):
        return self.head(self.rnn(x)[0]){}

model = Tagger()
loss = nn.CrossEntropyLoss()
batch = torch.randn(16, 12, 8), torch.randint(12, (16, 12))
"""


@rule(
    "C36",
    "classes-in-another-dimension",
    "error",
    title="The cross-entropy takes another dimension for the classes",
    why="cross_entropy reads the classes along dimension 1. Where sizes happen to agree, scores along time or space "
    "are compared as if they were classes, and a view that does not transpose mixes both.",
    fix="output.transpose(1, 2) for (N, T, K); output.permute(0, 2, 1).reshape(-1, K) before flattening (N, K, T).",
    source="torch.nn.CrossEntropyLoss: input of shape (N, C, d1, ...); the features are followed through the views",
    bad=TAGGER.format(""),
    good=TAGGER.format(".transpose(1, 2)"),
)
def classes_in_another_dimension(evidence: Evidence) -> Iterator[Found]:
    """The numbers of the last layer's units, sent through the same views, do not count up along dimension 1."""
    for call in evidence.losses:
        if call.kind not in ("cross_entropy", "nll_loss") or call.input.dim() < 2 or call.input.shape[1] < 2:
            continue
        found = units(evidence, call.input)
        if found is None:
            continue
        node, numbers, count = found
        steps = numbers.diff(dim=1)
        if steps.numel() == 0 or bool((steps == steps.flatten()[0]).all() and steps.flatten()[0] != 0):
            continue
        classes = numbers.shape[1]
        still = bool((steps == 0).all())
        # Scores of positions, as of a pointer, are a choice; so are units that are no multiple of the classes.
        if count % classes or (still and count != classes):
            continue
        where = "other positions of the same unit" if still else "a mixture of units and positions"
        yield Found(
            f"{call.kind} takes dimension 1 of {shown(tuple(numbers.shape))} for the {classes} classes, and that "
            f"holds {where} of {said(node)}",
            module=node.name,
            fix="output.transpose(1, -1)  # classes in dimension 1"
            if still
            else f"output.movedim(1, -1).reshape(-1, {classes})  # not view: a view keeps the order of memory",
        )


def units(evidence: Evidence, values: Tensor) -> tuple[Node, Tensor, int] | None:
    """The layer that made these values, the number of the unit at each place, and how many units there are."""
    views: list[Node] = []
    node = evidence.trace.maker(values, through_views=False)
    while node is not None and (node.kind in AGAIN or node.kind in SAME or node.kind == "log_softmax"):
        views.append(node)
        node = node.sources[0] if node.sources else None
    axis = {"linear": -1, "rnn": -1, "conv": 1, "conv_transpose": 1}.get("" if node is None else node.kind)
    if node is None or axis is None or not node.outputs or node.outputs[0].dim() < 2:
        return None
    made = node.outputs[0]
    axis %= made.dim()
    if node.kind.startswith("conv") and node.module is None and made.dim() < 3:
        return None
    count = made.shape[axis]
    shape = [-1 if i == axis else 1 for i in range(made.dim())]
    numbers = torch.arange(count).view(shape).expand(made.shape).contiguous()
    for view in reversed(views):
        if view.kind in AGAIN:
            arguments = view.args[1:] if view.module is None else ()
            try:
                numbers = again(numbers, view.kind, arguments, view.kwargs)
            except Exception:  # called in a way that we cannot repeat
                return None
    return (node, numbers, count) if numbers.shape == values.shape else None


def again(numbers: Tensor, kind: str, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """The same view of other numbers."""
    found = getattr(numbers, kind)
    return found if isinstance(found, Tensor) else found(*args, **kwargs)


MOVED = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        x = x.{}
        return self.head(F.relu(self.conv(x)).mean((2, 3)))

model = Net()
loss = nn.CrossEntropyLoss()
batch = torch.randn(16, 12, 10, 3), torch.randint(4, (16,))
"""


@rule(
    "C44",
    "view-where-dimensions-change-places",
    "warning",
    title="A view where dimensions were to change places",
    why="view and reshape keep the order of memory and only cut it anew: the pixels of an image of (H, W, 3) as (3, H, "
    "W) are three stripes of mixed colours.",
    fix="x.permute(0, 3, 1, 2) for (N, H, W, C) to (N, C, H, W).",
    source="torch.Tensor.view; the sizes of the result are those of the input in another order",
    bad=MOVED.format("reshape(16, 3, 12, 10)"),
    good=MOVED.format("permute(0, 3, 1, 2)"),
)
def view_where_dimensions_change_places(evidence: Evidence) -> Iterator[Found]:
    """As many dimensions, the same sizes and another order, of floats that come from the batch or a layer."""
    for node in evidence.trace.of_kind("view", "reshape"):
        if node.module is not None or not node.inputs or not node.outputs or not node.inputs[0].is_floating_point():
            continue
        x, y = node.inputs[0], node.outputs[0]
        before, after = ([n for n in z.shape if n > 1] for z in (x, y))
        if x.dim() != y.dim() or len(before) < 3 or before == after or sorted(before) != sorted(after):
            continue
        if isinstance(x, torch.nn.Parameter):
            continue
        yield Found(
            f"{node.where} makes {shown(tuple(y.shape))} of {shown(tuple(x.shape))}: the same sizes in another "
            "order, and the values stay where they were",
            module=node.name,
            fix=f"x.permute({', '.join(map(str, places(tuple(x.shape), tuple(y.shape))))})",
        )
        return


def places(before: tuple[int, ...], after: tuple[int, ...]) -> list[int]:
    """A permutation that makes one shape of the other."""
    left = list(range(len(before)))
    found = []
    for size in after:
        place = next(i for i in left if before[i] == size)
        left.remove(place)
        found.append(place)
    return found
