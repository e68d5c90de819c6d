"""Models that take the whole batch and return their loss, and what looks like a mixed-up target and is none."""

import copy
import math

import torch
import torch.nn.functional as F
from program import Program
from torch import nn


def _mlp(inside, outputs, *end, width=32):
    return nn.Sequential(nn.Linear(inside, width), nn.ReLU(), nn.Linear(width, outputs), *end)


def _adam(model, lr=1e-3):
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)


# ---- the loss comes from the model


def logits_and_loss() -> Program:
    """A small GPT: forward(tokens, targets=None) returns (logits, loss)."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(30, 16), nn.Linear(16, 30, bias=False)
            self.block = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, norm_first=True)
            nn.init.normal_(self.embed.weight, std=0.02)
            self.head.weight = self.embed.weight

        def forward(self, tokens, targets=None):
            mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
            logits = self.head(self.block(self.embed(tokens), src_mask=mask, is_causal=True))
            if targets is None:
                return logits, None
            return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    model, text = Net(), torch.randint(30, (8, 13))
    return Program(model, None, (text[:, :-1], text[:, 1:]), _adam(model))


def images_and_texts() -> Program:
    """Contrastive learning of pairs, with a learnt temperature: no target."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.image, self.text = _mlp(24, 16), _mlp(12, 16)
            self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

        def forward(self, image, text):
            a, b = F.normalize(self.image(image), dim=1), F.normalize(self.text(text), dim=1)
            scores, same = self.scale.exp() * a @ b.T, torch.arange(len(a))
            return (F.cross_entropy(scores, same) + F.cross_entropy(scores.T, same)) / 2

    model = Net()
    return Program(model, None, (torch.randn(32, 24), torch.randn(32, 12)), _adam(model))


def moving_average_with_norms() -> Program:
    """BYOL: a moving average in training mode, whose batch norms have statistics of their own."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.online = nn.Sequential(nn.Linear(24, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16))
            self.predict = _mlp(16, 16)
            self.slow = copy.deepcopy(self.online).requires_grad_(False)

        def forward(self, a, b):
            with torch.no_grad():
                y = self.slow(b)
            return 2 - 2 * F.cosine_similarity(self.predict(self.online(a)), y).mean()

    model = Net()
    return Program(model, None, (torch.randn(32, 24), torch.randn(32, 24)), _adam(model))


def triplets() -> Program:
    """Anchor, positive, negative."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = _mlp(12, 8)

        def forward(self, anchor, positive, negative):
            return F.triplet_margin_loss(self.embed(anchor), self.embed(positive), self.embed(negative))

    model = Net()
    return Program(model, None, tuple(torch.randn(16, 12) for _ in range(3)), _adam(model))


def margin_needs_labels() -> Program:
    """ArcFace: the margin is added to the angle of the right class, in the model."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.centres = _mlp(12, 8), nn.Parameter(torch.randn(5, 8))

        def forward(self, x, labels):
            cosine = F.linear(F.normalize(self.embed(x)), F.normalize(self.centres)).clamp(-0.999, 0.999)
            right = F.one_hot(labels, 5).bool()
            return F.cross_entropy(8 * torch.where(right, torch.cos(torch.acos(cosine) + 0.3), cosine), labels)

    model = Net()
    return Program(model, None, (torch.randn(32, 12), torch.randint(5, (32,))), _adam(model))


# ---- targets that are what they should be


def logarithms_of_prices() -> Program:
    """log1p(price) is around 12: a level that the bias grows to, and no scale."""
    x = torch.randn(64, 12)
    model = _mlp(12, 1)
    return Program(model, nn.MSELoss(), (x, 12 + 0.4 * x[:, :1]), _adam(model, 1e-2))


def start_and_end_of_a_span() -> Program:
    """A cross-entropy over positions, one for each of two units."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.rnn = nn.Embedding(40, 16), nn.GRU(16, 16, batch_first=True, bidirectional=True)
            self.ends = nn.Linear(32, 2)

        def forward(self, tokens):
            start, end = self.ends(self.rnn(self.embed(tokens))[0]).split(1, dim=-1)
            return start.squeeze(-1), end.squeeze(-1)

    model = Net()
    batch = torch.randint(40, (16, 20)), torch.randint(20, (16, 2))
    return Program(
        model, lambda y, t: F.cross_entropy(y[0], t[:, 0]) + F.cross_entropy(y[1], t[:, 1]), batch, _adam(model)
    )


def anchors_of_a_detector() -> Program:
    """Three anchors a place, five classes each: a view, a permutation, and a view again."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 15, 1)

        def forward(self, x):
            y = self.head(F.relu(self.body(x)))
            n, _, h, w = y.shape
            return y.view(n, 3, 5, h, w).permute(0, 3, 4, 1, 2).reshape(n, -1, 5)

    model = Net()
    batch = torch.randn(8, 3, 6, 6), torch.randint(5, (8, 108))
    return Program(model, lambda y, t: F.cross_entropy(y.flatten(0, 1), t.flatten()), batch, _adam(model))


def critic_with_signs() -> Program:
    """-1 for real and 1 for made: mean(output * sign), which is negative."""
    model = _mlp(12, 1, nn.Flatten(0))
    sign = torch.cat([-torch.ones(16), torch.ones(16)])
    return Program(model, lambda y, t: (y * t).mean(), (torch.randn(32, 12), sign), _adam(model, 1e-4))


def distances_to_centres() -> Program:
    """The output is a distance: the nearest centre is the class."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.centres = _mlp(12, 8), nn.Parameter(torch.randn(5, 8))

        def forward(self, x):
            return torch.cdist(self.embed(x), self.centres)

    model = Net()
    batch = torch.randn(32, 12), torch.randint(5, (32,))
    return Program(model, lambda y, t: F.cross_entropy(-y, t), batch, _adam(model))


def correlation_as_a_score() -> Program:
    """The negative correlation with the target, which is at least -1."""
    model = _mlp(12, 1, nn.Flatten(0))
    x = torch.randn(64, 12)
    return Program(model, lambda y, t: -torch.corrcoef(torch.stack([y, t]))[0, 1], (x, x[:, 0]), _adam(model))


def masked_words() -> Program:
    """A third of the tokens is hidden, and these are to be guessed by a model that sees both sides."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(31, 16), nn.Linear(16, 31)
            self.block = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)

        def forward(self, tokens):
            return self.head(self.block(self.embed(tokens)))

    model, text = Net(), torch.randint(30, (16, 12))
    hidden = torch.rand(16, 12) < 0.3
    batch = text.masked_fill(hidden, 30), text.masked_fill(~hidden, -100)
    return Program(model, lambda y, t: F.cross_entropy(y.transpose(1, 2), t), batch, _adam(model))


def sequence_through_a_bottleneck() -> Program:
    """The targets are the input: all of it goes through one vector."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.read = nn.Embedding(30, 16), nn.GRU(16, 24, batch_first=True)
            self.write, self.head = nn.GRU(24, 24, batch_first=True), nn.Linear(24, 30)

        def forward(self, tokens):
            state = self.read(self.embed(tokens))[1][-1]
            return self.head(self.write(state.unsqueeze(1).expand(-1, tokens.shape[1], -1))[0])

    model, text = Net(), torch.randint(30, (16, 12))
    return Program(model, lambda y, t: F.cross_entropy(y.flatten(0, 1), t.flatten()), (text, text), _adam(model))


# ---- what is kept, and what is there twice


def state_kept_without_a_graph() -> Program:
    """Truncated backpropagation: the state goes on, detached."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head, self.state = nn.GRU(4, 16, batch_first=True), nn.Linear(16, 1), None

        def forward(self, x):
            y, state = self.rnn(x, self.state)
            self.state = state.detach()
            return self.head(y[:, -1])

    model = Net()
    return Program(model, nn.MSELoss(), (torch.randn(16, 8, 4), torch.randn(16, 1)), _adam(model))


def features_kept_to_look_at() -> Program:
    """The last features are in an attribute, with their graph, and nobody uses them again."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(12, 16), nn.Linear(16, 4)

        def forward(self, x):
            self.features = F.relu(self.body(x))
            return self.head(self.features)

    model = Net()
    return Program(model, nn.CrossEntropyLoss(), (torch.randn(32, 12), torch.randint(4, (32,))), _adam(model))


def one_head_for_every_level() -> Program:
    """The same head stands three times in a list, and is used side by side."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.levels = nn.ModuleList([nn.Linear(12, 16) for _ in range(3)])
            self.heads = nn.ModuleList([nn.Linear(16, 4)] * 3)

        def forward(self, x):
            outputs = []
            for level, head in zip(self.levels, self.heads, strict=True):
                outputs.append(head(F.relu(level(x))))
            return outputs

    model = Net()
    batch = torch.randn(32, 12), torch.randint(4, (32,))
    return Program(model, lambda ys, t: sum(F.cross_entropy(y, t) for y in ys), batch, _adam(model))


def warm_up_from_nothing() -> Program:
    """A schedule that starts at a learning rate of 0."""
    model = _mlp(12, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 100))
    return Program(model, nn.CrossEntropyLoss(), (torch.randn(32, 12), torch.randint(4, (32,))), optimizer)
