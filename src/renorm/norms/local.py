"""Local response norm: each entry is divided by what its neighbouring channels hold at the same position."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from renorm.errors import BackendError, ShapeError
from renorm.kernels import extension, select

__all__ = ["LocalResponseNorm"]


class LocalResponseNorm(nn.LocalResponseNorm):
    r"""Local response norm over neighbouring channels, in time linear in the channels whatever the window.

    $$y_c = x_c \Big(k + \frac{\text{alpha}}{\text{size}} \sum_{j = c - \lfloor \text{size} / 2 \rfloor}^{c +
    \lfloor (\text{size} - 1) / 2 \rfloor} x_j^2\Big)^{-\text{beta}}$$

    where channels that do not exist count as 0. Arguments as `torch.nn.LocalResponseNorm`, then `backend`:
    ``"auto"``, ``"native"``, ``"torch"`` or ``"reference"``; the environment's RENORM_BACKEND where it is auto.

    Shapes: input and output (N, C, ...), also (N, C) alone; the output has the input's dtype and memory format.
    Half precision is computed in float32. The native kernel is right also where the square of a float32 overflows.

    Raises ShapeError for a size below 1 and for an input without channels, BackendError where `backend` cannot
    run. Krizhevsky, Sutskever & Hinton 2012, "ImageNet classification with deep convolutional neural networks".

    >>> LocalResponseNorm(3, alpha=3.0, beta=1.0)(torch.tensor([[1.0, 2.0, 2.0]]))
    tensor([[0.1667, 0.2000, 0.2222]])
    """

    def __init__(
        self, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0, *, backend: str = "auto"
    ) -> None:
        if size < 1:
            raise ShapeError(f"size is the number of channels in a window, 1 or more; got {size}")
        super().__init__(size, alpha, beta, k)
        select.resolve(backend)
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """Divide each entry of `x` by the response of its neighbours."""
        kernel = self.kernel(x)
        if kernel == "torch.local_response_norm":
            return F.local_response_norm(x, self.size, self.alpha, self.beta, self.k)
        window = _Window(self.size // 2, (self.size - 1) // 2, self.alpha / self.size, self.beta, self.k)
        if kernel == "reference":
            return _reference(x, window)
        if torch.is_grad_enabled() and x.requires_grad:
            y: Tensor = _Native.apply(x, window)  # type: ignore[no-untyped-call]
            return y
        return _native(x, None, window)

    def kernel(self, x: Tensor) -> str:
        """The name of the kernel that runs for this input."""
        if x.dim() < 2:
            raise ShapeError(f"the input is (N, C, ...), at least 2D; got {x.dim()}D of shape {tuple(x.shape)}")
        backend = select.resolve(self.backend)
        if backend == "torch":
            if x.dim() < 3:
                raise BackendError("backend='torch' cannot run here: torch's takes 3D or more; write backend='auto'")
            return "torch.local_response_norm"
        if backend == "reference" or x.numel() == 0:
            return "reference"
        if extension.usable(x):
            return "native"
        if backend == "native":
            raise BackendError(
                "backend='native' cannot run here: it needs the extension (see renorm.kernels.status()) and a plain "
                "CPU tensor of a floating dtype, in eager mode; write backend='auto' or 'reference'"
            )
        return "reference"

    def extra_repr(self) -> str:
        """Torch's, and the backend where one was asked for."""
        inherited: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return inherited if self.backend == "auto" else f"{inherited}, backend={self.backend!r}"


class _Window(NamedTuple):
    before: int  # channels of the window before its own
    after: int
    alpha: float  # divided by the window's size
    beta: float
    k: float


def _reference(x: Tensor, window: _Window) -> Tensor:
    """The definition in plain torch: any device and strides, differentiable as often as wanted, traced by all."""
    v = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    d = window.k + window.alpha * _window_sums(v.square(), window)
    y = v * d.pow(-window.beta)
    return y if y.dtype == x.dtype or not x.is_floating_point() else y.to(x.dtype)


def _window_sums(q: Tensor, window: _Window) -> Tensor:
    """Sums over the windows of dimension 1, by doubling: nothing is subtracted, so that no digit is lost."""
    before, after, channels = window.before, window.after, q.shape[1]
    if not torch.compiler.is_compiling():  # where it would be a guard on the number of channels
        before, after = (min(side, max(channels - 1, 0)) for side in (before, after))
    size = before + after + 1
    q = F.pad(q, [0, 0] * (q.dim() - 2) + [before, after])
    total, done, span = None, 0, 1
    while True:
        if size & span:
            part = q.narrow(1, done, channels)
            total = part if total is None else total + part
            done += span
        if done == size:
            assert total is not None
            return total
        q = q[:, :-span] + q[:, span:]
        span *= 2


def _native(x: Tensor, dy: Tensor | None, window: _Window) -> Tensor:
    """y, or dx where `dy` is given: one call of the extension, on memory as it lies where that is dense."""
    pixels = not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
    if not pixels:
        x = x.contiguous()
    if dy is not None:
        dy = dy.movedim(1, -1).contiguous() if pixels else dy.contiguous()
    batch, channels = x.shape[:2]
    positions = x.numel() // (batch * channels)
    out = torch.empty_like(x)
    extension.module().local(
        extension.DTYPES[x.dtype],
        torch.get_num_threads(),
        batch,
        channels,
        positions,
        channels * positions,
        1 if pixels else positions,
        channels if pixels else 1,
        *window,
        x.data_ptr(),
        0 if dy is None else dy.data_ptr(),
        out.data_ptr(),
    )
    return out


class _Native(torch.autograd.Function):
    """The native kernel, of which backward needs the input only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, window: _Window) -> Tensor:
        ctx.save_for_backward(x)
        ctx.window = window
        return _native(x, None, window)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        again = torch.is_grad_enabled()  # the gradient is to be differentiated itself
        batched = torch._C._functorch.is_legacy_batchedtensor(dy)  # is_grads_batched=True
        if not again and not batched and extension.usable(dy):
            return _native(x, dy, ctx.window), None
        with torch.enable_grad():
            leaf = x if again else x.detach().requires_grad_()
            y = _reference(leaf, ctx.window)
        (dx,) = torch.autograd.grad(y, leaf, dy, create_graph=again)
        return dx, None
