"""Running statistics measured again, against the moments of all values together in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing import spawn

import renorm as rn
from renorm.errors import SwapError


def draw(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 3


BATCHES = [draw(size, 3, 4, 5, seed=size) for size in (2, 7, 5, 1)]
WHOLE = torch.cat(BATCHES).double()
CASES = {
    "torch's": (lambda: nn.BatchNorm2d(3), 1),
    "renorm's": (lambda: rn.BatchNorm2d(3), 1),
    "torch's average of all": (lambda: nn.BatchNorm2d(3, momentum=None), 1),
    "Keras's variance": (lambda: rn.BatchNorm(3, unbiased=False), 0),
    "a pattern": (lambda: rn.Norm("[n] c [h w]", c=3), 1),
    "ghosts": (lambda: rn.GhostBatchNorm(3, 2), 1),
    "switchable": (lambda: rn.SwitchNorm2d(3), 0),
    "native": (lambda: rn.BatchNorm2d(3, backend="native"), 1),
    "reference": (lambda: rn.BatchNorm2d(3, backend="reference"), 1),
}


@pytest.mark.parametrize("name", CASES)
def test_the_moments_of_all_values(name: str) -> None:
    make, correction = CASES[name]
    layer = make().eval()
    before = layer.momentum
    report = rn.recalibrate(layer, BATCHES)
    torch.testing.assert_close(layer.running_mean.double(), WHOLE.mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        layer.running_var.double(), WHOLE.var((0, 2, 3), correction=correction), rtol=1e-6, atol=1e-6
    )
    assert (layer.momentum, layer.num_batches_tracked.item(), layer.training) == (before, 4, False)
    assert (report.num_batches, len(report.norms), report.left) == (4, 1, ())


def test_a_mean_far_from_zero() -> None:
    layer = nn.BatchNorm1d(2)
    batches = [draw(64, 2, seed=seed) + 3e4 for seed in range(5)]
    rn.recalibrate(layer, batches)
    expected = torch.cat(batches).double().var(0)
    torch.testing.assert_close(layer.running_var.double(), expected, rtol=2e-3, atol=0)


def test_batches_that_differ_in_mean() -> None:
    """A moving average knows the variance in batches only, and that of a loader sorted by class is too small."""
    batches = [draw(8, 2) + 20 * step for step in range(4)]
    layer, averaged = nn.BatchNorm1d(2), nn.BatchNorm1d(2, momentum=None)
    rn.recalibrate(layer, batches)
    for batch in batches:
        averaged(batch)
    torch.testing.assert_close(layer.running_var, torch.cat(batches).var(0))
    assert (averaged.running_var < 0.01 * layer.running_var).all()


@pytest.mark.parametrize("make", [nn.InstanceNorm2d, rn.InstanceNorm2d])
def test_statistics_of_samples_are_averaged(make: Any) -> None:
    layer = make(3, track_running_stats=True)
    rn.recalibrate(layer, BATCHES)
    torch.testing.assert_close(layer.running_mean.double(), WHOLE.mean((2, 3)).mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), WHOLE.var((2, 3)).mean(0), rtol=1e-6, atol=1e-6)


def test_a_mask() -> None:
    layer = rn.BatchNorm1d(3)
    x, mask = draw(6, 3, 8), torch.rand(6, 1, 8, generator=torch.Generator().manual_seed(0)) > 0.4
    batches = [(x[:2], mask[:2]), (x[2:], mask[2:])]
    rn.recalibrate(layer, batches, lambda model, batch: model(batch[0], mask=batch[1]))
    values = x.double().movedim(1, -1)[mask[:, 0]]
    torch.testing.assert_close(layer.running_mean.double(), values.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), values.var(0), rtol=1e-6, atol=1e-6)


def test_half_precision() -> None:
    layer = rn.BatchNorm2d(3)
    batches = [batch.bfloat16() for batch in BATCHES]
    rn.recalibrate(layer, batches)
    expected = torch.cat(batches).double().var((0, 2, 3))
    torch.testing.assert_close(layer.running_var.double(), expected, rtol=1e-5, atol=0)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 5, 1), rn.BatchNorm2d(5)
    )


def test_a_network_behind_its_own_batch_statistics() -> None:
    model = network().train()
    weights = copy.deepcopy(dict(model.named_parameters()))
    report = rn.recalibrate(model, BATCHES)
    expected = copy.deepcopy(model).train()
    expected[3].eval()  # dropout
    seen = [expected[:5](batch) for batch in BATCHES]
    torch.testing.assert_close(model[5].running_mean, torch.cat(seen).mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[5].running_var, torch.cat(seen).var((0, 2, 3)), rtol=1e-5, atol=1e-6)
    assert [one.name for one in report.norms] == ["1", "5"]
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())


def test_small_batches_leave_averages_that_jump_about() -> None:
    """The same weights predict worse behind the averages of batches of 2, and as with all the rows afterwards."""
    torch.manual_seed(0)
    x = torch.randn(512, 8)
    y = (x @ torch.randn(8) > 0).long()
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32, momentum=0.5), nn.ReLU(), nn.Linear(32, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    @torch.no_grad()
    def loss(*, training: bool) -> float:
        return nn.functional.cross_entropy(model.train(training)(x), y).item()

    shown = []
    for rows in torch.randint(len(x), (200, 2)):
        model.train()(x[rows])
        shown.append(loss(training=False))
    report = rn.recalibrate(model, x.split(128))
    recalibrated = loss(training=False)
    assert recalibrated < 0.8 * float(np.mean(shown))
    assert report.norms[0].mean_shift > 0.5
    assert recalibrated == pytest.approx(loss(training=True), rel=1e-2)


def test_the_report() -> None:
    layer = nn.BatchNorm1d(2)
    x = torch.tensor([[1.0, 10.0], [3.0, 10.0], [5.0, 40.0], [7.0, 40.0]])
    (one,) = rn.recalibrate(layer, [x[:2], x[2:]]).norms
    assert one.mean_shift == pytest.approx(4 / np.sqrt(20 / 3), rel=1e-4)
    assert one.var_ratio == pytest.approx((20 / 3, 300), rel=1e-4)
    assert str(one) == "(the model) (BatchNorm1d): mean moved by up to 1.55 deviations, variance by 6.67 to 300 times"


def test_kinds_of_batches() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, ids: Tensor, scale: float = 1.0) -> Tensor:
            return self.norm(scale * ids)

    x = draw(6, 3)
    found = []
    for batch in (x, [x, torch.zeros(6)], {"ids": x / 2, "scale": 2.0}):
        model = Named()
        rn.recalibrate(model, iter([batch]))
        found.append(model.norm.running_mean)
    torch.testing.assert_close(found[0], x.mean(0))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("make", [nn.BatchNorm1d, rn.BatchNorm1d])
def test_a_batch_that_is_not_finite_does_not_count(make: Any) -> None:
    good, bad = draw(8, 3), draw(8, 3).index_fill(0, torch.tensor(2), torch.inf)
    layer = make(3)
    rn.recalibrate(layer, [bad, good, bad])
    torch.testing.assert_close(layer.running_mean, good.mean(0))
    torch.testing.assert_close(layer.running_var, good.var(0))
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(SwapError, match="met no finite batch"):
        rn.recalibrate(layer, [bad])
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_a_layer_called_twice_in_one_forward() -> None:
    norm = nn.BatchNorm1d(3)
    x = draw(8, 3)

    def forward(model: nn.Module, batch: Tensor) -> None:
        model(batch)
        model(batch + 10)

    rn.recalibrate(norm, [x], forward)
    torch.testing.assert_close(norm.running_mean, x.mean(0) + 5)
    torch.testing.assert_close(norm.running_var, torch.cat([x, x + 10]).var(0))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_error_leaves_everything_as_it_was(error: type[BaseException]) -> None:
    def loader() -> Iterator[Tensor]:
        yield BATCHES[0]
        raise error

    model = network().train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error):
        rn.recalibrate(model, loader())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert (model[1].momentum, model[5].momentum) == (0.1, 0.1)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_norms_that_keep_their_statistics() -> None:
    frozen = rn.freeze(rn.BatchNorm2d(3))
    kept = {
        "1": (frozen, "1 (BatchNorm2d) is frozen"),
        "2": (rn.BatchRenorm(3), "2 (BatchRenorm) normalizes by its running statistics in training"),
        "3": (rn.PowerNorm(3), "3 (PowerNorm) normalizes by its running statistics in training"),
        "4": (rn.IterNorm(3), "4 (IterNorm) remembers more than mean and variance"),
    }
    model = nn.Sequential(nn.BatchNorm2d(3), *(layer for layer, _ in kept.values()))
    before = copy.deepcopy({name: layer.state_dict() for name, (layer, _) in kept.items()})
    report = rn.recalibrate(model, BATCHES)
    assert report.left == tuple(why for _, why in kept.values())
    assert str(report).startswith("1 norms measured on 4 batches, 4 left alone\n  0 (BatchNorm2d): mean moved")
    for name, (layer, _) in kept.items():
        assert all(torch.equal(value, before[name][key]) for key, value in layer.state_dict().items())


@pytest.mark.parametrize(
    ("model", "batches", "message"),
    [
        (nn.Sequential(nn.GroupNorm(1, 3)), BATCHES, "the model has no norm whose running statistics can be measured"),
        (rn.freeze(rn.BatchNorm2d(3)), BATCHES, r"again; the model \(BatchNorm2d\) is frozen"),
        (nn.BatchNorm2d(3), [], "there is no batch to measure on"),
        (nn.BatchNorm2d(3), BATCHES[0], r"got a tensor: write \[x\] for a single batch"),
        (nn.Sequential(nn.LazyBatchNorm2d(), nn.BatchNorm2d(3)), BATCHES, "0 has no shape yet"),
        (nn.BatchNorm2d(3, device="meta"), BATCHES, "the model is on the meta device, which holds no values"),
        (nn.ModuleDict({"used": nn.BatchNorm2d(3), "not used": nn.BatchNorm2d(3)}), BATCHES, "not used met no finite"),
    ],
)
def test_what_cannot_be_measured(model: nn.Module, batches: Any, message: str) -> None:
    with pytest.raises(SwapError, match=message):
        rn.recalibrate(
            model, batches, lambda model, x: model["used"](x) if isinstance(model, nn.ModuleDict) else model(x)
        )


@pytest.mark.parametrize("make", [nn.BatchNorm2d, rn.BatchNorm2d])
def test_an_empty_batch_counts_for_nothing(make: Any) -> None:
    layer = make(3)
    rn.recalibrate(layer, [BATCHES[0], BATCHES[0][:0], *BATCHES[1:]])
    torch.testing.assert_close(layer.running_mean.double(), WHOLE.mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), WHOLE.var((0, 2, 3)), rtol=1e-6, atol=1e-6)


def test_a_compiled_model() -> None:
    layer = rn.BatchNorm2d(3)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    compiled(BATCHES[0])
    rn.recalibrate(compiled, BATCHES)
    torch.testing.assert_close(layer.running_var.double(), WHOLE.var((0, 2, 3)), rtol=1e-6, atol=1e-6)


def process(rank: int, folder: str) -> None:
    """Each of two processes gives its parts, of sizes of their own, one of them empty."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    layer = rn.sync(rn.BatchNorm2d(3))
    ends = [(0, 2), (2, 3), (0, 5)] if rank == 0 else [(2, 2), (3, 7), (5, 5)]
    rn.recalibrate(layer, [draw(7, 3, 4, 5, seed=seed)[start:end] for seed, (start, end) in enumerate(ends)])
    torch.save(layer.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_measure_what_both_have(tmp_path: Path) -> None:
    spawn(process, (str(tmp_path),), nprocs=2)
    parts = [(0, 2), (2, 7), (0, 5)]
    whole = torch.cat([draw(7, 3, 4, 5, seed=seed)[start:end] for seed, (start, end) in enumerate(parts)]).double()
    for rank in range(2):
        state = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(state["running_mean"].double(), whole.mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(state["running_var"].double(), whole.var((0, 2, 3)), rtol=1e-6, atol=1e-6)
