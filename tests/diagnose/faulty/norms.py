"""Norms over the wrong values, or too few of them."""

import torch
import torch.nn.functional as F
from program import Program, fault
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def _adam(model):
    return torch.optim.Adam(model.parameters(), lr=1e-3)


def _rows(n, classes=4):
    return torch.randn(n, 16), torch.randint(classes, (n,))


def _images(n=16, classes=4, size=12):
    return torch.randn(n, 3, size, size), torch.randint(classes, (n,))


def _mlp(norm):
    return nn.Sequential(nn.Linear(16, 32, bias=False), norm, nn.ReLU(), nn.Linear(32, 4))


def _cnn(norm, **conv):
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, **conv), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 4),
    )  # fmt: skip


@fault("C17")
def one_sample_a_batch() -> Program:
    """Batch size 1 and BatchNorm1d: torch raises."""
    model = _mlp(nn.BatchNorm1d(32))
    return Program(model, nn.CrossEntropyLoss(), _rows(1), _adam(model))


@fault("C17")
def two_samples_a_batch() -> Program:
    """Batch size 2 and BatchNorm1d: the output is +1 and -1."""
    model = _mlp(nn.BatchNorm1d(32))
    return Program(model, nn.CrossEntropyLoss(), _rows(2), _adam(model))


@fault("C17")
def four_samples_a_batch() -> Program:
    """Batch size 4 and BatchNorm1d, of large samples that do not fit in memory otherwise."""
    model = _mlp(nn.BatchNorm1d(32))
    return Program(model, nn.CrossEntropyLoss(), _rows(4), _adam(model))


@fault("C17")
def last_batch_of_one() -> Program:
    """65 samples in batches of 16: the last one has a single sample, and the epoch ends in an exception."""
    model = _mlp(nn.BatchNorm1d(32))
    loader = DataLoader(TensorDataset(*_rows(65)), batch_size=16, shuffle=True)
    return Program(model, nn.CrossEntropyLoss(), None, _adam(model), loader)


@fault("C17")
def pooled_before_the_norm() -> Program:
    """Global pooling, then BatchNorm2d at 1 x 1 with two images: an ASPP's image branch at a small batch."""

    class ASPP(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Conv2d(3, 16, 3, padding=1)
            self.pool = nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
            )
            self.out = nn.Conv2d(32, 4, 1)

        def forward(self, x):
            x = F.relu(self.body(x))
            return self.out(torch.cat([x, self.pool(x).expand_as(x)], 1))

    model = ASPP()
    batch = torch.randn(2, 3, 12, 12), torch.randint(4, (2, 12, 12))
    return Program(model, nn.CrossEntropyLoss(), batch, _adam(model))


@fault("C18", also=("C25b", "C25d"))
def as_many_groups_as_features() -> Program:
    """GroupNorm(C, C) on vectors: each value minus itself."""
    model = _mlp(nn.GroupNorm(32, 32))
    return Program(model, nn.CrossEntropyLoss(), _rows(32), _adam(model))


@fault("C18", also=("C25b", "C25d"))
def layer_norm_of_one_feature() -> Program:
    """LayerNorm(1) on a single number for each step of a series: it is 0 whatever comes in."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.gru, self.out = nn.LayerNorm(1), nn.GRU(1, 16, batch_first=True), nn.Linear(16, 1)

        def forward(self, x):
            return self.out(self.gru(self.norm(x))[0][:, -1])

    model = Net()
    return Program(model, nn.MSELoss(), (torch.randn(16, 10, 1), torch.randn(16, 1)), _adam(model))


@fault("C18")
def instance_norm_at_one_position() -> Program:
    """InstanceNorm2d behind strides that leave 1 x 1: torch raises."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 4, 4), nn.ReLU(), nn.Conv2d(16, 32, 3, 1), nn.InstanceNorm2d(32), nn.ReLU(), nn.Flatten(),
        nn.Linear(32, 4),
    )  # fmt: skip
    return Program(model, nn.CrossEntropyLoss(), _images(), _adam(model))


@fault("C18")
def pairs_in_groups() -> Program:
    """GroupNorm(16, 32) on vectors: of two values only the order is left."""
    model = _mlp(nn.GroupNorm(16, 32))
    return Program(model, nn.CrossEntropyLoss(), _rows(32), _adam(model))


@fault("C16")
def bias_before_batch_norm() -> Program:
    """Convolutions with a bias that the norm subtracts: an info."""
    model = _cnn(nn.BatchNorm2d(16))
    return Program(model, nn.CrossEntropyLoss(), _images(), _adam(model))


@fault("C20")
def momentum_of_keras() -> Program:
    """momentum=0.99, as Keras counts it: running statistics are the last batch's."""
    model = _cnn(nn.BatchNorm2d(16, momentum=0.99), bias=False)
    return Program(model, nn.CrossEntropyLoss(), _images(), _adam(model))


@fault("C20")
def momentum_as_second_argument() -> Program:
    """BatchNorm2d(16, 0.1): the second argument is eps, not the momentum."""
    model = _cnn(nn.BatchNorm2d(16, 0.1), bias=False)
    return Program(model, nn.CrossEntropyLoss(), _images(), _adam(model))


@fault("C20")
def eps_of_the_gan_tutorial() -> Program:
    """BatchNorm1d(32, 0.8), which many GANs copy: an eps of 0.8 where a momentum was meant."""
    model = nn.Sequential(
        nn.Linear(16, 32, bias=False), nn.BatchNorm1d(32, 0.8), nn.LeakyReLU(0.2), nn.Linear(32, 64), nn.Tanh()
    )
    return Program(model, nn.MSELoss(), (torch.randn(32, 16), torch.rand(32, 64) * 2 - 1), _adam(model))


@fault("C21")
def layer_norm_on_images() -> Program:
    """LayerNorm(width) behind a convolution: each row of each channel on its own."""
    model = _cnn(nn.LayerNorm(12))
    return Program(model, nn.CrossEntropyLoss(), _images(), _adam(model))


@fault("C21")
def layer_norm_on_signals() -> Program:
    """The channels of a Conv1d happen to be as many as the steps: LayerNorm(24) takes the latter."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.out = nn.Conv1d(4, 24, 3, padding=1), nn.LayerNorm(24), nn.Linear(24, 3)

        def forward(self, x):
            return self.out(F.gelu(self.norm(self.conv(x))).mean(2))

    model = Net()
    return Program(model, nn.CrossEntropyLoss(), (torch.randn(16, 4, 24), torch.randint(3, (16,))), _adam(model))


@fault("C22")
def two_norms_in_a_row() -> Program:
    """BatchNorm2d at the end of one block and at the start of the next one: an info."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
    return Program(model, nn.CrossEntropyLoss(), _images(), _adam(model))


@fault("C22")
def two_relus_in_a_row() -> Program:
    """A block that ends in a ReLU, and F.relu around it: an info."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.out = nn.Sequential(nn.Linear(16, 32), nn.ReLU()), nn.Linear(32, 4)

        def forward(self, x):
            return self.out(F.relu(self.block(x)))

    model = Net()
    return Program(model, nn.CrossEntropyLoss(), _rows(32), _adam(model))


@fault("C30")
def alexnet_with_local_response_norm() -> Program:
    """LocalResponseNorm in a new net: an info."""
    model = _cnn(nn.LocalResponseNorm(5))
    return Program(model, nn.CrossEntropyLoss(), _images(), _adam(model))
