"""Who is about to come back: clients that wait for each answer send their next request soon after it.

Such clients fall into step with the engine. Of four, one is answered while three wait; the three run, and
the one that has meanwhile come back runs alone after them, for ever. Where the fixed cost of a run exceeds
the moment until the answered clients are back, it is better to let them join. That moment, and whether they
come back at all, is learned here. Requests are not told apart by client, which a proxy or a shared connection
would hide: each arrival is taken as the return of whoever has been away longest.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Deque, Iterable, Tuple

from device_agent.batching.smoothed import Smoothed

_MIN_RETURNED = 4
_MIN_RETURNED_FRACTION = 0.8
_LIKELY_DEVIATIONS = 2.0  # of gaps that are spread evenly, the last lies there
_LATEST_DEVIATIONS = 4.0
_MIN_SLACK_FRACTION = 0.5
_TRIAL_EVERY = 32
_TRIAL_FRACTION = 0.5


@dataclass(frozen=True)
class Company:
    """What is expected to join those who wait.

    Attributes:
        rows: how many rows.
        likely_s: when the last of them is probably here, on the monotonic clock.
        until_s: when to expect them no longer.
    """

    rows: int = 0
    likely_s: float = 0.0
    until_s: float = 0.0


NOBODY = Company()


class Returns:
    """Learns how soon, and how surely, a request follows an answer."""

    def __init__(self) -> None:
        self._away: Deque[Tuple[float, int]] = deque()  # when answered, rows of the request
        self._unseen = 0  # of those, the first, who may have come back while nobody looked
        self._gap_s = Smoothed(memory=32)
        self._untried = 0
        self._trial_until_s = 0.0
        self._returned = Smoothed(memory=32)  # 1 for a client that came back, 0 for one that did not

    @property
    def anybody_away(self) -> bool:
        """Whether an answer is out that no request has followed yet; a lone client that asks has nobody."""
        return bool(self._away)

    def answered(self, rows: Iterable[int], now_s: float) -> None:
        """Requests of these sizes are answered now."""
        self._away.extend((now_s, count) for count in rows)

    def arrived(self, now_s: float, horizon_s: float) -> None:
        """A request comes; answers that are older than ``horizon_s`` do not explain it."""
        self._forget(now_s, horizon_s)
        if self._away:
            answered_s, _ = self._away.popleft()
            if self._unseen:
                self._unseen -= 1
                return
            self._gap_s.add(now_s - answered_s)
            self._returned.add(1.0)

    def nobody_looked(self, now_s: float) -> None:
        """Until now the loop ran an engine: who came meanwhile is seen from now on, and teaches nothing."""
        self._away = deque((now_s, rows) for _, rows in self._away)
        self._unseen = len(self._away)

    def company(self, now_s: float, horizon_s: float) -> Company:
        """Who will probably be back soon."""
        self._forget(now_s, horizon_s)
        gap_s = self._gap_s
        if not self._away:
            return NOBODY
        if gap_s.count < _MIN_RETURNED or self._returned.mean < _MIN_RETURNED_FRACTION:
            return self._trial(now_s, horizon_s)
        slack_s = max(_LATEST_DEVIATIONS * gap_s.deviation, _MIN_SLACK_FRACTION * gap_s.mean)
        latest_s = gap_s.mean + slack_s
        rows = sum(count for answered_s, count in self._away if now_s < answered_s + latest_s)
        if rows == 0:
            return NOBODY
        last_s = self._away[-1][0]
        likely_s = last_s + gap_s.mean + _LIKELY_DEVIATIONS * gap_s.deviation
        return Company(rows, likely_s, last_s + latest_s)

    def _trial(self, now_s: float, horizon_s: float) -> Company:
        """Wait once in a while although it did not seem to pay.

        On a single core, a run holds up the requests of those who would have returned in time without it.
        """
        if now_s >= self._trial_until_s:
            self._untried += 1
            if self._untried < _TRIAL_EVERY:
                return NOBODY
            self._untried = 0
            self._trial_until_s = now_s + _TRIAL_FRACTION * horizon_s
        return Company(sum(count for _, count in self._away), now_s, self._trial_until_s)

    def _forget(self, now_s: float, horizon_s: float) -> None:
        while self._away and now_s - self._away[0][0] > horizon_s:
            self._away.popleft()
            if self._unseen:
                self._unseen -= 1
            else:
                self._returned.add(0.0)
