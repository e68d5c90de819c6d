"""Measure and apply, and the choice of what runs them."""

from renorm.kernels.moments import Affine, Moments
from renorm.kernels.select import BACKENDS, explain, status

__all__ = ["BACKENDS", "Affine", "Moments", "explain", "status"]
