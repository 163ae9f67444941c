"""Fuzz target: the message of a gRPC inference request, from its bytes to the arrays, and its answer.

What may come of any message is a ProtocolError that fits into a status, or a request whose arrays are what
the model takes. ``differs`` holds the message against the reference implementation of Protocol Buffers.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

from fuzz_choices import Choices
from fuzz_infer import INTERFACES, OUTPUTS, Broken, check_error, check_request, region_view, shape_of

from device_agent.manifest import TensorSpec
from device_agent.server.fields import ProtocolError
from device_agent.server.grpc_messages import SCHEMA
from device_agent.server.grpc_protocol import GrpcProtocol, open_envelope, stream_error
from device_agent.server.interface import ModelInterface
from device_agent.server.wire import WireError, delimited, read_fields, tag, varint
from device_agent.tensors import NUMPY_DTYPES, element_count

_INTEGERS = (0, 1, 2, 3, 127, 128, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, -1, -129)
_TEXTS = (
    b"",
    b"x",
    b"m",
    b"y",
    b"h",
    b"r",
    b"FP32",
    b"INT64",
    b"BYTES",
    b"\xff",
    b"\xed\xa0\x80",
    b"a" * 3000,
    b"1",
)
_KEYS = (
    b"timeout", b"priority", b"sequence_id", b"binary_data_output", b"classification",
    b"shared_memory_region", b"shared_memory_offset", b"shared_memory_byte_size", b"binary_data_size", b"",
)  # fmt: skip
_CONTENTS = {"b": 1, "i": 2, "u": 4, "f": 6, "O": 8}


def _any_field(c: Choices) -> bytes:
    """A field that need not be one."""
    kind = c.below(6)
    number = c.pick((1, 2, 3, 4, 5, 6, 7, 8, 0, 16, 2**28, 2**40))
    if kind == 0:
        return tag(number, 0) + varint(c.pick(_INTEGERS))
    if kind == 1:
        return delimited(number, c.pick(_TEXTS))
    if kind == 2:
        return tag(number, 2) + varint(c.pick(_INTEGERS)) + c.take(c.below(8))
    if kind == 3:
        return tag(number, c.pick((1, 5))) + c.take(8).ljust(c.pick((8, 4, 3)), b"\1")
    if kind == 4:
        return tag(number, c.pick((3, 4, 6, 7)))
    return c.take(c.below(12))


def _message(c: Choices, parts: list[bytes]) -> bytes:
    kept = [part for part in parts if not c.rarely()]
    if c.rarely():
        kept.insert(c.below(len(kept) + 1), _any_field(c))
    return b"".join(kept)


def _parameter(c: Choices, key: bytes, value: bytes) -> bytes:
    return _message(c, [delimited(1, key), delimited(2, _any_field(c) if c.rarely() else value)])


def _place(c: Choices, number: int, byte_size: int) -> list[bytes]:
    return [
        delimited(number, _parameter(c, b"shared_memory_region", delimited(3, b"r"))),
        delimited(number, _parameter(c, b"shared_memory_offset", tag(2, 0) + varint(c.below(9)))),
        delimited(number, _parameter(c, b"shared_memory_byte_size", tag(2, 0) + varint(byte_size))),
    ]


def _contents(c: Choices, spec: TensorSpec, count: int) -> bytes:
    dtype = NUMPY_DTYPES[spec.dtype]
    number = _CONTENTS[dtype.kind]
    if spec.dtype in ("INT64", "UINT64", "FP64"):
        number += 1
    if c.rarely():  # a wire type that is not the field's
        return b"".join(tag(number, 0) + varint(c.pick(_INTEGERS)) for _ in range(count))
    if dtype.kind == "O":
        return b"".join(delimited(8, c.take(c.below(4))) for _ in range(count))
    if dtype.kind == "f":
        form = "<f" if dtype.itemsize == 4 else "<d"
        return delimited(number, struct.pack(form, 0.5) * count)
    values = [c.pick(_INTEGERS) if c.rarely() else c.below(2) for _ in range(count)]
    if c.below(2):
        return b"".join(tag(number, 0) + varint(value) for value in values)
    return delimited(number, b"".join(map(varint, values)))


def _input(c: Choices, spec: TensorSpec, rows: int) -> tuple[bytes, bytes | None]:
    """An input, and its raw tensor where it has one."""
    shape = shape_of(c, spec, rows)
    count = element_count(shape)
    size = NUMPY_DTYPES[spec.dtype].itemsize * count
    if c.rarely():
        shape = [abs(c.pick(_INTEGERS)) if n == 0 or c.rarely() else n for n in shape] + [0] * c.below(2)
    packed = c.below(2)
    dims = [delimited(3, b"".join(map(varint, shape)))] if packed else [tag(3, 0) + varint(n) for n in shape]
    parts = [delimited(1, spec.name.encode()), delimited(2, spec.dtype.encode()), *dims]
    way = c.below(4)
    if way == 0:
        return _message(c, [*parts, delimited(5, _message(c, [_contents(c, spec, count)]))]), None
    if way == 1:
        return _message(c, [*parts, *_place(c, 4, size)]), None
    if spec.dtype == "BYTES":
        raw = b"".join(
            struct.pack("<I", len(item)) + item for item in (c.take(c.below(4)) for _ in range(count))
        )
    else:
        raw = c.take(8).ljust(size, b"\1")[:size]
    return _message(c, parts), raw + (c.take(3) if c.rarely() else b"")


def build(data: bytes) -> tuple[ModelInterface, bytes]:
    """The model, and the message."""
    c = Choices(data)
    interface = c.pick(INTERFACES)
    if c.below(8) == 7:
        return interface, c.take(c.left)
    rows = c.below(6)
    inputs = [_input(c, spec, rows) for spec in interface.inputs.values()]
    fields = [delimited(1, interface.name.encode())]
    if c.below(4) == 3:
        fields.append(delimited(3, c.pick(_TEXTS)))
    if c.below(4) == 3:
        fields.append(delimited(4, _parameter(c, c.pick(_KEYS), tag(2, 0) + varint(c.pick(_INTEGERS)))))
    fields += [delimited(5, head) for head, _ in inputs]
    for _ in range(c.below(3)):
        where = _place(c, 2, c.below(32)) if c.below(2) else []
        fields.append(delimited(6, _message(c, [delimited(1, c.pick((b"y", b"h", b"t"))), *where])))
    fields += [delimited(7, raw) for _, raw in inputs if raw is not None]
    message = bytearray(_message(c, fields))
    if c.rarely():
        message[c.byte() * 256 + c.byte() :] = b""
    if message and c.rarely():
        message[(c.byte() * 256 + c.byte()) % len(message)] = c.byte()
    return interface, bytes(message)


def run(data: bytes) -> str:
    """One execution.

    Returns:
        What came of it: ``refused`` or ``served``.

    Raises:
        Exception: whatever it is, it is a bug.
    """
    interface, message = build(data)
    protocol = GrpcProtocol(interface, region_view)
    ident = None
    try:
        envelope = open_envelope(message)
        ident = envelope.id
        request = protocol.decode(envelope)
        check_request(interface, request)
        answer = protocol.encode(request, OUTPUTS, final=True)
    except ProtocolError as error:
        check_error(error, (400,))
        stream_error(ident, error.message)
        return "refused"
    numbers = [number for number, *_ in read_fields(memoryview(answer))]
    if not numbers.count(5) == numbers.count(6) == len(request.head.outputs):
        raise Broken("other outputs than were asked for")
    return "served"


def differs(data: bytes, reference: Callable[[bytes], Any]) -> str:
    """Hold how a message is parted against the reference.

    Args:
        data: as for :func:`run`.
        reference: parses a message, or raises.

    Returns:
        ``same``, ``both refuse``, or ``stricter`` where only the reference accepts it.

    Raises:
        Broken: the message is accepted, and the reference refuses it or reads something else.
    """
    _, message = build(data)
    try:
        expected = reference(message)
    except Exception:
        expected = None
    try:
        got = open_envelope(message)
        head = SCHEMA.decode("ModelInferRequest", memoryview(got.head))
    except (ProtocolError, WireError):
        return "both refuse" if expected is None else "stricter"
    if expected is None and any("contents" in item for item in head["inputs"]):
        return "both refuse"  # contents are looked at later
    if expected is None:
        raise Broken(f"only the reference refuses {message.hex()}")
    parted = (got.model, got.version or "", got.id or "", [bytes(raw) for raw in got.raw])
    wanted = (expected.model_name, expected.model_version, expected.id, list(expected.raw_input_contents))
    if parted != wanted:
        raise Broken(f"{parted} where the reference has {wanted}")
    return "same"


def seeds() -> Iterator[bytes]:
    """Small inputs that reach every model and every way of sending a tensor."""
    for model in range(len(INTERFACES)):
        for way in range(4):
            yield bytes([model, 0, 2, way % 2, way, 1, 1, 1, way, 0, 0, 0])
            yield bytes([model, 0, 1, 1, 1, way, way, 1, 1, 3, 3, 1, 1])
