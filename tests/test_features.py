"""What is particular to norms of single feature maps and positions, and to their foils; the rest is in checks.py."""

import copy
import math
import os

import pytest
import torch
import torch.nn.functional as F
from cases.features import CASES
from checks import close, eps_of, layouts
from torch import nn

import renorm as rn
from renorm.errors import BackendError, ShapeError
from renorm.norms.channels import LayerNorm2d, PositionalNorm, ScaleNorm
from renorm.norms.evo import EvoNormB0, EvoNormS0
from renorm.norms.pointwise import TLU, Derf, DyT
from renorm.norms.response import FRN, GlobalResponseNorm

CASE = {case.name: case for case in CASES}
BY_NAME = [pytest.param(case, id=case.name) for case in CASES]
NORMS = [pytest.param(case, id=case.name) for case in CASES if isinstance(case.make(), rn.Norm)]


def randomized(layer, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def twice(function, x):
    """A gradient and the gradient of its square."""
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    return first.detach(), second


@pytest.fixture(scope="module")
def keras():
    os.environ.setdefault("KERAS_BACKEND", "torch")
    return pytest.importorskip("keras")


# ---- all of them


@pytest.mark.parametrize("name", ["GlobalResponseNorm", "GlobalResponseNorm-second", "EvoNormB0-affine-only"])
def test_huge_and_tiny_inputs_where_the_output_is_as_large(name):
    case = CASE[name]
    for scale in (1e15, 1e-12):
        x = case.input() * scale
        expected = case.formula(case.layer(torch.float64), x.double(), None)
        for laid in layouts(x).values():
            close(case.layer()(laid) / scale, expected / scale, 1e-5 * max(1.0, (expected / scale).abs().max().item()))


@pytest.mark.parametrize("name", ["TLU", "DyT-second", "DyT", "Derf-second", "Derf"])
def test_mask_in_evaluation_of_layers_without_statistics(name):
    layer, x, mask = CASE[name].layer().eval(), CASE[name].input(), CASE[name].mask()
    assert torch.equal(layer(torch.where(mask, x, float("nan")), mask), torch.where(mask, layer(x), 0))


@pytest.mark.parametrize("name", ["EvoNormB0", "EvoNormB0-NC", "EvoNormB0-cumulative"])
def test_evolved_batch_norm_in_evaluation_measures_the_instance_under_the_mask(name):
    case = CASE[name]
    layer, reference, x, mask = case.layer(), case.layer(torch.float64), case.input(), case.mask()
    for one in (layer, reference):
        one(x.to(one.weight.dtype), mask)
        one.eval()
    for masked in (None, mask):
        dirty = x if masked is None else torch.where(mask, x, float("nan"))
        expected = case.formula(reference, x.double(), masked)
        close(layer(dirty, masked), expected if masked is None else torch.where(mask, expected, 0), 1e-5)


@pytest.mark.parametrize("case", BY_NAME)
def test_an_input_of_zeros_has_finite_derivatives(case):
    layer = case.layer(torch.float64)
    for dtype in (torch.float32, torch.float64):
        for gradient in twice(copy.deepcopy(layer).to(dtype), torch.zeros(case.shape, dtype=dtype)):
            assert gradient.isfinite().all()


@pytest.mark.parametrize("case", NORMS)
def test_the_reference_kernel_agrees(case):
    layer, x = case.layer(), case.input()
    other = copy.deepcopy(layer)
    other.backend = "reference"
    assert other.kernel(x) == "reference"
    for mask in (None, case.mask()):
        close(other(x, mask), layer(x, mask), 32 * eps_of(torch.float32))


@pytest.mark.parametrize("case", NORMS)
def test_with_a_residual(case):
    layer, x, y = case.layer(), case.input(), case.input(seed=7)
    found, total = copy.deepcopy(layer).add(x, y)
    assert torch.equal(total, x + y)
    close(found, copy.deepcopy(layer)(x + y), 32 * eps_of(torch.float32))


def test_a_backend_that_cannot_run():
    for layer in (EvoNormB0(6, backend="torch"), EvoNormS0(6, 3, backend="torch"), ScaleNorm(6, backend="torch")):
        with pytest.raises(BackendError, match="backend='torch' cannot run here"):
            layer(torch.ones(2, 6))


# ---- FRN and TLU


def test_filter_response_norm_of_vectors_is_a_sign_unless_eps_is_learnt():
    x = torch.tensor([[-3.0, 0.1], [2.0, -0.2]])
    close(FRN(2)(x), x.sign(), 1e-4)
    layer = FRN(2, learn_eps=True)
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias", "learnt_eps"]
    close(layer(x), x / (x * x + 1e-6 + 1e-4).sqrt(), 1e-6)
    layer(x).square().sum().backward()
    assert (layer.learnt_eps.grad < 0).all()
    assert "learn_eps=True" in repr(layer)
    assert "learn_eps" not in repr(FRN(2))


def test_a_learnt_eps_of_zero_divides_by_nothing():
    layer = FRN(2, learn_eps=True)
    nn.init.zeros_(layer.learnt_eps)
    x = torch.zeros(3, 2, 5, requires_grad=True)
    layer(x).sum().backward()
    assert all(gradient.isfinite().all() for gradient in (x.grad, layer.learnt_eps.grad))


def test_filter_response_norm_with_a_fixed_eps_runs_in_one_call():
    layer, x = FRN(3), torch.randn(2, 3, 4)
    assert layer.kernel(x) == rn.Norm("n c [...]", center=False, c=3).kernel(x)
    close(FRN(3, activation="relu")(x), layer(x).relu(), 1e-6)


def test_thresholded_linear_unit_starts_as_a_relu():
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(TLU(3)(x), x.relu())
    layer = TLU(3)
    nn.init.ones_(layer.tau)
    mask = torch.rand(2, 1, 4, 5) > 0.5
    y = layer(FRN(3)(x, mask), mask)
    assert (y[~mask.expand(x.shape)] == 0).all()
    assert (y[mask.expand(x.shape)] >= 1).all()


@pytest.mark.parametrize("layer", [TLU, DyT, Derf])
def test_axis_and_channels_of_pointwise_layers(layer):
    def make(axis):
        return layer(3, axis=axis)

    with pytest.raises(ShapeError, match="are on axis 1 or -1; got axis=2"):
        make(2)
    for axis, shape in ((1, (3,)), (1, (2, 4, 3)), (-1, (2, 3, 4))):
        with pytest.raises(ShapeError, match=f"dimension {axis} must have 3 entries; the input has shape"):
            make(axis)(torch.zeros(shape))
    with pytest.raises(ShapeError, match="a mask is boolean"):
        make(1)(torch.zeros(2, 3), torch.ones(2, 3))
    assert f"3, axis={1}" in repr(make(1))


def test_dynamic_tanh_holds_the_authors_state():
    layer = DyT(4, alpha=0.8)
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        "alpha": (1,),
        "weight": (4,),
        "bias": (4,),
    }
    x = torch.randn(3, 4)
    close(layer(x), (0.8 * x).tanh(), 1e-6)


def test_dynamic_erf_holds_the_authors_state():
    layer = Derf(4, alpha=0.8, shift=-0.3)
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        "alpha": (1,),
        "shift": (1,),
        "weight": (4,),
        "bias": (4,),
    }
    x = torch.randn(3, 4)
    # The error function is the Gaussian's distribution function, rescaled.
    close(layer(x), 2 * torch.special.ndtr(math.sqrt(2) * (0.8 * x - 0.3)) - 1, 1e-6)


# ---- global response norm


def test_global_response_norm_starts_as_the_identity_and_is_finite_at_zero():
    x = torch.randn(2, 4, 5, 3)
    assert torch.equal(GlobalResponseNorm(3)(x), x)
    layer = randomized(GlobalResponseNorm(3).double())
    zero = torch.zeros(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(layer(zero), layer.bias.expand(zero.shape))
    # Every share is 0 there, so what is left of the layer is the identity.
    (gradient,) = torch.autograd.grad(layer(zero).sum(), zero)
    assert torch.equal(gradient, torch.ones_like(gradient))


def test_global_response_norm_by_torchs_norm():
    layer, x = randomized(GlobalResponseNorm(3)), torch.randn(2, 4, 5, 3)
    length = x.norm(dim=(1, 2), keepdim=True)
    share = length / (length.mean(-1, keepdim=True) + 1e-6)
    close(layer(x), x + layer.weight * (x * share) + layer.bias, 1e-6)
    second = GlobalResponseNorm(3, axis=1)
    second.load_state_dict(layer.state_dict())
    close(second(x.movedim(-1, 1)).movedim(1, -1), layer(x), 1e-6)


@pytest.mark.parametrize("names", [("weight", "bias"), ("gamma", "beta")])
@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (1, 3, 1, 1), (3,)])
def test_global_response_norm_loads_other_states(names, shape):
    state = {f"norm.{name}": torch.randn(shape) for name in names}
    model = nn.ModuleDict({"norm": GlobalResponseNorm(3)})
    model.load_state_dict(state)
    assert torch.equal(model["norm"].weight, state[f"norm.{names[0]}"].flatten())
    assert torch.equal(model["norm"].bias, state[f"norm.{names[1]}"].flatten())
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({})


def test_global_response_norm_leaves_channels_without_entries_out():
    layer, x = randomized(GlobalResponseNorm(3, axis=1)), torch.randn(2, 3, 5)
    mask = torch.tensor([True, False, True]).view(1, 3, 1).expand(x.shape)
    two = GlobalResponseNorm(2, axis=1)
    two.load_state_dict({name: value[[0, 2]] for name, value in layer.state_dict().items()})
    close(layer(x, mask)[:, [0, 2]], two(x[:, [0, 2]]), 1e-6)


def test_axis_of_global_response_norm():
    with pytest.raises(ShapeError, match="are on axis 1 or -1; got axis=0"):
        GlobalResponseNorm(3, axis=0)


# ---- EvoNorms


def test_running_variance_of_evolved_batch_norm_is_biased():
    layer, x = EvoNormB0(3, momentum=0.25).double(), torch.randn(5, 3, 4, dtype=torch.float64)
    layer(x)
    close(layer.running_var, 0.75 + 0.25 * x.var((0, 2), unbiased=False), 1e-12)
    rn.freeze(layer)
    before = layer.running_var.clone()
    close(layer(x), layer.eval()(x), 1e-12)
    assert torch.equal(layer.running_var, before)


def test_evolved_norms_without_activation_are_weight_and_bias():
    x = torch.randn(2, 6, 4)
    for layer in (EvoNormB0(6, activate=False), EvoNormS0(6, 3, activate=False)):
        assert {name for name, _ in randomized(layer).named_parameters()} == {"weight", "bias"}
        assert not list(layer.buffers())
        close(layer(x), x * layer.weight.view(6, 1) + layer.bias.view(6, 1), 1e-6)
        assert "activate=False" in repr(layer)


def test_evolved_group_norm_of_one_large_v_is_a_relu_by_the_groups_deviation():
    layer = EvoNormS0(6, 2)
    nn.init.constant_(layer.v, 1e4)
    x = torch.randn(3, 6, 5)
    std = x.view(3, 2, 15).var(-1, unbiased=False).add(1e-5).sqrt().repeat_interleave(3, 1)[..., None]
    close(layer(x), x.relu() / std, 1e-4)


def test_groups_of_evolved_group_norm():
    for groups in (4, 0):
        with pytest.raises(ShapeError, match=f"got num_features=6 and num_groups={groups}"):
            EvoNormS0(6, groups)


# ---- over the channels of a position


def test_channel_layer_norm_is_torchs_between_two_permutations():
    theirs = randomized(nn.LayerNorm(6, eps=1e-6))
    ours = LayerNorm2d(6)
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours, nn.LayerNorm)
    assert ours.normalized_shape == (6,)
    x, dy = torch.randn(5, 6, 4, 7) + 3, torch.randn(5, 6, 4, 7)
    for laid in (x, x.contiguous(memory_format=torch.channels_last)):
        a, b = laid.clone().requires_grad_(), laid.clone().requires_grad_()
        y, z = ours(a), theirs(b.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        close(y, z, 1e-5)
        found = torch.autograd.grad(y, [a, *ours.parameters()], dy)
        expected = torch.autograd.grad(z, [b, *theirs.parameters()], dy)
        for ours_, theirs_ in zip(found, expected, strict=True):
            close(ours_, theirs_, 1e-5 * max(1.0, theirs_.abs().max().item()))
    with pytest.raises(ShapeError, match="dimension 1 must have 6 entries"):
        ours(torch.zeros(2, 5, 3))


def test_positional_norm_gives_and_takes_moments():
    norm, x = PositionalNorm(), torch.randn(5, 6, 4, 7) * 3 + 2
    y, mean, std = norm.split(x)
    assert torch.equal(y, norm(x))
    assert mean.shape == std.shape == (5, 1, 4, 7)
    close(mean, x.mean(1, keepdim=True), 1e-5)
    close(std, (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt(), 1e-5)
    close(norm.restore(y, mean, std), x, 1e-5)
    decoded = torch.randn(5, 2, 4, 7)  # other channels
    close(norm.restore(decoded, mean, std), decoded * std + mean, 1e-5)


def test_positional_norm_under_a_mask():
    norm, x = PositionalNorm(), torch.randn(5, 6, 4)
    mask = torch.rand(5, 6, 4) > 0.4
    mask[0, :, 0] = False
    y, mean, std = norm.split(torch.where(mask, x, float("nan")), mask)
    close(norm.restore(y, mean, std, mask), torch.where(mask, x, 0), 1e-5)
    assert mean[0, 0, 0] == 0
    close(std[0, 0, 0], torch.tensor(1.0), 1e-5)


def test_moments_of_positional_norm_carry_gradients():
    norm = PositionalNorm()
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm.split, x)
    assert torch.autograd.gradgradcheck(norm.split, x)
    half = torch.randn(2, 3, 4, dtype=torch.bfloat16)
    assert {part.dtype for part in norm.split(half)} == {torch.bfloat16}
    graph = torch.compile(norm.split, fullgraph=True, backend="aot_eager")
    for found, expected in zip(graph(x), norm.split(x), strict=True):
        close(found, expected, 1e-12)


def test_scale_norm_starts_as_rms_norm_and_keeps_zeros():
    x = torch.randn(3, 5, 8)
    close(ScaleNorm(8)(x), F.rms_norm(x, (8,), eps=0.0), 1e-6)
    assert ScaleNorm(8).g.shape == ()
    x[0, 0] = 0
    assert (ScaleNorm(8)(x)[0, 0] == 0).all()


def test_scale_norm_by_keras(keras):
    layer, x = ScaleNorm(8), torch.randn(3, 5, 8)
    nn.init.ones_(layer.g)
    close(layer(x), keras.layers.UnitNormalization()(x), 1e-6)


# ---- variants of RMS norm


def test_rms_norm_with_an_offset_loads_gemmas_weights():
    torch.manual_seed(0)
    weight, x = 0.1 * torch.randn(8), torch.randn(3, 5, 8)
    layer = rn.RMSNorm(8, 1e-6, offset=True)
    assert torch.equal(layer.weight, torch.zeros(8))
    layer.load_state_dict({"weight": weight})
    # As google/gemma_pytorch has it.
    expected = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + weight)
    close(layer(x), expected, 1e-6)
    nn.init.ones_(layer.weight)
    layer.reset_parameters()
    assert torch.equal(layer.weight, torch.zeros(8))
    assert "offset=True" in repr(layer)
    assert isinstance(layer, nn.RMSNorm)
    assert rn.RMSNorm(8, elementwise_affine=False, offset=True)(x).shape == x.shape


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("partial", [1.0, 0.5])
def test_an_offset_is_applied_on_every_way(backend, partial):
    torch.manual_seed(0)
    options = {"eps": 1e-6, "partial": partial, "backend": backend, "activation": "silu"}
    offset, plain = rn.RMSNorm(8, offset=True, **options), rn.RMSNorm(8, **options)
    nn.init.normal_(offset.weight)
    with torch.no_grad():
        plain.weight.copy_(1 + offset.weight)
    x, residual = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    mask = torch.rand(3, 5, 8) > 0.3
    for _ in range(2):  # the second time by the way that was found
        close(offset(x), plain(x), 1e-6)
    close(offset(x, mask), plain(x, mask), 1e-6)
    close(offset.add(x, residual)[0], plain.add(x, residual)[0], 1e-6)
    graph = torch.compile(copy.deepcopy(offset), fullgraph=True, backend="aot_eager")
    close(graph(x), plain(x), 1e-6)
    many = torch.randn(40_000, 8)  # so many that the traced graph has the native operator
    close(graph(many), plain(many), 1e-5)


def test_a_small_weight_beside_one_survives_half_precision():
    layer = rn.RMSNorm(256, 1e-6, offset=True, dtype=torch.bfloat16)
    nn.init.constant_(layer.weight, 0.003)  # 1.003 is 1 in bfloat16
    x = torch.ones(1, 256, dtype=torch.bfloat16) * 100
    y = layer(x.double().to(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert layer._applied()[0].dtype == torch.float32
    close(layer._applied()[0], 1 + layer.weight.double(), 1e-6)


def test_default_rms_norm_keeps_its_way():
    plain, x = rn.RMSNorm(8), torch.randn(3, 8)
    assert plain.kernel(x) == rn.Norm("... [c]", center=False, bias=False, eps=None, c=8).kernel(x)
    assert plain._plain
    assert not rn.RMSNorm(8, partial=0.5)._plain
    assert not copy.deepcopy(rn.RMSNorm(8, partial=0.5))._plain
    assert torch.equal(plain(x), rn.RMSNorm(8, partial=1.0)(x))


def test_partial_rms_norm_looks_at_the_first_entries_only():
    layer, x = rn.RMSNorm(100, 1e-6, partial=0.07), torch.randn(3, 100)
    expected = x / (x[:, :7].square().mean(-1, keepdim=True) + 1e-6).sqrt()
    close(layer(x), expected, 1e-5)
    x[:, 7] = float("inf")
    close(layer(x)[:, :7], expected[:, :7], 1e-5)
    assert "partial=0.07" in repr(layer)
    # At least one.
    one = rn.RMSNorm(4, 0.0, elementwise_affine=False, partial=1e-12)
    assert torch.equal(one(torch.tensor([[2.0, 4.0, 6.0, 8.0]])), torch.tensor([[1.0, 2.0, 3.0, 4.0]]))


@pytest.mark.parametrize(("shape", "partial"), [(8, 0.0), (8, 1.5), (8, -1.0), ((4, 8), 0.5)])
def test_part_of_partial_rms_norm(shape, partial):
    with pytest.raises(ShapeError, match=rf"more than 0 and at most 1; got partial={partial} over \d dimensions"):
        rn.RMSNorm(shape, partial=partial)
