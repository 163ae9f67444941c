"""What is lost between two batches: the engine stands still while the next one waits already.

Answers are written, requests read and threads changed, by a processor whose caches the run has filled with
its own. A part of that is the same for a batch of any size, so that larger batches can pay even where the
runs themselves gain nothing by them: on a single core a tenth of the engine's time.

How a batch runs matters as much as its size. On a single core, a run on the event loop lets requests gather
in their sockets, to be read one after the other. Beside a run on a thread they are read as they come, each
time at the cost of a change between two threads that share the core and its caches. So both are learned.
"""

from __future__ import annotations

from typing import Dict, Optional, Tuple

from device_agent.batching.latency import LatencyModel

_INLINE_S = 20e-6
_THREAD_S = 100e-6


class Handovers:
    """Learns the time from the end of a batch to the start of the next."""

    def __init__(self) -> None:
        self._lost_s: Dict[bool, LatencyModel] = {True: LatencyModel(), False: LatencyModel()}
        self._last: Optional[Tuple[int, float, bool]] = None

    def ended(self, rows: int, ended_s: float, inline: bool) -> None:
        """A batch has ended, and others wait."""
        self._last = rows, ended_s, inline

    def held_up(self) -> None:
        """The next batch waits for something else: more requests, or its model's turn; or there is none."""
        self._last = None

    def started(self, now_s: float) -> None:
        """The next batch starts."""
        if self._last is not None:
            rows, ended_s, inline = self._last
            self._lost_s[inline].observe(rows, now_s - ended_s)
            self._last = None

    def lost_s(self, rows: int, inline: bool) -> float:
        """What is expected to be lost after a batch.

        Until a second size has been seen, all of it is taken to be the same for every size: so one is tried.
        """
        lost_s = self._lost_s[inline].predict(rows)
        if lost_s is not None:
            return lost_s
        return _INLINE_S if inline else _THREAD_S
