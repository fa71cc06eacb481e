"""The most memory a piece of work held at once."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

_GIB = 2**30
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Starts to watch when made; ``gib`` is the peak since then.

    On a GPU: what torch held there.  On Linux: the whole process, libraries and network included.  Elsewhere: the process
    since its start, which a later, smaller piece of work cannot lower.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif _RESET.exists():
            try:
                _RESET.write_text("5")  # resets the high-water mark (proc(5))
            except OSError:
                pass  # a container may forbid it; the mark is then that of the whole process so far

    def gib(self) -> float:
        """The peak in GiB."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / _GIB
        if _STATUS.exists():
            marks = [line.split() for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
            if marks:
                return int(marks[0][1]) * 1024 / _GIB
        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kB here
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB
