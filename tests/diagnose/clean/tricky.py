"""Hard negatives: each looks like a fault, and is none. The docstring says why."""

import torch
import torch.nn.functional as F
from program import Program
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def _data(n=32, classes=4):
    return torch.randn(n, 12), torch.randint(classes, (n,))


def _mlp(outputs, *end):
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, outputs), *end)


def log_softmax_into_cross_entropy() -> Program:
    """The log-softmax of log-probabilities is themselves: the loss is the same (an info is right)."""
    model = _mlp(4, nn.LogSoftmax(dim=1))
    return Program(model, nn.CrossEntropyLoss(), _data(), torch.optim.Adam(model.parameters(), lr=1e-3))


def sigmoid_for_metrics_only() -> Program:
    """The model returns probabilities, too, and the loss takes the logits."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = _mlp(1)

        def forward(self, x):
            logits = self.net(x).squeeze(1)
            return {"logits": logits, "probabilities": torch.sigmoid(logits)}

    model = Both()
    x, y = _data(classes=2)
    return Program(
        model,
        lambda out, target: F.binary_cross_entropy_with_logits(out["logits"], target),
        (x, y.float()),
        torch.optim.Adam(model.parameters(), lr=1e-3),
    )


def accuracy_inside_of_the_loss() -> Program:
    """A softmax in the loss function that only a metric uses."""
    seen = []

    def loss(logits, target):
        p = F.softmax(logits, dim=1)
        seen.append((p.argmax(1) == target).float().mean())
        return F.cross_entropy(logits, target)

    model = _mlp(4)
    return Program(model, loss, _data(), torch.optim.Adam(model.parameters(), lr=1e-3))


def one_hot_targets() -> Program:
    """Float rows are probabilities, which cross_entropy takes."""
    x, y = _data()
    model = _mlp(4)
    return Program(
        model, nn.CrossEntropyLoss(), (x, F.one_hot(y, 4).float()), torch.optim.Adam(model.parameters(), lr=1e-3)
    )


def temperature_in_attention() -> Program:
    """A softmax inside of the model, over time, is attention."""

    class Pooling(nn.Module):
        def __init__(self):
            super().__init__()
            self.score, self.temperature = nn.Linear(8, 1), 0.5
            self.out = nn.Linear(8, 4)

        def forward(self, x):
            weights = F.softmax(self.score(x) / self.temperature, dim=1)
            return self.out((weights * x).sum(1))

    model = Pooling()
    batch = torch.randn(32, 6, 8), torch.randint(4, (32,))
    return Program(model, nn.CrossEntropyLoss(), batch, torch.optim.Adam(model.parameters(), lr=1e-3))


def attention_over_one_key() -> Program:
    """Sequences of length one in this batch: the softmax over keys is 1, and the queries have no gradient."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            weights = F.softmax(self.q(x) @ self.k(x).transpose(1, 2) / 8**0.5, dim=-1)
            return self.head((x + self.out(weights @ self.v(x))).mean(1))

    model = Attention()
    batch = torch.randn(32, 1, 8), torch.randint(4, (32,))
    return Program(model, nn.CrossEntropyLoss(), batch, torch.optim.Adam(model.parameters(), lr=1e-3))


def tanh_head() -> Program:
    """All targets are inside of (-1, 1)."""
    model = _mlp(2, nn.Tanh())
    batch = torch.randn(32, 12), torch.rand(32, 2) * 2 - 1
    return Program(model, nn.MSELoss(), batch, torch.optim.Adam(model.parameters(), lr=1e-3))


def relu_head_for_counts() -> Program:
    """Targets are counts, none below 0."""
    model = _mlp(1, nn.ReLU())
    nn.init.ones_(model[2].bias)
    batch = torch.randn(32, 12), torch.poisson(torch.full((32, 1), 2.0))
    return Program(model, nn.MSELoss(), batch, torch.optim.Adam(model.parameters(), lr=1e-3))


def batch_norm_on_two_large_images() -> Program:
    """Two samples, and 1024 values a channel."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    batch = torch.randn(2, 3, 32, 32), torch.randint(4, (2, 32, 32))
    return Program(model, nn.CrossEntropyLoss(), batch, torch.optim.Adam(model.parameters(), lr=1e-3))


def last_batch_of_one_image() -> Program:
    """The last batch has one image, whose 64 positions are enough for the norm."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4),
    )  # fmt: skip
    data = TensorDataset(torch.randn(33, 3, 8, 8), torch.randint(4, (33,)))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    return Program(model, nn.CrossEntropyLoss(), None, optimizer, DataLoader(data, batch_size=16))


def sum_divided_by_hand() -> Program:
    """reduction='sum', then divided by the number of samples."""
    model = _mlp(4)
    return Program(
        model,
        lambda logits, y: F.cross_entropy(logits, y, reduction="sum") / len(y),
        _data(),
        torch.optim.Adam(model.parameters(), lr=1e-3),
    )


def functional_dropout() -> Program:
    """F.dropout that knows of self.training."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(12, 32), nn.Linear(32, 4)

        def forward(self, x):
            return self.b(F.dropout(F.relu(self.a(x)), 0.5, self.training))

    model = Net()
    return Program(model, nn.CrossEntropyLoss(), _data(), torch.optim.Adam(model.parameters(), lr=1e-3))


def monte_carlo_dropout() -> Program:
    """Dropout that is always on, and says so: training=True, with an average over samples in evaluation."""

    class MonteCarlo(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(12, 32), nn.Linear(32, 4)

        def forward(self, x):
            if self.training:
                return self.b(F.dropout(F.relu(self.a(x)), p=0.2, training=True))
            return torch.stack([self.b(F.dropout(F.relu(self.a(x)), p=0.2, training=True)) for _ in range(50)]).mean(0)

    model = MonteCarlo()
    return Program(model, nn.CrossEntropyLoss(), _data(), torch.optim.Adam(model.parameters(), lr=1e-3))


def sigmoid_and_squared_error() -> Program:
    """Targets are shares in [0, 1]."""
    model = _mlp(3, nn.Sigmoid())
    batch = torch.randn(32, 12), torch.rand(32, 3)
    return Program(model, nn.MSELoss(), batch, torch.optim.Adam(model.parameters(), lr=1e-3))


def brier_score() -> Program:
    """A squared error of one probability against 0 and 1 is a proper score, and used."""
    model = _mlp(1, nn.Sigmoid())
    x, y = _data(classes=2)
    return Program(model, nn.MSELoss(), (x, y.float().unsqueeze(1)), torch.optim.Adam(model.parameters(), lr=1e-3))


def zero_initialized_branch() -> Program:
    """A residual branch starts at zero (ReZero, Fixup): its inner layers have no gradient in the first step."""

    class ReZero(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.alpha = nn.Linear(12, 32), nn.Linear(32, 12), nn.Parameter(torch.zeros(1))
            self.head = nn.Linear(12, 4)

        def forward(self, x):
            return self.head(x + self.alpha * self.b(F.relu(self.a(x))))

    model = ReZero()
    return Program(model, nn.CrossEntropyLoss(), _data(), torch.optim.Adam(model.parameters(), lr=1e-3))


def zero_initialized_head() -> Program:
    """The last layer starts at zero: every class has the same probability, and learns from the first step."""
    model = _mlp(4)
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    return Program(model, nn.CrossEntropyLoss(), _data(), torch.optim.Adam(model.parameters(), lr=1e-3))


def logistic_regression_from_zero() -> Program:
    """One linear layer from zeros: the problem is convex, and symmetry does no harm."""
    model = nn.Linear(12, 4)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return Program(model, nn.CrossEntropyLoss(), _data(), torch.optim.SGD(model.parameters(), lr=0.1))


def tied_autoencoder() -> Program:
    """One matrix for both ways."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 12) * 0.2)
            self.up, self.down = nn.Parameter(torch.zeros(6)), nn.Parameter(torch.zeros(12))

        def forward(self, x):
            return F.linear(torch.tanh(F.linear(x, self.weight, self.up)), self.weight.t(), self.down)

    x = torch.randn(32, 12)
    model = Tied()
    return Program(model, nn.MSELoss(), (x, x), torch.optim.Adam(model.parameters(), lr=1e-3))


def head_for_another_task() -> Program:
    """Batches of two tasks alternate; this one is of the first, and the other head has no gradient."""

    class TwoTasks(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk = nn.Linear(12, 32)
            self.heads = nn.ModuleDict({"a": nn.Linear(32, 4), "b": nn.Linear(32, 7)})

        def forward(self, x, task="a"):
            return self.heads[task](F.relu(self.trunk(x)))

    model = TwoTasks()
    return Program(model, nn.CrossEntropyLoss(), _data(), torch.optim.Adam(model.parameters(), lr=1e-3))


def one_sample_and_layer_norm() -> Program:
    """A batch of one needs no batch: layer norm is over features."""
    model = nn.Sequential(nn.Linear(12, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 4))
    return Program(model, nn.CrossEntropyLoss(), _data(1), torch.optim.Adam(model.parameters(), lr=1e-3))


def centered_over_the_batch() -> Program:
    """Features minus their mean over the batch, which is a feature of the model."""

    class Centered(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(12, 32), nn.Linear(32, 4)
            self.register_buffer("mean", torch.zeros(32))

        def forward(self, x):
            h = F.relu(self.a(x))
            if self.training:
                center = h.mean(0)
                self.mean.lerp_(center.detach(), 0.1)
            else:
                center = self.mean
            return self.b(h - center)

    model = Centered()
    return Program(model, nn.CrossEntropyLoss(), _data(), torch.optim.Adam(model.parameters(), lr=1e-3))


def target_in_its_own_units() -> Program:
    """House prices of 180000 +- 80000, and a model whose output is scaled to them."""

    class Prices(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = _mlp(1)

        def forward(self, x):
            return 180_000 + 80_000 * self.net(x).squeeze(1)

    model = Prices()
    x = torch.randn(32, 12)
    y = 180_000 + 80_000 * torch.randn(32)
    return Program(
        model,
        lambda out, t: F.mse_loss(out / 80_000, t / 80_000),
        (x, y),
        torch.optim.Adam(model.parameters(), lr=1e-3),
    )


def logarithm_in_the_loss() -> Program:
    """Targets over five decades, compared in logarithms."""
    model = _mlp(1, nn.Flatten(0))
    batch = torch.randn(32, 12), torch.exp(2 + 2 * torch.randn(32))
    return Program(
        model, lambda out, y: F.mse_loss(out, torch.log1p(y)), batch, torch.optim.Adam(model.parameters(), lr=1e-3)
    )


def labels_as_column() -> Program:
    """(N, 1) against (N, 1): nothing is broadcast."""
    model = _mlp(1)
    x, y = _data(classes=2)
    return Program(
        model, nn.BCEWithLogitsLoss(), (x, y.float().view(-1, 1)), torch.optim.Adam(model.parameters(), lr=1e-3)
    )


def weights_of_samples() -> Program:
    """A loss of each sample times its weight, both (N,)."""
    model = _mlp(1, nn.Flatten(0))

    def loss(out, target):
        y, weight = target
        return (weight * (out - y) ** 2).sum() / weight.sum()

    batch = torch.randn(32, 12), (torch.randn(32), torch.rand(32))
    return Program(model, loss, batch, torch.optim.Adam(model.parameters(), lr=1e-3))


def one_target_for_all_pixels() -> Program:
    """A patch discriminator: a map of logits against one number a sample, expanded on purpose."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 3, 2, 1))
    x, y = torch.randn(8, 3, 16, 16), torch.randint(2, (8, 1, 1, 1)).float()
    return Program(
        model,
        lambda out, t: F.mse_loss(out, t.expand_as(out)),
        (x, y),
        torch.optim.Adam(model.parameters(), lr=2e-4),
    )


def bilinear_upsampling_weights() -> Program:
    """A transposed convolution that starts as bilinear upsampling: its channels are alike by design."""
    up = nn.ConvTranspose2d(4, 4, 4, 2, 1, bias=False)
    line = torch.tensor([0.25, 0.75, 0.75, 0.25])
    with torch.no_grad():
        up.weight.zero_()
        up.weight[range(4), range(4)] = torch.outer(line, line)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 4, 1), up)
    batch = torch.randn(4, 3, 16, 16), torch.randint(4, (4, 16, 16))
    return Program(model, nn.CrossEntropyLoss(), batch, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))


def identity_initialization() -> Program:
    """A recurrent net whose matrix starts as the identity (IRNN)."""

    class IRNN(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.out = nn.RNN(2, 24, nonlinearity="relu", batch_first=True), nn.Linear(24, 1)
            nn.init.eye_(self.rnn.weight_hh_l0)
            nn.init.zeros_(self.rnn.bias_hh_l0)
            nn.init.normal_(self.rnn.weight_ih_l0, std=0.05)

        def forward(self, x):
            return self.out(self.rnn(x)[1][-1]).squeeze(1)

    x = torch.rand(32, 10, 2)
    model = IRNN()
    return Program(model, nn.MSELoss(), (x, x[..., 0].mean(1)), torch.optim.Adam(model.parameters(), lr=1e-3))


def constant_features() -> Program:
    """One-hot categories of which most columns are 0 in this batch, and a column of ones."""
    x = torch.cat([F.one_hot(torch.randint(3, (32,)), 40).float(), torch.ones(32, 1), torch.randn(32, 4)], 1)
    model = nn.Sequential(nn.Linear(45, 32), nn.ReLU(), nn.Linear(32, 4))
    return Program(
        model, nn.CrossEntropyLoss(), (x, torch.randint(4, (32,))), torch.optim.Adam(model.parameters(), lr=1e-3)
    )


def word_counts() -> Program:
    """Bags of words: sparse counts, nearly all 0."""
    x = torch.poisson(torch.full((32, 300), 0.03))
    model = nn.Sequential(nn.Linear(300, 32), nn.ReLU(), nn.Linear(32, 4))
    return Program(
        model, nn.CrossEntropyLoss(), (x, torch.randint(4, (32,))), torch.optim.Adam(model.parameters(), lr=1e-3)
    )


def imbalanced_batch() -> Program:
    """Nine of ten labels are of one class, and the loss starts near ln 2 all the same."""
    model = _mlp(2)
    y = (torch.arange(60) % 10 == 0).long()
    return Program(
        model, nn.CrossEntropyLoss(), (torch.randn(60, 12), y), torch.optim.Adam(model.parameters(), lr=1e-3)
    )


def residual_of_zero() -> Program:
    """The net predicts a correction of a baseline that is in the input."""

    class Correction(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = _mlp(1)

        def forward(self, x, baseline):
            return baseline + self.net(x)

    baseline = torch.randn(32, 1)
    model = Correction()
    batch = (torch.randn(32, 12), baseline), baseline + 0.1 * torch.randn(32, 1)
    return Program(model, nn.MSELoss(), batch, torch.optim.Adam(model.parameters(), lr=1e-3))


def several_optimizers() -> Program:
    """The body's parameters are another optimizer's; `check` is told of both groups through one list of groups."""
    model = _mlp(4)
    optimizer = torch.optim.Adam(
        [{"params": model[0].parameters(), "lr": 1e-4}, {"params": model[2].parameters(), "lr": 1e-3}]
    )
    return Program(model, nn.CrossEntropyLoss(), _data(), optimizer)


def momentum_for_large_data() -> Program:
    """Batch norm with the momentum 0.01 and the eps 1e-3 of Keras' 0.99."""
    model = nn.Sequential(
        nn.Linear(12, 32, bias=False), nn.BatchNorm1d(32, eps=1e-3, momentum=0.01), nn.ReLU(), nn.Linear(32, 4)
    )
    return Program(model, nn.CrossEntropyLoss(), _data(), torch.optim.Adam(model.parameters(), lr=1e-3))


def averaged_statistics() -> Program:
    """momentum=None: running statistics are the mean over all batches."""
    model = nn.Sequential(nn.Linear(12, 32, bias=False), nn.BatchNorm1d(32, momentum=None), nn.ReLU(), nn.Linear(32, 4))
    return Program(model, nn.CrossEntropyLoss(), _data(), torch.optim.Adam(model.parameters(), lr=1e-3))


def instance_norm_for_style() -> Program:
    """Instance norm on images of 16 by 16, reflections, and outputs as images."""
    model = nn.Sequential(
        nn.ReflectionPad2d(2), nn.Conv2d(3, 8, 5), nn.InstanceNorm2d(8, affine=True), nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2, 1), nn.InstanceNorm2d(8, affine=True), nn.ReLU(), nn.Upsample(scale_factor=2),
        nn.ReflectionPad2d(2), nn.Conv2d(8, 3, 5),
    )  # fmt: skip
    x = torch.rand(2, 3, 16, 16)
    return Program(model, nn.L1Loss(), (x, x), torch.optim.Adam(model.parameters(), lr=1e-3))


def concatenated_halves() -> Program:
    """Two halves of the features, reshaped and joined in another order: views, but within each sample."""

    class Shuffle(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=4)
            self.fc = nn.Linear(16, 4)

        def forward(self, x):
            x = F.relu(self.conv1(x))
            n, c, h, w = x.shape
            x = x.view(n, 4, c // 4, h, w).transpose(1, 2).reshape(n, c, h, w)
            return self.fc(F.relu(self.conv2(x)).mean((2, 3)))

    model = Shuffle()
    batch = torch.randn(8, 3, 8, 8), torch.randint(4, (8,))
    return Program(model, nn.CrossEntropyLoss(), batch, torch.optim.Adam(model.parameters(), lr=1e-3))


def noise_in_the_labels() -> Program:
    """Targets without any relation to the inputs: nothing a single batch can show to be wrong."""
    model = _mlp(1)
    return Program(
        model, nn.HuberLoss(), (torch.randn(32, 12), torch.randn(32, 1)), torch.optim.Adam(model.parameters(), lr=1e-3)
    )


def hard_sample_mining() -> Program:
    """Only the worst quarter of the samples counts."""

    def loss(logits, y):
        return F.cross_entropy(logits, y, reduction="none").topk(len(y) // 4)[0].mean()

    model = _mlp(4)
    return Program(model, loss, _data(), torch.optim.Adam(model.parameters(), lr=1e-3))


def l2_in_the_loss() -> Program:
    """A penalty on weights by hand, which does not grow with the batch."""
    model = _mlp(4)

    def loss(logits, y):
        return F.cross_entropy(logits, y) + 1e-3 * sum(p.square().sum() for p in model.parameters())

    return Program(model, loss, _data(), torch.optim.SGD(model.parameters(), lr=0.1))


def stop_gradient_on_attention() -> Program:
    """Gates are detached on purpose, and learn through an auxiliary loss."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.gate, self.head = nn.Linear(12, 32), nn.Linear(12, 32), nn.Linear(32, 4)

        def forward(self, x):
            gate = torch.sigmoid(self.gate(x))
            return self.head(F.relu(self.body(x)) * gate.detach()), gate

    def loss(output, y):
        logits, gate = output
        return F.cross_entropy(logits, y) + 0.01 * (gate.mean() - 0.5) ** 2

    model = Gated()
    return Program(model, loss, _data(), torch.optim.Adam(model.parameters(), lr=1e-3))


def large_vocabulary_small_batch() -> Program:
    """A thousand classes and 16 samples: most classes are absent."""
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 1000))
    return Program(model, nn.CrossEntropyLoss(), _data(16, 1000), torch.optim.Adam(model.parameters(), lr=1e-3))


def embedding_rows_without_gradient() -> Program:
    """Ten of ten thousand rows of a table are in the batch; all others have gradient 0."""
    model = nn.Sequential(nn.Embedding(10_000, 8), nn.Flatten(), nn.Linear(80, 4))
    batch = torch.randint(10_000, (8, 10)), torch.randint(4, (8,))
    return Program(model, nn.CrossEntropyLoss(), batch, torch.optim.Adam(model.parameters(), lr=1e-3))


def alternating_freezing() -> Program:
    """Gradual unfreezing: only the head learns now, the optimizer knows all parameters already."""
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    return Program(model, nn.CrossEntropyLoss(), _data(), torch.optim.Adam(model.parameters(), lr=1e-3))
