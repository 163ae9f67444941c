"""Which builder makes engines for which runtime."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from edgekit.builders.engine_layers import EngineLayer
from edgekit.builders.work import Work
from edgekit.profile import Profile

#: Runtime of a profile -> the module that builds for it, resolved when it is needed.
BUILDERS = {
    "onnxruntime": "edgekit.builders.onnxruntime",
    "tensorrt": "edgekit.builders.tensorrt",
    "tensorrt_rtx": "edgekit.builders.tensorrt",
}


@dataclass(frozen=True)
class Built:
    """What became of one engine.

    Attributes:
        builder: the runtime that it is for.
        version: of the builder here; None where there is none.
        target: what it was built for.
        built: whether there is a file.
        executed: whether it ran here and gave the graph's outputs.
        why: the reason, where it was not built or not executed.
        path: file name in the stage's directory.
        fingerprint: what a device must match (``device_agent.manifest.EngineEntry``).
        plan: how a device builds its own (``device_agent.manifest.EngineBuild``), where it can.
        changes: what was rewritten in the graph for this runtime.
        not_on_dla: nodes that fall back from the device's DLA to its GPU -> why; by table, not executed.
        layers: of the engine, fused and with their types; None where it cannot be looked into here.
        layers_why: the reason, where there are none.
    """

    builder: str
    version: str | None
    target: str
    built: bool
    executed: bool
    why: str | None = None
    path: str | None = None
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    plan: Mapping[str, Any] | None = None
    changes: tuple[str, ...] = ()
    not_on_dla: Mapping[str, str] = field(default_factory=dict)
    layers: tuple[EngineLayer, ...] | None = None
    layers_why: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The form that artifacts and reports keep."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain


class Builder(Protocol):
    """What a builder's module offers."""

    def build(self, work: Work, profile: Profile, out: Path) -> Built:
        """Build an engine into the directory ``out``, or say how the device does."""


def build(work: Work, profile: Profile, out: Path, *, fallback: bool) -> list[Built]:
    """Build for the profile's runtime.

    Args:
        work: what to build.
        profile: the device.
        out: directory for the engines' files.
        fallback: whether to build for ONNX Runtime too, which every device can fall back to.
    """
    runtimes = dict.fromkeys((profile.runtime.name, *(["onnxruntime"] if fallback else [])))
    return [importlib.import_module(BUILDERS[runtime]).build(work, profile, out) for runtime in runtimes]
