"""Many series: a model for each, one for all, or one that is told about each; and the size of the bars."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from sklearn.linear_model import RidgeCV

from renorm.choices import models
from renorm.comparison.series import Layout, read
from renorm.studies.household import household, windows
from renorm.studies.picture import Plot, draw, points
from renorm.studies.replication import Claim, Plan, Published, Replication, Table
from renorm.studies.rows import Condition, Interval, Rows, Value

Array = npt.NDArray[np.float64]

_WAYS = {"local": "a model for each", "pooled": "one for all", "static": "one for all, with static features"}
_MODELS = {"ridge": "linear", "mlp": "MLP"}
_DAYS = (4, 7, 14, 42)
_LAGS, _TEST_DAYS, _FULL = 36, 7, 50  # half hours seen, two days of 18; days of a test; days that a park must have
_SIZES = (200, 1000, 5000)
_BARS = {1: "1 minute", 5: "5 minutes"}
_PAST, _NEXT, _TESTED = 60, 5, 3000  # minutes seen and forecast; windows tested
_TRAINED_ON = 120 * 1440  # minutes of the household before the test
_ALPHAS = tuple(10.0**power for power in range(-3, 5))
_STEPS = {"local": 300, "pooled": 1500, "static": 1500}  # of an MLP

Forecast = Callable[[Array], Array]


def measure(condition: Condition, seed: int) -> Mapping[str, Value]:
    """Errors over those of the naive forecast, the last value: the mean over series."""
    part, model = condition["part"], str(condition["model"])
    if part == "bars":
        found = [_bars(one, model, int(condition["bar"]), int(condition["rows"]), seed) for one in household()]
        return {"error": _mean(one for one, _ in found), "naive": _mean(one for _, one in found)}
    parks = _cut(int(condition["days"]), seed)
    if part == "trap":
        return {name: _trap(parks, by) for name, by in (("scaled_by_1", scale), ("scaled_by_small", _small))}
    return {"error": _pooling(parks, str(condition["way"]), model), "parks": float(len(parks))}


@dataclass(frozen=True)
class _Park:
    """One series, in its own scale."""

    x: Array  # (rows, half hours): what comes before
    y: Array  # (rows,): the next half hour
    x_test: Array
    y_test: Array
    static: Array  # (3,)


def _pooling(parks: list[_Park], way: str, model: str) -> float:
    """The mean error of the parks."""
    if way == "local":
        return _mean(_error(fit(model, park.x, park.y, _STEPS[way])(park.x_test), park) for park in parks)

    def seen(x: Array, park: _Park) -> Array:
        return np.hstack([x, np.tile(park.static, (len(x), 1))]) if way == "static" else x

    x = np.concatenate([seen(park.x, park) for park in parks])
    forecast = fit(model, x, np.concatenate([park.y for park in parks]), _STEPS[way])
    return _mean(_error(forecast(seen(park.x_test, park)), park) for park in parks)


def _error(forecast: Array, park: _Park) -> float:
    return _over(park.y_test, forecast, park.x_test[:, -1])


def _over(truth: Array, forecast: Array, naive: Array) -> float:
    """The ratio of the root mean squares of two forecasts' errors."""
    return float(np.sqrt(np.mean((forecast - truth) ** 2) / np.mean((naive - truth) ** 2)))


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def scale(x: Array) -> Array:
    """The deviation of each column; 1 where it is constant, also up to rounding.

    >>> scale(np.array([[1.0, 0.1], [3.0, 0.1]]))
    array([1., 1.])
    """
    found = np.asarray(x.std(0))
    return np.where(found > 1e-9 * np.abs(x).max(0, initial=1e-300), found, 1.0)


def _small(x: Array) -> Array:
    return np.asarray(x.std(0) + 1e-6)


def fit(model: str, x: Array, y: Array, steps: int, by: Callable[[Array], Array] = scale) -> Forecast:
    """A ridge regression, its weight by leave-one-out, or an MLP of torch's global random numbers; columns scaled."""
    x_mean, x_scale, y_mean, y_scale = x.mean(0), by(x), y.mean(), scale(y)
    target = (y - y_mean) / y_scale
    forecast = (_ridge if model == "ridge" else _mlp)((x - x_mean) / x_scale, target, steps)
    return lambda new: forecast((new - x_mean) / x_scale) * y_scale + y_mean


def _ridge(x: Array, y: Array, steps: int) -> Forecast:
    found = RidgeCV(_ALPHAS).fit(x, y)
    return lambda new: np.asarray(found.predict(new))


def _mlp(x: Array, y: Array, steps: int) -> Forecast:
    network = models.build("mlp", (x.shape[1],), 1, norm="none")
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    inputs, target = torch.from_numpy(x).float(), torch.from_numpy(y).float()[:, None]
    for _ in range(steps):
        rows = torch.randint(len(inputs), (128,))
        optimizer.zero_grad()
        F.mse_loss(network(inputs[rows]), target[rows]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    def forecast(new: Array) -> Array:
        with torch.no_grad():
            return np.asarray(network(torch.from_numpy(new).float())[:, 0].double())

    return forecast


def _trap(parks: list[_Park], by: Callable[[Array], Array]) -> float:
    """The error of a pooled MLP with a column that is 0 in all of the training and 1 in the test."""
    x = np.concatenate([np.hstack([park.x, np.zeros((len(park.x), 1))]) for park in parks])
    with torch.random.fork_rng(devices=[]):  # both scales start from the same weights
        forecast = fit("mlp", x, np.concatenate([park.y for park in parks]), _STEPS["pooled"], by)
    return _mean(_error(forecast(np.hstack([park.x_test, np.ones((len(park.x_test), 1))])), park) for park in parks)


@functools.lru_cache(maxsize=1)
def _parking() -> tuple[tuple[Array, npt.NDArray[np.bool_], npt.NDArray[np.int64], float], ...]:
    """Of each park: occupied places, a missing one the last before it; whether it was there; the day; the capacity."""
    data = read("parking", Layout())
    found = []
    for (occupied,), times, static in zip(data.values, data.times, data.static, strict=True):
        days = times // 86_400_000_000_000  # ns a day
        if len(np.unique(days)) < _FULL:
            continue
        known = np.isfinite(occupied)
        last = np.maximum.accumulate(np.where(known, np.arange(len(occupied)), 0))
        found.append((occupied[last], known, days, float(static[0])))
    return tuple(found)


def _cut(days: int, seed: int) -> list[_Park]:
    """The parks with a test of its own days for each seed, which follow the training days."""
    newest = max(int(day.max()) for _, _, day, _ in _parking())
    end = newest - seed * _TEST_DAYS  # the test's last day
    begin = end - _TEST_DAYS  # the training's
    parks = []
    for occupied, known, day, capacity in _parking():
        trained = occupied[(day > begin - days) & (day <= begin)]
        of, real = day[_LAGS:], known[_LAGS:]  # of what is forecast
        if not len(trained):
            continue
        mean, deviation = float(trained.mean()), float(scale(trained))
        every = np.lib.stride_tricks.sliding_window_view((occupied - mean) / deviation, _LAGS + 1)
        training = every[real & (of > begin - days) & (of <= begin)]
        test = every[real & (of > begin) & (of <= end)]
        if len(training) and len(test) and (test[:, -1] != test[:, -2]).any():
            static = np.array([np.log(capacity), mean / capacity, deviation / capacity])
            parks.append(_Park(training[:, :-1], training[:, -1], test[:, :-1], test[:, -1], static))
    return parks


def _bars(power: Array, model: str, bar: int, rows: int, seed: int) -> tuple[float, float]:
    """The error of a forecast from bars, and that of the last bar, both over that of the last minute."""
    random = np.random.default_rng(seed)
    training = _draw(power[:_TRAINED_ON], rows, random)
    test = _draw(power[_TRAINED_ON:], _TESTED, random)
    y, truth = training[:, _PAST:].mean(1), test[:, _PAST:].mean(1)
    x, past = (one[:, :_PAST].reshape(len(one), -1, bar).mean(2) for one in (training, test))
    forecast = fit(model, x, y, _STEPS["local"])(past)
    last = test[:, _PAST - 1]
    return _over(truth, forecast, last), _over(truth, past[:, -1], last)


def _draw(power: Array, number: int, random: np.random.Generator) -> Array:
    """Windows at random places: (number, minutes)."""
    every = windows(power, _PAST + _NEXT)
    return every[random.choice(len(every), number, replace=False)]


def judge(rows: Rows) -> tuple[Claim, ...]:
    """What must hold of few and of many days, of static features, and of the bars."""
    few, many = min(_DAYS), max(_DAYS)
    told = [_over_way(rows, "ridge", days, "static", "pooled") for days in (few, many)]
    free = _over_way(rows, "mlp", many, "pooled", "local")
    bars = [_over_minutes(rows, "ridge", size) for size in (min(_SIZES), max(_SIZES))]
    claims = [
        _less(f"With {few} days, a linear model for all parks errs less than one for each", _few(rows, few)),
        _less(f"With {many} days, one for each errs less than one for all", _few(rows, many, "local", "pooled")),
        Claim(
            f"Static features lower the error of the linear model for all, with {few} and with {many} days",
            ", ".join(one.text(3, unit=" times") for one in told),
            all(one.high < 1 for one in told),
        ),
        Claim(
            f"With {many} days and an MLP, pooling costs at most 5%",
            free.text(3, unit=" times"),
            free.mean <= 1.05,
        ),
        _less(
            f"A linear model from {min(_SIZES)} windows errs less with 5-minute bars than with 1-minute ones", bars[0]
        ),
    ]
    more = bars[1].text(3, unit=" times")
    return (*claims, Claim(f"From {max(_SIZES):,} windows it errs more with 5-minute bars", more, bars[1].low > 1))


def _less(text: str, ratio: Interval) -> Claim:
    return Claim(text, ratio.text(3, unit=" times"), ratio.high < 1)


def _few(rows: Rows, days: int, first: str = "pooled", second: str = "local") -> Interval:
    return _over_way(rows, "ridge", days, first, second)


def _over_way(rows: Rows, model: str, days: int, first: str, second: str) -> Interval:
    same = {"part": "pooling", "model": model, "days": days}
    return rows.ratio("error", same | {"way": first}, same | {"way": second})


def _over_minutes(rows: Rows, model: str, size: int) -> Interval:
    same = {"part": "bars", "model": model, "rows": size}
    return rows.ratio("error", same | {"bar": 5}, same | {"bar": 1})


def tables(rows: Rows) -> tuple[Table, ...]:
    """Errors of the poolings, of the bars, and of the trap."""

    def error(**condition: object) -> str:
        return rows.mean("error", **condition).text(3)

    poolings = tuple(
        (title, str(days), *(error(part="pooling", model=model, days=days, way=way) for way in _WAYS))
        for model, title in _MODELS.items()
        for days in _DAYS
    )
    bars = tuple(
        (title, f"{size:,}", *(error(part="bars", model=model, rows=size, bar=bar) for bar in _BARS))
        for model, title in _MODELS.items()
        for size in _SIZES
    )
    naive = rows.mean("naive", part="bars", model="ridge", rows=max(_SIZES), bar=5).text(3)
    trap = [rows.mean(name, part="trap") for name in ("scaled_by_1", "scaled_by_small")]
    return (
        Table(
            "Car parks: root mean squared error over that of the last value, the mean over parks",
            ("model", "training days", *_WAYS.values()),
            poolings,
        ),
        Table(
            "Household power, the mean of the next 5 minutes from the last 60: error over that of the last minute's "
            f"value, the mean over series; the last 5-minute bar has {naive}",
            ("model", "training windows", *(f"bars of {title}" for title in _BARS.values())),
            bars,
        ),
        Table(
            "A trap: a column that is constant in the training, and another constant in the test; the pooled MLP's "
            "error by what the column is divided by",
            ("1", "deviation + 1e-6"),
            (tuple(f"{one.mean:.3g} ({one.low:.3g} to {one.high:.3g})" for one in trap),),
        ),
    )


def draw_rows(rows: Rows) -> str:
    """Errors against the training days, and the ratio of bars against the windows."""
    plots = []
    for model, title in _MODELS.items():
        ways = {
            name: points(_DAYS, [rows.mean("error", part="pooling", model=model, days=d, way=way) for d in _DAYS])
            for way, name in _WAYS.items()
        }
        plots.append(Plot(f"{title}: error against log10 days", ways, log_x=True))
    bars = {
        f"5-minute bars, {title}": points(_SIZES, [_over_minutes(rows, model, size) for size in _SIZES])
        for model, title in _MODELS.items()
    }
    plots.append(Plot("error over that of 1-minute bars, log10 windows", bars, log_x=True))
    return draw(plots, "Errors by training days, pooled or not, and those of five-minute bars over one-minute ones")


def reading(rows: Rows) -> str:
    """What follows."""
    few, many = min(_DAYS), max(_DAYS)
    linear = [_few(rows, days).text(2) for days in (few, many)]
    free = [_over_way(rows, "mlp", days, "pooled", "local").text(2) for days in (few, many)]
    told = [_over_way(rows, "mlp", days, "static", "pooled").text(2) for days in (few, many)]
    bars = [_over_minutes(rows, model, size).text(2) for model in _MODELS for size in (min(_SIZES), max(_SIZES))]
    return (
        f"One linear model for all car parks errs {linear[0]} times as much as one for each with {few} days, and "
        f"{linear[1]} times with {many}; MLPs {free[0]} and {free[1]} times. So it is the length of the series that "
        "decides: pooling buys data, which short series lack. Static features change a pooled MLP's "
        f"error by {told[0]} and {told[1]} times; in a linear model they only move the level, which scaling each "
        "series has taken out already. Five-minute bars instead of one-minute ones change the error by "
        f"{bars[0]} times with {min(_SIZES):,} windows and {bars[1]} times with {max(_SIZES):,} in a linear model, "
        f"{bars[2]} and {bars[3]} times in an MLP: a coarser bar is fewer weights and less noise, and throws away what "
        "is new in the last minutes. These are two data sets, of car parks and of one household; for one's own, "
        "`renorm compare --task forecast` has both as axes."
    )


def _plan(seeds: int, days: tuple[int, ...] = _DAYS) -> Plan:
    conditions: list[Condition] = [
        {"part": "pooling", "model": model, "days": num, "way": way}
        for model in _MODELS
        for num in days
        for way in _WAYS
    ]
    conditions += [
        {"part": "bars", "model": model, "rows": size, "bar": bar}
        for model in _MODELS
        for size in _SIZES
        for bar in _BARS
    ]
    return Plan((*conditions, {"part": "trap", "model": "mlp", "days": min(_DAYS)}), seeds, f"{seeds} seeds")


REPLICATION = Replication(
    name="pooling",
    title="Many series: one model or many, and the size of the bars",
    question=(
        "Should every instrument have its own model, or all one, and do they need static features then? Are fine bars "
        "too noisy to learn from?"
    ),
    published=(
        Published(
            "One model for all series (global) can make the same forecasts as one for each (local), without any "
            "likeness of the series; local models grow in complexity with the number of series, global ones do not. "
            "Global linear models compete with local ones with far fewer parameters",
            "Montero-Manso & Hyndman 2021, International Journal of Forecasting 37, arXiv:2008.00444",
        ),
    ),
    protocol=(
        "**Pooling**: Birmingham's car parks, every half hour from 8:00 to 16:30, those with at least "
        f"{_FULL} days. The next value is forecast from the last {_LAGS}, two days; the values of a park are scaled by "
        f"the mean and deviation of its training days. A test is the {_TEST_DAYS} days after the training; each seed "
        "has days of its own. Static features: the capacity's logarithm, and the training's mean and deviation over "
        "the capacity. **Bars**: the four series of one household's power, at one minute. Training windows are drawn "
        f"at random from the first 120 days, {_TESTED:,} test windows from the 60 after. The last 60 minutes are seen "
        "as they are or as means of 5. **Models**: ridge regression, its weight chosen by leave-one-out, and the `mlp` "
        f"of `renorm.choices` without a norm (AdamW at 1e-3, batches of 128, {_STEPS['local']} steps, "
        f"{_STEPS['pooled']:,} where it is one for all car parks)."
    ),
    quick=_plan(2),
    minutes=2,
    full=_plan(4),
    measure=measure,
    judge=judge,
    tables=tables,
    draw=draw_rows,
    reading=reading,
)
