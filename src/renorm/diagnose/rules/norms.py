"""Rules about norms: what stands before them, over which axes, with which numbers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from renorm.diagnose.catalogue import Found, Mended, rule
from renorm.diagnose.evidence import Evidence
from renorm.diagnose.rules.calls import drop
from renorm.diagnose.rules.statistics import NormCall, is_norm, norm_call, norm_calls
from renorm.diagnose.rules.words import called, listed, path, shown
from renorm.diagnose.trace import Node

WEIGHTED = ("linear", "conv", "conv_transpose")


def one_each(calls: Iterator[NormCall]) -> list[NormCall]:
    """Of several calls of one layer that with the fewest values."""
    fewest: dict[object, NormCall] = {}
    for call in calls:
        key = call.node.module or call.node
        if key not in fewest or call.values < fewest[key].values:
            fewest[key] = call
    return list(fewest.values())


# ---- what stands before a norm

PLAIN = """
model = nn.Sequential(nn.Conv2d(3, 8, 3{}), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
loss = nn.CrossEntropyLoss()
batch = torch.randn(16, 3, 8, 8), torch.randint(4, (16,))
"""


@rule(
    "C16",
    "bias-before-norm",
    "info",
    title="A bias in front of a norm that subtracts it again",
    why="A constant added to a channel does not change what is left when the channel's mean is subtracted: the bias "
    "gets no gradient, and with weight decay it just shrinks. It costs memory and, in a convolution, time.",
    fix="Pass bias=False to the layer in front of the norm.",
    source="torchvision.ops.Conv2dNormActivation has no bias where there is a norm; with float32, bias gradients of "
    "1e-10 to 1e-12 were measured",
    bad=PLAIN.format(""),
    good=PLAIN.format(", bias=False"),
)
def bias_before_norm(evidence: Evidence) -> Iterator[Found]:
    """Everything the layer makes goes into such norms, and its bias has no gradient beside that of its weight."""
    uses: dict[int, list[tuple[Node, Tensor, Tensor]]] = {}
    for node in evidence.trace.of_kind(*WEIGHTED):
        weight, bias = parameters_of(node)
        if weight is not None and bias is not None and bias.requires_grad and weight.requires_grad:
            uses.setdefault(id(bias), []).append((node, weight, bias))
    returned = {id(evidence.blame(tensor)) for tensor in evidence.run.outputs}
    found: list[tuple[Node, list[Node], float]] = []
    for nodes in uses.values():
        behind = [evidence.trace.consumers(node) for node, _, _ in nodes]
        if all(norms and all(map(subtracts, norms)) for norms in behind) and not returned & {id(n[0]) for n in nodes}:
            norms = list(dict.fromkeys(norm for norms in behind for norm in norms))
            ratio = gradient_ratio([norm.outputs[0] for norm in norms], *nodes[0][1:])
            half = max(torch.finfo(norm.outputs[0].dtype).eps for norm in norms)
            if ratio is not None and ratio < max(1e-5, half):
                found.append((nodes[0][0], norms, ratio))
    if found:
        names = [called(node) for node, _, _ in found]
        layers = [node for node, _, _ in found if droppable(node)]
        pairs = tuple((node.name, tuple(norm.name for norm in norms)) for node, norms, _ in found if node in layers)
        yield Found(
            f"{listed(names)}: the bias is subtracted again by the norm behind it ({called(found[0][1][0])}"
            f"{'' if len(found) == 1 else ', ...'}); its gradient is at most "
            f"{max(ratio for _, _, ratio in found):.1g} times that of the weight",
            module=found[0][0].name,
            fix="\n".join(f"{path(node.name)}.bias = None  # or build it with bias=False" for node in layers[:5])
            or "# bias=None in the call",
            mend=partial(without_bias, pairs=pairs) if pairs else None,
        )


def parameters_of(node: Node) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of a layer, or of a call of its function."""
    if node.module is not None:
        return getattr(node.module, "weight", None), getattr(node.module, "bias", None)
    given = [
        node.kwargs.get(name, node.args[i] if len(node.args) > i else None) for i, name in ((1, "weight"), (2, "bias"))
    ]
    weight, bias = (value if isinstance(value, Tensor) else None for value in given)
    return weight, bias


def subtracts(node: Node) -> bool:
    """Whether this norm takes the mean of each channel of its input away."""
    call = norm_call(node)
    if call is None or not call.plain or not call.centered or not call.measures:
        return False
    return call.kind in ("batch_norm", "instance_norm") or (call.kind == "norm" and call.couples_batch)


def gradient_ratio(outputs: list[Tensor], weight: Tensor, bias: Tensor) -> float | None:
    """The norm of the bias' gradient over that of the weight's, for a gradient of all sorts that comes into `outputs`.

    None where there are none, such as behind a norm whose weight is 0.
    """
    arriving = [torch.arange(y.numel(), device=y.device).cos().view(y.shape).to(y.dtype) for y in outputs]
    try:
        of_weight, of_bias = torch.autograd.grad(outputs, (weight, bias), arriving, retain_graph=True)
    except RuntimeError:  # no graph, or one whose tensors were overwritten
        return None
    size = float(of_weight.norm())
    return float(of_bias.norm()) / size if size > 0 else None


def droppable(node: Node) -> bool:
    """Whether the layer's bias can be taken out of the model by its name."""
    module = node.module
    return module is not None and bool(node.name) and isinstance(module._parameters.get("bias"), Tensor)


def without_bias(
    model: nn.Module, optimizer: Optimizer | None, *, pairs: tuple[tuple[str, tuple[str, ...]], ...]
) -> Mended:
    """Take the biases out; running means, which had them in, move by as much: evaluation stays the same."""
    for name, norms in pairs:
        layer: Any = model.get_submodule(name)
        bias = layer.bias
        with torch.no_grad():
            for norm in norms:
                mean = getattr(model.get_submodule(norm), "running_mean", None)
                if isinstance(mean, Tensor) and mean.shape == bias.shape:
                    mean -= bias
        layer.bias = None
        if optimizer is not None:
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if p is not bias]
            optimizer.state.pop(bias, None)
    return Mended(model, optimizer, f"{listed([name for name, _ in pairs])}: bias=False")


# ---- its numbers


@rule(
    "C20",
    "norm-constants",
    "warning",
    title="A momentum or eps that is meant for another library",
    why="Torch's momentum is the weight of the new batch: 0.99, as other libraries count, keeps only the last batch, "
    "and evaluation follows its noise. An eps that is large beside the variance leaves the norm half undone; one that "
    "is tiny lets a constant channel explode.",
    fix="momentum=0.1 (one minus what Keras and TensorFlow call momentum), eps=1e-5.",
    source="torch.nn.BatchNorm2d: running = (1 - momentum) * running + momentum * batch",
    bad=PLAIN.format(", bias=False").replace("BatchNorm2d(8)", "BatchNorm2d(8, momentum=0.99)"),
    good=PLAIN.format(", bias=False").replace("BatchNorm2d(8)", "BatchNorm2d(8, momentum=0.01)"),
)
def norm_constants(evidence: Evidence) -> Iterator[Found]:
    """Layers of the same constants are one finding. LayerNorm with eps=1e-12, as BERT has it, is no mistake."""
    odd: dict[tuple[str, float], list[Node]] = {}
    for call in one_each(norm_calls(evidence.trace)):
        module = call.node.module
        if module is None:
            continue
        momentum, eps = getattr(module, "momentum", None), getattr(module, "eps", None)
        if call.tracks and call.measures and isinstance(momentum, (int, float)):
            if momentum >= 0.5:
                odd.setdefault(("momentum", float(momentum)), []).append(call.node)
            elif momentum == 0:
                odd.setdefault(("still", 0.0), []).append(call.node)
        if isinstance(eps, (int, float)) and (eps > 1e-2 or eps <= 0 or (eps < 1e-8 and call.couples_batch)):
            odd.setdefault(("eps", float(eps)), []).append(call.node)
    for (what, value), nodes in odd.items():
        if what == "momentum":
            other = max(0.001, round(1 - value, 6)) if value < 1 else 0.1
            said = f"momentum={value:g}: running statistics are {value:.0%} the last batch's"
            fix = f"momentum={other:g}  # torch's momentum is the weight of the new batch"
        elif what == "still":
            said = "momentum=0: running statistics never move from where they start, and evaluation uses them"
            fix = "momentum=0.1  # or None for the average over all batches"
        else:
            large = "large beside a variance of 1" if value > 0 else "a constant channel is divided by 0"
            said = f"eps={value:g}: {large if value > 1e-2 or value <= 0 else 'a constant channel explodes'}"
            fix = "eps=1e-5"
        names = tuple(node.name for node in nodes)
        attribute, number = ("eps", 1e-5) if what == "eps" else ("momentum", float(fix.split("=")[1].split()[0]))
        mend = partial(with_constant, names=names, attribute=attribute, value=number)
        yield Found(f"{listed(map(called, nodes))}: {said}", module=names[0], fix=fix, mend=mend)


def with_constant(
    model: nn.Module, optimizer: Optimizer | None, *, names: tuple[str, ...], attribute: str, value: float
) -> Mended:
    """Another momentum or eps for these norms."""
    for name in names:
        setattr(model.get_submodule(name), attribute, value)
    return Mended(model, optimizer, f"{listed(names)}: {attribute}={value:g}")


# ---- its axes

IMAGES = """
model = nn.Sequential(
    nn.Conv2d(3, 8, 3, padding=1), {}, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
)
loss = nn.CrossEntropyLoss()
batch = torch.randn(16, 3, 16, 16), torch.randint(4, (16,))
"""
# What keeps the dimensions where they are, beside layers with weights.
KEEPS = (
    *("relu", "leaky_relu", "sigmoid", "tanh", "gelu", "silu", "dropout", "batch_norm", "instance_norm", "group_norm"),
    *("GELU", "SiLU", "ELU", "PReLU", "Hardswish", "Mish", "ReLU6", "SELU", "MaxPool1d", "MaxPool2d", "AvgPool1d"),
    *("AvgPool2d", "max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "add", "__add__", "contiguous", "clone"),
    *("elu", "relu6", "hardswish", "mish", "Identity", "to", "float", "half", "bfloat16", "__iadd__", "view"),
)


@rule(
    "C21",
    "layer-norm-over-width",
    "warning",
    title="A layer norm over the width of images instead of their channels",
    why="LayerNorm(k) normalizes the last dimension. Behind a convolution that is the width: every row of every "
    "channel is standardized on its own, which removes contrast between places and fixes the image size.",
    fix="GroupNorm(1, channels), renorm.LayerNorm2d(channels), or move the channels to the end first.",
    source="torch.nn.LayerNorm: over the last dimensions; torch.nn.Conv2d: channels second",
    bad=IMAGES.format("nn.LayerNorm(16)"),
    good=IMAGES.format("nn.GroupNorm(1, 8)"),
)
def layer_norm_over_width(evidence: Evidence) -> Iterator[Found]:
    """The input comes from a convolution with its dimensions in their places, and only the last one is normalized."""
    for call in one_each(norm_calls(evidence.trace)):
        x = call.input
        if call.kind not in ("layer_norm", "rms_norm") or call.axis != -1 or x.dim() not in (3, 4, 5):
            continue
        if call.values != x.shape[-1] or not from_conv(call.node):
            continue
        last = {3: "length", 4: "width", 5: "width"}[x.dim()]
        yield Found(
            f"{called(call.node)} normalizes the {last} ({x.shape[-1]}) of {shown(tuple(x.shape))}, of which the "
            f"{x.shape[1]} channels are dimension 1",
            module=call.node.name,
            fix=f'model.set_submodule("{call.node.name}", torch.nn.GroupNorm(1, {x.shape[1]}))'
            if call.node.module is not None
            else f"torch.nn.functional.group_norm(x, 1)  # x has {x.shape[1]} channels",
        )


def from_conv(node: Node) -> bool:
    """Whether the input is a convolution's output, or computed from one with every dimension in its place."""
    rank, source = node.inputs[0].dim(), node.sources[0]
    while source is not None and source.outputs and source.outputs[0].dim() == rank:
        if source.kind in ("conv", "conv_transpose"):
            return True
        # Identity and Flatten are views of one kind; only the first keeps the shape.
        same = source.inputs and source.inputs[0].dim() == rank
        if source.kind not in KEEPS or not same or (source.kind == "view" and source.module is None):
            return False
        source = next((s for s in source.sources if s is not None), None)
    return False


@rule(
    "C22",
    "twice-in-a-row",
    "info",
    title="The same norm or activation twice in a row",
    why="The second one changes nothing, or only rescales what the first one made.",
    fix="Leave one of them out.",
    source="relu(relu(x)) = relu(x); the double normalization of TheDeepChecker (Ben Braiek & Khomh 2023)",
    bad=PLAIN.format(", bias=False").replace("nn.ReLU()", "nn.ReLU(), nn.ReLU()"),
    good=PLAIN.format(", bias=False"),
)
def twice_in_a_row(evidence: Evidence) -> Iterator[Found]:
    """Nothing else takes what the first made, and it is the same behind the second."""
    # torch.nn.Transformer has a last norm behind norms by default: not the user's doing.
    wholes = [name for name, module in evidence.model.named_modules() if isinstance(module, nn.Transformer)]
    runs: dict[nn.Module, int] = {}
    for node in evidence.trace.nodes:
        if node.module is not None:
            runs[node.module] = runs.get(node.module, 0) + 1
    for node in evidence.trace.nodes:
        if not (node.kind == "relu" or is_norm(node)) or not node.inputs:
            continue
        first = evidence.trace.maker(node.inputs[0])
        if first is None or first is node or first.kind != node.kind or evidence.trace.consumers(first) != [node]:
            continue
        x, y = first.outputs[0].detach().float(), node.outputs[0].detach().float()
        size = float(x.norm())
        if x.numel() != y.numel() or size == 0 or (is_norm(node) and not same_sets(first, node)):
            continue
        if any(f"{node.name}.".startswith(f"{name}." if name else "") for name in wholes):
            continue
        change = float((y.reshape(-1) - x.reshape(-1)).norm()) / size if x.shape == y.shape else 0.0
        if change < 0.01:
            once = node.module is not None and runs[node.module] == 1
            yield Found(
                f"{called(node)} follows {called(first)} with nothing between, and changes its output by {change:.1%}",
                module=node.name,
                fix=f'model.set_submodule("{node.name}", torch.nn.Identity())' if once else "# leave out one call",
                mend=drop(node) if once else None,
            )


def same_sets(first: Node, second: Node) -> bool:
    """Whether two norms average over sets of the same size."""
    one, other = norm_call(first), norm_call(second)
    return one is not None and other is not None and one.plain and other.plain and one.values == other.values


# ---- others


@rule(
    "C30",
    "local-response-norm",
    "info",
    title="Local response normalization",
    why="It was made for AlexNet; deeper networks were found not to profit from it, and it costs memory and time.",
    fix="Leave it out, or use a batch or group norm.",
    source="Simonyan & Zisserman 2015, arXiv:1409.1556, section 2.1: LRN does not improve performance",
    bad=PLAIN.format("").replace("nn.BatchNorm2d(8)", "nn.LocalResponseNorm(5)"),
    good=PLAIN.format(", bias=False"),
)
def local_response_norm(evidence: Evidence) -> Iterator[Found]:
    """A layer of either library, or the function."""
    nodes = [
        node
        for node in evidence.trace.nodes
        if node.kind == "local_response_norm" or isinstance(node.module, nn.LocalResponseNorm)
    ]
    if nodes:
        yield Found(
            f"{listed([called(node) for node in nodes])} is a local response norm, on "
            f"{shown(tuple(nodes[0].inputs[0].shape))}",
            module=nodes[0].name,
        )


@rule(
    "C30b",
    "spectral-norm-not-settled",
    "warning",
    title="A spectral norm whose power iteration does not run",
    why="The largest singular value is estimated by steps that run in training mode only: in evaluation mode, from "
    "random vectors, the weight is divided by anything, and is not of norm 1.",
    fix="model.train() in front of training; a few forward passes in training mode before evaluation.",
    source="torch.nn.utils.spectral_norm: power iteration in training mode",
    bad="""
model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(64, 64)), nn.ReLU(), nn.Linear(64, 1)).eval()
loss = nn.MSELoss()
batch = torch.randn(32, 64), torch.randn(32, 1)
""",
    good="""
model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(64, 64)), nn.ReLU(), nn.Linear(64, 1))
loss = nn.MSELoss()
batch = torch.randn(32, 64), torch.randn(32, 1)
""",
)
def spectral_norm_not_settled(evidence: Evidence) -> Iterator[Found]:
    """In evaluation mode, and the weight's largest singular value is far from 1."""
    for name, module in evidence.model.named_modules():
        weight = getattr(module, "weight", None)
        if module.training or not isinstance(weight, Tensor) or weight.dim() < 2 or not weight.is_floating_point():
            continue
        hook = "weight_u" in module._buffers and "weight_orig" in module._parameters
        if not hook and not spectral_parametrization(module):
            continue
        axis = 1 if isinstance(module, nn.modules.conv._ConvTransposeNd) else 0
        matrix = weight.detach().movedim(axis, 0).flatten(1).float()
        if matrix.numel() > 1 << 22:  # a singular value decomposition takes its time
            continue
        norm = float(torch.linalg.matrix_norm(matrix, 2))
        if not 1 / 1.5 < norm < 1.5:
            yield Found(
                f"{name or 'the model'} is in evaluation mode, and its spectrally normalized weight has norm "
                f"{norm:.3g} instead of 1",
                module=name,
                fix="model.train()",
            )


def spectral_parametrization(module: nn.Module) -> bool:
    """Whether the weight is divided by its spectral norm, by torch's or renorm's parametrization."""
    of_weight = getattr(getattr(module, "parametrizations", None), "weight", ())
    return any("SpectralNorm" in type(p).__name__ for p in of_weight)
