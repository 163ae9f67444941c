"""The first runs of an engine: they allocate its buffers and tell the batcher how long batches take."""

from __future__ import annotations

import time
from typing import Any, Dict

import numpy as np

from device_agent.batching.latency import PREPARING_RUNS, LatencyModel
from device_agent.engines.base import Engine

_RUNS = 2
_BUDGET_S = 0.12  # of usual run time, after which larger batches are learned while serving

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
    rows, spent_s = 1, 0.0
    while rows <= max(max_batch_size, 1) and spent_s <= _BUDGET_S:
        inputs = _batch(samples, rows if max_batch_size else 0)
        for _ in range(PREPARING_RUNS):
            engine.run(inputs)
        for _ in range(_RUNS):
            latency.observe(rows, _timed_run(engine, inputs))
        rows *= 2
        spent_s += (PREPARING_RUNS + _RUNS) * (latency.predict(rows) or 0.0)  # those that would be next


def _batch(samples: Arrays, rows: int) -> Arrays:
    if rows == 0:
        return samples
    return {name: np.take(array, range(rows), axis=0, mode="wrap") for name, array in samples.items()}


def _timed_run(engine: Engine, inputs: Arrays) -> float:
    started_s = time.monotonic()
    engine.run(inputs)
    return time.monotonic() - started_s
