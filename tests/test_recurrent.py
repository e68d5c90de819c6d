"""LSTM and GRU with layer norm: every kernel against the paper's formulas, one sequence and one step at a time."""

import copy
import io
import pickle

import pytest
import torch
from checks import close, eps_of
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

from renorm.errors import BackendError, ShapeError
from renorm.kernels import extension
from renorm.norms.recurrent import LayerNormGRU, LayerNormLSTM

needs_native = pytest.mark.skipif(extension.module() is None, reason="renorm was installed without its extension")
KERNELS = [pytest.param("native", marks=needs_native), "reference"]
LAYERS = {"LSTM": LayerNormLSTM, "GRU": LayerNormGRU}
TWINS = {"LSTM": nn.LSTM, "GRU": nn.GRU}
both = pytest.mark.parametrize("cell", ["LSTM", "GRU"])
kernels = pytest.mark.parametrize("kernel", KERNELS)
OPTIONS = [
    {},
    {"bias": False},
    {"bidirectional": True},
    {"num_layers": 3, "bidirectional": True, "eps": 1e-3},
    {"num_layers": 2, "batch_first": True},
    {"proj_size": 2, "num_layers": 2, "bidirectional": True},
]


# ---- the formulas


def norm(a, weight, bias, eps):
    """Layer norm of one vector."""
    mean = a.mean()
    return (a - mean) / ((a - mean).square().mean() + eps).sqrt() * weight + bias


def lstm_step(x, h, c, p, end, eps):
    """Equations 20 to 22 of the paper for one sequence, torch's gates; without norms where eps is None."""

    def normalized(a, which):
        return a if eps is None else norm(a, p[f"norm_weight_{which}_{end}"], p[f"norm_bias_{which}_{end}"], eps)

    gates = normalized(p[f"weight_hh_{end}"] @ h, "hh") + normalized(p[f"weight_ih_{end}"] @ x, "ih")
    if f"bias_ih_{end}" in p:
        gates = gates + p[f"bias_ih_{end}"] + p[f"bias_hh_{end}"]
    size = len(c)
    i, f, g, o = (gates[k * size : (k + 1) * size] for k in range(4))
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(normalized(c, "c"))
    return (p[f"weight_hr_{end}"] @ h if f"weight_hr_{end}" in p else h), c


def gru_step(x, h, _, p, end, eps):
    """The supplement's GRU, with torch's gates r, z, n, its z and its bias inside the reset."""
    size = len(h)
    parts = {"rz": slice(0, 2 * size), "n": slice(2 * size, 3 * size)}

    def linear(v, which, part):
        a = p[f"weight_{which}_{end}"][parts[part]] @ v
        if eps is not None:
            weight, bias = (p[f"norm_{kind}_{which}_{end}"][parts[part]] for kind in ("weight", "bias"))
            a = norm(a, weight, bias, eps)
        return a + p[f"bias_{which}_{end}"][parts[part]] if f"bias_{which}_{end}" in p else a

    rz = torch.sigmoid(linear(x, "ih", "rz") + linear(h, "hh", "rz"))
    r, z = rz[:size], rz[size:]
    n = torch.tanh(linear(x, "ih", "n") + r * linear(h, "hh", "n"))
    return (1 - z) * n + z * h, None


def formula(layer, sequences, states, eps):
    """Outputs of each sequence (steps, size) and the last states, (layers * directions, batch, size) each."""
    p = dict(layer.named_parameters())
    step = lstm_step if layer.mode == "LSTM" else gru_step
    outs, last = [], []
    for n, x in enumerate(sequences):
        ends = []
        for number in range(layer.num_layers):
            sides = []
            for side in range(1 + layer.bidirectional):
                end = f"l{number}" + "_reverse" * side
                h, *c = (s[number * (1 + layer.bidirectional) + side, n] for s in states)
                c = c[0] if c else None
                walked = [None] * len(x)
                for t in reversed(range(len(x))) if side else range(len(x)):
                    h, c = step(x[t], h, c, p, end, eps)
                    walked[t] = h
                sides.append(torch.stack(walked))
                ends.append([h] if c is None else [h, c])
            x = torch.cat(sides, -1)
        outs.append(x)
        last.append([torch.stack(which) for which in zip(*ends, strict=True)])
    return outs, [torch.stack(which, 1) for which in zip(*last, strict=True)]


def build(cell, *sizes, dtype=torch.float64, seed=0, **options):
    """A layer with random norms."""
    torch.manual_seed(seed)
    layer = LAYERS[cell](*sizes, dtype=dtype, **options)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith("norm_"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def random_states(layer, rows, dtype=torch.float64):
    number = layer.num_layers * (1 + layer.bidirectional)
    sizes = [layer.proj_size or layer.hidden_size] + [layer.hidden_size] * (layer.mode == "LSTM")
    return [torch.randn(number, rows, size, dtype=dtype).requires_grad_() for size in sizes]


def pair(layer, states):
    """States as the layer takes them and gives them."""
    return (states[0], states[1]) if layer.mode == "LSTM" else states[0]


def unpaired(states):
    return list(states) if isinstance(states, tuple) else [states]


def gradients(outputs, inputs, seed=7):
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in outputs]
    return torch.autograd.grad(outputs, inputs, upstream, allow_unused=True)


def all_close(actual, expected, tolerance):
    """Relative to the largest entry of each."""
    for a, b in zip(actual, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.shape == b.shape
            close(a, b, tolerance * max(1.0, b.abs().max().item()))


def wide(layer):
    return copy.deepcopy(layer).double()


# ---- values


@both
@pytest.mark.parametrize("options", OPTIONS)
def test_the_formulas_without_norms_are_torchs_layer(cell, options):
    """Of these tests' own loop: order of the gates, place of the biases, directions and projection are torch's."""
    options = {k: v for k, v in options.items() if k not in ("eps", "batch_first")}
    if cell == "GRU":
        options.pop("proj_size", None)
    torch.manual_seed(0)
    twin = TWINS[cell](3, 5, dtype=torch.float64, **options)
    x, states = torch.randn(4, 2, 3, dtype=torch.float64), random_states(twin, 2)
    y, last = twin(x, pair(twin, states))
    outs, ends = formula(twin, x.unbind(1), states, None)
    all_close([y, *unpaired(last)], [torch.stack(outs, 1), *ends], 1e-13)


@both
@kernels
@pytest.mark.parametrize("options", OPTIONS)
def test_values_and_gradients_are_the_formulas(cell, kernel, options):
    if cell == "GRU":
        options = {k: v for k, v in options.items() if k != "proj_size"}
    layer = build(cell, 3, 5, backend=kernel, **options)
    x, states = torch.randn(4, 3, 3, dtype=torch.float64).requires_grad_(), random_states(layer, 3)
    assert layer.kernel(x) == kernel
    y, last = layer(x.transpose(0, 1) if layer.batch_first else x, pair(layer, states))
    y = y.transpose(0, 1) if layer.batch_first else y
    outs, ends = formula(layer, x.unbind(1), states, layer.eps)
    expected, found = [torch.stack(outs, 1), *ends], [y, *unpaired(last)]
    all_close(found, expected, 1e-13)
    inputs = [x, *states, *layer.parameters()]
    all_close(gradients(found, inputs), gradients(expected, inputs), 1e-12)


# Rows and columns on threads of their own, all remainders of the tiles, a part of a vector at the end.
SHAPES = [(3, 1, 2, 1), (5, 7, 9, 17), (2, 19, 4, 33), (3, 5, 6, 300), (6, 40, 3, 96)]


@both
@kernels
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_in_all_sizes(cell, kernel, threads, shape):
    steps, rows, features, hidden = shape
    layer = build(cell, features, hidden, dtype=torch.float32, backend=kernel, bidirectional=rows == 19)
    x, states = torch.randn(steps, rows, features), random_states(layer, rows, torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y, last = layer(x, pair(layer, states))
        found = gradients([y, *unpaired(last)], list(layer.parameters()))
        with torch.no_grad():
            again, _ = layer(x, pair(layer, states))
    finally:
        torch.set_num_threads(before)
    exact = wide(layer)
    outs, ends = formula(exact, x.double().unbind(1), [s.double() for s in states], layer.eps)
    expected = [torch.stack(outs, 1), *ends]
    # Sums of up to 300 products and a few steps that hand their errors on; a hidden size of 1 amplifies by eps^-1/2.
    tolerance = 64 * eps_of(torch.float32) * (20 if hidden == 1 else 1)
    all_close([y, *unpaired(last)], expected, tolerance)
    assert torch.equal(y, again)
    all_close(found, gradients(expected, list(exact.parameters())), 8 * tolerance)


@both
@kernels
@pytest.mark.parametrize("lengths", [[5, 3, 3, 1], [2, 5, 1, 4, 4], [3, 3], [1]])
def test_packed_sequences(cell, kernel, lengths):
    """Each sequence is walked alone, from its own first to its own last step, whatever the order it comes in."""
    layer = build(cell, 3, 5, num_layers=2, bidirectional=True, backend=kernel)
    sequences = [torch.randn(n, 3, dtype=torch.float64).requires_grad_() for n in lengths]
    for states in (random_states(layer, len(lengths)), None):
        packed = pack_sequence(sequences, enforce_sorted=False)
        y, last = layer(packed, None if states is None else pair(layer, states))
        assert isinstance(y, PackedSequence)
        padded, found_lengths = pad_packed_sequence(y)
        assert found_lengths.tolist() == lengths
        given = [torch.zeros_like(s) for s in random_states(layer, len(lengths))] if states is None else states
        outs, ends = formula(layer, sequences, given, layer.eps)
        found = [padded[:n, k] for k, n in enumerate(lengths)] + unpaired(last)
        all_close(found, outs + ends, 1e-13)
        inputs = [*sequences, *layer.parameters()] + (states or [])
        all_close(gradients(found, inputs), gradients(outs + ends, inputs), 1e-12)


@needs_native
@pytest.mark.parametrize(("lengths", "hidden"), [([9] * 5 + [8] * 13 + [2] * 21 + [1], 100), ([9, 9, 8, 2, 1], 200)])
def test_packed_sequences_on_two_threads(lengths, hidden):
    """Threads share long and short sequences evenly and do not meet; or, where there are few, share the columns."""
    layer = build("LSTM", 3, hidden, proj_size=61, backend="native", bidirectional=True)
    packed = pack_padded_sequence(torch.randn(9, len(lengths), 3, dtype=torch.float64), lengths)
    twin = copy.deepcopy(layer)
    twin.backend = "reference"
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = [(y.data, *last) for y, last in (layer(packed), twin(packed))]
        by = [gradients(f, list(m.parameters())) for f, m in zip(found, (layer, twin), strict=True)]
    finally:
        torch.set_num_threads(before)
    all_close(*found, 1e-13)
    all_close(*by, 1e-12)


@both
@kernels
def test_unbatched_input(cell, kernel):
    for batch_first in (False, True):
        layer = build(cell, 3, 5, num_layers=2, batch_first=batch_first, backend=kernel)
        x, states = torch.randn(4, 3, dtype=torch.float64), random_states(layer, 1)
        y, last = layer(x, pair(layer, [s.squeeze(1) for s in states]))
        outs, ends = formula(layer, [x], states, layer.eps)
        all_close([y, *unpaired(last)], [outs[0], *(end.squeeze(1) for end in ends)], 1e-13)


@both
@kernels
def test_derivatives_twice(cell, kernel):
    options = {"proj_size": 2} if cell == "LSTM" else {}
    layer = build(cell, 2, 3, backend=kernel, **options)
    x, states = torch.randn(3, 2, 2, dtype=torch.float64).requires_grad_(), random_states(layer, 2)
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *rest):
        hx = pair(layer, rest[: len(states)])
        y, last = torch.func.functional_call(layer, dict(zip(names, rest[len(states) :], strict=True)), (x, hx))
        return (y, *unpaired(last))

    inputs = [x, *states, *(p.detach().requires_grad_() for p in layer.parameters())]
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@both
@kernels
def test_gradients_in_batches_and_again(cell, kernel):
    layer = build(cell, 2, 3, backend=kernel)
    x = torch.randn(3, 2, 2, dtype=torch.float64).requires_grad_()
    y = layer(x)[0]
    rows = torch.eye(y.numel(), dtype=torch.float64).view(-1, *y.shape)
    (batched,) = torch.autograd.grad(y, x, rows, is_grads_batched=True, retain_graph=True)
    for row, expected in zip(rows, batched, strict=True):  # and what backward was given is not changed
        close(torch.autograd.grad(y, x, row, retain_graph=True)[0], expected, 1e-13)


# ---- numerics


@both
@kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(cell, kernel, dtype):
    layer = build(cell, 6, 20, dtype=dtype, backend=kernel)
    x, states = torch.randn(7, 3, 6).to(dtype), random_states(layer, 3, dtype)
    y, last = layer(x, pair(layer, states))
    assert {t.dtype for t in (y, *unpaired(last))} == {dtype}
    outs, ends = formula(wide(layer), x.double().unbind(1), [s.double() for s in states], layer.eps)
    # Two roundings: of the input's product, which a norm's division makes relative to a deviation, and of the output.
    all_close([y, *unpaired(last)], [torch.stack(outs, 1), *ends], 4 * eps_of(dtype))
    assert all(g.dtype == dtype for g in gradients([y], list(layer.parameters())))


@both
@kernels
def test_autocast(cell, kernel):
    layer, x = build(cell, 6, 8, dtype=torch.float32, backend=kernel), torch.randn(5, 2, 6)
    exact = layer(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, last = layer(x)
        twin, _ = nn.LSTM(6, 8)(x)
    assert {t.dtype for t in (y, *unpaired(last))} == {twin.dtype} == {torch.bfloat16}
    close(y, exact, 8 * eps_of(torch.bfloat16))
    gradients([y, *unpaired(last)], list(layer.parameters()))


@needs_native
@both
def test_a_mean_far_from_zero(cell):
    """The pre-activations' mean is 1e4 of their deviations: no worse than torch's layer norm in a loop."""
    layer = build(cell, 4, 64, dtype=torch.float32, bias=False)
    with torch.no_grad():
        layer.weight_hh_l0.add_(100.0)
        layer.weight_ih_l0.add_(100.0)
    x, states = torch.rand(1, 6, 4) + 1, [s.detach().abs() for s in random_states(layer, 6, torch.float32)]
    outs, _ = formula(wide(layer), x.double().unbind(1), [s.double() for s in states], layer.eps)
    errors = {}
    for backend in ("native", "reference"):
        layer.backend = backend
        y, _ = layer(x, pair(layer, states))
        errors[backend] = (y - torch.stack(outs, 1)).abs().max().item()
    assert errors["native"] <= 2 * errors["reference"], errors  # the products round, each in an order of its own


@both
@kernels
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_sequence_stays_alone(cell, kernel, value):
    layer = build(cell, 3, 5, bidirectional=True, backend=kernel)
    x = torch.randn(4, 9, 3, dtype=torch.float64)
    good = layer(x)[0]
    x[2, 3, 1] = value
    y = layer(x)[0]
    others = [k for k in range(9) if k != 3]
    assert torch.equal(y[:, others], good[:, others])
    assert not y[2:, 3, :5].isfinite().any()
    assert not y[:3, 3, 5:].isfinite().any()


@both
@kernels
def test_no_variance_gives_the_biases(cell, kernel):
    """Weights of 0, hidden size 1: finite, with finite gradients."""
    for hidden in (1, 6):
        layer = build(cell, 3, hidden, backend=kernel)
        with torch.no_grad():
            layer.weight_hh_l0.zero_()
            layer.weight_ih_l0.zero_()
        x = torch.randn(4, 2, 3, dtype=torch.float64).requires_grad_()
        y, _ = layer(x)
        outs, _ = formula(layer, x.unbind(1), [torch.zeros_like(s) for s in random_states(layer, 2)], layer.eps)
        close(y, torch.stack(outs, 1), 1e-12)
        assert all(g.isfinite().all() for g in gradients([y], [x, *layer.parameters()]))


@kernels
def test_memory_layouts(kernel):
    layer = build("LSTM", 3, 5, backend=kernel)
    x, states = torch.randn(4, 2, 3, dtype=torch.float64), random_states(layer, 2)
    expected, _ = layer(x, pair(layer, states))
    strided = torch.stack([x, -x], -1)[..., 0].transpose(0, 2).contiguous().transpose(0, 2)
    h, c = (torch.stack([s, -s], -1)[..., 0] for s in states)
    with torch.no_grad():
        layer.weight_hh_l0 = nn.Parameter(layer.weight_hh_l0.t().contiguous().t())
    y, _ = layer(strided, (h, c))
    close(y, expected, 1e-14)
    y.sum().backward()  # an upstream gradient without strides


@needs_native
def test_outputs_that_are_changed_in_place():
    """The last states are copies; to change what backward needs is an error, as with nn.LSTM."""
    layer, x = build("LSTM", 3, 5, backend="native"), torch.randn(4, 2, 3, dtype=torch.float64)
    inputs = list(layer.parameters())
    expected = gradients([layer(x)[0]], inputs)
    y, (h, c) = layer(x)
    h.zero_(), c.zero_()
    all_close(gradients([y], inputs), expected, 0.0)
    y, _ = layer(x)
    with pytest.raises(RuntimeError, match="modified inplace"):
        y.mul_(0.0)


# ---- as torch's layers


@both
def test_dropout_is_between_layers_in_training_only(cell):
    layer = build(cell, 3, 5, num_layers=2, dropout=0.5)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(layer(x)[0])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    layer.eval()
    outs, _ = formula(layer, x.unbind(1), [torch.zeros_like(s) for s in random_states(layer, 2)], layer.eps)
    close(layer(x)[0], torch.stack(outs, 1), 1e-13)
    layer.train().dropout = 1.0
    y, _ = layer(x)
    close(y[:, 0], y[:, 1], 1e-14)  # nothing of the input is left
    with pytest.warns(UserWarning, match="dropout"):
        LAYERS[cell](3, 5, dropout=0.5)


@both
@kernels
def test_an_empty_batch_is_as_torchs(cell, kernel):
    x = torch.zeros(4, 0, 3)
    y, last = LAYERS[cell](3, 5, backend=kernel)(x)
    twin, twins_last = TWINS[cell](3, 5)(x)
    assert y.shape == twin.shape
    assert [s.shape for s in unpaired(last)] == [s.shape for s in unpaired(twins_last)]


@both
def test_same_parameters_under_the_same_seed(cell):
    torch.manual_seed(3)
    layer = LAYERS[cell](3, 5, num_layers=2, bidirectional=True)
    torch.manual_seed(3)
    twin = TWINS[cell](3, 5, num_layers=2, bidirectional=True)
    mine = layer.state_dict()
    for name, value in twin.state_dict().items():
        assert torch.equal(mine.pop(name), value)
    assert all(torch.equal(v, torch.full_like(v, float("weight" in name))) for name, v in mine.items())
    torch.manual_seed(3)
    layer.norm_weight_ih_l0.data.fill_(7)
    layer.reset_parameters()
    assert torch.equal(layer.weight_hh_l1_reverse, twin.weight_hh_l1_reverse)
    assert (layer.norm_weight_ih_l0 == 1).all()
    assert sum(p.numel() for names in layer.all_weights for p in names) == sum(p.numel() for p in layer.parameters())


@both
def test_the_state_of_torchs_layer_loads(cell):
    twin = nn.Sequential(TWINS[cell](3, 5, num_layers=2))
    layer = nn.Sequential(build(cell, 3, 5, num_layers=2, dtype=torch.float32))
    norms = [name for name, _ in layer.named_parameters() if "norm_" in name]
    with pytest.raises(RuntimeError, match="norm_weight_ih_l0"):
        layer.load_state_dict(twin.state_dict())
    layer = nn.Sequential(build(cell, 3, 5, num_layers=2, dtype=torch.float32))
    said = layer.load_state_dict(twin.state_dict(), strict=False)
    assert said.missing_keys == norms
    assert not said.unexpected_keys
    assert torch.equal(layer[0].weight_hh_l1, twin[0].weight_hh_l1)
    for name in norms:
        value = layer.get_parameter(name)
        assert torch.equal(value, torch.full_like(value, float("weight" in name)))
    trained = nn.Sequential(build(cell, 3, 5, num_layers=2, dtype=torch.float32, seed=5))
    layer.load_state_dict(trained.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), trained.parameters(), strict=True))


@both
def test_copies(cell):
    layer = build(cell, 3, 5, num_layers=2, bidirectional=True)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert torch.equal(other(x)[0], layer(x)[0])
    assert layer.float()(x.float())[0].dtype == torch.float32


@both
def test_meta(cell):
    layer = LAYERS[cell](3, 5, device="meta")
    y, last = layer(torch.zeros(4, 2, 3, device="meta"))
    assert y.shape == (4, 2, 5)
    assert unpaired(last)[0].is_meta
    layer.to_empty(device="cpu").reset_parameters()
    assert layer(torch.zeros(4, 2, 3))[0].isfinite().all()


def test_repr():
    layer = LayerNormLSTM(3, 5, 2, proj_size=4, eps=1e-3, backend="reference")
    assert repr(layer) == "LayerNormLSTM(3, 5, proj_size=4, num_layers=2, eps=0.001, backend='reference')"
    assert repr(LayerNormGRU(3, 5)) == "LayerNormGRU(3, 5)"


# ---- tracing


@both
def test_compile(cell):
    layer = build(cell, 3, 5, num_layers=2, bidirectional=True)
    x = torch.randn(4, 2, 3, dtype=torch.float64).requires_grad_()
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    inputs = [x, *layer.parameters()]
    found, expected = ([y, *unpaired(last)] for y, last in (compiled(x), layer(x)))
    all_close(found, expected, 1e-13)
    all_close(gradients(found, inputs), gradients(expected, inputs), 1e-12)


@both
def test_export_with_a_dynamic_batch(cell):
    layer = build(cell, 3, 5, bidirectional=True, dtype=torch.float32)
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(layer, (torch.randn(4, 3, 3),), dynamic_shapes={"input": {1: rows}})
    x = torch.randn(4, 7, 3)
    close(program.module()(x)[0], layer(x)[0], 16 * eps_of(torch.float32))


@both
def test_vmap(cell):
    layer = build(cell, 3, 5, num_layers=2)
    x = torch.randn(6, 4, 2, 3, dtype=torch.float64)
    y = torch.func.vmap(lambda v: layer(v)[0])(x)
    close(y, torch.stack([layer(v)[0] for v in x]), 1e-13)
    parameters = dict(layer.named_parameters())
    stacked = {name: torch.stack([p, 2 * p]) for name, p in parameters.items()}
    found = torch.func.vmap(lambda p: torch.func.functional_call(layer, p, (x[0],))[0])(stacked)
    twice = torch.func.functional_call(layer, {name: 2 * p for name, p in parameters.items()}, (x[0],))[0]
    close(found[1], twice, 1e-12)


@both
@kernels
def test_checkpointing_and_inference_mode(cell, kernel):
    layer = build(cell, 3, 5, backend=kernel)
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    with torch.inference_mode():
        layer(pack_padded_sequence(x, [6, 3]))  # what is remembered of these lengths must be of use later
    packed = pack_padded_sequence(x, [6, 3]).data.detach().requires_grad_()
    inputs = [packed, *layer.parameters()]

    def run(data):
        return layer(PackedSequence(data, torch.tensor([2, 2, 2, 1, 1, 1])))[0].data

    y = torch.utils.checkpoint.checkpoint(run, packed, use_reentrant=False)
    all_close(gradients([y], inputs), gradients([run(packed)], inputs), 1e-13)


# ---- errors


@both
def test_errors(cell):
    layer = LAYERS[cell](3, 5, num_layers=2)
    states = [s.float().detach() for s in random_states(layer, 2)]
    hx = pair(layer, states)
    with pytest.raises(ShapeError, match=r"\(steps, batch, features\)"):
        layer(torch.zeros(3))
    with pytest.raises(ShapeError, match="input_size=3"):
        layer(torch.zeros(4, 2, 4))
    with pytest.raises(ShapeError, match="input_size=3"):
        layer(pack_sequence([torch.zeros(2, 4)]))
    with pytest.raises(ShapeError, match="one step or more"):
        layer(torch.zeros(0, 2, 3))
    with pytest.raises(ShapeError, match=r"torch.float64: write layer.to\(torch.float64\)"):
        layer(torch.zeros(4, 2, 3, dtype=torch.float64))
    with pytest.raises(ShapeError, match="the initial h must be"):
        layer(torch.zeros(4, 3, 3), hx)
    with pytest.raises(ShapeError, match="the initial h must be"):
        layer(pack_sequence([torch.zeros(2, 3)]), hx)
    with pytest.raises(ShapeError, match="unbatched 2D input"):
        layer(torch.zeros(4, 3), hx)
    with pytest.raises(ShapeError, match="got 2D"):
        layer(torch.zeros(4, 2, 3), pair(layer, [s[0] for s in states]))
    if cell == "LSTM":
        with pytest.raises(ShapeError, match=r"hx=\(h, c\)"):
            layer(torch.zeros(4, 2, 3), states[0])
        with pytest.raises(ShapeError, match="the initial c must be"):
            layer(torch.zeros(4, 2, 3), (states[0], states[1][:1]))


@both
def test_backends(cell, monkeypatch):
    with pytest.raises(BackendError, match="a backend is one of"):
        LAYERS[cell](3, 5, backend="fast")
    x = torch.zeros(4, 2, 3)
    for backend in ("torch", "triton"):
        with pytest.raises(BackendError, match=f"backend='{backend}' cannot run here: it has no kernel"):
            LAYERS[cell](3, 5, backend=backend)(x)
    layer = LAYERS[cell](3, 5, backend="native")
    with pytest.raises(BackendError, match="cannot run here: the input is on meta"):
        layer.to("meta")(x.to("meta"))
    if extension.module() is not None:
        layer = LAYERS[cell](3, 5, backend="native")
        layer.weight_hh_l0 = nn.Parameter(layer.weight_hh_l0.detach().as_subclass(Odd))
        with pytest.raises(BackendError, match="cannot run here: the input is a Odd"):
            layer(x)
        layer.backend = "auto"
        assert layer(x)[0].shape == (4, 2, 5)
    monkeypatch.setattr(extension, "_MODULE", None)
    layer = LAYERS[cell](3, 5)
    assert layer.kernel(pack_sequence([x[0]])) == "reference"
    layer(x)


class Odd(torch.Tensor):
    """A tensor that may be anything."""
