"""What every test starts from, wherever it is run."""

import os
import signal
import sys
from functools import wraps

import pytest
import torch

DEVICE = os.environ.get("RENORM_TEST_DEVICE", "cpu")


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


@pytest.fixture(autouse=True)
def _on_the_device():
    """With RENORM_TEST_DEVICE=cuda, what a test makes without naming a device is there, and drawn as on the CPU."""
    if DEVICE == "cpu":
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        for name in ("rand", "randn", "randint", "randperm", "normal"):
            patch.setattr(torch, name, _drawn_on_the_cpu(getattr(torch, name)))
        torch.set_default_device(DEVICE)
        yield
        torch.set_default_device(None)


def _drawn_on_the_cpu(function):
    @wraps(function)
    def draw(*arguments, **options):
        if options.get("generator") is None or options.get("device") is not None:
            return function(*arguments, **options)
        return function(*arguments, **options, device="cpu").to(torch.get_default_device())

    return draw
