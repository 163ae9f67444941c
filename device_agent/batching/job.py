"""One request on its way through the engine, and why it may be turned away."""

from __future__ import annotations

from typing import Any, Callable, Dict, Hashable, Optional

import numpy as np

Arrays = Dict[str, "np.ndarray[Any, Any]"]


class QueueFull(Exception):
    """As many requests wait as may; the client should come back later."""


class DeadlineExceeded(Exception):
    """The request's own timeout passed while it waited, or would pass for certain."""


class Job:
    """One request on its way through the engine.

    Attributes:
        inputs: an array for each input.
        rows: size along the batch axis.
        batch_key: jobs with equal keys may run as one batch.
        on_done: called on the event loop when ``outputs`` or ``error`` is set; never after a cancel.
        timeout_s: longest time in the queue; None: no limit.
        arrived_s, started_s, finished_s: points on the monotonic clock.
        batch_rows: rows of the batch that it ran in.
        outputs: an array for each output; None until done, or if it failed.
        error: why it failed.
    """

    __slots__ = (
        "arrived_s", "batch_key", "batch_rows", "cancelled", "error", "finished_s", "inputs", "on_done",
        "outputs", "rows", "started_s", "timeout_s",
    )  # fmt: skip

    def __init__(
        self,
        inputs: Arrays,
        rows: int,
        batch_key: Hashable,
        on_done: Callable[[Job], None],
        timeout_s: Optional[float] = None,
    ) -> None:
        self.inputs = inputs
        self.rows = rows
        self.batch_key = batch_key
        self.on_done = on_done
        self.timeout_s = timeout_s
        self.arrived_s = self.started_s = self.finished_s = 0.0
        self.batch_rows = 0
        self.cancelled = False
        self.outputs: Optional[Arrays] = None
        self.error: Optional[Exception] = None
