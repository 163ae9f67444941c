"""Where a loaded model really runs: what the kernel says of its process, threads and memory."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Dict, List, Set

from device_agent import affinity
from device_agent.core_list import format_cpus, parse_cpus
from device_agent.engines.base import Engine, EngineSettings
from device_agent.memory import resident_bytes

if TYPE_CHECKING:
    from device_agent.loaded import LoadedModel


def report(loaded: LoadedModel, asked: EngineSettings) -> Dict[str, Any]:
    """Describe the engine of a model, read back at this moment.

    Args:
        loaded: what serves.
        asked: the settings that it was opened with.

    Returns:
        ``asked`` (threads, cpus, numa_node), ``runtime``, ``process``, ``isolated``, ``restarts`` and
        ``last_failure`` of an isolated engine, ``threads`` (see ``affinity.describe``), ``placed`` (whether
        every thread is confined to the cores that were asked for; null where none were), ``memory_policy``,
        and, of an isolated engine, ``memory_bytes`` and ``pages_by_node``.
    """
    engine, own = loaded.engine, loaded.engine.process == os.getpid()
    threads: Set[int] = set(engine.threads)
    if own and loaded.batcher.thread:
        threads.add(loaded.batcher.thread)
    entries = affinity.describe(engine.process, threads)
    return {
        "asked": {
            "threads": asked.threads,
            "cpus": format_cpus(asked.placement.cpus),
            "numa_node": asked.placement.numa_node,
        },
        "runtime": engine.runtime,
        "process": engine.process,
        "isolated": asked.isolate,
        **_restarts(engine),
        "threads": entries,
        "placed": _placed(entries, asked),
        "memory_policy": engine.memory_policy,
        "memory_bytes": None if own else resident_bytes(engine.process),
        "pages_by_node": {} if own else affinity.pages_by_node(engine.process),
    }


def _restarts(engine: Engine) -> Dict[str, Any]:
    if engine.process != os.getpid():
        from device_agent.engines.process import ProcessEngine  # loaded already where there is one

        if isinstance(engine, ProcessEngine):
            return {"restarts": engine.restarts, "last_failure": engine.last_failure}
    return {"restarts": 0, "last_failure": ""}


def _placed(entries: List[Dict[str, Any]], asked: EngineSettings) -> Any:
    wanted = set(asked.placement.cpus)
    if not wanted:
        return None
    return all(set(parse_cpus(entry["cpus"])) <= wanted for entry in entries)
