"""Rules about gradients: whether one arrives, is a number and is not zero."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from renorm.diagnose.catalogue import Found, rule
from renorm.diagnose.evidence import Evidence, entries
from renorm.diagnose.rules.losses import softmax_over_one
from renorm.diagnose.rules.parameters import apart, held_by, owner_of
from renorm.diagnose.rules.words import listed
from renorm.diagnose.trace import WEIGHTED, Node, tensors_in

# Calls by which values leave the trace.
LEAVES = frozenset(("detach", "numpy", "item", "tolist", "cpu", "argmax", "__bool__"))


def is_zero(tensor: Tensor) -> bool:
    """Whether there is nothing but zeros."""
    return not bool(entries(tensor).any())


def calls_of(evidence: Evidence, name: str) -> list[Node]:
    """The calls of a module, or of what is in it."""
    return [
        node for node in evidence.trace.nodes if node.module is not None and within(evidence.names[node.module], name)
    ]


def within(name: str, module: str) -> bool:
    """Whether a name is that of the module or of something in it."""
    return not module or name == module or name.startswith(f"{module}.")


def was_called(evidence: Evidence, owner: str, parameters: Iterable[Tensor]) -> bool:
    """Whether a module took part in the forward pass: called, or its parameters handed to a function."""
    wanted = {id(parameter) for parameter in parameters}
    for node in evidence.trace.nodes:
        # A leaf such as an attention calls what is in it without a call of the inner modules.
        if node.module is not None and within(owner, evidence.names[node.module]):
            return True
        if any(id(tensor) in wanted for tensor in node.inputs):
            return True
    return False


@rule(
    "C25",
    "gradient-not-finite",
    "error",
    title="No gradients, or gradients that are NaN or infinite",
    why="One NaN in a gradient is NaN in the parameter after one step, and in everything after that. A loss without a "
    "graph cannot be differentiated at all.",
    fix="Add a small number below roots and in denominators, on the inside; use torch.where on the inputs of the "
    "dangerous operation rather than on its outputs. Keep tensors: no .item(), .numpy(), .data or argmax on the way "
    "from the parameters to the loss.",
    source="the chain rule in IEEE 754 arithmetic: 0 times infinity is NaN",
    bad="""
class Distance(nn.Module):
    def forward(self, x):
        return (x**2).sum(1, keepdim=True).sqrt()

model = nn.Sequential(nn.Linear(4, 16), Distance())
nn.init.zeros_(model[0].bias)
loss = nn.MSELoss()
x = torch.randn(32, 4)
x[0] = 0  # the distance is 0, and the root has an infinite slope there
batch = x, torch.rand(32, 1)
""",
    good="""
class Distance(nn.Module):
    def forward(self, x):
        return ((x**2).sum(1, keepdim=True) + 1e-12).sqrt()

model = nn.Sequential(nn.Linear(4, 16), Distance())
nn.init.zeros_(model[0].bias)
loss = nn.MSELoss()
x = torch.randn(32, 4)
x[0] = 0
batch = x, torch.rand(32, 1)
""",
)
def gradient_not_finite(evidence: Evidence) -> Iterator[Found]:
    """The loss is finite and a gradient is not; or there is no graph, or torch cannot go back through it."""
    loss = evidence.run.loss
    trainable = [name for name, p in evidence.model.named_parameters() if p.requires_grad]
    if loss is None or loss.numel() != 1 or torch.is_inference_mode_enabled():
        return
    if not trainable:
        held = held_by(evidence)
        if (list(evidence.model.parameters()) if held is None else held) and not loss.requires_grad:
            has = "" if held is None else f", and the optimizer has {len(held)} of them"
            yield Found(
                f"nothing can learn: requires_grad is False for all of the model's parameters{has}; loss.backward() "
                "raises",
                severity=None if held else "info",  # without an optimizer it may be no more than looked at
                fix="# requires_grad_(True) on what shall learn, such as the head",
            )
        return
    if not loss.requires_grad:
        yield Found(
            f"the loss does not depend on any of the {len(trainable)} parameters as autograd sees it: loss.backward() "
            "raises",
            fix="# find what leaves the graph between the parameters and the loss: detach(), .data, .item(), numpy(), "
            "argmax, no_grad",
        )
        return
    if evidence.backward_error is not None:
        said = str(evidence.backward_error).strip().partition("\n")[0]
        if "checkpoint" not in said:  # which allows backward() and refuses autograd.grad()
            yield Found(f"the gradients cannot be computed: {said}")
        return
    if not math.isfinite(float(loss.detach())):
        return  # another rule's
    broken = {name: g for name, g in evidence.gradients.items() if g is not None and not entries(g).isfinite().all()}
    if broken:
        count = sum(int((~entries(g).isfinite()).sum()) for g in broken.values())
        total = sum(entries(g).numel() for g in broken.values())
        last = list(broken)[-1]  # the nearest to where it arose, as parameters are mostly in the order of the calls
        yield Found(
            f"the loss is {float(loss.detach()):.3g}, and {count} of {total} entries in the gradients of "
            f"{listed(reversed(broken))} are NaN or infinite",
            module=owner_of(last),
        )


DEEP = """
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5))
{}
loss = nn.CrossEntropyLoss()
batch = torch.randn(32, 8), torch.randint(5, (32,))
"""


@rule(
    "C25b",
    "dead-layers",
    "error",
    title="Layers whose gradient is exactly zero",
    why="They do not learn: nothing they do changes the loss. Where a ReLU gives 0 for every sample, or a sigmoid is "
    "saturated beyond the precision of the numbers, no step will bring them back.",
    fix="Look at what comes behind the last of them: biases far below zero, inputs that are not scaled, weights that "
    "are all zero.",
    source="Lu, Shin, Su & Karniadakis 2020, Dying ReLU and initialization, Commun. Comput. Phys. 28(5); confirmed "
    "on the batch",
    bad=DEEP.format("nn.init.constant_(model[2].bias, -100)"),
    good=DEEP.format("nn.init.zeros_(model[4].weight)  # a head that starts at zero is awake after one step"),
)
def dead_layers(evidence: Evidence) -> Iterator[Found]:
    """Not those behind weights that start at zero and get a gradient themselves, as heads, residual scales and LoRA.

    Those weights are moved a little, as the first step would, and the gradients are looked at again.
    """
    if not evidence.loss or not math.isfinite(evidence.loss) or evidence.batch_size < 8:
        return
    gradients = {name: g for name, g in evidence.gradients.items() if g is not None}
    dead = _dead(gradients)
    moved: set[str] = set()
    parameters = dict(evidence.model.named_parameters())
    while dead:
        asleep = {name for name, g in gradients.items() if is_zero(parameters[name]) and not is_zero(g)}
        if asleep <= moved:
            break
        moved |= asleep
        gradients = {n: g for n, g in evidence.gradients_after(partial(_move, names=moved)).items() if g is not None}
        dead &= _dead(gradients)
    dead = {owner for owner in dead if not _is_choice(evidence, owner)}
    if not dead:
        return
    if dead == {owner_of(name) for name in gradients}:
        if any(softmax_over_one(evidence)):
            return  # which says why
        yield Found(
            f"the loss is {evidence.loss:.3g}, and its gradient by all {len(gradients)} parameters is exactly 0: "
            "nothing learns",
            fix="# look for a mask that is 0 everywhere, a constant, or a layer in front of the loss that is dead",
        )
        return
    # The queries and keys of an attention over one key have no gradient either; nothing would depend on better ones.
    if not _matters(evidence, {name for name in evidence.gradients if owner_of(name) in dead}):
        return
    order = [name for name in called_leaves(evidence) if name in dead] or sorted(dead)
    last = order[-1]
    yield Found(
        f"no gradient reaches {len(dead)} of {len({owner_of(name) for name in evidence.gradients})} layers "
        f"({listed(order)}): every entry is exactly 0{_because(evidence, last)}",
        module=last,
    )


def _dead(gradients: dict[str, Tensor]) -> set[str]:
    """The modules all of whose gradients are zero."""
    alive = {owner_of(name) for name, gradient in gradients.items() if not is_zero(gradient)}
    return {owner_of(name) for name in gradients} - alive


def _move(model: nn.Module, *, names: set[str]) -> None:
    random = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name in names:
            noise = 0.01 * torch.randn(parameter.shape, generator=random)
            parameter.data.add_(noise.to(parameter.device, parameter.dtype))


def called_leaves(evidence: Evidence) -> list[str]:
    """The names of leaf modules in the order of their calls."""
    return [evidence.names[node.module] for node in evidence.trace.nodes if node.module in evidence.names]


def _because(evidence: Evidence, name: str) -> str:
    """What follows a layer, where that is a dead or saturated activation."""
    for node in calls_of(evidence, name):
        for after in evidence.trace.consumers(node):
            values = entries(after.outputs[0])
            if after.kind == "relu" and values.numel() and not bool(values.any()):
                return f"; {after.where} behind {name} gives 0 for all {values.numel()} values"
            if after.kind in ("sigmoid", "tanh"):
                size = float(entries(node.outputs[0]).abs().mean())
                return f"; {after.where} behind {name} gets values of size {size:.3g}, where it is flat"
    return ""


def _is_choice(evidence: Evidence, owner: str) -> bool:
    """Whether a module is one of several in a list that get the same input, as experts do, or got no sample at all."""
    nodes = calls_of(evidence, owner)
    if any(tensor.numel() == 0 for node in nodes for tensor in node.inputs):
        return True
    parts = owner.split(".")
    for i, part in enumerate(parts):
        prefix = ".".join(parts[:i])
        if not part.isdigit() or not isinstance(evidence.model.get_submodule(prefix), nn.ModuleList):
            continue
        mine: set[int] = set()
        others: set[int] = set()
        for node in calls_of(evidence, prefix):
            assert node.module is not None
            inside = within(evidence.names[node.module], f"{prefix}.{part}" if prefix else part)
            (mine if inside else others).update(map(id, node.inputs))
        if mine & others:
            return True
    return False


USED_TWICE = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.bn1 = nn.Linear(8, 16), nn.BatchNorm1d(16)
        self.fc2, self.bn2 = nn.Linear(16, 16), nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.bn1(self.fc1(x)))
        x = F.relu(self.{}(self.fc2(x)))
        return self.head(x)

model = Net()
loss = nn.CrossEntropyLoss()
batch = torch.randn(32, 8), torch.randint(5, (32,))
"""


@rule(
    "C25d",
    "no-gradient",
    "warning",
    title="Parameters that no gradient reaches",
    why="They stay as they were initialized. A layer that was called by another's name, or a graph that was cut, looks "
    "like a model that learns badly.",
    fix="Call the layer that is not called, or delete it; take out the detach, .data or no_grad that cuts the graph; "
    "where both are on purpose, requires_grad_(False) says so.",
    source="torch.autograd: what is not reached has no gradient, and the optimizer passes over it",
    bad=USED_TWICE.format("bn1"),
    good=USED_TWICE.format("bn2"),
)
def no_gradient(evidence: Evidence) -> Iterator[Found]:
    """One batch need not use everything: of layers that were not called at all this is no more than information.

    A warning where a twin was called twice instead; where a layer was called, the loss depends on what it holds, and no
    gradient arrives, and it is no copy of one that learns: an error, if the optimizer has it and nothing was switched
    off on purpose.
    """
    gradients = evidence.gradients
    owners: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in evidence.model.named_parameters():
        if parameter.requires_grad and name in gradients:
            owners.setdefault(owner_of(name), {})[name] = parameter
    without = {owner: found for owner, found in owners.items() if all(gradients[name] is None for name in found)}
    unused = [name for name, found in without.items() if not was_called(evidence, name, found.values())]
    for owner in list(unused):
        twin = _called_instead(evidence, owner)
        if twin:
            unused.remove(owner)
            yield Found(
                f"{owner} is never called, and {twin}, which is like it, is called twice: one for the other?",
                module=owner,
                fix=f"# call self.{owner} where self.{twin} is called for the second time",
            )
    cut = [name for name in without if name not in unused and was_called(evidence, name, without[name].values())]
    cut = [name for name in cut if not apart(name)]
    held = held_by(evidence)
    if held is not None:
        cut = [name for name in cut if any(id(parameter) in held for parameter in without[name].values())]
    matters = bool(cut) and _matters(evidence, {name for owner in cut for name in without[owner]})
    if matters:
        cut = [name for name in cut if not _is_copy(evidence, name, owners, set(without))]
        purpose = any(_switched_off(evidence, name) for name in cut)
        if cut:
            yield Found(
                f"the loss depends on {listed(cut)}, and no gradient arrives there: the graph is cut behind "
                f"{'them' if len(cut) > 1 else 'it'}"
                + (", by no_grad or detach" if purpose else "")
                + (", though the optimizer has the parameters" if held is not None else ""),
                module=cut[-1],
                severity="error" if held is not None and not purpose else "warning",
                fix="\n".join(f'model.get_submodule("{name}").requires_grad_(False)' for name in cut)
                + "  # if on purpose; else do not leave the graph"
                if purpose
                else "# keep the graph: no .data, numpy(), .item(), argmax or torch.tensor(...) of what they give",
            )
    dropped = [] if matters else [name for name in cut if thrown_away(evidence, name)]
    if dropped:
        yield Found(
            f"what {listed(dropped)} make{'s' if len(dropped) == 1 else ''} is not used: neither the loss nor an "
            "output depends on it",
            module=dropped[-1],
            fix="# use it, or take it out",
        )
    if unused:
        count = sum(parameter.numel() for owner in unused for parameter in without[owner].values())
        yield Found(
            f"{listed(unused)}: not called for this batch, {count} numbers that did not take part",
            module=unused[0],
            severity="info",
        )


def thrown_away(evidence: Evidence, name: str) -> bool:
    """Whether a layer was called, and nothing that its results went into is the loss or came out of the model."""
    calls = calls_of(evidence, name)
    if not any(node.kind in WEIGHTED for node in calls) or evidence.run.loss is None:  # others are C35's
        return False
    ends = {id(tensor) for tensor in (evidence.run.loss, *evidence.run.outputs)}
    ends |= {id(t) for module in evidence.model.modules() for t in tensors_in(list(vars(module).values()))}
    behind = {id(node) for node in calls}
    for node in evidence.trace.nodes:
        if id(node) not in behind and not any(id(source) in behind for source in node.sources if source is not None):
            continue
        behind.add(id(node))
        if node.kind in LEAVES or any(id(tensor) in ends for tensor in node.outputs):
            return False
    return True


def _called_instead(evidence: Evidence, owner: str) -> str:
    """A sibling of the same class and shapes that was called twice; experts and stages in lists are no such thing."""
    parent, _, attribute = owner.rpartition(".")
    if not attribute or attribute.isdigit() or owner not in {name for name, _ in evidence.model.named_modules()}:
        return ""
    module = evidence.model.get_submodule(owner)
    for name, other in evidence.model.get_submodule(parent).named_children():
        if other is not module and type(other) is type(module) and str(other) == str(module):
            calls = [node for node in evidence.trace.nodes if node.module is other]
            if len(calls) > 1 and name.rstrip("0123456789") == attribute.rstrip("0123456789"):
                return f"{parent}.{name}" if parent else name
    return ""


def _matters(evidence: Evidence, names: set[str]) -> bool:
    """Whether the loss depends on these parameters where no parameter is zero or otherwise particular."""

    def shake(model: nn.Module, seed: int, names: Collection[str]) -> None:
        random = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=random).to(parameter.device, parameter.dtype)
            if name in names:
                parameter.data.add_(noise * (parameter.data.float().abs().mean() + 0.1).to(parameter.dtype))

    def both(model: nn.Module) -> None:
        shake(model, 0, evidence.gradients)
        shake(model, 1, names)

    before, after = evidence.again(change=partial(shake, seed=0, names=evidence.gradients)), evidence.again(change=both)
    if before.loss is None or after.loss is None:
        return False
    losses = float(before.loss.detach()), float(after.loss.detach())
    return all(map(math.isfinite, losses)) and losses[0] != losses[1]


def _is_copy(evidence: Evidence, owner: str, owners: dict[str, dict[str, nn.Parameter]], without: set[str]) -> bool:
    """Whether a module that learns has the same parameters' shapes: a target network's or a teacher's pattern."""

    def shapes(name: str) -> tuple[str, list[tuple[int, ...]]]:
        return type(evidence.model.get_submodule(name)).__name__, [tuple(p.shape) for p in owners[name].values()]

    inside, outside = owner.rpartition(".")[2], shapes(owner)
    return any(
        other not in without and other.rpartition(".")[2] == inside and shapes(other) == outside for other in owners
    )


def _switched_off(evidence: Evidence, name: str) -> bool:
    """Whether a module ran under no_grad, or somebody detached what it gave."""
    for node in calls_of(evidence, name):
        if not any(output.requires_grad for output in node.outputs):
            return True
    return any(node.kind == "detach" and node.inputs and node.inputs[0].requires_grad for node in evidence.trace.nodes)
