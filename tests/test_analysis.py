"""Means, intervals and paired tests against SciPy and formulas; what the sentence may and may not claim."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up import NUM_TEST, Study, edited, record, regression, result, spec, stopped, study_of, typical
from numpy.typing import NDArray
from rich.console import Console
from scipy import stats

from renorm.comparison.analysis import Analysis, analyse
from renorm.comparison.cells import Row, corrected
from renorm.comparison.score import Estimate, estimate, rounded
from renorm.comparison.spec import TrialResult
from renorm.comparison.terminal import TerminalTable
from renorm.comparison.verdict import joined, norm_title

CLEAR = {
    ("batch", 32): [0.010, 0.016, 0.012, 0.018],
    ("group", 32): [0.031, 0.042, 0.033, 0.041],
    ("layer", 32): [0.019, 0.011, 0.014, 0.016],
}


def row_of(analysis: Analysis, norm: str, batch_size: int = 32) -> Row:
    return next(row for row in analysis.rows if row.norm == norm and row.setting.batch_size == batch_size)


# Estimates


@given(st.lists(st.floats(-1e3, 1e3).map(lambda x: round(x, 3)), min_size=2, max_size=12, unique=True))
def test_an_estimate_is_scipys_t_interval(values: list[float]) -> None:
    found = estimate(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    assert found.mean == pytest.approx(np.mean(values), abs=1e-9)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9, abs=1e-9)
    assert found.p == pytest.approx(stats.ttest_1samp(values, 0.0).pvalue, rel=1e-6)


def test_one_value_has_no_interval_and_none_has_no_mean() -> None:
    one, none = estimate([0.25]), estimate([])
    assert one.mean == 0.25
    assert math.isnan(one.low)
    assert math.isnan(one.p)
    assert math.isnan(none.mean)
    assert none.num == 0


@pytest.mark.parametrize(("values", "p"), [([0.5, 0.5], 0.0), ([0.0, 0.0, 0.0], 1.0), ([-2.0] * 5, 0.0)])
def test_equal_values_have_a_p_and_an_interval_of_no_length(values: list[float], p: float) -> None:
    found = estimate(values)
    assert (found.low, found.mean, found.high, found.p) == (values[0], values[0], values[0], p)


def test_differences_equal_but_for_rounding_count_as_equal() -> None:
    differences = [0.3 - 0.2, 0.2 - 0.1, 0.7 - 0.6]
    assert len(set(differences)) > 1
    assert estimate(differences).p == 0.0


def test_a_least_spread_stands_in_for_a_smaller_one() -> None:
    assert estimate([1.0, 1.0, 1.0], 0.5) == estimate([1.0, 1.5, 0.5], 0.1)
    assert estimate([1.0, 3.0], 0.5) == estimate([1.0, 3.0])


@pytest.mark.parametrize(
    ("value", "half", "text"),
    [
        (1.0934, 0.4321, "1.1"), (61.23, 12.7, "61"), (5432.1, 230.0, "5430"), (5432.1, 430.0, "5400"),
        (0.0123456, 0.00031, "0.0123"), (0.0, 0.5, "0.0"), (-0.04, 0.4, "0.0"), (-1.26, 0.4, "−1.3"),
        (math.nan, 1.0, "–"), (math.inf, 1.0, "–"), (0.0178, math.nan, "0.0178"), (0.0, math.nan, "0"),
        (0.9996, math.nan, "1.000"), (1.88e10, math.nan, "1.88e10"), (-1.3e10, 4e9, "−1.3e10"), (3e8, 1e9, "3e8"),
        (1.234e-8, math.nan, "1.23e-8"), (1e-15, 3e-16, "1.0e-15"), (0.0, 1e-9, "0"), (920_000.0, 5e4, "920000"),
    ],
)  # fmt: skip
def test_a_number_is_rounded_to_its_uncertainty(value: float, half: float, text: str) -> None:
    assert rounded(value, half) == text


def test_a_signed_number_shows_its_plus() -> None:
    assert rounded(0.94, 0.31, signed=True) == "+0.9"
    assert rounded(-0.94, 0.31, signed=True) == "−0.9"
    assert rounded(0.0, 0.31, signed=True) == "0.0"


# Rows


def test_a_row_has_mean_interval_seeds_and_medians() -> None:
    analysis = analyse(*study_of(CLEAR))
    row = row_of(analysis, "batch")
    low, high = stats.t.interval(0.95, 3, loc=0.014, scale=stats.sem(CLEAR["batch", 32]))
    assert row.score.mean == pytest.approx(0.014)
    assert (row.score.low, row.score.high) == pytest.approx((low, high))
    assert row.by_seed == dict(enumerate(CLEAR["batch", 32]))
    assert row.status == "4 of 4"
    assert row.seconds_per_step == pytest.approx(6e-4 * 1.15)
    assert row.peak_memory_mb == 38.0
    assert row.num_parameters == 42_000 + 128 * 5


def test_rows_are_by_setting_best_first_and_the_unfinished_last() -> None:
    analysis = analyse(*typical())
    assert [cell.setting.batch_size for cell in analysis.cells] == [2, 32]
    for cell in analysis.cells:
        means = [row.score.mean for row in cell.rows if row.score.num]
        assert means == sorted(means)
        assert cell.rows[-1].norm == "instance"
    assert analysis.norms == ("none", "batch", "layer", "group", "rms", "switch", "instance")


def test_an_error_rates_interval_is_shown_cut_to_its_range() -> None:
    analysis = analyse(*study_of({("batch", 2): [0.0, 0.0, 0.1], ("layer", 2): [1.0, 0.9, 1.0]}))
    best, worst = analysis.cells[0].rows
    assert best.score.low < 0
    assert worst.score.high > 1
    assert analysis.score.clipped(best.score)[0] == 0.0
    assert analysis.score.clipped(worst.score)[1] == 1.0
    assert analysis.score.interval(best.score).startswith("0")


def test_a_refused_norm_is_a_row_with_its_reason() -> None:
    row = row_of(analyse(*typical()), "instance", 2)
    assert (row.status, row.place, row.score.num) == ("refused", "unfinished", 0)
    assert len(row.reasons) == 1
    assert "averages over one value" in row.reasons[0]
    assert math.isnan(row.score.mean)


def test_a_norm_of_which_one_seed_diverged_shows_both_and_a_note() -> None:
    analysis = analyse(*typical())
    row = row_of(analysis, "none")
    assert (row.score.num, row.status, row.place) == (2, "2 of 3, 1 diverged", "untested")
    assert row.reasons == ("the loss was nan after 99 steps",)
    assert any("likely too good" in note for note in analysis.notes)


def test_who_finished_fewer_seeds_is_never_the_best() -> None:
    study = study_of(CLEAR)
    broken = edited(
        study, lambda r: stopped(r.spec, "diverged", "nan") if r.spec.norm == "batch" and r.spec.seed == 3 else r
    )
    lucky = edited(
        broken, lambda r: replace(r, test={"error": 0.0}) if r.status == "ok" and r.spec.norm == "batch" else r
    )
    analysis = analyse(*lucky)
    assert analysis.cells[0].best is row_of(analysis, "layer")
    assert row_of(analysis, "batch").place == "survivor"
    assert "batch norm has the lowest" not in analysis.sentence


def test_an_ok_trial_without_a_finite_score_failed() -> None:
    study = edited(
        study_of(CLEAR),
        lambda r: replace(r, test={"error": math.nan}) if r.spec.key == spec("group", seed=0).key else r,
    )
    analysis = analyse(*study)
    assert row_of(analysis, "group").status == "3 of 4, 1 failed"
    assert row_of(analysis, "group").reasons == ("its test error is not a finite number",)
    assert [trial.spec.norm for trial in analysis.unfinished] == ["group"]


def test_unknown_times_and_memory_are_left_out_of_the_medians() -> None:
    study = edited(study_of(CLEAR), lambda r: replace(r, peak_memory_mb=math.nan if r.spec.seed else 7.0))
    assert row_of(analyse(*study), "batch").peak_memory_mb == 7.0
    assert math.isnan(row_of(analyse(*typical()), "switch").peak_memory_mb)


def test_without_a_test_part_the_validation_scores_count_and_it_says_so() -> None:
    study, results = study_of(CLEAR)
    data = {**study.data, "num_test": 0}
    results = [replace(r, spec=replace(r.spec, test=False), test={}, valid={"error": 0.5}) for r in results]
    analysis = analyse(replace(study, data=data, keys=tuple(r.spec.key for r in results)), results)
    assert analysis.score.part == "validation"
    assert analysis.score.step == pytest.approx(1 / 359)
    assert {row.score.mean for row in analysis.rows} == {0.5}
    assert "validation error" in analysis.sentence
    assert any("no test part" in note for note in analysis.notes)


def test_the_score_of_a_constant_is_noted() -> None:
    study, results = study_of(CLEAR)
    told = analyse(replace(study, data={**study.data, "constant": {"valid": 0.5, "test": 0.9}}), results).notes
    assert "Always predicting the most frequent class of the training part gives a test error of 90.0%." in told


def test_trials_of_the_tuning_and_of_other_grids_are_left_out() -> None:
    study, results = study_of(CLEAR)
    tuning = result(spec("batch", 32, 0, test=False), 0.9)
    older = result(spec("batch", 32, 0, epochs=99), 0.9)
    assert analyse(study, [*results, tuning, older]) == analyse(study, results)
    assert analyse(study, [*results, *results]) == analyse(study, results)


def test_the_order_of_the_results_does_not_matter() -> None:
    study, results = typical()
    assert analyse(study, results[::-1]) == analyse(study, results)


def test_with_tuned_rates_norms_are_compared_each_at_its_own() -> None:
    rates = {"batch": 0.3, "group": 0.1}
    results = [
        result(spec(norm, 32, seed, base_lr=rate), 0.01 * place + 0.001 * seed)
        for place, (norm, rate) in enumerate(rates.items(), 1)
        for seed in range(3)
    ]
    study = record(results)
    apart = analyse(study, results)
    together = analyse(replace(study, settings={**study.settings, "tune_lr": True}), results)
    assert len(apart.cells) == 2
    assert [(row.norm, row.base_lr) for row in together.cells[0].rows] == [("batch", 0.3), ("group", 0.1)]
    assert len(together.cells[0].comparisons) == 1
    assert any("own learning rate" in note for note in together.notes)


# Comparisons


def holm(p_values: list[float]) -> list[float]:
    """Holm's adjusted p-values from the definition: max over the j-th smallest p, j <= i, of (m - j + 1) p_j."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    out = [0.0] * len(p_values)
    for i, index in enumerate(order):
        out[index] = min(1.0, max((len(order) - j) * p_values[order[j]] for j in range(i + 1)))
    return out


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_the_correction_is_holms(p_values: list[float]) -> None:
    differences = [Estimate(0.1, 0.0, 0.2, 3, p) for p in p_values]
    assert corrected(differences) == pytest.approx(holm(p_values))


def test_fewer_than_three_pairs_are_not_tested_and_do_not_count() -> None:
    few, many = Estimate(0.1, 0.0, 0.2, 2, 0.01), Estimate(0.1, 0.0, 0.2, 3, 0.01)
    found = corrected([few, many, many])
    assert math.isnan(found[0])
    assert found[1:] == pytest.approx([0.02, 0.02])


def log_odds(rates: Sequence[float]) -> NDArray[np.float64]:
    """Of errors among NUM_TEST samples, with half an error and half a success added (Haldane and Anscombe)."""
    errors = np.asarray(rates) * NUM_TEST
    return np.log((errors + 0.5) / (NUM_TEST - errors + 0.5))


def test_comparisons_are_paired_t_tests_of_log_odds_with_holms_correction() -> None:
    study = study_of(CLEAR)
    found = analyse(*study).cells[0].comparisons
    pairs = [(CLEAR[item.other, 32], CLEAR["batch", 32]) for item in found]
    tests = [stats.ttest_rel(log_odds(other), log_odds(best)) for other, best in pairs]
    assert [item.difference.p for item in found] == pytest.approx([test.pvalue for test in tests])
    assert [item.p_corrected for item in found] == pytest.approx(holm([test.pvalue for test in tests]))
    low, high = stats.ttest_rel(*pairs[1]).confidence_interval()
    assert (found[1].difference.low, found[1].difference.high) == pytest.approx((low, high))
    assert {item.other: item.shown for item in found} == {"layer": False, "group": True}


def test_pairs_are_of_one_seed_even_when_seeds_are_missing() -> None:
    study = edited(study_of(CLEAR), lambda r: None if (r.spec.norm, r.spec.seed) in {("group", 0), ("layer", 1)} else r)
    item = next(item for item in analyse(*study).cells[0].comparisons if item.other == "group")
    expected = np.subtract(CLEAR["group", 32], CLEAR["batch", 32])[1:]
    assert item.difference.num == 3
    assert item.difference.mean == pytest.approx(expected.mean())


def test_equal_differences_of_few_test_samples_are_not_certain() -> None:
    def p_of(samples: int) -> float:
        scores = {("batch", 32): [4 / NUM_TEST] * 3, ("layer", 32): [(4 + samples) / NUM_TEST] * 3}
        return analyse(*study_of(scores)).cells[0].comparisons[0].p_corrected

    # One sample of 360 in each of three seeds is what rounding alone can make; nine are not.
    assert p_of(1) > 0.05
    assert p_of(9) < 0.05


def test_equal_differences_of_a_regression_are_exact() -> None:
    analysis = analyse(*regression())
    assert all(item.p_corrected == 0.0 and item.shown for cell in analysis.cells for item in cell.comparisons)


def test_six_equal_norms_with_three_seeds_rarely_differ() -> None:
    rng = np.random.default_rng(7)
    names = ("none", "batch", "layer", "group", "rms", "switch")
    runs = 300
    claims = 0
    for _ in range(runs):
        scores = {(norm, 32): rng.normal(54.0, 2.0, size=3).tolist() for norm in names}
        claims += any(item.shown for item in analyse(*study_of(scores, task="regression")).cells[0].comparisons)
    # 7.3% in a simulation of 4000 studies; 300 studies stay below 12% with a probability of 0.999.
    assert claims / runs < 0.12


def test_six_equal_norms_of_random_errors_rarely_differ() -> None:
    rng = np.random.default_rng(8)
    names = ("none", "batch", "layer", "group", "rms", "switch")
    claims = 0
    for _ in range(300):
        rates = rng.binomial(NUM_TEST, 0.03, size=(6, 3)) / NUM_TEST
        scores = {(norm, 32): row.tolist() for norm, row in zip(names, rates, strict=True)}
        claims += any(item.shown for item in analyse(*study_of(scores)).cells[0].comparisons)
    assert claims / 300 < 0.12


def test_a_large_failure_shows_with_three_seeds() -> None:
    """Errors of 32, 45 and 43% vary by far more than those near 3%; nobody would call that no difference."""
    scores = {("batch", 2): [0.323, 0.448, 0.426]}
    for i, norm in enumerate(("layer", "group", "rms", "switch", "none")):
        scores[norm, 2] = [0.033 + 0.003 * i, 0.030 + 0.001 * i, 0.036 - 0.002 * i]
    found = analyse(*study_of(scores)).cells[0]
    assert {item.other for item in found.comparisons if item.shown} == {"batch"}


def test_each_norm_is_compared_with_itself_across_batch_sizes() -> None:
    large, small = [0.010, 0.012, 0.011], [0.400, 0.350, 0.382]
    scores = {
        ("batch", 2): small,
        ("batch", 8): [0.1] * 3,
        ("batch", 32): large,
        ("group", 2): large,
        ("group", 32): large[::-1],
    }
    found = {change.norm: change for change in analyse(*study_of(scores)).changes}
    pairs = ((small, large), (large, large[::-1]))
    p_values = holm([stats.ttest_rel(log_odds(one), log_odds(other)).pvalue for one, other in pairs])
    assert (found["batch"].small, found["batch"].large) == (2, 32)
    assert [found["batch"].p_corrected, found["group"].p_corrected] == pytest.approx(p_values)
    assert found["batch"].verdict == "worse at the small batch"
    assert found["group"].verdict == "no change shown"


def test_a_norm_that_gains_from_a_small_batch_is_said_to() -> None:
    scores = {("layer", 2): [0.01, 0.02, 0.012], ("layer", 32): [0.21, 0.22, 0.213]}
    assert analyse(*study_of(scores)).changes[0].verdict == "better at the small batch"


def test_a_change_of_two_seeds_is_not_tested() -> None:
    assert analyse(*study_of({("layer", 2): [0.1, 0.2], ("layer", 32): [0.1, 0.1]})).changes[0].verdict == "not tested"


# The sentence


def sentence(study: Study) -> str:
    return analyse(*study).sentence


def test_the_sentence_names_what_is_shown_and_what_is_not() -> None:
    assert sentence(study_of(CLEAR)) == (
        "At batch size 32, batch norm has the lowest mean test error (1.4%), shown to be below group norm (3.7%); no "
        "difference is shown to layer norm. Four seeds on one split of one data set: other data may order the norms "
        "differently."
    )


def test_the_sentence_when_all_or_none_differ() -> None:
    clear = {key: values for key, values in CLEAR.items() if key[0] != "layer"}
    equal = {key: values for key, values in CLEAR.items() if key[0] != "group"}
    assert "shown to be below group norm (3.7%)." in sentence(study_of(clear))
    assert "no difference" not in sentence(study_of(clear))
    assert "; no difference is shown to layer norm." in sentence(study_of(equal))
    assert "shown to be below" not in sentence(study_of(equal))


def test_the_sentence_speaks_of_the_largest_and_the_smallest_batch() -> None:
    text = sentence(typical())
    assert text.startswith("At batch size 32, batch norm has the lowest")
    assert ". At batch size 2, layer norm has the lowest" in text
    assert "batch norm (36.4%)" in text
    assert text.count(". ") == 2


def test_the_sentence_of_one_seed_claims_no_difference() -> None:
    text = sentence(study_of({key: values[:1] for key, values in CLEAR.items()}))
    assert "lowest mean test error (1.00%). With one seed no difference can be shown; it takes at least three." in text
    assert "shown to be below" not in text


def test_the_sentence_when_only_one_norm_finished() -> None:
    study = edited(
        study_of(CLEAR), lambda r: r if r.spec.norm == "group" else stopped(r.spec, "failed", "ValueError: x")
    )
    assert sentence(study).startswith("At batch size 32 only group norm finished, with a test error of 3.7%.")


def test_the_sentence_names_all_of_a_tie() -> None:
    text = sentence(study_of({("batch", 4): [0.1, 0.2, 0.3], ("none", 4): [0.3, 0.2, 0.1]}))
    assert "batch norm and the model without a norm have the lowest mean test error" in text


def test_the_sentence_of_a_regression_has_the_targets_unit() -> None:
    assert "the lowest mean test RMSE (57 in units of progression), shown to be below every other norm" in sentence(
        regression()
    )


def test_the_sentence_names_the_settings_that_vary() -> None:
    results = [
        result(spec(norm, 32, seed, optimizer=optimizer), 0.1 + 0.1 * (optimizer == "sgd") + 0.001 * seed)
        for norm in ("batch", "layer")
        for optimizer in ("sgd", "adam")
        for seed in range(3)
    ]
    assert sentence((record(results), results)).startswith(
        "At batch size 32, adam (the lowest of 2 settings), batch norm and layer norm have the lowest"
    )


def test_the_sentence_sets_the_best_setting_against_the_others() -> None:
    def study_with(shifts: dict[str, list[float]], norms: tuple[str, ...] = ("batch", "layer")) -> Study:
        results = [
            result(spec(norm, 32, seed, model=model), 0.1 + shift)
            for norm in norms
            for model, of_seeds in shifts.items()
            for seed, shift in enumerate(of_seeds)
        ]
        return record(results), results

    apart = {"mlp": [0.0, 0.003, 0.006], "cnn": [0.2, 0.2, 0.21], "tcn": [0.003, 0.0, 0.009]}
    assert " With batch norm at batch size 32, that setting is shown to be below 1 of the 2 other settings. Three" in (
        sentence(study_with(apart))
    )
    alone = sentence(study_with({key: apart[key] for key in ("mlp", "tcn")}, ("batch",)))
    assert alone.startswith(
        "At batch size 32, mlp (the lowest of 2 settings), batch norm has a mean test error of 10.3%. With batch norm "
        "at batch size 32, that setting is not shown to be below the other setting."
    )
    assert "With batch norm" not in sentence(study_with({key: shifts[:2] for key, shifts in apart.items()}))


def test_a_tie_of_settings_goes_to_the_better_second() -> None:
    means = {("none", "cnn"): 0.1, ("none", "mlp"): 0.1, ("batch", "cnn"): 0.3, ("batch", "mlp"): 0.2}
    results = [
        result(spec(norm, 32, seed, model=model), mean) for (norm, model), mean in means.items() for seed in range(3)
    ]
    assert sentence((record(results), results)).startswith("At batch size 32, mlp (the lowest of 2 settings), the")


def test_the_sentence_chooses_no_learning_rate() -> None:
    results = [result(spec("batch", 32, seed, base_lr=rate, lr=rate), rate) for rate in (0.1, 0.2) for seed in range(3)]
    text = sentence((record(results), results))
    assert "learning rate 0.1 (the lowest of 2 settings)" in text
    assert "With batch norm at" not in text


def test_trials_that_have_not_run_are_counted() -> None:
    study = edited(study_of(CLEAR), lambda r: r if r.spec.seed else None)
    analysis = analyse(*study)
    assert analysis.num_missing == 3
    assert analysis.sentence.endswith("; 3 trials have not run yet.")
    assert "3 of 12 trials have not run yet." in analysis.notes


@pytest.mark.parametrize("num_keys", [0, 12])
def test_without_any_result_there_is_nothing_to_compare(num_keys: int) -> None:
    study, _ = study_of(CLEAR)
    analysis = analyse(replace(study, keys=study.keys[:num_keys]), [])
    assert analysis.rows == ()
    assert analysis.sentence.startswith("No trial has finished, so there is nothing to compare.")
    assert ("12 trials have not run yet." in analysis.sentence) == bool(num_keys)


def test_when_every_trial_fails_there_is_nothing_to_compare() -> None:
    study = edited(typical(), lambda r: stopped(r.spec, "failed", "ValueError: boom"))
    analysis = analyse(*study)
    assert analysis.sentence.startswith("No trial has finished")
    assert all(cell.best is None for cell in analysis.cells)
    assert len(analysis.unfinished) == 42


@pytest.mark.parametrize(
    ("norm", "title"),
    [("none", "no norm"), ("rms", "RMS norm"), ("switch", "switchable norm"), ("group(8)", "group norm (8 groups)"),
     ("n (g [c]) [...] g=8", "n (g [c]) [...] g=8")],
)  # fmt: skip
def test_norms_have_the_names_people_use(norm: str, title: str) -> None:
    assert norm_title(norm) == title


def test_words_are_joined_as_in_a_sentence() -> None:
    assert [joined(words) for words in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]


# The terminal


def printed(analysis: Analysis, width: int = 80) -> str:
    console = Console(width=width, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as capture:
        console.print(TerminalTable(analysis))
    return capture.get()


def test_the_terminal_table_marks_the_lowest_by_a_star_and_fits_80_columns() -> None:
    text = printed(analyse(*typical()))
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(map(len, lines)) <= 80
    assert [line.split()[:2] for line in lines if "★" in line] == [["layer", "norm"], ["batch", "norm"]]
    assert next(line for line in lines if line.startswith(" switchable norm")).split() == (
        ["switchable", "norm", "2.2", "1.5", "to", "2.9", "no", "difference", "shown", "3", "of", "3", "0.454"]
    )


def test_the_terminal_table_says_why_trials_did_not_finish() -> None:
    text = " ".join(printed(analyse(*typical())).split())
    assert "instance norm, batch size 2 and batch size 32: instance norm averages over one value" in text
    assert "no norm, batch size 32: the loss was nan after 99 steps" in text


def test_the_terminal_table_shows_markup_in_a_reason_as_it_is() -> None:
    def spoil(item: TrialResult) -> TrialResult:
        return stopped(item.spec, "failed", "[red]boom[/red] [/]") if item.spec.norm == "batch" else item

    assert "[red]boom[/red] [/]" in printed(analyse(*edited(study_of(CLEAR), spoil)))


def test_the_terminal_table_of_nothing_and_of_a_regression() -> None:
    study, _ = study_of(CLEAR)
    assert "Norm" in printed(analyse(study, []))
    assert "RMSE" in printed(analyse(*regression()))


def test_the_terminal_table_gives_long_titles_the_whole_width() -> None:
    results = [
        result(spec("batch", 32, 0, model=model, loss=loss, dropout=0.25), 0.1)
        for model in ("mlp", "transformer")
        for loss in ("label_smoothing", "binary_cross_entropy")
    ]
    lines = [line.rstrip() for line in printed(analyse(record(results), results)).splitlines()]
    assert "Batch size 32, transformer, binary cross entropy loss" in lines
    assert max(map(len, lines)) <= 80


def test_the_terminal_table_breaks_long_patterns() -> None:
    pattern = "n (g [c]) [d h w] g=8" * 3
    lines = [line.rstrip() for line in printed(analyse(*study_of({(pattern, 32): [0.1, 0.2, 0.3]}))).splitlines()]
    assert max(map(len, lines)) <= 80
    names = [line[: lines[1].index("Error") - 1] for line in lines[lines.index("Batch size 32") + 1 :]]
    assert "".join(names).replace(" ", "") == pattern.replace(" ", "")
