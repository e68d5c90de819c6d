"""A validation MSE below that of training, at a far lower correlation: how it comes about."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LinearRegression

from renorm.studies.household import household, windows
from renorm.studies.picture import Plot, draw, points
from renorm.studies.replication import Claim, Plan, Published, Replication, Table
from renorm.studies.rows import Condition, Rows, Value

Array = npt.NDArray[np.float64]

_SIGNAL = 0.5  # slope of the one column that says something; the noise has variance 1
_DEVIATIONS = (3.0, 2.0, 1.0, 0.5, 1 / 3)  # of the validation, over that of the training
_CALM, _SAME = {"signal": _SIGNAL, "deviation": 1 / 3}, {"signal": _SIGNAL, "deviation": 1.0}
_NO_SIGNAL = {"signal": 0.0, "deviation": 1.0}
_ROWS, _HELD_OUT, _COLUMNS = 300, 300, 100  # of a made data set
_MEMORY = 0.5  # correlation of one step's noise with the next one's
_BLOCK, _RESAMPLES = 20, 200  # rows that the bootstrap keeps together; times it draws
_MONTH, _BAR, _SEEN, _NEXT = 30 * 1440, 5, 48, 6  # minutes of a month and of a bar; bars seen and forecast
_MONTHS = 5  # pairs of a series


@dataclass(frozen=True)
class Parts:
    r"""An MSE and what it is the sum of, exactly, with deviations s of all rows and the correlation r.

    $$\text{MSE} = (\bar f - \bar y)^2 + (s_f - s_y)^2 + 2 s_f s_y (1 - r)$$
    """

    mse: float
    bias: float  # squared difference of the means
    spread: float  # squared difference of the deviations
    shape: float  # what a correlation below 1 costs
    correlation: float
    deviation: float  # of the target

    @property
    def share(self) -> float:
        """The MSE over the target's variance: 1 is a forecast of the mean."""
        return self.mse / self.deviation**2


def parts(forecast: Array, truth: Array) -> Parts:
    """The decomposition.

    >>> parts(np.array([1.0, 2.0]), np.array([1.0, 4.0]))
    Parts(mse=2.0, bias=1.0, spread=1.0, shape=0.0, correlation=1.0, deviation=1.5)
    """
    f, y = float(forecast.std()), float(truth.std())
    both = float(np.mean((forecast - forecast.mean()) * (truth - truth.mean())))
    return Parts(
        mse=float(np.mean((forecast - truth) ** 2)),
        bias=float(forecast.mean() - truth.mean()) ** 2,
        spread=(f - y) ** 2,
        shape=2 * (f * y - both),
        correlation=both / (f * y) if f * y else 0.0,
        deviation=y,
    )


def resampled(forecast: Array, truth: Array, random: np.random.Generator) -> tuple[Array, Array]:
    """MSE and correlation of resamples that keep blocks of neighbouring rows together: (resamples,) each."""
    blocks = -(-len(truth) // _BLOCK)
    starts = random.integers(0, len(truth) - _BLOCK + 1, (_RESAMPLES, blocks, 1))
    rows = (starts + np.arange(_BLOCK)).reshape(_RESAMPLES, -1)[:, : len(truth)]
    f, y = forecast[rows], truth[rows]
    centred = [one - one.mean(1, keepdims=True) for one in (f, y)]
    sizes = [np.sqrt(np.sum(one**2, 1)) for one in centred]
    correlation = np.sum(centred[0] * centred[1], 1) / np.maximum(sizes[0] * sizes[1], 1e-300)
    return np.mean((f - y) ** 2, 1), correlation


def measure(condition: Condition, seed: int) -> Mapping[str, Value]:
    """Of made data, means over the data sets; of the household, a value for each series and pair of months."""
    random = np.random.default_rng(seed)
    if condition["part"] == "household":
        found = [_compare(*pair, random) for series in household() for pair in _months(series)]
        return {name: [one[name] for one in found] for name in found[0]}
    signal, deviation = float(condition["signal"]), float(condition["deviation"])
    found = [_compare(*_made(signal, deviation, random), random) for _ in range(int(condition["sets"]))]
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


Pair = tuple[Array, Array, Array, Array]  # training columns and target, validation columns and target


def _compare(x: Array, y: Array, x_new: Array, y_new: Array, random: np.random.Generator) -> dict[str, float]:
    """Both halves of a least-squares forecast: its parts, whether it looks like a bug, and what resamples say."""
    model = LinearRegression().fit(x, y)
    training, validation = parts(model.predict(x), y), parts(model.predict(x_new), y_new)
    mse, correlation = resampled(model.predict(x_new), y_new, random)
    mse_before, correlation_before = resampled(model.predict(x), y, random)
    low, high = np.quantile(correlation, (0.025, 0.975))
    odd = validation.mse < training.mse and validation.correlation < training.correlation
    sure = np.quantile(mse - mse_before, 0.975) < 0 and np.quantile(correlation - correlation_before, 0.975) < 0
    error = max(abs(one.bias + one.spread + one.shape - one.mse) / one.mse for one in (training, validation))
    return {
        **{f"training_{name}": value for name, value in asdict(training).items()},
        **{f"validation_{name}": value for name, value in asdict(validation).items()},
        "training_share": training.share,
        "validation_share": validation.share,
        "odd": float(odd),
        "sure": float(odd and sure),
        "odd_share": float(odd and validation.share < training.share),
        "covers_0": float(low <= 0 <= high),
        "error": error,
    }


def _made(signal: float, deviation: float, random: np.random.Generator) -> Pair:
    """One column of a hundred says something of the target; the noise remembers a little."""
    rows = _ROWS + _HELD_OUT
    x = random.standard_normal((rows, _COLUMNS))
    noise = random.standard_normal(rows) * np.sqrt(1 - _MEMORY**2)
    for row in range(1, rows):
        noise[row] += _MEMORY * noise[row - 1]
    y = noise + signal * x[:, 0]
    x[_ROWS:] *= deviation  # what is seen of a calm time is calm, too
    y[_ROWS:] *= deviation
    return x[:_ROWS], y[:_ROWS], x[_ROWS:], y[_ROWS:]


def _months(power: Array) -> list[Pair]:
    """A month trained on, and the next one: the mean power of half an hour from the four hours before."""
    cut = []
    for begin in range(0, len(power) - _MONTH + 1, _MONTH):
        bars = power[begin : begin + _MONTH].reshape(-1, _BAR).mean(1)
        rows = windows(bars, _SEEN + _NEXT, _NEXT)
        cut.append((rows[:, :_SEEN], rows[:, _SEEN:].mean(1)))
    return [(*training, *validation) for training, validation in itertools.pairwise(cut)]


def judge(rows: Rows) -> tuple[Claim, ...]:
    """What must hold of the sum, of the made data, and of the household."""
    error = max(float(np.max(row.values["error"])) for row in rows)
    odd = [rows.mean("odd", **case).share() for case in (_CALM, _SAME)]
    by_share = rows.mean("odd_share", **_CALM).share()
    covers = rows.mean("covers_0", **_NO_SIGNAL).share()
    fitted = rows.mean("training_correlation", **_NO_SIGNAL)
    pairs = [_pairs(rows, name) for name in ("odd", "validation_deviation", "training_deviation")]
    calmer = pairs[0] * (pairs[1] < pairs[2])
    return (
        Claim(
            "Bias, spread and correlation add up to the MSE, to 12 digits",
            f"off by at most {error:.0e} of it",
            error <= 1e-12,
        ),
        Claim(
            "Validation MSE below training MSE at a lower correlation: at least 90% of made data sets whose validation "
            "is calm, at most 5% of those where it is like the training",
            ", ".join(one.text(1, 100, "%") for one in odd),
            odd[0].mean >= 0.9 and odd[1].mean <= 0.05,
        ),
        Claim(
            "Divided by the target's variance, the MSE of at most 1% of the calm ones still disagrees with the "
            "correlation",
            by_share.text(1, 100, "%"),
            by_share.mean <= 0.01,
        ),
        Claim(
            "Without any signal training correlates at 0.4 or more, and the validation's bootstrap interval has 0 in "
            "85 to 99% of data sets",
            f"{fitted.text(2)}; {covers.text(1, 100, '%')}",
            fitted.mean >= 0.4 and 0.85 <= covers.mean <= 0.99,
        ),
        Claim(
            "The household's power has it as well, and always where the validation month's deviation is lower",
            f"{int(pairs[0].sum())} of {len(pairs[0])} pairs of months, {int(calmer.sum())} of them with a lower one",
            bool(pairs[0].sum() > 0 and calmer.sum() == pairs[0].sum()),
        ),
    )


def _pairs(rows: Rows, name: str) -> Array:
    """Of the household: by series and month; the seeds draw only the bootstrap."""
    return np.asarray(rows.values(name, part="household")[0])


def tables(rows: Rows) -> tuple[Table, ...]:
    """The parts of the made data, and the household's odd pairs."""
    made: list[tuple[str, ...]] = []
    for signal, scales in ((_SIGNAL, _DEVIATIONS), (0.0, (1.0,))):
        for half, scale in [("training", 1.0), *(("validation", scale) for scale in scales)]:
            names = (f"{half}_{name}" for name in ("mse", "bias", "spread", "shape", "share", "correlation"))
            numbers = [f"{rows.mean(name, signal=signal, deviation=scale).mean:.3f}" for name in names]
            made.append((f"{signal:g}", half, f"{scale:.2g}", *numbers))
    sure = rows.values("sure", part="household").sum(1).mean()
    real: list[tuple[str, ...]] = []
    for index in np.flatnonzero(_pairs(rows, "odd")):
        series, month = divmod(int(index), _MONTHS)
        halves = [
            " → ".join(f"{_pairs(rows, f'{half}_{name}')[index]:.3g}" for half in ("training", "validation"))
            for name in ("mse", "correlation", "deviation", "share")
        ]
        real.append((str(series + 1), f"{month + 1} → {month + 2}", *halves))
    return (
        Table(
            "Made data, means: the MSE is the sum of bias, spread and correlation's part",
            (
                "slope",
                "half",
                "scale",
                "MSE",
                "bias",
                "spread",
                "correlation's part",
                "MSE over variance",
                "correlation",
            ),
            tuple(made),
        ),
        Table(
            "The household's pairs of months with a lower MSE and a lower correlation in validation, training → "
            f"validation. The block bootstrap is sure of both in {sure:.1f} of the {len(real)}, the mean over seeds",
            ("series", "months", "MSE", "correlation", "deviation", "MSE over variance"),
            tuple(real),
        ),
    )


def draw_rows(rows: Rows) -> str:
    """What the validation's deviation does to its MSE and its correlation."""

    def made(name: str) -> list[tuple[float, float]]:
        return points(_DEVIATIONS, [rows.mean(name, signal=_SIGNAL, deviation=value) for value in _DEVIATIONS])

    variance = (_pairs(rows, "validation_deviation") / _pairs(rows, "training_deviation")) ** 2
    mse = _pairs(rows, "validation_mse") / _pairs(rows, "training_mse")
    of_pairs = list(zip(variance.tolist(), mse.tolist(), strict=True))
    plots = [
        Plot(
            "made data: log10 MSE by log10 scale",
            {"training": made("training_mse"), "validation": made("validation_mse")},
            log_x=True,
            log_y=True,
        ),
        Plot(
            "made data: correlation by log10 scale",
            {"training": made("training_correlation"), "validation": made("validation_correlation")},
            log_x=True,
        ),
        Plot(
            "household: log10 MSE ratio by log10 variance ratio",
            {"pairs of months": of_pairs},
            log_x=True,
            log_y=True,
            joined=False,
        ),
    ]
    return draw(plots, "The MSE follows the validation's variance, the correlation does not")


def reading(rows: Rows) -> str:
    """What follows."""
    return (
        "It need not be a bug. An MSE is in the target's squared unit: a calmer validation has a lower one, however "
        "bad the forecast; a correlation has no unit, and an overfitted model's is lower outside the training. So "
        "compare the MSE over the target's variance, with the correlation beside it, and look at the three parts: bias "
        "(the level is off), spread (forecasts too bold or too timid), and what the correlation costs. Before a "
        "correlation is believed at all, see whether its block bootstrap interval has 0: without any signal the "
        "training's is high all the same. The household shows it in some pairs of months, most of them within what a "
        "bootstrap allows: there it is no finding at all. With the same variance in both halves a lower validation MSE "
        "at a lower correlation hardly occurs. Where it does, look for dropout or augmentation in the training's "
        "figure, for other scalers, and for a training loss that is a mean over an epoch in which the model improved."
    )


def _plan(sets: int, seeds: int) -> Plan:
    cases = (*({"signal": _SIGNAL, "deviation": deviation} for deviation in _DEVIATIONS), _NO_SIGNAL)
    conditions: list[Condition] = [{"part": "made", **case, "sets": sets} for case in cases]
    return Plan((*conditions, {"part": "household"}), seeds, f"{sets} data sets of each kind, {seeds} times")


REPLICATION = Replication(
    name="mse-and-correlation",
    title="A lower MSE with a lower correlation",
    question=(
        "The validation set's MSE is lower than the training set's, yet the correlation is far higher in training: is "
        "it a bug?"
    ),
    published=(
        Published(
            "An MSE is the sum of the squared difference of the means, the squared difference of the deviations, and "
            "twice the product of the deviations times one less the correlation",
            "Gupta, Kling, Yilmaz & Martinez 2009, Journal of Hydrology 377",
        ),
    ),
    protocol=(
        f"**Made data**: {_COLUMNS} standard normal columns, of which one has the slope {_SIGNAL} or 0; noise of "
        f"variance 1 whose neighbours correlate at {_MEMORY}. Least squares on {_ROWS} rows, {_HELD_OUT} after them "
        "for validation, whose columns and target are multiplied by a scale. **Household**: four series of power, 180 "
        f"days, in bars of {_BAR} minutes; least squares forecast the mean of the next {_NEXT} bars from the last "
        f"{_SEEN}, trained on a month of 30 days and judged on the next, for all 20 pairs. Intervals within a data "
        f"set are of a moving-block bootstrap, {_BLOCK} rows to a block, {_RESAMPLES} resamples."
    ),
    quick=_plan(50, 3),
    minutes=1,
    full=_plan(200, 5),
    measure=measure,
    judge=judge,
    tables=tables,
    draw=draw_rows,
    reading=reading,
)
