"""Engines: what was built ran here, and what was not says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from stage_testing import dataset, run_stage, sources

from edgekit import ort, profile
from edgekit.artifact import Artifact
from edgekit.errors import BadInput
from edgekit.models import load_model
from edgekit.stages.registry import Sources


def graph_artifact(
    out: Path, nodes: list[Any], shape: list[Any], outputs: list[Any]
) -> tuple[Artifact, Sources]:
    """A hand-made graph with the input ``x`` and the output ``y``, as an export would leave it."""
    out.mkdir(parents=True)
    weight = numpy_helper.from_array(np.full((3, 3), 1e30, np.float32), "large")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, outputs)
    graph = helper.make_graph(nodes, "g", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, str(out / "model.onnx"))
    free = [1 if isinstance(size, str) else size for size in shape]
    images = np.random.default_rng(0).normal(size=(8, *free[1:])).astype(np.float32)
    given = sources(load_model(out / "model.onnx"), dataset({"x": images}))
    return Artifact("onnx", out, "s", "k", (), {"precision": "fp32"}), given


RELU = [helper.make_node("Relu", ["x"], ["y"])]


def test_the_engine_is_the_graph_and_ran(tmp_path: Path) -> None:
    """For ONNX Runtime the graph itself is the engine, run at batch 1 and at the largest batch."""
    graph, given = graph_artifact(tmp_path / "graph", RELU, ["n", 3], ["n", 3])
    made = run_stage("build", {"max_batch_size": 16}, given, tmp_path / "out", graph=graph)
    assert (made.path / "model.onnx").read_bytes() == (graph.path / "model.onnx").read_bytes()
    (engine,) = made.metadata["engines"]
    assert engine["builder"] == "onnxruntime"
    assert engine["built"] is engine["executed"] is True
    assert engine["version"] == ort.version()
    assert made.metadata["max_batch_size"] == 16


def test_a_fixed_batch_is_what_is_promised(tmp_path: Path) -> None:
    """Where the graph fixes the batch, the bundle promises that batch and no other."""
    graph, given = graph_artifact(tmp_path / "graph", RELU, [1, 3], [1, 3])
    made = run_stage("build", {"max_batch_size": 16}, given, tmp_path / "out", graph=graph)
    assert made.metadata["max_batch_size"] == 1


def test_a_runtime_without_a_builder_is_recorded(tmp_path: Path) -> None:
    """The engine that could not be built says why, and the fallback is there."""
    graph, given = graph_artifact(tmp_path / "graph", RELU, ["n", 3], ["n", 3])
    device = profile.load("jetson-agx-xavier")
    made = run_stage("build", {"max_batch_size": 4}, given, tmp_path / "out", device, graph=graph)
    missing, fallback = made.metadata["engines"]
    assert (missing["builder"], missing["built"], missing["target"]) == ("tensorrt", False, "sm_72")
    assert missing["why"]
    assert fallback["executed"] is True


def test_numbers_that_overflow_are_refused(tmp_path: Path) -> None:
    """A graph that gives infinity on ordinary inputs is no engine."""
    nodes = [helper.make_node("MatMul", ["x", "large"], ["m"]), helper.make_node("Mul", ["m", "m"], ["y"])]
    graph, given = graph_artifact(tmp_path / "graph", nodes, ["n", 3], ["n", 3])
    with pytest.raises(BadInput, match="NaN or infinity"):
        run_stage("build", {"max_batch_size": 4}, given, tmp_path / "out", graph=graph)


def test_a_graph_that_mixes_rows_is_refused(tmp_path: Path) -> None:
    """Where the number of rows changes inside, batching on the device would mix requests."""
    nodes = [helper.make_node("ReduceSum", ["x"], ["y"], keepdims=1)]
    graph, given = graph_artifact(tmp_path / "graph", nodes, ["n", 3], [1, 1])
    with pytest.raises(BadInput, match="batch axis"):
        run_stage("build", {"max_batch_size": 4}, given, tmp_path / "out", graph=graph)


def test_a_graph_that_the_runtime_does_not_take_is_refused(tmp_path: Path) -> None:
    """The runtime's own words, in three lines."""
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    graph, given = graph_artifact(tmp_path / "graph", nodes, ["n", 3], ["n", 3])
    (graph.path / "model.onnx").write_bytes(b"\x08\x08not a graph")
    with pytest.raises(BadInput, match="does not accept") as caught:
        run_stage("build", {"max_batch_size": 4}, given, tmp_path / "out", graph=graph)
    assert len(str(caught.value).splitlines()) == 3
