"""A GPU that is not there: launches on meta tensors are compiled for it, as a real one would, and not run."""

import re
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from renorm.kernels import native
from renorm.kernels.triton import available, launch


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel."""

    name: str
    programs: int
    kernel: object  # what Triton compiled
    arguments: dict

    @property
    def key(self) -> tuple:
        """Equal for launches that share what was compiled."""
        return self.name, self.kernel.hash

    @property
    def threads(self) -> int:
        return 32 * self.kernel.metadata.num_warps

    @property
    def ptx(self) -> str:
        return self.kernel.asm["ptx"]

    def resources(self) -> tuple[int, int]:
        """Registers of a thread, and bytes that it keeps in memory for want of more."""
        from triton import knobs

        path = next(path for path in self.kernel.metadata_group.values() if path.endswith(".cubin"))
        said = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", path], capture_output=True, text=True, check=True
        ).stdout
        found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
        return found["REG"], found["STACK"] + found["LOCAL"]


class _Driver:
    """What Triton asks of a device."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability  # kernels are cached by it

    def get_current_stream(self, device):
        return 0


@contextmanager
def absent_gpu(monkeypatch, capability=90, processors=132):
    """Inside, meta tensors are on it; gives the list of launches."""
    from triton.runtime import jit

    launches: list[Launch] = []
    run = jit.JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        launches.append(Launch(self.fn.__name__, grid[0], kernel, given))
        return kernel

    with monkeypatch.context() as patch:
        patch.setattr(jit.driver, "_active", _Driver(capability))
        patch.setattr(jit.JITFunction, "run", compile_only)
        patch.setattr(available, "why_not", lambda x: None)
        patch.setattr(launch, "processors", lambda device: processors)
        yield launches


def on_it(shape, dtype=torch.bfloat16, *, channels_last=False):
    """A tensor of the absent GPU, which takes no memory."""
    x = torch.empty(shape, dtype=dtype, device="meta")
    return x.to(memory_format=torch.channels_last) if channels_last else x


def both_ways(layer, x, *, residual=None, mask=None):
    """A forward and a backward pass of a layer on it."""
    x = x.detach().requires_grad_()
    y = layer.to("meta", x.dtype)(x) if mask is None else layer.to("meta", x.dtype)(x, mask)
    y.backward(torch.empty_like(y))
