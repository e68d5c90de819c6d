"""Small models that differ in nothing but their norm: at one seed, all other initial weights are the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from renorm.choices import activations
from renorm.choices.registry import look_up
from renorm.errors import StudyError
from renorm.norms import named

__all__ = ["NAMES", "build"]

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
) -> nn.Module:
    """A built-in model for samples of `input_shape`, with `num_outputs` raw outputs (no softmax).

    | name | input | layers |
    |---|---|---|
    | mlp | any shape, flattened | 3 x (linear to 128, norm, activation), linear |
    | cnn | (C, L) to (C, D, H, W) | 3 x (conv to 32, 64, 128, norm, activation), global mean, linear |
    | resnet | (C, H, W) | stem, 3 stages of 2 basic blocks with 32, 64, 128 channels, global mean, linear |
    | transformer | (F,), (C, L), (C, H, W) | 2 pre-norm encoder blocks of width 64, 4 heads, mean, linear |

    A transformer's tokens are the features of a vector, the steps of a sequence or the rows of an image.
    Linear and convolution layers keep their bias whatever follows, so that every norm starts from the same
    weights. The random numbers are torch's global ones: seed them before.

    Args:
        name: one of :data:`NAMES`.
        input_shape: the shape of one sample, without the batch axis.
        num_outputs: how many numbers the model gives for a sample: the classes, or 1 for a regression.
        norm: a norm as :func:`renorm.norms.named.parse` reads it: "batch", "group(32)", "none", ...
        activation: one of :data:`renorm.choices.activations.NAMES`.

    Raises:
        StudyError: no model, norm or activation is called that, or the model cannot take `input_shape`.

    >>> model = build("mlp", (1, 8, 8), 10, norm="batch")
    >>> model(torch.zeros(4, 1, 8, 8)).shape
    torch.Size([4, 10])
    """
    maker, ranks = look_up(_MODELS, name, "model")
    shape = tuple(input_shape)
    if len(shape) not in ranks or min(shape) < 1:
        raise StudyError(
            f"model {name!r} takes {_describe(ranks)}; this data's samples have the shape {shape}; "
            f"choose one of {', '.join(_fitting(len(shape))) or 'your own models'}"
        )
    return maker(shape, num_outputs, norm, activation)


def _describe(ranks: range) -> str:
    return " or ".join(_KINDS.get(rank, f"{rank} axes") for rank in ranks)


def _fitting(rank: int) -> list[str]:
    return [name for name, (_, ranks) in _MODELS.items() if rank in ranks]


def _mlp(shape: tuple[int, ...], num_outputs: int, norm: str, activation: str) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    width = math.prod(shape)
    for _ in range(3):
        layers += [nn.Linear(width, 128), named.build(norm, 128, positions=False), activations.build(activation)]
        width = 128
    return nn.Sequential(*layers, nn.Linear(width, num_outputs))


def _cnn(shape: tuple[int, ...], num_outputs: int, norm: str, activation: str) -> nn.Module:
    conv, pool = _CONV[len(shape) - 1], _MAX_POOL[len(shape) - 1]
    layers: list[nn.Module] = []
    width = shape[0]
    for index, channels in enumerate((32, 64, 128)):
        layers += [
            conv(width, channels, 3, padding=1),
            named.build(norm, channels),
            activations.build(activation),
        ]
        if index < 2:
            # ceil_mode: an axis of one entry stays, so that any image size is taken
            layers.append(pool(2, ceil_mode=True))
        width = channels
    return nn.Sequential(*layers, _GlobalMean(), nn.Linear(width, num_outputs))


def _resnet(shape: tuple[int, ...], num_outputs: int, norm: str, activation: str) -> nn.Module:
    width = 32
    layers: list[nn.Module] = [
        nn.Conv2d(shape[0], width, 3, padding=1),
        named.build(norm, width),
        activations.build(activation),
    ]
    for channels in (32, 64, 128):
        layers += [
            _BasicBlock(width, channels, norm, activation),
            _BasicBlock(channels, channels, norm, activation),
        ]
        width = channels
    return nn.Sequential(*layers, _GlobalMean(), nn.Linear(width, num_outputs))


def _transformer(shape: tuple[int, ...], num_outputs: int, norm: str, activation: str) -> nn.Module:
    tokens = _Tokens(shape)
    blocks = [_EncoderBlock(64, 4, norm, activation) for _ in range(2)]
    embedding = _Embedding(tokens.count, tokens.width, 64)
    return nn.Sequential(
        tokens, embedding, *blocks, named.build(norm, 64, axis=-1), _TokenMean(), nn.Linear(64, num_outputs)
    )


_Maker = Callable[[tuple[int, ...], int, str, str], nn.Module]
_MODELS: dict[str, tuple[_Maker, range]] = {
    "mlp": (_mlp, range(1, 9)),
    "cnn": (_cnn, range(2, 5)),
    "resnet": (_resnet, range(3, 4)),
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

    def __init__(self, channels: int, wider: int, norm: str, activation: str) -> None:
        super().__init__()
        stride = 1 if wider == channels else 2
        self.conv1 = nn.Conv2d(channels, wider, 3, stride=stride, padding=1)
        self.norm1 = named.build(norm, wider)
        self.conv2 = nn.Conv2d(wider, wider, 3, padding=1)
        self.norm2 = named.build(norm, wider)
        self.activation = activations.build(activation)
        self.shortcut: nn.Module = nn.Identity()
        if wider != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, wider, 1, stride=2), named.build(norm, wider))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, wider, H / stride, W / stride)."""
        y = self.activation(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y)) + self.shortcut(x)
        return self.activation(y)  # type: ignore[no-any-return]


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

    def __init__(self, width: int, num_heads: int, norm: str, activation: str) -> None:
        super().__init__()
        self.norm1 = named.build(norm, width, axis=-1)
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.norm2 = named.build(norm, width, axis=-1)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 2 * width), activations.build(activation), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens, width) -> the same shape."""
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.feed_forward(self.norm2(x))  # type: ignore[no-any-return]


class _TokenMean(nn.Module):
    """(N, tokens, width) -> (N, width)."""

    def forward(self, x: Tensor) -> Tensor:
        """The mean over the tokens."""
        return x.mean(1)
