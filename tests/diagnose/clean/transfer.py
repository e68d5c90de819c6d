"""Parts that are frozen, borrowed or taught by another model."""

import copy

import torch
import torch.nn.functional as F
from program import Program
from torch import nn

from clean.text import GPT
from clean.vision import ResNet, VisionTransformer


def _images(n=16, classes=10):
    return torch.randn(n, 3, 16, 16), torch.randint(classes, (n,))


def _trained(model):
    """Statistics and weights that are no longer those of the start."""
    with torch.no_grad():
        for _ in range(5):
            model(torch.randn(16, 3, 16, 16))
    return model


def linear_probe() -> Program:
    """A frozen backbone in eval mode, and an optimizer for the head only."""

    class Probe(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = _trained(ResNet())
            self.backbone.fc = nn.Identity()
            self.backbone.requires_grad_(False).eval()
            self.head = nn.Linear(32, 5)

        def train(self, mode=True):
            super().train(mode)
            self.backbone.eval()
            return self

        def forward(self, x):
            with torch.no_grad():
                features = self.backbone(x)
            return self.head(features)

    model = Probe()
    return Program(model, nn.CrossEntropyLoss(), _images(classes=5), torch.optim.Adam(model.head.parameters(), lr=1e-3))


def fine_tuning_with_frozen_norms() -> Program:
    """Norms keep statistics and weights of the pretraining; all else learns, slower than the head."""
    model = _trained(ResNet())
    model.fc = nn.Linear(32, 4)
    model.train()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
            m.requires_grad_(False)
    head = set(model.fc.parameters())
    body = [p for p in model.parameters() if p.requires_grad and p not in head]
    optimizer = torch.optim.SGD([{"params": body, "lr": 1e-3}, {"params": list(head), "lr": 1e-2}], momentum=0.9)
    return Program(model, nn.CrossEntropyLoss(), _images(classes=4), optimizer)


def first_layers_frozen() -> Program:
    """The usual recipe: freeze the first stage with its norms in eval mode, train the others."""
    model = VisionTransformer(classes=3)
    for p in (*model.patch.parameters(), *model.encoder.layers[0].parameters()):
        p.requires_grad = False
    optimizer = torch.optim.AdamW(filter(lambda p: p.requires_grad, model.parameters()), lr=1e-4)
    return Program(model, nn.CrossEntropyLoss(), _images(classes=3), optimizer)


class LoRA(nn.Module):
    def __init__(self, linear, rank=4):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, linear.in_features) / linear.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x):
        return self.linear(x) + (x @ self.a.t()) @ self.b.t()


def low_rank_adaptation() -> Program:
    """One factor starts at zero, so the other has no gradient in the first step."""
    model = GPT()
    model.requires_grad_(False)
    for block in model.h:
        block.c_attn, block.c_proj = LoRA(block.c_attn), LoRA(block.c_proj)
    tokens = torch.randint(100, (8, 13))
    return Program(
        model,
        lambda logits, y: F.cross_entropy(logits.flatten(0, 1), y.flatten()),
        (tokens[:, :-1], tokens[:, 1:]),
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3),
    )


def adapters() -> Program:
    """Bottlenecks that start as the identity behind frozen layers."""

    class Adapter(nn.Module):
        def __init__(self, layer, width):
            super().__init__()
            self.layer = layer.requires_grad_(False)
            self.down, self.up = nn.Linear(width, 4), nn.Linear(4, width)
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

        def forward(self, x):
            y = self.layer(x)
            return y + self.up(F.gelu(self.down(y)))

    model = nn.Sequential(
        Adapter(nn.Sequential(nn.Linear(12, 32), nn.ReLU()), 32),
        Adapter(nn.Sequential(nn.Linear(32, 32), nn.ReLU()), 32),
        nn.Linear(32, 3),
    )
    batch = torch.randn(32, 12), torch.randint(3, (32,))
    return Program(
        model,
        nn.CrossEntropyLoss(),
        batch,
        torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3),
    )


def prompt_tuning() -> Program:
    """Only the vectors in front of the text learn."""

    class Prompted(nn.Module):
        def __init__(self):
            super().__init__()
            self.gpt = GPT().requires_grad_(False)
            self.prompt = nn.Parameter(0.02 * torch.randn(3, 32))

        def forward(self, tokens):
            x = torch.cat([self.prompt.expand(len(tokens), -1, -1), self.gpt.wte(tokens)], 1)
            x = x + self.gpt.wpe(torch.arange(x.shape[1]))
            for block in self.gpt.h:
                x = block(x)
            return self.gpt.lm_head(self.gpt.ln_f(x[:, 3:]))

    tokens = torch.randint(100, (8, 13))
    model = Prompted()
    return Program(
        model,
        lambda logits, y: F.cross_entropy(logits.flatten(0, 1), y.flatten()),
        (tokens[:, :-1], tokens[:, 1:]),
        torch.optim.Adam([model.prompt], lr=5e-3),
    )


def distillation() -> Program:
    """A frozen teacher outside of the model, softened by a temperature, and the labels."""
    teacher = _trained(ResNet()).eval().requires_grad_(False)
    student = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 10),
    )  # fmt: skip
    x, y = _images()
    with torch.no_grad():
        soft = teacher(x)

    def loss(logits, target):
        labels, teachers = target
        kl = F.kl_div(F.log_softmax(logits / 4, 1), F.softmax(teachers / 4, 1), reduction="batchmean") * 16
        return 0.9 * kl + 0.1 * F.cross_entropy(logits, labels)

    return Program(student, loss, (x, (y, soft)), torch.optim.Adam(student.parameters(), lr=1e-3))


def distillation_with_the_teacher_inside() -> Program:
    """Teacher and student in one module; the teacher is never trained."""

    class Distiller(nn.Module):
        def __init__(self):
            super().__init__()
            self.teacher = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 5))
            self.student = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5))
            self.teacher.eval().requires_grad_(False)

        def forward(self, x):
            with torch.no_grad():
                t = self.teacher(x)
            return self.student(x), t

    def loss(output, target):
        s, t = output
        return F.cross_entropy(s, target) + F.mse_loss(s, t)

    model = Distiller()
    batch = torch.randn(32, 12), torch.randint(5, (32,))
    return Program(model, loss, batch, torch.optim.Adam(model.student.parameters(), lr=1e-3))


def mean_teacher() -> Program:
    """The moving average of the student teaches it on unlabelled samples; it runs in training mode, as published."""

    class MeanTeacher(nn.Module):
        def __init__(self):
            super().__init__()
            self.student = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 4))
            self.teacher = copy.deepcopy(self.student).requires_grad_(False)

        def forward(self, labelled, unlabelled):
            with torch.no_grad():
                t = self.teacher(unlabelled).softmax(1)
            return self.student(labelled), self.student(unlabelled).softmax(1), t

    def loss(output, target):
        logits, s, t = output
        return F.cross_entropy(logits, target) + F.mse_loss(s, t)

    model = MeanTeacher()
    batch = torch.randn(16, 12), torch.randn(48, 12), torch.randint(4, (16,))
    return Program(model, loss, batch, torch.optim.Adam(model.student.parameters(), lr=1e-3))


def mixup() -> Program:
    """Mixed images and mixed labels: cross-entropy of probabilities."""
    x, y = _images()
    share, other = 0.7, torch.randperm(16)
    labels = F.one_hot(y, 10).float()
    model = ResNet()
    batch = share * x + (1 - share) * x[other], share * labels + (1 - share) * labels[other]
    return Program(model, nn.CrossEntropyLoss(), batch, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
