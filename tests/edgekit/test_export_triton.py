"""A bundle as a Triton model repository: Triton's own protobuf reads it, and our agent serves the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tritonclient.http
from google.protobuf import text_format
from host_testing import assert_three_lines, edgekit
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from repository_agent import agent_on
from tritonclient.grpc import model_config_pb2

from device_agent.manifest import Contract, Golden, Manifest, Step, TensorSpec, Tolerance
from device_agent.repository.document import from_text
from edgekit import bundle, export_triton
from edgekit.errors import BadInput

WEIGHTS = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)


def manifest_of(**changes: Any) -> Manifest:
    """What is known of the bundle of :func:`packed`."""
    known: dict[str, Any] = {
        "schema": 1,
        "name": "demo",
        "version": 3,
        "profile": "x86-cpu",
        "architecture": "x86_64",
        "graph": "model.onnx",
        "precision": "fp32",
        "inputs": (TensorSpec("x", "FP32", (-1, 8)),),
        "outputs": (TensorSpec("scores", "FP32", (-1, 4)),),
        "max_batch_size": 8,
        "files": (),
        "engines": (),
        "golden": Golden("golden_inputs.npz", "golden_outputs.npz", {"scores": Tolerance(1e-5, 1e-5)}),
        "contract": Contract(),
    }
    return Manifest(**{**known, **changes})


def graph() -> bytes:
    """``scores`` is ``x W``."""
    value = helper.make_tensor_value_info
    made = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["scores"])],
        "demo",
        [value("x", TensorProto.FLOAT, ["n", 8])],
        [value("scores", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(WEIGHTS, "w")],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


@pytest.fixture
def packed(tmp_path: Path) -> bundle.Bundle:
    """A bundle, packed."""
    staging = tmp_path / "staging"
    staging.mkdir()
    (staging / "model.onnx").write_bytes(graph())
    x = np.ones((1, 8), np.float32)
    np.savez(staging / "golden_inputs.npz", x=x)
    np.savez(staging / "golden_outputs.npz", scores=x @ WEIGHTS)
    return bundle.pack(staging, manifest_of(), tmp_path / "out")


def parsed(text: str) -> Any:
    """``config.pbtxt`` as Triton's own protobuf has it."""
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def test_tritons_own_protobuf_reads_the_configuration(packed: bundle.Bundle, tmp_path: Path) -> None:
    """Platform, batch, names, types, dims and labels are what the bundle's manifest says."""
    labels = tmp_path / "names.txt"
    labels.write_text("ant\nbee\ncat\ndog\n")
    done = export_triton.export(packed.archive, tmp_path / "repository", str(labels))
    assert (done.name, done.version, done.digest) == ("demo", 3, packed.digest)
    config = parsed((done.directory / "config.pbtxt").read_text())
    assert (config.name, config.platform, config.max_batch_size) == ("demo", "onnxruntime_onnx", 8)
    assert [(t.name, t.data_type, list(t.dims)) for t in config.input] == [
        ("x", model_config_pb2.TYPE_FP32, [8])
    ]
    assert (config.output[0].name, config.output[0].label_filename) == ("scores", "labels.txt")
    assert config.HasField("dynamic_batching")
    assert (done.directory / "labels.txt").read_text() == labels.read_text()
    assert (done.directory / "3" / "model.onnx").read_bytes() == graph()
    onnx.checker.check_model(done.directory / "3" / "model.onnx")


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
DTYPES = ["BOOL", "UINT8", "INT64", "FP16", "FP32", "FP64", "BF16", "BYTES"]


@given(NAMES, st.sampled_from(DTYPES), st.lists(st.sampled_from([-1, 1, 3]), max_size=3), st.integers(1, 64))
def test_any_signature_is_written_as_triton_and_the_agent_read_it(
    name: str, dtype: str, shape: list[int], batch: int
) -> None:
    """Whatever a tensor is called and however it is shaped, both parsers read the same back."""
    specs = (TensorSpec(name, dtype, tuple(shape)),)
    text = export_triton.config_text(
        manifest_of(inputs=specs, outputs=specs, max_batch_size=batch), {name: "labels.txt"}
    )
    theirs = parsed(text)
    batched = shape[:1] == [-1]
    dims = shape[1:] if batched else shape
    assert theirs.max_batch_size == (batch if batched else 0)
    assert (theirs.input[0].name, list(theirs.input[0].dims)) == (name, dims or [1])
    assert theirs.input[0].HasField("reshape") == (not dims)
    assert theirs.output[0].label_filename == "labels.txt"
    ours = from_text(text, "config.pbtxt").document
    assert ours["input"][0]["name"] == name
    assert ours["input"][0]["dims"] == list(theirs.input[0].dims)
    data_type = model_config_pb2.DataType.Name(theirs.input[0].data_type)
    assert ours["input"][0]["data_type"] == data_type


def test_the_agent_serves_the_repository_like_the_bundle(packed: bundle.Bundle, tmp_path: Path) -> None:
    """The round trip: a bundle exported for Triton gives the same outputs, bit for bit."""
    repository = tmp_path / "repository"
    result = edgekit("export-triton", str(packed.directory), str(repository), "--json", cwd=tmp_path)
    assert result.code == 0
    assert json.loads(result.out)["directory"] == str(repository / "demo")
    x = np.random.default_rng(1).standard_normal((3, 8)).astype(np.float32)
    session = onnxruntime.InferenceSession(graph(), providers=["CPUExecutionProvider"])
    with (
        agent_on(repository, tmp_path) as address,
        tritonclient.http.InferenceServerClient(address) as client,
    ):
        tensor = tritonclient.http.InferInput("x", [3, 8], "FP32")
        tensor.set_data_from_numpy(x)
        answer = client.infer("demo", [tensor], model_version="3").as_numpy("scores")
        assert client.get_model_config("demo")["max_batch_size"] == 8
    assert np.array_equal(answer, session.run(None, {"x": x})[0])


def test_exporting_again_changes_nothing(packed: bundle.Bundle, tmp_path: Path) -> None:
    """The same bundle may be exported any number of times; versions of one model stand side by side."""
    repository = tmp_path / "repository"
    first = export_triton.export(packed.directory, repository)
    before = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in first.directory.rglob("*.*")}
    export_triton.export(packed.archive, repository)
    assert before == {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in first.directory.rglob("*.*")}


def test_what_is_there_is_never_mixed_up(packed: bundle.Bundle, tmp_path: Path) -> None:
    """A model of that name that is not this one is left alone, and the error says what to do."""
    repository = tmp_path / "repository"
    done = export_triton.export(packed.directory, repository)
    (done.directory / "3" / "model.onnx").write_bytes(b"another")
    with pytest.raises(BadInput, match="another graph"):
        export_triton.export(packed.directory, repository)
    (done.directory / "config.pbtxt").write_text("max_batch_size: 2")
    with pytest.raises(BadInput, match="another model"):
        export_triton.export(packed.directory, repository)
    assert (done.directory / "config.pbtxt").read_text() == "max_batch_size: 2"


def test_a_composition_is_refused(tmp_path: Path) -> None:
    """A model of several graphs is not exported by halves."""
    staging = tmp_path / "staging"
    staging.mkdir()
    for name in ("model.onnx", "after.onnx", "golden_inputs.npz", "golden_outputs.npz"):
        (staging / name).write_bytes(graph())
    steps = (
        Step("model", "model.onnx", {"x": "x"}, {"scores": "middle"}),
        Step("after", "after.onnx", {"x": "middle"}, {"scores": "scores"}),
    )
    packed = bundle.pack(staging, manifest_of(composition=steps), tmp_path / "out")
    with pytest.raises(BadInput, match="2 graphs"):
        export_triton.export(packed.directory, tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_wrong_labels_are_three_lines(packed: bundle.Bundle, tmp_path: Path) -> None:
    """A file that is missing, or an output that does not exist, is an error before anything is written."""
    for labels in ("missing.txt", "score=missing.txt"):
        result = edgekit("export-triton", str(packed.directory), "there", "--labels", labels, cwd=tmp_path)
        assert_three_lines(result, 2)
    assert not (tmp_path / "there").exists()
