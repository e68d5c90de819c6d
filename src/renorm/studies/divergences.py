"""Divergences between distributions that move apart: which of them still pulls (Arjovsky et al. 2017)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributions import Normal, Uniform

from renorm.measures.divergences import js, kl, wasserstein
from renorm.studies.picture import Plot, draw
from renorm.studies.replication import Claim, Plan, Published, Replication, Table
from renorm.studies.rows import Condition, Rows, Value

_NAMES = {"kl": "KL", "js": "JS", "wasserstein": "Wasserstein"}
_FAMILIES = {"points": "Two points", "uniform": "U(0, 1)", "normal": "N(0, 1)", "samples": "Draws from N(0, 1)"}
_SHIFTS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
_START = 4.0  # where the descent that is judged begins
_STEPS, _RATE = 100, 0.1  # of the descent


def measure(condition: Condition, seed: int) -> Mapping[str, Value]:
    """Each distance at one shift, its derivative by the shift, and where gradient descent on it ends."""
    family, shift, num = str(condition["family"]), float(condition["shift"]), int(condition["draws"])
    draws = torch.randn(2, num, dtype=torch.float64)
    found: dict[str, Value] = {}
    for name in _NAMES:
        value, gradient = _pull(family, name, shift, draws)
        found |= {name: value, f"{name}_gradient": gradient}
        place = shift
        for _ in range(_STEPS):
            step = _RATE * _pull(family, name, place, draws)[1]
            if step == 0:
                break
            place -= step
        found[f"{name}_left"] = abs(place)
    return found


def _pull(family: str, name: str, shift: float, draws: Tensor) -> tuple[float, float]:
    """A distance, and its derivative by the shift; 0 where it does not depend on it."""
    s = torch.tensor(shift, dtype=torch.float64, requires_grad=True)
    value = distance(family, name, s, draws)
    (gradient,) = torch.autograd.grad(value, s, allow_unused=True) if value.requires_grad else (None,)
    return value.item(), 0.0 if gradient is None else gradient.item()


def distance(family: str, name: str, shift: Tensor, draws: Tensor) -> Tensor:
    """One of the three between a distribution of this family and the same, moved by the shift."""
    zero = torch.zeros_like(shift)
    divergence = kl if name == "kl" else js
    if family == "points":
        if name == "wasserstein":
            return wasserstein(zero[None], shift[None], given="samples")
        return divergence(zero[None], shift.detach()[None], given="samples")
    if family == "samples":
        if name == "wasserstein":
            return wasserstein(draws[0], draws[1] + shift, given="samples")
        return divergence(draws[0], (draws[1] + shift).detach(), given="samples")
    if name == "wasserstein":
        make = Normal if family == "normal" else _unit
        return wasserstein(make(zero, 1.0), make(shift, 1.0), given="distribution")
    if family == "normal":
        x = torch.linspace(-20, 30, 5001, dtype=torch.float64)
        return divergence(-(x**2) / 2, -((x - shift) ** 2) / 2, given="logits")
    # Between these edges both densities are constant.
    edges = torch.stack([zero, zero + 1, shift, shift + 1]).sort().values
    left, right = edges[:-1], edges[1:]
    p, q = (torch.where((left >= low) & (right <= low + 1), right - left, 0) for low in (zero, shift))
    return divergence(p, q, given="probs")


def _unit(low: Tensor, width: float) -> Uniform:
    return Uniform(low, low + width)


def judge(rows: Rows) -> tuple[Claim, ...]:
    """What theory says of points and uniforms, of normals far apart, and of draws."""
    apart = [shift for shift in _SHIFTS if shift > 0]
    points = [_mean(rows, family="points", shift=shift) for shift in apart]
    beyond = [_mean(rows, family="uniform", shift=shift) for shift in apart if shift > 1]
    far = _mean(rows, family="normal", shift=8.0)
    drawn = {shift: _mean(rows, family="samples", shift=shift) for shift in _SHIFTS}
    off = max(abs(found["wasserstein"] - shift) for shift, found in drawn.items() if shift >= 1)
    left = {name: _mean(rows, family="uniform", shift=_START)[f"{name}_left"] for name in _NAMES}
    return (
        Claim(
            "two points: KL is infinite, JS log 2 and Wasserstein the distance, however near they are",
            f"KL {points[0]['kl']}, JS {points[0]['js']:.6f}, Wasserstein {points[0]['wasserstein']:g} at {apart[0]:g}",
            all(
                one["kl"] == math.inf and _near(one["js"], math.log(2)) and _near(one["wasserstein"], shift)
                for one, shift in zip(points, apart, strict=True)
            ),
        ),
        Claim(
            "uniforms that do not overlap: KL and JS have gradient 0, Wasserstein has 1",
            ", ".join(f"{title} {beyond[0][f'{name}_gradient']:.4f}" for name, title in _NAMES.items()),
            all(
                one["kl_gradient"] == one["js_gradient"] == 0 and _near(one["wasserstein_gradient"], 1)
                for one in beyond
            ),
        ),
        Claim(
            f"gradient descent from {_START:g}: on Wasserstein it ends within 0.1 of the target, on KL and JS where it "
            "began",
            ", ".join(f"{title} {left[name]:.2f}" for name, title in _NAMES.items()),
            left["wasserstein"] <= 0.1 + 1e-9 and left["kl"] == left["js"] == _START,
        ),
        Claim(
            "normals 8 deviations apart: JS has a gradient below 0.001, Wasserstein 1",
            f"JS {far['js_gradient']:.6f}, Wasserstein {far['wasserstein_gradient']:.4f}",
            abs(far["js_gradient"]) < 1e-3 and _near(far["wasserstein_gradient"], 1),
        ),
        Claim(
            "draws: KL is infinite and JS log 2 at every shift, 0 too; Wasserstein is within 0.15 of the shift from 1 "
            "on",
            f"JS {min(one['js'] for one in drawn.values()):.4f} at least, Wasserstein off by at most {off:.3f}",
            all(one["kl"] == math.inf and _near(one["js"], math.log(2)) for one in drawn.values()) and off <= 0.15,
        ),
    )


def _mean(rows: Rows, **where: object) -> dict[str, float]:
    names = [f"{name}{kind}" for name in _NAMES for kind in ("", "_gradient", "_left")]
    return {name: float(rows.values(name, **where).mean()) for name in names}


def _near(a: float, b: float) -> bool:
    return abs(a - b) < 1e-4


def tables(rows: Rows) -> tuple[Table, ...]:
    """Distances with their gradients."""
    made = []
    for family, title in _FAMILIES.items():
        lines = []
        for shift in _SHIFTS:
            found = _mean(rows, family=family, shift=shift)
            cells = (f"{_number(found[name])}, {_number(found[f'{name}_gradient'])}" for name in _NAMES)
            lines.append((f"{shift:g}", *cells))
        made.append(Table(f"{title}: distance in nats or in units of the shift, and its gradient",
                          ("shift", *_NAMES.values()), tuple(lines)))  # fmt: skip
    return tuple(made)


def _number(value: float) -> str:
    return "∞" if value == math.inf else f"{value + 0.0:.3g}" if abs(value) >= 5e-4 else "0"


def draw_rows(rows: Rows) -> str:
    """The distances against the shift; where one is infinite it leaves at the top."""
    plots = []
    for family in ("uniform", "normal", "samples"):
        curves = {
            title: [(shift, _mean(rows, family=family, shift=shift)[name]) for shift in _SHIFTS if shift <= 4]
            for name, title in _NAMES.items()
        }
        plots.append(Plot(f"{_FAMILIES[family]}: distance by shift", curves))
    return draw(plots, "JS is flat where two distributions do not overlap, Wasserstein grows with the shift")


def reading(rows: Rows) -> str:
    """What follows."""
    normal = _mean(rows, family="normal", shift=8.0)
    drawn = _mean(rows, family="samples", shift=0.0)
    return (
        "KL and JS compare masses at the same place and know nothing of how far two places are from each other. Where "
        "nothing overlaps they have no gradient, and a model that they are to train has nowhere to go.\n\nThat KL's "
        "gradient vanishes far away is **not true of densities that are nowhere 0**: that of two normals "
        f"grows with the shift ({_number(normal['kl_gradient'])} at 8), and descent on it arrives. JS is bounded by "
        "log 2 and does lose its gradient.\n\nDraws of a continuous distribution have no value in common, so that KL "
        "and JS of draws are infinite and log 2 even between equal distributions: fit densities first, or bin. "
        "Wasserstein of draws is not 0 there either "
        f"({_number(drawn['wasserstein'])} here): it falls with the number of draws, slowly in many dimensions."
    )


def _conditions(draws: int) -> tuple[Condition, ...]:
    return tuple({"family": family, "shift": shift, "draws": draws} for family in _FAMILIES for shift in _SHIFTS)


REPLICATION = Replication(
    name="divergences",
    title="Divergences between distributions that move apart",
    question="Why do KL and JS give no gradient between distributions far apart, and Wasserstein does?",
    published=(
        Published(
            "Of two parallel lines at a distance θ, Wasserstein is |θ|, JS log 2 and KL infinite for every θ but 0: "
            "only the first has a gradient that brings them together",
            "Arjovsky et al. 2017, Wasserstein GAN, arXiv:1701.07875, example 1",
        ),
    ),
    protocol=(
        "A distribution and the same one moved by a shift: two points, two uniforms of width 1, two normals of "
        "deviation 1 (KL and JS as sums over a grid of step 0.01), and draws of two normals. "
        "`renorm.measures.divergences` gives KL, JS and the Wasserstein distance of order 1, autograd the derivatives "
        "by the shift. Then 100 steps of gradient descent on the shift, with a learning rate of 0.1. Only draws "
        "depend on the seed."
    ),
    quick=Plan(_conditions(500), 3, "500 draws, 3 seeds"),
    minutes=1,
    full=Plan(_conditions(2000), 8, "2,000 draws, 8 seeds"),
    measure=measure,
    judge=judge,
    tables=tables,
    draw=draw_rows,
    reading=reading,
)
