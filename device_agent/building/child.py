"""The build process: ``python -m device_agent.building.child PARENT``.

Reads one job from standard input, builds, writes the engine to a file, and tells on standard output what it
does: a JSON object a line, ``{"phase": ...}`` and at last ``{"built": ...}`` or ``{"failed": ...}``.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, List, Mapping

from device_agent import durable
from device_agent.ending import die_with, prefer_to_be_ended
from device_agent.engines.tensorrt_build import build_engine
from device_agent.engines.tensorrt_libraries import tactic_sources
from device_agent.engines.tensorrt_settings import BuildError, BuildSettings
from device_agent.manifest import ShapeRange

_NICENESS = 10  # what serves comes first
_OOM_SCORE = 1000  # the first that the kernel ends
_PROGRESS_EVERY_S = 1.0


def main(arguments: List[str]) -> int:
    """Build one engine."""
    die_with(int(arguments[0]))
    prefer_to_be_ended(_OOM_SCORE)
    os.nice(_NICENESS)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to the log
    job = json.loads(sys.stdin.read())

    def tell(message: Mapping[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        tell({"built": _build(job, _Progress(tell))})
    except (BuildError, OSError, ImportError, MemoryError) as error:
        tell({"failed": str(error) or type(error).__name__})
        return 1
    return 0


class _Progress:
    """Tells phases as TensorRT reports them, not more often than a person can read."""

    def __init__(self, tell: Any) -> None:
        self._tell = tell
        self._told_s = 0.0

    def __call__(self, phase: str, done: int, steps: int) -> None:
        now_s = time.monotonic()
        if now_s - self._told_s >= _PROGRESS_EVERY_S or done == 0:
            self._told_s = now_s
            self._tell({"phase": phase, "done": done, "steps": steps})


def _build(job: Mapping[str, Any], progress: _Progress) -> Mapping[str, Any]:
    progress(f"loading {job['runtime']}", 0, 0)
    trt = importlib.import_module(job["runtime"])
    settings = BuildSettings(
        precision=job["precision"],
        profiles=_profiles(job["shapes"]),
        workspace_bytes=job["workspace_bytes"],
        calibration_cache=_read(job["calibration_cache"]),
        layer_precisions=json.loads(_read(job["layer_precisions"]) or b"{}"),
        timing_cache=_read(job["timing_cache"]),
        tactic_sources=tactic_sources(trt),
        dla_core=job["dla_core"],
        compute_capabilities=(f"SM{job['sm']}",) if hasattr(trt, "ComputeCapability") else (),
    )
    progress("building", 0, 0)
    graph = Path(job["graph"])
    built = build_engine(trt, graph.read_bytes(), settings, str(graph), progress)
    durable.write(Path(job["engine"]), built.engine)
    if built.timing_cache:
        durable.write(Path(job["timing_cache"]), built.timing_cache)
    return {
        "layers": built.layers,
        "not_on_dla": list(built.not_on_dla),
        "constrained": built.constrained,
        "warnings": list(built.warnings),
    }


def _profiles(shapes: Mapping[str, Any]) -> Any:
    if not shapes:
        return ()
    return ({name: ShapeRange(*(tuple(shape) for shape in three)) for name, three in shapes.items()},)


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes() if path else b""
    except FileNotFoundError:
        return b""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
