"""Emissions for TensorRT: Q/DQ placement, the calibration cache, and that both mean the same numbers."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from graphs import build, make_residual_cnn, run
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from calibration import CalibrationError, Scales, calibrate, prepare, quantize, sqnr_db
from calibration.affine import symmetric_s8
from calibration.tensorrt_cache import layer_precisions, read_cache, write_cache


@pytest.fixture(scope="module")
def cnn_scales(residual_cnn: ModelProto, images: np.ndarray) -> Scales:
    return calibrate(residual_cnn, [{"image": images}])


def producers(model: ModelProto) -> dict[str, NodeProto]:
    return {name: node for node in model.graph.node for name in node.output}


def test_everything_is_symmetric_and_biases_are_float(residual_cnn: ModelProto, cnn_scales: Scales) -> None:
    """Every zero point is int8 zero, no bias is quantized, and weights have a scale for each channel."""
    int8 = quantize(residual_cnn, cnn_scales, "tensorrt").model
    onnx.checker.check_model(int8, full_check=True)
    constants = {t.name: numpy_helper.to_array(t) for t in int8.graph.initializer}
    made = producers(int8)
    for node in int8.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero_point = constants[node.input[2]]
            assert zero_point.dtype == np.int8
            assert not zero_point.any()
        if node.op_type in ("Conv", "Gemm"):
            assert constants[node.input[2]].dtype == np.float32
            assert constants[made[node.input[1]].input[1]].ndim == 1


def test_residual_add_fuses_with_its_convolution(residual_cnn: ModelProto, cnn_scales: Scales) -> None:
    """The Add reads the convolution directly and the shortcut through a Q/DQ pair."""
    int8 = quantize(residual_cnn, cnn_scales, "tensorrt").model
    made = producers(int8)
    add = next(node for node in int8.graph.node if node.op_type == "Add")
    assert Counter(made[name].op_type for name in add.input) == {"Conv": 1, "DequantizeLinear": 1}


def test_concatenated_tensors_share_a_scale(images: np.ndarray) -> None:
    """Two convolutions whose results are concatenated and read by a third share the scale of the whole."""
    rng = np.random.default_rng(0)
    model = build(
        [
            helper.make_node("Conv", ["image", "w1"], ["a"], name="first"),
            helper.make_node("Conv", ["image", "w2"], ["b"], name="second"),
            helper.make_node("Conv", ["a", "w3"], ["c"], name="third"),
            helper.make_node("Concat", ["a", "b"], ["ab"], name="join", axis=1),
            helper.make_node("Conv", ["ab", "w4"], ["d"], name="last"),
        ],
        {"image": (TensorProto.FLOAT, ["n", 3, 8, 8])},
        {"c": ["n", 2, 8, 8], "d": ["n", 2, 8, 8]},
        {
            "w1": rng.normal(0, 1, (4, 3, 1, 1)).astype(np.float32),
            "w2": rng.normal(0, 9, (4, 3, 1, 1)).astype(np.float32),
            "w3": rng.normal(0, 1, (2, 4, 1, 1)).astype(np.float32),
            "w4": rng.normal(0, 1, (2, 8, 1, 1)).astype(np.float32),
        },
    )
    scales = calibrate(model, [{"image": images}])
    int8 = quantize(model, scales, "tensorrt").model
    quantizers = {
        node.input[0]: node.input[1] for node in int8.graph.node if node.op_type == "QuantizeLinear"
    }
    assert quantizers["a"] == quantizers["b"] == quantizers["ab"]


def test_a_concat_that_only_int8_reads_joins_integers_alone(images: np.ndarray) -> None:
    """What was resized in float is quantized before it is joined with int8, to the same values as after it.

    TensorRT 8.5.2 built no engine of the detection example while one side of its Concat was float.
    """
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["image", "w1"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["r"], name="relu"),
        helper.make_node("MaxPool", ["r"], ["small"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Resize", ["small", "", "twice"], ["up"], name="resize", mode="nearest"),
        helper.make_node("Concat", ["r", "up"], ["ab"], name="join", axis=1),
        helper.make_node("Conv", ["ab", "w2"], ["c"], name="last"),
        helper.make_node("Conv", ["r", "w3"], ["d"], name="other"),
    ]
    model = build(
        nodes,
        {"image": (TensorProto.FLOAT, ["n", 3, 8, 8])},
        {"c": ["n", 2, 8, 8], "d": ["n", 2, 8, 8]},
        {
            "w1": rng.normal(0, 1, (4, 3, 1, 1)).astype(np.float32),
            "w2": rng.normal(0, 1, (2, 8, 1, 1)).astype(np.float32),
            "w3": rng.normal(0, 1, (2, 4, 1, 1)).astype(np.float32),
            "twice": np.array([1, 1, 2, 2], np.float32),
        },
    )
    scales = calibrate(model, [{"image": images}])
    int8 = quantize(model, scales, "tensorrt").model
    made = producers(int8)
    (concat,) = (node for node in int8.graph.node if node.op_type == "Concat")
    pairs = [made[name] for name in (*concat.input, made["ab_quantized"].output[0])]
    assert [pair.op_type for pair in pairs] == ["DequantizeLinear", "DequantizeLinear", "QuantizeLinear"]
    assert len({pair.input[1] for pair in pairs}) == 1
    (up,) = (node for node in int8.graph.node if node.op_type == "QuantizeLinear" and node.input[0] == "up")
    assert made["up"].op_type == "Resize"
    concat.input[1] = up.input[0]
    with_pair, without = quantize(model, scales, "tensorrt").model, int8
    for one, other in zip(run(with_pair, {"image": images}), run(without, {"image": images}), strict=True):
        np.testing.assert_array_equal(one, other)


def test_outputs_are_close_to_float(residual_cnn: ModelProto, cnn_scales: Scales, images: np.ndarray) -> None:
    """The symmetric graph, run by ONNX Runtime, stays above 25 dB."""
    int8 = quantize(residual_cnn, cnn_scales, "tensorrt").model
    assert sqnr_db(run(residual_cnn, {"image": images}), run(int8, {"image": images})) > 25


def test_products_of_activations_stay_in_float(attention: ModelProto, tokens: dict[str, np.ndarray]) -> None:
    """TensorRT fuses attention in half precision, so only products with weights are quantized."""
    report = quantize(attention, calibrate(attention, [tokens]), "tensorrt").report
    assert report.quantized == ("key", "output", "query", "value")


def test_cache_holds_the_scales_of_the_graph(residual_cnn: ModelProto, cnn_scales: Scales) -> None:
    """Cache and Q/DQ graph mean the same numbers: every scale of the graph is in the cache, bit for bit."""
    cache = read_cache(write_cache(residual_cnn, cnn_scales))
    int8 = quantize(residual_cnn, cnn_scales, "tensorrt").model
    constants = {t.name: numpy_helper.to_array(t) for t in int8.graph.initializer}
    quantizers = [node for node in int8.graph.node if node.op_type == "QuantizeLinear"]
    assert quantizers
    for node in quantizers:
        assert np.float32(cache[node.input[0]]) == constants[node.input[1]]


def test_cache_format() -> None:
    """A cache is written in the documented text: the version line, then big-endian hex floats by name."""
    model = build(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        {"x": (TensorProto.FLOAT, ["n", 2])},
        {"y": ["n", 2]},
        {"w": np.eye(2, dtype=np.float32)},
    )
    scales = calibrate(model, [{"x": np.array([[-127.0, 63.5]], np.float32)}])
    assert write_cache(model, scales) == "TRT-8502-EntropyCalibration2\nx: 3f800000\ny: 3f800000\n"
    assert write_cache(model, scales, (8, 6, 1)).startswith("TRT-8601-")
    assert write_cache(model, scales, (10, 3, 0)).startswith("TRT-100300-")
    assert symmetric_s8(-127.0, 63.5).scale == 1.0


@pytest.mark.parametrize(
    "text", ["", "x: 3f800000", "TRT-8502-EntropyCalibration2\nx 3f800000", "TRT-1\nx: 3f"]
)
def test_malformed_caches_are_refused(text: str) -> None:
    """What is not a cache is refused with the line that is wrong."""
    with pytest.raises(CalibrationError, match="not a TensorRT calibration cache"):
        read_cache(text)


def test_layer_precisions_follow_the_same_placement(residual_cnn: ModelProto, cnn_scales: Scales) -> None:
    """The precision list has every operator once, with the Q/DQ graph's layers in int8."""
    found = layer_precisions(residual_cnn, cnn_scales, exclude=["stem"])
    prepared = prepare(residual_cnn).graph.node
    assert set(found) == {node.name for node in prepared}
    linear = {node.name for node in prepared if node.op_type in ("Conv", "Gemm", "Add")}
    assert {name for name, kind in found.items() if kind == "int8" and name in linear} == {
        "first",
        "second",
        "third",
        "fc",
        "residual",
    }
    assert found["stem"] == "fp16"


def test_what_carries_integers_is_not_held_to_fp16() -> None:
    """A ReLU or MaxPool between int8 layers is free to be int8; before a layer in float it is fp16.

    Held to fp16, each of them kept the convolution before it out of int8 (seen with TensorRT 8.5.2).
    """
    kernel = np.random.default_rng(0).normal(size=(4, 4, 3, 3)).astype(np.float32)
    pads = {"pads": [1, 1, 1, 1]}
    model = build(
        [
            helper.make_node("Conv", ["x", "w1"], ["a"], name="first", **pads),
            helper.make_node("Relu", ["a"], ["b"], name="relu"),
            helper.make_node("MaxPool", ["b"], ["c"], name="pool", kernel_shape=[2, 2]),
            helper.make_node("Conv", ["c", "w2"], ["d"], name="second", **pads),
            helper.make_node("Sigmoid", ["d"], ["e"], name="sigmoid"),
            helper.make_node("Conv", ["e", "w3"], ["f"], name="third", **pads),
            helper.make_node("Relu", ["f"], ["g"], name="last relu"),
            helper.make_node("Conv", ["g", "w4"], ["y"], name="in float", **pads),
        ],
        {"x": (TensorProto.FLOAT, ["n", 4, 8, 8])},
        {"y": ["n", 4, 7, 7]},
        {f"w{number}": kernel * number for number in (1, 2, 3, 4)},
    )
    scales = calibrate(model, [{"x": np.random.default_rng(1).normal(size=(2, 4, 8, 8)).astype(np.float32)}])
    assert layer_precisions(model, scales, exclude=["in float"]) == {
        "first": "int8",
        "relu": "int8",
        "pool": "int8",
        "second": "int8",
        "sigmoid": "fp16",
        "third": "int8",
        "last relu": "fp16",
        "in float": "fp16",
    }


def test_what_leaves_float16_is_held_to_fp32(residual_cnn: ModelProto, images: np.ndarray) -> None:
    """The cache has no scale for such tensors, so their layers must not fall from INT8 to FP16."""
    scales = calibrate(residual_cnn, [{"image": images * 1e6}])
    found = layer_precisions(residual_cnn, scales)
    assert found["stem"] == "fp32"
    assert "fp16" not in found.values()


def test_weights_for_tensorrt_8_are_float_and_mean_the_same(
    residual_cnn: ModelProto, cnn_scales: Scales, images: np.ndarray
) -> None:
    """No int8 constant is left but zero points, which 8.x does not take everywhere, and no answer differs."""
    newer, older = (quantize(residual_cnn, cnn_scales, name) for name in ("tensorrt", "tensorrt-8"))
    onnx.checker.check_model(older.model, full_check=True)
    assert older.report.quantized == newer.report.quantized
    integers = [t for t in older.model.graph.initializer if t.data_type == TensorProto.INT8]
    assert all(not numpy_helper.to_array(tensor).any() for tensor in integers)
    for one, other in zip(
        run(newer.model, {"image": images}), run(older.model, {"image": images}), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_half_precision_around_int8_keeps_the_integers(
    residual_cnn: ModelProto, cnn_scales: Scales, images: np.ndarray
) -> None:
    """The strongly typed graph has the scales of the other, bit for bit, and computes in float16 between."""
    single, half = (quantize(residual_cnn, cnn_scales, name) for name in ("tensorrt", "tensorrt-fp16"))
    onnx.checker.check_model(half.model, full_check=True)
    assert half.report.quantized == single.report.quantized

    def scales(model: ModelProto) -> dict[str, bytes]:
        constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        pairs = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
        assert all(constants[node.input[1]].dtype == np.float32 for node in pairs)
        return {node.name: constants[node.input[1]].tobytes() for node in pairs}

    assert scales(half.model) == scales(single.model)
    types = {v.name: v.type.tensor_type.elem_type for v in half.model.graph.value_info}
    linear = [node for node in half.model.graph.node if node.op_type in ("Conv", "Gemm")]
    assert linear
    assert {types[name] for node in linear for name in (node.input[0], node.output[0])} == {
        TensorProto.FLOAT16
    }
    assert sqnr_db(run(residual_cnn, {"image": images}), run(half.model, {"image": images})) > 25


@pytest.mark.parametrize("version", [13, 19, 21])
def test_half_precision_around_int8_from_every_opset(version: int, images: np.ndarray) -> None:
    """Where newer opsets allow float16 scales the scales stay float32 all the same."""
    model = make_residual_cnn(version)
    half = quantize(model, calibrate(model, [{"image": images}]), "tensorrt-fp16").model
    assert sqnr_db(run(model, {"image": images}), run(half, {"image": images})) > 25


def test_an_int8_layer_beyond_float16_stays_in_single_precision() -> None:
    """A layer whose dequantized input would overflow float16 is kept in float32 around its pair."""
    model = build(
        [
            helper.make_node("MatMul", ["x", "w"], ["y"], name="large"),
            helper.make_node("MatMul", ["y", "w"], ["z"], name="small"),
        ],
        {"x": (TensorProto.FLOAT, ["n", 4])},
        {"z": ["n", 4]},
        {"w": (np.eye(4) * 1e-3).astype(np.float32)},
    )
    feed = {"x": np.full((2, 4), 9e5, np.float32)}
    half = quantize(model, calibrate(model, [feed]), "tensorrt-fp16").model
    np.testing.assert_allclose(run(half, feed)[0], run(model, feed)[0], rtol=0.02)
