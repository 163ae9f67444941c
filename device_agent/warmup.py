"""The first runs of an engine: they allocate its buffers and tell the batcher how long batches take."""

from __future__ import annotations

import time
from typing import Any, Dict

import numpy as np

from device_agent.batching.latency import LatencyModel
from device_agent.engines.base import Engine

_RUNS = 3
_BUDGET_S = 0.2  # for batches larger than one; a slow model learns them while it serves

Arrays = Dict[str, "np.ndarray[Any, Any]"]


def learn_latency(engine: Engine, latency: LatencyModel, samples: Arrays, max_batch_size: int) -> None:
    """Run batches of 1, 2, 4 and so on, as far as the time goes.

    Args:
        engine: what runs.
        latency: is told how long each took.
        samples: an array for each input, with at least one row; rows are repeated.
        max_batch_size: the largest batch; 0: there is no batch axis, and the samples run as they are.

    Raises:
        EngineError: a run failed.
    """
    _timed_run(engine, _batch(samples, min(max_batch_size, 1)))  # its time says nothing: it allocates
    rows, deadline_s = 1, time.monotonic() + _BUDGET_S
    while rows <= max(max_batch_size, 1) and (rows == 1 or _fits(latency, rows, deadline_s)):
        inputs = _batch(samples, rows if max_batch_size else 0)
        for _ in range(_RUNS):
            latency.observe(rows, _timed_run(engine, inputs))
        rows *= 2


def _fits(latency: LatencyModel, rows: int, deadline_s: float) -> bool:
    return time.monotonic() + _RUNS * (latency.predict(rows) or 0.0) < deadline_s


def _batch(samples: Arrays, rows: int) -> Arrays:
    if rows == 0:
        return samples
    return {name: np.take(array, range(rows), axis=0, mode="wrap") for name, array in samples.items()}


def _timed_run(engine: Engine, inputs: Arrays) -> float:
    started_s = time.monotonic()
    engine.run(inputs)
    return time.monotonic() - started_s
