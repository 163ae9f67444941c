"""The asyncio shell around :mod:`device_agent.batching.policy`: a bounded queue in front of one engine.

Everything here runs on the event loop. A batch runs on the model's own thread, so that the loop keeps reading
and writing; where a run is known to be shorter than the way to a thread and back, it runs on the loop itself.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import List, Optional, Sequence

from device_agent.batching.execution import EngineThread, execute
from device_agent.batching.job import DeadlineExceeded, Job, QueueFull
from device_agent.batching.latency import LatencyModel
from device_agent.batching.policy import PolicySettings, decide, earliest_start_s
from device_agent.engines.base import Engine
from device_agent.metrics import ModelMetrics

__all__ = ["Batcher", "BatcherSettings", "DeadlineExceeded", "Job", "QueueFull"]

_INLINE_BELOW_S = 60e-6  # about what handing a batch to a thread and back costs


@dataclass(frozen=True)
class BatcherSettings:
    """Limits of one model.

    Attributes:
        policy: how batches are chosen.
        max_queue_size: requests that may wait, not counting those that run.
    """

    policy: PolicySettings
    max_queue_size: int


class Batcher:
    """Queue, policy and engine of one loaded model. Not thread-safe: call it on the event loop."""

    def __init__(self, engine: Engine, settings: BatcherSettings, metrics: ModelMetrics) -> None:
        self.latency = LatencyModel()
        self._engine = engine
        self._settings = settings
        self._metrics = metrics
        self._queue: List[Job] = []
        self._timeouts = 0  # waiting jobs that have one
        self._busy = False
        self._free_at_s = 0.0  # when the running batch should end
        self._pump_planned = False
        self._timer: Optional[asyncio.TimerHandle] = None
        self._idle_waiters: List[asyncio.Future[None]] = []
        self._thread: Optional[EngineThread] = None

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
            QueueFull: the queue is at its limit.
            DeadlineExceeded: the job cannot start within its timeout, by all that was learned.
        """
        if len(self._queue) >= self._settings.max_queue_size and not self._busy:
            self._pump()  # a burst filled the queue before the engine could take from it
        if len(self._queue) >= self._settings.max_queue_size:
            self._metrics.refused += 1
            raise QueueFull
        job.arrived_s = time.monotonic()
        if job.timeout_s is not None and self._earliest_start_s(job) > job.arrived_s + job.timeout_s:
            self._metrics.deadline_missed += 1
            raise DeadlineExceeded
        self._queue.append(job)
        self._timeouts += job.timeout_s is not None
        self._metrics.queue_depth = len(self._queue)
        if not self._busy:
            self._plan_pump()

    def cancel(self, job: Job) -> None:
        """Forget a job whose client is gone; a batch that already runs is not disturbed."""
        job.cancelled = True
        if job in self._queue:
            self._take([self._queue.index(job)])
            self._metrics.cancelled += 1
            self._notify_if_idle()

    async def drain(self) -> None:
        """Wait until nothing is queued and nothing runs."""
        if not self._queue and not self._busy:
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._idle_waiters.append(waiter)
        await waiter

    def close(self) -> None:
        """Stop the thread. No job may follow."""
        if self._thread is not None:
            self._thread.stop()
            self._thread = None

    # Choosing

    def _earliest_start_s(self, job: Job) -> float:
        now_s = job.arrived_s
        free_at_s = self._free_at_s if self._busy else now_s
        return earliest_start_s(
            self._queue, job.batch_key, now_s, free_at_s, self.latency.predict, self._settings.policy
        )

    def _plan_pump(self) -> None:
        # Not at once: requests that other connections have already sent are read first, and join.
        if not self._pump_planned:
            self._pump_planned = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._pump_planned = False
        if self._busy:
            return
        now_s = time.monotonic()
        expired = self._take_expired(now_s) if self._timeouts else []
        decision = decide(self._queue, now_s, False, self.latency.predict, self._settings.policy)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if decision.take:
            self._start(self._take(decision.take))
        elif decision.wake_at_s is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(decision.wake_at_s - now_s, self._pump)
        for job in expired:
            job.on_done(job)
        if expired:
            self._notify_if_idle()

    def _take(self, positions: Sequence[int]) -> List[Job]:
        batch = [self._queue[position] for position in positions]
        for position in reversed(positions):
            del self._queue[position]
        self._metrics.queue_depth = len(self._queue)
        self._timeouts -= sum(job.timeout_s is not None for job in batch)
        return batch

    def _take_expired(self, now_s: float) -> List[Job]:
        positions = [
            i
            for i, job in enumerate(self._queue)
            if job.timeout_s is not None and now_s - job.arrived_s > job.timeout_s
        ]
        expired = self._take(positions) if positions else []
        for job in expired:
            job.error = DeadlineExceeded()
            self._metrics.deadline_missed += 1
        return expired

    # Running

    def _start(self, batch: List[Job]) -> None:
        self._busy = True
        rows = sum(job.rows for job in batch)
        expected_s = self.latency.predict(rows)
        if expected_s is not None and expected_s < _INLINE_BELOW_S:
            execute(self._engine, batch)
            self._settle(batch)
            if self._queue:
                self._plan_pump()
            self._answer(batch)
            return
        if self._thread is None:
            self._thread = EngineThread(self._engine, asyncio.get_running_loop(), self._finish)
        self._free_at_s = time.monotonic() + (expected_s or 0.0)
        self._thread.run(batch)

    def _finish(self, batch: List[Job]) -> None:
        """A batch is back from the thread: set the engine to work again before anything else."""
        self._settle(batch)
        self._pump()
        self._answer(batch)

    def _settle(self, batch: List[Job]) -> None:
        self._busy = False
        first = batch[0]
        if first.error is None:
            self.latency.observe(first.batch_rows, first.finished_s - first.started_s)

    def _answer(self, batch: List[Job]) -> None:
        self._metrics.record_batch(batch)
        for job in batch:
            if not job.cancelled:
                job.on_done(job)
        self._notify_if_idle()

    def _notify_if_idle(self) -> None:
        if self._queue or self._busy:
            return
        for waiter in self._idle_waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._idle_waiters.clear()
