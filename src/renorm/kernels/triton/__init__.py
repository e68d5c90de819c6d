"""The plans in Triton, for GPUs. Importing this package does not import Triton; `calls` does, when a kernel runs."""
