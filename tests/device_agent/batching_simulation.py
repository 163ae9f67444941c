"""A simulated engine, clients and clock around the agent's own scheduler."""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from device_agent.batching.job import Job, TurnedAway
from device_agent.batching.scheduler import BatcherSettings, Scheduler

ANSWER_S = 20e-6  # the loop writes one answer after the other


@dataclass
class Log:
    """What became of the requests; each entry is the level and seconds.

    Attributes:
        answered: from arrival to answer.
        refused: from arrival to refusal: at once, or late.
        batches: rows of each.
        waits: from an arrival that found the engine idle to the start of its run.
    """

    answered: List[Tuple[int, float]] = field(default_factory=list)
    refused: List[Tuple[int, float]] = field(default_factory=list)
    batches: List[int] = field(default_factory=list)
    waits: List[float] = field(default_factory=list)

    def latencies_s(self, level: int = 1) -> List[float]:
        """Of the answered requests of a level, ascending."""
        return sorted(seconds for its, seconds in self.answered if its == level)

    def p99_s(self, level: int = 1) -> float:
        """The 99th percentile for a level."""
        latencies_s = self.latencies_s(level)
        return latencies_s[int(0.99 * (len(latencies_s) - 1))]


class Simulation:
    """One engine whose runs take ``run_s(rows, now_s)``, and whoever asks it.

    After each it stands still for ``lost_s(rows)``. What is sent while a run holds up the loop is read later.
    """

    def __init__(
        self,
        settings: BatcherSettings,
        run_s: Callable[[int, float], float],
        lost_s: Callable[[int], float] = lambda rows: 0.0,
    ) -> None:
        self.scheduler = Scheduler(settings)
        self.log = Log()
        self.now_s = 0.0
        self._run_s = run_s
        self._lost_s = lost_s
        self._events: List[Tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._on_answer: Dict[Job, Callable[[], None]] = {}
        self._sent_s: Dict[Job, float] = {}
        self._unread: List[Job] = []
        for rows in (1, 2, 4, 8, 16):  # the warm-up
            if rows <= settings.max_batch_size:
                self.scheduler.latency.observe(rows, run_s(rows, 0.0))

    def closed_loop(
        self, clients: int, think_s: Callable[[], float], rows: int = 1, priority: int = 0, **job: Any
    ) -> None:
        """Clients that send their next request ``think_s()`` after an answer."""
        for number in range(clients):
            self._at(number * 1e-4, lambda: self._send(rows, priority, think_s, **job))

    def open_loop(self, arrivals_s: Sequence[float], priority: int = 0, rows: int = 1, **job: Any) -> None:
        """Requests at given times."""
        for arrival_s in arrivals_s:
            self._at(arrival_s, lambda: self._send(rows, priority, None, **job))

    def run(self, seconds: float) -> Log:
        """Go on until the clock says so."""
        while self._events and self._events[0][0] <= seconds:
            self.now_s, _, event = heapq.heappop(self._events)
            event()
        return self.log

    def _at(self, when_s: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when_s, next(self._numbers), event))

    def _send(
        self, rows: int, priority: int, think_s: Optional[Callable[[], float]], **job_settings: Any
    ) -> None:
        job = Job({}, rows, "k", lambda job: None, priority=priority, **job_settings)
        if think_s is not None:
            again_s = think_s
            self._on_answer[job] = lambda: self._at(
                self.now_s + again_s(), lambda: self._send(rows, priority, again_s, **job_settings)
            )
        self._sent_s[job] = self.now_s
        if self.scheduler.busy and self.scheduler.inline:
            self._unread.append(job)
        elif self._read(job):
            self._step()

    def _read(self, job: Job) -> bool:
        try:
            self.scheduler.admit(job, self.now_s)
        except TurnedAway:
            self._done(job, self.log.refused)
            return False
        return True

    def _step(self) -> None:
        step = self.scheduler.next(self.now_s)
        for job in step.late:
            self._done(job, self.log.refused)
        if step.batch:
            self._start(step.batch)
        elif step.wake_at_s is not None:
            self._at(step.wake_at_s, self._step)

    def _start(self, batch: List[Job]) -> None:
        rows = sum(job.rows for job in batch)
        self.scheduler.started(batch, self.now_s)
        self.log.batches.append(rows)
        started_s, finished_s = self.now_s, self.now_s + self._run_s(rows, self.now_s)
        for job in batch:
            job.started_s, job.finished_s, job.batch_rows = started_s, finished_s, rows
        self._at(finished_s + self._lost_s(rows), lambda: self._finish(batch))

    def _finish(self, batch: List[Job]) -> None:
        self.scheduler.finished(batch, self.now_s)
        unread, self._unread = self._unread, []
        for job in unread:
            self._read(job)
        self._step()
        for number, job in enumerate(batch, start=1):
            self._at(self.now_s + number * ANSWER_S, lambda job=job: self._done(job, self.log.answered))

    def _done(self, job: Job, where: List[Tuple[int, float]]) -> None:
        where.append((job.level, self.now_s - self._sent_s.pop(job)))
        again = self._on_answer.pop(job, None)
        if again is not None:
            again()
