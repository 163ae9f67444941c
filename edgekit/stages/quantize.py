"""The graph in another precision: INT8 by static calibration, or FP16 by conversion."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from edgekit.data import Dataset
from edgekit.errors import BadInput, NotPossible
from edgekit.measure import graph as graph_facts
from edgekit.measure.drop import Bound, Judge, can_judge, keep_within
from edgekit.profile import Profile
from edgekit.recipe import Quantize
from edgekit.stages.export import GRAPH_FILE
from edgekit.stages.registry import Inputs
from edgekit.tensors import Arrays

if TYPE_CHECKING:
    from calibration import Attempt, Choice

SCALES_FILE = "scales.json"
#: The float graph that the scales belong to, with the methods that helped.
FLOAT_FILE = "float.onnx"
#: Observers and methods are judged on every so-manieth calibration sample, which is not calibrated on.
_JUDGE_EVERY = 8
_MOST_JUDGES = 32
#: Calibration samples on which the contract's loss of the metric is checked.
_MOST_SCORED = 256
#: Samples that show the range of every tensor before a conversion to FP16.
_RANGE_SAMPLES = 64


class Config(BaseModel):
    """Settings of this stage.

    Attributes:
        precision: of the graph that is made.
        quantize: None where the precision needs none.
        bound: how much of the metric INT8 may lose; None: not asked.
        keep_float: whether builders need the float graph beside the INT8 one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    precision: Literal["int8", "fp16"]
    quantize: Quantize | None
    bound: Bound | None
    keep_float: bool = False


def run(inputs: Inputs, config: Config, profile: Profile, out: Path) -> Mapping[str, Any]:
    """Write the graph, and for INT8 the scales that it was made from.

    Raises:
        NotPossible: nothing in the graph can be computed in integers, or nothing is float32.
        BadInput: the calibration data does not suit the model.
    """
    import onnx

    from calibration import CalibrationError, NothingToQuantize

    graph = onnx.load(str(inputs.artifacts["graph"].path / GRAPH_FILE))
    try:
        if config.precision == "fp16":
            converted, metadata = _to_fp16(graph, inputs)
        else:
            converted, metadata = _to_int8(graph, inputs, config, profile, out)
    except NothingToQuantize as error:
        raise NotPossible(error.what, error.why, "choose --precision auto or fp32") from error
    except CalibrationError as error:
        raise BadInput(error.what, error.why, error.fix) from error
    graph_facts.strip(converted)
    onnx.save(converted, str(out / GRAPH_FILE))
    return {"precision": config.precision, **metadata}


def weight_bits(profile: Profile) -> int:
    """Bits of INT8 weights: 7 where the processor's 16-bit sums would saturate."""
    saturates = profile.runtime.name == "onnxruntime" and profile.accelerator.saturating_int8
    return 7 if saturates else 8


def _to_int8(
    graph: Any, inputs: Inputs, config: Config, profile: Profile, out: Path
) -> tuple[Any, dict[str, Any]]:
    import onnx

    settings, bits = config.quantize or Quantize(), weight_bits(profile)
    data = inputs.sources.calib.take(settings.max_samples)
    rest, judges = _split(data, settings)
    choice = _choose(graph, rest, judges, settings, bits, inputs)
    choice.scales.save(out / SCALES_FILE)
    if config.keep_float:
        onnx.save(choice.model, str(out / FLOAT_FILE))
    quantized, drop = choice.quantized, None
    reasons = dict.fromkeys(choice.spared, "it hurts int8 much and computes little")
    if config.bound is not None and can_judge(config.bound.metric, data):
        original = inputs.artifacts["original"].path / GRAPH_FILE
        shown = data.take(_MOST_SCORED)
        judge = Judge(
            config.bound.metric, original, shown, inputs.sources.model, inputs.sources.behind, inputs.tick
        )
        kept = keep_within(judge, config.bound, choice, judges, bits, settings.max_kept_float)
        quantized, drop = kept.quantized, kept.facts
        reasons |= dict.fromkeys(kept.layers, "in int8 it costs more of the metric than the contract allows")
    report = quantized.report
    return quantized.model, {
        "calibrator": choice.observer,
        "samples": choice.scales.samples,
        "kept_high_precision": dict(report.kept_float) | reasons,
        "in_float": sorted(reasons),
        "calibration": {
            "observer": choice.observer,
            "methods": list(choice.methods),
            "samples": choice.scales.samples,
            "weight_bits": bits,
            "attempts": [_attempt(attempt) for attempt in choice.attempts],
            "int8_operators": len(report.quantized) + len(report.joined),
            "float_operators": report.float_operators,
            "int8_macs_fraction": report.int8_macs_fraction,
            "drop": drop,
        },
        "report": asdict(report),
    }


def _split(data: Dataset, settings: Quantize) -> tuple[Dataset, list[Arrays]]:
    """What is calibrated on, and the samples that judge the candidates; none where there is no choice."""
    if settings.observer != "auto" and not settings.methods:
        return data, []
    rest, held_out = data.split(_JUDGE_EVERY)
    return rest, list(_Rows(held_out.take(_MOST_JUDGES)))


def _choose(
    graph: Any, data: Dataset, judges: list[Arrays], settings: Quantize, bits: int, inputs: Inputs
) -> Choice:
    """Try the recipe's observers and methods; without judges its first observer is taken as it is."""
    from calibration import Options, choose
    from calibration.observers import OBSERVERS

    observers = OBSERVERS if settings.observer == "auto" else (settings.observer,)
    options = Options(
        observers=observers if judges else observers[:1],
        methods=settings.methods if judges else (),
        percentile=settings.percentile,
        weight_bits=bits,
        budget_s=settings.method_budget_s,
    )

    def progress(done: int) -> None:
        inputs.tick(done, max(done, data.count or 0))

    return choose(graph, _Rows(data), judges or list(_Rows(data.take(1))), options, progress=progress)


def _attempt(attempt: Attempt) -> dict[str, Any]:
    """JSON has no infinity: an INT8 graph without any error has no score."""
    score = attempt.score if attempt.score is not None and math.isfinite(attempt.score) else None
    return {
        "name": attempt.name,
        "sqnr_db": score,
        "gain_db": attempt.gain,
        "kept": attempt.kept,
        "why": attempt.why,
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
        "in_float": sorted(report.kept),
        "report": asdict(report),
    }


@dataclass(frozen=True)
class _Rows:
    """Samples as batches of one, so that texts are never padded; they can be read again and again."""

    data: Dataset

    def __iter__(self) -> Iterator[Arrays]:
        return (batch.inputs for batch in self.data.batches(1))
