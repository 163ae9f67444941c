"""A graph reads no file of the device but its own, and brings no code."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, List

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from agent_testing import linear, make_model
from device_agent.engines import external_data
from device_agent.engines.base import EngineSettings
from device_agent.engines.onnxruntime import open_graph
from device_agent.errors import Refused
from device_agent.manifest import TensorSpec

X, Y = TensorSpec("x", "FP32", (-1, 4)), TensorSpec("y", "FP32", (-1, 4))
DATA = np.arange(4, dtype=np.float32)


def _outside(location: str, **entries: str) -> onnx.TensorProto:
    """A tensor of four numbers whose data lies in a file."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": "16", **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def _adding(tensor: onnx.TensorProto) -> onnx.ModelProto:
    return make_model([helper.make_node("Add", ["x", "w"], ["y"])], [X], [Y], [tensor])


def _in_a_branch(tensor: onnx.TensorProto) -> onnx.ModelProto:
    """The tensor hides in the value of a Constant, in the branch of an If."""
    y = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    constant = helper.make_node("Constant", [], ["out"], value=tensor)
    branch = helper.make_graph([constant], "branch", [], [y])
    yes = numpy_helper.from_array(np.array(True), "yes")
    choose = helper.make_node("If", ["yes"], ["chosen"], then_branch=branch, else_branch=branch)
    return make_model([choose, helper.make_node("Add", ["x", "chosen"], ["y"])], [X], [Y], [yes])


def _sparse(tensor: onnx.TensorProto) -> onnx.ModelProto:
    indices = numpy_helper.from_array(np.arange(4, dtype=np.int64), "i")
    model = make_model([helper.make_node("Identity", ["x"], ["y"])], [X], [Y])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(tensor, indices, [4]))
    return model


def _in_a_function(tensor: onnx.TensorProto) -> onnx.ModelProto:
    model = make_model([helper.make_node("Identity", ["x"], ["y"])], [X], [Y])
    node = helper.make_node("Constant", [], ["out"], value=tensor)
    model.functions.append(helper.make_function("d", "f", [], ["out"], [node], [helper.make_opsetid("", 17)]))
    return model


PLACES = [_adding, _in_a_branch, _sparse, _in_a_function]
WRONG = {
    "/etc/passwd": "outside of its directory",
    "../secret": "outside of its directory",
    "data/../../secret": "outside of its directory",
    "..\\secret": "outside of its directory",
    "absent.bin": "that is not there",
    "": "that is not there",
    ".": "that is not there",
    "*/_ORT_MEM_ADDR_/*": "that is not there",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("location", WRONG)
def test_a_graph_cannot_read_the_devices_files(
    tmp_path: Path, location: str, place: Callable[[Any], onnx.ModelProto]
) -> None:
    """Wherever in a graph a tensor names a file elsewhere, or an address in memory, the graph is refused."""
    (tmp_path / "secret").write_bytes(DATA.tobytes())
    graph = tmp_path / "model" / "model.onnx"
    graph.parent.mkdir()
    graph.write_bytes(place(_outside(location)).SerializeToString())
    with pytest.raises(Refused, match="does not load") as caught:
        open_graph(graph, EngineSettings())
    assert WRONG[location] in caught.value.why


def test_data_beside_the_graph_is_read(tmp_path: Path) -> None:
    """Weights in a file of the same bundle are what external data is for."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "weights.bin").write_bytes(DATA.tobytes())
    (tmp_path / "model.onnx").write_bytes(_adding(_outside("data/weights.bin")).SerializeToString())
    engine = open_graph(tmp_path / "model.onnx", EngineSettings(threads=1))
    np.testing.assert_array_equal(engine.run({"x": np.ones((1, 4), np.float32)})["y"], [DATA + 1])
    engine.close()


def test_an_onnx_graph_cannot_pass_for_another_format(tmp_path: Path) -> None:
    """Only the suffix makes a file one of ONNX Runtime's own format, as for ONNX Runtime itself."""
    model = _adding(_outside("/etc/passwd"))
    model.producer_name = "ORTM"
    data = model.SerializeToString()
    assert data[4:8] == b"ORTM"
    (tmp_path / "model.onnx").write_bytes(data)
    with pytest.raises(Refused) as caught:
        open_graph(tmp_path / "model.onnx", EngineSettings())
    assert "outside of its directory" in caught.value.why


def test_a_bundle_brings_no_operators_of_its_own(tmp_path: Path) -> None:
    """An operator that ONNX Runtime does not have is refused: no library is ever loaded for it."""
    model = make_model([helper.make_node("Run", ["x"], ["y"], domain="evil")], [X], [Y])
    model.opset_import.append(helper.make_opsetid("evil", 1))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "evil.so").write_bytes(b"\x7fELF")
    with pytest.raises(Refused, match="does not load") as caught:
        open_graph(tmp_path / "model.onnx", EngineSettings())
    assert "evil" in caught.value.why


@pytest.mark.parametrize("data", [b"", b"location", b"\x3a\xff\x01location", b"\x0b location", b"\xff" * 12])
def test_what_is_no_graph_is_refused(tmp_path: Path, data: bytes) -> None:
    """A file that is not an ONNX graph is an error of three lines."""
    (tmp_path / "model.onnx").write_bytes(data)
    with pytest.raises(Refused, match="does not load"):
        open_graph(tmp_path / "model.onnx", EngineSettings())


@given(st.data())
def test_reading_names_never_breaks(data: st.DataObject) -> None:
    """Whatever bytes a file holds, its names are read or it is no graph; nothing else happens."""
    whole = bytearray(_in_a_branch(_outside("/etc/passwd")).SerializeToString())
    for _ in range(data.draw(st.integers(0, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        names: List[str] = list(external_data.locations(cut))
    except ValueError:
        return
    assert all(isinstance(name, str) for name in names)


def test_every_tensor_of_a_graph_without_files_is_passed_over() -> None:
    """A graph whose weights are inside names no file."""
    assert list(external_data.locations(linear().SerializeToString())) == []
