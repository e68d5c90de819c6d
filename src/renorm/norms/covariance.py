"""Joint moments: the covariance of channels, measured, merged over processes, and pooled for running statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from renorm.norms import sync

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["JointMoments", "measure", "merge", "pool", "ridge"]

# Positions in one sum or product on the CPU. Of 120,000 at mean 1e4, the covariance of 3 channels is off by 1.3e-5 in
# one product and 2e-6 in parts of 2048; that of 64 channels by 1e-6 and 3e-7, and a tenth slower.
_LONGEST = 2048


@dataclass(frozen=True)
class JointMoments:
    r"""Count, mean and biased covariance of the channels of each group.

    $$\text{mean} = \frac1n \sum_i x_i, \qquad
    \text{cov} = \frac1n \sum_i (x_i - \text{mean}) (x_i - \text{mean})^\top$$

    A group without a real entry has count 0, mean 0 and covariance I, as variances are 1 in `Moments`.
    """

    count: Tensor  # real positions: (groups,)
    mean: Tensor  # (groups, channels of a group)
    cov: Tensor  # (groups, channels, channels), divided by count


def measure(v: Tensor, real: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, JointMoments]:
    """The entries less a pivot, the pivot, (groups, c), which is their mean to rounding, and their moments."""
    if real is None:
        count = torch.full((v.shape[1],), v.shape[0] * v.shape[3], dtype=dtype, device=v.device)
    else:
        count = real.expand(-1, v.shape[1], -1, -1).sum((0, 2, 3)).to(dtype)
    n = count.clamp(min=1)
    pivot = (_sum(v.detach(), dtype) / n[:, None]).to(v.dtype)
    v = v - pivot[..., None]
    if real is not None:
        v = torch.where(real, v, 0)
    # What rounding of the pivot left, some units of it: its square may be subtracted without a loss.
    rest = _sum(v, dtype) / n[:, None]
    cov = torch.stack([(part @ part.mT).sum(0, dtype=dtype) for part in _parts(v)]).sum(0) / n[:, None, None]
    cov = cov - rest[:, :, None] * rest[:, None, :]
    eye = torch.eye(v.shape[2], dtype=dtype, device=v.device)
    return v, pivot, JointMoments(count, pivot.to(dtype) + rest, torch.where(count[:, None, None] > 0, cov, eye))


def _parts(v: Tensor) -> Sequence[Tensor]:
    """`v` in parts that the CPU sums and multiplies in float32: the rounding of one grows with its length.

    On a GPU both are trees; and a tracer would fix the number of parts.
    """
    if torch.compiler.is_compiling() or not v.is_cpu:
        return (v,)
    return torch.split(v, _LONGEST, -1)


def _sum(v: Tensor, dtype: torch.dtype) -> Tensor:
    """Over samples and positions: (groups, c)."""
    if torch.compiler.is_compiling():
        return v.sum((0, 3), dtype=dtype)  # a loop that casts on its way
    return torch.stack([part.sum((0, 3)) for part in _parts(v)]).sum(0, dtype=dtype)


def ridge(cov: Tensor, eps: float, noise: float) -> Tensor:
    """What eps lacks of the rounding of `cov`, `noise` of its Frobenius norm, on the diagonal.

    Where there are fewer positions than channels, eigenvalues that are 0 come out of a product in float32 as some 1e-7
    of the largest, of either sign (measured for 4 to 256 channels: down to -0.35 of float32's eps times the norm, and
    -0.15 of bfloat16's where it is rounded to that), and ``1 / sqrt(eps)`` would blow up what is rounding in x, too.
    """
    lacking = (noise * cov.detach().square().sum((-2, -1)).sqrt() - eps).clamp(min=0)
    return torch.diag_embed(lacking[:, None].expand(cov.shape[:2]))


def merge(own: JointMoments, group: ProcessGroup) -> JointMoments:
    """Moments of the union of what all processes of `group` have (Chan, Golub & LeVeque 1983), exactly."""
    parts = sync.gather(torch.cat([own.count[:, None], own.mean, own.cov.flatten(1)], 1), group)
    size = own.mean.shape[1]
    count, mean = parts[:, :, 0].detach(), parts[:, :, 1 : size + 1]
    cov = parts[:, :, size + 1 :].reshape(*mean.shape, size)
    total = count.sum(0)
    weight = count / total.clamp(min=1)
    merged = (weight[..., None] * mean).sum(0)
    apart = mean - merged
    spread = cov + apart[..., :, None] * apart[..., None, :]
    eye = torch.eye(size, dtype=cov.dtype, device=cov.device)
    return JointMoments(
        total, merged, torch.where(total[:, None, None] > 0, (weight[..., None, None] * spread).sum(0), eye)
    )


@torch.no_grad()
def pool(batch: JointMoments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `running.update` takes: unbiased covariances, and which groups have any."""
    n = batch.count[:, None, None]
    cov = batch.cov * n / (n - 1).clamp(min=1)
    has_mean, has_cov = (n[:, 0] > 0).expand(batch.mean.shape), (n > 1).expand(cov.shape)
    return batch.mean.detach().flatten(), has_mean.flatten(), cov.flatten(), has_cov.flatten()
