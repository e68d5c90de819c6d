"""Layer norm in a recurrent network: is it faster, and is it still with a tuned learning rate."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from renorm.norms.recurrent import LayerNormLSTM
from renorm.studies.corpus import corpus, fingerprint, identified, windows
from renorm.studies.picture import Plot, draw, points
from renorm.studies.replication import Claim, Plan, Published, Replication, Table
from renorm.studies.rows import Condition, Rows, Value
from renorm.studies.training import mean_loss

_CELLS = {"plain": "LSTM", "layer": "layer-norm LSTM"}
_RATES = (2e-3, 5e-3, 1e-2, 2e-2, 4e-2)
_UNTUNED = _RATES[0]
_GOAL = 2.1  # nats a character
_OVER = 10  # steps whose mean loss is compared with the goal
_HIDDEN, _LENGTH, _BATCH, _CHARACTERS = 128, 32, 32, 100


class _Model(nn.Module):
    """Which character is next: logits of (N, vocabulary, steps) for characters (N, steps)."""

    def __init__(self, cell: str, num_tokens: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_tokens, 32)
        # Made of the same random numbers: layer norm's weights are 1 and 0.
        self.lstm = (LayerNormLSTM if cell == "layer" else nn.LSTM)(32, _HIDDEN, batch_first=True)
        self.head = nn.Linear(_HIDDEN, num_tokens)

    def forward(self, x: Tensor) -> Tensor:
        """(N, steps) -> (N, vocabulary, steps)."""
        return self.head(self.lstm(self.embedding(x))[0]).transpose(1, 2)  # type: ignore[no-any-return]


def measure(condition: Condition, seed: int) -> Mapping[str, Value]:
    """Steps to the goal, the held-out loss at the end, and the losses on the way."""
    text = corpus("character", _CHARACTERS)
    model = _Model(str(condition["cell"]), text.num_tokens)
    training, random = torch.cat(text.training), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=float(condition["lr"]))
    losses: list[float] = []
    for _ in range(int(condition["steps"])):
        starts = torch.randint(len(training) - _LENGTH, (_BATCH, 1), generator=random)
        window = training[starts + torch.arange(_LENGTH + 1)]
        loss = F.cross_entropy(model(window[:, :-1]), window[:, 1:])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    held_out = windows(text.held_out, _LENGTH + 1)
    reached = steps_to(losses, _GOAL)
    means = [sum(losses[i : i + _OVER]) / _OVER for i in range(0, len(losses) - _OVER + 1, _OVER)]
    return {
        "steps": float(reached or len(losses)),
        "reached": float(reached is not None),
        "held_out": mean_loss(model, held_out[:, :-1], held_out[:, 1:]),
        "curve": means,
        "text": fingerprint(),
    }


def steps_to(losses: list[float], goal: float) -> int | None:
    """After how many steps the mean of the last ten losses is at most the goal; None where it never is.

    >>> steps_to([3.0] * 10 + [1.0] * 10, 2.0), steps_to([3.0] * 20, 2.0)
    (15, None)
    """
    for end in range(_OVER, len(losses) + 1):
        if sum(losses[end - _OVER : end]) <= goal * _OVER:
            return end
    return None


def judge(rows: Rows) -> tuple[Claim, ...]:
    """What must hold at the untuned and at the best learning rates."""
    untuned = rows.ratio("steps", *({"cell": cell, "lr": _UNTUNED} for cell in _CELLS))
    tuned = rows.ratio("steps", *(rows.best("steps", cell=cell) for cell in _CELLS))
    return (
        Claim(
            f"At the untuned learning rate, {_UNTUNED:g}, the plain LSTM needs at least 1.5 times as many steps to a "
            f"loss of {_GOAL}",
            untuned.text(2, unit=" times"),
            untuned.mean >= 1.5 and untuned.low > 1,
        ),
        Claim(
            "Each at its own best learning rate, it still needs more steps",
            tuned.text(2, unit=" times"),
            tuned.low > 1,
        ),
    )


def tables(rows: Rows) -> tuple[Table, ...]:
    """Steps to the goal, and held-out losses."""
    steps = tuple((f"{lr:g}", *(_steps(rows, cell=cell, lr=lr) for cell in _CELLS)) for lr in _RATES)
    losses = tuple((f"{lr:g}", *(rows.mean("held_out", cell=cell, lr=lr).text(3) for cell in _CELLS)) for lr in _RATES)
    head = ("learning rate", *_CELLS.values())
    return (
        Table(f"Steps until the mean of {_OVER} training losses is at most {_GOAL} nats a character", head, steps),
        Table("Held-out loss after the last step, nats a character", head, losses),
    )


def _steps(rows: Rows, **condition: object) -> str:
    found, reached = rows.mean("steps", **condition), rows.values("reached", **condition)
    text = found.text(0)
    return text if reached.all() else f"{text}, not reached by {int((1 - reached).sum())} of {len(reached)}"


def draw_rows(rows: Rows) -> str:
    """Steps against the learning rate, and the losses of the untuned and of the best rates."""
    steps = {
        title: points(_RATES, [rows.mean("steps", cell=cell, lr=lr) for lr in _RATES]) for cell, title in _CELLS.items()
    }
    untuned = {title: _curve(rows, {"cell": cell, "lr": _UNTUNED}) for cell, title in _CELLS.items()}
    tuned = {title: _curve(rows, rows.best("steps", cell=cell)) for cell, title in _CELLS.items()}
    plots = [
        Plot(f"steps to a loss of {_GOAL} against log10 rate", steps, log_x=True),
        Plot(f"training loss by step, rate {_UNTUNED:g}", untuned),
        Plot("training loss by step, each at its best rate", tuned),
    ]
    return draw(
        plots, "Steps to the loss by learning rate, and the training losses at the low rate and at the best ones"
    )


def _curve(rows: Rows, condition: Mapping[str, object]) -> list[tuple[float, float]]:
    means = rows.curve("curve", **condition)
    return points([_OVER * (i + 0.5) for i in range(len(means))], means)


def reading(rows: Rows) -> str:
    """What follows."""
    best = [rows.best("steps", cell=cell) for cell in _CELLS]
    tuned = rows.ratio("steps", *best)
    losses = rows.difference("held_out", *(rows.best("held_out", cell=cell) for cell in _CELLS))
    return (
        "Layer norm keeps the sizes of the gates' inputs, so that a learning rate which is too low for the plain LSTM "
        f"does for it. With the rate tuned for each ({best[0]['lr']:g} and {best[1]['lr']:g}) the plain LSTM needs "
        f"{tuned.text(2)} times as many steps: compare norms at their own best rates. In the held-out loss after the "
        f"last step, each at its best rate for that, the plain LSTM is above by {losses.text(3)} nats. Steps are "
        "counted, time is not: a step of the two does not take equally long. The best rate was chosen on what is "
        f"reported, for both alike. {identified(rows.values('text')[0])}"
    )


def _plan(steps: int, seeds: int) -> Plan:
    conditions: list[Condition] = [{"cell": cell, "lr": lr, "steps": steps} for cell in _CELLS for lr in _RATES]
    return Plan(tuple(conditions), seeds, f"{steps} steps for each training, {seeds} seeds")


REPLICATION = Replication(
    name="lstm-layer-norm",
    title="Layer norm in a recurrent network",
    question="Is layer norm the norm for recurrent networks, and what does it bring?",
    published=(
        Published(
            "Layer norm stabilizes the hidden state of recurrent networks and can shorten their training a lot",
            "Ba, Kiros & Hinton 2016, arXiv:1607.06450, abstract",
        ),
    ),
    protocol=(
        "The language reference of Python's `pydoc_data.topics`, character by character; every fifth document is held "
        f"out. An embedding of 32, one LSTM of {_HIDDEN} (`torch.nn.LSTM` or `rn.LayerNormLSTM`, from the same initial "
        f"weights) and a linear layer predict the next character; Adam, batches of {_BATCH} windows of {_LENGTH} "
        f"characters from anywhere, no clipping. Both run at the learning rates {', '.join(f'{r:g}' for r in _RATES)}, "
        "of which the lowest stands for an untuned one."
    ),
    quick=_plan(400, 3),
    minutes=2,
    full=_plan(800, 5),
    measure=measure,
    judge=judge,
    tables=tables,
    draw=draw_rows,
    reading=reading,
)
