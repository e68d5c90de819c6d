"""The other choices of a network: models, activations, optimizers; thin registries over torch."""
