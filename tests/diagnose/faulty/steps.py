"""The optimizer: what it has, and how far it goes."""

import torch
import torch.nn.functional as F
from clean.vision import ResNet
from program import Program, fault
from torch import nn


def _rows(n=32, classes=4):
    return torch.randn(n, 16), torch.randint(classes, (n,))


def _images(n=16, classes=10):
    return torch.randn(n, 3, 16, 16), torch.randint(classes, (n,))


def _mlp(width=64, outputs=4):
    return nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs))


@fault("C24")
def head_replaced_after_the_optimizer() -> Program:
    """The optimizer has the old head; the new one never learns."""
    model = ResNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model.fc = nn.Linear(32, 5)
    return Program(model, nn.CrossEntropyLoss(), _images(classes=5), optimizer)


@fault("C24")
def optimizer_of_another_model() -> Program:
    """The model is made a second time, after the optimizer."""
    optimizer = torch.optim.Adam(_mlp().parameters(), lr=1e-3)
    return Program(_mlp(), nn.CrossEntropyLoss(), _rows(), optimizer)


@fault("C24")
def head_only_in_the_optimizer() -> Program:
    """model.fc.parameters() is left from the first phase; nothing is frozen, and the body gets gradients."""
    model = ResNet()
    optimizer = torch.optim.Adam(model.fc.parameters(), lr=1e-3)
    return Program(model, nn.CrossEntropyLoss(), _images(), optimizer)


@fault("C24")
def class_token_forgotten() -> Program:
    """The list of parameters names the layers, and forgets a parameter of the model itself."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.embed = nn.Parameter(torch.randn(1, 1, 16)), nn.Linear(4, 16)
            self.attend, self.out = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 3)

        def forward(self, x):
            x = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], 1)
            return self.out(self.attend(x, x, x)[0][:, 0])

    model = Net()
    parts = [*model.embed.parameters(), *model.attend.parameters(), *model.out.parameters()]
    optimizer = torch.optim.Adam(parts, lr=1e-3)
    return Program(model, nn.CrossEntropyLoss(), (torch.randn(16, 6, 4), torch.randint(3, (16,))), optimizer)


@fault("C24")
def same_parameters_in_two_groups() -> Program:
    """The head is in its own group and in that of the whole model's list: each step updates it twice."""
    model = _mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": list(model[4].parameters())})
    return Program(model, nn.CrossEntropyLoss(), _rows(), optimizer)


@fault("C24")
def reassigned_parameter() -> Program:
    """A weight is replaced by a new nn.Parameter after the optimizer was made."""
    model = _mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model[4].weight = nn.Parameter(torch.randn(4, 64) * 0.05)
    return Program(model, nn.CrossEntropyLoss(), _rows(), optimizer)


@fault("C26")
def decay_on_norms() -> Program:
    """AdamW with a weight decay of 0.05 on all parameters: an info."""
    model = ResNet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    return Program(model, nn.CrossEntropyLoss(), _images(), optimizer)


@fault("C27")
def adam_with_a_rate_of_sgd() -> Program:
    """Adam with lr=1."""
    model = _mlp()
    return Program(model, nn.CrossEntropyLoss(), _rows(), torch.optim.Adam(model.parameters(), lr=1.0))


@fault("C27")
def adam_with_a_tenth() -> Program:
    """Adam with lr=0.1 on a CNN."""
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(1024, 10),
    )  # fmt: skip
    return Program(model, nn.CrossEntropyLoss(), _images(), torch.optim.Adam(model.parameters(), lr=0.1))


@fault("C27")
def sgd_with_a_hundred() -> Program:
    """SGD with lr=100 for a regression."""
    model = _mlp(outputs=1)
    batch = torch.randn(32, 16), torch.randn(32, 1)
    return Program(model, nn.MSELoss(), batch, torch.optim.SGD(model.parameters(), lr=100.0))


@fault("C27", also=("C12",))
def sum_with_a_rate_of_means() -> Program:
    """A summed loss over 512 samples, and lr=0.1 of SGD."""
    model = _mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return Program(model, nn.CrossEntropyLoss(reduction="sum"), _rows(512), optimizer)


@fault("C27b")
def steps_below_the_precision() -> Program:
    """Parameters in bfloat16 and lr=1e-5: a step rounds to nothing."""
    model = _mlp().to(torch.bfloat16)
    batch = torch.randn(32, 16, dtype=torch.bfloat16), torch.randint(4, (32,))
    return Program(model, nn.CrossEntropyLoss(), batch, torch.optim.AdamW(model.parameters(), lr=1e-5))


@fault("C25", also=("C24", "C25d"))
def everything_frozen() -> Program:
    """requires_grad_(False) on the whole model, head included."""
    model = ResNet().requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Program(model, nn.CrossEntropyLoss(), _images(), optimizer)


@fault("C29")
def rate_too_small() -> Program:
    """SGD with lr=1e-7: asked for, 200 steps on one batch do not move the loss."""
    model = _mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-7)
    return Program(model, nn.CrossEntropyLoss(), _rows(), optimizer, options={"include": ("C29",)})


@fault("C29")
def input_that_does_not_get_through() -> Program:
    """The forward uses a variable of the wrong name: all samples look alike."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 4)

        def forward(self, x):
            h = torch.zeros_like(x)
            return self.b(F.relu(self.a(h)))

    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    return Program(model, nn.CrossEntropyLoss(), _rows(), optimizer, options={"include": ("C29",)})
