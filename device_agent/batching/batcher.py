"""The asyncio shell around :mod:`device_agent.batching.scheduler`: clock, event loop and engine.

Everything here runs on the event loop. A batch runs on the model's own thread, so that the loop keeps reading
and writing; where a run is known to be shorter than a thread is worth, it runs on the loop itself.
"""

from __future__ import annotations

import asyncio
import time
from typing import Callable, List, Optional, Sequence

from device_agent.batching.execution import EngineThread, execute
from device_agent.batching.job import DeadlineExceeded, Job, QueueFull
from device_agent.batching.latency import LatencyModel
from device_agent.batching.scheduler import INLINE_BELOW_S, BatcherSettings, Scheduler
from device_agent.batching.share import EngineShare, Tenant
from device_agent.engines.base import Engine
from device_agent.metrics import ModelMetrics

# Of the loop, before the next run on it. In each it reads once from every connection, after what was planned
# for it: a new one is accepted, then its first request is read, of a long one the head and then the body.
_READING_ROUNDS = 4

__all__ = ["Batcher", "BatcherSettings", "DeadlineExceeded", "Job", "QueueFull"]

_ALONE_AFTER = 8  # runs of one request each, with nobody else in sight


class Batcher:
    """Queue, policy and engine of one loaded model. Not thread-safe: call it on the event loop.

    Attributes:
        settings: the limits.
    """

    def __init__(
        self,
        engine: Engine,
        settings: BatcherSettings,
        metrics: ModelMetrics,
        share: Optional[EngineShare] = None,
    ) -> None:
        """Put a queue in front of an engine.

        Args:
            engine: what runs the batches.
            settings: the limits.
            metrics: what is counted.
            share: the places for runs that this model shares with others; None: it has one for itself.
        """
        self.settings = settings
        self._engine = engine
        self._metrics = metrics
        self._scheduler = Scheduler(settings)
        self._share = share or EngineShare()
        self._tenant = Tenant(settings.weight, self._plan_pump)
        self._holds_place = False
        self._loop: Optional[asyncio.AbstractEventLoop] = None
        self._pump_planned = False
        self._alone_runs = 0  # since two requests were last seen at a time
        self._ran_this_turn = False
        self._timer: Optional[asyncio.TimerHandle] = None
        self._idle_waiters: List[asyncio.Future[None]] = []
        self._thread: Optional[EngineThread] = None
        self._deliver: Callable[[List[Job]], None] = self._answer

    @property
    def latency(self) -> LatencyModel:
        """What a batch costs; learned."""
        return self._scheduler.latency

    @property
    def thread(self) -> int:
        """The id of the model's own thread in the system; 0: it has not been needed yet."""
        return 0 if self._thread is None else self._thread.native_id

    @property
    def idle(self) -> bool:
        """Whether nothing is queued and nothing runs."""
        return not self._scheduler.busy and len(self._scheduler.queue) == 0

    @property
    def running_s(self) -> float:
        """How long the run on the model's own thread has taken until now; 0: there is none."""
        return 0.0 if self._thread is None else self._thread.running_s

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
            QueueFull: the queue is at its limit.
            DeadlineExceeded: the job cannot be answered in time, by all that was learned.
        """
        try:
            self._admit(job)
        except (QueueFull, DeadlineExceeded):
            if not job.probe:
                self._metrics.count_refused()
            raise
        self._metrics.queue_depth = len(self._scheduler.queue)
        if self._scheduler.busy or self._ran_this_turn:
            self._alone_runs = 0
        if self._alone_runs >= _ALONE_AFTER and not self._pump_planned:
            self._pump()
            self._ran_this_turn = True
            self._running_loop().call_soon(self._end_turn)
        elif not self._scheduler.busy:
            self._plan_pump()

    def cancel(self, job: Job) -> None:
        """Forget a job whose client is gone; a batch that already runs is not disturbed."""
        job.cancelled = True
        if self._scheduler.remove(job):
            self._metrics.queue_depth = len(self._scheduler.queue)
            if not job.probe:
                self._metrics.cancelled += 1
            self._notify_if_idle()

    async def drain(self) -> None:
        """Wait until nothing is queued and nothing runs."""
        if self.idle:
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._idle_waiters.append(waiter)
        await waiter

    def show_answers(self, observer: Optional[Callable[[Sequence[Job]], None]]) -> None:
        """Show every batch that was computed to ``observer``, before its clients are answered.

        Until then nobody writes to the memory that the inputs lie in. The observer must be quick and must not
        raise. None: show them to nobody any more, which costs nothing.
        """

        def show_and_answer(batch: List[Job]) -> None:
            if observer is not None:
                observer(batch)
            self._answer(batch)

        self._deliver = self._answer if observer is None else show_and_answer

    def close(self) -> None:
        """Stop the thread. No job may follow."""
        self._share.leave(self._tenant)
        if self._thread is not None:
            self._thread.stop()
            self._thread = None

    # Choosing

    def _admit(self, job: Job) -> None:
        now_s = time.monotonic()
        try:
            self._scheduler.admit(job, now_s)
        except QueueFull:
            if self._scheduler.busy:
                raise
            self._pump()  # a burst filled the queue before the engine could take from it
            self._scheduler.admit(job, now_s)

    def _plan_pump(self) -> None:
        # Not at once: requests that other connections have already sent are read first, and join.
        # A client that has been alone for a while need not wait for others to be read.
        if not self._pump_planned:
            self._pump_planned = True
            self._running_loop().call_soon(self._planned_pump)

    def _plan_pump_after_reading(self) -> None:
        """As :meth:`_plan_pump`, after what came while a run held up the loop."""
        if not self._pump_planned:
            self._pump_planned = True
            self._read_on(_READING_ROUNDS)

    def _read_on(self, rounds: int) -> None:
        loop = self._running_loop()
        if rounds == 1:
            loop.call_soon(self._planned_pump)
        else:
            loop.call_soon(self._read_on, rounds - 1)

    def _planned_pump(self) -> None:
        self._pump_planned = False
        self._pump()

    def _end_turn(self) -> None:
        self._ran_this_turn = False

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:  # a batcher is made before its loop runs; asking each time costs a system call
            self._loop = asyncio.get_running_loop()
        return self._loop

    def _pump(self) -> None:
        """Start what should run now, if the engine is free and it is this model's turn."""
        if self._scheduler.busy:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now_s = time.monotonic()
        step = self._scheduler.next(now_s, self._may_run)
        self._metrics.queue_depth = len(self._scheduler.queue)
        if step.batch:
            self._start(step.batch)
        else:
            self._share.decline(self._tenant)
        if step.wake_at_s is not None:
            self._timer = self._running_loop().call_later(step.wake_at_s - now_s, self._pump)
        for job in step.late:
            if not job.probe:
                self._metrics.count_late()
            job.on_done(job)
        if step.late:
            self._notify_if_idle()

    def _may_run(self, expected_s: Optional[float]) -> bool:
        """Take a place; a run that is shorter than the way to a thread needs none."""
        self._holds_place = expected_s is None or expected_s >= INLINE_BELOW_S
        return not self._holds_place or self._share.acquire(self._tenant, expected_s)

    # Running

    def _start(self, batch: List[Job]) -> None:
        self._scheduler.started(batch, time.monotonic())
        self._alone_runs = self._alone_runs + 1 if self._is_alone(batch) else 0
        if self._scheduler.inline:
            self._run_here(batch)
            return
        if self._thread is None:
            loop = self._running_loop()
            self._thread = EngineThread(self._engine, loop, self._finish, self.settings.placement)
        self._thread.run(batch)

    def _is_alone(self, batch: List[Job]) -> bool:
        return len(batch) == 1 and len(self._scheduler.queue) == 0

    def _run_here(self, batch: List[Job]) -> None:
        """Run on the event loop, and answer before anything is learned of it."""
        execute(self._engine, batch)
        self._deliver(batch)
        self._settle(batch)
        if self._scheduler.minds_arrivals:
            self._plan_pump_after_reading()
        elif len(self._scheduler.queue):
            self._plan_pump()

    def _finish(self, batch: List[Job]) -> None:
        """A batch is back from the thread: set the engine to work again before anything else.

        Not on a single core, where it would hold up the answers.
        """
        if self.settings.one_core:
            self._deliver(batch)
            self._settle(batch)
            self._pump()
        else:
            self._settle(batch)
            self._pump()
            self._deliver(batch)

    def _settle(self, batch: List[Job]) -> None:
        self._scheduler.finished(batch, time.monotonic())
        if self._holds_place:
            used_s = batch[-1].finished_s - batch[0].started_s
            self._share.release(self._tenant, used_s, again=len(self._scheduler.queue) > 0)
        self._notify_if_idle()

    def _answer(self, batch: List[Job]) -> None:
        for job in batch:
            if not job.cancelled:
                job.on_done(job)
        self._metrics.record_batch(batch)

    def _notify_if_idle(self) -> None:
        if not self._idle_waiters or not self.idle:
            return
        for waiter in self._idle_waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._idle_waiters.clear()
