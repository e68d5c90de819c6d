"""Healthy training loops, each a second or so: `watch` has nothing to say of them.

A function takes `watch`, which is called as `renorm.watch` is, and returns what it gave and the losses. With
`unwatched` in its place the same loop runs alone.
"""

import contextlib
import copy
import inspect
import itertools
import sys

import torch
import torch.nn.functional as F
from torch import nn

import renorm as rn


class unwatched(contextlib.nullcontext):
    """Nobody looks."""

    def __init__(self, *args, **kwargs):
        super().__init__(self)

    def step(self, *args):
        pass

    validate = step


def quietly(*args, **kwargs):
    return rn.watch(*args, on_error="silent", **kwargs)


def images(n=600, noise=1.0, classes=6, size=12, seed=1):
    """Noisy copies of a picture for each class."""
    made = torch.Generator().manual_seed(seed)
    pictures = 2 * F.avg_pool2d(
        torch.randn(classes, 3, size, size, generator=torch.Generator().manual_seed(0)), 3, 1, 1
    )
    y = torch.randint(classes, (n,), generator=made)
    return pictures[y] + noise * torch.randn(n, 3, size, size, generator=made), y


class Block(nn.Module):
    def __init__(self, width, out, stride, zero):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.relu, self.down = nn.ReLU(inplace=True), nn.Conv2d(width, out, 1, stride)
        if zero:
            nn.init.zeros_(self.bn2.weight)

    def forward(self, x):
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + self.down(x))


def resnet(zero=False):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), Block(8, 8, 1, zero), Block(8, 16, 2, zero),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 6),
    )  # fmt: skip


def mlp(*widths):
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def fit(watch, model, optimizer, data, loss_of, steps, batch=16, valid=None, schedule=None, clip=None, told=True):
    """The usual loop, with a validation now and then."""
    losses = []
    with watch(model, optimizer) as w:
        for step in range(steps):
            model.train()
            i = torch.randint(len(data[0]), (batch,))
            optimizer.zero_grad()
            outputs = model(data[0][i])
            loss = loss_of(outputs, data[1][i])
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            if schedule:
                schedule.step()
            w.step(loss, outputs, data[1][i]) if told else w.step(loss)
            losses.append(loss.item())
            if valid and step % 40 == 39:
                model.eval()
                with torch.no_grad():
                    outputs = model(valid[0])
                    w.validate(loss_of(outputs, valid[1]), outputs, valid[1])
    return w, losses


# ---- images


def convolutions_with_sgd(watch):
    model = resnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    return fit(watch, model, optimizer, images(), F.cross_entropy, 250, valid=images(200, seed=2))


def convolutions_from_zero_with_one_cycle(watch):
    model = resnet(zero=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=250)
    return fit(watch, model, optimizer, images(), F.cross_entropy, 250, schedule=schedule, valid=images(200, seed=2))


def convolutions_that_converged(watch):
    model = resnet()
    return fit(watch, model, torch.optim.Adam(model.parameters(), 1e-3), images(noise=0.3), F.cross_entropy, 500)


def large_batches_with_decay(watch):
    model = resnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.4, momentum=0.9)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [60, 100], 0.1)
    return fit(watch, model, optimizer, images(), F.cross_entropy, 140, batch=96, schedule=schedule)


def small_batches(watch):
    model = resnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    return fit(watch, model, optimizer, images(), F.cross_entropy, 300, batch=4, valid=images(100, seed=2))


def functions_for_layers(watch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 16, 3, 1, 1)
            self.out1, self.out2 = nn.Linear(144, 32), nn.Linear(32, 6)

        def forward(self, x):
            x = F.max_pool2d(F.relu(self.conv1(x)), 2)
            x = F.max_pool2d(self.conv2(x).relu(), 2).flatten(1)
            return F.log_softmax(self.out2(torch.relu(self.out1(x))), 1)

    model = Net()
    return fit(watch, model, torch.optim.Adam(model.parameters(), 1e-3), images(), F.nll_loss, 250)


def masks_of_images(watch):
    x, _ = images(200)
    y = (x.mean(1) > 0.3).long()
    y[:, 0] = 255
    layers = [nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(8, 2, 1))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    return fit(
        watch, model, optimizer, (x, y), lambda y, t: F.cross_entropy(y, t, ignore_index=255), 150, 4, (x[:50], y[:50])
    )


def a_frozen_part(watch):
    model = resnet()
    model.requires_grad_(False)
    for _ in range(20):
        model(images(64)[0])
    model[7].requires_grad_(True)
    model[:7].eval()
    model.train = lambda mode=True: model  # it stays as it is
    return fit(watch, model, torch.optim.Adam(model[7].parameters(), 1e-2), images(), F.cross_entropy, 200)


def fine_tuning(watch):
    model = resnet()
    fit(unwatched, model, torch.optim.Adam(model.parameters(), 1e-3), images(), F.cross_entropy, 200)
    optimizer = torch.optim.Adam(model.parameters(), 1e-5)
    return fit(watch, model, optimizer, images(), F.cross_entropy, 250, valid=images(200, seed=2))


def accumulated_batches(watch):
    model, (x, y) = resnet(), images()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    with watch(model, optimizer) as w:
        for _ in range(80):
            parts = []
            for _ in range(4):
                i = torch.randint(600, (8,))
                loss = F.cross_entropy(model(x[i]), y[i]) / 4
                loss.backward()
                parts.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
            w.step(sum(parts))
            losses.append(sum(parts))
    return w, losses


# ---- sequences


class Transformer(nn.Module):
    def __init__(self, classes, norm_first):
        super().__init__()
        self.embedding, self.places = nn.Embedding(30, 32), nn.Parameter(0.02 * torch.randn(16, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, 0.1, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, classes)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        x = self.encoder(self.embedding(x) + self.places[: x.shape[1]], mask=mask, is_causal=True)
        return self.head(self.norm(x))


def warmed_up(optimizer, steps):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / steps))


def of_words(y, t):
    return F.cross_entropy(y.flatten(0, 1), t.flatten())


def language_model(watch):
    chances = (3 * torch.randn(30, 30)).softmax(1)
    x = torch.randint(30, (500, 1))
    for _ in range(16):
        x = torch.cat([x, torch.multinomial(chances[x[:, -1]], 1)], 1)
    model = Transformer(30, norm_first=True)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    data, valid = (x[:400, :-1], x[:400, 1:]), (x[400:, :-1], x[400:, 1:])
    schedule = warmed_up(optimizer, 100)
    return fit(watch, model, optimizer, data, of_words, 200, valid=valid, schedule=schedule)


def transformer_that_starts_slowly(watch):
    x = torch.randint(30, (800, 12))
    y = (x[:, :6].sum(1) > x[:, 6:].sum(1)).long()
    model = Transformer(2, norm_first=False)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    return fit(
        watch, model, optimizer, (x, y), lambda y, t: F.cross_entropy(y[:, -1], t), 250,
        schedule=warmed_up(optimizer, 200), told=False,
    )  # fmt: skip


def lstm_with_clipped_gradients(watch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(3, 32, 2, batch_first=True, dropout=0.1), nn.Linear(32, 1)

        def forward(self, x):
            return self.head(self.lstm(x)[0][:, -1])

    x = 0.2 * torch.randn(500, 20, 3).cumsum(1)
    y = x[:, -1, :1] - x[:, 5, :1]
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    return fit(watch, model, optimizer, (x[:400], y[:400]), F.mse_loss, 200, valid=(x[400:], y[400:]), clip=1.0)


def recurrence_by_hand(watch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.input, self.state, self.head = nn.Linear(3, 24), nn.Linear(24, 24), nn.Linear(24, 3)

        def forward(self, x):
            state = x.new_zeros(len(x), 24)
            for step in range(x.shape[1]):
                state = torch.tanh(self.input(x[:, step]) + self.state(state))
            return self.head(state)

    x = torch.randn(600, 10, 3)
    model = Net()
    return fit(
        watch, model, torch.optim.RMSprop(model.parameters(), 1e-3), (x, x[:, -1].argmax(1)), F.cross_entropy, 200
    )


# ---- generators


def gan(watch):
    generator = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 2))
    critic = nn.Sequential(nn.Linear(2, 64), nn.LeakyReLU(0.2), nn.BatchNorm1d(64), nn.Linear(64, 1), nn.Sigmoid())
    of_generator, of_critic = (torch.optim.Adam(m.parameters(), 1e-3, betas=(0.5, 0.999)) for m in (generator, critic))
    ones, zeros, losses = torch.ones(32, 1), torch.zeros(32, 1), []
    with watch({"generator": generator, "critic": critic}, (of_critic, of_generator)) as w:
        for _ in range(250):
            critic.requires_grad_(True)
            fake, real = generator(torch.randn(32, 8)), 0.3 * torch.randn(32, 2) + torch.tensor([1.0, -1.0])
            of_critic.zero_grad()
            loss = F.binary_cross_entropy(critic(real), ones) + F.binary_cross_entropy(critic(fake.detach()), zeros)
            loss.backward()
            of_critic.step()
            w.step(loss)
            critic.requires_grad_(False)
            of_generator.zero_grad()
            loss = F.binary_cross_entropy(critic(fake), ones)
            loss.backward()
            of_generator.step()
            w.step(loss)
            losses.append(loss.item())
    return w, losses


def critic_five_times(watch):
    generator, critic = mlp(8, 64, 2), mlp(2, 64, 1)
    of_generator, of_critic = (torch.optim.RMSprop(m.parameters(), 5e-4) for m in (generator, critic))
    losses = []
    with watch((generator, critic), (of_critic, of_generator)) as w:
        for step in range(400):
            of_critic.zero_grad()
            loss = critic(generator(torch.randn(32, 8)).detach()).mean() - critic(torch.randn(32, 2) + 2).mean()
            loss.backward()
            of_critic.step()
            w.step(loss)
            for p in critic.parameters():
                p.data.clamp_(-0.05, 0.05)
            if step % 5 == 4:
                of_generator.zero_grad()
                loss = -critic(generator(torch.randn(32, 8))).mean()
                loss.backward()
                of_generator.step()
                w.step(loss)
            losses.append(loss.item())
    return w, losses


def pictures():
    return (images(400, size=8)[0].mean(1) > 0).float().flatten(1)


def autoencoder(watch):
    x = pictures()
    model = nn.Sequential(mlp(64, 32, 8), nn.ReLU(), mlp(8, 32, 64), nn.Sigmoid())
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    return fit(watch, model, optimizer, (x, x), F.binary_cross_entropy, 300, 32, (x, x))


def variational_autoencoder_without_forward(watch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = mlp(64, 32, 8), nn.Sequential(mlp(4, 32, 64), nn.Sigmoid())

        def loss(self, x):
            mean, log_var = self.encoder(x).chunk(2, 1)
            y = self.decoder(mean + torch.randn_like(mean) * (log_var / 2).exp())
            divergence = -0.5 * (1 + log_var - mean.square() - log_var.exp()).sum(1).mean()
            return F.binary_cross_entropy(y, x, reduction="sum") / len(x) + divergence

    model, x, losses = Net(), pictures(), []
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    with watch(model, optimizer) as w:
        for _ in range(250):
            optimizer.zero_grad()
            loss = model.loss(x[torch.randint(400, (32,))])
            loss.backward()
            optimizer.step()
            w.step(loss)
            losses.append(loss.item())
    return w, losses


# ---- tables and the rest


def regression(watch):
    x = torch.randn(1500, 8)
    y = 2 * x[:, :1] + x[:, 1:2].square() + 0.5 * torch.randn(1500, 1)
    model = mlp(8, 64, 64, 1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    return fit(watch, model, optimizer, (x[:1200], y[:1200]), F.mse_loss, 500, 32, (x[1200:], y[1200:]))


def regression_of_noise(watch):
    x = torch.randn(3000, 8)
    y = 0.15 * x[:, :1] + torch.randn(3000, 1)
    model = mlp(8, 16, 1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    return fit(watch, model, optimizer, (x[:2000], y[:2000]), F.mse_loss, 500, 32, (x[2000:], y[2000:]))


def regression_taken_up_again(watch):
    x = torch.randn(1500, 8)
    data = x, 2 * x[:, :1] + 0.5 * torch.randn(1500, 1)
    model = mlp(8, 32, 1)
    fit(unwatched, model, torch.optim.Adam(model.parameters(), 1e-3), data, F.mse_loss, 800, 32)
    return fit(watch, model, torch.optim.Adam(model.parameters(), 1e-3), data, F.mse_loss, 500, 32, told=False)


def deep_without_norms(watch):
    x = torch.randn(1000, 16)
    model = mlp(16, *[64] * 6, 4)
    for layer in model[::2]:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    return fit(watch, model, optimizer, (x, x[:, :4].argmax(1)), F.cross_entropy, 400, 32)


def learnt_by_heart(watch):
    data = torch.randn(32, 10), torch.randint(4, (32,))
    model = mlp(10, 64, 4)
    return fit(watch, model, torch.optim.Adam(model.parameters(), 1e-2), data, F.cross_entropy, 600, 32)


def rare_positives(watch):
    x = torch.randn(3000, 6)
    y = (x[:, :1] > 1.4).float()
    model = mlp(6, 16, 1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    return fit(watch, model, optimizer, (x, y), F.binary_cross_entropy_with_logits, 400, 32)


def several_labels(watch):
    x = torch.randn(1500, 10)
    y = (x[:, :5] + 0.3 * torch.randn(1500, 5) > 1).float()
    model = mlp(10, 32, 5)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    return fit(watch, model, optimizer, (x, y), F.binary_cross_entropy_with_logits, 300, 32, (x[:300], y[:300]))


def sparse_rows_and_two_optimizers(watch):
    embedding, head = nn.Embedding(500, 16, sparse=True), nn.Linear(16, 2)
    x = torch.randint(500, (2000, 6))
    y = ((x < 250).sum(1) > 3).long()
    optimizers = torch.optim.SparseAdam(embedding.parameters(), 1e-2), torch.optim.Adam(head.parameters(), 1e-2)
    losses = []
    with watch(nn.ModuleDict({"embedding": embedding, "head": head}), optimizers) as w:
        for _ in range(200):
            i = torch.randint(2000, (32,))
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = F.cross_entropy(head(embedding(x[i]).mean(1)), y[i])
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            w.step(loss)
            losses.append(loss.item())
    return w, losses


def second_order_steps(watch):
    x = torch.randn(200, 4)
    y = x @ torch.randn(4, 1) + 0.1 * torch.randn(200, 1)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=5)
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    with watch(model, optimizer) as w:
        for _ in range(50):
            losses.append(optimizer.step(closure).item())
            w.step(losses[-1])
    return w, losses


def low_rank_from_zero(watch):
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.whole = nn.Linear(32, 32).requires_grad_(False)
            self.down, self.up = nn.Linear(32, 4, bias=False), nn.Linear(4, 32, bias=False)
            nn.init.zeros_(self.up.weight)

        def forward(self, x):
            return self.whole(x) + self.up(self.down(x))

    model = nn.Sequential(Adapted(), nn.ReLU(), Adapted())
    x = torch.randn(1000, 32)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    return fit(watch, model, optimizer, (x, 0.2 * x @ torch.randn(32, 32)), F.mse_loss, 300, 32)


def agent_with_a_late_target(watch):
    values = mlp(4, 64, 2)
    late = copy.deepcopy(values)
    optimizer = torch.optim.Adam(values.parameters(), 1e-3)
    losses = []
    with watch(values, optimizer) as w:
        for step in range(400):
            x, action = torch.randn(32, 4), torch.randint(2, (32, 1))
            with torch.no_grad():
                y = x[:, :1] + 0.9 * late(x + 0.1 * torch.randn_like(x)).max(1, keepdim=True)[0]
            loss = F.smooth_l1_loss(values(x).gather(1, action), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            w.step(loss)
            losses.append(loss.item())
            if step % 100 == 99:
                late.load_state_dict(values.state_dict())
    return w, losses


def short_floats(watch):
    x = torch.randn(1000, 8).bfloat16()
    model = mlp(8, 32, 3).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    return fit(watch, model, optimizer, (x, x[:, :3].argmax(1)), F.cross_entropy, 250, 32)


def two_phases_with_an_optimizer_each(watch):
    encode, decode, head = nn.Sequential(nn.Linear(16, 32), nn.ReLU()), nn.Linear(32, 16), nn.Linear(32, 3)
    first = torch.optim.Adam([*encode.parameters(), *decode.parameters()], 1e-3)
    second = torch.optim.Adam(head.parameters(), 1e-3)
    x = torch.randn(500, 16)
    losses = []
    with watch({"encode": encode, "decode": decode, "head": head}, (first, second)) as w:
        for step in range(200):
            i = torch.randint(500, (32,))
            optimizer = first if step < 100 else second
            if step < 100:
                loss = F.mse_loss(decode(encode(x[i])), x[i])
            else:
                with torch.no_grad():
                    features = encode(x[i])
                loss = F.cross_entropy(head(features), x[i, :3].argmax(1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            w.step(loss)
            losses.append(loss.item())
    return w, losses


def weights_shaken_twice_a_step(watch):
    model = mlp(8, 64, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    x = torch.randn(500, 8)
    y = x[:, :3].argmax(1)
    losses = []
    with watch(model, optimizer) as w:
        for _ in range(150):
            i = torch.randint(500, (32,))
            loss = F.cross_entropy(model(x[i]), y[i])
            loss.backward()
            size = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
            up = [0.05 * p.grad / size for p in model.parameters()]  # towards a larger loss nearby, and back
            with torch.no_grad():
                for p, change in zip(model.parameters(), up, strict=True):
                    p += change
            optimizer.zero_grad()
            F.cross_entropy(model(x[i]), y[i]).backward()
            with torch.no_grad():
                for p, change in zip(model.parameters(), up, strict=True):
                    p -= change
            optimizer.step()
            optimizer.zero_grad()
            w.step(loss)
            losses.append(loss.item())
    return w, losses


def line_of_two_parameters(watch):
    x = torch.linspace(0, 1, 100).unsqueeze(1)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    data = x[:80], 0.7 * x[:80] + 0.3
    return fit(watch, model, optimizer, data, F.l1_loss, 150, 80, (x[80:], 0.7 * x[80:] + 0.3))


ALL = {
    name: function
    for name, function in vars(sys.modules[__name__]).items()
    if inspect.isfunction(function) and list(inspect.signature(function).parameters) == ["watch"]
}
