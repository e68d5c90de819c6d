"""Ghost batch norm, batch renorm and power norm: schedules, states, and the papers' algorithms step by step."""

import copy
import os

import numpy as np
import pytest
import torch
from checks import close
from torch import nn
from torch.utils.checkpoint import checkpoint

import renorm as rn
from renorm.errors import ShapeError
from renorm.norms.batch import BatchRenorm, GhostBatchNorm, PowerNorm, Ramp


def batches(*shape, steps=3, mean=1.5, dtype=torch.float64):
    """(x, dy, mask) of each step."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x, dy = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
        yield x * 2 + mean, dy, torch.rand(shape, generator=generator) > 0.3


def randomized(layer):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


class TestGhostBatchNorm:
    def test_one_call_equals_a_loop_over_ghosts(self):
        """The loop is what pytorch-tabnet does; gradients too, also where the batch does not divide."""
        for count in (6, 7, 8, 2):
            ours = randomized(GhostBatchNorm(5, 3).double())
            theirs = nn.BatchNorm2d(5).double()
            theirs.load_state_dict(ours.state_dict())
            for x, dy, _ in batches(count, 5, 4, 3):
                a, b = (x.clone().requires_grad_() for _ in range(2))
                y, z = ours(a), torch.cat([theirs(part) for part in b.split(3)])
                close(y, z, 1e-13)
                for p, q in zip(
                    torch.autograd.grad(y, [a, *ours.parameters()], dy),
                    torch.autograd.grad(z, [b, *theirs.parameters()], dy),
                    strict=True,
                ):
                    close(p, q, 1e-12)

    @pytest.mark.parametrize("momentum", [0.1, None])
    def test_running_statistics_are_those_of_the_whole_batch(self, momentum):
        ours, theirs = GhostBatchNorm(5, 3, momentum=momentum).double(), nn.BatchNorm1d(5, momentum=momentum).double()
        for x, _, _ in batches(8, 5, 4):
            ours(x)
            theirs(x)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        for name, value in theirs.state_dict().items():
            close(ours.state_dict()[name], value, 1e-13)

    def test_running_statistics_count_real_entries_only(self):
        ours, whole = GhostBatchNorm(5, 3).double(), rn.BatchNorm1d(5).double()
        for x, _, mask in batches(8, 5, 4):
            ours(x, mask)
            whole(x, mask)
        close(ours.running_mean, whole.running_mean, 1e-13)
        close(ours.running_var, whole.running_var, 1e-13)

    def test_the_papers_update_forgets_as_much_with_a_larger_momentum(self):
        """Algorithm 1 of arXiv:1705.08741 moves the statistics once for each ghost."""
        ghosts, momentum = 4, 0.1
        ghost = torch.tensor([[1.0], [3.0]], dtype=torch.float64)  # all alike: the order cannot matter
        ours = GhostBatchNorm(1, 2, momentum=1 - (1 - momentum) ** ghosts).double()
        ours(ghost.repeat(ghosts, 1))
        running = 0.0
        for _ in range(ghosts):
            running = (1 - momentum) * running + momentum * 2.0
        close(ours.running_mean, torch.tensor([running]), 1e-7)

    @pytest.mark.parametrize("how", ["eval", "frozen"])
    def test_evaluation_takes_any_batch(self, how):
        layer = randomized(GhostBatchNorm(5, 4))
        for x, _, _ in batches(8, 5, 3, 3, dtype=torch.float32):
            layer(x)
        plain = nn.BatchNorm2d(5).eval()
        plain.load_state_dict(layer.state_dict())
        if how == "eval":
            layer.eval()
        else:
            layer.frozen = True
        for count in (0, 1, 3, 4, 7):
            x = torch.randn(count, 5, 3, 3)
            close(layer(x), plain(x), 1e-6)
        with pytest.raises(ShapeError, match="dimension 1 must have 5"):
            layer(torch.randn(4, 6, 3, 3))
        high = torch.randn(3, 5, 1, 2, 1, 2, 1, 2)
        close(layer(high), plain(high.flatten(3)).view_as(high), 1e-6)

    def test_without_running_statistics_evaluation_has_ghosts_too(self):
        layer = GhostBatchNorm(5, 3, track_running_stats=False)
        x = torch.randn(7, 5)[:6]
        close(layer.eval()(x), layer.train()(x), 0)

    def test_a_last_ghost_of_one_value(self):
        x = torch.randn(5, 3)
        with pytest.raises(ShapeError, match=r"got input size \(5, 3\): the last ghost of 4 samples has one"):
            GhostBatchNorm(3, 4)(x)
        assert GhostBatchNorm(3, 4)(torch.randn(5, 3, 2)).shape == (5, 3, 2)
        allowing = GhostBatchNorm(3, 4, one_value="allow")
        with torch.no_grad():
            allowing.bias.fill_(0.5)
        assert (allowing(x)[4] == 0.5).all()
        by_running = GhostBatchNorm(3, 4, one_value="running")
        mask = torch.tensor([[True], [True], [True], [True], [False]])
        y = by_running(x)
        close(y[:4], GhostBatchNorm(3, 4)(x[:4]), 1e-6)
        close(y[4], x[4], 1e-4)  # mean 0 and variance 1 so far
        assert by_running.num_batches_tracked == 1
        assert (by_running(x, mask)[4] == 0).all()
        close(by_running(x[:1]), by_running.eval()(x[:1]), 0)

    def test_every_ghost_of_one_value(self):
        with pytest.raises(ShapeError, match="more than 1 value per channel"):
            GhostBatchNorm(3, 1)(torch.randn(5, 3))

    @pytest.mark.parametrize("size", [0, -1, 2.0, True])
    def test_sizes_that_are_none(self, size):
        with pytest.raises(ShapeError, match="has 1 sample or more; got size="):
            GhostBatchNorm(3, size)

    def test_other_axes(self):
        with pytest.raises(ShapeError, match="ghost batch norm are on axis 1 or -1; got axis=2"):
            GhostBatchNorm(3, 2, axis=2)
        with pytest.raises(ShapeError, match="at least 2D"):
            GhostBatchNorm(3, 2)(torch.randn(3))

    @pytest.mark.parametrize("count", [6, 7])
    def test_neighbours(self, count):
        """An activation behind it and a residual before it, whether the batch divides or not."""
        layer, active = GhostBatchNorm(3, 3), GhostBatchNorm(3, 3, activation="relu")
        x, residual = torch.randn(2, count, 3, 4)
        y, total = active.add(x, residual)
        assert torch.equal(total, x + residual)
        close(y, layer(total).relu(), 1e-6)
        close(active(x), layer(x).relu(), 1e-6)

    def test_what_it_says_of_itself(self):
        layer = GhostBatchNorm(3, 4)
        assert isinstance(layer, nn.modules.batchnorm._BatchNorm)  # as update_bn and weight decay groups ask
        assert repr(layer).endswith("size=4)")
        for count, ghosts, smallest in ((8, 2, 4), (6, 2, 2), (3, 1, 3)):
            x = torch.randn(count, 3, 5)
            assert layer.measure(x).mean.shape == (ghosts, 1, 3, 1)
            assert layer.values_per_set(x.shape) == smallest * 5
            assert layer.kernel(x) == layer.kernel(x[:, :, :]) != ""
            assert layer.plan(x) is not None

    def test_memory_format_survives_the_copy(self):
        x = torch.randn(5, 3, 4, 4).contiguous(memory_format=torch.channels_last)
        assert GhostBatchNorm(3, 2)(x).is_contiguous(memory_format=torch.channels_last)

    def test_compiled_batches_that_do_not_divide(self):
        torch._dynamo.reset()
        layer = randomized(GhostBatchNorm(3, 4))
        compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, dynamic=True, backend="eager")
        for count in (10, 11):
            x = torch.randn(count, 3, 5)
            close(compiled(x), layer(x), 1e-5)
        for name, value in layer.state_dict().items():
            close(compiled._orig_mod.state_dict()[name], value, 1e-5)


class TestRamp:
    def test_paper(self):
        """Section 4 of arXiv:1702.03275: batch norm for 5k steps, r_max 3 at 40k, d_max 5 at 25k."""
        layer = BatchRenorm(1)
        at = torch.tensor([0, 4_999, 5_000, 15_000, 22_500, 25_000, 40_000, 1_000_000])
        rmax, dmax = layer.limits(at)
        close(rmax, torch.tensor([1, 1, 1, 11 / 7, 2, 15 / 7, 3, 3]), 1e-6)
        close(dmax, torch.tensor([0, 0, 0, 2.5, 4.375, 5, 5, 5]), 1e-6)

    def test_a_jump(self):
        assert Ramp(0.0, 2.0, 3, 4)(torch.tensor([3, 4])).tolist() == [0.0, 2.0]


def renorm_by_the_paper(x, state, weight, bias, mask, rmax, dmax, *, eps=1e-5, rate=0.01):
    """Algorithm 1 of arXiv:1702.03275 on (N, C), channel by channel; `state` holds mu and sigma, and is moved."""
    columns = []
    for c in range(x.shape[1]):
        real = x[mask[:, c], c]
        mean = real.sum() / len(real)
        deviation = (eps + ((real - mean) ** 2).sum() / len(real)).sqrt()
        mu, sigma = state["mu"][c], state["sigma"][c]
        r = min(max((deviation / sigma).item(), 1 / rmax), rmax)
        d = min(max(((mean - mu) / sigma).item(), -dmax), dmax)
        column = ((x[:, c] - mean) / deviation * r + d) * weight[c] + bias[c]
        columns.append(torch.where(mask[:, c], column, 0))
        state["mu"][c] = mu + rate * (mean.item() - mu)
        state["sigma"][c] = sigma + rate * (deviation.item() - sigma)
    return torch.stack(columns, 1)


class TestBatchRenorm:
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("backend", ["auto", "reference"])
    def test_paper_step_by_step(self, masked, backend):
        """Values, gradients and state of Algorithm 1, with limits that some channels reach and others do not."""
        layer = randomized(BatchRenorm(4, momentum=0.2, rmax=Ramp(1.0, 2.0, 0, 4), dmax=1.5, backend=backend).double())
        state = {"mu": [0.0] * 4, "sigma": [(1 + 1e-5) ** 0.5] * 4}
        for step, (x, dy, mask) in enumerate(batches(9, 4, steps=6)):
            mask = mask if masked else torch.ones_like(mask)
            rmax = 1.0 + min(step, 4) / 4
            a, b = (x.clone().requires_grad_() for _ in range(2))
            y = layer(a, mask if masked else None)
            z = renorm_by_the_paper(b, state, layer.weight, layer.bias, mask, rmax, 1.5, rate=0.2)
            close(y, z, 1e-13)
            for p, q in zip(
                torch.autograd.grad(y, [a, *layer.parameters()], dy),
                torch.autograd.grad(z, [b, *layer.parameters()], dy),
                strict=True,
            ):
                close(p, q, 1e-12)
            close(layer.running_mean, torch.tensor(state["mu"], dtype=torch.float64), 1e-13)
            close((layer.running_var + 1e-5).sqrt(), torch.tensor(state["sigma"], dtype=torch.float64), 1e-13)

    def test_without_limits_training_is_evaluation(self):
        layer = randomized(BatchRenorm(4, rmax=1e9, dmax=1e9).double())
        for x, _, _ in batches(9, 4, 3):
            close(copy.deepcopy(layer)(x), copy.deepcopy(layer).eval()(x), 1e-12)
            layer(x)

    def test_at_first_it_is_batch_norm(self):
        layer, plain = BatchRenorm(4, momentum=0.1), nn.BatchNorm1d(4)
        x = torch.randn(9, 4, 3) * 5 + 3
        close(layer(x), plain(x), 1e-5)

    def test_state_is_batch_norms(self):
        layer, plain = BatchRenorm(4), nn.BatchNorm2d(4)
        plain(torch.randn(5, 4, 3, 3) * 3)
        layer.load_state_dict(plain.state_dict())
        plain.load_state_dict(layer.state_dict())
        x = torch.randn(5, 4, 3, 3)
        close(layer.eval()(x), plain.eval()(x), 1e-6)
        assert isinstance(layer, nn.modules.batchnorm._BatchNorm)

    def test_keras(self):
        """Keras' renorm, whose two momenta are what is kept, with running deviations that start at 1."""
        os.environ.setdefault("KERAS_BACKEND", "torch")
        keras = pytest.importorskip("keras")
        theirs = keras.layers.BatchNormalization(
            momentum=0.9,
            epsilon=1e-3,
            renorm=True,
            renorm_momentum=0.9,
            renorm_clipping={"rmax": 1.5, "rmin": 1 / 1.5, "dmax": 0.7},
        )
        ours = BatchRenorm(4, axis=-1, eps=1e-3, momentum=0.1, rmax=1.5, dmax=0.7)
        ours.running_var -= 1e-3
        generator = np.random.default_rng(0)
        for _ in range(5):
            x = (generator.normal(size=(6, 3, 4)) * np.array([0.3, 1, 2, 9]) + [1, 0.1, 0, 5]).astype("float32")
            y, z = ours(torch.from_numpy(x)), theirs(x, training=True)
            np.testing.assert_allclose(y.detach().numpy(), z.detach().numpy(), atol=5e-6)
        np.testing.assert_allclose(ours.running_mean, theirs.moving_mean.value.numpy(), atol=1e-5)
        np.testing.assert_allclose(ours.running_var, theirs.moving_variance.value.numpy(), rtol=1e-5)

    def test_one_graph_follows_the_schedule(self):
        torch._dynamo.reset()
        layer = BatchRenorm(4, rmax=Ramp(1.0, 3.0, 2, 4), dmax=lambda batches: batches / 2)
        graphs = []

        def backend(graph, _):
            graphs.append(graph)
            return graph.forward

        compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend=backend)
        for x, _, _ in batches(9, 4, steps=6, mean=9, dtype=torch.float32):
            close(compiled(x), layer(x), 1e-5)
        assert len(graphs) == 1

    def test_an_overflow_leaves_the_state_alone(self):
        layer = BatchRenorm(4)
        layer(torch.randn(9, 4))
        before = copy.deepcopy(layer.state_dict())
        layer(torch.full((9, 4), torch.inf))
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())

    def test_one_value(self):
        with pytest.raises(ShapeError, match="more than 1 value per channel"):
            BatchRenorm(4)(torch.randn(1, 4))
        layer = BatchRenorm(4, one_value="running")
        close(layer(torch.ones(1, 4)), torch.ones(1, 4), 1e-5)

    def test_says_its_limits(self):
        assert "rmax=2.0, dmax=Ramp(start=0.0" in repr(BatchRenorm(4, rmax=2.0))


def power_by_the_paper(x, dy, state, weight, bias, mask, *, warm, eps=1e-5, alpha=0.9):
    """Algorithm 2 of arXiv:2003.07845 on (N, C), channel by channel: (y, dx, dweight, dbias); moves `state`."""
    y, dx = torch.zeros_like(x), torch.zeros_like(x)
    dweight, dbias = torch.zeros_like(weight), torch.zeros_like(bias)
    for c in range(x.shape[1]):
        rows = [i for i in range(len(x)) if mask[i, c]]
        square = sum(x[i, c].item() ** 2 for i in rows) / len(rows)
        psi = ((square if warm else state["psi2"][c]) + eps) ** 0.5
        hats = {i: x[i, c].item() / psi for i in rows}
        dhats = {i: dy[i, c].item() * weight[c].item() for i in rows}
        gamma = sum(hats[i] ** 2 for i in rows) / len(rows)
        cross = sum(dhats[i] * hats[i] for i in rows) / len(rows)
        for i in rows:
            y[i, c] = hats[i] * weight[c] + bias[c]
            # PN-V, the warm-up, is differentiated exactly: the batch's own mean stands in nu's place.
            dx[i, c] = (dhats[i] - (cross if warm else state["nu"][c]) * hats[i]) / psi
            dweight[c] += dy[i, c] * hats[i]
            dbias[c] += dy[i, c]
        state["psi2"][c] = alpha * state["psi2"][c] + (1 - alpha) * square
        state["nu"][c] = state["nu"][c] * (1 - (1 - alpha) * gamma) + (1 - alpha) * cross
    return y, dx, dweight, dbias


class TestPowerNorm:
    @pytest.mark.parametrize("warmup", [0, 2])
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("backend", ["auto", "reference"])
    def test_paper_step_by_step(self, masked, warmup, backend):
        """Forward, backward, psi and nu over several steps: the peer's code mixes running and batch statistics,
        moves psi twice while it warms up, and averages over padding.
        """
        layer = randomized(PowerNorm(4, momentum=0.1, warmup=warmup, backend=backend).double())
        state = {"psi2": [1.0] * 4, "nu": [0.0] * 4}
        for step, (x, dy, mask) in enumerate(batches(9, 4, steps=6)):
            mask = mask if masked else torch.ones_like(mask)
            dirty = torch.where(mask, x, torch.nan).requires_grad_()
            y = layer(dirty, mask if masked else None)
            gradients = torch.autograd.grad(y, [dirty, layer.weight, layer.bias], dy)
            expected = power_by_the_paper(
                x, dy, state, layer.weight.detach(), layer.bias.detach(), mask, warm=step < warmup
            )
            for p, q in zip((y, *gradients), expected, strict=True):
                close(p, q, 1e-12)
            close(layer.running_var, torch.tensor(state["psi2"], dtype=torch.float64), 1e-13)
            close(layer.nu, torch.tensor(state["nu"], dtype=torch.float64), 1e-13)
        assert layer.num_batches_tracked == 6
        assert (layer.running_mean == 0).all()

    def test_images_are_their_positions(self):
        """(N, C, H, W), channels second or last, is (N * H * W, C)."""
        second, last, flat = PowerNorm(4).double(), PowerNorm(4, axis=-1).double(), PowerNorm(4).double()
        for x, dy, _ in batches(3, 5, 2, 4):
            views = {second: lambda t: t.movedim(-1, 1), last: lambda t: t, flat: lambda t: t.reshape(-1, 4)}
            found = []
            for layer, view in views.items():
                leaf = x.clone().requires_grad_()
                found.append(torch.autograd.grad((layer(view(leaf)) * view(dy)).sum(), leaf)[0])
            close(found[0], found[2], 1e-13)
            close(found[1], found[2], 1e-13)
        close(second.nu, flat.nu, 1e-13)

    def test_affine_false_has_no_parameters(self):
        assert not list(PowerNorm(4, affine=False).parameters())

    def test_evaluation_divides_by_psi(self):
        layer = randomized(PowerNorm(4).double())
        for x, _, _ in batches(9, 4):
            layer(x)
        expected = x / (layer.running_var + 1e-5).sqrt() * layer.weight + layer.bias
        close(layer.eval()(x[:1]), expected[:1], 1e-13)
        layer.train().frozen = True
        close(layer(x), expected, 1e-13)

    def test_backward_passes_of_one_forward_count_once(self):
        """retain_graph, and a gradient penalty, which is also the derivative of the approximate gradient."""
        x, dy, _ = next(batches(9, 4))
        once, often = PowerNorm(4).double(), PowerNorm(4).double()
        for layer in (once, often):
            layer.nu += 0.3
        a, b = (x.clone().requires_grad_() for _ in range(2))
        once(a).backward(dy)
        y = often(b)
        (first,) = torch.autograd.grad(y, b, dy, create_graph=True)
        (penalty,) = torch.autograd.grad((first * dy).sum(), b, retain_graph=True)
        # first = dy / psi - 0.3 * x / psi ** 2, with psi ** 2 = 1 + eps
        close(penalty, -0.3 * dy / (1 + 1e-5), 1e-13)
        y.backward(dy)
        close(b.grad, a.grad, 0)
        close(often.nu, once.nu, 1e-14)

    def test_two_forwards_before_their_backward_passes(self):
        layer = PowerNorm(4).double()
        (x, dy, _), (other, _, _) = batches(9, 4, steps=2)
        x.requires_grad_()
        other.requires_grad_()
        both = layer(x), layer(other)
        (both[0] * dy).sum().backward()
        (both[1] * dy).sum().backward()
        assert layer.num_batches_tracked == 2
        assert layer.nu.isfinite().all()

    def test_an_overflowing_gradient_leaves_nu_alone(self):
        layer = PowerNorm(4)
        layer(torch.randn(9, 4, requires_grad=True)).sum().backward()
        before = layer.nu.clone()
        assert (before != 0).all()
        layer(torch.randn(9, 4, requires_grad=True)).backward(torch.full((9, 4), torch.inf))
        assert torch.equal(layer.nu, before)

    def test_compiled_steps(self):
        torch._dynamo.reset()
        layer = randomized(PowerNorm(4, warmup=2))
        compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
        for x, dy, _ in batches(9, 4, steps=4, dtype=torch.float32):
            a, b = (x.clone().requires_grad_() for _ in range(2))
            layer(a).backward(dy)
            compiled(b).backward(dy)
            close(b.grad, a.grad, 1e-5)
        for name, value in layer.state_dict().items():
            close(compiled._orig_mod.state_dict()[name], value, 1e-5)

    def test_other_axes(self):
        with pytest.raises(ShapeError, match="power norm are on axis 1 or -1; got axis=0"):
            PowerNorm(4, axis=0)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("make", [lambda: BatchRenorm(4, rmax=2.0, dmax=3.0, momentum=0.5), lambda: PowerNorm(4)])
def test_a_checkpointed_batch_meets_the_statistics_of_its_first_time(make, reentrant):
    """The second forward comes when the running statistics have moved: it must not see that, nor count."""
    plain, again = (randomized(make()) for _ in range(2))
    for x, dy, _ in batches(9, 4, 3, dtype=torch.float32):
        a, b = (x.clone().requires_grad_() for _ in range(2))
        plain(a).backward(dy)
        checkpoint(again, b, use_reentrant=reentrant).backward(dy)
        assert torch.equal(a.grad, b.grad)
    for name, value in plain.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    assert copy.deepcopy(again)._before is None
