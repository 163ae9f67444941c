from __future__ import annotations

import asyncio
import gc
import socket
import threading
import time
import weakref
from typing import Any, Callable, Dict, List, Optional, Tuple

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
from device_agent.batching.execution import EngineThread
from device_agent.batching.latency import LatencyModel
from device_agent.batching.settings import Batching
from device_agent.batching.share import EngineShare
from device_agent.engines.base import Arrays, EngineError
from device_agent.manifest import TensorSpec
from device_agent.metrics import ModelMetrics
from device_agent.warmup import learn_latency

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


class PreparingEngine:
    """Stands in for an engine on a GPU: the first two runs of each size allocate, and record a graph."""

    inputs, outputs = (TensorSpec("x", "FP32", (-1, 1)),), (TensorSpec("y", "FP32", (-1, 1)),)

    def __init__(self) -> None:
        self.runs: Dict[int, int] = {}

    def run(self, inputs: Arrays) -> Dict[str, Any]:
        """Nothing comes of it; it takes 2 ms for any size, and 25 ms at first."""
        rows = len(inputs["x"])
        self.runs[rows] = self.runs.get(rows, 0) + 1
        time.sleep(25e-3 if self.runs[rows] <= 2 else 2e-3)
        return {"y": inputs["x"]}

    def close(self) -> None:
        """Nothing to free."""


def test_the_first_runs_of_a_size_say_nothing_of_what_it_costs() -> None:
    """An engine that prepares itself for each new size is not taken for one that gains nothing by batches."""
    model = LatencyModel()
    learn_latency(PreparingEngine(), model, {"x": np.zeros((1, 1), np.float32)}, 32)
    assert (model.predict(8) or 0.0) < 2 * (model.predict(1) or 0.0)


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

    def __init__(
        self, max_batch_size: int = 8, max_queue_size: int = 100, one_core: bool = False, **batching: Any
    ) -> None:
        self.engine = StandInEngine()
        self.metrics = ModelMetrics()
        settings = BatcherSettings(max_batch_size, max_queue_size, Batching(**batching), one_core=one_core)
        self.batcher = Batcher(self.engine, settings, self.metrics)
        self.answers: Dict[float, Any] = {}

    def submit(
        self, *values: float, key: str = "k", timeout_s: Optional[float] = None, priority: int = 0
    ) -> Job:
        """Queue a request, which is known by its first value."""
        name = values[0]

        def on_done(job: Job) -> None:
            self.answers[name] = job.error or (job.outputs or {})["x"].tolist()

        job = Job({"x": np.array(values, np.float32)}, len(values), key, on_done, timeout_s, priority)
        self.batcher.submit(job)
        return job

    async def until_running(self) -> None:
        """Wait until the engine has taken what waits."""
        while not self.batcher._scheduler.busy:
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


def test_a_client_that_is_alone_is_answered_at_once_until_company_comes() -> None:
    """A lone client's request waits for nobody; of clients that come together, requests share a run again."""
    at_once = []

    async def scenario(bench: Bench) -> None:
        for value in map(float, range(40)):
            bench.submit(value)
            at_once.append(value in bench.answers)
            await asyncio.sleep(0)
            while value not in bench.answers:
                await asyncio.sleep(0)
        for _ in range(2):
            for value in (101.0, 102.0, 103.0):
                bench.submit(value)
            await asyncio.sleep(0.05)

    bench = run(scenario, one_core=True)
    assert not at_once[0]
    assert at_once[-1]
    assert bench.engine.batches[-3:] == [[101.0], [102.0, 103.0], [101.0, 102.0, 103.0]]


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
    assert bench.metrics.refused == 1


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

    assert run(scenario, max_batch_size=3, max_queue_delay_microseconds=30_000_000).engine.batches == [
        [1.0, 2.0, 3.0]
    ]


def test_a_delay_that_ends_without_company_runs_the_lone_request() -> None:
    """The timer starts the batch."""

    async def scenario(bench: Bench) -> None:
        bench.submit(1.0)

    assert run(scenario, max_queue_delay_microseconds=10_000).answers == {1.0: [2.0]}


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


def test_a_request_of_a_higher_level_that_comes_during_a_run_is_next() -> None:
    """What came while a run held up the event loop is read before the next run is chosen."""

    async def scenario(bench: Bench) -> None:
        bench.batcher.latency.observe(1, 1e-3)
        ours, client = socket.socketpair()

        def read() -> None:
            loop.remove_reader(ours)
            bench.submit(9.0, priority=1)

        def send(inputs: Arrays) -> Dict[str, Any]:
            if inputs["x"][0] == 1.0:
                client.send(b"x")
            return compute(inputs)

        compute, bench.engine.run = bench.engine.run, send  # type: ignore[method-assign]  # lets it arrive
        loop = asyncio.get_running_loop()
        loop.add_reader(ours, read)
        for value in (1.0, 2.0, 3.0):
            bench.submit(value, priority=2)
        await bench.batcher.drain()
        ours.close()
        client.close()

    bench = run(scenario, max_batch_size=1, one_core=True, priority_levels=2, default_priority_level=2)
    assert bench.engine.batches == [[1.0], [9.0], [2.0], [3.0]]


# Several models


class SlowEngine(StandInEngine):
    """A stand-in whose runs take ten milliseconds, and which notes when they start."""

    def __init__(self, name: str, log: List[str]) -> None:
        super().__init__()
        self._name = name
        self._log = log

    def run(self, inputs: Arrays) -> Dict[str, Any]:
        """Take a while."""
        self._log.append(self._name)
        time.sleep(0.01)
        return super().run(inputs)


def test_a_hot_model_does_not_starve_another() -> None:
    """Two models on one engine take turns, however long the queue of the first."""

    async def main() -> List[str]:
        log: List[str] = []
        share = EngineShare(places=1)
        hot, quiet = (
            Batcher(SlowEngine(name, log), BatcherSettings(1), ModelMetrics(), share)
            for name in ("hot", "quiet")
        )
        for batcher, count in ((hot, 12), (quiet, 3)):
            for _ in range(count):
                job = Job({"x": np.ones(1, np.float32)}, 1, "k", lambda job: None)
                batcher.submit(job)
        for batcher in (hot, quiet):
            await batcher.drain()
            batcher.close()
        return log

    log = asyncio.run(main())
    assert log.count("hot") == 12
    assert log.count("quiet") == 3
    assert "quiet" not in log[7:]


def test_a_model_that_is_closed_leaves_its_place_to_others() -> None:
    """A queue that was cancelled while it waited for the engine holds up nobody."""

    async def main() -> List[str]:
        log: List[str] = []
        share = EngineShare(places=1)
        first, gone, last = (
            Batcher(SlowEngine(name, log), BatcherSettings(1), ModelMetrics(), share)
            for name in ("first", "gone", "last")
        )
        jobs = [Job({"x": np.ones(1, np.float32)}, 1, "k", lambda job: None) for _ in range(3)]
        for batcher, job in zip((first, gone, last), jobs):
            batcher.submit(job)
        await asyncio.sleep(0.002)
        gone.cancel(jobs[1])
        gone.close()
        for batcher in (first, last):
            await batcher.drain()
            batcher.close()
        return log

    assert asyncio.run(main()) == ["first", "last"]


# Memory


@pytest.mark.parametrize("fails", [False, True])
def test_the_memory_of_a_request_is_let_go_once_it_is_answered(fails: bool) -> None:
    """The engine's thread holds nothing while it waits: a shared memory region ends with its last request."""

    class Engine:
        """Doubles what it is given, or fails."""

        def run(self, inputs: Arrays) -> Arrays:
            """One run."""
            if fails:
                raise EngineError("no")
            return {"y": 2 * inputs["x"]}

    async def scenario() -> bool:
        loop = asyncio.get_running_loop()
        answered = asyncio.Event()
        thread = EngineThread(Engine(), loop, lambda batch: answered.set())  # type: ignore[arg-type]  # only run
        inputs = np.ones((1, 4), np.float32)
        seen = weakref.ref(inputs)
        thread.run([Job({"x": inputs}, 1, (), lambda job: None)])
        del inputs
        await answered.wait()
        for _ in range(200):  # the thread lets go after it has told the loop
            if seen() is None:
                break
            await asyncio.sleep(0.01)
        thread.stop()
        return seen() is None

    gc.disable()  # what only a collection would free is held for as long as a device is idle
    try:
        assert asyncio.run(scenario())
    finally:
        gc.enable()
