"""Small models that differ in nothing but their norm: at one seed, all other initial weights are the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from renorm.choices.blocks import (
    KERNEL,
    BasicBlock,
    Behind,
    CausalBlock,
    ChannelsFirst,
    Embedding,
    EncoderBlock,
    GlobalMean,
    LastStep,
    Recurrent,
    TokenMean,
    Tokens,
)
from renorm.choices.registry import look_up
from renorm.errors import StudyError
from renorm.norms import named

__all__ = ["NAMES", "build", "forecaster"]

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_MAX_POOL = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
_KINDS = {1: "vectors", 2: "sequences (channels, length)", 3: "images (channels, height, width)"}


def build(
    name: str,
    input_shape: Sequence[int],
    num_outputs: int,
    *,
    norm: str,
    activation: str = "relu",
    dropout: float = 0.0,
) -> nn.Module:
    """A built-in model for samples of `input_shape`, with `num_outputs` raw outputs (no softmax).

    | name | input | layers |
    |---|---|---|
    | mlp | any shape, flattened | 3 x (linear to 128, norm, activation), linear |
    | cnn | (C, L) to (C, D, H, W) | 3 x (conv to 32, 64, 128, norm, activation), global mean, linear |
    | resnet | (C, H, W) | stem, 3 stages of 2 basic blocks with 32, 64, 128 channels, global mean, linear |
    | lstm | (F,), (C, L), (C, H, W) | 2 x (LSTM of 64, norm), last step, linear to 64, activation, linear |
    | tcn | (F,), (C, L), (C, H, W) | residual blocks of 2 causal convs of 64, dilated 1, 2, 4, ..., last step, linear |
    | transformer | (F,), (C, L), (C, H, W) | 2 pre-norm encoder blocks of width 64, 4 heads, mean, linear |

    The steps of an LSTM and a TCN (S. Bai et al. 2018, arXiv:1803.01271) and the tokens of a transformer are the
    features of a vector, the steps of a sequence or the rows of an image. A TCN has as many blocks as its last step
    needs to see the first. Dropout stands behind every hidden activation, or behind the norm of an LSTM; the
    transformer has it where torch's encoder layer does.
    Linear and convolution layers keep their bias whatever follows, so that every norm starts from the same
    weights. The random numbers are torch's global ones: seed them before.

    Args:
        name: one of :data:`NAMES`.
        input_shape: the shape of one sample, without the batch axis.
        num_outputs: how many numbers the model gives for a sample: the classes, or 1 for a regression.
        norm: a norm as :func:`renorm.norms.named.parse` reads it: "batch", "group(32)", "none", ...
        activation: one of :data:`renorm.choices.activations.ACTIVATIONS`.
        dropout: the share of entries that are set to 0 in training, below 1.

    Raises:
        StudyError: no model or activation is called that, the model cannot take `input_shape`, `num_outputs` is below
            1, or `dropout` is not in [0, 1).
        UnknownNormError: no norm is called that.

    >>> import torch
    >>> model = build("mlp", (1, 8, 8), 10, norm="batch")
    >>> model(torch.zeros(4, 1, 8, 8)).shape
    torch.Size([4, 10])
    """
    if num_outputs < 1:
        raise StudyError(f"a model gives one number or more; got num_outputs={num_outputs!r}: write 1 for a regression")
    body = _body(name, input_shape, norm, activation, dropout)
    return nn.Sequential(*body.layers, *body.pool, nn.Linear(body.width, num_outputs))


def forecaster(
    name: str,
    input_shape: Sequence[int],
    horizon: int,
    *,
    num_targets: int = 1,
    norm: str,
    activation: str = "relu",
    dropout: float = 0.0,
) -> nn.Module:
    """A built-in model with a head for forecasts: (N, C, L), the past, to (N, num_targets, horizon), the next steps.

    All steps of the horizon come at once, from one linear layer on the last step of an "lstm" and a "tcn", on all
    steps of a "cnn" and a "transformer" (their mean, which :func:`build` takes, forgets when something was), and on
    the hidden layer of an "mlp". A column that does not change in time, such as a static feature, is a channel that
    repeats it.

    Args:
        name: one of :data:`NAMES` that takes sequences.
        input_shape: (C, L): the channels, and the steps that the model sees.
        horizon: how many steps it forecasts.
        num_targets: how many series it forecasts.
        norm: as :func:`build` has it.
        activation: likewise.
        dropout: likewise.

    Raises:
        StudyError: as :func:`build` does, or `input_shape` is not (C, L), or `horizon` or `num_targets` is below 1.

    >>> import torch
    >>> model = forecaster("tcn", (4, 24), horizon=6, norm="layer")
    >>> model(torch.zeros(2, 4, 24)).shape
    torch.Size([2, 1, 6])
    """
    if len(input_shape) != 2:
        raise StudyError(f"a forecast is made from samples of the shape (channels, steps); got {tuple(input_shape)}")
    if horizon < 1 or num_targets < 1:
        raise StudyError(f"horizon and num_targets must be at least 1; got {horizon!r} and {num_targets!r}")
    body = _body(name, input_shape, norm, activation, dropout)
    return nn.Sequential(
        *body.layers,
        *body.read,
        nn.Linear(body.read_width, num_targets * horizon),
        nn.Unflatten(1, (num_targets, horizon)),
    )


@dataclass(frozen=True)
class _Body:
    """A model without its last layer."""

    layers: list[nn.Module]  # from samples to features
    width: int  # how many features, for each place where there are places
    pool: list[nn.Module]  # makes one vector of `width` of the places
    read: list[nn.Module]  # the same for a forecast, to which it matters where a feature is
    read_width: int  # of that vector


def _body(name: str, input_shape: Sequence[int], norm: str, activation: str, dropout: float) -> _Body:
    maker, ranks = look_up(_MODELS, name, "model")
    shape = tuple(input_shape)
    if shape and min(shape) < 1:
        raise StudyError(f"a sample must have one entry or more; got samples of the shape {shape}")
    if len(shape) not in ranks:
        raise StudyError(
            f"model {name!r} takes {_describe(ranks)}; this data's samples have the shape {shape}; "
            f"choose one of {', '.join(_fitting(len(shape))) or 'your own models'}"
        )
    if not 0 <= dropout < 1:
        raise StudyError(f"dropout must be a share from 0 on and below 1; got {dropout!r}")
    return maker(shape, norm, Behind(activation, dropout))


def _describe(ranks: range) -> str:
    kinds = [_KINDS[rank] for rank in ranks if rank in _KINDS]
    more = [f"samples of up to {ranks[-1]} axes"] if ranks[-1] not in _KINDS else []
    return " or ".join([*kinds, *more])


def _fitting(rank: int) -> list[str]:
    return [name for name, (_, ranks) in _MODELS.items() if rank in ranks]


def _mlp(shape: tuple[int, ...], norm: str, behind: Behind) -> _Body:
    layers: list[nn.Module] = [nn.Flatten()]
    width = math.prod(shape)
    for _ in range(3):
        layers += [nn.Linear(width, 128), named.build(norm, 128, positions=False), behind.layer(), *behind.dropout()]
        width = 128
    return _Body(layers, width, [], [], width)


def _cnn(shape: tuple[int, ...], norm: str, behind: Behind) -> _Body:
    conv, pool = _CONV[len(shape) - 1], _MAX_POOL[len(shape) - 1]
    layers: list[nn.Module] = []
    width, places = shape[0], list(shape[1:])
    for index, channels in enumerate((32, 64, 128)):
        layers += [conv(width, channels, 3, padding=1), named.build(norm, channels), behind.layer(), *behind.dropout()]
        if index < 2:
            # ceil_mode: an axis of one entry stays, so that any image size is taken
            layers.append(pool(2, ceil_mode=True))
            places = [-(-size // 2) for size in places]
        width = channels
    return _Body(layers, width, [GlobalMean()], [nn.Flatten()], width * math.prod(places))


def _resnet(shape: tuple[int, ...], norm: str, behind: Behind) -> _Body:
    width = 32
    layers: list[nn.Module] = [
        nn.Conv2d(shape[0], width, 3, padding=1),
        named.build(norm, width),
        behind.layer(),
        *behind.dropout(),
    ]
    for channels in (32, 64, 128):
        layers += [BasicBlock(width, channels, norm, behind), BasicBlock(channels, channels, norm, behind)]
        width = channels
    return _Body(layers, width, [GlobalMean()], [GlobalMean()], width)


def _lstm(shape: tuple[int, ...], norm: str, behind: Behind) -> _Body:
    tokens = Tokens(shape)
    layers: list[nn.Module] = [tokens]
    width = tokens.width
    for _ in range(2):
        layers += [Recurrent(width, 64), named.build(norm, 64, axis=-1), *behind.dropout()]
        width = 64
    # An LSTM has gates for activations; the one that is asked for stands behind the last step.
    last = [LastStep(1), nn.Linear(64, 64), behind.layer(), *behind.dropout()]
    return _Body([*layers, *last], 64, [], [], 64)


def _tcn(shape: tuple[int, ...], norm: str, behind: Behind) -> _Body:
    tokens = Tokens(shape)
    layers: list[nn.Module] = [tokens, ChannelsFirst()]
    width, dilation, seen = tokens.width, 1, 1
    while seen < tokens.count or dilation == 1:
        layers.append(CausalBlock(width, 64, dilation, norm, behind))
        seen += 2 * (KERNEL - 1) * dilation
        width, dilation = 64, 2 * dilation
    return _Body([*layers, LastStep(2)], 64, [], [], 64)


def _transformer(shape: tuple[int, ...], norm: str, behind: Behind) -> _Body:
    tokens = Tokens(shape)
    blocks = [EncoderBlock(64, 4, norm, behind) for _ in range(2)]
    embedding = Embedding(tokens.count, tokens.width, 64)
    layers = [tokens, embedding, *behind.dropout(), *blocks, named.build(norm, 64, axis=-1)]
    return _Body(layers, 64, [TokenMean()], [nn.Flatten()], 64 * tokens.count)


_Maker = Callable[[tuple[int, ...], str, Behind], _Body]
_MODELS: dict[str, tuple[_Maker, range]] = {
    "mlp": (_mlp, range(1, 9)),
    "cnn": (_cnn, range(2, 5)),
    "resnet": (_resnet, range(3, 4)),
    "lstm": (_lstm, range(1, 4)),
    "tcn": (_tcn, range(1, 4)),
    "transformer": (_transformer, range(1, 4)),
}

NAMES: tuple[str, ...] = tuple(_MODELS)
