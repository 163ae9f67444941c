"""Which other files an ONNX graph reads: only regular files beside it, never the rest of the device.

ONNX lets a tensor name a file for its data. ONNX Runtime 1.19, the newest for Python 3.8, opens whatever path
stands there (1.32 does not), and newer ones also know a name that stands for an address in the process's own
memory. So the names are read here first, with as much of protobuf as that needs. The field numbers are those
of onnx.proto (ONNX 1.16):

    ModelProto: graph 7, training_info 20, functions 25       TrainingInfoProto: graphs 1, 2
    GraphProto: node 1, initializer 5, sparse_initializer 15  FunctionProto: node 7, attribute_proto 11
    NodeProto: attribute 5                                    SparseTensorProto: values 1, indices 2
    AttributeProto: t 5, g 6, tensors 10, graphs 11, sparse_tensor 22, sparse_tensors 23
    TensorProto: external_data 13, entries of key 1 and value 2
"""

from __future__ import annotations

import mmap
from pathlib import Path, PurePosixPath
from typing import Dict, Iterator, List, Mapping, Tuple, Union

_TENSOR = "tensor"
_FIELDS: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: _TENSOR, 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: _TENSOR, 6: "graph", 10: _TENSOR, 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: _TENSOR, 2: _TENSOR},
    _TENSOR: {13: "entry"},
}
_KEY, _VALUE = 1, 2
_LOCATION = b"location"
_ORT_FORMAT = ".ort"  # ONNX Runtime's own format, which it knows by the suffix, has no such names

_Data = Union[bytes, mmap.mmap]
_Span = Tuple[int, int]


def check(graph: Path) -> None:
    """Refuse a graph that reads a file which does not lie beside or below it.

    Raises:
        ValueError: it does; or it names a file that is not there, or is no ONNX graph.
        OSError: the graph cannot be read.
    """
    if graph.suffix == _ORT_FORMAT:
        return
    with graph.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data.find(_LOCATION) >= 0:  # most graphs name no file, which one look at the bytes shows
            for location in sorted(set(locations(data))):
                _check_location(graph.parent, location)


def locations(data: _Data) -> Iterator[str]:
    """The names of the files that a serialized ModelProto takes tensors from.

    Raises:
        ValueError: it is not a protobuf message.
    """
    waiting: List[Tuple[str, _Span]] = [("model", (0, len(data)))]
    while waiting:
        kind, span = waiting.pop()
        entry: Dict[int, bytes] = {}
        for number, (start, end) in _submessages(data, span):
            if kind == "entry":
                entry[number] = bytes(data[start:end])
            elif number in _FIELDS[kind]:
                waiting.append((_FIELDS[kind][number], (start, end)))
        if entry.get(_KEY) == _LOCATION:
            yield entry.get(_VALUE, b"").decode("utf-8", "backslashreplace")


def _check_location(directory: Path, location: str) -> None:
    path = PurePosixPath(location)
    if path.is_absolute() or ".." in path.parts or "\\" in location or "\0" in location:
        raise ValueError(f"it takes data from a file outside of its directory: {location!r}")
    if not (directory / location).is_file():
        raise ValueError(f"it takes data from a file that is not there: {location!r}")


# Protobuf (https://protobuf.dev/programming-guides/encoding)


def _submessages(data: _Data, span: _Span) -> Iterator[Tuple[int, _Span]]:
    """The numbers and places of a message's length-delimited fields."""
    at, end = span
    while at < end:
        tag, at = _varint(data, at, end)
        wire_type = tag & 7
        if wire_type == 0:
            _, at = _varint(data, at, end)
        elif wire_type == 1:
            at += 8
        elif wire_type == 5:
            at += 4
        elif wire_type == 2:
            size, at = _varint(data, at, end)
            if at + size > end:
                raise ValueError("it is not an ONNX graph: a field ends behind its message")
            yield tag >> 3, (at, at + size)
            at += size
        else:
            raise ValueError("it is not an ONNX graph: a field has an unknown wire type")


def _varint(data: _Data, at: int, end: int) -> _Span:
    """A number, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value & (2**64 - 1), at
    raise ValueError("it is not an ONNX graph: a number does not end")
