"""Measurement of a candidate beside the original, on the files that would ship.

The metric and the golden outputs are the same at every run; timings are not, and nothing that is
made into a bundle depends on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from edgekit import ort
from edgekit.artifact import Artifact
from edgekit.builders.onnxruntime import ENGINE_FILE
from edgekit.data import Dataset
from edgekit.measure import accuracy, latency, layers
from edgekit.measure.device import Timed
from edgekit.measure.outputs import collect
from edgekit.profile import Profile
from edgekit.recipe import Measure
from edgekit.stages.registry import Inputs
from edgekit.tensors import write_npz

GOLDEN_INPUTS = "golden_inputs.npz"
GOLDEN_OUTPUTS = "golden_outputs.npz"
_GOLDEN_ROWS = 4
_PROFILED_RUNS = 20

#: How far an engine on another processor may be from the golden outputs, as a share of the largest value
#: of the output: float kernels differ in summation order; a changed rounding moves an INT8 value by a step.
GOLDEN_TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2, "int8": 1e-1}


#: Of outputs behind a post-processing: a box more or less is no error there, where the heads before it agree.
_ANY = {"absolute": float(np.finfo(np.float32).max), "relative": 0.0}


class Config(BaseModel):
    """Settings of this stage: ``metric`` as named by ``accuracy.choose``, and the digest of its source."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    measure: Measure
    metric: str
    metric_source: str | None
    threads: int


def run(inputs: Inputs, config: Config, profile: Profile, out: Path) -> Mapping[str, Any]:
    """Measure the metric and the latency of both engines, and write the golden inputs and outputs.

    What each kernel of the candidate takes is looked at apart from the latency, which it would spoil.

    Raises:
        BadInput: the metric does not suit the model, or the held-out data is damaged.
    """
    held_out = inputs.sources.held_out.take(config.measure.max_samples)
    sessions = {
        role: ort.open_chain(inputs.artifacts[role].path / ENGINE_FILE, inputs.sources.behind, config.threads)
        for role in ("original", "candidate")
    }
    outputs, labels = collect(sessions, held_out, inputs.sources.model, inputs.tick)
    scores = {
        role: accuracy.score(config.metric, values, outputs["original"], labels).as_json()
        for role, values in outputs.items()
    }
    lost = accuracy.drop(config.metric, outputs["candidate"], outputs["original"], labels)
    example = next(iter(held_out.batches(1))).inputs
    timings = inputs.sources.device.time(
        {
            role: Timed(inputs.artifacts[role].path / ENGINE_FILE, example, behind=inputs.sources.behind)
            for role in sessions
        },
        runs=config.measure.runs,
        warmup=config.measure.warmup,
        threads=config.threads,
    )
    graph = inputs.artifacts["candidate"].path / ENGINE_FILE
    kernels = layers.profile(graph, example, _PROFILED_RUNS, config.threads)
    tolerances = _golden(sessions["candidate"], held_out, inputs.artifacts["candidate"], out)
    if inputs.sources.postprocess is not None:
        tolerances |= {spec.name: _ANY for spec in inputs.sources.postprocess.outputs}
    return {
        "metric": scores,
        "metric_drop_interval": None if lost is None else lost.as_json(),
        "latency_ms": {role: timing.as_json() for role, timing in timings.items()},
        "speedup_interval": latency.speedup_interval(timings["original"], timings["candidate"]).as_json(),
        "layers": [layer.as_json() for layer in kernels],
        "tolerances": tolerances,
    }


def _golden(session: ort.Chain, data: Dataset, engine: Artifact, out: Path) -> dict[str, Any]:
    """Write a few held-out inputs with the candidate's own outputs; return the tolerances."""
    rows = min(_GOLDEN_ROWS, int(engine.metadata["max_batch_size"]))
    golden_inputs = next(iter(data.batches(rows))).inputs
    golden_outputs = session.run(golden_inputs)
    write_npz(out / GOLDEN_INPUTS, golden_inputs)
    write_npz(out / GOLDEN_OUTPUTS, golden_outputs)
    share = GOLDEN_TOLERANCE[engine.metadata["precision"]]
    return {
        name: {"absolute": share * max(float(np.abs(value).max(initial=0)), 1e-6), "relative": 0.0}
        for name, value in golden_outputs.items()
    }
