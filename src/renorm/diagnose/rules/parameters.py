"""Parameters in words, and the rule about those that torch does not know of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from renorm.diagnose.catalogue import Found, Mended, rule
from renorm.diagnose.evidence import Evidence
from renorm.diagnose.hidden import Hidden, hidden
from renorm.diagnose.trace import tensors_in

# What the names of modules say that are not trained, or not by this loss.
APART = ("teacher", "target", "momentum", "discrim", "critic", "advers", "generator")
APART_WORDS = frozenset(("ema", "d", "g", "disc", "dis", "gen", "netd", "netg"))


def owner_of(name: str) -> str:
    """The layer that has a parameter: "block.fc" of "block.fc.weight", and where its weight is parametrized, too."""
    if ".parametrizations." in f".{name}":
        return f".{name}".partition(".parametrizations.")[0].removeprefix(".")
    return name.rpartition(".")[0]


def apart(name: str) -> bool:
    """Whether a name says that a module is trained by something else than this loss."""
    lower = name.lower()
    words = set(lower.replace("_", ".").split("."))
    return any(part in lower for part in APART) or bool(words & APART_WORDS)


def tensors(count: int) -> str:
    """So many tensors, in words."""
    return f"{count} tensor" if count == 1 else f"{count} tensors"


def held_by(evidence: Evidence) -> set[int] | None:
    """The ids of the optimizer's parameters; None without one."""
    if evidence.optimizer is None:
        return None
    return {id(parameter) for group in evidence.optimizer.param_groups for parameter in group["params"]}


LISTED = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.blocks = {}
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = F.relu(block(x))
        return self.head(x)

model = Net()
loss = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters())
batch = torch.randn(32, 8), torch.randint(5, (32,))
"""


@rule(
    "C32",
    "unregistered-layers",
    "error",
    title="Layers or tensors that learn and are not registered",
    why="A layer in a list or dict, or a tensor with requires_grad as an attribute, is not among model.parameters(): "
    "the optimizer does not get it, state_dict() leaves it out, and model.to(), train() and eval() pass over it.",
    fix="nn.ModuleList for lists of layers, nn.ModuleDict for dicts, nn.Parameter for tensors.",
    source="torch.nn.Module: only attributes that are modules and parameters are registered",
    bad=LISTED.format("[nn.Linear(16, 16) for _ in range(3)]"),
    good=LISTED.format("nn.ModuleList(nn.Linear(16, 16) for _ in range(3))"),
)
def unregistered_layers(evidence: Evidence) -> Iterator[Found]:
    """The gradient of the loss reaches them: what is kept in a list without being trained is nobody's mistake."""
    yield from _made_in_forward(evidence)
    held = held_by(evidence) or set()
    batch = {id(tensor) for tensor in tensors_in([evidence.inputs, evidence.target])}
    if isinstance(evidence.loss_function, nn.Module):
        batch |= {id(parameter) for parameter in evidence.loss_function.parameters()}
    registered = {id(parameter) for parameter in evidence.model.parameters()}
    for item in hidden(evidence.model):
        wanted: list[Tensor] = [p for module in item.modules for p in module.parameters() if p.requires_grad]
        for tensor in item.tensors:
            # What was there before the forward pass: it may leave activations behind in attributes.
            if tensor.requires_grad and id(tensor) not in batch and id(tensor) in evidence.loose:
                wanted += [leaf for leaf in leaves_of(tensor) if id(leaf) not in batch]
        wanted = list({id(tensor): tensor for tensor in wanted if id(tensor) not in registered}.values())
        reached = _reached(evidence, wanted)
        if not reached:
            continue
        count = sum(tensor.numel() for tensor in reached)
        known = all(id(tensor) in held for tensor in reached)
        what = type(item.value).__name__ if item.modules else "tensor"
        what = (
            f"{what} of {len(item.modules)} modules"
            if isinstance(item.value, (list, tuple, dict)) and item.modules
            else what
        )
        repair = _repair(item)
        yield Found(
            f"{item.name}, a {what}, holds {count} numbers that get a gradient and are not registered in the model: "
            + ("the optimizer has them, state_dict() and to() do not" if known else "the optimizer never sees them"),
            module=item.owner,
            severity="warning" if known else "error",
            fix=f"self.{item.attribute} = {repair or 'torch.nn.ModuleList(...)'}",
            mend=partial(_register, owner=item.owner, attribute=item.attribute)
            if repair and (item.modules or not known)
            else None,
        )


def _made_in_forward(evidence: Evidence) -> Iterator[Found]:
    """Parameters of the graph that are others in another pass: a layer is built anew every time."""
    loss = evidence.run.loss
    if loss is None or not loss.requires_grad:
        return
    known = {id(tensor) for thing in (evidence.model, evidence.loss_function) for tensor in _parameters(thing)}
    known |= {
        id(tensor) for item in hidden(evidence.model) for module in item.modules for tensor in _parameters(module)
    }
    known |= held_by(evidence) or set()

    def strange(loss: Tensor) -> list[Tensor]:
        leaves = leaves_of(loss, 100_000)
        return [leaf for leaf in leaves if isinstance(leaf, nn.Parameter) and id(leaf) not in known]

    first = strange(loss)
    again = evidence.again(gradients=True).loss if first else None
    if again is None:
        return
    others = {id(leaf) for leaf in strange(again)}
    new = [leaf for leaf in first if id(leaf) not in others]
    if new and others - {id(leaf) for leaf in first}:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in new[:3])
        yield Found(
            f"{len(new)} parameters ({shapes}) are made in the forward pass, with new numbers every time: nothing of "
            "them is learnt or saved",
            fix="# build the layer in __init__ and only call it in forward; nn.LazyLinear finds its size by itself",
        )


def _parameters(thing: object) -> list[Tensor]:
    return list(thing.parameters()) if isinstance(thing, nn.Module) else []


def leaves_of(tensor: Tensor, most: int = 1000) -> list[Tensor]:
    """The leaves of a tensor's graph that want a gradient; the tensor, if it is one."""
    if tensor.is_leaf:
        return [tensor]
    found: list[Tensor] = []
    seen: set[object] = set()
    waiting = [tensor.grad_fn]
    while waiting and len(seen) < most:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        found += [leaf] if isinstance(leaf, Tensor) else []
        waiting += [before for before, _ in node.next_functions]
    return found


def _reached(evidence: Evidence, tensors: list[Tensor]) -> list[Tensor]:
    """Those that the loss, or without one the output, has a gradient for."""
    loss = evidence.run.loss
    if loss is None or loss.numel() != 1:
        outputs = [tensor for tensor in evidence.run.outputs if tensor.is_floating_point() and tensor.requires_grad]
        loss = sum((tensor.float().sum() for tensor in outputs), torch.zeros(())) if outputs else None
    if loss is None or not loss.requires_grad or not tensors:
        return []
    try:
        found = torch.autograd.grad(loss, tensors, allow_unused=True, retain_graph=True)
    except RuntimeError:  # a finding of another rule
        return []
    return [tensor for tensor, gradient in zip(tensors, found, strict=True) if gradient is not None]


def _repair(item: Hidden) -> str:
    """How to register the attribute, as code; empty where that is not mechanical."""
    value = item.value
    if isinstance(value, nn.Module):
        return f"self.{item.attribute}  # as an attribute, not through __dict__ or object.__setattr__"
    if isinstance(value, Tensor):
        return f"torch.nn.Parameter(self.{item.attribute})" if value.is_leaf else ""
    if isinstance(value, (list, tuple)) and value:
        if all(isinstance(part, nn.Module) for part in value):
            return f"torch.nn.ModuleList(self.{item.attribute})"
        if all(isinstance(part, Tensor) and part.is_leaf and part.requires_grad for part in value):
            return f"torch.nn.ParameterList(self.{item.attribute})"
    if isinstance(value, dict) and value and all(isinstance(part, nn.Module) for part in value.values()):
        good = all(isinstance(name, str) and name and "." not in name for name in value)
        return f"torch.nn.ModuleDict(self.{item.attribute})" if good else ""
    return ""


def _register(model: nn.Module, optimizer: Optimizer | None, *, owner: str, attribute: str) -> Mended:
    module = model.get_submodule(owner)
    value = module.__dict__.pop(attribute)
    name = f"{owner}.{attribute}" if owner else attribute
    new: nn.Module | nn.Parameter
    if isinstance(value, nn.Module):
        new = value
    elif isinstance(value, Tensor):
        new = nn.Parameter(value.detach())
    elif isinstance(value, dict):
        new = nn.ModuleDict(value)
    elif isinstance(value[0], nn.Module):
        new = nn.ModuleList(value)
    else:
        new = nn.ParameterList(nn.Parameter(part.detach()) for part in value)
    setattr(module, attribute, new)
    added = list(new.parameters()) if isinstance(new, nn.Module) else [new]
    return Mended(model, optimizer, f"{name} is a {type(new).__name__} now{hand_over(optimizer, added)}")


def hand_over(optimizer: Optimizer | None, parameters: Iterable[Tensor]) -> str:
    """Put parameters into an optimizer's first group, and say so."""
    if optimizer is None:
        return ""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    new = [parameter for parameter in parameters if id(parameter) not in held]
    optimizer.param_groups[0]["params"].extend(new)
    return f", {tensors(len(new))} more in the optimizer's first group" if new else ""
