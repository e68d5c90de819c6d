"""Information criteria: a model's fit, and what its parameters cost.

They are derived for models of few parameters, fitted by maximum likelihood to far more samples. A deep network is none:
its parameters are not identified, training stops before the maximum, and penalties that count them exceed any gain in
likelihood. Between networks, compare scores on held-out data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from renorm.errors import MeasureError

__all__ = ["Criteria", "Noise", "information_criteria", "log_likelihood"]

Noise = Literal["gaussian", "bernoulli", "categorical"]
_ROWS = 1024  # of the data at once


@dataclass(frozen=True)
class Criteria:
    r"""The maximum of a model's likelihood and what the criteria make of it; of two models the lower one is chosen.

    $$AIC = 2k - 2 \ln L, \qquad AICc = AIC + \frac{2k(k+1)}{n-k-1}, \qquad BIC = k \ln n - 2 \ln L$$

    A parameter costs 2 in AIC and ln n in BIC, which is more from n = 8 on. AICc is for small n, exact for linear
    models whose k counts the variance; it is inf where n <= k + 1, for which it is not defined.
    Raises MeasureError for a negative k, and an n below 1. Akaike 1974; Hurvich & Tsai 1989; Schwarz 1978.

    >>> found = Criteria(log_likelihood=-100.0, num_parameters=3, num_samples=50)
    >>> f"{found.aic:.2f} {found.aicc:.2f} {found.bic:.2f}"
    '206.00 206.52 211.74'
    """

    log_likelihood: float  # ln L of all samples, in nats
    num_parameters: int  # k
    num_samples: int  # n

    def __post_init__(self) -> None:
        if self.num_parameters < 0 or self.num_samples < 1:
            raise MeasureError(
                "num_parameters must not be negative and num_samples at least 1; got "
                f"{self.num_parameters} and {self.num_samples}"
            )

    @property
    def aic(self) -> float:
        """Akaike's criterion."""
        return 2 * self.num_parameters - 2 * self.log_likelihood

    @property
    def aicc(self) -> float:
        """Akaike's criterion, corrected for few samples."""
        k, left = self.num_parameters, self.num_samples - self.num_parameters - 1
        return self.aic + 2 * k * (k + 1) / left if left > 0 else math.inf

    @property
    def bic(self) -> float:
        """The Bayesian criterion, also called Schwarz's."""
        return self.num_parameters * math.log(self.num_samples) - 2 * self.log_likelihood


def information_criteria(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    noise: Noise,
    count_variance: bool = False,
    num_parameters: int | None = None,
) -> Criteria:
    r"""AIC, AICc and BIC of a fitted model on the data it was fitted to.

    Args:
        model: gives what `log_likelihood` takes for `noise`. It is evaluated in evaluation mode and left as it was.
        x: (n, ...), the inputs.
        y: the targets, as `log_likelihood` takes them.
        noise: what is assumed of y given the output.
        count_variance: whether the variance of Gaussian noise counts as a parameter. statsmodels does not count it,
            R does; between models of the same noise it shifts AIC and BIC of all by the same.
        num_parameters: k, where it is not the number of entries that require a gradient, shared ones once. A softmax
            over K outputs, for one, is not changed by what is added to all K: a linear layer of d inputs before it
            has (K - 1)(d + 1) free parameters.

    The criteria mean what they say for a maximum of the likelihood: train to the end, without weight decay.
    Raises MeasureError as `log_likelihood` does, and for a `num_parameters` below 0.
    Akaike 1974, "A New Look at the Statistical Model Identification".

    >>> x = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    >>> model = nn.Linear(1, 1)
    >>> nn.init.constant_(model.weight, 2.0), nn.init.constant_(model.bias, 1.0)
    (...)
    >>> y = 2 * x + 1 + torch.tensor([[0.1], [-0.1], [-0.1], [0.1]])
    >>> found = information_criteria(model, x, y, noise="gaussian")
    >>> found.num_parameters, round(found.aic, 3)
    (2, -3.069)
    """
    k = sum(p.numel() for p in model.parameters() if p.requires_grad) if num_parameters is None else num_parameters
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            # In evaluation mode a sample's output does not depend on which others are there.
            output = torch.cat([model.eval()(rows) for rows in x.split(_ROWS)])  # type: ignore[no-untyped-call]
    finally:
        for module, training in modes:
            module.training = training
    value = log_likelihood(output, y, noise=noise)
    return Criteria(value, k + (count_variance and noise == "gaussian"), len(y))


def log_likelihood(output: Tensor, y: Tensor, *, noise: Noise) -> float:
    r"""The log-likelihood of all samples, in nats.

    $$\text{gaussian: } -\frac{m}{2} \Big( \ln \frac{2 \pi \sum (y - \hat y)^2}{m} + 1 \Big), \qquad
    \text{bernoulli: } \sum y \ln p + (1 - y) \ln (1 - p), \qquad \text{categorical: } \sum \ln p_y$$

    Args:
        output: what the model predicts. gaussian: the mean, of y's shape; bernoulli: the logit of p, of y's shape;
            categorical: logits (n, K), whose softmax is p.
        y: gaussian: m numbers in n rows, whose one variance is set to its maximum of the likelihood, the mean squared
            error; bernoulli: 0 or 1; categorical: n class indices.
        noise: which of these.

    (n, 1) and (n,) fit each other. It is inf for Gaussian noise where every sample is met, and minus infinity where
    one had no chance. Raises MeasureError for an unknown noise, other shapes, targets outside of their range, values
    that are NaN or infinite, and no sample.

    >>> log_likelihood(torch.tensor([0.0, 0.0]), torch.tensor([1, 0]), noise="bernoulli")
    -1.386...
    """
    if noise not in ("gaussian", "bernoulli", "categorical"):
        raise MeasureError(f"noise must be 'gaussian', 'bernoulli' or 'categorical'; got {noise!r}")
    if not y.dim() or not y.numel() or not output.dim():
        raise MeasureError(
            "a likelihood needs rows of outputs and targets, one sample at least; got the shapes "
            f"{tuple(output.shape)} and {tuple(y.shape)}: write output.view(1) and y.view(1) for a single number"
        )
    output, y = output.detach().double(), y.detach()
    if noise == "categorical":
        return _categorical(output, y.squeeze(1) if y.shape[1:] == (1,) else y)
    if output.shape != y.shape:
        if {output.shape, y.shape} != {torch.Size([len(y)]), torch.Size([len(y), 1])}:
            # (n, 1) against (n, 2) would broadcast
            raise MeasureError(
                f"outputs and targets of {noise} noise must have the same shape; got {tuple(output.shape)} and "
                f"{tuple(y.shape)}: write a model with as many outputs as targets"
            )
        output = output.reshape(y.shape)
    y = y.double()
    if output.isnan().any() or not y.isfinite().all():
        raise MeasureError("outputs and targets must be numbers; some are NaN or infinite: leave these samples out")
    if noise == "bernoulli":
        if not ((y == 0) | (y == 1)).all():
            raise MeasureError(
                f"targets of bernoulli noise must be 0 or 1; got {y.min():g} to {y.max():g}: write noise='categorical' "
                "for classes, 'gaussian' for other numbers"
            )
        return float(F.logsigmoid(torch.where(y == 1, output, -output)).sum())
    variance = (output - y).square().mean()
    return float(-y.numel() / 2 * ((2 * math.pi * variance).log() + 1))


def _categorical(output: Tensor, y: Tensor) -> float:
    if output.dim() != 2 or y.shape != output.shape[:1]:
        raise MeasureError(
            f"categorical noise needs logits (n, K) and class indices (n,); got {tuple(output.shape)} and "
            f"{tuple(y.shape)}: write y.argmax(1) for one-hot rows, and for places "
            "output.movedim(1, -1).flatten(0, -2) and y.flatten()"
        )
    if y.is_floating_point() or not ((y >= 0) & (y < output.shape[1])).all():
        raise MeasureError(
            f"targets of categorical noise must be whole numbers from 0 to {output.shape[1] - 1}; got {y.dtype} from "
            f"{y.min():g} to {y.max():g}: write y.long(), or a model with an output for each class"
        )
    log = output.log_softmax(1)
    if log.isnan().any():
        raise MeasureError("outputs must be numbers or -inf; some are NaN or infinite: mend the model or its input")
    return float(log.gather(1, y.long()[:, None]).sum())
