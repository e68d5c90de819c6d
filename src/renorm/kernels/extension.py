"""The compiled extension (csrc/): whether it is there, for which tensors it may run, and its batch norm statistics.

It is optional: compiled where renorm is installed with a compiler, or part of a wheel.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "DTYPES",
    "batch_norm_in_training",
    "exporting",
    "missing",
    "module",
    "observed",
    "status",
    "traceable",
    "track",
    "tracks",
    "usable",
    "why_not",
]

_INTERFACE = 2  # of csrc/module.cpp


DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def _load() -> tuple[ModuleType | None, str]:
    try:
        # After torch, whose OpenMP pool it shares: two pools in one process wait for each other's cores.
        found = importlib.import_module("renorm.kernels._native")
    except ModuleNotFoundError:
        return None, (
            "renorm was installed without them, because no C++ compiler was found or RENORM_NATIVE was 0; "
            "RENORM_NATIVE=1 pip install ... says what is missing"
        )
    except ImportError as error:
        return None, f"they cannot be loaded: {error}"
    if found.interface != _INTERFACE:
        return None, "they were built from other sources: install renorm again"
    return found, ""


_MODULE: Any
_MODULE, _MISSING = _load()


def module() -> Any:
    """The extension, or None."""
    return _MODULE


def missing() -> str:
    """Why there is no extension; empty where there is one."""
    return _MISSING


def status() -> str:
    """What there is of the extension, in words."""
    if _MODULE is None:
        return f"not available: {_MISSING}"
    threads = "torch's threads" if _MODULE.openmp else "one thread"
    return f"{_MODULE.instructions} kernels for CPU tensors, on {threads}"


def usable(x: Tensor) -> bool:
    """Whether a raw pointer to `x` may be taken here: a plain CPU tensor in eager mode that nothing looks through."""
    return why_not(x) is None


def why_not(x: Tensor) -> str | None:
    """The reason against it."""
    if _MODULE is None:
        return _MISSING
    if not x.is_cpu:
        return f"the input is on {x.device.type}"
    if x.dtype not in DTYPES:
        return f"the input is {x.dtype}"
    return observed(x)


def observed(x: Tensor) -> str | None:
    """What looks at operations on `x`, so that no pointer to it may be taken."""
    if torch.compiler.is_compiling():
        return "a graph is being traced"
    kind = type(x)
    if kind is not Tensor and kind is not torch.nn.Parameter:
        return f"the input is a {kind.__name__}"
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or x.is_neg()
    ):
        return "a transform, a mode or a tracer looks at every operation"
    return None


def traceable(x: Tensor) -> bool:
    """Whether the operators of graph.py may stand for the kernels in the graph that is being traced."""
    return _MODULE is not None and not exporting() and x.device.type == "cpu" and x.dtype in DTYPES


def exporting() -> bool:
    """Whether torch.export traces; torch's own `is_exporting` says so in every compiled graph before torch 2.13."""
    return bool(getattr(torch.compiler, "_is_exporting_flag", False))


def tracks(running: tuple[Tensor, Tensor], num_batches_tracked: Tensor | None) -> bool:
    """Whether `track` and `batch_norm_in_training` can move these."""
    return (
        running[0].dtype == running[1].dtype
        and running[0].dtype in (torch.float32, torch.float64)
        and all(why_not(t) is None and t.is_contiguous() for t in running)
        and (
            num_batches_tracked is None
            or (
                type(num_batches_tracked) is Tensor
                and num_batches_tracked.is_cpu
                and num_batches_tracked.dtype == torch.int64
            )
        )
    )


def track(
    stats: Tensor,
    running: tuple[Tensor, Tensor],
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    *,
    unbiased: bool,
) -> None:
    """Move running statistics, one for each set and in the sets' order, as `running.update` does.

    As in torch's batch norm, autograd does not learn of it: two forward passes may precede their backward passes.
    """
    mean, var = running
    _MODULE.track(
        DTYPES[mean.dtype],
        stats.shape[1],
        stats.data_ptr(),
        -1.0 if momentum is None else momentum,
        unbiased,
        mean.data_ptr(),
        var.data_ptr(),
        0 if num_batches_tracked is None else num_batches_tracked.data_ptr(),
    )


def batch_norm_in_training(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: tuple[Tensor, Tensor],
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """Torch's own batch norm, which moves `running` itself; put back where the batch was not finite. See `tracks`."""
    mean, var = running
    where = DTYPES[mean.dtype], mean.numel(), mean.data_ptr(), var.data_ptr()
    if momentum is None:
        assert num_batches_tracked is not None
        momentum = 1.0 / (int(num_batches_tracked) + 1)
    _MODULE.guard(*where)
    y = torch.batch_norm(x, weight, bias, mean, var, True, momentum, eps, True)
    _MODULE.settle(*where, 0 if num_batches_tracked is None else num_batches_tracked.data_ptr())
    return y
