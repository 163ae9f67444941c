"""Learned rounding: integers that the Q/DQ graph keeps, and smaller errors of layers."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from graphs import Array, build, run
from hard_graphs import make_uneven_cnn
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper

from calibration import Scales, calibrate, prepare, quantize
from calibration.graph import Index, array
from calibration.methods.layers import to_groups
from calibration.methods.patches import patches
from calibration.methods.rounding import Quantization, descend, round_weights
from calibration.placement import place
from calibration.targets import TARGETS


def _quantization(model: ModelProto, scales: Scales, target: str = "onnxruntime") -> Quantization:
    runtime = TARGETS[target]
    return Quantization(runtime, scales, place(model, runtime).tensors, 127)


def _error(integers: Array, wanted: Array, moments: Array) -> float:
    difference = integers - wanted
    return float(np.einsum("goi,gij,goj->", difference, moments, difference))


def _moments(rng: np.random.Generator, groups: int, inputs: int) -> Any:
    x = rng.normal(1, 1, (groups, 200, inputs)).astype(np.float32)
    return np.swapaxes(x, 1, 2) @ x / 200


@given(seed=st.integers(0, 10_000), groups=st.integers(1, 4), inputs=st.integers(2, 90))
@settings(max_examples=40, deadline=None)
def test_descent_never_does_worse_than_the_nearest(seed: int, groups: int, inputs: int) -> None:
    """Integers next to the weights, within the levels, with no larger error; the largest weight stays."""
    rng = np.random.default_rng(seed)
    wanted = rng.uniform(-127, 127, (groups, 3, inputs)).astype(np.float32)
    moments = _moments(rng, groups, inputs)
    chosen = descend(wanted, moments, 127)
    nearest = np.clip(np.rint(wanted), -127, 127)
    assert np.array_equal(chosen, np.rint(chosen))
    assert np.abs(chosen - wanted).max() <= 1.0
    assert np.abs(chosen).max() <= 127
    assert _error(chosen, wanted, moments) <= _error(nearest, wanted, moments) * (1 + 1e-4)
    largest = np.abs(wanted).argmax(axis=2)[..., None]
    kept = (np.take_along_axis(a, largest, axis=2) for a in (chosen, nearest))
    assert np.array_equal(*kept)


def test_descent_comes_close_to_the_best_choice() -> None:
    """On weights few enough to try every choice, at least half of what can be gained is gained."""
    rng = np.random.default_rng(0)
    gained = possible = 0.0
    for _ in range(20):
        wanted = rng.uniform(-100, 100, (1, 1, 8)).astype(np.float32)
        wanted[0, 0, 0] = 127.0
        moments = _moments(rng, 1, 8)
        choices = itertools.product(*zip(np.floor(wanted[0, 0]), np.ceil(wanted[0, 0]), strict=True))
        best = min(_error(np.array(choice)[None, None], wanted, moments) for choice in choices)
        nearest = _error(np.rint(wanted), wanted, moments)
        gained += nearest - _error(descend(wanted, moments, 127), wanted, moments)
        possible += nearest - best
    assert gained > 0.5 * possible


@pytest.mark.parametrize(
    ("shape", "kernel", "attributes"),
    [
        ((2, 4, 7, 6), (6, 4, 3, 3), {"pads": [1, 0, 2, 1]}),
        ((1, 4, 9, 9), (4, 1, 3, 3), {"group": 4, "strides": [2, 2], "pads": [1, 1, 1, 1]}),
        ((1, 6, 9, 8), (4, 3, 2, 3), {"group": 2, "dilations": [2, 1]}),
        ((3, 2, 11), (5, 2, 4), {"strides": [3]}),
    ],
)
def test_patches_are_what_the_convolution_multiplies(
    shape: tuple[int, ...], kernel: tuple[int, ...], attributes: dict[str, Any]
) -> None:
    """Patches times the grouped weight are the convolution's outputs, for any borders, steps and groups."""
    rng = np.random.default_rng(1)
    x, w = rng.normal(0, 1, shape).astype(np.float32), rng.normal(0, 1, kernel).astype(np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="conv", **attributes)
    free: list[str | int] = ["n", *shape[1:]]
    model = build([node], {"x": (TensorProto.FLOAT, free)}, {"y": [None] * len(shape)}, {"w": w})  # type: ignore[dict-item,list-item]
    want = np.moveaxis(run(model, {"x": x})[0], 1, -1).reshape(-1, kernel[0])
    grouped = to_groups(node, w)
    cut = patches(node, x, kernel[2:], 10_000, rng)
    found = cut @ np.swapaxes(grouped.reshape(grouped.shape[0], grouped.shape[1], -1), 1, 2)
    assert np.allclose(np.moveaxis(found, 0, 1).reshape(len(want), -1), want, atol=1e-4)
    assert patches(node, x, kernel[2:], 3, rng).shape[1] == 3


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("weight_bits", [7, 8])
def test_quantize_finds_the_chosen_integers(target: str, weight_bits: int) -> None:
    """Rounded weights are whole steps of the scale that ``quantize`` gives them."""
    rng = np.random.default_rng(2)
    model = prepare(make_uneven_cnn(spread=3.0))
    images = rng.normal(0, 1, (16, 3, 8, 8)).astype(np.float32)
    scales = calibrate(model, [{"image": images}])
    levels = {7: 63, 8: 127}[weight_bits]
    runtime = TARGETS[target]
    quantization = Quantization(runtime, scales, place(model, runtime).tensors, levels)
    layers = place(model, runtime).quantized
    rounded = round_weights(model, layers, [{"image": i[None]} for i in images], quantization, threads=1)
    assert rounded is not None
    before, after = _weights(model), _weights(rounded)
    moved = sum(not np.array_equal(before[name], after[name]) for name in before)
    assert moved >= 3
    int8 = quantize(rounded, scales, target, weight_bits=weight_bits).model
    for name, weight in _dequantized(int8).items():
        assert np.allclose(weight, after[name], rtol=1e-6, atol=0)


def test_rounding_lowers_the_error_of_a_layer() -> None:
    """On inputs that hang together the error of the layer's output on other data falls by a third."""
    rng = np.random.default_rng(3)
    mixing = rng.normal(0, 1, (6, 48))
    x = np.maximum(rng.normal(0, 1, (600, 6)) @ mixing, 0).astype(np.float32)
    weight = rng.normal(0, 1, (48, 16)).astype(np.float32)
    model = prepare(
        build(
            [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
            {"x": (TensorProto.FLOAT, ["n", 48])},
            {"y": ["n", 16]},
            {"w": weight},
        )
    )
    scales = calibrate(model, [{"x": x[:500]}])
    rows = [{"x": row[None]} for row in x[:500]]
    rounded = round_weights(model, ("product",), rows, _quantization(model, scales), threads=1)
    assert rounded is not None
    nearest = _dequantized(quantize(model, scales).model)["product"]
    errors = [np.square(x[500:] @ (w - weight)).mean() for w in (nearest, _weights(rounded)["product"])]
    assert errors[1] < 0.66 * errors[0]


def test_no_time_leaves_the_weights_alone() -> None:
    """Where the time is up before it begins, nothing is changed."""
    model = prepare(make_uneven_cnn(channels=8))
    image = np.random.default_rng(0).normal(0, 1, (4, 3, 8, 8)).astype(np.float32)
    quantization = _quantization(model, calibrate(model, [{"image": image}]))
    late = round_weights(
        model, ("stem",), [{"image": image}], quantization, threads=1, out_of_time=lambda: True
    )
    assert late is None


def _weights(model: ModelProto) -> dict[str, Any]:
    constants = Index(model).constants
    return {
        node.name: array(constants[node.input[1]])
        for node in model.graph.node
        if node.op_type in ("Conv", "MatMul", "Gemm")
    }


def _dequantized(model: ModelProto) -> dict[str, Any]:
    """The weights that the layers of a Q/DQ graph see."""
    index = Index(model)
    found = {}
    for node in model.graph.node:
        source = index.producer.get(node.input[1]) if len(node.input) > 1 else None
        if node.op_type in ("Conv", "MatMul", "Gemm") and source is not None:
            integers, scale = (array(index.constants[name]) for name in source.input[:2])
            axis = next(a.i for a in source.attribute if a.name == "axis")
            shape = [-1 if i == axis else 1 for i in range(integers.ndim)]
            found[node.name] = integers.astype(np.float32) * scale.reshape(shape)
    return found
