"""Reversible instance norm: what is particular to it. What all norms share is in checks.py."""

import pytest
import torch
from checks import close, eps_of
from torch import nn

import renorm as rn
from renorm.choices.reversible import Reversible, parted
from renorm.errors import ShapeError


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(shape, generator=generator, dtype=torch.float64) + 7).to(dtype)


def moved(norm):
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(0.3 * draw(*parameter.shape, seed=1).to(parameter.dtype) / 7)
    return norm


class Theirs(nn.Module):
    """Equations 1 to 3 of the paper, in the layout (N, time, C) that it uses, with the state between the two halves."""

    def __init__(self, weight, bias, eps=1e-5):
        super().__init__()
        self.weight, self.bias, self.eps = weight, bias, eps

    def forward(self, x):
        self.mean = x.mean(1, keepdim=True)
        self.std = ((x - self.mean).square().mean(1, keepdim=True) + self.eps).sqrt()
        return (x - self.mean) / self.std * self.weight + self.bias

    def back(self, y):
        return (y - self.bias) / self.weight * self.std + self.mean


@pytest.mark.parametrize("axis", [1, -1])
def test_both_halves_are_the_papers(axis):
    x, y = draw(4, 10, 3), draw(4, 5, 3, seed=2)
    norm = moved(rn.RevIN(3, axis=axis, dtype=torch.float64))
    theirs = Theirs(norm.weight, norm.bias)
    turn = (lambda t: t.transpose(1, 2)) if axis == 1 else (lambda t: t)
    normalized, statistics = norm.normalize(turn(x))
    close(turn(normalized), theirs(x), 32 * eps_of(torch.float64))
    close(turn(norm.denormalize(turn(y), statistics)), theirs.back(y), 64 * 10 * eps_of(torch.float64))


@pytest.mark.parametrize("subtract_last", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_what_is_undone_is_what_was_done(subtract_last, affine, backend):
    x = draw(5, 3, 9, dtype=torch.float32)
    norm = moved(rn.RevIN(3, affine=affine, subtract_last=subtract_last, backend=backend))
    y, statistics = norm.normalize(x)
    close(norm.denormalize(y, statistics), x, 64 * x.abs().max().item() * eps_of(torch.float32))
    close(y, norm(x), 0)


def test_a_level_and_a_scale_come_through():
    """The forecast of a x + b is that of x, times a, plus b: what the norm is for."""
    torch.manual_seed(0)
    head = nn.Sequential(nn.Flatten(), nn.Linear(2 * 12, 4), nn.Unflatten(1, (1, 4))).double()
    model = Reversible(head, 2).double()
    x = draw(6, 2, 12)
    close(model(1000 * x + 5e4), 1000 * model(x) + 5e4, 1e-2)  # eps: 1e-5 of a variance near 9


def test_the_last_step_is_the_center():
    norm = rn.RevIN(2, affine=False, subtract_last=True)
    x = draw(3, 2, 7, dtype=torch.float32)
    y, (center, _) = norm.normalize(x)
    assert y[..., -1].abs().max() == 0
    assert torch.equal(center[..., 0].float(), x[..., -1])


@pytest.mark.parametrize("axis", [1, -1])
def test_masked_steps_have_no_say(axis):
    x = draw(4, 3, 8, dtype=torch.float32)
    mask = torch.rand(4, 1, 8, generator=torch.Generator().manual_seed(3)) > 0.3
    mask[0] = False
    mask[1, :, 5:] = False
    turn = (lambda t: t) if axis == 1 else (lambda t: t.transpose(1, 2))
    norm = rn.RevIN(3, subtract_last=True, axis=axis)
    spoilt = torch.where(mask, x, torch.nan)
    y, (center, std) = norm.normalize(turn(torch.where(mask, x, 99.0)), turn(mask))
    _, (other, _) = norm.normalize(turn(spoilt), turn(mask))
    assert torch.equal(center, other)
    assert (turn(y)[~mask.expand(x.shape)] == 0).all()
    center = center if axis == 1 else center.transpose(1, 2)
    newest = [mask[n, 0].nonzero().max().item() for n in (1, 2, 3)]
    assert torch.equal(
        center[1:, :, 0].float(), torch.stack([x[n, :, at] for n, at in zip((1, 2, 3), newest, strict=True)])
    )
    assert (center[0] == 0).all()
    assert std.isfinite().all()


def test_a_forecast_of_some_channels():
    norm = moved(rn.RevIN(4))
    x, y = draw(3, 4, 9, dtype=torch.float32), draw(3, 4, 5, seed=4, dtype=torch.float32)
    _, statistics = norm.normalize(x)
    whole = norm.denormalize(y, statistics)
    close(norm.denormalize(y[:, [2, 0]], statistics, channels=[2, 0]), whole[:, [2, 0]], 1e-5)


def test_gradients_go_through_the_statistics():
    class Last(nn.Module):
        def forward(self, x):
            return x[:, :1, -3:].square()

    model = Reversible(Last(), 2).double()
    names = [name for name, _ in model.named_parameters()]

    def run(x, *values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    given = (draw(2, 2, 5).requires_grad_(), *model.parameters())
    assert torch.autograd.gradcheck(run, given)
    assert torch.autograd.gradgradcheck(run, given)


def test_a_constant_past_gives_its_level_back():
    norm = rn.RevIN(1)
    x = torch.full((2, 1, 6), 12.5)
    y, statistics = norm.normalize(x)
    assert y.abs().max() == 0
    close(norm.denormalize(torch.zeros(2, 1, 3), statistics), torch.full((2, 1, 3), 12.5), 0)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ShapeError, match="axis 1 or -1; got axis=2"):
        rn.RevIN(3, axis=2)
    norm = rn.RevIN(3)
    _, statistics = norm.normalize(torch.zeros(2, 3, 4))
    with pytest.raises(ShapeError, match=r"2 samples and 3 channels .*got \(2, 1, 4\): name its channels"):
        norm.denormalize(torch.zeros(2, 1, 4), statistics)
    with pytest.raises(ShapeError, match=r"got \(2, 3\)"):
        norm.denormalize(torch.zeros(2, 3), statistics)
    with pytest.raises(ShapeError):
        norm(torch.zeros(2, 4, 4))


def test_it_says_what_it_is():
    assert "3, subtract_last=True, pattern='n c [t]'" in repr(rn.RevIN(3, subtract_last=True))


def test_static_channels_are_passed_as_they_are():
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(x)
            return x[:, :1, :2]

    x = draw(3, 4, 6, dtype=torch.float32)
    Reversible(Spy(), 2)(x)
    assert torch.equal(seen[0][:, 2:], x[:, 2:])
    close(seen[0][:, :2].mean(2), torch.zeros(3, 2), 1e-6)


@pytest.mark.parametrize(
    ("name", "expected"), [("revin", (True, "none")), ("revin+group(8)", (True, "group(8)")), ("rms", (False, "rms"))]
)
def test_a_norms_name_has_two_parts(name, expected):
    assert parted(name) == expected
