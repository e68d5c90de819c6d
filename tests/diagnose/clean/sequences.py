"""Series of numbers: signals, forecasts, speech."""

import torch
import torch.nn.functional as F
from program import Program
from torch import nn


def _waves(n=16, length=24, features=1):
    t = torch.arange(length) * 0.3
    phase, speed = torch.rand(n, 1, features) * 6, 0.5 + torch.rand(n, 1, features)
    return torch.sin(t[None, :, None] * speed + phase) + 0.1 * torch.randn(n, length, features)


def gru_classifier() -> Program:
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.fc = nn.GRU(3, 32, batch_first=True), nn.Linear(32, 4)

        def forward(self, x):
            _, hidden = self.gru(x)
            return self.fc(hidden[-1])

    model = Classifier()
    batch = _waves(features=3), torch.randint(4, (16,))
    return Program(model, nn.CrossEntropyLoss(), batch, torch.optim.Adam(model.parameters(), lr=1e-3))


def lstm_forecast() -> Program:
    """The next value from the last output; target of the same shape."""

    class Forecast(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.linear = nn.LSTM(1, 32, 2, batch_first=True), nn.Linear(32, 1)

        def forward(self, x):
            h0 = torch.zeros(2, x.size(0), 32)
            out, _ = self.lstm(x, (h0, torch.zeros_like(h0)))
            return self.linear(out[:, -1, :])

    x = _waves()
    model = Forecast()
    return Program(model, nn.MSELoss(), (x[:, :-1], x[:, -1]), torch.optim.Adam(model.parameters(), lr=0.01))


def rnn_cells_by_hand() -> Program:
    """A loop over time with nn.LSTMCell, time first, all outputs kept."""

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.out = nn.LSTMCell(2, 16), nn.Linear(16, 2)

        def forward(self, x):
            h = c = x.new_zeros(x.shape[1], 16)
            outputs = []
            for step in x:
                h, c = self.cell(step, (h, c))
                outputs.append(self.out(h))
            return torch.stack(outputs)

    x = _waves(features=2).transpose(0, 1)
    model = Loop()
    return Program(model, nn.MSELoss(), (x[:-1], x[1:]), torch.optim.RMSprop(model.parameters(), lr=1e-3))


class TemporalBlock(nn.Module):
    def __init__(self, inside, outside, dilation):
        super().__init__()
        self.pad = 2 * dilation
        self.conv1 = nn.utils.parametrizations.weight_norm(nn.Conv1d(inside, outside, 3, dilation=dilation))
        self.conv2 = nn.utils.parametrizations.weight_norm(nn.Conv1d(outside, outside, 3, dilation=dilation))
        self.down = nn.Conv1d(inside, outside, 1) if inside != outside else nn.Identity()
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        y = self.dropout(F.relu(self.conv1(F.pad(x, (self.pad, 0)))))
        y = self.dropout(F.relu(self.conv2(F.pad(y, (self.pad, 0)))))
        return F.relu(y + self.down(x))


def temporal_convolutions() -> Program:
    """Causal, dilated, weight-normalized, with the paper's ReLU after the sum."""

    class TCN(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(TemporalBlock(3, 16, 1), TemporalBlock(16, 16, 2), TemporalBlock(16, 16, 4))
            self.out = nn.Linear(16, 5)

        def forward(self, x):
            return self.out(self.net(x.transpose(1, 2))[:, :, -1])

    model = TCN()
    batch = _waves(features=3), torch.randint(5, (16,))
    return Program(model, nn.CrossEntropyLoss(), batch, torch.optim.Adam(model.parameters(), lr=2e-3))


def wavenet() -> Program:
    """Gates of tanh and sigmoid, skips, a class for each of 64 levels."""

    class WaveNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.start = nn.Conv1d(1, 16, 1)
            self.filters = nn.ModuleList([nn.Conv1d(16, 16, 2, dilation=d) for d in (1, 2, 4)])
            self.gates = nn.ModuleList([nn.Conv1d(16, 16, 2, dilation=d) for d in (1, 2, 4)])
            self.skips = nn.ModuleList([nn.Conv1d(16, 32, 1) for _ in range(3)])
            self.end = nn.Sequential(nn.ReLU(), nn.Conv1d(32, 32, 1), nn.ReLU(), nn.Conv1d(32, 64, 1))

        def forward(self, x):
            x, skip = self.start(x), 0
            for i, (f, g, s) in enumerate(zip(self.filters, self.gates, self.skips, strict=True)):
                padded = F.pad(x, (2**i, 0))
                y = torch.tanh(f(padded)) * torch.sigmoid(g(padded))
                skip = skip + s(y)
                x = x + y
            return self.end(skip)

    x = _waves(4, 48).transpose(1, 2).clamp(-1, 1)
    levels = ((x[:, 0, 1:] + 1) * 31.5).round().long()
    model = WaveNet()
    return Program(model, nn.CrossEntropyLoss(), (x[:, :, :-1], levels), torch.optim.Adam(model.parameters(), lr=1e-3))


def speech_with_ctc() -> Program:
    """Log-probabilities time first, lengths of inputs and targets, blanks at 0."""

    class Speech(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Sequential(nn.Conv1d(20, 32, 3, padding=1), nn.BatchNorm1d(32), nn.ReLU())
            self.rnn, self.fc = nn.GRU(32, 24, bidirectional=True), nn.Linear(48, 28)

        def forward(self, x):
            y, _ = self.rnn(self.conv(x).permute(2, 0, 1))
            return F.log_softmax(self.fc(y), dim=2)

    def loss(log_probs, target):
        labels, lengths = target
        return F.ctc_loss(log_probs, labels, torch.full((len(labels),), log_probs.shape[0]), lengths)

    model = Speech()
    batch = torch.randn(8, 20, 40), (torch.randint(1, 28, (8, 10)), torch.randint(4, 11, (8,)))
    return Program(model, loss, batch, torch.optim.AdamW(model.parameters(), lr=5e-4))


def audio_spectrogram() -> Program:
    """Logarithms of a mel spectrogram: around -4, with a norm as the first layer."""
    model = nn.Sequential(
        nn.BatchNorm2d(1), nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    batch = -4 + 2 * torch.randn(8, 1, 20, 24), torch.randint(10, (8,))
    return Program(model, nn.CrossEntropyLoss(), batch, torch.optim.Adam(model.parameters(), lr=1e-3))


def sequence_autoencoder() -> Program:
    """An LSTM's last state is repeated and decoded."""

    class Autoencoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.LSTM(2, 24, batch_first=True), nn.LSTM(24, 24, batch_first=True)
            self.out = nn.Linear(24, 2)

        def forward(self, x):
            code = self.encoder(x)[1][0][-1]
            y, _ = self.decoder(code.unsqueeze(1).repeat(1, x.shape[1], 1))
            return self.out(y)

    x = _waves(features=2)
    model = Autoencoder()
    return Program(model, nn.L1Loss(), (x, x), torch.optim.Adam(model.parameters(), lr=1e-3))


def transformer_forecast() -> Program:
    """A reversible normalization of each series by its own mean and deviation."""

    class Forecaster(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.position = nn.Linear(1, 32), nn.Parameter(0.02 * torch.randn(20, 32))
            layer = nn.TransformerEncoderLayer(32, 4, 64, 0.1, batch_first=True, norm_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = nn.Linear(20 * 32, 4)

        def forward(self, x):
            mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True) + 1e-5
            z = self.embed((x - mean) / std) + self.position
            y = self.head(self.encoder(z).flatten(1)).unsqueeze(-1)
            return y * std + mean

    x = 3 * _waves() + 2 * torch.randn(16, 1, 1)
    model = Forecaster()
    return Program(model, nn.MSELoss(), (x[:, :20], x[:, 20:]), torch.optim.Adam(model.parameters(), lr=1e-4))


def quantiles_of_a_series() -> Program:
    """Three quantiles by the pinball loss: every output against one target, by an explicit unsqueeze."""

    class Quantiles(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.out = nn.GRU(1, 24, batch_first=True), nn.Linear(24, 3)

        def forward(self, x):
            return self.out(self.gru(x)[0][:, -1])

    def loss(output, target):
        q = torch.tensor([0.1, 0.5, 0.9])
        error = target.unsqueeze(1) - output
        return torch.maximum(q * error, (q - 1) * error).mean()

    x = _waves()
    model = Quantiles()
    return Program(model, loss, (x[:, :-1], x[:, -1, 0]), torch.optim.Adam(model.parameters(), lr=1e-3))


def heartbeat() -> Program:
    """One-dimensional convolutions with residuals on normalized signals, weights for rare classes."""

    class Block(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.conv1 = nn.Conv1d(channels, channels, 5, padding=2)
            self.conv2 = nn.Conv1d(channels, channels, 5, padding=2)

        def forward(self, x):
            return F.max_pool1d(F.relu(x + self.conv2(F.relu(self.conv1(x)))), 2)

    model = nn.Sequential(
        nn.Conv1d(1, 16, 5, padding=2), Block(16), Block(16), nn.Flatten(), nn.Linear(16 * 12, 32), nn.ReLU(),
        nn.Linear(32, 5),
    )  # fmt: skip
    y = torch.multinomial(torch.tensor([0.6, 0.1, 0.1, 0.1, 0.1]), 32, replacement=True)
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.4, 2.0, 2.0, 2.0, 2.0]))
    batch = _waves(32, 48).transpose(1, 2), y
    return Program(model, loss, batch, torch.optim.Adam(model.parameters(), lr=1e-3))
