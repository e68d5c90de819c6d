"""`watch` for the libraries that own the training loop: Lightning, Hugging Face's Trainer, Keras 3 and skorch.

None of them is imported before its callback is asked for. A callback takes the options of `renorm.watch`, and has what
was found in `report`, while it trains and after.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from renorm.diagnose.finding import Report
from renorm.diagnose.watch import Watch, watch
from renorm.errors import RuleError

__all__ = ["keras", "lightning", "skorch", "transformers"]

Method = Callable[..., Any]


class _Watcher:
    """A watch that begins when a training loop does, ends with it, and can be pickled."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        taken = list(inspect.signature(watch).parameters)[3:]  # but model, optimizer and loader
        unknown = [name for name in options if name not in taken]
        if unknown:
            raise RuleError(f"a callback takes {', '.join(taken)}; got {', '.join(unknown)}")
        self.options = dict(options)
        self.watch: Watch | None = None

    @property
    def report(self) -> Report:
        """What was found so far."""
        return Report(()) if self.watch is None else self.watch.report

    def begin(self, model: nn.Module, optimizers: Iterable[Optimizer], loader: Any = None) -> None:
        self.end(quiet=True)  # a run that was broken off
        self.watch = watch(model, tuple(optimizers), loader, **self.options)
        self.watch.__enter__()

    def step(self, loss: Tensor | float | None) -> None:
        if self.watch is not None and loss is not None:
            self.watch.step(loss)

    def validate(self, loss: Tensor | float | None) -> None:
        if self.watch is not None and loss is not None:
            self.watch.validate(loss)

    def end(self, *, quiet: bool = False) -> None:
        if self.watch is not None:
            self.watch.close(quiet=quiet)

    def __getstate__(self) -> dict[str, Any]:
        # Hooks, findings and writers belong to the process that trains.
        return {"options": {k: v for k, v in self.options.items() if k != "writer"}, "watch": None}


def lightning(**options: Any) -> Any:
    """A callback for ``lightning.Trainer(callbacks=[...])``.

    Args:
        options: those of `renorm.watch` but model, optimizer and loader: ``every``, ``on_error`` ...

    ``.report`` has the findings. The validation loss is the metric ``val_loss`` or ``valid_loss``, where the module
    logs one. It works for ``pytorch_lightning``, too: whichever of the two was imported first.

    Raises RuleError for an option that `renorm.watch` does not have, ModuleNotFoundError without the library.
    """
    return _new("Lightning", options)


def transformers(**options: Any) -> Any:
    """A callback for ``transformers.Trainer(callbacks=[...])``.

    Args:
        options: those of `renorm.watch` but model, optimizer and loader: ``every``, ``on_error`` ...

    ``.report`` has the findings. The loss is that in the model's output, or the one that the trainer logs where the
    model gives none; the validation loss is ``eval_loss``.

    Raises RuleError for an option that `renorm.watch` does not have, ModuleNotFoundError without the library.
    """
    return _new("Transformers", options)


def keras(**options: Any) -> Any:
    """A callback for ``model.fit(callbacks=[...])`` of Keras 3 on its torch backend.

    Args:
        options: those of `renorm.watch` but model, optimizer and loader: ``every``, ``on_error`` ...

    ``.report`` has the findings. Weights, gradients and losses are watched; Keras' own layers are not looked into.

    Raises RuleError for an option that `renorm.watch` does not have and where the backend is another,
    ModuleNotFoundError without the library.
    """
    return _new("Keras", options)


def skorch(**options: Any) -> Any:
    """A callback for ``skorch.NeuralNet(callbacks=[...])``.

    Args:
        options: those of `renorm.watch` but model, optimizer and loader: ``every``, ``on_error`` ...

    ``.report`` has the findings; of a net that was cloned, as a grid search does, its own copy of the callback has
    them: ``dict(net.callbacks_)``.

    Raises RuleError for an option that `renorm.watch` does not have, ModuleNotFoundError without the library.
    """
    return _new("Skorch", options)


# The classes are made when they are asked for, as attributes of this module, where pickle finds them again.


def __getattr__(name: str) -> Any:
    if name.endswith("Watch") and name.removesuffix("Watch") in _MAKERS:
        return _class(name.removesuffix("Watch"))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _new(library: str, options: Mapping[str, Any]) -> Any:
    return _class(library)(**options)


@functools.cache
def _class(library: str) -> type[Any]:
    base, methods = _MAKERS[library]()

    def init(self: Any, **options: Any) -> None:
        base.__init__(self)
        self.watcher = _Watcher(options)

    body = {"__init__": init, "report": property(_report), "__module__": __name__, "__doc__": __doc__, **methods}
    return type(f"{library}Watch", (base,), body)


def _report(self: Any) -> Report:
    """What was found so far."""
    report: Report = self.watcher.report
    return report


def _lightning() -> tuple[type[Any], dict[str, Method]]:
    known = [name for name in ("lightning.pytorch", "pytorch_lightning") if name in sys.modules]
    try:
        library = importlib.import_module(known[0] if known else "lightning.pytorch")
    except ModuleNotFoundError:
        library = importlib.import_module("pytorch_lightning")

    def on_train_start(self: Any, trainer: Any, pl_module: Any) -> None:
        self.losses, self.steps = [], trainer.global_step
        self.watcher.begin(pl_module, trainer.optimizers, trainer.train_dataloader)

    def on_train_batch_end(
        self: Any, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *rest: Any
    ) -> None:
        # What training_step returned; Lightning has divided it by the number of batches that it accumulates.
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            self.losses.append(loss.detach() * trainer.accumulate_grad_batches)
        if self.losses and trainer.global_step != self.steps:
            self.watcher.step(torch.stack(self.losses).mean())
            self.losses, self.steps = [], trainer.global_step

    def on_validation_end(self: Any, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            metrics = trainer.callback_metrics
            self.watcher.validate(next((metrics[n] for n in ("val_loss", "valid_loss") if n in metrics), None))

    def on_train_end(self: Any, trainer: Any, pl_module: Any) -> None:
        self.watcher.end()

    def on_exception(self: Any, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.watcher.end(quiet=True)

    return library.Callback, _methods(on_train_start, on_train_batch_end, on_validation_end, on_train_end, on_exception)


def _transformers() -> tuple[type[Any], dict[str, Method]]:
    library = importlib.import_module("transformers")

    def on_train_begin(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        self.losses, self.summed, self.known = [], False, False
        self.watcher.begin(model, [getattr(optimizer, "optimizer", optimizer)], kwargs.get("train_dataloader"))
        self.hook = model.register_forward_hook(functools.partial(_keep_loss, self), with_kwargs=True)

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The parts of an accumulated batch are already shares of its loss where the model was told how many there are.
        losses = torch.stack(self.losses) if self.losses else None
        self.losses = []
        if losses is not None:
            self.watcher.step(losses.sum() if self.summed else losses.mean())

    def on_log(self: Any, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs and not self.known:
            self.watcher.step(float(logs["loss"]))

    def on_evaluate(self: Any, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.watcher.validate((metrics or {}).get("eval_loss"))

    def on_train_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.hook.remove()
        self.watcher.end()

    return library.TrainerCallback, _methods(on_train_begin, on_step_end, on_log, on_evaluate, on_train_end)


def _keep_loss(callback: Any, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if model.training and isinstance(loss, Tensor) and loss.numel() == 1:
        callback.losses.append(loss.detach().reshape(()))
        callback.summed, callback.known = kwargs.get("num_items_in_batch") is not None, True


class _Steps(Optimizer):
    """Keras' optimizer to those who know torch's: the same weights, and hooks around a step that is Keras' own."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__(weights, {"lr": 0.0})
        self.update: Callable[[], Any] | None = None

    def step(self, closure: Any = None) -> Any:
        return None if self.update is None else self.update()


def _keras() -> tuple[type[Any], dict[str, Method]]:
    library = importlib.import_module("keras")
    if library.backend.backend() != "torch":
        raise RuleError(
            f"Keras must run on torch; its backend is {library.backend.backend()}: set KERAS_BACKEND=torch before "
            "keras is imported"
        )

    def on_train_begin(self: Any, logs: Any = None) -> None:
        optimizer = self.model.optimizer
        vars(optimizer).pop("apply", None)  # of a run that was broken off
        steps, apply = _Steps([variable.value for variable in self.model.trainable_variables]), optimizer.apply

        @functools.wraps(apply)
        def stepped(*args: Any, **kwargs: Any) -> Any:
            steps.param_groups[0]["lr"] = float(optimizer.learning_rate)
            steps.update = functools.partial(apply, *args, **kwargs)
            return steps.step()

        optimizer.apply = stepped
        self.seen = None
        self.watcher.begin(self.model, [steps])

    def on_epoch_begin(self: Any, epoch: int, logs: Any = None) -> None:
        self.seen = None

    def on_train_batch_end(self: Any, batch: int, logs: Any = None) -> None:
        self.watcher.step(_batch_loss(self, logs or {}))

    def on_test_end(self: Any, logs: Any = None) -> None:
        self.watcher.validate((logs or {}).get("loss"))

    def on_train_end(self: Any, logs: Any = None) -> None:
        vars(self.model.optimizer).pop("apply", None)
        self.watcher.end()

    return library.callbacks.Callback, _methods(
        on_train_begin, on_epoch_begin, on_train_batch_end, on_test_end, on_train_end
    )


def _batch_loss(callback: Any, logs: Mapping[str, Any]) -> Any:
    """The loss of the last batch: Keras tells the mean of the epoch so far."""
    tracker = next((metric for metric in callback.model.metrics if metric.name == "loss"), None)
    if tracker is None or not hasattr(tracker, "total") or not hasattr(tracker, "count"):
        return logs.get("loss")
    now = [variable.value.detach().clone().double() for variable in (tracker.total, tracker.count)]
    before, callback.seen = callback.seen, now
    return now[0] / now[1] if before is None else (now[0] - before[0]) / (now[1] - before[1])


def _skorch() -> tuple[type[Any], dict[str, Method]]:
    library = importlib.import_module("skorch.callbacks")

    def on_train_begin(self: Any, net: Any, X: Any = None, y: Any = None, **kwargs: Any) -> None:
        self.watcher.begin(net.module_, [value for value in vars(net).values() if isinstance(value, Optimizer)])

    def on_batch_end(self: Any, net: Any, batch: Any = None, training: Any = None, **kwargs: Any) -> None:
        if training:
            self.watcher.step(kwargs.get("loss"))

    def on_epoch_end(self: Any, net: Any, **kwargs: Any) -> None:
        self.watcher.validate(net.history[-1].get("valid_loss"))

    def on_train_end(self: Any, net: Any, **kwargs: Any) -> None:
        self.watcher.end()

    # scikit-learn clones a net, and with it this, by these.
    def get_params(self: Any, deep: bool = True) -> dict[str, Any]:
        return dict(self.watcher.options)

    def set_params(self: Any, **params: Any) -> Any:
        self.watcher.options.update(params)
        return self

    return library.Callback, {
        **_methods(on_train_begin, on_batch_end, on_epoch_end, on_train_end),
        "get_params": get_params,
        "set_params": set_params,
    }


def _methods(*functions: Method) -> dict[str, Method]:
    return {function.__name__: function for function in functions}


_MAKERS: dict[str, Callable[[], tuple[type[Any], dict[str, Any]]]] = {
    "Lightning": _lightning,
    "Transformers": _transformers,
    "Keras": _keras,
    "Skorch": _skorch,
}
