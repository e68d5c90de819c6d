"""A GPU that is not there: launches on meta tensors are compiled for it, as on a real one, and not run."""

import re
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from renorm.kernels.triton import available, launch


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel."""

    name: str
    programs: int
    kernel: Any  # what Triton compiled
    arguments: dict[str, Any]

    @property
    def ptx(self) -> str:
        return self.kernel.asm["ptx"]

    def resources(self) -> tuple[int, int]:
        """Registers of a thread, and bytes that it keeps in memory for want of more."""
        from triton import knobs

        path = next(path for path in self.kernel.metadata_group.values() if path.endswith(".cubin"))
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", path]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
        return found["REG"], found["STACK"] + found["LOCAL"]


class _Driver:
    """What Triton asks of a device."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # compiled kernels are kept by it

    def get_current_stream(self, device: int) -> int:
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


def on_it(*shape: int, dtype=torch.bfloat16, channels_last=False) -> Tensor:
    """A tensor of the absent GPU, which takes no memory."""
    x = torch.empty(shape, dtype=dtype, device="meta")
    return x.to(memory_format=torch.channels_last) if channels_last else x


def both_ways(layer: nn.Module, x: Tensor, *rest: Tensor) -> None:
    """Forward and backward of a layer on it, or of a call of a layer."""
    x = x.detach().requires_grad_()
    y = layer.to("meta", x.dtype)(x, *rest)
    y.backward(torch.empty_like(y))
