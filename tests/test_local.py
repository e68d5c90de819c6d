"""Local response norm: every kernel against the formula by loops over the windows, and against torch's layer."""

import copy
import itertools
import pickle

import pytest
import torch
from checks import close, eps_of, layouts
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from renorm.errors import BackendError, ShapeError, UnknownNormError
from renorm.kernels import extension
from renorm.norms.local import LocalResponseNorm

needs_native = pytest.mark.skipif(extension.module() is None, reason="renorm was installed without its extension")
KERNELS = [pytest.param("native", marks=needs_native), "reference"]
SHAPES = [(2, 7, 5, 3), (1, 40, 3, 11), (3, 21, 6), (5, 19), (2, 6, 3, 2, 5), (2, 1, 4, 4), (1, 3, 37, 17)]
SIZES = [1, 2, 3, 4, 5, 9, 12, 30, 101]  # odd and even; larger than the channels; added one by one or not


def formula(x, size, alpha=1e-4, beta=0.75, k=1.0):
    """The paper's, window by window, in float64; torch's convention for even sizes."""
    x = x.double()
    channels = []
    for c in range(x.shape[1]):
        window = x[:, max(0, c - size // 2) : c + (size - 1) // 2 + 1]
        channels.append(x[:, c] * (k + alpha / size * window.square().sum(1)) ** -beta)
    return torch.stack(channels, 1)


def expected(x, dy, *arguments):
    """The formula's y and dx, and the sum of the absolute terms of dx: what its rounding errors are relative to."""
    x = x.detach().double().requires_grad_()
    y = formula(x, *arguments)
    (dx,) = torch.autograd.grad(y, x, dy.double())
    size, alpha, beta = (*arguments, *(1e-4, 0.75)[len(arguments) - 1 :])[:3]
    terms = torch.zeros_like(dx)
    for i in range(x.shape[1]):
        window = slice(max(0, i - (size - 1) // 2), i + size // 2 + 1)  # of those whose windows hold i
        d = (y.detach() / x.detach()) ** (-1 / beta)
        share = (dy.double() * y / d).abs()[:, window].sum(1)
        terms[:, i] = (dy.double() * y / x).abs()[:, i] + 2 * alpha / size * abs(beta) * x[:, i].abs() * share
    return y.detach(), dx, terms.detach()


def relative(actual, wanted, terms, tolerance):
    error = ((actual.double() - wanted).abs() / terms.abs()).max().item()
    assert error <= tolerance, f"relative error {error:.3g}, allowed {tolerance:.3g}"


def draw(shape, dtype=torch.float32, seed=0, scale=1.0):
    """Entries away from 0, by which errors are divided."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return ((x + 0.1 * x.sign()) * scale).to(dtype)


def run(layer, x, dy):
    x = x.detach().requires_grad_()
    y = layer(x)
    return y, torch.autograd.grad(y, x, dy)[0]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_values_and_gradients_are_the_formulas(kernel, shape, dtype):
    for size in SIZES:
        # A response of 10 to 1000 and one near 1, where beta matters and where it does not.
        for alpha, beta, k in ((2.0, 0.75, 1.0), (50.0, 0.5, 2.0), (1e-4, 1.0, 1.0), (3.0, 0.6, 0.5), (1.0, 1.7, 1.0)):
            layer = LocalResponseNorm(size, alpha, beta, k, backend=kernel)
            x, dy = draw(shape, dtype, 1, 3.0), draw(shape, dtype, 2)
            y, dx, terms = expected(x, dy, size, alpha, beta, k)
            for laid in layouts(x).values():
                assert layer.kernel(laid) == kernel
                ours = run(layer, laid, dy)
                assert ours[0].dtype == ours[1].dtype == dtype
                # Torch's own layer errs by up to 6 units here, and so do these; sums in another order by a few more.
                relative(ours[0], y, y, 16 * eps_of(dtype))
                relative(ours[1], dx, terms, 16 * eps_of(dtype))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once(kernel, dtype):
    for shape in SHAPES:
        for size, beta in ((5, 0.75), (12, 0.6)):
            layer = LocalResponseNorm(size, 2.0, beta, backend=kernel)
            x, dy = draw(shape, dtype, 1, 3.0), draw(shape, dtype, 2)
            y, dx, terms = expected(x, dy, size, 2.0, beta, 1.0)
            for laid in layouts(x).values():
                ours = run(layer, laid, dy)
                assert ours[0].dtype == ours[1].dtype == dtype
                # One rounding is half a unit; below 2^-14 a float16 is subnormal, with half a unit of 2^-24.
                relative(ours[0], y, y.abs() + 2**-13, 0.6 * eps_of(dtype))
                relative(ours[1], dx, terms + 2**-13, 0.6 * eps_of(dtype))


@pytest.mark.parametrize("kernel", KERNELS)
def test_torchs_layer_computes_the_same(kernel):
    for size in (1, 2, 3, 4, 5, 9, 30):
        ours, theirs = LocalResponseNorm(size, 2.0, 0.6, 1.5, backend=kernel), nn.LocalResponseNorm(size, 2.0, 0.6, 1.5)
        assert isinstance(ours, nn.LocalResponseNorm)
        assert list(ours.state_dict()) == list(theirs.state_dict()) == []
        for shape in ((2, 7, 5, 3), (3, 21, 6), (2, 6, 3, 2, 5)):
            x, dy = draw(shape, seed=1), draw(shape, seed=2)
            for a, b in zip(run(ours, x, dy), run(theirs, x, dy), strict=True):
                close(a, b, 16 * eps_of(torch.float32) * b.abs().max().item())
    assert LocalResponseNorm(5).extra_repr() == nn.LocalResponseNorm(5).extra_repr()
    layer = LocalResponseNorm(4, backend="torch")
    assert torch.equal(layer(x), nn.LocalResponseNorm(4)(x))


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_memory_format_is_kept(kernel):
    layer = LocalResponseNorm(5, backend=kernel)
    for shape in SHAPES:
        for name, x in layouts(draw(shape)).items():
            if name in ("contiguous", "channels_last", "channels_last_3d"):
                y, dx = run(layer, x, torch.ones(shape))
                assert y.stride() == x.stride(), name
                if kernel == "native":  # torch's operations give a gradient the layout of the one that comes
                    assert dx.stride() == x.stride(), name
    x = draw((3, 6, 21)).transpose(1, 2)  # (N, L, C) in memory
    assert layer(x).stride() == x.stride()


@pytest.mark.parametrize("kernel", KERNELS)
def test_large_neighbours_outside_the_window_cost_no_digits(kernel):
    """A sum kept by adding what enters and subtracting what leaves would lose all of them."""
    for size in (3, 5, 9, 20):
        x = draw((2, 64, 3, 7))
        x[:, 31] *= 1e12
        far = [c for c in range(64) if not c - size // 2 <= 31 <= c + (size - 1) // 2]
        y = formula(x, size, 2.0)[:, far]
        for laid in layouts(x).values():
            relative(LocalResponseNorm(size, 2.0, backend=kernel)(laid)[:, far], y, y, 16 * eps_of(torch.float32))


@pytest.mark.parametrize("kernel", KERNELS)
def test_large_and_small_entries(kernel):
    for scale in (1e-12, 1e6, 1e15, 1e18):
        for dtype in (torch.float32, torch.bfloat16):
            x = draw((2, 9, 5, 3), dtype, scale=scale)
            y = formula(x, 5)
            for laid in layouts(x).values():
                relative(LocalResponseNorm(5, backend=kernel)(laid), y, y, 32 * eps_of(dtype))


@needs_native
@pytest.mark.parametrize("beta", [0.75, 0.5, 1.0, 0.6, 3.0, -0.5])
def test_native_where_float32_squares_are_no_numbers(beta):
    """Beyond 1e19 the reference, and torch, give 0 for y, and a gradient that has lost a term from 1e17 on."""
    for scale in (1e9, 1e18, 1e25, 1e36):
        for dtype in (torch.float32, torch.bfloat16):
            for k in (0.0, 1.0, 1e20):
                if beta < 0 and scale > 1e18:
                    continue  # y itself is no float32
                layer = LocalResponseNorm(5, beta=beta, k=k, backend="native")
                x, dy = draw((2, 9, 5, 3), dtype, 1), draw((2, 9, 5, 3), dtype, 2)
                x[1, 2] *= scale  # beside small ones
                x[0] *= scale
                wanted = expected(x, dy, 5, 1e-4, beta, k)
                tiny = torch.finfo(dtype).tiny / eps_of(dtype)  # where float32 has fewer digits
                for laid in layouts(x).values():
                    y, dx = run(layer, laid, dy)
                    relative(y, wanted[0], wanted[0].abs() + tiny, 16 * eps_of(dtype))
                    relative(dx, wanted[1], wanted[2] + tiny, 16 * eps_of(dtype))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("beta", [0.75, 0.5, 1.0, 0.6])
def test_what_is_not_finite_stays_in_its_windows(kernel, beta):
    for size in (1, 4, 5, 12):
        for bad in (float("nan"), float("inf")):
            for x in layouts(draw((2, 30, 3, 7))).values():
                x[1, 11, 1, 2] = bad
                y, dx = run(LocalResponseNorm(size, beta=beta, backend=kernel), x, torch.ones(x.shape))
                wanted = formula(x, size, beta=beta)
                assert torch.equal(y.isnan(), wanted.isnan())
                close(y.nan_to_num(0), wanted.nan_to_num(0), 1e-5)
                touched = dx.isfinite().logical_not().nonzero()
                assert (abs(touched - torch.tensor([1, 11, 1, 2])) <= torch.tensor([0, 2 * size, 0, 0])).all()


@settings(max_examples=100, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 40), st.integers(1, 5)),
    size=st.integers(1, 90),
    beta=st.sampled_from([0.75, 0.5, 1.0, 0.3]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    last=st.booleans(),
)
def test_any_shape_and_window_is_the_formula(shape, size, beta, dtype, last):
    x, dy = draw(shape, dtype, 1, 3.0), draw(shape, dtype, 2)
    if last:
        x, dy = x.contiguous(memory_format=torch.channels_last), dy.contiguous(memory_format=torch.channels_last)
    y, dx, terms = expected(x, dy, size, 2.0, beta)
    ours = run(LocalResponseNorm(size, 2.0, beta), x, dy)
    relative(ours[0], y, y, 16 * eps_of(dtype))
    relative(ours[1], dx, terms, 16 * eps_of(dtype))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_number_of_threads_changes_no_bit(dtype):
    before = torch.get_num_threads()
    x, dy = draw((3, 20, 30, 31), dtype, 1), draw((3, 20, 30, 31), dtype, 2)
    results = {name: [] for name in layouts(x)}
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for name, laid in layouts(x).items():
                results[name].append(run(LocalResponseNorm(5, backend="native"), laid, dy))
    finally:
        torch.set_num_threads(before)
    for found in results.values():
        for y, dx in found:
            assert torch.equal(y, found[0][0])
            assert torch.equal(dx, found[0][1])


@pytest.mark.parametrize("kernel", KERNELS)
def test_empty_inputs(kernel):
    for shape in ((0, 4, 3, 3), (2, 0, 3), (2, 3, 0), (0, 5)):
        x = torch.zeros(shape, requires_grad=True)
        y = LocalResponseNorm(5, backend=kernel)(x)
        assert y.shape == x.shape
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert dx.shape == x.shape


@pytest.mark.parametrize("kernel", KERNELS)
def test_first_and_second_derivatives(kernel):
    for size, beta in ((1, 0.75), (4, 0.75), (5, 0.6), (30, 1.0)):
        layer = LocalResponseNorm(size, 2.0, beta, backend=kernel)
        for shape in ((2, 7, 2, 2), (2, 5)):
            for name, laid in layouts(draw(shape, torch.float64)).items():
                x = laid.detach().requires_grad_()
                assert torch.autograd.gradcheck(layer, x, fast_mode=True), name
                assert torch.autograd.gradgradcheck(layer, x, fast_mode=True), name


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_gradient_penalty(kernel):
    x = draw((2, 7, 5, 3))
    gradients = []
    for layer, dtype in (
        (LocalResponseNorm(5, 2.0, backend=kernel), torch.float32),
        (lambda x: formula(x, 5, 2.0), torch.float64),
    ):
        leaf = x.to(dtype).requires_grad_()
        (first,) = torch.autograd.grad(layer(leaf).pow(3).sum(), leaf, create_graph=True)
        gradients.append(torch.autograd.grad(first.square().mean(), leaf)[0])
    close(gradients[0], gradients[1], 64 * eps_of(torch.float32) * gradients[1].abs().max().item())


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_in_any_layout(kernel):
    x, dy = draw((2, 7, 5, 3)), draw((2, 7, 5, 3), seed=1)
    for laid in layouts(x).values():
        wanted = expected(x, dy, 5)[1]
        for upstream in layouts(dy).values():
            close(run(LocalResponseNorm(5, backend=kernel), laid, upstream)[1], wanted, 1e-6)
        leaf = laid.detach().requires_grad_()
        LocalResponseNorm(5, backend=kernel)(leaf).sum().backward()  # an expanded one
        close(leaf.grad, expected(x, torch.ones(x.shape), 5)[1], 1e-6)


@needs_native
def test_native_saves_its_input_and_nothing_else():
    x, saved = draw((2, 7, 5, 3)).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        LocalResponseNorm(5, backend="native")(x)
    assert [tensor.data_ptr() for tensor in saved] == [x.data_ptr()]
    y = LocalResponseNorm(5, backend="native")(x)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_function_transforms():
    layer = LocalResponseNorm(5, 2.0)
    stack = draw((3, 2, 7, 5, 3))
    wanted = torch.stack([layer(x) for x in stack])
    close(torch.vmap(layer)(stack), wanted, 16 * eps_of(torch.float32))
    x, dy = stack[0], draw((2, 7, 5, 3), seed=1)
    _, dx, _ = expected(x, dy, 5, 2.0)
    close(torch.func.grad(lambda x: (layer(x) * dy).sum())(x), dx, 1e-6)
    _, tangent = torch.func.jvp(layer, (x,), (dy,))
    with torch.autograd.forward_ad.dual_level():
        dual = layer(torch.autograd.forward_ad.make_dual(x, dy))
        close(torch.autograd.forward_ad.unpack_dual(dual).tangent, tangent, 1e-6)
    close((tangent * dy).sum(), (dx * dy).sum(), 1e-3)
    leaf = x.requires_grad_()
    (batched,) = torch.autograd.grad(layer(leaf), leaf, torch.stack([dy, -dy]), is_grads_batched=True)
    close(batched, torch.stack([dx, -dx]), 1e-6)


def test_compile_and_export():
    layer, x, dy = LocalResponseNorm(5, 2.0), draw((2, 7, 5, 3)), draw((2, 7, 5, 3), seed=1)
    wanted = expected(x, dy, 5, 2.0)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for laid in layouts(x).values():
        y, dx = run(compiled, laid, dy)
        close(y, wanted[0], 1e-6)
        close(dx, wanted[1], 1e-6)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for count, channels in ((11, 31), (13, 37), (17, 41)):  # dynamo gives equal sizes one symbol
        other = draw((count, channels, 5, 3))
        close(compiled(other), formula(other, 5, 2.0), 1e-6)
    assert len(graphs) == 1
    sizes = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("channels", min=2, max=64)}
    program = torch.export.export(layer, (x,), dynamic_shapes=(sizes,))
    close(program.module()(other), formula(other, 5, 2.0), 1e-6)


def test_copies():
    layer, x = LocalResponseNorm(4, 2.0, 0.6, 1.5, backend="reference"), draw((2, 7, 5, 3))
    assert repr(layer) == "LocalResponseNorm(4, alpha=2.0, beta=0.6, k=1.5, backend='reference')"
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(twin) == repr(layer)
        assert torch.equal(twin(x), layer(x))


def test_integers_have_the_float_response():
    x = torch.arange(24).view(2, 12)
    close(LocalResponseNorm(5)(x), formula(x, 5), 1e-5)


def test_mistakes():
    with pytest.raises(ShapeError, match=r"1 or more; got 0"):
        LocalResponseNorm(0)
    with pytest.raises(ShapeError, match=r"at least 2D; got 1D of shape \(7,\)"):
        LocalResponseNorm(5)(torch.zeros(7))
    with pytest.raises(BackendError, match="a backend is one of"):
        LocalResponseNorm(5, backend="fast")
    with pytest.raises(BackendError, match="backend='native' cannot run here"):
        LocalResponseNorm(5, backend="native")(torch.zeros(2, 3, device="meta"))
    with pytest.raises(BackendError, match="3D or more"):
        LocalResponseNorm(5, backend="torch")(torch.zeros(2, 3))
    with pytest.raises(BackendError, match="of its own convention over channels"):
        LocalResponseNorm(4, convention="onnx", backend="torch")(torch.zeros(2, 3, 4))
    for backend in ("torch", "native"):
        with pytest.raises(BackendError, match=f"backend='{backend}' cannot run here"):
            LocalResponseNorm(3, within=True, backend=backend)(torch.zeros(2, 3, 4))
    with pytest.raises(ShapeError, match=r"there must be positions, \(N, C, ...\); got shape \(2, 3\)"):
        LocalResponseNorm(3, within=True)(torch.zeros(2, 3))
    for convention in ("caffe", "tensorflow"):
        with pytest.raises(ShapeError, match=f"{convention} has windows of odd sizes only; got 4"):
            LocalResponseNorm(4, convention=convention)
    with pytest.raises(UnknownNormError, match="one of torch, onnx, caffe, tensorflow; got 'keras'"):
        LocalResponseNorm(5, convention="keras")
    with pytest.raises(ShapeError, match="a mask is boolean"):
        LocalResponseNorm(5)(torch.zeros(2, 3), torch.ones(2, 3))


# ---- conventions


@pytest.mark.parametrize("kernel", KERNELS)
def test_onnx_has_windows_that_look_ahead(kernel):
    """pytorch#75722: for even sizes torch's windows look back and ONNX's ahead, so an exported layer is another one."""
    onnx = pytest.importorskip("onnx")
    reference = pytest.importorskip("onnx.reference")
    runtime = pytest.importorskip("onnxruntime")
    shape = (9, 9, 5, 3)  # onnx's own implementation has the batch's size for the number of channels
    for size in (1, 2, 3, 4, 5, 8, 11):
        node = onnx.helper.make_node("LRN", ["x"], ["y"], size=size, alpha=2.0, beta=0.6, bias=1.5)
        values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in "xy"]
        graph = onnx.helper.make_graph([node], "lrn", values[:1], values[1:])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
        sessions = [reference.ReferenceEvaluator(model)]
        if size % 2:  # the others are refused by onnxruntime
            sessions += [runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])]
        x = draw(shape, scale=3.0)
        ours = LocalResponseNorm(size, 2.0, 0.6, 1.5, convention="onnx", backend=kernel)
        for session in sessions:
            theirs = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
            for laid in layouts(x).values():
                assert ours.kernel(laid) == kernel
                # onnxruntime's sums are running ones: what enters is added, what leaves subtracted.
                relative(ours(laid), theirs.double(), theirs, 1e-5)
        torchs = nn.LocalResponseNorm(size, 2.0, 0.6, 1.5)(x)
        assert torch.allclose(torchs, theirs, rtol=1e-4) == (size % 2 == 1)
        close(torchs.flip(1), ours(x.flip(1)), 1e-6)


@pytest.mark.parametrize("kernel", [*KERNELS, "torch"])
def test_caffe_and_tensorflow(kernel):
    """One alpha means three things (caffe-tensorflow#173, caffe#1453): each by a loop over the windows."""
    x = draw((2, 9, 5, 3), scale=3.0)
    v = x.double()
    for radius, alpha, beta, k in ((2, 1e-4, 0.75, 2.0), (1, 2.0, 0.5, 1.0), (5, 1.0, 0.5, 1.0), (0, 1.0, 1.0, 1.0)):
        size = 2 * radius + 1
        sums = torch.stack([v[:, max(0, d - radius) : d + radius + 1].square().sum(1) for d in range(9)], 1)
        wanted = {"tensorflow": v / (k + alpha * sums) ** beta, "caffe": v / (k + alpha / size * sums) ** beta}
        for convention, y in wanted.items():
            ours = LocalResponseNorm(size, alpha, beta, k, convention=convention, backend=kernel)
            relative(ours(x), y, y, 16 * eps_of(torch.float32))
        scaled = LocalResponseNorm(size, alpha * size, beta, k, backend=kernel)
        relative(scaled(x), wanted["tensorflow"], wanted["tensorflow"], 16 * eps_of(torch.float32))


# ---- within a channel


def within(x, before, after, factor, beta=0.75, k=1.0):
    """Position by position: Caffe's WITHIN_CHANNEL, in which positions beyond the image count as 0."""
    x = x.double()
    y = torch.empty_like(x)
    for place in itertools.product(*map(range, x.shape[2:])):
        window = tuple(slice(max(0, p - before), p + after + 1) for p in place)
        total = x[(..., *window)].square().flatten(2).sum(2)
        y[(..., *place)] = x[(..., *place)] * (k + factor * total) ** -beta
    return y


@pytest.mark.parametrize("shape", [(3, 2, 11), (2, 3, 7, 5), (2, 2, 4, 3, 5)], ids=str)
def test_windows_within_a_channel(shape):
    x, dims = draw(shape, scale=3.0), len(shape) - 2
    for size in (1, 2, 3, 4, 5, 9):
        for convention, divisor in (
            ("torch", size**dims),
            ("onnx", size**dims),
            ("caffe", size**dims),
            ("tensorflow", 1),
        ):
            if size % 2 == 0 and convention in ("caffe", "tensorflow"):
                continue
            before, after = size // 2, (size - 1) // 2
            if convention == "onnx":
                before, after = after, before
            layer = LocalResponseNorm(size, 2.0, 0.6, 1.5, convention=convention, within=True)
            wanted = within(x, before, after, 2.0 / divisor, 0.6, 1.5)
            for name, laid in layouts(x).items():
                y = layer(laid)
                relative(y, wanted, wanted, 16 * eps_of(torch.float32))
                if name in ("contiguous", "channels_last", "channels_last_3d"):
                    assert y.stride() == laid.stride()
            half = x.bfloat16()
            wanted = within(half, before, after, 2.0 / divisor, 0.6, 1.5)
            assert layer(half).dtype == torch.bfloat16
            relative(layer(half), wanted, wanted, 0.6 * eps_of(torch.bfloat16))
    x = draw((2, 2, 3, 4)[: dims + 2] if dims < 3 else (1, 2, 2, 3, 2), torch.float64).requires_grad_()
    for size in (2, 3):
        layer = LocalResponseNorm(size, 2.0, within=True)
        assert torch.autograd.gradcheck(layer, x, fast_mode=True)
        assert torch.autograd.gradgradcheck(layer, x, fast_mode=True)


def test_caffes_layer_is_a_power_of_an_average_pool():
    """Its own layers: square, average pool that counts the padding, (1 + alpha average)^-beta, product."""
    x = draw((2, 3, 9, 7), scale=3.0)
    for size in (1, 3, 5):
        average = torch.nn.functional.avg_pool2d(x.square(), size, 1, (size - 1) // 2, count_include_pad=True)
        ours = LocalResponseNorm(size, 2.0, 0.6, convention="caffe", within=True)(x)
        close(ours, x * (1 + 2.0 * average) ** -0.6, 1e-6)


def test_large_positions_outside_the_window_cost_no_digits():
    x = draw((2, 3, 17, 13))
    x[:, :, 8, 6] *= 1e12
    y = within(x, 1, 1, 2.0 / 9)
    far = torch.ones(17, 13, dtype=torch.bool)
    far[7:10, 5:8] = False
    relative(LocalResponseNorm(3, 2.0, within=True)(x)[..., far], y[..., far], y[..., far], 16 * eps_of(torch.float32))


def test_within_a_channel_everywhere():
    """Empty, compiled with any batch and image, exported, under vmap, copied."""
    layer, x = LocalResponseNorm(3, 2.0, within=True, convention="caffe"), draw((2, 3, 5, 4))
    for shape in ((0, 3, 5, 4), (2, 0, 4), (2, 3, 0, 4)):
        assert layer(torch.zeros(shape)).shape == shape
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for other in (x, draw((11, 31, 7, 13)), draw((13, 37, 9, 17))):
        close(compiled(other), within(other, 1, 1, 2.0 / 9), 1e-6)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    close(program.module()(other[:, :3, :5, :4]), layer(other[:, :3, :5, :4]), 1e-6)
    close(torch.vmap(layer)(torch.stack([x, -x])), torch.stack([layer(x), -layer(x)]), 1e-6)
    assert repr(layer) == "LocalResponseNorm(3, alpha=2.0, beta=0.75, k=1.0, convention='caffe', within=True)"
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    with torch.device("meta"):
        assert LocalResponseNorm(3, within=True)(torch.empty(2, 3, 5)).shape == (2, 3, 5)


# ---- masks


@pytest.mark.parametrize("kernel", [*KERNELS, "within"])
def test_masked_entries_count_as_zeros(kernel):
    options = {"within": True} if kernel == "within" else {"backend": kernel}
    layer, x = LocalResponseNorm(4, 2.0, **options), draw((2, 7, 5, 3))
    for shape in ((2, 7, 5, 3), (2, 1, 5, 3), (7, 1, 1)):
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.4
        whole = mask.expand(x.shape)
        zeroed = torch.where(whole, x, 0)
        wanted = within(zeroed, 2, 1, 2.0 / 16) if kernel == "within" else formula(zeroed, 4, 2.0)
        for garbage in (0.0, 1e30, float("nan"), float("inf")):
            leaf = torch.where(whole, x, garbage).requires_grad_()
            y = layer(leaf, mask)
            close(y, wanted, 1e-6)
            (dx,) = torch.autograd.grad(y.square().sum(), leaf)
            assert dx.isfinite().all()
            assert (dx[~whole] == 0).all()
    bad = x.clone()
    bad[0, 3, 2, 1] = float("nan")  # a real entry: what is masked beside it is still 0
    only = torch.zeros_like(x, dtype=torch.bool)
    only[0, 3, 2, 1] = True
    y = layer(bad, only)
    assert y.isnan().sum() == 1
    assert (y[~only] == 0).all()
    assert (layer(x, torch.zeros_like(only)) == 0).all()
    x = draw((2, 5, 3, 2), torch.float64).requires_grad_()
    mask = torch.rand(x.shape) > 0.4
    assert torch.autograd.gradgradcheck(lambda x: layer(x, mask), x, fast_mode=True)
