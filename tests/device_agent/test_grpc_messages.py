"""The messages of gRPC against protobuf itself, with the descriptors that Triton's client carries."""

from __future__ import annotations

import struct
from typing import Any, Dict, Iterator, List, Tuple

import numpy as np
import pytest
from google.protobuf import descriptor as protobuf
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2, service_pb2

from device_agent.manifest import TensorSpec
from device_agent.server.fields import ProtocolError
from device_agent.server.grpc_messages import SCHEMA
from device_agent.server.grpc_protocol import GrpcProtocol, open_envelope, stream_error, stream_response
from device_agent.server.interface import ModelInterface
from device_agent.server.wire import WireError, delimited, read_fields, read_packed_varints, signed, varint
from device_agent.server.wire_schema import parse_schema
from device_agent.tensors import NUMPY_DTYPES

# Names that nested messages have in Triton's own files.
NESTED = {
    "TensorMetadata": "ModelMetadataResponse.TensorMetadata",
    "InferInputTensor": "ModelInferRequest.InferInputTensor",
    "InferRequestedOutputTensor": "ModelInferRequest.InferRequestedOutputTensor",
    "InferOutputTensor": "ModelInferResponse.InferOutputTensor",
    "ModelIndex": "RepositoryIndexResponse.ModelIndex",
    "RegionStatus": "SystemSharedMemoryStatusResponse.RegionStatus",
    "LatestVersions": "ModelVersionPolicy.Latest",
    "SpecificVersions": "ModelVersionPolicy.Specific",
    "InstanceKind": "ModelInstanceGroup.Kind",
    "WarmupInput": "ModelWarmup.Input",
    "TimeoutAction": "ModelQueuePolicy.TimeoutAction",
}
OF_GOOGLE = {"Empty", "Status", "Any", "RetryInfo", "Duration"}  # not in Triton's files
SCALARS = {
    protobuf.FieldDescriptor.TYPE_STRING: "string",
    protobuf.FieldDescriptor.TYPE_BYTES: "bytes",
    protobuf.FieldDescriptor.TYPE_DOUBLE: "double",
    protobuf.FieldDescriptor.TYPE_BOOL: "bool",
    protobuf.FieldDescriptor.TYPE_INT32: "int32",
    protobuf.FieldDescriptor.TYPE_INT64: "int64",
    protobuf.FieldDescriptor.TYPE_UINT32: "uint32",
    protobuf.FieldDescriptor.TYPE_UINT64: "uint64",
}


def descriptor_of(name: str) -> Any:
    """Triton's descriptor of a message or an enumeration of ours."""
    first, *rest = NESTED.get(name, name).split(".")
    for file in (service_pb2.DESCRIPTOR, model_config_pb2.DESCRIPTOR):
        found = file.message_types_by_name.get(first) or file.enum_types_by_name.get(first)
        for part in rest:
            found = found and (found.nested_types_by_name.get(part) or found.enum_types_by_name.get(part))
        if found is not None:
            return found
    raise AssertionError(f"Triton has no {name}")


def kind_of(field: Any) -> str:
    """The kind of a field as our tables write it."""
    named = field.message_type or field.enum_type
    if named is None:
        return SCALARS[field.type]
    short = named.full_name.split(".", 1)[1]
    return next((ours for ours, theirs in NESTED.items() if theirs == short), short)


@pytest.mark.parametrize("name", sorted(set(SCHEMA.messages) - OF_GOOGLE))
def test_every_field_is_that_of_triton(name: str) -> None:
    """Number, name, kind, repetition and choice of every field are what Triton's client expects."""
    theirs = {field.number: field for field in descriptor_of(name).fields}
    for number, field in SCHEMA.messages[name].items():
        other = theirs[number]
        assert other.name == field.name
        if field.name in ("contents", "all"):  # read elsewhere, and an empty message
            continue
        entry = (
            other.message_type if other.message_type and other.message_type.GetOptions().map_entry else None
        )
        if entry is not None:
            assert kind_of(entry.fields_by_name["key"]) == field.key_kind
            assert kind_of(entry.fields_by_name["value"]) == field.kind
        else:
            assert field.key_kind is None
            assert kind_of(other) == field.kind
            assert is_repeated(other) == field.repeated
        assert (other.containing_oneof is not None) >= field.chosen


def is_repeated(field: Any) -> bool:
    """Whether a field is a list, in old and new protobuf."""
    modern = getattr(field, "is_repeated", None)
    return field.label == field.LABEL_REPEATED if modern is None else bool(modern)


@pytest.mark.parametrize("name", sorted(SCHEMA.enumerations))
def test_every_enumeration_is_that_of_triton(name: str) -> None:
    """Each of our names has Triton's number."""
    theirs = {value.name: value.number for value in descriptor_of(name).values}
    assert SCHEMA.enumerations[name].items() <= theirs.items()


def test_every_call_has_its_messages() -> None:
    """Triton's service has no message that our tables need and lack."""
    for name in SCHEMA.messages:
        for field in SCHEMA.messages[name].values():
            known = field.kind in SCALARS.values() or field.kind in SCHEMA.messages
            assert known or field.kind in SCHEMA.enumerations, field


# The wire format

uint64 = st.integers(0, 2**64 - 1)
int64 = st.integers(-(2**63), 2**63 - 1)


@given(st.lists(uint64))
def test_packed_numbers_survive(numbers: List[int]) -> None:
    """Any 64-bit numbers come back exactly."""
    packed = b"".join(map(varint, numbers))
    assert read_packed_varints(memoryview(packed)).tolist() == numbers


@given(int64)
def test_negative_numbers_survive(number: int) -> None:
    """Signed numbers travel in two's complement."""
    (decoded,) = read_packed_varints(memoryview(varint(number))).tolist()
    assert signed(decoded) == number


@given(st.binary(max_size=64))
def test_any_bytes_are_a_message_or_an_error(data: bytes) -> None:
    """Nothing but WireError comes out of bytes from a stranger, and no field lies outside them."""
    for message in ("ModelInferRequest", "RepositoryModelLoadRequest", "ModelConfigRequest"):
        try:
            SCHEMA.decode(message, memoryview(data))
        except WireError:
            continue
    try:
        spans = [(start, stop) for _, _, _, start, stop in read_fields(memoryview(data))]
    except WireError:
        return
    assert [0, *(stop for _, stop in spans)] == [*(start for start, _ in spans), len(data)]


@pytest.mark.parametrize(
    "data", [b"\xff" * 11, b"\xff", b"\x0a\x05ab", b"\x0b", b"\x02\x00", b"\x0a\x01\xff"]
)
def test_damaged_messages_are_refused(data: bytes) -> None:
    """Numbers without end, fields cut short, groups, field 0 and text that is not UTF-8 are errors."""
    with pytest.raises(WireError):
        SCHEMA.decode("ModelReadyRequest", memoryview(data))


def test_unknown_fields_and_types_are_skipped() -> None:
    """A newer client's fields, or a known number with another type, do not disturb the others."""
    known = service_pb2.ModelReadyRequest(name="m", version="2").SerializeToString()
    strange = b"\xfa\x01\x02xy" + b"\x08\x05" + b"\x19" + bytes(8) + b"\x1d" + bytes(4)
    assert SCHEMA.decode("ModelReadyRequest", memoryview(strange + known)) == {"name": "m", "version": "2"}


def test_numbers_one_by_one_are_the_same_as_packed() -> None:
    """Protocol Buffers 2 writers do not pack."""
    table = parse_schema("message M\n  1 int64* n\n")
    assert table.decode("M", memoryview(b"\x08\x01\x0a\x02\x02\x03\x08\x04")) == {"n": [1, 2, 3, 4]}


parameters = st.dictionaries(
    st.text(max_size=5),
    st.one_of(
        st.fixed_dictionaries({"bool_param": st.booleans()}),
        st.fixed_dictionaries({"int64_param": int64}),
        st.fixed_dictionaries({"uint64_param": uint64}),
        st.fixed_dictionaries({"string_param": st.text(max_size=5)}),
        st.fixed_dictionaries({"double_param": st.floats(allow_nan=False)}),
    ),
    max_size=3,
)
tensors = st.lists(
    st.fixed_dictionaries({
        "name": st.text(max_size=4),
        "datatype": st.sampled_from(sorted(NUMPY_DTYPES)),
        "shape": st.lists(int64, max_size=4),
        "parameters": parameters,
    }),
    max_size=3,
)  # fmt: skip


@given(parameters, tensors)
def test_we_read_what_protobuf_writes_and_it_reads_what_we_write(
    given_parameters: Dict[str, Any], inputs: List[Dict[str, Any]]
) -> None:
    """Every value of a request survives both ways between protobuf's code and ours."""
    values = {"parameters": given_parameters, "inputs": inputs, "outputs": []}
    theirs = service_pb2.ModelInferRequest()
    for key, choice in given_parameters.items():
        fill(theirs.parameters[key], choice)
    for item in inputs:
        tensor = theirs.inputs.add(name=item["name"], datatype=item["datatype"], shape=item["shape"])
        for key, choice in item["parameters"].items():
            fill(tensor.parameters[key], choice)
    read = SCHEMA.decode("ModelInferRequest", memoryview(theirs.SerializeToString()))
    written = [{"name": "", "datatype": "", **item} for item in read.pop("inputs")]
    assert written == inputs
    assert read == {"parameters": given_parameters, "outputs": []}
    assert service_pb2.ModelInferRequest.FromString(SCHEMA.encode("ModelInferRequest", values)) == theirs


def fill(parameter: Any, choice: Dict[str, Any]) -> None:
    """Set the chosen value of one of protobuf's parameters."""
    for name, value in choice.items():
        setattr(parameter, name, value)


# Inference messages


def protocol_for(dtype: str, shape: Tuple[int, ...] = (-1, 3)) -> GrpcProtocol:
    """A model ``m`` whose ``y`` is like its ``x``."""
    spec = (TensorSpec("x", dtype, shape), TensorSpec("y", dtype, shape))
    return GrpcProtocol(ModelInterface("m", "3", spec[:1], spec[1:], 4))


def request_to(dtype: str, rows: int = 1, **fields: Any) -> Any:
    """A request without data."""
    message = service_pb2.ModelInferRequest(model_name="m", **fields)
    message.inputs.add(name="x", datatype=dtype, shape=[rows, 3])
    return message


CONTENTS: Dict[str, Tuple[str, List[Any]]] = {
    "BOOL": ("bool_contents", [True, False, True]),
    "INT8": ("int_contents", [-128, 0, 127]),
    "INT16": ("int_contents", [-32768, 0, 32767]),
    "INT32": ("int_contents", [-(2**31), 0, 2**31 - 1]),
    "INT64": ("int64_contents", [-(2**63), 0, 2**63 - 1]),
    "UINT8": ("uint_contents", [0, 1, 255]),
    "UINT16": ("uint_contents", [0, 1, 65535]),
    "UINT32": ("uint_contents", [0, 1, 2**32 - 1]),
    "UINT64": ("uint64_contents", [0, 2**63, 2**64 - 1]),
    "FP32": ("fp32_contents", [-1.5, 0.0, 3.25]),
    "FP64": ("fp64_contents", [-1.5, 1e300, 0.1]),
    "BYTES": ("bytes_contents", [b"", b"\xff\x00", b"text"]),
}


@pytest.mark.parametrize("dtype", sorted(CONTENTS))
def test_typed_contents_carry_every_type(dtype: str) -> None:
    """Values at the ends of each type's range arrive exactly, in the tensor's own type."""
    field, values = CONTENTS[dtype]
    message = request_to(dtype)
    getattr(message.inputs[0].contents, field).extend(values)
    protocol = protocol_for(dtype)
    array = protocol.decode(open_envelope(message.SerializeToString())).inputs["x"]
    assert array.dtype == NUMPY_DTYPES[dtype]
    assert array.tolist() == [values]


@pytest.mark.parametrize("dtype", sorted(set(NUMPY_DTYPES) - {"BYTES"}))
def test_raw_contents_are_viewed_and_answered(dtype: str) -> None:
    """Raw bytes of every type go in and out bit for bit."""
    data = np.arange(3).astype(NUMPY_DTYPES[dtype]).tobytes()
    message = request_to(dtype, id="caf\u00e9", raw_input_contents=[data])
    protocol = protocol_for(dtype)
    for _ in range(2):  # the second time from the cache
        request = protocol.decode(open_envelope(message.SerializeToString()))
        assert request.inputs["x"].tobytes() == data
        answer = service_pb2.ModelInferResponse.FromString(
            protocol.encode(request, {"y": request.inputs["x"]})
        )
        assert answer.raw_output_contents == [data]
        assert (answer.model_name, answer.model_version, answer.id) == ("m", "3", "caf\u00e9")
        (output,) = answer.outputs
        assert (output.name, output.datatype, list(output.shape)) == ("y", dtype, [1, 3])


def problems() -> Iterator[Tuple[Any, str]]:
    """Requests for a FP32 or INT8 model, and what is wrong with each."""
    raw = struct.pack("<3f", 1, 2, 3)
    both = request_to("FP32", raw_input_contents=[raw])
    both.inputs[0].contents.fp32_contents.extend([1, 2, 3])
    yield both, "raw_input_contents"
    yield request_to("FP32", raw_input_contents=[raw, raw]), "2 tensors for 1 inputs"
    yield request_to("FP32", raw_input_contents=[raw[:-1]]), "11 bytes"
    yield request_to("FP32"), "0 FP32 elements"
    yield request_to("FP64", raw_input_contents=[raw]), "is FP32, not 'FP64'"
    yield request_to("FP32", rows=5, raw_input_contents=[raw]), "batches of 1 to 4"
    wrong_field = request_to("FP32")
    wrong_field.inputs[0].contents.fp64_contents.extend([1, 2, 3])
    yield wrong_field, "0 FP32 elements"
    negative = request_to("FP32", raw_input_contents=[raw])
    negative.inputs[0].shape[0] = -1
    yield negative, "no valid shape"
    timed = request_to("FP32", raw_input_contents=[raw])
    timed.parameters["timeout"].int64_param = -1
    yield timed, "timeout"
    sequence = request_to("FP32", raw_input_contents=[raw])
    sequence.parameters["sequence_id"].int64_param = 7
    yield sequence, "sequence_id"


@pytest.mark.parametrize(("message", "text"), list(problems()))
def test_what_is_wrong_is_named(message: Any, text: str) -> None:
    """Each mistake is INVALID_ARGUMENT with a text that says which it is."""
    with pytest.raises(ProtocolError, match=text) as caught:
        protocol_for("FP32").decode(open_envelope(message.SerializeToString()))
    assert caught.value.status == 400


def test_values_outside_a_narrow_type_are_refused() -> None:
    """int_contents carries 32 bits; an INT8 tensor takes none that would have to be cut."""
    message = request_to("INT8")
    message.inputs[0].contents.int_contents.extend([1, 2, 128])
    with pytest.raises(ProtocolError, match="outside the range of INT8"):
        protocol_for("INT8").decode(open_envelope(message.SerializeToString()))
    half = request_to("FP16")
    half.inputs[0].contents.fp32_contents.extend([1, 2, 3])
    with pytest.raises(ProtocolError, match="only raw_input_contents"):
        protocol_for("FP16").decode(open_envelope(half.SerializeToString()))


def test_unpacked_and_split_contents_are_read() -> None:
    """Elements may come packed, in pieces, or one by one."""
    one, two, three = (struct.pack("<f", value) for value in (1, 2, 3))
    contents = b"\x32\x04" + one + b"\x35" + two + b"\x32\x04" + three
    message = request_to("FP32")
    tensor = message.inputs[0].SerializeToString()
    tensor += b"\x2a" + varint(len(contents)) + contents
    data = b"\x0a\x01m" + b"\x2a" + varint(len(tensor)) + tensor
    assert protocol_for("FP32").decode(open_envelope(data)).inputs["x"].tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(
    ("dtype", "field"),
    [("FP32", b"\x32\x00"), ("INT32", b"\x10\x01"), ("BYTES", b"\x42\x00"), ("BYTES", b"\x48\x00")],
    ids=["empty pieces", "one by one", "strings", "unknown"],
)
def test_contents_of_millions_of_fields_keep_nobody_waiting(dtype: str, field: bytes) -> None:
    """Contents in more pieces than their tensor can need are refused before all of them are read."""
    message = request_to(dtype)
    tensor = message.inputs[0].SerializeToString() + delimited(5, field * 100_000)
    with pytest.raises(ProtocolError, match="more than 16384 fields"):
        protocol_for(dtype).decode(open_envelope(delimited(1, b"m") + delimited(5, tensor)))


def test_strings_may_be_as_many_as_their_tensor_has() -> None:
    """Each string is a field of its own, and a tensor of many is no attack."""
    message = request_to("BYTES")
    message.inputs[0].shape[1] = 20_000
    message.inputs[0].contents.bytes_contents.extend([b"text"] * 20_000)
    protocol = protocol_for("BYTES", (-1, -1))
    assert protocol.decode(open_envelope(message.SerializeToString())).inputs["x"].shape == (1, 20_000)


def test_nesting_multiplies_no_number_of_fields() -> None:
    """A message of a few thousand messages of a few thousand fields each is refused like one of millions."""
    item = delimited(1, b"x") + (b"\x18" + varint(3)) * 10_000
    assert SCHEMA.decode("ModelInferRequest", memoryview(delimited(5, item)))["inputs"][0]["name"] == "x"
    with pytest.raises(WireError, match="more than 16384 fields"):
        SCHEMA.decode("ModelInferRequest", memoryview(delimited(5, item) * 2))


@given(st.binary(max_size=80))
def test_strangers_get_a_protocol_error(data: bytes) -> None:
    """Bytes that are no request end in a ProtocolError, whatever they are."""
    protocol = protocol_for("FP32")
    with pytest.raises(ProtocolError):
        protocol.decode(open_envelope(data))


def test_stream_messages_are_those_of_triton() -> None:
    """An answer is wrapped; an error keeps the id and says that it is the last word."""
    protocol = protocol_for("FP32")
    message = request_to("FP32", id="7", raw_input_contents=[bytes(12)])
    request = protocol.decode(open_envelope(message.SerializeToString()))
    data = stream_response(protocol.encode(request, {"y": request.inputs["x"]}, final=True))
    good = service_pb2.ModelStreamInferResponse.FromString(data)
    assert good.error_message == ""
    assert good.infer_response.id == "7"
    assert good.infer_response.parameters["triton_final_response"].bool_param
    bad = service_pb2.ModelStreamInferResponse.FromString(stream_error("7", "n\u00f6"))
    assert (bad.error_message, bad.infer_response.id) == ("n\u00f6", "7")
