"""Activation functions that are flat at their ends: their inputs get finer integers, their results stay."""

from __future__ import annotations

import math

import numpy as np
import pytest
from graphs import build, run
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper

from calibration import calibrate, prepare, quantize, sqnr_db
from calibration.graph import Index
from calibration.saturation import useful_range, within

SIXTH = 1 / 6
HARD_SIGMOID = helper.make_node("HardSigmoid", ["y"], ["gate"], alpha=SIXTH, beta=0.5)


def make_gated(*activation: object, opset: int = 18) -> ModelProto:
    """A convolution, an activation from ``y`` to ``z``, and another convolution."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "first"], ["y"], name="first"),
        *activation,
        helper.make_node("Conv", ["z", "second"], ["out"], name="second"),
    ]
    constants = {
        "first": rng.normal(0, 2, (8, 3, 1, 1)).astype(np.float32),
        "second": rng.normal(0, 1, (4, 8, 1, 1)).astype(np.float32),
    }
    inputs = {"x": (TensorProto.FLOAT, ["n", 3, 6, 6])}
    return prepare(build(nodes, inputs, {"out": ["n", 4, 6, 6]}, constants, opset))


CASES = {
    "HardSwish": ((helper.make_node("HardSwish", ["y"], ["z"]),), (-3.0, math.inf)),
    "HardSigmoid": ((helper.make_node("HardSigmoid", ["y"], ["z"], alpha=SIXTH, beta=0.5),), (-3.0, 3.0)),
    "default alpha": ((helper.make_node("HardSigmoid", ["y"], ["z"]),), (-2.5, 2.5)),
    "gate": ((HARD_SIGMOID, helper.make_node("Mul", ["y", "gate"], ["z"])), (-3.0, math.inf)),
    "gate first": ((HARD_SIGMOID, helper.make_node("Mul", ["gate", "y"], ["z"])), (-3.0, math.inf)),
    "square": ((helper.make_node("Mul", ["y", "y"], ["z"]),), (-math.inf, math.inf)),
    "falling": ((helper.make_node("HardSigmoid", ["y"], ["z"], alpha=-1.0),), (-math.inf, math.inf)),
    "another reader": (
        (HARD_SIGMOID, helper.make_node("Add", ["y", "gate"], ["z"])), (-math.inf, math.inf)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_only_what_every_reader_ignores_is_cut_off(name: str) -> None:
    """The useful range ends where all readers are flat, and nowhere where one of them is not."""
    activation, expected = CASES[name]
    assert useful_range("y", Index(make_gated(*activation))) == pytest.approx(expected, rel=1e-6)


def test_what_the_graph_returns_is_whole() -> None:
    """A tensor that is also an output keeps its range."""
    model = make_gated(*CASES["HardSwish"][0])
    model.graph.output.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, None))
    assert useful_range("y", Index(model)) == (-math.inf, math.inf)


@given(st.floats(-50, 50, width=32), st.floats(0, 50, width=32))
def test_a_range_stays_a_range(lo: float, width: float) -> None:
    """Its ends stay in order and inside, also where all values lie on a flat side."""
    low, high = within((lo, lo + width), (-3.0, 3.0))
    assert -3.0 <= low <= high <= 3.0


@pytest.mark.parametrize("name", ["HardSwish", "gate"])
def test_the_steps_become_finer(name: str) -> None:
    """The scale covers what is told apart, what was seen is still written down, and INT8 comes closer."""
    model = make_gated(*CASES[name][0])
    x = np.random.default_rng(1).normal(0, 2, (32, 3, 6, 6)).astype(np.float32)
    scales = calibrate(model, [{"x": x}], observer="minmax")
    found = scales.tensors["y"]
    assert (found.lo, found.min < -6, found.hi == found.max) == (pytest.approx(-3, rel=1e-6), True, True)
    whole = scales.tensors | {"y": type(found)(found.min, found.max, found.min, found.max, found.elements)}
    coarse = type(scales)(scales.observer, scales.settings, scales.samples, whole, scales.macs)
    expected = run(model, {"x": x})
    fine_db, coarse_db = (
        sqnr_db(expected, run(quantize(model, s).model, {"x": x})) for s in (scales, coarse)
    )
    assert fine_db > coarse_db + 1
