"""The scheduler on a simulated clock: throughput beside simpler policies, deadlines, levels, throttling."""

from __future__ import annotations

import random
import statistics
from typing import Callable, List

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batching_simulation import Simulation
from device_agent.batching.job import Job, QueueFull
from device_agent.batching.returns import NOBODY, Returns
from device_agent.batching.scheduler import BatcherSettings, Scheduler
from device_agent.batching.settings import Batching, QueuePolicy

SLO_S = 0.05
CAPACITY = 400.0  # of ``steady``, requests a second
NEVER_WAITS = Batching(max_queue_delay_microseconds=0)
WAITS_1_MS = Batching(max_queue_delay_microseconds=1000)
LEVELS = Batching(priority_levels=3, default_priority_level=2)


def shared(rows: int, now_s: float) -> float:
    """An engine for which batching pays: most of a run is the same for any number of rows."""
    return 2.2e-3 + 0.4e-3 * rows


def steady(rows: int, now_s: float) -> float:
    """An engine for which batching does not pay."""
    return 2.5e-3 * rows


def poisson(rate: float, seconds: float, seed: int) -> List[float]:
    """Times of requests that come when they come."""
    rng = random.Random(seed)
    times, now_s = [], rng.expovariate(rate)
    while now_s < seconds:
        times.append(now_s)
        now_s += rng.expovariate(rate)
    return times


def closed_rate(run_s: Callable[[int, float], float], clients: int, think_s: float, how: Batching) -> float:
    """Answers a second to clients that each wait for theirs."""
    rng = random.Random(clients)
    simulation = Simulation(BatcherSettings(16, batching=how), run_s)
    simulation.closed_loop(clients, lambda: think_s * rng.uniform(0.5, 1.5))
    return len(simulation.run(1.0).answered)


# Waiting for company


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.floats(50e-6, 400e-6), st.floats(1e-3, 5e-3), st.floats(1e-6, 2e-3))
def test_clients_that_wait_are_answered_at_least_as_fast_as_without_waiting_for_them(
    clients: int, think_s: float, fixed_s: float, per_row_s: float
) -> None:
    """Whatever the engine, the learned wait costs no throughput, and beats a fixed one of a millisecond."""
    ours, never, fixed = (
        closed_rate(lambda rows, now_s: fixed_s + per_row_s * rows, clients, think_s, how)
        for how in (Batching(), NEVER_WAITS, WAITS_1_MS)
    )
    assert ours >= 0.97 * never
    assert ours >= 0.97 * fixed


@pytest.mark.parametrize(("clients", "gain"), [(2, 1.5), (4, 1.4), (8, 1.25), (16, 1.15)])
def test_clients_in_step_share_a_run(clients: int, gain: float) -> None:
    """Where batching pays, clients that wait for their answers run together and not in turns."""
    ours = closed_rate(shared, clients, 150e-6, Batching())
    assert ours > gain * closed_rate(shared, clients, 150e-6, NEVER_WAITS)


def test_batching_is_found_to_pay_after_a_warm_up_that_said_otherwise() -> None:
    """A device that was busy while it warmed up does not run requests one by one for ever."""
    simulation = Simulation(BatcherSettings(32), shared)
    for rows in (2, 4, 8, 16, 32):  # something else had the GPU
        simulation.scheduler.latency.observe(rows, 20e-3 * rows)
    simulation.closed_loop(16, lambda: 150e-6)
    simulation.run(3.0)
    before = len(simulation.log.answered)
    simulation.run(5.0)
    assert len(simulation.log.answered) - before > 0.8 * 2 * closed_rate(shared, 16, 150e-6, Batching())


def test_looking_whether_batches_pay_costs_next_to_nothing_where_they_do_not() -> None:
    """Where sixteen cost sixteen times as much, one run in thirty is a batch at first, later far fewer."""
    simulation = Simulation(BatcherSettings(16), steady)
    simulation.closed_loop(16, lambda: 150e-6)
    batches = simulation.run(20.0).batches
    assert sum(rows > 1 for rows in batches[:2000]) <= 2000 / 30
    assert sum(rows > 1 for rows in batches[2000:]) <= len(batches[2000:]) / 400


@pytest.mark.parametrize("clients", [4, 16])
@pytest.mark.parametrize("one_core", [False, True])
def test_what_is_lost_between_runs_is_shared_by_a_batch(clients: int, one_core: bool) -> None:
    """Runs that gain nothing by company have it all the same, where half a millisecond is lost after each."""

    def rate(how: Batching) -> float:
        settings = BatcherSettings(16, batching=how, one_core=one_core)
        simulation = Simulation(settings, steady, lost_s=lambda rows: 500e-6 + 30e-6 * rows)
        simulation.closed_loop(clients, lambda: 150e-6)
        return len(simulation.run(5.0).answered) / 5.0

    assert rate(Batching()) > 1.08 * rate(Batching(preferred_batch_size=(1,)))


def test_batches_on_a_single_core_end_in_time_for_others() -> None:
    """Where a run holds up the loop, it does so for ten milliseconds, or a fifth of the time given."""
    for slo_s, timeout_s, most in ((None, None, 10e-3), (0.03, None, 6e-3), (None, 0.03, 6e-3)):
        simulation = Simulation(
            BatcherSettings(16, one_core=True, slo_s=slo_s), steady, lost_s=lambda rows: 500e-6
        )
        simulation.closed_loop(16, lambda: 150e-6, timeout_s=timeout_s)
        batches = simulation.run(5.0).batches
        assert {steady(rows, 0.0) <= most for rows in batches[100:]} == {True}
        assert max(batches[100:]) > 1


def test_a_try_that_is_broken_off_does_not_end_the_learning() -> None:
    """Where the crowd is gone before enough larger batches were seen, a device that throttles is noticed."""
    slow = 1.0

    def throttled(rows: int, now_s: float) -> float:
        return slow * steady(rows, now_s)

    simulation = Simulation(BatcherSettings(16), throttled)
    simulation.open_loop([0.0] * 90)
    simulation.run(1.0)
    assert max(simulation.log.batches[-4:]) > 1
    slow = 3.0
    simulation.open_loop([1.0 + 0.02 * number for number in range(200)])
    simulation.run(6.0)
    assert simulation.scheduler.turn_s(1) == pytest.approx(3 * steady(1, 0.0), rel=0.1)


def test_a_client_that_gives_up_does_not_make_the_device_seem_slow() -> None:
    """Who waited after a run and is gone did not wait for the next one, which may come an hour later."""
    scheduler = Scheduler(BatcherSettings(16))
    for hour in range(40):
        now_s = 3600.0 * hour
        first, second = (Job({}, 1, "k", lambda job: None) for _ in range(2))
        scheduler.admit(first, now_s)
        (job,) = scheduler.next(now_s).batch
        scheduler.started([job], now_s)
        scheduler.admit(second, now_s)
        job.started_s, job.finished_s, job.batch_rows = now_s, now_s + 2.5e-3, 1
        scheduler.finished([job], job.finished_s)
        assert scheduler.remove(second)
    assert scheduler.turn_s(1) < 3e-3


def test_a_slow_moment_does_not_decide_what_batches_are_worth() -> None:
    """On a device where one run in six takes twice as long, batches that pay are used nevertheless."""
    rng = random.Random(0)

    def unsteady(rows: int, now_s: float) -> float:
        return shared(rows, now_s) * (2.0 if rng.random() < 1 / 6 else 1.0)

    simulation = Simulation(BatcherSettings(16), unsteady)
    simulation.closed_loop(16, lambda: 150e-6)
    batches = simulation.run(20.0).batches
    assert statistics.mean(batches[len(batches) // 2 :]) > 8


def test_a_lone_client_never_waits() -> None:
    """One client is answered as soon as without batching, however quickly it asks again."""
    assert closed_rate(shared, 1, 150e-6, Batching()) == closed_rate(shared, 1, 150e-6, NEVER_WAITS)


@pytest.mark.parametrize(("clients", "spared"), [(1, True), (4, False)])
def test_a_lone_client_is_spared_the_way_to_a_thread(clients: int, spared: bool) -> None:
    """On a single core its runs stay on the loop; they leave it where others may come back meanwhile."""
    simulation = Simulation(BatcherSettings(16, one_core=True), shared)
    limits_s: List[float] = []
    started = simulation.scheduler.started

    def watched(batch: List[Job], now_s: float) -> None:
        limits_s.append(simulation.scheduler.inline_below_s)
        started(batch, now_s)

    simulation.scheduler.started = watched  # type: ignore[method-assign]  # looks on, changes nothing
    simulation.closed_loop(clients, lambda: 150e-6)
    simulation.run(1.0)
    assert all(limit_s > shared(1, 0.0) for limit_s in limits_s) == spared


@pytest.mark.parametrize("rate", [50, 300, 1000])
def test_requests_that_come_by_themselves_are_not_held_up(rate: float) -> None:
    """Poisson arrivals, which no answer calls forth, are answered as by an engine that never waits."""
    means = []
    for how in (Batching(), NEVER_WAITS):
        simulation = Simulation(BatcherSettings(16, batching=how), shared)
        simulation.open_loop(poisson(rate, 3.0, seed=1))
        latencies_s = simulation.run(5.0).latencies_s()
        means.append(sum(latencies_s) / len(latencies_s))
    assert means[0] <= 1.02 * means[1]


def test_clients_that_leave_are_waited_for_no_longer() -> None:
    """An answer that is followed by nothing ends the wait; soon nobody waits at all."""
    returns = Returns()
    for number in range(50):
        returns.answered([1], number * 1e-2)
        returns.arrived(number * 1e-2 + 2e-4, horizon_s=2e-3)
    returns.answered([1, 1], 1.0)
    company = returns.company(1.0, horizon_s=2e-3)
    assert company.rows == 2
    assert 1.0 < company.likely_s <= company.until_s < 1.002
    assert returns.company(company.until_s, horizon_s=2e-3) is NOBODY


def test_a_return_that_nobody_could_see_teaches_nothing() -> None:
    """While a run holds up the loop, clients seem to come back when it ends; that is not when they came."""
    returns = Returns()
    for number in range(50):
        returns.answered([1], number * 1e-2)
        returns.arrived(number * 1e-2 + 2e-4, horizon_s=2e-3)
    before = returns.company(1.0, horizon_s=2e-3)
    returns.answered([1, 1], 1.0)
    returns.nobody_looked(1.5)
    returns.answered([1], 1.5)
    for _ in range(2):
        returns.arrived(1.5 + 1e-5, horizon_s=2e-3)
    assert before is NOBODY
    company = returns.company(1.5 + 1e-5, horizon_s=2e-3)
    assert company.rows == 1
    assert company.likely_s == pytest.approx(1.5 + 2e-4)


# Deadlines


@pytest.mark.parametrize("run_s", [steady, shared])
@pytest.mark.parametrize("load", [1.2, 3.0])
@pytest.mark.parametrize(("one_core", "at_once_s"), [(False, 1e-3), (True, 10e-3)])
def test_overload_is_refused_at_once_and_the_rest_keeps_the_objective(
    run_s: Callable[[int, float], float], load: float, one_core: bool, at_once_s: float
) -> None:
    """Accepted requests stay within the objective, nine of ten refusals are immediate, the engine is used.

    On a single core also those are, which come while a run holds up the loop; they are refused after it.
    """
    capacity = CAPACITY if run_s is steady else 16 / shared(16, 0.0)
    simulation = Simulation(BatcherSettings(16, slo_s=SLO_S, one_core=one_core), run_s)
    simulation.open_loop(poisson(load * capacity, 4.0, seed=2))
    log = simulation.run(6.0)
    assert log.p99_s() <= SLO_S
    assert len(log.answered) >= 0.95 * 4.0 * capacity
    late = sum(seconds > at_once_s for _, seconds in log.refused)
    assert late <= 0.1 * len(log.refused)


def test_light_load_is_never_refused() -> None:
    """With an objective of twenty runs, half of the capacity is all answered."""
    simulation = Simulation(BatcherSettings(16, slo_s=SLO_S), steady)
    simulation.open_loop(poisson(0.5 * CAPACITY, 4.0, seed=3))
    assert simulation.run(6.0).refused == []


def test_a_device_that_throttles_refuses_more_and_is_still_in_time() -> None:
    """When the engine becomes three times slower, what is accepted keeps the objective."""
    simulation = Simulation(
        BatcherSettings(16, slo_s=SLO_S), lambda rows, now_s: steady(rows, now_s) * (3 if now_s > 2.0 else 1)
    )
    simulation.open_loop(poisson(0.8 * CAPACITY, 6.0, seed=4))
    log = simulation.run(8.0)
    assert log.p99_s() <= SLO_S
    assert len(log.answered) >= 0.9 * (2 * 0.8 + 4 / 3) * CAPACITY


def test_a_timeout_bounds_the_time_in_the_queue() -> None:
    """At twice the capacity nobody starts after the timeout that the request names."""
    simulation = Simulation(BatcherSettings(1), steady)
    simulation.open_loop(poisson(2 * CAPACITY, 2.0, seed=5), timeout_s=0.02)
    log = simulation.run(4.0)
    assert max(log.latencies_s()) <= 0.02 + steady(1, 0.0) + 1e-3
    assert len(log.answered) >= 0.9 * 2.0 * CAPACITY


# Triton's queue policies


def test_a_default_timeout_holds_and_may_be_forbidden_to_override() -> None:
    """A request's own timeout counts only where the policy allows it, and can only be shorter."""
    strict = QueuePolicy(default_timeout_microseconds=1000, allow_timeout_override=False)
    assert strict.timeout_s(1e-4) == 1e-3
    assert QueuePolicy(default_timeout_microseconds=1000).timeout_s(1e-4) == 1e-4
    assert QueuePolicy(default_timeout_microseconds=1000).timeout_s(1.0) == 1e-3
    assert QueuePolicy().timeout_s(None) is None


def test_delayed_requests_run_after_those_in_time() -> None:
    """With DELAY, a request whose time has passed is not refused; it runs when the others have."""
    policy = QueuePolicy(timeout_action="DELAY", default_timeout_microseconds=20_000)
    simulation = Simulation(BatcherSettings(1, batching=Batching(default_queue_policy=policy)), steady)
    simulation.scheduler.latency.observe(1, 1e-6)  # so that the forecast lets all of them in
    simulation.open_loop([0.0001 * number for number in range(20)])
    log = simulation.run(2.0)
    assert len(log.answered) == 20
    assert log.refused == []


def test_each_level_has_its_own_room() -> None:
    """A lower level that fills its queue does not keep a higher one out."""
    batching = Batching(
        priority_levels=2, default_priority_level=2, priority_queue_policy={2: QueuePolicy(max_queue_size=2)}
    )
    simulation = Simulation(BatcherSettings(1, 3, batching), lambda rows, now_s: 1.0)
    simulation.open_loop([0.001 * number for number in range(6)], priority=2)
    simulation.open_loop([0.1], priority=1)
    log = simulation.run(0.5)
    assert log.refused == [(2, 0.0)] * 3
    assert simulation.scheduler.queue.waiting(1) == 1


def test_a_full_queue_says_when_to_come_back() -> None:
    """The refusal carries the time that the queue should take."""
    simulation = Simulation(BatcherSettings(1, 10), lambda rows, now_s: 1.0)
    simulation.open_loop([0.001 * number for number in range(11)])
    simulation.run(0.5)
    with pytest.raises(QueueFull) as raised:
        simulation.scheduler.admit(next(iter(simulation.scheduler.queue.jobs)), 0.5)
    assert raised.value.retry_after_s == pytest.approx(10.5, abs=0.1)


# Levels


def _levels(loads: List[float], seconds: float = 10.0) -> Simulation:
    simulation = Simulation(BatcherSettings(16, slo_s=SLO_S, batching=LEVELS), steady)
    for level, load in enumerate(loads, start=1):
        simulation.open_loop(poisson(load * CAPACITY, seconds, seed=level), priority=level)
    return simulation


def test_the_highest_level_hardly_notices_an_overload_by_others() -> None:
    """Its p99 at 120% of the capacity is within 1.5 of that at 50%, and every level is served."""
    half = _levels([0.10, 0.15, 0.25]).run(12.0)
    over = _levels([0.24, 0.36, 0.60]).run(12.0)
    assert over.p99_s(1) <= 1.5 * half.p99_s(1)
    assert not [seconds for level, seconds in over.refused if level == 1]
    assert all(len(over.latencies_s(level)) > 0.1 * 10 * CAPACITY for level in (1, 2, 3))


def test_no_level_starves_when_the_highest_alone_is_too_much() -> None:
    """Each level that has requests gets its twentieth of the engine, within the objective."""
    log = _levels([2.0, 0.5, 0.5]).run(12.0)
    assert all(len(log.latencies_s(level)) > 0.03 * 10 * CAPACITY for level in (2, 3))
    assert max(log.p99_s(level) for level in (1, 2, 3)) <= SLO_S


def test_a_low_level_that_is_overtaken_all_the_time_is_refused_early() -> None:
    """Requests that were given up count in the forecast too, so few wait in vain for their time to pass."""
    log = _levels([0.4, 0.6, 1.0]).run(12.0)
    waits_s = [seconds for level, seconds in log.refused if level == 3]
    assert len(waits_s) > 0.5 * 10 * CAPACITY
    assert sum(wait_s > 1e-3 for wait_s in waits_s) < 0.1 * len(waits_s)


# Requests of several rows


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 8), st.floats(0, 0.05)), min_size=1, max_size=60))
def test_requests_of_any_size_are_all_answered(plan: List[tuple]) -> None:
    """Whatever sizes come when, each is answered once, in batches within the limit."""
    simulation = Simulation(BatcherSettings(8), shared)
    for rows, arrival_s in plan:
        simulation.open_loop([arrival_s], rows=rows)
    log = simulation.run(10.0)
    assert len(log.answered) == len(plan)
    assert max(log.batches) <= 8
    assert sum(log.batches) == sum(rows for rows, _ in plan)
