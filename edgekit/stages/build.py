"""Engines for the profile's runtime, and ONNX Runtime's beside them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from edgekit.builders import registry
from edgekit.builders.work import Work
from edgekit.profile import Profile
from edgekit.stages.export import GRAPH_FILE
from edgekit.stages.quantize import FLOAT_FILE, SCALES_FILE
from edgekit.stages.registry import Inputs


class Config(BaseModel):
    """Settings of this stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_batch_size: int
    fallback: bool = True
    """Whether ONNX Runtime's engine is built too."""


def run(inputs: Inputs, config: Config, profile: Profile, out: Path) -> Mapping[str, Any]:
    """Write the engines, and the scales where the graph was made from some.

    Raises:
        BadInput: the graph does not load or run, or a rewritten one does not compute the same.
    """
    graph = inputs.artifacts["graph"]
    work = _work(inputs, config)
    engines = registry.build(work, profile, out, fallback=config.fallback)
    if work.scales is not None and config.fallback:
        shutil.copyfile(work.scales, out / SCALES_FILE)
    return {
        "engines": [engine.as_json() for engine in engines],
        "precision": graph.metadata.get("precision", "fp32"),
        "max_batch_size": work.max_batch_size,
    }


def _work(inputs: Inputs, config: Config) -> Work:
    graph = inputs.artifacts["graph"]
    model = inputs.sources.model
    free = model.inputs[0].shape[0] == -1
    largest = config.max_batch_size if free else model.inputs[0].shape[0]
    examples = tuple(model.example(batch) for batch in sorted({1, largest} if free else {largest}))
    made_from = inputs.artifacts.get("plain", graph)
    scales, plain = graph.path / SCALES_FILE, graph.path / FLOAT_FILE
    return Work(
        graph=graph.path / GRAPH_FILE,
        plain=plain if plain.exists() else made_from.path / GRAPH_FILE,
        precision=graph.metadata.get("precision", "fp32"),
        examples=examples,
        shapes={spec.name: tuple(spec.shape) for spec in model.inputs},
        max_batch_size=largest,
        timings=inputs.timings,
        scales=scales if scales.exists() else None,
        in_float=tuple(graph.metadata.get("in_float", ())),
    )
