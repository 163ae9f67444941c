from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass
from typing import Any, Callable, Dict, Hashable, List, Optional, Tuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_agent.batching.batcher import (
    Batcher,
    BatcherSettings,
    DeadlineExceeded,
    Job,
    QueueFull,
)
from device_agent.batching.latency import LatencyModel
from device_agent.batching.policy import PolicySettings, decide, earliest_start_s
from device_agent.engines.base import Arrays, EngineError
from device_agent.manifest import TensorSpec
from device_agent.metrics import ModelMetrics

# The policy


@dataclass(frozen=True)
class Item:
    """A waiting request, as the policy sees it."""

    rows: int
    batch_key: Hashable = "k"
    arrived_s: float = 0.0


def unknown(rows: int) -> Optional[float]:
    return None


def affine(fixed_s: float, per_row_s: float) -> Callable[[int], Optional[float]]:
    return lambda rows: fixed_s + per_row_s * rows


items = st.builds(
    Item,
    rows=st.integers(1, 8),
    batch_key=st.sampled_from("abc"),
    arrived_s=st.floats(0, 1, allow_nan=False),
)
queues = st.lists(items, max_size=20).map(lambda q: sorted(q, key=lambda item: item.arrived_s))
models = st.one_of(
    st.just(unknown),
    st.builds(affine, st.floats(0, 0.1), st.floats(1e-6, 0.1)),
)
limits = st.builds(PolicySettings, max_batch_size=st.integers(8, 32), max_queue_delay_s=st.floats(0, 0.5))


@given(queues, st.floats(1, 3), models, limits)
def test_a_busy_engine_is_left_alone(
    queue: List[Item], now_s: float, model: Any, settings: PolicySettings
) -> None:
    """Nothing is decided while a batch runs; the end of the batch asks again."""
    decision = decide(queue, now_s, True, model, settings)
    assert decision.take == ()
    assert decision.wake_at_s is None


@given(queues, st.floats(1, 3), models, limits)
def test_a_batch_is_within_its_limits_and_of_one_kind(
    queue: List[Item], now_s: float, model: Any, settings: PolicySettings
) -> None:
    """A batch never exceeds max_batch_size nor mixes shapes, and holds each request once."""
    taken = decide(queue, now_s, False, model, settings).take
    assert list(taken) == sorted(set(taken))
    assert sum(queue[i].rows for i in taken) <= settings.max_batch_size
    assert len({queue[i].batch_key for i in taken}) <= 1


@given(queues, st.floats(1, 3), models, limits)
def test_the_oldest_request_is_in_every_batch(
    queue: List[Item], now_s: float, model: Any, settings: PolicySettings
) -> None:
    """No request starves: whenever a batch starts, the one that waited longest is in it."""
    taken = decide(queue, now_s, False, model, settings).take
    assert not taken or taken[0] == 0


@given(queues.filter(bool), st.floats(1, 3), models, st.integers(8, 32))
def test_an_idle_engine_never_waits_unless_it_is_told_to(
    queue: List[Item], now_s: float, model: Any, max_batch_size: int
) -> None:
    """Without a queue delay, waiting requests start at once."""
    assert decide(queue, now_s, False, model, PolicySettings(max_batch_size)).take


@given(queues.filter(bool), st.floats(1, 3), models, limits)
def test_a_queue_delay_ends(queue: List[Item], now_s: float, model: Any, settings: PolicySettings) -> None:
    """Either a batch starts now, or there is a time to ask again at which it does start."""
    decision = decide(queue, now_s, False, model, settings)
    if not decision.take:
        assert decision.wake_at_s is not None
        assert now_s < decision.wake_at_s <= queue[0].arrived_s + settings.max_queue_delay_s
        assert decide(queue, decision.wake_at_s, False, model, settings).take


def test_a_full_batch_does_not_wait_for_the_delay() -> None:
    """When no more would fit there is nothing to wait for."""
    settings = PolicySettings(max_batch_size=4, max_queue_delay_s=10.0)
    assert decide([Item(2), Item(2)], 0.0, False, unknown, settings).take == (0, 1)
    assert decide([Item(2), Item(1)], 0.0, False, unknown, settings).take == ()
    assert decide([Item(2), Item(3)], 0.0, False, unknown, settings).take == (0,)


def test_batches_are_large_where_that_pays() -> None:
    """With a high fixed cost, everything that waits runs together."""
    queue = [Item(1)] * 8
    settings = PolicySettings(max_batch_size=8)
    assert len(decide(queue, 1.0, False, affine(10e-3, 1e-3), settings).take) == 8


def test_batches_are_small_where_large_ones_gain_nothing() -> None:
    """If eight rows cost eight times as much as one, the first client need not wait for the eighth."""
    queue = [Item(1)] * 8
    settings = PolicySettings(max_batch_size=8)
    assert len(decide(queue, 1.0, False, affine(0.0, 50e-3), settings).take) == 1


def test_other_shapes_are_skipped_over_not_waited_for() -> None:
    """A request of another shape does not end the batch; it is first in a later one."""
    queue = [Item(1, "a"), Item(1, "b"), Item(1, "a")]
    assert decide(queue, 1.0, False, unknown, PolicySettings(8)).take == (0, 2)


@given(queues, st.floats(1, 3), st.floats(0, 4), st.floats(1e-6, 0.1), st.floats(0, 0.1), limits)
def test_the_earliest_start_is_a_promise_that_no_schedule_beats(
    queue: List[Item],
    now_s: float,
    free_at_s: float,
    per_row_s: float,
    fixed_s: float,
    settings: PolicySettings,
) -> None:
    """The policy itself never starts a new request before the earliest start, so no refusal is unjust."""
    model = affine(fixed_s, per_row_s)
    estimate_s = earliest_start_s(queue, "a", now_s, free_at_s, model, settings)
    newcomer = Item(1, "a", now_s)
    clock_s, waiting = max(now_s, free_at_s), [*queue, newcomer]
    while any(item is newcomer for item in waiting):
        taken = decide(waiting, clock_s + 10.0, False, model, settings).take
        start_s = clock_s
        clock_s += model(sum(waiting[i].rows for i in taken)) or 0.0
        waiting = [item for i, item in enumerate(waiting) if i not in taken]
    assert now_s <= estimate_s <= start_s + 1e-9


# The learned latency


@given(st.floats(1e-4, 1e-1), st.floats(1e-5, 1e-2), st.lists(st.integers(1, 16), min_size=30, max_size=60))
def test_latency_is_learned_for_sizes_that_were_seen(
    fixed_s: float, per_row_s: float, sizes: List[int]
) -> None:
    """After a while the prediction for a size that runs is close to what it takes."""
    model = LatencyModel()
    for rows in sizes:
        model.observe(rows, fixed_s + per_row_s * rows)
    rows = sizes[-1]
    truth_s = fixed_s + per_row_s * rows
    assert model.predict(rows) == pytest.approx(truth_s, rel=0.5)


def test_latency_is_learned_for_sizes_between() -> None:
    """Sizes that never ran are predicted from those that did."""
    model = LatencyModel()
    for _ in range(5):
        for rows in (1, 8):
            model.observe(rows, 2e-3 + 1e-3 * rows)
    assert model.predict(4) == pytest.approx(6e-3, rel=0.02)


def test_batches_that_outgrow_a_cache_are_seen_as_dearer() -> None:
    """Where each further row costs more than the one before, one row is predicted to be the cheapest."""
    model = LatencyModel()
    for _ in range(10):
        for rows in (1, 2, 4):
            model.observe(rows, 1e-3 * rows**1.2)
    costs = [(model.predict(rows) or 0.0) / rows for rows in (1, 2, 4, 8)]
    assert costs == sorted(costs)


def test_a_device_that_throttles_is_followed_at_every_size() -> None:
    """When one size becomes three times slower, the others are expected to, even if none of them ran."""
    model = LatencyModel()
    for rows in (1, 1, 1, 2, 2, 2, 4, 4, 4, 8, 8, 8):
        model.observe(rows, 1e-3 * (1 + rows))
    for _ in range(300):
        model.observe(4, 3e-3 * 5)
    assert model.predict(4) == pytest.approx(15e-3, rel=0.05)
    assert model.predict(8) == pytest.approx(27e-3, rel=0.15)


@given(st.lists(st.tuples(st.integers(1, 64), st.floats(0, 100)), min_size=1, max_size=50))
def test_predictions_are_never_negative_and_grow_with_size(runs: List[Tuple[int, float]]) -> None:
    """Whatever was measured, a larger batch is not predicted to be faster."""
    model = LatencyModel()
    for rows, seconds in runs:
        model.observe(rows, seconds)
    predictions = [model.predict(rows) or 0.0 for rows in (1, 2, 8, 64)]
    assert predictions[0] >= -1e-9
    assert predictions == sorted(predictions)


# The batcher


class StandInEngine:
    """A double of an engine: doubles ``x`` when it is let go, and fails on negative numbers."""

    runtime = "stand-in"
    inputs = outputs = (TensorSpec("x", "FP32", (-1,)),)

    def __init__(self) -> None:
        self.batches: List[List[float]] = []
        self.may_run = threading.Event()
        self.may_run.set()

    def run(self, inputs: Arrays) -> Dict[str, Any]:
        """Compute when the test lets it."""
        self.may_run.wait(20)
        self.batches.append(inputs["x"].tolist())
        if (inputs["x"] < -100).any():
            raise KeyError("not one of the engine's own errors")
        if (inputs["x"] < 0).any():
            raise EngineError("negative")
        return {"x": inputs["x"] * 2}

    def close(self) -> None:
        """Hold nothing."""


class Bench:
    """A batcher on a stand-in engine, and what it answered."""

    def __init__(self, max_batch_size: int = 8, max_queue_size: int = 100, delay_s: float = 0.0) -> None:
        self.engine = StandInEngine()
        self.metrics = ModelMetrics()
        settings = BatcherSettings(PolicySettings(max_batch_size, delay_s), max_queue_size)
        self.batcher = Batcher(self.engine, settings, self.metrics)
        self.answers: Dict[float, Any] = {}

    def submit(self, *values: float, key: str = "k", timeout_s: Optional[float] = None) -> Job:
        """Queue a request, which is known by its first value."""
        name = values[0]

        def on_done(job: Job) -> None:
            self.answers[name] = job.error or (job.outputs or {})["x"].tolist()

        job = Job({"x": np.array(values, np.float32)}, len(values), key, on_done, timeout_s)
        self.batcher.submit(job)
        return job

    async def until_running(self) -> None:
        """Wait until the engine has taken what waits."""
        while not self.batcher._busy:
            await asyncio.sleep(0.001)

    async def finish(self) -> None:
        """Let everything run, and stop."""
        self.engine.may_run.set()
        await self.batcher.drain()
        self.batcher.close()


def run(scenario: Callable[[Bench], Any], **settings: Any) -> Bench:
    """Run a scenario on a fresh bench, to its end."""

    async def main() -> Bench:
        bench = Bench(**settings)
        await scenario(bench)
        await bench.finish()
        return bench

    return asyncio.run(main())


async def _hold(bench: Bench) -> None:
    """Keep the engine busy with request 1000."""
    bench.engine.may_run.clear()
    bench.submit(1000.0)
    await bench.until_running()


def test_requests_that_queue_while_the_engine_is_busy_run_together() -> None:
    """Each request gets its own rows of the shared run."""

    async def scenario(bench: Bench) -> None:
        await _hold(bench)
        bench.submit(1.0)
        bench.submit(2.0, 3.0)
        bench.submit(4.0)

    bench = run(scenario)
    assert bench.engine.batches == [[1000.0], [1.0, 2.0, 3.0, 4.0]]
    assert bench.answers == {1000.0: [2000.0], 1.0: [2.0], 2.0: [4.0, 6.0], 4.0: [8.0]}
    assert bench.metrics.rows == 5
    assert bench.metrics.batch_rows.count == 2


def test_a_full_queue_refuses_and_recovers() -> None:
    """One request more than the queue holds is refused at once; the others are answered."""

    async def scenario(bench: Bench) -> None:
        await _hold(bench)
        bench.submit(1.0)
        bench.submit(2.0)
        with pytest.raises(QueueFull):
            bench.submit(3.0)

    bench = run(scenario, max_queue_size=2)
    assert sorted(bench.answers) == [1.0, 2.0, 1000.0]
    assert bench.metrics.refused == 1


def test_a_cancelled_request_frees_its_slot() -> None:
    """A client that goes away while it waits costs no engine time and makes room for another."""

    async def scenario(bench: Bench) -> None:
        await _hold(bench)
        gone = bench.submit(1.0)
        bench.batcher.cancel(gone)
        bench.submit(2.0)

    bench = run(scenario, max_queue_size=1)
    assert bench.engine.batches == [[1000.0], [2.0]]
    assert sorted(bench.answers) == [2.0, 1000.0]
    assert bench.metrics.cancelled == 1


def test_a_cancel_during_the_run_does_not_disturb_the_others() -> None:
    """Batch mates of a client that goes away get their answers."""

    async def scenario(bench: Bench) -> None:
        await _hold(bench)
        gone = bench.submit(1.0)
        bench.submit(2.0)
        bench.engine.may_run.set()
        while len(bench.engine.batches) < 1:
            await asyncio.sleep(0)
        bench.batcher.cancel(gone)

    bench = run(scenario)
    assert bench.answers[2.0] == [4.0]
    assert 1.0 not in bench.answers


@pytest.mark.parametrize("bad", [-1.0, -1000.0])
def test_a_failing_request_fails_alone(bad: float) -> None:
    """Whatever error a request provokes, the others of its batch are run again without it."""

    async def scenario(bench: Bench) -> None:
        await _hold(bench)
        for value in (1.0, 2.0, bad, 3.0, 4.0):
            bench.submit(value)

    bench = run(scenario)
    assert {k: v for k, v in bench.answers.items() if k > 0} == {
        1000.0: [2000.0], 1.0: [2.0], 2.0: [4.0], 3.0: [6.0], 4.0: [8.0]
    }  # fmt: skip
    assert isinstance(bench.answers[bad], EngineError)
    assert bench.metrics.failed == 1
    assert bench.metrics.rows == 5


def test_a_request_whose_timeout_passes_in_the_queue_is_not_computed() -> None:
    """Its client is told, and the engine's time goes to the others."""

    async def scenario(bench: Bench) -> None:
        await _hold(bench)
        bench.submit(1.0, timeout_s=0.001)
        bench.submit(2.0, timeout_s=60.0)
        time.sleep(0.01)

    bench = run(scenario)
    assert isinstance(bench.answers[1.0], DeadlineExceeded)
    assert bench.answers[2.0] == [4.0]
    assert [1.0] not in bench.engine.batches
    assert bench.metrics.deadline_missed == 1


def test_a_request_that_cannot_start_in_time_is_refused_at_once() -> None:
    """Its client learns it before the deadline, not after, and the queue is not made longer."""

    async def scenario(bench: Bench) -> None:
        for rows in (1, 2, 4, 8):
            bench.batcher.latency.observe(rows, 1.0 * rows)
        await _hold(bench)
        bench.submit(1.0)
        with pytest.raises(DeadlineExceeded):
            bench.submit(2.0, timeout_s=0.5)
        bench.submit(3.0, timeout_s=60.0)

    bench = run(scenario, max_batch_size=1)
    assert sorted(bench.answers) == [1.0, 3.0, 1000.0]
    assert bench.metrics.deadline_missed == 1


def test_requests_of_different_shapes_do_not_share_a_run() -> None:
    """Each shape runs by itself, in order of arrival."""

    async def scenario(bench: Bench) -> None:
        await _hold(bench)
        bench.submit(1.0, key="a")
        bench.submit(2.0, key="b")
        bench.submit(3.0, key="a")

    assert run(scenario).engine.batches == [[1000.0], [1.0, 3.0], [2.0]]


def test_a_queue_delay_gathers_company_for_an_idle_engine() -> None:
    """Where the user allows a delay, requests that arrive within it run together."""

    async def scenario(bench: Bench) -> None:
        bench.submit(1.0)
        await asyncio.sleep(0.002)
        bench.submit(2.0)
        bench.submit(3.0)

    assert run(scenario, max_batch_size=3, delay_s=30.0).engine.batches == [[1.0, 2.0, 3.0]]


def test_a_delay_that_ends_without_company_runs_the_lone_request() -> None:
    """The timer starts the batch."""

    async def scenario(bench: Bench) -> None:
        bench.submit(1.0)

    assert run(scenario, delay_s=0.01).answers == {1.0: [2.0]}


@given(st.lists(st.tuples(st.integers(1, 4), st.booleans(), st.booleans()), min_size=1, max_size=12))
def test_every_request_is_answered_once_unless_its_client_left(plan: List[Tuple[int, bool, bool]]) -> None:
    """For any mix of sizes, failures and cancels, nobody else is left without an answer."""

    async def scenario(bench: Bench) -> None:
        await _hold(bench)
        for number, (rows, fails, leaves) in enumerate(plan):
            values = [float(number) + 1.0] + [-1.0 if fails else 7.0] * (rows - 1)
            job = bench.submit(*values)
            if leaves:
                bench.batcher.cancel(job)

    bench = run(scenario)
    stayed = {float(n) + 1.0 for n, (_, _, leaves) in enumerate(plan) if not leaves}
    assert set(bench.answers) == stayed | {1000.0}
    for number, (rows, fails, leaves) in enumerate(plan):
        if not leaves:
            failed = isinstance(bench.answers[number + 1.0], EngineError)
            assert failed == (fails and rows > 1)
