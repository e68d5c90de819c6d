"""`watch(writer=)`: what TensorBoard and MLflow are given, read back, and what becomes of one that fails."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import renorm as rn
from renorm.diagnose.callbacks import _Watcher
from renorm.errors import RuleError

X, Y = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3


class Mlflow:
    """The two functions of mlflow's documentation."""

    def __init__(self, error=None):
        self.metrics, self.texts, self.error, self.calls = {}, {}, error, 0

    def log_metrics(self, metrics, step=None):
        self.calls += 1
        if self.error is not None:
            raise self.error
        for key, value in metrics.items():
            self.metrics.setdefault(key, {})[step] = value

    def log_text(self, text, artifact_file):
        self.texts[artifact_file] = text


def train(writer, count=12, rate=0.1, on_error="silent", **options):
    """Losses, weights and the watch of a short training."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), rate)
    losses, norms = [], []
    with rn.watch(model, optimizer, every=5, dense=5, on_error=on_error, writer=writer, **options) as w:
        for _ in range(count):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(X), Y)
            loss.backward()
            norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
            optimizer.step()
            w.step(loss)
            losses.append(loss.item())
        w.validate(0.75)
    return losses, norms, w


SAMPLED = [0, 1, 2, 3, 4, 5, 10]


def test_tensorboard(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        losses, norms, _ = train(writer)
    read = EventAccumulator(str(tmp_path)).Reload()

    def scalars(tag):
        return {event.step: event.value for event in read.Scalars(tag)}

    assert scalars("renorm/loss") == pytest.approx({step: losses[step] for step in SAMPLED})
    assert scalars("renorm/gradient norm") == pytest.approx({step: norms[step] for step in SAMPLED}, rel=1e-5)
    assert scalars("renorm/learning rate") == pytest.approx(dict.fromkeys(SAMPLED, 0.1))
    assert scalars("renorm/validation loss") == {12: 0.75}
    assert set(scalars("renorm/errors").values()) == {0.0}
    assert list(scalars("renorm update over weight/0.weight")) == SAMPLED
    assert any(tag.startswith("renorm layers/1/") for tag in read.Tags()["scalars"])


def test_finding_in_tensorboard(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        _, _, w = train(writer, rate=math.inf)
    (error,) = w.report.errors
    read = EventAccumulator(str(tmp_path)).Reload()
    (text,) = read.Tensors(f"renorm/{error.slug}/text_summary")
    assert error.message.split()[0] in text.tensor_proto.string_val[0].decode()
    assert text.step == error.step
    assert read.Scalars("renorm/errors")[-1].value == 1


def test_mlflow():
    mlflow = Mlflow()
    losses, norms, _ = train(mlflow)
    assert mlflow.metrics["renorm/loss"] == pytest.approx({step: losses[step] for step in SAMPLED})
    assert mlflow.metrics["renorm/gradient norm"] == pytest.approx({step: norms[step] for step in SAMPLED}, rel=1e-5)
    assert mlflow.metrics["renorm/validation loss"] == {12: 0.75}
    assert mlflow.calls <= 2 * len(SAMPLED) + 2
    assert not mlflow.texts


def test_finding_in_mlflow():
    mlflow = Mlflow()
    _, _, w = train(mlflow, rate=math.inf)
    (error,) = w.report.errors
    assert mlflow.texts[f"renorm/001-{error.slug}.txt"].startswith(f"error {error.id}")


def test_no_text():
    """A writer of numbers only has no findings."""
    mlflow = Mlflow()
    mlflow.log_text = None
    _, _, w = train(mlflow, rate=math.inf)
    assert w.report.errors
    assert not w.report.failures
    assert max(mlflow.metrics["renorm/errors"].values()) == 1


def test_several_optimizers():
    mlflow = Mlflow()
    model = nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 3)])
    optimizers = [torch.optim.SGD(part.parameters(), rate) for part, rate in zip(model, (0.1, 0.2), strict=True)]
    with rn.watch(model, optimizers, on_error="silent", writer=mlflow) as w:
        for _ in range(3):
            for part, optimizer in zip(model, optimizers, strict=True):
                optimizer.zero_grad()
                loss = F.cross_entropy(part(X), Y)
                loss.backward()
                optimizer.step()
                w.step(loss)
    assert mlflow.metrics["renorm/optimizer 1/learning rate"] == {0: 0.2, 1: 0.2, 2: 0.2}
    assert list(mlflow.metrics["renorm gradient norm/optimizer 0/0.weight"]) == [0, 1, 2]


def test_results_are_the_same():
    assert train(Mlflow())[0] == train(None)[0]


def test_failing_writer(capsys):
    """It is told once, the training goes on, and the rules are asked all the same."""
    mlflow = Mlflow(OSError("disk full"))
    losses, _, w = train(mlflow, on_error="print")
    assert losses == train(None)[0]
    assert w.report.failures == ("the writer failed and is off: OSError: disk full",)
    assert capsys.readouterr().err.count("disk full") == 1
    assert mlflow.calls == 1
    assert train(Mlflow(OSError("disk full")), rate=math.inf)[2].report.errors


def test_no_writer():
    with pytest.raises(RuleError, match=r"add_scalar.*log_metrics.*got str"):
        train("runs/1")


def test_callback_without_its_writer():
    """A callback is copied and pickled where a writer, with its thread and file, cannot be."""
    copied = copy.deepcopy(_Watcher({"writer": Mlflow(), "every": 50}))
    assert copied.options == {"every": 50}
