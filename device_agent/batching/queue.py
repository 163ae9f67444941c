"""The bounded queue in front of one engine: higher levels first, and in each the order of arrival.

The order is strict, as Triton's is, but no level starves: a request of a level that had no part in the last
``STARVED_AFTER`` batches leads the next. So each level is sure of its share of the engine, a twentieth, and
the highest level's requests wait for a lower one at most that often.
"""

from __future__ import annotations

from collections import Counter
from typing import Counter as CounterType
from typing import Dict, Iterator, List, Sequence

from device_agent.batching.job import Job

STARVED_AFTER = 20


class JobQueue:
    """Waiting jobs.

    Attributes:
        jobs: in the order in which they should be served.
        rows: of all of them.
        timed: how many have a latest start or end.
    """

    def __init__(self) -> None:
        self.jobs: List[Job] = []
        self.rows = 0
        self.timed = 0
        self._by_level: CounterType[int] = Counter()
        self._passed_over: Dict[int, int] = {}  # batches since one had a job of the level

    def __len__(self) -> int:
        return len(self.jobs)

    def waiting(self, level: int) -> int:
        """How many jobs of a level wait."""
        return self._by_level[level]

    def position(self, job: Job) -> int:
        """Where a job would be put."""
        position, place = len(self.jobs), (job.level, job.delayed)
        while position and (self.jobs[position - 1].level, self.jobs[position - 1].delayed) > place:
            position -= 1
        return position

    def rows_ahead(self, job: Job) -> int:
        """Rows that would be served before those of ``job``."""
        return self.rows - sum(other.rows for other in self.jobs[self.position(job) :])

    def add(self, job: Job) -> None:
        """Put a job in its place."""
        self.jobs.insert(self.position(job), job)
        self.rows += job.rows
        self.timed += is_timed(job)
        self._by_level[job.level] += 1
        self._passed_over.setdefault(job.level, 0)

    def take(self, positions: Sequence[int]) -> List[Job]:
        """Take out the jobs at these positions, which ascend."""
        taken = [self.jobs[position] for position in positions]
        for position in reversed(positions):
            del self.jobs[position]
        for job in taken:
            self.rows -= job.rows
            self.timed -= is_timed(job)
            self._by_level[job.level] -= 1
        return taken

    # Levels

    def leader(self) -> int:
        """Position of the job that must be in the next batch."""
        if len(self._passed_over) < 2:
            return 0
        starved = [level for level in self._waiting_levels() if self.turns_until_led(level) == 0]
        if not starved:
            return 0
        level = max(starved, key=lambda level: self._passed_over[level])
        return next(i for i, job in enumerate(self.jobs) if job.level == level)

    def turns_until_led(self, level: int) -> int:
        """Batches after which a job of this level leads one, whatever else waits."""
        return max(0, STARVED_AFTER - self._passed_over.get(level, 0))

    def ran(self, batch: Sequence[Job]) -> None:
        """Take note of which levels had a part in a batch."""
        if len(self._passed_over) < 2:
            return
        for level in self._passed_over:
            self._passed_over[level] += 1
        for job in batch:
            self._passed_over[job.level] = 0

    def _waiting_levels(self) -> Iterator[int]:
        return (level for level in self._passed_over if self._by_level[level])


def is_timed(job: Job) -> bool:
    """Whether a job has a latest start or end."""
    return min(job.start_by_s, job.finish_by_s) < float("inf")
