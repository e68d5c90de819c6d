"""What every test starts from, wherever it is run."""

import signal
import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def _interruptible():
    """A shell's background job is started with Ctrl-C ignored, and so is what it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def one_thread():
    """Sums in one order: what trials run with."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def fresh_graphs():
    """No test meets the compiled graphs of another: all norms share one forward, and graphs of it are limited."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
