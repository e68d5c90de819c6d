"""Find the norms of a model; swap, freeze, synchronize, recalibrate, fold and port them."""

from renorm.surgery.find import norms
from renorm.surgery.fold import FoldReport, fold
from renorm.surgery.freeze import freeze, unfreeze
from renorm.surgery.port import from_keras
from renorm.surgery.recalibrate import Recalibration, recalibrate
from renorm.surgery.swap import SwapReport, swap
from renorm.surgery.sync import sync, unsync

__all__ = [
    "FoldReport",
    "Recalibration",
    "SwapReport",
    "fold",
    "freeze",
    "from_keras",
    "norms",
    "recalibrate",
    "swap",
    "sync",
    "unfreeze",
    "unsync",
]
