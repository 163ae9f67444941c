"""Fuzz target: the body of an inference request, from its compression to the arrays, and its answer.

What may come of any body is a ProtocolError that a client can read, or a request whose arrays are what the
model takes. Anything else is a bug: another exception, an array of a wrong type or shape, an answer that is
no JSON, a message without end.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from fuzz_choices import Choices

from device_agent.manifest import TensorSpec
from device_agent.server.content import decompress
from device_agent.server.fields import ProtocolError, error_body
from device_agent.server.interface import InferRequest, ModelInterface
from device_agent.server.protocol import Answer, ModelProtocol
from device_agent.server.shared_memory import Regions
from device_agent.tensors import NUMPY_DTYPES, element_count

MAX_BODY_BYTES = 1 << 16
_MAX_MESSAGE = 2000
_REGION_BYTES = 64


def _interface(name: str, inputs: Sequence[TensorSpec], *outputs: str) -> ModelInterface:
    return ModelInterface(name, "1", inputs, [_OUTPUTS[output] for output in outputs], max_batch_size=4)


_OUTPUTS = {
    "y": TensorSpec("y", "FP32", (-1, 2)),
    "h": TensorSpec("h", "FP16", (-1,)),
    "t": TensorSpec("t", "BYTES", (-1,)),
}
INTERFACES = (
    _interface("numbers", [TensorSpec("x", "FP32", (-1, 3))], "y"),
    _interface("ragged", [TensorSpec("x", "INT64", (-1, -1, -1)), TensorSpec("m", "BOOL", (-1,))], "y", "t"),
    _interface("text", [TensorSpec("x", "BYTES", (-1, -1))], "t"),
    _interface("fixed", [TensorSpec("x", "UINT8", (2, 3)), TensorSpec("h", "BF16", (4,))], "y", "h", "t"),
    _interface("small", [TensorSpec("x", "INT8", (-1,)), TensorSpec("d", "FP64", (-1, -1))], "t", "y"),
)
OUTPUTS = {
    "y": np.array([[0.5, np.nan], [np.inf, -0.0]], np.float32),
    "h": np.zeros(2, np.float16),
    "t": np.array([b"a", b"\xc3\xa9"], dtype=object),
}


def _regions() -> Regions:
    """One real region, ``r``, whose object has no name any more."""
    regions = Regions()
    path = Path(f"/dev/shm/edgekit-fuzz-{os.getpid()}")
    path.write_bytes(b"\1" * _REGION_BYTES)
    try:
        regions.register("r", path.name, 0, _REGION_BYTES)
    finally:
        path.unlink()
    return regions


region_view = _regions().view

# What is written where something else belongs

NUMBERS = (
    b"0", b"1", b"-1", b"2", b"3", b"4", b"5", b"24", b"255", b"256", b"-129", b"1.0", b"1.5", b"-0",
    b"1e400", b"1e300", b"1e-400", b"NaN", b"-Infinity", b"2147483648", b"9223372036854775807",
    b"9223372036854775808", b"18446744073709551616", b"4611686018427387904", b"9" * 400,
    b"9" * 4300, b"9" * 4301, b"0x1", b"01", b"1.",
)  # fmt: skip
STRINGS = (
    b'"x"', b'"m"', b'"y"', b'"h"', b'"d"', b'"t"', b'"r"', b'""', b'"FP32"', b'"INT64"', b'"BYTES"',
    b'"BF16"', b'"\\ud800"', b'"\\u0000"', b'"\xc3\xa9"', b'"\xff"', b'"unfinished', b'"1"',
    b'"' + b"a" * 3000 + b'"',
)  # fmt: skip
CONSTANTS = (b"null", b"true", b"false", b"{}", b"[]", b"[[]]", b"[null]", b"nul", b"")
KEYS = (
    b"id", b"inputs", b"outputs", b"parameters", b"name", b"datatype", b"shape", b"data", b"binary_data",
    b"binary_data_size", b"binary_data_output", b"shared_memory_region", b"shared_memory_offset",
    b"shared_memory_byte_size", b"timeout", b"priority", b"sequence_id", b"classification", b"x",
)  # fmt: skip
DEPTHS = (1, 2, 50, 900, 5000)


def _any(c: Choices, depth: int = 0) -> bytes:
    """Any JSON, or what is nearly JSON."""
    kind = c.below(8)
    if kind == 0:
        return c.pick(STRINGS)
    if kind == 1:
        return c.pick(CONSTANTS)
    if kind == 2 and depth < 3:
        return b"[" + b",".join(_any(c, depth + 1) for _ in range(c.below(5))) + b"]"
    if kind == 3 and depth < 3:
        fields = (b'"%s":%s' % (c.pick(KEYS), _any(c, depth + 1)) for _ in range(c.below(4)))
        return b"{" + b",".join(fields) + b"}"
    if kind == 4 and c.rarely():
        levels = c.pick(DEPTHS)
        return b"[" * levels + b"]" * levels
    if kind == 5:
        return c.take(c.below(12))
    return c.pick(NUMBERS)


def _or_any(c: Choices, right: bytes) -> bytes:
    return _any(c) if c.rarely() else right


def _object(c: Choices, fields: Sequence[tuple[bytes, bytes]]) -> bytes:
    parts = [b'"%s":%s' % (key, _or_any(c, value)) for key, value in fields if not c.rarely()]
    if c.rarely():
        parts.append(b'"%s":%s' % (c.pick(KEYS), _any(c)))
    return b"{" + b",".join(parts) + b"}"


# Requests that are nearly right


def shape_of(c: Choices, spec: TensorSpec, rows: int) -> list[int]:
    """A shape that fits the model, where ``rows`` do."""
    return [
        (rows if axis == 0 else c.below(4)) if size == -1 else size for axis, size in enumerate(spec.shape)
    ]


def _elements(c: Choices, spec: TensorSpec, count: int) -> bytes:
    kind = NUMPY_DTYPES[spec.dtype].kind
    right = {"O": b'"ab"', "b": b"true", "f": b"0.5"}.get(kind, b"7")
    return b"[" + b",".join(_or_any(c, right) for _ in range(count)) + b"]"


def _raw(c: Choices, spec: TensorSpec, count: int) -> bytes:
    if spec.dtype == "BYTES":
        return b"".join(
            len(item).to_bytes(4, "little") + item for item in (c.take(c.below(4)) for _ in range(count))
        )
    return (c.take(8) or b"\0").ljust(NUMPY_DTYPES[spec.dtype].itemsize * count, b"\2")[
        : NUMPY_DTYPES[spec.dtype].itemsize * count
    ]


def _input(c: Choices, spec: TensorSpec, rows: int) -> tuple[bytes, bytes]:
    """The JSON of an input, and the bytes that belong behind the JSON."""
    shape = shape_of(c, spec, rows)
    count = element_count(shape)
    fields = [
        (b"name", json.dumps(spec.name).encode()),
        (b"datatype", json.dumps(spec.dtype).encode()),
        (b"shape", json.dumps(shape).encode()),
    ]
    way = c.below(4)
    if way == 0:
        return _object(c, [*fields, (b"data", _elements(c, spec, count))]), b""
    if way == 1:
        size = NUMPY_DTYPES[spec.dtype].itemsize * count
        place = [
            (b"shared_memory_region", b'"r"'),
            (b"shared_memory_offset", b"%d" % c.below(9)),
            (b"shared_memory_byte_size", b"%d" % size),
        ]
        return _object(c, [*fields, (b"parameters", _object(c, place))]), b""
    raw = _raw(c, spec, count)
    parameters = _object(c, [(b"binary_data_size", b"%d" % len(raw))])
    return _object(c, [*fields, (b"parameters", parameters)]), raw


def _outputs(c: Choices) -> bytes:
    items = []
    for _ in range(c.below(4)):
        way = c.below(3)
        place = [(b"shared_memory_region", b'"r"'), (b"shared_memory_byte_size", b"%d" % c.below(32))]
        parameters = [[], [(b"binary_data", c.pick((b"true", b"false")))], place][way]
        items.append(
            _object(c, [(b"name", c.pick((b'"y"', b'"h"', b'"t"'))), (b"parameters", _object(c, parameters))])
        )
    return b"[" + b",".join(items) + b"]"


def _request(c: Choices, interface: ModelInterface) -> tuple[bytes, bytes]:
    rows = c.below(6)
    parts = [_input(c, spec, rows) for spec in interface.inputs.values()]
    fields = [(b"inputs", b"[" + b",".join(head for head, _ in parts) + b"]")]
    if c.below(2):
        fields.append((b"outputs", _outputs(c)))
    if c.below(4) == 3:
        parameters = [(b"timeout", c.pick(NUMBERS)), (b"binary_data_output", c.pick(CONSTANTS))]
        fields.append((b"parameters", _object(c, parameters)))
    if c.below(4) == 3:
        fields.append((b"id", c.pick(STRINGS)))
    return _object(c, fields), b"".join(raw for _, raw in parts)


def _compressed(c: Choices, body: bytes) -> tuple[bytes, bytes | None]:
    """The body as it is sent, and its Content-Encoding; not always true."""
    way = c.below(32)
    if way == 1:
        return gzip.compress(body, 1), b"gzip"
    if way == 2:
        return zlib.compress(body, 1), b"deflate"
    if way == 3:
        return gzip.compress(body, 1)[: c.byte()] + c.take(8), b"gzip"
    if way == 4:
        return body, c.pick((b"gzip", b"deflate", b"br", b"identity", b"GZIP", b"gzip, gzip", b""))
    if way == 5:
        return zlib.compress(b" " * (MAX_BODY_BYTES + c.byte() - 128), 1), b"deflate"
    return body, None


def build(data: bytes) -> tuple[ModelInterface, bytes, bytes | None, int | None]:
    """The model, the body, its Content-Encoding, and its Inference-Header-Content-Length."""
    c = Choices(data)
    interface = c.pick(INTERFACES)
    if c.below(4) == 3:
        json_bytes = c.pick((None, 0, 1, c.byte()))
        return interface, c.take(c.left), None, json_bytes
    head, tail = _request(c, interface)
    json_bytes = None if not tail and c.below(2) else len(head)
    if c.rarely():
        json_bytes = c.pick((None, 0, 1, len(head) - 1, len(head) + 1, 10**18))
    body, coding = _compressed(c, head + tail + (c.take(c.below(9)) if c.rarely() else b""))
    return interface, body, coding, json_bytes


# What must hold


class Broken(Exception):
    """The agent did what it must not."""


def run(data: bytes) -> str:
    """One execution.

    Returns:
        What came of it: ``refused`` or ``served``.

    Raises:
        Exception: whatever it is, it is a bug.
    """
    interface, body, coding, json_bytes = build(data)
    protocol = ModelProtocol(interface, region_view)
    try:
        plain = decompress(memoryview(body), coding, MAX_BODY_BYTES)
        request = protocol.decode(plain, json_bytes)
    except ProtocolError as error:
        check_error(error, (400, 413, 501))
        return "refused"
    check_request(interface, request)
    again = protocol.decode(plain, json_bytes)  # from the cache, where it is cached
    _check_equal(request, again)
    try:
        answer = protocol.encode(request, OUTPUTS)
    except ProtocolError as error:
        check_error(error, (400,))
        return "refused"
    _check_answer(request, answer)
    return "served"


def check_error(error: ProtocolError, statuses: tuple[int, ...]) -> None:
    """Hold an error to what clients can read."""
    if error.status not in statuses or len(error.message) > _MAX_MESSAGE:
        raise Broken(f"status {error.status}, a message of {len(error.message)} characters")
    if json.loads(error_body(error.message))["error"] != error.message:
        raise Broken("the message does not arrive")


def check_request(interface: ModelInterface, request: InferRequest) -> None:
    """Hold a request that was accepted to what the model takes."""
    head = request.head
    if set(request.inputs) != set(interface.inputs):
        raise Broken(f"inputs {sorted(request.inputs)}")
    for name, spec in interface.inputs.items():
        array = request.inputs[name]
        fits = len(array.shape) == len(spec.shape) and all(
            w in (-1, g) for g, w in zip(array.shape, spec.shape, strict=True)
        )
        if array.dtype != NUMPY_DTYPES[spec.dtype] or not fits or not array.flags.aligned:
            raise Broken(f"{name} is {array.dtype} {array.shape}")
        if spec.dtype == "BYTES" and not all(type(item) is bytes for item in array.ravel().tolist()):
            raise Broken(f"{name} has an element that is not bytes")
        if spec.shape[:1] == (-1,) and array.shape[0] != head.rows:
            raise Broken(f"{name} has {array.shape[0]} rows, not {head.rows}")
    if not 1 <= head.rows <= interface.max_batch_size:
        raise Broken(f"{head.rows} rows")
    if head.timeout_s is not None and not (math.isfinite(head.timeout_s) and head.timeout_s > 0):
        raise Broken(f"timeout {head.timeout_s}")
    if request.id is not None and type(request.id) is not str:
        raise Broken(f"id {request.id!r}")
    hash(head.batch_key)


def _check_equal(first: InferRequest, second: InferRequest) -> None:
    same = all(_same(array, second.inputs[name]) for name, array in first.inputs.items())
    if not same or (first.id, first.head) != (second.id, second.head):
        raise Broken("the same body read twice is two requests")


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.tolist() == b.tolist() if a.dtype == object else a.tobytes() == b.tobytes()


def _check_answer(request: InferRequest, answer: Answer) -> None:
    whole = b"".join(bytes(part) for part in answer.parts)
    document = json.loads(whole[: answer.json_bytes])
    if document.get("id") != request.id:
        raise Broken(f"the id {request.id!r} came back as {document.get('id')!r}")
    if [output["name"] for output in document["outputs"]] != [wish.name for wish in request.head.outputs]:
        raise Broken("other outputs than were asked for")
    sizes = sum(_binary_sizes(document))
    if answer.json_bytes is not None and answer.json_bytes + sizes != len(whole):
        raise Broken("the sizes in the answer do not add up")


def _binary_sizes(document: dict) -> Iterator[int]:
    for output in document["outputs"]:
        yield output.get("parameters", {}).get("binary_data_size", 0)


def seeds() -> Iterator[bytes]:
    """Small inputs that reach every model and every way of sending a tensor."""
    for model in range(len(INTERFACES)):
        for way in range(4):
            yield bytes([model, 0, 2, way, 1, 1, 1, way, 0, 0, 0])
    yield b'\0\3\0{"inputs":[{"name":"x","datatype":"FP32","shape":[1,3],"data":[1,2,3]}]}'
    yield b'\2\3\0{"id":"a","inputs":[{"name":"x","datatype":"BYTES","shape":[1,2],"data":[["a","b"]]}]}'
