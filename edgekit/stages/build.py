"""Engines for the profile's runtime, and ONNX Runtime's beside them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from edgekit.builders import registry
from edgekit.profile import Profile
from edgekit.stages.export import GRAPH_FILE
from edgekit.stages.quantize import SCALES_FILE
from edgekit.stages.registry import Inputs


class Config(BaseModel):
    """Settings of this stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_batch_size: int


def run(inputs: Inputs, config: Config, profile: Profile, out: Path) -> Mapping[str, Any]:
    """Write the engines, and the scales where the graph was made from some.

    Raises:
        BadInput: the graph does not load or run.
    """
    graph = inputs.artifacts["graph"]
    model = inputs.sources.model
    free = model.inputs[0].shape[0] == -1
    largest = config.max_batch_size if free else model.inputs[0].shape[0]
    examples = [dict(model.example(batch)) for batch in sorted({1, largest} if free else {largest})]
    engines = registry.build(graph.path / GRAPH_FILE, examples, profile, out)
    if (graph.path / SCALES_FILE).exists():
        shutil.copyfile(graph.path / SCALES_FILE, out / SCALES_FILE)
    return {
        "engines": [engine.as_json() for engine in engines],
        "precision": graph.metadata.get("precision", "fp32"),
        "max_batch_size": largest,
    }
