"""One request on its way through the engine, and why it may be turned away."""

from __future__ import annotations

import math
from typing import Any, Callable, Dict, Hashable, Optional

import numpy as np

Arrays = Dict[str, "np.ndarray[Any, Any]"]


class TurnedAway(Exception):
    """A request that will not be computed.

    Attributes:
        retry_after_s: when the queue should be short enough for another try.
    """

    def __init__(self, retry_after_s: float = 1.0) -> None:
        super().__init__(retry_after_s)
        self.retry_after_s = retry_after_s


class QueueFull(TurnedAway):
    """As many requests wait as may; the client should come back later."""


class DeadlineExceeded(TurnedAway):
    """The request cannot be answered in time: by its own timeout, or by the model's objective."""


class Job:
    """One request on its way through the engine.

    Attributes:
        inputs: an array for each input.
        rows: size along the batch axis.
        batch_key: jobs with equal keys may run as one batch.
        on_done: called on the event loop when ``outputs`` or ``error`` is set; never after a cancel.
        timeout_s: longest time in the queue that the client asks for; None: it does not say.
        priority: the level that the client asks for, 1 being the highest; 0: it does not say.
        probe: whether the agent itself asks, so that it is not counted as a client's.
        level: the level that it has; set, as all that follows, when it is admitted.
        start_by_s, finish_by_s: the latest points for it on the monotonic clock; infinite: none.
        forecast_s: expected time in the queue.
        delayed: whether its time has passed and it now waits behind the others of its level.
        arrived_s, started_s, finished_s: points on the monotonic clock.
        batch_rows: rows of the batch that it ran in.
        outputs: an array for each output; None until done, or if it failed.
        error: why it failed.
    """

    __slots__ = (
        "arrived_s", "batch_key", "batch_rows", "cancelled", "delayed", "error", "finish_by_s", "finished_s",
        "forecast_s", "inputs", "level", "on_done", "outputs", "priority", "probe", "rows", "start_by_s",
        "started_s", "timeout_s",
    )  # fmt: skip

    def __init__(
        self,
        inputs: Arrays,
        rows: int,
        batch_key: Hashable,
        on_done: Callable[[Job], None],
        timeout_s: Optional[float] = None,
        priority: int = 0,
        probe: bool = False,
    ) -> None:
        self.inputs = inputs
        self.rows = rows
        self.batch_key = batch_key
        self.on_done = on_done
        self.timeout_s = timeout_s
        self.priority = priority
        self.probe = probe
        self.level = 1
        self.start_by_s = self.finish_by_s = math.inf
        self.forecast_s = 0.0
        self.delayed = False
        self.arrived_s = self.started_s = self.finished_s = 0.0
        self.batch_rows = 0
        self.cancelled = False
        self.outputs: Optional[Arrays] = None
        self.error: Optional[Exception] = None
