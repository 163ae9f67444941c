"""Finding the layers that hurt."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from graphs import build
from onnx import ModelProto, TensorProto, helper

from calibration import CalibrationError, calibrate, layer_precisions, sensitivity, sqnr_db, write_cache


def test_the_layer_with_outliers_is_worst() -> None:
    """A layer whose weight hides small values behind a large one in each channel is found first."""
    rng = np.random.default_rng(0)
    bad = rng.normal(0, 0.05, (16, 16)).astype(np.float32)
    bad[3, :] = 40.0  # multiplies an input that is always zero
    good = rng.normal(0, 0.25, (16, 16)).astype(np.float32)
    mute = np.ones(16, np.float32)
    mute[3] = 0.0
    model = build(
        [
            helper.make_node("MatMul", ["x", "good"], ["a"], name="harmless"),
            helper.make_node("Mul", ["a", "mute"], ["b"], name="mute_one"),
            helper.make_node("MatMul", ["b", "bad"], ["y"], name="harmful"),
        ],
        {"x": (TensorProto.FLOAT, ["n", 16])},
        {"y": ["n", 16]},
        {"bad": bad, "good": good, "mute": mute},
    )
    sample = {"x": rng.normal(0, 1, (32, 16)).astype(np.float32)}
    found = sensitivity(model, calibrate(model, [sample]), [sample])
    assert [entry.node for entry in found] == ["harmful", "harmless"]
    assert found[0].sqnr_db < found[1].sqnr_db - 10


def test_every_layer_is_measured(residual_cnn: ModelProto, images: np.ndarray) -> None:
    """Each linear layer appears once, and progress is told for each."""
    told: list[tuple[int, int]] = []
    sample = {"image": images[:4]}
    scales = calibrate(residual_cnn, [sample])
    found = sensitivity(
        residual_cnn, scales, [sample], progress=lambda done, total: told.append((done, total))
    )
    assert sorted(entry.node for entry in found) == ["fc", "first", "second", "stem", "third"]
    assert told == [(i, 5) for i in range(1, 6)]


def test_files_are_taken_for_models(residual_cnn: ModelProto, images: np.ndarray, tmp_path: Path) -> None:
    """A model's file gives the sensitivities and the calibration cache of the model itself."""
    path = tmp_path / "model.onnx"
    path.write_bytes(residual_cnn.SerializeToString())
    sample = {"image": images[:2]}
    scales = calibrate(path, [sample])
    assert sensitivity(path, scales, [sample]) == sensitivity(residual_cnn, scales, [sample])
    assert write_cache(str(path), scales) == write_cache(residual_cnn, scales)
    assert layer_precisions(path, scales) == layer_precisions(residual_cnn, scales)


def test_no_samples_is_an_error(residual_cnn: ModelProto, images: np.ndarray) -> None:
    """Without samples nothing can be measured, and that is an error."""
    with pytest.raises(CalibrationError, match="no samples"):
        sensitivity(residual_cnn, calibrate(residual_cnn, [{"image": images}]), [])


def test_sqnr() -> None:
    """Ten times less noise amplitude is 20 dB more; identical arrays are infinitely good."""
    signal = np.array([3.0, 4.0])
    assert sqnr_db([signal], [signal]) == math.inf
    assert sqnr_db([signal], [signal * 1.1]) == pytest.approx(20.0)
    assert sqnr_db([signal], [signal * 1.01]) == pytest.approx(40.0)
