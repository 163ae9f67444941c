"""Which builder makes engines for which runtime."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from edgekit.profile import Profile

#: Runtime of a profile -> the module that builds for it, resolved when it is needed.
BUILDERS = {"onnxruntime": "edgekit.builders.onnxruntime"}


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
    """

    builder: str
    version: str | None
    target: str
    built: bool
    executed: bool
    why: str | None = None
    path: str | None = None
    fingerprint: Mapping[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The form that artifacts and reports keep."""
        return asdict(self)


class Builder(Protocol):
    """What a builder's module offers."""

    def build(self, graph: Path, examples: list[dict[str, Any]], profile: Profile, out: Path) -> Built:
        """Build an engine for ``graph`` into the directory ``out``."""


def build(graph: Path, examples: list[dict[str, Any]], profile: Profile, out: Path) -> list[Built]:
    """Build for the profile's runtime, and for ONNX Runtime, which every device can fall back to.

    Args:
        graph: an ``.onnx`` file.
        examples: inputs at several batch sizes, to run what was built.
        profile: the device.
        out: directory for the engines' files.
    """
    results = []
    for runtime in dict.fromkeys((profile.runtime.name, "onnxruntime")):
        if runtime in BUILDERS:
            results.append(importlib.import_module(BUILDERS[runtime]).build(graph, examples, profile, out))
        else:
            results.append(_no_builder(runtime, profile))
    return results


def _no_builder(runtime: str, profile: Profile) -> Built:
    why = (
        f"this version of edgekit has no builder for {runtime}; the device serves the graph with ONNX Runtime"
    )
    sm = profile.accelerator.sm
    target = f"sm_{sm}" if sm else profile.architecture
    return Built(runtime, None, target, built=False, executed=False, why=why)
