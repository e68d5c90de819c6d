"""`watch` changes nothing, tells what it finds, and never breaks a training by itself."""

import contextlib
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from renorm.diagnose import RULES, Found, rule, watch
from renorm.errors import DiagnosisError, RuleError


def network():
    return nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 3))


def train(steps=60, *, watching=True, lr=0.1, rate_at=None, **options):
    """Losses of a small training, its state, and the watch."""
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    watched = watch(model, optimizer, **{"on_error": "silent", **options}) if watching else contextlib.nullcontext()
    losses = []
    with watched as w:
        for step in range(steps):
            x = torch.randn(32, 8)
            if rate_at == step:
                optimizer.param_groups[0]["lr"] = 1e20
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), (x.sum(1) > 0).long())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if w is not None:
                w.step(loss)
    return losses, model.state_dict(), w, torch.rand(3)


def test_results_are_the_same_bit_for_bit():
    (a, state, _, numbers), (b, watched, _, later) = train(watching=False), train()
    assert a == b
    assert torch.equal(numbers, later)
    assert all(torch.equal(state[key], watched[key]) for key in state)


def test_a_healthy_training_is_quiet():
    report = train(150)[2].report
    assert not [str(f) for f in report.findings if f.severity != "info"]
    assert not report.failures


def test_only_sampled_steps_have_hooks():
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hooked = []
    with watch(model, optimizer, every=10, dense=2, on_error="silent"):
        for _ in range(25):
            hooked.append(any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()))
            optimizer.zero_grad()
            model(torch.randn(4, 8)).sum().backward()
            optimizer.step()
    assert [step for step, has in enumerate(hooked) if has] == [0, 1, 10, 20]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_broken_run_is_found_and_can_be_stopped(tmp_path):
    log = tmp_path / "findings.jsonl"
    report = train(rate_at=20, log=log)[2].report
    assert "W01" in {finding.id for finding in report.errors}
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert "W01" in {line["id"] for line in lines}
    with pytest.raises(DiagnosisError) as raised:
        train(rate_at=20, on_error="raise")
    assert raised.value.report.errors


def test_findings_are_printed_once(capsys):
    train(rate_at=20, on_error="print")
    printed = capsys.readouterr().err
    assert printed.count("W01") == 1


def test_a_rule_that_fails_is_off_and_named_once():
    @rule("X09", "broken", "error", title="t", why="w.", fix="f", source="s", when="watch")
    def broken(history):
        raise ZeroDivisionError("mine")
        yield Found("")

    try:
        _, _, watched, _ = train(40)
    finally:
        del RULES["X09"]
    assert [failure for failure in watched.report.failures if "X09" in failure and "ZeroDivisionError" in failure]
    assert len(watched.report.failures) == 1


def test_an_exception_in_the_loop_comes_through_and_leaves_no_hook():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(KeyError), watch(model, optimizer, on_error="silent"):
        raise KeyError("the user's")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not optimizer._optimizer_step_pre_hooks


def test_two_optimizers_in_turn():
    torch.manual_seed(0)
    generator, critic = nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-3) for m in (generator, critic)]
    model = nn.ModuleDict({"generator": generator, "critic": critic})
    with watch(model, optimizers, on_error="silent") as w:
        for _ in range(40):
            for optimizer, sign in zip(optimizers, (-1, 1), strict=True):
                optimizer.zero_grad()
                loss = sign * critic(generator(torch.randn(16, 4))).mean() + 1
                loss.backward()
                optimizer.step()
                w.step(loss)
    assert not w.report.failures
    assert not w.report.errors


def test_settings_that_cannot_be():
    model = nn.Linear(2, 1)
    with pytest.raises(RuleError, match="every is 1 or more"):
        watch(model, torch.optim.SGD(model.parameters(), lr=0.1), every=0)
