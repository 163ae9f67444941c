"""The statistics extension of the protocol: counters of a model in Triton's JSON form. Pure functions."""

from __future__ import annotations

import time
from typing import Any, Dict

from device_agent.metrics import Histogram, ModelMetrics


def model_statistics(name: str, version: str, counters: ModelMetrics) -> Dict[str, Any]:
    """One entry of ``model_stats``.

    ``inference_count`` counts rows, ``execution_count`` runs of the engine, ``success.count`` requests. The
    engine reads request memory in place, so there are no separate input and output copies to time: their
    durations are zero.
    """
    count = counters.total_seconds.count
    return {
        "name": name,
        "version": version,
        "last_inference": _wall_clock_ms(counters.last_inference_s),
        "inference_count": counters.rows,
        "execution_count": counters.batch_rows.count,
        "inference_stats": {
            "success": _duration(count, counters.total_seconds.total),
            "fail": _duration(counters.failed, counters.failed_seconds),
            "queue": _of(counters.queue_seconds),
            "compute_input": _duration(count, 0.0),
            "compute_infer": _of(counters.compute_seconds),
            "compute_output": _duration(count, 0.0),
            "cache_hit": _duration(0, 0.0),
            "cache_miss": _duration(0, 0.0),
        },
        "batch_stats": [
            {
                "batch_size": rows,
                "compute_input": _duration(int(runs), 0.0),
                "compute_infer": _duration(int(runs), seconds),
                "compute_output": _duration(int(runs), 0.0),
            }
            for rows, (runs, seconds) in sorted(counters.by_batch.items())
        ],
    }


def _of(histogram: Histogram) -> Dict[str, int]:
    return _duration(histogram.count, histogram.total)


def _duration(count: int, seconds: float) -> Dict[str, int]:
    return {"count": count, "ns": round(seconds * 1e9)}


def _wall_clock_ms(monotonic_s: float) -> int:
    """Milliseconds since 1970 of a point on the monotonic clock; 0: never."""
    if monotonic_s == 0.0:
        return 0
    return round((time.time() - (time.monotonic() - monotonic_s)) * 1e3)
