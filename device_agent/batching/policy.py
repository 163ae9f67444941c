"""Which waiting requests run now: a pure function of the queue, the clock and what was learned.

An idle engine takes what waits at once; requests that arrive while it is busy run together when it is free
again. It waits only where clients that were just answered are about to return and a run less is worth more
than the wait (see :mod:`device_agent.batching.returns`), or where the user sets a delay.

A larger batch is taken only where it pays: of the sizes that the queue offers, the smallest with which all
that waits is done within a few percent of the least time. Where a batch of sixteen costs sixteen times as
much as one, requests run one after the other, and the first is answered sixteen times earlier.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Hashable, List, Optional, Protocol, Sequence, Tuple

from device_agent.batching.returns import NOBODY, Company

_WAIT_WORTH_FRACTION = 0.8  # of what is gained; the rest is for estimates that are off

Predict = Callable[[int], Optional[float]]


class Waiting(Protocol):
    """A request in the queue.

    Attributes:
        rows: its size along the batch axis.
        batch_key: requests with equal keys may share a batch: the same inputs, types and row shapes.
        arrived_s: when it came, on the clock that ``now_s`` is read from.
        start_by_s, finish_by_s: the latest points for it on that clock; infinite: none.
    """

    rows: int
    batch_key: Hashable
    arrived_s: float
    start_by_s: float
    finish_by_s: float


@dataclass(frozen=True)
class PolicySettings:
    """How far batching may go.

    Attributes:
        max_batch_size: most rows in one run; 1 runs every request alone.
        max_queue_delay_s: how long a request may wait for company while the engine is idle; None: as long
            as waiting pays, by what was learned.
        preferred_sizes: rows at which a batch starts without waiting for more; empty: any size.
        worth_fraction: how much sooner all must be done with larger batches, for these to be taken.
    """

    max_batch_size: int
    max_queue_delay_s: Optional[float] = None
    preferred_sizes: Tuple[int, ...] = ()
    worth_fraction: float = 0.05


@dataclass(frozen=True)
class Learned:
    """What past runs say of the next.

    Attributes:
        predict_s: seconds of a run with a number of rows; None: not known yet.
        turn_s: seconds from the start of such a run to the start of the next; only what is between them while
            nothing was learned of runs.
        company: who is about to join.
        steady_rows: what :func:`steady_size` found lately; 0: it is worked out when it is needed.
    """

    predict_s: Predict
    turn_s: Callable[[int], float]
    company: Company = NOBODY
    steady_rows: int = 0


@dataclass(frozen=True)
class Decision:
    """What to do now.

    Attributes:
        take: positions in the queue, ascending, to run as one batch now; empty: run nothing.
        wake_at_s: when to ask again, if nothing else happens before; None: at the next event.
    """

    take: Tuple[int, ...] = ()
    wake_at_s: Optional[float] = None


def decide(
    queue: Sequence[Waiting],
    now_s: float,
    busy: bool,
    learned: Learned,
    settings: PolicySettings,
    leader: int = 0,
) -> Decision:
    """Choose the next batch.

    Args:
        queue: waiting requests, in the order in which they should be served.
        now_s: the clock.
        busy: whether the engine is running a batch.
        learned: what past runs say.
        settings: the limits.
        leader: position of the request that must be in the batch; others join if they share its key.
    """
    if busy or not queue:
        return Decision()
    candidates = _companions(queue, leader, settings.max_batch_size)
    rows = sum(queue[i].rows for i in candidates)
    if rows < settings.max_batch_size and not _left_behind(queue, candidates):
        wake_at_s = _wait_until_s(queue, candidates, rows, now_s, learned, settings)
        if wake_at_s is not None and wake_at_s > now_s:
            return Decision(wake_at_s=wake_at_s)
        return Decision(take=_in_time(queue, _sized(queue, candidates, learned, settings), now_s, learned))
    return Decision(take=tuple(sorted(_sized(queue, candidates, learned, settings))))


def look(queue: Sequence[Waiting], leader: int, rows: int, now_s: float, learned: Learned) -> Decision:
    """A batch of up to ``rows``, to see what it costs, as far as nobody is late by it."""
    return Decision(take=_in_time(queue, _companions(queue, leader, rows), now_s, learned))


def steady_size(learned: Learned, settings: PolicySettings) -> int:
    """Rows in each batch of a queue that never ends; the most while nothing was learned."""
    return _smallest_worthwhile(range(1, settings.max_batch_size + 1), learned, settings.worth_fraction)


def saved_s(rows: int, more_rows: int, learned: Learned, max_rows: int) -> float:
    """Seconds of the engine that are saved where ``more_rows`` run with ``rows`` and not after them.

    Args:
        rows: those that wait.
        more_rows: those to come.
        learned: what runs cost.
        max_rows: the size of batch beyond which nothing is gained.
    """
    apart_s = clearing_s(rows, max_rows, learned) + clearing_s(more_rows, max_rows, learned)
    return apart_s - clearing_s(rows + more_rows, max_rows, learned)


def clearing_s(rows: int, size: int, learned: Learned) -> float:
    """Seconds for ``rows`` in batches of ``size``."""
    whole, rest = divmod(rows, size)
    return whole * learned.turn_s(size) + (learned.turn_s(rest) if rest else 0.0)


# Who


def _companions(queue: Sequence[Waiting], leader: int, max_rows: int) -> List[int]:
    """The leader and, in the queue's order, those that fit into a batch with it."""
    first = queue[leader]
    taken, rows = [leader], first.rows
    for position, item in enumerate(queue):
        if position == leader or item.batch_key != first.batch_key:
            continue
        if rows + item.rows > max_rows:
            break  # a smaller one behind it would fit, but requests of one shape keep their order
        taken.append(position)
        rows += item.rows
    return taken


def _left_behind(queue: Sequence[Waiting], candidates: List[int]) -> bool:
    """Whether a request of the batch's shape found no place in it: then waiting gathers nobody else."""
    key = queue[candidates[0]].batch_key
    return sum(item.batch_key == key for item in queue) > len(candidates)


# When


def _wait_until_s(
    queue: Sequence[Waiting],
    candidates: List[int],
    rows: int,
    now_s: float,
    learned: Learned,
    settings: PolicySettings,
) -> Optional[float]:
    """Until when to wait for more; None: not at all."""
    start_by_s = min(queue[i].start_by_s for i in candidates)
    if settings.max_queue_delay_s is None:
        if learned.company.rows == 0 or not _company_pays(queue, candidates, rows, now_s, learned, settings):
            return None
        return min(learned.company.until_s, start_by_s)
    if any(size <= rows for size in settings.preferred_sizes):
        return None
    return min(min(queue[i].arrived_s for i in candidates) + settings.max_queue_delay_s, start_by_s)


def _company_pays(
    queue: Sequence[Waiting],
    candidates: List[int],
    rows: int,
    now_s: float,
    learned: Learned,
    settings: PolicySettings,
) -> bool:
    company = learned.company
    size = learned.steady_rows or steady_size(learned, settings)
    gain_s = saved_s(rows, company.rows, learned, size)
    wait_s = max(0.0, company.likely_s - now_s)
    if wait_s >= _WAIT_WORTH_FRACTION * gain_s:
        return False
    together = min(rows + company.rows, settings.max_batch_size)
    answer_s = company.until_s + learned.turn_s(together)
    return answer_s <= min(queue[i].finish_by_s for i in candidates)


# How many


def _sized(
    queue: Sequence[Waiting], candidates: List[int], learned: Learned, settings: PolicySettings
) -> List[int]:
    if len(candidates) == 1:
        return candidates
    if learned.steady_rows and len(candidates) == settings.max_batch_size and not settings.preferred_sizes:
        return candidates[: learned.steady_rows]  # of single rows, as many as it was worked out for
    sizes: List[int] = []
    rows = 0
    for position in candidates:
        rows += queue[position].rows
        sizes.append(rows)
    if settings.preferred_sizes:
        return candidates[: _preferred(sizes, settings.preferred_sizes)]
    return candidates[: 1 + sizes.index(_smallest_worthwhile(sizes, learned, settings.worth_fraction))]


def _preferred(sizes: Sequence[int], preferred: Sequence[int]) -> int:
    """How many candidates make up the largest preferred size that is reached; all if none is."""
    reached = [size for size in preferred if size <= sizes[-1]]
    if not reached:
        return len(sizes)
    return max(1, sum(size <= max(reached) for size in sizes))


def _smallest_worthwhile(sizes: Sequence[int], learned: Learned, worth_fraction: float) -> int:
    """The smallest of ``sizes``, ascending, in which the last one's rows are done about as soon as can be."""
    rows = sizes[-1]
    if learned.predict_s(rows) is None:
        return rows  # nothing learned yet: batching is what usually pays
    totals_s = [clearing_s(rows, size, learned) for size in sizes]
    bound_s = min(totals_s) * (1.0 + worth_fraction)
    return next(size for size, total_s in zip(sizes, totals_s) if total_s <= bound_s)


def _in_time(queue: Sequence[Waiting], chosen: List[int], now_s: float, learned: Learned) -> Tuple[int, ...]:
    """Leave out the last ones where they would make the others late.

    Only for a queue that fits into one batch. In a longer one, smaller batches would make everybody later.
    """
    while len(chosen) > 1:
        finish_by_s = min(queue[i].finish_by_s for i in chosen)
        rows = sum(queue[i].rows for i in chosen)
        if now_s + (learned.predict_s(rows) or 0.0) <= finish_by_s:
            break
        chosen = chosen[:-1]
    return tuple(sorted(chosen))
