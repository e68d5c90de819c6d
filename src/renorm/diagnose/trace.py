"""One forward pass as a graph of calls: which layer or function made each tensor, and from what.

Leaf modules are one node each; functions and methods called outside of them are nodes too, so that ``F.relu(x)``,
``x.relu()`` and ``nn.ReLU()(x)`` look the same to a rule.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from renorm.norms.norm import Norm

__all__ = ["LOSSES", "LossCall", "Node", "Trace", "kind_of_module", "record", "tensors_in"]

# One word for a module, a function and a method that do the same.
_MODULES: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((nn.ReLU,), "relu"),
    ((nn.LeakyReLU,), "leaky_relu"),
    ((nn.Sigmoid,), "sigmoid"),
    ((nn.Tanh,), "tanh"),
    ((nn.Softmax, nn.Softmax2d), "softmax"),
    ((nn.LogSoftmax,), "log_softmax"),
    ((nn.LogSigmoid,), "logsigmoid"),
    ((nn.Softplus,), "softplus"),
    ((nn.Hardsigmoid,), "hardsigmoid"),
    ((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout), "dropout"),
    ((nn.Linear,), "linear"),
    ((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), "conv_transpose"),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), "conv"),
    ((nn.modules.batchnorm._BatchNorm,), "batch_norm"),
    ((nn.modules.instancenorm._InstanceNorm,), "instance_norm"),
    ((nn.GroupNorm,), "group_norm"),
    ((nn.RMSNorm,), "rms_norm"),
    ((nn.LayerNorm,), "layer_norm"),
    ((Norm,), "norm"),
    ((nn.Embedding, nn.EmbeddingBag), "embedding"),
    ((nn.RNNBase, nn.RNNCellBase), "rnn"),
    ((nn.MultiheadAttention,), "attention"),
    ((nn.Flatten, nn.Unflatten, nn.Identity), "view"),
)
_FUNCTIONS = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), "conv"),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), "conv_transpose"),
    **dict.fromkeys(("dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"), "dropout"),
    **dict.fromkeys(("scaled_dot_product_attention", "multi_head_attention_forward"), "attention"),
    "cross_entropy_loss": "cross_entropy",
    "expit": "sigmoid",
    "__matmul__": "matmul",
    "__rmatmul__": "matmul",
    "mm": "matmul",
    "bmm": "matmul",
    "addmm": "linear",
}
# The same values in another shape, place or dtype.
# fmt: off
_VIEWS = frozenset((
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "swapaxes",
    "movedim", "contiguous", "clone", "to", "float", "half", "bfloat16", "double", "type", "type_as", "view_as",
    "reshape_as", "__getitem__", "select", "narrow", "expand", "expand_as", "detach", "cpu", "cuda", "t", "T", "mT",
    "__get__", "chunk", "split", "unbind", "ravel", "atleast_1d", "requires_grad_",
))
# fmt: on
_LOSS_FUNCTIONS: tuple[Callable[..., Any], ...] = (
    F.cross_entropy,
    F.nll_loss,
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.kl_div,
    F.poisson_nll_loss,
    F.gaussian_nll_loss,
    F.soft_margin_loss,
    F.multilabel_soft_margin_loss,
    F.multi_margin_loss,
    F.hinge_embedding_loss,
    F.cosine_embedding_loss,
    F.margin_ranking_loss,
    F.triplet_margin_loss,
    F.ctc_loss,
)
LOSSES = {function.__name__: inspect.signature(function) for function in _LOSS_FUNCTIONS}
WEIGHTED = frozenset({"linear", "conv", "conv_transpose", "matmul", "embedding", "rnn", "attention"})


@dataclass(eq=False)
class Node:
    """One call."""

    kind: str  # "linear", "relu", "batch_norm" ...; else the class of the module or the name of the function
    name: str  # of the module that ran, or in which the function was called; as in named_modules()
    module: nn.Module | None  # of a leaf
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    sources: tuple[Node | None, ...]  # what made each input; None for the batch, parameters and constants
    args: tuple[Any, ...]  # of the call
    kwargs: dict[str, Any]

    @property
    def is_view(self) -> bool:
        """Whether the values are those of the input."""
        if self.kind == "dropout":
            return self.module is not None and (not self.module.training or getattr(self.module, "p", 1) == 0)
        return self.kind == "view" or self.kind in _VIEWS

    @property
    def where(self) -> str:
        """For messages: the module's name, or the function and the module it is called in."""
        if self.module is not None:
            return self.name or "the model"
        return f"{self.kind}() in {self.name}" if self.name else f"{self.kind}()"


@dataclass(frozen=True)
class LossCall:
    """One call of a loss of torch.nn.functional."""

    kind: str  # the function's name, such as "cross_entropy"
    input: Tensor
    target: Tensor
    options: dict[str, Any]  # the other arguments, defaults filled in
    node: Node


@dataclass
class Trace:
    """The calls in their order."""

    nodes: list[Node] = field(default_factory=list)
    makers: dict[int, Node] = field(default_factory=dict)  # by id of a tensor that nodes keep alive
    failed: Node | None = None  # the function that raised, without outputs
    running: list[nn.Module] = field(default_factory=list)  # outermost first; after an error, those it came through
    entered: list[tuple[Tensor, ...]] = field(default_factory=list)  # what went into each of them

    def maker(self, tensor: Tensor, *, through_views: bool = True) -> Node | None:
        """The call that made these values; None where no call did."""
        node = self.makers.get(id(tensor))
        return behind_views(node) if through_views else node

    def of_kind(self, *kinds: str) -> Iterator[Node]:
        """The calls of these kinds."""
        return (node for node in self.nodes if node.kind in kinds)

    def consumers(self, node: Node) -> list[Node]:
        """The calls that take what `node` made, views left out."""
        found = []
        for other in self.nodes:
            if any(source is node for source in other.sources):
                found += self.consumers(other) if other.is_view else [other]
        return found

    def losses(self) -> list[LossCall]:
        """The calls of torch's losses, that which raised among them."""
        calls = [*self.of_kind(*LOSSES), *([self.failed] if self.failed and self.failed.kind in LOSSES else [])]
        return [call for call in map(_loss_call, calls) if call is not None]


def _loss_call(node: Node) -> LossCall | None:
    try:
        bound = LOSSES[node.kind].bind(*node.args, **node.kwargs)
    except TypeError:
        return None
    bound.apply_defaults()
    (_, input), (_, target), *options = bound.arguments.items()
    if not isinstance(input, Tensor) or not isinstance(target, Tensor):
        return None
    return LossCall(node.kind, input, target, dict(options), node)


def behind_views(node: Node | None) -> Node | None:
    """The call whose values `node` passes on."""
    while node is not None and node.is_view and node.sources:
        node = node.sources[0]
    return node


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples, dicts and dataclasses such as the outputs of other libraries."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_in(item)]
    if hasattr(value, "__dataclass_fields__"):
        return [tensor for name in value.__dataclass_fields__ for tensor in tensors_in(getattr(value, name))]
    return []


@contextmanager
def record(model: nn.Module) -> Iterator[Trace]:
    """Record what `model`, and whatever else runs in this context, calls."""
    trace = Trace()
    names = {module: name for name, module in model.named_modules()}
    stack = trace.running
    leaves: list[tuple[tuple[Tensor, ...], tuple[Node | None, ...]]] = []  # inputs of the leaf that is running

    def add(kind: str, name: str, module: nn.Module | None, taken: Any, made: Any, args: Any, kwargs: Any) -> None:
        inputs, sources = taken
        outputs = tuple(tensors_in(made))
        if not outputs:
            return
        node = Node(kind, name, module, inputs, outputs, sources, args, kwargs)
        trace.nodes.append(node)
        for output in outputs:
            trace.makers[id(output)] = node

    def take(values: Any) -> tuple[tuple[Tensor, ...], tuple[Node | None, ...]]:
        inputs = tuple(tensors_in(values))
        return inputs, tuple(trace.makers.get(id(tensor)) for tensor in inputs)

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        stack.append(module)
        trace.entered.append(tuple(tensors_in((args, kwargs))))
        if _is_leaf(module):
            leaves.append(take((args, kwargs)))

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        stack.pop()
        trace.entered.pop()
        if _is_leaf(module):
            taken = leaves.pop()
            if not leaves:
                add(kind_of_module(module), names.get(module, ""), module, taken, output, args, kwargs)

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if leaves:
                return func(*args, **kwargs)
            taken = take((args, kwargs))
            word = getattr(func, "__name__", "").removesuffix("_") if func is not None else ""
            word = getattr(func, "__name__", "") if word.startswith("__") or not word else word
            name = next((names[module] for module in reversed(stack) if module in names), "")
            kind = _FUNCTIONS.get(word, word)
            try:
                result = func(*args, **kwargs)
            except Exception:
                trace.failed = trace.failed or Node(kind, name, None, taken[0], (), taken[1], args, kwargs)
                raise
            add(kind, name, None, taken, result, args, kwargs)
            return result

    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        with Functions():
            yield trace
    finally:
        for handle in handles:
            handle.remove()


def _is_leaf(module: nn.Module) -> bool:
    if isinstance(module, (Norm, nn.MultiheadAttention)):
        return True
    if any(name != "parametrizations" for name, _ in module.named_children()):
        return False
    # A layer of the user's own is looked into, since what it calls says more than its name; so is a model whose layers
    # are not registered. An empty Sequential, the usual shortcut of a residual block, passes its input on.
    ours = type(module).__module__.startswith(("torch.nn.", "renorm."))
    return (ours or _known(module) is not None) and not isinstance(module, (nn.Sequential, nn.ModuleList))


def kind_of_module(module: nn.Module) -> str:
    """One word for what a leaf module does, as in `Node.kind`."""
    return _known(module) or type(module).__name__


def _known(module: nn.Module) -> str | None:
    return next((kind for classes, kind in _MODULES if isinstance(module, classes)), None)
