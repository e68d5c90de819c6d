"""Ways of writing and running layers: precisions, parametrizations, lazy layers, renorm's own."""

import torch
import torch.nn.functional as F
from program import Program
from torch import nn
from torch.utils.checkpoint import checkpoint

import renorm as rn


def _images(n=16):
    return torch.randn(n, 3, 12, 12), torch.randint(5, (n,))


def _cnn(norm):
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), norm(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), norm(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, 5),
    )  # fmt: skip


def autocast() -> Program:
    """bfloat16 inside of the model, the loss in float32."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = _cnn(nn.BatchNorm2d)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.net(x)

    model = Mixed()
    return Program(
        model,
        lambda logits, y: F.cross_entropy(logits.float(), y),
        _images(),
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
    )


def bfloat16() -> Program:
    """Parameters and inputs in bfloat16."""
    model = nn.Sequential(nn.Linear(16, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 5)).to(torch.bfloat16)
    batch = torch.randn(32, 16, dtype=torch.bfloat16), torch.randint(5, (32,))
    return Program(model, nn.CrossEntropyLoss(), batch, torch.optim.AdamW(model.parameters(), lr=1e-3))


def double() -> Program:
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1)).double()
    batch = torch.randn(32, 8).double(), torch.randn(32, 1).double()
    return Program(model, nn.MSELoss(), batch, torch.optim.LBFGS(model.parameters(), lr=1))


def channels_last() -> Program:
    model = _cnn(nn.BatchNorm2d).to(memory_format=torch.channels_last)
    x, y = _images()
    return Program(
        model,
        nn.CrossEntropyLoss(),
        (x.contiguous(memory_format=torch.channels_last), y),
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
    )


def lazy() -> Program:
    """Lazy layers that one forward pass has given their shapes."""
    model = nn.Sequential(
        nn.LazyConv2d(16, 3, bias=False), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5)
    )
    x, y = _images()
    model(x)
    return Program(model, nn.CrossEntropyLoss(), (x, y), torch.optim.Adam(model.parameters(), lr=1e-3))


def weight_norm() -> Program:
    wn = nn.utils.parametrizations.weight_norm
    model = nn.Sequential(wn(nn.Linear(16, 32)), nn.ReLU(), wn(nn.Linear(32, 32)), nn.ReLU(), wn(nn.Linear(32, 5)))
    batch = torch.randn(32, 16), torch.randint(5, (32,))
    return Program(model, nn.CrossEntropyLoss(), batch, torch.optim.Adam(model.parameters(), lr=1e-3))


def spectral_norm() -> Program:
    """A hinge discriminator, in training mode, which steps the power iteration."""
    sn = nn.utils.parametrizations.spectral_norm
    model = nn.Sequential(
        sn(nn.Conv2d(3, 16, 4, 2, 1)), nn.LeakyReLU(0.1), sn(nn.Conv2d(16, 32, 4, 2, 1)), nn.LeakyReLU(0.1),
        nn.Flatten(), sn(nn.Linear(32 * 9, 1)),
    )  # fmt: skip

    def loss(score, real):
        return F.relu(1 - real * score.squeeze(1)).mean()

    batch = _images()[0], torch.cat([torch.ones(8), -torch.ones(8)])
    return Program(model, loss, batch, torch.optim.Adam(model.parameters(), lr=2e-4, betas=(0.0, 0.9)))


def checkpointed() -> Program:
    """Activations are computed again in the backward pass."""

    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(4)
            )
            self.start, self.end = nn.Linear(10, 32), nn.Linear(32, 3)

        def forward(self, x):
            x = self.start(x)
            for block in self.blocks:
                x = x + checkpoint(block, x, use_reentrant=False)
            return self.end(x)

    model = Deep()
    batch = torch.randn(32, 10), torch.randint(3, (32,))
    return Program(model, nn.CrossEntropyLoss(), batch, torch.optim.AdamW(model.parameters(), lr=1e-3))


def complex_numbers() -> Program:
    """A Fourier layer: complex weights, real inputs and outputs."""

    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            self.lift, self.drop = nn.Linear(1, 16), nn.Linear(16, 1)
            self.weight = nn.Parameter(torch.randn(16, 16, 8, dtype=torch.cfloat) / 16)

        def forward(self, x):
            h = self.lift(x.unsqueeze(-1)).transpose(1, 2)
            f = torch.fft.rfft(h)
            low = torch.einsum("ncm,com->nom", f[..., :8], self.weight)
            y = torch.fft.irfft(F.pad(low, (0, f.shape[-1] - 8)), n=x.shape[1])
            return self.drop(F.gelu(y + h).transpose(1, 2)).squeeze(-1)

    model = Spectral()
    batch = torch.randn(16, 32), torch.randn(16, 32)
    return Program(model, nn.MSELoss(), batch, torch.optim.Adam(model.parameters(), lr=1e-3))


def batch_norm_of_renorm() -> Program:
    model = _cnn(rn.BatchNorm)
    return Program(model, nn.CrossEntropyLoss(), _images(), torch.optim.SGD(model.parameters(), lr=0.05))


def group_norm_of_renorm() -> Program:
    model = _cnn(lambda channels: rn.GroupNorm(4, channels))
    return Program(model, nn.CrossEntropyLoss(), _images(2), torch.optim.SGD(model.parameters(), lr=0.05))


def pattern_of_renorm() -> Program:
    """Layer norm over the channels of images, as a pattern."""
    model = _cnn(lambda channels: rn.Norm("n [c] h w", c=channels))
    return Program(model, nn.CrossEntropyLoss(), _images(), torch.optim.AdamW(model.parameters(), lr=1e-3))


def layer_norm_of_renorm() -> Program:
    model = nn.Sequential(
        nn.Linear(16, 32), rn.LayerNorm(32), nn.GELU(), nn.Linear(32, 32), rn.RMSNorm(32), nn.GELU(), nn.Linear(32, 5)
    )
    batch = torch.randn(4, 16), torch.randint(5, (4,))
    return Program(model, nn.CrossEntropyLoss(), batch, torch.optim.AdamW(model.parameters(), lr=1e-3))


def compiled() -> Program:
    """torch.compile around the model; it is checked as it was written."""
    model = torch.compile(_cnn(nn.BatchNorm2d))
    return Program(model, nn.CrossEntropyLoss(), _images(), torch.optim.SGD(model.parameters(), lr=0.05))


def functional_parameters() -> Program:
    """Parameters without layers, and norms as functions."""

    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w2 = nn.Parameter(torch.randn(32, 16) / 4), nn.Parameter(torch.randn(5, 32) / 32**0.5)
            self.b1, self.b2 = nn.Parameter(torch.zeros(32)), nn.Parameter(torch.zeros(5))

        def forward(self, x):
            x = F.gelu(F.layer_norm(F.linear(x, self.w1, self.b1), (32,)))
            return x @ self.w2.t() + self.b2

    model = Raw()
    batch = torch.randn(32, 16), torch.randint(5, (32,))
    return Program(model, nn.CrossEntropyLoss(), batch, torch.optim.Adam(model.parameters(), lr=1e-3))
