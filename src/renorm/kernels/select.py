"""Which kernel runs: one function that chooses, and the norm in one call.

The rules, each with the measurement behind it (`benchmarks/results/`; torch 2.13, CPU, 2 threads):

- The Triton kernels run where they are asked for: no GPU has measured them yet.
- On CPU tensors the native kernels run wherever they are faster than torch's, see `_FASTER`, and for everything
  torch has no kernel for: masks, a solve of one's own, other patterns.
- `F.group_norm` never sees a channels_last tensor: it loses precision there (input N(1000, 1): error 1.2e3,
  contiguous 9e-5).
- Instance norm runs natively whatever the size: `F.instance_norm` drops channels_last, takes 1.5 times as long at the
  least and errs 1e-3 deviations at a mean of 1e4 of them, natively 1e-6. Elsewhere `F.group_norm` with one channel a
  group, which computes the same, stands for it.
- Where neither runs, the reference does: other devices, transforms, a missing extension.
"""

from __future__ import annotations

import os
from typing import Protocol

import torch
from torch import Tensor

from renorm.errors import BackendError
from renorm.kernels import aten, extension, fused, native, reference
from renorm.kernels.moments import Affine, Moments
from renorm.kernels.triton import available
from renorm.pattern import Partition
from renorm.plan import Plan

__all__ = ["BACKENDS", "OWN", "choose", "explain", "normalize", "standardize", "status"]

BACKENDS = ("auto", "reference", "torch", "native", "triton")
OWN = ("native", "triton")  # kernels of this package

# Read once: what runs should not change while a program does.
ENVIRONMENT = os.environ.get("RENORM_BACKEND", "auto")


def resolve(backend: str) -> str:
    """The backend asked for: the argument, else the environment's RENORM_BACKEND at import, else ``"auto"``."""
    if backend == "auto":
        backend = ENVIRONMENT
    if backend not in BACKENDS:
        raise BackendError(f"a backend is one of {', '.join(BACKENDS)}; got {backend!r}")
    return backend


def choose(
    x: Tensor,
    part: Partition,
    op: str | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    about_zero: bool = False,
    mask: Tensor | None = None,
    obstacle: str | None = None,
    fixed: bool = False,
    backend: str = "auto",
) -> str:
    """The name of the kernel that will run: ``"native"``, ``"triton"``, ``"torch.<function>"`` or ``"reference"``.

    `op` is what `aten.recognize` said of the partition, `obstacle` a reason of the layer's own against torch's
    kernels, `fixed` whether the statistics are given. Raises BackendError where `backend` names one that cannot run
    this.
    """
    backend = resolve(backend)
    if backend == "reference":
        return "reference"
    if fixed and backend != "torch" and torch.compiler.is_compiling():
        backend = "auto"  # with given statistics the compiler has one loop, which it fuses with its neighbours
    own = "triton" if backend == "triton" else "native"
    if torch.compiler.is_compiling() and obstacle != OWN_SOLVE and not fixed:
        traced = available.traceable(x) if own == "triton" else extension.traceable(x)
        if traced and (backend == own or (backend == "auto" and x.numel() >= _TRACED_FROM)):
            return own
    torch_obstacle = obstacle or _why_not_torch(x, op, weight, bias, about_zero, mask)
    by_torch = "torch.rms_norm" if about_zero else f"torch.{op}"
    if backend == "torch":
        if torch_obstacle is None:
            return by_torch
        raise BackendError(f"backend='torch' cannot run here: {torch_obstacle}; write backend='auto' or 'reference'")
    if (
        backend == "auto"
        and torch_obstacle is None
        and (fixed or native.why_not(x, own) is not None or not faster(x, part, by_torch, weight, bias))
    ):
        return by_torch
    found = native.fit(x, part, weight, bias, mask, own)
    if not isinstance(found, str):
        return own
    if backend == own:
        raise BackendError(f"backend={backend!r} cannot run here: {found}; write backend='auto' or 'reference'")
    return by_torch if torch_obstacle is None else "reference"


OWN_SOLVE = "torch has no kernel for a solve of its own"

# In a traced graph an operator costs some 50 us, and a compiler fuses small norms with their neighbours.
_TRACED_FROM = 262_144

_MANY = 1 << 62
_Spans = tuple[tuple[int, int], ...]
# Between how many entries the native kernels are faster than torch's: forward alone, and with gradients, on two
# cores with AVX-512 (the cases "small ..." of benchmarks/bench_kernels.py, and sizes between). What is in the cache
# torch norms as fast; where an output is larger than the allocator keeps (32 MiB), huge pages decide.
_FASTER: dict[str, tuple[_Spans, _Spans]] = {
    "torch.rms_norm": (((0, _MANY),), ((0, _MANY),)),
    "torch.layer_norm": (((65_536, 1_500_000), (32_000_000, _MANY)), ((8_500_000, _MANY),)),
    "torch.group_norm": (((150_000, 2_000_000), (32_000_000, _MANY)), ((500_000, _MANY),)),
    "torch.batch_norm": (((16_384, _MANY),), ((400_000, _MANY),)),
}


def faster(x: Tensor, part: Partition, by_torch: str, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether the native kernels are faster than this one of torch, or right where it is not."""
    learns, entries = native.learns(x, weight, bias), x.numel()
    if by_torch in ("torch.group_norm", "torch.layer_norm") and not x.is_contiguous():
        return True  # torch's need a copy there and one back
    if by_torch in ("torch.group_norm", "torch.layer_norm") and any(part.names[i] == "c" for i in part.kept):
        return True  # instance norm
    if by_torch == "torch.layer_norm" and part.reduced[-1] != len(part.names) - 1:
        return entries >= 16_384  # and here
    if by_torch == "torch.batch_norm" and x.dim() > 2:
        if not x.is_contiguous():
            return entries >= 16_384  # torch's errs ten times as much there as on contiguous input, at a large mean
        return entries >= (40_000 if learns else 8_192)  # torch's own is slow where channels are not last
    return any(low <= entries < high for low, high in _FASTER[by_torch][learns])


def _why_not_torch(
    x: Tensor,
    op: str | None,
    weight: Tensor | None,
    bias: Tensor | None,
    about_zero: bool,
    mask: Tensor | None,
) -> str | None:
    if mask is not None:
        return "torch's kernels take no mask"
    if op is None:
        return "torch has no kernel for this pattern"
    if about_zero and (op != "layer_norm" or bias is not None):
        return "torch's rms_norm is over whole axes, with a weight along all of them and no bias"
    if weight is not None and weight.dtype != x.dtype:
        if weight.dtype != torch.float32 or x.dtype not in (torch.float16, torch.bfloat16):
            return "the parameters' dtype is not the input's"
        if about_zero or (op != "batch_norm" and x.device.type != "cpu"):
            return "this torch kernel wants parameters of the input's dtype"
    if x.numel() == 0:
        return "the input has no entries"
    return None


def normalize(
    x: Tensor,
    part: Partition,
    kernel: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    about_zero: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Moments | None]:
    """Measure, standardize and recover in one call by `kernel`; the moments where they came for nothing.

    $$y = \\frac{x - \\text{mean}}{\\sqrt{\\text{var} + \\text{eps}}} \\cdot \\text{weight} + \\text{bias}$$
    """
    if kernel == "torch.layer_norm":
        return aten.layer_norm(x, part, weight, bias, eps), None
    if kernel == "torch.rms_norm":
        return aten.rms_norm(x, part, weight, eps), None
    if kernel == "torch.group_norm":
        return aten.group_norm(x, part, weight, bias, eps), None
    if kernel == "torch.batch_norm":
        return aten.batch_norm(x, part, weight, bias, eps)
    if kernel in OWN:
        made = native.fit(x, part, weight, bias, mask, kernel)
        assert not isinstance(made, str)
        y, stats = fused.normalize(x, part, made, weight, bias, eps, about_zero=about_zero, mask=mask)
        assert stats is not None
        return y, native.moments_of(stats, part, made)
    moments = reference.measure(x, part, mask=mask, about_zero=about_zero)
    affine = standardize(moments, eps, about_zero=about_zero)
    return reference.apply(x, part, affine, weight, bias, mask=mask), moments


def standardize(moments: Moments, eps: float, *, about_zero: bool = False) -> Affine:
    """The plain solve: subtract the mean, divide by the standard deviation (root mean square about zero)."""
    return Affine(torch.rsqrt(moments.var + eps), None if about_zero else moments.mean)


def status() -> str:
    """Which kernels this installation has, and why.

    >>> print(status())
    native: ...
    triton: ...
    torch: ...
    reference: plain torch operations, for everything else
    """
    return (
        f"native: {extension.status()}\ntriton: {available.status()}\n"
        f"torch: {torch.__version__}, where its kernels are exact\n"
        "reference: plain torch operations, for everything else"
    )


class _Layer(Protocol):
    """What `explain` asks of a layer: any `renorm.Norm`."""

    def kernel(self, x: Tensor, mask: Tensor | None = None) -> str: ...
    def plan(self, x: Tensor) -> Plan: ...


def explain(layer: _Layer, x: Tensor, mask: Tensor | None = None) -> str:
    """Which kernel `layer` runs on `x`, in the mode it is in, and the loops over x's memory.

    Raises BackendError where `layer` is no `renorm.Norm`, nor made of one.

    >>> import renorm
    >>> print(explain(renorm.GroupNorm(2, 4), torch.zeros(3, 4, 5)))
    kernel: torch.group_norm
    n (g [c]) [...] on 3x4x5: 6 sets of 10 entries, row kernel
      n     kept                3 x 20
      g     kept     weighted   2 x 10
      c     reduced  weighted   2 x 5
      ...0  reduced             5 x 1
    """
    if not hasattr(layer, "plan"):
        raise BackendError(
            f"a kernel is explained for a layer that has a pattern; got {type(layer).__name__}: write renorm.Norm, or "
            "renorm.swap(model, ...) to have such layers in the place of torch's"
        )
    return f"kernel: {layer.kernel(x, mask)}\n{layer.plan(x)}"
