"""Local response norm: each entry is divided by what its neighbours hold, in other channels or at other positions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from renorm.errors import BackendError, ShapeError, UnknownNormError
from renorm.kernels import extension, select
from renorm.norms.masks import expand_mask

__all__ = ["LocalResponseNorm"]

Convention = Literal["torch", "onnx", "caffe", "tensorflow"]


class LocalResponseNorm(nn.LocalResponseNorm):
    r"""Local response norm over neighbouring channels, in time linear in the channels whatever the window.

    $$y_c = x_c \Big(k + \frac{\text{alpha}}{n} \sum_{j = c - \text{before}}^{c + \text{after}}
    x_j^2\Big)^{-\text{beta}}$$

    where channels that do not exist count as 0. Arguments as `torch.nn.LocalResponseNorm`, then `convention`, which
    says what `size` and `alpha` mean:

    | convention | before, after | n | where it differs from torch's |
    |---|---|---|---|
    | ``"torch"`` | size // 2, (size - 1) // 2 | size | |
    | ``"onnx"`` | (size - 1) // 2, size // 2 | size | even sizes look ahead (pytorch#75722) |
    | ``"caffe"`` | (size - 1) // 2 both | size, size^d within | even sizes are refused |
    | ``"tensorflow"`` | depth_radius both | 1 | size = 2 depth_radius + 1; alpha is not divided, nor in the paper |

    TensorFlow's alpha=2e-5 with depth_radius=2 is torch's alpha=1e-4 with size=5 (caffe-tensorflow#173); the paper
    has ``LocalResponseNorm(5, 1e-4, 0.75, 2.0, convention="tensorflow")``. With `within` the window is `size` positions
    along each of the d dimensions behind the channels, of one channel (Caffe's WITHIN_CHANNEL, which takes k for 1);
    before and after are as above and n is size^d. `backend` is ``"auto"``, ``"native"``, ``"torch"`` or
    ``"reference"``; the environment's RENORM_BACKEND where it is auto.

    Shapes: input and output (N, C, ...), also (N, C) alone unless `within`; the output has the input's dtype and memory
    format. Half precision is computed in float32. The native kernel, for windows over channels, is right also where
    the square of a float32 overflows. Entries where `mask` is False, boolean and broadcastable to the input, count as 0
    and come out as 0.

    Raises ShapeError for a size below 1 or one that the convention does not have, and for an input without channels or
    positions, UnknownNormError for an unknown convention, BackendError where `backend` cannot run. Krizhevsky,
    Sutskever & Hinton 2012, "ImageNet classification with deep convolutional neural networks".

    >>> x = torch.tensor([[1.0, 2.0, 2.0]])
    >>> LocalResponseNorm(3, alpha=3.0, beta=1.0)(x)
    tensor([[0.1667, 0.2000, 0.2222]])
    >>> LocalResponseNorm(3, alpha=1.0, beta=1.0, convention="tensorflow")(x)
    tensor([[0.1667, 0.2000, 0.2222]])
    """

    def __init__(
        self,
        size: int,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 1.0,
        *,
        convention: Convention = "torch",
        within: bool = False,
        backend: str = "auto",
    ) -> None:
        if size < 1:
            raise ShapeError(f"size is the number of entries in a window, 1 or more; got {size}")
        if convention not in get_args(Convention):
            raise UnknownNormError(f"a convention is one of {', '.join(get_args(Convention))}; got {convention!r}")
        if convention in ("caffe", "tensorflow") and size % 2 == 0:
            raise ShapeError(
                f"{convention} has windows of odd sizes only; got {size}: write an odd one, or convention='torch' or "
                "'onnx'"
            )
        super().__init__(size, alpha, beta, k)
        select.resolve(backend)
        self.convention = convention
        self.within = within
        self.backend = backend

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Divide each entry of `x` by the response of its neighbours."""
        if mask is not None:
            mask = expand_mask(mask, x)
            # Masked again behind: the response of NaN neighbours is NaN times 0.
            return torch.where(mask, self.forward(torch.where(mask, x, 0)), 0)
        kernel = self.kernel(x)
        window = self._window(x.dim() - 2 if self.within else 1)
        if kernel == "torch.local_response_norm":
            alpha = self.alpha * self.size if self.convention == "tensorflow" else self.alpha
            return F.local_response_norm(x, self.size, alpha, self.beta, self.k)
        if kernel == "reference":
            return _reference(x, window, range(2, x.dim()) if self.within else (1,))
        if torch.is_grad_enabled() and x.requires_grad:
            y: Tensor = _Native.apply(x, window)  # type: ignore[no-untyped-call]
            return y
        return _native(x, None, window)

    def _window(self, dims: int) -> _Window:
        before, after = self.size // 2, (self.size - 1) // 2
        if self.convention == "onnx":
            before, after = after, before
        entries = 1 if self.convention == "tensorflow" else self.size**dims
        return _Window(before, after, self.alpha / entries, self.beta, self.k)

    def kernel(self, x: Tensor) -> str:
        """The name of the kernel that runs for this input."""
        if x.dim() < 2:
            raise ShapeError(f"the input is (N, C, ...), at least 2D; got {x.dim()}D of shape {tuple(x.shape)}")
        if self.within and x.dim() < 3:
            raise ShapeError(f"within a channel there must be positions, (N, C, ...); got shape {tuple(x.shape)}")
        backend = select.resolve(self.backend)
        if backend == "torch":
            if x.dim() < 3 or self.within or (self.convention == "onnx" and self.size % 2 == 0):
                raise BackendError(
                    "backend='torch' cannot run here: torch's takes 3D or more, and windows of its own convention over "
                    "channels; write backend='auto'"
                )
            return "torch.local_response_norm"
        if backend == "triton":
            raise BackendError(
                "backend='triton' cannot run here: there is no Triton kernel for local response norm; write "
                "backend='auto' or 'reference'"
            )
        if backend == "reference" or x.numel() == 0:
            return "reference"
        if not self.within and extension.usable(x):
            return "native"
        if backend == "native":
            raise BackendError(
                "backend='native' cannot run here: it needs the extension (see renorm.kernels.status()), windows over "
                "channels and a plain CPU tensor of a floating dtype, in eager mode; write backend='auto' or "
                "'reference'"
            )
        return "reference"

    def extra_repr(self) -> str:
        """Torch's, and what differs from its layer."""
        words: list[str] = [super().extra_repr()]  # type: ignore[no-untyped-call]
        words += [f"convention={self.convention!r}"] if self.convention != "torch" else []
        words += ["within=True"] if self.within else []
        words += [f"backend={self.backend!r}"] if self.backend != "auto" else []
        return ", ".join(words)


class _Window(NamedTuple):
    before: int  # entries of the window before its own, along each of its dimensions
    after: int
    alpha: float  # divided by the window's size where the convention says so
    beta: float
    k: float


def _reference(x: Tensor, window: _Window, dims: Iterable[int] = (1,)) -> Tensor:
    """The definition in plain torch: any device and strides, differentiable as often as wanted, traced by all."""
    v = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    total = v.square()
    for dim in dims:
        total = _window_sums(total, dim, window)
    y = v * (window.k + window.alpha * total).pow(-window.beta)
    return y if y.dtype == x.dtype or not x.is_floating_point() else y.to(x.dtype)


def _window_sums(q: Tensor, dim: int, window: _Window) -> Tensor:
    """Sums over the windows of dimension `dim`, by doubling: nothing is subtracted, so that no digit is lost."""
    before, after, entries = window.before, window.after, q.shape[dim]
    if not torch.compiler.is_compiling():  # where it would be a guard on the number of entries
        before, after = (min(side, max(entries - 1, 0)) for side in (before, after))
    size = before + after + 1
    q = F.pad(q, [0, 0] * (q.dim() - 1 - dim) + [before, after])
    total, done, span = None, 0, 1
    while True:
        if size & span:
            part = q.narrow(dim, done, entries)
            total = part if total is None else total + part
            done += span
        if done == size:
            assert total is not None
            return total
        rest = q.shape[dim] - span
        q = q.narrow(dim, 0, rest) + q.narrow(dim, span, rest)
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
