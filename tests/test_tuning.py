"""The choice of a learning rate from the trials that tried it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import small

from renorm.comparison.spec import TrialResult
from renorm.comparison.tuning import choose

Scores = dict[float, list[tuple[float, float] | str]]


def results(scores: Scores, norm: str = "batch") -> list[TrialResult]:
    """For each rate, each seed's (error, loss), or the status of a trial without them."""
    (spec,) = small.specs(norm=norm, seeds=1)
    return [
        TrialResult(replace(spec, base_lr=rate, seed=seed), status=outcome)  # type: ignore[arg-type]
        if isinstance(outcome, str)
        else TrialResult(
            replace(spec, base_lr=rate, seed=seed), "ok", valid=dict(zip(("error", "loss"), outcome, strict=True))
        )
        for rate, seeds in scores.items()
        for seed, outcome in enumerate(seeds)
    ]


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ({0.1: [(0.3, 1), (0.3, 1)], 1.0: [(0.1, 1), (0.4, 1)]}, 1.0),  # the mean decides, not the best seed
        ({0.1: [(0.2, 2)], 1.0: [(0.2, 1)]}, 1.0),  # equal scores: the loss
        ({1.0: [(0.2, 1)], 0.1: [(0.2, 1)]}, 0.1),  # equal in both: the lower rate
        ({0.1: [(0.4, 1), (0.4, 1)], 1.0: [(0.0, 0), "diverged"]}, 0.1),  # every seed must finish
        ({0.1: ["refused"], 1.0: ["refused"]}, 0.1),
        ({0.1: [(math.nan, 1)], 1.0: [(0.5, 1)]}, 1.0),
    ],
)
def test_the_rate_with_the_best_mean_is_chosen(scores: Scores, best: float) -> None:
    (choice,) = choose(results(scores))
    assert choice.base_lr == best


def test_each_norm_has_its_own_choice() -> None:
    found = choose(
        [
            *results({0.1: [(0.1, 1)], 1.0: [(0.2, 1)]}, "batch"),
            *results({0.1: [(0.2, 1)], 1.0: [(0.1, 1)]}, "layer"),
        ]
    )
    assert [(choice.norm, choice.base_lr) for choice in found] == [("batch", 0.1), ("layer", 1.0)]
    (spec,) = small.specs(norm="layer", seeds=1)
    assert [choice.covers(spec) for choice in found] == [False, True]


def test_the_text_says_what_was_tried_and_warns_at_the_edge() -> None:
    (choice,) = choose(results({0.01: [(0.25, 1)], 0.1: [(0.125, 1)], 1.0: ["diverged"]}))
    assert choice.text() == "batch, batch size 8: lr 0.1 of 0.01 (0.25), 0.1 (0.125), 1 (diverged)"
    assert choice.text(["optimizer", "dropout"]).startswith("batch, batch size 8, sgd, dropout 0: lr 0.1 of")
    (choice,) = choose(results({0.1: [(0.25, 1)], 1.0: [(0.125, 1)]}))
    assert choice.text().endswith("; it is at the edge of the range, a better one may lie outside")
    (choice,) = choose(results({0.1: ["refused"], 1.0: ["refused"]}))
    assert choice.text().endswith("1 (refused)")
