"""A progress bar with the time that is left, for those who call ``calibrate`` themselves."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

_WIDTH = 30
_EVERY_S = 0.1


class ProgressBar:
    """Draws one line over itself; give it to ``calibrate(progress=...)``.

    Args:
        total_rows: how many rows there will be.
        stream: where to draw; None: standard error.
        clock: seconds that only grow.
    """

    def __init__(
        self, total_rows: int, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total = max(total_rows, 1)
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._first: tuple[float, int] | None = None
        self._drawn_at = -_EVERY_S

    def __call__(self, done: int) -> None:
        """Draw ``done`` rows; the first call starts the clock, since a resumed run begins in the middle."""
        now = self._clock()
        if self._first is None:
            self._first = (now, done)
        ended = done >= self._total
        if now - self._drawn_at < _EVERY_S and not ended:
            return
        self._drawn_at = now
        filled = min(done * _WIDTH // self._total, _WIDTH)
        bar = "#" * filled + "-" * (_WIDTH - filled)
        self._stream.write(f"\rcalibrating [{bar}] {done}/{self._total} rows, {self._left(now, done)} left ")
        if ended:
            self._stream.write("\n")
        self._stream.flush()

    def _left(self, now: float, done: int) -> str:
        start, rows_before = self._first or (now, done)
        if done == rows_before:
            return "-:--"
        left_s = round((now - start) / (done - rows_before) * max(self._total - done, 0))
        return f"{left_s // 60}:{left_s % 60:02d}"
