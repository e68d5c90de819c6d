"""Measure and apply, and the choice of what runs them."""

from renorm.kernels.extension import status
from renorm.kernels.moments import Affine, Moments
from renorm.kernels.select import BACKENDS, explain

__all__ = ["BACKENDS", "Affine", "Moments", "explain", "status"]
