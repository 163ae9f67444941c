"""Sparing: a layer that hurts much and computes little stays in float, and no other does."""

from __future__ import annotations

import numpy as np
from graphs import build
from onnx import ModelProto, TensorProto, helper

from calibration import Options, choose
from calibration.methods.sparing import MAX_MACS_FRACTION

OPTIONS = Options(methods=("sparing", "rounding", "bias_correction"), threads=1)


def make_stack(outlier: float, width: int = 128, depth: int = 1) -> ModelProto:
    """Products in a row; the last is small, and an outlier that it hardly weighs is among what it reads."""
    rng = np.random.default_rng(0)
    sizes = [(32, width), *[(width, width)] * depth, (width, 2)]
    weights = {
        f"w{i}": (rng.normal(0, 1, size) * np.sqrt(2 / size[0])).astype(np.float32)
        for i, size in enumerate(sizes)
    }
    weights[f"w{depth}"][:, 0] *= outlier
    weights[f"w{depth + 1}"][0] /= outlier
    nodes = []
    for i in range(depth + 1):
        nodes.append(helper.make_node("MatMul", [f"r{i}" if i else "x", f"w{i}"], [f"a{i}"], name=f"p{i}"))
        nodes.append(helper.make_node("Relu", [f"a{i}"], [f"r{i + 1}"]))
    nodes.append(helper.make_node("MatMul", [f"r{depth + 1}", f"w{depth + 1}"], ["y"], name="head"))
    return build(nodes, {"x": (TensorProto.FLOAT, ["n", 32])}, {"y": ["n", 2]}, weights)


def rows(count: int, seed: int) -> list[dict[str, np.ndarray]]:
    values = np.random.default_rng(seed).normal(0, 1, (count, 32)).astype(np.float32)
    return [{"x": row[None]} for row in values]


def test_a_harmful_small_layer_is_spared() -> None:
    """It brings many decibels, costs at most a fiftieth of the work, and the report names the layer."""
    chosen = choose(make_stack(outlier=200.0), rows(64, 1), rows(32, 2), OPTIONS)
    assert chosen.spared == ("head",)
    assert "sparing" in chosen.methods
    assert chosen.quantized.report.kept_float == {"head": "excluded"}
    assert (chosen.quantized.report.int8_macs_fraction or 0) >= 1 - MAX_MACS_FRACTION
    gain = next(attempt.gain for attempt in chosen.attempts if attempt.name == "sparing")
    assert gain is not None
    assert gain > 6


def test_a_layer_that_does_no_harm_is_not() -> None:
    """Where the noise is spread as the work is, everything stays in int8."""
    chosen = choose(make_stack(outlier=1.0, depth=16), rows(64, 1), rows(32, 2), OPTIONS)
    assert chosen.spared == ()
    assert chosen.quantized.report.int8_macs_fraction == 1.0


def test_large_layers_are_never_spared() -> None:
    """A layer with more of the work than the limit stays in int8, whatever its harm."""
    chosen = choose(make_stack(outlier=200.0, width=8), rows(64, 1), rows(32, 2), OPTIONS)
    assert chosen.spared == ()
