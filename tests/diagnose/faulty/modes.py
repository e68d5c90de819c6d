"""Training where evaluation is meant, the other way round, and dropout in the wrong place."""

import torch
import torch.nn.functional as F
from clean.vision import ResNet
from program import Program, fault
from torch import nn


def _adam(model):
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def _rows(n=64, classes=4):
    return torch.randn(n, 16), torch.randint(classes, (n,))


def _images(n=16, classes=10):
    return torch.randn(n, 3, 16, 16), torch.randint(classes, (n,))


@fault("C23", also=("C33",))
def left_in_evaluation() -> Program:
    """model.eval() for the validation of the last epoch, and no model.train() since."""
    model = ResNet()
    for _ in range(3):
        model(torch.randn(16, 3, 16, 16))
    model.eval()
    return Program(model, nn.CrossEntropyLoss(), _images(), _adam(model))


@fault("C23")
def dropout_switched_off() -> Program:
    """An MLP with dropout in eval mode while it is trained."""
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 4)).eval()
    return Program(model, nn.CrossEntropyLoss(), _rows(), _adam(model))


@fault("C23")
def backbone_in_evaluation_and_training() -> Program:
    """self.backbone.eval() in __init__, though the backbone is fine-tuned as a whole."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = ResNet(classes=32).eval()
            self.head = nn.Linear(32, 5)

        def forward(self, x):
            return self.head(F.relu(self.backbone(x)))

    model = Net()
    return Program(model, nn.CrossEntropyLoss(), _images(classes=5), _adam(model))


@fault("C23b")
def frozen_backbone_in_training_mode() -> Program:
    """requires_grad_(False) on the backbone, whose norms go on following the new data."""
    model = ResNet()
    for _ in range(3):
        model(torch.randn(16, 3, 16, 16))
    model.requires_grad_(False)
    model.fc = nn.Linear(32, 5)
    return Program(model, nn.CrossEntropyLoss(), _images(classes=5), _adam(model))


@fault("C23b")
def frozen_first_stage() -> Program:
    """Stem and first stage frozen, model.train() called afterwards."""
    model = ResNet()
    for part in (model.conv1, model.bn1, model.layer1):
        part.requires_grad_(False)
    model.train()
    return Program(model, nn.CrossEntropyLoss(), _images(), _adam(model))


@fault("C31")
def dropout_that_never_sleeps() -> Program:
    """F.dropout(x, 0.5) without training=self.training: predictions are random."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 64), nn.Linear(64, 4)

        def forward(self, x):
            return self.b(F.dropout(F.relu(self.a(x)), 0.5))

    model = Net()
    return Program(model, nn.CrossEntropyLoss(), _rows(), _adam(model))


@fault("C31")
def dropout_made_in_the_forward() -> Program:
    """nn.Dropout(0.3)(x) in the forward: a new module, always in training mode."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 64), nn.Linear(64, 4)

        def forward(self, x):
            return self.b(nn.Dropout(0.3)(F.relu(self.a(x))))

    model = Net()
    return Program(model, nn.CrossEntropyLoss(), _rows(), _adam(model))


@fault("C19")
def dropout_before_batch_norm() -> Program:
    """Dropout directly in front of a batch norm: its variance is another in evaluation."""
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Dropout(0.5), nn.BatchNorm1d(64), nn.Linear(64, 4))
    return Program(model, nn.CrossEntropyLoss(), _rows(), _adam(model))


@fault("C19")
def dropout_one_layer_before_batch_norm() -> Program:
    """Dropout, a linear layer, a batch norm, in a narrow net."""
    model = nn.Sequential(
        nn.Linear(16, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(),
        nn.Linear(32, 4),
    )  # fmt: skip
    return Program(model, nn.CrossEntropyLoss(), _rows(), _adam(model))


@fault("C19b")
def dropout_on_the_logits() -> Program:
    """Dropout behind the last layer: it zeroes the scores of classes."""
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 10), nn.Dropout(0.3))
    return Program(model, nn.CrossEntropyLoss(), _rows(classes=10), _adam(model))


@fault("C19b")
def dropout_on_a_forecast() -> Program:
    """Dropout behind the last layer of a regression."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.out, self.drop = nn.GRU(2, 24, batch_first=True), nn.Linear(24, 1), nn.Dropout(0.2)

        def forward(self, x):
            return self.drop(self.out(self.gru(x)[0][:, -1]))

    model = Net()
    return Program(model, nn.MSELoss(), (torch.randn(32, 9, 2), torch.randn(32, 1)), _adam(model))


@fault("C33")
def statistics_of_other_data() -> Program:
    """A net that was trained on unscaled features goes on with scaled ones, and with the old running statistics."""
    model = nn.Sequential(
        nn.Linear(16, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64, bias=False),
        nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 4),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    x = torch.randn(64, 16)
    y = x[:, :4].argmax(1)
    for _ in range(120):
        optimizer.zero_grad()
        F.cross_entropy(model(20 + 5 * x), y).backward()
        optimizer.step()
    return Program(model, nn.CrossEntropyLoss(), (x, y), optimizer)


@fault("C30b", also=("C23", "C11"))
def spectral_norm_without_training() -> Program:
    """A discriminator with spectral norm that is trained in eval mode: the power iteration never runs."""
    sn = nn.utils.spectral_norm
    model = nn.Sequential(sn(nn.Linear(64, 64)), nn.LeakyReLU(0.2), sn(nn.Linear(64, 1))).eval()
    return Program(model, nn.BCEWithLogitsLoss(), (torch.randn(32, 64), torch.ones(32, 1)), _adam(model))
