"""Finding, swapping and freezing norms in models as people have them."""

import copy

import pytest
import torch
from checks import close
from torch import nn

import renorm as rn
from renorm.errors import PatternError, SwapError, UnknownNormError
from renorm.norms import named
from renorm.surgery import norms


class Block(nn.Module):
    """A residual block of a ResNet."""

    def __init__(self, channels):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class BatchNormAct2d(nn.BatchNorm2d):
    """A norm that also activates, as timm's of that name does."""

    def forward(self, x):
        return torch.relu(super().forward(x))


def resnet(channels=12):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, channels, 3),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        Block(channels),
        Block(channels),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 5),
    )
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 2)
                module.bias.normal_()
                module.running_mean.normal_()
    return model


X = torch.randn(4, 3, 9, 9)


def test_a_resnet_gets_group_norms_with_what_was_learnt():
    model = resnet()
    before = copy.deepcopy(model.state_dict())
    swapped, report = rn.swap(model, "batch -> group(4)")
    assert [change.name for change in report.changes] == ["1", "3.bn1", "3.bn2", "4.bn1", "4.bn2"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert type(model[1]) is nn.BatchNorm2d
    for old, new in zip(norms(model), norms(swapped), strict=True):
        assert isinstance(new.module, nn.GroupNorm)
        assert torch.equal(new.module.weight, old.module.weight)
        assert torch.equal(new.module.bias, old.module.bias)
    expected = nn.GroupNorm(4, 12)
    expected.load_state_dict(swapped[1].state_dict())
    close(swapped[1](model[0](X)), expected(model[0](X)), 1e-5)
    swapped(X).sum().backward()


def test_to_ones_own_kind_nothing_changes_but_the_class():
    model = resnet().eval()
    swapped, _ = rn.swap(model, "batch -> batch")
    assert not swapped[1].training
    assert type(swapped[1]) is rn.BatchNorm2d
    close(swapped(X), model(X), 1e-6)
    assert list(swapped.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize(
    "target", ["none", "layer", "instance", "group", "rms", "switch", "n [c] ...", "n (g [c]) [...] g=3"]
)
def test_every_target_runs_and_learns(target):
    swapped, report = rn.swap(resnet(), f"any -> {target}")
    assert len(report.changes) == 5
    swapped(X).sum().backward()
    assert all(parameter.grad is not None for parameter in swapped.parameters())


def test_rules_are_text_mapping_or_function():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.LayerNorm(6), nn.Linear(6, 2))
    for rule in ("batch -> none; layer->rms", {"batch": "none", "layer": "rms"}):
        swapped, _ = rn.swap(model, rule)
        assert type(swapped[1]) is nn.Identity
        assert type(swapped[2]) is rn.RMSNorm
    swapped, report = rn.swap(model, lambda name, norm: nn.Tanh() if name == "1" else None)
    assert type(swapped[1]) is nn.Tanh
    assert type(swapped[2]) is nn.LayerNorm
    assert len(report.changes) == 1


def test_the_first_rule_that_fits_counts():
    swapped, _ = rn.swap(nn.Sequential(nn.BatchNorm1d(4), nn.LayerNorm(4)), "batch -> group(2); any -> none")
    assert [type(module) for module in swapped] == [rn.GroupNorm, nn.Identity]


def test_groups_that_do_not_divide_become_the_largest_smaller_divisor():
    swapped, report = rn.swap(nn.Sequential(nn.BatchNorm2d(48)), "batch -> group(32)")
    assert swapped[0].num_groups == 24
    assert "32 groups do not divide 48 channels: 24 instead" in str(report)


def test_a_subclass_is_left_alone_and_reported():
    model = nn.Sequential(BatchNormAct2d(4), nn.BatchNorm2d(4))
    swapped, report = rn.swap(model, "batch -> group(2)")
    assert type(swapped[0]) is BatchNormAct2d
    assert type(swapped[1]) is rn.GroupNorm
    assert "0: BatchNormAct2d left alone (BatchNormAct2d may do more than normalize)" in str(report)
    with pytest.raises(SwapError, match="give a function"):
        rn.swap(nn.Sequential(BatchNormAct2d(4)), "batch -> group(2)")


def test_sequences_and_tokens_have_their_channels_last():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    for target, pattern in (("batch", "[...] c"), ("group(2)", "... (g [c])"), ("instance", "n [...] c")):
        swapped, _ = rn.swap(layer, f"layer -> {target}")
        assert swapped.norm1.pattern == pattern
        assert swapped(torch.randn(3, 5, 8)).shape == (3, 5, 8)


def test_torchs_fused_encoder_layer_does_not_skip_the_new_norm():
    """In evaluation torch's fast path would compute layer norm with the new norm's weights."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    swapped, report = rn.swap(layer, "layer -> group(2)")
    swapped.eval()
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        inner = x + swapped._sa_block(x, None, None)
        inner = swapped.norm1(inner)
        expected = swapped.norm2(inner + swapped._ff_block(inner))
        close(swapped(x), expected, 1e-6)
        assert (swapped(x) - layer.eval()(x)).abs().max() > 1e-2
    assert "fused encoder layer switched off" in str(report)


def test_tied_norms_stay_tied_and_frozen_parameters_stay_frozen():
    norm = nn.BatchNorm1d(4)
    norm.weight.requires_grad_(False)
    swapped, report = rn.swap(nn.ModuleList([norm, norm]), "batch -> group(2)")
    assert swapped[0] is swapped[1]
    assert not swapped[0].weight.requires_grad
    assert swapped[0].bias.requires_grad
    assert len(report.changes) == 2


def test_dtype_eps_momentum_and_mode_stay():
    norm = nn.BatchNorm2d(4, eps=1e-3, momentum=0.3, dtype=torch.float64).eval()
    (new, _) = rn.swap(norm, "batch -> switch")
    assert (new.eps, new.momentum, new.training) == (1e-3, 0.3, False)
    assert {p.dtype for p in new.parameters()} == {torch.float64}
    assert torch.equal(new.running_mean, norm.running_mean)


def test_norms_without_parameters_give_norms_without_parameters():
    new, _ = rn.swap(nn.BatchNorm2d(4, affine=False), "batch -> group(2)")
    assert list(new.parameters()) == []
    new, _ = rn.swap(nn.LayerNorm(4, bias=False), "layer -> batch")
    assert [name for name, _ in new.named_parameters()] == ["weight"]


def test_what_cannot_be_carried_over_is_said():
    _, report = rn.swap(nn.LayerNorm((4, 3, 3)), "layer -> group(2)")
    assert "weight and bias not carried over" in str(report)


def test_our_own_general_norms_are_found():
    model = nn.Sequential(
        rn.Norm("n [c ...]", c=4), rn.Norm("... [c]", center=False, c=4), rn.Norm("[a] b", b=4, weight="b")
    )
    assert [(site.kind, site.num_features, site.axis) for site in norms(model)] == [
        ("layer", 4, 1),
        ("rms", 4, -1),
        ("pattern", 0, -1),
    ]
    with pytest.raises(SwapError, match="how many channels"):
        rn.swap(model, "any -> batch")


@pytest.mark.parametrize(
    ("rule", "error", "words"),
    [
        ("batch", SwapError, "a rule reads"),
        ("batch -> a -> b", SwapError, "a rule reads"),
        ("", SwapError, "a rule reads"),
        ("bath -> group", SwapError, "left side of a rule.*did you mean 'batch'"),
        (None, SwapError, "a rule is text such as"),
        ("batch -> grop", UnknownNormError, "did you mean 'group'"),
        ("batch -> n [c", PatternError, "never closed"),
        ("instance -> group", SwapError, r"matches no norm of the model; it has 1 \(batch\), 3\.bn1 \(batch\)"),
        (lambda name, norm: None, SwapError, "the function replaced no norm"),
        (lambda name, norm: "group", SwapError, "must return a module or None"),
    ],
)
def test_rules_that_cannot_be_followed(rule, error, words):
    with pytest.raises(error, match=words):
        rn.swap(resnet(), rule)


def test_what_is_no_model():
    with pytest.raises(SwapError, match=r"in a torch\.nn\.Module; got 'resnet'"):
        rn.swap("resnet", "batch -> layer")


def test_lazy_norms_must_have_seen_an_input():
    with pytest.raises(SwapError, match="run a lazy layer on a batch first"):
        rn.swap(nn.Sequential(nn.LazyBatchNorm1d()), "batch -> group(2)")


def test_frozen_norms_survive_train():
    model, _ = rn.swap(resnet(), "batch -> batch")
    rn.freeze(model).train()
    state = copy.deepcopy(model.state_dict())
    y = model(X)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    close(y, model.eval()(X), 1e-6)
    assert not model[1].weight.requires_grad
    assert model[0].weight.requires_grad
    assert "frozen=True" in repr(model[1])
    assert copy.deepcopy(model)[1].frozen
    rn.unfreeze(model).train()
    model(X)
    assert model[1].num_batches_tracked == 1
    assert model[1].weight.requires_grad


def test_freezing_statistics_only():
    norm = rn.freeze(rn.BatchNorm1d(3), parameters=False)
    assert norm.weight.requires_grad
    norm(torch.randn(5, 3))
    assert norm.num_batches_tracked == 0


def test_what_cannot_be_frozen():
    with pytest.raises(SwapError, match="'batch -> batch'"):
        rn.freeze(resnet())
    with pytest.raises(SwapError, match="no renorm norm"):
        rn.freeze(nn.Linear(2, 2))


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("name", ["batch", "layer", "instance", "group(3)", "rms", "switch", "none"])
def test_named_norms_draw_no_random_numbers_and_keep_the_shape(name, axis):
    state = torch.get_rng_state()
    layer = named.build(name, 6, axis=axis)
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.randn(3, 6, 5) if axis == 1 else torch.randn(3, 5, 6)
    assert layer(x).shape == x.shape
    if name != "none" and (name, axis) != ("layer", 1):  # that one is a group norm of one group
        assert layer.pattern == named.pattern_of(named.parse(name), axis)


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("grup(3)", UnknownNormError, "did you mean 'group'"),
        ("layer(3)", UnknownNormError, "only group takes a number"),
        ("group(0)", UnknownNormError, "from 1 on"),
        ("xyz", UnknownNormError, "one of none, batch"),
        ("n [c] d=3", PatternError, "no axis 'd'"),
    ],
)
def test_names_that_are_none(text, error, words):
    with pytest.raises(error, match=words):
        named.parse(text)


def test_a_pattern_by_name_takes_its_open_size_from_the_channels():
    layer = named.build("n (g [c]) [...] g=3", 12)
    assert layer.sizes == {"g": 3, "c": 4}
    with pytest.raises(PatternError, match="10 channels cannot be split"):
        named.build("n (g [c]) [...] g=3", 10)


def test_values_per_set():
    shape = (5, 6, 4, 7)
    expected = {"batch": 140, "instance": 28, "layer": 168, "group(3)": 56, "rms": 168, "switch": 28}
    assert {name: named.build(name, 6).values_per_set(shape) for name in expected} == expected
    assert named.build("switch", 6, positions=False).values_per_set((5, 6)) == 5
