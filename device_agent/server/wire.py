"""The wire format of Protocol Buffers: fields of a message, and the values in them. Pure functions.

Written from the published encoding (protobuf.dev, "Encoding"). A library would copy every tensor out of its
message, take megabytes of memory, and tie the agent to the range of versions that fits its generated code.
"""

from __future__ import annotations

from typing import Any, Iterator, Tuple, Union

import numpy as np

from device_agent.tensors import Buffer

VARINT, FIXED64, LENGTH_DELIMITED, FIXED32 = 0, 1, 2, 5

_FIXED_BYTES = {FIXED64: 8, FIXED32: 4}
_MAX_VARINT_BYTES = 10
_MAX_NUMBER = (1 << 29) - 1
MAX_FIELDS = 1 << 14  # of one message; reading millions would keep every other client waiting
_MASK_64 = (1 << 64) - 1

Value = Union[int, memoryview]


class WireError(ValueError):
    """The bytes are no message of this type; the text says why."""


# Reading


def read_varint(data: memoryview, position: int) -> Tuple[int, int]:
    """The unsigned number at ``position``, and the position after it."""
    value, end = 0, min(len(data), position + _MAX_VARINT_BYTES)
    start = position
    while position < end:
        byte = data[position]
        value |= (byte & 0x7F) << 7 * (position - start)
        position += 1
        if byte < 0x80:
            return value & _MASK_64, position
    raise WireError("a number is cut short or too long")


def read_fields(data: memoryview, max_fields: int = MAX_FIELDS) -> Iterator[Tuple[int, int, Value, int, int]]:
    """Every field of a message, in the order of its bytes.

    Args:
        data: the message.
        max_fields: how many it may have.

    Yields:
        Number; wire type; the number of a varint, or a view on the bytes of the other types; where the field,
        tag included, starts and stops.

    Raises:
        WireError: the message is cut short, has an invalid tag, or too many fields.
    """
    position, end, left = 0, len(data), max_fields
    while position < end:
        start, left = position, left - 1
        if left < 0:
            raise WireError(f"it has more than {max_fields} fields")
        tag, position = read_varint(data, position)
        number, wire_type = tag >> 3, tag & 7
        value: Value
        if wire_type == VARINT:
            value, position = read_varint(data, position)
        else:
            if wire_type == LENGTH_DELIMITED:
                size, position = read_varint(data, position)
            elif wire_type in _FIXED_BYTES:
                size = _FIXED_BYTES[wire_type]
            else:
                raise WireError(f"wire type {wire_type} is not in use")
            if position + size > end:
                raise WireError("a field is cut short")
            value = data[position : position + size]
            position += size
        if not 0 < number <= _MAX_NUMBER:
            raise WireError("a field has an invalid number")
        yield number, wire_type, value, start, position


def read_text(value: memoryview) -> str:
    """A string."""
    try:
        return str(value, "utf-8")
    except UnicodeDecodeError as error:
        raise WireError(f"a string is not UTF-8: {error}") from error


def read_packed_varints(data: memoryview) -> np.ndarray[Any, Any]:
    """Many varints one after the other, as ``uint64``."""
    octets = np.frombuffer(data, np.uint8)
    if len(octets) == 0:
        return np.empty(0, np.uint64)
    stops = np.flatnonzero(octets < 0x80) + 1
    if len(stops) == 0 or stops[-1] != len(octets):
        raise WireError("a number is cut short")
    starts = np.concatenate(([0], stops[:-1]))
    sizes = stops - starts
    if sizes.max() > _MAX_VARINT_BYTES:
        raise WireError("a number is too long")
    values = np.zeros(len(stops), np.uint64)
    for index in range(int(sizes.max())):
        has = sizes > index
        part = (octets[starts[has] + index] & np.uint8(0x7F)).astype(np.uint64)
        values[has] |= part << np.uint64(7 * index)
    return values


def signed(value: int) -> int:
    """A 64-bit pattern as a two's complement number."""
    return value - (1 << 64) if value >> 63 else value


# Writing


def varint(value: int) -> bytes:
    """A number of at most 64 bits; a negative one in two's complement."""
    value &= _MASK_64
    octets = bytearray()
    while value > 0x7F:
        octets.append(value & 0x7F | 0x80)
        value >>= 7
    octets.append(value)
    return bytes(octets)


def tag(number: int, wire_type: int) -> bytes:
    """What stands before a field."""
    return varint(number << 3 | wire_type)


def delimited(number: int, data: Buffer) -> bytes:
    """A string, bytes or message as a field."""
    return b"".join((tag(number, LENGTH_DELIMITED), varint(len(data)), data))
