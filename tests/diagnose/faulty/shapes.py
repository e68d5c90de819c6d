"""Shapes and labels that do not belong together, and that torch mostly takes."""

import torch
import torch.nn.functional as F
from program import Program, fault
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def _rows(n=32, features=20):
    return torch.randn(n, features)


def _mlp(outputs, *end):
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, outputs), *end)


def _adam(model):
    return torch.optim.Adam(model.parameters(), lr=1e-3)


@fault("C07")
def column_against_row() -> Program:
    """MSELoss of (N, 1) and (N,): every output against every target."""
    model = _mlp(1)
    return Program(model, nn.MSELoss(), (_rows(), torch.randn(32)), _adam(model))


@fault("C07")
def row_against_column() -> Program:
    """The output is squeezed and the target is not."""
    model = _mlp(1, nn.Flatten(0))
    return Program(model, nn.SmoothL1Loss(), (_rows(), torch.randn(32, 1)), _adam(model))


@fault("C07")
def squared_error_by_hand() -> Program:
    """((output - target) ** 2).mean() of (N, 1) and (N,): not even a warning of torch's."""
    model = _mlp(1)
    return Program(model, lambda out, y: ((out - y) ** 2).mean(), (_rows(), torch.randn(32)), _adam(model))


@fault("C07")
def absolute_error_by_hand_with_swapped_arguments() -> Program:
    """torch.abs(target - output).mean() in an LSTM's forecast."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.out = nn.LSTM(1, 16, batch_first=True), nn.Linear(16, 1)

        def forward(self, x):
            return self.out(self.lstm(x)[0][:, -1])

    model = Net()
    batch = torch.randn(16, 9, 1), torch.randn(16)
    return Program(model, lambda out, y: torch.abs(y - out).mean(), batch, _adam(model))


@fault("C07")
def series_without_channel() -> Program:
    """Outputs (N, T, 1) against targets (N, T): sequences against each other."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.out = nn.GRU(3, 16, batch_first=True), nn.Linear(16, 1)

        def forward(self, x):
            return self.out(self.gru(x)[0])

    model = Net()
    return Program(model, nn.HuberLoss(), (torch.randn(12, 12, 3), torch.randn(12, 12)), _adam(model))


@fault("C07")
def loader_gives_rows() -> Program:
    """The loader's targets are (N,), the model's outputs (N, 1)."""
    model = _mlp(1)
    loader = DataLoader(TensorDataset(_rows(64), torch.randn(64)), batch_size=16)
    return Program(model, nn.L1Loss(), None, _adam(model), loader)


@fault("C09")
def batch_for_classes() -> Program:
    """A squeezed output and float labels in CrossEntropyLoss: one sample with N classes."""
    model = _mlp(1, nn.Flatten(0))
    return Program(model, nn.CrossEntropyLoss(), (_rows(), torch.randint(2, (32,)).float()), _adam(model))


@fault("C15")
def labels_from_one() -> Program:
    """Labels 1 to K for K units: an IndexError here, an assertion on a GPU."""
    model = _mlp(10)
    return Program(model, nn.CrossEntropyLoss(), (_rows(), torch.arange(32) % 10 + 1), _adam(model))


@fault("C15")
def void_label_in_masks() -> Program:
    """Pixels of label 255, and no ignore_index."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 1))
    y = torch.randint(5, (4, 12, 12))
    y[:, 0] = 255
    return Program(model, nn.CrossEntropyLoss(), (torch.randn(4, 3, 12, 12), y), _adam(model))


@fault("C15")
def negative_labels() -> Program:
    """-1 for unknown, which cross_entropy does not know of."""
    y = torch.randint(4, (32,))
    y[::7] = -1
    model = _mlp(4)
    return Program(model, nn.CrossEntropyLoss(), (_rows(), y), _adam(model))


@fault("C15")
def one_class_a_batch() -> Program:
    """A file sorted by class, and a loader that does not shuffle."""
    model = _mlp(4)
    data = TensorDataset(_rows(256), torch.arange(4).repeat_interleave(64))
    return Program(model, nn.CrossEntropyLoss(), None, _adam(model), DataLoader(data, batch_size=32))


@fault("C15")
def units_for_no_class() -> Program:
    """A head of 1000 units for pixels of 3 classes."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1000, 1))
    batch = torch.randn(4, 3, 20, 20), torch.randint(3, (4, 20, 20))
    return Program(model, nn.CrossEntropyLoss(), batch, _adam(model))


@fault("C15", also=("C11b",))
def everything_is_ignored() -> Program:
    """ignore_index is the label of all pixels: the loss is 0 / 0."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    batch = torch.randn(4, 3, 8, 8), torch.zeros(4, 8, 8, dtype=torch.long)
    return Program(model, nn.CrossEntropyLoss(ignore_index=0), batch, _adam(model))


@fault("C15b", "C00")
def indices_as_floats() -> Program:
    """Class indices from a table of float32."""
    model = _mlp(4)
    return Program(model, nn.CrossEntropyLoss(), (_rows(), torch.randint(4, (32,)).float()), _adam(model))


@fault("C15b", "C00")
def one_hot_as_integers() -> Program:
    """F.one_hot without float()."""
    model = _mlp(4)
    y = F.one_hot(torch.randint(4, (32,)), 4)
    return Program(model, nn.CrossEntropyLoss(), (_rows(), y), _adam(model))


@fault("C15b", "C00")
def labels_as_a_column() -> Program:
    """Labels of shape (N, 1) for a cross-entropy."""
    model = _mlp(4)
    return Program(model, nn.CrossEntropyLoss(), (_rows(), torch.randint(4, (32, 1))), _adam(model))


@fault("C00")
def features_counted_wrong() -> Program:
    """The first linear layer behind the convolutions has another number of inputs."""
    model = nn.Sequential(nn.Conv2d(3, 8, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 7 * 7, 10))
    return Program(model, nn.CrossEntropyLoss(), (torch.randn(8, 3, 16, 16), torch.randint(10, (8,))), _adam(model))


@fault("C00")
def channels_last_images() -> Program:
    """Images as NumPy has them, (N, H, W, C), into a convolution."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    return Program(model, nn.CrossEntropyLoss(), (torch.randn(8, 16, 16, 3), torch.randint(10, (8,))), _adam(model))


@fault("C00")
def vocabulary_too_small() -> Program:
    """A token beyond the embedding's rows."""
    model = nn.Sequential(nn.Embedding(100, 8), nn.Flatten(), nn.Linear(80, 2))
    tokens = torch.randint(100, (8, 10))
    tokens[3, 4] = 100
    return Program(model, nn.CrossEntropyLoss(), (tokens, torch.randint(2, (8,))), _adam(model))


@fault("C00")
def doubles_from_numpy() -> Program:
    """Inputs in float64, as NumPy makes them."""
    model = _mlp(3)
    return Program(model, nn.CrossEntropyLoss(), (_rows().double(), torch.randint(3, (32,))), _adam(model))


@fault("C12")
def summed_over_the_batch() -> Program:
    """reduction='sum' with the learning rate of a mean."""
    model = _mlp(1, nn.Flatten(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    return Program(model, nn.MSELoss(reduction="sum"), (_rows(), torch.randn(32)), optimizer)


@fault("C12")
def sum_by_hand() -> Program:
    """A loss of one's own that ends in .sum()."""
    model = _mlp(4)

    def loss(logits, y):
        p = F.softmax(logits, 1)
        return -torch.log(p[torch.arange(len(y)), y] + 1e-9).sum()

    return Program(model, loss, (_rows(), torch.randint(4, (32,))), torch.optim.SGD(model.parameters(), lr=1e-3))


@fault("C45")
def weighted_and_not_averaged() -> Program:
    """Weights of samples: reduction='none', times the weights, and no mean; backward() raises."""
    model, weights = _mlp(4), torch.rand(32)

    def loss(logits, y):
        return F.cross_entropy(logits, y, reduction="none") * weights

    return Program(model, loss, (_rows(), torch.randint(4, (32,))), torch.optim.SGD(model.parameters(), lr=0.1))
