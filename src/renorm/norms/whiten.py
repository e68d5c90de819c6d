"""Whitening: channels are decorrelated, not only scaled. A covariance in place of a variance, a matrix of a scale."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from renorm.errors import ShapeError, UnknownNormError
from renorm.kernels.moments import statistics_dtype
from renorm.norms import covariance
from renorm.norms import running as running_statistics
from renorm.norms.axes import Bound
from renorm.norms.covariance import JointMoments
from renorm.norms.masks import expand_mask
from renorm.norms.norm import Norm

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["BatchWhitening", "IterNorm"]

Device = torch.device | str | None


class _Whitening(Norm):
    """Batch norm by the covariance of each group of channels: `solve` gives the matrix that whitens."""

    running_cov: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        groups: int = 1,
        axis: int = 1,
        recover: str | nn.Module = "affine",
        process_group: ProcessGroup | None = None,
    ) -> None:
        patterns = {1: "[n] (g c) [...]", -1: "[n ...] (g c)"}
        if axis not in patterns:
            raise ShapeError(f"the channels of a whitening are on axis 1 or -1; got axis={axis}")
        if groups < 1 or num_features % groups:
            raise ShapeError(f"groups must divide the channels, {num_features}; got groups={groups}")
        size = num_features // groups
        super().__init__(
            patterns[axis],
            eps=eps,
            weight="g c",
            recover=recover if affine or recover != "affine" else "none",
            running="g c" if track_running_stats else None,
            momentum=momentum,
            process_group=process_group,
            device=device,
            dtype=dtype,
            g=groups,
            c=size,
        )
        self.num_features = num_features
        self.affine = affine
        self.groups = groups
        self.axis = axis
        self.running_var = None  # running_cov has it on its diagonal
        cov = torch.eye(size, device=device, dtype=dtype).repeat(groups, 1, 1) if track_running_stats else None
        self.register_buffer("running_cov", cov)

    @abstractmethod
    def solve(self, cov: Tensor) -> Tensor:  # type: ignore[override]
        """From the covariance of each group to the matrix that is applied to its centred channels.

        Both (groups, c, c), in float64 on the CPU. A whitening of your own overrides this: differentiable torch code
        for which ``matrix @ cov @ matrix.mT`` is about the identity.
        """

    def batch_moments(self, batch: JointMoments) -> JointMoments:  # type: ignore[override]
        """The moments of the whole batch, that of all processes where there is a `process_group`; remembered."""
        if self.process_group is not None:
            batch = covariance.merge(batch, self.process_group)
        running = self._running()
        if running is not None and not running_statistics.recomputing():
            running_statistics.update(running, self.num_batches_tracked, self.momentum, covariance.pool(batch))
        return batch

    def extra_repr(self) -> str:
        """The pattern and what is particular to this layer."""
        return f"{self._particular()}, {super().extra_repr()}"

    @abstractmethod
    def _particular(self) -> str:
        """What tells this layer from others of its class."""

    def _running(self) -> tuple[Tensor, Tensor] | None:
        if self.running_mean is None or self.running_cov is None or not (self.track_running_stats and self._learns()):
            return None
        return self.running_mean, self.running_cov

    def _choose(self, x: Tensor, bound: Bound, mask: Tensor | None) -> str:
        return "torch.bmm"

    def _normalize(self, x: Tensor, mask: Tensor | None, *context: Any) -> Tensor:
        fixed = self._uses_running(self._bound(x).part, x)
        # Autocast would round float32 statistics to half precision ahead of the products.
        device = x.device.type
        cast = device != "meta" and torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if cast else nullcontext():
            return self._whiten(x, None if mask is None else expand_mask(mask, x), fixed=fixed)

    def _whiten(self, x: Tensor, mask: Tensor | None, *, fixed: bool) -> Tensor:
        dtype = statistics_dtype(x)
        planes = self._in_planes(x)
        v = self._split(x, planes)
        v = v.float() if v.dtype in (torch.float16, torch.bfloat16) else v
        noise = 2 * torch.finfo(v.dtype).eps
        real = None
        if mask is not None:
            real = _shared(self._split(mask, planes), self.axis)
            v = torch.where(real, v, 0)
        if fixed:
            assert self.running_mean is not None
            assert self.running_cov is not None
            mean, cov = self.running_mean.to(dtype).view(self.groups, -1), self.running_cov.to(dtype)
            pivot = mean.to(v.dtype)
            v = v - pivot[..., None]
            noise = max(noise, torch.finfo(self.running_cov.dtype).eps / 4)
        else:
            v, pivot, batch = covariance.measure(v, real, dtype)
            moments = self.batch_moments(batch)
            mean, cov = moments.mean, moments.cov
        finite = cov.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
        # LAPACK refuses what is not finite; a NaN stays in its own group.
        cov = torch.where(finite, cov, 0)
        matrix = torch.where(finite, self.solve(cov + covariance.ridge(cov, self._eps(cov), noise)), torch.nan)
        if self.weight is not None:
            matrix = self.weight.to(dtype).view(self.groups, -1, 1) * matrix
        shift = matrix @ (pivot.to(dtype) - mean)[..., None]
        if self.bias is not None:
            shift = shift + self.bias.to(dtype).view(self.groups, -1, 1)
        matrix, shift = matrix.to(v.dtype), shift.to(v.dtype)
        # Positions first where they lie so: the product comes out as x lies, for one group.
        y = matrix @ v + shift if planes else (v.mT @ matrix.mT + shift.mT).mT
        if real is not None:
            y = torch.where(real, y, 0)
        return self._join(y.to(x.dtype), x, planes)

    def _in_planes(self, x: Tensor) -> bool:
        """Whether the product of each sample is apart, without a copy: where its positions lie together and are many.

        In a traced graph it is not asked, as it would be a guard on the size, and the copy is fused.
        """
        if torch.compiler.is_compiling() or self.axis == -1 or x.dim() == 2 or x.stride(1) == 1:
            return False
        return math.prod(x.shape[2:]) >= self.sizes["c"]

    def _split(self, x: Tensor, planes: bool) -> Tensor:
        """`x` as matrices, (samples, groups, channels, positions): a view where it can be, and one sample of all."""
        split = (self.groups, self.sizes["c"])
        if planes:
            return x.reshape(x.shape[0], *split, math.prod(x.shape[2:]))
        rows = x.movedim(self.axis, -1)
        return rows.reshape(1, math.prod(rows.shape[:-1]), *split).permute(0, 2, 3, 1)

    def _join(self, y: Tensor, x: Tensor, planes: bool) -> Tensor:
        """The matrices `y` as a tensor that lies as `x` does."""
        if planes:
            return y.reshape(x.shape)
        y = y[0].permute(2, 0, 1).reshape(x.movedim(self.axis, -1).shape).movedim(-1, self.axis)
        return y if x.stride(self.axis) == 1 else y.contiguous()


class BatchWhitening(_Whitening):
    r"""Batch whitening: the channels of a group have covariance I over the batch, not only variance 1.

    $$y = \text{weight} \cdot W (x - \text{mean}) + \text{bias}, \qquad
    W \, (\text{cov} + \text{eps} \cdot I) \, W^\top = I$$

    with mean and biased covariance of each group of channels over batch and positions. `method` says which W:

    - ``"zca"``: $(\text{cov} + \text{eps} \cdot I)^{-1/2}$, which turns the channels as little as can be.
    - ``"pca"``: $\Lambda^{-1/2} U^\top$, eigenvectors in the order of falling eigenvalues, the sign of each such that
      its largest entry (the first, of nearly equal ones) is positive. Channels come out as principal components, which
      may swap from batch to batch.
    - ``"cholesky"``: the inverse of the lower triangular Cholesky factor; the fastest.

    Args:
        num_features: channels C; with `groups` those of each group are neighbours, c = C / groups of them.
        eps: added to the diagonal of the covariance, or what that is known to where this is more: 2.4e-7 of its
            Frobenius norm for products in float32, and a quarter of the dtype's eps of a running_cov in half precision.
        momentum: weight of the new batch in the running statistics (torch's sense); None averages all batches.
        affine: False leaves weight and bias out.
        track_running_stats: False whitens by the batch in evaluation, too.
        groups: channels are whitened in so many groups; the papers take 16 to 64 channels a group. The solve is
            cubic in c.
        axis: the dimension of the channels, 1 or -1.
        recover: as `Norm`; ``"linear"`` is the coloring of whitening and coloring.
        process_group: as `Norm`.
        method: which W, as above.

    Shapes: input and output (N, C, ...) or (N, ..., C), weight and bias (C,), running_mean (C,), running_cov
    (groups, c, c), divided by n - 1 as torch's running_var is; W of evaluation comes from it. A mask is the same for
    all channels of a group: masked positions count for nothing and come out as 0. The products are in float32, in
    float64 for a float64 input.

    The derivatives are exact twice, also where eigenvalues coincide or vanish, except that for ``"pca"`` eigenvectors
    whose eigenvalues are equal to rounding are arbitrary, and are taken not to turn into each other.

    Raises ShapeError for channels or groups that do not fit, and for a mask that varies over the channels of a group
    (in compiled code, and under vmap, such a position counts as masked); UnknownNormError for another `method`.

    Huang et al. 2018, arXiv:1804.08450 (ZCA, PCA); Siarohin et al. 2018, arXiv:1806.00420 (Cholesky, coloring).

    >>> x = torch.randn(64, 3) @ torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 3.0]])
    >>> y = BatchWhitening(3)(x)
    >>> torch.allclose(y.T @ y / 64, torch.eye(3), atol=1e-3)
    True
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        groups: int = 1,
        axis: int = 1,
        recover: str | nn.Module = "affine",
        process_group: ProcessGroup | None = None,
        method: str = "zca",
    ) -> None:
        if method not in _METHODS:
            raise UnknownNormError(f"method is one of {', '.join(_METHODS)}; got {method!r}")
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            groups=groups,
            axis=axis,
            recover=recover,
            process_group=process_group,
        )
        self.method = method

    def solve(self, cov: Tensor) -> Tensor:  # type: ignore[override]
        """The whitening matrix of each group."""
        return _METHODS[self.method](cov, self._eps(cov))

    def _particular(self) -> str:
        return f"method={self.method!r}"


class IterNorm(_Whitening):
    r"""Iterative normalization: ZCA whitening by a few Newton-Schulz steps, matrix products only.

    $$y = \text{weight} \cdot \frac{P_T}{\sqrt{t}} (x - \text{mean}) + \text{bias}, \qquad
    P_0 = I, \quad P_{k + 1} = \tfrac12 (3 P_k - P_k^3 \, S / t)$$

    with S = cov + eps I, its trace t, and T `iterations`. Large eigenvalues come to 1 first, small ones the later the
    smaller they are of t: few steps are a whitening that spares directions without much variance. Many give that of
    ``BatchWhitening(method="zca")``. Other arguments, shapes, masks and errors are those of `BatchWhitening`. For
    evaluation the covariance is averaged, of which T steps are made then; the authors' code averages the matrices.

    Args:
        num_features: channels C.
        eps: as `BatchWhitening`.
        momentum: as `BatchWhitening`.
        affine: as `BatchWhitening`.
        track_running_stats: as `BatchWhitening`.
        groups: as `BatchWhitening`.
        axis: as `BatchWhitening`.
        recover: as `BatchWhitening`.
        process_group: as `BatchWhitening`.
        iterations: T, the steps.

    Raises ShapeError for a negative number of iterations. Huang et al. 2019, arXiv:1904.03441.

    >>> x = torch.randn(64, 4) @ torch.diag(torch.tensor([1.0, 2.0, 2.0, 1.0]))
    >>> y, z = IterNorm(4, iterations=12)(x), BatchWhitening(4)(x)
    >>> torch.allclose(y, z, atol=1e-3)
    True
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        groups: int = 1,
        axis: int = 1,
        recover: str | nn.Module = "affine",
        process_group: ProcessGroup | None = None,
        iterations: int = 5,
    ) -> None:
        if iterations < 0:
            raise ShapeError(f"the number of iterations is 0 or more; got {iterations}")
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            groups=groups,
            axis=axis,
            recover=recover,
            process_group=process_group,
        )
        self.iterations = iterations

    def solve(self, cov: Tensor) -> Tensor:  # type: ignore[override]
        """The approximate inverse square root of the covariance of each group."""
        eye = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
        cov = cov + self._eps(cov) * eye
        trace = cov.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
        # P_k of the formula, beside its product with S / t: as one sequence, rounding grows from step to step (Higham
        # 2008, Functions of Matrices, chapter 6).
        root, inverse = cov / trace, eye.expand(cov.shape)
        for _ in range(self.iterations):
            step = 1.5 * eye - 0.5 * inverse @ root
            root, inverse = root @ step, step @ inverse
        return inverse * trace.rsqrt()

    def _particular(self) -> str:
        return f"iterations={self.iterations}"


def _shared(mask: Tensor, axis: int) -> Tensor:
    """The mask of each group, (samples, groups, 1, positions), from that of each channel."""
    first = mask[:, :, :1]
    if mask.stride(2) == 0 or mask.shape[2] == 1:
        return first
    # Where its values may not be looked at, a position is real if all of its channels are.
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if not traced and not mask.is_meta and not torch.equal(mask, first.expand(mask.shape)):
        shape = "mask[:, None]" if axis == 1 else "mask[..., None]"
        raise ShapeError(
            "a mask of a whitening must be the same for all channels of a group, as a covariance is of channels at the "
            f"same positions; this one varies: pass one of size 1 along the channels, such as {shape}"
        )
    return mask.all(2, keepdim=True)


# ---- from covariances to whitening matrices
#
# Autograd through eigh divides by differences of eigenvalues, which is NaN where two coincide. Instead, the matrix is
# written as its Taylor polynomial of degree 2 in d, the covariance less itself held constant. Its value is that of the
# first term, and its first and second derivatives are those of the matrix.


def _zca(cov: Tensor, eps: float) -> Tensor:
    r"""(cov + eps I)^(-1/2).

    With $s_i$ the roots of its eigenvalues, the first order is, in the basis of eigenvectors, the divided difference
    $-d_{ij} / (s_i s_j (s_i + s_j))$ (Daleckii & Krein 1965): nothing is divided by $s_i - s_j$. The second comes from
    comparing terms in W M W = I.
    """
    values, u = torch.linalg.eigh(cov.detach())
    s = (values.clamp(min=0) + eps).sqrt()
    row, column = s[..., :, None], s[..., None, :]
    d = u.mT @ (cov - cov.detach()) @ u
    first = -d / (row * column * (row + column))
    cross = first @ d / column
    second = -(cross + cross.mT + (first * column.square()) @ first) / (row + column)
    matrix: Tensor = u @ (torch.diag_embed(1 / s) + first + second) @ u.mT
    return matrix


def _pca(cov: Tensor, eps: float) -> Tensor:
    """Eigenvectors, each divided by the root of its eigenvalue plus eps; perturbed as Rayleigh and Schrödinger do."""
    values, u = (found.flip(-1) for found in torch.linalg.eigh(cov.detach()))
    # Of entries that are equal to rounding always the first decides.
    largest = (u.abs() * torch.linspace(1, 0.99, u.shape[-1], dtype=u.dtype, device=u.device)[:, None]).argmax(-2, True)
    u = u * u.gather(-2, largest).sign()
    d = u.mT @ (cov - cov.detach()) @ u
    apart = values[..., None, :] - values[..., :, None]
    noise = 8 * u.shape[-1] * torch.finfo(cov.dtype).eps * values[..., :1, None].abs()
    inverse = torch.where(apart.abs() > noise, 1 / apart, 0)
    diagonal = d.diagonal(dim1=-2, dim2=-1)
    first = inverse * d
    moved = d @ first
    turned = first + inverse * (moved - first * diagonal[..., None, :])
    turned = turned + torch.diag_embed(1 - first.square().sum(-2) / 2)  # columns of length 1
    values = values.clamp(min=0) + eps + diagonal + moved.diagonal(dim1=-2, dim2=-1)
    matrix: Tensor = values.rsqrt()[..., None] * (u @ turned).mT
    return matrix


def _cholesky(cov: Tensor, eps: float) -> Tensor:
    """The inverse of the lower triangular L for which L L^T = cov + eps I."""
    eye = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
    lower = torch.linalg.cholesky_ex(cov + eps * eye).L
    matrix: Tensor = torch.linalg.solve_triangular(lower, eye.expand(cov.shape), upper=False)
    return matrix


_METHODS: dict[str, Callable[[Tensor, float], Tensor]] = {"zca": _zca, "pca": _pca, "cholesky": _cholesky}
