"""TensorRT's engine for a device that is this machine: a server with its own GPU, or a Jetson itself.

It is built in a process of its own (see ``child``), from the plan that the bundle carries, as the device's
agent would. What TensorRT measured on the way is kept in a timing cache, so the next build is faster.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from device_agent.manifest import EngineBuild
from edgekit.builders import child

_TIMEOUT_S = 3600


@dataclass(frozen=True)
class Answer:
    """What came of it.

    Attributes:
        version: of TensorRT; None where it is not here.
        built: whether the engine is there.
        why: the reason, where it is not.
        fingerprint: of this machine: ``sm``, ``tensorrt``, ``cuda``, ``driver``; empty where it has no GPU.
    """

    version: str | None
    built: bool
    why: str = ""
    fingerprint: Mapping[str, str] = field(default_factory=dict)


def build(plan: EngineBuild, folder: Path, engine: Path, timings: Path) -> Answer:
    """Build an engine by a plan, if this machine is what it requires.

    Args:
        plan: how; its paths are below ``folder``.
        folder: where the graph is.
        engine: the file to write.
        timings: folder of timing caches, a file for each device, CUDA, driver and TensorRT.
    """
    if importlib.util.find_spec("tensorrt") is None:
        return Answer(None, False, "TensorRT is not installed here")
    job = {"plan": asdict(plan), "folder": str(folder), "engine": str(engine), "timings": str(timings)}
    found, how = child.ask(__name__, [job], _TIMEOUT_S)
    return Answer(**found[0]) if found else Answer(None, False, f"TensorRT {how}")


# The child


def _answer(job: Mapping[str, Any]) -> Answer:
    from device_agent import manifest_form
    from device_agent.engines.tensorrt import fingerprint
    from device_agent.engines.tensorrt_settings import BuildError
    from device_agent.errors import AgentError

    try:
        own = dict(fingerprint())
        plan = manifest_form.build(EngineBuild, job["plan"], "plan")
        unlike = [
            f"{key} {value}, this machine has {own.get(key)}"
            for key, value in plan.requires.items()
            if own.get(key) != value and not own.get(key, "").startswith(f"{value}.")
        ]
        if unlike:
            return Answer(own["tensorrt"], False, f"it is for {unlike[0]}", own)
        timings = Path(job["timings"], f"{_digest(own)}.cache")
        _build(plan, Path(job["folder"]), Path(job["engine"]), timings)
    except AgentError as error:
        return Answer(None, False, error.why)
    except BuildError as error:
        return Answer(own["tensorrt"], False, str(error), own)
    return Answer(own["tensorrt"], True, fingerprint=own)


def _digest(fingerprint: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]


def _build(plan: EngineBuild, folder: Path, engine: Path, timings: Path) -> None:
    from device_agent.engines.tensorrt_build import build_engine
    from device_agent.engines.tensorrt_libraries import tactic_sources
    from device_agent.engines.tensorrt_module import load
    from device_agent.engines.tensorrt_settings import BuildSettings

    trt = load("tensorrt")
    precisions = (folder / plan.layer_precisions).read_bytes() if plan.layer_precisions else b"{}"
    settings = BuildSettings(
        precision=plan.precision,
        profiles=(plan.shapes,) if plan.shapes else (),
        workspace_bytes=plan.workspace_bytes,
        calibration_cache=(folder / plan.calibration_cache).read_bytes() if plan.calibration_cache else b"",
        layer_precisions=json.loads(precisions),
        timing_cache=timings.read_bytes() if timings.exists() else b"",
        tactic_sources=tactic_sources(trt),
        dla_core=plan.dla_core,
    )
    graph = folder / plan.graph
    built = build_engine(trt, graph.read_bytes(), settings, str(graph))
    engine.write_bytes(built.engine)
    if built.timing_cache:
        whole = timings.with_suffix(".part")
        whole.write_bytes(built.timing_cache)
        os.replace(whole, timings)


if __name__ == "__main__":
    child.serve(lambda job: asdict(_answer(job)))
