"""The arithmetic of linear quantization: real = (integer - zero_point) * scale.

Every emission takes its scales from these functions, so that they mean the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
_Number = TypeVar("_Number", bound=np.generic)

#: The smallest scale given out: a bias has scale activation * weight, which must stay a normal float32.
MIN_SCALE = float(2.0**-60)
#: The scale of a tensor that was zero throughout: zero stays exact, and no division by zero can follow.
ZERO_TENSOR_SCALE = 1.0
#: Biases are kept within this magnitude in their int32, which leaves room for the accumulated products.
MAX_BIAS = 2**30


@dataclass(frozen=True)
class Affine:
    """How one tensor is quantized.

    Attributes:
        scale: real size of one step; a scalar array, or one value a channel.
        zero_point: the integer that means 0.0; its dtype (uint8, int8, int32) is the quantized type.
        axis: the channel axis where ``scale`` has one value a channel; None: one scale for all.
    """

    scale: Floats
    zero_point: npt.NDArray[np.integer]
    axis: int | None = None


def asymmetric_u8(lo: float, hi: float) -> Affine:
    """uint8 over the range [lo, hi], widened to hold zero.

    Zero is always an exact integer: padding and ReLU stay exact. A range of [0, 0] gets scale 1.
    """
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    if lo == hi:
        scale = ZERO_TENSOR_SCALE
    else:
        scale = max((hi - lo) / 255.0, MIN_SCALE)
    zero_point = int(np.clip(np.rint(-lo / scale), 0, 255))
    return Affine(np.array(scale, np.float32), np.array(zero_point, np.uint8))


def symmetric_s8(lo: float, hi: float) -> Affine:
    """int8 over [-a, a] with a the larger magnitude, zero point 0; -128 is not used by values in range."""
    bound = max(abs(lo), abs(hi))
    scale = ZERO_TENSOR_SCALE if bound == 0.0 else max(bound / 127.0, MIN_SCALE)
    return Affine(np.array(scale, np.float32), np.array(0, np.int8))


def weight_s8(
    weight: Floats,
    axis: int | None,
    *,
    levels: int = 127,
    bias: Floats | None = None,
    input_scale: float | None = None,
) -> Affine:
    """Symmetric int8 for a weight, one scale for each output channel.

    Args:
        weight: the values.
        axis: the axis of the output channels; None: one scale for the whole tensor.
        levels: largest integer used: 127, or 63 for processors whose u8 x s8 products saturate in 16 bits.
        bias: the bias that will be quantized with scale ``input_scale * weight scale``; a channel's
            scale is widened where that bias would leave int32 (an all-zero channel has no scale of its own).
        input_scale: scale of the activation that the weight multiplies; needed with ``bias``.

    Returns:
        Scales that are never zero: an all-zero channel without a bias gets 1.
    """
    magnitude = np.abs(weight).astype(np.float64)
    if axis is None:
        bound = np.asarray(magnitude.max(initial=0.0))
    else:
        others = tuple(i for i in range(weight.ndim) if i != axis)
        bound = magnitude.max(axis=others, initial=0.0)
    scale = bound / levels
    if bias is not None and input_scale is not None:
        fitting = np.abs(bias.astype(np.float64)) / (input_scale * MAX_BIAS)
        scale = np.maximum(scale, fitting if axis is not None else fitting.max(initial=0.0))
    scale = np.where(scale == 0.0, ZERO_TENSOR_SCALE, np.maximum(scale, MIN_SCALE))
    return Affine(scale.astype(np.float32), np.zeros(scale.shape, np.int8), axis)


def bias_s32(input_scale: Floats, weight: Affine) -> Affine:
    """int32 with scale ``input_scale * weight scale``: the unit of the accumulator."""
    scale = (input_scale.astype(np.float32) * weight.scale).astype(np.float32)
    return Affine(scale, np.zeros(scale.shape, np.int32), None if scale.ndim == 0 else 0)


def quantize(values: Floats, affine: Affine) -> npt.NDArray[np.integer]:
    """Round half to even and saturate, as ONNX QuantizeLinear does."""
    kind = np.iinfo(affine.zero_point.dtype)
    scale = spread(affine.scale, values.ndim, affine.axis).astype(np.float64)
    zero = spread(affine.zero_point, values.ndim, affine.axis).astype(np.float64)
    steps = np.rint(values / scale) + zero
    return np.clip(steps, kind.min, kind.max).astype(affine.zero_point.dtype)


def dequantize(values: npt.NDArray[np.integer], affine: Affine) -> Floats:
    """The real numbers that the integers mean."""
    scale = spread(affine.scale, values.ndim, affine.axis).astype(np.float32)
    zero = spread(affine.zero_point, values.ndim, affine.axis).astype(np.int64)
    real: Floats = (values.astype(np.int64) - zero).astype(np.float32) * scale
    return real


def spread(per_channel: npt.NDArray[_Number], rank: int, axis: int | None) -> npt.NDArray[_Number]:
    """Reshape one value a channel so that it broadcasts along ``axis``."""
    if axis is None or per_channel.ndim == 0:
        return per_channel
    return per_channel.reshape([-1 if i == axis else 1 for i in range(rank)])
