"""Models with their weights beside them: files of two parts, and sessions without the limit of 2 GB."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from graphs import build, make_residual_cnn, run
from onnx import ModelProto, TensorProto, helper, numpy_helper

from calibration import CalibrationError, calibrate, load_model, prepare, quantize, save_model, to_fp16
from calibration.session import open_session
from calibration.storage import attach, detach, digest


@pytest.fixture
def two_files(residual_cnn: ModelProto, tmp_path: Path) -> Path:
    """``residual_cnn`` as exporters write large models: the graph, and a file of weights beside it."""
    path = tmp_path / "model.onnx"
    copy = ModelProto()
    copy.CopyFrom(residual_cnn)
    onnx.save(copy, str(path), save_as_external_data=True, location="weights.bin", size_threshold=64)
    return path


def test_external_data_is_the_same_model(
    two_files: Path, residual_cnn: ModelProto, images: np.ndarray
) -> None:
    """A file with external data calibrates, and becomes INT8 and FP16, like the model in memory."""
    samples = [{"image": images}]
    scales = calibrate(two_files, samples, observer="entropy")
    assert scales == calibrate(residual_cnn, samples, observer="entropy")
    for target in ("onnxruntime", "tensorrt"):
        found, expected = (quantize(model, scales, target).model for model in (two_files, residual_cnn))
        assert found.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)
    found, expected = (to_fp16(model, scales)[0] for model in (str(two_files), residual_cnn))
    assert found.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)


def test_a_model_of_two_files_round_trips(
    residual_cnn: ModelProto, images: np.ndarray, tmp_path: Path
) -> None:
    """What is saved with external data is a small file and a large one, and loads in ONNX Runtime."""
    path = tmp_path / "model.onnx"
    before = residual_cnn.SerializeToString(deterministic=True)
    save_model(residual_cnn, path, external_data=True)
    assert residual_cnn.SerializeToString(deterministic=True) == before
    assert path.stat().st_size < len(before) / 2
    onnx.checker.check_model(str(path))
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(
        session.run(None, {"image": images})[0], run(residual_cnn, {"image": images})[0], rtol=1e-5, atol=1e-5
    )
    assert digest(load_model(path)) == digest(residual_cnn)


def test_small_models_are_one_file(residual_cnn: ModelProto, tmp_path: Path) -> None:
    """Below the limit of one file nothing is written beside it."""
    save_model(residual_cnn, tmp_path / "model.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("version", [9, 13, 22])
def test_preparing_keeps_the_weights_of_every_opset(version: int, images: np.ndarray, tmp_path: Path) -> None:
    """Weights are taken out for upgrades and shape inference, and put back whole."""
    model = make_residual_cnn(version)
    path = tmp_path / "model.onnx"
    save_model(model, path, external_data=True)
    prepared = prepare(path)
    assert not any(t.data_location == TensorProto.EXTERNAL for t in prepared.graph.initializer)
    np.testing.assert_allclose(
        run(prepared, {"image": images})[0], run(model, {"image": images})[0], rtol=1e-4, atol=1e-5
    )


def test_detaching_copies_no_weight_and_can_be_undone(residual_cnn: ModelProto) -> None:
    """The detached part is small, and with its weights it is the model again, bit for bit."""
    detached = detach(residual_cnn)
    assert len(detached.model.SerializeToString()) < len(residual_cnn.SerializeToString()) / 2
    attach(detached.model, detached.weights)
    assert digest(detached.model) == digest(residual_cnn)


def test_sessions_fuse_weights_that_are_handed_over(
    residual_cnn: ModelProto, images: np.ndarray, tmp_path: Path
) -> None:
    """An INT8 graph whose weights come beside it runs in the same integer kernels, with the same values."""
    int8 = quantize(residual_cnn, calibrate(residual_cnn, [{"image": images}])).model
    beside = open_session(int8, threads=1).run(None, {"image": images})[0]
    np.testing.assert_array_equal(beside, run(int8, {"image": images})[0])


@pytest.mark.parametrize("is_input", [False, True])
def test_a_weight_that_nothing_reads_does_no_harm(is_input: bool) -> None:
    """A model with a left-over weight runs, and becomes INT8, as the model without it does."""
    weight = np.random.default_rng(0).normal(0, 0.2, (32, 32)).astype(np.float32)
    inputs = {"x": (TensorProto.FLOAT, ["n", 32])}
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="one")
    model = build([node], inputs, {"y": ["n", 32]}, {"w": weight, "left_over": np.ones(1000, np.float32)})
    if is_input:  # as before IR version 4, where every initializer is an input too
        model.graph.input.append(helper.make_tensor_value_info("left_over", TensorProto.FLOAT, [1000]))
    feed = {"x": np.ones((4, 32), np.float32)}
    np.testing.assert_allclose(
        open_session(model, threads=1).run(None, feed)[0], feed["x"] @ weight, rtol=1e-5, atol=1e-6
    )
    int8 = quantize(model, calibrate(model, [feed])).model
    assert any(t.data_type == TensorProto.INT8 for t in int8.graph.initializer)


def test_a_weight_that_two_operators_share_is_stored_once() -> None:
    """A shared initializer is one initializer in int8 too, and the float original is gone."""
    rng = np.random.default_rng(0)
    model = build(
        [
            helper.make_node("MatMul", ["x", "w"], ["a"], name="one"),
            helper.make_node("Relu", ["a"], ["b"], name="act"),
            helper.make_node("MatMul", ["b", "w"], ["y"], name="two"),
        ],
        {"x": (TensorProto.FLOAT, ["n", 32])},
        {"y": ["n", 32]},
        {"w": rng.normal(0, 0.2, (32, 32)).astype(np.float32)},
    )
    feed = {"x": rng.normal(0, 1, (4, 32)).astype(np.float32)}
    int8 = quantize(model, calibrate(model, [feed])).model
    matrices = [t for t in int8.graph.initializer if len(t.dims) == 2]
    assert [t.data_type for t in matrices] == [TensorProto.INT8]


@pytest.mark.parametrize("content", [None, b"not a model"])
def test_a_file_that_is_no_model_is_refused(content: bytes | None, tmp_path: Path) -> None:
    """A missing file, and one that is something else, are refused by the path."""
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CalibrationError, match=r"model\.onnx"):
        prepare(path)


def test_missing_weights_are_refused(two_files: Path) -> None:
    """A model whose file of weights was left behind is refused with what is missing."""
    (two_files.parent / "weights.bin").unlink()
    with pytest.raises(CalibrationError, match="cannot be read") as caught:
        prepare(two_files)
    assert "weights.bin" in caught.value.why


def test_kinds_of_initializers_survive(tmp_path: Path) -> None:
    """Weights of other types, and values that are not raw bytes, come back as they were."""
    constants = {"half": np.ones((40, 40), np.float16), "integers": np.arange(1000), "text": np.ones(3)}
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    tensors.append(helper.make_tensor("listed", TensorProto.FLOAT, [500], [0.5] * 500))
    graph = helper.make_graph([], "constants", [], [], tensors)
    model = helper.make_model(graph)
    save_model(model, tmp_path / "model.onnx", external_data=True)
    for tensor, original in zip(load_model(tmp_path / "model.onnx").graph.initializer, tensors, strict=True):
        np.testing.assert_array_equal(numpy_helper.to_array(tensor), numpy_helper.to_array(original))
    assert Counter(t.name for t in tensors) == {"half": 1, "integers": 1, "text": 1, "listed": 1}
