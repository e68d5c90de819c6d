"""The parts of the studies on text, style and series that have an exact answer."""

import math

import numpy as np
import pytest
import torch

from renorm.studies import lstm_layer_norm, style, text_statistics
from renorm.studies.corpus import corpus, fingerprint, windows


def test_a_corpus_holds_every_word_of_the_documents():
    words = corpus("word", 10**6)
    every = torch.cat([*words.training, *words.held_out])
    assert words.num_tokens == torch.cat(words.training).unique().numel() + 1  # and 0
    assert every.max() < words.num_tokens
    assert 3 * len(words.held_out) < len(words.training) < 5 * len(words.held_out)
    assert (torch.cat(corpus("word", 50).training) == 0).any()
    assert torch.cat(corpus("character", 1000).training).numel() > every.numel()
    assert fingerprint() == int(fingerprint()) < 2**48


def test_windows_do_not_overlap():
    assert windows([torch.arange(7), torch.arange(2)], 3).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("together", [True, False])
def test_windows_of_a_batch_come_from_one_document_or_from_any(together):
    documents = [torch.full((200,), number) for number in range(50)]
    x, y = text_statistics._text(documents, together, torch.Generator().manual_seed(0))
    assert x.shape == y.shape == (8, 64)
    assert (len(x.unique()) == 1) is together


def test_the_language_model_sees_no_later_word_in_evaluation():
    torch.manual_seed(0)
    model = text_statistics._LanguageModel(20, "batch").eval()
    x = torch.randint(20, (3, 64))
    changed = torch.cat([x[:, :40], (x[:, 40:] + 1) % 20], 1)
    torch.testing.assert_close(model(x)[..., :40], model(changed)[..., :40])
    assert not torch.allclose(model(x)[..., 40:], model(changed)[..., 40:])


@pytest.mark.parametrize("data", ["random", "document", "convolutions", "pixels"])
def test_stability_is_measured_of_as_many_values_everywhere(data, monkeypatch):
    monkeypatch.setattr(text_statistics, "_SETTLE", 2)
    monkeypatch.setattr(text_statistics, "_LOOK", 2)
    torch.manual_seed(0)
    found = text_statistics.measure({"data": data, "norm": "batch", "lr": 1e-3, "steps": 2}, 0)
    assert found["mean_shift"] > 0 < found["var_shift"]
    assert math.isfinite(found["loss"])


def test_equal_luminances_are_spread_and_colours_stay():
    x = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    y = style.equalized(x)
    luminance = torch.einsum("c,nchw->nhw", torch.tensor([0.299, 0.587, 0.114]), y)
    even = (2 * (torch.arange(16) + 0.5) / 16 - 1).expand(2, -1)
    torch.testing.assert_close(luminance.flatten(1).sort(1).values, even, atol=1e-6, rtol=0)
    torch.testing.assert_close(y[:, 0] - y[:, 2], x[:, 0] - x[:, 2])


def test_the_style_loss_is_0_of_the_style_and_1_of_nothing():
    style_of = [torch.rand(1, 4, 5, 5, generator=torch.Generator().manual_seed(0))]
    goal = style._statistics(style_of)
    assert style._style_loss(goal, goal) == 0
    assert style._style_loss(style._statistics([torch.zeros(3, 4, 5, 5)]), goal) == pytest.approx(1, abs=1e-3)


def test_a_training_for_style_is_measured():
    torch.manual_seed(0)
    found = style.measure({"part": "training", "input": "style", "norm": "batch", "lr": 1e-2, "steps": 3}, 0)
    assert len(found["curve"]) == 3
    assert found["loss"] == pytest.approx(sum(found["curve"]) / 3)


def test_steps_to_a_goal():
    falling = [4.0 - 0.1 * step for step in range(40)]
    first = lstm_layer_norm.steps_to(falling, 2.0)
    assert np.mean(falling[first - 10 : first]) <= 2.0 < np.mean(falling[first - 11 : first - 1])
    assert lstm_layer_norm.steps_to(falling, 0.0) is None


def test_both_cells_start_from_the_same_weights():
    found = []
    for cell in ("plain", "layer"):
        torch.manual_seed(0)
        found.append(lstm_layer_norm._Model(cell, 20).state_dict())
    assert set(found[0]) < set(found[1])
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_a_goal_that_is_not_reached_is_said():
    torch.manual_seed(0)
    found = lstm_layer_norm.measure({"cell": "layer", "lr": 2e-3, "steps": 20}, 0)
    assert (found["steps"], found["reached"], len(found["curve"])) == (20, 0, 2)
