"""Rules about what a forward pass leaves behind or has twice: the last batch's graph, the batch itself, one layer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from renorm.diagnose.catalogue import Found, rule
from renorm.diagnose.evidence import Evidence, forward, preserved
from renorm.diagnose.hidden import hidden
from renorm.diagnose.rules.words import listed
from renorm.diagnose.trace import tensors_in

CARRIED = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head, self.h = nn.GRU(4, 8, batch_first=True), nn.Linear(8, 1), None

    def forward(self, x):
        y, h = self.rnn(x, self.h)
        self.h = h{}
        return self.head(y[:, -1])

model = Net()
loss = nn.MSELoss()
batch = torch.randn(16, 5, 4), torch.randn(16, 1)
"""


@rule(
    "C39",
    "graph-of-the-last-batch",
    "error",
    title="A state that is kept still hangs on the graph of the last batch",
    why="The second backward() goes through the first batch's graph, which is gone: torch raises, or with retain_graph "
    "every step gets slower and takes more memory.",
    fix="Detach what is kept: self.h = h.detach().",
    source="measured: two batches in a row, each with its backward pass",
    bad=CARRIED.format(""),
    good=CARRIED.format(".detach()"),
)
def graph_of_the_last_batch(evidence: Evidence) -> Iterator[Found]:
    """Something with a graph is in an attribute after the run, and the gradients of a second one cannot be computed."""
    if evidence.backward_error is not None or not evidence.gradients:
        return
    kept = [
        item for item in hidden(evidence.model) if any(t.grad_fn is not None for t in item.tensors if not t.is_leaf)
    ]
    if not kept:
        return
    model = evidence.model
    with preserved(model, evidence.loss_function, evidence.inputs, evidence.target), torch.enable_grad():
        for turn in range(2):
            evidence.seed.restore()
            loss = forward(model, evidence.loss_function, evidence.fresh, evidence.target).loss
            learning = [p for p in model.parameters() if p.requires_grad]
            if loss is None or loss.numel() != 1 or not loss.requires_grad:
                return
            try:
                torch.autograd.grad(loss, learning, allow_unused=True)
            except RuntimeError as error:
                if "second time" in str(error) or turn:
                    names = listed(item.name for item in kept)
                    yield Found(
                        f"{names} of the last batch has a graph, and the next backward() needs it again: "
                        f"{str(error).partition('.')[0].strip()}",
                        module=kept[0].owner,
                        fix=f"self.{kept[0].attribute} = self.{kept[0].attribute}.detach()  # behind each batch",
                    )
                return


SCALED = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, x):
        {}
        return self.layer(x)

model = Net()
loss = nn.CrossEntropyLoss()
batch = 3 * torch.randn(32, 8) + 1, torch.randint(3, (32,))
"""


@rule(
    "C40",
    "batch-is-written-into",
    "warning",
    title="The model changes its input in place",
    why="Whoever has the batch has another one afterwards: a second pass over it, a target that is the same tensor, or "
    "a data set that is kept in memory is scaled again each time.",
    fix="x = (x - mean) / std, without an underscore; no in-place activation on the input.",
    source="measured: the values before and after the forward pass",
    bad=SCALED.format("x.sub_(1).div_(3)"),
    good=SCALED.format("x = (x - 1) / 3"),
)
def batch_is_written_into(evidence: Evidence) -> Iterator[Found]:
    """A loader that makes each batch anew loses nothing by it: an info, unless the target is the same tensor."""
    if not evidence.written:
        return
    changed = [x for x in tensors_in(evidence.inputs) if id(x) in evidence.written]
    targets = {t.untyped_storage().data_ptr() for t in tensors_in(evidence.target) if t.layout is torch.strided}
    aliased = any(x.untyped_storage().data_ptr() in targets for x in changed)
    fresh = isinstance(evidence.loader, torch.utils.data.DataLoader)
    yield Found(
        f"{len(changed)} of {len(tensors_in(evidence.inputs))} inputs have other values after the forward pass"
        + (", and the target is the same tensor" if aliased else ""),
        severity="info" if fresh and not aliased else None,
    )


STACK = """
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Sequential({}), nn.Linear(16, 5))
loss = nn.CrossEntropyLoss()
batch = torch.randn(32, 8), torch.randint(5, (32,))
"""


@rule(
    "C41",
    "one-layer-in-a-row",
    "warning",
    title="A stack of layers that is one layer several times",
    why="[layer] * 6 is six times the same object: the stack is as deep, and has the parameters of one layer.",
    fix="nn.ModuleList([make() for _ in range(6)]), or copy.deepcopy(layer) for each.",
    source="the identity of the modules in the container; their calls feed one another",
    bad=STACK.format("*[nn.Sequential(nn.Linear(16, 16), nn.ReLU())] * 4"),
    good=STACK.format("*[nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(4)]"),
)
def one_layer_in_a_row(evidence: Evidence) -> Iterator[Found]:
    """In one list or sequence, with parameters, and each call feeds the next, as those of parallel heads do not."""
    for name, module in evidence.model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        parts = list(module._modules.values())
        for part in {id(part): part for part in parts}.values():
            count = sum(other is part for other in parts)
            if part is None or count < 2 or not any(True for _ in part.parameters()) or not chained(evidence, part):
                continue
            yield Found(
                f"{name or 'the model'} holds one {type(part).__name__} {count} times: its parameters are shared",
                module=name,
                fix=f"{type(module).__name__} of {count} layers: copy.deepcopy(layer) for each; if shared on purpose, "
                "one layer in a loop says so",
            )


def chained(evidence: Evidence, part: nn.Module) -> bool:
    """Whether what a module makes goes into it again."""
    inside = {id(module) for module in part.modules()}
    leaves = [node for node in evidence.trace.nodes if id(node.module) in inside]
    if not leaves:
        return False
    first = leaves[0].module
    after_another = {id(leaves[0])}  # nodes that depend on the first call
    for node in evidence.trace.nodes:
        if any(source is not None and id(source) in after_another for source in node.sources):
            if node.module is first and node is not leaves[0]:
                return True
            after_another.add(id(node))
    return False
