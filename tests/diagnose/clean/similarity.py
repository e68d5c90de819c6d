"""Embeddings that are compared with each other."""

import torch
import torch.nn.functional as F
from program import Program
from torch import nn


def _encoder(width=16):
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(32, width),
    )  # fmt: skip


def siamese() -> Program:
    """Pairs, a shared encoder, the contrastive loss with a margin."""

    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = _encoder()

        def forward(self, a, b):
            return self.encoder(a), self.encoder(b)

    def loss(output, same):
        distance = F.pairwise_distance(*output)
        return (same * distance**2 + (1 - same) * F.relu(1 - distance) ** 2).mean()

    model = Siamese()
    batch = torch.randn(16, 3, 12, 12), torch.randn(16, 3, 12, 12), torch.randint(2, (16,)).float()
    return Program(model, loss, batch, torch.optim.Adam(model.parameters(), lr=1e-3))


def triplet() -> Program:
    class Triplet(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = _encoder()

        def forward(self, anchor, positive, negative):
            return tuple(F.normalize(self.encoder(x), dim=1) for x in (anchor, positive, negative))

    model = Triplet()
    batch = {name: torch.randn(16, 3, 12, 12) for name in ("anchor", "positive", "negative")}
    loss = nn.TripletMarginLoss(margin=0.2)
    return Program(model, lambda out: loss(*out), batch, torch.optim.Adam(model.parameters(), lr=1e-3))


def simclr() -> Program:
    """The other samples of the batch are the negatives: the loss mixes the batch, and shall."""

    class SimCLR(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.projection = _encoder(), nn.Sequential(nn.ReLU(), nn.Linear(16, 16))

        def forward(self, a, b):
            return F.normalize(self.projection(self.encoder(torch.cat([a, b]))), dim=1)

    def loss(z):
        n = len(z) // 2
        logits = (z @ z.t() / 0.5).masked_fill(torch.eye(2 * n, dtype=torch.bool), float("-inf"))
        return F.cross_entropy(logits, torch.cat([torch.arange(n, 2 * n), torch.arange(n)]))

    model = SimCLR()
    x = torch.randn(16, 3, 12, 12)
    batch = {"a": x + 0.1 * torch.randn_like(x), "b": x + 0.1 * torch.randn_like(x)}
    return Program(model, loss, batch, torch.optim.Adam(model.parameters(), lr=1e-3))


def clip() -> Program:
    """Similarities of all images with all texts come out of the model: row i is made of the whole batch."""

    class CLIP(nn.Module):
        def __init__(self):
            super().__init__()
            self.image, self.tokens, self.text = _encoder(), nn.Embedding(50, 16), nn.Linear(16, 16)
            self.scale = nn.Parameter(torch.tensor(2.659))

        def forward(self, images, tokens):
            a = F.normalize(self.image(images), dim=-1)
            b = F.normalize(self.text(self.tokens(tokens).mean(1)), dim=-1)
            logits = self.scale.exp() * a @ b.t()
            return logits, logits.t()

    def loss(output):
        labels = torch.arange(len(output[0]))
        return (F.cross_entropy(output[0], labels) + F.cross_entropy(output[1], labels)) / 2

    model = CLIP()
    batch = {"images": torch.randn(16, 3, 12, 12), "tokens": torch.randint(50, (16, 6))}
    return Program(model, loss, batch, torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.2))


def two_towers_in_the_model() -> Program:
    """In-batch negatives: logits N by N out of the model, labels arange, one tensor each."""

    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.users = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16))
            self.items = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 16))

        def forward(self, users, items):
            return self.users(users) @ self.items(items).t()

    model = Towers()
    batch = (torch.randn(32, 8), torch.randn(32, 12)), torch.arange(32)
    return Program(model, nn.CrossEntropyLoss(), batch, torch.optim.Adam(model.parameters(), lr=1e-3))


def byol() -> Program:
    """A target network that is a moving average: no gradient, not in the optimizer, on purpose."""

    class BYOL(nn.Module):
        def __init__(self):
            super().__init__()
            self.online, self.target = _encoder(), _encoder()
            self.target.load_state_dict(self.online.state_dict())
            self.target.requires_grad_(False)
            self.predictor = nn.Sequential(
                nn.Linear(16, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16)
            )

        def forward(self, a, b):
            p, q = self.predictor(self.online(a)), self.predictor(self.online(b))
            with torch.no_grad():
                z, w = self.target(b), self.target(a)
            return 2 - F.cosine_similarity(p, z).mean() - F.cosine_similarity(q, w).mean()

    model = BYOL()
    batch = {"a": torch.randn(16, 3, 12, 12), "b": torch.randn(16, 3, 12, 12)}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    return Program(model, None, batch, optimizer)


def barlow_twins() -> Program:
    """A correlation matrix over the batch, of a batch norm without weights; sums, by design."""

    class Barlow(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.norm = _encoder(), nn.BatchNorm1d(16, affine=False)

        def forward(self, a, b):
            c = self.norm(self.encoder(a)).t() @ self.norm(self.encoder(b)) / len(a)
            on = (c.diagonal() - 1).square().sum()
            return on + 0.005 * (c - torch.diag(c.diagonal())).square().sum()

    model = Barlow()
    x = torch.randn(32, 3, 12, 12)
    batch = {"a": x + 0.2 * torch.randn_like(x), "b": x + 0.2 * torch.randn_like(x)}
    return Program(model, None, batch, torch.optim.Adam(model.parameters(), lr=1e-3))


def prototypes() -> Program:
    """Five classes, three shots: means of the support set are the classes of the query set."""

    class Prototypes(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 16))

        def forward(self, support, query):
            centers = self.encoder(support).view(5, 3, -1).mean(1)
            return -(torch.cdist(self.encoder(query), centers) ** 2)

    classes = torch.randn(5, 20)
    support = classes.repeat_interleave(3, 0) + 0.3 * torch.randn(15, 20)
    y = torch.randint(5, (25,))
    model = Prototypes()
    batch = (support, classes[y] + 0.3 * torch.randn(25, 20)), y
    return Program(model, nn.CrossEntropyLoss(), batch, torch.optim.Adam(model.parameters(), lr=1e-3))


def arc_face() -> Program:
    """Cosines times 16 with a margin on the right class: the loss starts far above ln K, by design."""

    class ArcFace(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.weight = _encoder(), nn.Parameter(torch.randn(20, 16))

        def forward(self, x, y):
            cosine = F.normalize(self.encoder(x)) @ F.normalize(self.weight).t()
            angle = torch.acos(cosine.clamp(-1 + 1e-6, 1 - 1e-6))
            with_margin = torch.cos(angle + 0.3)
            return 16 * torch.where(F.one_hot(y, 20).bool(), with_margin, cosine)

    model = ArcFace()
    y = torch.randint(20, (16,))
    batch = (torch.randn(16, 3, 12, 12), y), y
    return Program(model, nn.CrossEntropyLoss(), batch, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))


def supervised_cosine() -> Program:
    """nn.CosineEmbeddingLoss with labels of 1 and -1."""

    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 8))

        def forward(self, a, b):
            return self.net(a), self.net(b)

    loss = nn.CosineEmbeddingLoss(margin=0.1)
    model = Towers()
    batch = torch.randn(32, 12), torch.randn(32, 12), torch.randint(2, (32,)) * 2 - 1
    return Program(model, lambda out, y: loss(*out, y), batch, torch.optim.Adam(model.parameters(), lr=1e-3))
