"""What is particular to the layer: its arguments, its errors, its policies. What all norms share is in checks.py."""

import copy
import io
import pickle
import re

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from checks import close, moments
from hypothesis import assume, given, settings
from test_plan import cases
from torch import nn

import renorm as rn
from renorm.errors import BackendError, PatternError, ShapeError, UnknownNormError
from renorm.kernels import extension, select
from renorm.kernels.moments import Affine
from renorm.pattern import partition

# The kernels for what torch has none for.
OWN = "reference" if extension.module() is None else "native"


@pytest.mark.parametrize(
    ("pattern", "options", "weight", "running"),
    [
        ("[n] c [...]", {"c": 6}, (6,), (6,)),
        ("n (g [c]) [...]", {"g": 2, "c": 3}, (6,), None),
        ("n (g [c]) [...]", {"g": 2, "weight": "g"}, (2,), None),
        ("n (g [c]) [...]", {"g": 2, "weight": None}, None, None),
        ("... [h c]", {"h": 4, "c": 3, "weight": "h c"}, (4, 3), None),
        ("... [h c]", {"c": 3}, (3,), None),
        ("t [n] c", {"t": 5, "c": 3, "running": "t c"}, (3,), (5, 3)),
        ("(k [b]) c [...]", {"b": 2, "c": 3}, (3,), (3,)),
        ("[n] c [...]", {"c": 6, "running": None}, (6,), None),
        ("[a] b", {"b": 4, "weight": "b"}, (4,), (4,)),
    ],
)
def test_where_parameters_and_running_statistics_run(pattern, options, weight, running):
    layer = rn.Norm(pattern, **options)
    for tensor, shape in ((layer.weight, weight), (layer.running_mean, running), (layer.running_var, running)):
        assert (tensor is None) == (shape is None)
        assert tensor is None or tuple(tensor.shape) == shape


@pytest.mark.parametrize(
    ("pattern", "options", "words"),
    [
        ("[n] c", {}, "pass its size, c=..."),
        ("[n] d", {"d": 3}, "no axis is called c"),
        ("[n] c", {"c": 3, "weight": "d"}, "weight names the axis 'd'"),
        ("[n] c", {"c": 3, "running": "n"}, "'n' is averaged over"),
        ("[n] c", {"c": 3, "running": "m"}, "running names the axis 'm'"),
        ("[n] c", {"c": -3}, "positive integer"),
        ("[n] c", {"c": 3, "eps1": 3}, "did you mean|no axis 'eps1'"),
    ],
)
def test_what_a_layer_cannot_be_made_of(pattern, options, words):
    with pytest.raises(PatternError, match=words):
        rn.Norm(pattern, **options)


@pytest.mark.parametrize(
    ("layer", "shape", "words"),
    [
        (rn.BatchNorm2d(3), (2, 3, 4), r"expected 4D input \(got 3D input\)"),
        (
            rn.BatchNorm2d(3),
            (2, 4, 5, 5),
            r"dimension 1 must have 3 entries \(c=3\); the input has shape \(2, 4, 5, 5\)",
        ),
        (rn.BatchNorm2d(3), (1, 3, 1, 1), "Expected more than 1 value per channel when training"),
        (rn.BatchNorm(3), (3,), "expected at least 2D input"),
        (rn.InstanceNorm2d(3), (2, 3, 1, 1), "Expected more than 1 spatial element when training"),
        (rn.InstanceNorm2d(3, affine=True), (2, 4, 5, 5), "dimension 1 must have 3 entries"),
        (rn.LayerNorm(3), (2, 4), "dimension 1 must have 3 entries"),
        (rn.GroupNorm(2, 4), (2, 6, 3), "dimension 1 must have 4 entries"),
        (rn.GroupNorm(4, 4), (1, 4), "Expected more than 1 value per channel when training"),
        (rn.GroupNorm(2, 4), (4,), "at least 2 dimensions; the tensor has 1"),
        (rn.RMSNorm((2, 3)), (5, 2, 4), "dimension 2 must have 3 entries"),
    ],
)
def test_inputs_that_do_not_fit(layer, shape, words):
    """The classes torch raises: ValueError for most, RuntimeError for layer and group norm; ShapeError is both."""
    with pytest.raises(ValueError, match=words):
        layer(torch.randn(shape))


def test_constructor_errors_are_torchs():
    with pytest.raises(ValueError, match="num_channels"):
        rn.GroupNorm(4, 6)
    with pytest.raises(ShapeError, match="axis 1 or -1"):
        rn.SwitchNorm(4, axis=2)
    with pytest.raises(ShapeError, match="instance, layer and batch"):
        rn.SwitchNorm(4, partitions=("pixel",))


def test_rms_norm_eps_none_is_torchs():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = (torch.randn(4, 9) * 1e-5).to(dtype)
        close(rn.RMSNorm(9, dtype=dtype)(x), nn.RMSNorm(9, dtype=dtype)(x), 4 * torch.finfo(dtype).eps)
        mask = torch.ones_like(x, dtype=torch.bool)
        close(rn.RMSNorm(9, dtype=dtype)(x, mask), nn.RMSNorm(9, dtype=dtype)(x), 4 * torch.finfo(dtype).eps)


def test_instance_norm_takes_one_sample_without_a_batch_dimension():
    x = torch.randn(3, 5, 7)
    for options in ({}, {"affine": True, "track_running_stats": True}):
        ours, theirs = rn.InstanceNorm2d(3, **options), nn.InstanceNorm2d(3, **options)
        close(ours(x), theirs(x), 1e-6)
        assert ours.values_per_set((3, 5, 7)) == ours.values_per_set((2, 3, 5, 7)) == 35


def test_instance_norm_warns_of_other_channels_as_torch_does():
    with pytest.warns(UserWarning, match="the input has 4 channels and the layer 3"):
        y = rn.InstanceNorm2d(3)(torch.randn(2, 4, 5, 5))
    assert y.shape == (2, 4, 5, 5)


def test_one_value_policies():
    x = torch.tensor([[3.0, 5.0]])
    layer = rn.BatchNorm1d(2, one_value="running")
    layer(torch.randn(8, 2) + 4)
    state = copy.deepcopy(layer.state_dict())
    expected = (x - layer.running_mean) / (layer.running_var + layer.eps).sqrt()
    close(layer(x), expected, 1e-6)
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    assert torch.equal(rn.BatchNorm1d(2, one_value="allow")(x), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="one_value='running' to normalize"):
        rn.BatchNorm1d(2)(x)
    assert rn.BatchNorm1d(2).eval()(x).shape == x.shape


def test_momentum_none_averages_all_batches_equally():
    layer, batches = rn.BatchNorm1d(3, momentum=None), [torch.randn(5, 3) for _ in range(4)]
    for batch in batches:
        layer(batch)
    close(layer.running_mean, torch.stack([b.mean(0) for b in batches]).mean(0), 1e-6)
    close(layer.running_var, torch.stack([b.var(0) for b in batches]).mean(0), 1e-6)
    assert layer.num_batches_tracked == 4


def test_a_batch_that_is_not_finite_is_not_counted():
    layer = rn.BatchNorm1d(2, momentum=None)
    good = torch.randn(5, 2)
    layer(good)
    layer(torch.tensor([[1.0, float("inf")], [2.0, 3.0]]))
    assert layer.num_batches_tracked == 1
    close(layer.running_mean, good.mean(0), 1e-6)


def test_masked_running_statistics_are_those_of_the_real_entries():
    x, mask = torch.randn(6, 3, 4), torch.rand(6, 1, 4) > 0.4
    layer = rn.BatchNorm1d(3, momentum=1.0)
    layer(x, mask)
    for channel in range(3):
        values = x[:, channel][mask[:, 0]].double().numpy()
        assert layer.running_mean[channel].item() == pytest.approx(values.mean(), abs=1e-6)
        assert layer.running_var[channel].item() == pytest.approx(values.var(ddof=1), abs=1e-5)


def test_a_masked_channel_keeps_its_running_statistics():
    mask = torch.tensor([[True, False]]).expand(5, 2)
    layer = rn.BatchNorm1d(2, momentum=1.0)
    x = torch.randn(5, 2)
    layer(x, mask)
    close(layer.running_mean, torch.stack([x[:, 0].mean(), torch.tensor(0.0)]), 1e-6)
    close(layer.running_var, torch.stack([x[:, 0].var(), torch.tensor(1.0)]), 1e-6)


def test_padding_does_not_change_a_sequence():
    """The feature pytorch#70529 asks for: a padded batch normalizes as its sequences would alone."""
    lengths = [3, 7, 5]
    sequences = [torch.randn(6, n) for n in lengths]
    padded = torch.full((3, 6, 7), float("nan"))
    for i, sequence in enumerate(sequences):
        padded[i, :, : lengths[i]] = sequence
    mask = (torch.arange(7) < torch.tensor(lengths)[:, None])[:, None]
    instance = rn.InstanceNorm1d(6)
    for i, sequence in enumerate(sequences):
        close(instance(padded, mask)[i, :, : lengths[i]], instance(sequence[None])[0], 1e-6)
    batch = rn.BatchNorm1d(6)(padded, mask)
    together = torch.cat(sequences, dim=1).T
    close(batch.transpose(1, 2)[mask[:, 0]], nn.BatchNorm1d(6)(together), 1e-6)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.ones(2, 3), "a mask is boolean"),
        (np.ones((2, 3), bool), r"a mask is a tensor; got ndarray: write torch.as_tensor\(mask\)"),
        (torch.ones(2, 3, dtype=torch.bool), r"must broadcast to the input's shape \(2, 3, 5\); got \(2, 3\)"),
        (torch.ones(4, 1, 1, dtype=torch.bool), "must broadcast"),
    ],
)
def test_masks_that_do_not_fit(mask, words):
    with pytest.raises(ShapeError, match=words):
        rn.BatchNorm1d(3)(torch.randn(2, 3, 5), mask)


def test_group_norm_on_channels_last_keeps_its_digits():
    """torch 2.13's own errs by 1.2e3 here, on values of about 1."""
    x = (torch.randn(8, 64, 32, 32) + 1000).contiguous(memory_format=torch.channels_last)
    groups = x.double().reshape(8, 32, -1)
    expected = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    y = rn.GroupNorm(32, 64)(x)
    assert y.stride() == x.stride()
    close(y, expected.view(x.shape), 2e-3)


def test_a_norm_of_ones_own_is_a_solve():
    class HalfCentered(rn.Norm):
        """Subtract half the mean."""

        def solve(self, moments):
            return Affine(torch.rsqrt(moments.var + self.eps), moments.mean / 2)

    layer = HalfCentered("n (g [c]) [...]", g=2, c=3)
    x = torch.randn(4, 6, 5, dtype=torch.float64)
    groups = x.view(4, 2, -1)
    var, mean = torch.var_mean(groups, -1, unbiased=False, keepdim=True)
    close(layer.double()(x), ((groups - mean / 2) / (var + 1e-5).sqrt()).view(x.shape), 1e-12)
    assert layer.kernel(x) == OWN


def test_a_solve_with_batch_statistics_gets_running_ones_in_evaluation():
    class Renamed(rn.Norm):
        def solve(self, moments):
            batch = self.batch_moments(moments.merge("n"))
            return Affine(torch.rsqrt(batch.var + self.eps), batch.mean)

    ours, theirs = Renamed("n c [...]", c=3, running="c"), nn.BatchNorm1d(3)
    for _ in range(3):
        x = torch.randn(4, 3, 5) + 2
        close(ours(x), theirs(x), 1e-5)
    close(ours.running_var, theirs.running_var, 1e-6)
    close(ours.eval()(x), theirs.eval()(x), 1e-5)


def test_track_running_stats_can_be_switched_off_as_in_torch():
    ours, theirs = rn.BatchNorm1d(3), nn.BatchNorm1d(3)
    for layer in (ours, theirs):
        layer.track_running_stats = False
        layer(torch.randn(5, 3) + 9)
    assert torch.equal(ours.running_mean, theirs.running_mean)


def test_swa_finds_and_updates_our_layers():
    """`update_bn` looks for torch's classes; ours are among them."""
    torch.manual_seed(0)
    data = [torch.randn(6, 4) for _ in range(5)]
    ours, theirs = (nn.Sequential(layer) for layer in (rn.BatchNorm1d(4), nn.BatchNorm1d(4)))
    for model in (ours, theirs):
        torch.optim.swa_utils.update_bn(data, model)
    close(ours[0].running_mean, theirs[0].running_mean, 1e-6)
    close(ours[0].running_var, theirs[0].running_var, 1e-6)


def test_checkpoints_from_before_num_batches_tracked_load():
    old = nn.BatchNorm1d(3).state_dict()
    del old["num_batches_tracked"]
    old._metadata[""]["version"] = 1
    rn.BatchNorm1d(3).load_state_dict(old)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_backends_by_argument(backend):
    layer, x = rn.GroupNorm(2, 6, backend=backend), torch.randn(3, 6, 5)
    assert layer.kernel(x) == {"reference": "reference", "torch": "torch.group_norm"}[backend]
    close(layer(x), nn.GroupNorm(2, 6)(x), 1e-6)
    assert f"backend='{backend}'" in repr(layer)


def test_backend_by_environment(monkeypatch):
    layer, x = rn.LayerNorm(6), torch.randn(3, 6)
    assert layer.kernel(x) == "torch.layer_norm"
    monkeypatch.setattr(select, "ENVIRONMENT", "reference")
    assert layer.kernel(x) == "reference"
    assert rn.LayerNorm(6, backend="torch").kernel(x) == "torch.layer_norm"
    monkeypatch.setattr(select, "ENVIRONMENT", "fast")
    with pytest.raises(BackendError, match="one of auto, reference, torch, native, triton; got 'fast'"):
        rn.LayerNorm(6)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (lambda: rn.SwitchNorm2d(6, backend="torch"), "no kernel for a solve of its own"),
        (lambda: rn.Norm("(k [b]) c ...", k=1, c=6, running=None, backend="torch"), "no kernel for this pattern"),
        (lambda: rn.Norm("n [c ...]", center=False, c=6, backend="torch"), "rms_norm is over"),
        (lambda: rn.InstanceNorm2d(6, track_running_stats=True, backend="torch"), "does not hand out the moments"),
        (lambda: rn.GroupNorm(2, 6, backend="torch", dtype=torch.float64), "parameters' dtype"),
    ],
)
def test_a_backend_that_cannot_run_says_why(layer, words):
    with pytest.raises(BackendError, match=words):
        layer()(torch.randn(2, 6, 4, 4))
    with pytest.raises(BackendError, match="take no mask"):
        rn.LayerNorm(4, backend="torch")(torch.randn(2, 4), torch.ones(2, 4, dtype=torch.bool))


@pytest.mark.parametrize(
    ("pattern", "options", "kernel"),
    [
        ("[n] c d [...]", {"c": 3, "d": 4, "weight": "c d"}, "torch.batch_norm"),
        ("[n] c d w", {"c": 3, "d": 4, "w": 6, "weight": "c d w", "running": "c"}, "torch.batch_norm"),
        ("[n] c d w", {"c": 3, "d": 4, "w": 6, "weight": "d", "running": "c d w"}, OWN),
        ("n [c d] ...", {"c": 3, "d": 4, "weight": "c d"}, "torch.layer_norm"),
        ("n c d [...]", {"c": 3, "d": 4, "weight": "c d"}, OWN if OWN == "native" else "torch.group_norm"),
        ("n c [d] w", {"c": 3, "d": 4, "weight": "c d"}, "reference"),
        ("n (g [c]) d [...]", {"g": 3, "c": 1, "d": 4, "weight": "g c d"}, OWN),
    ],
)
def test_parameters_along_several_dimensions(pattern, options, kernel):
    """Torch's kernels want vectors; the formula is the reference's, which checks.py holds to the paper's."""
    x = torch.randn(5, 3, 4, 6) + 1
    layers = [rn.Norm(pattern, backend=backend, **options) for backend in ("auto", "reference")]
    with torch.no_grad():
        for one, other in zip(*(layer.parameters() for layer in layers), strict=True):
            other.copy_(one.normal_())
    assert layers[0].kernel(x) == kernel
    for training in (True, False):
        y, z = (layer.train(training)(x) for layer in layers)
        close(y, z, 2e-6 * max(1.0, z.abs().max().item()))
    for one, other in zip(*(layer.buffers() for layer in layers), strict=True):
        close(one, other, 1e-6)


@given(cases())
@settings(max_examples=200, deadline=None)
def test_any_pattern_by_whatever_kernel_is_the_formula(case):
    """Random patterns, splits, weighted axes and strides: the kernel that is chosen computes the definition."""
    pattern, sizes, weighted, x = case
    part = partition(pattern, x.dim(), sizes, weighted)
    split = dict(zip(part.names, part.split_shape(x.shape), strict=True))
    assume(all(size > 0 for size in split.values()))
    layer = rn.Norm(
        pattern, weight=" ".join(weighted) or None, running=None, **{**sizes, **{n: split[n] for n in weighted}}
    )
    layer.double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    view = part.view(x)
    mean, var = moments(view, part.reduced)
    along = [size if i in part.weighted else 1 for i, size in enumerate(view.shape)]
    expected = (view - mean) / (var + 1e-5).sqrt()
    if weighted:
        expected = expected * layer.weight.reshape(along) + layer.bias.reshape(along)
    y = layer(x)
    assert y.shape == x.shape
    close(y, expected.reshape(x.shape), 1e-9 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("layer", [nn.LayerNorm(4), rn.LocalResponseNorm(3), rn.LayerNormLSTM(4, 4), rn.DyT(4)])
def test_a_layer_without_a_pattern_is_not_explained(layer: nn.Module) -> None:
    with pytest.raises(BackendError, match=f"has a pattern; got {type(layer).__name__}"):
        rn.kernels.explain(layer, torch.randn(2, 4, 4))


def test_explain_and_repr_say_what_ran():
    layer, x = rn.BatchNorm2d(4), torch.randn(2, 4, 3, 3)
    assert rn.kernels.explain(layer, x).startswith("kernel: torch.batch_norm\n[n] c [...] on 2x4x3x3: 4 sets of 18")
    assert rn.kernels.explain(layer, x, torch.ones(1, dtype=torch.bool)).startswith(f"kernel: {OWN}\n")
    assert "kernel=" not in repr(layer)
    layer(x)
    assert "kernel=torch.batch_norm" in repr(layer)


def test_rank_beyond_those_bound_ahead():
    x = torch.randn(2, 3, 1, 2, 1, 2, 1, 3)
    close(rn.BatchNorm(3)(x), nn.BatchNorm1d(3)(x.view(2, 3, -1)).view(x.shape), 1e-5)


def test_inductor_trains_the_same_network():
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(2, 8, 3),
        rn.BatchNorm2d(8, momentum=None),
        nn.ReLU(),
        rn.GroupNorm(2, 8),
        rn.SwitchNorm2d(8),
        rn.Norm("n [c] ...", c=8),
    )
    compiled_model = copy.deepcopy(plain)
    compiled = torch.compile(compiled_model, fullgraph=True)
    x = torch.randn(4, 2, 8, 8)
    for model in (plain, compiled):
        model(x).square().mean().backward()
    for p, q in zip(plain.parameters(), compiled_model.parameters(), strict=True):
        close(q.grad, p.grad, 1e-4)
    for p, q in zip(plain.buffers(), compiled_model.buffers(), strict=True):
        close(q, p, 1e-5)


@pytest.mark.parametrize(
    "layer",
    [
        rn.BatchNorm2d(6),
        rn.InstanceNorm2d(6),
        rn.GroupNorm(3, 6),
        rn.LayerNorm(7),
        rn.RMSNorm(7),
        rn.SwitchNorm2d(6),
        rn.Norm("n [c] ...", c=6),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_onnx_runtime_computes_what_we_do(layer):
    x = torch.randn(3, 6, 5, 7)
    layer(x)
    layer.eval()
    file = io.BytesIO()
    program = torch.onnx.export(layer, (x,), dynamo=True, dynamic_shapes=({0: "batch"},), verbose=False)
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    other = torch.randn(5, 6, 5, 7)
    (result,) = session.run(None, {session.get_inputs()[0].name: np.asarray(other)})
    close(torch.from_numpy(result), layer(other), 1e-5)


@pytest.mark.skipif(OWN == "reference", reason="no native kernels here")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda **o: rn.BatchNorm2d(6, **o), (9, 6, 5, 7)),
        (lambda **o: rn.InstanceNorm2d(6, affine=True, track_running_stats=True, **o), (9, 6, 5, 7)),
        (lambda **o: rn.LayerNorm(7, bias=False, **o), (5, 7)),
        (lambda **o: rn.RMSNorm(7, **o), (5, 7)),
        (lambda **o: rn.Norm("n [c] ...", c=18, **o), (4, 18, 5, 7)),
        (lambda **o: rn.Norm("(k [b]) c [...]", b=2, weight=None, running=None, **o), (4, 6, 5, 7)),
    ],
)
def test_a_traced_graph_runs_the_native_kernels(make, shape, dtype, masked):
    """One graph, the operator in it, and values, gradients and running statistics those of the eager reference."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    seen = []

    def look(module, inputs):
        seen.extend(str(node.target) for node in module.graph.nodes)
        return module

    layers = [make(dtype=dtype, backend=backend) for backend in ("native", "reference")]
    compiled = torch.compile(layers[0], fullgraph=True, backend=look)
    both = torch.compile(copy.deepcopy(layers[0]), fullgraph=True, backend="aot_eager")
    mask = torch.rand(shape) > 0.3 if masked else None
    x = torch.randn(shape).to(dtype)
    compiled(x, mask)
    assert any("renorm" in target for target in seen)
    a, b = (x.clone().requires_grad_() for _ in range(2))
    y, z = both(a, mask), layers[1](b, mask)
    tolerance = 4 * torch.finfo(dtype).eps * max(1.0, z.abs().max().item())
    close(y, z, tolerance)
    upstream = torch.randn(shape).to(dtype)
    for one, other in zip(
        torch.autograd.grad(y, [a, *both.parameters()], upstream),
        torch.autograd.grad(z, [b, *layers[1].parameters()], upstream),
        strict=True,
    ):
        close(one, other, 8 * torch.finfo(dtype).eps * max(1.0, other.abs().max().item()))
    for one, other in zip(both.buffers(), layers[1].buffers(), strict=True):
        close(one, other, 1e-2 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "gelu", "silu"])
@pytest.mark.parametrize("backend", ["reference", "torch", OWN])
def test_neighbours_in_one_pass(backend, activation, layout):
    """Residual and activation: values, gradients and running statistics of the three steps in torch, in float64."""
    torch.manual_seed(0)
    follow = {
        None: lambda z: z,
        "relu": F.relu,
        "leaky_relu": F.leaky_relu,
        "gelu": F.gelu,
        "silu": F.silu,
    }[activation]
    for make, twin, shape in (
        (rn.BatchNorm2d, nn.BatchNorm2d, (5, 6, 9, 7)),
        (lambda c, **o: rn.GroupNorm(3, c, **o), lambda c, **o: nn.GroupNorm(3, c, **o), (5, 6, 9, 7)),
        (lambda c, **o: rn.LayerNorm(c, **o), nn.LayerNorm, (3, 4, 5, 33)),
        (lambda c, **o: rn.Norm("n [c] ...", c=c, **o), None, (5, 34, 3, 7)),
    ):
        channels = shape[-1] if twin is nn.LayerNorm else shape[1]
        if twin is None and backend == "torch":
            continue
        ours = make(channels, activation=activation, backend=backend)
        exact = make(channels, dtype=torch.float64, backend="reference") if twin is None else twin(channels).double()
        with torch.no_grad():
            for p in ours.parameters():
                p.normal_()
        exact.load_state_dict(ours.state_dict())
        x, residual = (torch.randn(shape).contiguous(memory_format=layout).requires_grad_() for _ in range(2))
        y, total = ours.add(x, residual)
        wide = [t.detach().double().requires_grad_() for t in (x, residual)]
        expected_total = wide[0] + wide[1]
        expected = follow(exact(expected_total))
        close(y, expected, 3e-6)
        close(total, expected_total, 1e-6)
        up = [torch.randn(shape) for _ in range(2)]
        found = torch.autograd.grad((y, total), [x, residual, *ours.parameters()], up)
        wanted = torch.autograd.grad((expected, expected_total), [*wide, *exact.parameters()], [u.double() for u in up])
        for a, b in zip(found, wanted, strict=True):
            close(a, b, 1e-5 * max(1.0, b.abs().max().item()))
        for a, b in zip(ours.buffers(), exact.buffers(), strict=True):
            close(a, b, 1e-5)
        close(ours(x), follow(exact(x.double())), 3e-6)
        if OWN in (backend, "reference"):
            leaf = x.detach().double().requires_grad_()
            layer = copy.deepcopy(ours).double()
            (once,) = torch.autograd.grad(layer(leaf).pow(3).sum(), leaf, create_graph=True)
            (twice,) = torch.autograd.grad(once.square().sum(), leaf)
            other = leaf.detach().requires_grad_()
            (once,) = torch.autograd.grad(follow(exact(other)).pow(3).sum(), other, create_graph=True)
            (expected_twice,) = torch.autograd.grad(once.square().sum(), other)
            close(twice, expected_twice, 1e-6 * expected_twice.abs().max().item())


def test_a_sum_that_is_not_used_and_an_activation_that_does_not_exist():
    layer = rn.LayerNorm(6, backend=OWN)
    x, residual = (torch.randn(3, 6, requires_grad=True) for _ in range(2))
    y, total = layer.add(x, residual)
    for found, wanted in zip(
        torch.autograd.grad(y.square().sum(), [x, residual], retain_graph=True),
        torch.autograd.grad(F.layer_norm(x + residual, (6,)).square().sum(), [x, residual]),
        strict=True,
    ):
        close(found, wanted, 1e-5)
    (found,) = torch.autograd.grad(total.sum(), x)
    assert torch.equal(found, torch.ones(3, 6))
    assert "activation='silu'" in repr(rn.GroupNorm(2, 4, activation="silu"))
    with pytest.raises(UnknownNormError, match="one of relu, leaky_relu, gelu, silu; got 'swish'"):
        rn.LayerNorm(6, activation="swish")


def test_recoveries():
    linear = rn.Norm("... [c]", c=4, recover="linear")
    x = torch.randn(3, 4)
    assert torch.allclose(linear(x), rn.LayerNorm(4)(x), atol=1e-6)  # at first the identity
    assert [name for name, _ in linear.named_parameters()] == ["recover.weight", "recover.bias"]
    assert not list(rn.Norm("... [c]", c=4, recover="none").parameters())
    assert rn.Norm("n c [...]", recover="none")(torch.randn(2, 3, 5)).shape == (2, 3, 5)
    y, total = rn.Norm("... [c]", c=4, recover="linear", activation="relu").add(x, x)
    assert torch.equal(total, 2 * x)
    assert torch.allclose(y, rn.LayerNorm(4)(2 * x).relu(), atol=1e-6)
    with pytest.raises(UnknownNormError, match="recover is one of affine, none, linear, mlp, or a module; got 'mpl'"):
        rn.Norm("... [c]", c=4, recover="mpl")
    with pytest.raises(PatternError, match="pass its size, c="):
        rn.Norm("... [c]", recover="linear")


def test_batch_norm_on_channels_last_errs_no_more_than_torch_on_contiguous_input():
    torch.manual_seed(0)
    x = torch.randn(8, 64, 14, 14) + 1e4
    exact = nn.BatchNorm2d(64).double()(x.double())
    allowed = (nn.BatchNorm2d(64)(x) - exact).abs().max()
    y = rn.BatchNorm2d(64)(x.contiguous(memory_format=torch.channels_last))
    assert (y - exact).abs().max() <= allowed


def test_an_own_backend_compiles_in_evaluation():
    layer = rn.BatchNorm2d(8, backend="native").eval()
    x = torch.randn(4, 8, 16, 16)
    close(torch.compile(layer, fullgraph=True)(x), layer(x), 1e-5)


def test_a_layer_that_was_pickled_when_all_was_in_one_file():
    layer = rn.GroupNorm(2, 4)
    now, then = b"crenorm.norms.axes\nBound\n", b"crenorm.norms.norm\n_Bound\n"
    pickled = pickle.dumps(layer, protocol=2)
    assert now in pickled
    x = torch.randn(3, 4, 5)
    assert torch.equal(pickle.loads(pickled.replace(now, then))(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize(
    "layer",
    [
        *(rn.BatchNorm1d(3), rn.BatchNorm1d(3, activation="relu"), rn.LayerNorm(3), rn.RMSNorm(3), rn.GroupNorm(1, 3)),
        *(rn.BatchNorm1d(3).eval(), rn.IterNorm(3), rn.Norm("n [c]", c=3, recover="mlp")),
    ],
    ids=str,
)
def test_only_real_numbers_are_normalized(layer, dtype):
    """An integer result would be cut off, and of a complex one half be lost."""
    with pytest.raises(ShapeError, match=f"a norm takes floating-point numbers; got {dtype}: write "):
        layer(torch.ones(4, 3, dtype=dtype))


def test_query_key_norm_and_pixel_norm_as_the_card_writes_them():
    written = re.findall(r"`(rn\.Norm\(.*?\))`", " ".join(rn.explain("qknorm").watch))
    by_head, pixel = (eval(line, {"rn": rn, "H": 3, "D": 5}).double() for line in written)
    nn.init.normal_(by_head.weight)
    x = torch.randn(2, 7, 15, dtype=torch.float64) + 0.5
    heads = F.rms_norm(x.unflatten(2, (3, 5)), (5,), by_head.weight, by_head.eps)
    close(by_head(x), heads.flatten(2), 1e-13)
    for shape in ((2, 6, 5, 4), (3, 6)):
        small = 1e-4 * torch.randn(shape, dtype=torch.float64)  # squares as large as eps
        close(pixel(small), small / (small.square().mean(1, keepdim=True) + 1e-8).sqrt(), 1e-13)
