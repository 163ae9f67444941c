"""What an engine is opened from, in a form that can be sent to another process."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Dict, Mapping, Tuple

from device_agent.affinity import Placement
from device_agent.composition.plan import order
from device_agent.engines.base import EngineSettings
from device_agent.manifest import Manifest, Step


@dataclass(frozen=True)
class EngineSource:
    """A file and the runtime that loads it; in a composition, those of the main step.

    Attributes:
        runtime: a key of ``device_agent.engines.RUNTIMES``.
        path: the file, absolute.
        fingerprint: what must equal the device's own, as in ``EngineEntry``.
        steps: of a composition, in the order in which they run; ``graph`` of each is absolute.
        main: the graph whose steps ``path`` stands for.
        inputs, outputs: names of a composition's tensors, as in the manifest.
        wide: tensors that are INT64 in the manifest; the engine may have them as INT32.
    """

    runtime: str
    path: str
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    steps: Tuple[Step, ...] = ()
    main: str = ""
    inputs: Tuple[str, ...] = ()
    outputs: Tuple[str, ...] = ()
    wide: Tuple[str, ...] = ()

    def of_step(self, step: Step) -> EngineSource:
        """What one of the steps is opened from: the main one as this says, others on ONNX Runtime."""
        if step.graph == self.main:
            return EngineSource(self.runtime, self.path, self.fingerprint)
        return EngineSource("onnxruntime", step.graph)

    def to_json(self) -> Dict[str, Any]:
        """A JSON object that ``source_of`` reads."""
        return asdict(self)


def with_steps(source: EngineSource, directory: Path, manifest: Manifest) -> EngineSource:
    """``source`` for the main graph of an unpacked bundle, with the other steps where it has some."""
    if not manifest.composition:
        tensors = manifest.inputs + manifest.outputs
        return replace(source, wide=tuple(spec.name for spec in tensors if spec.dtype == "INT64"))
    inputs = tuple(spec.name for spec in manifest.inputs)
    outputs = tuple(spec.name for spec in manifest.outputs)
    steps = order(manifest.composition, inputs, outputs)
    return replace(
        source,
        steps=tuple(replace(step, graph=str(directory / step.graph)) for step in steps),
        main=str(directory / manifest.graph),
        inputs=inputs,
        outputs=outputs,
    )


def source_of(document: Mapping[str, Any]) -> EngineSource:
    """Read what ``EngineSource.to_json`` gave, as JSON returns it."""
    lists = {key: tuple(document[key]) for key in ("inputs", "outputs", "wide")}
    return EngineSource(**{**document, **lists, "steps": tuple(Step(**step) for step in document["steps"])})


def settings_of(document: Mapping[str, Any]) -> EngineSettings:
    """Read what ``dataclasses.asdict`` made of settings, as JSON returns it."""
    placement = Placement(tuple(document["placement"]["cpus"]), document["placement"]["numa_node"])
    return EngineSettings(**{**document, "placement": placement})
