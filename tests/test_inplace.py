"""In-place activated batch norm: what is kept, what is recovered; and the norms that take in their neighbours."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from checks import close, eps_of, layouts
from torch import nn
from torch.utils.checkpoint import checkpoint

import renorm as rn
from renorm.errors import BackendError, ShapeError, UnknownNormError
from renorm.kernels import extension
from renorm.norms import inplace
from renorm.norms.inplace import InPlaceBatchNorm2d

needs_native = pytest.mark.skipif(extension.module() is None, reason="renorm was installed without its extension")
BACKENDS = [pytest.param("native", marks=needs_native), "reference"]
ACTIVATIONS = {
    "leaky_relu": lambda u, slope: F.leaky_relu(u, slope),
    "elu": lambda u, slope: F.elu(u, slope),
    "identity": lambda u, slope: u,
}
SHAPE = (5, 8, 4, 7)
# Of any sign; 0, and too small to invert; far below the bias, and just enough above an eighth of it.
WEIGHT = [1.0, -0.7, 0.0, -0.0, 1e-30, 0.01, -0.14, 3.0]
BIAS = [0.5, 0.3, 0.7, 0.0, 0.2, -1.0, 1.0, 0.0]


def made(activation="leaky_relu", dtype=torch.float32, **options):
    layer = InPlaceBatchNorm2d(8, activation=activation, dtype=dtype, **options)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(WEIGHT, dtype=torch.float64))
        layer.bias.copy_(torch.tensor(BIAS, dtype=torch.float64))
    return layer


def draw(seed=0, shape=SHAPE, mean=0.5):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + mean


class Apart(nn.Module):
    """Torch's batch norm and activation, in float64."""

    def __init__(self, layer):
        super().__init__()
        self.norm = nn.BatchNorm2d(layer.num_features, dtype=torch.float64)
        self.norm.load_state_dict(layer.state_dict())
        self.follow, self.slope = ACTIVATIONS[layer.activation], layer.slope

    def forward(self, x):
        return self.follow(self.norm(x), self.slope)


def run(layer, x, dz):
    """Values and gradients for an input that is the result of an operation, as a convolution's is."""
    leaf = x.detach().requires_grad_()
    z = layer(leaf.clone())
    return z, torch.autograd.grad(z, [leaf, *layer.parameters()], dz)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_and_gradients_are_those_of_batch_norm_and_activation(backend, activation, dtype):
    """Whatever the weight (inplace_abn#92 has abs(weight) + eps, so that batch norm's do not carry over)."""
    for slope, seed in itertools.product((0.01, 0.5), range(2)):
        layer = made(activation, dtype, slope=slope, backend=backend)
        assert list(layer.state_dict()) == list(nn.BatchNorm2d(8).state_dict())
        x, dz = draw(seed).to(dtype), draw(seed + 10).to(dtype)
        exact = Apart(layer)
        wanted = run(exact, x.double(), dz.double())
        z, gradients = run(layer, x, dz)
        unit = eps_of(dtype)
        close(z, wanted[0], 4 * unit * wanted[0].abs().max().item())
        for found, gradient in zip(gradients, wanted[1], strict=True):
            # Three bits for the inversion, and half of the digits for ELU where it is nearly flat.
            lost = 8 + (unit**-0.5 if activation == "elu" else 0)
            close(found, gradient, 2 * lost * unit * gradient.abs().max().item())
        for name, value in exact.norm.state_dict().items():
            close(layer.state_dict()[name], value, 4 * unit)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_inversion_in_float32_costs_a_digit(backend, activation):
    """Beside batch norm and activation in float32, whose gradients are off by up to a unit or two."""
    layer = made(activation, backend=backend)
    apart = Apart(layer).float()
    x, dz = draw().float(), draw(1).float()
    exact = run(Apart(layer), x.double(), dz.double())[1]
    errors = []
    for one in (layer, apart):
        gradients = run(one, x, dz)[1]
        errors.append(
            max(
                ((found - wanted).abs().max() / wanted.abs().max()).item()
                for found, wanted in zip(gradients, exact, strict=True)
            )
        )
    assert errors[0] <= 10 * max(errors[1], eps_of(torch.float32))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_first_and_second_derivatives_through_what_was_written_over(backend, activation):
    layer = made(activation, torch.float64, backend=backend)
    with torch.no_grad():
        layer.bias[3] = -0.2  # a weight and a bias of 0 are where the activation has a corner
    mask = torch.rand(SHAPE, generator=torch.Generator().manual_seed(3)) > 0.3
    for masked, layout in itertools.product((None, mask), (torch.contiguous_format, torch.channels_last)):

        def call(x, weight, bias, masked=masked, layout=layout):
            y = (3 * x).contiguous(memory_format=layout)
            parameters = {"weight": weight, "bias": bias}
            return torch.func.functional_call(copy.deepcopy(layer), parameters, (y, masked))

        inputs = (draw().requires_grad_(), *(p.detach().clone().requires_grad_() for p in layer.parameters()))
        assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@needs_native
def test_a_few_samples_at_a_time(monkeypatch):
    """Backward goes through the batch in chunks, of which the last one is smaller; the kept channels too."""
    mask = torch.rand(SHAPE, generator=torch.Generator().manual_seed(3)) > 0.3
    for activation, masked, layout in itertools.product(ACTIVATIONS, (None, mask), layouts(draw())):
        layer, x, dz = made(activation), layouts(draw().float())[layout].requires_grad_(), draw(1).float()
        found = []
        for chunk in (1, 500, 1 << 20):
            monkeypatch.setattr(inplace, "_CHUNK", chunk)
            found.append(torch.autograd.grad(layer(x, masked), [x, *layer.parameters()], dz))
        for gradients in found[:2]:
            for a, b in zip(gradients, found[2], strict=True):
                close(a, b, 1e-6 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks(backend):
    """The mask's entries are no part of the statistics, whatever they hold, in the channels that are kept too."""
    mask = torch.rand(SHAPE, generator=torch.Generator().manual_seed(3)) > 0.3
    plain = rn.BatchNorm2d(8, backend="reference").double()
    for activation, follow in ACTIVATIONS.items():
        layer = made(activation, backend=backend)
        plain.load_state_dict(layer.state_dict())
        leaf = draw().requires_grad_()
        wanted = torch.where(mask, follow(plain(leaf, mask), layer.slope), 0)
        gradients = torch.autograd.grad(wanted, [leaf, *plain.parameters()], draw(1))
        for garbage in (0.0, float("nan"), float("inf"), 1e30):
            x = torch.where(mask, draw().float(), garbage).requires_grad_()
            z = layer(x.clone(), mask)
            close(z, wanted, 1e-6)
            found = torch.autograd.grad(z, [x, *layer.parameters()], torch.where(mask, draw(1).float(), garbage))
            for a, b in zip(found, gradients, strict=True):
                close(a, b, 2e-5)


# ---- what is kept


def kept(function, x):
    """Bytes of the tensors that are kept for backward, each memory once."""
    found = {}

    def pack(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function(x)
    return sum(found.values()), y


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_only_the_output_is_kept(backend, activation):
    layer = InPlaceBatchNorm2d(8, activation=activation, backend=backend)
    x = draw(shape=(16, 8, 16, 16)).float().requires_grad_()
    size = x.numel() * 4
    assert size <= kept(layer, x)[0] < 1.01 * size
    stack = nn.Sequential(nn.Conv2d(8, 8, 1), layer, nn.Conv2d(8, 8, 1))
    assert 2 * size <= kept(stack, x)[0] < 2.02 * size  # the inputs of the convolutions
    with torch.no_grad():
        layer.weight[3] = 0
    assert 9 / 8 * size <= kept(layer, x)[0] < 1.01 * 9 / 8 * size  # and one channel
    bound = nn.Sequential(nn.Conv2d(8, 8, 1), rn.BatchNorm2d(8, activation="leaky_relu"), nn.Conv2d(8, 8, 1))
    assert kept(bound, x)[0] >= 3 * size


@needs_native
def test_what_is_written_over_and_what_is_not():
    layer = InPlaceBatchNorm2d(8, backend="native")
    base = draw().float().requires_grad_()
    conv = nn.Conv2d(8, 8, 1)
    for make in (conv, lambda x: x + 1, torch.clone, lambda x: torch.cat([x, x])):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = make(base.contiguous(memory_format=layout))
            before = x.detach().clone()
            z = layer(x)
            assert z is x
            close(z, Apart(layer)(before.double()), 1e-5)
    fused = rn.BatchNorm2d(8, backend="native")

    def retained(x):
        y = x + 1
        y.retain_grad()
        return y

    for make in (
        lambda x: x,  # a leaf
        lambda x: x.detach(),
        lambda x: (x + 1).view(x.shape),
        lambda x: (x + 1).transpose(2, 3),
        lambda x: torch.split(torch.cat([x, x]), 5)[1],
        F.relu,
        torch.sigmoid,
        fused,
        InPlaceBatchNorm2d(8),
        retained,
    ):
        x = make(base)
        before = x.detach().clone()
        z = layer(x)
        assert torch.equal(x, before)
        close(z, Apart(layer)(before.double()), 1e-5)
        torch.autograd.grad(z.square().sum(), [layer.weight, base] if x.requires_grad else [layer.weight])
    with torch.no_grad():
        x = conv(base)
        before = x.clone()
        layer(x)
        assert torch.equal(x, before)
    x = conv(base)
    before = x.detach().clone()
    layer.eval()(x)
    assert torch.equal(x, before)


def test_a_result_that_something_else_needs_is_an_error_in_backward():
    """As with any operation in place; a copy helps."""
    layer, x = InPlaceBatchNorm2d(8, backend="native" if extension.module() else "auto"), draw().float()
    x.requires_grad_()
    for copied in (False, True):
        y = x + 1
        product = y * y
        loss = (layer(y.clone() if copied else y) + product).sum()
        if copied or extension.module() is None:
            loss.backward()
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stack_trains_as_one_of_torch(backend):
    """Convolution, norm and activation twice over, three steps."""

    def stack(norm):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3), *norm(), nn.Conv2d(8, 8, 3), *norm(), nn.Flatten(), nn.Linear(72, 2)]
        return nn.Sequential(*layers).double()

    ours = stack(lambda: [InPlaceBatchNorm2d(8, backend=backend)])
    theirs = stack(lambda: [nn.BatchNorm2d(8), nn.LeakyReLU()])
    losses = []
    for model in (ours, theirs):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        for step in range(3):
            optimizer.zero_grad()
            loss = model(draw(step, (6, 3, 7, 7))).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
        losses.append(model.eval()(draw(9, (2, 3, 7, 7))).detach())
    assert losses[0] == pytest.approx(losses[2], rel=1e-10)
    close(losses[1], losses[3], 1e-10)


# ---- bugs of peers, and corners


@pytest.mark.parametrize("backend", BACKENDS)
def test_elu_where_it_is_flat(backend):
    """There z is -slope whatever x was: log1p gives infinity, and a peer NaN (inplace_abn#70)."""
    layer = InPlaceBatchNorm2d(2, activation="elu", backend=backend)
    for dtype in (torch.float32, torch.bfloat16):
        x = draw(shape=(64, 2, 8, 8)).to(dtype)
        x[0, :, 0, 0] = -1e3  # 60 deviations from the mean, in both channels
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([1.0, -1.0]))
        dz = draw(1, x.shape).to(dtype)
        z, gradients = run(copy.deepcopy(layer).to(dtype), x, dz)
        assert (z[0, 0, 0, 0] == -1).all()
        for found, wanted in zip(gradients, run(Apart(layer), x.double(), dz.double())[1], strict=True):
            close(found, wanted, 0.25 * eps_of(dtype) ** 0.5 * wanted.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_upstream_gradient_is_left_as_it_is(backend):
    """That of a sum is expanded: a peer wrote into it (inplace_abn#155)."""
    layer, x = made(backend=backend), draw().float().requires_grad_()
    wanted = run(Apart(layer), x.double(), torch.ones(SHAPE, dtype=torch.float64))[1]
    (found,) = torch.autograd.grad(layer(x.clone()).sum(), x)
    close(found, wanted[0], 1e-5)
    for laid in layouts(draw(1).float()).values():
        before = laid.clone()
        first = run(layer, x, laid)[1]
        assert torch.equal(laid, before)
        close(first[0], run(layer, x, draw(1).float())[1][0], 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice_in_part_and_in_batches(backend):
    layer, x = made(backend=backend), draw().float().requires_grad_()
    z = layer(x.clone())
    dz = draw(1).float()
    whole = torch.autograd.grad(z, [x, *layer.parameters()], dz, retain_graph=True)
    for i, one in enumerate([x, *layer.parameters()]):
        assert torch.equal(torch.autograd.grad(z, one, dz, retain_graph=True)[0], whole[i])
    (batched,) = torch.autograd.grad(z, x, torch.stack([dz, -dz]), is_grads_batched=True)
    close(batched, torch.stack([whole[0], -whole[0]]), 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_input_that_learns_nothing(backend):
    layer = made(backend=backend)
    found = torch.autograd.grad(layer(draw().float()), [*layer.parameters()], draw(1).float())
    for a, b in zip(found, run(Apart(layer), draw(), draw(1))[1][1:], strict=True):
        close(a, b, 2e-5)
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    leaf = draw().float().requires_grad_()
    (dx,) = torch.autograd.grad(layer(leaf.clone()), leaf, draw(1).float())
    close(dx, run(Apart(layer), draw(), draw(1))[1][0], 2e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_whose_input_is_a_result(reentrant):
    """The input is needed for the second forward, and is not written over."""
    conv, behind = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
    gradients = []
    for through in (lambda f, y: f(y), lambda f, y: checkpoint(f, y, use_reentrant=reentrant)):
        layer, x = made(), draw().float().requires_grad_()
        through(nn.Sequential(layer, behind), conv(x)).square().sum().backward()
        gradients.append(x.grad)
        assert layer.num_batches_tracked == 1
    close(*gradients, 1e-6 * gradients[0].abs().max().item())


def test_without_parameters_and_without_running_statistics():
    for options in ({"affine": False}, {"bias": False}, {"track_running_stats": False}, {"momentum": None}):
        layer = InPlaceBatchNorm2d(8, **options)
        exact = nn.BatchNorm2d(8, **options, dtype=torch.float64)
        for _ in range(2):
            z, gradients = run(layer, draw().float(), draw(1).float())
            leaf = draw().requires_grad_()
            y = F.leaky_relu(exact(leaf))
            close(z, y, 2e-6)
            wanted = torch.autograd.grad(y, [leaf, *exact.parameters()], draw(1))
            for a, b in zip(gradients, wanted, strict=True):
                close(a, b, 2e-5)
        for a, b in zip(layer.buffers(), exact.buffers(), strict=True):
            close(a, b, 1e-6)


def test_frozen_and_evaluation():
    layer, x = made("elu"), draw().float()
    layer(x)
    wanted = run(Apart(layer).eval(), x.double(), draw(1))
    before = copy.deepcopy(layer.state_dict())
    layer.frozen = True
    for training in (True, False):
        z, gradients = run(layer.train(training), x, draw(1).float())
        close(z, wanted[0], 2e-6)
        for a, b in zip(gradients, wanted[1], strict=True):
            close(a, b, 1e-6 * b.abs().max().item())
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_mistakes_and_names():
    for slope in (0.0, -0.1, float("inf"), float("nan")):  # a peer divides by zero (inplace_abn#15)
        with pytest.raises(ShapeError, match="if its slope is positive"):
            InPlaceBatchNorm2d(3, slope=slope)
    with pytest.raises(UnknownNormError, match=r"one of leaky_relu, elu, identity; got 'relu': write BatchNorm2d"):
        InPlaceBatchNorm2d(3, activation="relu")
    with pytest.raises(BackendError, match="torch's kernel keeps its input"):
        InPlaceBatchNorm2d(3, backend="torch")(torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        InPlaceBatchNorm2d(3)(torch.zeros(1, 3, 1, 1))
    layer = InPlaceBatchNorm2d(3, activation="elu")
    assert isinstance(layer, nn.BatchNorm2d)
    assert "activation='elu'" in repr(layer)
    assert "slope=1.0" in repr(layer)
    assert InPlaceBatchNorm2d(3).slope == 0.01
    assert InPlaceBatchNorm2d(3, backend="reference").kernel(torch.zeros(2, 3, 4, 4)) == "reference"


def test_on_the_meta_device():
    with torch.device("meta"):
        assert InPlaceBatchNorm2d(3)(torch.empty(2, 3, 4, 4)).shape == (2, 3, 4, 4)


def test_an_addition_before_it():
    """Both outputs have their gradients, and the sum is not written over."""
    for activation, follow in ACTIVATIONS.items():
        layer = made(activation)
        exact = Apart(layer)
        x, residual = (draw(seed).requires_grad_() for seed in (2, 3))
        total = x + residual
        wanted = torch.autograd.grad([exact(total), total], [x, residual], [draw(4), draw(5)])
        a, b = (draw(seed).float().requires_grad_() for seed in (2, 3))
        z, added = layer.add(1 * a, 1 * b)
        close(added, total, 1e-6)
        close(z, follow(exact.norm(total), layer.slope), 3e-6)
        found = torch.autograd.grad([z, added], [a, b], [draw(4).float(), draw(5).float()])
        for one, other in zip(found, wanted, strict=True):
            close(one, other, 3e-5)


# ---- the other norms with neighbours: `activation=` and `add`

LAYERS = {
    "RMSNorm": (lambda **o: rn.RMSNorm(7, eps=1e-6, **o), (4, 3, 7)),
    "LayerNorm": (lambda **o: rn.LayerNorm(7, **o), (4, 3, 7)),
    "GroupNorm": (lambda **o: rn.GroupNorm(2, 6, **o), (4, 6, 5)),
    "BatchNorm2d": (lambda **o: rn.BatchNorm2d(3, **o), (4, 3, 2, 5)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LAYERS)
def test_the_sums_gradient_is_not_dropped(name, backend):
    """A peer's fused addition and RMS norm has 0.743 where 3.741 is right: only the norm's output led back."""
    make, shape = LAYERS[name]
    layer = make(backend=backend, activation="silu").double()
    x, residual = (draw(seed, shape).requires_grad_() for seed in range(2))
    for weight in (0.0, 3.0):
        y, total = layer.add(x, residual)
        dy = draw(2, shape)
        found = torch.autograd.grad([y, total], [x, residual], [dy, torch.full(shape, weight, dtype=torch.float64)])
        leaf = (x + residual).detach().requires_grad_()
        (alone,) = torch.autograd.grad(layer(leaf), leaf, dy)
        for gradient in found:
            close(gradient, alone + weight, 1e-12)

    def both(x, residual):
        return copy.deepcopy(layer).add(x, residual)

    assert torch.autograd.gradcheck(both, (x, residual), fast_mode=True)
    assert torch.autograd.gradgradcheck(both, (x, residual), fast_mode=True)


@pytest.mark.parametrize("name", LAYERS)
def test_a_float32_residual_is_not_rounded(name):
    """Beside half precision: a peer rounds it through bfloat16."""
    make, shape = LAYERS[name]
    x, residual = draw(0, shape).bfloat16(), draw(1, shape).float()
    y, total = make().add(x, residual)
    assert total.dtype == y.dtype == torch.float32
    assert torch.equal(total, x.float() + residual)
    close(y, make()(total), 1e-6)


def test_dropout_that_is_off_is_nothing():
    """Norm and dropout off need no kernel: torch hands its input through."""
    y = rn.LayerNorm(7)(draw(0, (4, 7)).float())
    for dropout in (nn.Dropout(0.5).eval(), nn.Dropout(0.0)):
        assert torch.equal(dropout(y), y)
    assert nn.Dropout(0.5).eval()(y).data_ptr() == y.data_ptr()
