"""What depends on what: samples on each other, layers that torch does not know of."""

import torch
import torch.nn.functional as F
from program import Program, fault
from torch import nn


def _adam(model):
    return torch.optim.Adam(model.parameters(), lr=1e-3)


def _series(n=16, steps=10, features=6, classes=3):
    return torch.randn(n, steps, features), torch.randint(classes, (n,))


@fault("C28")
def lstm_without_batch_first() -> Program:
    """(N, T, F) into nn.LSTM(batch_first=False): it runs over the samples."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.out = nn.LSTM(6, 32), nn.Linear(32, 3)

        def forward(self, x):
            y, _ = self.lstm(x)
            return self.out(y[:, -1])

    model = Net()
    return Program(model, nn.CrossEntropyLoss(), _series(), _adam(model))


@fault("C28")
def encoder_without_batch_first() -> Program:
    """nn.TransformerEncoderLayer's default is time first, and the batch is first: samples attend to each other."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(6, 16)
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 1, enable_nested_tensor=False)
            self.out = nn.Linear(16, 3)

        def forward(self, x):
            return self.out(self.encoder(self.embed(x)).mean(1))

    model = Net()
    return Program(model, nn.CrossEntropyLoss(), _series(), _adam(model))


@fault("C28", also=("C44",))
def view_instead_of_permute() -> Program:
    """Time first by view(T, N, F), which cuts samples into pieces of others."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.out = nn.GRU(6, 24), nn.Linear(24, 3)

        def forward(self, x):
            n, t, f = x.shape
            y, _ = self.gru(x.view(t, n, f))
            return self.out(y[-1])

    model = Net()
    return Program(model, nn.CrossEntropyLoss(), _series(), _adam(model))


@fault("C28")
def image_reshaped_over_samples() -> Program:
    """view(-1, C, H, W) of images whose channels stand in front of the batch."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)

        def forward(self, x):
            y = F.relu(self.conv(x)).transpose(0, 1).contiguous()
            return self.out(y.view(x.shape[0], 8, -1).mean(2))

    model = Net()
    batch = torch.randn(16, 3, 8, 8), torch.randint(4, (16,))
    return Program(model, nn.CrossEntropyLoss(), batch, _adam(model))


@fault("C28")
def softmax_over_the_batch() -> Program:
    """F.softmax(x, dim=0) as attention over features: samples compete."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.score, self.value, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)

        def forward(self, x):
            return self.out(F.softmax(self.score(x), dim=0) * self.value(x))

    model = Net()
    batch = torch.randn(16, 16), torch.randint(3, (16,))
    return Program(model, nn.CrossEntropyLoss(), batch, _adam(model))


@fault("C28")
def attention_by_matmul_over_samples() -> Program:
    """q @ k.t() of (N, F): an attention of samples to samples where time was meant."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(6, 6) for _ in range(4))
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            x = x.mean(1)
            weights = F.softmax(self.q(x) @ self.k(x).t() / 6**0.5, dim=-1)
            return self.head(self.out(weights @ self.v(x)))

    model = Net()
    return Program(model, nn.CrossEntropyLoss(), _series(), _adam(model))


@fault("C28")
def state_kept_between_samples() -> Program:
    """A loop over the samples of a batch that hands the hidden state on."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.out = nn.GRUCell(6, 16), nn.Linear(16, 3)

        def forward(self, x):
            h = torch.zeros(x.shape[1], 16)
            outputs = []
            for sample in x:
                h = self.cell(sample, h)
                outputs.append(self.out(h.mean(0)))
            return torch.stack(outputs)

    model = Net()
    return Program(model, nn.CrossEntropyLoss(), _series(), _adam(model))


@fault("C32", "C24", "C25d")
def layers_in_a_list() -> Program:
    """A Python list of layers: parameters() does not know of them."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [nn.Linear(16, 32), nn.Linear(32, 32)]
            self.out = nn.Linear(32, 4)

        def forward(self, x):
            for layer in self.layers:
                x = F.relu(layer(x))
            return self.out(x)

    model = Net()
    batch = torch.randn(32, 16), torch.randint(4, (32,))
    return Program(model, nn.CrossEntropyLoss(), batch, _adam(model))


@fault("C32")
def heads_in_a_dict() -> Program:
    """A Python dict of heads."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(16, 32)
            self.heads = {"a": nn.Linear(32, 4), "b": nn.Linear(32, 2)}

        def forward(self, x):
            x = F.relu(self.body(x))
            return {name: head(x) for name, head in self.heads.items()}

    def loss(out, y):
        return F.cross_entropy(out["a"], y["a"]) + F.cross_entropy(out["b"], y["b"])

    model = Net()
    batch = torch.randn(32, 16), {"a": torch.randint(4, (32,)), "b": torch.randint(2, (32,))}
    return Program(model, loss, batch, _adam(model))


@fault("C32")
def parameter_as_plain_tensor() -> Program:
    """torch.randn(..., requires_grad=True) as an attribute: a weight that is no parameter."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.randn(16, requires_grad=True)
            self.out = nn.Linear(16, 4)

        def forward(self, x):
            return self.out(x * self.scale)

    model = Net()
    batch = torch.randn(32, 16), torch.randint(4, (32,))
    return Program(model, nn.CrossEntropyLoss(), batch, _adam(model))


@fault("C32")
def layer_made_in_the_forward() -> Program:
    """nn.Linear in the forward: new random weights in every step."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            x = F.relu(self.conv(x)).flatten(1)
            return nn.Linear(x.shape[1], 4)(x)

    model = Net()
    batch = torch.randn(16, 3, 8, 8), torch.randint(4, (16,))
    return Program(model, nn.CrossEntropyLoss(), batch, _adam(model))
