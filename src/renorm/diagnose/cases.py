"""Worst cases as they are handed to the user: what is known of each, as text, and as a table with pictures."""

from __future__ import annotations

import base64
import html
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from torch import Tensor

__all__ = ["SURE", "Case", "Neighbor", "WorstCases", "png"]

SURE = 0.9  # of a prediction that is called sure
_PICTURE = "height:64px;image-rendering:pixelated;margin:0 .3em .2em 0;border:1px solid rgba(127,127,127,.4)"
_CELL = "text-align:left;vertical-align:top;padding:.4em .8em .4em 0"


@dataclass(frozen=True)
class Neighbor:
    """One training example."""

    index: int  # in the training data
    distance: float  # in the last hidden representation; cosine: 0 for the same direction, 2 for the opposite one
    target: Any  # as in Case
    input: Any = field(repr=False)  # as the data gives it, without the batch dimension


@dataclass(frozen=True)
class Case:
    """One sample, what the model made of it, and what it is like."""

    index: int  # in the data
    loss: float
    confidence: float | None  # the highest probability; several labels or pixels: the mean over them; None: numbers
    error: float | None  # the mean absolute error; None for classes
    prediction: Any  # a class, a number, the list of labels above 0.5, or a tensor
    target: Any
    input: Any = field(repr=False)  # as the data gives it, without the batch dimension
    neighbors: tuple[Neighbor, ...] = ()  # the nearest first

    @property
    def hint(self) -> str:
        """What to look at first, of a class that was taken for another; empty where nothing can be said.

        The target may be wrong, there may be too little like it in the training data, or classes meet here.
        """
        near = [neighbor.target for neighbor in self.neighbors]
        if not isinstance(self.prediction, int) or not near or self.prediction == self.target:
            return ""
        count = len(near)
        if all(target == self.prediction for target in near):
            sure = "surely " if (self.confidence or 0.0) >= SURE else ""
            return (
                f"all {count} nearest training examples have the class it was {sure}taken for: is the target right? "
                "If so, training lacks examples like it"
            )
        if all(target == self.target for target in near):
            return f"all {count} nearest training examples have its class: only the last layer takes it for another"
        if self.target not in near:
            return f"none of the {count} nearest training examples has its class: there may be too few like it"
        return f"{near.count(self.target)} of the {count} nearest training examples have its class: between classes"


@dataclass(frozen=True)
class WorstCases(Sequence[Case]):
    """The worst cases, the worst first; a sequence of `Case`."""

    cases: tuple[Case, ...]
    num_samples: int  # that were looked at
    mean_loss: float  # of all of them
    classes: tuple[str, ...] = ()  # names, by class

    @overload
    def __getitem__(self, index: int) -> Case: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Case, ...]: ...
    def __getitem__(self, index: int | slice) -> Case | tuple[Case, ...]:
        return self.cases[index]

    def __len__(self) -> int:
        return len(self.cases)

    def name(self, value: Any) -> str:
        """A prediction or target in words."""
        if isinstance(value, bool) or not isinstance(value, int):
            return _short(value)
        return self.classes[value] if 0 <= value < len(self.classes) else str(value)

    def _title(self) -> str:
        share = sum(case.loss for case in self.cases) / (self.mean_loss * self.num_samples) if self.mean_loss else 0.0
        of_all = f", {share:.0%} of the loss of all" if 0 < share <= 1 else ""
        return f"{len(self)} worst of {self.num_samples} samples{of_all} (mean loss {self.mean_loss:.4g})"

    def _facts(self, case: Case) -> str:
        sure = f" with confidence {case.confidence:.2f}" if case.confidence is not None else ""
        off = f", off by {case.error:.4g}" if case.error is not None else ""
        return (
            f"loss {case.loss:.4g}: predicted {self.name(case.prediction)}{sure}, target {self.name(case.target)}{off}"
        )

    def __str__(self) -> str:
        lines = [self._title()]
        for case in self.cases:
            lines.append(f"  {case.index}: {self._facts(case)}")
            if case.neighbors:
                near = (f"{self.name(n.target)} ({n.index}, {n.distance:.2g})" for n in case.neighbors)
                lines.append(f"      nearest in training: {', '.join(near)}")
            if case.hint:
                lines.append(f"      {case.hint}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = []
        for case in self.cases:
            near = "".join(
                f'<div style="display:inline-block;margin-right:.8em">{_shown(n.input)}<br>'
                f"{html.escape(self.name(n.target))}<br><small>{n.index}, {n.distance:.2g}</small></div>"
                for n in case.neighbors
            )
            hint = f"<br><i>{html.escape(case.hint)}</i>" if case.hint else ""
            rows.append(
                f'<tr><td style="{_CELL}">{_shown(case.input)}<br><small>{case.index}</small></td>'
                f'<td style="{_CELL};max-width:24em">{html.escape(self._facts(case))}{hint}</td>'
                f'<td style="{_CELL}">{near}</td></tr>'
            )
        head = "".join(
            f'<th style="{_CELL}">{name}</th>' for name in ("Sample", "What happened", "Nearest in training")
        )
        return f"<div><b>{self._title()}</b><table><tr>{head}</tr>{''.join(rows)}</table></div>"


def _short(value: Any) -> str:
    """A few numbers for many."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Tensor):
        if value.dim() != 1:
            return f"a tensor of shape {tuple(value.shape)}"
        shown = ", ".join(f"{number:.4g}" for number in value[:6].tolist())
        return f"({shown}{', ...' if len(value) > 6 else ''})"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(item)}" for key, item in value.items())
    return str(value)


def _shown(input: Any) -> str:
    """A picture of an image, text of anything else."""
    if isinstance(input, Tensor) and input.dim() == 3 and input.shape[0] in (1, 3) and min(input.shape[1:]) > 3:
        return f'<img style="{_PICTURE}" src="data:image/png;base64,{base64.b64encode(png(input)).decode()}" alt="">'
    parts = input if isinstance(input, list) else [input]
    return "<br>".join(html.escape(_short(part)) for part in parts)


def png(image: Tensor) -> bytes:
    """A PNG file of (C, H, W), C 1 or 3, its values stretched to the range from black to white."""
    image = image.float().nan_to_num(0.0, 0.0, 0.0)
    low, high = image.aminmax()
    pixels = ((image - low) / (high - low).clamp_min(1e-12) * 255).round().byte().permute(1, 2, 0).contiguous()
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.numpy().tobytes() for row in pixels)  # each with its filter, none

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
