"""Rules of `watch` about the loop: calls that are missing or in the wrong order, schedules, how validation is done."""

from __future__ import annotations

import math
from collections.abc import Iterator

from renorm.diagnose.catalogue import Found, rule
from renorm.diagnose.history import History, Sample
from renorm.diagnose.rules.curves import evaluated, mean
from renorm.diagnose.rules.steps import training
from renorm.diagnose.rules.words import listed

GONE = 1e-7  # of the largest learning rate; a cosine is above that but for the last 0.02% of its steps


@rule(
    "W23",
    "steps-without-gradients",
    "error",
    when="watch",
    title="The optimizer steps, and there are no gradients; or it never steps",
    why="Nothing is learnt, and nothing raises.",
    fix="optimizer.zero_grad(); loss.backward(); optimizer.step()  # in this order, in each step",
    source="what the optimizer finds when it steps",
    bad=training(update="optimizer.zero_grad(); optimizer.step()"),
    good=training(),
)
def steps_without_gradients(history: History) -> Iterator[Found]:
    """In 3 samples each gradient is None or zero and no weight changes; or 50 losses were told, and no step made."""
    untaken = history.events.get("unmoved")
    if untaken is not None:
        yield Found(
            f"{untaken} losses, and not one step of {type(history.optimizer).__name__}: no weight has changed",
            fix="optimizer.step()  # behind loss.backward()",
        )
        return
    samples = history.recent(3)
    if len(samples) < 3 or not all(map(idle, samples)):
        return
    if not any(p.requires_grad for group in history.optimizer.param_groups for p in group["params"]):
        return
    none = not any(sample.gradients for sample in samples)
    yield Found(
        f"the gradients of all {len(samples[-1].weights)} parameters are {'None' if none else '0'} when "
        f"{type(history.optimizer).__name__} steps"
        + (": no loss.backward(), or zero_grad() behind it, or a loss that does not reach them" if none else ""),
    )


def idle(sample: Sample) -> bool:
    """Whether a step had parameters and no gradient."""
    still = not any(sample.gradients.values()) and not any(sample.updates.values())
    return bool(sample.weights) and still and not sample.skipped


@rule(
    "W24",
    "learning-rate-is-gone",
    "warning",
    when="watch",
    title="The learning rate has fallen to nothing, and training goes on",
    why="Steps no longer change anything. A schedule that counts epochs is stepped with every batch, or is shorter "
    "than the training.",
    fix="scheduler.step() once an epoch for a schedule in epochs; for one in steps, the number of all steps.",
    source="the rates of the groups; the limit is ours, below the end of OneCycleLR and of cosine schedules",
    bad=training(steps=150, update="optimizer.step(); optimizer.param_groups[0]['lr'] *= 0.7"),
    good=training(steps=150, update="optimizer.step(); optimizer.param_groups[0]['lr'] *= 0.98"),
)
def learning_rate_is_gone(history: History) -> Iterator[Found]:
    """In the last two samples, below a ten millionth of what it was in every group."""
    rates = [(sample.step, max(sample.rates.values())) for sample in history.samples if sample.rates]
    if len(rates) < 3:
        return
    most = max(rate for _, rate in rates)
    if most > 0 and all(rate <= GONE * most for _, rate in rates[-2:]) and rates[-1][1] <= rates[0][1]:
        since = next(step for step, rate in rates if rate == most)
        yield Found(
            f"the learning rate is {rates[-1][1]:.2g} in step {rates[-1][0]}, and was {most:.2g} in step {since}"
        )


PLAYERS = """
x = torch.randn(256, 8)
maker, judge = nn.Linear(4, 8), nn.Linear(8, 1)
optimizers = torch.optim.Adam(judge.parameters(), 1e-3), torch.optim.Adam({}.parameters(), 1e-3)
with rn.watch({{"maker": maker, "judge": judge}}, optimizers, on_error="silent") as w:
    for step in range(60):
        real, made = judge(x[torch.randint(256, (32,))]), judge(maker(torch.randn(32, 4)).detach())
        loss = F.softplus(-real).mean() + F.softplus(made).mean()
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()
        w.step(loss)
        loss = F.softplus(-judge(maker(torch.randn(32, 4)))).mean()
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()
        w.step(loss)
report = w.report
"""


@rule(
    "W25",
    "model-without-optimizer",
    "error",
    when="watch",
    title="A model gets gradients, and none of the optimizers has its parameters",
    why="It stays as it was at the start, while the other one learns to beat it.",
    fix="One optimizer for each model: torch.optim.Adam(generator.parameters()), "
    "torch.optim.Adam(critic.parameters()).",
    source="torch.optim.Optimizer holds references to the tensors it was given",
    bad=PLAYERS.format("judge"),
    good=PLAYERS.format("maker"),
)
def model_without_optimizer(history: History) -> Iterator[Found]:
    """Of several models, one whose parameters with gradients are in no group; a warning under a single optimizer."""
    if history.optimizer is not history.optimizers[0] or len(history.samples) < 3:
        return
    alone = len(history.optimizers) == 1
    if alone and len(history.samples[-1].modes) < 2:  # parts of one model are trained by choice
        return
    held = {p for optimizer in history.optimizers for group in optimizer.param_groups for p in group["params"]}
    for label, model in history.model.named_children():
        own = list(model.parameters())
        if own and all(p.requires_grad and p.grad is not None and p not in held for p in own):
            yield Found(
                f"all {len(own)} parameters of {label} have gradients and are in no optimizer that is watched",
                module=label,
                severity="warning" if alone else None,
            )


NORMED = "model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))"


@rule(
    "W26",
    "validation-in-training-mode",
    "warning",
    when="watch",
    title="Validation runs in training mode",
    why="Batch norms normalize by the validation batch, and their running statistics take it in; dropout drops. The "
    "number is not that of the model that will be used, and the validation data are not unseen.",
    fix="model.eval() before validation, model.train() behind it.",
    source="the counters of the batch norms: they count batches in training mode only",
    bad=evaluated(model=NORMED).replace("model.eval()", "model.train()"),
    good=evaluated(model=NORMED),
)
def validation_in_training_mode(history: History) -> Iterator[Found]:
    """At two validations running a batch norm has counted more batches than there were since the sample before."""
    extra = [more for more in history.events.get("counted", ())[-2:] if more >= 1]
    if len(extra) == 2:
        yield Found(
            f"batch norms took in {extra[-1]:.0f} batches in training mode between the last step and validate()"
        )


@rule(
    "W27",
    "validation-is-unlike-training",
    "warning",
    when="watch",
    title="The validation loss is far above that of knowing nothing, from the first one on",
    why="A model that learns by heart is good on new data first, and gets worse. One that is bad from the start sees "
    "other data than in training: not normalized, another order of channels or classes, another loss.",
    fix="One function that prepares both; compare mean and standard deviation of a batch of each.",
    source="how losses go apart in overfitting; the factors are ours: calibrated on the clean programs of "
    "tests/diagnose",
    bad=evaluated(validate="F.cross_entropy(model(60 * x[1000:] + 90), y[1000:])"),
    good=evaluated(),
)
def validation_is_unlike_training(history: History) -> Iterator[Found]:
    """Each of three and more is above 3 times training, and 1.5 times the loss at the start, which has fallen."""
    found = history.validations
    if len(found) < 3 or not all(math.isfinite(one.loss) and one.training > 0 for one in found):
        return
    start = mean(history.start)
    if all(one.loss > max(3 * one.training, 1.5 * start) for one in found) and found[-1].training < 0.9 * start:
        losses = listed([f"{one.loss:.3g}" for one in found])
        yield Found(f"validation losses are {losses}; training went from {start:.3g} to {found[-1].training:.3g}")
