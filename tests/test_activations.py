"""Activations: what the registry says of each is what the layer does."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from renorm.choices import activations, picture
from renorm.choices.activations import ACTIVATIONS, NAMES, Activation, build, draw_activation
from renorm.errors import StudyError

EVERY = pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
ELEMENTWISE = pytest.mark.parametrize(
    "activation", [a for a in ACTIVATIONS.values() if a.elementwise], ids=[n for n in ACTIVATIONS if n != "softmax"]
)
# the kinks of all of them, and far out
POINTS = [-1e4, -700.0, -40.0, -6.0, -3.0, -1.0, -0.3, 0.0, 0.7, 1.0, 3.0, 6.0, 40.0, 700.0, 1e4]


def layer(activation: Activation) -> nn.Module:
    return activation.layer().double()


def gradient(activation: Activation, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(layer(activation)(x).sum(), x)[0]


@ELEMENTWISE
def test_the_slope_is_what_autograd_gives_kinks_and_far_ends_included(activation: Activation) -> None:
    x = torch.cat([torch.tensor(POINTS, dtype=torch.float64), torch.linspace(-9, 9, 400, dtype=torch.float64)])
    # torch's hardsigmoid has 1/6 in float32, and its softplus is linear from 20 on, where it lacks 2e-9
    atol = 6e-9 if activation.name == "hardsigmoid" else 3e-9
    torch.testing.assert_close(activation.slope(x), gradient(activation, x), rtol=1e-12, atol=atol)


def test_the_slope_of_softmax_is_its_jacobian() -> None:
    x = 3 * torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    jacobian = torch.func.vmap(torch.func.jacrev(layer(ACTIVATIONS["softmax"])))(x)
    torch.testing.assert_close(ACTIVATIONS["softmax"].slope(x), jacobian)


@EVERY
def test_values_fill_the_range_and_nothing_else(activation: Activation) -> None:
    x = torch.cat([torch.linspace(-5e5, 5e5, 100_001), torch.linspace(-8, 8, 160_001)]).double()
    y = layer(activation)(x if activation.elementwise else torch.stack([x, torch.zeros_like(x)], -1))
    for bound, reached in zip(activation.range, (y.min().item(), y.max().item()), strict=True):
        if math.isinf(bound):
            assert math.copysign(reached, bound) == reached
            assert abs(reached) > 1e3
        else:
            assert reached == pytest.approx(bound, abs=1e-5)


@EVERY
def test_it_saturates_where_it_says(activation: Activation) -> None:
    x = torch.linspace(-100, 100, 200_001, dtype=torch.float64)
    if activation.elementwise:
        slope = gradient(activation, x).abs()
    else:
        slope = activation.slope(torch.stack([x, torch.zeros_like(x)], -1))[:, 0, 0]
    steep = x[slope >= 0.01]
    low, high = activation.saturates
    if not len(steep):
        assert (low, high) == (math.inf, -math.inf)
        return
    assert steep.min().item() == pytest.approx(max(low, -100), abs=2e-3)
    assert steep.max().item() == pytest.approx(min(high, 100), abs=2e-3)


@EVERY
def test_the_gain_is_torchs_or_keeps_the_second_moment(activation: Activation) -> None:
    source = activation.gain_source
    if found := re.match(r"torch\.nn\.init\.calculate_gain\('(\w+)'\)", source):
        slope = {"leaky_relu": 0.01, "prelu": 0.25}.get(activation.name)
        assert activation.gain == nn.init.calculate_gain(found[1], slope)
        return
    if "output" in source:
        assert activation.gain == 1
        return
    z = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    with torch.no_grad():
        moment = torch.trapezoid(density * layer(activation)(z) ** 2, z).item()
    assert activation.gain == pytest.approx(moment**-0.5, abs=1e-4)


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "prelu", "identity"])
def test_a_deep_net_keeps_its_scale_at_that_gain(name: str) -> None:
    """What a gain is for; of activations that scale with their input (GELU's second moment drifts, layer by layer)."""
    generator = torch.Generator().manual_seed(0)
    activation = ACTIVATIONS[name]
    x = torch.randn(64, 512, generator=generator)
    for _ in range(30):
        weight = torch.randn(512, 512, generator=generator) * activation.gain / math.sqrt(512)
        x = activation.layer()(x).detach() @ weight.T
    assert 0.3 < x.pow(2).mean().item() < 3


@EVERY
def test_every_entry_is_whole(activation: Activation) -> None:
    assert activation.formula
    assert activation.derivative
    for text in (activation.formula, activation.derivative):
        assert text.count("{") == text.count("}")
    assert isinstance(build(activation.name), nn.Module)


def test_the_issues_activations_are_there() -> None:
    asked = "identity binary_step sigmoid tanh relu leaky_relu prelu elu selu gelu silu softplus softmax mish"
    assert set(asked.split()) <= set(ACTIVATIONS)


def test_compare_is_offered_what_suits_a_hidden_layer() -> None:
    assert set(NAMES) == {
        *("relu", "leaky_relu", "elu", "selu", "gelu", "silu", "mish", "softplus", "sigmoid", "tanh", "identity")
    }
    for name in NAMES:
        assert ACTIVATIONS[name].elementwise
        assert not list(build(name).parameters())


def test_building_draws_no_random_numbers() -> None:
    state = torch.get_rng_state()
    for name in ACTIVATIONS:
        build(name)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_binary_step_has_a_gradient_of_zero() -> None:
    x = torch.tensor([-2.0, -0.0, 0.0, 1e-30, math.nan], requires_grad=True)
    y = build("binary_step")(x)
    y.sum().backward()
    assert y.tolist()[:4] == [0, 1, 1, 1]
    assert math.isnan(y[4].item())
    assert torch.equal(x.grad[:4], torch.zeros(4))


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(StudyError, match="did you mean 'sigmoid'"):
        build("sigmod")
    with pytest.raises(StudyError, match="did you mean 'softmax'"):
        draw_activation(["relu", "sofmax"])
    with pytest.raises(StudyError, match="at least one activation; got none"):
        draw_activation([])


# the picture

SVG = "{http://www.w3.org/2000/svg}"


def curves(svg: str) -> list[list[np.ndarray]]:
    """For each panel, the unbroken pieces of each curve in px."""
    panels = ElementTree.fromstring(svg).findall(f"{SVG}svg")
    return [[_pieces(path.get("d")) for path in panel.findall(f"{SVG}path")[1:]] for panel in panels]


def _pieces(path: str) -> np.ndarray:
    return [np.array([p.split() for p in piece.split("L")], float) for piece in path.split("M")[1:]]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_can_be_drawn(name: str) -> None:
    drawing = draw_activation(name)
    assert [len(panel) for panel in curves(drawing.svg)] == [1, 1]
    assert name in drawing.svg
    assert "currentColor" in drawing.svg


def test_the_curves_are_f_and_its_slope() -> None:
    ((f,), (slope,)) = curves(draw_activation("tanh").svg)
    (f,), (slope,) = f, slope
    assert np.all(np.diff(f[:, 1]) <= 0)  # down the page is up
    assert slope[500, 1] == slope[:, 1].min()  # steepest at 0
    # 300 px for 10 units; f from -1 to 1 with 6% of space
    x, height = f[:, 0] / 30 - 5, 1.12 - f[:, 1] / 220 * 2.24
    np.testing.assert_allclose(height, np.tanh(x), atol=2e-3)


def test_a_jump_is_left_open() -> None:
    ((step,), (flat,)) = curves(draw_activation("binary_step").svg)
    assert [len(step), len(flat)] == [2, 1]
    ((smooth,), (kinked,)) = curves(draw_activation("relu").svg)
    assert [len(smooth), len(kinked)] == [1, 2]


def test_names_share_a_picture_and_save(tmp_path: Path) -> None:
    drawing = draw_activation(["relu", "softmax"])
    assert len({path for panel in curves(drawing.svg) for path in map(str, panel)}) == 4
    assert drawing.save(tmp_path / "a.svg").read_text(encoding="utf-8") == drawing._repr_svg_()
    assert drawing.save(tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.parametrize(("low", "high"), [(-5, 5), (0, 1), (-0.06, 1.06), (0.1, 0.1001), (-3e6, 7e6)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    marks = picture.ticks(low, high)
    assert 3 <= len(marks) <= 8
    assert low <= min(marks) <= max(marks) <= high


def test_contours_are_where_the_level_is() -> None:
    x, y = np.linspace(-2, 2, 81), np.linspace(-1, 1, 41)
    pieces = picture.contours(x, y, x**2 + 4 * y[:, None] ** 2, 1.0)
    assert len(pieces) > 50
    np.testing.assert_allclose(pieces[..., 0] ** 2 + 4 * pieces[..., 1] ** 2, 1, atol=5e-3)
    assert picture.contours(x, y, x + 0 * y[:, None], 9.0).shape == (0, 2, 2)


def test_nothing_of_torch_is_done_again() -> None:
    ours = [type(a.layer()).__name__ for a in ACTIVATIONS.values() if "renorm" in type(a.layer()).__module__]
    assert ours == ["BinaryStep"]
    assert "BinaryStep" in activations.__all__
