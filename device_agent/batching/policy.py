"""Which waiting requests run now: a pure function of the queue, the clock and what was learned.

The policy is work-conserving. An idle engine takes what waits at once; requests that arrive while it is
busy run together when it is free again. Only a ``max_queue_delay_s`` that the user sets makes an idle engine
wait for company.

A larger batch is taken only where it pays: among the sizes that the queue offers, the smallest whose cost
for each row is within 2% of the cheapest. Where a batch of sixteen costs sixteen times as much as one,
requests run one after the other, and the first is answered sixteen times earlier.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Hashable, List, Optional, Protocol, Sequence, Tuple

_WORTH_FRACTION = 0.02


class Waiting(Protocol):
    """A request in the queue.

    Attributes:
        rows: its size along the batch axis.
        batch_key: requests with equal keys may share a batch: the same inputs, types and row shapes.
        arrived_s: when it came, on the clock that ``now_s`` is read from.
    """

    rows: int
    batch_key: Hashable
    arrived_s: float


@dataclass(frozen=True)
class PolicySettings:
    """How far batching may go.

    Attributes:
        max_batch_size: most rows in one run; 1 runs every request alone.
        max_queue_delay_s: how long the oldest request may wait for company while the engine is idle.
        handover_s: what every batch costs besides its run: the way to the engine's thread and back.
    """

    max_batch_size: int
    max_queue_delay_s: float = 0.0
    handover_s: float = 100e-6


@dataclass(frozen=True)
class Decision:
    """What to do now.

    Attributes:
        take: positions in the queue, ascending, to run as one batch now; empty: run nothing.
        wake_at_s: when to ask again, if nothing else happens before; None: at the next event.
    """

    take: Tuple[int, ...] = ()
    wake_at_s: Optional[float] = None


_LONE = Decision(take=(0,))


def decide(
    queue: Sequence[Waiting],
    now_s: float,
    busy: bool,
    predict_s: Callable[[int], Optional[float]],
    settings: PolicySettings,
) -> Decision:
    """Choose the next batch.

    The oldest request is in every batch, so none starves; others join if they share its key.

    Args:
        queue: waiting requests, oldest first.
        now_s: the clock.
        busy: whether the engine is running a batch.
        predict_s: learned seconds for a number of rows; None: not known yet.
        settings: the limits.
    """
    if busy or not queue:
        return Decision()
    if len(queue) == 1 and settings.max_queue_delay_s == 0.0:
        return _LONE
    candidates = _companions(queue, settings.max_batch_size)
    rows = sum(queue[i].rows for i in candidates)
    due_s = queue[0].arrived_s + settings.max_queue_delay_s
    if now_s < due_s and rows < settings.max_batch_size and not _left_behind(queue, candidates):
        return Decision(wake_at_s=due_s)
    return Decision(take=_worthwhile(queue, candidates, predict_s, settings.handover_s))


def earliest_start_s(
    queue: Sequence[Waiting],
    batch_key: Hashable,
    now_s: float,
    free_at_s: float,
    predict_s: Callable[[int], Optional[float]],
    settings: PolicySettings,
) -> float:
    """When a request that joins the queue now could start at best, on the clock of ``now_s``.

    At best: it overtakes requests of other keys, those of its own run before it at the lowest learned cost
    for each row, and its own batch is full. Where nothing was learned, that is now.

    Args:
        queue: waiting requests.
        batch_key: the new request's.
        now_s: the clock.
        free_at_s: when the running batch should end; in the past if none runs or it is late.
        predict_s: learned seconds for a number of rows; None: not known yet.
        settings: the limits.
    """
    start_s = max(now_s, free_at_s)
    one_s, full_s = predict_s(1), predict_s(settings.max_batch_size)
    if one_s is None or full_s is None:
        return start_s
    rows = sum(item.rows for item in queue if item.batch_key == batch_key)
    before = max(0, rows - (settings.max_batch_size - 1))
    return start_s + before * min(one_s, full_s / settings.max_batch_size)


def _companions(queue: Sequence[Waiting], max_rows: int) -> List[int]:
    """The oldest request and, in order of arrival, those that fit into a batch with it."""
    first = queue[0]
    taken, rows = [0], first.rows
    for position in range(1, len(queue)):
        item = queue[position]
        if item.batch_key != first.batch_key:
            continue
        if rows + item.rows > max_rows:
            break  # a smaller one behind it would fit, but requests of one shape keep their order
        taken.append(position)
        rows += item.rows
    return taken


def _left_behind(queue: Sequence[Waiting], candidates: List[int]) -> bool:
    """Whether a request of the batch's shape found no place in it: then waiting gathers nobody else."""
    return sum(item.batch_key == queue[0].batch_key for item in queue) > len(candidates)


def _worthwhile(
    queue: Sequence[Waiting],
    candidates: List[int],
    predict_s: Callable[[int], Optional[float]],
    handover_s: float,
) -> Tuple[int, ...]:
    if len(candidates) == 1:
        return (candidates[0],)
    costs_s: List[float] = []
    rows = 0
    for position in candidates:
        rows += queue[position].rows
        batch_s = predict_s(rows)
        if batch_s is None:
            return tuple(candidates)  # nothing learned yet: batching is what usually pays
        costs_s.append((handover_s + batch_s) / rows)
    bound_s = min(costs_s) * (1.0 + _WORTH_FRACTION)
    count = next(i for i, cost_s in enumerate(costs_s, start=1) if cost_s <= bound_s)
    return tuple(candidates[:count])
