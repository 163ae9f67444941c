"""Models and their weights apart, so that a model may be larger than a protobuf message: 2 GB.

In memory a model holds its weights. Where it has to become bytes, for ONNX Runtime, for shape inference or
for a file, the weights go another way: the bytes hold references in their place.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]
from onnx import ModelProto, TensorProto

from calibration.errors import CalibrationError

#: Shapes, axes and the like are smaller; they stay where shape inference sees them.
_MIN_WEIGHT_BYTES = 1024
#: The largest protobuf message, less room for the graph.
_MAX_FILE_BYTES = 2**31 - 2**27
#: Weights begin on a page, so that runtimes can map them.
_ALIGNMENT_BYTES = 4096
#: Types that numpy has too.
_WEIGHT_TYPES = frozenset(
    {
        TensorProto.FLOAT,
        TensorProto.FLOAT16,
        TensorProto.DOUBLE,
        TensorProto.INT8,
        TensorProto.UINT8,
        TensorProto.INT32,
        TensorProto.INT64,
    }
)


#: What the functions of this package take for a model.
Source = ModelProto | Path | str


@dataclass(frozen=True)
class Detached:
    """A model whose larger initializers are references, and those initializers.

    Attributes:
        model: small enough to become bytes; a copy.
        weights: by name; the original's own tensors, not copies.
    """

    model: ModelProto
    weights: Mapping[str, TensorProto]

    @property
    def is_large(self) -> bool:
        """Whether one protobuf message could not hold both parts."""
        return sum(_size_bytes(tensor) for tensor in self.weights.values()) >= _MAX_FILE_BYTES


def detach(model: ModelProto) -> Detached:
    """Take the weights out of a model, which itself stays as it is."""
    small = ModelProto()
    _copy_fields(model, small, "graph")
    _copy_fields(model.graph, small.graph, "initializer")
    weights = {}
    for tensor in model.graph.initializer:
        if _is_weight(tensor):
            weights[tensor.name] = tensor
            _add_reference(small, tensor, "memory")
        else:
            small.graph.initializer.append(tensor)
    return Detached(small, weights)


def attach(model: ModelProto, weights: Mapping[str, TensorProto]) -> None:
    """Put weights back in place of the references to them; the model then holds copies."""
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(weights[tensor.name])


def copied(model: ModelProto) -> ModelProto:
    """A copy with its own weights, whatever the size: ``CopyFrom`` alone goes through bytes."""
    detached = detach(model)
    attach(detached.model, detached.weights)
    return detached.model


def infer_shapes(model: ModelProto) -> None:
    """Write the shapes and types that can be inferred into a model.

    Raises:
        CalibrationError: its shapes contradict each other.
    """
    try:
        inferred = onnx.shape_inference.infer_shapes(detach(model).model, data_prop=True)
    except (RuntimeError, ValueError) as error:
        raise CalibrationError(
            "the model is not valid ONNX",
            f"its shapes do not fit together: {str(error).splitlines()[0]}",
            "check the file with onnx.checker, or export it again",
        ) from error
    for field in ("value_info", "output", "node"):  # nodes: their bodies have shapes too
        model.graph.ClearField(field)
        getattr(model.graph, field).extend(getattr(inferred.graph, field))


def load_model(source: Source) -> ModelProto:
    """Read a model and the weights in files beside it; a model in memory is returned as it is.

    Raises:
        CalibrationError: there is no such file, it is not ONNX, or the files of its weights are missing.
    """
    if isinstance(source, ModelProto):
        return source
    try:
        model = onnx.load(str(source))
    except (OSError, DecodeError, onnx.checker.ValidationError) as error:
        raise CalibrationError(
            f"the model {str(source)!r} cannot be read",
            (str(error).strip() or type(error).__name__).splitlines()[0],
            "give an ONNX file, with the files of its weights in the same directory",
        ) from error
    for tensor in model.graph.initializer:
        tensor.ClearField("data_location")  # so that it makes no difference where a weight was
    return model


def save_model(model: ModelProto, path: Path | str, *, external_data: bool | None = None) -> None:
    """Write a model, whatever its size.

    Args:
        model: what to write; it stays as it is.
        path: the file.
        external_data: whether the weights go to a second file, ``path`` with ``.data`` after its name;
            None: where one file cannot hold them.
    """
    path = Path(path)
    detached = detach(model)
    if external_data is False or (external_data is None and not detached.is_large):
        path.write_bytes(model.SerializeToString(deterministic=True))
        return
    data = path.with_name(f"{path.name}.data")
    places = {}
    with data.open("wb") as stream:
        for name, tensor in detached.weights.items():
            stream.write(bytes(-stream.tell() % _ALIGNMENT_BYTES))
            places[name] = stream.tell()
            stream.write(tensor.raw_data)
    for tensor in detached.model.graph.initializer:
        if tensor.name in places:
            del tensor.external_data[:]
            length = _size_bytes(detached.weights[tensor.name])
            where = {"location": data.name, "offset": places[tensor.name], "length": length}
            for key, value in where.items():
                tensor.external_data.add(key=key, value=str(value))
    path.write_bytes(detached.model.SerializeToString(deterministic=True))


def digest(model: ModelProto) -> str:
    """SHA-256 of a model with its weights, in hexadecimal."""
    detached = detach(model)
    found = hashlib.sha256(detached.model.SerializeToString(deterministic=True))
    for tensor in detached.weights.values():
        found.update(hashlib.sha256(tensor.raw_data).digest())
    return found.hexdigest()


def _is_weight(tensor: TensorProto) -> bool:
    raw = tensor.data_type in _WEIGHT_TYPES and tensor.HasField("raw_data")
    return raw and _size_bytes(tensor) >= _MIN_WEIGHT_BYTES


def _size_bytes(tensor: TensorProto) -> int:
    """From the shape: to touch ``raw_data`` copies it."""
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    return int(math.prod(tensor.dims)) * dtype.itemsize


def _add_reference(model: ModelProto, tensor: TensorProto, location: str) -> None:
    reference = model.graph.initializer.add(
        name=tensor.name,
        data_type=tensor.data_type,
        dims=tensor.dims,
        data_location=TensorProto.EXTERNAL,
    )
    reference.external_data.add(key="location", value=location)


def _copy_fields(source: Message, target: Message, but: str) -> None:
    for field, value in source.ListFields():
        if field.name == but:
            continue
        if isinstance(value, Message):
            getattr(target, field.name).CopyFrom(value)
        elif isinstance(value, (str, bytes, int, float)):
            setattr(target, field.name, value)
        else:
            getattr(target, field.name).extend(value)
