"""What independent programs showed to be missed: answers in the wrong place, settings, what is kept or thrown away."""

import torch
import torch.nn.functional as F
from program import Program, fault
from torch import nn


def _mlp(inside, outputs, *end, width=32):
    return nn.Sequential(nn.Linear(inside, width), nn.ReLU(), nn.Linear(width, outputs), *end)


def _adam(model, lr=1e-3, **options):
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr, **options)


def _rows(classes=4, n=32):
    return torch.randn(n, 12), torch.randint(classes, (n,))


class Words(nn.Module):
    """Tokens to scores of tokens."""

    def __init__(self, both=False, words=30):
        super().__init__()
        self.embed = nn.Embedding(words, 16)
        self.rnn = nn.LSTM(16, 16, batch_first=True, bidirectional=both)
        self.head = nn.Linear(32 if both else 16, words)

    def forward(self, tokens):
        return self.head(self.rnn(self.embed(tokens))[0])


def _flat(y, t):
    return F.cross_entropy(y.flatten(0, 1), t.flatten())


# ---- axes, signs, answers


@fault("C36")
def classes_behind_time() -> Program:
    """(N, T, K) into the cross-entropy, and T is K."""
    model, text = Words(words=24), torch.randint(24, (16, 25))
    return Program(model, nn.CrossEntropyLoss(), (text[:, :-1], text[:, 1:]), _adam(model))


@fault("C36")
def view_of_channels_first() -> Program:
    """A segmentation's (N, K, H, W) flattened by view(-1, K): classes and pixels are mixed."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 1))
    batch = torch.randn(8, 3, 8, 8), torch.randint(4, (8, 8, 8))
    return Program(model, lambda y, t: F.cross_entropy(y.view(-1, 4), t.view(-1)), batch, _adam(model))


@fault("C37")
def likelihood_minimized() -> Program:
    """The mean log-probability of the right class, without a minus."""
    model = _mlp(12, 4)
    return Program(model, lambda y, t: y.log_softmax(1).gather(1, t[:, None]).mean(), _rows(), _adam(model))


@fault("C37")
def overlap_minimized() -> Program:
    """The Dice score itself as the loss."""

    def dice(y, t):
        p = torch.sigmoid(y)
        return ((2 * (p * t).sum((1, 2, 3)) + 1) / ((p + t).sum((1, 2, 3)) + 1)).mean()

    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 1))
    return Program(model, dice, (torch.randn(8, 3, 8, 8), (torch.rand(8, 1, 8, 8) < 0.3).float()), _adam(model))


@fault("C37")
def error_with_a_minus() -> Program:
    """The negative squared error: outputs run away from the targets."""
    x = torch.randn(32, 12)
    model = _mlp(12, 1)
    return Program(model, lambda y, t: -((y - t) ** 2).mean(), (x, x[:, :1] + 1), _adam(model))


@fault("C38")
def targets_are_the_tokens() -> Program:
    """Nobody shifted the targets: each position answers with what it has just read."""
    model, text = Words(), torch.randint(30, (16, 12))
    return Program(model, _flat, (text, text), _adam(model))


@fault("C38")
def next_word_in_both_directions() -> Program:
    """The second direction of a language model has read the next word."""
    model, text = Words(both=True), torch.randint(30, (16, 13))
    return Program(model, _flat, (text[:, :-1], text[:, 1:]), _adam(model))


@fault("C03b", also=("C11b",))
def logarithms_as_targets_of_kl() -> Program:
    """A teacher's log-probabilities as the target of kl_div, which takes their logarithm."""
    model, teacher = _mlp(12, 4), torch.randn(32, 4).log_softmax(1)
    batch = torch.randn(32, 12), teacher
    return Program(model, lambda y, t: F.kl_div(y.log_softmax(1), t, reduction="batchmean"), batch, _adam(model))


@fault("C15")
def one_class_counts() -> Program:
    """Class weights of 1 and 0."""
    model = _mlp(12, 2)
    return Program(model, nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.0])), _rows(2), _adam(model))


@fault("C15")
def a_thousand_units_for_four_classes() -> Program:
    """A pretrained net's head was left as it is."""
    model = _mlp(12, 1000)
    return Program(model, nn.CrossEntropyLoss(), _rows(), _adam(model))


# ---- settings


@fault("C26b", also=("C26",))
def decay_of_one() -> Program:
    """weight_decay=1 of Adam, which adds it to the gradient."""
    model = _mlp(12, 4)
    return Program(model, nn.CrossEntropyLoss(), _rows(), _adam(model, weight_decay=1.0))


@fault("C26b", also=("C26",))
def decay_of_five_with_adamw() -> Program:
    """A two-hundredth of every weight goes in each step."""
    model = _mlp(12, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=5.0)
    return Program(model, nn.CrossEntropyLoss(), _rows(), optimizer)


@fault("C27c")
def rate_of_zero() -> Program:
    """lr=0."""
    model = _mlp(12, 4)
    return Program(model, nn.CrossEntropyLoss(), _rows(), torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9))


@fault("C27d")
def momentum_of_the_second_beta() -> Program:
    """momentum=0.999."""
    model = _mlp(12, 4)
    return Program(model, nn.CrossEntropyLoss(), _rows(), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.999))


# ---- what is kept, changed, shared, thrown away


@fault("C39")
def state_with_its_graph() -> Program:
    """The LSTM's state is handed from batch to batch, and was not detached."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head, self.state = nn.LSTM(4, 16, batch_first=True), nn.Linear(16, 1), None

        def forward(self, x):
            y, self.state = self.rnn(x, self.state)
            return self.head(y[:, -1])

    model = Net()
    return Program(model, nn.MSELoss(), (torch.randn(16, 8, 4), torch.randn(16, 1)), _adam(model))


@fault("C40")
def normalized_in_place() -> Program:
    """x.sub_(mean).div_(std) in forward: the data set in memory is normalized again in each epoch."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = _mlp(12, 4)

        def forward(self, x):
            return self.net(x.sub_(0.5).div_(0.25))

    model = Net()
    return Program(model, nn.CrossEntropyLoss(), (torch.rand(32, 12), torch.randint(4, (32,))), _adam(model))


@fault("C41")
def blocks_times_four() -> Program:
    """nn.ModuleList([block] * 4)."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            block = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
            self.embed, self.blocks, self.head = nn.Linear(6, 16), nn.ModuleList([block] * 4), nn.Linear(16, 4)

        def forward(self, x):
            x = self.embed(x)
            for block in self.blocks:
                x = block(x)
            return self.head(x.mean(1))

    model = Net()
    return Program(model, nn.CrossEntropyLoss(), (torch.randn(16, 9, 6), torch.randint(4, (16,))), _adam(model))


@fault("C42", also=("C16",))
def norm_behind_the_prediction() -> Program:
    """BatchNorm1d(1) behind the last layer of a regression."""
    x = torch.randn(32, 12)
    model = _mlp(12, 1, nn.BatchNorm1d(1))
    return Program(model, nn.MSELoss(), (x, 2 * x[:, :1] + 5), _adam(model))


@fault("C25d")
def branch_that_goes_nowhere() -> Program:
    """The second layer's result has a name, and is not what goes on."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Linear(12, 32), nn.Linear(32, 32), nn.Linear(32, 4)

        def forward(self, x):
            x = F.relu(self.first(x))
            y = F.relu(self.second(x))  # noqa: F841
            return self.head(x)

    model = Net()
    return Program(model, nn.CrossEntropyLoss(), _rows(), _adam(model))


# ---- a second round


@fault("C02b")
def tanh_before_bce_with_logits() -> Program:
    """The last layer of a binary classifier ends in a tanh."""
    model = _mlp(12, 1, nn.Tanh(), nn.Flatten(0))
    return Program(model, nn.BCEWithLogitsLoss(), (torch.randn(32, 12), torch.randint(2, (32,)).float()), _adam(model))


@fault("C10")
def gelu_before_bce_with_logits() -> Program:
    """An activation behind every layer: no logit is below -0.17."""
    model = _mlp(12, 1, nn.GELU(), nn.Flatten(0))
    return Program(model, nn.BCEWithLogitsLoss(), (torch.randn(32, 12), torch.randint(2, (32,)).float()), _adam(model))


@fault("C08")
def clamped_predictions() -> Program:
    """A regression's output is clamped to [0, 1], and its targets are not there."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = _mlp(12, 1)

        def forward(self, x):
            return self.net(x).clamp(0, 1)

    model = Net()
    return Program(model, nn.MSELoss(), (torch.randn(32, 12), 3 * torch.randn(32, 1)), _adam(model))


@fault("C08")
def capped_predictions() -> Program:
    """The output is capped at 1 from above only; most targets are larger."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = _mlp(12, 1)

        def forward(self, x):
            return torch.clamp(self.net(x), max=1.0)

    model = Net()
    return Program(model, nn.L1Loss(), (torch.randn(32, 12), torch.randn(32, 1) + 3), _adam(model))


@fault("C37")
def lower_bound_minimized() -> Program:
    """A variational autoencoder that minimizes the evidence's lower bound."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode, self.decode = nn.Linear(24, 8), nn.Linear(4, 24)

        def forward(self, x):
            mean, log_var = self.encode(x).chunk(2, 1)
            return self.decode(mean + torch.randn_like(mean) * (log_var / 2).exp()), mean, log_var

    def bound(output, x):
        logits, mean, log_var = output
        fit = -F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(1)
        return (fit + 0.5 * (1 + log_var - mean**2 - log_var.exp()).sum(1)).mean()

    model, x = Net(), torch.rand(32, 24)
    return Program(model, bound, (x, x), _adam(model))


@fault("C43")
def teacher_learns_from_its_student() -> Program:
    """The teacher is part of the model, and nothing keeps the gradient from it."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.teacher = nn.Linear(12, 4), _mlp(12, 4)

        def forward(self, x):
            return self.student(x), self.teacher(x)

    def loss(output, target):
        student, teacher = output
        soft = F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="batchmean")
        return soft + F.cross_entropy(student, target)

    model = Net()
    return Program(model, loss, _rows(), _adam(model))


@fault("C44")
def channels_moved_by_a_view() -> Program:
    """Images as (N, H, W, 3) become (N, 3, H, W) by view."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

        def forward(self, x):
            n, h, w, c = x.shape
            return self.head(F.relu(self.conv(x.view(n, c, h, w))).mean((2, 3)))

    model = Net()
    return Program(model, nn.CrossEntropyLoss(), (torch.randn(16, 10, 10, 3), torch.randint(4, (16,))), _adam(model))
