"""What is particular to whitening: its matrices, their derivatives where eigenvalues coincide, running covariances."""

import copy

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from cases.whiten import cholesky, newton_schulz, pca, whitened, zca
from checks import close, eps_of

import renorm as rn
from renorm.errors import ShapeError, UnknownNormError
from renorm.norms.whiten import BatchWhitening, IterNorm

METHODS = {"zca": zca, "pca": pca, "cholesky": cholesky}
# How each layer is made, and what stands for its matrix.
LAYERS = {
    **{name: (lambda *a, name=name, **o: BatchWhitening(*a, method=name, **o), f) for name, f in METHODS.items()},
    "iternorm": (IterNorm, newton_schulz(5)),
}


def mixed(*shape, seed=0, mean=3.0, dtype=torch.float64):
    """Correlated channels (dimension 1) of different variance and mean."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    mixing = torch.eye(shape[1]) + 0.5 * torch.randn(shape[1], shape[1], generator=generator, dtype=torch.float64)
    return (torch.einsum("nc...,dc->nd...", x, mixing) + mean).to(dtype).contiguous()


def covariance(x):
    """Of the channels (dimension 1), biased."""
    return torch.from_numpy(np.cov(x.detach().double().movedim(1, 0).flatten(1).numpy(), bias=True))


@pytest.mark.parametrize("name", LAYERS)
def test_the_covariance_of_each_group_is_the_identity(name):
    make, _ = LAYERS[name]
    layer = make(6, 1e-9, groups=2, affine=False, **({"iterations": 40} if name == "iternorm" else {})).double()
    found = covariance(layer(mixed(50, 6, 3)))
    for part in (slice(0, 3), slice(3, 6)):
        close(found[part, part], torch.eye(3), 1e-6)
    assert found[:3, 3:].abs().max() > 0.1  # between groups nothing is taken out


@pytest.mark.parametrize("name", METHODS)
def test_what_eps_leaves(name):
    x, eps = mixed(50, 4), 0.5
    found, cov = covariance(BatchWhitening(4, eps, method=name, affine=False).double()(x)), covariance(x)
    # W (cov + eps I) W^T = I, so that what is missing from the identity is eps W W^T.
    matrix = torch.from_numpy(METHODS[name]((cov + eps * torch.eye(4)).numpy()))
    close(found, torch.eye(4) - eps * matrix @ matrix.T, 1e-12)


def test_iterations_lead_to_zca():
    x = mixed(50, 5)
    expected = BatchWhitening(5).double()(x)
    errors = [(IterNorm(5, iterations=t).double()(x) - expected).abs().max().item() for t in (0, 3, 6, 9, 12, 15)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-12
    assert errors[1] > 1
    # As one sequence, as in the paper, the steps double rounding errors without end.
    close(IterNorm(5, iterations=200).double()(x), expected, 1e-12)


def test_no_iteration_divides_by_the_root_of_the_trace():
    x = mixed(50, 5)
    y = IterNorm(5, 0.0, iterations=0, affine=False).double()(x)
    close(y, (x - x.mean(0)) / covariance(x).trace().sqrt(), 1e-14)


@pytest.mark.parametrize("name", LAYERS)
def test_a_group_of_one_channel_is_batch_norm(name):
    ours = LAYERS[name][0](3, groups=3).double()
    theirs = rn.BatchNorm2d(3).double()
    for training in (True, True, False):
        ours.train(training)
        theirs.train(training)
        a, b = (mixed(5, 3, 4, 2).requires_grad_() for _ in range(2))
        y, z = ours(a), theirs(b)
        close(y, z, 1e-13)
        close(torch.autograd.grad(y.pow(3).sum(), a)[0], torch.autograd.grad(z.pow(3).sum(), b)[0], 1e-10)
    close(ours.running_mean, theirs.running_mean, 1e-14)
    close(ours.running_cov.flatten(), theirs.running_var, 1e-14)


@pytest.mark.parametrize("name", METHODS)
def test_eigenvalues_eight_orders_apart(name):
    x = mixed(60, 5, mean=1.0)
    values, vectors = np.linalg.eigh(covariance(x).numpy())
    # The same samples with variances 1 down to 1e-8, along directions that no channel follows.
    along = (x - x.mean(0)).numpy() @ vectors / np.sqrt(values)
    x = torch.from_numpy(along * np.logspace(-4, 0, 5) @ vectors.T) + 1.0
    # A covariance from products in float32 knows the small variances to 1e-7, a hundredth of this eps.
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 0.05)):
        eps = 0.0 if dtype == torch.float64 else 1e-5
        leaf = x.to(dtype).requires_grad_()
        y = BatchWhitening(5, eps, method=name, affine=False).to(dtype)(leaf)
        layer = BatchWhitening(5, affine=False)
        close(y, whitened(METHODS[name], eps=eps)(layer, leaf.detach().double(), None), tolerance)
        assert torch.autograd.grad(y.pow(3).sum(), leaf)[0].isfinite().all()


def isotropic(channels):
    """Samples whose covariance is a multiple of the identity, to the last bit."""
    return torch.cat([torch.eye(channels, dtype=torch.float64), -torch.eye(channels, dtype=torch.float64)])


@pytest.mark.parametrize("name", ["zca", "cholesky", "iternorm"])
def test_both_derivatives_where_all_eigenvalues_coincide(name):
    layer = LAYERS[name][0](3, affine=False, track_running_stats=False).double()
    x = isotropic(3).requires_grad_()
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("samples", [2, 3, 4])
def test_both_derivatives_with_fewer_samples_than_channels(name, samples):
    """A covariance of rank 1 to 3 in 6 channels: some eigenvalues vanish, together."""
    layer = LAYERS[name][0](6, 0.1, affine=False, track_running_stats=False).double()
    x = mixed(samples, 6).requires_grad_()
    close(layer(x), whitened(LAYERS[name][1], eps=0.1)(layer, x.detach(), None), 1e-12)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_are_finite_for_channels_that_are_alike(name, dtype):
    same = mixed(20, 1).expand(20, 4)
    for x in (same, torch.full((20, 4), 7.25), isotropic(4), torch.cat([same, mixed(20, 2)], 1)):
        leaf = x.to(dtype).requires_grad_()
        layer = LAYERS[name][0](x.shape[1]).to(dtype)
        y = layer(leaf)
        (dx,) = torch.autograd.grad(y.float().pow(3).sum(), leaf, create_graph=True)
        (ddx,) = torch.autograd.grad(dx.float().square().sum(), leaf)
        assert all(tensor.isfinite().all() for tensor in (y, dx, ddx))


def test_principal_components_in_their_order_and_with_their_sign():
    x = mixed(200, 5)
    layer = BatchWhitening(5, method="pca", affine=False, track_running_stats=False).double()
    y = layer(x)
    close(layer(x.flip(0)), y.flip(0), 1e-10)
    # Projections on the components: falling variances, and the largest entry of each component is positive.
    loadings = (x - x.mean(0)).T @ y / len(x)
    assert (loadings.norm(dim=0).diff() < 0).all()
    assert (loadings.gather(0, loadings.abs().argmax(0, keepdim=True)) > 0).all()


def test_the_sign_does_not_hang_on_rounding():
    """Two channels of the same variance: the components are (1, 1) and (1, -1), whose entries are equally large."""
    a, b = mixed(40, 2)[:, :1], mixed(40, 2, seed=1)[:, :1]
    signs = set()
    for scale in np.linspace(1, 2, 20):
        x = torch.cat([a + b, a - b], 1) * scale
        x = x - x.mean(0)
        x = x / x.square().mean(0).sqrt()
        y = BatchWhitening(2, method="pca", affine=False).double()(x)
        loadings = x.T @ y
        signs.add(tuple(loadings.sign().flatten().tolist()))
    assert signs == {(1.0, 1.0, -1.0, 1.0)}


# ---- bugs of peers: the code of IterNorm's and DBN's authors


@pytest.mark.parametrize("name", LAYERS)
def test_groups_from_the_first_step_each_with_its_own_matrix(name):
    """IterNorm's code fails for more than one group, DBN's whitens all by one matrix."""
    x = mixed(30, 6, 2)
    whole = LAYERS[name][0](6, groups=2).double()
    y = whole(x)
    for group, part in enumerate((slice(0, 3), slice(3, 6))):
        alone = LAYERS[name][0](3).double()
        close(y[:, part], alone(x[:, part]), 1e-13)
        close(whole.running_cov[group], alone.running_cov[0], 1e-14)
    assert (whole.running_cov[0] - whole.running_cov[1]).abs().max() > 0.01


@pytest.mark.parametrize("name", LAYERS)
def test_two_backward_passes_and_one_in_evaluation(name):
    """IterNorm's code fails in all three; running statistics of DBN's keep the graph of every batch."""
    layer = LAYERS[name][0](6, groups=2).double()
    for training in (True, True, False):
        x = mixed(30, 6).requires_grad_()
        y = layer.train(training)(x)
        first = torch.autograd.grad(y.pow(2).sum(), [x, *layer.parameters()], retain_graph=True)
        again = torch.autograd.grad(y.pow(2).sum(), [x, *layer.parameters()])
        assert all(torch.equal(p, q) for p, q in zip(first, again, strict=True))
        assert all(buffer.grad_fn is None and not buffer.requires_grad for buffer in layer.buffers())
    assert torch.autograd.gradcheck(layer, mixed(3, 6).requires_grad_())


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_evaluation_is_by_the_running_covariance(name, momentum):
    """IterNorm's and DBN's code average whitening matrices: the mean of 1 / s is not 1 / the mean of s."""
    make, matrix = LAYERS[name]
    layer = make(4, momentum=momentum).double()
    mean, cov = torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    for step in range(12):
        x = mixed(30, 4, 2, seed=step, mean=float(step)) * (1 + step % 3)
        layer(x)
        m = momentum or 1 / (step + 1)
        mean = (1 - m) * mean + m * x.mean((0, 2))
        cov = (1 - m) * cov + m * covariance(x) * 60 / 59
    close(layer.running_mean, mean, 1e-12)
    close(layer.running_cov[0], cov, 1e-11)
    w = torch.from_numpy(matrix((cov + 1e-5 * torch.eye(4)).numpy()))
    x = mixed(7, 4, 2, seed=20)
    expected = torch.einsum("dc,ncl->ndl", w, x - mean[:, None])
    close(layer.eval()(x), expected, 1e-9)
    layer.running_cov.mul_(4)  # nothing is kept that is out of date
    layer.running_mean.zero_()
    w = torch.from_numpy(matrix((4 * cov + 1e-5 * torch.eye(4)).numpy()))
    close(layer(x), torch.einsum("dc,ncl->ndl", w, x), 1e-9)


def test_evaluation_after_many_batches_whitens_the_population():
    layer = BatchWhitening(4, momentum=None, affine=False)
    for step in range(60):
        layer(mixed(1920, 4, dtype=torch.float32)[32 * step : 32 * step + 32])
    close(covariance(layer.eval()(mixed(1920, 4, dtype=torch.float32))), torch.eye(4), 0.05)


def test_frozen():
    layer = BatchWhitening(4)
    layer(mixed(30, 4, dtype=torch.float32))
    before = copy.deepcopy(layer.state_dict())
    x = mixed(30, 4, seed=1, dtype=torch.float32)
    expected = copy.deepcopy(layer).eval()(x)
    rn.freeze(layer).train()
    assert torch.equal(layer(x), expected)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    rn.unfreeze(layer)
    assert not torch.equal(layer(x), expected)
    assert layer.num_batches_tracked == 2


# ---- layouts, masks, precision


@pytest.mark.parametrize("shape", [(9, 6, 2, 2), (9, 6, 1, 1), (3, 6, 5, 4), (2, 6, 3, 2, 5), (1, 6, 30), (40, 6)])
@pytest.mark.parametrize("groups", [1, 2])
def test_every_way_to_the_products(shape, groups):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 3
    layer = BatchWhitening(6, groups=groups, affine=False)
    expected = whitened(zca, groups)(layer, x, None)
    y = layer(x)
    close(y, expected, 64 * eps_of(torch.float32))
    assert y.is_contiguous()
    last = BatchWhitening(6, groups=groups, affine=False, axis=-1)
    z = last(x.movedim(1, -1))
    close(z.movedim(-1, 1), expected, 64 * eps_of(torch.float32))
    assert last(x.movedim(1, -1).contiguous()).is_contiguous()


def test_groups_may_have_masks_of_their_own():
    x = mixed(20, 6, 3)
    mask = torch.rand(20, 2, 1, 3, generator=torch.Generator().manual_seed(0)) > 0.4
    mask = mask.expand(20, 2, 3, 3).reshape(20, 6, 3)
    y = BatchWhitening(6, groups=2, affine=False).double()(torch.where(mask, x, torch.nan), mask)
    for part in (slice(0, 3), slice(3, 6)):
        expected = whitened(zca)(BatchWhitening(3, affine=False), x[:, part], mask[:, part])
        close(y[:, part], expected, 1e-12)


def test_one_group_without_a_real_entry():
    layer = BatchWhitening(6, groups=2).double()
    before = copy.deepcopy(layer.state_dict())
    x = mixed(20, 6).requires_grad_()
    mask = torch.tensor([True] * 3 + [False] * 3)
    y = layer(x, mask)
    close(y[:, :3], BatchWhitening(3).double()(x[:, :3]), 1e-13)
    (dx,) = torch.autograd.grad(y.pow(3).sum(), x)
    assert dx.isfinite().all()
    assert (y[:, 3:] == 0).all()
    assert (dx[:, 3:] == 0).all()
    assert torch.equal(layer.running_cov[1], before["running_cov"][1])
    assert torch.equal(layer.running_mean[3:], before["running_mean"][3:])
    assert not torch.equal(layer.running_cov[0], before["running_cov"][0])


def test_a_mask_that_varies_over_the_channels():
    layer, x = BatchWhitening(4), mixed(20, 4, 3, dtype=torch.float32)
    mask = torch.ones(20, 4, 3, dtype=torch.bool)
    mask[0, 1, 2] = False
    with pytest.raises(ShapeError, match=r"same for all channels of a group.*such as mask\[:, None\]"):
        layer(x, mask)
    with pytest.raises(ShapeError, match=r"such as mask\[\.\.\., None\]"):
        BatchWhitening(3, axis=-1)(x, mask)
    with pytest.raises(ShapeError, match="boolean"):
        layer(x, mask.float())
    # In a graph its values cannot be looked at: a position counts if all of its channels do.
    torch._dynamo.reset()
    y = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="eager")(x, mask)
    close(y, layer(x, mask.all(1, keepdim=True)), 1e-5)
    stacked = torch.vmap(BatchWhitening(4, track_running_stats=False))(x[None], mask[None])
    close(stacked[0], y, 1e-5)


def test_a_nan_stays_in_its_group():
    for bad in (torch.nan, torch.inf):
        x = mixed(20, 6).requires_grad_()
        with torch.no_grad():
            x[3, 4] = bad
        layer = BatchWhitening(6, groups=2).double()
        y = layer(x)
        assert y[:, :3].isfinite().all()
        assert y[:, 3:].isnan().all()
        assert torch.autograd.grad(y[:, :3].sum(), x)[0][:, :3].isfinite().all()
        assert layer.num_batches_tracked == 0
        assert torch.equal(layer.running_cov, torch.eye(3).double().expand(2, 3, 3))


def test_autocast_leaves_float32_alone():
    x = mixed(50, 4, 3, dtype=torch.float32)
    layer = BatchWhitening(4)
    expected = copy.deepcopy(layer)(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("name", LAYERS)
def test_few_samples_of_large_values(name, scale):
    """Eigenvalues that should be 0 are not after a product in float32, and some are negative: all beyond eps."""
    layer = LAYERS[name][0](32, momentum=1.0)
    x = mixed(10, 32, dtype=torch.float32, mean=10.0).mul(scale).requires_grad_()
    y = layer(x)
    (dx,) = torch.autograd.grad(y.pow(3).sum(), x)
    assert (dx * scale).abs().max() < 100
    found = torch.linalg.eigvalsh(covariance(y))
    # 10 samples span 9 directions, whitened by IterNorm's five steps in part; nothing is in the others.
    assert found[:-9].abs().max() < 1e-3
    assert found.max() < 1.001
    assert found[-9] > (0.3 if name == "iternorm" else 0.999)
    for dtype in (torch.float32, torch.bfloat16):
        z = layer.to(dtype).eval()(x.detach().to(dtype))
        assert z.abs().max() <= 1.1 * y.abs().max()


@pytest.mark.parametrize("axis", [1, -1])
def test_a_long_product_loses_no_digits(axis):
    x = torch.randn(2, 3, 60000, generator=torch.Generator().manual_seed(0)) + 1e4
    x = x.movedim(1, axis)
    layer = BatchWhitening(3, affine=False, momentum=1.0, axis=axis).train()
    layer.running_cov = layer.running_cov.double()
    layer(x)
    expected = covariance(x.movedim(axis, 1)) * 120000 / 119999
    # As much as any value may be off; at mean 1e4 an entry is a multiple of 1e-3, and rounding goes one way.
    close(layer.running_cov[0], expected, 32 * eps_of(torch.float32))


# ---- arguments


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: BatchWhitening(6, axis=2), ShapeError, "on axis 1 or -1; got axis=2"),
        (lambda: BatchWhitening(6, groups=4), ShapeError, "must divide the channels, 6; got groups=4"),
        (lambda: IterNorm(6, groups=0), ShapeError, "got groups=0"),
        (lambda: BatchWhitening(6, method="svd"), UnknownNormError, "one of zca, pca, cholesky; got 'svd'"),
        (lambda: IterNorm(6, iterations=-1), ShapeError, "0 or more; got -1"),
        (lambda: BatchWhitening(6)(torch.ones(4, 5)), ShapeError, "5"),
        (lambda: BatchWhitening(6)(torch.ones(6)), ShapeError, "dimension"),
        (lambda: BatchWhitening(6)(torch.ones(1, 6)), ShapeError, "more than 1 value per channel"),
    ],
)
def test_what_a_whitening_cannot_be(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_one_position_in_evaluation_and_without_running_statistics():
    assert BatchWhitening(6).eval()(torch.ones(1, 6)).isfinite().all()
    assert (BatchWhitening(6, track_running_stats=False)(torch.ones(1, 6)) == 0).all()


def test_what_it_says_of_itself():
    layer = IterNorm(6, groups=2, axis=-1)
    words = "iterations=5, pattern='[n ...] (g c)', g=2, c=3, eps=1e-05, running='g c'"
    assert repr(layer) == f"IterNorm({words})"
    assert repr(BatchWhitening(6, method="pca")).startswith("BatchWhitening(method='pca', pattern='[n] (g c) [...]'")
    assert layer.kernel(torch.ones(2, 6)) == "torch.bmm"
    assert layer.values_per_set((5, 4, 6)) == 20
    shapes = {key: tuple(value.shape) for key, value in layer.state_dict().items()}
    assert shapes == {
        "weight": (6,),
        "bias": (6,),
        "running_mean": (6,),
        "num_batches_tracked": (),
        "running_cov": (2, 3, 3),
    }


def test_whitening_and_coloring():
    """arXiv:1806.00420: a linear layer behind the whitening, which may undo it."""
    layer = BatchWhitening(4, recover="linear").double()
    x = mixed(30, 4, 2)
    with torch.no_grad():
        layer.recover.weight.copy_(torch.from_numpy(np.linalg.inv(zca(covariance(x).numpy()))))
        layer.recover.bias.copy_(x.mean((0, 2)))
    close(layer(x), x, 1e-3)
    assert layer.weight is None
    assert isinstance(BatchWhitening(4, affine=False, recover="linear").recover, torch.nn.Linear)


def test_a_solve_of_ones_own():
    class Shrunk(BatchWhitening):
        """Whitens by half of the covariance and half of its diagonal."""

        def solve(self, cov):
            return super().solve((cov + torch.diag_embed(cov.diagonal(dim1=-2, dim2=-1))) / 2)

    layer = Shrunk(4, affine=False).double()
    x = mixed(30, 4).requires_grad_()
    cov = covariance(x)
    w = torch.from_numpy(zca(((cov + cov.diag().diag()) / 2 + 1e-5 * torch.eye(4)).numpy()))
    close(layer(x), (x - x.mean(0)) @ w.T, 1e-12)
    assert torch.autograd.gradgradcheck(lambda x: copy.deepcopy(layer)(x), x)


# ---- several processes

PARTS = {"unequal": (0, 9, 20), "empty": (0, 20, 20)}


def step(name, rows, **options):
    """One step on these rows, and an evaluation: everything that must not depend on who has them."""
    layer = LAYERS[name][0](6, groups=2, **options).double()
    found = {}
    mask = torch.rand(20, 1, 3, generator=torch.Generator().manual_seed(5)) > 0.3
    for masked in (False, True):
        x, dy = mixed(20, 6, 3)[rows].requires_grad_(), mixed(20, 6, 3, seed=1)[rows]
        y = layer(x, mask[rows] if masked else None)
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
        (ddx,) = torch.autograd.grad((dx * dy).sum(), x)
        found[masked] = [tensor.detach() for tensor in (y, dx, ddx)]
    return found, layer.state_dict()


def processes(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    world = torch.distributed.group.WORLD
    found = {
        (name, kind): step(name, slice(ends[rank], ends[rank + 1]), process_group=world)
        for name in LAYERS
        for kind, ends in PARTS.items()
    }
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one_with_the_whole_batch(tmp_path):
    multiprocessing.spawn(processes, (str(tmp_path),), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    for name in LAYERS:
        whole, state = step(name, slice(None))
        for kind in PARTS:
            for masked, tensors in whole.items():
                for i, expected in enumerate(tensors):
                    joined = torch.cat([part[name, kind][0][masked][i] for part in parts])
                    close(joined, expected, 1e-9 * max(1.0, expected.abs().max().item()))
            for part in parts:
                for key, value in state.items():
                    close(part[name, kind][1][key], value, 1e-12)
