"""The arithmetic that every emission shares."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from calibration.affine import asymmetric_u8, bias_s32, dequantize, quantize, symmetric_s8, weight_s8

reals = st.floats(-1e6, 1e6, width=32)


@given(reals, reals)
def test_zero_is_exact(a: float, b: float) -> None:
    """Zero comes back as exactly zero from every uint8 range: padding and ReLU stay exact."""
    affine = asymmetric_u8(min(a, b), max(a, b))
    zero = np.zeros(1, np.float32)
    assert dequantize(quantize(zero, affine), affine)[0] == 0.0


@given(reals, reals, st.floats(0.0, 1.0))
def test_u8_error_is_at_most_one_step(a: float, b: float, where: float) -> None:
    """A value inside the range comes back within one step; half a step away from the ends."""
    lo, hi = min(a, b, 0.0), max(a, b, 0.0)
    affine = asymmetric_u8(lo, hi)
    value = np.array([lo + where * (hi - lo)], np.float32)
    error = abs(float(dequantize(quantize(value, affine), affine)[0]) - float(value[0]))
    assert error <= float(affine.scale) * 1.001 + 1e-30


@given(reals, reals)
def test_s8_is_symmetric_and_covers_the_range(a: float, b: float) -> None:
    """The symmetric range has zero point 0 and holds both ends within half a step."""
    affine = symmetric_s8(min(a, b), max(a, b))
    assert int(affine.zero_point) == 0
    ends = np.array([a, b], np.float32)
    error = np.abs(dequantize(quantize(ends, affine), affine) - ends).max()
    assert error <= float(affine.scale) * 0.501


@given(st.floats(0, 2.0**-100, width=32))
def test_scale_is_never_zero(tiny: float) -> None:
    """However small a tensor's values are, its scale is a positive normal number."""
    smallest_normal = np.finfo(np.float32).tiny
    for affine in (asymmetric_u8(-tiny, tiny), symmetric_s8(-tiny, tiny)):
        assert float(affine.scale) >= smallest_normal


def test_constant_tensors() -> None:
    """A tensor of one value gets a range from zero to it; a tensor of zeros gets scale 1."""
    assert float(asymmetric_u8(5.1, 5.1).scale) == np.float32(5.1 / 255)
    assert float(asymmetric_u8(0.0, 0.0).scale) == 1.0
    assert int(asymmetric_u8(-3.0, -3.0).zero_point) == 255


@given(hnp.arrays(np.float32, (5, 7), elements=st.floats(-100, 100, width=32)), st.sampled_from([0, 1, None]))
def test_weight_error_is_half_a_step_of_its_own_channel(weight: np.ndarray, axis: int | None) -> None:
    """Each weight comes back within half a step of its channel, and -128 is never used."""
    affine = weight_s8(weight, axis)
    integers = quantize(weight, affine)
    assert integers.min() >= -127
    steps = affine.scale if axis is None else np.expand_dims(affine.scale, 1 - axis)
    assert (np.abs(dequantize(integers, affine) - weight) <= steps * 0.501).all()


def test_seven_bit_weights_cannot_saturate_sixteen_bits() -> None:
    """With 63 levels a pair of u8 x s8 products fits the 16-bit sum of processors without VNNI."""
    weight = np.array([[-3.0, 2.0, 1.0]], np.float32)
    integers = quantize(weight, weight_s8(weight, 0, levels=63))
    assert np.abs(integers.astype(int)).max() == 63
    assert 2 * 255 * 63 < 2**15


@given(st.floats(-1e4, 1e4, width=32), st.floats(1e-3, 1e2))
def test_bias_of_an_all_zero_channel_survives(bias: float, input_scale: float) -> None:
    """An all-zero channel still adds its bias: the scale is widened instead of overflowing int32."""
    weight = np.zeros((1, 4), np.float32)
    biases = np.array([bias], np.float32)
    affine = weight_s8(weight, 0, bias=biases, input_scale=input_scale)
    unit = bias_s32(np.array(input_scale, np.float32), affine)
    back = dequantize(quantize(biases, unit), unit)
    np.testing.assert_allclose(back, biases, rtol=1e-5, atol=float(unit.scale[0]))
