"""Peak memory of a piece of work in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


@contextmanager
def peak_rss() -> Iterator[Callable[[], int | None]]:
    """Measure the peak resident memory of the block.

    Yields:
        A function that gives the peak since the block began, in bytes; None where the kernel does not let a
        process reset its high-water mark (see proc(5), ``clear_refs``).
    """
    try:
        _CLEAR.write_text("5")
        resettable = True
    except OSError:
        resettable = False
    yield lambda: _high_water_bytes() if resettable else None


def _high_water_bytes() -> int | None:
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
