"""Dropout kept on at inference: a prediction with an interval."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from renorm.errors import StudyError

__all__ = ["MCDropout", "mc_dropout"]

_LEVEL = 0.95  # share of the samples in the interval
# torch's blocks that in evaluation mode compute all by themselves, and leave their dropout layers out
_BLOCKS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


@dataclass(frozen=True)
class MCDropout:
    """What a model says with dropout on, over several runs."""

    mean: Tensor  # over the runs, of the output's shape
    low: Tensor  # the 2.5% quantile over the runs
    high: Tensor  # the 97.5% quantile
    samples: Tensor = field(repr=False)  # (samples, *output's shape)


def mc_dropout(model: nn.Module, x: Tensor, samples: int = 30) -> MCDropout:
    r"""Run `model` on `x` several times with dropout on and everything else in evaluation mode: mean and interval.

    $$\bar y = \frac1T \sum_{t=1}^T f_{m_t}(x), \qquad m_t \text{ a dropout mask of its own}$$
    The interval has 95% of the runs: its ends are their quantiles, linear between two runs. It shows how unsure the
    model is of its function, and not the noise of the data; with few samples it is too narrow (of 30 the ends are
    near the extremes). In float16 and bfloat16 mean and quantiles are float32.

    Dropout is kept on in torch's dropout layers and in layers that have a `dropout` share of their own (attention, an
    LSTM of several layers: torch's drops between them only); norms use their running statistics, and modes are put
    back. Random numbers are torch's global ones.

    Args:
        model: gives a tensor for `x`, floating: logits, probabilities, numbers.
        x: its input.
        samples: how many runs, T.

    Raises:
        StudyError: the model has no such layer (dropout as a function in a module of your own is not seen), or
            `samples` is below 2, or the output is no floating tensor.

    Source: Y. Gal, Z. Ghahramani: Dropout as a Bayesian approximation, 2016 (arXiv:1506.02142).

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.5), nn.Linear(64, 1))
    >>> result = mc_dropout(model, torch.ones(2, 3))
    >>> result.mean.shape, bool((result.low < result.mean).all())
    (torch.Size([2, 1]), True)
    """
    if samples < 2:
        raise StudyError(f"an interval needs at least 2 samples; got {samples}: write for example 30")
    with torch.no_grad(), _dropping(model):
        runs = [model(x) for _ in range(samples)]
    if not isinstance(runs[0], Tensor):
        raise StudyError(
            f"the model must give a tensor; got {type(runs[0]).__name__}: wrap it in one that picks it out"
        )
    if not runs[0].is_floating_point():
        raise StudyError(
            f"the mean is of logits, probabilities or numbers; got {runs[0].dtype}: write a model that gives what goes "
            "into argmax"
        )
    drawn = torch.stack(runs)
    drawn = drawn if drawn.dtype == torch.float64 else drawn.float()
    # not torch.quantile, which refuses more than 2^24 entries
    ordered = drawn.sort(0).values
    return MCDropout(drawn.mean(0), _quantile(ordered, (1 - _LEVEL) / 2), _quantile(ordered, (1 + _LEVEL) / 2), drawn)


def _quantile(ordered: Tensor, share: float) -> Tensor:
    place = share * (len(ordered) - 1)
    below = int(place)
    return torch.lerp(ordered[below], ordered[min(below + 1, len(ordered) - 1)], place - below)


@contextmanager
def _dropping(model: nn.Module) -> Iterator[None]:
    """Everything in evaluation mode but dropout; the modes are put back."""
    modes = {module: module.training for module in model.modules()}
    drops = [module for module in modes if _drops(module)]
    if not drops:
        raise StudyError(
            "the model has no dropout to keep on: no dropout layer or LSTM or attention with a share above 0; write "
            "torch.nn.Dropout(p) as a layer where you call F.dropout"
        )
    try:
        model.eval()
        for module in (*drops, *(module for module in modes if isinstance(module, _BLOCKS))):
            module.training = True  # its own mode only: the parts of a block may be norms
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _drops(module: nn.Module) -> bool:
    if getattr(module, "num_layers", 2) == 1:  # a recurrent net, which drops between layers only
        return False
    share = module.p if isinstance(module, _DropoutNd) else getattr(module, "dropout", 0)
    return isinstance(share, (int, float)) and share > 0
