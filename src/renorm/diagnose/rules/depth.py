"""Rules about activations that are missing: models that are linear, and results that nobody takes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from renorm.diagnose.catalogue import Found, rule
from renorm.diagnose.evidence import Evidence, Run, mapped
from renorm.diagnose.rules.words import called, listed, path
from renorm.diagnose.trace import Node, tensors_in

LAYERS = ("linear", "conv", "conv_transpose")

STACK = """
model = nn.Sequential(nn.Linear(8, 32), {}nn.Linear(32, 32), {}nn.Linear(32, 5))
loss = nn.CrossEntropyLoss()
batch = torch.randn(32, 8), torch.randint(5, (32,))
"""


@rule(
    "C34",
    "linear-model",
    "warning",
    title="Several layers and no activation between them",
    why="Linear layers behind each other are one linear layer: the depth costs time and adds nothing.",
    fix="An activation such as nn.ReLU() between the layers.",
    source="the composition of affine maps is affine; measured on the batch. Missing activations are among the faults "
    "of DeepLocalize (Wardat et al. 2021) and NeuraLint (Nikanjam et al. 2021)",
    bad=STACK.format("", ""),
    good=STACK.format("nn.ReLU(), ", "nn.ReLU(), "),
)
def linear_model(evidence: Evidence) -> Iterator[Found]:
    """Nothing but linear calls on the way, and the output at the middle of two inputs is the middle of their outputs.

    One activation behind the last layer makes no difference. A hidden layer that is narrower than input and output
    restricts the rank, which is a purpose.
    """
    given = [x for x in tensors_in(evidence.inputs) if x.is_floating_point()]
    if evidence.run.error is not None or len(given) != 1 or len(tensors_in(evidence.inputs)) != 1 or len(given[0]) < 2:
        return
    layers = chain(evidence)
    if len(layers) < 2:
        return
    widths = [(channels(node, node.inputs[0]), channels(node, node.outputs[0])) for node in layers]
    if min(out for _, out in widths[:-1]) < min(widths[0][0], widths[-1][1]):
        return
    x = given[0].detach()
    other = 0.7 * x.roll(1, 0) + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    runs = [
        evidence.again(mapped(evidence.fresh, partial(_instead, value)), training=False)
        for value in (x, other, (x + other) / 2)
    ]
    ends = [end_of(run, layers[-1]) for run in runs]
    if any(end is None for end in ends):
        return
    one, two, middle = (end.detach().double() for end in ends if end is not None)
    apart = float((one - two).norm())
    if not apart > 0 or float((middle - (one + two) / 2).norm()) > 1e-4 * apart + 1e-6 * float(one.norm()):
        return
    between = next((called(node) for node in layers[:1]), "")
    yield Found(
        f"{listed([called(node) for node in layers])}: {len(layers)} layers, and what comes out of the last one is a "
        f"linear function of the input: there is no activation behind {between}",
        module=layers[0].name,
        fix=f"torch.relu({path(layers[0].name)}(x))  # and behind the others but the last",
    )


def _instead(value: Tensor, _: Tensor) -> Tensor:
    return value


HEADS = ("sigmoid", "softmax", "log_softmax", "tanh", "softplus", "relu", "exp", "logsigmoid", "hardsigmoid")
LINEAR = (
    *("dropout", "batch_norm", "mean", "sum", "avg_pool1d", "avg_pool2d", "avg_pool3d", "AvgPool1d", "AvgPool2d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "pad", "interpolate"),
    *("Upsample", "pixel_shuffle", "PixelShuffle", "ZeroPad2d", "ReflectionPad2d"),
)


def chain(evidence: Evidence) -> list[Node]:
    """The layers on the way to the output, the first in front; empty where anything else than a linear call is "
    "there."""
    outputs = [y for y in evidence.run.outputs if y.is_floating_point()]
    node = evidence.blame(outputs[0]) if len(outputs) == 1 else None
    if node is not None and node.kind in HEADS:
        node = node.sources[0]
    found: list[Node] = []
    while node is not None:
        if node.kind in LAYERS and node.module is not None:
            depthwise = getattr(node.module, "groups", 1) > 1  # as pooling with weights
            found += [] if depthwise else [node]
        elif not node.is_view and node.kind not in LINEAR:
            return []
        if sum(source is not None for source in node.sources) > 1:
            return []
        node = node.sources[0] if node.sources else None
    return found[::-1]


def channels(node: Node, tensor: Tensor) -> int:
    """The width of what goes into a layer, or comes out of it."""
    return tensor.shape[-1] if node.kind == "linear" or tensor.dim() < 2 else tensor.shape[1]


def end_of(run: Run, layer: Node) -> Tensor | None:
    """What this layer gave in another run, where it ran once."""
    found = [node for node in run.trace.nodes if node.module is layer.module]
    return found[0].outputs[0] if run.error is None and len(found) == 1 else None


LOST = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 5)

    def forward(self, x):
        x = F.relu(self.a(x))
        x = self.b(x)
        {}F.relu(x)
        return self.c(x)

model = Net()
loss = nn.CrossEntropyLoss()
batch = torch.randn(32, 8), torch.randint(5, (32,))
"""
# What changes values and is written for nothing but its result.
PASSING = (
    *("relu", "leaky_relu", "dropout", "batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm", "norm"),
    *("gelu", "GELU", "silu", "SiLU", "elu", "ELU", "selu", "SELU", "relu6", "ReLU6", "hardswish", "Hardswish"),
    *("PReLU", "prelu", "mish", "Mish"),
)


@rule(
    "C35",
    "result-not-used",
    "warning",
    title="An activation, norm or dropout whose result is thrown away",
    why="F.relu(x) does not change x: without an assignment the model goes on with what it had.",
    fix="x = F.relu(x).",
    source="measured: the loss does not depend on the result, and the call's input goes on to other layers",
    bad=LOST.format(""),
    good=LOST.format("x = "),
)
def result_not_used(evidence: Evidence) -> Iterator[Found]:
    """Nothing takes the result, the loss' graph has it not, and what went in goes on elsewhere."""
    ends = [t for t in (evidence.run.loss, *evidence.run.outputs) if isinstance(t, Tensor) and t.grad_fn is not None]
    if evidence.run.error is not None or not ends:
        return
    kept = {id(tensor) for module in evidence.model.modules() for tensor in tensors_in(list(vars(module).values()))}
    returned = {id(tensor) for tensor in evidence.run.outputs}
    graph: set[object] | None = None
    for node in evidence.trace.of_kind(*PASSING):
        y = node.outputs[0]
        hooked = isinstance(node.module, nn.Module) and bool(node.module._forward_hooks)
        if not y.requires_grad or not node.inputs or y is node.inputs[0] or hooked or {id(y)} & (kept | returned):
            continue
        x = node.inputs[0]
        onward = [n for n in evidence.trace.nodes if n is not node and any(x is taken for taken in n.inputs)]
        if evidence.trace.consumers(node) or not onward:
            continue
        graph = reachable(ends) if graph is None else graph
        if y.grad_fn in graph:
            continue
        yield Found(
            f"the result of {called(node)} is not used; its input goes on to {listed([called(n) for n in onward])}",
            module=node.name,
            fix=f"x = {path(node.name)}(x)" if node.module is not None else f"x = F.{node.kind}(x)",
        )


def reachable(ends: list[Tensor]) -> set[object]:
    """All operations that these tensors were computed by."""
    waiting: list[object] = [end.grad_fn for end in ends]
    seen: set[object] = set()
    while waiting:
        operation = waiting.pop()
        if operation is not None and operation not in seen:
            seen.add(operation)
            waiting += [before for before, _ in operation.next_functions]  # type: ignore[attr-defined]
    return seen
