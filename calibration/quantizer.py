"""From a float model and its scales to an INT8 graph, with an account of what was done."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from onnx import ModelProto

from calibration.errors import CalibrationError, NothingToQuantize
from calibration.fp16 import halve
from calibration.graph import LINEAR
from calibration.layouts import Placement
from calibration.placement import place
from calibration.prepare import prepare
from calibration.qdq import write_qdq
from calibration.scales import Scales
from calibration.storage import Source, infer_shapes
from calibration.tables import store_tables
from calibration.targets import target_named

#: Largest integer in a weight, by bits: 7 bits keep u8 x s8 pairs inside the 16-bit sums of processors
#: that have neither VNNI nor dot-product instructions.
WEIGHT_LEVELS = {8: 127, 7: 63}


@dataclass(frozen=True)
class Report:
    """What was quantized.

    Attributes:
        target: the runtime.
        quantized: names of the linear operators in int8.
        joined: names of the other operators in int8.
        tables: names of the Gather operators whose table is stored in int8; they compute in float.
        kept_float: linear and recurrent operators in float, each with the reason.
        float_operators: how many operators stay in float, linear ones included.
        int8_macs_fraction: share of the multiply-accumulates in int8; None where the model has none.
    """

    target: str
    quantized: tuple[str, ...]
    joined: tuple[str, ...]
    tables: tuple[str, ...]
    kept_float: Mapping[str, str]
    float_operators: int
    int8_macs_fraction: float | None


@dataclass(frozen=True)
class Quantized:
    """An INT8 graph and its report."""

    model: ModelProto
    report: Report


def quantize(
    model: Source,
    scales: Scales,
    target: str = "onnxruntime",
    *,
    exclude: Collection[str] = (),
    weight_bits: int = 8,
) -> Quantized:
    """Write a static Q/DQ graph; weights are int8 with a scale for each output channel.

    For ``onnxruntime`` activations are uint8 and biases int32; for ``tensorrt`` activations are symmetric
    int8 and biases stay float.

    The same model and scales give the same bytes.

    Args:
        model: the model that was calibrated, or its file.
        scales: from ``calibrate``.
        target: ``onnxruntime`` (CPU), ``tensorrt`` (10 and newer, and TensorRT-RTX), ``tensorrt-fp16``, the
            same for strongly typed networks: what stays in float is float16 where the values fit, or
            ``tensorrt-8`` (8.5 and 8.6): weights are float in the file and rounded by a pair of their own.
        exclude: names of linear operators, and of Gathers from tables, to keep in float.
        weight_bits: 8, or 7 for x86 processors without VNNI, whose 16-bit sums would saturate.

    Raises:
        NothingToQuantize: every operator has to stay in float.
        CalibrationError: the scales are of another model, ``exclude`` or ``target`` or ``weight_bits`` is
            unknown, or the model is quantized already.
    """
    if weight_bits not in WEIGHT_LEVELS:
        raise CalibrationError(
            f"weights of {weight_bits} bits are not supported",
            "integer kernels take int8 weights; 7 bits leave room in 16-bit sums",
            "choose 8, or 7 for x86 processors without VNNI",
        )
    prepared = prepare(model)
    runtime = target_named(target)
    placement = place(prepared, runtime, exclude)
    _check(placement, scales)
    result = write_qdq(prepared, scales, placement, runtime, weight_levels=WEIGHT_LEVELS[weight_bits])
    if runtime.half_floats:
        infer_shapes(result)
        halve(result, scales)
    tables = store_tables(result, exclude) if runtime.integer_tables else ()
    return Quantized(result, _report(prepared, scales, placement, target, tables))


def _check(placement: Placement, scales: Scales) -> None:
    if not placement.quantized:
        reasons = sorted({f"{name}: {reason}" for name, reason in placement.kept_float.items()})
        raise NothingToQuantize(
            "nothing in the model can be quantized",
            "; ".join(reasons[:3]) or f"it has none of {', '.join(sorted(LINEAR))}",
            "keep the model in float; INT8 would only rename it",
        )
    missing = sorted(set(placement.tensors.values()) - set(scales.tensors))
    if missing:
        raise CalibrationError(
            "the scales do not belong to this model",
            f"they have no range for tensor {missing[0]!r}",
            "calibrate this model, and quantize the same file",
        )


def _report(
    model: ModelProto, scales: Scales, placement: Placement, target: str, tables: tuple[str, ...]
) -> Report:
    total = sum(scales.macs.values())
    in_int8 = sum(count for name, count in scales.macs.items() if name in placement.quantized)
    int8 = len(placement.quantized) + len(placement.joined)
    return Report(
        target=target,
        quantized=tuple(sorted(placement.quantized)),
        joined=tuple(sorted(placement.joined)),
        tables=tables,
        kept_float=dict(sorted(placement.kept_float.items())),
        float_operators=len(model.graph.node) - int8,
        int8_macs_fraction=in_int8 / total if total else None,
    )
