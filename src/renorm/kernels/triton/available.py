"""Whether the Triton kernels can run, and why not; Triton itself is imported when a kernel runs first."""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import lru_cache

import torch
from torch import Tensor

from renorm.kernels import extension

__all__ = ["DTYPES", "obstacle", "status", "traceable", "why_not"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CAPABILITY = (8, 0)  # the least of an NVIDIA GPU that Triton compiles for
_ASKED: set[tuple[str, int]] = set()  # devices that were tried, which no graph may capture


def obstacle(kind: str, index: int) -> str | None:
    """What keeps the kernels from a device of this kind and number; None where nothing does."""
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if (kind, index) not in _ASKED and started and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured, and Triton was not tried before: run the model once first"
    _ASKED.add((kind, index))
    return _obstacle(kind, index)


# What torch.compiler.assume_constant_result does; that imports the whole compiler, and with it Triton.
obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=64)
def _obstacle(kind: str, index: int) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if kind == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return (
            "the input is on cpu, where Triton only interprets, for tests: set TRITON_INTERPRET=1 before Python starts"
        )
    if kind != "cuda":
        return f"the input is on {kind}"
    if torch.version.hip is None:
        found = torch.cuda.get_device_capability(index)
        if found < _CAPABILITY:
            return f"Triton needs a GPU of compute capability 8.0, and this one has {found[0]}.{found[1]}"
    try:  # Whatever Triton lacks, such as a C compiler, shows when it runs first.
        importlib.import_module("renorm.kernels.triton.probe").run(torch.device(kind, index))
    except Exception as error:
        return f"Triton does not work: {type(error).__name__}: {error}"
    return None


def why_not(x: Tensor) -> str | None:
    """The reason against running on `x`."""
    return extension.observed(x) or _unfit(x)


def traceable(x: Tensor) -> bool:
    """Whether the operators of graph.py may stand for the kernels in the graph that is being traced."""
    return not extension.exporting() and _unfit(x) is None


def _unfit(x: Tensor) -> str | None:
    if x.dtype not in DTYPES:
        return f"the input is {x.dtype}"
    return obstacle(x.device.type, x.device.index or 0)


def status() -> str:
    """What there is of Triton, in words."""
    if importlib.util.find_spec("triton") is None:
        return "not available: Triton is not installed"
    if not torch.cuda.is_available():
        return "not available: there is no GPU that torch can use"
    reasons = [obstacle("cuda", index) for index in range(torch.cuda.device_count())]
    if all(reason is None for reason in reasons):
        return "kernels for CUDA tensors, with backend='triton' or RENORM_BACKEND=triton"
    named = [f"GPU {index}: {reason or 'kernels'}" for index, reason in enumerate(reasons)]
    return "; ".join(named)
