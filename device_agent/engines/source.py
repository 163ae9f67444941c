"""What an engine is opened from, in a form that can be sent to another process."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Dict, Mapping

from device_agent.affinity import Placement
from device_agent.engines.base import EngineSettings


@dataclass(frozen=True)
class EngineSource:
    """A file and the runtime that loads it.

    Attributes:
        runtime: a key of ``device_agent.engines.RUNTIMES``.
        path: the file, absolute.
        fingerprint: what must equal the device's own, as in ``EngineEntry``.
    """

    runtime: str
    path: str
    fingerprint: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> Dict[str, Any]:
        """A JSON object that ``source_of`` reads."""
        return asdict(self)


def source_of(document: Mapping[str, Any]) -> EngineSource:
    """Read what ``EngineSource.to_json`` gave."""
    return EngineSource(document["runtime"], document["path"], document["fingerprint"])


def settings_of(document: Mapping[str, Any]) -> EngineSettings:
    """Read what ``dataclasses.asdict`` made of settings, as JSON returns it."""
    placement = Placement(tuple(document["placement"]["cpus"]), document["placement"]["numa_node"])
    return EngineSettings(**{**document, "placement": placement})
