"""The rules, a file for each family; importing this package fills the catalogue."""

from renorm.diagnose.rules import losses

__all__ = ["losses"]
