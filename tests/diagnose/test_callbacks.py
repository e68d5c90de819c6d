"""`watch` inside the libraries that own the loop: each finds a run that diverges, and changes nothing of a good one."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import renorm as rn
from renorm.diagnose import RULES, Found, callbacks, rule
from renorm.errors import DiagnosisError, RuleError

os.environ.setdefault("KERAS_BACKEND", "torch")

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries warn of one another's versions

STEPS = 12
BATCH = 8


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(STEPS * BATCH, 6, generator=generator)
    return x, x[:, :3].argmax(1)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def steps_of(callback):
    return [step for step, _ in callback.watcher.watch.history.losses]


def losses_of(callback):
    return [loss for _, loss in callback.watcher.watch.history.losses]


# A run in each library: with a callback or without, returning the weights that were learned.


def with_lightning(callback, rate, epochs=1, accumulate=1):
    pl = pytest.importorskip("lightning.pytorch")

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()

        def training_step(self, batch, index):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch, index):
            self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), rate)

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), BATCH)
    module = Module()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[callback] if callback else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=accumulate,
    )
    trainer.fit(module, loader, loader)
    return module.net.state_dict()


def with_transformers(callback, rate, epochs=1, accumulate=1, own_loss=True):
    library = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x, labels=None):
            logits = self.net(x)
            return {"loss": nn.functional.cross_entropy(logits, labels) if own_loss else None, "logits": logits}

    x, y = data()
    samples = [{"x": x[i], "labels": y[i]} for i in range(len(y))]
    arguments = library.TrainingArguments(
        output_dir=".",
        logging_steps=1,
        num_train_epochs=epochs,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=accumulate,
        learning_rate=rate,
        optim="sgd",
        lr_scheduler_type="constant",
        eval_strategy="epoch",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        max_grad_norm=0,
    )
    model = Model()
    library.Trainer(
        model,
        arguments,
        train_dataset=samples,
        eval_dataset=samples,
        callbacks=[callback] if callback else [],
        compute_loss_func=None if own_loss else lambda out, y, **_: nn.functional.cross_entropy(out["logits"], y),
    ).train()
    return model.net.state_dict()


def with_keras(callback, rate, epochs=1):
    keras = pytest.importorskip("keras")
    keras.utils.set_random_seed(0)
    model = keras.Sequential([
        keras.Input((6,)),
        keras.layers.Dense(16, activation="tanh"),
        keras.layers.Dense(3),
    ])  # fmt: skip
    model.compile(
        keras.optimizers.SGD(rate), keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False
    )
    x, y = (part.numpy() for part in data())
    model.fit(
        x,
        y,
        batch_size=BATCH,
        epochs=epochs,
        shuffle=False,
        validation_data=(x, y),
        verbose=0,
        callbacks=[callback] if callback else [],
    )
    return {str(i): weight.value.detach().clone() for i, weight in enumerate(model.trainable_variables)}


def with_skorch(callback, rate, epochs=1):
    library = pytest.importorskip("skorch")
    x, y = (part.numpy() for part in data())
    made = library.NeuralNetClassifier(
        net(),
        criterion=nn.CrossEntropyLoss,
        lr=rate,
        batch_size=BATCH,
        max_epochs=epochs,
        train_split=library.dataset.ValidSplit(4, stratified=False),
        verbose=0,
        callbacks=[("watch", callback)] if callback else [],
    )
    made.fit(x, y)
    return made.module_.state_dict()


LIBRARIES = {
    "lightning": with_lightning,
    "transformers": with_transformers,
    "keras": with_keras,
    "skorch": with_skorch,
}


@pytest.fixture(params=LIBRARIES)
def library(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return request.param


def made(library, **options):
    pytest.importorskip("lightning.pytorch" if library == "lightning" else library)
    return getattr(callbacks, library)(**options)


def test_a_good_run_is_the_same_and_has_no_findings(library):
    callback = made(library, on_error="silent")
    watched = LIBRARIES[library](callback, 0.05, epochs=2)
    plain = LIBRARIES[library](None, 0.05, epochs=2)
    assert all(torch.equal(watched[name], plain[name]) for name in plain)
    assert callback.report.findings == ()
    assert callback.report.failures == ()


def test_every_step_has_its_loss_and_every_sample_its_numbers(library):
    callback = made(library, on_error="silent", every=1)
    LIBRARIES[library](callback, 0.05, epochs=2)
    history = callback.watcher.watch.history
    per_epoch = STEPS * 3 // 4 if library == "skorch" else STEPS
    assert history.step == 2 * per_epoch
    assert len(losses_of(callback)) == history.step
    assert losses_of(callback)[0] == pytest.approx(np.log(3), rel=0.5)
    assert np.mean(losses_of(callback)[-4:]) < np.mean(losses_of(callback)[:4])
    assert len(history.validations) == 2
    sample = history.last
    assert set(sample.gradients) == set(sample.weights) == set(sample.updates)
    assert len(sample.weights) == 4
    assert all(value > 0 for value in (*sample.gradients.values(), *sample.updates.values()))
    assert list(sample.rates.values()) == pytest.approx([0.05] * 4)
    # The update of plain gradient descent is the gradient times the rate, if both are of the same step.
    for name, gradient in sample.gradients.items():
        assert sample.updates[name] == pytest.approx(0.05 * gradient, rel=1e-3)


@pytest.fixture
def finite():
    """A rule of our own, so that the test does not depend on which there are."""

    def find(history):
        if history.losses and not np.isfinite(history.losses[-1][1]):
            yield Found(f"the loss is {history.losses[-1][1]}")

    rule("X01", "finite-loss", "error", title="", why="", fix="", source="", when="watch")(find)
    yield
    del RULES["X01"]


def test_a_broken_run_is_stopped(library, finite):
    callback = made(library, on_error="raise")
    with pytest.raises(DiagnosisError):
        LIBRARIES[library](callback, float("inf"), epochs=2)
    assert callback.report.errors
    # And the same callback watches the next run.
    LIBRARIES[library](callback, 0.05)
    assert callback.report.findings == ()


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_accumulated_batches_are_one_step(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole, parts = (made(name, on_error="silent", every=1) for _ in range(2))
    LIBRARIES[name](whole, 0.05)
    LIBRARIES[name](parts, 0.05, accumulate=3)
    assert parts.watcher.watch.history.step == len(losses_of(parts)) == STEPS // 3
    assert parts.report.findings == ()
    if name == "lightning":  # the trainer shuffles
        assert losses_of(parts)[0] == pytest.approx(np.mean(losses_of(whole)[:3]), rel=0.1)


def test_the_trainers_own_loss(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    callback = made("transformers", on_error="silent")
    with_transformers(callback, 0.05, own_loss=False)
    assert len(losses_of(callback)) == STEPS
    assert losses_of(callback)[0] == pytest.approx(np.log(3), rel=0.5)


def test_the_other_name_of_lightning(monkeypatch):
    other = pytest.importorskip("pytorch_lightning")
    for name in list(sys.modules):
        if name.partition(".")[0] == "lightning":
            monkeypatch.delitem(sys.modules, name)
    callbacks._class.cache_clear()
    assert isinstance(callbacks.lightning(), other.Callback)
    callbacks._class.cache_clear()


def test_callbacks_can_be_pickled(library):
    callback = made(library, every=7, on_error="silent")
    LIBRARIES[library](callback, 0.05)
    again = pickle.loads(pickle.dumps(callback.watcher))
    assert again.options == {"every": 7, "on_error": "silent"}
    assert again.report.findings == ()
    assert type(pickle.loads(pickle.dumps(made(library, every=3)))) is type(callback)


def test_skorch_clones():
    base = pytest.importorskip("sklearn.base")
    callback = made("skorch", every=7)
    assert base.clone(callback).get_params() == {"every": 7}
    assert callback.set_params(every=5).get_params() == {"every": 5}


def test_an_unknown_option():
    pytest.importorskip("skorch")
    with pytest.raises(RuleError, match=r"a callback takes every, .*; got evry"):
        callbacks.skorch(evry=3)


def test_keras_on_another_backend(monkeypatch):
    keras = pytest.importorskip("keras")
    callbacks._class.cache_clear()
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(RuleError, match="must run on torch; its backend is jax"):
        callbacks.keras()
    callbacks._class.cache_clear()


def test_a_missing_name():
    with pytest.raises(AttributeError, match="no attribute 'PaddleWatch'"):
        _ = callbacks.PaddleWatch


def test_no_library_is_imported():
    code = (
        "import sys, renorm, renorm.diagnose.callbacks; "
        "print([n for n in ('lightning', 'pytorch_lightning', 'transformers', 'keras', 'skorch') if n in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"
    assert rn.diagnose is not None
