"""``InferTensorContents``: an input whose values are numbers or strings of Protocol Buffers. Pure."""

from __future__ import annotations

from typing import Any, List

import numpy as np

from device_agent.manifest import TensorSpec
from device_agent.server.fields import ProtocolError
from device_agent.server.interface import Shape
from device_agent.server.wire import (
    FIXED32,
    FIXED64,
    LENGTH_DELIMITED,
    MAX_FIELDS,
    VARINT,
    WireError,
    read_fields,
    read_packed_varints,
)
from device_agent.tensors import NUMPY_DTYPES, TensorError, element_count, object_array, shaped

# The field of InferTensorContents that carries a datatype; FP16 and BF16 have none.
_CONTENTS_FIELDS = {
    "BOOL": 1, "INT8": 2, "INT16": 2, "INT32": 2, "INT64": 3, "UINT8": 4, "UINT16": 4, "UINT32": 4,
    "UINT64": 5, "FP32": 6, "FP64": 7, "BYTES": 8,
}  # fmt: skip


def decode_contents(spec: TensorSpec, shape: Shape, data: memoryview) -> np.ndarray[Any, Any]:
    """Read the values of an input from its ``InferTensorContents``.

    Raises:
        ProtocolError: 400: the datatype has no typed form, the values are in another field, in too many
            pieces, or do not fit.
    """
    wanted = _CONTENTS_FIELDS.get(spec.dtype)
    if wanted is None:
        raise ProtocolError(400, f"input '{spec.name}' is {spec.dtype}, which only raw_input_contents carry")
    try:
        if spec.dtype == "BYTES":
            values: Any = _bytes_values(data, element_count(shape))
        else:
            values = _number_values(spec.dtype, wanted, data)
    except WireError as error:
        raise ProtocolError(400, f"the contents of input '{spec.name}' are damaged: {error}") from error
    if len(values) != element_count(shape):
        raise ProtocolError(
            400,
            f"input '{spec.name}' has {len(values)} {spec.dtype} elements in its contents where its shape "
            f"{list(shape)} needs {element_count(shape)}",
        )
    try:
        if spec.dtype == "BYTES":
            return object_array(list(values), shape)
        return shaped(_narrowed(spec, np.asarray(values)), shape)
    except TensorError as error:
        raise ProtocolError(400, f"input '{spec.name}' {error}") from error


def _bytes_values(data: memoryview, count: int) -> List[bytes]:
    return [
        bytes(value)
        for number, _, value, _, _ in read_fields(data, max(count, MAX_FIELDS))  # each is a field of its own
        if number == _CONTENTS_FIELDS["BYTES"] and isinstance(value, memoryview)
    ]


def _number_values(datatype: str, wanted: int, data: memoryview) -> np.ndarray[Any, Any]:
    """All elements, whether they were packed, came in several pieces, or one by one."""
    fixed = NUMPY_DTYPES[datatype] if datatype in ("FP32", "FP64") else None
    pieces: List[np.ndarray[Any, Any]] = []
    alone = VARINT if fixed is None else FIXED32 if fixed.itemsize == 4 else FIXED64
    for number, wire_type, value, _, _ in read_fields(data):
        if number != wanted or wire_type not in (alone, LENGTH_DELIMITED):
            continue
        if isinstance(value, int):
            pieces.append(np.array([value], np.uint64))
        elif fixed is None:
            pieces.append(read_packed_varints(value))
        elif len(value) % fixed.itemsize:
            raise WireError(f"{len(value)} bytes of numbers that have {fixed.itemsize} each")
        else:
            pieces.append(np.frombuffer(value, fixed))
    return np.concatenate(pieces) if pieces else np.empty(0, fixed or np.uint64)


def _narrowed(spec: TensorSpec, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Elements in the type of the tensor, which is narrower than what carries them."""
    dtype = NUMPY_DTYPES[spec.dtype]
    if dtype.kind == "f":
        return values if values.flags.aligned else values.copy()
    wide = values.view(np.int64) if dtype.kind == "i" else values
    if dtype.kind == "b":
        return wide.astype(bool)
    limits = np.iinfo(dtype)
    if len(wide) and (wide.min() < limits.min or wide.max() > limits.max):
        raise ProtocolError(400, f"input '{spec.name}' has an element outside the range of {spec.dtype}")
    return wide.astype(dtype)
