"""INT8 graphs: what is quantized, that it runs in integers, and that it means the float model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from graphs import build, make_residual_cnn, run
from onnx import ModelProto, TensorProto, helper, numpy_helper

from calibration import CalibrationError, NothingToQuantize, Scales, calibrate, prepare, quantize, sqnr_db
from calibration.observers import OBSERVERS


@pytest.fixture(scope="module")
def cnn_scales(residual_cnn: ModelProto, images: np.ndarray) -> Scales:
    return calibrate(residual_cnn, [{"image": images}])


def fused_operators(model: ModelProto, path: Path) -> Counter[str]:
    """The operators that ONNX Runtime really runs."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 4
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def test_cnn_runs_in_integers_from_end_to_end(
    residual_cnn: ModelProto, cnn_scales: Scales, tmp_path: Path
) -> None:
    """Convolutions, the residual add, pooling and the classifier all become integer kernels."""
    int8 = quantize(residual_cnn, cnn_scales)
    onnx.checker.check_model(int8.model, full_check=True)
    fused = fused_operators(int8.model, tmp_path / "fused.onnx")
    assert fused["QLinearConv"] == 4
    assert fused["QLinearAdd"] == 1
    assert fused["QLinearGlobalAveragePool"] == 1
    assert fused["QGemm"] == 1
    assert not fused["Conv"] + fused["Gemm"] + fused["Add"] + fused["Relu"]


def test_report_counts_what_was_done(residual_cnn: ModelProto, cnn_scales: Scales) -> None:
    """The report names the int8 operators, the float ones with reasons, and the share of compute."""
    whole = quantize(residual_cnn, cnn_scales).report
    assert whole.quantized == ("fc", "first", "second", "stem", "third")
    assert whole.joined == ("flatten", "pool", "residual")
    assert whole.int8_macs_fraction == 1.0
    part = quantize(residual_cnn, cnn_scales, exclude=["first", "fc"]).report
    assert part.kept_float == {"fc": "excluded", "first": "excluded"}
    assert part.int8_macs_fraction is not None
    assert 0.5 < part.int8_macs_fraction < 0.7


@pytest.mark.parametrize("observer", ["minmax", "percentile"])
def test_outputs_are_close_to_float(observer: str, residual_cnn: ModelProto, images: np.ndarray) -> None:
    """The int8 CNN stays above 25 dB of signal to quantization noise on images it was not calibrated on."""
    scales = calibrate(residual_cnn, [{"image": images[:16]}], observer=observer)
    feed = {"image": images[16:]}
    int8 = quantize(residual_cnn, scales).model
    assert sqnr_db(run(residual_cnn, feed), run(int8, feed)) > 25


def test_excluded_layers_stay_float(residual_cnn: ModelProto, cnn_scales: Scales, tmp_path: Path) -> None:
    """An excluded layer keeps its float kernel and weight; the others stay in int8."""
    int8 = quantize(residual_cnn, cnn_scales, exclude=["first"])
    fused = fused_operators(int8.model, tmp_path / "fused.onnx")
    assert fused["QLinearConv"] == 3
    assert fused["FusedConv"] + fused["Conv"] == 1


def test_same_input_same_bytes(residual_cnn: ModelProto, cnn_scales: Scales) -> None:
    """Quantizing is deterministic, through the file of scales too."""
    once = quantize(residual_cnn, cnn_scales).model.SerializeToString(deterministic=True)
    again = quantize(prepare(residual_cnn), cnn_scales).model.SerializeToString(deterministic=True)
    assert once == again


@pytest.mark.parametrize("version", range(11, 23))
def test_per_channel_weights_load_from_every_opset(version: int, images: np.ndarray) -> None:
    """A model older than opset 13 is upgraded first, so its per-channel scales load and mean the same."""
    model = make_residual_cnn(version)
    int8 = quantize(model, calibrate(model, [{"image": images}])).model
    assert sqnr_db(run(model, {"image": images}), run(int8, {"image": images})) > 25


def test_weights_have_one_scale_for_each_channel(residual_cnn: ModelProto, cnn_scales: Scales) -> None:
    """Convolution weights are int8 with a scale for each output channel, biases int32."""
    graph = quantize(residual_cnn, cnn_scales).model.graph
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    producer = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type == "Conv":
            weight, bias = producer[node.input[1]], producer[node.input[2]]
            assert constants[weight.input[0]].dtype == np.int8
            assert constants[weight.input[1]].shape == (16,)
            assert constants[bias.input[0]].dtype == np.int32
            scale = constants[producer[node.input[0]].input[1]] * constants[weight.input[1]]
            np.testing.assert_array_equal(constants[bias.input[1]], scale)


def test_attention_averages_stay_in_float(attention: ModelProto, tokens: dict[str, np.ndarray]) -> None:
    """Products with weights and the scores are int8; the average by a Softmax is not, with the reason."""
    scales = calibrate(attention, [tokens])
    int8 = quantize(attention, scales)
    assert int8.report.quantized == ("key", "output", "query", "scores", "value")
    assert "Softmax" in int8.report.kept_float["average"]
    kept = tokens["attention_mask"].astype(bool)
    reference, found = (run(model, tokens)[0][kept] for model in (attention, int8.model))
    assert sqnr_db([reference], [found]) > 25


def test_a_tensor_that_the_graph_returns_is_quantized_under_its_name(images: np.ndarray) -> None:
    """A convolution whose result is returned, and read on as well, keeps its output's name."""
    rng = np.random.default_rng(0)
    model = build(
        [
            helper.make_node("Conv", ["image", "w1"], ["middle"], name="a"),
            helper.make_node("Conv", ["middle", "w2"], ["last"], name="b"),
        ],
        {"image": (TensorProto.FLOAT, ["n", 3, 8, 8])},
        {"middle": ["n", 4, 8, 8], "last": ["n", 2, 8, 8]},
        {"w1": rng.normal(0, 1, (4, 3, 1, 1)).astype(np.float32), "w2": np.ones((2, 4, 1, 1), np.float32)},
    )
    int8 = quantize(model, calibrate(model, [{"image": images}])).model
    onnx.checker.check_model(int8, full_check=True)
    assert [value.name for value in int8.graph.output] == ["middle", "last"]
    for expected, got in zip(run(model, {"image": images}), run(int8, {"image": images}), strict=True):
        assert sqnr_db([expected], [got]) > 22


def test_shared_constants_and_taken_names() -> None:
    """A weight and a bias read twice, by a float operator too, and names that are taken, load and agree."""
    rng = np.random.default_rng(0)
    model = build(
        [
            helper.make_node("Conv", ["x", "w", "b"], ["w_quantized"], name="one"),
            helper.make_node("Relu", ["w_quantized"], ["x_scale"], name="act"),
            helper.make_node("Conv", ["x_scale", "w", "b"], ["c2"], name="two"),
            helper.make_node("Mul", ["c2", "w"], ["scaled"], name="float_use_of_weight"),
            helper.make_node("Sigmoid", ["scaled"], ["y"], name="x_zero_point"),
        ],
        {"x": (TensorProto.FLOAT, ["n", 4, 4, 4])},
        {"y": [4, 4, 4, 4]},
        {
            "w": rng.normal(0, 0.5, (4, 4, 1, 1)).astype(np.float32),
            "b": rng.normal(0, 0.5, 4).astype(np.float32),
        },
    )
    feed = {"x": rng.normal(0, 1, (1, 4, 4, 4)).astype(np.float32)}
    int8 = quantize(model, calibrate(model, [feed]))
    onnx.checker.check_model(int8.model, full_check=True)
    names = [t.name for t in int8.model.graph.initializer]
    assert len(names) == len(set(names))
    assert int8.report.quantized == ("one", "two")
    assert sqnr_db(run(model, feed), run(int8.model, feed)) > 25


def test_zero_and_constant_tensors_give_usable_scales() -> None:
    """An all-zero channel keeps its bias, and a tensor that is zero throughout quantizes without NaN."""
    weight = np.zeros((2, 2, 1, 1), np.float32)
    weight[0, 0] = 1.0
    model = build(
        [
            helper.make_node("Conv", ["x", "w", "b"], ["c"], name="conv"),
            helper.make_node("Mul", ["c", "zero"], ["z"], name="mute"),
            helper.make_node("Conv", ["z", "w", "b"], ["y"], name="after"),
        ],
        {"x": (TensorProto.FLOAT, ["n", 2, 2, 2])},
        {"c": ["n", 2, 2, 2], "y": ["n", 2, 2, 2]},
        {"w": weight, "b": np.array([0.0, 3.0], np.float32), "zero": np.zeros(1, np.float32)},
    )
    feed = {"x": np.linspace(-1, 1, 8, dtype=np.float32).reshape(1, 2, 2, 2)}
    int8 = quantize(model, calibrate(model, [feed])).model
    first, second = run(int8, feed)
    np.testing.assert_allclose(first[0, 1], 3.0, atol=0.02)
    np.testing.assert_allclose(second[0], np.array([0.0, 3.0])[:, None, None] * np.ones((2, 2, 2)), atol=0.02)


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("value", [0.0, 3.0, -1e-7, 1e-30])
@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt", "tensorrt-fp16", "tensorrt-8"])
def test_constant_activations_give_finite_results(observer: str, value: float, target: str) -> None:
    """A tensor that is one value throughout has a scale above zero that holds the value."""
    model = build(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        {"x": (TensorProto.FLOAT, ["n", 4])},
        {"y": ["n", 2]},
        {"w": np.ones((4, 2), np.float32)},
    )
    feed = {"x": np.full((3, 4), value, np.float32)}
    int8 = quantize(model, calibrate(model, [feed], observer=observer), target).model
    scales = [numpy_helper.to_array(t) for t in int8.graph.initializer if t.name.endswith("_scale")]
    assert all((scale > 0).all() for scale in scales)
    np.testing.assert_allclose(run(int8, feed)[0], 4 * np.float32(value), rtol=0.01, atol=1e-12)


def test_seven_bit_weights(residual_cnn: ModelProto, cnn_scales: Scales, images: np.ndarray) -> None:
    """Seven-bit weights, for processors without VNNI, use half the range and stay close to float."""
    int8 = quantize(residual_cnn, cnn_scales, weight_bits=7).model
    weights = [numpy_helper.to_array(t) for t in int8.graph.initializer if t.data_type == TensorProto.INT8]
    assert max(int(np.abs(w.astype(int)).max()) for w in weights) == 63
    assert sqnr_db(run(residual_cnn, {"image": images}), run(int8, {"image": images})) > 22


def body_model() -> ModelProto:
    """A model whose only product is inside an If."""
    branch = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["inner"], name="hidden")],
        "then",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["same"])],
        "else",
        [],
        [helper.make_tensor_value_info("same", TensorProto.FLOAT, None)],
    )
    return build(
        [helper.make_node("If", ["flag"], ["y"], name="choice", then_branch=branch, else_branch=other)],
        {"x": (TensorProto.FLOAT, ["n", 3]), "flag": (TensorProto.BOOL, [])},
        {"y": ["n", 3]},
        {"w": np.eye(3, dtype=np.float32)},
    )


def test_nothing_to_quantize_is_an_error() -> None:
    """A model whose work is inside a branch is refused with the reason, never called INT8 unchanged."""
    model = body_model()
    scales = calibrate(model, [{"x": np.ones((1, 3), np.float32), "flag": np.array(True)}])
    with pytest.raises(CalibrationError, match="choice/hidden: inside the body of a If"):
        quantize(model, scales)


@pytest.mark.parametrize("flag", [True, False])
def test_a_branch_that_always_runs_is_quantized(flag: bool) -> None:
    """Where the condition is a constant, computed from constants too, the branch that runs becomes INT8."""
    rng = np.random.default_rng(0)

    def branch(name: str) -> onnx.GraphProto:
        """Both branches use the same names inside; each nests another If."""
        output = helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)
        same = helper.make_graph([helper.make_node("Identity", ["hidden"], ["inner"])], name, [], [output])
        nodes = [
            helper.make_node("MatMul", ["x", "local"], ["hidden"], name="product"),
            helper.make_node("If", ["yes"], ["result"], then_branch=same, else_branch=same),
        ]
        weight = numpy_helper.from_array(rng.normal(0, 1, (3, 3)).astype(np.float32), "local")
        result = helper.make_tensor_value_info("result", TensorProto.FLOAT, None)
        return helper.make_graph(nodes, name, [], [result], [weight])

    choice = {"then_branch": branch("then"), "else_branch": branch("else")}
    model = build(
        [
            helper.make_node("Not", ["no"], ["yes"], name="invert"),
            helper.make_node("And", ["yes", "flag"], ["condition"], name="decide"),
            helper.make_node("If", ["condition"], ["y"], name="choice", **choice),
        ],
        {"x": (TensorProto.FLOAT, ["n", 3])},
        {"y": ["n", 3]},
        {"no": np.array(False), "flag": np.array(flag)},
    )
    feed = {"x": rng.normal(0, 1, (8, 3)).astype(np.float32)}
    int8 = quantize(model, calibrate(model, [feed]))
    onnx.checker.check_model(int8.model, full_check=True)
    assert int8.report.quantized == ("choice/product",)
    assert int8.report.int8_macs_fraction == 1.0
    assert sqnr_db(run(model, feed), run(int8.model, feed)) > 25


def test_recurrent_operators_are_named_and_counted() -> None:
    """An LSTM stays in float with a note, and its compute counts against the share of int8."""
    rng = np.random.default_rng(0)
    model = build(
        [
            helper.make_node("LSTM", ["x", "w", "r"], ["", "h"], name="memory", hidden_size=4),
            helper.make_node("Squeeze", ["h", "axis"], ["flat"], name="squeeze"),
            helper.make_node("MatMul", ["flat", "out"], ["y"], name="head"),
        ],
        {"x": (TensorProto.FLOAT, [5, 1, 3])},
        {"y": [1, 2]},
        {
            "w": rng.normal(0, 1, (1, 16, 3)).astype(np.float32),
            "r": rng.normal(0, 1, (1, 16, 4)).astype(np.float32),
            "axis": np.array([0], np.int64),
            "out": rng.normal(0, 1, (4, 2)).astype(np.float32),
        },
    )
    feed = {"x": rng.normal(0, 1, (5, 1, 3)).astype(np.float32)}
    report = quantize(model, calibrate(model, [feed])).report
    assert report.kept_float == {"memory": "LSTM runs over time steps"}
    assert report.int8_macs_fraction == pytest.approx(8 / (8 + 5 * 16 * 7))


def test_scales_of_another_model_are_refused(residual_cnn: ModelProto) -> None:
    """Scales without a range for one of the model's tensors are refused by that tensor's name."""
    with pytest.raises(CalibrationError, match="no range for tensor"):
        quantize(residual_cnn, Scales("minmax", {}, 1, {}, {}))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"target": "tpu"}, "no target 'tpu'"),
        ({"exclude": ["nowhere"]}, "no node 'nowhere'"),
        ({"weight_bits": 4}, "4 bits"),
    ],
)
def test_unknown_settings_are_refused(
    settings: dict[str, object], why: str, residual_cnn: ModelProto, cnn_scales: Scales
) -> None:
    """An unknown target, node or width of weights is refused by name."""
    with pytest.raises(CalibrationError, match=why):
        quantize(residual_cnn, cnn_scales, **settings)  # type: ignore[arg-type]


def test_a_model_in_half_precision_has_nothing_to_quantize() -> None:
    """It is told apart from a broken model, so that callers can go on with it as it is."""
    half = helper.make_model(
        helper.make_graph(
            [helper.make_node("Relu", ["x"], ["y"])],
            "half",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["n", 2])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["n", 2])],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    with pytest.raises(NothingToQuantize, match="no float32 activations"):
        calibrate(half, [{"x": np.ones((1, 2), np.float16)}])
