"""In-place activated batch norm."""

import torch.nn.functional as F
from checks import Case

from cases.plain import IMAGE, standardize
from renorm.norms.inplace import InPlaceBatchNorm2d


def activated(activation):
    """Batch norm's formula, then the activation."""
    normalized = standardize((0, 2, 3))
    return lambda layer, x, mask: activation(normalized(layer, x, mask))


CASES = [
    Case("InPlaceBatchNorm2d", lambda: InPlaceBatchNorm2d(6), IMAGE, activated(F.leaky_relu), None, True),
    Case(
        "InPlaceBatchNorm2d-elu",
        lambda: InPlaceBatchNorm2d(6, activation="elu", slope=0.5),
        IMAGE,
        activated(lambda u: F.elu(u, 0.5)),
        None,
        True,
    ),
    Case(
        "InPlaceBatchNorm2d-identity",
        lambda: InPlaceBatchNorm2d(6, activation="identity"),
        IMAGE,
        standardize((0, 2, 3)),
        None,
        True,
    ),
]
