"""Quantization as a stage: graphs that run, scales beside them, errors in three lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from stage_testing import dataset, noise, run_stage, sources, torch_model
from torch import nn

from calibration import METHODS
from calibration.observers import OBSERVERS
from edgekit import ort, profile
from edgekit.artifact import Artifact
from edgekit.errors import BadInput
from edgekit.models import Model
from edgekit.recipe import Quantize
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


INT8: dict[str, Any] = {"precision": "int8", "quantize": {"max_samples": 20}, "bound": None}


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
    config = {"precision": "fp16", "quantize": None, "bound": None}
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


def test_every_attempt_is_accounted_for(exported: Artifact, data: Sources, tmp_path: Path) -> None:
    """Each observer and method has its score or the reason that it has none, and operators are counted."""
    found = run_stage("quantize", INT8, data, tmp_path / "out", graph=exported).metadata["calibration"]
    names = [attempt["name"] for attempt in found["attempts"]]
    assert names == [*OBSERVERS, *METHODS]
    assert all(attempt["sqnr_db"] is not None or attempt["why"] for attempt in found["attempts"])
    kept = {attempt["name"] for attempt in found["attempts"] if attempt["kept"]}
    assert kept == {found["observer"], *found["methods"]}
    assert (found["weight_bits"], found["int8_macs_fraction"], found["drop"]) == (8, 1.0, None)


def test_the_recipe_s_methods_are_those_of_calibration() -> None:
    """By default all are tried."""
    assert Quantize().methods == METHODS


def test_an_observer_alone_calibrates_on_every_sample(
    exported: Artifact, data: Sources, tmp_path: Path
) -> None:
    """Where nothing is to be chosen, no sample is held out to choose by."""
    settings = {"max_samples": 20, "observer": "minmax", "methods": []}
    made = run_stage("quantize", {**INT8, "quantize": settings}, data, tmp_path / "out", graph=exported)
    assert (made.metadata["calibrator"], made.metadata["samples"]) == ("minmax", 20)


def test_processors_that_saturate_get_seven_bits(exported: Artifact, data: Sources, tmp_path: Path) -> None:
    """The profile decides, not the machine that compresses: no weight leaves 7 bits."""
    device = profile.load("x86-cpu-avx2")
    made = run_stage("quantize", INT8, data, tmp_path / "out", device, graph=exported)
    graph = onnx.load(str(made.path / "model.onnx")).graph
    weights = [numpy_helper.to_array(t) for t in graph.initializer if t.data_type == onnx.TensorProto.INT8]
    assert max(int(np.abs(w.astype(int)).max()) for w in weights if w.ndim > 1) == 63
    assert made.metadata["calibration"]["weight_bits"] == 7


def _bound(max_drop: float) -> dict[str, Any]:
    return {**INT8, "bound": {"max_drop": max_drop, "metric": "cosine", "metric_source": None}}


def test_a_drop_that_is_missed_keeps_layers_in_float(
    exported: Artifact, data: Sources, tmp_path: Path
) -> None:
    """Where int8 loses more than the contract allows, the worst layer stays in float and says why."""
    whole = run_stage("quantize", _bound(1.0), data, tmp_path / "whole", graph=exported, original=exported)
    drop = whole.metadata["calibration"]["drop"]
    assert (whole.metadata["kept_high_precision"], drop["protected"]) == ({}, drop["in_int8"])
    allowed = 0.9 * (drop["original"] - drop["in_int8"])
    made = run_stage("quantize", _bound(allowed), data, tmp_path / "kept", graph=exported, original=exported)
    found = made.metadata["calibration"]
    assert len(made.metadata["kept_high_precision"]) == 1
    assert "contract" in next(iter(made.metadata["kept_high_precision"].values()))
    assert found["drop"]["protected"] >= found["drop"]["at_least"] > found["drop"]["in_int8"]
    assert 0 < found["int8_macs_fraction"] < 1


def test_no_layer_is_kept_where_none_can_help(exported: Artifact, data: Sources, tmp_path: Path) -> None:
    """Where the float graph misses the drop itself, or no layer may be kept, INT8 stays whole."""
    graph = onnx.load(str(exported.path / "model.onnx"))
    for tensor in graph.graph.initializer:
        if len(tensor.dims) > 1:
            tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), tensor.name))
    other = tmp_path / "other"
    other.mkdir()
    onnx.save(graph, str(other / "model.onnx"))
    original = Artifact("onnx", other, "a" * 64, "k" * 64, (), {})
    made = run_stage("quantize", _bound(1e-6), data, tmp_path / "a", graph=exported, original=original)
    assert made.metadata["kept_high_precision"] == {}
    forbidden = {**_bound(1e-9), "quantize": {"max_samples": 20, "max_kept_float": 0}}
    made = run_stage("quantize", forbidden, data, tmp_path / "b", graph=exported, original=exported)
    assert made.metadata["kept_high_precision"] == {}
