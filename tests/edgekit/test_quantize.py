"""Quantization as a stage: graphs that run, scales beside them, errors in three lines."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from stage_testing import dataset, noise, run_stage, sources, torch_model
from torch import nn

from edgekit import ort
from edgekit.artifact import Artifact
from edgekit.errors import BadInput
from edgekit.models import Model
from edgekit.stages.registry import Sources


def _net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 5)
    )


@pytest.fixture(scope="module")
def model() -> Model:
    """A convolution and a linear layer."""
    return torch_model(_net, image=(3, 6, 6))


@pytest.fixture(scope="module")
def exported(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Its ONNX graph."""
    return run_stage("export", {"export": {}}, sources(model), tmp_path_factory.mktemp("export") / "out")


@pytest.fixture(scope="module")
def data(model: Model) -> Sources:
    """Calibration data."""
    return sources(model, dataset(noise({"image": (3, 6, 6)}, 32)))


INT8 = {"precision": "int8", "quantize": {"max_samples": 20}}


def _cosine(a: Artifact, b: Artifact) -> float:
    images = noise({"image": (3, 6, 6)}, 8)
    x, y = (next(iter(ort.Session(g.path / "model.onnx").run(images).values())).ravel() for g in (a, b))
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def test_int8_answers_like_the_original(exported: Artifact, data: Sources, tmp_path: Path) -> None:
    """The INT8 graph holds real INT8 weights, is smaller, and its outputs point the same way."""
    made = run_stage("quantize", INT8, data, tmp_path / "out", graph=exported)
    graph = onnx.load(str(made.path / "model.onnx"))
    assert {t.data_type for t in graph.graph.initializer} & {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
    assert _cosine(made, exported) > 0.99
    assert made.size_bytes() < exported.size_bytes()
    assert made.metadata["precision"] == "int8"
    assert made.metadata["samples"] == 18  # two of the twenty judged the observers
    assert json.loads((made.path / "scales.json").read_text())


def test_the_same_data_give_the_same_bytes(exported: Artifact, data: Sources, tmp_path: Path) -> None:
    """Calibration is reproducible to the bit."""
    first, second = (
        run_stage("quantize", INT8, data, tmp_path / name, graph=exported).sha256 for name in ("a", "b")
    )
    assert first == second


def test_fp16_halves_the_weights(exported: Artifact, data: Sources, tmp_path: Path) -> None:
    """The FP16 graph is about half the size, needs no data, and answers the same."""
    config = {"precision": "fp16", "quantize": None}
    made = run_stage("quantize", config, data, tmp_path / "out", graph=exported)
    assert made.size_bytes() < 0.65 * exported.size_bytes()
    assert _cosine(made, exported) > 0.999
    assert made.metadata["calibrator"] is None


def test_calibration_that_fails_reads_in_three_lines(
    exported: Artifact, model: Model, tmp_path: Path
) -> None:
    """Data that damages a scale is refused as bad input, with what, why and what to do."""
    bad = noise({"image": (3, 6, 6)}, 8)
    bad["image"][5, 0, 0, 0] = np.nan
    with pytest.raises(BadInput) as caught:
        run_stage("quantize", INT8, sources(model, dataset(bad)), tmp_path / "out", graph=exported)
    assert len(str(caught.value).splitlines()) == 3
