"""Copies of live requests for a version that does not serve yet: which are taken, and what is kept."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from random import Random
from typing import Any, Deque, Optional, Sequence

import numpy as np

from device_agent.batching.job import Arrays, Job

#: Requests that may wait for the new version; each holds its inputs and outputs in memory.
MOST_WAITING = 2


@dataclass(frozen=True)
class Sample:
    """A request that the old version answered.

    Attributes:
        inputs: arrays that nobody writes to any more.
        rows: size along the batch axis.
        outputs: the old version's.
        run_s: how long its engine took; None: other requests were in the same run.
    """

    inputs: Arrays
    rows: int
    outputs: Arrays
    run_s: Optional[float]


class Mirror:
    """Takes a share of the requests that a version answers, by chance, and drops what finds no room.

    Attributes:
        dropped: requests that were chosen and found no room.
    """

    def __init__(self, fraction: float) -> None:
        """Take about ``fraction`` of the requests."""
        self.dropped = 0
        self._fraction = fraction
        # Not every n-th: with n sources that take turns it would always be the same one's.
        self._random = Random()  # noqa: S311 - nothing is kept secret by it
        self._waiting: Deque[Sample] = deque()

    def offer(self, batch: Sequence[Job]) -> None:
        """Look at a batch before its clients are answered; on the event loop, so it only copies."""
        for job in batch:
            answered = job.error is None and job.outputs is not None and not job.cancelled
            if not answered or job.probe or self._random.random() >= self._fraction:
                continue
            try:
                self._take(job)
            except MemoryError:
                self.dropped += 1

    def _take(self, job: Job) -> None:
        if len(self._waiting) >= MOST_WAITING:
            self.dropped += 1
            return
        alone = job.batch_rows == job.rows
        run_s = job.finished_s - job.started_s if alone else None
        self._waiting.append(Sample(_kept(job.inputs), job.rows, dict(job.outputs or {}), run_s))

    def next(self) -> Optional[Sample]:
        """The request that waits longest; None: none does."""
        return self._waiting.popleft() if self._waiting else None

    def clear(self) -> None:
        """Let go of what waits."""
        self._waiting.clear()


def _kept(inputs: Arrays) -> Arrays:
    """The inputs, copied where others may write to their memory once the request is answered."""
    return {name: array if _stays(array) else array.copy() for name, array in inputs.items()}


def _stays(array: np.ndarray[Any, Any]) -> bool:
    """Whether an array is its own memory, or a view of such as nobody can write to.

    Others are views: of shared memory, which is the client's, or of a connection's memory, which its next
    request is received into.
    """
    owner: Any = array
    while isinstance(owner, np.ndarray) and owner.base is not None:
        owner = owner.base
    if isinstance(owner, memoryview):
        owner = owner.obj
    return owner is array or isinstance(owner, bytes)
