"""What the small models are made of: residual blocks, attention, recurrence, and the steps between them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from renorm.choices import activations
from renorm.norms import named

__all__ = [
    "KERNEL",
    "BasicBlock",
    "Behind",
    "CausalBlock",
    "ChannelsFirst",
    "Embedding",
    "EncoderBlock",
    "GlobalMean",
    "LastStep",
    "Recurrent",
    "TokenMean",
    "Tokens",
]

KERNEL = 3  # steps that a causal convolution sees


@dataclass(frozen=True)
class Behind:
    """What stands behind a norm: the activation, and dropout where there is any."""

    activation: str
    p: float  # of dropout

    def layer(self) -> nn.Module:
        """The activation."""
        return activations.build(self.activation)

    def dropout(self) -> list[nn.Module]:
        """A layer, or none."""
        return [nn.Dropout(self.p)] if self.p else []


class GlobalMean(nn.Module):
    """(N, C, ...) -> (N, C): the mean of each channel."""

    def forward(self, x: Tensor) -> Tensor:
        """The mean over all axes after the second."""
        return x.flatten(2).mean(2)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, as in a ResNet; it halves the image when it widens."""

    def __init__(self, channels: int, wider: int, norm: str, behind: Behind) -> None:
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


class Tokens(nn.Module):
    """A sample cut into tokens: the features of a vector, the steps of a sequence, the rows of an image."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.count = shape[0] if len(shape) == 1 else shape[1]
        self.width = math.prod(shape) // self.count

    def forward(self, x: Tensor) -> Tensor:
        """(N, F), (N, C, L) or (N, C, H, W) -> (N, tokens, width)."""
        return x.unsqueeze(2) if x.dim() == 2 else x.transpose(1, 2).flatten(2)


class Embedding(nn.Module):
    """A linear layer on each token, plus a learnt vector for its position."""

    def __init__(self, num_tokens: int, width: int, embedded: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, embedded)
        self.position = nn.Parameter(0.02 * torch.randn(num_tokens, embedded))

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens, width) -> (N, tokens, embedded)."""
        return self.linear(x) + self.position  # type: ignore[no-any-return]


class EncoderBlock(nn.Module):
    """A pre-norm transformer encoder block around torch's attention.

    It is not nn.TransformerEncoderLayer with other norms put in: in evaluation mode that layer's fast path
    reads the norms' weight, bias and eps and computes a layer norm with them, whatever they are.
    """

    def __init__(self, width: int, num_heads: int, norm: str, behind: Behind) -> None:
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


class TokenMean(nn.Module):
    """(N, tokens, width) -> (N, width)."""

    def forward(self, x: Tensor) -> Tensor:
        """The mean over the tokens."""
        return x.mean(1)


class Recurrent(nn.Module):
    """An LSTM layer without its final states."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, hidden, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, steps, width) -> (N, steps, hidden)."""
        return self.lstm(x)[0]  # type: ignore[no-any-return]


class LastStep(nn.Module):
    """The newest entry of the dimension `dim`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """(N, steps, C) or (N, C, steps) -> (N, C)."""
        return x.select(self.dim, -1)


class ChannelsFirst(nn.Module):
    """(N, steps, C) -> (N, C, steps)."""

    def forward(self, x: Tensor) -> Tensor:
        """The transpose."""
        return x.transpose(1, 2)


class CausalBlock(nn.Module):
    """Two dilated convolutions that see no later step, beside a shortcut (Bai et al. 2018).

    A norm that averages over steps does see the later ones; of the last step, which the model reads, there are none.
    """

    def __init__(self, channels: int, wider: int, dilation: int, norm: str, behind: Behind) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(channels, wider, KERNEL, dilation=dilation)
        self.norm1 = named.build(norm, wider)
        self.conv2 = nn.Conv1d(wider, wider, KERNEL, dilation=dilation)
        self.norm2 = named.build(norm, wider)
        self.activation = behind.layer()
        self.dropout = nn.Dropout(behind.p)
        self.shortcut = nn.Identity() if wider == channels else nn.Conv1d(channels, wider, 1)
        self.past = (KERNEL - 1) * dilation

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, steps) -> (N, wider, steps)."""
        y = self.dropout(self.activation(self.norm1(self.conv1(F.pad(x, (self.past, 0))))))
        y = self.dropout(self.activation(self.norm2(self.conv2(F.pad(y, (self.past, 0))))))
        return self.activation(y + self.shortcut(x))  # type: ignore[no-any-return]
