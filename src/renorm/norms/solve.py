"""Solves: from moments to the scale, center and shift that are applied. The plain one is `select.standardize`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from renorm.kernels.moments import Affine, Moments

__all__ = ["mix"]


def mix(moments: Sequence[Moments], mean_weight: Tensor, var_weight: Tensor, eps: float) -> Affine:
    r"""Standardize by a mixture of several moments (Luo et al. 2018, arXiv:1806.10779, equation 3).

    $$\text{center} = \sum_k \text{softmax}(a)_k \text{mean}_k, \qquad
    \text{scale} = \Bigl(\text{eps} + \sum_k \text{softmax}(b)_k \text{var}_k\Bigr)^{-1/2}$$

    with `mean_weight` a and `var_weight` b, one entry for each of `moments`.
    """
    dtype = moments[0].mean.dtype
    a, b = (weights.to(dtype).softmax(0).unbind() for weights in (mean_weight, var_weight))
    center, var = a[0] * moments[0].mean, b[0] * moments[0].var + eps
    for k, more in enumerate(moments[1:], 1):
        center, var = torch.addcmul(center, a[k], more.mean), torch.addcmul(var, b[k], more.var)
    return Affine(torch.rsqrt(var), center)
