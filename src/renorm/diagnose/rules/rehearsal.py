"""Rules about how far the first steps go, which are made on copies."""

from __future__ import annotations

import copy
import inspect
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from renorm.diagnose.catalogue import Found, rule
from renorm.diagnose.evidence import Evidence, entries, forward, preserved
from renorm.diagnose.rules.parameters import owner_of

LARGE = 0.3  # of a weight's norm, for one step
REPLACED_BY = 2.0  # times their norm, for one step of most weights
STEPS = 5  # on the batch, to see whether the loss falls


@dataclass
class Rehearsal:
    """A copy of the optimizer with copies of its parameters: it can step, and nothing of the user's moves."""

    optimizer: Optimizer
    pairs: list[tuple[Tensor, Tensor]]  # the model's parameters and their copies

    @classmethod
    def of(cls, optimizer: Optimizer) -> Rehearsal:
        """The optimizer with its state; hooks, and a scheduler's wrap of step(), stay behind."""
        twin = copy.deepcopy(optimizer)
        groups = zip(optimizer.param_groups, twin.param_groups, strict=True)
        pairs = [pair for a, b in groups for pair in zip(a["params"], b["params"], strict=True)]
        return cls(twin, pairs)

    def step(self, gradients: dict[int, Tensor]) -> None:
        """One step with gradients by the id of the model's parameters."""
        for original, twin in self.pairs:
            gradient = gradients.get(id(original))
            twin.grad = None if gradient is None else gradient.clone()
        self.optimizer.step()

    def write(self) -> None:
        """Put the copies' values into the model."""
        for original, twin in self.pairs:
            original.data.copy_(twin.data)


def _can_step(optimizer: Optimizer | None) -> bool:
    """Whether step() can be called without a closure."""
    if optimizer is None or isinstance(optimizer, torch.optim.LBFGS):
        return False
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is None or closure.default is not inspect.Parameter.empty


def _by_id(model: nn.Module, gradients: dict[str, Tensor | None]) -> dict[int, Tensor]:
    parameters = dict(model.named_parameters())
    return {id(parameters[name]): gradient for name, gradient in gradients.items() if gradient is not None}


def _train(evidence: Evidence, rehearsal: Rehearsal, steps: int, enough: float = -math.inf) -> list[float]:
    """The losses before and after each of some steps on the batch, from the same random numbers; stops at `enough`."""
    losses = []
    with preserved(evidence.model, evidence.loss_function, evidence.inputs, evidence.target), torch.enable_grad():
        for step in range(steps + 1):
            evidence.seed.restore()
            run = forward(evidence.model, evidence.loss_function, evidence.fresh, evidence.target)
            if run.loss is None or run.loss.numel() != 1 or not run.loss.requires_grad:
                break
            losses.append(float(run.loss.detach()))
            if step == steps or losses[-1] <= enough or not math.isfinite(losses[-1]):
                break
            named = {name: p for name, p in evidence.model.named_parameters() if p.requires_grad}
            found = torch.autograd.grad(run.loss, list(named.values()), allow_unused=True)
            rehearsal.step(_by_id(evidence.model, dict(zip(named, found, strict=True))))
            rehearsal.write()
    return losses


STEP = """
model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
optimizer = torch.optim.{}
loss = nn.CrossEntropyLoss()
batch = torch.randn(32, 8), torch.randint(5, (32,))
"""


@rule(
    "C27",
    "step-too-large",
    "warning",
    title="The optimizer's steps are too large for this model",
    why="A step that changes weights by a third of themselves leaves the neighbourhood where the gradient means "
    "something: the loss rises on the very samples it was computed from.",
    fix="A learning rate ten times lower, or a warm-up.",
    source="the step is measured on the batch; threshold calibrated on the clean programs of tests/diagnose: the "
    "first step is below 0.3 of a weight, or the loss falls",
    bad=STEP.format("Adam(model.parameters(), lr=0.5)"),
    good=STEP.format("Adam(model.parameters(), lr=1e-3)"),
)
def step_too_large(evidence: Evidence) -> Iterator[Found]:
    """A step on copies: over 0.3 of a weight's norm, and the loss of this batch is higher after five of them.

    Or most weights change by more than twice their norm. Gradients that are clipped in training are not here.
    """
    given, rehearsal = evidence.optimizer, _first_step(evidence)
    if given is None or rehearsal is None:
        return
    kind, names = type(given).__name__, {id(p): name for name, p in evidence.model.named_parameters()}
    sizes: dict[str, float] = {}
    for original, twin in rehearsal.pairs:
        name = names.get(id(original), "a parameter")
        if _breaks(original, twin):
            yield _broken(rehearsal, name, twin)
            return
        size = float(entries(original).norm())
        if original.dim() >= 2 and size > 0:
            sizes[name] = float((entries(twin) - entries(original)).norm()) / size
    sizes = {name: size for name, size in sizes.items() if math.isfinite(size)}
    if not sizes or max(sizes.values()) <= LARGE:
        return
    name = max(sizes, key=lambda one: sizes[one])
    rate = float(given.param_groups[0].get("lr", math.nan))
    said = f"the first step of {kind}, lr={rate:g}, changes"
    lower = rate * 0.01 / sizes[name]  # would change no weight by more than a hundredth
    fix = f"# lr={lower:.0e}, or a warm-up; a loop that clips gradients may be fine as it is"
    losses = _train(evidence, Rehearsal.of(given), STEPS)
    if len(losses) < 2 or not math.isfinite(losses[0]):
        return
    middle = statistics.median(sizes.values())
    if not math.isfinite(losses[-1]) or losses[-1] > losses[0] + 0.05 * abs(losses[0]):
        yield Found(
            f"{said} {name} by {sizes[name]:.0%} of its norm, and {len(losses) - 1} steps on this batch take its loss "
            f"from {losses[0]:.3g} to {losses[-1]:.3g}",
            module=owner_of(name),
            fix=fix,
        )
    elif len(sizes) >= 3 and rate >= 0.05 and middle > REPLACED_BY:
        yield Found(
            f"{said} the weights by {middle:.0%} of their norm (the median of {len(sizes)}): nothing of how they were "
            "initialized is left",
            fix=fix,
        )


def _breaks(original: Tensor, twin: Tensor) -> bool:
    """Whether a step with a finite gradient makes NaN or infinity of finite numbers."""
    before = [entries(original)] + ([] if twin.grad is None else [entries(twin.grad)])
    return not bool(entries(twin).isfinite().all()) and all(bool(values.isfinite().all()) for values in before)


def _broken(rehearsal: Rehearsal, name: str, twin: Tensor) -> Found:
    """What to say of it."""
    count, kind = int((~entries(twin).isfinite()).sum()), type(rehearsal.optimizer).__name__
    eps = next((group["eps"] for group in rehearsal.optimizer.param_groups if "eps" in group), None)
    return Found(
        f"one step of {kind} makes {count} of the {twin.numel()} entries of {name} "
        f"({str(twin.dtype).removeprefix('torch.')}) NaN or infinite"
        + (f", with eps={eps:g}" if eps is not None else ""),
        module=owner_of(name),
        severity="error",
        fix="# eps=1e-8 is 0 in float16: keep the parameters in float32 and use torch.autocast"
        if twin.dtype == torch.float16
        else "# a larger eps, a lower learning rate",
    )


def _first_step(evidence: Evidence, rate: str = "lr") -> Rehearsal | None:
    """A rehearsal after its first step; None without an optimizer that can make it.

    `rate` names the group's entry to take the learning rate from: schedulers keep that without warm-up in "initial_lr".
    """
    optimizer = evidence.optimizer
    if optimizer is None or not evidence.gradients or not _can_step(optimizer):
        return None
    try:
        rehearsal = Rehearsal.of(optimizer)
        for group in rehearsal.optimizer.param_groups:
            group["lr"] = group.get(rate, group.get("lr"))
        rehearsal.step(_by_id(evidence.model, evidence.gradients))
    except Exception:  # an optimizer that needs more than its state and gradients is not judged
        return None
    return rehearsal


ROUNDED = """
model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 5)){}
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
loss = nn.CrossEntropyLoss()
batch = torch.randn(32, 8){}, torch.randint(5, (32,))
"""


@rule(
    "C27b",
    "steps-lost-in-rounding",
    "warning",
    title="Parameters in low precision that a step does not change",
    why="bfloat16 has 8 bits: a step of less than 1/256 of a weight rounds back to the weight. Training stands still "
    "though loss and gradients look healthy.",
    fix="Keep the parameters in float32 and compute in bfloat16 with torch.autocast; or an optimizer with float32 "
    "copies or stochastic rounding.",
    source="Zamirai et al. 2020, Revisiting BFloat16 training (2010.06192); measured on the batch",
    bad=ROUNDED.format(".bfloat16()", ".bfloat16()"),
    good=ROUNDED.format("", ""),
)
def steps_lost_in_rounding(evidence: Evidence) -> Iterator[Found]:
    """Over 90 % of the entries of low precision that have a gradient stay what they are."""
    if not any(p.requires_grad and p.dtype in (torch.bfloat16, torch.float16) for p in evidence.model.parameters()):
        return
    rehearsal = _first_step(evidence, "initial_lr")
    if rehearsal is None or not any(float(group["lr"]) > 0 for group in rehearsal.optimizer.param_groups):
        return
    same = total = 0
    for original, twin in rehearsal.pairs:
        gradient = twin.grad
        if (
            original.dtype in (torch.bfloat16, torch.float16)
            and gradient is not None
            and gradient.layout is torch.strided
        ):
            learning = (gradient != 0) & (original != 0)
            total += int(learning.sum())
            same += int((learning & (original.detach() == twin.detach())).sum())
    if total and same > 0.9 * total:
        rate = max(float(group["lr"]) for group in rehearsal.optimizer.param_groups)
        yield Found(
            f"a step of {type(rehearsal.optimizer).__name__}, lr={rate:g}, leaves {same} of {total} entries of low "
            "precision as they are: it is less than their last bit",
            fix="model.float()\nwith torch.autocast(device_type, dtype=torch.bfloat16):\n    output = model(x)",
        )


UNLEARNABLE = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(8, 64), nn.Linear(64, 5)

    def forward(self, x):
        return self.head(F.relu(self.layer({})))

model = Net()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
loss = nn.CrossEntropyLoss()
batch = torch.randn(32, 8), torch.randint(5, (32,))
options = {{"include": ("C29",)}}
"""


@rule(
    "C29",
    "one-batch-is-not-learnt",
    "warning",
    title="Two hundred steps on one batch do not bring its loss down",
    why="A model that cannot learn one batch by heart will not learn the data set: the input does not get through, the "
    "labels are not those of the samples as the model sees them, or the steps are wrong.",
    fix="Look for samples that become equal on the way to the loss, for a frozen model, for a learning rate that is "
    "far off.",
    source="the overfitting check of TheDeepChecker (Ben Braiek & Khomh 2023)",
    bad=UNLEARNABLE.format("0 * x"),
    good=UNLEARNABLE.format("x"),
    opt_in=True,
)
def one_batch_is_not_learnt(evidence: Evidence) -> Iterator[Found]:
    """On copies, with the given optimizer, or Adam without one; the loss stays above a tenth of its start."""
    start = evidence.loss
    trainable = [parameter for parameter in evidence.model.parameters() if parameter.requires_grad]
    if start is None or not math.isfinite(start) or start <= 0 or not trainable or not evidence.gradients:
        return  # a loss that may be negative has no floor to come near to
    if evidence.optimizer is not None and _first_step(evidence) is None:
        return
    optimizer = evidence.optimizer or torch.optim.Adam(trainable, lr=1e-3)
    losses = _train(evidence, Rehearsal.of(optimizer), 200, enough=0.1 * start)
    if losses and not losses[-1] <= 0.1 * losses[0]:
        yield Found(
            f"{len(losses) - 1} steps of {type(optimizer).__name__} on this batch alone take its loss from "
            f"{losses[0]:.3g} to {losses[-1]:.3g}"
        )
