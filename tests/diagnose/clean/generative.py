"""Models of data: autoencoders, adversaries, flows, diffusion, and equations."""

import math

import torch
import torch.nn.functional as F
from program import Program
from torch import nn


def autoencoder() -> Program:
    """Pixels in [0, 1], a sigmoid, and binary cross-entropy against them: not only zeros and ones."""
    x = torch.rand(16, 1, 8, 8)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 32), nn.ReLU(),
        nn.Linear(32, 64), nn.Sigmoid(), nn.Unflatten(1, (1, 8, 8)),
    )  # fmt: skip
    return Program(model, nn.BCELoss(), (x, x), torch.optim.Adam(model.parameters(), lr=1e-3))


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.mean, self.log_var = nn.Linear(64, 32), nn.Linear(32, 4), nn.Linear(32, 4)
        self.fc3, self.fc4 = nn.Linear(4, 32), nn.Linear(32, 64)

    def forward(self, x):
        h = F.relu(self.fc1(x.view(-1, 64)))
        mean, log_var = self.mean(h), self.log_var(h)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * log_var)
        return torch.sigmoid(self.fc4(F.relu(self.fc3(z)))), mean, log_var


def variational_autoencoder() -> Program:
    """The ELBO over the batch, divided by its size."""

    def loss(output, x):
        reconstruction, mean, log_var = output
        bce = F.binary_cross_entropy(reconstruction, x.view(-1, 64), reduction="sum")
        kld = -0.5 * torch.sum(1 + log_var - mean.pow(2) - log_var.exp())
        return (bce + kld) / len(x)

    x = torch.rand(16, 1, 8, 8)
    model = VAE()
    return Program(model, loss, (x, x), torch.optim.Adam(model.parameters(), lr=1e-3))


def vector_quantization() -> Program:
    """A straight-through estimator: detach in the forward pass, on purpose."""

    class VQ(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Conv2d(3, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 8, 1))
            self.codes = nn.Embedding(32, 8)
            self.codes.weight.data.uniform_(-1 / 32, 1 / 32)
            self.decoder = nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU(), nn.ConvTranspose2d(16, 3, 4, 2, 1))

        def forward(self, x):
            z = self.encoder(x)
            flat = z.permute(0, 2, 3, 1).reshape(-1, 8)
            index = torch.cdist(flat, self.codes.weight).argmin(1)
            q = self.codes(index).view(len(x), *z.shape[2:], 8).permute(0, 3, 1, 2)
            commitment = F.mse_loss(q.detach(), z) * 0.25 + F.mse_loss(q, z.detach())
            return self.decoder(z + (q - z).detach()), commitment

    x = torch.randn(8, 3, 8, 8)
    model = VQ()
    return Program(
        model, lambda out, y: F.mse_loss(out[0], y) + out[1], (x, x), torch.optim.Adam(model.parameters(), lr=2e-4)
    )


class Discriminator(nn.Module):
    def __init__(self, channels=1):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(channels, 16, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(16, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32), nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(32, 1, 2),
        )  # fmt: skip

    def forward(self, x):
        return self.net(x).view(-1)


def discriminator_step() -> Program:
    """Real and generated images, in [-1, 1], labels of ones and zeros."""
    model = Discriminator()
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.normal_(m.weight, 0.0, 0.02)
    x = torch.cat([torch.rand(8, 1, 8, 8) * 2 - 1, torch.tanh(torch.randn(8, 1, 8, 8))])
    y = torch.cat([torch.ones(8), torch.zeros(8)])
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4, betas=(0.5, 0.999))
    return Program(model, nn.BCEWithLogitsLoss(), (x, y), optimizer)


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.ConvTranspose2d(16, 32, 2, 1, 0, bias=False), nn.BatchNorm2d(32), nn.ReLU(True),
            nn.ConvTranspose2d(32, 16, 4, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(True),
            nn.ConvTranspose2d(16, 1, 4, 2, 1, bias=False), nn.Tanh(),
        )  # fmt: skip

    def forward(self, z):
        return self.net(z)


def generator_step() -> Program:
    """The loss runs the discriminator, whose parameters are another optimizer's; labels are all ones."""
    generator, discriminator = Generator(), Discriminator()

    def loss(images):
        logits = discriminator(images)
        return F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))

    optimizer = torch.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    return Program(generator, loss, {"z": torch.randn(16, 16, 1, 1)}, optimizer)


def critic_with_gradient_penalty() -> Program:
    """WGAN-GP: an unbounded score and a gradient inside of the loss."""
    critic = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.LeakyReLU(0.2), nn.Linear(32, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1)
    )

    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.critic = critic

        def forward(self, real, fake):
            mixed = torch.lerp(real, fake, torch.rand(len(real), 1, 1, 1)).requires_grad_(True)
            (gradient,) = torch.autograd.grad(self.critic(mixed).sum(), mixed, create_graph=True)
            penalty = ((gradient.flatten(1).norm(dim=1) - 1) ** 2).mean()
            return self.critic(real), self.critic(fake), penalty

    model = Critic()
    batch = {"real": torch.rand(16, 1, 8, 8) * 2 - 1, "fake": torch.tanh(torch.randn(16, 1, 8, 8))}
    return Program(
        model,
        lambda out: out[1].mean() - out[0].mean() + 10 * out[2],
        batch,
        torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.0, 0.9)),
    )


class Denoiser(nn.Module):
    """A small net with an embedding of the time, added to each channel."""

    def __init__(self, channels=16):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, channels), nn.SiLU(), nn.Linear(channels, channels))
        self.conv1, self.conv2 = nn.Conv2d(1, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, padding=1)
        self.norm1, self.norm2 = nn.GroupNorm(4, channels), nn.GroupNorm(4, channels)
        self.out = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, x, t):
        angle = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(8) / 8)
        time = self.time(torch.cat([angle.sin(), angle.cos()], 1))[:, :, None, None]
        h = self.conv1(x)
        h = h + self.conv2(F.silu(self.norm1(h) + time))
        return self.out(F.silu(self.norm2(h)))


def diffusion() -> Program:
    """Predicts the noise at a random time; the last convolution starts at zero, as is usual."""
    model = Denoiser()
    nn.init.zeros_(model.out.weight)
    nn.init.zeros_(model.out.bias)
    x, noise, t = torch.rand(16, 1, 8, 8) * 2 - 1, torch.randn(16, 1, 8, 8), torch.randint(1000, (16,))
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[t].view(-1, 1, 1, 1)
    noisy = kept.sqrt() * x + (1 - kept).sqrt() * noise
    return Program(model, nn.MSELoss(), ((noisy, t), noise), torch.optim.AdamW(model.parameters(), lr=1e-4))


def flow_matching() -> Program:
    """The velocity from noise to data; the model draws noise and time itself and returns its loss."""

    class Flow(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

        def forward(self, x):
            noise, t = torch.randn_like(x), torch.rand(len(x), 1)
            velocity = self.net(torch.cat([(1 - t) * noise + t * x, t], 1))
            return F.mse_loss(velocity, x - noise)

    model = Flow()
    return Program(model, None, {"x": torch.randn(64, 2) + 1}, torch.optim.Adam(model.parameters(), lr=1e-3))


class Coupling(nn.Module):
    def __init__(self, flip):
        super().__init__()
        self.flip = flip
        self.net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 4))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, x):
        a, b = x.chunk(2, 1)[::-1] if self.flip else x.chunk(2, 1)
        scale, shift = self.net(a).chunk(2, 1)
        scale = torch.tanh(scale)
        parts = (a, b * scale.exp() + shift)
        return torch.cat(parts[::-1] if self.flip else parts, 1), scale.sum(1)


def normalizing_flow() -> Program:
    """RealNVP: starts as the identity, the loss is a negative log-likelihood and may be below zero."""

    class RealNVP(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Coupling(i % 2 == 1) for i in range(4))

        def forward(self, x):
            total = 0
            for layer in self.layers:
                x, log_det = layer(x)
                total = total + log_det
            return x, total

    def loss(output):
        z, log_det = output
        return (0.5 * z.square().sum(1) + 2 * math.log(2 * math.pi) - log_det).mean()

    model = RealNVP()
    return Program(model, loss, {"x": torch.randn(64, 4)}, torch.optim.Adam(model.parameters(), lr=1e-3))


class MaskedConv(nn.Conv2d):
    def __init__(self, kind, *args, **kwargs):
        super().__init__(*args, **kwargs)
        mask = torch.ones_like(self.weight)
        middle = self.kernel_size[0] // 2
        mask[:, :, middle, middle + (kind == "B") :] = 0
        mask[:, :, middle + 1 :] = 0
        self.register_buffer("mask", mask)

    def forward(self, x):
        return F.conv2d(x, self.weight * self.mask, self.bias, self.stride, self.padding)


def pixel_cnn() -> Program:
    """Each pixel from those before it: 256 classes a pixel, some never seen in a batch."""
    model = nn.Sequential(
        MaskedConv("A", 1, 16, 5, padding=2), nn.ReLU(), MaskedConv("B", 16, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 256, 1),
    )  # fmt: skip
    levels = torch.randint(256, (8, 8, 8))
    batch = levels.unsqueeze(1).float() / 255, levels
    return Program(model, nn.CrossEntropyLoss(), batch, torch.optim.Adam(model.parameters(), lr=1e-3))


def physics_informed() -> Program:
    """u'' + u = 0 with u(0) = 0, u'(0) = 1: derivatives of the output inside of the loss, no data."""

    class Solution(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))

        def forward(self, t):
            t = t.clone().requires_grad_(True)
            u = self.net(t)
            (first,) = torch.autograd.grad(u.sum(), t, create_graph=True)
            (second,) = torch.autograd.grad(first.sum(), t, create_graph=True)
            return u, first, second

    def loss(output):
        u, first, second = output
        return ((second + u) ** 2).mean() + u[0].square().sum() + (first[0] - 1).square().sum()

    model = Solution()
    t = torch.linspace(0, 6, 40).unsqueeze(1)
    return Program(model, loss, {"t": t}, torch.optim.Adam(model.parameters(), lr=1e-3))


def neural_field() -> Program:
    """Sines of sines on coordinates (SIREN), with their own initial weights."""

    class Sine(nn.Module):
        def __init__(self, inside, outside, first=False):
            super().__init__()
            self.linear = nn.Linear(inside, outside)
            bound = 1 / inside if first else math.sqrt(6 / inside) / 30
            nn.init.uniform_(self.linear.weight, -bound, bound)

        def forward(self, x):
            return torch.sin(30 * self.linear(x))

    model = nn.Sequential(Sine(2, 64, True), Sine(64, 64), nn.Linear(64, 3))
    batch = torch.rand(256, 2) * 2 - 1, torch.rand(256, 3)
    return Program(model, nn.MSELoss(), batch, torch.optim.Adam(model.parameters(), lr=1e-4))


def score_matching() -> Program:
    """Denoising score matching: targets as large as 1 / sigma, weighted by sigma squared."""

    class Score(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(
                nn.Linear(3, 64), nn.Softplus(), nn.Linear(64, 64), nn.Softplus(), nn.Linear(64, 2)
            )

        def forward(self, x, sigma):
            return self.net(torch.cat([x, sigma.log()], 1)) / sigma

    def loss(score, target):
        noise, sigma = target
        return (sigma**2 * (score + noise / sigma) ** 2).mean()

    sigma, noise = torch.exp(torch.linspace(-3, 1, 64)).unsqueeze(1), torch.randn(64, 2)
    batch = (torch.randn(64, 2) + sigma * noise, sigma), (noise, sigma)
    model = Score()
    return Program(model, loss, batch, torch.optim.Adam(model.parameters(), lr=1e-3))


def neural_ode() -> Program:
    """The same layer in eight Euler steps."""

    class ODE(nn.Module):
        def __init__(self):
            super().__init__()
            self.field, self.head = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2)), nn.Linear(2, 2)

        def forward(self, x):
            for _ in range(8):
                x = x + self.field(x) / 8
            return self.head(x)

    model = ODE()
    batch = torch.randn(64, 2), torch.randint(2, (64,))
    return Program(model, nn.CrossEntropyLoss(), batch, torch.optim.Adam(model.parameters(), lr=1e-2))
