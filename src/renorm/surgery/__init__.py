"""Find, swap, freeze and synchronize the norms of a model."""

from renorm.surgery.find import norms
from renorm.surgery.freeze import freeze, unfreeze
from renorm.surgery.swap import SwapReport, swap
from renorm.surgery.sync import sync, unsync

__all__ = ["SwapReport", "freeze", "norms", "swap", "sync", "unfreeze", "unsync"]
