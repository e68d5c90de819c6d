"""Folding: the same outputs with fewer layers, and what must be left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
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
        (nn.Sequential(rn.CosineConv2d(3, 3, 1), nn.BatchNorm2d(3)), "CosineConv2d, which may do more"),
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


class Convolved(nn.Module):
    """A convolution and its norm, and one thing more."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Any:
        return self.norm(self.conv(x))


class Tied(Convolved):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(3, 3, 1)
        self.other.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.norm(self.conv(x)))


class ReadsWeight(Convolved):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) * self.conv.weight.sum()


class ReadsStatistics(Convolved):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) - self.norm.running_mean[:, None, None]


class ReadsWithoutSkip(Convolved):
    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + (y if skip is None else skip)


class ReadsInEvaluation(Convolved):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) if self.training else self.norm(y) + y


class Apart(Untraceable):
    """Takes what is between a convolution and its norm out of a Sequential."""

    def forward(self, x: Tensor) -> Tensor:
        between = self.body[:1](x)
        return super().forward(x) + between.mean((1, 2, 3))[:, None]


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Tied(), "conv shares a parameter with another layer"),
        (ReadsWeight(), "conv.weight is read by itself"),
        (ReadsStatistics(), "norm.running_mean is read by itself"),
        (ReadsWithoutSkip(), "nothing that could take it in"),
        (ReadsInEvaluation(), "nothing that could take it in"),
        (Apart(), "torch.fx cannot trace the model: give an example"),
    ],
)
def test_what_else_reads_a_layer(model: nn.Module, why: str) -> None:
    trained(model)
    folded, report = rn.fold(model)
    assert not report.folded
    assert why in report.left[0][1]
    x = draw(2, 3, 4, 4)
    assert torch.equal(copy.deepcopy(model).eval()(x), folded(x))


def test_an_activation_in_two_places_of_a_sequential() -> None:
    model = trained(Untraceable())
    act = nn.ReLU()
    model.body = trained(nn.Sequential(nn.Conv2d(3, 4, 1), act, nn.Conv2d(4, 4, 1), act, nn.BatchNorm2d(4)))
    folded, report = rn.fold(model, draw(2, 3, 4, 4))
    assert not report.folded
    assert difference(model, folded, draw(2, 3, 4, 4)) == 0


@dataclass
class Output:
    """What a model may return."""

    y: Tensor
    name: str = "y"
    none: None = None


class Returns(nn.Module):
    """Batch norm over the channels of a sequence that fits the steps as well, in an output of some kind."""

    def __init__(self, kind: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.norm, self.kind = nn.Linear(4, 5), nn.BatchNorm1d(5), kind

    def forward(self, x: Tensor) -> Any:
        return self.kind(self.norm(self.linear(x)))


@pytest.mark.parametrize("kind", [Output, lambda y: {"n": "y", "y": [y, 1]}, lambda y: y.masked_fill(y > 1, torch.inf)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_of_any_kind_are_compared(kind: Callable[[Tensor], Any], dtype: torch.dtype) -> None:
    model = trained(Returns(kind)).to(dtype)
    assert rn.fold(model, draw(3, 4).to(dtype))[1].folded
    with pytest.raises(SwapError, match="the folded model's output differs by"):
        rn.fold(model, draw(3, 5, 4).to(dtype))


def test_an_output_without_tensors() -> None:
    with pytest.raises(SwapError, match="no tensor was found in the output on `example`"):
        rn.fold(trained(Returns(str)), draw(3, 4))


def test_a_lazy_layer() -> None:
    with pytest.raises(SwapError, match="0 has no shape yet"):
        rn.fold(nn.Sequential(nn.LazyConv2d(3, 1), nn.BatchNorm2d(3)))


@pytest.mark.parametrize("change", [rn.fold, lambda model: rn.swap(model, "batch -> group(1)")])
def test_a_model_that_is_wrapped_for_data_parallelism(change: Any) -> None:
    """Its reducer would go on with the parameters of the layers that are gone."""
    model: Any = object.__new__(nn.parallel.DistributedDataParallel)  # as it stands, without its processes
    nn.Module.__init__(model)
    model.module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(SwapError, match=r"pass model\.module, and wrap the copy"):
        change(model)
    assert change(model.module)
