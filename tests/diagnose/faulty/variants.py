"""The same kinds of faults in other clothes: inside of models, by hand, behind views, with rarer losses."""

import torch
import torch.nn.functional as F
from program import Program, fault
from torch import nn


def _mlp(inside, outputs, *end, width=32):
    return nn.Sequential(nn.Linear(inside, width), nn.ReLU(), nn.Linear(width, outputs), *end)


def _adam(model, lr=1e-3):
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)


def _rows(classes=4, n=32):
    return torch.randn(n, 10), torch.randint(classes, (n,))


# ---- losses of logarithms, and of labels that are -1 and 1


@fault("C03b")
def distillation_of_probabilities() -> Program:
    """KLDivLoss of softmax and softmax, without a logarithm."""
    model = _mlp(10, 5, nn.Softmax(1))
    y = F.softmax(torch.randn(32, 5), 1)
    return Program(model, nn.KLDivLoss(reduction="batchmean"), (torch.randn(32, 10), y), _adam(model))


@fault("C03b")
def kl_of_logits() -> Program:
    """kl_div of logits, which have no lower bound for the loss."""
    model = _mlp(10, 5)
    y = F.softmax(torch.randn(32, 5), 1)
    return Program(
        model, lambda out, t: F.kl_div(out, t, reduction="batchmean"), (torch.randn(32, 10), y), _adam(model)
    )


@fault("C03b")
def ctc_of_logits() -> Program:
    """CTC on the outputs of a linear layer."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.fc = nn.GRU(12, 24), nn.Linear(24, 20)

        def forward(self, x):
            return self.fc(self.gru(x.permute(2, 0, 1))[0])

    def loss(out, target):
        labels, lengths = target
        return F.ctc_loss(out, labels, torch.full((len(labels),), len(out)), lengths)

    model = Net()
    batch = torch.randn(8, 12, 30), (torch.randint(1, 20, (8, 6)), torch.randint(3, 7, (8,)))
    return Program(model, loss, batch, _adam(model))


@fault("C03b")
def rates_taken_for_logarithms() -> Program:
    """PoissonNLLLoss with its default log_input=True behind a softplus."""
    model = _mlp(10, 1, nn.Softplus())
    y = torch.poisson(torch.full((32, 1), 0.7))
    return Program(model, nn.PoissonNLLLoss(), (torch.randn(32, 10), y), _adam(model))


@fault("C08b")
def cosine_labels_of_zero_and_one() -> Program:
    """CosineEmbeddingLoss with 0 for different pairs: they cost nothing."""

    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = _mlp(12, 8)

        def forward(self, a, b):
            return self.net(a), self.net(b)

    loss = nn.CosineEmbeddingLoss()
    model = Towers()
    batch = torch.randn(32, 12), torch.randn(32, 12), torch.randint(2, (32,)).float()
    return Program(model, lambda out, y: loss(*out, y), batch, _adam(model))


@fault("C08b")
def soft_margin_labels_of_zero_and_one() -> Program:
    """SoftMarginLoss with labels 0 and 1."""
    model = _mlp(10, 1)
    return Program(model, nn.SoftMarginLoss(), (torch.randn(32, 10), torch.randint(2, (32, 1)).float()), _adam(model))


@fault("C04")
def sigmoid_before_multi_label_margin() -> Program:
    """MultiLabelSoftMarginLoss applies a sigmoid, too."""
    model = _mlp(10, 6, nn.Sigmoid())
    y = (torch.rand(32, 6) < 0.3).float()
    return Program(model, nn.MultiLabelSoftMarginLoss(), (torch.randn(32, 10), y), _adam(model))


@fault("C08")
def softplus_for_signed_targets() -> Program:
    """nn.Softplus at the end, and standardized targets."""
    model = _mlp(10, 1, nn.Softplus())
    return Program(model, nn.MSELoss(), (torch.randn(32, 10), torch.randn(32, 1)), _adam(model))


# ---- the loss inside of the model, or by hand


@fault("C01")
def softmax_in_a_model_with_its_own_loss() -> Program:
    """A dict batch, and a model that takes the cross-entropy of its probabilities itself."""

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(50, 16), nn.Linear(16, 4)

        def forward(self, input_ids, labels=None):
            probabilities = self.out(self.embed(input_ids).mean(1)).softmax(-1)
            return {"loss": F.cross_entropy(probabilities, labels), "probabilities": probabilities}

    model = Classifier()
    batch = {"input_ids": torch.randint(50, (16, 8)), "labels": torch.randint(4, (16,))}
    return Program(model, None, batch, _adam(model))


@fault("C07")
def broadcast_in_a_model_with_its_own_loss() -> Program:
    """The same for a regression: (N, 1) and labels (N,) in F.mse_loss."""

    class Regressor(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = _mlp(10, 1)

        def forward(self, x, labels):
            return {"loss": F.mse_loss(self.net(x), labels)}

    model = Regressor()
    return Program(model, None, {"x": torch.randn(32, 10), "labels": torch.randn(32)}, _adam(model))


@fault("C07")
def broadcast_by_hand_in_a_model() -> Program:
    """(prediction - labels) ** 2 inside of the model."""

    class Regressor(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = _mlp(10, 1)

        def forward(self, x, labels):
            return ((self.net(x) - labels) ** 2).mean()

    model = Regressor()
    return Program(model, None, {"x": torch.randn(32, 10), "labels": torch.randn(32)}, _adam(model))


@fault("C07")
def root_of_a_broadcast_error() -> Program:
    """RMSE of (N, 1) and (N,)."""
    model = _mlp(10, 1)
    return Program(
        model,
        lambda out, y: torch.sqrt(F.mse_loss(out, y) + 1e-8),
        (torch.randn(32, 10), torch.randn(32)),
        _adam(model),
    )


@fault("C07")
def likelihood_by_hand_is_broadcast() -> Program:
    """-(y log p + (1 - y) log(1 - p)) with p of (N, 1) and y of (N,)."""
    model = _mlp(10, 1, nn.Sigmoid())

    def loss(p, y):
        return -(y * torch.log(p + 1e-7) + (1 - y) * torch.log(1 - p + 1e-7)).mean()

    return Program(model, loss, (torch.randn(32, 10), torch.randint(2, (32,)).float()), _adam(model))


@fault("C25", "C25d")
def loss_wrapped_anew() -> Program:
    """torch.tensor(loss.item(), requires_grad=True): backward() runs, and no parameter hears of it."""
    model = _mlp(10, 4)

    def loss(out, y):
        return torch.tensor(F.cross_entropy(out, y).item(), requires_grad=True)

    return Program(model, loss, _rows(), _adam(model))


@fault("C25")
def loss_through_numpy() -> Program:
    """The error is computed by NumPy."""
    model = _mlp(10, 1)

    def loss(out, y):
        return torch.as_tensor(((out.detach().numpy()[:, 0] - y.numpy()) ** 2).mean())

    return Program(model, loss, (torch.randn(32, 10), torch.randn(32)), _adam(model))


# ---- views and states that mix samples


@fault("C28")
def last_state_by_view() -> Program:
    """h of (2, N, H) by view(-1, 2H): the states of neighbours side by side."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(6, 16, batch_first=True, bidirectional=True)
            self.out = nn.Linear(32, 3)

        def forward(self, x):
            _, h = self.gru(x)
            return self.out(h.view(-1, 32))

    model = Net()
    return Program(model, nn.CrossEntropyLoss(), (torch.randn(16, 9, 6), torch.randint(3, (16,))), _adam(model))


@fault("C28")
def attention_without_batch_first() -> Program:
    """nn.MultiheadAttention's default on (N, T, F)."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.out = nn.MultiheadAttention(8, 2), nn.Linear(8, 3)

        def forward(self, x):
            return self.out((x + self.attention(x, x, x)[0]).mean(1))

    model = Net()
    return Program(model, nn.CrossEntropyLoss(), (torch.randn(16, 9, 8), torch.randint(3, (16,))), _adam(model))


@fault("C28")
def heads_by_view() -> Program:
    """Heads of attention by view(H, N, T, D) in place of a transposition."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 3)

        def forward(self, x):
            n, t, c = x.shape
            q, k, v = (z.reshape(4, n, t, c // 4) for z in self.qkv(x).chunk(3, -1))
            y = F.scaled_dot_product_attention(q, k, v).permute(1, 2, 0, 3).reshape(n, t, c)
            return self.out(y.mean(1))

    model = Net()
    return Program(model, nn.CrossEntropyLoss(), (torch.randn(16, 6, 16), torch.randint(3, (16,))), _adam(model))


# ---- dropout, norms and parameters


@fault("C31")
def attention_dropout_that_never_sleeps() -> Program:
    """scaled_dot_product_attention with dropout_p=0.1, whatever the mode."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 3)

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.out(F.scaled_dot_product_attention(q, k, v, dropout_p=0.1).mean(1))

    model = Net()
    return Program(model, nn.CrossEntropyLoss(), (torch.randn(16, 6, 16), torch.randint(3, (16,))), _adam(model))


@fault("C31", "C32")
def dropouts_in_a_list() -> Program:
    """nn.Dropout modules in a Python list: eval() does not reach them."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(10, 32), nn.Linear(32, 32)])
            self.dropouts = [nn.Dropout(0.3), nn.Dropout(0.3)]
            self.out = nn.Linear(32, 4)

        def forward(self, x):
            for layer, dropout in zip(self.layers, self.dropouts, strict=True):
                x = dropout(F.relu(layer(x)))
            return self.out(x)

    model = Net()
    return Program(model, nn.CrossEntropyLoss(), _rows(), _adam(model))


@fault("C24")
def unfrozen_after_the_optimizer() -> Program:
    """The optimizer was made of what required a gradient then; the body has been unfrozen since."""
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    optimizer = _adam(model)
    model.requires_grad_(True)
    return Program(model, nn.CrossEntropyLoss(), _rows(), optimizer)


@fault("C25b")
def norms_started_at_zero() -> Program:
    """Weight 0 in every norm of a net without shortcuts: ReLUs get 0, and give no gradient."""
    model = nn.Sequential(
        nn.Linear(10, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 4)
    )
    for m in model:
        if isinstance(m, nn.LayerNorm):
            nn.init.zeros_(m.weight)
    return Program(model, nn.CrossEntropyLoss(), _rows(), _adam(model))


@fault("C32", also=("C38",))
def list_of_blocks_in_a_transformer() -> Program:
    """self.blocks = [Block() for _ in range(depth)] in a model with other parameters."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(50, 16)
            self.blocks = [nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True) for _ in range(2)]
            self.head = nn.Linear(16, 50)

        def forward(self, tokens):
            x = self.embed(tokens)
            for block in self.blocks:
                x = block(x)
            return self.head(x).transpose(1, 2)

    model = Net()
    tokens = torch.randint(50, (8, 9))
    return Program(model, nn.CrossEntropyLoss(), (tokens[:, :-1], tokens[:, 1:]), _adam(model))


# ---- activations that are missing, and too much dropout


@fault("C34")
def no_activation_at_all() -> Program:
    """Three linear layers in a row."""
    model = nn.Sequential(nn.Linear(10, 64), nn.Linear(64, 32), nn.Linear(32, 4))
    return Program(model, nn.CrossEntropyLoss(), _rows(), _adam(model))


@fault("C34")
def convolutions_without_activation() -> Program:
    """Convolutions, average pooling, dropout and a linear layer; all of it linear."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3)
            self.drop, self.fc = nn.Dropout(0.2), nn.Linear(32, 4)

        def forward(self, x):
            x = F.avg_pool2d(self.conv1(x), 2)
            return self.fc(self.drop(self.conv2(x).mean((2, 3))))

    model = Net()
    return Program(model, nn.CrossEntropyLoss(), (torch.randn(16, 3, 14, 14), torch.randint(4, (16,))), _adam(model))


@fault("C34")
def activation_only_at_the_end() -> Program:
    """Linear layers with a sigmoid behind the last one only."""
    model = nn.Sequential(nn.Linear(10, 32), nn.Linear(32, 32), nn.Linear(32, 1), nn.Sigmoid())
    return Program(model, nn.BCELoss(), (torch.randn(32, 10), torch.randint(2, (32, 1)).float()), _adam(model))


@fault("C35")
def activation_without_assignment() -> Program:
    """F.relu(x) on a line of its own."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(10, 32), nn.Linear(32, 32), nn.Linear(32, 4)

        def forward(self, x):
            x = torch.tanh(self.a(x))
            x = self.b(x)
            F.relu(x)
            return self.c(x)

    model = Net()
    return Program(model, nn.CrossEntropyLoss(), _rows(), _adam(model))


@fault("C35")
def norm_without_assignment() -> Program:
    """self.bn(x) is called, and its result is not taken."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.fc = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Linear(16, 4)

        def forward(self, x):
            x = self.conv(x)
            self.bn(x)
            return self.fc(F.relu(x).mean((2, 3)))

    model = Net()
    return Program(model, nn.CrossEntropyLoss(), (torch.randn(16, 3, 8, 8), torch.randint(4, (16,))), _adam(model))


@fault("C19c")
def probability_to_keep() -> Program:
    """Dropout(0.9), where 0.9 was the probability to keep."""
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Dropout(0.9), nn.Linear(64, 4))
    return Program(model, nn.CrossEntropyLoss(), _rows(), _adam(model))


# ---- numbers


@fault("C13")
def inputs_of_nothing() -> Program:
    """A data set that reads no file and gives zeros."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    return Program(model, nn.CrossEntropyLoss(), (torch.zeros(16, 3, 12, 12), torch.randint(4, (16,))), _adam(model))


@fault("C13")
def one_sample_many_times() -> Program:
    """An index that does not move: every sample of the batch is the same one, with labels of others."""
    model = _mlp(10, 4)
    return Program(
        model, nn.CrossEntropyLoss(), (torch.randn(1, 10).repeat(32, 1), torch.randint(4, (32,))), _adam(model)
    )


@fault("C13", also=("C11",))
def hounsfield_units() -> Program:
    """CT images from -1000 to 3000 into a net without norms."""
    model = nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 2))
    x = (torch.randn(8, 1, 16, 16) * 500 - 200).clamp(-1000, 3000)
    return Program(model, nn.CrossEntropyLoss(), (x, torch.randint(2, (8,))), _adam(model))


@fault("C14")
def ages() -> Program:
    """Ages from 18 to 90 for a head around 0."""
    model = _mlp(10, 1)
    return Program(model, nn.MSELoss(), (torch.randn(64, 10), 18 + 72 * torch.rand(64, 1)), _adam(model))
