"""The peak of this process's resident memory over a stretch of its life."""

from __future__ import annotations

import ctypes
import gc
import math
import sys
from pathlib import Path

__all__ = ["PeakMemory"]

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """How far resident memory rises above where it stood at :meth:`start`; nan where the system cannot say.

    It is the high-water mark that Linux keeps of the whole process, set back at the start, after freed memory was
    returned to the system. Elsewhere, and with a C library that cannot return it (musl), it is nan. What the process
    allocates beside the model counts too, so that figures below a few megabytes mean nothing.

    >>> memory = PeakMemory()
    >>> memory.start()
    >>> memory.peak_mb() >= 0 or math.isnan(memory.peak_mb())
    True
    """

    def __init__(self) -> None:
        self._start = math.nan

    def start(self) -> None:
        """Return freed memory to the system, and set the high-water mark back to what is resident now."""
        gc.collect()
        # without this a trial reuses, unseen, what an earlier one in the same process has freed
        if not _trim():
            return
        try:
            _CLEAR.write_text("5")
        except OSError:
            return
        self._start = _resident_mb("VmRSS")

    def peak_mb(self) -> float:
        """Megabytes (2**20 bytes) from the start to the high-water mark since then."""
        # Linux sums its counters up lazily: the mark can lie a little below the reading at the start
        return self._start if math.isnan(self._start) else max(0.0, _resident_mb("VmHWM") - self._start)


def _trim() -> bool:
    """Whether freed memory could be returned to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is None:
        return False
    trim(0)
    return True


def _resident_mb(field: str) -> float:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return math.nan
    found = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(found[0]) / 1024 if found else math.nan
