"""Maintenance windows: times of day, pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Optional, Sequence

DAY_S = 24 * 3600
_WINDOW = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])-([01][0-9]|2[0-3]):([0-5][0-9])")


@dataclass(frozen=True)
class Window:
    """From ``start_s`` until before ``end_s``, in seconds of the day; over midnight if the end is earlier."""

    start_s: int
    end_s: int

    def holds(self, second: int) -> bool:
        """Whether a second of the day lies in it."""
        return (second - self.start_s) % DAY_S < (self.end_s - self.start_s) % DAY_S


def parse(text: str) -> Optional[Window]:
    """Read ``HH:MM-HH:MM``; None if it is something else, or an empty window."""
    match = _WINDOW.fullmatch(text)
    if match is None:
        return None
    hours = [int(part) for part in match.groups()]
    window = Window(hours[0] * 3600 + hours[1] * 60, hours[2] * 3600 + hours[3] * 60)
    return window if window.start_s != window.end_s else None


def wait_s(windows: Sequence[Window], second: int) -> int:
    """Seconds until the next window opens; 0: one is open, or there are none."""
    if not windows or any(window.holds(second) for window in windows):
        return 0
    return min((window.start_s - second) % DAY_S for window in windows)
