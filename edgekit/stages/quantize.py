"""The graph in another precision: INT8 by static calibration, or FP16 by conversion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from edgekit.errors import BadInput
from edgekit.measure import graph as graph_facts
from edgekit.profile import Profile
from edgekit.recipe import Quantize
from edgekit.stages.export import GRAPH_FILE
from edgekit.stages.registry import Inputs
from edgekit.tensors import Arrays

SCALES_FILE = "scales.json"


class Config(BaseModel):
    """Settings of this stage; ``quantize`` is None where the precision needs none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    precision: Literal["int8", "fp16"]
    quantize: Quantize | None


def run(inputs: Inputs, config: Config, profile: Profile, out: Path) -> Mapping[str, Any]:
    """Write the graph, and for INT8 the scales that it was made from.

    Raises:
        BadInput: the calibration data does not suit the model, or nothing in the graph can be converted.
    """
    import onnx

    from calibration import CalibrationError

    graph = onnx.load(str(inputs.artifacts["graph"].path / GRAPH_FILE))
    try:
        if config.precision == "fp16":
            converted, metadata = _to_fp16(graph)
        else:
            converted, metadata = _to_int8(graph, inputs, config.quantize or Quantize(), out)
    except CalibrationError as error:
        raise BadInput(error.what, error.why, error.fix) from error
    graph_facts.strip(converted)
    onnx.save(converted, str(out / GRAPH_FILE))
    return {"precision": config.precision, **metadata}


def _to_int8(graph: Any, inputs: Inputs, settings: Quantize, out: Path) -> tuple[Any, dict[str, Any]]:
    from calibration import calibrate, quantize

    count = inputs.sources.calib.count
    total = settings.max_samples if count is None else min(count, settings.max_samples)
    scales = calibrate(
        graph,
        _samples(inputs, settings.max_samples),
        observer=settings.observer,
        percentile=settings.percentile,
        progress=lambda done: inputs.tick(done, total),
    )
    scales.save(out / SCALES_FILE)
    quantized = quantize(graph, scales)
    return quantized.model, {
        "calibrator": settings.observer,
        "samples": scales.samples,
        "report": asdict(quantized.report),
    }


def _to_fp16(graph: Any) -> tuple[Any, dict[str, Any]]:
    from calibration import to_fp16

    converted, report = to_fp16(graph)
    return converted, {"calibrator": None, "samples": 0, "report": asdict(report)}


def _samples(inputs: Inputs, limit: int) -> Iterator[Arrays]:
    """Calibration samples as batches of one, so that texts are never padded."""
    for batch in inputs.sources.calib.take(limit).batches(1):
        yield batch.inputs
