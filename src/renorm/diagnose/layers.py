"""What passes through the layers of a model while a step of its training is sampled.

Hooks are there only meanwhile. They change nothing: no output, no mode, no random number; and they keep out of all that
is not a plain forward pass of training (tracing, capture of a graph, function transforms, recomputation in backward).
"""

from __future__ import annotations

import math
import sys
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from renorm.diagnose.trace import kind_of_module, tensors_in

__all__ = ["Layers", "Seen", "is_compiled", "unwrapped"]

MAX_ENTRIES = 65536  # of an activation that are looked at; a strided choice of more
MAX_CALLS = 4  # of one layer in a forward pass that are told apart; more are left out
WINDOW = 5  # samples, at least, that judge whether a unit is dead
IDLE = 3  # steps without a call, after which hooks are left out
ENOUGH = 256  # entries of a unit, at least, that judge it
Numbers = dict[str, Tensor | float]

# Functions that do what an activation layer does, by the names that torch calls them in a TorchFunctionMode.
_FUNCTIONS = {"relu": "relu", "relu_": "relu", "tanh": "tanh", "tanh_": "tanh", "sigmoid": "sigmoid"} | {
    "sigmoid_": "sigmoid",
    "expit": "sigmoid",
}


@dataclass
class Seen:
    """What the forward passes since the last step showed; tensors are not fetched yet."""

    layers: dict[str, tuple[str, Numbers]] = field(default_factory=dict)  # kind and numbers, by name
    inputs: list[Tensor] = field(default_factory=list)  # the largest magnitude of each
    shapes: list[tuple[int, ...]] = field(default_factory=list)  # of the outputs
    outputs: list[tuple[str, Tensor]] = field(default_factory=list)  # largest magnitudes, where a fault is searched


class _Hook:
    """A hook that does not follow its module into a copy or a file."""

    def __init__(self, call: Callable[..., Any] | None = None, fail: Callable[[Exception], None] | None = None) -> None:
        self.call, self.fail = call, fail

    def __call__(self, *args: Any) -> None:
        if torch.compiler.is_compiling() or self.call is None or self.fail is None:
            return  # first, since what follows must not be traced
        try:
            self.call(*args)
        except Exception as error:  # a diagnosis must not stop a training run by its own bugs
            self.fail(error)

    def __deepcopy__(self, memo: Any) -> _Hook:
        return _Hook()

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


class _Functions(TorchFunctionMode):
    """Sees activations that a forward pass calls as functions."""

    def __init__(self, layers: Layers) -> None:
        super().__init__()
        self.layers = layers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not torch.compiler.is_compiling():
            kind = _FUNCTIONS.get(getattr(func, "__name__", ""))
            if kind is not None:
                self.layers.called(kind, result)
        return result


class Layers:
    """The hooks of some models, and what they saw."""

    def __init__(self, models: dict[str, nn.Module], fail: Callable[[str, Exception], None]) -> None:
        self.models = models  # by what their modules' names begin with
        self.attached = False
        self._fail = fail
        self._off: set[str] = set()  # measures that failed
        self._handles: list[Any] = []
        self._stack: list[tuple[nn.Module, str, str]] = []  # modules that run, outermost first: name, kind
        self._mode: _Functions | None = None
        self._functions = False  # whether functions may be looked at
        self._calls: Counter[str] = Counter()  # in this forward pass, by name
        self._places: dict[str, int] = {}  # storages of this pass's activations
        self._memory: dict[str, dict[str, Any]] = {}  # of the measures, by name
        self._channels: tuple[set[int], set[int]] = set(), set()  # sizes: of a Conv1d's output, of a Linear's
        self._locating = False
        self._seen = Seen()
        self._entered = False
        self._idle = 0  # steps in which no hook was called: the model runs in a compiled function, or not as modules

    def attach(self, *, locating: bool = False) -> None:
        """Look at the forward passes from now on; `locating` looks for values that are not finite, everywhere."""
        self._locating = locating
        if self.attached or self._handles or "all" in self._off:
            self.attached = True
            return
        self.attached, self._functions = True, not _has_compiled()
        for prefix, model in self.models.items():
            if is_compiled(model):
                continue
            modules = list(_eager_modules(unwrapped(model), prefix))
            self._functions &= len(modules) == sum(1 for _ in unwrapped(model).modules())
            for name, module in modules:
                kind = kind_of_module(module)
                if isinstance(module, (nn.Conv1d, nn.Linear)):
                    width = module.out_channels if isinstance(module, nn.Conv1d) else module.out_features
                    self._channels[isinstance(module, nn.Linear)].add(width)
                before = _Hook(self._entering(name, kind), self._broken)
                after = _Hook(self._left(name, kind), self._broken)
                self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                self._handles.append(module.register_forward_hook(after, always_call=True))

    def detach(self) -> None:
        """Look no more; behind the forward pass that runs, where one does."""
        self.attached = False
        if not self._stack:
            self._remove()

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def take(self) -> Seen:
        """What was seen since this was asked last."""
        seen, self._seen = self._seen, Seen()
        if self.attached and self._handles:
            self._idle = 0 if self._entered else self._idle + 1
            self._entered = False
            if self._idle >= IDLE:
                self._off.add("all")
                self._remove()
        for memory in self._memory.values():
            memory.pop("batches", None)
        return seen

    # ---- hooks

    def _broken(self, error: Exception) -> None:
        self._off.add("all")
        self._remove()
        self._fail("looking at layers", error)

    def _entering(self, name: str, kind: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not _is_plain():
                return
            self._entered = True
            if not self._stack:
                self._begin(module, args, kwargs)
            self._stack.append((module, name, kind))

        return enter

    def _left(self, name: str, kind: str) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if not self._stack or not _is_plain():
                return
            if self._stack[-1][0] is not module:  # an exception was caught somewhere inside
                while self._stack and self._stack[-1][0] is not module:
                    self._stack.pop()
            if self._stack:
                self._stack.pop()
            if output is not None and module.training and torch.is_grad_enabled():
                if self._locating and not any(module.children()):
                    self._seen.outputs += [(name, most) for most in _magnitudes(output)]
                self._measure(kind, name, module, args, output)
            if not self._stack:
                self._end(module, output)

        return leave

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """The outermost module starts."""
        self._calls.clear()
        self._places.clear()
        if not module.training or not torch.is_grad_enabled():
            return
        if not self._seen.inputs:
            self._seen.inputs += _magnitudes((args, kwargs))
        if self._functions:
            self._mode = _Functions(self)
            self._mode.__enter__()  # type: ignore[no-untyped-call]

    def _end(self, module: nn.Module, output: Any) -> None:
        """The outermost module is done, or raised."""
        if self._mode is not None:
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._mode = None
        if not self.attached:
            self._remove()
        if output is None or not module.training or not torch.is_grad_enabled():
            return
        outputs = [tensor for tensor in tensors_in(output) if type(tensor) is Tensor]
        self._seen.shapes += [tuple(tensor.shape) for tensor in outputs]
        ends = {tensor.untyped_storage().data_ptr() for tensor in outputs}
        for name, place in self._places.items():
            if place in ends:  # a head is meant to saturate
                self._seen.layers.pop(name, None)

    def called(self, kind: str, output: Any) -> None:
        """A function was called in the forward pass."""
        if self._stack and self._stack[-1][2] != kind and torch.is_grad_enabled():  # else the layer's own hook looks
            module, where, _ = self._stack[-1]
            if module.training:
                self._measure(kind, f"{kind}() in {where}" if where else f"{kind}()", module, (), output)

    @torch.no_grad()
    def _measure(self, kind: str, name: str, module: nn.Module, args: Any, output: Any) -> None:
        measure = MEASURES.get(kind)
        if measure is None or kind in self._off or type(output) is not Tensor or not output.is_floating_point():
            return
        if output.numel() == 0:
            return
        if kind not in ("batch_norm", "norm"):
            self._calls[name] += 1
            call = self._calls[name]
            if call > MAX_CALLS:
                return
            name = name if call == 1 else f"{name} (call {call})"
            self._places[name] = output.untyped_storage().data_ptr()
        try:
            # Our own calls are nobody's functions.
            with torch._C.DisableTorchFunction():
                x = args[0].detach() if args and type(args[0]) is Tensor else output.detach()
                made = measure(module, x, output.detach(), self._axis(output), self._memory.setdefault(name, {}))
        except Exception as error:
            self._off.add(kind)
            self._fail(f"looking at layers of kind {kind}", error)
            return
        if made:
            self._seen.layers[name] = kind, made

    def _axis(self, y: Tensor) -> int:
        """Where the units are: behind a convolution in dimension 1, behind a linear layer in the last."""
        convolutions, linears = self._channels
        if y.dim() == 3:
            return 1 if y.shape[1] in convolutions and y.shape[2] not in linears else 2
        return y.dim() - 1 if y.dim() > 3 and y.shape[-1] in linears and y.shape[1] not in linears else 1


# ---- what is measured

Measure = Callable[[nn.Module, Tensor, Tensor, int, dict[str, Any]], Numbers]


def _units(module: nn.Module, x: Tensor, y: Tensor, axis: int, memory: dict[str, Any]) -> Numbers:
    """`dead`: the share of units that were 0 on all entries of the last samples; `units`, `samples`, `entries`."""
    if y.dim() < 2:
        return {}
    y = thinned(y, (axis,))
    alive = y.amax([i for i in range(y.dim()) if i != axis]) > 0
    window: deque[tuple[Tensor, int]] = memory.setdefault("alive", deque(maxlen=ENOUGH))
    if window and window[-1][0].shape != alive.shape:
        window.clear()
    window.append((alive, y.numel() // y.shape[axis]))
    while len(window) > WINDOW and sum(entries for _, entries in window) - window[0][1] >= ENOUGH:
        window.popleft()
    dead = ~torch.stack([mask for mask, _ in window]).any(0)
    entries = sum(entries for _, entries in window)
    return {"dead": dead.float().mean(), "units": len(alive), "samples": len(window), "entries": entries}


def _saturated(near: float, centre: float) -> Measure:
    def measure(module: nn.Module, x: Tensor, y: Tensor, axis: int, memory: dict[str, Any]) -> Numbers:
        # By the output: the input may have been overwritten.
        flat = thinned(y, ()).float()
        return {"saturated": ((flat - centre).abs() > near).float().mean(), "entries": flat.numel()}

    return measure


def _batch_statistics(module: nn.Module, x: Tensor, y: Tensor, axis: int, memory: dict[str, Any]) -> Numbers:
    """Batch against running statistics, in units of the batch's own deviation (arXiv:2210.05153).

    `mean`: median over channels of |running mean - batch mean| / batch deviation; `var`: that of the logarithm of
    running over batch variance; `values`: entries of a channel; `samples`: size of the batch; `small`: the
    share of channels whose running variance is below 10 eps; `weak`: that of weights below 1e-3; `frozen`: whether no
    parameter ever learnt; `drift`: how far the running means went since the first sample. Several calls in a step count
    as one batch.
    """
    mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    if not isinstance(mean, Tensor) or not isinstance(var, Tensor) or nn.parameter.is_lazy(mean):
        return {}
    if x.dim() < 2 or x.shape[1] != mean.numel() or getattr(module, "axis", 1) != 1:
        return {}
    if not getattr(module, "couples_batch", True):
        return {}
    batches: list[tuple[Tensor, Tensor, int]] = memory.setdefault("batches", [])
    if len(batches) < MAX_CALLS:  # a layer that is called in a loop needs not be measured each time
        # Sums of what is above the running mean: a tenth of the time of torch.var_mean on a CPU, and as good as that
        # where the batch is anywhere near.
        part = thinned(x, (0, 1)).float() - mean.float().view(-1, *[1] * (x.dim() - 2))
        over = [i for i in range(x.dim()) if i != 1]
        above = part.mean(over)
        batches.append((mean + above, (part.square().mean(over) - above.square()).clamp(min=0), len(x)))
    batch_mean, batch_var, samples = batches[0]
    if len(batches) > 1:
        spread, batch_mean = torch.var_mean(torch.stack([batch[0] for batch in batches]), 0, correction=0)
        batch_var = torch.stack([batch[1] for batch in batches]).mean(0) + spread
        samples = sum(batch[2] for batch in batches)
    eps = float(getattr(module, "eps", None) or 1e-5)
    weight = getattr(module, "weight", None)
    weight = weight if isinstance(weight, Tensor) else None
    memory["learns"] = memory.get("learns", False) or weight is None or weight.requires_grad
    first = memory.setdefault("first", mean.detach().clone())
    values = x.numel() // x.shape[1]
    memory["values"] = min(values, memory.get("values", values))
    numbers: Numbers = {
        "mean": ((mean - batch_mean) / (batch_var + eps).sqrt()).abs().median(),
        "var": ((var.float() + eps) / (batch_var + eps)).log().abs().median(),
        "values": values,
        "fewest": memory["values"],
        "samples": samples,
        "small": (var < 10 * eps).float().mean(),
        "frozen": float(not memory["learns"]),
    }
    if weight is not None:
        numbers["weak"] = (weight.detach().abs() < 1e-3).float().mean()
    if not memory["learns"]:
        numbers["drift"] = ((mean - first) / (var + eps).sqrt()).float().square().mean().sqrt()
    return numbers


MEASURES: dict[str, Measure] = {
    "relu": _units,
    "tanh": _saturated(math.tanh(3.0), 0.0),
    "sigmoid": _saturated(1 / (1 + math.exp(-6.0)) - 0.5, 0.5),
    "batch_norm": _batch_statistics,
    "norm": _batch_statistics,
}


def thinned(x: Tensor, keep: Collection[int]) -> Tensor:
    """A strided view of about MAX_ENTRIES entries at most; the dimensions in `keep` stay whole."""
    excess = math.ceil(x.numel() / MAX_ENTRIES)
    for dim in (*range(2, x.dim()), *reversed(range(min(2, x.dim())))):
        step = min(excess, x.shape[dim])
        if step > 1 and dim not in keep:
            # From the middle of the first stretch: the border of an image is no fair choice.
            x = x[(slice(None),) * dim + (slice(step // 2, None, step),)]
            excess = math.ceil(excess / step)
    return x


def _magnitudes(values: Any) -> list[Tensor]:
    """The largest absolute value of each plain tensor of floats in `values`, nan where there is one."""
    plain = [x for x in tensors_in(values) if type(x) is Tensor and x.is_floating_point() and x.numel() > 0]
    extremes = [x.detach().aminmax() for x in plain if x.layout == torch.strided]
    return [torch.maximum(most, -least).float() for least, most in extremes]


# ---- what is not looked at


def _is_plain() -> bool:
    """Whether a forward pass runs as it is written: nothing traces, captures, transforms or recomputes it."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._current_graph_task_id() != -1  # checkpointing runs it again in backward
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or (
            torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
            and torch.cuda.is_current_stream_capturing()
        )
    )


def _has_compiled() -> bool:
    """Whether torch.compile has compiled anything: compiled code is guarded against function modes."""
    utils = sys.modules.get("torch._dynamo.utils")
    counters = getattr(utils, "counters", None) or {}
    return bool(counters.get("frames", {}).get("total", 0))


def is_compiled(model: nn.Module) -> bool:
    """Whether the whole model runs compiled, or as copies in threads."""
    while True:
        compiled = getattr(model, "_orig_mod", None) is not None or model._compiled_call_impl is not None
        if compiled or isinstance(model, (nn.DataParallel, torch.jit.ScriptModule)):
            return True
        if not isinstance(model, nn.parallel.DistributedDataParallel):
            return False
        model = model.module


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and DistributedDataParallel's wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _eager_modules(model: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules outside of compiled parts, with their names."""
    inside: set[nn.Module] = set()
    for name, module in model.named_modules(prefix=prefix):
        if module in inside:
            continue
        if is_compiled(module):
            inside.update(module.modules())
        else:
            yield name, module
