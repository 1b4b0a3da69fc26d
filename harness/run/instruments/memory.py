"""Memory of this rank: what torch allocated on its GPU, or else what is resident in RAM."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from harness.machine import peak_resident_bytes


def _cuda() -> Any | None:
    """torch.cuda where this rank uses a GPU; it may not have been imported yet, or not to its end."""
    cuda = sys.modules.get("torch.cuda")
    return cuda if cuda is not None and getattr(cuda, "is_initialized", bool)() else None


def used_memory_bytes() -> int:
    """In use now."""
    cuda = _cuda()
    return int(cuda.memory_allocated() if cuda else this_process().memory_info().rss)


@cache
def this_process() -> psutil.Process:
    """The handle of this rank."""
    return psutil.Process()


def peak_memory_bytes() -> int:
    """Largest memory since `reset_peak_memory`, or since the process began."""
    cuda = _cuda()
    return int(cuda.max_memory_allocated()) if cuda else peak_resident_bytes()


def reset_peak_memory() -> None:
    """Forget the peaks of building the model: what is reported is that of what comes now.

    On CPU Linux forgets (proc(5), clear_refs), once glibc has given back what is free; where they may not be asked, the
    peak since the start is reported.
    """
    if cuda := _cuda():
        cuda.reset_peak_memory_stats()
        return
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
