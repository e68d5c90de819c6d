"""Find, swap and freeze the norms of a model."""

from renorm.surgery.find import norms
from renorm.surgery.freeze import freeze, unfreeze
from renorm.surgery.swap import SwapReport, swap

__all__ = ["SwapReport", "freeze", "norms", "swap", "unfreeze"]
