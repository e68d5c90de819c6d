"""More hard negatives: conventions, masks, routing and losses that a rule for the usual case would get wrong."""

import math

import torch
import torch.nn.functional as F
from program import Program
from torch import nn


def _mlp(inside, outputs, *end, width=32):
    return nn.Sequential(nn.Linear(inside, width), nn.ReLU(), nn.Linear(width, outputs), *end)


def _adam(model, lr=1e-3):
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)


# ---- conventions of calls


def arguments_as_one_tuple() -> Program:
    """forward takes the pair as one argument and unpacks it itself."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = _mlp(8, 3)

        def forward(self, pair):
            a, b = pair
            return self.net(torch.cat([a, b], 1))

    model = Net()
    batch = (torch.randn(16, 4), torch.randn(16, 4)), torch.randint(3, (16,))
    return Program(model, nn.CrossEntropyLoss(), batch, _adam(model))


def batch_as_one_dict() -> Program:
    """forward takes the whole dict, and returns its loss in one."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = _mlp(8, 1)

        def forward(self, batch):
            prediction = self.net(batch["features"]).squeeze(1)
            return {"loss": F.mse_loss(prediction, batch["label"]), "prediction": prediction}

    model = Net()
    return Program(model, None, {"features": torch.randn(16, 8), "label": torch.randn(16)}, _adam(model))


def detection_in_lists() -> Program:
    """Images of several sizes in a list, targets in a list of dicts, a dict of losses out."""

    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.GroupNorm(4, 16), nn.ReLU())
            self.classes, self.boxes = nn.Linear(16, 5), nn.Linear(16, 4)

        def forward(self, images, targets):
            features = torch.stack([self.body(image[None]).mean((2, 3))[0] for image in images])
            labels = torch.stack([t["label"] for t in targets])
            boxes = torch.stack([t["box"] for t in targets])
            return {
                "classification": F.cross_entropy(self.classes(features), labels),
                "boxes": F.smooth_l1_loss(self.boxes(features), boxes),
            }

    model = Detector()
    images = [torch.rand(3, 12 + 4 * (i % 2), 16) for i in range(8)]
    targets = [{"label": torch.tensor(i % 5), "box": torch.rand(4)} for i in range(8)]
    return Program(model, lambda losses: sum(losses.values()), {"images": images, "targets": targets}, _adam(model))


def tokens_time_first() -> Program:
    """The word-level language model: tokens (T, N), states handed from batch to batch, targets flattened."""

    class RNNModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.encoder = nn.Dropout(0.2), nn.Embedding(60, 24)
            self.rnn, self.decoder = nn.LSTM(24, 32, 2, dropout=0.2), nn.Linear(32, 60)
            nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
            nn.init.zeros_(self.decoder.bias)
            nn.init.uniform_(self.decoder.weight, -0.1, 0.1)

        def forward(self, tokens, hidden):
            output, hidden = self.rnn(self.drop(self.encoder(tokens)), hidden)
            return F.log_softmax(self.decoder(self.drop(output)).view(-1, 60), dim=1), hidden

    model = RNNModel()
    hidden = (torch.zeros(2, 8, 32), torch.zeros(2, 8, 32))
    batch = (torch.randint(60, (20, 8)), hidden), torch.randint(60, (160,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return Program(model, lambda out, y: F.nll_loss(out[0], y), batch, optimizer)


def bag_of_instances() -> Program:
    """One slide: its 50 patches are the first dimension, its label is one number."""

    class AttentionMIL(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.attention = (
                nn.Linear(20, 32),
                nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 1)),
            )
            self.classifier = nn.Linear(32, 1)

        def forward(self, patches):
            h = F.relu(self.features(patches))
            weights = F.softmax(self.attention(h), dim=0)
            return self.classifier((weights * h).sum(0))

    model = AttentionMIL()
    return Program(model, nn.BCEWithLogitsLoss(), (torch.randn(50, 20), torch.ones(1)), _adam(model))


# ---- what is masked, and what is made inside


def unknown_labels_masked() -> Program:
    """-1 means unknown, and its loss is multiplied by 0."""

    def loss(logits, y):
        each = F.binary_cross_entropy_with_logits(logits, y, reduction="none")
        known = (y >= 0).float()
        return (each * known).sum() / known.sum()

    y = torch.randint(-1, 2, (32, 6)).float()
    model = _mlp(10, 6)
    return Program(model, loss, (torch.randn(32, 10), y), _adam(model))


def missing_targets_masked() -> Program:
    """Targets of -999 where nothing was measured, left out of the mean, behind a softplus."""

    def loss(out, y):
        each = F.mse_loss(out, y, reduction="none")
        return each[y > -900].mean()

    y = torch.rand(32, 4).masked_fill(torch.rand(32, 4) < 0.3, -999.0)
    model = _mlp(10, 4, nn.Softplus())
    return Program(model, loss, (torch.randn(32, 10), y), _adam(model))


def momentum_contrast() -> Program:
    """The positive stands first, so all labels are 0, and they are made in the model."""

    class MoCo(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder_q, self.encoder_k = _mlp(20, 16), _mlp(20, 16)
            self.encoder_k.load_state_dict(self.encoder_q.state_dict())
            self.encoder_k.requires_grad_(False)
            self.register_buffer("queue", F.normalize(torch.randn(16, 64), dim=0))

        def forward(self, a, b):
            q = F.normalize(self.encoder_q(a), dim=1)
            with torch.no_grad():
                k = F.normalize(self.encoder_k(b), dim=1)
            positive = torch.einsum("nc,nc->n", q, k).unsqueeze(-1)
            logits = torch.cat([positive, q @ self.queue.clone().detach()], 1) / 0.2
            return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))

    model = MoCo()
    x = torch.randn(32, 20)
    batch = {"a": x + 0.1 * torch.randn_like(x), "b": x + 0.1 * torch.randn_like(x)}
    return Program(model, None, batch, torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9))


def empty_masks() -> Program:
    """Crops without a single foreground pixel: all labels of this batch are 0."""
    model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 2, 1))
    batch = torch.randn(4, 1, 12, 12), torch.zeros(4, 12, 12, dtype=torch.long)
    return Program(model, nn.CrossEntropyLoss(weight=torch.tensor([0.1, 0.9])), batch, _adam(model))


def list_wise_ranking() -> Program:
    """One query: scores of its documents against a distribution over them, both one-dimensional."""
    model = nn.Sequential(*_mlp(10, 1), nn.Flatten(0))
    y = F.softmax(2 * torch.rand(20), 0)
    return Program(model, nn.CrossEntropyLoss(), (torch.randn(20, 10), y), _adam(model))


def probabilities_mixed() -> Program:
    """A softmax gate times sigmoid experts, by a matrix product: a probability, for BCELoss."""

    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.experts = nn.Linear(10, 3), nn.Linear(10, 3 * 4)

        def forward(self, x):
            gate = F.softmax(self.gate(x), 1).unsqueeze(1)
            experts = torch.sigmoid(self.experts(x)).view(-1, 3, 4)
            return torch.bmm(gate, experts).squeeze(1)

    model = Mixture()
    return Program(model, nn.BCELoss(), (torch.randn(32, 10), torch.randint(2, (32, 4)).float()), _adam(model))


def noisy_or() -> Program:
    """1 minus a product of complements, in [0, 1], for BCELoss."""

    class NoisyOr(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = _mlp(10, 5)

        def forward(self, x):
            return (1 - torch.prod(1 - torch.sigmoid(self.net(x) - 2), 1)).clamp(1e-6, 1 - 1e-6)

    model = NoisyOr()
    return Program(model, nn.BCELoss(), (torch.randn(32, 10), torch.randint(2, (32,)).float()), _adam(model))


def attention_weights_returned() -> Program:
    """Weights over a single key are returned for inspection: all ones, and nobody minds."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.score, self.out = nn.Linear(16, 1), nn.Linear(16, 3)

        def forward(self, x):
            y, _ = self.attention(x, x, x)
            weights = F.softmax(self.score(y), dim=1)
            return self.out((weights * y).sum(1)), weights

    model = Net()
    batch = torch.randn(16, 1, 16), torch.randint(3, (16,))
    return Program(model, lambda out, y: F.cross_entropy(out[0], y), batch, _adam(model))


# ---- sums


def variational_autoencoder_in_sums() -> Program:
    """The ELBO as the example of PyTorch has it: summed over pixels and samples, with Adam."""

    class VAE(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc21, self.fc22 = nn.Linear(64, 32), nn.Linear(32, 4), nn.Linear(32, 4)
            self.fc3, self.fc4 = nn.Linear(4, 32), nn.Linear(32, 64)

        def forward(self, x):
            h = F.relu(self.fc1(x.view(-1, 64)))
            mu, logvar = self.fc21(h), self.fc22(h)
            z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)
            return torch.sigmoid(self.fc4(F.relu(self.fc3(z)))), mu, logvar

    def loss(output, x):
        recon, mu, logvar = output
        bce = F.binary_cross_entropy(recon, x.view(-1, 64), reduction="sum")
        return bce - 0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())

    x = torch.rand(16, 1, 8, 8)
    model = VAE()
    return Program(model, loss, (x, x), _adam(model))


def sum_with_adam() -> Program:
    """A summed loss does not change the steps of Adam, which divides by the gradients' size."""
    model = _mlp(10, 4)
    batch = torch.randn(32, 10), torch.randint(4, (32,))
    return Program(model, nn.CrossEntropyLoss(reduction="sum"), batch, _adam(model))


def auxiliary_loss_not_yet() -> Program:
    """The weight of the second loss is ramped up from 0: its head has gradients of exactly 0 today."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.aux = nn.Linear(10, 32), nn.Linear(32, 4), nn.Linear(32, 10)

        def forward(self, x):
            h = F.relu(self.body(x))
            return self.head(h), self.aux(h), x

    def loss(output, y):
        logits, rebuilt, x = output
        return F.cross_entropy(logits, y) + 0.0 * F.mse_loss(rebuilt, x)

    model = Net()
    return Program(model, loss, (torch.randn(32, 10), torch.randint(4, (32,))), _adam(model))


# ---- samples that know of each other, on purpose


def minibatch_deviation() -> Program:
    """The deviation over the batch as a further channel of a discriminator (progressive GANs)."""

    class Discriminator(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(1, 16, 4, 2, 1), nn.Conv2d(17, 32, 4, 2, 1)
            self.fc = nn.Linear(128, 1)

        def forward(self, x):
            x = F.leaky_relu(self.conv1(x), 0.2)
            deviation = x.std(0, unbiased=False).mean().expand(len(x), 1, *x.shape[2:])
            x = F.leaky_relu(self.conv2(torch.cat([x, deviation], 1)), 0.2)
            return self.fc(x.flatten(1))

    model = Discriminator()
    batch = torch.randn(16, 1, 8, 8), torch.cat([torch.ones(8, 1), torch.zeros(8, 1)])
    return Program(model, nn.BCEWithLogitsLoss(), batch, torch.optim.Adam(model.parameters(), 1e-3, (0.0, 0.99)))


def mixed_inside_of_training() -> Program:
    """Manifold mixup: hidden features of two samples are mixed in training only."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(10, 32), nn.Linear(32, 4)

        def forward(self, x):
            h = F.relu(self.a(x))
            if self.training:
                h = 0.8 * h + 0.2 * h[torch.randperm(len(h))]
            return self.b(h)

    model = Net()
    return Program(model, nn.CrossEntropyLoss(), (torch.randn(32, 10), torch.randint(4, (32,))), _adam(model))


def crops_in_the_batch() -> Program:
    """Five crops a sample, folded into the batch and averaged again."""

    class FiveCrops(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.fc = nn.Linear(8, 4)

        def forward(self, x):
            n, crops = x.shape[:2]
            return self.fc(self.net(x.flatten(0, 1))).view(n, crops, -1).mean(1)

    model = FiveCrops()
    return Program(model, nn.CrossEntropyLoss(), (torch.randn(8, 5, 3, 8, 8), torch.randint(4, (8,))), _adam(model))


def sorted_by_length() -> Program:
    """Samples are sorted for packing inside of the model, and put back."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.gru, self.out = (
                nn.Embedding(40, 16, padding_idx=0),
                nn.GRU(16, 24, batch_first=True),
                nn.Linear(24, 3),
            )

        def forward(self, tokens):
            lengths, order = (tokens != 0).sum(1).sort(descending=True)
            packed = nn.utils.rnn.pack_padded_sequence(self.embed(tokens[order]), lengths, batch_first=True)
            _, h = self.gru(packed)
            return self.out(h[-1][order.argsort()])

    lengths = torch.randint(2, 10, (16,))
    tokens = torch.randint(1, 40, (16, 10)) * (torch.arange(10) < lengths[:, None])
    model = Net()
    return Program(model, nn.CrossEntropyLoss(), (tokens, torch.randint(3, (16,))), _adam(model))


def scaled_by_the_largest() -> Program:
    """All samples are divided by the largest value of the batch, as some do with spectra."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = _mlp(30, 3)

        def forward(self, x):
            return self.net(x / x.abs().max())

    model = Net()
    return Program(model, nn.CrossEntropyLoss(), (5 * torch.rand(32, 30), torch.randint(3, (32,))), _adam(model))


# ---- parts that are hidden, frozen or borrowed


def teacher_in_a_list() -> Program:
    """A list keeps the frozen teacher out of parameters() and of the checkpoint, on purpose."""

    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = _mlp(10, 4)
            self.teacher = [_mlp(10, 4, width=64).eval().requires_grad_(False)]

        def forward(self, x):
            return self.net(x), self.teacher[0](x)

    def loss(output, y):
        s, t = output
        return F.cross_entropy(s, y) + F.kl_div(F.log_softmax(s, 1), F.softmax(t, 1), reduction="batchmean")

    model = Student()
    return Program(model, loss, (torch.randn(32, 10), torch.randint(4, (32,))), _adam(model))


def perceptual_loss() -> Program:
    """A frozen feature net in the loss function, whose images are [0, 1]."""
    vgg = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)).eval()
    vgg.requires_grad_(False)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 3, 3, padding=1), nn.Sigmoid())

    def loss(out, y):
        return F.l1_loss(out, y) + F.mse_loss(vgg(out), vgg(y))

    x = torch.rand(4, 3, 12, 12)
    return Program(model, loss, (x, x), _adam(model))


def zero_convolutions() -> Program:
    """ControlNet: a trainable copy of a frozen block, joined by convolutions that start at zero."""

    class Controlled(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.SiLU()).requires_grad_(False)
            self.out = nn.Conv2d(16, 3, 3, padding=1).requires_grad_(False)
            self.copy = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.SiLU())
            self.zero_in, self.zero_out = nn.Conv2d(3, 3, 1), nn.Conv2d(16, 16, 1)
            for conv in (self.zero_in, self.zero_out):
                nn.init.zeros_(conv.weight)
                nn.init.zeros_(conv.bias)

        def forward(self, x, hint):
            return self.out(self.block(x) + self.zero_out(self.copy(x + self.zero_in(hint))))

    model = Controlled()
    x = torch.randn(8, 3, 8, 8)
    return Program(model, nn.MSELoss(), ((x, torch.rand(8, 3, 8, 8)), torch.randn(8, 3, 8, 8)), _adam(model))


def gradient_reversal() -> Program:
    """Domain-adversarial training: a custom function turns the gradient around."""

    class Reverse(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            return -0.1 * grad

    class DANN(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.classes, self.domain = nn.Linear(10, 32), nn.Linear(32, 3), nn.Linear(32, 1)

        def forward(self, x):
            h = F.relu(self.features(x))
            return self.classes(h), self.domain(Reverse.apply(h)).squeeze(1)

    def loss(output, y):
        half = len(y) // 2
        domain = (torch.arange(len(y)) < half).float()
        return F.cross_entropy(output[0][:half], y[:half]) + F.binary_cross_entropy_with_logits(output[1], domain)

    model = DANN()
    return Program(model, loss, (torch.randn(32, 10), torch.randint(3, (32,))), _adam(model))


def straight_through_bits() -> Program:
    """Signs with the gradient of the identity: round in the forward, on purpose."""

    class Binary(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(10, 32), nn.Linear(32, 4)

        def forward(self, x):
            h = torch.tanh(self.a(x))
            return self.b(h + (torch.sign(h) - h).detach())

    model = Binary()
    return Program(model, nn.CrossEntropyLoss(), (torch.randn(32, 10), torch.randint(4, (32,))), _adam(model))


def gumbel_softmax() -> Program:
    """Hard samples of a categorical variable in the middle of a model."""

    class Discrete(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = _mlp(10, 6), _mlp(6, 10)

        def forward(self, x):
            return self.decoder(F.gumbel_softmax(self.encoder(x), tau=1.0, hard=True))

    model = Discrete()
    x = torch.randn(32, 10)
    return Program(model, nn.MSELoss(), (x, x), _adam(model))


def experts_by_name() -> Program:
    """Dense experts weighted by a softmax, as attributes rather than in a list."""

    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.expert1, self.expert2 = nn.Linear(10, 2), _mlp(10, 3), _mlp(10, 3)

        def forward(self, x):
            g = F.softmax(self.gate(x), dim=1)
            return g[:, :1] * self.expert1(x) + g[:, 1:] * self.expert2(x)

    model = Dense()
    return Program(model, nn.CrossEntropyLoss(), (torch.randn(32, 10), torch.randint(3, (32,))), _adam(model))


# ---- heads and losses that are scaled, clipped or learnt


def tanh_clipped_logits() -> Program:
    """A pointer over 8 places with logits 10 * tanh(.), as in neural combinatorial optimization."""

    class Pointer(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.query = nn.Linear(2, 16), nn.Linear(16, 16)

        def forward(self, x):
            h = self.embed(x)
            q = self.query(h.mean(1, keepdim=True))
            return 10 * torch.tanh((q @ h.transpose(1, 2)).squeeze(1) / 4)

    model = Pointer()
    return Program(model, nn.CrossEntropyLoss(), (torch.rand(32, 8, 2), torch.randint(8, (32,))), _adam(model))


def scaled_sigmoid() -> Program:
    """Ratings from 1 to 5 by 1 + 4 * sigmoid."""

    class Ratings(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = _mlp(10, 1)

        def forward(self, x):
            return 1 + 4 * torch.sigmoid(self.net(x).squeeze(1))

    model = Ratings()
    return Program(model, nn.MSELoss(), (torch.randn(32, 10), torch.randint(1, 6, (32,)).float()), _adam(model))


def learned_scale_of_noise() -> Program:
    """A Laplace likelihood whose scale is a parameter of the model that is returned."""

    class Laplace(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.log_scale = _mlp(10, 1), nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return torch.distributions.Laplace(self.net(x).squeeze(1), self.log_scale.exp())

    model = Laplace()
    return Program(model, lambda d, y: -d.log_prob(y).mean(), (torch.randn(32, 10), torch.randn(32)), _adam(model))


def kl_of_logarithms() -> Program:
    """nn.KLDivLoss with log-probabilities and probabilities."""
    model = _mlp(10, 5, nn.LogSoftmax(1))
    y = F.softmax(torch.randn(32, 5), 1)
    return Program(model, nn.KLDivLoss(reduction="batchmean"), (torch.randn(32, 10), y), _adam(model))


def rates_of_counts() -> Program:
    """PoissonNLLLoss(log_input=False) on a softplus."""
    model = _mlp(10, 1, nn.Softplus())
    y = torch.poisson(torch.full((32, 1), 2.0))
    return Program(model, nn.PoissonNLLLoss(log_input=False), (torch.randn(32, 10), y), _adam(model))


def time_of_the_day() -> Program:
    """Hours and weekdays as sine and cosine beside standardized numbers."""
    hour, day = torch.randint(24, (64,)), torch.randint(7, (64,))
    angles = torch.stack([2 * math.pi * hour / 24, 2 * math.pi * day / 7], 1)
    x = torch.cat([angles.sin(), angles.cos(), torch.randn(64, 3)], 1)
    model = _mlp(7, 1)
    return Program(model, nn.MSELoss(), (x, torch.randn(64, 1)), _adam(model))


def long_tails() -> Program:
    """Float counts with a long tail, compressed by log1p in the model."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = _mlp(20, 2)

        def forward(self, x):
            return self.net(torch.log1p(x))

    model = Net()
    x = torch.exp(3 + 2 * torch.randn(64, 20))
    return Program(model, nn.CrossEntropyLoss(), (x, torch.randint(2, (64,))), _adam(model))


# ---- linear parts


def bottleneck_of_components() -> Program:
    """A linear autoencoder, which finds principal components: the narrow layer is the point."""
    x = torch.randn(64, 12)
    model = nn.Sequential(nn.Linear(12, 3, bias=False), nn.Linear(3, 12, bias=False))
    return Program(model, nn.MSELoss(), (x, x), _adam(model))


def embedding_and_head() -> Program:
    """Features end in a linear layer, and the classifier is another one, without an activation, as in face nets."""
    model = nn.Sequential(_mlp(10, 32), nn.Linear(32, 8))
    return Program(model, nn.CrossEntropyLoss(), (torch.randn(32, 10), torch.randint(8, (32,))), _adam(model))


def trend_and_season() -> Program:
    """DLinear: two linear layers beside each other, on a moving average and on what is left."""

    class DLinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.trend, self.season = nn.Linear(24, 6), nn.Linear(24, 6)

        def forward(self, x):
            smooth = F.avg_pool1d(F.pad(x, (2, 2), mode="replicate"), 5, 1)
            return self.trend(smooth) + self.season(x - smooth)

    model = DLinear()
    return Program(model, nn.MSELoss(), (torch.randn(16, 3, 24), torch.randn(16, 3, 6)), _adam(model))


def features_kept_for_later() -> Program:
    """Activations are stored on the module for a plot, beside what goes on."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.seen = nn.Linear(10, 32), nn.Linear(32, 4), None

        def forward(self, x):
            x = self.a(x)
            self.seen = F.relu(x)
            return self.b(torch.tanh(x))

    model = Net()
    return Program(model, nn.CrossEntropyLoss(), (torch.randn(32, 10), torch.randint(4, (32,))), _adam(model))


def each_with_each() -> Program:
    """Each with each, on purpose: pairwise differences of scores and of targets for a ranking loss."""

    def loss(score, y):
        better = (y[:, None] > y[None, :]).float()
        difference = score[:, None] - score[None, :]
        return (F.softplus(-difference) * better).sum() / better.sum()

    model = nn.Sequential(_mlp(10, 1), nn.Flatten(0))
    return Program(model, loss, (torch.randn(24, 10), torch.randn(24)), _adam(model))
