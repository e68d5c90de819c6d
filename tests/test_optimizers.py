"""Optimizers: torch's steps against the formulas, step by step in float64, and their paths on test functions."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
import pytest
import torch
from torch import nn

from renorm.choices.optimizers import (
    FUNCTIONS,
    NAMES,
    OPTIMIZERS,
    build,
    draw_trajectory,
    trajectory,
)
from renorm.errors import StudyError

Vector = np.ndarray
Gradient = Callable[[Vector], Vector]
Path = Iterator[Vector]


def ravine(place: Vector) -> Vector:
    return place * [1.0, 50.0]


def rosenbrock(place: Vector) -> Vector:
    x, y = place
    return np.array([-2 * (1 - x) - 400 * x * (y - x**2), 200 * (y - x**2)])


def saddle(place: Vector) -> Vector:
    return np.array([place[0], place[1] ** 3 - place[1]])


GRADIENTS = {"ravine": ravine, "rosenbrock": rosenbrock, "saddle": saddle}

# The formulas, as loops; `rate` gives the learning rate of step t, from 0. Epsilon is torch's default, in the root
# where the literature has it there.


def sgd(x: Vector, g: Gradient, rate: Callable[[int], float]) -> Path:
    for t in range(10**6):
        x = x - rate(t) * g(x)
        yield x


def momentum(x: Vector, g: Gradient, rate: Callable[[int], float], mu: float = 0.9) -> Path:
    m = 0 * x
    for t in range(10**6):
        m = mu * m + rate(t) * g(x)
        x = x - m
        yield x


def momentum_of_torch(x: Vector, g: Gradient, rate: Callable[[int], float], mu: float = 0.9) -> Path:
    b = 0 * x
    for t in range(10**6):
        b = mu * b + g(x)
        x = x - rate(t) * b
        yield x


def nesterov(x: Vector, g: Gradient, rate: Callable[[int], float], mu: float = 0.9) -> Path:
    """The look-ahead points, which are torch's parameters."""
    m = 0 * x
    for t in range(10**6):
        m = mu * m + rate(t) * g(x - mu * m)
        x = x - m
        yield x - mu * m


def nesterov_of_torch(x: Vector, g: Gradient, rate: Callable[[int], float], mu: float = 0.9) -> Path:
    b = 0 * x
    for t in range(10**6):
        here = g(x)
        b = mu * b + here
        x = x - rate(t) * (here + mu * b)
        yield x


def adagrad(x: Vector, g: Gradient, rate: Callable[[int], float], eps: float = 1e-10, inside: bool = False) -> Path:
    r = 0 * x
    for t in range(10**6):
        here = g(x)
        r = r + here**2
        x = x - rate(t) / (np.sqrt(r + eps) if inside else np.sqrt(r) + eps) * here
        yield x


def adadelta(x: Vector, g: Gradient, rate: Callable[[int], float], rho: float = 0.9, eps: float = 1e-6) -> Path:
    squares, steps = 0 * x, 0 * x
    for t in range(10**6):
        here = g(x)
        squares = rho * squares + (1 - rho) * here**2
        step = -np.sqrt(steps + eps) / np.sqrt(squares + eps) * here
        steps = rho * steps + (1 - rho) * step**2
        x = x + rate(t) * step
        yield x


def rmsprop(
    x: Vector, g: Gradient, rate: Callable[[int], float], rho: float = 0.99, eps: float = 1e-8, inside: bool = False
) -> Path:
    squares = 0 * x
    for t in range(10**6):
        here = g(x)
        squares = rho * squares + (1 - rho) * here**2
        x = x - rate(t) / (np.sqrt(squares + eps) if inside else np.sqrt(squares) + eps) * here
        yield x


def adam(
    x: Vector,
    g: Gradient,
    rate: Callable[[int], float],
    decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Path:
    m, v = 0 * x, 0 * x
    for t in range(10**6):
        here = g(x)
        m = betas[0] * m + (1 - betas[0]) * here
        v = betas[1] * v + (1 - betas[1]) * here**2
        m_hat, v_hat = m / (1 - betas[0] ** (t + 1)), v / (1 - betas[1] ** (t + 1))
        x = x - rate(t) * decay * x - rate(t) * m_hat / (np.sqrt(v_hat) + eps)
        yield x


LOOPS = {
    "sgd": (sgd, {}, 1e-3),
    "momentum": (momentum_of_torch, {}, 5e-4),
    "nesterov": (nesterov_of_torch, {}, 5e-4),
    "adagrad": (adagrad, {}, 0.3),
    "adadelta": (adadelta, {}, 1.0),
    "rmsprop": (rmsprop, {}, 0.02),
    "adam": (adam, {}, 0.05),
    "adamw": (adam, {"decay": 0.01}, 0.05),
}


def constant(lr: float) -> Callable[[int], float]:
    return lambda t: lr


def of_torch(name: str, function: str, lr: float, steps: int, rate: Callable[[int], float] | None = None) -> Vector:
    """Torch's path, with the learning rate set anew before each step."""
    chosen = FUNCTIONS[function]
    place = nn.Parameter(torch.tensor(chosen.start, dtype=torch.float64))
    optimizer = build(name, [place], lr)
    path = []
    for t in range(steps):
        if rate is not None:
            optimizer.param_groups[0]["lr"] = rate(t)
        optimizer.zero_grad()
        chosen.value(*place).backward()
        optimizer.step()
        path.append(place.detach().numpy().copy())
    return np.array(path)


def test_every_optimizer_has_its_loop() -> None:
    assert set(LOOPS) == set(OPTIMIZERS) == set(NAMES)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_torch_takes_the_steps_of_the_formula(name: str, function: str) -> None:
    loop, options, lr = LOOPS[name]
    start = np.array(FUNCTIONS[function].start)
    expected = np.array(list(islice(loop(start, GRADIENTS[function], constant(lr), **options), 60)))
    path = trajectory(name, function, steps=60, lr=lr)
    assert path.shape == (61, 2)
    assert path.dtype == np.float64
    assert path[0].tolist() == list(FUNCTIONS[function].start)
    np.testing.assert_allclose(path[1:], expected, rtol=1e-9, atol=1e-12)
    assert np.abs(path[-1] - path[0]).max() > 1e-3  # they moved


@pytest.mark.parametrize("name", ["momentum", "nesterov"])
def test_the_taught_formula_is_the_same_path_while_the_rate_is_constant(name: str) -> None:
    taught = {"momentum": momentum, "nesterov": nesterov}[name]
    start = np.array(FUNCTIONS["rosenbrock"].start)
    expected = np.array(list(islice(taught(start, rosenbrock, constant(5e-4)), 60)))
    np.testing.assert_allclose(trajectory(name, "rosenbrock", 60, 5e-4)[1:], expected, rtol=1e-9)


def test_the_rate_is_outside_torchs_buffer() -> None:
    """Lowered a hundredfold, torch's next step is that much smaller; the formula's buffer carries the old rate on."""

    def lowered(t: int) -> float:
        return 5e-3 if t < 10 else 5e-5

    start = np.array(FUNCTIONS["ravine"].start)
    torchs = of_torch("momentum", "ravine", 5e-3, 12, lowered)
    outside, inside = (
        np.array(list(islice(loop(start, ravine, lowered), 12))) for loop in (momentum_of_torch, momentum)
    )
    np.testing.assert_allclose(torchs, outside, rtol=1e-12)
    steps = [np.abs(np.diff(path, axis=0)) for path in (outside, inside)]
    assert (steps[0][9] < 0.05 * steps[0][8]).all()
    assert (steps[1][9] > 0.5 * steps[1][8]).all()


@pytest.mark.parametrize(("name", "loop", "lr"), [("adagrad", adagrad, 0.3), ("rmsprop", rmsprop, 0.02)])
def test_where_epsilon_stands_shows_at_small_gradients_only(name: str, loop: Callable[..., Path], lr: float) -> None:
    start = np.array(FUNCTIONS["ravine"].start)
    inside = np.array(list(islice(loop(start, ravine, constant(lr), inside=True), 20)))
    np.testing.assert_allclose(trajectory(name, "ravine", 20, lr)[1:], inside, rtol=1e-4, atol=1e-6)
    tiny = [next(loop(np.full(2, 1e-7), lambda x: x, constant(lr), inside=where)) for where in (False, True)]
    assert np.abs(tiny[0] - tiny[1]).max() > 0.1 * lr


def test_adagrads_step_has_g_and_not_its_square() -> None:
    """The first step is lr whatever the gradient, as g / sqrt(g^2) is 1; with g^2 it would grow with g."""
    first = trajectory("adagrad", "ravine", 1, 0.01)[1] - FUNCTIONS["ravine"].start
    np.testing.assert_allclose(first, [0.01, -0.01], rtol=1e-8)


def test_rmsprops_step_is_subtracted() -> None:
    path = trajectory("rmsprop", "ravine", 30, 0.05)
    assert (np.abs(path[-1]) < np.abs(path[0])).all()


def test_batches_of_all_of_one_and_between() -> None:
    """SGD on a batch steps along the mean of its samples' gradients: over all of them, the gradient of the whole."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 2)), rng.normal(size=8)
    for size in (8, 1, 4):
        weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        optimizer = build("sgd", [weight], 0.1)
        expected = np.zeros(2)
        for begin in range(0, 8, size):
            rows = slice(begin, begin + size)
            optimizer.zero_grad()
            ((torch.from_numpy(x[rows]) @ weight - torch.from_numpy(y[rows])) ** 2).mean().backward()
            optimizer.step()
            gradients = [2 * (x[i] @ expected - y[i]) * x[i] for i in range(8)[rows]]
            expected = expected - 0.1 * sum(gradients) / size
        np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_every_entry_is_whole(name: str) -> None:
    entry = OPTIMIZERS[name]
    for text in (entry.formula, entry.torch):
        assert text.count("{") == text.count("}")
        assert r"\theta_{t+1} =" in text
    assert (entry.formula == entry.torch) == entry.difference.startswith("none")
    assert entry.source


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_minima_are_minima(name: str) -> None:
    function = FUNCTIONS[name]
    for place in function.minima:
        np.testing.assert_allclose(GRADIENTS[name](np.array(place)), 0, atol=1e-12)
        at = torch.tensor(place, dtype=torch.float64)
        hessian = torch.autograd.functional.hessian(lambda p: function.value(*p), at)
        assert torch.linalg.eigvalsh(hessian).min() > 0
    np.testing.assert_allclose(GRADIENTS["saddle"](np.zeros(2)), 0)
    hessian = torch.autograd.functional.hessian(
        lambda p: FUNCTIONS["ravine"].value(*p), torch.zeros(2, dtype=torch.float64)
    )
    assert torch.linalg.cond(hessian).item() == pytest.approx(50)


def test_what_the_pictures_are_for() -> None:
    """Down a ravine at the same rate, momentum is ahead of plain descent; beside a saddle, Adam is off first."""
    far = {name: np.abs(trajectory(name, "ravine", 60, 0.01)[-1, 0]) for name in ("sgd", "momentum", "nesterov")}
    assert far["nesterov"] < 0.5 * far["sgd"]
    assert far["momentum"] < 0.5 * far["sgd"]
    off = {name: np.argmax(trajectory(name, "saddle", 200, 0.05)[:, 1] > 0.5) for name in ("sgd", "momentum", "adam")}
    assert 0 < off["adam"] < off["momentum"] < off["sgd"]


def test_a_path_needs_no_gradients_switched_on_and_draws_no_random_numbers() -> None:
    state = torch.get_rng_state()
    with torch.no_grad():
        path = trajectory("adam", "saddle", 5, 0.1)
    assert np.abs(np.diff(path, axis=0)).max() > 0
    assert torch.equal(torch.get_rng_state(), state)


SVG = "{http://www.w3.org/2000/svg}"


def drawn(svg: str) -> tuple[list[np.ndarray], int]:
    """The paths in px (the thick lines), and how many contours there are."""
    (plane,) = ElementTree.fromstring(svg).findall(f"{SVG}svg")
    lines = plane.findall(f"{SVG}path")[1:]
    thick = [line.get("d") for line in lines if line.get("stroke-width") == "2"]
    return [np.array([p.split() for p in d[1:].split("L")], float) for d in thick], len(lines) - len(thick)


def test_the_picture_shows_the_paths_over_contours() -> None:
    paths, num_contours = drawn(draw_trajectory(["sgd", "adam"], "ravine", 30, {"sgd": 0.01, "adam": 0.1}).svg)
    assert [len(path) for path in paths] == [31, 31]
    assert num_contours == 12
    expected = trajectory("adam", "ravine", 30, 0.1)
    # 300 px for x in [-2.5, 1], 220 px for y in [-1, 1], downwards
    np.testing.assert_allclose(paths[1][:, 0], (expected[:, 0] + 2.5) / 3.5 * 300, atol=0.06)
    np.testing.assert_allclose(paths[1][:, 1], (1 - expected[:, 1]) / 2 * 220, atol=0.06)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_optimizer_can_be_drawn_on_every_function(function: str) -> None:
    svg = draw_trajectory(NAMES, function, 20, 1e-3).svg
    assert all(f"{name}, lr 0.001" in svg for name in NAMES)
    ElementTree.fromstring(svg)


def test_a_path_that_diverges_is_drawn_as_far_as_it_goes() -> None:
    path = trajectory("sgd", "rosenbrock", 40, 0.5)
    assert not np.isfinite(path[-1]).all()
    svg = draw_trajectory("sgd", "rosenbrock", 40, 0.5).svg
    ElementTree.fromstring(svg)
    assert "nan" not in svg
    assert "inf" not in svg


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: trajectory("adan"), "optimizer must be one of sgd, .*did you mean 'adam'"),
        (lambda: trajectory("adam", "rosenbrok"), "function must be one of .*did you mean 'rosenbrock'"),
        (lambda: trajectory("adam", steps=0), "at least 1 step; got steps=0"),
        (lambda: trajectory("adam", lr=math.nan), "learning rate must be a positive finite number; got nan"),
        (lambda: draw_trajectory([]), "at least one optimizer; got none"),
        (lambda: draw_trajectory(["sgd", "adam"], lr={"sgd": 0.1}), "got none for adam: write a number"),
    ],
)
def test_what_cannot_be_drawn_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        call()
