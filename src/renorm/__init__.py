"""renorm: the workbench for normalization in deep networks, for PyTorch."""
