"""FP16 graphs: float32 outside, float16 inside, and float32 islands where the values do not fit."""

from __future__ import annotations

import numpy as np
import onnx
from graphs import build, run
from onnx import ModelProto, TensorProto, helper

from calibration import calibrate, sqnr_db, to_fp16


def test_cnn_halves_and_agrees(residual_cnn: ModelProto, images: np.ndarray) -> None:
    """A CNN in float16 is about half the size, takes and returns float32, and agrees to 50 dB."""
    half, report = to_fp16(residual_cnn, calibrate(residual_cnn, [{"image": images}]))
    onnx.checker.check_model(half, full_check=True)
    assert half.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT
    assert half.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    assert half.ByteSize() < 0.7 * residual_cnn.ByteSize()
    assert report.kept == {}
    assert report.guarded
    assert sqnr_db(run(residual_cnn, {"image": images}), run(half, {"image": images})) > 50


def test_attention_agrees_with_padding(attention: ModelProto, tokens: dict[str, np.ndarray]) -> None:
    """A masked text layer agrees where there is no padding, and its mask constant does not overflow."""
    half, report = to_fp16(attention, calibrate(attention, [tokens]))
    onnx.checker.check_model(half, full_check=True)
    assert "mask" in report.kept
    kept = tokens["attention_mask"].astype(bool)
    reference, found = (run(model, tokens)[0][kept] for model in (attention, half))
    assert sqnr_db([reference], [found]) > 50


def make_square() -> ModelProto:
    return build(
        [
            helper.make_node("MatMul", ["x", "w"], ["m"], name="small"),
            helper.make_node("Mul", ["m", "m"], ["square"], name="large"),
            helper.make_node("Sqrt", ["square"], ["y"], name="root"),
        ],
        {"x": (TensorProto.FLOAT, ["n", 4])},
        {"y": ["n", 4]},
        {"w": 300.0 * np.eye(4, dtype=np.float32)},
    )


def test_overflowing_nodes_stay_float32() -> None:
    """Where real data leaves float16's range, the operators around that tensor stay in float32."""
    model = make_square()
    feed = {"x": np.array([[1.0, 2.0, 3.0, -4.0]], np.float32)}
    guarded, report = to_fp16(model, calibrate(model, [feed]))
    assert set(report.kept) == {"large", "root"}
    assert "'square' reaches" in report.kept["large"]
    assert report.converted == 1
    np.testing.assert_allclose(run(guarded, feed)[0], run(model, feed)[0], rtol=1e-3)


def test_underflowing_nodes_stay_float32() -> None:
    """A tensor that lies below float16's normal range throughout keeps its operators in float32."""
    model = build(
        [
            helper.make_node("MatMul", ["x", "w"], ["m"], name="tiny"),
            helper.make_node("Div", ["m", "scale"], ["y"], name="back"),
        ],
        {"x": (TensorProto.FLOAT, ["n", 2])},
        {"y": ["n", 2]},
        {"w": 1e-7 * np.eye(2, dtype=np.float32), "scale": np.array(1e-7, np.float32)},
    )
    feed = {"x": np.array([[1.0, 3.0]], np.float32)}
    guarded, report = to_fp16(model, calibrate(model, [feed]))
    assert "under float16's normal range" in report.kept["tiny"]
    np.testing.assert_allclose(run(guarded, feed)[0], run(model, feed)[0], rtol=1e-3)


def test_excluded_nodes_stay_float32(residual_cnn: ModelProto) -> None:
    """Excluded operators stay in float32 with that reason, and without scales the report says unguarded."""
    half, report = to_fp16(residual_cnn, exclude=["stem"])
    onnx.checker.check_model(half, full_check=True)
    assert report.kept == {"stem": "excluded"}
    assert not report.guarded


def test_float32_only_slots_are_left_alone() -> None:
    """An input that ONNX defines as float32 only, such as Resize's scales, stays float32."""
    model = build(
        [helper.make_node("Resize", ["x", "", "scales"], ["y"], name="resize", mode="nearest")],
        {"x": (TensorProto.FLOAT, [1, 1, 2, 2])},
        {"y": [1, 1, 4, 4]},
        {"scales": np.array([1, 1, 2, 2], np.float32)},
    )
    half, report = to_fp16(model)
    onnx.checker.check_model(half, full_check=True)
    assert report.converted == 1
    feed = {"x": np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2)}
    np.testing.assert_array_equal(run(half, feed)[0], run(model, feed)[0])


def test_bodies_read_float32_from_outside() -> None:
    """A branch stays in float32, and what it reads from a float16 part comes back to float32 first."""
    branch = helper.make_graph(
        [helper.make_node("Exp", ["m"], ["inner"], name="exp")],
        "then",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )
    other = helper.make_graph(
        [helper.make_node("Neg", ["m"], ["same"], name="neg")],
        "else",
        [],
        [helper.make_tensor_value_info("same", TensorProto.FLOAT, None)],
    )
    model = build(
        [
            helper.make_node("MatMul", ["x", "w"], ["m"], name="product"),
            helper.make_node("If", ["flag"], ["y"], name="choice", then_branch=branch, else_branch=other),
        ],
        {"x": (TensorProto.FLOAT, ["n", 2]), "flag": (TensorProto.BOOL, [])},
        {"y": ["n", 2]},
        {"w": np.eye(2, dtype=np.float32)},
    )
    half, report = to_fp16(model)
    assert report.kept == {"choice": "If has a body"}
    feed = {"x": np.array([[0.5, 1.0]], np.float32), "flag": np.array(True)}
    np.testing.assert_allclose(run(half, feed)[0], run(model, feed)[0], rtol=1e-3)


def test_a_tiny_term_beside_a_larger_one_is_no_reason() -> None:
    """A bias below float16's normal range is lost without harm, so its operator is converted."""
    model = build(
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="product")],
        {"x": (TensorProto.FLOAT, ["n", 2])},
        {"y": ["n", 2]},
        {"w": np.eye(2, dtype=np.float32), "b": np.full(2, 1e-8, np.float32)},
    )
    feed = {"x": np.array([[1.0, 3.0]], np.float32)}
    _, report = to_fp16(model, calibrate(model, [feed]))
    assert report.kept == {}
