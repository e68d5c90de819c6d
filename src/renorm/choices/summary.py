"""What a model is made of: its layers, the shapes that leave them, and where each parameter count comes from."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from renorm.norms.norm import Norm

__all__ = ["Row", "Summary", "summary"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One layer."""

    name: str  # as in named_modules(); "" where it is the model itself
    kind: str  # its class
    shapes: tuple[Shape, ...]  # of the tensors it returned at its first call; none where it was not called
    num_calls: int
    num_parameters: int  # that no row above has counted
    num_trainable: int  # of these
    arithmetic: str  # how num_parameters comes about, as "64 * (3*3*3 + 1)"; empty where there are none
    shared: tuple[str, ...]  # its parameters that a row above has counted, as "weight is embedding.weight"

    @property
    def shape(self) -> str:
        """The output's shape in words, "-" where it was not called."""
        return ", ".join(str(shape) for shape in self.shapes) or "-"

    @property
    def note(self) -> str:
        """The arithmetic, what is shared, and how often it ran if not once."""
        parts = [self.arithmetic, *self.shared]
        if self.num_calls != 1 and self.kind not in ("ParameterList", "ParameterDict"):  # these cannot be called
            parts.append(f"called {self.num_calls} times" if self.num_calls else "not called")
        return "; ".join(part for part in parts if part)


@dataclass(frozen=True)
class Summary:
    """The layers of a model in the order in which they ran; printed it is a table, in a notebook too."""

    model: str  # its class
    rows: tuple[Row, ...]

    @property
    def num_parameters(self) -> int:
        """Of the whole model, shared ones counted once."""
        return sum(row.num_parameters for row in self.rows)

    @property
    def num_trainable(self) -> int:
        """Those that require a gradient."""
        return sum(row.num_trainable for row in self.rows)

    @property
    def _total(self) -> str:
        frozen = self.num_parameters - self.num_trainable
        return f"{self.num_parameters:,} parameters" + (f", {frozen:,} of them frozen" if frozen else "")

    def _cells(self) -> list[tuple[str, str, str, str, str]]:
        return [(row.name or "-", row.kind, row.shape, f"{row.num_parameters:,}", row.note) for row in self.rows]

    def __str__(self) -> str:
        cells = [_HEAD, *self._cells()]
        widths = [max(len(line[column]) for line in cells) for column in range(len(_HEAD))]
        lines = []
        for line in cells:
            padded = [text.ljust(width) for text, width in zip(line, widths, strict=True)]
            padded[3] = line[3].rjust(widths[3])
            lines.append("  ".join(padded).rstrip())
        rule = "-" * max(map(len, lines))
        return "\n".join([lines[0], rule, *lines[1:], rule, f"{self.model}: {self._total}"])

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(text)}</th>" for text in _HEAD)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(text)}</td>" for text in line) + "</tr>" for line in self._cells()
        )
        total = f'<tr><th colspan="{len(_HEAD)}">{escape(f"{self.model}: {self._total}")}</th></tr>'
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody><tfoot>{total}</tfoot></table>"


_HEAD = ("layer", "kind", "output", "parameters", "how many")


def summary(model: nn.Module, batch: Any) -> Summary:
    r"""The layers of `model` as one batch runs through them: output shapes and parameter counts, spelt out.

    $$\text{Linear: } o (i + 1), \quad \text{Conv: } o \left(\tfrac{i}{g} \textstyle\prod k + 1\right), \quad
    \text{LSTM: } 4 (h i + h^2 + 2 h), \quad \text{norm: } 2 c$$
    with i inputs, o outputs, g groups, kernel sizes k, h hidden units (torch has two biases where Keras has one) and c
    channels. A parameter that several layers share is counted in the first of them only, so that the counts add up to
    the number of the model's parameters.

    The model runs once, in evaluation mode and without gradients; modes, buffers and random numbers stay as they are.

    Args:
        model: any module.
        batch: what :func:`renorm.check` takes: inputs alone, (x, y) as a loader gives it, (x1, x2, ..., y),
            ((x1, x2), y), or a dict of the model's arguments. All of a tuple are inputs where the model's forward
            needs as many.

    Lazy layers take their sizes from the batch, and keep them. Raises whatever the model raises on this batch.

    >>> net = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.Flatten(), nn.Linear(1024, 10))
    >>> print(summary(net, torch.zeros(2, 3, 4, 4)))
    layer  kind         output         parameters  how many
    ---------------------------------------------------------------
    0      Conv2d       (2, 64, 4, 4)       1,792  64 * (3*3*3 + 1)
    1      BatchNorm2d  (2, 64, 4, 4)         128  2 * 64
    2      Flatten      (2, 1024)               0
    3      Linear       (2, 10)            10,250  10 * (1024 + 1)
    ---------------------------------------------------------------
    Sequential: 12,170 parameters
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile has wrapped
    calls = _run(model, batch)
    layers = dict(_layers(model))
    counted: dict[int, str] = {}  # a parameter's id -> what it is called where it was counted
    rows = []
    for layer in sorted(layers, key=lambda layer: calls[layer].order if layer in calls else math.inf):
        name, own = layers[layer]
        fresh = {key: value for key, value in own.items() if id(value) not in counted}
        shared = tuple(f"{key} is {counted[id(value)]}" for key, value in own.items() if key not in fresh)
        counted |= {id(value): f"{name}.{key}" if name else key for key, value in fresh.items()}
        call = calls.get(layer)
        rows.append(
            Row(
                name=name,
                kind=type(layer).__name__,
                shapes=call.shapes if call else (),
                num_calls=call.num if call else 0,
                num_parameters=sum(value.numel() for value in fresh.values()),
                num_trainable=sum(value.numel() for value in fresh.values() if value.requires_grad),
                arithmetic=_spelt(layer, list(fresh.values())),
                shared=shared,
            )
        )
    return Summary(type(model).__name__, tuple(rows))


# ---- the run


@dataclass
class _Call:
    order: int  # of the first call, among all
    num: int = 0
    shapes: tuple[Shape, ...] = ()  # what the first call returned


def _run(model: nn.Module, batch: Any) -> dict[nn.Module, _Call]:
    """Which modules ran, when, how often, and what shapes they returned."""
    calls: dict[nn.Module, _Call] = {}

    def before(layer: nn.Module, arguments: Any) -> None:
        calls.setdefault(layer, _Call(len(calls)))

    def after(layer: nn.Module, arguments: Any, output: Any) -> None:
        call = calls[layer]
        call.num += 1
        if call.num == 1:
            call.shapes = tuple(tuple(tensor.shape) for tensor in _tensors(output))

    modes = {layer: layer.training for layer in model.modules()}
    # torch's encoder layer computes its parts by itself in evaluation mode, unless hooks are attached to them
    handles = [layer.register_forward_pre_hook(before) for layer in modes]
    handles += [layer.register_forward_hook(after) for layer in modes]
    inputs = _inputs(model, batch)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model.eval()
            if isinstance(inputs, Mapping):
                model(**inputs)
            else:
                model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
        for layer, training in modes.items():
            layer.training = training
    return calls


def _inputs(model: nn.Module, batch: Any) -> Any:
    """The model's arguments, as check reads them from a batch: (x, y) and (x1, x2, ..., y) have a target at the end."""
    if not isinstance(batch, (list, tuple)):
        return batch if isinstance(batch, Mapping) else (batch,)
    if all(isinstance(part, Tensor) for part in batch) and not _takes(model, len(batch) - 1):
        return tuple(batch)
    inputs = batch[0] if len(batch) <= 2 else tuple(batch[:-1])
    return inputs if isinstance(inputs, (list, tuple, Mapping)) else (inputs,)


def _takes(model: nn.Module, number: int) -> bool:
    """Whether the model can be called with so many arguments; True where its forward does not say."""
    try:
        inspect.signature(model.forward).bind(*[None] * number)
    except TypeError:
        return False
    except ValueError:
        pass
    return True


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


# ---- the layers and their parameters


def _layers(model: nn.Module) -> Iterator[tuple[nn.Module, tuple[str, dict[str, Tensor]]]]:
    """Modules without parts, and those of parts that have parameters of their own."""
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            continue
        whole = isinstance(module, (Norm, nn.MultiheadAttention)) or hasattr(module, "parametrizations")
        if whole:
            inside |= set(module.modules())
        named = module.named_parameters(recurse=whole)
        own = {key: value for key, value in named if not is_lazy(value)}
        if own or whole or not any(module.children()):
            yield module, (name, own)


def _spelt(layer: nn.Module, parameters: list[Tensor]) -> str:
    """How many there are, as the layer's formula where it holds, else as the sizes of the tensors."""
    number = sum(value.numel() for value in parameters)
    formula = _formula(layer)
    if formula and formula[1] == number:
        return formula[0]
    sizes = Counter("*".join(map(str, value.shape)) or "1" for value in parameters)
    return " + ".join(f"{times} * {size}" if times > 1 else size for size, times in sizes.items())


def _formula(layer: nn.Module) -> tuple[str, int] | None:
    """In words and in number; a subclass with more parameters has another number, which the caller sees."""
    if isinstance(layer, nn.Linear):
        return _units(layer.out_features, (layer.in_features,), layer.bias)
    if isinstance(layer, nn.Bilinear):
        return _units(layer.out_features, (layer.in1_features, layer.in2_features), layer.bias)
    if isinstance(layer, nn.modules.conv._ConvNd):
        return _units(layer.out_channels, (layer.in_channels // layer.groups, *layer.kernel_size), layer.bias)
    if isinstance(layer, nn.MultiheadAttention):
        width = layer.embed_dim
        return f"4 * {width} * ({width} + 1)", 4 * width * (width + 1)  # query, key, value and output
    if isinstance(layer, nn.RNNBase):
        return _recurrent(layer)
    if isinstance(layer, nn.RNNCellBase):
        gates = layer.weight_hh.shape[0] // layer.hidden_size
        return _gates(gates, layer.input_size, layer.hidden_size, layer.hidden_size, layer.bias)
    return None


def _units(outputs: int, inputs: tuple[int, ...], bias: Tensor | None) -> tuple[str, int]:
    each = "*".join(map(str, inputs))
    if bias is None:
        return f"{outputs} * {each}" if len(inputs) == 1 else f"{outputs} * ({each})", outputs * math.prod(inputs)
    return f"{outputs} * ({each} + 1)", outputs * (math.prod(inputs) + 1)


def _gates(gates: int, inputs: int, hidden: int, state: int, bias: bool) -> tuple[str, int]:
    """One layer in one direction; `state` is the size of h, which a projection makes smaller than `hidden`."""
    text = f"{hidden}*{inputs} + {hidden}*{state}" + (f" + 2*{hidden}" if bias else "")
    number = gates * hidden * (inputs + state + 2 * bias)
    return (f"{gates} * ({text})" if gates > 1 else text), number


def _recurrent(layer: nn.RNNBase) -> tuple[str, int]:
    gates, state = {"LSTM": 4, "GRU": 3}.get(layer.mode, 1), layer.proj_size or layer.hidden_size
    directions = 2 if layer.bidirectional else 1
    texts, total = [], 0
    for index, times in ((0, 1), (1, layer.num_layers - 1)):
        if not times:
            continue
        inputs = directions * state if index else layer.input_size
        text, number = _gates(gates, inputs, layer.hidden_size, state, layer.bias)
        if layer.proj_size:
            text, number = f"{text} + {state}*{layer.hidden_size}", number + state * layer.hidden_size
        times *= directions
        texts.append(f"{times} * ({text})" if times > 1 else text)
        total += times * number
    return " + ".join(texts), total
