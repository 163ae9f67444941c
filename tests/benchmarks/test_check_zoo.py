"""The preflight of the zoo: graphs that are kept are checked, and what has none has a reason."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx
from onnx import TensorProto, helper

ROOT = Path(__file__).resolve().parents[2]


def test_graphs_that_are_there_are_checked_for_every_profile(tmp_path: Path) -> None:
    """Each graph gets a verdict for each device, and only that is timed; a model without a graph is named."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 8]) for name in "xy")
    node = helper.make_node("LayerNormalization", ["x", "scale"], ["y"], name="normal")
    scale = helper.make_tensor("scale", TensorProto.FLOAT, [8], [0.5] * 8)
    graph = helper.make_graph([node], "g", [x], [y], [scale])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(tmp_path / "normal.onnx"))
    (tmp_path / "huge.txt").write_text("ValueError: it has more than 200,000,000 parameters")
    command = [sys.executable, "benchmarks/check_zoo.py", "--json", "--graphs", str(tmp_path), "--only"]
    ended = subprocess.run([*command, "normal", "huge"], cwd=ROOT, capture_output=True, text=True, check=True)
    figures = json.loads(ended.stdout)["figures"]
    assert figures["graphs"] == 1
    assert sum(figures["verdicts"].values()) == figures["profiles"]
    assert figures["verdicts"]["lowered"] > 0
    assert figures["not_exported"] == {"huge": "ValueError: it has more than 200,000,000 parameters"}
    assert 0 < figures["seconds"] < 600
