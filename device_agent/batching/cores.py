"""Which models share cores, and what that means for how their batches run."""

from __future__ import annotations

import os
from typing import Dict, Set, Tuple

from device_agent.batching.share import EngineShare
from device_agent.engines.base import EngineSettings


class Shares:
    """The places for runs, one account for each set of cores; models on different cores do not compete."""

    def __init__(self, concurrent_runs: int = 0) -> None:
        """Let ``concurrent_runs`` engines run at a time on each set of cores; 0: as many as find cores."""
        self._concurrent_runs = concurrent_runs
        self._by_cores: Dict[Tuple[int, ...], EngineShare] = {}

    def of(self, settings: EngineSettings) -> EngineShare:
        """The places of a model that runs as ``settings`` say."""
        cores = settings.placement.cpus
        if cores not in self._by_cores:
            self._by_cores[cores] = EngineShare(self._concurrent_runs or places(settings))
        return self._by_cores[cores]


def places(settings: EngineSettings) -> int:
    """How many runs of ``settings.threads`` threads find cores of their own; at least one."""
    cores = len(settings.placement.cpus or own_cores())
    return max(1, cores // (settings.threads or cores))


def on_one_core(settings: EngineSettings) -> bool:
    """Whether a model's engine has no other core than the event loop has."""
    return len(own_cores()) == 1 and not settings.placement.cpus and not settings.isolate


def own_cores() -> Set[int]:
    """The cores that this process may use."""
    return os.sched_getaffinity(0)
