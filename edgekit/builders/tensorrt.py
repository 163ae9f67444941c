"""TensorRT: engines ahead of time where that is possible, and for every device a plan to build its own.

TensorRT-RTX builds for its GPUs on any machine. TensorRT itself builds only on a GPU of the same kind, with
the same release: where this machine is not one, the bundle carries the lowered graph and the settings, and
the device builds. Neither is executed here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from device_agent.engines.tensorrt_settings import BuildError, serving_ranges
from device_agent.manifest import EngineBuild, ShapeRange
from edgekit.builders import engine_layers, here, rtx
from edgekit.builders.registry import Built
from edgekit.builders.tensorrt_graph import TensorRtGraph, make
from edgekit.builders.work import Work
from edgekit.errors import BadInput
from edgekit.lowering.tables import dla_for_profile, for_profile, lowest_version
from edgekit.profile import Profile

#: Sizes of free axes besides the batch, such as a sequence's length: least, usual, largest.
FREE_AXIS = (1, 128, 512)
#: Share of the device's memory that one layer may take while it runs.
_WORKSPACE_FRACTION = 1 / 16
_MOST_WORKSPACE_BYTES = 4 << 30
_DLA_PRECISIONS = {"fp16", "int8"}
#: Of the text encoder on a server's GPU (docs/tensorrt.md).
_FP16_ATTENTION = "; expect fp16 for its attention: TensorRT 8.5 was seen to heed no calibration cache there"
#: Longest build ahead of time; none of the tried graphs took a tenth of it.
_BUILD_TIMEOUT_S = 600


def build(work: Work, profile: Profile, out: Path) -> Built:
    """Make the graph for the profile's TensorRT, and the engine where it can be built here.

    Raises:
        BadInput: a graph that was rewritten for its parser does not compute the same.
    """
    table = for_profile(profile)
    if table is None:
        return _not_built(profile, f"no table of operators for TensorRT {lowest_version(profile)} or older")
    dla_core = _dla_core(work, profile)
    graph = make(work, profile, table, on_dla=dla_core is not None)
    if graph.refused:
        first = graph.refused[0]
        return _not_built(profile, f"its parser does not take {first.op_type} '{first.node}': {first.why}")
    try:
        shapes = serving_ranges(work.shapes, (1, work.max_batch_size), FREE_AXIS)
    except BuildError as error:
        raise BadInput("the model's shapes do not suit TensorRT", str(error), "fix its axes") from error
    path = _write(graph.model, ".onnx", out)
    plan = _plan(work, profile, graph, shapes, path, dla_core, out)
    facts: dict[str, Any] = {
        "plan": asdict(plan),
        "changes": graph.changes,
        "not_on_dla": _not_on_dla(profile, work.precision, graph),
    }
    make_engine = _here_or_there if profile.runtime.name == "tensorrt" else _ahead_of_time
    made = make_engine(work, profile, plan, out, facts)
    return replace(made, why=f"{made.why}{_FP16_ATTENTION}") if graph.attention_by_cache else made


def target(profile: Profile) -> str:
    """What an engine is built for, in words."""
    return f"sm_{profile.accelerator.sm}, {profile.runtime.name} {profile.runtime.versions}"


def _here_or_there(
    work: Work, profile: Profile, plan: EngineBuild, out: Path, facts: Mapping[str, Any]
) -> Built:
    """The engine, where this machine is such a device; else the device builds it."""
    engine = _place(out, plan.graph, profile)
    answer = here.build(plan, out, engine, work.timings)
    if answer.built:
        return Built(
            version=answer.version,
            why="it was built on this machine's GPU, and the agent is the first to run it",
            layers_why="tests/hardware/jetson.sh writes what TensorRT's inspector says of them",
            **_of_engine(work, profile, plan, str(answer.version), engine, out),
            **facts,
        )
    engine.unlink(missing_ok=True)
    where = "its GPU" if plan.dla_core is None else f"its DLA {plan.dla_core}, and the GPU for the rest"
    why = (
        f"an engine fits one GPU and one TensorRT ({answer.why}); a device with sm {profile.accelerator.sm} "
        f"and TensorRT {lowest_version(profile)} builds it from {plan.graph} for {where}, "
        "and serves with ONNX Runtime before"
    )
    return _not_built(profile, why, **facts)


def _ahead_of_time(
    work: Work, profile: Profile, plan: EngineBuild, out: Path, facts: Mapping[str, Any]
) -> Built:
    graph, engine = out / plan.graph, _place(out, plan.graph, profile)
    shapes = {name: asdict(shape) for name, shape in plan.shapes.items()}
    job = rtx.Job(str(graph), f"SM{profile.accelerator.sm}", shapes, str(engine))
    (answer,) = rtx.ask([job], timeout_s=_BUILD_TIMEOUT_S)
    if answer.version is None or not answer.accepted:
        engine.unlink(missing_ok=True)
        return _not_built(profile, answer.why, version=answer.version, **facts)
    layers = engine_layers.read(answer.layer_listing)
    return Built(
        version=answer.version,
        why="there is no such GPU here",
        layers=layers,
        layers_why=None if layers else f"TensorRT-RTX {answer.version} did not list them while it built",
        **_of_engine(work, profile, plan, answer.version, engine, out),
        **facts,
    )


def _place(out: Path, graph: str, profile: Profile) -> Path:
    """Where the engine from a graph goes."""
    path = out / "engines" / f"{Path(graph).stem}.sm{profile.accelerator.sm}.engine"
    path.parent.mkdir(exist_ok=True)
    return path


def _of_engine(
    work: Work, profile: Profile, plan: EngineBuild, version: str, engine: Path, out: Path
) -> dict[str, Any]:
    """What is said of every engine that was built here, wherever it is to run."""
    return {
        "builder": profile.runtime.name,
        "target": target(profile),
        "built": True,
        "executed": False,
        "path": str(engine.relative_to(out)),
        "fingerprint": {
            "sm": str(profile.accelerator.sm),
            profile.runtime.name: version,
            "precision": work.precision,
            "graph": hashlib.sha256((out / plan.graph).read_bytes()).hexdigest(),
        },
    }


def _plan(
    work: Work,
    profile: Profile,
    graph: TensorRtGraph,
    shapes: Mapping[str, ShapeRange],
    path: str,
    dla_core: int | None,
    out: Path,
) -> EngineBuild:
    version = lowest_version(profile)
    return EngineBuild(
        runtime=profile.runtime.name,
        graph=path,
        precision=work.precision,
        requires={
            "sm": str(profile.accelerator.sm),
            profile.runtime.name: f"{version.major}.{version.minor}",
        },
        shapes=dict(shapes),
        workspace_bytes=min(int(profile.memory.size_bytes * _WORKSPACE_FRACTION), _MOST_WORKSPACE_BYTES),
        calibration_cache=_write(graph.cache.encode(), ".cache", out) if graph.cache else "",
        layer_precisions=_write(_json(graph.precisions), ".json", out) if graph.precisions else "",
        dla_core=dla_core,
    )


def _json(precisions: Mapping[str, str]) -> bytes:
    return json.dumps(dict(precisions), sort_keys=True, indent=1).encode()


def _write(content: bytes, suffix: str, out: Path) -> str:
    """Write a file named after its content, so that profiles which share it share it in the bundle too."""
    path = Path("builds") / f"{hashlib.sha256(content).hexdigest()[:16]}{suffix}"
    (out / path).parent.mkdir(exist_ok=True)
    (out / path).write_bytes(content)
    return str(path)


def _dla_core(work: Work, profile: Profile) -> int | None:
    """The DLA that the profile asks for, where this candidate can run on one at all.

    Raises:
        BadInput: the DLA would have to take several shapes.
    """
    if dla_for_profile(profile) is None or profile.dla is None or work.precision not in _DLA_PRECISIONS:
        return None
    if profile.dla.core is not None and (
        work.max_batch_size > 1 or any(size < 0 for shape in work.shapes.values() for size in shape[1:])
    ):
        raise BadInput(
            f"{profile.name} asks for its DLA, which takes one shape alone",
            f"the model is served in batches of up to {work.max_batch_size}, or has a free axis besides",
            "set export.max_batch_size = 1 and fix the model's axes, or leave dla.core out of the profile",
        )
    return profile.dla.core


def _not_on_dla(profile: Profile, precision: str, graph: TensorRtGraph) -> dict[str, str]:
    dla = dla_for_profile(profile)
    if dla is None:
        return {}
    if precision not in _DLA_PRECISIONS:
        return dict.fromkeys(graph.names, f"the DLA has no {precision}")
    held = {name: "it is held in fp32" for name, kind in graph.precisions.items() if kind == "fp32"}
    return {**held, **dla.fallback(graph.names)}


def _not_built(profile: Profile, why: str, version: str | None = None, **facts: Any) -> Built:
    return Built(
        profile.runtime.name,
        version,
        target(profile),
        built=False,
        executed=False,
        why=why,
        layers_why="there is no engine here to look into",
        **facts,
    )
