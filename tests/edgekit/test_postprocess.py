"""Post-processing: outside of the compression, behind the model in the bundle, served as one model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import parser

from device_agent.manifest import TensorSpec
from edgekit import ort, postprocess
from edgekit.errors import BadInput

OUTPUTS = (TensorSpec("output0", "FP32", (-1, 4, 6, 6)),)


def graph(body: str, inputs: str = "float[n, 4, 6, 6] output0", outputs: str = "float[n, 6, 6] best") -> str:
    """A graph in ONNX's text form."""
    return f'<ir_version: 9, opset_import: ["": 17]> behind ({inputs}) => ({outputs}) {{ {body} }}'


LARGEST = graph("best = ReduceMax <axes = [1], keepdims = 0> (output0)")


def write(path: Path, text: str) -> Path:
    """Save a graph."""
    onnx.save(parser.parse_model(text), path)
    return path


def test_it_runs_behind_a_model(tmp_path: Path) -> None:
    """The model's outputs go in, and both theirs and its own come out, at any batch."""
    behind = postprocess.load(write(tmp_path / "largest.onnx", LARGEST).name, tmp_path, OUTPUTS)
    assert [tensor.shape for tensor in behind.outputs] == [(-1, 6, 6)]
    double = graph("output0 = Add (x, x)", "float[n, 4, 6, 6] x", "float[n, 4, 6, 6] output0")
    chain = ort.open_chain(parser.parse_model(double).SerializeToString(), behind.graph)
    for rows in (1, 3):
        x = np.random.default_rng(0).normal(size=(rows, 4, 6, 6)).astype(np.float32)
        made = chain.run({"x": x})
        assert list(made) == list(chain.outputs) == ["output0", "best"]
        assert np.array_equal(made["best"], (2 * x).max(axis=1))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (graph("best = Identity (other)", "float[n, 4, 6, 6] other"), "it takes 'other' FP32"),
        (graph("best = Cast <to = 1> (output0)", "double[n, 4, 6, 6] output0"), "it takes 'output0' FP64"),
        (graph("best = ReduceMax <axes = [0], keepdims = 0> (output0)"), "loses the batch axis"),
        (graph("best = Squeeze (missing)"), "missing"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    """A graph that takes what the model does not give, or mixes up its batch, is refused before any work."""
    path = write(tmp_path / "graph.onnx", text)
    with pytest.raises(BadInput) as caught:
        postprocess.load(path.name, tmp_path, OUTPUTS)
    assert reason in str(caught.value)


def test_a_file_that_is_no_graph_is_named(tmp_path: Path) -> None:
    """A missing or damaged file is named."""
    (tmp_path / "text.onnx").write_bytes(b"no graph")
    for name in ("text.onnx", "missing.onnx"):
        with pytest.raises(BadInput, match=name):
            postprocess.load(name, tmp_path, OUTPUTS)
