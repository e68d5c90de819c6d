"""Rules about the numbers that go in: inputs at the first weights, targets of a regression, the loss at the start."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from renorm.diagnose.catalogue import Found, rule
from renorm.diagnose.evidence import Evidence, entries
from renorm.diagnose.rules.calls import REGRESSION, counted
from renorm.diagnose.rules.words import said, shown
from renorm.diagnose.trace import WEIGHTED, LossCall, Node, kind_of_module, tensors_in

NORMS = frozenset({"batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm", "norm"})
ENOUGH = 16  # samples, before anything is said about a column of a table

TABLE = """
x = torch.randn(32, 4) * torch.tensor({}) + 3
model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
loss = nn.MSELoss()
batch = x, torch.randn(32, 1)
"""


def first_weights(evidence: Evidence) -> Iterator[tuple[Node, Tensor]]:
    """The layers that see the batch first, and what they see of it: behind whatever scales it, before any weight.

    Behind a norm or an embedding the scale of the batch does not matter, and such inputs are left out.
    """
    settled: dict[int, bool] = {}  # by id of a node: a weight or a norm came before
    for node in evidence.trace.nodes:
        behind = any(source is not None and settled.get(id(source), False) for source in node.sources)
        settled[id(node)] = behind or node.kind in WEIGHTED or node.kind in NORMS
        if behind or node.kind not in WEIGHTED - {"embedding"}:
            continue
        if node.kind == "matmul" and not any(isinstance(tensor, nn.Parameter) for tensor in node.inputs[1:]):
            continue
        values = node.inputs[0] if node.inputs else None
        if values is None or values.layout is not torch.strided:
            continue
        if values.is_floating_point() and values.numel() > 1 and _of_batch(evidence, node):
            yield node, values


def _of_batch(evidence: Evidence, node: Node) -> bool:
    """Whether the first input of a call comes from the batch: not from a parameter, a buffer or out of nothing."""
    batch = {id(tensor) for tensor in tensors_in(evidence.inputs)}
    waiting: list[tuple[Tensor, Node | None]] = [(node.inputs[0], node.sources[0])]
    seen: set[int] = set()
    while waiting:
        tensor, source = waiting.pop()
        if id(tensor) in batch:
            return True
        if source is not None and id(source) not in seen:
            seen.add(id(source))
            waiting += zip(source.inputs, source.sources, strict=True)
    return False


@rule(
    "C13",
    "input-scale",
    "warning",
    title="Inputs that are far from zero mean and unit variance at the first weights",
    why="Initial weights are made for inputs of about unit variance. Larger ones saturate units and make the first "
    "steps too large; an offset much larger than the spread, or one column a thousand times another, makes the loss "
    "steep in one direction and flat in all others.",
    fix="Standardize with the training set's mean and standard deviation, images to [0, 1] or to mean 0 and variance "
    "1; or begin with a batch norm.",
    source="LeCun, Bottou, Orr & Müller 1998, Efficient BackProp, 4.3; thresholds calibrated on the clean programs of "
    "tests/diagnose",
    bad=TABLE.format("[1.0, 5.0, 2000.0, 0.3]"),
    good=TABLE.format("[1.0, 5.0, 2.0, 0.3]"),
)
def input_scale(evidence: Evidence) -> Iterator[Found]:
    """Read where the first weights read it: a model that scales its inputs itself is judged behind that."""
    seen: set[int] = set()
    if all_alike(evidence):
        yield Found(
            f"all {evidence.batch_size} samples of the batch are the same, and their targets are not",
            fix="# an index that does not move, a file that is not read, an array that is filled in place?",
        )
        return
    for node, values in first_weights(evidence):
        if id(values) in seen:
            continue
        seen.add(id(values))
        numbers = entries(values)
        if not bool(numbers.isfinite().all()):
            count = int((~numbers.isfinite()).sum())
            yield Found(
                f"{count} of the {numbers.numel()} input values at {node.where} are NaN or infinite: so is everything "
                "behind",
                module=node.name,
                fix="x = torch.nan_to_num(x)  # or leave such samples out of the data set",
                severity="error",
            )
            continue
        trouble = _trouble(values.detach(), numbers)
        if trouble:
            yield Found(f"the inputs at {node.where} {trouble[0]}", module=node.name, fix=trouble[1])


def all_alike(evidence: Evidence) -> bool:
    """Whether every input has one row again and again, while the targets differ."""
    size = evidence.batch_size
    rows = [x for x in tensors_in(evidence.inputs) if x.dim() > 0 and len(x) == size and x.layout is torch.strided]
    targets = [t for t in tensors_in(evidence.target) if t.dim() > 0 and len(t) == size]
    if size < 8 or not rows or len(rows) < len(tensors_in(evidence.inputs)) or not any(x[0].numel() > 1 for x in rows):
        return False
    return all(bool((x == x[:1]).all()) for x in rows) and any(not bool((t == t[:1]).all()) for t in targets)


STANDARDIZE = "x = (x - mean) / std  # mean and std of the training set, column by column"


def _trouble(values: Tensor, numbers: Tensor) -> tuple[str, str] | None:
    """What is wrong with finite inputs, and code against it."""
    low, high = (float(value) for value in numbers.aminmax())
    mean, std = float(numbers.mean()), float(numbers.std())
    if low >= 0 and 100 < high <= 255 and std > 20 and bool((numbers == numbers.round()).all()):
        return f"are whole numbers from {low:g} to {high:g}, as images in bytes are", "x = x / 255"
    # A table: (samples, columns). Constant and 0/1 columns have no scale; what a batch shows of rare ones is chance.
    if values.dim() == 2 and values.shape[0] >= ENOUGH and values.shape[1] >= 2:
        columns = values.float()
        stds, means = columns.std(0), columns.mean(0)
        real = (stds > 0) & ((columns == 0).float().mean(0) < 0.5)
        if int(real.sum()) >= 2:
            small, large = (float(value) for value in stds[real].aminmax())
            if large > 10 and large > 1e3 * small:
                a, b = (int(torch.where(real & (stds == value))[0][0]) for value in (small, large))
                return (
                    f"have columns of very different scales: standard deviation {large:.3g} in column {b}, "
                    f"{small:.3g} in column {a}",
                    STANDARDIZE,
                )
        offset = real & (means.abs() > 10) & (means.abs() > 10 * stds)
        if bool(offset.any()):
            i = int(torch.where(offset)[0][0])
            return (
                f"have a mean of {float(means[i]):.4g} and a spread of {float(stds[i]):.3g} in column {i}",
                STANDARDIZE,
            )
    if std > 50:
        return f"have a standard deviation of {std:.3g}, and go from {low:.4g} to {high:.4g}", STANDARDIZE
    if abs(mean) > 10 and abs(mean) > 10 * std > 0:
        return f"have a mean of {mean:.4g} and a spread of only {std:.3g}", STANDARDIZE
    if 0 < std < 2e-3 and max(-low, high) < 5e-3:
        return (
            f"are tiny, from {low:.3g} to {high:.3g} with a standard deviation of {std:.2g}: scaled twice?",
            STANDARDIZE,
        )
    return None


REGRESSED = """
x = torch.randn(64, 4)
y = {} * x.sum(1, keepdim=True) + {}
model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
loss = nn.MSELoss()
batch = x, y
"""


@rule(
    "C14",
    "target-scale",
    "warning",
    title="Targets of a regression that are far from the scale of the outputs",
    why="A head starts with outputs around 0 and of about unit size. It first has to grow to the targets' level and "
    "size, with gradients as large as they are, before it can learn how they depend on the input.",
    fix="Standardize the targets with the training set's mean and standard deviation, and undo it in predictions.",
    source="LeCun, Bottou, Orr & Müller 1998, Efficient BackProp, 4.5; thresholds calibrated on the clean programs of "
    "tests/diagnose",
    bad=REGRESSED.format(100, 1000),
    good=REGRESSED.format(0.5, 0),
)
def target_scale(evidence: Evidence) -> Iterator[Found]:
    """Targets of large spread or offset, and outputs that have neither: a model may scale its outputs itself."""
    for call in evidence.losses:
        if call.kind not in REGRESSION or not call.target.is_floating_point():
            continue
        real = counted(evidence, call)  # without what stands for missing values behind a mask
        if real is not None and real.shape == call.target.shape == call.input.shape:
            target, output = entries(call.target[real]), entries(call.input[real])
        else:
            target, output = entries(call.target), entries(call.input)
        if min(target.numel(), output.numel()) < 8 or not bool(target.isfinite().all() and output.isfinite().all()):
            continue
        mean, std = float(target.mean()), float(target.std())
        at, spread = float(output.mean()), float(output.std())
        # A target of bootstrapping or of an autoencoder is made by the model: it has the outputs' scale.
        wide = std > 10 and spread < 0.1 * std
        far = (
            abs(mean) > 20 and abs(mean) > 10 * std and abs(mean - at) > 10 * max(std, spread)
        )  # logarithms stay below
        if wide or far:
            yield Found(
                f"the targets of {call.kind} have mean {mean:.4g} and standard deviation {std:.3g}, the outputs of "
                f"{said(evidence.blame(call.input))} mean {at:.3g} and standard deviation {spread:.3g}",
                fix=f"y = (y - {mean:.4g}) / {std or 1:.4g}  # with numbers of the training set; predictions: "
                f"output * {std or 1:.4g} + {mean:.4g}",
            )


START = """
model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 10))
{}
loss = nn.CrossEntropyLoss()
batch = torch.randn(64, 8), torch.randint(10, (64,))
"""


@rule(
    "C11",
    "initial-loss",
    "warning",
    title="A loss far above chance at the start",
    why="A model that knows nothing should be undecided, and lose ln K. One that is sure, and wrong, first has to "
    "unlearn that: its first steps shrink the last layer instead of learning.",
    fix="Make the last layer's initial weights smaller, or normalize what goes into it.",
    source="the check of the initial loss in TheDeepChecker (Ben Braiek & Khomh 2023); threshold calibrated on the "
    "clean programs of tests/diagnose, which start at up to 1.7 times it",
    bad=START.format("nn.init.normal_(model[2].weight)"),
    good=START.format("nn.init.normal_(model[2].weight, std=0.02)"),
)
def initial_loss(evidence: Evidence) -> Iterator[Found]:
    """Logits as a plain layer gives them; a trained model starts low, so that only a high loss says something."""
    for call in evidence.losses:
        node = evidence.blame(call.input)
        if node is None or node.kind not in ("linear", "conv", "conv_transpose", "matmul"):
            continue  # such as scaled cosines with a margin, which start high on purpose
        weights = any(isinstance(x, nn.Parameter) or isinstance(x._base, nn.Parameter) for x in node.inputs)
        if node.kind == "matmul" and not weights:
            continue  # similarities, which a temperature may have scaled
        found = _chance(call)
        if found is None:
            continue
        start, chance, what = found
        if start > max(2 * chance, chance + 2):
            spread = float(entries(call.input).std())
            yield Found(
                f"{call.kind} starts at {start:.3g}, and knowing nothing gives {what} = {chance:.3g}: the logits of "
                f"{node.where} have a standard deviation of {spread:.3g}",
                module=node.name,
                fix=f'torch.nn.init.normal_(model.get_submodule("{node.name}").weight, std=0.02)'
                if node.module is not None
                else "# smaller initial weights in the last layer",
            )


def _chance(call: LossCall) -> tuple[float, float, str] | None:
    """(loss now, loss of one who knows nothing, its formula) of unweighted means; None for other losses."""
    logits, target = call.input.detach(), call.target.detach()
    try:
        if call.kind == "cross_entropy" and logits.dim() >= 2 and logits.shape[1] >= 2:
            ignored = call.options.get("ignore_index", -100)
            start = float(
                F.cross_entropy(
                    logits.float(), target.float() if target.is_floating_point() else target, ignore_index=ignored
                )
            )
            return start, math.log(logits.shape[1]), f"ln {logits.shape[1]}"
        if call.kind == "binary_cross_entropy_with_logits":
            return float(F.binary_cross_entropy_with_logits(logits.float(), target.float())), math.log(2), "ln 2"
    except (RuntimeError, IndexError, ValueError):
        pass  # targets that do not fit: a finding of another rule
    return None


BROKEN = """
class Standardize(nn.Module):
    def forward(self, x):
        return (x - x.mean(1, keepdim=True)) / {}

model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), Standardize(), nn.Linear(16, 3))
loss = nn.CrossEntropyLoss()
x = torch.randn(32, 8)
model[0].bias.data -= {}  # some samples make no unit active
batch = x, torch.randint(3, (32,))
"""


@rule(
    "C11b",
    "loss-not-finite",
    "error",
    title="The loss of the first batch is NaN or infinite",
    why="Every gradient is NaN then, and after one step every parameter.",
    fix="Look at the operation that made the first NaN: a division by 0, a logarithm or root of 0 or less, a softmax "
    "over nothing but -inf, an overflow of float16.",
    source="IEEE 754 arithmetic: NaN stays NaN",
    bad=BROKEN.format("x.std(1, keepdim=True)", 3),
    good=BROKEN.format("(x.std(1, keepdim=True) + 1e-5)", 0),
)
def loss_not_finite(evidence: Evidence) -> Iterator[Found]:
    """Names the first call that made a NaN of numbers, or else an infinity."""
    if evidence.loss is None or math.isfinite(evidence.loss):
        return
    node = next((n for n in evidence.trace.nodes if _makes(n, torch.isnan)), None)
    what = "NaN"
    if node is None:
        node = next((n for n in evidence.trace.nodes if _makes(n, torch.isinf)), None)
        what = "infinity"
    by = f"; the first {what} comes out of {node.where}" if node is not None else ""
    if any(t.is_floating_point() and not bool(t.isfinite().all()) for t in tensors_in(evidence.inputs)):
        by = "; there is NaN or infinity in the batch"
    if node is not None and node.kind not in WEIGHTED:
        by += f", from inputs {' and '.join(_range(tensor) for tensor in node.inputs[:2])}"
    yield Found(f"the loss is {evidence.loss:g}{by}", module=node.name if node is not None else "")


def _makes(node: Node, test: object) -> bool:
    assert callable(test)

    def some(tensors: tuple[Tensor, ...]) -> bool:
        return any(t.is_floating_point() and bool(test(t.detach()).any()) for t in tensors)

    return some(node.outputs) and not some(node.inputs)


def _range(tensor: Tensor) -> str:
    shape = shown(tuple(tensor.shape))
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return shape
    low, high = (float(value) for value in entries(tensor).aminmax())
    return f"{shape} between {low:.3g} and {high:.3g}"


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalizes: torch's norms, ours, and those of others that say so in their name."""
    return kind_of_module(module) in NORMS or (
        type(module).__name__.lower().endswith("norm") and next(module.children(), None) is None
    )
