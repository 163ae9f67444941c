"""Which engine a device should build of a bundle, and what tells one engine from another. Pure."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Callable, Dict, Mapping, Optional

from device_agent.engines.fingerprint import misfit, of_entry
from device_agent.errors import AgentError
from device_agent.manifest import EngineBuild, Manifest

#: A runtime's own values on this device; raises AgentError where it is not here.
Fingerprint = Callable[[str], Mapping[str, str]]


@dataclass(frozen=True)
class Wanted:
    """An engine that this device should have.

    Attributes:
        build: how it is built.
        fingerprint: all that it depends on: the device's own values, the precision, the graph's digest and
            a digest of everything else that the bundle says of the build.
    """

    build: EngineBuild
    fingerprint: Mapping[str, str]

    @property
    def key(self) -> str:
        """Its name on disk: equal for equal engines alone."""
        text = json.dumps(dict(self.fingerprint), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @property
    def device(self) -> Dict[str, str]:
        """The part of the fingerprint that the device decides."""
        return {key: value for key, value in self.fingerprint.items() if key not in _OF_THE_BUNDLE}


_OF_THE_BUNDLE = ("precision", "graph", "settings")


def choose(manifest: Manifest, fingerprint: Fingerprint) -> Optional[Wanted]:
    """The first of a bundle's builds that is for this device; None: there is none, or none is needed.

    None is needed where a prebuilt engine fits.
    """
    if not manifest.builds:
        return None
    known: Dict[str, Optional[Mapping[str, str]]] = {}

    def own(runtime: str) -> Optional[Mapping[str, str]]:
        if runtime not in known:
            try:
                known[runtime] = fingerprint(runtime)
            except AgentError:
                known[runtime] = None
        return known[runtime]

    for entry in manifest.engines:
        values = own(entry.runtime)
        if values is not None and misfit(of_entry(entry, manifest), values) is None:
            return None
    for build in manifest.builds:
        values = own(build.runtime)
        if values is not None and all(_is(values.get(key, ""), x) for key, x in build.requires.items()):
            return Wanted(build, {**values, **_of_bundle(build, manifest)})
    return None


def _is(own: str, asked: str) -> bool:
    """Whether a value is as asked, which may be the beginning of a version."""
    return own == asked or own.startswith(asked + ".")


def _of_bundle(build: EngineBuild, manifest: Manifest) -> Dict[str, str]:
    digests = {entry.path: entry.sha256 for entry in manifest.files}
    shapes = {name: [shape.least, shape.usual, shape.most] for name, shape in build.shapes.items()}
    rest = [
        build.runtime, shapes, build.workspace_bytes, build.dla_core,
        digests.get(build.calibration_cache), digests.get(build.layer_precisions),
    ]  # fmt: skip
    settings = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    return {"precision": build.precision, "graph": digests[build.graph], "settings": settings}
