"""Data, initial values, parameters and the optimizer: particular faults, and healthy programs that look like them."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from renorm.diagnose import check


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def of(report, *ids):
    """The findings of some rules."""
    assert not report.failures
    return [finding for finding in report.findings if finding.id in ids]


def one(report, id):
    """The only finding of a rule."""
    (finding,) = of(report, id)
    return finding


def quiet(report):
    """Nothing but infos."""
    assert not report.failures
    return not [str(finding) for finding in report.findings if finding.severity != "info"]


def mlp(*sizes, last=()):
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1], *last)


def classes(n=32, features=8, k=5):
    return torch.randn(n, features), torch.randint(k, (n,))


CE = nn.CrossEntropyLoss()
Adam = torch.optim.Adam


# ---- C13: inputs


def table(scale, offset=0.0, n=64):
    return torch.randn(n, 8) * torch.as_tensor(scale) + torch.as_tensor(offset)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: torch.randint(256, (16, 3, 8, 8)).float(), "are whole numbers from 0 to 255, as images in bytes are"),
        (lambda: torch.rand(16, 3, 8, 8) / 255, "are tiny"),
        (lambda: torch.randn(16, 3, 8, 8) * 3000, "have a standard deviation of "),
        (lambda: torch.randn(16, 3, 8, 8) + 290, "have a mean of 290 and a spread of only"),
    ],
    ids=["bytes", "scaled twice", "wide", "far"],
)
def test_images_that_are_not_scaled(make, says):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    finding = one(check(model, CE, batch=(make(), torch.randint(5, (16,)))), "C13")
    assert (finding.severity, finding.module) == ("warning", "0")
    assert says in finding.message


def test_a_column_that_is_not_scaled():
    scale = torch.ones(8)
    scale[3] = 5000
    finding = one(check(mlp(8, 16, 5), CE, batch=(table(scale), torch.randint(5, (64,)))), "C13")
    assert "in column 3" in finding.message


def test_a_column_far_from_zero():
    offset = torch.zeros(8)
    offset[5] = 2000
    finding = one(check(mlp(8, 16, 5), CE, batch=(table(1.0, offset), torch.randint(5, (64,)))), "C13")
    assert "a mean of 2000 and a spread of" in finding.message
    assert "in column 5" in finding.message


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_no_numbers(bad):
    x, y = classes()
    x[3, 2] = bad
    report = check(mlp(8, 16, 5), CE, batch=(x, y))
    finding = one(report, "C13")
    assert finding.severity == "error"
    assert finding.message.startswith("1 of the 256 input values at 0 are NaN or infinite")
    assert of(report, "C11b")


def test_dates_as_floats_into_a_recurrent_net():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.GRU(2, 8, batch_first=True), nn.Linear(8, 5)

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])

    x = torch.stack([torch.randn(16, 10), 700 + torch.arange(160.0).view(16, 10) / 50], 2)
    assert one(check(Net(), CE, batch=(x, torch.randint(5, (16,)))), "C13").module == "rnn"


class Behind(nn.Module):
    """A classifier of images behind some layer of the user's."""

    def __init__(self, first, channels=3):
        super().__init__()
        self.first = first
        self.conv, self.head = nn.Conv2d(channels, 4, 3), nn.Linear(4, 5)

    def forward(self, x):
        return self.head(F.relu(self.conv(self.first(x))).mean((2, 3)))


class Divide(nn.Module):
    def forward(self, x):
        return x.float() / 255


@pytest.mark.parametrize(
    "first",
    [nn.BatchNorm2d(3), nn.InstanceNorm2d(3), nn.GroupNorm(1, 3), Divide(), nn.Sequential(nn.Identity(), Divide())],
    ids=lambda layer: type(layer).__name__,
)
def test_a_model_that_scales_its_inputs_itself(first):
    x = torch.randint(256, (16, 3, 8, 8)).float()
    assert quiet(check(Behind(first), CE, batch=(x, torch.randint(5, (16,)))))


def images(kind):
    x = torch.rand(16, 3, 8, 8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return {
        "unit": x,
        "imagenet": (x - mean.view(3, 1, 1)) / std.view(3, 1, 1),
        "symmetric": 2 * x - 1,
        "white paper": (torch.rand(16, 3, 8, 8) < 0.95).float(),
        "decibels": -80 * x,
        "quiet decibels": -70 + 8 * torch.randn(16, 3, 8, 8),
    }[kind]


@pytest.mark.parametrize("kind", ["unit", "imagenet", "symmetric", "white paper", "decibels", "quiet decibels"])
def test_images_as_people_give_them(kind):
    report = check(Behind(nn.Identity()), CE, batch=(images(kind), torch.randint(5, (16,))))
    assert not of(report, "C13")


def spread_counts():
    counts = torch.poisson(torch.full((64, 200), 0.05))
    return counts * torch.where(torch.rand(64, 200) < 0.01, 80.0, 1.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: F.one_hot(torch.randint(200, (64,)), 200).float(),
        lambda: torch.poisson(torch.full((64, 200), 0.05)),
        spread_counts,
        lambda: torch.cat([torch.randn(64, 100), torch.ones(64, 100)], 1),
        lambda: torch.randint(17, (64, 200)).float(),
        lambda: F.normalize(torch.rand(64, 200)),
    ],
    ids=["one-hot", "counts", "counts with outliers", "constant columns", "digits", "unit rows"],
)
def test_tables_as_people_give_them(make):
    assert not of(check(mlp(200, 16, 5), CE, batch=(make(), torch.randint(5, (64,)))), "C13")


def test_token_ids():
    model = nn.Sequential(nn.Embedding(5000, 16), nn.Flatten(), nn.Linear(160, 5))
    assert quiet(check(model, CE, Adam(model.parameters()), (torch.randint(5000, (32, 10)), torch.randint(5, (32,)))))


# ---- C14: targets


@pytest.mark.parametrize(("mean", "std"), [(0, 300), (50, 1), (2e5, 7e4)], ids=["wide", "far", "prices"])
def test_targets_that_are_not_scaled(mean, std):
    for loss in (nn.MSELoss(), nn.L1Loss(), nn.SmoothL1Loss()):
        batch = torch.randn(64, 8), mean + std * torch.randn(64, 1)
        finding = one(check(mlp(8, 16, 1), loss, batch=batch), "C14")
        assert finding.severity == "warning"
        assert "y = (y - " in finding.fix


@pytest.mark.parametrize(("mean", "std"), [(0, 1), (0.5, 0.3), (22, 9), (1, 0.02)])
def test_targets_within_reach(mean, std):
    batch = torch.randn(64, 8), mean + std * torch.randn(64, 1)
    assert not of(check(mlp(8, 16, 1), nn.MSELoss(), batch=batch), "C14")


def test_a_model_that_scales_its_outputs_itself():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(8, 16, 1)

        def forward(self, x):
            return 500 + 300 * self.net(x)

    y = 500 + 300 * torch.randn(64, 1)
    assert not of(check(Scaled(), nn.MSELoss(), batch=(torch.randn(64, 8), y)), "C14")


def test_targets_that_are_masked():
    y = torch.randn(64, 3)
    missing = torch.rand(64, 3) < 0.3
    y[missing] = -999

    def loss(output, target):
        return (F.mse_loss(output, target, reduction="none") * (target != -999)).mean()

    assert not of(check(mlp(8, 16, 3), loss, batch=(torch.randn(64, 8), y)), "C14")
    assert of(check(mlp(8, 16, 3), nn.MSELoss(), batch=(torch.randn(64, 8), y)), "C14")


def test_an_autoencoder_of_images():
    x = torch.rand(16, 64).clamp(0.9, 1)
    assert quiet(check(mlp(64, 16, 64, last=(nn.Sigmoid(),)), nn.MSELoss(), batch=(x, x)))


# ---- C11: the loss at the start


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_loss_far_above_chance(reduction):
    model = mlp(8, 64, 10)
    nn.init.normal_(model[2].weight, std=2)
    loss = nn.CrossEntropyLoss(reduction=reduction)

    def mean(output, target):
        return loss(output, target).mean()

    finding = one(check(model, mean, batch=classes(64, 8, 10)), "C11")
    assert "ln 10 = 2.3" in finding.message
    assert finding.module == "2"


def test_a_binary_loss_far_above_chance():
    model = mlp(8, 64, 3)
    nn.init.normal_(model[2].weight, std=5)
    batch = torch.randn(64, 8), torch.randint(2, (64, 3)).float()
    assert "ln 2 = 0.693" in one(check(model, nn.BCEWithLogitsLoss(), batch=batch), "C11").message


def test_a_model_that_was_trained_starts_low():
    model, (x, y) = mlp(8, 64, 5), classes()
    optimizer = Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        CE(model(x), y).backward()
        optimizer.step()
    assert quiet(check(model, CE, optimizer, (x, y)))


def test_scaled_cosines_with_a_margin_start_high():
    class ArcFace(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.weight = mlp(8, 32, 16), nn.Parameter(torch.randn(50, 16))

        def forward(self, x):
            return 64 * F.linear(F.normalize(self.net(x)), F.normalize(self.weight)) - 32

    assert not of(check(ArcFace(), CE, batch=classes(64, 8, 50)), "C11")


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 50.0, 1.0, 1.0, 1.0])])
def test_weighted_and_ignored_classes(weight):
    x, y = classes()
    y[:20] = -100
    assert quiet(check(mlp(8, 16, 5), nn.CrossEntropyLoss(weight=weight), batch=(x, y)))


def test_where_the_first_nan_comes_from():
    class Log(nn.Module):
        def forward(self, x):
            return torch.log(x)

    report = check(nn.Sequential(nn.Linear(8, 5), Log()), nn.MSELoss(), batch=(torch.randn(32, 8), torch.randn(32, 5)))
    finding = one(report, "C11b")
    assert "the first NaN comes out of log() in 1, from inputs (32, 5) between -" in finding.message
    assert finding.module == "1"


def test_masks_of_minus_infinity_are_no_trouble():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 5)

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            mask = torch.full((6, 6), float("-inf")).triu(1)
            return self.head(((q @ k.mT + mask).softmax(-1) @ v).mean(1))

    assert quiet(check(Attention(), CE, batch=(torch.randn(16, 6, 8), torch.randint(5, (16,)))))


# ---- C24: what the optimizer has


def test_a_layer_that_was_replaced_later():
    model = mlp(8, 16, 10)
    optimizer = Adam(model.parameters())
    model[2] = nn.Linear(16, 5)
    report = check(model, CE, optimizer, classes())
    finding = one(report, "C24")
    assert finding.severity == "error"
    assert (
        "has 2 tensors from outside of the model, and does not have 2 tensors of the model with a gradient"
        in finding.message
    )
    assert "2.weight, 2.bias; 85 numbers" in finding.message
    fixed = report.fix()
    held = [p for group in fixed.optimizer.param_groups for p in group["params"]]
    assert any(p is fixed.model[2].weight for p in held)
    assert len(optimizer.param_groups[0]["params"]) == 4
    assert not of(check(fixed.model, CE, fixed.optimizer, classes()), "C24")


def test_an_optimizer_of_another_model():
    model = mlp(8, 16, 5)
    optimizer = Adam(copy.deepcopy(model).parameters())
    finding = one(check(model, CE, optimizer, classes()), "C24")
    assert finding.severity == "error"
    assert "nothing of the optimizer's 4 tensors is in the model" in finding.message


def test_a_weight_norm_put_on_later():
    model = mlp(8, 16, 5)
    optimizer = Adam(model.parameters())
    nn.utils.parametrizations.weight_norm(model[0])
    assert one(check(model, CE, optimizer, classes()), "C24").severity == "error"


class Vision(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(8))
        self.blocks, self.head = mlp(8, 16, 8), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.blocks(x + self.token))


def test_a_tensor_of_the_model_itself_that_was_forgotten():
    model = Vision()
    optimizer = Adam([*model.blocks.parameters(), *model.head.parameters()])
    finding = one(check(model, CE, optimizer, classes()), "C24")
    assert finding.severity == "error"
    assert "1 tensor of the model with a gradient (token; 8 numbers)" in finding.message


def test_a_block_that_is_left_out_is_a_warning():
    model = Vision()
    optimizer = Adam([model.token, *model.blocks.parameters()])
    finding = one(check(model, CE, optimizer, classes()), "C24")
    assert finding.severity == "warning"
    assert finding.module == "head"


def test_half_a_block_that_is_left_out():
    model = Vision()
    optimizer = Adam([model.token, *model.blocks[0].parameters(), *model.head.parameters()])
    assert one(check(model, CE, optimizer, classes()), "C24").severity == "error"


def test_the_group_without_decay_that_was_forgotten():
    model = mlp(8, 16, 5)
    report = check(model, CE, Adam([p for p in model.parameters() if p.dim() > 1]), classes())
    assert one(report, "C24").severity == "warning"


def test_a_layer_made_in_forward():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 16)

        def forward(self, x):
            x = F.relu(self.fc(x))
            if not hasattr(self, "head"):
                self.head = nn.Linear(x.shape[1], 5)
            return self.head(x)

    model = Net()
    finding = one(check(model, CE, Adam(model.parameters()), classes()), "C24")
    assert finding.module == "head"
    assert not hasattr(model, "head")


def test_a_tensor_given_twice():
    model = mlp(8, 16, 5)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = torch.optim.SGD([*model.parameters(), model[0].weight], lr=0.1)
    finding = one(check(model, CE, optimizer, classes()), "C24")
    assert (finding.severity, "1 tensor twice" in finding.message) == ("warning", True)


def test_frozen_backbones_and_teachers():
    model = mlp(8, 16, 5)
    model[0].requires_grad_(False)
    assert quiet(check(model, CE, Adam(model[2].parameters()), classes()))
    assert quiet(check(model, CE, Adam(model.parameters()), classes()))

    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.teacher, self.net = mlp(8, 16, 5).requires_grad_(False), mlp(8, 16, 5)

        def forward(self, x):
            return self.net(x), self.teacher(x)

    def loss(output, target):
        return CE(output[0], target) + F.mse_loss(output[0], output[1])

    model = Student()
    assert quiet(check(model, loss, Adam(model.net.parameters()), classes()))


class Adversaries(nn.Module):
    """Both nets of a GAN, and the generator's loss."""

    def __init__(self, names=("generator", "discriminator")):
        super().__init__()
        self.names = names
        for name, net in zip(names, (mlp(8, 16, 8), mlp(8, 16, 1)), strict=True):
            setattr(self, name, net)

    def forward(self, z):
        for name in self.names:
            z = getattr(self, name)(z)
        return z


@pytest.mark.parametrize("names", [("generator", "discriminator"), ("G", "D"), ("netG", "netD"), ("actor", "critic")])
def test_one_optimizer_of_two(names):
    model, batch = Adversaries(names), (torch.randn(32, 8), torch.ones(32, 1))
    assert quiet(check(model, nn.BCEWithLogitsLoss(), Adam(getattr(model, names[0]).parameters(), lr=2e-4), batch))
    assert quiet(check(model, nn.BCEWithLogitsLoss(), Adam(getattr(model, names[1]).parameters(), lr=2e-4), batch))


def test_one_net_of_two():
    generator, discriminator = mlp(8, 16, 8), mlp(8, 16, 1)

    def loss(output):
        return F.binary_cross_entropy_with_logits(discriminator(output), torch.ones(32, 1))

    both = Adam([*generator.parameters(), *discriminator.parameters()])
    assert quiet(check(generator, loss, Adam(generator.parameters()), [torch.randn(32, 8)]))
    assert quiet(check(generator, loss, both, [torch.randn(32, 8)]))


def test_optimizers_for_some_kinds_of_parameters():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.fc = nn.Embedding(100, 8, sparse=True), nn.Linear(8, 5)

        def forward(self, ids):
            return self.fc(self.embed(ids))

    model, batch = Net(), (torch.randint(100, (32,)), torch.randint(5, (32,)))
    assert quiet(check(model, CE, torch.optim.SparseAdam(model.embed.parameters()), batch))
    assert quiet(check(model, CE, Adam(model.fc.parameters()), batch)) is False  # nobody has the embedding
    net = mlp(8, 16, 5)
    assert quiet(check(net, CE, torch.optim.Muon([p for p in net.parameters() if p.dim() == 2]), classes()))


class Language(nn.Module):
    def __init__(self, vocabulary=50):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 16)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.rnn, self.head = nn.LSTM(16, 16, batch_first=True), nn.Linear(16, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.rnn(self.embed(ids))[0]).flatten(0, 1)


def test_tied_weights_and_groups():
    model = Language()
    batch = torch.randint(50, (8, 12)), torch.randint(50, (96,))
    assert quiet(check(model, CE, Adam(model.parameters(), lr=1e-3), batch))
    groups = [{"params": model.embed.parameters()}, {"params": model.rnn.parameters(), "lr": 1e-4}]
    assert quiet(check(model, CE, torch.optim.AdamW(groups, lr=1e-3), batch))


def test_parameters_of_the_loss_may_be_in_the_optimizer():
    class Center(nn.Module):
        def __init__(self):
            super().__init__()
            self.centers = nn.Parameter(torch.randn(5, 5))

        def forward(self, output, target):
            return CE(output, target) + 0.01 * (output - self.centers[target]).square().mean()

    model, loss = mlp(8, 16, 5), Center()
    assert quiet(check(model, loss, Adam([*model.parameters(), *loss.parameters()]), classes()))


def test_nothing_but_norms_is_trained():
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5))
    for layer in (model[0], model[3]):
        layer.requires_grad_(False)
    finding = one(check(model, CE, Adam(model[1].parameters()), classes(64)), "C24")
    assert finding.severity == "info"


@pytest.mark.parametrize(
    "kind", ["Adam", "AdamW", "SGD", "RMSprop", "Adagrad", "NAdam", "RAdam", "Adadelta", "LBFGS", "ASGD"]
)
def test_every_optimizer(kind):
    model = mlp(8, 32, 32, 5)
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=1e-3)
    assert quiet(check(model, CE, optimizer, classes()))


# ---- C25: gradients


def test_a_loss_without_a_graph():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 5)

        def forward(self, x):
            return torch.tensor(self.fc(x).tolist())

    finding = one(check(Net(), CE, batch=classes()), "C25")
    assert "does not depend on any of the 2 parameters" in finding.message


def test_a_graph_that_was_written_into():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.head = nn.Linear(8, 16), nn.Linear(16, 5)

        def forward(self, x):
            x = self.fc(x).sigmoid()
            y = self.head(x)
            x += 1
            return y

    finding = one(check(Net(), CE, batch=classes()), "C25")
    assert "modified by an inplace operation" in finding.message


def test_half_precision_gradients_that_overflow():
    model = mlp(8, 16, 5).half()

    def loss(output, target):
        return CE(output.float(), target) * 1e6

    x, y = classes()
    assert one(check(model, loss, batch=(x.half(), y)), "C25").severity == "error"


@pytest.mark.parametrize("kind", ["relu", "zeros", "saturated"])
def test_dead_layers(kind):
    model = mlp(8, 16, 16, 5)
    if kind == "relu":
        nn.init.constant_(model[0].bias, -50)
    if kind == "zeros":
        for p in model.parameters():
            nn.init.zeros_(p)
    if kind == "saturated":
        model[1] = nn.Sigmoid()
        nn.init.constant_(model[0].bias, 200)
    finding = one(check(model, CE, Adam(model.parameters()), classes()), "C25b")
    assert finding.severity == "error"
    assert "every entry is exactly 0" in finding.message
    says = {
        "relu": "1 behind 0 gives 0 for all 512 values",
        "zeros": "gives 0 for all",
        "saturated": "1 behind 0 gets values of size 200, where it is flat",
    }
    assert says[kind] in finding.message


def test_a_loss_that_depends_on_nothing():
    batch = torch.randn(32, 8), torch.randn(32, 5)
    report = check(mlp(8, 16, 5), lambda output, y: ((output - y) * (y > 100)).square().mean() + 1, batch=batch)
    assert one(report, "C25b").message.startswith("the loss is 1, and its gradient by all 4 parameters is exactly 0")


def test_a_model_that_is_all_frozen():
    model = mlp(8, 16, 5).requires_grad_(False)
    finding = one(check(model, CE, Adam(model.parameters()), classes()), "C25")
    assert (
        "requires_grad is False for all of the model's parameters, and the optimizer has 4 of them" in finding.message
    )
    finding = one(check(model, CE, None, classes()), "C25")
    assert finding.severity == "info"
    assert finding.message.endswith("requires_grad is False for all of the model's parameters; loss.backward() raises")
    assert quiet(check(nn.Flatten(), CE, None, classes()))  # nothing was frozen
    learning = nn.Linear(5, 5)  # of the loss
    assert quiet(check(model, lambda output, y: CE(learning(output), y), None, classes()))


@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.Tanh])
def test_activations_that_start_where_they_are_flat(activation):
    model = mlp(8, 16, 5)
    model[1] = activation()
    nn.init.normal_(model[0].weight, std=1000)
    finding = one(check(model, CE, batch=classes()), "C25e")
    assert (finding.module, finding.severity) == ("0", "warning")
    assert "of the inputs of 1 are beyond" in finding.message


class Residual(nn.Module):
    """Branches that start at zero."""

    def __init__(self, kind):
        super().__init__()
        self.inner, self.outer, self.norm = nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)
        self.scale = nn.Parameter(torch.zeros(1)) if kind == "rezero" else 1.0
        if kind == "gamma":
            nn.init.zeros_(self.norm.weight)
        if kind == "outer":
            nn.init.zeros_(self.outer.weight)
            nn.init.zeros_(self.outer.bias)
        if kind in ("head", "everything"):
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        if kind == "everything":
            nn.init.zeros_(self.norm.weight)

    def forward(self, x):
        return self.head(x + self.scale * self.norm(self.outer(F.relu(self.inner(x)))))


@pytest.mark.parametrize("kind", ["gamma", "outer", "head", "rezero", "everything"])
def test_branches_that_start_at_zero(kind):
    model = Residual(kind)
    assert quiet(check(model, CE, Adam(model.parameters()), classes()))


def test_lora():
    class LoRA(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer.requires_grad_(False)
            self.a = nn.Parameter(torch.randn(2, layer.in_features) / 4)
            self.b = nn.Parameter(torch.zeros(layer.out_features, 2))

        def forward(self, x):
            return self.layer(x) + F.linear(F.linear(x, self.a), self.b)

    model = nn.Sequential(LoRA(nn.Linear(8, 16)), nn.ReLU(), LoRA(nn.Linear(16, 5)))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert quiet(check(model, CE, Adam(trained, lr=1e-4), classes()))


class Experts(nn.Module):
    """`way`: those without samples are passed over, get an empty batch, or are multiplied by zero."""

    def __init__(self, way):
        super().__init__()
        self.way, self.router = way, nn.Linear(8, 4)
        self.experts, self.head = nn.ModuleList(mlp(8, 16, 8) for _ in range(4)), nn.Linear(8, 5)
        nn.init.constant_(self.router.bias, 0)
        self.router.bias.data[0] = -100  # nobody goes to the first

    def forward(self, x):
        gates = self.router(x).softmax(-1)
        choice, y = gates.argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = torch.where(choice == i)[0]
            if self.way == "multiply":
                y = y + (choice == i)[:, None] * gates[:, i : i + 1] * expert(x)
            elif len(rows) or self.way == "empty":
                y = y.index_add(0, rows, gates[rows, i : i + 1] * expert(x[rows]))
        return self.head(y)


@pytest.mark.parametrize("way", ["pass", "empty", "multiply"])
def test_experts_without_samples(way):
    model = Experts(way)
    report = check(model, CE, Adam(model.parameters()), classes())
    assert quiet(report)
    assert [f.severity for f in of(report, "C25d")] == (["info"] if way == "pass" else [])


def test_recurrence_over_one_step():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 5)

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])

    assert quiet(check(Net(), CE, batch=(torch.randn(32, 1, 8), torch.randint(5, (32,)))))


def test_a_hinge_that_is_satisfied():
    model = mlp(8, 16, 1)
    batch = torch.randn(32, 8), torch.ones(32, 1)
    assert quiet(check(model, lambda output, y: F.relu(-10 - output * y).mean(), batch=batch))


@pytest.mark.parametrize("layer", ["linear", "conv", "lstm"])
def test_units_that_stay_equal(layer):
    model = {
        "linear": lambda: mlp(8, 16, 5),
        "conv": lambda: nn.Sequential(
            nn.Unflatten(1, (1, 2, 4)), nn.Conv2d(1, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5)
        ),
        "lstm": lambda: Last(nn.LSTM(8, 16), nn.Linear(16, 5)),
    }[layer]()
    for name, p in model.named_parameters():
        nn.init.constant_(p, 0.1) if "weight" in name else nn.init.zeros_(p)
    finding = one(check(model, CE, batch=classes()), "C25c")
    assert finding.severity == "error"
    assert "have the same weights (mean 0.1) and get the same gradient" in finding.message


class Last(nn.Module):
    def __init__(self, rnn, head):
        super().__init__()
        self.rnn, self.head = rnn, head

    def forward(self, x):
        return self.head(self.rnn(x)[0])


def test_equal_units_that_will_differ():
    model = mlp(8, 16, 5)
    nn.init.constant_(model[0].weight, 0.1)  # the next layer tells its units apart
    assert quiet(check(model, CE, batch=classes()))
    model = mlp(8, 16, 5)
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    assert quiet(check(model, CE, batch=classes()))
    pool = nn.Conv2d(3, 3, 2, groups=3)
    nn.init.constant_(pool.weight, 0.25)
    model = nn.Sequential(pool, nn.Flatten(), nn.Linear(27, 5))
    assert quiet(check(model, CE, batch=(torch.rand(16, 3, 4, 4), torch.randint(5, (16,)))))


class Cut(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.way, self.encoder, self.head = way, mlp(8, 16, 16), nn.Linear(16, 5)

    def forward(self, x):
        if self.way == "no_grad":
            with torch.no_grad():
                return self.head(self.encoder(x))
        x = self.encoder(x)
        if self.way == "rebuilt":
            x = torch.tensor(x.detach().numpy()) if False else torch.tensor(x.tolist())
        return self.head(x.detach() if self.way == "detach" else x)


def test_a_graph_that_was_cut():
    model = Cut("rebuilt")
    finding = one(check(model, CE, Adam(model.parameters()), classes()), "C25d")
    assert finding.severity == "error"
    assert "the loss depends on encoder.0, encoder.2, and no gradient arrives there" in finding.message
    assert one(check(model, CE, None, classes()), "C25d").severity == "warning"
    model = Cut("detach")
    finding = one(check(model, CE, Adam(model.parameters()), classes()), "C25d")
    assert finding.severity == "warning"
    assert 'model.get_submodule("encoder.0").requires_grad_(False)' in finding.fix
    model = Cut("no_grad")
    assert not of(check(model, CE, Adam(model.head.parameters()), classes()), "C25d")


def test_target_networks_run_without_gradients():
    class Bootstrap(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.online, self.name = mlp(8, 16, 4), name
            setattr(self, name, mlp(8, 16, 4))

        def forward(self, x):
            with torch.no_grad():
                goal = getattr(self, self.name)(x)
            return F.mse_loss(self.online(x), goal)

    for name in ("target", "teacher", "slow"):
        model = Bootstrap(name)
        assert quiet(check(model, None, Adam(model.parameters()), [torch.randn(32, 8)]))


def test_layers_that_are_not_called():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.pooler = mlp(8, 16, 16), nn.Linear(16, 5), nn.Linear(16, 16)

        def forward(self, x):
            return self.head(self.body(x))

    model = Net()
    report = check(model, CE, Adam(model.parameters()), classes())
    assert quiet(report)
    assert "pooler: not called for this batch, 272 numbers" in one(report, "C25d").message


def test_gradients_that_vanish():
    model = nn.Sequential(*[part for _ in range(12) for part in (nn.Linear(16, 16), nn.Sigmoid())], nn.Linear(16, 5))
    assert one(check(model, CE, batch=(torch.randn(32, 16), torch.randint(5, (32,)))), "C25e").module == "0"


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_layer_scale(scale):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.gamma = nn.Linear(16, 16), nn.Parameter(scale * torch.ones(16))

        def forward(self, x):
            return x + self.gamma * self.fc(x)

    model = nn.Sequential(nn.Linear(8, 16), *[Block() for _ in range(10)], nn.Linear(16, 5))
    assert quiet(check(model, CE, Adam(model.parameters()), classes()))


# ---- C26: weight decay


def test_norms_move_to_a_group_of_their_own():
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 5))
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=3e-4, weight_decay=0.1, betas=(0.9, 0.95))
    x, y = classes()
    CE(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    report = check(model, CE, optimizer, (x, y))
    finding = one(report, "C26")
    assert finding.severity == "info"
    assert "decays 2 tensors of norms and 2 of biases by 0.1" in finding.message
    fixed = report.fix()
    first, second = fixed.optimizer.param_groups
    assert (first["weight_decay"], second["weight_decay"]) == (0.1, 0.0)
    assert (second["lr"], second["betas"]) == (3e-4, (0.9, 0.95))
    assert first["param_names"] == ["0.weight", "3.weight"]
    assert [p.dim() for p in first["params"]] == [2, 2]
    assert len(second["params"]) == 4
    norm = fixed.model[1].weight
    assert torch.equal(fixed.optimizer.state[norm]["exp_avg"], optimizer.state[model[1].weight]["exp_avg"])
    assert len(optimizer.param_groups) == 1
    assert not of(check(fixed.model, CE, fixed.optimizer, (x, y)), "C26")
    CE(fixed.model(x), y).backward()
    fixed.optimizer.step()


def test_decay_as_it_should_be():
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 5))
    for optimizer in (Adam(model.parameters()), torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=5e-4)):
        assert not of(check(model, CE, optimizer, classes()), "C26")


# ---- C27: steps


@pytest.mark.parametrize(
    "make",
    [
        lambda p: Adam(p, lr=1.0),
        lambda p: torch.optim.SGD(p, lr=1000),
        lambda p: torch.optim.RMSprop(p, lr=1),
    ],
    ids=["Adam", "SGD", "RMSprop"],
)
def test_steps_that_are_too_large(make):
    model = mlp(8, 64, 64, 5)
    finding = one(check(model, CE, make(model.parameters()), classes()), "C27")
    assert finding.severity == "warning"
    assert "steps on this batch take its loss from 1.6" in finding.message


def test_steps_that_leave_nothing_of_the_initial_weights():
    blocks = [part for _ in range(3) for part in (nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU())]
    model = nn.Sequential(nn.Linear(8, 32), *blocks, nn.Linear(32, 5))
    nn.init.normal_(model[-1].weight, std=1e-3)
    optimizer = Adam([{"params": model[:-1].parameters(), "lr": 1.0}, {"params": model[-1].parameters(), "lr": 0.01}])
    finding = one(check(model, CE, optimizer, classes()), "C27")
    assert "nothing of how they were initialized is left" in finding.message


def test_a_step_to_nan():
    model = mlp(8, 16, 5).half()
    model[0].bias.requires_grad_(False)
    x, y = classes()
    x[:, 0] = 0  # no gradient for its weights, and 0 / (0 + eps)
    report = check(model, lambda o, t: CE(o.float(), t), Adam(model.parameters()), (x.half(), y))
    finding = one(report, "C27")
    assert finding.severity == "error"
    assert "(float16) NaN or infinite, with eps=1e-08" in finding.message


def test_large_rates_that_work():
    linear = nn.Linear(8, 5)
    nn.init.normal_(linear.weight, std=1e-3)
    for optimizer in (torch.optim.SGD(linear.parameters(), lr=2.0), Adam(linear.parameters(), lr=0.05)):
        assert not of(check(linear, CE, optimizer, classes(256)), "C27")


def test_the_step_of_a_warm_up_and_of_optimizers_that_want_a_closure():
    model = mlp(8, 16, 5)
    optimizer = Adam(model.parameters(), lr=1.0)
    torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1e-4)
    assert quiet(check(model, CE, optimizer, classes()))

    class Closing(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 1e6})

        def step(self, closure):
            raise AssertionError("check must not call this")

    assert quiet(check(model, CE, Closing(model.parameters()), classes()))
    assert quiet(check(model, CE, torch.optim.LBFGS(model.parameters(), lr=1e6), classes()))


def test_steps_are_rehearsed_on_copies():
    model = mlp(8, 16, 5)
    optimizer = Adam(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    called = []
    optimizer.register_step_post_hook(lambda *_: called.append(1))
    x, y = classes()
    CE(model(x), y).backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 5
    called.clear()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
    grads = [p.grad.clone() for p in model.parameters()]
    assert of(check(model, CE, optimizer, (x, y), include=["C29"]), "C27")
    after = (model.state_dict(), optimizer.state_dict(), scheduler.state_dict())
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert called == []


def test_steps_that_are_lost():
    model = mlp(8, 64, 5).bfloat16()
    x, y = classes()
    report = check(model, CE, Adam(model.parameters(), lr=1e-6), (x.bfloat16(), y))
    assert "it is less than their last bit" in one(report, "C27b").message
    assert not of(check(model, CE, torch.optim.SGD(model.parameters(), lr=0.5), (x.bfloat16(), y)), "C27b")
    assert not of(check(model, CE, Adam(model.parameters(), lr=0.0), (x.bfloat16(), y)), "C27b")
    warming = Adam(model.parameters(), lr=1e-2)
    torch.optim.lr_scheduler.LinearLR(warming, start_factor=1e-4)
    assert not of(check(model, CE, warming, (x.bfloat16(), y)), "C27b")


# ---- C29: one batch


def test_one_batch_is_not_learnt():
    class Forgetful(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(8, 16, 5)

        def forward(self, x):
            return self.net(x.mean(0, keepdim=True).expand_as(x))

    assert not of(check(Forgetful(), CE, batch=classes()), "C29")
    finding = one(check(Forgetful(), CE, batch=classes(), include=["one-batch-is-not-learnt"]), "C29")
    assert finding.message.startswith("200 steps of Adam on this batch alone take its loss from 1.")
    model = mlp(8, 64, 5)
    assert not of(check(model, CE, Adam(model.parameters(), lr=1e-2), classes(), include=["C29"]), "C29")


# ---- C32: layers that are not registered


class Stack(nn.Module):
    def __init__(self, hold):
        super().__init__()
        self.first, self.head = nn.Linear(8, 16), nn.Linear(16, 5)
        self.held = hold([nn.Linear(16, 16), nn.Linear(16, 16)])

    def forward(self, x):
        x = self.first(x)
        for layer in self.held.values() if isinstance(self.held, dict) else self.held:
            x = F.relu(layer(x))
        return self.head(x)


HOLDS = {
    "list": (list, nn.ModuleList),
    "tuple": (tuple, nn.ModuleList),
    "dict": (lambda layers: {"a": layers[0], "b": layers[1]}, nn.ModuleDict),
}


@pytest.mark.parametrize("kind", HOLDS)
def test_layers_in_containers(kind):
    hold, mended = HOLDS[kind]
    model = Stack(hold)
    optimizer = Adam(model.parameters())
    x, y = classes()
    report = check(model, CE, optimizer, (x, y))
    finding = one(report, "C32")
    assert finding.severity == "error"
    assert f"held, a {kind} of 2 modules, holds 544 numbers that get a gradient" in finding.message
    fixed = report.fix()
    assert isinstance(fixed.model.held, mended)
    assert sum(len(group["params"]) for group in fixed.optimizer.param_groups) == 8
    assert isinstance(model.held, type(hold([1, 2])))
    assert len(optimizer.param_groups[0]["params"]) == 4
    if kind != "dict":
        assert torch.equal(fixed.model(x), model(x))
    assert any("more in the optimizer's first group" in said for said in fixed.said)


def test_a_layer_that_is_new_in_every_pass():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 16)

        def forward(self, x):
            return nn.Linear(16, 5)(F.relu(self.fc(x)))

    model = Net()
    finding = one(check(model, CE, Adam(model.parameters()), classes()), "C32")
    assert finding.severity == "error"
    assert finding.message.startswith("2 parameters (")
    assert "(5, 16)" in finding.message


def test_layers_in_a_list_that_the_optimizer_has():
    model = Stack(list)
    optimizer = Adam([*model.parameters(), *(p for layer in model.held for p in layer.parameters())])
    assert one(check(model, CE, optimizer, classes()), "C32").severity == "warning"
    assert not of(check(model, CE, optimizer, classes()), "C24")


def test_lists_of_layers_that_are_registered():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 5)
            self.order = [self.a, nn.ReLU(), self.b]
            self.by_name = {"a": self.a, 3: [self.b]}

        def forward(self, x):
            for layer in self.order:
                x = layer(x)
            return x

    model = Net()
    assert quiet(check(model, CE, Adam(model.parameters()), classes()))


def test_a_teacher_hidden_on_purpose():
    class Net(nn.Module):
        def __init__(self, frozen):
            super().__init__()
            self.net, self.teacher = mlp(8, 16, 5), [mlp(8, 16, 5).requires_grad_(not frozen)]

        def forward(self, x):
            with torch.no_grad():
                goal = self.teacher[0](x)
            return F.mse_loss(self.net(x), goal)

    for frozen in (True, False):
        model = Net(frozen)
        assert quiet(check(model, None, Adam(model.parameters()), [torch.randn(32, 8)]))


class Free(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.net, self.bias = mlp(8, 16, 5), bias

    def forward(self, x):
        return self.net(x) + self.bias


def test_tensors_that_are_no_parameters():
    report = check(Free(torch.zeros(5, requires_grad=True)), CE, batch=classes())
    assert "bias, a tensor, holds 5 numbers" in one(report, "C32").message
    assert isinstance(report.fix().model.bias, nn.Parameter)
    finding = one(check(Free(nn.Parameter(torch.randn(5)) * 0.1), CE, batch=classes()), "C32")
    assert finding.severity == "error"
    assert finding.mend is None
    model = Free(0.0)
    model.bias = [torch.zeros(5, requires_grad=True)]
    model.forward = lambda x: model.net(x) + model.bias[0]
    assert isinstance(check(model, CE, batch=classes()).fix().model.bias, nn.ParameterList)


def test_tensors_that_a_pass_leaves_behind():
    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.seen = mlp(8, 16, 5), []

        def forward(self, x):
            self.x = x.detach().clone().requires_grad_()
            self.last = self.net(self.x)
            self.seen.append(self.last)
            return self.last

    model = Caching()
    model(torch.randn(2, 8))
    assert quiet(check(model, CE, Adam(model.parameters()), classes()))
    x, y = classes()
    assert quiet(check(Free(torch.zeros(5)), CE, batch=(x.requires_grad_(), y)))
