"""Tensors as the Open Inference Protocol v2 writes them, and as numpy holds them.

In memory ``BYTES`` is an object array of ``bytes``, and ``BF16`` is a ``uint16`` array of its bit patterns,
since numpy has no type for either. On the wire everything is little-endian and row-major; an element of
``BYTES`` is its length as u32 and then its data (the protocol's binary tensor data extension). In JSON,
``FP16`` and ``BF16`` have no form.

Pure functions; no I/O.
"""

from __future__ import annotations

import struct
from itertools import chain
from typing import Any, Dict, FrozenSet, List, Sequence, Tuple, Union

import numpy as np

Buffer = Union[bytes, bytearray, memoryview]

NUMPY_DTYPES: Dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BF16": np.dtype("<u2"),
    "BYTES": np.dtype("O"),
}
NO_JSON_FORM: FrozenSet[str] = frozenset({"FP16", "BF16"})

_LENGTH = struct.Struct("<I")
_COPIED_BYTES = 4096  # making a view costs more than copying so little


class TensorError(ValueError):
    """The data of a tensor does not fit its datatype and shape; the text says how."""


def element_count(shape: Sequence[int]) -> int:
    """Number of elements of a tensor of ``shape``, as an exact integer."""
    count = 1
    for size in shape:
        count *= size
    return count


# Binary


def decode_binary(datatype: str, shape: Tuple[int, ...], data: memoryview) -> np.ndarray[Any, Any]:
    """View raw tensor data as an array, without a copy but for ``BYTES`` and unaligned data.

    Raises:
        TensorError: the data is not exactly as long as ``shape`` needs.
    """
    if datatype == "BYTES":
        return _decode_bytes(shape, data)
    dtype = NUMPY_DTYPES[datatype]
    expected = element_count(shape) * dtype.itemsize
    if len(data) != expected:
        raise TensorError(f"has {len(data)} bytes of data where its shape {list(shape)} needs {expected}")
    array = shaped(np.frombuffer(data, dtype=dtype), shape)
    # A runtime may read wide words from the pointer that it is given.
    return array if array.flags.aligned else array.copy()


def encode_binary(datatype: str, array: np.ndarray[Any, Any]) -> Buffer:
    """Raw little-endian bytes of ``array``; a view on its memory where it is large and contiguous."""
    if datatype == "BYTES":
        return b"".join(_LENGTH.pack(len(item)) + item for item in array.ravel().tolist())
    dtype = NUMPY_DTYPES[datatype]
    if array.nbytes <= _COPIED_BYTES and array.dtype == dtype:
        return array.tobytes()
    contiguous = np.ascontiguousarray(array, dtype=dtype)
    return contiguous.reshape(-1).view(np.uint8).data


def _decode_bytes(shape: Tuple[int, ...], data: memoryview) -> np.ndarray[Any, Any]:
    count = element_count(shape)
    items: List[bytes] = []
    position, end = 0, len(data)
    while position < end and len(items) < count:
        if position + 4 > end:
            raise TensorError("ends inside the length of a BYTES element")
        (length,) = _LENGTH.unpack_from(data, position)
        position += 4
        if position + length > end:
            raise TensorError("ends inside a BYTES element")
        items.append(bytes(data[position : position + length]))
        position += length
    if len(items) != count or position != end:
        raise TensorError(f"does not hold exactly {count} BYTES elements")
    return object_array(items, shape)


def object_array(items: List[Any], shape: Tuple[int, ...]) -> np.ndarray[Any, Any]:
    """An array that holds ``items`` as they are; ``len(items)`` must fit ``shape``."""
    # Assigning the list at once would make numpy look for nested sequences.
    array = np.empty(len(items), dtype=object)
    for index, item in enumerate(items):
        array[index] = item
    return shaped(array, shape)


def shaped(array: np.ndarray[Any, Any], shape: Tuple[int, ...]) -> np.ndarray[Any, Any]:
    """``array`` in another shape of as many elements.

    Raises:
        TensorError: it is empty, and the shape has sizes that numpy cannot hold.
    """
    try:
        return array.reshape(shape)
    except (ValueError, OverflowError) as error:
        raise TensorError(f"has the shape {list(shape)}, which is too large") from error


# JSON

_JSON_TYPES: Dict[str, FrozenSet[type]] = {
    "b": frozenset({bool}),
    "i": frozenset({int}),
    "u": frozenset({int}),
    "f": frozenset({int, float}),
    "O": frozenset({str}),
}


def decode_json(datatype: str, shape: Tuple[int, ...], data: Any) -> np.ndarray[Any, Any]:
    """Build an array from JSON ``data``, flat or nested in row-major order.

    Raises:
        TensorError: the datatype has no JSON form, or an element is missing, strange or out of range.
    """
    if datatype in NO_JSON_FORM:
        raise TensorError(f"is {datatype}, which has no JSON form; send it as binary data")
    dtype = NUMPY_DTYPES[datatype]
    flat = _flatten(data)
    if len(flat) != element_count(shape):
        raise TensorError(
            f"has {len(flat)} elements where its shape {list(shape)} needs {element_count(shape)}"
        )
    strange = set(map(type, flat)) - _JSON_TYPES[dtype.kind]
    if strange:
        raise TensorError(f"is {datatype} but has an element of type {strange.pop().__name__}")
    if dtype.kind == "O":
        return object_array([item.encode("utf-8", "surrogatepass") for item in flat], shape)
    if dtype.kind in "iu" and flat:
        limits = np.iinfo(dtype)
        if min(flat) < limits.min or max(flat) > limits.max:
            raise TensorError(f"has an element outside the range of {datatype}")
    try:
        with np.errstate(over="raise"):
            array = np.array(flat, dtype=dtype)
    except (OverflowError, FloatingPointError) as error:
        raise TensorError(f"has an element outside the range of {datatype}") from error
    return shaped(array, shape)


def encode_json(datatype: str, array: np.ndarray[Any, Any]) -> List[Any]:
    """The elements of ``array`` as a flat list that ``json.dumps`` takes; integers stay exact.

    Raises:
        TensorError: the datatype has no JSON form, or a ``BYTES`` element is not UTF-8.
    """
    if datatype in NO_JSON_FORM:
        raise TensorError(f"is {datatype}, which has no JSON form; ask for binary data")
    flat: List[Any] = array.ravel().tolist()
    if datatype != "BYTES":
        return flat
    try:
        return [item.decode("utf-8") for item in flat]
    except UnicodeDecodeError as error:
        raise TensorError("has a BYTES element that is not UTF-8; ask for binary data") from error


def _flatten(data: Any) -> List[Any]:
    flat = data
    if type(flat) is not list:
        raise TensorError("has no list of data")
    while flat and type(flat[0]) is list:
        if any(type(item) is not list for item in flat):
            raise TensorError("mixes lists and values at one depth")
        flat = list(chain.from_iterable(flat))
    return flat
