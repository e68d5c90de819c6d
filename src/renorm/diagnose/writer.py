"""What `watch` writes into TensorBoard or MLflow: readings and counts of findings as scalars, findings as text."""

from __future__ import annotations

import collections
from collections.abc import Callable, Collection, Mapping
from typing import Any

from renorm.diagnose.catalogue import SEVERITIES
from renorm.diagnose.finding import Finding
from renorm.diagnose.history import Sample
from renorm.errors import RuleError

__all__ = ["Writer"]


class Writer:
    """A writer of the user's behind one interface.

    It is known by its methods: ``add_scalar(tag, value, step)`` and perhaps ``add_text(tag, text, step)``, as
    TensorBoard's SummaryWriter, or ``log_metrics({key: value}, step=)`` and perhaps ``log_text(text, file)``, as the
    module mlflow. All numbers of a step are one call of ``log_metrics``, which may be one over a network.
    """

    def __init__(self, writer: Any) -> None:
        self._texts = 0
        scalar, metrics = getattr(writer, "add_scalar", None), getattr(writer, "log_metrics", None)
        self._scalar: Callable[..., Any] | None = scalar if callable(scalar) else None
        self._metrics: Callable[..., Any] | None = metrics if callable(metrics) else None
        if self._scalar is None and self._metrics is None:
            raise RuleError(
                "writer must have add_scalar, as torch.utils.tensorboard.SummaryWriter, or log_metrics, as the module "
                f"mlflow; got {type(writer).__name__}"
            )
        self._text = getattr(writer, "log_text" if self._scalar is None else "add_text", None)

    def numbers(self, numbers: Mapping[str, float], step: int) -> None:
        """Write numbers by name."""
        if self._scalar is not None:
            for name, value in numbers.items():
                self._scalar(name, value, step)
        elif self._metrics is not None and numbers:
            self._metrics(dict(numbers), step=step)

    def finding(self, finding: Finding, step: int) -> None:
        """Write a finding as text, where the writer takes text."""
        if not callable(self._text):
            return
        self._texts += 1
        if self._scalar is None:
            self._text(str(finding), f"renorm/{self._texts:03}-{finding.slug}.txt")
        else:  # as code of markdown, which keeps the lines
            self._text(f"renorm/{finding.slug}", "\n".join(f"    {line}" for line in str(finding).splitlines()), step)


def readings(sample: Sample, label: str = "") -> dict[str, float]:
    """The numbers of a sampled step by the names that they are written under; `label`: of one of several optimizers."""
    of = f"{label}/" if label else ""
    found: dict[str, float] = {} if sample.loss is None else {f"renorm/{of}loss": sample.loss}
    if sample.rates:
        found[f"renorm/{of}learning rate"] = max(sample.rates.values())
    if sample.gradients:
        found[f"renorm/{of}gradient norm"] = sample.gradient
    found |= {f"renorm gradient norm/{of}{name}": norm for name, norm in sample.gradients.items()}
    found |= {f"renorm update over weight/{of}{name}": sample.ratio(name) for name in sample.updates}
    for name, layer in sample.layers.items():
        found |= {f"renorm layers/{of}{name}/{what}": number for what, number in layer.numbers.items()}
    return found


def counts(findings: Collection[Finding]) -> dict[str, float]:
    """How many different findings of each severity there are."""
    seen = collections.Counter(finding.severity for finding in findings)
    return {f"renorm/{severity}s": seen[severity] for severity in SEVERITIES}
