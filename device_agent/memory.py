"""Memory that a model leaves behind when it is loaded or closed."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path


def resident_bytes(process: int) -> int:
    """Memory of a process that is in use now; 0 once it has ended."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def give_back() -> None:
    """Return freed memory to the system.

    glibc keeps what loading a model has freed, for allocations that never come: the process stays larger by
    the size of the model, and by more after every update. Other C libraries have no such call and are left
    alone.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return
    trim(0)
