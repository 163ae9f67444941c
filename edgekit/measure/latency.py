"""Latency, measured side by side.

Two programs timed one after the other are compared across whatever else the machine did meanwhile. Here the
candidates take turns, run by run, so that a slow minute slows them all.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from edgekit.measure import interval
from edgekit.measure.interval import Interval


@dataclass(frozen=True)
class Latency:
    """Quantiles over single runs, in milliseconds.

    Attributes:
        p50, p95, p99: quantiles.
        runs: timed runs that they are taken from.
        batch: rows in each run.
        where: the machine that ran it.
        times_ms: of the single runs, in their order; not in reports.
    """

    p50: float
    p95: float
    p99: float
    runs: int
    batch: int
    where: str
    times_ms: tuple[float, ...] = field(default=(), repr=False)

    def as_json(self) -> dict[str, Any]:
        """The form that reports use."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "times_ms"}


def interleaved(
    candidates: Mapping[str, Callable[[], object]], *, runs: int, warmup: int, batch: int, where: str
) -> dict[str, Latency]:
    """Time each candidate ``runs`` times, taking turns.

    Args:
        candidates: by name, a function that runs it once.
        runs: timed runs of each.
        warmup: runs of each before the clock starts.
        batch: rows in each run, for the record.
        where: the machine, for the record.
    """
    for _ in range(warmup):
        for run in candidates.values():
            run()
    times_ms: dict[str, list[float]] = {name: [] for name in candidates}
    collecting = gc.isenabled()
    gc.disable()  # a collection in one candidate's turn would be charged to it
    try:
        for _ in range(runs):
            for name, run in candidates.items():
                begin = time.perf_counter_ns()
                run()
                times_ms[name].append((time.perf_counter_ns() - begin) / 1e6)
    finally:
        if collecting:
            gc.enable()
    return {name: summary(values, batch, where) for name, values in times_ms.items()}


def summary(times_ms: list[float], batch: int, where: str) -> Latency:
    """Quantiles of the times of single runs."""
    p50, p95, p99 = (float(value) for value in np.quantile(times_ms, (0.5, 0.95, 0.99)))
    return Latency(p50, p95, p99, len(times_ms), batch, where, tuple(times_ms))


def speedup_interval(original: Latency, candidate: Latency) -> Interval:
    """How sure the original's p50 over the candidate's is, for two that were timed in turns."""
    return interval.resampled_speedup(np.asarray(original.times_ms), np.asarray(candidate.times_ms))


def this_machine() -> str:
    """Name the processor and how many of its CPUs this process may use."""
    import os
    import platform

    name = platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            models = [line.partition(":")[2].strip() for line in stream if line.startswith("model name")]
        name = models[0] if models else name
    except OSError:
        pass  # not Linux: the architecture alone
    return f"this host: {name}, {len(os.sched_getaffinity(0))} CPUs"
