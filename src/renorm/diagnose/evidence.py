"""What one batch shows of a model: its calls, outputs, loss and gradients, and further runs on demand.

Nothing that is looked at here stays changed: parameters, buffers, gradients, modes and random numbers are put back.
"""

from __future__ import annotations

import copy
import inspect
import random
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from renorm.diagnose.hidden import TORCH, attributes, hidden, modules_of
from renorm.diagnose.trace import LossCall, Node, Trace, record, tensors_in
from renorm.errors import RuleError

__all__ = ["Evidence", "Run", "entries", "forward", "gather", "preserved"]

Loss = Callable[..., Tensor]
# How the arguments of a forward begin that are targets.
TARGETS = ("y_", "target", "label", "tgt", "truth", "gt")


@dataclass
class Run:
    """One forward pass, and what it led to."""

    trace: Trace
    inputs: Any  # what the model was given
    target: Any
    output: Any = None  # what the model returned
    loss: Tensor | None = None  # a number; None where there is no loss function and none in the output
    error: Exception | SystemExit | None = None  # that the model or the loss raised
    stage: str = ""  # where it was raised: "model" or "loss"
    untensored: str = ""  # what the loss function returned, in words, where that is no tensor

    @property
    def outputs(self) -> list[Tensor]:
        """The tensors in the output."""
        return tensors_in(self.output)


@dataclass
class Evidence:
    """What the rules of `check` look at."""

    model: nn.Module
    loss_function: Loss | None
    optimizer: Optimizer | None
    loader: Iterable[Any] | None
    inputs: Any
    target: Any
    run: Run  # of this batch, as the model was given: in its modes, with gradients
    seed: _RandomState = field(repr=False)
    loose: dict[int, Tensor] = field(default_factory=dict)  # in attributes before the run, not registered; by id
    written: dict[int, Tensor] = field(default_factory=dict)  # values of inputs before the run wrote into them; by id

    @property
    def trace(self) -> Trace:
        """The calls of the forward pass and of the loss."""
        return self.run.trace

    @property
    def losses(self) -> list[LossCall]:
        """The calls of torch's losses, one that raised among them."""
        return self.trace.losses()

    @property
    def loss(self) -> float | None:
        """The value of the loss; None where there is none or it is no number."""
        loss = self.run.loss
        return None if loss is None or loss.numel() != 1 else float(loss.detach())

    @property
    def batch_size(self) -> int:
        """The size of the first dimension of the first input."""
        return next((len(tensor) for tensor in tensors_in(self.inputs) if tensor.dim() > 0), 0)

    @cached_property
    def names(self) -> dict[nn.Module, str]:
        """Modules to their names."""
        return {module: name for name, module in self.model.named_modules()}

    @cached_property
    def gradients(self) -> dict[str, Tensor | None]:
        """The gradient of the loss by each parameter that requires one; None where it does not reach it.

        Empty where there is no loss to differentiate, and where that fails: see `backward_error`.
        """
        return self._backward[0]

    @property
    def backward_error(self) -> Exception | None:
        """What torch raised when it computed the gradients."""
        return self._backward[1]

    @cached_property
    def _backward(self) -> tuple[dict[str, Tensor | None], Exception | None]:
        try:
            return _gradients(self.run.loss, self.model), None
        except RuntimeError as error:  # such as a tensor of the graph that was changed in place
            return {}, error

    def gradients_after(self, change: Callable[[nn.Module], None]) -> dict[str, Tensor | None]:
        """The gradients, as in `gradients`, after a `change` of parameters that is put back; it writes to ``.data``."""
        with preserved(*self._touched), torch.enable_grad():
            self.seed.restore()
            change(self.model)
            return _gradients(forward(self.model, self.loss_function, self.fresh, self.target).loss, self.model)

    @property
    def fresh(self) -> Any:
        """The inputs, as they were before the model wrote into them."""
        if not self.written:
            return self.inputs
        return mapped(self.inputs, lambda x: self.written[id(x)].clone() if id(x) in self.written else x)

    @property
    def _touched(self) -> tuple[Any, ...]:
        return self.model, self.loss_function, self.inputs, self.target

    def again(
        self,
        inputs: Any = None,
        target: Any = None,
        *,
        training: bool | None = None,
        gradients: bool = False,
        change: Callable[[nn.Module], None] | None = None,
    ) -> Run:
        """Another run from the same random numbers: on other inputs, in another mode, or after a `change`.

        `training` sets the mode of all modules; `change` may do anything to parameters, buffers and modes. All of it
        is put back. An exception is in the run's `error`.
        """
        with preserved(*self._touched), torch.set_grad_enabled(gradients):
            self.seed.restore()
            if training is not None:
                self.model.train(training)
            if change is not None:
                change(self.model)
            return forward(
                self.model,
                self.loss_function,
                self.fresh if inputs is None else inputs,
                self.target if target is None else target,
            )

    def each_input(self, function: Callable[[Tensor], Tensor]) -> Any:
        """The inputs with `function` applied to every tensor of them."""
        return mapped(self.fresh, function)

    def each_target(self, function: Callable[[Tensor], Tensor]) -> Any:
        """The target with `function` applied to every tensor of it."""
        return mapped(self.target, function)

    def blame(self, tensor: Tensor) -> Node | None:
        """The call that made these values."""
        return self.trace.maker(tensor)


def gather(
    model: nn.Module,
    loss: Loss | None,
    optimizer: Optimizer | None,
    batch: Any,
    loader: Iterable[Any] | None,
) -> Evidence:
    """Run `model` and `loss` on one batch, of `loader` where none is given."""
    if batch is None:
        if loader is None:
            raise RuleError("check needs a batch, (x, y) as the loader gives it: write batch=(x, y) or loader=...")
        batch = _first(loader)
    inputs, target = parted(batch)
    if loss is None and _takes_targets(model, batch):
        inputs, target = tuple(batch), None
    elif loss is not None and isinstance(batch, Mapping) and _needs_target(loss):
        inputs, target = _parted_by_name(model, loss, batch)
    seed = _RandomState()
    loose = {id(tensor): tensor for item in hidden(model) for tensor in item.tensors}
    before = [(tensor, tensor.detach().clone()) for tensor in tensors_in(inputs) if tensor.layout is torch.strided]
    with torch.enable_grad():
        run = forward(model, loss, inputs, target)
    written = {id(tensor): value for tensor, value in before if not _same(tensor, value)}
    return Evidence(model, loss, optimizer, loader, inputs, target, run, seed, loose, written)


def _first(loader: Iterable[Any]) -> Any:
    try:
        for batch in loader:
            return batch
    except SystemExit as error:  # which would end the check without a word
        raise RuleError(f"the loader must give a batch; it raised SystemExit: {error}") from error
    raise RuleError(
        "check needs a batch, and the loader gave none: give it data, and where it drops the last batch, "
        "drop_last=False or a smaller batch_size; or write batch=(x, y)"
    )


def parted(batch: Any) -> tuple[Any, Any]:
    """(inputs, target) of a batch: a pair, a dict that is the model's arguments, or inputs alone."""
    if isinstance(batch, (list, tuple)):
        if len(batch) == 2:
            return batch[0], batch[1]
        if len(batch) == 1:
            return batch[0], None
        return tuple(batch[:-1]), batch[-1]
    return batch, None


def _takes_targets(model: nn.Module, batch: Any) -> bool:
    """Whether a model that returns its loss takes the whole batch: it needs the last part, or names it so."""
    if not isinstance(batch, (list, tuple)) or len(batch) < 2:
        return False
    try:
        signature = inspect.signature(model.forward)
        last = list(signature.bind(*batch).arguments)[-1]
    except (TypeError, ValueError):
        return False
    try:
        signature.bind(*batch[:-1])
    except TypeError:
        return True
    return _is_target(last)


def _parted_by_name(model: nn.Module, loss: Loss, batch: Mapping[str, Any]) -> tuple[Any, Any]:
    """(inputs, target) of a dict for a loss of two: the entry that is named as targets are, or the whole dict.

    The model gets what its forward names; a single entry that it does not name is its input.
    """
    targets = [name for name in batch if _is_target(str(name))]
    names, known = _arguments(model.forward), _arguments(loss)
    # A function of one's own may take the batch apart itself.
    whole = len(targets) != 1 or not (_is_target(known[1]) or known[1] == "other")
    rest = {name: value for name, value in batch.items() if name not in targets or name in names}
    anything = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())
    taken = {name: value for name, value in rest.items() if anything or name in names}
    inputs = next(iter(rest.values())) if not taken and len(rest) == 1 else taken or batch
    return inputs, batch if whole else batch[targets[0]]


def _needs_target(loss: Loss) -> bool:
    """Whether a loss cannot be called with an output alone."""
    try:
        inspect.signature(getattr(loss, "forward", loss)).bind(None)
    except TypeError:
        return len(_arguments(loss)) > 1
    except ValueError:  # nobody knows
        pass
    return False


def _is_target(name: str) -> bool:
    """Whether an argument or a key is named as targets are."""
    return name.lower() == "y" or name.lower().startswith(TARGETS)


def _arguments(function: Callable[..., Any]) -> list[str]:
    """The names of the positional arguments that a call must or may give; none where nobody knows."""
    try:
        parameters = inspect.signature(getattr(function, "forward", function)).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def forward(model: nn.Module, loss: Loss | None, inputs: Any, target: Any) -> Run:
    """The model on the inputs and the loss of what it returns, recorded; what they raise is kept."""
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings(), record(model) as trace:
        warnings.simplefilter("ignore")  # what torch warns of is among the findings
        run = Run(trace, inputs, target)
        try:
            run.output = _called(model, inputs)
        except (Exception, SystemExit) as error:  # a user's model may raise anything, and that is evidence
            run.error, run.stage = error, "model"
            return run
        try:
            made = _loss_of(loss, run.output, target)
        except (Exception, SystemExit) as error:
            run.error, run.stage = error, "loss"
            return run
        if isinstance(made, Tensor):
            run.loss = made
        elif loss is not None:
            run.untensored = "None" if made is None else type(made).__name__
    return run


def _called(model: nn.Module, inputs: Any) -> Any:
    """The model's output for a dict of arguments, for several inputs, or for one; as its forward can take them."""
    positional: tuple[Any, ...] = (inputs,)
    named: dict[str, Any] = {}
    if isinstance(inputs, Mapping):
        positional, named = (), dict(inputs)
    elif isinstance(inputs, (list, tuple)) and not hasattr(inputs, "_fields"):
        positional = tuple(inputs)
    try:
        signature = inspect.signature(model.forward)
        signature.bind(inputs)
        try:
            signature.bind(*positional, **named)
        except TypeError:  # a forward that takes the whole batch and unpacks it itself
            positional, named = (inputs,), {}
    except (TypeError, ValueError):  # it takes several, or nobody knows
        pass
    return model(*positional, **named)


def _loss_of(loss: Loss | None, output: Any, target: Any) -> Any:
    if loss is not None:
        return loss(output, target) if target is not None else loss(output)
    inside = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(inside, Tensor):
        return inside
    # A model that is its own loss function, or returns (logits, loss).
    numbers = [x for x in tensors_in(output) if x.dim() == 0 and x.is_floating_point()]
    return numbers[0] if len(numbers) == 1 and (isinstance(output, (Tensor, list, tuple))) else None


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Nested lists, tuples and dicts with `function` applied to their tensors."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: mapped(item, function) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [mapped(item, function) for item in value]
    return value


def entries(tensor: Tensor) -> Tensor:
    """The numbers in a tensor, as floats in one dimension; of a sparse one, those it stores."""
    plain = tensor.detach()
    if plain.layout is not torch.strided:
        plain = plain.coalesce().values() if plain.layout is torch.sparse_coo else plain.values()
    plain = torch.view_as_real(plain) if plain.is_complex() else plain
    return (plain if plain.dtype == torch.float64 else plain.float()).flatten()


class _RandomState:
    """Where torch's, Python's and NumPy's random numbers are."""

    def __init__(self) -> None:
        self.torch = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        self.python = random.getstate()
        self.numpy = np.random.get_state()  # noqa: NPY002 (the user's program may draw from it)

    def restore(self) -> None:
        """Go on from there."""
        torch.set_rng_state(self.torch)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002


@contextmanager
def preserved(*things: Any) -> Iterator[None]:
    """Put back, bit for bit, what a run of the model may change.

    Of modules among the `things`: parameters and buffers (the tensors themselves and their values), gradients, modes,
    submodules, attributes, and the same of layers in their lists and dicts. Of the rest: the tensors. And random
    numbers.
    """
    models = [thing for thing in things if isinstance(thing, nn.Module)]
    modules = list({id(module): module for model in models for module in modules_of(model)}.values())
    states = [
        (module.__dict__, attributes(module), [(part, dict(part)) for part in _registers(module)]) for module in modules
    ]
    boxes = [(box, copy.copy(box)) for _, plain, _ in states for box in plain.values() if _is_box(box)]
    held = [
        tensor for _, plain, parts in states for tensor in tensors_in([list(plain.values()), [p for _, p in parts]])
    ]
    loose = [tensor for thing in things if not isinstance(thing, nn.Module) for tensor in tensors_in(thing)]
    tensors = {id(tensor): tensor for tensor in (*held, *loose) if not nn.parameter.is_lazy(tensor)}.values()
    values = [(tensor, tensor.detach().clone(), tensor.grad if tensor.is_leaf else None) for tensor in tensors]
    gradients = [(grad, grad.detach().clone()) for _, _, grad in values if grad is not None]
    numbers = _RandomState()
    try:
        yield
    finally:
        for now, plain, parts in states:
            for part, registered in parts:
                part.clear()
                part.update(registered)
            for name in [name for name in now if name not in plain and name not in TORCH]:
                del now[name]
            now.update(plain)
        for box, before in boxes:
            _refill(box, before)
        with torch.no_grad():
            for tensor, value, _ in values:
                _put_back(tensor, value)
            for grad, value in gradients:
                _put_back(grad, value)
        for tensor, _, before in values:
            if tensor.is_leaf:
                tensor.grad = before
        numbers.restore()


def _gradients(loss: Tensor | None, model: nn.Module) -> dict[str, Tensor | None]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if loss is None or loss.numel() != 1 or not loss.requires_grad or not named:
        return {}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
    return dict(zip(named, found, strict=True))


def _registers(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return module._parameters, module._buffers, module._modules


def _is_box(value: Any) -> bool:
    return isinstance(value, (list, dict, set, deque))


def _refill(box: Any, before: Any) -> None:
    box.clear()
    if isinstance(box, (list, deque)):
        box.extend(before)
    else:
        box.update(before)


def _put_back(tensor: Tensor, value: Tensor) -> None:
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        return  # no layer writes into these
    if not _same(tensor, value):  # only where something changed: autograd counts versions
        tensor.data = value if tensor.shape != value.shape else tensor.data.copy_(value)


def _same(tensor: Tensor, value: Tensor) -> bool:
    """Whether the bits are the same: NaN is not equal to itself."""
    return tensor.shape == value.shape and torch.equal(_bits(tensor), _bits(value))


def _bits(tensor: Tensor) -> Tensor:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    plain = tensor.detach()
    if plain.is_complex():
        plain = torch.view_as_real(plain)
    return plain.contiguous().view(kinds[plain.element_size()])
