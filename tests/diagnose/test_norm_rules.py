"""What the rules about norms, modes and structure say of particular programs, and where they are silent."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import renorm as rn
from renorm.diagnose import check

zoo = rn.norms.zoo
CE = nn.CrossEntropyLoss()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class Net(nn.Module):
    """Layers by name, and a forward of them."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.call = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args, **kwargs):
        return self.call(self, *args, **kwargs)


def labels(n, classes=4):
    return torch.randint(classes, (n,))


MINE = {
    *("C00", "C16", "C17", "C18", "C19", "C19b", "C20", "C21", "C22", "C23", "C23b", "C28", "C30", "C30b", "C33"),
}


def found(model, loss=CE, batch=None, *, ids=MINE, **options):
    """Rule to severity, of the rules of this file."""
    report = check(model, loss, batch=batch, **options)
    assert not [failure for failure in report.failures if any(f"rule {id} " in failure for id in MINE)]
    return {f.id: f.severity for f in report.findings if f.id in ids}


def serious(*args, **options):
    return {id: s for id, s in found(*args, **options).items() if s != "info"}


def finding(id, *args, **options):
    report = check(*args, **options)
    return next(f for f in report.findings if f.id == id)


def images(n=16, channels=3, size=12):
    return torch.randn(n, channels, size, size), labels(n)


def head(channels):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4))


# ---- C16


@pytest.mark.parametrize("library", [nn, zoo])
def test_a_bias_is_subtracted_by_a_norm_of_either_library_and_rank(library):
    one = nn.Sequential(nn.Conv1d(3, 8, 3), library.BatchNorm1d(8), nn.Flatten(), nn.Linear(8 * 10, 4))
    assert found(one, batch=(torch.randn(16, 3, 12), labels(16))) == {"C16": "info"}
    two = nn.Sequential(nn.ConvTranspose2d(3, 8, 3), library.InstanceNorm2d(8), nn.ReLU(), head(8))
    assert found(two, batch=images()) == {"C16": "info"}
    three = nn.Sequential(nn.Conv3d(1, 4, 3), library.BatchNorm3d(4), nn.Flatten(), nn.Linear(4 * 64, 4))
    assert found(three, batch=(torch.randn(16, 1, 6, 6, 6), labels(16))) == {"C16": "info"}
    last = nn.Sequential(nn.Conv2d(3, 8, 3), library.BatchNorm2d(8), nn.ReLU(), head(8))
    x, y = images()
    assert found(last.to(memory_format=torch.channels_last), batch=(x.to(memory_format=torch.channels_last), y))


def test_functions_and_patterns_are_seen_too():
    def forward(self, x):
        x = F.conv2d(x, self.conv.weight, self.conv.bias)
        return self.head(F.relu(F.batch_norm(x, None, None, training=True)))

    assert found(Net(forward, conv=nn.Conv2d(3, 8, 3), head=head(8)), batch=images()) == {"C16": "info"}
    pattern = nn.Sequential(nn.Conv2d(3, 8, 3), rn.Norm("[n] c [...]", c=8), nn.ReLU(), head(8))
    assert found(pattern, batch=images()) == {"C16": "info"}


@pytest.mark.parametrize(
    "norm",
    [nn.GroupNorm(2, 8), zoo.GroupNorm(1, 8), zoo.SwitchNorm2d(8), nn.Identity(), rn.LayerNorm2d(8)],
    ids=lambda norm: type(norm).__name__,
)
def test_a_bias_that_is_not_subtracted_is_none_of_our_business(norm):
    assert found(nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), head(8)), batch=images()) == {}


def test_a_bias_that_has_other_uses_is_needed():
    def residual(self, x):
        y = self.conv(x)
        return self.head(y + self.norm(y))

    layers = {"conv": nn.Conv2d(3, 8, 3), "norm": nn.BatchNorm2d(8), "head": head(8)}
    assert found(Net(residual, **layers), batch=images()) == {}
    between = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), head(8))
    assert found(between, batch=images()) == {}
    frozen = nn.Sequential(nn.Conv2d(3, 8, 3), zoo.BatchNorm2d(8), nn.ReLU(), head(8))
    rn.freeze(frozen)
    assert found(frozen, batch=images()) == {}


@pytest.mark.parametrize("library", [nn, zoo])
def test_the_bias_is_taken_out_and_nothing_changes(library):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), library.BatchNorm2d(8), nn.ReLU(), head(8))
    for _ in range(3):
        model(torch.randn(16, 3, 12, 12))
    optimizer = torch.optim.AdamW(model.parameters())
    batch = images()
    report = check(model, CE, optimizer, batch)
    fixed = report.fix()
    assert fixed.model[0].bias is None
    assert isinstance(fixed.model[0].weight, nn.Parameter)
    held = {id(p) for group in fixed.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in fixed.model.parameters()}
    for mode in (True, False):
        x = batch[0]
        torch.testing.assert_close(
            copy.deepcopy(fixed.model).train(mode)(x), copy.deepcopy(model).train(mode)(x), rtol=1e-4, atol=1e-5
        )
    assert found(fixed.model, batch=batch) == {}


# ---- C17 and C18


@pytest.mark.parametrize("library", [nn, zoo])
@pytest.mark.parametrize(("n", "severity"), [(1, "error"), (2, "error"), (4, "warning"), (12, "info"), (16, None)])
def test_batch_norm_of_vectors(library, n, severity):
    model = nn.Sequential(nn.Linear(8, 16, bias=False), library.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    got = found(model, batch=(torch.randn(n, 8), labels(n)))
    assert got == ({} if severity is None else {"C17": severity})


def test_many_values_make_up_for_few_samples():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), head(8))
    assert serious(model, batch=images(2)) == {}
    assert serious(model, batch=images(1)) == {}


def test_functional_batch_norm_and_patterns_over_few_values():
    def forward(self, x):
        return self.out(F.batch_norm(self.first(x), self.mean, self.var, training=self.training))

    net = Net(forward, first=nn.Linear(8, 16, bias=False), out=nn.Linear(16, 4))
    net.register_buffer("mean", torch.zeros(16))
    net.register_buffer("var", torch.ones(16))
    assert found(net, batch=(torch.randn(2, 8), labels(2))) == {"C17": "error"}
    assert found(net, batch=(torch.randn(1, 8), labels(1))) == {"C17": "error"}
    pattern = nn.Sequential(nn.Linear(8, 16, bias=False), rn.Norm("[n] c", c=16), nn.Linear(16, 4))
    assert found(pattern, batch=(torch.randn(2, 8), labels(2))) == {"C17": "error"}
    ghosts = nn.Sequential(
        nn.Linear(8, 16, bias=False), rn.norms.batch.GhostBatchNorm(16, size=4), nn.ReLU(), nn.Linear(16, 4)
    )
    assert found(ghosts, batch=(torch.randn(32, 8), labels(32))) == {"C17": "warning"}
    made_for_it = nn.Sequential(nn.Linear(8, 16, bias=False), rn.norms.batch.BatchRenorm(16), nn.Linear(16, 4))
    assert found(made_for_it, batch=(torch.randn(4, 8), labels(4)), ids={"C17"}) == {}


def test_the_last_batch_is_predicted():
    data = TensorDataset(torch.randn(65, 8), labels(65))
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    assert found(model, loader=DataLoader(data, 32)) == {"C17": "error"}
    assert "65 samples in batches of 32 leave 1" in str(check(model, CE, loader=DataLoader(data, 32)))
    assert found(model, loader=DataLoader(data, 32, drop_last=True)) == {}
    assert found(model, loader=DataLoader(data, 13)) == {"C17": "info"}
    two = TensorDataset(torch.randn(66, 8), labels(66))
    assert found(model, loader=DataLoader(two, 32)) == {"C17": "warning"}
    conv = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), head(8))
    assert found(conv, loader=DataLoader(TensorDataset(*images(33)), 16)) == {}
    known = copy.deepcopy(model)
    known[1] = zoo.BatchNorm1d(16, one_value="running")
    assert found(known, loader=DataLoader(data, 32)) == {}
    assert found(copy.deepcopy(model).eval(), loader=DataLoader(data, 32), ids={"C17"}) == {}


def test_sets_of_one_and_two_values():
    def vectors(norm, n=16):
        model = nn.Sequential(nn.Linear(8, 16), norm, nn.ReLU(), nn.Linear(16, 4))
        return found(model, batch=(torch.randn(n, 8), labels(n)))

    assert vectors(nn.GroupNorm(16, 16)) == {"C18": "error"}
    assert vectors(nn.GroupNorm(16, 16), 1) == {"C18": "error"}  # which raises
    assert vectors(zoo.GroupNorm(16, 16)) == {"C18": "error"}
    assert vectors(nn.GroupNorm(8, 16)) == {"C18": "warning"}
    assert vectors(nn.GroupNorm(4, 16)) == {"C18": "info"}
    assert vectors(nn.GroupNorm(2, 16)) == {}
    assert vectors(rn.Norm("n (g [c])", g=16, c=1)) == {"C18": "error"}

    def forward(self, x):
        return self.out(F.group_norm(self.first(x), 16))

    net = Net(forward, first=nn.Linear(8, 16), out=nn.Linear(16, 4))
    assert found(net, batch=(torch.randn(16, 8), labels(16))) == {"C18": "error"}
    one = nn.Sequential(nn.Linear(8, 1), nn.LayerNorm(1), nn.ReLU(), nn.Linear(1, 4))
    assert found(one, batch=(torch.randn(16, 8), labels(16)), ids={"C18"}) == {"C18": "error"}
    pooled = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.InstanceNorm2d(8), nn.Flatten())
    assert found(pooled, batch=images(), ids={"C00", "C17", "C18"}) == {"C18": "error"}  # torch raises


def test_instance_norm_over_one_position_of_renorm():
    pooled = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), zoo.InstanceNorm2d(8), nn.Flatten(), nn.Linear(8, 4)
    )
    assert found(pooled, batch=images(), ids={"C00", "C17", "C18"}) == {"C18": "error"}


# ---- C19


def test_dropout_in_front_of_a_batch_norm():
    def mlp(*layers, width=64):
        return nn.Sequential(nn.Linear(8, width), nn.ReLU(), *layers, nn.ReLU(), nn.Linear(width, 4))

    batch = torch.randn(128, 8), labels(128)
    assert found(mlp(nn.Dropout(0.5), nn.BatchNorm1d(64)), batch=batch) == {"C19": "warning"}
    assert found(mlp(nn.Dropout(0.5), zoo.BatchNorm1d(64)), batch=batch) == {"C19": "warning"}
    assert found(mlp(nn.Dropout(0.5), nn.LayerNorm(64)), batch=batch) == {}
    assert found(mlp(nn.BatchNorm1d(64), nn.Dropout(0.5)), batch=batch) == {}
    wide = mlp(nn.Dropout(0.5), nn.BatchNorm1d(1024), width=1024)
    assert found(wide, batch=batch) == {"C19": "info"}
    blocks = [nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.5)]
    assert serious(mlp(*copy.deepcopy(blocks), *copy.deepcopy(blocks)), batch=batch) == {}
    frozen = mlp(nn.Dropout(0.5), zoo.BatchNorm1d(64))
    rn.freeze(frozen)
    assert found(frozen, batch=batch) == {}


def test_dropout_by_function_and_of_channels():
    def forward(self, x):
        return self.head(self.norm(F.dropout(F.relu(self.first(x)), 0.5, self.training)))

    net = Net(forward, first=nn.Conv2d(3, 16, 3), norm=nn.BatchNorm2d(16), head=head(16))
    assert found(net, batch=images()) == {"C19": "warning"}
    of_channels = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Dropout2d(0.5), nn.BatchNorm2d(16), head(16))
    assert found(of_channels, batch=images(32)) == {"C19": "warning"}


def test_the_residual_block_of_a_wide_network_is_left_alone():
    def forward(self, x):
        y = self.conv2(F.relu(self.norm2(self.dropout(self.conv1(F.relu(self.norm1(self.stem(x))))))))
        return self.head(y)

    net = Net(
        forward,
        stem=nn.Conv2d(3, 32, 3, bias=False),
        norm1=nn.BatchNorm2d(32),
        conv1=nn.Conv2d(32, 32, 3),
        dropout=nn.Dropout(0.3),
        norm2=nn.BatchNorm2d(32),
        conv2=nn.Conv2d(32, 32, 3),
        head=head(32),
    )
    assert serious(net, batch=images(16, 3, 16)) == {}


def test_dropout_on_the_output():
    def net(*last, loss=CE):
        model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4), *last)
        return found(model, loss, (torch.randn(64, 8), labels(64)), ids={"C19b"})

    assert net(nn.Dropout(0.3)) == {"C19b": "warning"}
    assert net(nn.Dropout(0.3), nn.LogSoftmax(1), loss=nn.NLLLoss()) == {"C19b": "warning"}
    assert net(nn.Dropout(0.0)) == {}
    assert net(nn.Identity()) == {}
    report = check(
        nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4), nn.Dropout(0.3)),
        CE,
        batch=(torch.randn(64, 8), labels(64)),
    )
    assert isinstance(report.fix().model[3], nn.Identity)


# ---- C20, C21, C22, C30


@pytest.mark.parametrize("library", [nn, zoo])
@pytest.mark.parametrize(
    ("options", "odd"),
    [
        ({"momentum": 0.9}, True),
        ({"momentum": 0.0}, True),
        ({"eps": 0.1}, True),
        ({"eps": 1e-12}, True),
        ({"momentum": None}, False),
        ({"momentum": 0.01, "eps": 1e-3}, False),
        ({"momentum": 0.9, "track_running_stats": False}, False),
    ],
)
def test_constants(library, options, odd):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), library.BatchNorm2d(8, **options), nn.ReLU(), head(8))
    assert found(model, batch=images()) == ({"C20": "warning"} if odd else {})


def test_constants_that_are_no_mistake():
    bert = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16, eps=1e-12), nn.GELU(), nn.Linear(16, 4))
    assert found(bert, batch=(torch.randn(16, 8), labels(16))) == {}
    rms = nn.Sequential(nn.Linear(8, 16), nn.RMSNorm(16), nn.GELU(), nn.Linear(16, 4))
    assert found(rms, batch=(torch.randn(16, 8), labels(16))) == {}


@pytest.mark.parametrize("norm", [nn.LayerNorm, zoo.LayerNorm, nn.RMSNorm])
def test_layer_norm_over_the_width(norm):
    conv = nn.Conv2d(3, 8, 3, padding=1)
    assert found(nn.Sequential(conv, norm(12), nn.ReLU(), head(8)), batch=images()) == {"C21": "warning"}
    after = nn.Sequential(conv, nn.GELU(), nn.Dropout(0.1), norm(12), head(8))
    assert found(after, batch=images()) == {"C21": "warning"}
    sound = nn.Sequential(nn.Conv1d(3, 8, 3), norm(10), nn.Flatten(), nn.Linear(80, 4))
    assert found(sound, batch=(torch.randn(16, 3, 12), labels(16))) == {"C21": "warning"}


@pytest.mark.parametrize("size", [8, 12])
def test_layer_norm_of_channels_at_the_end(size):
    def convnext(self, x):
        y = self.depthwise(x).permute(0, 2, 3, 1)
        y = self.out(F.gelu(self.wide(self.norm(y)))).permute(0, 3, 1, 2)
        return self.head(x + y)

    net = Net(
        convnext,
        depthwise=nn.Conv2d(8, 8, 3, padding=1, groups=8),
        norm=nn.LayerNorm(8),
        wide=nn.Linear(8, 32),
        out=nn.Linear(32, 8),
        head=head(8),
    )
    assert found(net, batch=images(16, 8, size)) == {}
    whole = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.LayerNorm([8, size, size]), nn.ReLU(), head(8))
    assert found(whole, batch=images(16, 3, size)) == {}
    channels = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), rn.LayerNorm2d(8), nn.ReLU(), head(8))
    assert found(channels, batch=images(16, 3, size)) == {}


def test_twice_in_a_row():
    relu = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.ReLU(), nn.Linear(16, 4))
    batch = torch.randn(32, 8), labels(32)
    assert found(relu, batch=batch) == {"C22": "info"}
    assert isinstance(check(relu, CE, batch=batch).fix().model[2], nn.Identity)
    norms = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 4))
    assert found(norms, batch=batch) == {"C22": "info"}

    def by_function(self, x):
        return self.out(F.relu(self.relu(self.first(x)))) + self.out(F.relu(self.first(x)))

    shared = Net(by_function, first=nn.Linear(8, 16), relu=nn.ReLU(), out=nn.Linear(16, 4))
    assert found(shared, batch=batch) == {"C22": "info"}
    assert check(shared, CE, batch=batch).fix().said == ()


def test_once_each_is_no_repetition():
    def residual(self, x):
        y = F.relu(self.first(x))
        return self.out(F.relu(y + self.second(y)))

    layers = {"first": nn.Linear(8, 16), "second": nn.Linear(16, 16), "out": nn.Linear(16, 4)}
    assert found(Net(residual, **layers), batch=(torch.randn(32, 8), labels(32))) == {}
    one = nn.ReLU()
    reused = nn.Sequential(nn.Linear(8, 16), one, nn.Linear(16, 16), one, nn.Linear(16, 4))
    assert found(reused, batch=(torch.randn(32, 8), labels(32))) == {}


def test_the_last_norms_that_torch_adds_itself_are_left_alone():
    net = Net(lambda self, x: self.out(self.whole(x, x)[:, 0]), whole=nn.Transformer(16, 2, 1, 1, 32, batch_first=True))
    net.out = nn.Linear(16, 4)
    assert found(net, batch=(torch.randn(8, 5, 16), labels(8))) == {}


def test_spectral_norm_that_is_settled():
    model = nn.Sequential(rn.norms.weight.spectral_norm(nn.Linear(64, 64)), nn.ReLU(), nn.Linear(64, 1))
    batch = torch.randn(32, 64), torch.randn(32, 1)
    assert found(model, nn.MSELoss(), batch) == {}
    assert found(model.eval(), nn.MSELoss(), batch) == {}
    lrn = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), rn.norms.local.LocalResponseNorm(5), head(8))
    assert found(lrn, batch=images()) == {"C30": "info"}


# ---- C23


def backbone():
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1))


def test_training_in_evaluation_mode():
    model = nn.Sequential(backbone(), head(8))
    assert found(model, batch=images()) == {}
    model.eval()
    assert found(model, batch=images()) == {"C23": "warning"}
    assert "model.train()" in finding("C23", model, CE, batch=images()).fix
    assert found(model, None, batch=images()) == {}  # nothing is trained
    part = nn.Sequential(backbone().eval(), head(8))
    assert found(part, batch=images()) == {"C23": "warning"}
    assert finding("C23", part, CE, batch=images()).module == "0"
    plain = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)).eval()
    assert found(plain, batch=(torch.randn(16, 8), labels(16))) == {}


def test_what_is_in_evaluation_mode_on_purpose():
    frozen = nn.Sequential(backbone().eval().requires_grad_(False), head(8))
    assert found(frozen, batch=images()) == {}
    model = nn.Sequential(backbone(), head(8))
    for _ in range(3):
        model(images()[0])
    model[0][1].eval()
    assert found(model, batch=images()) == {}
    model[0][3].eval()
    assert found(model, batch=images()) == {}
    others = torch.optim.SGD(model[1].parameters(), lr=0.1)
    model[0].eval()
    assert found(model, batch=images(), optimizer=others, ids={"C23"}) == {}
    unfrozen = nn.Sequential(backbone(), head(8))
    unfrozen[0][1].eval()  # with statistics that nothing was measured for
    assert found(unfrozen, batch=images()) == {"C23": "warning"}
    ours = nn.Sequential(nn.Conv2d(3, 8, 3), zoo.BatchNorm2d(8), nn.ReLU(), head(8))
    assert found(rn.freeze(ours), batch=images()) == {}


@pytest.mark.parametrize("library", [nn, zoo])
def test_frozen_norms_that_move(library):
    first = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), library.BatchNorm2d(8), nn.ReLU()).requires_grad_(False)
    model = nn.Sequential(first, head(8))
    assert found(model, batch=images()) == {"C23b": "warning"}
    first.eval()
    assert found(model, batch=images()) == {}
    only_norm = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), library.BatchNorm2d(8), nn.ReLU(), head(8))
    only_norm[1].requires_grad_(False)
    assert found(only_norm, batch=images()) == {"C23b": "warning"}
    fixed = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), library.BatchNorm2d(8, affine=False), nn.ReLU(), head(8))
    assert found(fixed, batch=images()) == {}


def test_gradients_that_pass_through_a_part_that_is_not_trained_now():
    generator = nn.Sequential(nn.Linear(8, 3 * 144), nn.Unflatten(1, (3, 12, 12)))
    critic = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.LeakyReLU(), head(8))
    model = nn.Sequential(generator, critic.requires_grad_(False))
    assert found(model, batch=(torch.randn(16, 8), labels(16))) == {"C23b": "info"}


# ---- C33


def test_the_gap_between_training_and_evaluation():
    model = nn.Sequential(nn.Linear(8, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x = torch.randn(512, 8)
    y = x[:, :1] * 2 + 1
    for i in range(150):
        part = slice(64 * (i % 8), 64 * (i % 8 + 1))
        optimizer.zero_grad()
        F.mse_loss(model(x[part]), y[part]).backward()
        optimizer.step()
    assert serious(model, nn.MSELoss(), (x[:64], y[:64]), ids={"C33"}) == {}
    moved = copy.deepcopy(model)
    moved[1].running_var *= 0.05
    assert found(moved, nn.MSELoss(), (x[:64], y[:64]), ids={"C33"}) == {"C33": "warning"}
    shifted = copy.deepcopy(model)
    got = finding("C33", shifted, nn.MSELoss(), batch=(x[:64] + 5, y[:64]))
    assert got.module == "1"
    fresh = nn.Sequential(nn.Linear(8, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 1))
    assert found(fresh, nn.MSELoss(), (x[:64] + 5, y[:64]), ids={"C33"}) == {}


# ---- C28


def mixes(model, batch, loss=CE, **options):
    return found(model, loss, batch, ids={"C28"}, **options)


def test_views_and_softmaxes_that_mix_samples():
    batch = torch.randn(16, 10, 6), labels(16)

    def viewed(self, x):
        return self.head(self.rnn(x.view(10, 16, 6))[0][-1])

    rnn = Net(viewed, rnn=nn.GRU(6, 8), head=nn.Linear(8, 4))
    assert mixes(rnn, batch) == {"C28": "error"}

    def permuted(self, x):
        return self.head(self.rnn(x.permute(1, 0, 2))[0][-1])

    assert mixes(Net(permuted, rnn=nn.GRU(6, 8), head=nn.Linear(8, 4)), batch) == {}

    def attending(self, x):
        x = self.first(x.flatten(1))
        return self.head(torch.softmax(x, 0) * x)

    wrong = Net(attending, first=nn.Linear(60, 16), head=nn.Linear(16, 4))
    got = finding("C28", wrong, CE, batch=batch)
    assert got.severity == "error"
    assert "softmax" in got.message

    def reshaped(self, x):
        return self.head(x.reshape(3, 16, 144).permute(1, 0, 2).flatten(1))

    images_viewed = Net(reshaped, head=nn.Linear(432, 4))
    assert mixes(images_viewed, images()) == {"C28": "error"}


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("pooled", [True, False])
def test_transformers(norm_first, pooled):
    def forward(self, tokens):
        x = self.encoder(self.embedding(tokens) + self.positions)
        return self.head(x.mean(1)) if pooled else self.head(x).transpose(1, 2)

    def build(batch_first):
        layer = nn.TransformerEncoderLayer(
            16, 4, 32, dropout=0.1, norm_first=norm_first, batch_first=batch_first, activation="gelu"
        )
        net = Net(
            forward,
            embedding=nn.Embedding(50, 16),
            encoder=nn.TransformerEncoder(
                layer, 2, norm=nn.LayerNorm(16) if norm_first else None, enable_nested_tensor=False
            ),
            head=nn.Linear(16, 4),
        )
        net.positions = nn.Parameter(0.1 * torch.randn(12, 16))
        return net

    tokens = torch.randint(50, (16, 12))
    target = labels(16) if pooled else torch.randint(4, (16, 12))
    assert serious(build(True), batch=(tokens, target)) == {}
    if pooled:
        assert mixes(build(False), (tokens, target)) == {"C28": "error"}
    else:
        loader = DataLoader(TensorDataset(tokens, target), 16)
        assert mixes(build(False), None, loader=loader) == {"C28": "error"}


def test_time_first_is_no_mixing():
    def forward(self, x):
        return self.head(self.rnn(x)[0])

    net = Net(forward, rnn=nn.LSTM(6, 8, bidirectional=True), head=nn.Linear(16, 1))
    assert mixes(net, (torch.randn(20, 8, 6), torch.randn(20, 8, 1)), nn.MSELoss()) == {}

    def last(self, x):
        return self.head(self.rnn(x)[0][-1])

    net = Net(last, rnn=nn.LSTM(6, 8), head=nn.Linear(8, 4))
    assert mixes(net, (torch.randn(20, 8, 6), labels(8))) == {}
    assert mixes(net, (torch.randn(8, 8, 6), labels(8))) == {}


def test_one_sequence_without_a_batch():
    def tagger(self, words):
        x = self.embedding(words)
        x, _ = self.rnn(x.view(len(words), 1, -1))
        return self.head(x.view(len(words), -1))

    net = Net(tagger, embedding=nn.Embedding(20, 6), rnn=nn.LSTM(6, 8), head=nn.Linear(8, 4))
    assert mixes(net, (torch.randint(20, (9,)), labels(9))) == {}
    unbatched = Net(lambda self, x: self.head(self.rnn(x)[0]), rnn=nn.LSTM(6, 8), head=nn.Linear(8, 4))
    batch = torch.randn(16, 6), labels(16)
    assert mixes(unbatched, batch) == {"C28": "warning"}
    assert mixes(unbatched, None, loader=DataLoader(TensorDataset(*batch), 16)) == {"C28": "error"}


def test_graphs_sets_and_similarities():
    adjacency = torch.eye(16) + (torch.rand(16, 16) > 0.8).float()
    x, y = torch.randn(16, 6), labels(16)

    def dense(self, x, adjacency):
        return self.second(adjacency @ F.relu(self.first(adjacency @ x)))

    layers = {"first": nn.Linear(6, 8), "second": nn.Linear(8, 4)}
    assert mixes(Net(dense, **layers), (x, adjacency, y)) == {}

    def closed(self, x):
        return self.second(adjacency @ F.relu(self.first(adjacency @ x)))

    assert mixes(Net(closed, **layers), (x, y)) == {}
    edges = torch.randint(16, (2, 40))

    def sparse(self, x, edges):
        h = self.first(x)
        return self.second(F.relu(torch.zeros_like(h).index_add(0, edges[1], h[edges[0]])))

    assert mixes(Net(sparse, **layers), (x, edges, y)) == {}

    def similarities(self, a, b):
        return F.normalize(self.first(a), dim=1) @ F.normalize(self.first(b), dim=1).T

    assert mixes(Net(similarities, first=nn.Linear(6, 8)), (x, torch.randn(16, 6), torch.arange(16))) == {}


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(8),
        nn.BatchNorm1d(8, track_running_stats=False),
        zoo.BatchNorm1d(8),
        zoo.BatchNorm1d(8, track_running_stats=False),
        zoo.SwitchNorm1d(8),
        rn.Norm("[n] c", c=8),
        rn.Norm("[n] c", c=8, running=None),
        nn.LayerNorm(8),
    ],
    ids=str,
)
def test_norms_over_the_batch_are_no_mixing(norm):
    net = nn.Sequential(nn.Linear(6, 8, bias=False), norm, nn.ReLU(), nn.Linear(8, 4))
    assert found(net, batch=(torch.randn(32, 6), labels(32)), ids={"C28", "C17", "C18", "C23"}) == {}


def test_what_is_random_or_drops_samples_is_no_mixing():
    def deep(self, x):
        x = F.relu(self.first(x))
        if self.training:
            x = x * (torch.rand(len(x), 1) > 0.2)  # stochastic depth
            x = 0.7 * x + 0.3 * x[torch.randperm(len(x))]  # mixup of features
        return self.out(x)

    net = Net(deep, first=nn.Linear(6, 8), out=nn.Linear(8, 4))
    assert found(net, batch=(torch.randn(32, 6), labels(32))) == {}
    always = Net(lambda self, x: self.out(F.dropout(self.first(x), 0.5)), first=nn.Linear(6, 8), out=nn.Linear(8, 4))
    assert mixes(always, (torch.randn(32, 6), labels(32))) == {}
    own = Net(lambda self, x: self.out((x - x.mean(0)) / x.std(0)), out=nn.Linear(6, 4))
    assert mixes(own, (torch.randn(32, 6), labels(32))) == {"C28": "info"}


# ---- C00


def test_what_does_not_run_is_said_once():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(500, 4))
    got = finding("C00", model, CE, batch=images())
    assert got.module == "3"
    assert "(16, 800)" in got.message
    assert "torch.nn.Linear(800, 4)" in got.fix
    assert found(model, batch=images()) == {"C00": "error"}
    floats = nn.Sequential(nn.Linear(8, 4))
    assert found(floats, batch=(torch.randn(16, 8), labels(16).float()), ids={"C00", "C15b"}) == {"C15b": "error"}
    double = finding("C00", floats, CE, batch=(torch.randn(16, 8).double(), labels(16)))
    assert "float64" in double.message
    assert "x.float()" in double.fix
    tokens = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(20, 4))
    got = finding("C00", tokens, CE, batch=(torch.full((16, 5), 10), labels(16)))
    assert "Embedding(11, 4)" in got.fix
    last = nn.Sequential(nn.Conv2d(3, 8, 3), head(8))
    got = finding("C00", last, CE, batch=(torch.randn(16, 12, 12, 3), labels(16)))
    assert "permute" in got.fix
    got = finding("C00", floats, nn.BCEWithLogitsLoss(), batch=(torch.randn(16, 8), torch.rand(16)))
    assert "(16, 4)" in got.message

    def raising(self, x):
        raise KeyError("nothing of the kind")

    got = finding("C00", Net(raising, inner=nn.Linear(2, 2)), CE, batch=images())
    assert "nothing of the kind" in got.message


# ---- more


def test_norms_that_mix_statistics_have_constants_and_modes_too():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), zoo.SwitchNorm2d(8, momentum=0.9), nn.ReLU(), head(8))
    assert found(model, batch=images()) == {"C20": "warning"}
    assert finding("C20", model, CE, batch=images()).module == "1"
    assert check(model, CE, batch=images()).fix().model[1].momentum == pytest.approx(0.1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), zoo.SwitchNorm2d(8), nn.ReLU(), head(8))
    model[:2].requires_grad_(False)
    assert found(model, batch=images()) == {"C23b": "warning"}
    assert found(check(model, CE, batch=images()).fix().model, batch=images()) == {}
    vectors = nn.Sequential(nn.Linear(8, 16), zoo.SwitchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    assert found(vectors, batch=(torch.randn(4, 8), labels(4))) == {}


def test_modes_are_mended():
    model = nn.Sequential(backbone(), head(8)).eval()
    assert check(model, CE, batch=images()).fix().model.training
    assert not model.training


def test_dropout_of_monte_carlo_evaluation_is_no_mode_mistake():
    model = nn.Sequential(backbone(), head(8))
    for _ in range(3):
        model(images()[0])
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    assert found(model, batch=images(), ids={"C23"}) == {}


def test_layers_of_the_users_own_are_looked_into():
    class Scaled(nn.Module):
        def forward(self, x):
            return F.softmax(x, 0)

    model = nn.Sequential(nn.Linear(8, 16), Scaled(), nn.Linear(16, 4))
    got = finding("C28", model, CE, batch=(torch.randn(16, 8), labels(16)))
    assert got.module == "1"


def test_a_maximum_over_the_batch_is_the_models_own_statistic():
    own = Net(lambda self, x: self.out(x / x.max()), out=nn.Linear(6, 4))
    assert mixes(own, (torch.randn(32, 6), labels(32))) == {"C28": "info"}
