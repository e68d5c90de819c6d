"""The layers: one `Norm`, its zoo of patterns, and norms by name."""
