"""Rules about what depends on what: samples on each other, and programs that do not run at all."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from renorm.diagnose.catalogue import RULES, Found, rule
from renorm.diagnose.evidence import Evidence, Run, mapped
from renorm.diagnose.rules.statistics import norm_calls
from renorm.diagnose.rules.words import called, listed, path, shown
from renorm.diagnose.trace import Node, tensors_in
from renorm.norms.norm import Norm

# Calls by which samples may know of each other on purpose: graphs, sets, retrieval.
GRAPHS = (
    "scatter_add",
    "index_add",
    "scatter_reduce",
    "segment_reduce",
    "spmm",
    "sparse_mm",
    "scatter",
    "scatter_mean",
)
REDUCTIONS = (
    "mean",
    "var",
    "std",
    "var_mean",
    "std_mean",
    "sum",
    "amax",
    "amin",
    "max",
    "min",
    "norm",
    "cov",
    "median",
)
SEQUENCES = ("rnn", "attention")

# ---- samples that know of each other

MIXED = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(6, 16{})
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])

model = Net()
loss = nn.CrossEntropyLoss()
batch = torch.randn(16, 10, 6), torch.randint(3, (16,))
"""


@rule(
    "C28",
    "samples-mix",
    "error",
    title="The output for one sample depends on the others of the batch",
    why="A view that takes the batch for time, a softmax over dimension 0, an RNN without batch_first: the model reads "
    "the answer for one sample off the others, and gives another answer when it stands in another batch.",
    fix="permute instead of view where dimensions change places; batch_first=True; softmax over the classes.",
    source="the batch gradient check of Lightning Bolts (#568); measured here by replacing half of the samples",
    bad=MIXED.format(""),
    good=MIXED.format(", batch_first=True"),
)
def samples_mix(evidence: Evidence) -> Iterator[Found]:
    """Half of the samples are replaced, and outputs of the others change; norms over the batch are in evaluation.

    Silent where the first dimension may be something else than the batch: time (then dimension 1 is not mixed),
    the nodes of a graph, one sequence without a batch. Statistics over the batch that the model computes itself are
    an info.
    """
    size = evidence.batch_size
    if evidence.run.error is not None or size < 2 or not paired(evidence, size) or on_purpose(evidence, size):
        return
    base = evidence.again(training=False, change=settle)
    twice = evidence.again(training=False, change=settle)
    if base.error is not None or coupled(base) or not base.outputs:
        return
    place = next((i for i, y in enumerate(base.outputs) if per_sample(y, size)), None)
    if place is None or any(not torch.equal(*pair) for pair in both(base, twice, place)):
        return
    for kept in (slice(size // 2, None), slice(0, size // 2)):
        other = evidence.again(swapped(evidence, size, kept), training=False, change=settle)
        changed = changes(base, other, place, kept)
        if changed is None or changed[0] <= 1e-4 * changed[1]:
            continue
        if along_dimension_one(evidence, base, place):
            return
        clean, mixed, reduced = first_mixed(base, other, size, kept)
        sequence = mixed is not None and (mixed.kind in SEQUENCES or "ttention" in mixed.where)
        # Tokens get a dimension more when they are embedded.
        unbatched = all(x.dim() + (not x.is_floating_point()) < 3 for x in tensors_in(evidence.inputs))
        if sequence and unbatched and not known_batch(evidence, size):
            severity = "warning"  # one sequence of vectors, without a batch, would look the same
        else:
            severity = "info" if reduced else "error"
        where = f"first seen in the output of {called(mixed)}" if mixed is not None else "seen in the output"
        after = f", not yet in that of {called(clean)}" if clean is not None else ""
        halves = (0, size // 2 - 1), (size // 2, size - 1)
        (first, last), rest = halves if kept.start else halves[::-1]
        yield Found(
            f"the outputs of samples {rest[0]} to {rest[1]} change when samples {first} to {last} of the batch are "
            f"replaced, by {changed[0] / changed[1]:.1%} of the latters' own change: {where}{after}",
            module=mixed.name if mixed is not None else "",
            fix=unmixed(mixed),
            severity=severity,  # type: ignore[arg-type]
        )
        return


def unmixed(mixed: Node | None) -> str:
    """What to do about a call that mixes samples, as code."""
    if mixed is not None and mixed.kind == "rnn" and getattr(mixed.module, "batch_first", True) is False:
        return f"# {called(mixed)}: batch_first=True, or the input with time first, x.transpose(0, 1)"
    if mixed is not None and mixed.module is not None and getattr(mixed.module, "batch_first", True) is False:
        return f"# {called(mixed)}: batch_first=True"
    if mixed is not None and mixed.kind in ("softmax", "log_softmax"):
        return "torch.softmax(x, dim=1)  # dimension 0 is the batch"
    return "x.permute(...)  # where dimensions change places; a view keeps the order of memory and mixes them"


def paired(evidence: Evidence, size: int) -> bool:
    """Whether input and target go by samples: the same first dimension throughout."""
    inputs = [x for x in tensors_in(evidence.inputs) if x.dim() > 0]
    targets = [t for t in tensors_in(evidence.target) if t.dim() > 0]
    long = [x for x in inputs if len(x) == size]
    if inputs and all(x.dim() == 1 and not x.is_floating_point() for x in inputs):
        return False  # one sequence of tokens
    return bool(long) and all(len(t) == size for t in targets)


def on_purpose(evidence: Evidence, size: int) -> bool:
    """Whether samples are nodes of a graph: an adjacency matrix or a list of edges comes with them."""
    inputs = tensors_in(evidence.inputs)
    edges = any(x.dim() == 2 and len(x) == 2 != size and not x.is_floating_point() for x in inputs)
    square = any(x.shape[:2] == (size, size) and x.dim() == 2 for x in inputs) and len(inputs) > 1
    if edges or square or any(x.is_sparse for x in inputs) or any(True for _ in evidence.trace.of_kind(*GRAPHS)):
        return True
    for node in evidence.trace.of_kind("matmul", "__matmul__", "mm", "einsum", "linear"):
        # A constant matrix, neither of the batch nor a parameter, that is as large as the batch.
        for x, source in zip(node.inputs, node.sources, strict=True):
            constant = source is None and not isinstance(x, nn.Parameter) and x.shape == (size, size)
            if x.is_sparse or (constant and not any(x is given for given in inputs)):
                return True
    # A sequence that the model itself makes a batch of one of; an RNN that is fed (1, N, F) by unsqueeze(0) too.
    for node in evidence.trace.of_kind(*SEQUENCES):
        shape = tuple(node.inputs[0].shape) if node.inputs else ()
        batch = 0 if getattr(node.module, "batch_first", False) else 1
        if len(shape) == 3 and shape[batch] == 1 and shape[1 - batch] == size and not known_batch(evidence, size):
            return True
    return False


def known_batch(evidence: Evidence, size: int) -> bool:
    """Whether the loader says that the first dimension is the batch."""
    return getattr(evidence.loader, "batch_size", None) == size


def settle(model: nn.Module) -> None:
    """Statistics for batch norms that keep none, so that samples stand apart."""
    for module in model.modules():
        batch = isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, Norm)
        if batch and module.running_mean is None:
            device = next((p.device for p in model.parameters()), None)
            module.running_mean = torch.zeros(module.num_features, device=device)
            module.running_var = torch.ones(module.num_features, device=device)
            module.track_running_stats = True


def coupled(run: Run) -> bool:
    """Whether a norm over the batch is still at work, which no mode takes apart."""
    if any(call.couples_batch and call.measures for call in norm_calls(run.trace)):
        return True
    modules = [node.module for node in run.trace.nodes]
    return any(isinstance(m, Norm) and m.couples_batch and m.running_mean is None for m in modules)


def per_sample(y: Tensor, size: int) -> bool:
    """Whether an output has a row for each sample; similarities of each with each are no such rows."""
    return y.dim() > 0 and len(y) == size and y.is_floating_point() and not (y.dim() == 2 and y.shape[1] == size)


def both(one: Run, other: Run, place: int) -> list[tuple[Tensor, Tensor]]:
    """The same output of two runs, as a list of none or one pair of tensors of one shape."""
    if other.error is not None or len(one.outputs) != len(other.outputs):
        return []
    x, y = one.outputs[place], other.outputs[place]
    return [(x, y)] if x.shape == y.shape else []


def swapped(evidence: Evidence, size: int, kept: slice, dim: int = 0) -> object:
    """The inputs with all but the `kept` samples replaced, by others of the batch in another order.

    Real values are scaled too, so that a sample that comes in the place of itself or of its twin differs.
    """

    def swap(x: Tensor) -> Tensor:
        if x.dim() <= dim or x.shape[dim] != size:
            return x
        moved = x.roll(1, dim).flip(dim) if not x.is_floating_point() else 0.5 * x.flip(dim) + 0.25
        if x.dtype == torch.bool or (not x.is_floating_point() and is_mask(x)):
            return x
        rows = torch.zeros(size, dtype=torch.bool, device=x.device)
        rows[kept] = True
        return torch.where(rows.view([-1 if i == dim else 1 for i in range(x.dim())]), x, moved.to(x.dtype))

    return mapped(evidence.fresh, swap)


def is_mask(x: Tensor) -> bool:
    """Whether these are zeros and ones: an attention mask, or types of tokens."""
    return x.dim() >= 2 and bool(((x == 0) | (x == 1)).all())


def changes(base: Run, other: Run, place: int, kept: slice) -> tuple[float, float] | None:
    """By how much the outputs of kept and of replaced samples change, at most; None where nothing can be said."""
    for x, y in both(base, other, place):
        change = (x.detach() - y.detach()).abs().flatten(1).amax(1) if x.dim() > 1 else (x.detach() - y.detach()).abs()
        rows = torch.zeros(len(change), dtype=torch.bool, device=change.device)
        rows[kept] = True
        own = float(change[~rows].max())
        if own > 0 and bool(change.isfinite().all()):
            return float(change[rows].max()), own
    return None


def along_dimension_one(evidence: Evidence, base: Run, place: int) -> bool:
    """Whether dimension 1 of the input behaves as a batch: the samples are there, and time comes first."""
    y = base.outputs[place]
    inputs = [x for x in tensors_in(evidence.inputs) if x.dim() > 1 and len(x) == evidence.batch_size]
    if not inputs or known_batch(evidence, evidence.batch_size):
        return False
    size = inputs[0].shape[1]
    rows = 1 if y.dim() > 1 and y.shape[1] == size else 0 if len(y) == size else None
    images = inputs[0].dim() > 3 or size < 2
    if rows is None or images:
        return False
    kept = slice(size // 2, None)
    other = evidence.again(swapped(evidence, size, kept, dim=1), training=False, change=settle)
    for one, two in both(base, other, place):
        change = (one.detach() - two.detach()).abs().movedim(rows, 0).flatten(1).amax(1)
        return float(change[kept].max()) <= 1e-4 * float(change[: size // 2].max())
    return False


def first_mixed(base: Run, other: Run, size: int, kept: slice) -> tuple[Node | None, Node | None, bool]:
    """The last call that has samples apart, the first that has not, and whether a reduction over them is between."""
    clean, reduced = None, False
    for one, two in zip(base.trace.nodes, other.trace.nodes, strict=False):
        if one.kind != two.kind or one.name != two.name:
            break
        y, z = one.outputs[0], two.outputs[0]
        if y.shape != z.shape or not y.is_floating_point():
            continue
        if one.kind in REDUCTIONS and over_samples(one, size):
            reduced = True
            continue
        if y.dim() == 0 or len(y) != size:
            if one.kind in REDUCTIONS and one.inputs and one.inputs[0].dim() and len(one.inputs[0]) == size:
                reduced = True
            continue
        own, others = (y - z).detach().abs(), torch.zeros(size, dtype=torch.bool, device=y.device)
        others[kept] = True
        if float(own[others].max()) > 1e-4 * max(float(own[~others].max()), 1e-12):
            return clean, one, reduced
        if float(own[~others].max()) > 0 and not one.is_view:
            clean = one
            reduced = False
    return clean, None, reduced


def over_samples(node: Node, size: int) -> bool:
    """Whether a call is a reduction over dimension 0, or over all, of something with a row for each sample."""
    if not node.inputs or node.inputs[0].dim() == 0 or len(node.inputs[0]) != size:
        return False
    rank = node.inputs[0].dim()
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    if dims is None:
        return True
    dims = dims if isinstance(dims, (list, tuple)) else (dims,)
    return any(isinstance(dim, int) and not isinstance(dim, bool) and dim % rank == 0 for dim in dims)


# ---- programs that do not run

# Rules that say why a program raises; where one of them does, this file has nothing to add.
EXPLAIN = ("C04b", "C05", "C09", "C15", "C15b", "C17", "C18")


@rule(
    "C00",
    "does-not-run",
    "error",
    title="The model or the loss raises an exception on the batch, or the loss is no tensor",
    why="Nothing can be trained, or looked at, before it runs.",
    fix="See the message: where it was raised, and the shapes that went in.",
    source="the exception",
    bad="""
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 8 * 8, 4))
loss = nn.CrossEntropyLoss()
batch = torch.randn(16, 3, 8, 8), torch.randint(4, (16,))
""",
    good="""
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 4))
loss = nn.CrossEntropyLoss()
batch = torch.randn(16, 3, 8, 8), torch.randint(4, (16,))
""",
)
def does_not_run(evidence: Evidence) -> Iterator[Found]:
    """Silent where another rule says why."""
    error = evidence.run.error
    if evidence.run.untensored:
        yield Found(
            f"the loss must be a tensor, for loss.backward(); the loss function returned {evidence.run.untensored}",
            fix="# return the loss alone, as torch computes it: no .item(), float() or .numpy(), and nothing beside it",
        )
    if error is None or explained(evidence):
        return
    trace = evidence.trace
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else text[:297] + "..."
    raised = f"{type(error).__name__}: {text}".removesuffix(": ")
    if evidence.run.stage == "loss":
        shapes = listed([shown(tuple(y.shape)) for y in evidence.run.outputs]) or "no tensors"
        targets = listed([described(t) for t in tensors_in(evidence.target)]) or "none"
        name = trace.failed.kind if trace.failed is not None else "the loss"
        yield Found(f"{name} raises {raised} (output {shapes}, target {targets})", fix=advice(evidence, text, None))
        return
    module = trace.running[-1] if trace.running else evidence.model
    name = evidence.names.get(module, "")
    failed = trace.failed.kind + "()" if trace.failed is not None else ""
    taken = trace.failed.inputs if trace.failed is not None else trace.entered[-1] if trace.entered else ()
    where = f"{name or 'the model'} ({type(module).__name__})" + (f" in {failed}" if failed else "")
    shapes = ", ".join(described(x) for x in taken[:4]) or "no tensors"
    yield Found(f"{where} raises {raised} (input {shapes})", module=name, fix=advice(evidence, text, module))


def explained(evidence: Evidence) -> bool:
    """Whether another rule says why."""
    for id in EXPLAIN:
        try:
            if id in RULES and any((f.severity or RULES[id].severity) == "error" for f in RULES[id].find(evidence)):
                return True
        except Exception:  # noqa: PERF203 (its failure is reported where it runs itself)
            continue
    return False


def described(x: Tensor) -> str:
    """Shape and dtype."""
    return f"{shown(tuple(x.shape))} {str(x.dtype).removeprefix('torch.')}"


def advice(evidence: Evidence, text: str, module: nn.Module | None) -> str:
    """What to write, for the exceptions that are met most."""
    name = evidence.names.get(module, "") if module is not None else ""
    sizes = re.search(r"mat1 and mat2 shapes cannot be multiplied \((\d+)x(\d+) and (\d+)x(\d+)\)", text)
    if sizes and isinstance(module, nn.Linear):
        return f"{path(name)} = torch.nn.Linear({sizes[2]}, {module.out_features})  # was in_features={sizes[3]}"
    channels = re.search(r"to have (\d+) channels, but got (\d+) channels", text)
    if channels:
        last = evidence.trace.entered[-1] if evidence.trace.entered else ()
        if last and last[0].dim() == 4 and last[0].shape[-1] == int(channels[1]):
            return "x.permute(0, 3, 1, 2)  # channels are dimension 1"
        return f"# {name or 'the convolution'} takes {channels[1]} channels, and gets {channels[2]}"
    if "dtype" in text or "scalar type" in text or "Double" in text:
        return "x.float()  # the dtype of the model's parameters; class indices are .long()"
    if "same device" in text:
        return "model.to(device); x = x.to(device); y = y.to(device)"
    if "index out of range in self" in text and isinstance(module, nn.Embedding):
        indices = tensors_in(evidence.trace.entered[-1]) if evidence.trace.entered else []
        most = max((int(i.max()) for i in indices if i.numel() and not i.is_floating_point()), default=-1)
        return f"torch.nn.Embedding({most + 1}, {module.embedding_dim})  # indices go up to {most}"
    if "Target size" in text or "size of tensor" in text:
        return "# output and target of one shape: output.squeeze(1), or target.unsqueeze(1)"
    if "missing" in text and "argument" in text:
        return "# a batch is (x1, x2, ..., y), or a dict of the model's arguments"
    return "# see the message"
