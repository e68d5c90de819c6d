"""Rows of numbers and categories; heads and losses of all sorts."""

import math

import torch
import torch.nn.functional as F
from program import Program
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def _rows(n=64, features=10):
    x = torch.randn(n, features)
    return x, x @ torch.linspace(-0.6, 0.6, features) + 0.1 * torch.randn(n)


def _mlp(outputs, features=10, width=32):
    return nn.Sequential(
        nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)
    )


def linear_regression() -> Program:
    x, y = _rows()
    model = nn.Linear(10, 1)
    return Program(model, nn.MSELoss(), (x, y.unsqueeze(1)), torch.optim.SGD(model.parameters(), lr=0.01))


def logistic_regression() -> Program:
    """A sigmoid in the model and BCELoss: old, and right."""
    x, y = _rows()
    model = nn.Sequential(nn.Linear(10, 1), nn.Sigmoid())
    batch = x, (y > 0).float().unsqueeze(1)
    return Program(model, nn.BCELoss(), batch, torch.optim.SGD(model.parameters(), lr=0.1))


def regression() -> Program:
    """A loader whose last batch is smaller, with no batch norm to mind it."""
    x, y = _rows(100)
    model = _mlp(1)
    loader = DataLoader(TensorDataset(x, y.unsqueeze(1)), batch_size=32, shuffle=True)
    return Program(model, nn.MSELoss(), None, torch.optim.Adam(model.parameters(), lr=1e-3), loader)


def regression_with_batch_norm() -> Program:
    """Norm in front of the activation, dropout behind it, and the small last batch is dropped."""
    x, y = _rows(129)
    model = nn.Sequential(
        nn.Linear(10, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32, bias=False),
        nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 1), nn.Flatten(0),
    )  # fmt: skip
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True, drop_last=True)
    return Program(model, nn.SmoothL1Loss(), None, torch.optim.AdamW(model.parameters(), lr=1e-3), loader)


def iris() -> Program:
    """Four features in centimetres, as they are in the file: means of 1 to 6, deviations of 0.4 to 1.8."""
    mean, std = torch.tensor([5.84, 3.05, 3.76, 1.2]), torch.tensor([0.83, 0.43, 1.76, 0.76])
    x = mean + std * torch.randn(50, 4)
    model = _mlp(3, 4, 16)
    return Program(
        model, nn.CrossEntropyLoss(), (x, torch.randint(3, (50,))), torch.optim.Adam(model.parameters(), lr=0.01)
    )


class Entities(nn.Module):
    def __init__(self):
        super().__init__()
        self.embeddings = nn.ModuleList([nn.Embedding(size, min(8, (size + 1) // 2)) for size in (7, 12, 31)])
        self.numbers = nn.BatchNorm1d(5)
        self.layers = nn.Sequential(nn.Linear(4 + 6 + 8 + 5, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 1))

    def forward(self, categories, numbers):
        x = [embedding(categories[:, i]) for i, embedding in enumerate(self.embeddings)]
        return self.layers(torch.cat([*x, self.numbers(numbers)], 1)).squeeze(-1)


def categories_and_numbers() -> Program:
    """Embeddings of categories; numbers in their own units go through a batch norm first."""
    categories = torch.stack([torch.randint(size, (64,)) for size in (7, 12, 31)], 1)
    numbers = torch.randn(64, 5) * torch.tensor([1.0, 20.0, 3e4, 0.1, 5.0]) + torch.tensor([0.0, 40.0, 5e4, 0.5, 10.0])
    model = Entities()
    return Program(
        model,
        nn.BCEWithLogitsLoss(),
        (categories, numbers, torch.randint(2, (64,)).float()),
        torch.optim.Adam(model.parameters(), lr=1e-3),
    )


def tasks_in_a_dict() -> Program:
    """A regression, a classification and a binary head on one trunk."""

    class Tasks(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk = nn.Sequential(nn.Linear(10, 32), nn.ReLU())
            self.heads = nn.ModuleDict({"age": nn.Linear(32, 1), "kind": nn.Linear(32, 5), "sold": nn.Linear(32, 1)})

        def forward(self, x):
            x = self.trunk(x)
            return {name: head(x) for name, head in self.heads.items()}

    def loss(out, y):
        return (
            F.mse_loss(out["age"].squeeze(1), y["age"])
            + F.cross_entropy(out["kind"], y["kind"])
            + F.binary_cross_entropy_with_logits(out["sold"][:, 0], y["sold"])
        )

    model = Tasks()
    y = {"age": torch.randn(64), "kind": torch.randint(5, (64,)), "sold": torch.randint(2, (64,)).float()}
    return Program(model, loss, (_rows()[0], y), torch.optim.Adam(model.parameters(), lr=1e-3))


def uncertainty_weighting() -> Program:
    """The weights of two losses are parameters, of a module that holds them and the net."""

    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.log_vars = _mlp(4), nn.Parameter(torch.zeros(2))

        def forward(self, x):
            out = self.net(x)
            return out[:, :1], out[:, 1:], self.log_vars

    def loss(output, target):
        value, logits, log_vars = output
        losses = torch.stack([F.mse_loss(value, target[0]), F.cross_entropy(logits, target[1])])
        return (torch.exp(-log_vars) * losses + log_vars).sum()

    model = Weighted()
    batch = torch.randn(64, 10), (torch.randn(64, 1), torch.randint(3, (64,)))
    return Program(model, loss, batch, torch.optim.Adam(model.parameters(), lr=1e-3))


def multi_label() -> Program:
    x, _ = _rows()
    model = _mlp(8)
    return Program(
        model, nn.MultiLabelSoftMarginLoss(), (x, (torch.rand(64, 8) < 0.3).float()),
        torch.optim.Adam(model.parameters(), lr=1e-3),
    )  # fmt: skip


def ordinal() -> Program:
    """K - 1 binary questions with a shared slope (CORAL)."""

    class Coral(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.bias = _mlp(1), nn.Parameter(torch.arange(4, 0, -1.0) / 4)

        def forward(self, x):
            return self.net(x) + self.bias

    def loss(logits, rank):
        levels = (rank[:, None] > torch.arange(4)).float()
        return F.binary_cross_entropy_with_logits(logits, levels)

    model = Coral()
    batch = _rows()[0], torch.randint(5, (64,))
    return Program(model, loss, batch, torch.optim.Adam(model.parameters(), lr=1e-3))


def poisson() -> Program:
    """Counts; the model gives the logarithm of the rate."""
    x, y = _rows()
    model = _mlp(1)
    batch = x, torch.poisson(y.clamp(-2, 2).exp()).unsqueeze(1)
    return Program(model, nn.PoissonNLLLoss(), batch, torch.optim.Adam(model.parameters(), lr=1e-3))


def gaussian() -> Program:
    """Mean and variance of each target."""

    class MeanVariance(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.mean, self.var = nn.Linear(10, 32), nn.Linear(32, 1), nn.Linear(32, 1)

        def forward(self, x):
            x = torch.tanh(self.body(x))
            return self.mean(x), F.softplus(self.var(x)) + 1e-3

    x, y = _rows()
    model = MeanVariance()
    return Program(
        model,
        lambda out, target: F.gaussian_nll_loss(out[0], target, out[1]),
        (x, y.unsqueeze(1)),
        torch.optim.Adam(model.parameters(), lr=1e-3),
    )


def survival() -> Program:
    """Cox's partial likelihood: the risk of each against those still there."""

    def loss(risk, target):
        time, event = target
        order = time.argsort(descending=True)
        risk, event = risk.squeeze(1)[order], event[order]
        return -((risk - torch.logcumsumexp(risk, 0)) * event).sum() / event.sum()

    model = _mlp(1)
    batch = _rows()[0], (torch.rand(64) * 10, (torch.rand(64) < 0.6).float())
    return Program(model, loss, batch, torch.optim.Adam(model.parameters(), lr=1e-3))


def mixture_density() -> Program:
    """Three Gaussians: weights by a softmax, the likelihood by a logsumexp."""

    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(10, 32), nn.Tanh())
            self.weights, self.means, self.scales = (nn.Linear(32, 3) for _ in range(3))

        def forward(self, x):
            x = self.body(x)
            return F.softmax(self.weights(x), dim=1), self.means(x), torch.exp(self.scales(x))

    def loss(output, y):
        weights, means, scales = output
        log = -0.5 * ((y - means) / scales) ** 2 - scales.log() - 0.5 * math.log(2 * math.pi)
        return -torch.logsumexp(weights.log() + log, dim=1).mean()

    x, y = _rows()
    model = Mixture()
    return Program(model, loss, (x, y.unsqueeze(1)), torch.optim.Adam(model.parameters(), lr=1e-3))


def focal() -> Program:
    """Focal loss by hand on probabilities from a softmax that is not in the model."""

    def loss(logits, target):
        ce = F.cross_entropy(logits, target, reduction="none")
        return ((1 - torch.exp(-ce)) ** 2 * ce).mean()

    model = _mlp(4)
    return Program(model, loss, (_rows()[0], torch.randint(4, (64,))), torch.optim.Adam(model.parameters(), lr=1e-3))


def rare_positives() -> Program:
    """Two of a hundred: the loss starts above the entropy of the labels."""
    y = torch.zeros(100, 1)
    y[:2] = 1
    model = _mlp(1)
    loss = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([49.0]))
    return Program(model, loss, (torch.randn(100, 10), y), torch.optim.Adam(model.parameters(), lr=1e-3))


def hinge() -> Program:
    """A linear support vector machine: labels of -1 and 1, margins by hand."""
    x, y = _rows()
    model = nn.Linear(10, 1)
    return Program(
        model,
        lambda out, target: F.relu(1 - target * out.squeeze(1)).mean() + 1e-3 * model.weight.square().sum(),
        (x, y.sign()),
        torch.optim.SGD(model.parameters(), lr=0.1),
    )


def self_normalizing() -> Program:
    """SELU, LeCun's initial weights, alpha dropout, nine layers and no norm."""
    layers, inside = [], 10
    for _ in range(8):
        layers += [nn.Linear(inside, 32), nn.SELU(), nn.AlphaDropout(0.05)]
        inside = 32
    model = nn.Sequential(*layers, nn.Linear(32, 2))
    for m in model:
        if isinstance(m, nn.Linear):
            nn.init.kaiming_normal_(m.weight, nonlinearity="linear")
            nn.init.zeros_(m.bias)
    return Program(
        model, nn.CrossEntropyLoss(), (_rows()[0], torch.randint(2, (64,))), torch.optim.Adam(model.parameters())
    )


class Factorization(nn.Module):
    def __init__(self, users=40, items=60, width=8):
        super().__init__()
        self.users, self.items = nn.Embedding(users, width), nn.Embedding(items, width)
        self.user_bias, self.item_bias = nn.Embedding(users, 1), nn.Embedding(items, 1)
        for table in (self.users, self.items):
            nn.init.normal_(table.weight, std=0.1)
        for table in (self.user_bias, self.item_bias):
            nn.init.zeros_(table.weight)
        self.mean = 3.5

    def forward(self, user, item):
        product = (self.users(user) * self.items(item)).sum(1)
        return self.mean + product + self.user_bias(user).squeeze(1) + self.item_bias(item).squeeze(1)


def ratings() -> Program:
    """Matrix factorization of ratings from 1 to 5, around their mean."""
    batch = torch.randint(40, (128,)), torch.randint(60, (128,)), torch.randint(1, 6, (128,)).float()
    model = Factorization()
    return Program(model, nn.MSELoss(), batch, torch.optim.Adam(model.parameters(), lr=5e-3, weight_decay=1e-5))


def clicks() -> Program:
    """A factorization machine with a deep part; only ids in."""

    class DeepFM(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.linear = nn.Embedding(200, 8), nn.Embedding(200, 1)
            nn.init.normal_(self.embedding.weight, std=0.01)
            self.deep = nn.Sequential(nn.Linear(40, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 1))
            self.bias = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            v = self.embedding(x)
            pairs = 0.5 * (v.sum(1) ** 2 - (v**2).sum(1)).sum(1, keepdim=True)
            logit = self.bias + self.linear(x).sum(1) + pairs + self.deep(v.flatten(1))
            return torch.sigmoid(logit.squeeze(1))

    x = torch.randint(40, (128, 5)) + 40 * torch.arange(5)
    model = DeepFM()
    batch = x, (torch.rand(128) < 0.2).float()
    return Program(model, nn.BCELoss(), batch, torch.optim.Adam(model.parameters(), lr=1e-3))


def anomaly_autoencoder() -> Program:
    x = torch.randn(64, 12)
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3), nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 12))
    return Program(model, nn.MSELoss(), (x, x), torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-5))


def ranked_pairs() -> Program:
    """Pairs of items and a margin ranking loss; the same net scores both."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.score = _mlp(1)

        def forward(self, a, b):
            return self.score(a).squeeze(1), self.score(b).squeeze(1)

    model = Pair()
    batch = torch.randn(64, 10), torch.randn(64, 10), torch.randint(2, (64,)).float() * 2 - 1
    return Program(
        model,
        lambda out, y: F.margin_ranking_loss(out[0], out[1], y, margin=0.5),
        batch,
        torch.optim.Adam(model.parameters(), lr=1e-3),
    )
