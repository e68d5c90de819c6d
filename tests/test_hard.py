"""Worst cases and information criteria: what a trial keeps of its model, and what the report makes of it."""

from __future__ import annotations

import base64
import io
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small
import torch
import torch.nn.functional as F
from made_up import edited, record, result, spec, study_of
from PIL import Image
from torch import nn

from renorm.comparison import Comparison, report, run_study
from renorm.comparison.analysis import analyse
from renorm.comparison.closer import MOST_CASES, criteria_of, worst_of
from renorm.comparison.criteria import criteria_means
from renorm.comparison.data import Splits, from_parts
from renorm.comparison.hard import hard_cases
from renorm.comparison.spec import CaseRecord, TrialResult
from renorm.comparison.trial import run_trial


def images(num: int = 30) -> Splits:
    rng = np.random.default_rng(0)
    y = np.arange(num) % 2
    x = rng.normal(size=(num, 1, 6, 6)) + y[:, None, None, None]
    return from_parts((x, y), (x, y), (x[:20], y[:20]))


def numbers() -> Splits:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 3))
    y = 100 + 5 * x[:, 0] + rng.normal(size=60)
    return from_parts((x[:30], y[:30]), (x[30:45], y[30:45]), (x[45:], y[45:]))


def linear(num_in: int, num_out: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(num_in, num_out)).eval()


def test_worst_classes() -> None:
    splits = small.splits()
    model = linear(2, 2)
    output = model(torch.tensor(splits.x_test))
    losses = F.cross_entropy(output, torch.tensor(splits.y_test), reduction="none")
    found = worst_of(model, splits)
    assert [case.index for case in found] == losses.argsort(descending=True)[:MOST_CASES].tolist()
    first = found[0]
    assert first.loss == pytest.approx(losses.max().item(), rel=1e-6)
    assert first.prediction == output[first.index].argmax()
    assert first.confidence == pytest.approx(output[first.index].softmax(0).max().item(), rel=1e-6)
    assert first.target == splits.y_test[first.index]
    cosine = F.cosine_similarity(torch.tensor(splits.x_test[first.index]), torch.tensor(splits.x_train))
    assert [index for index, _ in first.neighbors] == cosine.argsort(descending=True)[:3].tolist()
    assert [target for _, target in first.neighbors] == splits.y_train[[i for i, _ in first.neighbors]].tolist()


def test_worst_numbers_have_the_targets_units() -> None:
    splits = numbers()
    model = linear(3, 1)
    worst = worst_of(model, splits)[0]
    predicted = model(torch.tensor(splits.x_test))[worst.index].item() * splits.target_std + splits.target_mean
    assert worst.prediction == pytest.approx(predicted, rel=1e-5)
    assert worst.target == pytest.approx(splits.y_test[worst.index] * splits.target_std + splits.target_mean, rel=1e-6)
    assert worst.confidence is None


def test_worst_of_the_validation_part() -> None:
    parts = small.parts()
    splits = from_parts(*parts[:2])
    y = torch.tensor(splits.y_valid)
    losses = F.cross_entropy(linear(2, 2)(torch.tensor(splits.x_valid)), y, reduction="none")
    assert worst_of(linear(2, 2), splits)[0].index == losses.argmax()


def test_no_worst_of_a_model_that_raises() -> None:
    class Raises(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("no")

    assert worst_of(Raises(), small.splits()) == ()


def test_criteria_by_hand() -> None:
    splits = small.splits()
    model = linear(2, 2)
    log = -F.cross_entropy(
        model(torch.tensor(splits.x_train)).double(), torch.tensor(splits.y_train), reduction="sum"
    ).item()
    found = criteria_of(model, splits, "categorical")
    assert found["log_likelihood"] == pytest.approx(log)
    assert (found["k"], found["n"]) == (6, 48)
    assert found["aic"] == pytest.approx(12 - 2 * log)
    assert found["aicc"] == pytest.approx(12 - 2 * log + 84 / 41)
    assert found["bic"] == pytest.approx(6 * math.log(48) - 2 * log)


def test_criteria_of_a_regression() -> None:
    splits = numbers()
    model = linear(3, 1)
    errors = model(torch.tensor(splits.x_train)).view(-1).detach().numpy() - splits.y_train
    log = -15 * (math.log(2 * math.pi * np.mean(errors.astype(float) ** 2)) + 1)
    assert criteria_of(model, splits, "gaussian")["log_likelihood"] == pytest.approx(log, rel=1e-5)


def test_no_criteria_of_outputs_that_are_not_finite() -> None:
    model = linear(2, 2)
    nn.init.constant_(model[1].weight, math.nan)  # type: ignore[index,arg-type]
    assert criteria_of(model, small.splits(), "categorical") == {}


def test_no_criteria_of_a_loss_that_is_no_likelihood() -> None:
    assert criteria_of(linear(2, 2), small.splits(), None) == {}


def test_kept_and_read_again() -> None:
    kept = run_trial(small.specs()[0], small.splits())
    assert len(kept.worst) == MOST_CASES
    assert kept.criteria["n"] == 48
    again = TrialResult.from_json(kept.to_json())
    assert again.worst == kept.worst
    assert again.criteria == kept.criteria


def test_a_result_of_an_earlier_version() -> None:
    raw = result(spec(), 0.1).to_json()
    del raw["worst"], raw["criteria"]
    assert TrialResult.from_json(raw).worst == ()


def test_nothing_of_a_rate_that_is_being_tuned() -> None:
    kept = run_trial(replace(small.specs()[0], test=False), small.splits())
    assert kept.worst == ()
    assert kept.criteria == {}


def case(index: int, loss: float, prediction: int = 1, confidence: float | None = 0.9, target: int = 0) -> CaseRecord:
    return CaseRecord(index, loss, prediction, confidence, target, ((7, 1), (8, 1)))


def test_cases_in_the_most_lists_come_first() -> None:
    study, results = study_of({("batch", 32): [0.1, 0.2], ("layer", 32): [0.3, 0.4]})
    lists = [
        (case(5, 9.0), case(2, 1.0)),
        (case(2, 2.0, prediction=3, confidence=0.5),),
        (case(2, 3.0), case(6, 0.5)),
        (case(6, 0.7),),
    ]
    results = [replace(trial, worst=worst) for trial, worst in zip(results, lists, strict=True)]
    found = hard_cases(analyse(study, results), results)
    assert [(one.index, one.num_trials, one.loss) for one in found] == [(2, 3, 2.0), (6, 2, 0.6), (5, 1, 9.0)]
    assert found[0].predictions == ((1, 2, 0.9), (3, 1, 0.5))
    assert [one.norms for one in found] == [("batch", "layer"), ("layer",), ("batch",)]
    assert found[0].nearest == lists[0][1]  # of the best norm's first seed
    assert len(hard_cases(analyse(study, results), results, most=1)) == 1


def test_section_of_hostile_names() -> None:
    study, results = study_of({("batch", 32): [0.1]})
    results = [replace(results[0], worst=(case(4, 2.0),))]
    classes = ["<b>zero</b>", "one", *map(str, range(2, 10))]
    page = report.html(replace(study, data={**study.data, "classes": classes}), results)
    assert "&lt;b&gt;zero&lt;/b&gt;" in page
    assert "<b>zero" not in page
    assert "all 2 nearest training examples have the class it was surely taken for" in page


def test_section_of_a_regression() -> None:
    study, results = study_of({("batch", 32): [54.0, 55.0]}, task="regression")
    study = replace(study, data={**study.data, "classes": []})
    found = (case(4, 2.0, 140, None, 262), case(4, 3.0, 150, None, 262))
    results = [replace(trial, worst=(one,)) for trial, one in zip(results, found, strict=True)]
    page = report.html(study, results)
    assert "<td>262</td><td>145</td>" in page
    assert "2 of 2<br>" in page
    assert "Look at" not in page[page.index('<section id="cases"') :]


def test_no_sections_without_cases() -> None:
    page = report.html(*study_of({("batch", 32): [0.1]}))
    assert 'id="cases"' not in page
    assert 'id="criteria"' not in page
    assert 'id="paths"' not in page


def test_optimizers_get_their_paths() -> None:
    results = [result(spec(optimizer=name), 0.1) for name in ("sgd", "adam")]
    page = report.html(record(results), results)
    section = page[page.index('id="paths"') :]
    assert section.count("<figure><svg") == 2
    assert "adam, lr" in section


def test_criteria_of_a_row() -> None:
    study = study_of({("batch", 32): [0.1, 0.2], ("layer", 32): [0.3, 0.4]})

    def edit(trial: TrialResult) -> TrialResult:
        names = ("k", "n", "log_likelihood", "aic", "aicc", "bic")
        return replace(trial, criteria=dict.fromkeys(names, 10.0 + trial.spec.seed))

    study = edited(study, edit)
    analysis = analyse(*study)
    assert criteria_means(analysis.rows[0])["aic"] == 10.5
    assert criteria_means(replace(analysis.rows[0], trials=())) == {}
    unlimited = edited(study, lambda trial: replace(trial, criteria={**trial.criteria, "aicc": math.inf}))
    assert "<td>10.5</td><td>–</td><td>10.5</td>" in report.html(*unlimited)


def test_pictures_from_the_store(tmp_path: Path) -> None:
    splits = images()
    made = run_study(small.study(seeds=1), splits=splits, out=tmp_path, jobs=1, progress=False)
    assert not made.table()["aic"].isna().any()
    page = made.report().read_text(encoding="utf-8")
    first = re.search(r'<img src="data:image/png;base64,([^"]+)" alt=""><small>(\d+)', page)
    assert first is not None
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(first[1]))))
    expected = splits.x_test[int(first[2]), 0]
    scaled = (expected - expected.min()) / (expected.max() - expected.min()) * 255
    np.testing.assert_allclose(pixels, scaled, atol=0.51)

    loaded = Comparison.load(made.folder)
    (made.folder / "data.npz").write_bytes(b"damaged")
    assert '<img src="data' not in loaded.report().read_text(encoding="utf-8")
    images(34).save(made.folder / "data.npz")
    assert '<img src="data' not in loaded.report().read_text(encoding="utf-8")
