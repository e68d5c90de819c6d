"""Numbers that go in as nobody would want them to."""

import torch
from clean.vision import LeNet
from program import Program, fault
from torch import nn


def _adam(model):
    return torch.optim.Adam(model.parameters(), lr=1e-3)


@fault("C13", also=("C11",))
def pixels_up_to_255() -> Program:
    """Images as floats from 0 to 255, and no norm in the net."""
    model = LeNet()
    x = torch.randint(256, (32, 1, 28, 28)).float() * (torch.rand(32, 1, 28, 28) < 0.4)
    return Program(model, nn.CrossEntropyLoss(), (x, torch.randint(10, (32,))), _adam(model))


@fault("C13", also=("C11",))
def columns_in_their_own_units() -> Program:
    """Age, income, a rate and a year in one table."""
    n = torch.randn(64, 4)
    x = n * torch.tensor([12.0, 25_000.0, 0.02, 6.0]) + torch.tensor([40.0, 50_000.0, 0.05, 2010.0])
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    return Program(model, nn.CrossEntropyLoss(), (x, torch.randint(2, (64,))), _adam(model))


@fault("C13")
def timestamps() -> Program:
    """Seconds since 1970 as a feature beside standardized ones."""
    x = torch.randn(64, 6)
    x[:, 0] = 1.6e9 + 1e5 * torch.rand(64)
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 1), nn.Flatten(0))
    return Program(model, nn.MSELoss(), (x, torch.randn(64)), _adam(model))


@fault("C13")
def scaled_twice() -> Program:
    """ToTensor and another division by 255."""
    model = LeNet()
    x = torch.rand(32, 1, 28, 28) / 255
    return Program(model, nn.CrossEntropyLoss(), (x, torch.randint(10, (32,))), _adam(model))


@fault("C13", "C11b")
def missing_values() -> Program:
    """NaN in a table: in the inputs, in the loss, and after one step in every parameter."""
    x = torch.randn(64, 8)
    x[3, 2] = float("nan")
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    return Program(model, nn.CrossEntropyLoss(), (x, torch.randint(3, (64,))), _adam(model))


@fault("C13", also=("C25b",))
def prices_as_a_series() -> Program:
    """A share price around 30000 into an LSTM, whose gates saturate."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.out = nn.LSTM(1, 32, batch_first=True), nn.Linear(32, 1)

        def forward(self, x):
            return self.out(self.lstm(x)[0][:, -1])

    x = 30_000 + torch.randn(16, 20, 1).cumsum(1) * 200
    model = Net()
    return Program(model, nn.MSELoss(), (x, (x[:, -1] - 30_000) / 1000), _adam(model))


@fault("C14")
def targets_in_dollars() -> Program:
    """House prices as they are, and a head around 0."""
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 1))
    y = 200_000 + 80_000 * torch.randn(64, 1)
    return Program(model, nn.MSELoss(), (torch.randn(64, 8), y), _adam(model))


@fault("C14")
def targets_are_years() -> Program:
    """Years of release: a mean of 2000 and a spread of 10."""
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 1), nn.Flatten(0))
    return Program(model, nn.L1Loss(), (torch.randn(64, 8), 2000 + 10 * torch.randn(64)), _adam(model))


@fault("C14")
def coordinates_in_pixels() -> Program:
    """Key points from 0 to 640 for a head that starts around 0."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 8))
    return Program(model, nn.SmoothL1Loss(), (torch.randn(16, 3, 16, 16), 640 * torch.rand(16, 8)), _adam(model))


@fault("C11b", "C25")
def logarithm_of_zero() -> Program:
    """log of a softmax that underflows: the loss is infinite."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 4)
            nn.init.normal_(self.fc.weight, std=200.0)

        def forward(self, x):
            return torch.log(torch.softmax(self.fc(x), 1))

    model = Net()
    return Program(model, nn.NLLLoss(), (torch.randn(32, 8), torch.randint(4, (32,))), _adam(model))


@fault("C11b", also=("C13",))
def division_by_a_deviation_of_zero() -> Program:
    """Each series is divided by its deviation, and one is constant."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.out = nn.GRU(1, 16, batch_first=True), nn.Linear(16, 1)

        def forward(self, x):
            x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
            return self.out(self.gru(x)[0][:, -1])

    x = torch.randn(16, 10, 1)
    x[5] = 3.0
    model = Net()
    return Program(model, nn.MSELoss(), (x, torch.randn(16, 1)), _adam(model))


@fault("C11b")
def all_keys_masked() -> Program:
    """A padded row without a single token: the softmax over nothing but -inf."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.score, self.out = nn.Embedding(50, 16, padding_idx=0), nn.Linear(16, 1), nn.Linear(16, 2)

        def forward(self, tokens):
            x = self.embed(tokens)
            scores = self.score(x).squeeze(-1).masked_fill(tokens == 0, float("-inf"))
            return self.out((scores.softmax(1).unsqueeze(-1) * x).sum(1))

    tokens = torch.randint(1, 50, (16, 8))
    tokens[4] = 0
    model = Net()
    return Program(model, nn.CrossEntropyLoss(), (tokens, torch.randint(2, (16,))), _adam(model))
