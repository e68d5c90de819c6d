"""Initial weights, and gradients that do not come through."""

import torch
import torch.nn.functional as F
from clean.text import GPT
from program import Program, fault
from torch import nn


def _batch(n=32, features=16, classes=4):
    return torch.randn(n, features), torch.randint(classes, (n,))


def _mlp(depth=2, width=32, activation=nn.ReLU, outputs=4):
    layers, inside = [], 16
    for _ in range(depth):
        layers += [nn.Linear(inside, width), activation()]
        inside = width
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def _adam(model):
    return torch.optim.Adam(model.parameters(), lr=1e-3)


@fault("C25b", "C25c", also=("C25e",))
def zeros_everywhere() -> Program:
    """All weights start at 0, in every layer: only the last bias learns."""
    model = _mlp()
    for p in model.parameters():
        nn.init.zeros_(p)
    return Program(model, nn.CrossEntropyLoss(), _batch(), _adam(model))


@fault("C25c", also=("C25e", "C11"))
def ones_everywhere() -> Program:
    """All weights start at 1: the units of a layer stay one unit."""
    model = _mlp()
    for m in model:
        if isinstance(m, nn.Linear):
            nn.init.ones_(m.weight)
    return Program(model, nn.CrossEntropyLoss(), _batch(), _adam(model))


@fault("C25c")
def constant_first_layer() -> Program:
    """nn.init.constant_ on a convolution whose filters should differ."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)
    )
    nn.init.constant_(model[0].weight, 0.05)
    nn.init.zeros_(model[0].bias)
    nn.init.constant_(model[4].weight, 0.1)
    batch = torch.randn(16, 3, 12, 12), torch.randint(4, (16,))
    return Program(model, nn.CrossEntropyLoss(), batch, _adam(model))


@fault("C11")
def weights_of_unit_variance() -> Program:
    """Weights from N(0, 1) in wide layers: logits of hundreds."""
    model = _mlp(3, 128)
    for m in model:
        if isinstance(m, nn.Linear):
            nn.init.normal_(m.weight)
    return Program(model, nn.CrossEntropyLoss(), _batch(), _adam(model))


@fault("C11")
def tied_embedding_of_unit_variance() -> Program:
    """A GPT whose tied table keeps nn.Embedding's N(0, 1): the first loss is several times ln 100."""
    model = GPT()
    nn.init.normal_(model.wte.weight)
    tokens = torch.randint(100, (8, 13))
    return Program(
        model,
        lambda logits, y: F.cross_entropy(logits.flatten(0, 1), y.flatten()),
        (tokens[:, :-1], tokens[:, 1:]),
        _adam(model),
    )


@fault("C11")
def head_started_too_large() -> Program:
    """A replaced head with weights from N(0, 1) on pooled features."""
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(256, 10),
    )  # fmt: skip
    nn.init.normal_(model[-1].weight)
    batch = torch.randn(16, 3, 16, 16), torch.randint(10, (16,))
    return Program(model, nn.CrossEntropyLoss(), batch, _adam(model))


@fault("C25b")
def dead_relus() -> Program:
    """A bias of -10 in front of a ReLU: no unit is active for any sample."""
    model = _mlp()
    nn.init.constant_(model[2].bias, -10.0)
    return Program(model, nn.CrossEntropyLoss(), _batch(), _adam(model))


@fault("C25b", "C25e")
def saturated_sigmoids() -> Program:
    """Inputs of a hundred into sigmoids: their slope is 0 in float32."""
    model = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 32), nn.Sigmoid(), nn.Linear(32, 4))
    nn.init.normal_(model[1].weight, std=1000.0)
    return Program(model, nn.CrossEntropyLoss(), _batch(), _adam(model))


@fault("C25e")
def ten_layers_of_sigmoids() -> Program:
    """Deep, sigmoid, no norm and no residual: the first layer's gradient is a millionth of the last one's."""
    model = _mlp(10, activation=nn.Sigmoid)
    return Program(model, nn.CrossEntropyLoss(), _batch(), torch.optim.SGD(model.parameters(), lr=0.1))


@fault("C25e")
def twenty_plain_layers_with_small_weights() -> Program:
    """Weights from N(0, 0.01) in twenty layers without norm: what comes through is a power of it."""
    model = _mlp(20)
    for m in model:
        if isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, std=0.01)
    return Program(model, nn.CrossEntropyLoss(), _batch(), torch.optim.SGD(model.parameters(), lr=0.1))


@fault("C25e", "C11", "C25", "C11b")
def exploding_recurrence() -> Program:
    """A plain RNN with ReLU and weights from N(0, 1) over forty steps."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.out = nn.RNN(4, 64, nonlinearity="relu", batch_first=True), nn.Linear(64, 3)
            nn.init.normal_(self.rnn.weight_hh_l0)

        def forward(self, x):
            return self.out(self.rnn(x)[0][:, -1])

    model = Net()
    return Program(model, nn.CrossEntropyLoss(), (torch.randn(16, 40, 4), torch.randint(3, (16,))), _adam(model))


@fault("C25d")
def detached_features() -> Program:
    """.detach() between two parts that should both learn; the optimizer has both."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = nn.Sequential(nn.Linear(16, 32), nn.ReLU()), nn.Linear(32, 4)

        def forward(self, x):
            return self.head(self.encoder(x).detach())

    model = Net()
    return Program(model, nn.CrossEntropyLoss(), _batch(), _adam(model))


@fault("C25d")
def data_in_the_forward() -> Program:
    """.data in the middle of the forward, from code for old versions."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)

        def forward(self, x):
            features = F.relu(self.conv(x)).data
            return self.fc(features.mean((2, 3)))

    model = Net()
    return Program(model, nn.CrossEntropyLoss(), (torch.randn(16, 3, 8, 8), torch.randint(4, (16,))), _adam(model))


@fault("C25d")
def tensor_made_anew() -> Program:
    """torch.tensor(x.tolist()) for a change of type cuts the graph."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 4)

        def forward(self, x):
            return self.b(torch.tensor(F.relu(self.a(x)).tolist()))

    model = Net()
    return Program(model, nn.CrossEntropyLoss(), _batch(), _adam(model))


@fault("C25d")
def no_grad_in_the_forward() -> Program:
    """A no_grad block around an encoder that is meant to be fine-tuned."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = nn.GRU(8, 24, batch_first=True), nn.Linear(24, 4)

        def forward(self, x):
            with torch.no_grad():
                _, h = self.encoder(x)
            return self.head(h[-1])

    model = Net()
    return Program(model, nn.CrossEntropyLoss(), (torch.randn(16, 7, 8), torch.randint(4, (16,))), _adam(model))


@fault("C25")
def loss_without_graph() -> Program:
    """argmax of the outputs, compared with the labels as floats: backward() raises."""
    model = _mlp()
    return Program(model, lambda out, y: F.mse_loss(out.argmax(1).float(), y.float()), _batch(), _adam(model))


@fault("C25")
def accuracy_as_the_loss() -> Program:
    """1 - accuracy: no gradient at all."""
    model = _mlp()
    return Program(model, lambda out, y: 1 - (out.argmax(1) == y).float().mean(), _batch(), _adam(model))


@fault("C25b", "C25d", "C25")
def rounded_outputs() -> Program:
    """torch.round on the outputs: a graph whose gradient is 0 everywhere."""
    model = _mlp(outputs=1)
    batch = torch.randn(32, 16), torch.randint(4, (32, 1)).float()
    return Program(model, lambda out, y: F.mse_loss(torch.round(out), y), batch, _adam(model))


@fault("C25")
def root_at_zero() -> Program:
    """A distance of a pair of equal samples: the root's slope is infinite, and times 0 NaN."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))

        def forward(self, a, b):
            return ((self.net(a) - self.net(b)) ** 2).sum(1).sqrt()

    a = torch.randn(16, 16)
    b = torch.randn(16, 16)
    b[2] = a[2]
    model = Net()
    return Program(model, nn.MSELoss(), ((a, b), torch.rand(16)), _adam(model))


@fault("C25d")
def layer_used_twice_instead_of_another() -> Program:
    """bn1 is called in the place of bn2, by copy and paste."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
            self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
            self.fc = nn.Linear(8, 4)

        def forward(self, x):
            x = F.relu(self.bn1(self.conv1(x)))
            x = F.relu(self.bn1(self.conv2(x)))
            return self.fc(x.mean((2, 3)))

    model = Net()
    return Program(model, nn.CrossEntropyLoss(), (torch.randn(16, 3, 8, 8), torch.randint(4, (16,))), _adam(model))


@fault("C25b", "C25d")
def loss_of_the_wrong_head() -> Program:
    """A multiplication by a mask that is 0 everywhere: the loss is constant."""
    model = _mlp(outputs=1)

    def loss(out, y):
        mask = (y > 100).float()
        return ((out.squeeze(1) - y) ** 2 * mask).sum() / (mask.sum() + 1e-8) + 1.0

    return Program(model, loss, (torch.randn(32, 16), torch.randn(32)), _adam(model))
