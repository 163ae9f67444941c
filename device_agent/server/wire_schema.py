"""Protocol Buffers messages described by a table, read into mappings and written from them.

Fields come in any order, repeated numbers packed or not; fields of unknown numbers, or of another type than
the table says, are skipped, as the format's rules ask. Pure functions.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional

from device_agent.server.wire import (
    FIXED64,
    LENGTH_DELIMITED,
    MAX_FIELDS,
    VARINT,
    Value,
    WireError,
    delimited,
    read_fields,
    read_packed_varints,
    read_text,
    signed,
    tag,
    varint,
)

_DOUBLE = struct.Struct("<d")
_WIRE_TYPES = {
    "string": LENGTH_DELIMITED,
    "bytes": LENGTH_DELIMITED,
    "double": FIXED64,
    "bool": VARINT,
    "int32": VARINT,
    "int64": VARINT,
    "uint32": VARINT,
    "uint64": VARINT,
}
_SIGNED = frozenset({"int32", "int64"})
_EMPTY = {"string": "", "bytes": memoryview(b""), "double": 0.0, "bool": False}


@dataclass(frozen=True)
class Field:
    """A field of a message.

    Attributes:
        number: its number.
        name: its key in the mapping that stands for the message.
        kind: a scalar type of the language, or the name of a message or an enumeration.
        repeated: the value is a list.
        key_kind: the kind of a map's keys; None: it is no map.
        chosen: it is one of several alternatives, so that it is written even where it is zero.
    """

    number: int
    name: str
    kind: str
    repeated: bool = False
    key_kind: Optional[str] = None
    chosen: bool = False


Fields = Mapping[int, Field]


class _Allowance:
    """How many fields a message may have, with those of the messages inside it."""

    def __init__(self) -> None:
        self._left = MAX_FIELDS

    def spend(self) -> None:
        """Read one more."""
        self._left -= 1
        if self._left < 0:
            raise WireError(f"it has more than {MAX_FIELDS} fields")


@dataclass(frozen=True)
class Schema:
    """Messages and enumerations by name; see :func:`parse_schema`.

    Attributes:
        messages: the fields of each message by number.
        enumerations: the numbers of each enumeration by name; they are only written.
    """

    messages: Mapping[str, Fields]
    enumerations: Mapping[str, Mapping[str, int]]

    def decode(self, message: str, data: memoryview) -> Dict[str, Any]:
        """Read a message into a mapping.

        Repeated fields and maps are always there; others only if they were sent. ``bytes`` are views.

        Raises:
            WireError: the bytes are no such message, or it has too many fields, those of the messages inside
                it included.
        """
        return self._decode(self.messages[message], data, _Allowance())

    def encode(self, message: str, values: Mapping[str, Any]) -> bytes:
        """Write a mapping as a message; keys that the message does not have are left out."""
        return self._encode(self.messages[message], values)

    # Reading

    def _decode(self, fields: Fields, data: memoryview, allowance: _Allowance) -> Dict[str, Any]:
        values: Dict[str, Any] = {f.name: [] for f in fields.values() if f.repeated}
        values.update({f.name: {} for f in fields.values() if f.key_kind})
        for number, wire_type, value, _, _ in read_fields(data):
            allowance.spend()
            known = fields.get(number)
            if known is not None:
                self._take(values, known, wire_type, value, allowance)
        return values

    def _take(
        self, values: Dict[str, Any], known: Field, wire_type: int, value: Value, allowance: _Allowance
    ) -> None:
        expected = _WIRE_TYPES.get(known.kind, LENGTH_DELIMITED)
        data = value if isinstance(value, memoryview) and wire_type == LENGTH_DELIMITED else None
        if known.key_kind is not None:
            if data is not None:
                self._put_entry(values[known.name], known, data, allowance)
        elif known.repeated and expected == VARINT and data is not None:
            values[known.name] += [_scalar(known.kind, n) for n in read_packed_varints(data).tolist()]
        elif wire_type != expected:
            return
        elif known.repeated:
            values[known.name].append(self._value(known.kind, value, allowance))
        else:
            values[known.name] = self._value(known.kind, value, allowance)

    def _put_entry(
        self, mapping: Dict[Any, Any], known: Field, data: memoryview, allowance: _Allowance
    ) -> None:
        entry = self._decode(_entry_fields(known), data, allowance)
        key = entry.get("key", _EMPTY.get(known.key_kind or "", 0))
        mapping[key] = entry["value"] if "value" in entry else self._empty(known.kind)

    def _value(self, kind: str, value: Value, allowance: _Allowance) -> Any:
        if kind in self.messages and isinstance(value, memoryview):
            return self._decode(self.messages[kind], value, allowance)
        return _scalar(kind, value)

    def _empty(self, kind: str) -> Any:
        return self.decode(kind, memoryview(b"")) if kind in self.messages else _EMPTY.get(kind, 0)

    # Writing

    def _encode(self, fields: Fields, values: Mapping[str, Any]) -> bytes:
        parts: List[bytes] = []
        for known in fields.values():
            if known.name in values:
                parts += self._encoded(known, values[known.name])
        return b"".join(parts)

    def _encoded(self, known: Field, value: Any) -> List[bytes]:
        if known.key_kind is not None:
            entries = ({"key": key, "value": item} for key, item in value.items())
            fields = _entry_fields(known)
            return [delimited(known.number, self._encode(fields, entry)) for entry in entries]
        if not known.repeated:
            is_written = known.chosen or known.kind in self.messages or value
            return [self._encoded_one(known, value)] if is_written else []
        if _WIRE_TYPES.get(known.kind) == VARINT:
            return [delimited(known.number, b"".join(map(varint, value)))] if value else []
        return [self._encoded_one(known, item) for item in value]

    def _encoded_one(self, known: Field, value: Any) -> bytes:
        if known.kind in self.messages:
            return delimited(known.number, self.encode(known.kind, value))
        if known.kind in self.enumerations:
            return tag(known.number, VARINT) + varint(self.enumerations[known.kind][value])
        if known.kind == "string":
            return delimited(known.number, value.encode("utf-8"))
        if known.kind == "bytes":
            return delimited(known.number, value)
        if known.kind == "double":
            return tag(known.number, FIXED64) + _DOUBLE.pack(value)
        return tag(known.number, VARINT) + varint(int(value))  # JSON has only strings as keys


def _entry_fields(known: Field) -> Fields:
    """A map is a repeated message of a key and a value."""
    return {
        1: Field(1, "key", known.key_kind or "", chosen=True),
        2: Field(2, "value", known.kind, chosen=True),
    }


def _scalar(kind: str, value: Value) -> Any:
    if isinstance(value, memoryview):
        if kind == "double":
            return _DOUBLE.unpack(value)[0]
        return value if kind == "bytes" else read_text(value)
    if kind == "bool":
        return value != 0
    return signed(value) if kind in _SIGNED else value


# Tables


def parse_schema(text: str) -> Schema:
    """Read messages and enumerations from a table.

    A line without indentation begins ``message NAME`` or ``enum NAME``. Under a message stands a field a
    line: number, kind, name. A kind followed by ``*`` is repeated, by ``?`` one of several alternatives;
    ``map<KEY,KIND>`` is a map. Under an enumeration stand a number and a name a line.
    """
    messages: Dict[str, Dict[int, Field]] = {}
    enumerations: Dict[str, Dict[str, int]] = {}
    keyword = current = ""
    for line in filter(None, map(str.rstrip, text.splitlines())):
        words = line.split()
        if not line.startswith(" "):
            keyword, current = words
            messages.update({current: {}} if keyword == "message" else {})
            enumerations.update({current: {}} if keyword == "enum" else {})
        elif keyword == "enum":
            enumerations[current][words[1]] = int(words[0])
        else:
            one = _field(int(words[0]), words[1], words[2])
            messages[current][one.number] = one
    return Schema(messages, enumerations)


def _field(number: int, kind: str, name: str) -> Field:
    if kind.startswith("map<"):
        key_kind, _, value_kind = kind[len("map<") : -1].partition(",")
        return Field(number, name, value_kind, key_kind=key_kind)
    return Field(number, name, kind.rstrip("*?"), repeated=kind.endswith("*"), chosen=kind.endswith("?"))
