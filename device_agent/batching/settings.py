"""What a user may say about the batching of one model, in Triton's words and with Triton's meaning.

The same dataclasses are filled from the agent's configuration (``[models.NAME.batching]``) and from the
``dynamic_batching`` block of a ``config.pbtxt``. Field names, units and meaning are those of
``ModelDynamicBatching`` and ``ModelQueuePolicy`` in Triton's ``model_config.proto``; what differs is said
at the field. Where a field is left at its default, the agent decides by what it learned.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Dict, Iterator, Mapping, Optional, Tuple

REJECT = "REJECT"
DELAY = "DELAY"


@dataclass(frozen=True)
class QueuePolicy:
    """How long requests of one priority level may wait, and how many of them.

    Attributes:
        timeout_action: ``REJECT`` refuses a request whose timeout has passed; ``DELAY`` runs it after those
            of its level and of higher levels whose timeout has not.
        default_timeout_microseconds: longest time in the queue of a request that names none; 0: no limit.
        allow_timeout_override: whether a request's own ``timeout`` counts; it can only shorten a default.
            Triton's default is false: where a ``config.pbtxt`` has a queue policy, set it from there.
        max_queue_size: waiting requests of the level; more are refused. 0: ``limits.max_queue_size``, where
            Triton has no limit.
    """

    timeout_action: str = REJECT
    default_timeout_microseconds: int = 0
    allow_timeout_override: bool = True
    max_queue_size: int = 0

    def timeout_s(self, requested_s: Optional[float]) -> Optional[float]:
        """Longest time in the queue of a request that asks for ``requested_s``; None: no limit."""
        default_s = self.default_timeout_microseconds / 1e6 or None
        if requested_s is None or not self.allow_timeout_override:
            return default_s
        return requested_s if default_s is None else min(requested_s, default_s)


@dataclass(frozen=True)
class Batching:
    """How requests of one model are put together.

    Attributes:
        preferred_batch_size: sizes, in rows, at which a batch starts at once; the largest that the queue
            offers is taken. Empty: the size is chosen by the learned latency.
        max_queue_delay_microseconds: how long a request may wait for a preferred size, or a full batch. None:
            an idle engine waits only where the learned return of clients says that waiting pays; a number
            replaces that, and 0 never waits.
        priority_levels: how many levels there are, 1 being the highest; 0: priorities are not told apart.
        default_priority_level: of requests that name none, or one that does not exist; 0, only where there
            are no levels: none.
        default_queue_policy: for levels without their own.
        priority_queue_policy: by level.
    """

    preferred_batch_size: Tuple[int, ...] = ()
    max_queue_delay_microseconds: Optional[int] = None
    priority_levels: int = 0
    default_priority_level: int = 0
    default_queue_policy: QueuePolicy = QueuePolicy()
    priority_queue_policy: Mapping[int, QueuePolicy] = field(
        default_factory=dict, metadata={"entries": QueuePolicy(), "key": int}
    )

    def level(self, requested: int) -> int:
        """The level of a request that asks for ``requested``; 1 where there are no levels."""
        if self.priority_levels == 0:
            return 1
        return requested if 1 <= requested <= self.priority_levels else self.default_priority_level

    def policy(self, level: int) -> QueuePolicy:
        """What holds for requests of a level."""
        return self.priority_queue_policy.get(level, self.default_queue_policy)


def document(batching: Batching) -> Dict[str, Any]:
    """The settings as the ``dynamic_batching`` of a model configuration in JSON."""
    result: Dict[str, Any] = {
        "preferred_batch_size": list(batching.preferred_batch_size),
        "max_queue_delay_microseconds": batching.max_queue_delay_microseconds or 0,
        "preserve_ordering": False,
        "priority_levels": batching.priority_levels,
        "default_priority_level": batching.default_priority_level,
        "priority_queue_policy": {
            str(level): asdict(policy) for level, policy in batching.priority_queue_policy.items()
        },
    }
    if batching.default_queue_policy != QueuePolicy():
        result["default_queue_policy"] = asdict(batching.default_queue_policy)
    return result


def problems(batching: Batching, max_batch_size: Optional[int] = None) -> Iterator[Tuple[str, str]]:
    """What types cannot say: each field that is wrong, and what it should be.

    Args:
        batching: the settings.
        max_batch_size: of the model, where it is known already.
    """
    sizes = batching.preferred_batch_size
    if any(size < 1 for size in sizes):
        yield "preferred_batch_size", "sizes above zero"
    if max_batch_size is not None and any(size > max_batch_size for size in sizes):
        yield "preferred_batch_size", f"sizes up to the model's max_batch_size, {max_batch_size}"
    if batching.max_queue_delay_microseconds is not None and batching.max_queue_delay_microseconds < 0:
        yield "max_queue_delay_microseconds", "zero or more"
    levels = batching.priority_levels
    if levels < 0:
        yield "priority_levels", "zero or more"
    if not min(levels, 1) <= batching.default_priority_level <= levels:
        yield "default_priority_level", f"a level from 1 to priority_levels, {levels}"
    yield from _policy_problems("default_queue_policy", batching.default_queue_policy)
    for level, policy in batching.priority_queue_policy.items():
        if not 1 <= level <= levels:
            yield f"priority_queue_policy.{level}", f"for a level from 1 to priority_levels, {levels}"
        yield from _policy_problems(f"priority_queue_policy.{level}", policy)


def _policy_problems(name: str, policy: QueuePolicy) -> Iterator[Tuple[str, str]]:
    if policy.timeout_action not in (REJECT, DELAY):
        yield f"{name}.timeout_action", f"'{REJECT}' or '{DELAY}'"
    for key in ("default_timeout_microseconds", "max_queue_size"):
        if getattr(policy, key) < 0:
            yield f"{name}.{key}", "zero or more"
