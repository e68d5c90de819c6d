"""What only a GPU shows: devices, streams, graphs, compilers. Skipped where there is none."""

import copy

import pytest
import torch
from checks import close, eps_of
from torch import nn
from torch.utils.checkpoint import checkpoint

import renorm as rn
from renorm.kernels.triton import available

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use")

# One pass, several passes, a solve of its own: (layer, shape).
LAYERS = {
    "layer": (lambda: rn.LayerNorm(768, backend="triton"), (64, 768)),
    "RMS": (lambda: rn.RMSNorm(768, backend="triton"), (64, 768)),
    "group": (lambda: rn.GroupNorm(4, 16, backend="triton"), (8, 16, 14, 14)),
    "batch": (lambda: rn.BatchNorm2d(16, backend="triton"), (32, 16, 14, 14)),
    "small batch": (lambda: rn.BatchNorm2d(16, backend="triton"), (32, 16, 7, 7)),
    "switch": (lambda: rn.SwitchNorm2d(16, backend="triton"), (8, 16, 14, 14)),
}


@pytest.fixture(params=LAYERS)
def made(request):
    """A layer on the GPU, its input and a gradient of its output."""
    make, shape = LAYERS[request.param]
    torch.manual_seed(0)
    layer = make().cuda()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer, torch.randn(shape, device="cuda") + 1, torch.randn(shape, device="cuda")


def results(layer, x, dy, call=None):
    """y and all gradients."""
    leaf = x.detach().clone().requires_grad_()
    parameters = list(layer.parameters())
    y = (call or layer)(leaf)
    return [y, *torch.autograd.grad(y, [leaf, *parameters], dy)]


def alike(found, wanted, units=64):
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        close(a, b, units * eps_of(a.dtype) * max(1.0, b.abs().max().item()))


def test_the_kernels_run():
    assert available.obstacle("cuda", 0) is None
    assert "triton: kernels for CUDA tensors" in rn.kernels.status()


def test_they_give_what_the_reference_gives_and_the_same_bits_again(made):
    layer, x, dy = made
    twin = copy.deepcopy(layer)
    twin.backend = "reference"
    found = results(copy.deepcopy(layer), x, dy)
    alike(found, results(twin, x, dy))
    assert all(torch.equal(a, b) for a, b in zip(found, results(copy.deepcopy(layer), x, dy), strict=True))
    assert layer.kernel(x) == "triton"


def test_in_a_compiled_graph(made):
    layer, x, dy = made
    if isinstance(layer, rn.SwitchNorm2d):
        pytest.skip("what is solved between the kernels is the compiler's, with backend='auto'")
    x, dy = (t.repeat(64, *[1] * (t.dim() - 1)) for t in (x, dy))  # large enough for the operator
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True)
    twin = copy.deepcopy(layer)
    alike(results(compiled, x, dy), results(twin, x, dy))


def test_in_a_cuda_graph(made):
    layer, x, dy = made
    leaf = x.clone().requires_grad_()
    wanted = [leaf, *layer.parameters()]

    def step():
        y = layer(leaf)
        return [y, *torch.autograd.grad(y, wanted, dy)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaf.copy_(2 * x - 1)
    graph.replay()
    replayed = [t.clone() for t in captured]
    assert all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))


def test_on_another_stream(made):
    layer, x, dy = made
    wanted = results(copy.deepcopy(layer), x, dy)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = x.clone()
        torch.cuda._sleep(50_000_000)
        late.add_(1).sub_(1)
        found = results(copy.deepcopy(layer), late, dy)
    torch.cuda.current_stream().wait_stream(stream)
    alike(found, wanted)


def test_under_autocast_and_checkpointing(made):
    layer, x, dy = made
    wanted = results(copy.deepcopy(layer), x, dy)
    again = copy.deepcopy(layer)
    alike(results(again, x, dy, lambda leaf: checkpoint(again, leaf, use_reentrant=False)), wanted)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = results(copy.deepcopy(layer), x, dy)
    alike(found, wanted)


def test_deterministic_algorithms_are_no_obstacle(made):
    layer, x, dy = made
    torch.use_deterministic_algorithms(True)
    try:
        results(layer, x, dy)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_on_a_device_that_is_not_the_current_one(made):
    layer, x, dy = made
    wanted = results(copy.deepcopy(layer), x, dy)
    found = results(copy.deepcopy(layer).to("cuda:1"), x.to("cuda:1"), dy.to("cuda:1"))
    alike([t.cpu() for t in found], [t.cpu() for t in wanted])


def test_beyond_32_bits():
    """2^31 entries and more, 4.3 GB in bfloat16; the last rows alone, too."""
    free, _ = torch.cuda.mem_get_info()
    if free < 40 << 30:
        pytest.skip("it takes 40 GB")
    layer = rn.LayerNorm(4096, backend="triton", device="cuda", dtype=torch.bfloat16)
    x = torch.randn(2**19 + 8, 4096, device="cuda", dtype=torch.bfloat16)
    found = results(layer, x, x)
    tail = results(layer, x[-8:].clone(), x[-8:].clone())
    alike([t[-8:] for t in found[:2]], tail[:2], 1)
    batch = rn.BatchNorm1d(4096, backend="triton", device="cuda", dtype=torch.bfloat16)
    y = batch(x)[-8:].float()
    mean, var = x[::64].float().mean(0), x[::64].float().var(0)
    assert (y - (x[-8:].float() - mean) / var.sqrt()).abs().max() < 0.2, "of a sample of the rows"


def test_small_calls_follow_each_other_without_waiting():
    """Nothing on the way asks the GPU for a number."""
    layer = nn.Sequential(*(rn.LayerNorm(64, backend="triton") for _ in range(3))).cuda()
    x = torch.randn(8, 64, device="cuda", requires_grad=True)
    layer(x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
