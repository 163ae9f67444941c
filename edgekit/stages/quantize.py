"""The graph in another precision: INT8 by static calibration, or FP16 by conversion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from edgekit.data import Dataset
from edgekit.errors import BadInput
from edgekit.measure import graph as graph_facts
from edgekit.profile import Profile
from edgekit.recipe import Quantize
from edgekit.stages.export import GRAPH_FILE
from edgekit.stages.registry import Inputs
from edgekit.tensors import Arrays

SCALES_FILE = "scales.json"
#: ``auto`` judges the observers on every so-manieth calibration sample, which it does not calibrate on.
_JUDGE_EVERY = 8
_MOST_JUDGES = 32
#: Samples that show the range of every tensor before a conversion to FP16.
_RANGE_SAMPLES = 64


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
            converted, metadata = _to_fp16(graph, inputs)
        else:
            converted, metadata = _to_int8(graph, inputs, config.quantize or Quantize(), out)
    except CalibrationError as error:
        raise BadInput(error.what, error.why, error.fix) from error
    graph_facts.strip(converted)
    onnx.save(converted, str(out / GRAPH_FILE))
    return {"precision": config.precision, **metadata}


def _to_int8(graph: Any, inputs: Inputs, settings: Quantize, out: Path) -> tuple[Any, dict[str, Any]]:
    from calibration import Options, calibrate, choose, quantize

    count = inputs.sources.calib.count
    total = settings.max_samples if count is None else min(count, settings.max_samples)

    def progress(done: int) -> None:
        inputs.tick(done, total)

    calib, judges = inputs.sources.calib.take(settings.max_samples), list[Arrays]()
    scores: dict[str, float] = {}
    if settings.observer == "auto":
        calib, held_out = calib.split(_JUDGE_EVERY)
        judges = list(_Rows(held_out.take(_MOST_JUDGES)))
    if judges:
        options = Options(percentile=settings.percentile)
        choice = choose(graph, _Rows(calib), judges, options, progress=progress)
        scales, quantized, scores = choice.scales, choice.quantized, dict(choice.scores)
    else:
        observer = "minmax" if settings.observer == "auto" else settings.observer
        scales = calibrate(
            graph, _Rows(calib), observer=observer, percentile=settings.percentile, progress=progress
        )
        quantized = quantize(graph, scales)
    scales.save(out / SCALES_FILE)
    return quantized.model, {
        "calibrator": scales.observer,
        "scores_sqnr_db": scores,
        "samples": scales.samples,
        "kept_high_precision": dict(quantized.report.kept_float),
        "report": asdict(quantized.report),
    }


def _to_fp16(graph: Any, inputs: Inputs) -> tuple[Any, dict[str, Any]]:
    """Convert; operators whose values leave float16's range on real samples stay in fp32."""
    from calibration import calibrate, to_fp16

    scales = calibrate(graph, _Rows(inputs.sources.calib.take(_RANGE_SAMPLES)), observer="minmax")
    converted, report = to_fp16(graph, scales)
    return converted, {
        "calibrator": None,
        "samples": scales.samples,
        "kept_high_precision": dict(report.kept),
        "report": asdict(report),
    }


@dataclass(frozen=True)
class _Rows:
    """Samples as batches of one, so that texts are never padded; they can be read again and again."""

    data: Dataset

    def __iter__(self) -> Iterator[Arrays]:
        return (batch.inputs for batch in self.data.batches(1))
