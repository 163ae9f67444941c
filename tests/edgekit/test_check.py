"""``edgekit check``: verdicts for devices that are not here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from host_testing import Forker, assert_three_lines
from lowering_graphs import one
from onnx import ModelProto

from edgekit import profile
from edgekit.check.memory import need
from edgekit.check.verdicts import Verdict, check
from edgekit.models import load_model


def verdicts(model: ModelProto, home: Path, *names: str) -> dict[str, Verdict]:
    """Judge a graph for some profiles."""
    path = home / "model.onnx"
    onnx.save(onnx.shape_inference.infer_shapes(model), str(path))
    found = check(load_model(path), [profile.load(name) for name in names])
    return {verdict.profile: verdict for verdict in found}


NORMAL = one(
    "LayerNormalization", ["n", 8], {"s": np.full(8, 1.5, np.float32), "b": np.ones(8, np.float32)}, opset=18
)


def test_one_graph_many_devices(tmp_path: Path) -> None:
    """A graph runs as it is on new runtimes, is rewritten for old ones and says so, with the proof."""
    names = ("x86-cpu", "jetson-agx-xavier", "jetson-agx-orin-jp60", "jetson-agx-orin", "jetson-thor")
    found = verdicts(NORMAL, tmp_path, *names)
    assert [found[name].verdict for name in names] == ["runs", "lowered", "lowered", "runs", "runs"]
    xavier = found["jetson-agx-xavier"]
    assert "LayerNormalization taken apart (1)" in xavier.changes
    assert xavier.difference is not None
    assert xavier.difference < 1e-5
    assert found["jetson-agx-orin-jp60"].changes == ("opset 18 brought down to 17",)
    assert "release/8.5-GA" in xavier.source


def test_every_shipped_profile_gets_a_verdict(tmp_path: Path) -> None:
    """``all`` leaves no device out, and none of them is refused a plain graph."""
    found = verdicts(one("Relu", ["n", 8], opset=13), tmp_path, *profile.names())
    assert set(found) == set(profile.names())
    assert {verdict.verdict for verdict in found.values()} <= {"runs", "lowered"}
    assert all(found[name].precisions["int8"] for name in found)  # nothing in it could be int8


def test_an_operator_that_no_rule_reaches_is_refused_by_name(tmp_path: Path) -> None:
    """The node, its operator and the reason; ONNX Runtime runs it all the same."""
    found = verdicts(one("Det", ["n", 3, 3], opset=17), tmp_path, "jetson-agx-xavier", "x86-cpu")
    (refused,) = found["jetson-agx-xavier"].refused
    assert (refused.node, refused.op_type) == ("it", "Det")
    assert found["x86-cpu"].verdict == "runs"


def test_a_newer_opset_than_the_device_reads_is_refused(tmp_path: Path) -> None:
    """ONNX Runtime 1.19 on a Jetson Nano does not read opset 23."""
    found = verdicts(one("Relu", ["n", 8], opset=23), tmp_path, "jetson-nano")
    assert "opset 21 and older" in found["jetson-nano"].refused[0].why


def test_the_dla_lists_what_falls_back(tmp_path: Path) -> None:
    """Xavier's DLA has no Softmax, Orin's has; where there is no DLA nothing is said of one."""
    model = one("Softmax", ["n", 8], axis=-1, opset=17)
    found = verdicts(model, tmp_path, "jetson-agx-xavier", "jetson-agx-orin", "jetson-orin-nano")
    xavier, orin = found["jetson-agx-xavier"].dla, found["jetson-agx-orin"].dla
    assert xavier is not None
    assert orin is not None
    assert xavier.fallback == {"it": "the DLA has no Softmax"}
    assert orin.fallback == {}
    assert found["jetson-orin-nano"].dla is None


def test_a_model_larger_than_the_memory_is_refused(tmp_path: Path) -> None:
    """Weights and the tensors that are alive at once have to fit what the device can give."""
    model = one("Mul", [1, 1024, 1024], {"w": np.ones((1024, 1024), np.float32)}, opset=17)
    path = tmp_path / "model.onnx"
    onnx.save(onnx.shape_inference.infer_shapes(model), str(path))
    device = profile.load("jetson-agx-xavier")
    small = device.model_copy(update={"memory": device.memory.model_copy(update={"size_bytes": 12 << 20})})
    (verdict,) = check(load_model(path), [small])
    assert verdict.verdict == "refused"
    assert verdict.refused[-1].op_type == "memory"
    counted = need(onnx.load(str(path)))
    assert (counted.weights_bytes, counted.activations_bytes) == (4 << 20, 8 << 20)


def test_the_rtx_parser_is_asked_where_it_is_here(tmp_path: Path) -> None:
    """For RTX cards the real parser's word stands beside the table's."""
    pytest.importorskip("tensorrt_rtx", reason="needs the wheel tensorrt-rtx-cu13")
    found = verdicts(NORMAL, tmp_path, "rtx-4000-ada")
    oracle = found["rtx-4000-ada"].oracle
    assert oracle is not None
    assert (oracle.accepted, found["rtx-4000-ada"].verdict) == (True, "runs")
    refused = verdicts(one("Det", ["n", 3, 3], opset=17), tmp_path, "rtx-4000-ada")["rtx-4000-ada"]
    assert refused.oracle is not None
    assert (refused.oracle.accepted, refused.verdict) == (False, "refused")
    assert "Det" in refused.oracle.why


def test_the_command_prints_one_document(tmp_path: Path, forked: Forker) -> None:
    """``--json`` gives a verdict a profile; a refusal by a device that was named ends in exit code 2."""
    graph = onnx.shape_inference.infer_shapes(one("Det", ["n", 3, 3], opset=17))
    onnx.save(graph, str(tmp_path / "det.onnx"))
    everything = forked.run("check", "det.onnx", "--json", cwd=tmp_path)
    assert everything.code == 0
    checks = everything.json()["checks"]
    assert [entry["profile"] for entry in checks] == profile.names()
    named = forked.run("check", "det.onnx", "--profile", "jetson-agx-xavier", cwd=tmp_path)
    assert named.code == 2
    assert "Det 'it': Det is not among its operators" in named.out
    assert_three_lines(forked.run("check", "none.onnx", cwd=tmp_path), 2)
