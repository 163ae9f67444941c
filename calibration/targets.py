"""What each runtime asks of a quantized graph. A new runtime is a new entry here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from calibration.affine import Affine, asymmetric_u8, symmetric_s8
from calibration.errors import CalibrationError


@dataclass(frozen=True)
class Target:
    """What a runtime asks of a quantized graph.

    Attributes:
        name: as the user gives it.
        linear: operator types with an integer kernel.
        activation: from a range to how an activation is quantized.
        ends_in_integers: whether an int8 operator has to be followed by a Q/DQ pair, or may return float.
        integer_bias: whether biases are int32 (else they stay float).
        quantizes_products: whether a MatMul of two activations is worth int8.
        shields_float_layers: whether float layers between int8 ones have to be hidden from the runtime.
        integer_tables: whether embedding tables may be int8.
        half_floats: whether what stays in float is float16.
        float_weights: whether weights are float in the file, with a Q/DQ pair behind them.
    """

    name: str
    linear: frozenset[str]
    activation: Callable[[float, float], Affine]
    ends_in_integers: bool
    integer_bias: bool
    quantizes_products: bool
    shields_float_layers: bool
    integer_tables: bool
    half_floats: bool = False
    float_weights: bool = False


_ONNXRUNTIME = Target(
    name="onnxruntime",
    linear=frozenset({"Conv", "MatMul", "Gemm"}),  # the CPU provider has no integer ConvTranspose
    activation=asymmetric_u8,
    ends_in_integers=True,
    integer_bias=True,
    quantizes_products=True,
    shields_float_layers=True,
    integer_tables=True,
)
#: From 10 on, and TensorRT-RTX.
_TENSORRT = Target(
    name="tensorrt",
    linear=frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm"}),
    activation=symmetric_s8,  # its quantization is symmetric only
    ends_in_integers=False,
    integer_bias=False,  # its parser refuses an int32 DequantizeLinear
    quantizes_products=False,  # it fuses attention in half precision
    shields_float_layers=False,
    integer_tables=False,  # its parser takes quantized constants only before a DequantizeLinear
)
#: For strongly typed networks, where the graph alone says what is in half precision. TensorRT-RTX builds for
#: Turing (SM75) only so: it has no float32 matrix products there.
_TENSORRT_FP16 = replace(_TENSORRT, name="tensorrt-fp16", half_floats=True)
#: 8.5.2 and 8.6.0 end some graphs with int8 constants in assertions of their own (``chooseHigherPrecision`` a
#: detector with two heads, ``convertMyelinWeightsToFp32`` a text encoder), and build them from float weights.
_TENSORRT_8 = replace(_TENSORRT, name="tensorrt-8", float_weights=True)

TARGETS: Mapping[str, Target] = {
    target.name: target for target in (_ONNXRUNTIME, _TENSORRT, _TENSORRT_FP16, _TENSORRT_8)
}


def target_named(name: str) -> Target:
    """Look a target up.

    Raises:
        CalibrationError: there is no such target.
    """
    if name in TARGETS:
        return TARGETS[name]
    raise CalibrationError(
        f"there is no target {name!r}",
        "a target is the runtime that the Q/DQ graph is made for",
        "choose one of: " + ", ".join(sorted(TARGETS)),
    )
