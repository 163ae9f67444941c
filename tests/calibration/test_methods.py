"""Methods beyond rounding: exact where they promise it, and worth it on graphs that are hard to quantize."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import Array, build, run
from hard_graphs import make_block_with_outliers, make_uneven_cnn
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper

from calibration import calibrate, prepare, quantize, sqnr_db
from calibration.methods.bias_correction import correct_biases
from calibration.methods.equalization import equalize
from calibration.methods.smoothing import smooth
from calibration.targets import TARGETS

EXACT = 1e-5


def _images(count: int, seed: int = 5) -> Array:
    return np.random.default_rng(seed).normal(0, 1, (count, 3, 8, 8)).astype(np.float32)


def _tokens(count: int, seed: int = 6) -> Array:
    return np.random.default_rng(seed).normal(0, 1, (count, 7, 32)).astype(np.float32)


def _distance(a: ModelProto, b: ModelProto, feed: dict[str, Array]) -> float:
    """The largest difference of the outputs, as a share of the largest value."""
    onnx.checker.check_model(b)
    x, y = run(a, feed)[0], run(b, feed)[0]
    return float(np.abs(x - y).max() / np.abs(x).max())


def _quality(
    model: ModelProto, reference: ModelProto, calib: dict[str, Array], test: dict[str, Array]
) -> float:
    int8 = quantize(model, calibrate(model, [calib])).model
    return sqnr_db(run(reference, test), run(int8, test))


def _required(model: ModelProto | None) -> ModelProto:
    assert model is not None
    return model


@given(seed=st.integers(0, 10_000), spread=st.floats(1.5, 1e4))
@settings(max_examples=15, deadline=None)
def test_equalization_leaves_the_function_as_it_is(seed: int, spread: float) -> None:
    """Whatever the channels' sizes, through ReLU, depthwise layers, pooling and Flatten the outputs stay."""
    model = prepare(make_uneven_cnn(seed, spread, channels=8))
    assert _distance(model, _required(equalize(model)), {"image": _images(4)}) < EXACT


def test_equalization_saves_a_net_with_uneven_channels() -> None:
    """Where channels differ a thousand times, equalization brings many decibels."""
    model = prepare(make_uneven_cnn())
    calib, test = {"image": _images(32)}, {"image": _images(16, seed=9)}
    before = _quality(model, model, calib, test)
    after = _quality(_required(equalize(model)), model, calib, test)
    assert after > before + 10


def test_equalized_graphs_are_left_alone() -> None:
    """Equalizing twice changes nothing more."""
    assert equalize(_required(equalize(prepare(make_uneven_cnn())))) is None


@pytest.mark.parametrize(
    ("kind", "attributes", "linked"),
    [
        ("Relu", {}, True),
        ("LeakyRelu", {"alpha": 0.1}, True),
        ("Sigmoid", {}, False),
        ("HardSwish", {}, False),
    ],
)
def test_only_homogeneous_activations_are_crossed(
    kind: str, attributes: dict[str, float], linked: bool
) -> None:
    """Channels are scaled across operators with f(s x) = s f(x), and across no others."""
    rng = np.random.default_rng(0)
    model = prepare(
        build(
            [
                helper.make_node("MatMul", ["x", "w1"], ["a"], name="first"),
                helper.make_node(kind, ["a"], ["b"], name="act", **attributes),
                helper.make_node("MatMul", ["b", "w2"], ["y"], name="second"),
            ],
            {"x": (TensorProto.FLOAT, ["n", 4])},
            {"y": ["n", 3]},
            {
                "w1": rng.normal(0, 1, (4, 6)).astype(np.float32),
                "w2": rng.normal(0, 1, (6, 3)).astype(np.float32),
            },
        )
    )
    found = equalize(model)
    assert (found is not None) == linked
    if found is not None:
        assert _distance(model, found, {"x": rng.normal(0, 1, (5, 4)).astype(np.float32)}) < EXACT


def test_a_channel_that_leaves_the_graph_is_not_scaled(residual_cnn: ModelProto, images: Array) -> None:
    """Tensors that a residual Add reads, or that the graph returns, keep their values."""
    prepared = prepare(residual_cnn)
    equalized = _required(equalize(prepared))
    seen = ("stem_n_r", "logits")
    for model in (prepared, equalized):
        model.graph.output.append(helper.make_empty_tensor_value_info(seen[0]))
    a, b = (run(model, {"image": images})[1] for model in (prepared, equalized))
    del prepared.graph.output[-1]
    assert np.allclose(a, b, rtol=EXACT)


def test_shared_weights_keep_their_other_readers() -> None:
    """A weight that two layers share is scaled for one of them only."""
    rng = np.random.default_rng(3)
    w = (rng.normal(0, 1, (6, 6)) * np.exp(rng.uniform(0, 5, 6))).astype(np.float32)
    model = prepare(
        build(
            [
                helper.make_node("MatMul", ["x", "w"], ["a"], name="first"),
                helper.make_node("MatMul", ["a", "w"], ["y"], name="second"),
            ],
            {"x": (TensorProto.FLOAT, ["n", 6])},
            {"y": ["n", 6]},
            {"w": w},
        )
    )
    feed = {"x": rng.normal(0, 1, (5, 6)).astype(np.float32)}
    assert _distance(model, _required(equalize(model)), feed) < EXACT


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("target", sorted(TARGETS))
def test_smoothing_moves_outliers_without_changing_the_function(post_norm: bool, target: str) -> None:
    """Outliers of a LayerNorm cost fewer decibels, whether or not a residual Add reads it too."""
    model = prepare(make_block_with_outliers(post_norm))
    calib, test = {"x": _tokens(32)}, {"x": _tokens(16, seed=9)}
    smoothed = _required(smooth(model, [{"x": row[None]} for row in calib["x"]], TARGETS[target], threads=1))
    assert _distance(model, smoothed, test) < EXACT
    assert _quality(smoothed, model, calib, test) > _quality(model, model, calib, test) + 3


def test_query_key_and_value_share_their_smoothing() -> None:
    """Where the LayerNorm feeds nothing else it takes the factors; else one Mul is added."""
    rows = [{"x": row[None]} for row in _tokens(32)]
    counts = []
    for post_norm in (False, True):
        model = prepare(make_block_with_outliers(post_norm))
        smoothed = _required(smooth(model, rows, TARGETS["onnxruntime"], threads=1))
        readers = [n for n in smoothed.graph.node if n.name in ("query", "key", "value")]
        assert len({node.input[0] for node in readers}) == 1
        norm_gain = next(n for n in smoothed.graph.node if n.name == "norm").input[1]
        counts.append((norm_gain == "gain", readers[0].input[0] == "n"))
    assert counts == [(False, True), (True, False)]


def test_smoothing_leaves_even_activations_alone() -> None:
    """Without outliers nothing is changed."""
    model = prepare(make_block_with_outliers(post_norm=True, outlier=1.0))
    found = smooth(model, [{"x": row[None]} for row in _tokens(32)], TARGETS["onnxruntime"], threads=1)
    assert found is None or not any(node.name == "n_smoothed" for node in found.graph.node)


def test_bias_correction_restores_the_means(residual_cnn: ModelProto, images: Array) -> None:
    """After correction the outputs' mean error per channel is a fraction of what it was."""
    model = prepare(residual_cnn)
    scales = calibrate(model, [{"image": images}], observer="percentile", percentile=99.0)
    int8 = quantize(model, scales)
    rows = [{"image": row[None]} for row in images]
    corrected = _required(correct_biases(model, int8.model, int8.report.quantized, rows, threads=1))
    after = quantize(corrected, scales).model
    want = run(model, {"image": images})[0]
    errors = [np.abs((run(m, {"image": images})[0] - want).mean(axis=0)).max() for m in (int8.model, after)]
    assert errors[1] < 0.3 * errors[0]


def test_a_layer_without_a_bias_gets_one() -> None:
    """A Conv without a bias is corrected too; a MatMul without an Add has no place for one and is left."""
    rng = np.random.default_rng(0)
    model = prepare(
        build(
            [
                helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
                helper.make_node("MatMul", ["c", "v"], ["y"], name="product"),
            ],
            {"x": (TensorProto.FLOAT, ["n", 2, 5, 4])},
            {"y": ["n", 3, 5, 4]},
            {
                "w": rng.normal(0, 1, (3, 2, 1, 1)).astype(np.float32),
                "v": rng.normal(0, 1, (4, 4)).astype(np.float32),
            },
        )
    )
    x = rng.normal(1, 1, (16, 2, 5, 4)).astype(np.float32)
    scales = calibrate(model, [{"x": x}], observer="percentile", percentile=90.0)
    int8 = quantize(model, scales)
    rows = [{"x": row[None]} for row in x]
    corrected = _required(correct_biases(model, int8.model, int8.report.quantized, rows, threads=1))
    nodes = {node.name: node for node in corrected.graph.node}
    assert (len(nodes["conv"].input), len(nodes["product"].input)) == (3, 2)
    assert correct_biases(model, int8.model, ("product",), rows, threads=1) is None


def test_wide_biases_of_matrix_products_are_corrected() -> None:
    """A bias that is an Add's constant is corrected too, however wide it is."""
    rng = np.random.default_rng(0)
    model = prepare(
        build(
            [
                helper.make_node("MatMul", ["x", "w"], ["p"], name="product"),
                helper.make_node("Add", ["bias", "p"], ["y"], name="sum"),
            ],
            {"x": (TensorProto.FLOAT, ["n", 16])},
            {"y": ["n", 400]},
            {
                "w": rng.normal(0, 1, (16, 400)).astype(np.float32),
                "bias": rng.normal(0, 1, 400).astype(np.float32),
            },
        )
    )
    x = rng.normal(1, 1, (64, 16)).astype(np.float32)
    scales = calibrate(model, [{"x": x}], observer="percentile", percentile=90.0)
    int8 = quantize(model, scales)
    corrected = _required(correct_biases(model, int8.model, ("product",), [{"x": x}], threads=1))
    want = run(model, {"x": x})[0]
    errors = [
        np.abs((run(m, {"x": x})[0] - want).mean(axis=0)).max()
        for m in (int8.model, quantize(corrected, scales).model)
    ]
    assert errors[1] < 0.1 * errors[0]
