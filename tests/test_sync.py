"""Statistics over several processes equal those of one process with the whole batch."""

import copy
import io
import pickle

import pytest
import torch
import torch.multiprocessing as multiprocessing
from checks import close
from torch import nn

import renorm as rn
from renorm.errors import PatternError, SwapError

# What can be synchronized, by name: how it is made, and the shape of the whole batch.
LAYERS = {
    "BatchNorm1d": (lambda **o: rn.BatchNorm1d(3, **o), (7, 3)),
    "BatchNorm2d": (lambda **o: rn.BatchNorm2d(3, **o), (7, 3, 4, 5)),
    "BatchNorm-last": (lambda **o: rn.BatchNorm(3, axis=-1, **o), (7, 4, 3)),
    "BatchNorm2d-cumulative": (lambda **o: rn.BatchNorm2d(3, momentum=None, **o), (7, 3, 4, 5)),
    "BatchNorm2d-reference": (lambda **o: rn.BatchNorm2d(3, backend="reference", **o), (7, 3, 4, 5)),
    "BatchNorm2d-plain": (lambda **o: rn.BatchNorm2d(3, affine=False, track_running_stats=False, **o), (7, 3, 4, 5)),
    "Norm-rms": (lambda **o: rn.Norm("[n] c [...]", c=3, center=False, bias=False, **o), (7, 3, 4, 5)),
    "SwitchNorm2d": (lambda **o: rn.SwitchNorm2d(3, **o), (7, 3, 4, 5)),
    "BatchRenorm": (lambda **o: rn.BatchRenorm(3, rmax=1.3, dmax=0.5, momentum=0.3, **o), (7, 3, 4, 5)),
    "PowerNorm": (lambda **o: rn.PowerNorm(3, **o), (7, 3, 4, 5)),
    "PowerNorm-warm": (lambda **o: rn.PowerNorm(3, warmup=1, axis=-1, **o), (7, 4, 3)),
    "InPlaceBatchNorm2d": (lambda **o: rn.InPlaceBatchNorm2d(3, **o), (7, 3, 4, 5)),
    "EvoNormB0": (lambda **o: rn.EvoNormB0(3, **o), (7, 3, 4, 5)),
}
PARTS = {"unequal": (0, 5, 7), "one sample": (0, 6, 7), "empty": (0, 7, 7), "first empty": (0, 0, 7)}


def made(name, **options):
    torch.manual_seed(0)
    layer = LAYERS[name][0](**options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def batch(name, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = LAYERS[name][1]
    x, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) + mean for mean in (20, 0))
    return x, dy, torch.rand(shape, generator=generator) > 0.3


def run(layer, name, rows, *, masked):
    """Two steps on these rows: everything that must not depend on who has them."""
    found = {}
    for step in range(2):
        x, dy, mask = (tensor[rows] for tensor in batch(name, step))
        x.requires_grad_()
        y = layer(x, mask if masked else None)
        first = torch.autograd.grad(y, [x, *layer.parameters()], dy, create_graph=True)
        (second,) = torch.autograd.grad((first[0] * dy).sum(), x)
        found[f"y{step}"], found[f"dx{step}"], found[f"ddx{step}"] = y.detach(), first[0].detach(), second
        found[f"dparameters{step}"] = [gradient.detach() for gradient in first[1:]]
    found["state"] = {key: value.clone() for key, value in layer.state_dict().items()}
    layer.eval()
    found["evaluation"] = layer(batch(name, 3)[0]).detach()
    return found


def processes(rank, folder):
    """What each of two processes finds, in files; everything in one start, which takes seconds."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    world = torch.distributed.group.WORLD
    found = {}
    for name in LAYERS:
        for kind, ends in PARTS.items():
            rows = slice(ends[rank], ends[rank + 1])
            for masked in (False, True):
                found[name, kind, masked] = run(made(name, process_group=world), name, rows, masked=masked)
    found["compiled"] = compiled(world, rank)
    found["ddp"] = ddp(rank)
    found["copies"] = copies(world, rank)
    found["subgroups"] = subgroups(rank)
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def compiled(world, rank):
    """Training in one graph, against eager."""
    errors = []
    for name in ("BatchNorm2d", "SwitchNorm2d"):
        plain = made(name, process_group=world)
        graph = torch.compile(copy.deepcopy(plain), fullgraph=True, backend="aot_eager")
        x = batch(name, 0)[0][slice(0, 5) if rank == 0 else slice(5, 7)]
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = plain(a), graph(b)
        dx, dz = torch.autograd.grad(y.square().sum(), a)[0], torch.autograd.grad(z.square().sum(), b)[0]
        errors += [(y - z).abs().max().item(), (dx - dz).abs().max().item()]
        errors += [(p - q).abs().max().item() for p, q in zip(plain.buffers(), graph.buffers(), strict=True)]
    return max(errors)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(24, 2)).double()


def ddp(rank):
    """A synchronized model under DDP, two steps; torch's own raises on the CPU."""
    model = nn.parallel.DistributedDataParallel(rn.sync(network()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        x = batch("BatchNorm2d", step)[0][:6][3 * rank : 3 * rank + 3]
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model.module.state_dict()


def copies(world, rank):
    """A copy is synchronized as its original is, and a pickle finds the group by its name."""
    layer = made("BatchNorm2d", process_group=world)
    again = pickle.loads(pickle.dumps(layer))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=False)
    x = batch("BatchNorm2d", 0)[0][slice(0, 5) if rank == 0 else slice(5, 7)]
    expected = layer(x)
    same = [torch.equal(copy.deepcopy(layer)(x), expected)]
    same += [other.process_group is world and torch.equal(other(x), expected) for other in (again, saved)]
    # Outside of any group the pickle is a layer like another.
    rn.unsync(again)
    return all(same) and again.process_group is None and not torch.equal(again(x), expected)


def subgroups(rank):
    """Groups of one process are no synchronization."""
    groups = [torch.distributed.new_group([i]) for i in range(2)]
    x = batch("BatchNorm2d", 0)[0][slice(0, 5) if rank == 0 else slice(5, 7)]
    y = rn.sync(nn.Sequential(made("BatchNorm2d")), groups[rank])(x)
    return (y - made("BatchNorm2d")(x)).abs().max().item()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(processes, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("name", LAYERS)
def test_two_processes_equal_one_with_the_whole_batch(found, name, kind, masked):
    whole = run(made(name), name, slice(None), masked=masked)
    parts = [part[name, kind, masked] for part in found]
    for step in range(2):
        for what in ("y", "dx", "ddx"):
            joined = torch.cat([part[f"{what}{step}"] for part in parts])
            close(joined, whole[f"{what}{step}"], 1e-9)
        for i, gradient in enumerate(whole[f"dparameters{step}"]):
            close(sum(part[f"dparameters{step}"][i] for part in parts), gradient, 1e-9)
    for part in parts:
        for key, value in whole["state"].items():
            close(part["state"][key], value, 1e-9)
        close(part["evaluation"], whole["evaluation"], 1e-9)


def test_one_graph(found):
    assert max(part["compiled"] for part in found) < 1e-9


def test_ddp_equals_one_process(found):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        x = batch("BatchNorm2d", step)[0][:6]
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    for part in found:
        assert list(part["ddp"]) == list(model.state_dict())
        for key, value in model.state_dict().items():
            close(part["ddp"][key], value, 1e-9)


def test_copies_and_groups(found):
    assert all(part["copies"] for part in found)
    assert max(part["subgroups"] for part in found) < 1e-12


@pytest.fixture
def alone(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def test_sync_and_unsync_a_model(alone):
    norm, shared = nn.BatchNorm2d(4, eps=1e-3, momentum=None), nn.SyncBatchNorm(4)
    model = nn.Sequential(norm, rn.SwitchNorm2d(4), nn.GroupNorm(2, 4), shared, shared, rn.BatchNorm2d(4)).eval()
    parameters = list(model.parameters())
    assert rn.sync(model) is model
    assert [type(m).__name__ for m in model] == [
        *("BatchNorm2d", "SwitchNorm2d", "GroupNorm", "BatchNorm", "BatchNorm", "BatchNorm2d"),
    ]
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert model[0].eps == 1e-3
    assert model[0].momentum is None
    assert model[0].running_mean is norm.running_mean
    assert model[3] is model[4]
    assert not model[0].training
    assert [getattr(m, "process_group", None) is alone for m in model] == [True, True, False, True, True, True]
    rn.unsync(model)
    assert all(getattr(m, "process_group", None) is None for m in model)
    assert isinstance(rn.sync(nn.BatchNorm1d(3)), rn.BatchNorm1d)


def test_what_cannot_be_synchronized(alone):
    class Activated(nn.BatchNorm2d):
        pass

    with pytest.raises(SwapError, match="0 is a Activated, which may do more than normalize"):
        rn.sync(nn.Sequential(Activated(3)))
    with pytest.raises(SwapError, match="no norm that averages over the batch"):
        rn.sync(nn.Sequential(rn.GroupNorm(1, 3)))
    with pytest.raises(PatternError, match="leave process_group out"):
        rn.Norm("n [c]", c=3, process_group=alone)
    with pytest.raises(PatternError, match="leave process_group out"):
        rn.SwitchNorm2d(3, partitions=("instance", "layer"), process_group=alone)


def test_without_a_group():
    with pytest.raises(SwapError, match=r"first call torch\.distributed.init_process_group"):
        rn.sync(nn.BatchNorm2d(3))
