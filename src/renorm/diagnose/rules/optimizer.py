"""Rules about the optimizer: which parameters it has, what it decays, how far its first steps go."""

from __future__ import annotations

import copy
import inspect
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from renorm.diagnose.catalogue import Found, Mended, rule
from renorm.diagnose.evidence import Evidence, entries, forward, preserved
from renorm.diagnose.hidden import hidden
from renorm.diagnose.rules.data import is_norm
from renorm.diagnose.rules.parameters import apart, hand_over, listed, owner_of, tensors

LARGE = 0.3  # of a weight's norm, for one step
REPLACED_BY = 2.0  # times their norm, for one step of most weights
STEPS = 5  # on the batch, to see whether the loss falls

REPLACED = """
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 10))
{}
loss = nn.CrossEntropyLoss()
batch = torch.randn(32, 8), torch.randint(5, (32,))
"""
BUILD, REPLACE = "optimizer = torch.optim.Adam(model.parameters())", "model[2] = nn.Linear(16, 5)"


@rule(
    "C24",
    "parameters-outside-the-optimizer",
    "error",
    title="The optimizer does not have the model's parameters",
    why="A parameter that is in no group is never updated, and nothing says so. It mostly comes from a layer that was "
    "replaced or added after the optimizer was built.",
    fix="Build the optimizer last; freeze what shall not learn with requires_grad_(False).",
    source="torch.optim.Optimizer holds references to the tensors it was given",
    bad=REPLACED.format(f"{BUILD}\n{REPLACE}"),
    good=REPLACED.format(f"{REPLACE}\n{BUILD}"),
)
def parameters_outside_the_optimizer(evidence: Evidence) -> Iterator[Found]:
    """An error where the split cannot be meant: old tensors instead of new ones, or part of a block without the rest.

    A whole block that is left out may have an optimizer of its own, or stay as it is: a warning, if its name does not
    say so.
    """
    if evidence.optimizer is None:
        return
    params = [parameter for group in evidence.optimizer.param_groups for parameter in group["params"]]
    ids = {id(parameter) for parameter in params}
    yield from _twice(evidence, params)
    names = {id(parameter): name for name, parameter in evidence.model.named_parameters()}
    own = set(names)
    others = {id(p) for item in hidden(evidence.model) for m in item.modules for p in m.parameters()}
    others |= {id(tensor) for item in hidden(evidence.model) for tensor in item.tensors}
    if isinstance(evidence.loss_function, nn.Module):
        others |= {id(parameter) for parameter in evidence.loss_function.parameters()}
    strange = len(ids - own - others)
    missing = {
        name: parameter
        for name, parameter in evidence.model.named_parameters()
        if id(parameter) not in ids and evidence.gradients.get(name) is not None
    }
    mend = partial(_add, names=tuple(missing)) if missing else None
    count = sum(parameter.numel() for parameter in missing.values())
    lacking = f"{tensors(len(missing))} of the model with a gradient ({listed(missing)}; {count} numbers)"
    if own and strange and not ids & own:
        yield Found(
            f"nothing of the optimizer's {tensors(len(ids))} is in the model: it was built for another one, or a copy",
            fix=_again(evidence.optimizer),
            mend=mend,
        )
    elif strange and missing:
        yield Found(
            f"the optimizer has {tensors(strange)} from outside of the model, and does not have {lacking}: it was "
            "built before they were replaced",
            module=owner_of(next(iter(missing))),
            fix=_again(evidence.optimizer),
            mend=mend,
        )
    elif missing and ids & own and not _specialized(evidence.optimizer):
        split = _split(evidence, set(missing), ids)
        if split != "apart":
            whole = split == "blocks"
            yield Found(
                f"the optimizer does not have {lacking}" + (": their blocks are not trained" if whole else ""),
                module=owner_of(next(iter(missing))),
                severity="warning" if whole else "error",
                fix=_again(evidence.optimizer)
                + ("\n# or, if on purpose: requires_grad_(False) on what shall not learn" if whole else ""),
                mend=mend,
            )
    trained = [name for name, p in evidence.model.named_parameters() if p.requires_grad and id(p) in ids]
    frozen = [name for name, p in evidence.model.named_parameters() if not p.requires_grad or id(p) not in ids]
    if trained and frozen and all(is_norm(evidence.model.get_submodule(owner_of(name))) for name in trained):
        yield Found(
            f"nothing but norms is trained ({listed(map(owner_of, trained))}); {len(frozen)} other tensors are frozen",
            severity="info",
            fix="# fine if that is the method; norms put in after the rest was frozen train by mistake",
        )


def _twice(evidence: Evidence, params: list[Tensor]) -> Iterator[Found]:
    double = len(params) - len({id(parameter) for parameter in params})
    if double:
        yield Found(
            f"the optimizer has {tensors(double)} twice: each step updates twice",
            severity="warning",
            fix="# pass every tensor once; model.parameters() leaves tied ones out by itself",
        )


def _again(optimizer: Optimizer) -> str:
    """Code that builds the optimizer."""
    rate = float(optimizer.param_groups[0].get("lr", 1e-3))
    kind = type(optimizer)
    name = f"torch.optim.{kind.__name__}" if kind.__module__.startswith("torch.optim") else kind.__name__
    return f"optimizer = {name}(model.parameters(), lr={rate:g})  # when the model is complete"


def _specialized(optimizer: Optimizer) -> bool:
    """Whether an optimizer is made for some kinds of parameters only, and goes with another one."""
    name = type(optimizer).__name__.lower()
    return any(word in name for word in ("muon", "sparse", "shampoo"))


def _split(evidence: Evidence, missing: set[str], ids: set[int]) -> str:
    """Where the line runs between what the optimizer has and what not.

    "blocks": between children of the model, or between matrices and vectors; "apart": so, and by a name that says that
    another optimizer has the others; "within": through the middle of a child.
    """
    names = [name for name in evidence.gradients if evidence.gradients[name] is not None]
    prefix = ""
    while True:  # down to where the model branches
        heads = {name[len(prefix) :].partition(".")[0] for name in names}
        if len(heads) != 1 or f"{prefix}{next(iter(heads))}" in names:
            break
        prefix += f"{next(iter(heads))}."
    blocks: dict[str, set[str]] = {}
    for name in names:
        blocks.setdefault(name[len(prefix) :].partition(".")[0], set()).add(name)
    if all(inside <= missing or not inside & missing for inside in blocks.values()):
        without = [block for block, inside in blocks.items() if inside <= missing]
        with_ = [block for block in blocks if block not in without]
        if any(prefix + block in names for block in without):
            return "within"  # a tensor of the model itself, such as a class token, is no block
        return "apart" if all(map(apart, without)) or all(map(apart, with_)) else "blocks"
    parameters = dict(evidence.model.named_parameters())
    flat = {parameters[name].dim() < 2 for name in missing}
    return (
        "blocks"
        if len(flat) == 1 and flat.isdisjoint(parameters[n].dim() < 2 for n in names if n not in missing)
        else "within"
    )


def _add(model: nn.Module, optimizer: Optimizer | None, *, names: tuple[str, ...]) -> Mended:
    parameters = dict(model.named_parameters())
    said = hand_over(optimizer, [parameters[name] for name in names if name in parameters])
    return Mended(model, optimizer, said.removeprefix(", ") or "nothing to add")


DECAYED = """
model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5))
{}
loss = nn.CrossEntropyLoss()
batch = torch.randn(32, 8), torch.randint(5, (32,))
"""


@rule(
    "C26",
    "weight-decay-of-norms",
    "info",
    title="Weight decay on norms and biases",
    why="Decay draws the scale of a norm to 0 instead of to 1, and does not regularize: a smaller weight before a norm "
    "computes the same. Recipes for ResNets, BERT and GPT leave norms and biases out.",
    fix="Two groups: weight_decay=0 for norms and biases.",
    source="Goyal et al. 2017, Accurate, large minibatch SGD (1706.02677), 5.1; the optimizer of BERT's release",
    bad=DECAYED.format("optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)"),
    good=DECAYED.format(
        "matrices = [p for p in model.parameters() if p.dim() > 1]\n"
        "vectors = [p for p in model.parameters() if p.dim() < 2]\n"
        'optimizer = torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0}])'
    ),
)
def weight_decay_of_norms(evidence: Evidence) -> Iterator[Found]:
    """Groups that have weights besides: one of norms alone was made on purpose."""
    if evidence.optimizer is None:
        return
    for i, group in enumerate(evidence.optimizer.param_groups):
        decay = float(group.get("weight_decay") or 0)
        spared = [name for name, p in _sparable(evidence.model, group) if p.requires_grad]
        if decay >= 1e-3 and spared and len(spared) < len(group["params"]):
            norms = sum(is_norm(evidence.model.get_submodule(owner_of(name))) for name in spared)
            yield Found(
                f"group {i} of the optimizer decays {tensors(norms)} of norms and {len(spared) - norms} of biases by "
                f"{decay:g}, as the weights",
                fix=f"norms_and_biases = [p for p in model.parameters() if p.dim() < 2]\n"
                f"weights = [p for p in model.parameters() if p.dim() > 1]\n"
                f"optimizer = torch.optim.{type(evidence.optimizer).__name__}(\n"
                f'    [{{"params": weights}}, {{"params": norms_and_biases, "weight_decay": 0.0}}],\n'
                f"    lr={float(group['lr']):g}, weight_decay={decay:g},\n"
                f")",
                mend=_spare,
            )
            return


def _sparable(model: nn.Module, group: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The parameters of norms, and biases, in an optimizer's group."""
    ids = {id(parameter) for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        bias = name.rpartition(".")[2].startswith("bias") and parameter.dim() == 1
        if id(parameter) in ids and (bias or is_norm(model.get_submodule(owner_of(name)))):
            yield name, parameter


def _spare(model: nn.Module, optimizer: Optimizer | None) -> Mended:
    """Move them to groups without decay, the optimizer's state with them."""
    assert optimizer is not None
    moved = 0
    for group in list(optimizer.param_groups):
        spared = [parameter for _, parameter in _sparable(model, group)]
        if float(group.get("weight_decay") or 0) < 1e-3 or not spared or len(spared) == len(group["params"]):
            continue
        ids = {id(parameter) for parameter in spared}
        rest = {name: value for name, value in group.items() if name not in ("params", "param_names")}
        names = dict(zip(map(id, group["params"]), group.get("param_names", ()), strict=False))
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ids]
        new = {**rest, "params": spared, "weight_decay": 0.0}
        if names:
            group["param_names"] = [names[id(parameter)] for parameter in group["params"]]
            new["params"] = [(names[id(parameter)], parameter) for parameter in spared]
        optimizer.add_param_group(new)
        moved += len(spared)
    return Mended(model, optimizer, f"{moved} tensors of norms and biases are in a group without weight decay")


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
