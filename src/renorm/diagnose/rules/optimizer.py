"""Rules about the optimizer: which parameters it has, and what it decays."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from renorm.diagnose.catalogue import Found, Mended, rule
from renorm.diagnose.evidence import Evidence
from renorm.diagnose.hidden import hidden
from renorm.diagnose.rules.data import is_norm
from renorm.diagnose.rules.parameters import apart, hand_over, owner_of, tensors
from renorm.diagnose.rules.words import listed

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
