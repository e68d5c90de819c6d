"""Folding: the same outputs with fewer layers, and what must be left alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import renorm as rn
from renorm.errors import SwapError


def trained(model: nn.Module) -> nn.Module:
    """Random parameters and running statistics, as after training; in training mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if value.is_floating_point():
                low = 0.5 if name.endswith("running_var") else -1.0
                value.copy_(torch.rand(value.shape, generator=generator) * (2 - low) / 2 + low)
    return model


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def difference(model: nn.Module, folded: nn.Module, x: Tensor) -> float:
    """Between outputs in evaluation mode in float64, relative to the largest."""
    with torch.no_grad():
        one, two = (copy.deepcopy(each).double().eval()(x.double()) for each in (model, folded))
    return float((one - two).abs().max() / one.abs().max())


LAYERS = {
    "conv1d": (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, padding=1, stride=2), nn.BatchNorm2d(6), (2, 4, 9, 8)),
    "conv2d without bias": (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), (2, 4, 9, 8)),
    "grouped conv2d": (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (2, 4, 9, 8)),
    "depthwise conv2d": (nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8), (2, 4, 9, 8)),
    "conv3d": (nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3), (2, 2, 4, 5, 4)),
    "transposed conv1d": (nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 9)),
    "transposed conv2d": (nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4), (2, 4, 5, 5)),
    "grouped transposed conv2d": (nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "linear": (nn.Linear(4, 6), nn.BatchNorm1d(6), (5, 4)),
    "norm without parameters": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False), (2, 4, 9, 8)),
    "renorm's": (nn.Conv2d(4, 6, 3), rn.BatchNorm2d(6), (2, 4, 9, 8)),
    "renorm's with activation": (nn.Conv2d(4, 6, 3), rn.BatchNorm2d(6, activation="gelu"), (2, 4, 9, 8)),
    "renorm's of any rank": (nn.Conv1d(4, 6, 3), rn.BatchNorm(6, eps=1e-2), (2, 4, 9)),
    "a pattern": (nn.Conv2d(4, 6, 3), rn.Norm("[n] c [h w]", c=6), (2, 4, 9, 8)),
    "a pattern with eps of the dtype": (nn.Linear(4, 6), rn.Norm("[n] c", c=6, eps=None), (5, 4)),
    "channels last behind a linear layer": (nn.Linear(4, 6), rn.BatchNorm(6, axis=-1), (2, 5, 4)),
    "ghost batch norm": (nn.Conv2d(4, 6, 3), rn.GhostBatchNorm(6, 2), (2, 4, 9, 8)),
    "batch renorm": (nn.Conv2d(4, 6, 3), rn.BatchRenorm(6), (2, 4, 9, 8)),
    "instance norm that tracks": (nn.Conv2d(4, 6, 3), rn.InstanceNorm2d(6, track_running_stats=True), (2, 4, 9, 8)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_same_outputs(name: str) -> None:
    layer, norm, shape = LAYERS[name]
    model = trained(nn.Sequential(layer, norm, nn.Tanh()).double())
    before = copy.deepcopy(model.state_dict())
    folded, report = rn.fold(model)
    assert report.folded == (("0", "1"),), report
    assert not any(isinstance(module, type(norm)) for module in folded.modules())
    assert difference(model, folded, draw(*shape)) < 1e-13
    assert model.training
    assert not folded.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Block(nn.Module):
    """A residual block, as a model is written: not a Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), rn.BatchNorm2d(4)
        self.first = nn.BatchNorm2d(4)  # of a pre-activation block: nothing before it

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(self.first(x))).relu()
        return (x + self.bn2(self.conv2(y))).relu()


def test_a_residual_network() -> None:
    model = trained(nn.Sequential(Block(), Block()).double())
    folded, report = rn.fold(model, draw(2, 4, 8, 8).double())
    assert report.folded == (("0.conv1", "0.bn1"), ("0.conv2", "0.bn2"), ("1.conv1", "1.bn1"), ("1.conv2", "1.bn2"))
    assert [norm for norm, _ in report.left] == ["0.first", "1.first"]
    assert "nothing that could take it in" in report.left[0][1]
    assert difference(model, folded, draw(2, 4, 8, 8)) < 1e-13
    assert "4 folded, 2 left alone\n  0.bn1 into 0.conv1" in str(report)


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        convs = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.body = nn.Sequential(convs[0], nn.BatchNorm2d(4), nn.ReLU(), convs[1], nn.BatchNorm2d(4))
        self.head, self.norm = nn.Linear(4, 2), nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if y.sum() > 0:  # control flow by values
            y = y + 1
        return self.norm(self.head(y.mean((2, 3))))


def test_a_model_that_cannot_be_traced() -> None:
    model = trained(Untraceable())
    folded, report = rn.fold(model, draw(3, 3, 6, 6))
    assert report.folded == (("body.0", "body.1"), ("body.3", "body.4"))
    assert [norm for norm, _ in report.left] == ["norm"]
    assert difference(model, folded, draw(3, 3, 6, 6)) < 1e-6  # the parameters are float32


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.norm(self.conv(x))))


class Both(Twice):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


class More(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model[0].register_forward_hook(lambda module, args, output: output + 1)
    return model


def shared() -> nn.Module:
    conv = nn.Conv2d(3, 3, 1)
    return nn.Sequential(conv, nn.BatchNorm2d(3), conv)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Twice(), "nothing that could take it in stands right before it alone"),
        (Both(), "nothing that could take it in stands right before it alone"),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), "behind ReLU, which multiplies by no weight"),
        (nn.Sequential(nn.Conv2d(3, 3, 1), More(3)), "More may do more than normalize"),
        (nn.Sequential(nn.Conv2d(3, 3, 1), rn.SwitchNorm2d(3)), "SwitchNorm2d may do more than normalize"),
        (nn.Sequential(nn.Conv2d(3, 3, 1), rn.PowerNorm(3)), "PowerNorm may do more than normalize"),
        (nn.Sequential(weight_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3)), "is computed"),
        (hooked(), "Conv2d has hooks"),
        (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm2d(3)), "its statistics are not those of the 3 channels"),
        (nn.Sequential(nn.Conv2d(3, 3, 1), rn.BatchNorm(3, axis=-1)), "its statistics are not those of the 3 channels"),
    ],
)
def test_what_is_left_alone(model: nn.Module, why: str) -> None:
    trained(model)
    folded, report = rn.fold(model)
    assert report.folded == ()
    assert why in report.left[0][1]
    x = draw(2, 3, 3, 3)
    assert torch.equal(copy.deepcopy(model).eval()(x), folded(x))


def test_a_layer_in_two_places() -> None:
    model = trained(shared())
    folded, report = rn.fold(model)
    assert not report.folded
    assert difference(model, folded, draw(2, 3, 3, 3)) == 0


def test_dtype_device_and_gradients_stay() -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))).to(torch.bfloat16)
    model.requires_grad_(False)
    folded, _ = rn.fold(model)
    assert folded[0].bias.dtype == folded[0].weight.dtype == torch.bfloat16
    assert not folded[0].bias.requires_grad


def test_a_folded_model_exports_and_saves(tmp_path: Any) -> None:
    folded, _ = rn.fold(trained(nn.Sequential(nn.Conv2d(3, 4, 3), rn.BatchNorm2d(4, activation="relu"))))
    x = draw(2, 3, 6, 6)
    program = torch.export.export(folded, (x,)).module()
    torch.testing.assert_close(program(x), folded(x))
    torch.save(folded, tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(x), folded(x))


class Sequence(nn.Module):
    """A batch norm over the steps of a sequence that has as many steps as channels."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": self.norm(self.linear(x)), "x": x}


def test_an_example_shows_what_cannot_be_seen() -> None:
    model = trained(Sequence())
    assert rn.fold(model, draw(3, 4))[1].folded
    with pytest.raises(SwapError, match=r"the folded model's output differs by .* from the model's"):
        rn.fold(model, draw(3, 5, 4))


def test_nothing_to_fold() -> None:
    with pytest.raises(SwapError, match="no norm with running statistics"):
        rn.fold(nn.Sequential(nn.Conv2d(3, 3, 1), nn.GroupNorm(1, 3)))
