"""Engines: what was built ran here, and what was not says why."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from stage_testing import dataset, run_stage, sources

import calibration
from calibration.tensorrt_cache import read_cache
from device_agent import manifest_form
from device_agent.manifest import EngineBuild, ShapeRange
from edgekit import ort, profile
from edgekit.artifact import Artifact
from edgekit.builders import engine_layers
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


def test_a_jetson_gets_a_plan_to_build_its_own(tmp_path: Path) -> None:
    """No engine for it can be built here; the bundle says so, and has a graph in its opset to build from."""
    graph, given = graph_artifact(tmp_path / "graph", RELU, ["n", 3], ["n", 3])
    device = profile.load("jetson-agx-xavier")
    made = run_stage("build", {"max_batch_size": 4}, given, tmp_path / "out", device, graph=graph)
    planned, fallback = made.metadata["engines"]
    assert (planned["builder"], planned["built"], planned["executed"]) == ("tensorrt", False, False)
    assert "sm 72" in planned["why"]
    assert (planned["layers"], planned["layers_why"]) == (None, "there is no engine here to look into")
    build = manifest_form.build(EngineBuild, planned["plan"], "plan")
    assert build.requires == {"sm": "72", "tensorrt": "8.5"}
    assert build.shapes["x"] == ShapeRange((1, 3), (4, 3), (4, 3))
    assert onnx.load(str(made.path / build.graph)).opset_import[0].version <= 17
    assert fallback["executed"] is True


@pytest.fixture
def xavier_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builders find a recording double of TensorRT 8.5 on a Xavier."""
    double = Path(__file__).parents[1] / "device_agent" / "recording"
    monkeypatch.syspath_prepend(str(double))
    root = Path(__file__).parents[2]
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(double), str(root), os.environ.get("PYTHONPATH", "")])
    )


@pytest.mark.usefixtures("xavier_here")
def test_a_machine_that_is_the_device_builds_the_engine(tmp_path: Path) -> None:
    """On a Xavier the engine for Xavier is built at once; what was measured for it serves the next build.

    The GPU and TensorRT are a recording double; the process is real.
    """
    graph, given = graph_artifact(tmp_path / "graph", RELU, ["n", 3], ["n", 3])
    device, config = profile.load("jetson-agx-xavier"), {"max_batch_size": 4, "fallback": False}
    for run in ("first", "second"):
        made = run_stage("build", config, given, tmp_path / run, device, graph=graph)
    (engine,) = made.metadata["engines"]
    assert engine["built"], engine["why"]
    assert engine["executed"] is False
    assert (engine["fingerprint"]["sm"], engine["fingerprint"]["tensorrt"]) == ("72", "8.5.2.2")
    assert (
        (made.path / engine["path"]).read_bytes().endswith((made.path / engine["plan"]["graph"]).read_bytes())
    )
    (timings,) = (tmp_path / "timings").iterdir()
    assert timings.read_bytes() == b"timings" * 2


@pytest.mark.usefixtures("xavier_here")
def test_an_engine_for_another_device_is_not_built(tmp_path: Path) -> None:
    """A Xavier builds none for an Orin, and says what differs."""
    graph, given = graph_artifact(tmp_path / "graph", RELU, ["n", 3], ["n", 3])
    device = profile.load("jetson-agx-orin")
    config = {"max_batch_size": 4, "fallback": False}
    made = run_stage("build", config, given, tmp_path / "out", device, graph=graph)
    (planned,) = made.metadata["engines"]
    assert planned["built"] is False
    assert "it is for sm 87, this machine has 72" in planned["why"]
    assert list((made.path / "engines").iterdir()) == []


def calibrated_artifact(out: Path, nodes: list[Any], shape: list[Any]) -> tuple[Artifact, Sources]:
    """A graph from ``x`` to ``y`` with weights ``w`` and ``scale``, as the int8 stage would leave it."""
    random = np.random.default_rng(3)
    weights = {"w": random.normal(size=(8, 8)), "scale": random.uniform(0.5, 1.5, 8)}
    used = {name for node in nodes for name in node.input}
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)
    constants = [
        numpy_helper.from_array(v.astype(np.float32), name) for name, v in weights.items() if name in used
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], constants), opset_imports=[helper.make_opsetid("", 18)]
    )
    model.ir_version = 9
    out.mkdir(parents=True)
    data = random.normal(size=(16, *shape[1:])).astype(np.float32)
    plain = calibration.prepare(model)
    scales = calibration.calibrate(plain, [{"x": data}])
    scales.save(out / "scales.json")
    onnx.save(plain, str(out / "float.onnx"))
    onnx.save(calibration.quantize(plain, scales).model, str(out / "model.onnx"))
    onnx.save(plain, str(out.with_suffix(".onnx")))
    given = sources(load_model(out.with_suffix(".onnx")), dataset({"x": data}))
    return Artifact("onnx", out, "s", "k", (), {"precision": "int8", "in_float": []}), given


def normalizing_artifact(out: Path) -> tuple[Artifact, Sources]:
    """A product and a LayerNormalization, which TensorRT 8.5 lacks."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="product"),
        helper.make_node("LayerNormalization", ["m", "scale"], ["y"], name="normal"),
    ]
    return calibrated_artifact(out, nodes, ["n", 8])


def test_tensorrt_8_gets_cache_and_precisions_instead_of_pairs(tmp_path: Path) -> None:
    """For implicit int8: a float graph without LayerNormalization, its calibration cache, its precisions."""
    graph, given = normalizing_artifact(tmp_path / "graph")
    device = profile.load("jetson-agx-xavier")
    config = {"max_batch_size": 4, "fallback": False}
    made = run_stage("build", config, given, tmp_path / "out", device, graph=graph)
    (planned,) = made.metadata["engines"]
    build = manifest_form.build(EngineBuild, planned["plan"], "plan")
    nodes = onnx.load(str(made.path / build.graph)).graph.node
    assert not {"LayerNormalization", "QuantizeLinear"} & {node.op_type for node in nodes}
    assert set(read_cache((made.path / build.calibration_cache).read_text())) >= {"x", "m"}
    precisions = json.loads((made.path / build.layer_precisions).read_text())
    assert precisions["product"] == "int8"
    assert set(precisions) == {node.name for node in nodes}
    assert "normal/Sqrt" in planned["not_on_dla"]


def test_attention_by_calibration_cache_is_said_to_be_fp16(tmp_path: Path) -> None:
    """TensorRT 8.5 computed attention in fp16 whatever the cache said; the report promises no INT8 for it.

    Nothing is known of newer ones, which get a cache for their DLA alone.
    """
    xavier = profile.load("jetson-agx-xavier")
    newer = dla_profile(tmp_path / "mine.toml", "jetson-agx-orin", "10.3")
    config = {"max_batch_size": 1, "fallback": False}
    for device, right, fp16 in ((xavier, "turned", True), (xavier, "w", False), (newer, "turned", False)):
        home = tmp_path / device.name / right
        nodes = [
            helper.make_node("Transpose", ["x"], ["turned"], name="turn", perm=[0, 2, 1]),
            helper.make_node("MatMul", ["x", right], ["m"], name="multiply"),
            helper.make_node("MatMul", ["m", "w"], ["p"], name="product"),
            helper.make_node("Add", ["p", "turned"], ["y"], name="sum"),
        ]
        graph, given = calibrated_artifact(home / "graph", nodes, ["n", 8, 8])
        made = run_stage("build", config, given, home / "out", device, graph=graph)
        (planned,) = made.metadata["engines"]
        assert planned["plan"]["calibration_cache"]
        assert ("expect fp16 for its attention" in planned["why"]) is fp16


def dla_profile(path: Path, base: str, tensorrt: str) -> profile.Profile:
    """A profile of one's own that asks for the DLA."""
    runtime = f'[runtime]\nversions = "=={tensorrt}.*"\n'
    path.write_text(f'extends = "{base}"\nname = "mine"\n[dla]\ncore = 1\n{runtime}')
    return profile.load(path)


@pytest.mark.parametrize(
    ("base", "tensorrt", "cached"),
    [
        ("jetson-agx-xavier", "8.5.2", True),
        ("jetson-agx-orin", "10.3", True),
        ("jetson-agx-orin", "11.4", False),
    ],
)
def test_a_plan_for_a_dla_lists_what_falls_back(
    tmp_path: Path, base: str, tensorrt: str, cached: bool
) -> None:
    """Where a profile asks for its DLA, the plan names it, with a cache before 11 and pairs from then on."""
    graph, given = normalizing_artifact(tmp_path / "graph")
    device = dla_profile(tmp_path / "mine.toml", base, tensorrt)
    config = {"max_batch_size": 1, "fallback": False}
    made = run_stage("build", config, given, tmp_path / "out", device, graph=graph)
    (planned,) = made.metadata["engines"]
    build = manifest_form.build(EngineBuild, planned["plan"], "plan")
    assert build.dla_core == 1
    assert build.shapes["x"] == ShapeRange((1, 8), (1, 8), (1, 8))
    assert bool(build.calibration_cache) == cached
    kinds = {node.op_type for node in onnx.load(str(made.path / build.graph)).graph.node}
    assert ("QuantizeLinear" in kinds) != cached
    assert planned["not_on_dla"]
    assert "product" not in planned["not_on_dla"]
    assert "DLA 1" in planned["why"]


def test_a_dla_takes_one_shape_alone(tmp_path: Path) -> None:
    """Batches of several sizes are refused with what to set, before anything is built."""
    graph, given = normalizing_artifact(tmp_path / "graph")
    device = dla_profile(tmp_path / "mine.toml", "jetson-agx-xavier", "8.5.2")
    with pytest.raises(BadInput, match=r"export\.max_batch_size = 1"):
        run_stage("build", {"max_batch_size": 4}, given, tmp_path / "out", device, graph=graph)


def test_a_dla_has_no_fp32(tmp_path: Path) -> None:
    """A candidate in fp32 is built for the GPU, and every node says why."""
    graph, given = graph_artifact(tmp_path / "graph", RELU, [1, 3], [1, 3])
    device = dla_profile(tmp_path / "mine.toml", "jetson-agx-xavier", "8.5.2")
    config = {"max_batch_size": 1, "fallback": False}
    made = run_stage("build", config, given, tmp_path / "out", device, graph=graph)
    (planned,) = made.metadata["engines"]
    assert planned["plan"]["dla_core"] is None
    assert set(planned["not_on_dla"].values()) == {"the DLA has no fp32"}


def test_a_newer_tensorrt_gets_pairs_in_the_graph(tmp_path: Path) -> None:
    """From 10 on the graph itself says int8: symmetric, with float16 around it, and no cache."""
    graph, given = normalizing_artifact(tmp_path / "graph")
    config = {"max_batch_size": 4, "fallback": False}
    device = profile.load("jetson-agx-orin")
    made = run_stage("build", config, given, tmp_path / "out", device, graph=graph)
    build = manifest_form.build(EngineBuild, made.metadata["engines"][0]["plan"], "plan")
    model = onnx.load(str(made.path / build.graph))
    assert {"QuantizeLinear", "LayerNormalization"} <= {node.op_type for node in model.graph.node}
    assert build.calibration_cache == build.layer_precisions == ""


@pytest.mark.parametrize("name", ["rtx-a2000", "rtx-4000-ada", "rtx-pro-blackwell"])
def test_an_rtx_engine_is_really_built(tmp_path: Path, name: str) -> None:
    """TensorRT-RTX builds for a GPU that is not here; the engine's fingerprint names GPU, build and graph."""
    pytest.importorskip("tensorrt_rtx", reason="needs the wheel tensorrt-rtx-cu13")
    graph, given = normalizing_artifact(tmp_path / "graph")
    device = profile.load(name)
    config = {"max_batch_size": 4, "fallback": False}
    made = run_stage("build", config, given, tmp_path / "out", device, graph=graph)
    (engine,) = made.metadata["engines"]
    assert engine["built"], engine["why"]
    assert (engine["executed"], engine["why"]) == (False, "there is no such GPU here")
    assert (made.path / engine["path"]).stat().st_size > 1000
    build = manifest_form.build(EngineBuild, engine["plan"], "plan")
    graph_digest = hashlib.sha256((made.path / build.graph).read_bytes()).hexdigest()
    assert engine["fingerprint"] == {
        "sm": str(device.accelerator.sm),
        "tensorrt_rtx": engine["version"],
        "precision": "int8",
        "graph": graph_digest,
    }
    product = next(layer for layer in engine["layers"] if layer["kind"] == "gemm")
    assert product["inputs"] == ["int8"]
    assert "product" in product["nodes"]
    assert "normal" in {node for layer in engine["layers"] for node in layer["nodes"]}
    assert engine["layers_why"] is None


@pytest.mark.parametrize(
    "listing",
    ["", "Layers:", "Layers:\n\nI/O Tensors:", "Layers:\nName: a, LayerType: kgen, Inputs: [ { Name: x }]"],
)
def test_a_listing_in_another_form_is_no_layers(listing: str) -> None:
    """Where TensorRT-RTX words its list of layers in another way, there is none, and not a wrong one."""
    assert engine_layers.read(listing) is None


def test_what_tensorrt_rtx_refuses_is_said_in_its_words(tmp_path: Path) -> None:
    """Turing has no float32 products in TensorRT-RTX: no engine, and the reason, but still a plan."""
    pytest.importorskip("tensorrt_rtx", reason="needs the wheel tensorrt-rtx-cu13")
    nodes = [helper.make_node("MatMul", ["x", "large"], ["y"], name="product")]
    graph, given = graph_artifact(tmp_path / "graph", nodes, ["n", 3], ["n", 3])
    turing = profile.load("rtx-a2000")
    turing = turing.model_copy(
        update={"accelerator": turing.accelerator.model_copy(update={"sm": 75}), "name": "turing"}
    )
    config = {"max_batch_size": 4, "fallback": False}
    made = run_stage("build", config, given, tmp_path / "out", turing, graph=graph)
    (engine,) = made.metadata["engines"]
    assert engine["built"] is False
    assert "FP32 GEMM is not supported" in engine["why"]
    assert engine["path"] is None


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


def test_an_output_that_is_one_number_is_refused(tmp_path: Path) -> None:
    """A mean over the whole batch has no rows to give back: bad input, in three lines."""
    nodes = [helper.make_node("ReduceMean", ["x"], ["y"], keepdims=0)]
    graph, given = graph_artifact(tmp_path / "graph", nodes, ["n", 3], [])
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
