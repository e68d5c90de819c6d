"""Rules about an optimizer's settings that are off by orders of magnitude, whatever the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from renorm.diagnose.catalogue import Found, rule
from renorm.diagnose.evidence import Evidence

COUPLED = 0.1  # of weight decay that goes through the gradient; recipes have 5e-4
SHRINKS = 2e-3  # of a weight by one step of decoupled decay; recipes have 3e-4
HEAVY = 0.995  # momentum; recipes have up to 0.99

SET = """
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))
optimizer = torch.optim.{}
loss = nn.CrossEntropyLoss()
batch = torch.randn(32, 8), torch.randint(5, (32,))
"""


def groups(evidence: Evidence) -> list[dict[str, Any]]:
    """The optimizer's groups that have parameters; none without one."""
    found = [] if evidence.optimizer is None else evidence.optimizer.param_groups
    return [group for group in found if group["params"]]


@rule(
    "C26b",
    "decay-outweighs-the-loss",
    "warning",
    title="Weight decay that shrinks weights faster than anything can be learnt",
    why="Every step takes a share of each weight away. What the loss asks for has to be larger than that, or all "
    "weights go to 0, and outputs with them.",
    fix="1e-4 to 5e-4 for SGD and Adam, 0.01 to 0.1 for AdamW.",
    source="recipes of timm, torchvision, nanoGPT and ViT stay a factor of 6 and more below; the limits are ours",
    bad=SET.format("Adam(model.parameters(), lr=1e-3, weight_decay=1.0)"),
    good=SET.format("AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)"),
)
def decay_outweighs_the_loss(evidence: Evidence) -> Iterator[Found]:
    """Decay in the gradient from 0.1 on; decoupled from 1/500 of a weight each step on."""
    for group in groups(evidence):
        decay, kind = float(group.get("weight_decay") or 0), type(evidence.optimizer).__name__
        decoupled = group.get("decoupled_weight_decay", kind.lower().endswith("w") or kind in ("Lion", "Muon"))
        rate = max(float(group.get("lr") or 0), float(group.get("initial_lr") or 0))
        known = type(evidence.optimizer).__module__.startswith("torch.optim")
        if (decoupled and rate * decay > SHRINKS) or (not decoupled and known and decay >= COUPLED):
            by = f"weight_decay={decay:g} of {kind}"
            yield Found(
                f"{by}, lr={rate:g}, takes {rate * decay:.2g} of every weight in each step"
                if decoupled
                else f"{by} adds {decay:g} times each weight to its gradient",
                fix="weight_decay=0.01" if decoupled else "weight_decay=1e-4",
            )
            return


@rule(
    "C27c",
    "learning-rate-of-zero",
    "error",
    title="A learning rate of 0",
    why="No step changes anything.",
    fix="Set lr; a warm-up that starts at 0 keeps the rate it leads to in initial_lr, and is fine.",
    source="the update rule",
    bad=SET.format("SGD(model.parameters(), lr=0.0)"),
    good=SET.format("SGD(model.parameters(), lr=0.1)"),
)
def learning_rate_of_zero(evidence: Evidence) -> Iterator[Found]:
    """In all groups, and no scheduler has put another one there."""
    rates = [(group.get("lr"), group.get("initial_lr")) for group in groups(evidence)]
    if rates and all(rate is not None and float(rate) == 0 and not start for rate, start in rates):
        yield Found(f"lr is 0 in {'all groups' if len(rates) > 1 else type(evidence.optimizer).__name__}")


@rule(
    "C27d",
    "momentum-near-one",
    "warning",
    title="A momentum that remembers hundreds of steps",
    why="With momentum m a gradient acts on 1/(1-m) steps, and the step is as many times larger: 1000 times at 0.999. "
    "That value belongs to the second beta of Adam.",
    fix="momentum=0.9; a rate 1/(1-m) times smaller where it has to be larger.",
    source="Goodfellow, Bengio & Courville 2016, Deep Learning, 8.3.2",
    bad=SET.format("SGD(model.parameters(), lr=0.1, momentum=0.999)"),
    good=SET.format("SGD(model.parameters(), lr=0.01, momentum=0.99)"),
)
def momentum_near_one(evidence: Evidence) -> Iterator[Found]:
    """SGD's and RMSprop's momentum, or the first beta of Adam, from 0.995 on."""
    for group in groups(evidence):
        betas = group.get("betas")
        momentum = group.get("momentum", betas[0] if isinstance(betas, (tuple, list)) and betas else 0)
        undamped = not group.get("dampening") and not isinstance(betas, (tuple, list))
        if isinstance(momentum, (int, float)) and momentum >= HEAVY:
            name = "momentum" if "momentum" in group else "the first beta"
            spans = 1 / max(1 - momentum, 1e-6)
            yield Found(
                f"{name} is {momentum:g}: gradients of {spans:.0f} steps are "
                + (f"added up, and steps are {spans:.0f} times lr" if undamped else "averaged"),
                fix="momentum=0.9" if "momentum" in group else "betas=(0.9, 0.999)",
            )
            return
