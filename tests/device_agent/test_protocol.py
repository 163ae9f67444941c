from __future__ import annotations

import json
import struct
import zlib
from typing import Any, Dict, List, Optional

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from device_agent import tensors
from device_agent.manifest import TensorSpec
from device_agent.server.content import compress, decompress
from device_agent.server.documents import model_config, model_metadata
from device_agent.server.fields import ProtocolError
from device_agent.server.interface import ModelInterface
from device_agent.server.paths import parse_path
from device_agent.server.protocol import ModelProtocol
from device_agent.tensors import NUMPY_DTYPES, object_array

# Tensors

shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)


@st.composite
def arrays(draw: Any, names: List[str]) -> Any:
    """A datatype, and an array of it."""
    dtype = draw(st.sampled_from(names))
    shape = draw(shapes)
    if dtype == "BYTES":
        count = tensors.element_count(shape)
        items = draw(st.lists(st.binary(max_size=6), min_size=count, max_size=count))
        return dtype, object_array(items, shape)
    return dtype, draw(hnp.arrays(NUMPY_DTYPES[dtype], shape))


@given(arrays(sorted(NUMPY_DTYPES)), st.integers(0, 7))
def test_binary_tensors_survive_a_round_trip(typed: Any, offset: int) -> None:
    """Every datatype comes back bit for bit, wherever in a buffer its data starts."""
    dtype, array = typed
    data = bytes(tensors.encode_binary(dtype, array))
    view = memoryview(b"\0" * offset + data)[offset:]
    back = tensors.decode_binary(dtype, array.shape, view)
    assert back.shape == array.shape
    assert bytes(tensors.encode_binary(dtype, back)) == data
    assert back.flags.aligned


@given(arrays(sorted(set(NUMPY_DTYPES) - tensors.NO_JSON_FORM - {"BYTES"})))
def test_json_tensors_survive_a_round_trip(typed: Any) -> None:
    """Numbers come back exactly, 64-bit integers and float32 included."""
    dtype, array = typed
    text = json.dumps(tensors.encode_json(dtype, array))
    back = tensors.decode_json(dtype, array.shape, json.loads(text))
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), min_size=2, max_size=2))
def test_json_text_survives_a_round_trip(items: List[str]) -> None:
    """Strings of any language come back as they were."""
    array = tensors.decode_json("BYTES", (2,), items)
    assert tensors.encode_json("BYTES", array) == items


def test_strided_outputs_are_written_row_major() -> None:
    """A runtime may hand out views; the wire has C order."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    assert bytes(tensors.encode_binary("FP32", array)) == array.tobytes()


def test_nested_and_flat_json_are_the_same() -> None:
    """Data may be given in either form."""
    nested = tensors.decode_json("INT32", (2, 2), [[1, 2], [3, 4]])
    flat = tensors.decode_json("INT32", (2, 2), [1, 2, 3, 4])
    np.testing.assert_array_equal(nested, flat)


@pytest.mark.parametrize(
    ("dtype", "data"),
    [
        ("INT64", [2**63, 0]),
        ("INT8", [128, 0]),
        ("UINT8", [-1, 0]),
        ("INT32", [1.5, 0]),
        ("INT32", [True, False]),
        ("BOOL", [1, 0]),
        ("FP32", ["1", "2"]),
        ("FP32", [None, 1]),
        ("FP64", [10**400, 1]),
        ("BYTES", [1, 2]),
        ("FP16", [1.0, 2.0]),
        ("FP32", [1.0]),
        ("FP32", [[1.0], 2.0]),
        ("FP32", "12"),
        ("FP32", {"a": 1}),
    ],
)
def test_json_that_does_not_fit_is_refused_not_bent(dtype: str, data: Any) -> None:
    """No value is wrapped, truncated or converted on the way in."""
    with pytest.raises(tensors.TensorError):
        tensors.decode_json(dtype, (2,), data)


@pytest.mark.parametrize(
    "data", [b"", b"\1\0\0", b"\5\0\0\0ab", struct.pack("<I", 1) + b"a" + b"extra", b"\xff\xff\xff\xff"]
)
def test_bytes_tensors_that_lie_about_their_length_are_refused(data: bytes) -> None:
    """A length beyond the data is an error, not a read beyond it."""
    with pytest.raises(tensors.TensorError):
        tensors.decode_binary("BYTES", (1,), memoryview(data))


# Requests

INTERFACE = ModelInterface(
    "m\u00f6del",
    "3",
    [TensorSpec("x", "FP32", (-1, 2)), TensorSpec("n", "INT64", (-1, 1))],
    [TensorSpec("y", "FP32", (-1, 2)), TensorSpec("h", "FP16", (-1, 1))],
    max_batch_size=4,
)
MODEL = ModelProtocol(INTERFACE)


def json_request(**changes: Any) -> Dict[str, Any]:
    """A valid request in JSON, changed; a value of None removes the key."""
    request: Dict[str, Any] = {
        "inputs": [
            {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1.0, 2.0]},
            {"name": "n", "shape": [1, 1], "datatype": "INT64", "data": [[9007199254740993]]},
        ]
    }
    request.update(changes)
    return {key: value for key, value in request.items() if value is not None}


def decode(request: Any, tail: bytes = b"", announced: Optional[int] = None) -> Any:
    """Decode a JSON document, or bytes as they are, followed by binary data."""
    head = request if isinstance(request, bytes) else json.dumps(request).encode()
    if tail and announced is None:
        announced = len(head)
    return MODEL.decode(memoryview(head + tail), announced)


def with_input(**changes: Any) -> Dict[str, Any]:
    """A request whose first input is changed."""
    request = json_request()
    request["inputs"][0].update(changes)
    return request


def test_a_json_request_is_read_exactly() -> None:
    """Shapes, rows, id and 64-bit integers arrive as they were sent."""
    request = decode(json_request(id="caf\u00e9", parameters={"timeout": 1500}))
    assert request.id == "caf\u00e9"
    assert request.head.rows == 1
    assert request.head.timeout_s == 0.0015
    assert request.inputs["x"].tolist() == [[1.0, 2.0]]
    assert request.inputs["n"].tolist() == [[9007199254740993]]
    assert [(wish.name, wish.binary) for wish in request.head.outputs] == [("y", False), ("h", False)]


def test_binary_and_json_inputs_may_be_mixed() -> None:
    """Each input says for itself how it is sent."""
    request = json_request()
    del request["inputs"][0]["data"]
    request["inputs"][0]["parameters"] = {"binary_data_size": 8}
    data = np.array([3, 4], np.float32).tobytes()
    for _ in range(2):  # the second time through what is remembered of the first
        decoded = decode(request, data)
        assert decoded.inputs["x"].tolist() == [[3.0, 4.0]]
        assert decoded.inputs["n"].tolist() == [[9007199254740993]]


def test_a_repeated_head_is_never_answered_with_an_older_body() -> None:
    """Requests with the same JSON and other raw data stay apart."""
    request = json_request()
    for item, size in zip(request["inputs"], (8, 8)):
        del item["data"]
        item["parameters"] = {"binary_data_size": size}
    for value in (1.0, 2.0, 3.0):
        tail = np.array([value, value], np.float32).tobytes() + np.array([int(value)], np.int64).tobytes()
        decoded = decode(request, tail)
        assert decoded.inputs["x"].tolist() == [[value, value]]
        assert decoded.inputs["n"].tolist() == [[int(value)]]
    with pytest.raises(ProtocolError):
        decode(request, tail[:-1])


@pytest.mark.parametrize(
    ("outputs", "parameters", "wishes"),
    [
        (None, None, [("y", False), ("h", False)]),
        ([], {"binary_data_output": True}, [("y", True), ("h", True)]),
        ([{"name": "h"}], {"binary_data_output": True}, [("h", True)]),
        (
            [{"name": "h", "parameters": {"binary_data": True}}, {"name": "y"}],
            None,
            [("h", True), ("y", False)],
        ),
        ([{"name": "y", "parameters": {"binary_data": False}}], {"binary_data_output": True}, [("y", False)]),
    ],
)
def test_outputs_are_those_asked_for(outputs: Any, parameters: Any, wishes: Any) -> None:
    """None named means all; an output's own setting goes before the request's."""
    request = decode(json_request(outputs=outputs, parameters=parameters))
    assert [(wish.name, wish.binary) for wish in request.head.outputs] == wishes


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "not a JSON object"),
        (json_request(inputs=None), "'inputs'"),
        (json_request(inputs=[1]), "'inputs'"),
        (json_request(inputs=[]), "needs the input 'x'"),
        (json_request(inputs=json_request()["inputs"] * 2), "given twice"),
        (json_request(inputs=[*json_request()["inputs"], {"name": "z"}]), "no input 'z'"),
        (json_request(inputs=[*json_request()["inputs"], {"name": ["x"]}]), "no input ['x']"),
        (json_request(id=7), "'id'"),
        (json_request(parameters=[]), "'parameters'"),
        (json_request(parameters={"timeout": -1}), "'timeout'"),
        (json_request(parameters={"sequence_id": 5}), "sequence_id"),
        (json_request(outputs="y"), "'outputs'"),
        (json_request(outputs=[{"name": "q"}]), "no output 'q'"),
        (json_request(outputs=[{"name": "y", "parameters": {"classification": "3"}}]), "classification"),
        (json_request(outputs=[{"name": "y", "parameters": {"binary_data": 1}}]), "binary_data"),
        (with_input(datatype="INT32"), "is FP32, not 'INT32'"),
        (with_input(datatype=None), "is FP32"),
        (with_input(shape=[1, 3]), "[1, 3]"),
        (with_input(shape=[2]), "[2]"),
        (with_input(shape=[-1, 2]), "no valid shape"),
        (with_input(shape=[True, 2]), "no valid shape"),
        (with_input(shape="1,2"), "no valid shape"),
        (with_input(shape=[2, 2], data=[1, 2, 3, 4]), "differ along the batch axis"),
        (with_input(data=[1.0]), "has 1 elements"),
        (with_input(data=["a", "b"]), "type str"),
        (with_input(parameters={"binary_data_size": 8}), "both data and binary_data_size"),
        (with_input(parameters={"shared_memory_region": "r"}), "a size"),
        (with_input(parameters={"shared_memory_region": "r", "shared_memory_byte_size": 8}), "'r' is not"),
    ],
)
def test_a_bad_request_is_told_what_is_wrong(request_: Any, message: str) -> None:
    """Every mistake is a 400 that names it."""
    with pytest.raises(ProtocolError) as caught:
        decode(request_)
    assert caught.value.status == 400
    assert message in caught.value.message


@pytest.mark.parametrize("rows", [0, 5])
def test_batches_are_held_to_what_was_tested(rows: int) -> None:
    """No rows, or more than max_batch_size, is a 400."""
    request = json_request()
    for item in request["inputs"]:
        item["shape"][0] = rows
        item["data"] = [1] * (rows * item["shape"][1])
    with pytest.raises(ProtocolError, match="batches of 1 to 4"):
        decode(request)


@pytest.mark.parametrize(
    ("size", "tail", "announced"),
    [
        (8, b"\0" * 7, None),
        (8, b"\0" * 9, None),
        (4, b"\0" * 4, None),
        (8, b"", None),
        (8, b"\0" * 8, 10_000),
    ],
)
def test_binary_data_must_have_the_announced_size(size: int, tail: bytes, announced: Any) -> None:
    """Too short, too long, or not what the shape needs: 400."""
    request = json_request()
    del request["inputs"][0]["data"]
    request["inputs"][0]["parameters"] = {"binary_data_size": size}
    with pytest.raises(ProtocolError) as caught:
        decode(request, tail, announced)
    assert caught.value.status == 400


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=9), children, max_size=3)
    ),
    max_leaves=8,
)
keys = st.sampled_from(["name", "shape", "datatype", "data", "parameters"])


@settings(max_examples=300)
@given(
    st.sampled_from(["id", "parameters", "inputs", "outputs"]),
    st.integers(0, 1),
    keys,
    json_values,
    st.booleans(),
    st.binary(max_size=20),
)
def test_no_request_breaks_the_parser(
    top: str, index: int, key: str, value: Any, deep: bool, tail: bytes
) -> None:
    """Whatever a client sends, the outcome is a checked request or a 400."""
    request = json_request()
    if deep:
        request["inputs"][index][key] = value
    else:
        request[top] = value
    status = 200
    try:
        decoded = decode(request, tail)
    except ProtocolError as error:
        status = error.status
    else:
        assert set(decoded.inputs) == {"x", "n"}
    assert status in (200, 400)


# Answers


def test_an_answer_holds_json_and_raw_tensors_in_order() -> None:
    """The JSON announces each raw tensor's size, and they follow in that order."""
    request = decode(json_request(id='a\u2603"', parameters={"binary_data_output": True}))
    y, h = np.array([[1, 2]], np.float32), np.array([[0.5]], np.float16)
    answer = MODEL.encode(request, {"h": h, "y": y})
    body = b"".join(answer.parts)
    document = json.loads(body[: answer.json_bytes])
    assert document["model_name"] == "m\u00f6del"
    assert document["model_version"] == "3"
    assert document["id"] == 'a\u2603"'
    assert [o["name"] for o in document["outputs"]] == ["y", "h"]
    assert [o["parameters"]["binary_data_size"] for o in document["outputs"]] == [8, 2]
    assert body[answer.json_bytes :] == y.tobytes() + h.tobytes()


def test_an_answer_in_json_has_no_binary_part() -> None:
    """A JSON answer is one document."""
    request = decode(json_request(outputs=[{"name": "y"}]))
    answer = MODEL.encode(request, {"y": np.array([[0.1, -2]], np.float32), "h": np.zeros((1, 1))})
    assert answer.json_bytes is None
    (output,) = json.loads(b"".join(answer.parts))["outputs"]
    assert output["shape"] == [1, 2]
    assert np.array(output["data"], np.float32).tolist() == np.array([0.1, -2], np.float32).tolist()


def test_types_without_a_json_form_say_so() -> None:
    """FP16 asked for as JSON is a 400 that tells the way out."""
    request = decode(json_request())
    with pytest.raises(ProtocolError, match="binary"):
        MODEL.encode(request, {"y": np.zeros((1, 2), np.float32), "h": np.zeros((1, 1), np.float16)})


# Documents


def test_metadata_shows_the_batch_axis_and_config_hides_it() -> None:
    """As Triton does: metadata shapes start with -1, config dims leave the batch out."""
    metadata = model_metadata(INTERFACE, ["2", "3"], "onnxruntime")
    assert metadata["inputs"][0] == {"name": "x", "datatype": "FP32", "shape": [-1, 2]}
    assert metadata["versions"] == ["2", "3"]
    config = model_config(INTERFACE, "d1", "onnxruntime", {"max_queue_delay_microseconds": 0})
    assert config["max_batch_size"] == 4
    assert config["input"][0] == {"name": "x", "data_type": "TYPE_FP32", "dims": [2]}
    assert config["parameters"] == {"digest": {"string_value": "d1"}}
    fixed = model_config(INTERFACE, "d1", "onnxruntime", None)
    assert fixed["max_batch_size"] == 0
    assert fixed["input"][0]["dims"] == [-1, 2]


@pytest.mark.parametrize(
    ("target", "kind", "model", "version"),
    [
        (b"/v2", "server_metadata", None, None),
        (b"/v2/", "server_metadata", None, None),
        (b"/v2/health/live", "live", None, None),
        (b"/v2/models/m", "metadata", "m", None),
        (b"/v2/models/m/versions/2", "metadata", "m", "2"),
        (b"/v2/models/m/versions/2/infer?x=1", "infer", "m", "2"),
        (b"/v2/models/a%2Eb/ready", "model_ready", "a.b", None),
        (b"/v2/models/stats", "all_statistics", None, None),
        (b"/v2/models/m/stats", "statistics", "m", None),
        (b"/v2/repository/models/m/load", "load", "m", None),
        (b"/v2/systemsharedmemory/region/r/register", "region_register", "r", None),
        (b"/v2/systemsharedmemory/unregister", "region_unregister", None, None),
        (b"/v2/cudasharedmemory/status", "cuda_status", None, None),
    ],
)
def test_paths_find_their_handler(target: bytes, kind: str, model: Any, version: Any) -> None:
    """Model and version come from the path, whatever follows a question mark."""
    route = parse_path(target)
    assert route is not None
    assert (route.kind, route.name, route.version) == (kind, model, version)


@pytest.mark.parametrize(
    "target",
    [
        b"/",
        b"/v1",
        b"/v2/models",
        b"/v2/models/m/versions",
        b"/v2/models/m/x",
        b"/v2/models/m/infer/x",
        b"/v2/systemsharedmemory/register",
    ],
)
def test_other_paths_are_nothing(target: bytes) -> None:
    """An unknown path has no handler."""
    assert parse_path(target) is None


# Content codings


@given(st.binary(max_size=2000), st.sampled_from([b"gzip", b"deflate"]))
def test_compressed_bodies_survive_a_round_trip(data: bytes, coding: bytes) -> None:
    """What is compressed for a client is what decompresses."""
    parts, header = compress([data[:7], data[7:]], coding)
    assert header == b"Content-Encoding: " + coding + b"\r\n"
    assert bytes(decompress(memoryview(b"".join(parts)), coding, 4000)) == data


@pytest.mark.parametrize(
    ("body", "coding", "status"),
    [
        (b"x", b"br", 501),
        (b"not compressed", b"gzip", 400),
        (zlib.compress(b"a" * 100)[:-3], b"deflate", 400),
        (zlib.compress(b"a") + b"more", b"deflate", 400),
        (zlib.compress(b"a" * 1001), b"deflate", 413),
    ],
)
def test_bad_compression_has_its_own_status(body: bytes, coding: bytes, status: int) -> None:
    """Unknown is 501, corrupt 400, and a small body that grows beyond the limit 413."""
    with pytest.raises(ProtocolError) as caught:
        decompress(memoryview(body), coding, 1000)
    assert caught.value.status == status


def test_a_list_of_readable_codings_is_not_a_wish() -> None:
    """Clients that always name every coding they know get the answer uncompressed."""
    assert compress([b"abc"], b"gzip, deflate, br") == ([b"abc"], b"")
    assert compress([b"abc"], None) == ([b"abc"], b"")
