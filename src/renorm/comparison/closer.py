"""What a trial keeps of its model besides scores: the worst cases, and information criteria of the fit."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from renorm.comparison.data import Splits
from renorm.comparison.spec import CaseRecord
from renorm.diagnose.worst import Case, worst_cases
from renorm.errors import MeasureError, RuleError
from renorm.measures.criteria import Noise, information_criteria

__all__ = ["criteria_of", "worst_of"]

MOST_CASES = 20
MOST_NEIGHBORS = 3
BATCH = 1024  # samples at once


def worst_of(model: nn.Module, splits: Splits) -> tuple[CaseRecord, ...]:
    """The worst samples of the test part, or of the validation part where there is none; none if they cannot be seen.

    Numbers are in the target's units; indices are rows of the part, those of neighbors of the training part.
    """
    x, y = (splits.x_test, splits.y_test) if len(splits.y_test) else (splits.x_valid, splits.y_valid)
    parts = [tuple(map(torch.tensor, part)) for part in ((x, y), (splits.x_train, splits.y_train))]

    def loss(output: Tensor, target: Tensor) -> Tensor:
        if splits.classes:
            return F.cross_entropy(output, target, reduction="none")
        return F.mse_loss(output.view(-1), target, reduction="none")

    def plain(value: float) -> float:
        return int(value) if splits.classes else float(value) * splits.target_std + splits.target_mean

    def record(case: Case) -> CaseRecord:
        near = tuple((one.index, plain(one.target)) for one in case.neighbors)
        return CaseRecord(case.index, case.loss, plain(case.prediction), case.confidence, plain(case.target), near)

    try:
        found = worst_cases(model, loss, parts[0], MOST_CASES, parts[1], neighbors=MOST_NEIGHBORS, batch_size=BATCH)
        return tuple(map(record, found))
    except RuleError:  # a model of the user's that cannot be traced
        return ()


def criteria_of(model: nn.Module, splits: Splits, noise: Noise | None) -> dict[str, float]:
    """AIC, AICc and BIC on the training part, of the noise whose likelihood was maximized, in standardized units.

    Empty where the loss was no likelihood, or an output is not finite.
    """
    if noise is None:
        return {}
    x, y = torch.tensor(splits.x_train), torch.tensor(splits.y_train)
    try:
        found = information_criteria(model, x, y, noise=noise)
    except MeasureError:
        return {}
    return {
        "log_likelihood": found.log_likelihood,
        "k": found.num_parameters,
        "n": found.num_samples,
        "aic": found.aic,
        "aicc": found.aicc,
        "bic": found.bic,
    }
