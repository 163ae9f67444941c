"""Whether a new version can be loaded beside the one that serves, or has to wait until that one is gone.

The first way (blue/green) fails no request; the second has a pause, whose length is told before it begins.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from device_agent.errors import Refused
from device_agent.manifest import Manifest

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")

# Of its files; ONNX Runtime holds the weights once, packed for its kernels a second time, and the graph.
_BYTES_PER_FILE_BYTE = 2.5
_SMALLEST_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class Cost:
    """What loading a version took, measured.

    Attributes:
        memory_bytes: by how much it made the process larger, or the size of its own process.
        load_s: from opening the engine to a warm one.
    """

    memory_bytes: int = 0
    load_s: float = 0.0


@dataclass(frozen=True)
class SwapPlan:
    """How a version takes the place of another.

    Attributes:
        needed_bytes: what the new version will need, estimated.
        available_bytes: what the system can give, but for the reserve; None: it does not say.
        pause_s: how long nothing will serve, estimated; None: the old version serves meanwhile.
    """

    needed_bytes: int
    available_bytes: Optional[int]
    pause_s: Optional[float]

    def __str__(self) -> str:
        if self.pause_s is None:
            return "the old version serves until the new one is ready"
        return (
            f"the old version is stopped first, pause about {self.pause_s:.1f} s: the new one needs about "
            f"{_megabytes(self.needed_bytes)}, and {_megabytes(self.available_bytes or 0)} are free"
        )


#: Nothing serves yet, so nothing has to be stopped.
NOTHING_TO_STOP = SwapPlan(0, None, None)


def plan(needed_bytes: int, available_bytes: Optional[int], load_s: float) -> SwapPlan:
    """Decide. Where the system does not tell what is free, both versions are taken to fit."""
    fits = available_bytes is None or needed_bytes <= available_bytes
    return SwapPlan(needed_bytes, available_bytes, None if fits else load_s)


def estimate(new: Manifest, old: Manifest, measured: Cost) -> int:
    """Bytes that a new version will need: what the old one took, scaled by the size of their files.

    What a small model takes is the runtime's own and no measure of its files; it is added, not scaled.
    """
    new_bytes, old_bytes = _model_bytes(new), _model_bytes(old)
    by_size = int(_BYTES_PER_FILE_BYTE * new_bytes)
    if old_bytes < _SMALLEST_BYTES:
        return max(measured.memory_bytes + by_size, _SMALLEST_BYTES)
    return max(by_size, measured.memory_bytes * new_bytes // old_bytes, _SMALLEST_BYTES)


def require_memory(new: Manifest, available_bytes: Optional[int], old_bytes: int) -> None:
    """Refuse what cannot be loaded even with the old version stopped, before a byte of it is stored.

    Only what is certain counts: the weights are held once at least.

    Args:
        new: the version.
        available_bytes: what is free now; None: the system does not say.
        old_bytes: what stopping the old version would free.

    Raises:
        Refused: the device has not enough memory for its files.
    """
    needed_bytes = _model_bytes(new)
    most_bytes = None if available_bytes is None else available_bytes + old_bytes
    if most_bytes is not None and needed_bytes > most_bytes:
        raise Refused(
            f"there is no memory for {new.name} version {new.version}",
            f"its weights take {_megabytes(needed_bytes)}; at most {_megabytes(most_bytes)} can be had",
            "stop other models or processes, or build a smaller bundle",
        )


def _model_bytes(manifest: Manifest) -> int:
    """Of the graphs that are loaded together; of engines, the largest, since one of them is taken."""
    sizes = {entry.path: entry.size_bytes for entry in manifest.files}
    graphs = {manifest.graph, *(step.graph for step in manifest.composition)}
    engines = [sizes.get(engine.path, 0) for engine in manifest.engines]
    return max(sum(sizes.get(graph, 0) for graph in graphs), *engines, 0)


def available_bytes(reserve_bytes: int) -> Optional[int]:
    """What new allocations can have, by the system and by this service's own limit; None: neither says."""
    figures = [figure for figure in (_system_bytes(), _cgroup_bytes()) if figure is not None]
    return max(0, min(figures) - reserve_bytes) if figures else None


def _system_bytes() -> Optional[int]:
    for line in _MEMINFO.read_text().splitlines() if _MEMINFO.exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_bytes() -> Optional[int]:
    """What is left of systemd's MemoryMax= (cgroup v2)."""
    try:
        path = next(line[3:] for line in _CGROUP.read_text().splitlines() if line.startswith("0::"))
        limit = (_CGROUPS / path.lstrip("/") / "memory.max").read_text().strip()
        used = (_CGROUPS / path.lstrip("/") / "memory.current").read_text()
    except (OSError, StopIteration):
        return None
    return None if limit == "max" else max(0, int(limit) - int(used))


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.0f} MB"
