"""What one model's engine should do next: queue, forecasts and what was learned, without clock or loop.

Every method is told the time. So a simulation runs the same code as the agent; the agent's shell around it is
:mod:`device_agent.batching.batcher`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Callable, Dict, List, Optional, Sequence

from device_agent.affinity import ANYWHERE, Placement
from device_agent.batching.handover import Handovers
from device_agent.batching.job import DeadlineExceeded, Job, QueueFull
from device_agent.batching.latency import PREPARING_RUNS, LatencyModel
from device_agent.batching.policy import (
    Decision,
    Learned,
    PolicySettings,
    decide,
    look,
    saved_s,
    steady_size,
)
from device_agent.batching.queue import STARVED_AFTER, JobQueue, is_timed
from device_agent.batching.returns import NOBODY, Returns
from device_agent.batching.settings import DELAY, Batching
from device_agent.batching.smoothed import Smoothed

INLINE_BELOW_S = 60e-6  # about what handing a batch to a thread and back costs
# On a single core a thread overlaps nothing with the event loop, and what it costs to go there and back is
# lost. Longer runs still go to a thread, so that health checks and refusals do not wait for them.
_INLINE_ON_ONE_CORE_BELOW_S = 10e-3
_INLINE_WITH_LEVELS_BELOW_S = 5e-3  # the highest level is not seen meanwhile
_INLINE_DEADLINE_FRACTION = 0.2  # of the time that requests have lately had
_LATELY_RUNS = 64
_BETWEEN_S = 100e-6
_PLANNED_FRACTION = 0.9  # of the objective; reading, answering and the way to the client take the rest
_MIN_GAIN_S = 200e-6  # a loop's timers are not much finer, and clients need as long to come back
_REFRESH_RUNS = 16
_WORTH_FRACTION = 0.03
_WORTH_FRACTION_WITH_LEVELS = 0.25  # the highest level waits for the whole of a run that goes on
# Where no larger batch is thought to pay, some are tried now and then: what was learned may be out of date,
# and runs of one size say nothing of others. They alternate with the usual ones, so that a slow moment of the
# device speaks against neither. Each try that changes nothing doubles the time to the next.
_LOOK_LEAST_ROWS = 4
_LOOK_BATCHES = PREPARING_RUNS + 5
_LOOK_EVERY_RUNS = 64
_LOOK_AT_LEAST_EVERY_RUNS = 4096
_FIRST = Decision(take=(0,))


@dataclass(frozen=True)
class BatcherSettings:
    """Limits of one model.

    Attributes:
        max_batch_size: most rows in one run; 1 runs every request alone.
        max_queue_size: requests of one level that may wait, where ``batching`` does not say.
        batching: what the user says of batching.
        slo_s: within which a request should be answered; one that cannot be is refused. None: no objective.
        weight: the model's share of the engine, relative to the others'.
        one_core: whether the engine and the event loop have one core between them.
        own_thread: run nothing on the event loop: the model has cores of its own, where the loop is not, or a
            process that may hang.
        placement: where the model's own thread runs.
    """

    max_batch_size: int
    max_queue_size: int = 256
    batching: Batching = field(default_factory=Batching)
    slo_s: Optional[float] = None
    weight: float = 1.0
    one_core: bool = False
    own_thread: bool = False
    placement: Placement = ANYWHERE


@dataclass(frozen=True)
class Step:
    """What to do now.

    Attributes:
        batch: jobs to run together; empty: none.
        late: jobs that can no longer be answered in time, with their ``error`` set.
        wake_at_s: when to ask again, if nothing else happens before; None: at the next event.
    """

    batch: List[Job]
    late: List[Job]
    wake_at_s: Optional[float] = None


class Scheduler:
    """Queue and policy of one engine that runs one batch at a time.

    Attributes:
        latency: what a batch costs; learned.
        queue: what waits.
        busy: whether a batch runs.
        inline: whether it runs on the event loop.
    """

    def __init__(self, settings: BatcherSettings) -> None:
        delay_us = settings.batching.max_queue_delay_microseconds
        self.latency = LatencyModel()
        self.queue = JobQueue()
        self.busy = self.inline = False
        self._settings = settings
        self._policy = PolicySettings(
            settings.max_batch_size,
            None if delay_us is None else delay_us / 1e6,
            settings.batching.preferred_batch_size,
            _WORTH_FRACTION if settings.batching.priority_levels < 2 else _WORTH_FRACTION_WITH_LEVELS,
        )
        self._learns_sizes = not delay_us and not settings.batching.preferred_batch_size
        self._waits_for_returns = delay_us is None and settings.max_batch_size > 1
        self._returns = Returns()
        self._free_at_s = 0.0  # when the running batch should end
        self._finished_s: Optional[float] = None  # when the last one did, with others waiting
        # From one batch to the next, whatever ran meanwhile: what those that wait have to expect.
        self._between_s = Smoothed(_BETWEEN_S, memory=64)
        self._handovers = Handovers()
        self._tightest_s, self._tightest_until_run = math.inf, 0  # time that requests have lately had
        self._blind_s, self._seeing_since_s = 0.0, 0.0  # the last run on the loop: how long, and its end
        self._turns_s: List[float] = []  # by rows; worked out now and then
        self._error: Dict[int, Smoothed] = {}  # actual over forecast time in the queue, by level
        self._runs = 0
        self._runs_by_rows: Dict[int, int] = {}
        self._look_at_run, self._look_every_runs = _LOOK_EVERY_RUNS, _LOOK_EVERY_RUNS
        self._looked_at = 0  # batches of the try that is under way
        self._steady_size = settings.max_batch_size
        self._horizon_s = 0.0  # a return later than this is not worth waiting for

    # A request comes

    def admit(self, job: Job, now_s: float) -> None:
        """Queue a job.

        Raises:
            QueueFull: the queue of its level is at its limit.
            DeadlineExceeded: the job cannot be answered in time, by all that was learned.
        """
        batching = self._settings.batching
        job.level = batching.level(job.priority)
        job.arrived_s = now_s
        policy = batching.policy(job.level)
        if self.queue.waiting(job.level) >= (policy.max_queue_size or self._settings.max_queue_size):
            raise QueueFull(self._wait_s(job, now_s))
        if self._horizon_s:
            self._returns.arrived(now_s, self._horizon_s)
        timeout_s = policy.timeout_s(job.timeout_s)
        if timeout_s is not None:
            job.start_by_s = now_s + timeout_s
        if self._settings.slo_s is not None:
            job.finish_by_s = now_s + _PLANNED_FRACTION * self._settings.slo_s
        if is_timed(job):
            self._note_deadline(job, now_s)
            self._check_forecast(job, now_s)
        self.queue.add(job)

    def _note_deadline(self, job: Job, now_s: float) -> None:
        """Learn how long runs may hold up the loop; count the time in which the last one did as gone."""
        allowed_s = min(job.start_by_s, job.finish_by_s) - now_s
        if allowed_s <= self._tightest_s or self._runs >= self._tightest_until_run:
            self._tightest_s, self._tightest_until_run = allowed_s, self._runs + _LATELY_RUNS
        if now_s - self._seeing_since_s < self._blind_s:
            unseen_s = min(self._blind_s, _INLINE_DEADLINE_FRACTION * allowed_s)
            job.start_by_s -= unseen_s
            job.finish_by_s -= unseen_s

    def remove(self, job: Job) -> bool:
        """Forget a job; whether it was still waiting."""
        if job not in self.queue.jobs:
            return False
        self.queue.take([self.queue.jobs.index(job)])
        if not self.queue.jobs:
            self._nobody_waits()
        return True

    def _nobody_waits(self) -> None:
        """What passes until the next batch is not the time between two."""
        self._finished_s = None
        self._handovers.held_up()

    # The engine is free

    def next(
        self, now_s: float, may_run: Callable[[Optional[float]], bool] = lambda expected_s: True
    ) -> Step:
        """Choose what runs now.

        Args:
            now_s: the clock.
            may_run: asked before a batch that should take so long is taken from the queue; where it answers
                no, the batch stays there.
        """
        if self.busy:
            return Step([], [])
        late = self._take_late(now_s) if self.queue.timed else []
        if not self.queue.jobs:
            self._nobody_waits()
            return Step([], late)
        decision = self._decide(now_s)
        if not decision.take or not may_run(self.expected_s([self.queue.jobs[i] for i in decision.take])):
            self._handovers.held_up()
            return Step([], late, decision.wake_at_s)
        return Step(self.queue.take(decision.take), late)

    def _decide(self, now_s: float) -> Decision:
        leader = self.queue.leader()
        if self._should_look():
            rows = min(self._policy.max_batch_size, max(2 * self._steady_size, _LOOK_LEAST_ROWS))
            return look(self.queue.jobs, leader, rows, now_s, self._learned(now_s))
        if self._goes_alone():
            return _FIRST if leader == 0 else Decision(take=(leader,))
        return decide(self.queue.jobs, now_s, False, self._learned(now_s), self._policy, leader)

    def _goes_alone(self) -> bool:
        """Whether there is nothing to choose: the usual case, which should cost nothing."""
        if not self._learns_sizes:
            return False
        return self._steady_size == 1 or (len(self.queue) == 1 and not self._horizon_s)

    def _should_look(self) -> bool:
        if self._runs < self._look_at_run or self._runs % 2 or self.queue.rows <= self._steady_size:
            return False
        return self._steady_size < self._policy.max_batch_size and self._learns_sizes

    def _is_looking(self) -> bool:
        """Whether a try is under way, of which nothing should be made before it is done."""
        return self._looked_at > 0 and self._runs < self._look_at_run + _LOOK_EVERY_RUNS

    def _looked(self) -> None:
        if not self._looked_at:
            self._look_at_run = self._runs
        self._looked_at += 1
        if self._looked_at < _LOOK_BATCHES:
            return
        self._looked_at = 0
        self._look_at_run = self._runs + self._look_every_runs
        self._look_every_runs = min(2 * self._look_every_runs, _LOOK_AT_LEAST_EVERY_RUNS)

    def started(self, batch: Sequence[Job], now_s: float) -> None:
        """A batch of :meth:`next` starts now; ``inline`` says where."""
        self.busy = True
        self.queue.ran(batch)
        rows = sum(job.rows for job in batch)
        if len(batch) > 1 and rows > self._steady_size:
            self._looked()
        expected_s = self.latency.predict(rows) or 0.0
        self.inline = 0.0 < expected_s < self.inline_below_s
        self._free_at_s = now_s + expected_s
        if self._finished_s is not None:
            self._between_s.add(now_s - self._finished_s)
        self._handovers.started(now_s)
        for job in batch:
            if job.forecast_s > expected_s:
                self._learn_error(job, now_s)

    def finished(self, batch: Sequence[Job], now_s: float) -> None:
        """A batch has ended; ``started_s`` and ``finished_s`` of its jobs are set."""
        self.busy = False
        first = batch[0]
        if self.inline:
            self._blind_s, self._seeing_since_s = now_s - first.started_s, now_s
        if first.error is None and self._is_prepared(first.batch_rows):
            self.latency.observe(first.batch_rows, first.finished_s - first.started_s)
        if self._runs % _REFRESH_RUNS == 0 and not self._is_looking():
            self._refresh()
        self._runs += 1
        self._finished_s = now_s if self.queue.jobs else None
        if self.queue.jobs:
            self._handovers.ended(first.batch_rows, batch[-1].finished_s, self.inline)
        if self._horizon_s:
            if self.inline:
                self._returns.nobody_looked(now_s)
            self._returns.answered([job.rows for job in batch], now_s)

    def _is_prepared(self, rows: int) -> bool:
        """Whether a run of so many rows, just ended, took its usual time; or nothing better is known."""
        earlier = self._runs_by_rows.get(rows, 0)
        if earlier < PREPARING_RUNS:
            self._runs_by_rows[rows] = earlier + 1
        return earlier >= PREPARING_RUNS or self.latency.predict(rows) is None

    def expected_s(self, batch: Sequence[Job]) -> Optional[float]:
        """How long a batch should run; None: not known yet."""
        return self.latency.predict(sum(job.rows for job in batch))

    @property
    def inline_below_s(self) -> float:
        """Batches that are shorter run on the event loop.

        While somebody may return for whom the next batch would wait, those are only the shortest: while the
        loop runs an engine, it does not see when clients come back.
        """
        awaits = self._horizon_s and self._returns.anybody_away and not self.queue.jobs
        return min(self._worth_holding_up_s, INLINE_BELOW_S) if awaits else self._worth_holding_up_s

    @property
    def _worth_holding_up_s(self) -> float:
        """Shorter runs are worth holding up the event loop."""
        settings = self._settings
        if settings.own_thread:
            return 0.0
        if not settings.one_core:
            return INLINE_BELOW_S
        has_levels = settings.batching.priority_levels > 1
        below_s = _INLINE_WITH_LEVELS_BELOW_S if has_levels else _INLINE_ON_ONE_CORE_BELOW_S
        if self._runs < self._tightest_until_run:
            below_s = min(below_s, _INLINE_DEADLINE_FRACTION * self._tightest_s)
        return below_s

    @property
    def minds_arrivals(self) -> bool:
        """Whether something waits that should not run before later arrivals are known.

        They may be of a higher level, or have less time than those that wait.
        """
        return bool(self.queue.timed) or (self._settings.batching.priority_levels > 1 and len(self.queue) > 0)

    # Learned

    def _learned(self, now_s: float) -> Learned:
        company = self._returns.company(now_s, self._horizon_s) if self._horizon_s else NOBODY
        return Learned(self.latency.predict, self.turn_s, company, self._steady_size)

    def turn_s(self, rows: int) -> float:
        """Expected seconds from the start of a batch of ``rows`` to the start of the next, if others wait."""
        if rows < len(self._turns_s):
            return self._turns_s[rows]
        return (self.latency.predict(rows) or 0.0) + self._handovers.lost_s(rows, self._is_inline(rows))

    def _refresh(self) -> None:
        """What changes slowly is not worked out for every request."""
        self._policy = replace(self._policy, max_batch_size=self._largest_size())
        self._turns_s.clear()
        self._turns_s.extend([self.turn_s(rows) for rows in range(self._policy.max_batch_size + 1)])
        learned = Learned(self.latency.predict, self.turn_s)
        before, self._steady_size = self._steady_size, steady_size(learned, self._policy)
        if self._steady_size > before:
            self._look_every_runs = _LOOK_EVERY_RUNS
        if self._waits_for_returns and self._steady_size > 1:
            gain_s = saved_s(1, 1, learned, self._steady_size)
            self._horizon_s = gain_s if gain_s >= _MIN_GAIN_S else 0.0
        else:
            self._horizon_s = 0.0

    def _largest_size(self) -> int:
        """Rows of the largest batch to be made: on a single core, of those that still run on the event loop.

        What a larger one gains is less than its thread costs, which shares the core and its caches with a
        loop that wakes up for every request that comes.
        """
        sizes = range(1, self._settings.max_batch_size + 1)
        if not self._settings.one_core or not self._is_inline(1) or not self._learns_sizes:
            return sizes[-1]
        return max(size for size in sizes if self._is_inline(size))

    def _is_inline(self, rows: int) -> bool:
        return (self.latency.predict(rows) or math.inf) < self._worth_holding_up_s

    def _learn_error(self, job: Job, now_s: float) -> None:
        error = self._error.setdefault(job.level, Smoothed(1.0, memory=64))
        error.add(min(10.0, (now_s - job.arrived_s) / job.forecast_s))

    # Forecasts

    def _check_forecast(self, job: Job, now_s: float) -> None:
        if self.latency.predict(job.rows) is None:
            return
        wait_s = self._wait_s(job, now_s)
        size = min(self._steady_size, self.queue.rows_ahead(job) + job.rows)
        answer_s = now_s + wait_s + (self.latency.predict(max(size, job.rows)) or 0.0)
        if now_s + wait_s > job.start_by_s or answer_s > job.finish_by_s:
            raise DeadlineExceeded(max(now_s + wait_s - job.start_by_s, answer_s - job.finish_by_s))

    def _wait_s(self, job: Job, now_s: float) -> float:
        """How long a job that comes now will wait, as it usually turns out, and a little more."""
        free_s = max(0.0, self._free_at_s - now_s) if self.busy else 0.0
        ahead = self.queue.rows_ahead(job)
        batches = math.ceil(max(0, ahead + job.rows - self._steady_size) / self._steady_size)
        turn_s = (self.latency.predict(self._steady_size) or 0.0) + self._between_s.mean
        job.forecast_s = free_s + (self._between_s.mean if ahead or self.busy else 0.0) + batches * turn_s
        error = self._error.get(job.level)
        wait_s = job.forecast_s * (max(1.0, error.mean + error.deviation) if error else 1.0)
        # A level that is passed over has its turn at the latest then, however much is ahead of it.
        turns = self.queue.turns_until_led(job.level) + self.queue.waiting(job.level) * STARVED_AFTER
        return min(wait_s, free_s + (1 + turns) * turn_s) if job.level > 1 else wait_s

    def _take_late(self, now_s: float) -> List[Job]:
        """Take out who cannot be answered in time any more; those that are only delayed go back."""
        crowded = self.queue.rows > self._steady_size
        run_s = (self.latency.predict(self._steady_size) or 0.0) if crowded else 0.0
        late = self.queue.take([
            i
            for i, job in enumerate(self.queue.jobs)
            if now_s > job.start_by_s
            or now_s + max(run_s, self.latency.predict(job.rows) or 0.0) > job.finish_by_s
        ])  # fmt: skip
        for job in late:
            if job.forecast_s:
                self._learn_error(job, now_s)  # else only those would count that were not held up much
        return [job for job in late if not self._delays(job)]

    def _delays(self, job: Job) -> bool:
        if self._settings.batching.policy(job.level).timeout_action != DELAY:
            job.error = DeadlineExceeded()
            return False
        job.delayed = True
        job.start_by_s = job.finish_by_s = math.inf
        self.queue.add(job)
        return True
