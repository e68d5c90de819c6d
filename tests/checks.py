"""What every norm must do. `test_zoo.py` runs each function here over each case; exceptions are declared there.

A check takes a `Case` and raises AssertionError. References are float64 formulas over explicit partitions, written
here from the papers; no kernel is compared with itself.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import renorm as rn


@dataclass(frozen=True)
class Case:
    """One zoo entry as the checks use it."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of an input: odd sizes, no two alike
    formula: Callable[[nn.Module, Tensor, Tensor | None], Tensor]  # (layer, x in float64, mask) -> y, training mode
    twin: Callable[[], nn.Module] | None = None  # torch's own layer
    couples_batch: bool = False  # statistics are shared across samples
    exempt: dict[str, str] = field(default_factory=dict)  # check -> why it does not apply

    def layer(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A layer with random parameters, in training mode."""
        torch.manual_seed(0)
        layer = self.make().to(dtype)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape).to(dtype))
        return layer

    def input(self, dtype: torch.dtype = torch.float32, *, mean: float = 1.5, seed: int = 1) -> Tensor:
        """Input with a mean that is not 0."""
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(self.shape, generator=generator, dtype=torch.float64) + mean).to(dtype)

    def mask(self, seed: int = 2) -> Tensor:
        """A mask with about a third of the entries False, broadcast over the channels where there are positions."""
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(self.shape, generator=generator) > 0.35


def moments(x: Tensor, dims: tuple[int, ...], mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance in float64 over `dims`, of the entries where `mask` is True."""
    x = x.double()
    mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.expand(x.shape)
    count = mask.sum(dims, keepdim=True).clamp(min=1)
    mean = torch.where(mask, x, 0).sum(dims, keepdim=True) / count
    var = torch.where(mask, x - mean, 0).square().sum(dims, keepdim=True) / count
    return mean, var


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values in every memory layout people have."""
    made = {
        "contiguous": x.contiguous(),
        "transposed": x.transpose(0, -1).contiguous().transpose(0, -1),
        "sliced": torch.stack([x, -x], dim=-1)[..., 0],
        "offset": torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
    }
    if x.dim() == 4:
        made["channels_last"] = x.contiguous(memory_format=torch.channels_last)
    if x.dim() == 5:
        made["channels_last_3d"] = x.contiguous(memory_format=torch.channels_last_3d)
    return made


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (actual.double() - expected.double()).abs().max().item() if actual.numel() else 0.0
    assert error <= tolerance, f"error {error:.3g}, allowed {tolerance:.3g}"


def eps_of(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def check_formula(case: Case) -> None:
    """Values are the paper's, in float64 to rounding and in float32 to a few units of it."""
    for dtype in (torch.float64, torch.float32):
        layer, x = case.layer(dtype), case.input(dtype)
        expected = case.formula(case.layer(torch.float64), x.double(), None)
        y = layer(x)
        assert y.dtype == dtype
        # 32 units: y is up to 5, and float32 parameters times x_hat add one rounding each.
        close(y, expected, 32 * eps_of(dtype))


def check_half(case: Case) -> None:
    """Half precision differs from float64 by the rounding of the input's dtype, not by its statistics."""
    for dtype in (torch.bfloat16, torch.float16):
        layer, x = case.layer(dtype), case.input(dtype)
        reference = case.layer(dtype).double()
        expected = case.formula(reference, x.double(), None)
        for laid in layouts(x).values():
            y = copy.deepcopy(layer)(laid)
            assert y.dtype == dtype
            # One rounding of y is half a unit; the parameters' product and sum add two at most.
            close(y, expected, 2 * eps_of(dtype) * max(1.0, expected.abs().max().item()))


def check_half_with_float32_parameters(case: Case) -> None:
    """Half-precision activations meet float32 parameters: torch's usual mixed precision."""
    layer, x = case.layer(torch.float32), case.input(torch.bfloat16)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    expected = case.formula(case.layer(torch.float64), x.double(), None)
    close(y, expected, 2 * eps_of(torch.bfloat16) * max(1.0, expected.abs().max().item()))


def check_layouts(case: Case) -> None:
    """Memory layout changes neither values nor gradients, and dense layouts come out as they went in."""
    x = case.input()
    expected = case.formula(case.layer(torch.float64), x.double(), None)
    upstream = torch.randn(case.shape, generator=torch.Generator().manual_seed(3))
    gradients = {}
    for name, laid in layouts(x).items():
        layer, leaf = case.layer(), laid.detach().requires_grad_()
        y = layer(leaf)
        close(y, expected, 32 * eps_of(torch.float32))
        if name.startswith("channels_last"):
            assert y.stride() == laid.stride(), name
        gradients[name] = torch.autograd.grad(y, leaf, upstream)[0]
    for gradient in gradients.values():
        close(gradient, gradients["contiguous"], 1e-5)


def check_large_mean(case: Case) -> None:
    """A mean 1e4 times the deviation: the error is at most that of torch's layer on contiguous input."""
    for mean in (1e2, 1e4):
        x = case.input(mean=mean)
        expected = case.formula(case.layer(torch.float64), x.double(), None)
        # A float32 mean near 1e4 is off by 5e-4; torch's own layers err 2.7e-3 there (layer norm).
        allowed = 4 * mean * eps_of(torch.float32)
        if case.twin is not None:
            allowed = max(allowed, torch_error(case, x, expected))
        for laid in layouts(x).values():
            close(case.layer()(laid), expected, allowed)


def torch_error(case: Case, x: Tensor, expected: Tensor) -> float:
    assert case.twin is not None
    twin = case.twin()
    twin.load_state_dict(case.layer().state_dict())
    return (twin(x).double() - expected).abs().max().item()


def check_constant_input(case: Case) -> None:
    """Variance 0 gives finite values and gradients."""
    layer = case.layer()
    x = torch.full(case.shape, 7.25, requires_grad=True)
    y = layer(x)
    assert y.isfinite().all()
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.isfinite().all()
    expected = case.formula(case.layer(torch.float64), x.detach().double(), None)
    close(y, expected, 1e-3)


def check_magnitudes(case: Case) -> None:
    """Huge and tiny values, in the range where a float32 square is a number."""
    for scale in (1e15, 1e-12):
        x = case.input() * scale
        expected = case.formula(case.layer(torch.float64), x.double(), None)
        for laid in layouts(x).values():
            close(case.layer()(laid), expected, 1e-4)


def check_non_finite(case: Case) -> None:
    """A NaN stays in its own set, and running statistics are not poisoned by it (pytorch#88474)."""
    layer = case.layer()
    layer(case.input())
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    for bad in (float("nan"), float("inf")):
        x = case.input()
        x.view(-1)[0] = bad
        layer(x)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


def check_mask(case: Case) -> None:
    """Masked entries count for nothing, whatever they hold, and come out as 0."""
    layer, x, mask = case.layer(), case.input(), case.mask()
    expected = case.formula(case.layer(torch.float64), x.double(), mask)
    for garbage in (0.0, 1e30, float("nan"), float("inf")):
        dirty = torch.where(mask, x, garbage).requires_grad_()
        y = copy.deepcopy(layer)(dirty, mask)
        close(y, torch.where(mask, expected, 0), 64 * eps_of(torch.float32))
        (gradient,) = torch.autograd.grad(y.sum(), dirty)
        assert gradient.isfinite().all()
        assert (gradient[~mask] == 0).all()
    everything = torch.ones(case.shape, dtype=torch.bool)
    close(copy.deepcopy(layer)(x, everything), copy.deepcopy(layer)(x), 16 * eps_of(torch.float32))


def check_mask_in_evaluation(case: Case) -> None:
    """By running statistics a mask changes no real entry; otherwise it means what it means in training."""
    layer, x, mask = case.layer(), case.input(), case.mask()
    layer(x)
    y = layer.eval()(torch.where(mask, x, float("nan")), mask)
    assert y.isfinite().all()
    assert (y[~mask] == 0).all()
    if layer.running_mean is None:
        close(y, torch.where(mask, case.formula(case.layer(torch.float64), x.double(), mask), 0), 64 * eps_of(y.dtype))
    elif type(layer).solve is rn.Norm.solve:  # a mixture measures part of its statistics in evaluation too
        close(y, torch.where(mask, layer(x), 0), 64 * eps_of(y.dtype))


def check_mask_of_nothing(case: Case) -> None:
    """No real entry at all: zeros and zero gradients, and nothing remembered."""
    layer = case.layer()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = case.input().requires_grad_()
    y = layer(x, torch.zeros(case.shape, dtype=torch.bool))
    assert (y == 0).all()
    y.sum().backward()
    for tensor in (x, *layer.parameters()):
        assert tensor.grad is not None
        assert (tensor.grad == 0).all()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


def check_gradients(case: Case) -> None:
    """First and second derivatives against finite differences, with and without a mask."""
    layer = case.layer(torch.float64)
    x = case.input(torch.float64).requires_grad_()
    mask = case.mask()
    names = [name for name, _ in layer.named_parameters()]
    for masked in (None, mask):

        def call(x: Tensor, *values: Tensor, masked: Tensor | None = masked) -> Tensor:
            fresh = copy.deepcopy(layer)
            return torch.func.functional_call(fresh, dict(zip(names, values, strict=True)), (x, masked))

        inputs = (x, *(p.detach().clone().requires_grad_() for p in layer.parameters()))
        assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def check_empty(case: Case) -> None:
    """An empty batch gives an empty result and leaves the running statistics alone."""
    layer = case.layer()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.randn(0, *case.shape[1:], requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape
    y.sum().backward()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


def check_evaluation(case: Case) -> None:
    """In evaluation a sample's output does not depend on the others in its batch."""
    layer = case.layer()
    for seed in range(3):
        layer(case.input(seed=seed))
    layer.eval()
    x = case.input(seed=5)
    whole = layer(x)
    for i in range(case.shape[0]):
        close(layer(x[i : i + 1]), whole[i : i + 1], 8 * eps_of(torch.float32))
    state = copy.deepcopy(layer.state_dict())
    layer(x)
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


def check_copies(case: Case) -> None:
    """deepcopy, pickle, torch.save and state_dict give a layer that computes the same."""
    layer, x = case.layer(), case.input()
    layer(x)
    layer.eval()
    expected = layer(x)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    loaded = case.make()
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded.eval()):
        assert torch.equal(twin(x), expected)
    assert repr(layer).count("(") >= 1


def check_torch_twin(case: Case) -> None:
    """Torch's layer: same state_dict keys, values, gradients and running statistics, in both modes."""
    assert case.twin is not None
    ours, theirs = case.layer(), case.twin()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert isinstance(ours, type(theirs))
    theirs.load_state_dict(ours.state_dict())
    upstream = torch.randn(case.shape, generator=torch.Generator().manual_seed(3))
    for training in (True, True, False):
        ours.train(training)
        theirs.train(training)
        a, b = (case.input(seed=int(training)).requires_grad_() for _ in range(2))
        y, z = ours(a), theirs(b)
        close(y, z, 16 * eps_of(torch.float32))
        for p, q in zip(
            torch.autograd.grad(y, [a, *ours.parameters()], upstream),
            torch.autograd.grad(z, [b, *theirs.parameters()], upstream),
            strict=True,
        ):
            close(p, q, 64 * eps_of(torch.float32) * max(1.0, q.abs().max().item()))
        twice = [second_gradient(layer, x) for layer, x in ((ours, a), (theirs, b))]
        close(*twice, 1e-3 * max(1.0, twice[1].abs().max().item()))
    for name, value in theirs.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            close(ours.state_dict()[name], value, 8 * eps_of(torch.float32) * max(1.0, value.abs().max().item()))


def second_gradient(layer: nn.Module, x: Tensor) -> Tensor:
    """The gradient of the squared gradient: what a gradient penalty needs."""
    (first,) = torch.autograd.grad(copy.deepcopy(layer)(x).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().mean(), x)
    return second


def check_compile(case: Case) -> None:
    """One graph without a break, for training with gradients and running statistics, and for evaluation."""
    torch._dynamo.reset()
    plain, x = case.layer(), case.input()
    compiled = torch.compile(copy.deepcopy(plain), fullgraph=True, backend="aot_eager")
    for training in (True, False):
        plain.train(training)
        compiled.train(training)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = plain(a), compiled(b)
        close(z, y, 32 * eps_of(torch.float32))
        close(torch.autograd.grad(z.square().sum(), b)[0], torch.autograd.grad(y.square().sum(), a)[0], 1e-4)
    for (name, p), q in zip(plain.state_dict().items(), compiled.state_dict().values(), strict=True):
        close(q, p, 8 * eps_of(torch.float32)), name


def check_compile_dynamic(case: Case) -> None:
    """The same graph serves another batch size."""
    torch._dynamo.reset()
    layer = case.layer().eval()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for count in (11, 13, 17):  # unlike any other size: dynamo gives equal sizes one symbol
        x = torch.randn(count, *case.shape[1:])
        close(compiled(x), layer(x), 32 * eps_of(torch.float32))
    assert len(graphs) == 1


def check_export(case: Case) -> None:
    """torch.export gives a program for any batch size."""
    layer, x = case.layer().eval(), case.input()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},))
    other = torch.randn(case.shape[0] + 3, *case.shape[1:])
    close(program.module()(other), layer(other), 32 * eps_of(torch.float32))


def check_vmap(case: Case) -> None:
    """vmap over a stack of inputs in evaluation, and over an ensemble of layers in training, equals a loop."""
    layer = case.layer()
    layer(case.input())
    layer.eval()
    stack = torch.stack([case.input(seed=seed) for seed in range(3)])
    expected = torch.stack([layer(x) for x in stack])
    close(torch.vmap(layer)(stack), expected, 32 * eps_of(torch.float32))
    layers = [copy.deepcopy(layer).train() for _ in range(3)]
    with torch.no_grad():
        for i, member in enumerate(layers):
            for parameter in member.parameters():
                parameter.add_(0.1 * i)
    parameters, buffers = torch.func.stack_module_state(layers)

    def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layers[0], (parameters, buffers), (x,))

    loop = [copy.deepcopy(member) for member in layers]
    expected = torch.stack([member(x) for member, x in zip(loop, stack, strict=True)])
    close(torch.vmap(call)(parameters, buffers, stack), expected, 32 * eps_of(torch.float32))
    for name, values in buffers.items():
        for value, member in zip(values, loop, strict=True):
            close(value, member.state_dict()[name], 8 * eps_of(torch.float32))


def check_autocast(case: Case) -> None:
    """Under autocast the output has the input's dtype and the statistics are float32."""
    layer, x = case.layer(), case.input(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    expected = case.formula(case.layer(torch.float64), x.double(), None)
    close(y, expected, 2 * eps_of(torch.bfloat16) * max(1.0, expected.abs().max().item()))


def check_checkpoint(case: Case) -> None:
    """Activation checkpointing changes no gradient and counts a batch once (pytorch#96136)."""
    from torch.utils.checkpoint import checkpoint

    for reentrant in (False, True):
        plain, again = case.layer(), case.layer()
        a, b = case.input().requires_grad_(), case.input().requires_grad_()
        plain(a).square().sum().backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint(again, b, use_reentrant=reentrant).square().sum().backward()
        assert torch.equal(a.grad, b.grad)
        for (name, p), q in zip(plain.state_dict().items(), again.state_dict().values(), strict=True):
            assert torch.equal(p, q), name


def check_meta(case: Case) -> None:
    """A layer made on the meta device has shapes only, and works after to_empty and loading."""
    with torch.device("meta"):
        layer = case.make()
    assert all(p.is_meta for p in layer.parameters())
    layer = layer.to_empty(device=torch.get_default_device())
    layer.load_state_dict(case.layer().state_dict())
    assert torch.equal(layer(case.input()), case.layer()(case.input()))


def check_device(case: Case) -> None:
    """Away from the CPU nothing is made on it and nothing is read back: no step waits for the device."""
    for training in (True, False):
        for dtype in (torch.float32, torch.bfloat16):
            layer = case.layer(dtype).to("meta").train(training)  # a device without values, which refuses to be read
            x = case.input(dtype).to("meta").requires_grad_()
            masks = [None] if "mask" in case.exempt else [None, case.mask().to("meta")]
            for mask in masks:
                y = layer(x) if mask is None else layer(x, mask)
                (grad,) = torch.autograd.grad(y.sum(), x)
                assert y.is_meta
                assert (grad.shape, grad.dtype) == (x.shape, dtype)


CHECKS = {name.removeprefix("check_"): value for name, value in list(globals().items()) if name.startswith("check_")}
