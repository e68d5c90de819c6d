"""Small models that differ in nothing but their norm: at one seed, all other initial weights are the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from renorm.choices import activations
from renorm.choices.registry import look_up
from renorm.errors import StudyError
from renorm.norms import named

__all__ = ["NAMES", "build", "forecaster"]

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_MAX_POOL = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
_KERNEL = 3  # steps that a causal convolution sees
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
        StudyError: no model or activation is called that, the model cannot take `input_shape`, or `dropout` is not in
            [0, 1).
        UnknownNormError: no norm is called that.

    >>> model = build("mlp", (1, 8, 8), 10, norm="batch")
    >>> model(torch.zeros(4, 1, 8, 8)).shape
    torch.Size([4, 10])
    """
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
        norm, activation, dropout: as :func:`build` has them.

    Raises:
        StudyError: as :func:`build` does, or `input_shape` is not (C, L), or `horizon` or `num_targets` is below 1.

    >>> model = forecaster("tcn", (4, 24), horizon=6, norm="layer")
    >>> model(torch.zeros(2, 4, 24)).shape
    torch.Size([2, 1, 6])
    """
    if len(input_shape) != 2:
        raise StudyError(f"a forecast is made from samples of the shape (channels, steps); got {tuple(input_shape)}")
    if horizon < 1 or num_targets < 1:
        raise StudyError(f"horizon and num_targets must be at least 1; got {horizon} and {num_targets}")
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
    if len(shape) not in ranks or min(shape) < 1:
        raise StudyError(
            f"model {name!r} takes {_describe(ranks)}; this data's samples have the shape {shape}; "
            f"choose one of {', '.join(_fitting(len(shape))) or 'your own models'}"
        )
    if not 0 <= dropout < 1:
        raise StudyError(f"dropout must be a share from 0 on and below 1; got {dropout!r}")
    return maker(shape, norm, _Behind(activation, dropout))


def _describe(ranks: range) -> str:
    return " or ".join(_KINDS.get(rank, f"{rank} axes") for rank in ranks)


def _fitting(rank: int) -> list[str]:
    return [name for name, (_, ranks) in _MODELS.items() if rank in ranks]


@dataclass(frozen=True)
class _Behind:
    """What stands behind a norm: the activation, and dropout where there is any."""

    activation: str
    p: float  # of dropout

    def layer(self) -> nn.Module:
        """The activation."""
        return activations.build(self.activation)

    def dropout(self) -> list[nn.Module]:
        """A layer, or none."""
        return [nn.Dropout(self.p)] if self.p else []


def _mlp(shape: tuple[int, ...], norm: str, behind: _Behind) -> _Body:
    layers: list[nn.Module] = [nn.Flatten()]
    width = math.prod(shape)
    for _ in range(3):
        layers += [nn.Linear(width, 128), named.build(norm, 128, positions=False), behind.layer(), *behind.dropout()]
        width = 128
    return _Body(layers, width, [], [], width)


def _cnn(shape: tuple[int, ...], norm: str, behind: _Behind) -> _Body:
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
    return _Body(layers, width, [_GlobalMean()], [nn.Flatten()], width * math.prod(places))


def _resnet(shape: tuple[int, ...], norm: str, behind: _Behind) -> _Body:
    width = 32
    layers: list[nn.Module] = [
        nn.Conv2d(shape[0], width, 3, padding=1),
        named.build(norm, width),
        behind.layer(),
        *behind.dropout(),
    ]
    for channels in (32, 64, 128):
        layers += [_BasicBlock(width, channels, norm, behind), _BasicBlock(channels, channels, norm, behind)]
        width = channels
    return _Body(layers, width, [_GlobalMean()], [_GlobalMean()], width)


def _lstm(shape: tuple[int, ...], norm: str, behind: _Behind) -> _Body:
    tokens = _Tokens(shape)
    layers: list[nn.Module] = [tokens]
    width = tokens.width
    for _ in range(2):
        layers += [_Recurrent(width, 64), named.build(norm, 64, axis=-1), *behind.dropout()]
        width = 64
    # An LSTM has gates for activations; the one that is asked for stands behind the last step.
    last = [_LastStep(1), nn.Linear(64, 64), behind.layer(), *behind.dropout()]
    return _Body([*layers, *last], 64, [], [], 64)


def _tcn(shape: tuple[int, ...], norm: str, behind: _Behind) -> _Body:
    tokens = _Tokens(shape)
    layers: list[nn.Module] = [tokens, _ChannelsFirst()]
    width, dilation, seen = tokens.width, 1, 1
    while seen < tokens.count or dilation == 1:
        layers.append(_CausalBlock(width, 64, dilation, norm, behind))
        seen += 2 * (_KERNEL - 1) * dilation
        width, dilation = 64, 2 * dilation
    return _Body([*layers, _LastStep(2)], 64, [], [], 64)


def _transformer(shape: tuple[int, ...], norm: str, behind: _Behind) -> _Body:
    tokens = _Tokens(shape)
    blocks = [_EncoderBlock(64, 4, norm, behind) for _ in range(2)]
    embedding = _Embedding(tokens.count, tokens.width, 64)
    layers = [tokens, embedding, *behind.dropout(), *blocks, named.build(norm, 64, axis=-1)]
    return _Body(layers, 64, [_TokenMean()], [nn.Flatten()], 64 * tokens.count)


_Maker = Callable[[tuple[int, ...], str, _Behind], _Body]
_MODELS: dict[str, tuple[_Maker, range]] = {
    "mlp": (_mlp, range(1, 9)),
    "cnn": (_cnn, range(2, 5)),
    "resnet": (_resnet, range(3, 4)),
    "lstm": (_lstm, range(1, 4)),
    "tcn": (_tcn, range(1, 4)),
    "transformer": (_transformer, range(1, 4)),
}

NAMES: tuple[str, ...] = tuple(_MODELS)


class _GlobalMean(nn.Module):
    """(N, C, ...) -> (N, C): the mean of each channel."""

    def forward(self, x: Tensor) -> Tensor:
        """The mean over all axes after the second."""
        return x.flatten(2).mean(2)


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, as in a ResNet; it halves the image when it widens."""

    def __init__(self, channels: int, wider: int, norm: str, behind: _Behind) -> None:
        super().__init__()
        stride = 1 if wider == channels else 2
        self.conv1 = nn.Conv2d(channels, wider, 3, stride=stride, padding=1)
        self.norm1 = named.build(norm, wider)
        self.conv2 = nn.Conv2d(wider, wider, 3, padding=1)
        self.norm2 = named.build(norm, wider)
        self.activation = behind.layer()
        self.dropout = nn.Dropout(behind.p)
        self.shortcut: nn.Module = nn.Identity()
        if wider != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, wider, 1, stride=2), named.build(norm, wider))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, wider, H / stride, W / stride)."""
        y = self.dropout(self.activation(self.norm1(self.conv1(x))))
        y = self.norm2(self.conv2(y)) + self.shortcut(x)
        return self.dropout(self.activation(y))  # type: ignore[no-any-return]


class _Tokens(nn.Module):
    """A sample cut into tokens: the features of a vector, the steps of a sequence, the rows of an image."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.count = shape[0] if len(shape) == 1 else shape[1]
        self.width = math.prod(shape) // self.count

    def forward(self, x: Tensor) -> Tensor:
        """(N, F), (N, C, L) or (N, C, H, W) -> (N, tokens, width)."""
        return x.unsqueeze(2) if x.dim() == 2 else x.transpose(1, 2).flatten(2)


class _Embedding(nn.Module):
    """A linear layer on each token, plus a learnt vector for its position."""

    def __init__(self, num_tokens: int, width: int, embedded: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, embedded)
        self.position = nn.Parameter(0.02 * torch.randn(num_tokens, embedded))

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens, width) -> (N, tokens, embedded)."""
        return self.linear(x) + self.position  # type: ignore[no-any-return]


class _EncoderBlock(nn.Module):
    """A pre-norm transformer encoder block around torch's attention.

    It is not nn.TransformerEncoderLayer with other norms put in: in evaluation mode that layer's fast path
    reads the norms' weight, bias and eps and computes a layer norm with them, whatever they are.
    """

    def __init__(self, width: int, num_heads: int, norm: str, behind: _Behind) -> None:
        super().__init__()
        self.norm1 = named.build(norm, width, axis=-1)
        self.attention = nn.MultiheadAttention(width, num_heads, dropout=behind.p, batch_first=True)
        self.norm2 = named.build(norm, width, axis=-1)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 2 * width), behind.layer(), *behind.dropout(), nn.Linear(2 * width, width)
        )
        self.dropout = nn.Dropout(behind.p)

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens, width) -> the same shape."""
        y = self.norm1(x)
        x = x + self.dropout(self.attention(y, y, y, need_weights=False)[0])
        return x + self.dropout(self.feed_forward(self.norm2(x)))  # type: ignore[no-any-return]


class _TokenMean(nn.Module):
    """(N, tokens, width) -> (N, width)."""

    def forward(self, x: Tensor) -> Tensor:
        """The mean over the tokens."""
        return x.mean(1)


class _Recurrent(nn.Module):
    """An LSTM layer without its final states."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, hidden, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, steps, width) -> (N, steps, hidden)."""
        return self.lstm(x)[0]  # type: ignore[no-any-return]


class _LastStep(nn.Module):
    """The newest entry of the dimension `dim`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """(N, steps, C) or (N, C, steps) -> (N, C)."""
        return x.select(self.dim, -1)


class _ChannelsFirst(nn.Module):
    """(N, steps, C) -> (N, C, steps)."""

    def forward(self, x: Tensor) -> Tensor:
        """The transpose."""
        return x.transpose(1, 2)


class _CausalBlock(nn.Module):
    """Two dilated convolutions that see no later step, beside a shortcut (Bai et al. 2018).

    A norm that averages over steps does see the later ones; of the last step, which the model reads, there are none.
    """

    def __init__(self, channels: int, wider: int, dilation: int, norm: str, behind: _Behind) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(channels, wider, _KERNEL, dilation=dilation)
        self.norm1 = named.build(norm, wider)
        self.conv2 = nn.Conv1d(wider, wider, _KERNEL, dilation=dilation)
        self.norm2 = named.build(norm, wider)
        self.activation = behind.layer()
        self.dropout = nn.Dropout(behind.p)
        self.shortcut = nn.Identity() if wider == channels else nn.Conv1d(channels, wider, 1)
        self.past = (_KERNEL - 1) * dilation

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, steps) -> (N, wider, steps)."""
        y = self.dropout(self.activation(self.norm1(self.conv1(F.pad(x, (self.past, 0))))))
        y = self.dropout(self.activation(self.norm2(self.conv2(F.pad(y, (self.past, 0))))))
        return self.activation(y + self.shortcut(x))  # type: ignore[no-any-return]
