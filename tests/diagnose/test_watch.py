"""`watch`: silent on healthy trainings, the same results with and without it, and at home in every kind of loop."""

import copy
import json
import math
import os
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
import trainings
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.multiprocessing import spawn
from torch.utils.checkpoint import checkpoint

import renorm as rn
from renorm.diagnose import RULES, Found, layers, readings, rule
from renorm.diagnose import watch as watch_function
from renorm.errors import DiagnosisError, RuleError

X, Y = torch.randn(256, 8, generator=torch.Generator().manual_seed(0)), torch.arange(256) % 3


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))


def steps(model, optimizer, w, count, forward=None, each=None):
    """Train on `count` batches."""
    losses = []
    for step in range(count):
        i = slice(32 * (step % 8), 32 * (step % 8) + 32)
        optimizer.zero_grad()
        loss = F.cross_entropy((model if forward is None else forward)(X[i]), Y[i])
        loss.backward()
        optimizer.step()
        w.step(loss)
        losses.append(loss.item())
        if each is not None:
            each(step)
    return losses


def watched(model, optimizer=None, count=30, each=None, **options):
    """Train under observation; the watch."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.1)
    with rn.watch(model, optimizer, on_error="silent", **options) as w:
        steps(model, optimizer, w, count, each=each)
    assert not w.report.failures
    return w


@pytest.fixture
def own_rule():
    """A rule of one's own, which is taken away again."""
    made = []

    def make(find, severity="warning", id="X01"):
        rule(id, f"own-{id}", severity, when="watch", title="t", why="w.", fix="f", source="s")(find)
        made.append(id)

    yield make
    for id in made:
        del RULES[id]


def ids(w):
    return {finding.id for finding in w.report.findings}


# ---- healthy trainings


@pytest.mark.parametrize("name", trainings.ALL)
def test_healthy_trainings(name, one_thread):
    """Nothing is said of them, and every loss and every random number is the same without `watch`."""
    torch.manual_seed(0)
    w, losses = trainings.ALL[name](trainings.quietly)
    numbers = torch.get_rng_state()
    assert not w.report.failures
    assert not [str(finding) for finding in w.report.findings if finding.severity != "info"]
    torch.manual_seed(0)
    _, alone = trainings.ALL[name](trainings.unwatched)
    assert losses == alone
    assert torch.equal(numbers, torch.get_rng_state())


def test_weights_and_buffers_are_the_same(one_thread):
    states = []
    for watch in (trainings.quietly, trainings.unwatched):
        model = net()
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        with watch(model, optimizer) as w:
            steps(model, optimizer, w, 40)
        states.append((model.state_dict(), optimizer.state_dict()["state"]))
    assert states[0][0].keys() == states[1][0].keys()
    assert all(torch.equal(a, states[1][0][name]) for name, a in states[0][0].items())
    assert all(torch.equal(a["exp_avg"], states[1][1][key]["exp_avg"]) for key, a in states[0][1].items())


# ---- looks


def test_a_warning_needs_two_looks_and_an_error_one(own_rule, capsys):
    seen = []

    def flickers(history):
        seen.append(history.last.step)
        if len(seen) in (2, 4, 5, 6):
            yield Found("flickers")

    def breaks(history):
        if history.last.step == 3:
            yield Found("breaks")

    own_rule(flickers)
    own_rule(breaks, severity="error", id="X02")
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with rn.watch(model, optimizer, every=5, dense=4) as w:
        steps(model, optimizer, w, 40)
    found = {finding.id: finding for finding in w.report.findings}
    assert (found["X02"].step, found["X02"].count) == (4, 1)
    assert (found["X01"].step, found["X01"].count) == (6, 2)  # at its third sighting, the second running
    assert seen == [0, 1, 2, 3, 5, 10, 15, 20, 25, 30, 35]
    told = capsys.readouterr().err
    assert told.count("flickers") == 1
    assert told.index("breaks") < told.index("flickers")


def test_a_warning_that_becomes_an_error_is_told_again(own_rule, capsys):
    own_rule(lambda history: [Found("grows", severity="error" if history.step > 20 else None)])
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with rn.watch(model, optimizer) as w:
        steps(model, optimizer, w, 60)
    assert [finding.severity for finding in w.report.findings] == ["error"]
    assert capsys.readouterr().err.count("grows") == 2


def test_a_finding_with_a_key_is_told_once_whatever_it_names(own_rule):
    own_rule(lambda history: [Found("moves", module=str(history.step), key="")])
    assert len(watched(net()).report.findings) == 1


def test_a_rule_that_fails_is_named_once_and_off(own_rule, capsys):
    calls = []

    def fails(history):
        calls.append(history.step)
        raise ZeroDivisionError("by zero")

    own_rule(fails)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with rn.watch(model, optimizer) as w:
        losses = steps(model, optimizer, w, 30)
    assert len(losses) == 30
    assert len(calls) == 1
    assert w.report.failures == ("rule X01 (own-X01) failed and is off: ZeroDivisionError: by zero",)
    assert capsys.readouterr().err.count("by zero") == 1


@pytest.mark.parametrize("part", ["weigh_gradients", "_settle", "listen", "_named"])
def test_a_failure_of_our_own_does_not_stop_the_training(part, monkeypatch):
    def fails(*args):
        raise MemoryError("too large")

    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    w = rn.watch(model, optimizer, on_error="silent")
    monkeypatch.setattr(w if hasattr(w, part) else w._tracks[0], part, fails)
    with w:
        assert len(steps(model, optimizer, w, 30)) == 30
    assert w.report.failures == ("watching failed and is off: MemoryError: too large",)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_measure_that_fails_is_off_and_the_others_are_not(monkeypatch):
    def fails(*args):
        raise ValueError("odd")

    monkeypatch.setitem(layers.MEASURES, "relu", fails)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with rn.watch(model, optimizer, on_error="silent") as w:
        steps(model, optimizer, w, 12)
    assert w.report.failures == ("looking at layers of kind relu failed and is off: ValueError: odd",)
    assert list(w.history.last.layers) == ["1"]


def test_a_loss_that_is_no_number_is_noted():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with rn.watch(model, optimizer, on_error="silent") as w:
        w.step({"loss": 1.0})
        w.validate(None)
        steps(model, optimizer, w, 3)
    assert "TypeError" in w.report.failures[0]


# ---- what it costs


def test_hooks_are_there_only_while_a_step_is_sampled():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    there = []
    with rn.watch(model, optimizer, every=5, dense=2, on_error="silent") as w:
        steps(
            model, optimizer, w, 12,
            each=lambda step: there.append(
                bool(model[2]._forward_hooks) + bool(model[0]._forward_pre_hooks) + bool(model[3].bias._backward_hooks)
            ),
        )  # fmt: skip
    # Behind step 0 the hooks wait for step 1, behind 4 for 5, behind 9 for 10.
    assert [step for step, count in enumerate(there) if count] == [0, 4, 9]
    assert [sample.step for sample in w.history.samples] == [0, 1, 5, 10]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_sampled_step_waits_for_the_device_once(monkeypatch):
    """Waits are calls that make Python numbers of tensors; that of the loss is CPU's alone."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    waits = []
    for name in ("tolist", "item", "__bool__", "__float__", "__int__", "nonzero", "cpu"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda x, *a, n=name, r=real: (waits.append((x.device.type, n)), r(x, *a))[1]
        )
    counts = []
    with rn.watch(model, optimizer, every=5, dense=1, on_error="silent") as w:
        for _ in range(11):
            optimizer.zero_grad()
            outputs = model(X[:32])
            loss = F.cross_entropy(outputs, Y[:32])
            loss.backward()
            waits.clear()
            optimizer.step()
            inside = len(waits)
            w.step(loss, outputs, Y[:32])
            counts.append((inside, [name for _, name in waits]))
    assert {step for step, (_, names) in enumerate(counts) if "tolist" in names} == {0, 5, 10}
    assert all(inside == counts[1][0] for inside, _ in counts)  # what the optimizer does itself
    assert all([*names].count("tolist") <= 1 and "item" not in names and "__bool__" not in names for _, names in counts)


def test_losses_on_a_device_are_fetched_with_the_samples(monkeypatch):
    """A tensor elsewhere is not waited for; here one of the CPU plays that part."""
    module = sys.modules["renorm.diagnose.watch"]  # the name in the package is the function's
    monkeypatch.setattr(module, "_number", lambda loss: loss.detach().clone())
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with rn.watch(model, optimizer, every=5, dense=1, on_error="silent") as w:
        losses = steps(model, optimizer, w, 4)
        assert len(w.history.losses) == 1
        losses += steps(model, optimizer, w, 4)
        assert len(w.history.losses) == 6
    assert [value for _, value in w.history.losses] == losses


def test_large_parameters_are_copied_in_part(monkeypatch):
    whole = watched(net(), count=3).history.last
    monkeypatch.setattr(readings, "MAX_COPIED", 64)
    part = watched(net(), count=3).history.last
    assert part.partly == {"0.weight", "3.weight"}
    assert part.weights == whole.weights
    for name in whole.updates:
        assert part.ratio(name) == pytest.approx(whole.ratio(name), rel=0.5)
        assert name in part.partly or part.ratio(name) == whole.ratio(name)


# ---- what is measured


def test_numbers_of_a_step():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with rn.watch(model, optimizer, on_error="silent") as w:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X[:32]), Y[:32])
        loss.backward()
        optimizer.step()
        w.step(loss)
    sample = w.history.last
    assert sample.loss == loss.item()
    for name, p in model.named_parameters():
        assert sample.gradients[name] == pytest.approx(p.grad.norm().item(), rel=1e-6)
        assert sample.weights[name] == pytest.approx(before[name].norm().item(), rel=1e-6)
        assert sample.updates[name] == pytest.approx((p - before[name]).norm().item(), rel=1e-6)
        assert sample.rates[name] == 0.5
    assert sample.inputs == pytest.approx(X[:32].abs().max().item())
    assert sample.outputs == ((32, 3),)
    h = F.linear(X[:32], before["0.weight"], before["0.bias"])
    var, mean = torch.var_mean(h, 0, correction=0)
    running, numbers = 0.1 * mean, sample.layers["1"].numbers
    assert numbers["mean"] == pytest.approx(((running - mean) / (var + 1e-5).sqrt()).abs().median().item(), rel=1e-4)
    running = 0.9 + 0.1 * h.var(0)
    assert numbers["var"] == pytest.approx((running / var).log().abs().median().item(), rel=1e-3)
    assert numbers["values"] == 32
    dead = ((F.batch_norm(h, None, None, training=True) > 0).sum(0) == 0).float().mean()
    assert sample.layers["2"].numbers["dead"] == dead


def test_batch_norm_of_images_and_of_several_calls():
    norm = nn.BatchNorm2d(4, momentum=None)  # running statistics are means of all batches

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = norm

        def forward(self, x):
            return self.norm(x[:8]).mean() + self.norm(x[8:]).mean()

    model = Twice()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x = torch.randn(16, 4, 5, 5)
    x[8:] += 3
    with rn.watch(model, optimizer, on_error="silent") as w:
        model(x).backward()
        optimizer.step()
    numbers = w.history.last.layers["norm"].numbers
    assert numbers["mean"] == pytest.approx(0, abs=0.01)  # both batches together are what the running ones are
    assert numbers["samples"] == 16


@pytest.mark.parametrize("shape", [(64, 40), (8, 12, 40), (8, 40, 5, 5)])
def test_dead_units_of_any_layout(shape):
    """Units are the last dimension behind a linear layer, the second behind a convolution."""
    conv = len(shape) == 4

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(40, 16, 1) if conv else nn.Linear(40, 16)
            self.head = nn.Conv2d(16, 1, 1) if conv else nn.Linear(16, 1)
            with torch.no_grad():
                self.layer.bias[:12] = -100.0

        def forward(self, x):
            return self.head(F.relu(self.layer(x)))

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with rn.watch(model, optimizer, on_error="silent") as w:
        for _ in range(8):
            model(torch.randn(shape)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert w.history.last.layers["relu()"].numbers["dead"] == 0.75
    assert ids(w) == {"W04"}


def test_a_large_activation_is_looked_at_in_part():
    x = torch.randn(16, 64, 40, 40)
    view = layers.thinned(x, (0, 1))
    assert view.shape[:2] == (16, 64)
    assert view.numel() <= 2 * layers.MAX_ENTRIES
    assert layers.thinned(x, ()).numel() <= 2 * layers.MAX_ENTRIES
    assert layers.thinned(x[:1, :1], ()) is x[:1, :1] or layers.thinned(x[:1, :1], ()).shape == (1, 1, 40, 40)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.hidden, self.head = (
            nn.Sequential(nn.Linear(8, 16), nn.Tanh()),
            nn.Linear(16, 16),
            nn.Linear(16, 3),
        )

    def forward(self, x):
        x = self.inner(x)
        x = F.relu(self.hidden(x))
        x = torch.relu(self.hidden(x)).sigmoid()
        return self.head(x).tanh()


def test_functions_are_seen_and_heads_left_out():
    model = Functional()
    sample = watched(model, count=2).history.last
    assert set(sample.layers) == {"inner.1", "relu()", "relu() (call 2)", "sigmoid()"}
    assert {layer.kind for layer in sample.layers.values()} == {"relu", "tanh", "sigmoid"}


def test_an_error_in_the_forward_pass_leaves_nothing_behind():
    class Breaks(Functional):
        fails = False

        def forward(self, x):
            if self.fails:
                self.inner[0](x[:, :3])
            return super().forward(x)

    model = Breaks()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with rn.watch(model, optimizer, on_error="silent") as w:
        steps(model, optimizer, w, 2)
        model.fails = True
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model(X)
        assert not torch.overrides._get_current_function_mode_stack()
        model.fails = False
        steps(model, optimizer, w, 2)
    assert not w.report.failures
    assert set(w.history.last.layers) == {"inner.1", "relu()", "relu() (call 2)", "sigmoid()"}


def test_validation_in_between_is_not_measured():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with rn.watch(model, optimizer, dense=100, on_error="silent") as w:
        for _ in range(3):
            steps(model, optimizer, w, 1)
            model.eval()
            with torch.no_grad():
                model(1000 * X)
            model(1000 * X)  # without no_grad, too
            model.train()
    assert w.history.last.inputs < 10
    assert all(sample.layers["1"].numbers["samples"] == 32 for sample in w.history.samples)


def test_a_copy_and_a_file_have_no_hooks():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with rn.watch(model, optimizer, on_error="silent") as w:
        steps(model, optimizer, w, 3)
        assert model[2]._forward_hooks
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            before = len(w._layers._seen.shapes)
            assert torch.equal(other(X), model(X))
            assert len(w._layers._seen.shapes) == before + 1  # of the model itself
            assert all(hook.call is None for hook in other[2]._forward_hooks.values())


def test_checkpointing_runs_a_layer_again_unseen(one_thread):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = net(), nn.Linear(3, 3)

        def forward(self, x):
            return self.last(checkpoint(self.first, x, use_reentrant=False))

    results = []
    for watch in (trainings.quietly, trainings.unwatched):
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with watch(model, optimizer) as w:
            results.append(steps(model, optimizer, w, 12))
            seen = w
        if watch is trainings.quietly:
            assert seen.history.last.layers["first.1"].numbers["samples"] == 32
            assert not seen.report.failures
    assert results[0] == results[1]


def test_transforms_and_traces_are_left_alone():
    model = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with rn.watch(model, optimizer, on_error="silent") as w:
        parameters = dict(model.named_parameters())
        slopes = torch.func.vmap(torch.func.grad(lambda x: torch.func.functional_call(model, parameters, x).sum()))(X)
        torch.export.export(model, (X,))
        assert slopes.shape == X.shape
        model(X).mean().backward()
        optimizer.step()
    assert not w.report.failures
    assert list(w.history.last.layers) == ["1"]


# ---- loops of all kinds


def test_several_optimizers_have_samples_and_findings_of_their_own():
    generator, critic = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), nn.Linear(2, 1)
    optimizers = torch.optim.SGD(critic.parameters(), 0.1), torch.optim.SGD(generator.parameters(), 0.01)
    with rn.watch({"g": generator, "c": critic}, optimizers, every=4, dense=2, on_error="silent") as w:
        for step in range(12):
            optimizers[0].zero_grad()
            loss = critic(generator(torch.randn(16, 4)).detach()).mean()
            loss.backward()
            optimizers[0].step()
            w.step(loss)
            if step % 3 == 2:
                optimizers[1].zero_grad()
                loss = critic(generator(torch.randn(16, 4))).square().mean()
                loss.backward()
                optimizers[1].step()
                w.step(loss)
    of_critic, of_generator = (track.history for track in w._tracks)
    assert (of_critic.step, of_generator.step) == (12, 4)
    assert [sample.step for sample in of_critic.samples] == [0, 1, 4, 8]
    assert [sample.step for sample in of_generator.samples] == [0, 1]
    assert all(set(sample.gradients) == {"c.weight", "c.bias"} for sample in of_critic.samples)
    assert all(set(sample.layers) == {"g.1"} for sample in of_generator.samples)
    assert all(sample.loss is not None for history in (of_critic, of_generator) for sample in history.samples)
    assert len(of_generator.losses) == 4
    assert not w.report.findings


def test_models_in_a_tuple_are_named_by_their_class_or_place():
    a, b = nn.Linear(2, 2), net()
    optimizer = torch.optim.SGD([*a.parameters(), *b.parameters()], 0.1)
    w = rn.watch((a, b), optimizer)
    assert set(w.models) == {"Linear", "Sequential"}
    assert set(rn.watch((a, nn.Linear(2, 2)), optimizer).models) == {"0", "1"}


def test_accumulated_gradients_are_not_left_ones():
    def train(clear):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with rn.watch(model, optimizer, on_error="silent") as w:
            for _ in range(12):
                for part in X.split(64):
                    F.cross_entropy(model(part), Y[:64]).backward()
                optimizer.step()
                clear(optimizer)
        return ids(w)

    assert train(lambda optimizer: optimizer.zero_grad()) == set()
    assert train(lambda optimizer: optimizer.zero_grad(set_to_none=False)) == set()
    assert train(lambda o: [p.grad.data.zero_() for group in o.param_groups for p in group["params"]]) == set()
    assert "W19" in train(lambda optimizer: None)


def test_gradients_of_another_optimizers_loss_are_not_left_ones():
    """A generator's loss puts gradients into the critic, which are cleared when its turn comes."""
    generator, critic = nn.Linear(4, 2), nn.Linear(2, 1)
    optimizers = torch.optim.SGD(critic.parameters(), 0.01), torch.optim.SGD(generator.parameters(), 0.01)
    with rn.watch((generator, nn.Sequential(critic)), optimizers, on_error="silent") as w:
        for _ in range(12):
            for optimizer in optimizers:
                optimizer.zero_grad()
                critic(generator(torch.randn(16, 4))).square().mean().backward()
                optimizer.step()
    assert not ids(w)


def test_gradient_scaler():
    """Gradients are as large as without; a step that the scaler skips is none."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    with rn.watch(model, optimizer, dense=100, on_error="silent") as w:
        for step in range(6):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(X[:32]), Y[:32])
            scaler.scale(loss).backward()
            if step == 3:
                model[0].weight.grad[0, 0] = math.inf
            scaler.step(optimizer)
            scaler.update()
            w.step(loss)
    assert w.history.step == 5
    assert [sample.step for sample in w.history.samples] == [0, 1, 2, 3, 4]
    assert not w.report.findings
    reference = net()
    F.cross_entropy(reference(X[:32]), Y[:32]).backward()
    assert w.history.first.gradients["0.weight"] == pytest.approx(reference[0].weight.grad.norm().item(), rel=1e-5)


class Fused(torch.optim.Optimizer):
    """As those whose kernel divides by the scale of the gradients."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    def step(self, closure=None):
        pass


def test_fused_optimizers_divide_by_the_scale_themselves():
    model = net()
    optimizer = Fused(model.parameters())
    with rn.watch(model, optimizer, on_error="silent") as w:
        (1024 * F.cross_entropy(model(X[:32]), Y[:32])).backward()
        norm = model[0].weight.grad.norm().item()
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(1.0)
        optimizer.step()
    assert w.history.last.gradients["0.weight"] == pytest.approx(norm / 1024, rel=1e-5)
    assert w.history.last.skipped


@pytest.mark.parametrize("closure", ["argument", "keyword"])
def test_closures(closure):
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), 0.5, max_iter=3)

    def evaluate():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        return loss

    with rn.watch(model, optimizer, on_error="silent") as w:
        for _ in range(3):
            optimizer.step(evaluate) if closure == "argument" else optimizer.step(closure=evaluate)
    assert not w.report.findings
    assert w.history.step == 3
    for sample in w.history.samples:
        assert min(sample.gradients.values()) > 0
        assert set(sample.layers) == {"1", "2"}


def test_odd_parameters():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows = nn.Embedding(10, 4, sparse=True)
            self.waves = nn.Parameter(torch.randn(4, 4, dtype=torch.complex64))
            self.short = nn.Linear(4, 4, dtype=torch.bfloat16)
            self.long = nn.Linear(4, 3, dtype=torch.float64)
            self.unused = nn.Linear(2, 2)
            self.scalar, self.none = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.empty(0))

        def forward(self, x):
            x = self.rows(x).mean(1)
            x = (x.to(torch.complex64) @ self.waves).abs() * self.scalar
            return self.long(self.short(x.bfloat16()).double())

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, foreach=False)
    with rn.watch(model, optimizer, on_error="silent") as w:
        for _ in range(5):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(torch.randint(10, (16, 3))), torch.randint(3, (16,)))
            loss.backward()
            optimizer.step()
            w.step(loss)
    assert not w.report.failures
    sample = w.history.last
    assert sample.gradients["rows.weight"] == pytest.approx(model.rows.weight.grad.to_dense().norm().item(), rel=1e-5)
    assert sample.gradients["waves"] == pytest.approx(model.waves.grad.norm().item(), rel=1e-5)
    assert "unused.weight" in sample.weights
    assert "unused.weight" not in sample.gradients
    assert "short.weight" in sample.moved


def test_lazy_layers_are_named_once_they_are_there():
    model = nn.Sequential(nn.LazyLinear(16), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(3))
    w = watched(model, count=5)
    assert set(w.history.last.weights) == set(dict(model.named_parameters()))
    assert set(w.history.sizes) == set(w.history.last.weights)


def test_an_optimizer_inside_another():
    class Passes(torch.optim.Optimizer):  # as those of accelerate
        def __init__(self, optimizer):
            self.optimizer = optimizer

        param_groups = property(lambda self: self.optimizer.param_groups)

        def zero_grad(self):
            self.optimizer.zero_grad()

        def step(self):
            self.optimizer.step()

    model = net()
    w = watched(model, Passes(torch.optim.SGD(model.parameters(), 0.1)), count=3)
    assert len(w.history.samples) == 3


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch looks at it while it compiles
@pytest.mark.parametrize("way", ["model", "in place", "function", "whole function", "part"])
def test_compiled_models_are_compiled_no_more_often(way, one_thread):
    """Once more at most, for a function around the model: the first compilation sees the hooks, and leaves them out."""
    results, graphs = [], []
    for watch in (trainings.quietly, trainings.unwatched):
        torch._dynamo.reset()
        counter = CompileCounter()
        torch.manual_seed(0)
        model = forward = inside = Functional()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        if way == "model":
            forward = inside = torch.compile(model, backend=counter)
        elif way == "in place":
            model.compile(backend=counter)
        elif way == "part":
            model.hidden = torch.compile(model.hidden, backend=counter)
        else:
            forward = torch.compile(lambda x, m=model: m(x) * 1.0, backend=counter, fullgraph=way == "whole function")
        with watch(inside, optimizer, every=5) as w:
            results.append(steps(model, optimizer, w, 40, forward))
            if watch is trainings.quietly:
                assert not w.report.failures
                assert [sample.step for sample in w.history.samples] == [*range(10), 10, 15, 20, 25, 30, 35]
                assert set(w.history.last.weights) == {n.replace("_orig_mod.", "") for n, _ in model.named_parameters()}
        graphs.append(counter.frame_count)
    torch._dynamo.reset()
    assert results[0] == results[1]
    assert graphs[0] == graphs[1] + ("function" in way)


def _process(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(net())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    rule("X01", "own", "error", when="watch", title="t", why="w.", fix="f", source="s")(
        lambda history: [Found("on all"), *([Found("on the second", module="2")] if rank == 1 else [])]
    )
    with rn.watch(model, optimizer, log=f"{folder}/log{rank}.jsonl") as w:
        steps(model, optimizer, w, 12)
        names = set(w.history.last.weights), set(w.history.last.layers)
        report = w.gather()
    messages = [(finding.message, finding.count) for finding in report.findings]
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump([messages, sorted(names[0]), sorted(names[1]), list(report.failures)], file)
    torch.distributed.destroy_process_group()
    sys.stderr.flush()
    # Freed here, torch's reducer takes the group's thread down with the GIL held, for which that thread may be waiting.
    os._exit(0)


def test_processes_tell_once_and_gather(tmp_path, capfd):
    spawn(_process, (str(tmp_path),), nprocs=2)
    for rank in (0, 1):
        messages, weights, seen, failures = json.loads((tmp_path / f"{rank}.json").read_text())
        assert messages == [["on all", 20], ["on the second", 10]]
        assert weights == sorted(dict(net().named_parameters()))
        assert seen == ["1", "2"]
        assert not failures
    told = capfd.readouterr().err
    assert told.count("on all") == 1
    assert "on the second" not in told
    assert (tmp_path / "log0.jsonl").exists()
    assert not (tmp_path / "log1.jsonl").exists()


def test_gathering_in_one_process_is_the_report():
    w = watched(net(), count=3)
    assert w.gather() == w.report


# ---- in and out


def test_errors_leave_the_block_and_hooks_are_gone():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def train():
        with rn.watch(model, optimizer, on_error="raise") as w:
            steps(model, optimizer, w, 3)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        train()
    assert not any(module._forward_hooks for module in model.modules())
    assert not optimizer._optimizer_step_pre_hooks


def test_raising_stops_at_the_first_error():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    taken = []

    def train():
        with rn.watch(model, optimizer, on_error="raise") as w:
            for step in range(20):
                taken.append(step)
                steps(model, optimizer, w, 1) if step != 4 else (optimizer.step(), w.step(math.nan))

    with pytest.raises(DiagnosisError, match="the loss of step 4 is nan") as caught:
        train()
    assert taken[-1] == 4
    assert [finding.id for finding in caught.value.report.findings] == ["W01"]


def test_an_error_seen_only_at_the_end_does_not_hide_the_users(own_rule):
    own_rule(lambda history: [Found("late")], severity="error")
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def train(fails):
        with rn.watch(model, optimizer, on_error="raise") as w:
            F.cross_entropy(model(X), Y).backward()
            optimizer.step()  # and no w.step: the sample waits
            if fails:
                raise KeyError("mine")
            return w

    with pytest.raises(KeyError, match="mine"):
        train(fails=True)
    with pytest.raises(DiagnosisError, match="late"):
        train(fails=False)


def test_a_watch_is_entered_once_at_a_time_and_again_later():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with rn.watch(model, optimizer, on_error="silent") as w:
        steps(model, optimizer, w, 3)
        with pytest.raises(RuleError, match="under way already"), w:
            pass
        steps(model, optimizer, w, 3)
        with rn.watch(model, optimizer, on_error="silent") as inner:
            steps(model, optimizer, inner, 3)
    assert (w.history.step, inner.history.step) == (9, 3)
    with w:
        steps(model, optimizer, w, 3)
    assert w.history.step == 12
    assert not w.report.failures
    assert not any(module._forward_hooks for module in model.modules())


def test_without_saying_the_loss():
    """What the optimizer does is seen all the same."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with rn.watch(model, optimizer, on_error="silent") as w:
        for _ in range(12):
            F.cross_entropy(model(X), Y).backward()
            optimizer.step()
    assert len(w.history.samples) == 10
    assert "W19" in ids(w)


def test_settings_that_cannot_be():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for options in ({"every": 0}, {"dense": -1}, {"on_error": "explode"}):
        with pytest.raises(RuleError, match="every is 1 or more, dense 0 or more"):
            rn.watch(model, optimizer, **options)
    with pytest.raises(RuleError, match="there is no rule W99"):
        rn.watch(model, optimizer, ignore=["W99"])
    with pytest.raises(RuleError, match=r"watch takes a torch\.optim\.Optimizer"):
        rn.watch(model, [])
    with pytest.raises(RuleError, match=r"got the class SGD: write SGD\(model\.parameters\(\), lr=0\.01\)"):
        rn.watch(model, torch.optim.SGD)
    with pytest.raises(RuleError, match=r"got str: write torch\.optim\.SGD\(model\.parameters\(\), lr=0\.01\)"):
        rn.watch(model, [optimizer, "adam"])
    for bad in ([], {"a": 1}, (model, "b")):
        with pytest.raises(RuleError, match="watch takes a model"):
            rn.watch(bad, optimizer)


def test_findings_go_to_a_file(tmp_path):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with rn.watch(model, optimizer, on_error="silent", log=tmp_path / "log.jsonl") as w:
        w.step(math.inf)
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "W01"


def test_rules_can_be_left_out():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for name in ("W01", "non-finite"):
        with rn.watch(model, optimizer, on_error="silent", ignore=[name]) as w:
            w.step(math.nan)
        assert not w.report.findings


def test_the_name_is_the_function():
    assert rn.watch is watch_function


# ---- rules, beside their examples


def train(model, optimizer, loss_of, batch, count, fits=False, every=25, validate=None):
    with rn.watch(model, optimizer, on_error="silent", every=every) as w:
        for step in range(count):
            x, y = batch(step)
            optimizer.zero_grad()
            outputs = model(x)
            loss = loss_of(outputs, y)
            loss.backward()
            optimizer.step()
            w.step(loss, outputs, y) if fits else w.step(loss)
            if validate:
                validate(w, step)
    assert not w.report.failures
    return w


def message(w, id):
    return next(finding.message for finding in w.report.findings if finding.id == id)


class Overflows(nn.Module):
    def forward(self, x):
        return x * torch.where(x.mean() < 2, 1.0, math.inf)


def test_the_layer_that_is_first_not_finite_is_named():
    """A loop that leaves out steps whose loss is not finite: the weights stay well."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), Overflows(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with rn.watch(model, optimizer, on_error="silent") as w:
        for step in range(60):
            x = X if step < 40 else 100 * X
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), Y)
            if loss.isfinite():
                loss.backward()
            optimizer.step()
            w.step(loss)
    assert ids(w) == {"W01"}
    assert [finding.module for finding in w.report.findings] == ["", "2"]
    assert "all parameters are finite" in w.report.findings[0].message


def test_a_gradient_that_is_not_finite_is_named_without_a_loss():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with rn.watch(model, optimizer, on_error="silent") as w:
        F.cross_entropy(model(X), Y).backward()
        model[1].weight.grad[0, 0] = math.nan
        optimizer.step()
    assert message(w, "W01") == "the gradient of 1.weight is not finite in step 0"


def test_weights_that_round_back_to_what_they_were():
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3)).bfloat16()
    x = X.bfloat16()
    w = train(model, torch.optim.AdamW(model.parameters(), 1e-5), F.cross_entropy, lambda _: (x, Y), 250)
    assert "of the entries of 0.weight, 2.weight changed" in message(w, "W07")
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3)).bfloat16()
    w = train(model, torch.optim.SGD(model.parameters(), 1e-7), F.cross_entropy, lambda _: (x, Y), 250)
    assert "did not change, in bfloat16" in message(w, "W07")


@pytest.mark.parametrize("rate", [1e-9, 10.0])
def test_learning_rates_that_are_far_off(rate):
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    y = X[:, :1]
    w = train(model, torch.optim.Adam(model.parameters(), rate), F.mse_loss, lambda _: (X, y), 100)
    assert "W06" in ids(w)
    assert ("no step changed" if rate < 1 else "each step changes") in message(w, "W06")


def test_a_rate_that_falls_to_zero_is_none_too_small():
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 250)
    w = train(
        model, optimizer, F.mse_loss, lambda _: (X, X[:, :1]), 300,
        validate=lambda w, step: schedule.step() if step < 249 else optimizer.param_groups[0].update(lr=0.0),
    )  # fmt: skip
    assert not w.report.findings


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_validation_below_training_is_explained(scale):
    """D2 of the mission: a smaller error where the targets vary less, though the outputs follow them worse."""
    x = torch.randn(2000, 8)
    y = x[:, :1] + 0.5 * torch.randn(2000, 1)
    x[1000:] *= scale
    y[1000:] = x[1000:, :1] + 0.5 * scale**0.5 * torch.randn(1000, 1)
    model = nn.Linear(8, 1)

    def validate(w, step):
        if step % 20 == 19:
            with torch.no_grad():
                outputs = model(x[1000:])
            w.validate(F.mse_loss(outputs, y[1000:]), outputs, y[1000:])

    def batch(step):
        i = torch.randint(1000, (64,))
        return x[i], y[i]

    w = train(model, torch.optim.Adam(model.parameters(), 0.01), F.mse_loss, batch, 400, fits=True, validate=validate)
    assert ids(w) == (set() if scale == 1 else {"W22"})
    if scale < 1:
        assert "yet outputs follow the targets worse: correlation 0." in message(w, "W22")
        assert "The variance of the targets is 0." in message(w, "W22")
        assert w.report.findings[0].severity == "warning"


def test_validation_below_training_with_dropout_is_information():
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 1))

    def validate(w, step):
        if step % 20 == 19:
            model.eval()
            w.validate(F.mse_loss(model(X), X[:, :1]).item())
            model.train()

    w = train(
        model, torch.optim.Adam(model.parameters(), 0.003), F.mse_loss, lambda _: (X, X[:, :1]), 400, validate=validate
    )
    assert [(finding.id, finding.severity) for finding in w.report.findings] == [("W22", "info")]
    assert "2 drop values only in training" in message(w, "W22")


def test_the_floor_of_a_second_softmax():
    x = torch.randn(512, 10)
    y = x.argmax(1)
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Softmax(1))
    with torch.no_grad():
        model[0].weight.copy_(100 * torch.eye(10))
    w = train(model, torch.optim.SGD(model.parameters(), 0.01), F.cross_entropy, lambda _: (x, y), 600)
    assert "the lowest that a cross-entropy of probabilities can have" in message(w, "W08")


@pytest.mark.parametrize(
    ("outputs", "targets", "kind"),
    [
        (torch.randn(6, 4), torch.randint(4, (6,)), "counts"),
        (torch.randn(2, 4, 3, 3), torch.randint(4, (2, 3, 3)), "counts"),
        (torch.randn(2, 5, 4), torch.randint(4, (2, 5)), "counts"),
        (torch.randn(6, 1), torch.tensor([0.0, 1, 1, 0, 1, 0]), "counts"),
        (torch.randn(6), torch.randint(2, (6,)), "counts"),
        (torch.randn(6, 1), torch.randn(6), "fit"),
        (torch.randn(6, 3), torch.randn(6, 3), "fit"),
        (torch.randn(6, 3), torch.randint(2, (6, 3)).float(), None),  # several labels
        (torch.randn(6, 3), torch.randn(7), None),
        (torch.randint(3, (6,)), torch.randint(3, (6,)), None),
    ],
)
def test_outputs_and_targets(outputs, targets, kind):
    from renorm.diagnose.fit import compared, fetched
    from renorm.diagnose.history import Counts, Fit

    made = compared(outputs, targets)
    if made is None:
        assert kind is None
        return
    result = fetched(made[0], made[1].tolist(), 3, True)
    assert isinstance(result, {"counts": Counts, "fit": Fit, None: type(None)}[kind])
    if isinstance(result, Fit):
        y, t = outputs.flatten().double(), targets.flatten().double()
        assert result.error == pytest.approx((y - t).square().mean().item())
        assert result.correlation == pytest.approx(torch.corrcoef(torch.stack([y, t]))[0, 1].item())
        assert result.shift == pytest.approx((y - t).mean().item())
    if isinstance(result, Counts):
        assert sum(result.labels) == sum(result.predicted) == targets.numel()


def test_labels_outside_of_the_classes_are_no_labels():
    from renorm.diagnose.fit import compared, fetched

    outputs = torch.eye(3)
    counts = fetched(
        *(lambda made: (made[0], made[1].tolist()))(compared(outputs, torch.tensor([0, 255, -100]))), 0, False
    )
    assert counts.labels == (1, 0, 0)
    assert counts.predicted == (1, 0, 0)
    assert counts.right == (1, 0, 0)


def test_a_learning_rate_may_be_a_tensor():
    model = net()
    w = watched(model, torch.optim.SGD(model.parameters(), torch.tensor(0.25), foreach=False), count=2)
    assert set(w.history.last.rates.values()) == {0.25}


# ---- loops


def test_a_watch_that_saw_no_step_says_so():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with rn.watch(model, optimizer) as w:
        pass
    note = "no weight, gradient or layer was looked at: optimizer.step() was never seen inside of the `with` block, "
    assert w.report.failures == w.gather().failures == (f"{note}w.step(loss) neither",)
    assert w.report.ok
    outside = rn.watch(model, optimizer)
    steps(model, optimizer, outside, 3)
    assert outside.report.failures == (f"{note}w.step(loss) 3 times",)
    with w:
        optimizer.step()
    assert not w.report.failures
    assert not w.gather().failures


def test_an_optimizer_that_never_steps_is_named():
    model = net()
    before = [p.clone() for p in model.parameters()]
    with rn.watch(model, torch.optim.Adam(model.parameters()), on_error="silent") as w:
        for _ in range(60):
            w.step(F.cross_entropy(model(X[:32]), Y[:32]))
    assert all(map(torch.equal, model.parameters(), before))
    assert [finding.message for finding in w.report.errors] == [
        "50 losses, and not one step of Adam: no weight has changed"
    ]


def test_weights_that_move_without_a_step_that_is_seen_are_no_error():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)  # another one steps, as a compiled step is not seen
    with rn.watch(model, optimizer, on_error="silent") as w:
        for _ in range(60):
            loss = F.cross_entropy(model(X[:32]), Y[:32])
            loss.backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
            model.zero_grad()
            w.step(loss)
    assert not w.report.errors


def test_gradients_that_were_set_to_zero_are_none():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with rn.watch(model, optimizer, on_error="silent") as w:
        for _ in range(5):
            loss = F.cross_entropy(model(X[:32]), Y[:32])
            loss.backward()
            optimizer.zero_grad(set_to_none=False)
            optimizer.step()
            w.step(loss)
    assert "the gradients of all 6 parameters are 0 when SGD steps" in str(w.report)


def test_a_frozen_part_may_step_without_gradients():
    model = net().requires_grad_(False)
    other = nn.Linear(8, 3)
    optimizers = torch.optim.SGD(model.parameters(), 0.1), torch.optim.SGD(other.parameters(), 0.1)
    with rn.watch({"frozen": model, "other": other}, optimizers, on_error="silent") as w:
        for _ in range(5):
            loss = F.cross_entropy(other(X[:32]), Y[:32])
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
                w.step(loss)
    assert "W23" not in {finding.id for finding in w.report.findings}


@pytest.mark.parametrize("mode", ["eval", "back to train", "train"])
def test_batches_that_validation_takes_in(mode):
    model = net()

    def validate(step):
        if step % 15 == 14:
            model.train(mode == "train")
            with torch.no_grad():
                loss = torch.stack([F.cross_entropy(model(X[i : i + 64]), Y[i : i + 64]) for i in (0, 64, 128)]).mean()
            model.train(mode != "eval")
            w.validate(loss)
            model.train()

    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with rn.watch(model, optimizer, on_error="silent") as w:
        steps(model, optimizer, w, 110, each=validate)
    found = [finding.message for finding in w.report.findings if finding.id == "W26"]
    expected = ["batch norms took in 3 batches in training mode between the last step and validate()"]
    assert found == (expected if mode == "train" else [])


def test_a_model_beside_the_one_that_is_trained():
    maker, judge = nn.Linear(4, 8), nn.Linear(8, 1)
    optimizer = torch.optim.SGD(judge.parameters(), 0.1)
    with rn.watch({"maker": maker, "judge": judge}, optimizer, on_error="silent") as w:
        for _ in range(30):
            loss = F.softplus(judge(maker(torch.randn(32, 4)))).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            w.step(loss)
    found = [(f.severity, f.module) for f in w.report.findings if f.id == "W25"]
    assert found == [("warning", "maker")]
