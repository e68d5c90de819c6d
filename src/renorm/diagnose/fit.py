"""How outputs fit targets: counts for a classifier, moments for a regression; on the device, nothing is fetched."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from renorm.diagnose.history import Counts, Fit

__all__ = ["Comparison", "compared", "fetched"]

MAX_CLASSES = 1000
MAX_CELLS = 2**22  # of the tables that are counted
MOMENTS = 5
Comparison = tuple[Literal["counts", "either"], Tensor]


@torch.no_grad()
def compared(outputs: Tensor, targets: Tensor) -> Comparison | None:
    """Counts, of labels, predictions and both; or moments; as `fetched` takes them, None of anything else.

    Classes: outputs (N, K, ...) and targets (N, ...) of integers, negative or too large ones left out; or one output
    and targets of 0 and 1. Moments: floats of the same shape.
    """
    outputs, targets = outputs.detach(), targets.detach().to(outputs.device)
    if not outputs.is_floating_point() or outputs.numel() == 0:
        return None
    whole = not targets.is_floating_point() and not targets.is_complex()
    if whole and targets.dim() == 1 and outputs.dim() == 2 and outputs.shape[1] > 1 and len(outputs) == len(targets):
        return _counts(outputs, targets)
    if whole and outputs.dim() > 2 and targets.shape == (outputs.shape[0], *outputs.shape[2:]):
        return _counts(outputs.movedim(1, -1).flatten(0, -2), targets.flatten())
    if whole and outputs.dim() > 2 and targets.shape == outputs.shape[:-1]:  # (N, L, K), as of language models
        return _counts(outputs.flatten(0, -2), targets.flatten())
    if outputs.numel() != targets.numel() or outputs.squeeze().shape != targets.squeeze().shape:
        return None
    y, t = outputs.flatten(), targets.flatten()
    one = y.numel() == len(outputs)
    if whole:
        return ("counts", _binary(y, t)) if one else None
    # Whether the targets are labels is known only when they are fetched, which is done once for everything.
    labels = _wide(((t == 0) | (t == 1)).all().reshape(1))
    counts = _binary(y, t) if one else labels.new_zeros(0)
    return "either", torch.cat([labels, counts, _moments(_wide(y), _wide(t))])


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.device.type == "mps" else x.double()


def _binary(y: Tensor, t: Tensor) -> Tensor:
    # Of logits or probabilities: those are never negative and never above 1.
    positive = y > torch.where((y < 0).any() | (y > 1).any(), 0.0, 0.5)
    return _table(y[:, None], torch.stack([~positive, positive], 1), t)


def _counts(rows: Tensor, labels: Tensor) -> Comparison | None:
    if rows.shape[1] > MAX_CLASSES:
        return None
    step = max(1, rows.numel() // MAX_CELLS)
    rows, every = rows[::step], torch.arange(rows.shape[1], device=rows.device)
    return "counts", _table(rows, rows.argmax(1)[:, None] == every, labels[::step])


def _table(rows: Tensor, is_predicted: Tensor, labels: Tensor) -> Tensor:
    """How often a class is the label, is predicted, both; and how much the outputs vary over samples."""
    is_label = labels[:, None] == torch.arange(is_predicted.shape[1], device=labels.device)
    is_predicted = is_predicted & is_label.any(1, keepdim=True)  # labels outside the classes are no labels
    spread = rows.float().std(0, correction=0).mean() / rows.float().abs().mean().clamp(min=1e-30)
    counts = torch.cat([is_label.sum(0), is_predicted.sum(0), (is_label & is_predicted).sum(0)])
    return torch.cat([_wide(counts), _wide(spread.reshape(1))])


def _moments(y: Tensor, t: Tensor) -> Tensor:
    var_y, mean_y = torch.var_mean(y, correction=0)
    var_t, mean_t = torch.var_mean(t, correction=0)
    covariance = ((y - mean_y) * (t - mean_t)).mean()
    return torch.stack([(y - t).square().mean(), var_t, var_y, mean_y - mean_t, covariance])


def fetched(kind: str, values: list[float], step: int, validation: bool) -> Counts | Fit | None:
    """What was computed, as the rules look at it."""
    if kind == "either":
        labels, *values = values
        kind, values = ("counts", values[:-MOMENTS]) if labels else ("fit", values[-MOMENTS:])
    if kind == "counts":
        k = len(values) // 3
        if not k:  # several labels at once
            return None
        labelled, predicted, both = (tuple(map(int, values[i * k : (i + 1) * k])) for i in range(3))
        return Counts(step, validation, labelled, predicted, both, values[-1])
    error, variance, spread, shift, covariance = values
    scale = math.sqrt(max(variance, 0) * max(spread, 0))
    return Fit(step, validation, error, variance, spread, shift, covariance / scale if scale > 0 else math.nan)
