"""Normalization of gradients: against the papers' formulas by loops over the units, in steps of torch's optimizers."""

import copy
import math
import warnings

import pytest
import torch
from checks import close, eps_of
from torch import nn
from torch.nn.utils import parametrizations

from renorm.errors import ShapeError
from renorm.norms.gradient import centralize_gradients, clip_gradients_adaptively, normalize_gradients

HOOKS = {
    "centralize": centralize_gradients,
    "normalize": normalize_gradients,
    "clip": lambda optimizer, **extra: clip_gradients_adaptively(optimizer, 0.05, **extra),
}
OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "sgd-fused": lambda params: torch.optim.SGD(params, lr=0.1, fused=True),
    "sgd-loop": lambda params: torch.optim.SGD(params, lr=0.1, foreach=False),
    "adam": lambda params: torch.optim.Adam(params, lr=0.1),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.1, fused=True),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.1),
}
of_every = pytest.mark.parametrize("kind", HOOKS)


def network(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.ConvTranspose2d(6, 4, 2, groups=2),
        nn.ConvTranspose1d(4, 3, 2),
        nn.BatchNorm2d(3),
        nn.Linear(3, 5),
    ).to(dtype)
    model.factor = nn.Parameter(torch.tensor(2.0, dtype=dtype))
    model.unused = nn.Parameter(torch.ones(3, 3, dtype=dtype))
    give_gradients(model)
    return model


def give_gradients(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if name != "unused":
            p.grad = (torch.randn(p.shape, generator=generator, dtype=torch.float64) + 0.5).to(p.dtype)


def units(module, p):
    """Indices of the weights of each unit, by the shapes that torch documents."""
    if p.dim() < 2:
        return [(...,)]
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d)):
        size = module.in_channels // module.groups
        return [(slice(i * size, (i + 1) * size), o) for i in range(module.groups) for o in range(p.shape[1])]
    return [(o,) for o in range(len(p))]


def owners(model):
    return {p: module for module in model.modules() for p in module.parameters(recurse=False)}


def length(entries):
    return math.sqrt(sum(abs(entry) ** 2 for entry in entries.flatten().tolist()))


def by_loops(kind, model, clip=0.05, eps=1e-3):
    """The gradients as they should become."""
    wanted = {}
    for name, p in model.named_parameters():
        if p.grad is None:
            continue
        wanted[name] = g = p.grad.detach().clone().to(torch.promote_types(p.dtype, torch.float64))
        for index in units(owners(model)[p], p):
            part = g[index]
            if kind == "centralize" and p.dim() > 1:
                g[index] = part - sum(part.flatten().tolist()) / part.numel()
            elif kind == "normalize":
                g[index] = part / length(part)
            elif kind == "clip":
                largest = clip * max(length(p.detach()[index]), eps)
                if length(part) > largest:
                    g[index] = part * largest / length(part)
    return wanted


def grads(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(actual, wanted, tolerance=1e-12):
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        close(actual[name], value, tolerance)


@of_every
def test_sgd_steps_along_the_formula(kind):
    model = network()
    wanted, before = by_loops(kind, model), copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = HOOKS[kind](optimizer, model=model)
    optimizer.step()
    after = model.state_dict()
    for name, value in before.items():
        close(after[name], value - 0.1 * wanted[name] if name in wanted else value, 1e-12)
    same(grads(model), wanted)
    handle.remove()
    give_gradients(model)
    given = grads(model)
    optimizer.step()
    same(grads(model), given, 0.0)


@of_every
@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_any_optimizer_with_groups_takes_the_steps_of_changed_gradients(kind, build):
    model, by_hand = network(), network()

    def groups(model):
        return [
            {"params": list(model[:3].parameters()), "lr": 0.01},
            {"params": [*model[3:].parameters(), model.factor]},
        ]

    optimizer, other = build(groups(model)), build(groups(by_hand))
    HOOKS[kind](optimizer, model=model)
    for step in range(3):
        for each in (model, by_hand):
            give_gradients(each, seed=step)
        wanted = by_loops(kind, by_hand)
        for name, p in by_hand.named_parameters():
            p.grad = wanted.get(name)
        optimizer.step()
        other.step()
    same(model.state_dict(), by_hand.state_dict(), 1e-10)


@of_every
def test_without_the_model_outputs_are_dimension_0(kind):
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Linear(3, 2)).double()
    give_gradients(model)
    wanted = by_loops(kind, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    HOOKS[kind](optimizer)
    optimizer.step()
    same(grads(model), wanted)


@of_every
def test_the_model_is_known_under_parametrizations(kind):
    layer = parametrizations.spectral_norm(nn.ConvTranspose2d(4, 6, 3, groups=2).double())
    original = layer.parametrizations.weight.original
    original.grad = torch.randn_like(original)
    plain = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False).double())
    plain[0].weight.data = original.detach().clone()
    plain[0].weight.grad = original.grad.clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    HOOKS[kind](optimizer, model=layer)
    optimizer.step()
    close(original.grad, by_loops(kind, plain)["0.weight"], 1e-12)


@of_every
def test_lengths_of_a_transposed_convolution_in_groups_are_not_its_weights(kind):
    layer = parametrizations.weight_norm(nn.ConvTranspose2d(4, 6, 3, groups=2), dim=1)
    give_gradients(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    HOOKS[kind](optimizer, model=layer)
    optimizer.step()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@of_every
def test_what_is_excluded_stays(kind):
    model = network()
    given, wanted = grads(model), by_loops(kind, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    HOOKS[kind](optimizer, model=model, exclude=(item for item in [model[5], model[1].weight]))
    optimizer.step()
    for name in ("5.weight", "5.bias", "1.weight"):
        wanted[name] = given[name]
    same(grads(model), wanted)


def test_centralization_of_convolutions_only():
    model = network()
    given, wanted = grads(model), by_loops("centralize", model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    centralize_gradients(optimizer, conv_only=True, model=model)
    optimizer.step()
    wanted["5.weight"] = given["5.weight"]
    same(grads(model), wanted)


def test_normalization_of_tensors_and_of_groups():
    for by in ("tensor", "group"):
        model = network()
        given = grads(model)
        layers = [list(layer.parameters()) for layer in model]
        optimizer = torch.optim.SGD([{"params": layer} for layer in layers], lr=0.1)
        normalize_gradients(optimizer, by)
        optimizer.step()
        blocks = layers if by == "group" else [[p] for layer in layers for p in layer]
        names = {p: name for name, p in model.named_parameters()}
        for block in blocks:
            total = math.sqrt(sum(length(given[names[p]]) ** 2 for p in block))
            for p in block:
                close(p.grad, given[names[p]] / total, 1e-12)


def test_gradients_and_weights_of_zero():
    weight = nn.Parameter(torch.zeros(3, 4))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for register in HOOKS.values():
        handle = register(optimizer)
        weight.grad = torch.zeros(3, 4)
        optimizer.step()
        assert (weight.grad == 0).all()
        handle.remove()
    clip_gradients_adaptively(optimizer, 0.01, eps=1e-3)
    weight.grad = torch.ones(3, 4)
    optimizer.step()
    close(weight.detach(), torch.full((3, 4), -0.01 * 1e-3 / 2), 1e-12)


def test_a_gradient_within_the_bound_is_not_touched():
    weight = nn.Parameter(torch.randn(5, 7))
    weight.grad = given = 1e-4 * torch.randn(5, 7)
    before = given.clone()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    clip_gradients_adaptively(optimizer)
    optimizer.step()
    assert torch.equal(weight.grad, before)


@of_every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(kind, dtype):
    weight = nn.Linear(600, 3, bias=False).to(dtype)
    weight.weight.grad = (100 * torch.randn(3, 600) + 3000).to(dtype)  # squares overflow in float16
    wanted = by_loops(kind, weight)["weight"]
    optimizer = torch.optim.SGD(weight.parameters(), lr=0.1)
    HOOKS[kind](optimizer)
    optimizer.step()
    assert weight.weight.grad.dtype == dtype
    largest = wanted.abs().max()
    close(weight.weight.grad / largest, wanted / largest, eps_of(dtype))


@of_every
def test_complex_parameters(kind):
    model = nn.Linear(3, 2, dtype=torch.complex128)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    wanted = by_loops(kind, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    HOOKS[kind](optimizer)
    optimizer.step()
    for name, p in model.named_parameters():
        assert (p.grad - wanted[name]).abs().max() < 1e-12


@of_every
def test_strided_gradients(kind):
    model = network()
    wanted = by_loops(kind, model)
    for p in model.parameters():
        if p.grad is not None and p.dim() > 1:
            p.grad = p.grad.transpose(0, -1).contiguous().transpose(0, -1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    HOOKS[kind](optimizer, model=model)
    optimizer.step()
    same(grads(model), wanted)


@of_every
@pytest.mark.parametrize("by_name", [False, True])
def test_a_closure_gives_the_same_step(kind, by_name):
    model, other = network(), network()
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, other)]
    for each, optimizer in zip((model, other), optimizers, strict=True):
        HOOKS[kind](optimizer, model=each)

    def closure():
        give_gradients(model)
        return 3.0

    model.zero_grad()  # what is there before the closure is not used
    assert (optimizers[0].step(closure=closure) if by_name else optimizers[0].step(closure)) == 3.0
    optimizers[1].step()
    same(model.state_dict(), other.state_dict(), 0.0)


def test_lbfgs_changes_the_gradients_of_every_evaluation():
    """It finds the minimum among rows whose sums stay, which is where the centralized gradient is 0."""
    target = torch.tensor([[1.0, 2.0, 6.0]], dtype=torch.float64)
    weight = nn.Parameter(torch.zeros(1, 3, dtype=torch.float64))
    optimizer = torch.optim.LBFGS([weight], max_iter=20)
    centralize_gradients(optimizer)

    def closure():
        optimizer.zero_grad()
        loss = (weight - target).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    close(weight.detach(), target - target.mean(), 1e-6)


def test_hooks_run_in_order():
    weight = nn.Parameter(torch.zeros(1, 2))
    for order in (0, 1):
        optimizer = torch.optim.SGD([weight], lr=1.0)
        for register in (centralize_gradients, normalize_gradients)[:: 1 if order == 0 else -1]:
            register(optimizer)
        for closure in (False, True):
            weight.grad = torch.tensor([[3.0, 4.0]])
            optimizer.step(*[lambda: 0.0] * closure)
            close(weight.grad, torch.tensor([[-0.1, 0.1]]) if order else torch.tensor([[-1.0, 1.0]]) / 2**0.5, 1e-6)


@of_every
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscaled", [False, True])
def test_the_scale_of_a_grad_scaler_is_allowed_for(kind, fused, unscaled):
    model, plain = network(torch.float32), network(torch.float32)
    optimizers = [torch.optim.Adam(each.parameters(), lr=0.1, fused=fused) for each in (model, plain)]
    for each, optimizer in zip((model, plain), optimizers, strict=True):
        HOOKS[kind](optimizer, model=each)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(torch.zeros(()))
    for p in model.parameters():
        if p.grad is not None:
            p.grad.mul_(2.0**10)
    if unscaled:
        scaler.unscale_(optimizers[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaler.step(optimizers[0])
    scaler.update()
    optimizers[1].step()
    same(model.state_dict(), plain.state_dict(), 1e-5)


def test_the_scale_is_allowed_for_once_in_a_group():
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    for p in parameters:
        p.grad = torch.ones(2)
    optimizer = torch.optim.SGD(parameters, lr=1.0, fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)  # as a scaler does
    normalize_gradients(optimizer, "group")
    optimizer.step()
    for p in parameters:
        close(p.detach(), torch.full((2,), -1 / 6**0.5), 1e-6)


@of_every
def test_a_scaler_skips_what_overflowed(kind):
    for fused in (False, True):
        model = network(torch.float32)
        before = copy.deepcopy(model.state_dict())
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=fused)
        HOOKS[kind](optimizer, model=model)
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(torch.zeros(()))
        model[0].weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        same(model.state_dict(), before, 0.0)


@of_every
def test_scheduled_learning_rates(kind):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    HOOKS[kind](optimizer, model=model)
    wanted = by_loops(kind, model)
    optimizer.step()
    schedule.step()
    same(grads(model), wanted)


@of_every
def test_sparse_gradients_are_refused_or_excluded(kind):
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
    handle = HOOKS[kind](optimizer)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ShapeError, match="exclude="):
        optimizer.step()
    handle.remove()
    HOOKS[kind](optimizer, exclude=[table])
    optimizer.step()


def test_wrong_settings():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(ShapeError, match="by='layer'"):
        normalize_gradients(optimizer, by="layer")
    with pytest.raises(ShapeError, match="eps must be positive"):
        normalize_gradients(optimizer, eps=0.0)
    with pytest.raises(ShapeError, match="clip must be positive"):
        clip_gradients_adaptively(optimizer, clip=-1.0)
    with pytest.raises(ShapeError, match="eps must be positive"):
        clip_gradients_adaptively(optimizer, eps=0.0)
