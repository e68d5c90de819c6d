"""The rules, a file for each family; importing this package fills the catalogue."""

from renorm.diagnose.rules import data, gradients, losses, modes, norms, optimizer, parameters, structure

__all__ = ["data", "gradients", "losses", "modes", "norms", "optimizer", "parameters", "structure"]
