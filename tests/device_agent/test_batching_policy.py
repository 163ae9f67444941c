"""The batching policy as a pure function: what holds for every queue, clock and learned latency."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Callable, Hashable, List, Optional

from hypothesis import given
from hypothesis import strategies as st

from device_agent.batching.policy import Learned, PolicySettings, decide, steady_size
from device_agent.batching.returns import NOBODY, Company


@dataclass(frozen=True)
class Item:
    """A waiting request, as the policy sees it."""

    rows: int
    batch_key: Hashable = "k"
    arrived_s: float = 0.0
    start_by_s: float = math.inf
    finish_by_s: float = math.inf


def unknown(rows: int) -> Optional[float]:
    return None


def affine(fixed_s: float, per_row_s: float) -> Callable[[int], Optional[float]]:
    return lambda rows: fixed_s + per_row_s * rows


def knows(
    predict_s: Callable[[int], Optional[float]], between_s: float = 100e-6, company: Company = NOBODY
) -> Learned:
    """Runs as ``predict_s`` says, with always the same between them."""
    return Learned(predict_s, lambda rows: (predict_s(rows) or 0.0) + between_s, company)


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
companies = st.builds(Company, rows=st.integers(0, 16), likely_s=st.floats(1, 3), until_s=st.floats(3, 3.5))
knowledge = st.builds(knows, models, st.floats(0, 1e-3), companies)
limits = st.builds(
    PolicySettings,
    max_batch_size=st.integers(8, 32),
    max_queue_delay_s=st.one_of(st.none(), st.floats(0, 0.5)),
    preferred_sizes=st.lists(st.integers(1, 8), max_size=3).map(tuple),
)


@given(queues, st.floats(1, 3), knowledge, limits)
def test_a_busy_engine_is_left_alone(
    queue: List[Item], now_s: float, learned: Learned, settings: PolicySettings
) -> None:
    """Nothing is decided while a batch runs; the end of the batch asks again."""
    decision = decide(queue, now_s, True, learned, settings)
    assert decision.take == ()
    assert decision.wake_at_s is None


@given(queues, st.floats(1, 3), knowledge, limits)
def test_a_batch_is_within_its_limits_and_of_one_kind(
    queue: List[Item], now_s: float, learned: Learned, settings: PolicySettings
) -> None:
    """A batch never exceeds max_batch_size nor mixes shapes, and holds each request once."""
    taken = decide(queue, now_s, False, learned, settings).take
    assert list(taken) == sorted(set(taken))
    assert sum(queue[i].rows for i in taken) <= settings.max_batch_size
    assert len({queue[i].batch_key for i in taken}) <= 1


@given(queues.filter(bool), st.floats(1, 3), knowledge, limits, st.data())
def test_the_leader_is_in_every_batch(
    queue: List[Item], now_s: float, learned: Learned, settings: PolicySettings, data: st.DataObject
) -> None:
    """Whoever the queue says is next is in the batch, so no request starves."""
    leader = data.draw(st.integers(0, len(queue) - 1))
    taken = decide(queue, now_s, False, learned, settings, leader).take
    assert not taken or leader in taken


@given(queues.filter(bool), st.floats(1, 3), models, st.integers(8, 32))
def test_an_idle_engine_does_not_wait_for_nobody(
    queue: List[Item], now_s: float, model: Any, max_batch_size: int
) -> None:
    """Where nobody is about to come, waiting requests start at once."""
    assert decide(queue, now_s, False, knows(model), PolicySettings(max_batch_size)).take


@given(queues.filter(bool), st.floats(1, 3), knowledge, limits)
def test_every_wait_ends(queue: List[Item], now_s: float, learned: Learned, settings: PolicySettings) -> None:
    """Either a batch starts now, or there is a time to ask again at which it does start."""
    decision = decide(queue, now_s, False, learned, settings)
    if not decision.take:
        assert decision.wake_at_s is not None
        assert decision.wake_at_s > now_s
        assert decide(queue, decision.wake_at_s, False, knows(learned.predict_s), settings).take


@given(queues.filter(bool), st.floats(1, 3), knowledge, st.integers(8, 32))
def test_waiting_for_company_is_worth_it(
    queue: List[Item], now_s: float, learned: Learned, max_batch_size: int
) -> None:
    """An engine waits only if the run that is saved takes longer than the wait."""
    decision = decide(queue, now_s, False, learned, PolicySettings(max_batch_size))
    if not decision.take:
        saved_s = 2 * learned.turn_s(1) - learned.turn_s(2)
        assert learned.company.likely_s - now_s < saved_s + 1e-12


def test_company_is_awaited_where_it_saves_a_run() -> None:
    """Three clients about to return are worth a tenth of the fixed cost of the run that they save."""
    learned = knows(affine(2e-3, 0.4e-3), company=Company(rows=3, likely_s=1.0002, until_s=1.0005))
    assert decide([Item(1)], 1.0, False, learned, PolicySettings(16)).wake_at_s == 1.0005
    assert decide([Item(1)], 1.0, False, learned, PolicySettings(1)).take == (0,)
    dear = knows(affine(0.0, 2.4e-3), company=learned.company)
    assert decide([Item(1)], 1.0, False, dear, PolicySettings(16)).take == (0,)


def test_company_is_not_awaited_past_a_deadline() -> None:
    """A request that would be late with company runs without."""
    learned = knows(affine(2e-3, 0.4e-3), company=Company(rows=3, likely_s=1.0002, until_s=1.0005))
    hurried = Item(1, finish_by_s=1.003)
    assert decide([hurried], 1.0, False, learned, PolicySettings(16)).take == (0,)


def test_a_batch_is_kept_small_enough_for_a_deadline() -> None:
    """Those who do not fit into the time of the first run after it."""
    learned = knows(affine(1e-3, 1e-3))
    queue = [Item(1, finish_by_s=1.0035), Item(1), Item(1)]
    assert decide(queue, 1.0, False, learned, PolicySettings(8)).take == (0, 1)


def test_preferred_sizes_start_at_once_and_the_largest_wins() -> None:
    """As in Triton: a preferred size in the queue does not wait; anything else waits for the delay."""
    settings = PolicySettings(16, max_queue_delay_s=0.1, preferred_sizes=(2, 4))
    learned = knows(affine(0.0, 1e-3))
    assert decide([Item(1)] * 5, 0.0, False, learned, settings).take == (0, 1, 2, 3)
    assert decide([Item(1)], 0.0, False, learned, settings).wake_at_s == 0.1
    assert decide([Item(1)], 0.1, False, learned, settings).take == (0,)


@given(st.floats(1e-4, 1e-1), st.floats(1e-6, 1e-1), st.integers(1, 64))
def test_a_long_queue_runs_at_a_size_that_costs_little_more_than_the_best(
    fixed_s: float, per_row_s: float, max_batch_size: int
) -> None:
    """The steady size is at most 5% dearer for each row than the largest batch."""
    learned = knows(affine(fixed_s, per_row_s), between_s=0.0)
    size = steady_size(learned, PolicySettings(max_batch_size))
    per_row = [(fixed_s + per_row_s * rows) / rows for rows in (size, max_batch_size)]
    assert 1 <= size <= max_batch_size
    assert max_batch_size % size or per_row[0] <= 1.05 * per_row[1] + 1e-12


def test_a_full_batch_does_not_wait_for_the_delay() -> None:
    """When no more would fit there is nothing to wait for."""
    settings = PolicySettings(max_batch_size=4, max_queue_delay_s=10.0)
    assert decide([Item(2), Item(2)], 0.0, False, knows(unknown), settings).take == (0, 1)
    assert decide([Item(2), Item(1)], 0.0, False, knows(unknown), settings).take == ()
    assert decide([Item(2), Item(3)], 0.0, False, knows(unknown), settings).take == (0,)


def test_batches_are_large_where_that_pays() -> None:
    """With a high fixed cost, everything that waits runs together."""
    queue = [Item(1)] * 8
    settings = PolicySettings(max_batch_size=8)
    assert len(decide(queue, 1.0, False, knows(affine(10e-3, 1e-3)), settings).take) == 8


def test_batches_are_small_where_large_ones_gain_nothing() -> None:
    """If eight rows cost eight times as much as one, the first client need not wait for the eighth."""
    queue = [Item(1)] * 8
    settings = PolicySettings(max_batch_size=8)
    assert len(decide(queue, 1.0, False, knows(affine(0.0, 50e-3)), settings).take) == 1


def test_other_shapes_are_skipped_over_not_waited_for() -> None:
    """A request of another shape does not end the batch; it is first in a later one."""
    queue = [Item(1, "a"), Item(1, "b"), Item(1, "a")]
    assert decide(queue, 1.0, False, knows(unknown), PolicySettings(8)).take == (0, 2)


@given(st.builds(affine, st.floats(0, 0.01), st.floats(1e-6, 0.01)), st.integers(2, 16))
def test_a_queue_that_never_ends_gets_the_size_that_was_worked_out_for_it(
    predict_s: Callable[[int], Optional[float]], max_batch_size: int
) -> None:
    """What is worked out now and then, and not for every batch, is what would be worked out for it."""
    settings, learned = PolicySettings(max_batch_size), knows(predict_s)
    queue = [Item(1)] * (max_batch_size + 3)
    known = replace(learned, steady_rows=steady_size(learned, settings))
    taken = decide(queue, 1.0, False, known, settings).take
    assert taken == decide(queue, 1.0, False, learned, settings).take
    assert len(taken) == known.steady_rows
