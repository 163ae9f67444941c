"""Memory that a model leaves behind when it is loaded or closed."""

from __future__ import annotations

import ctypes


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
