"""Tensor types, and the check of arrays against a model's signature.

A signature is a tuple of ``device_agent.manifest.TensorSpec``: names, types of the Open Inference Protocol,
shapes with the batch axis first and -1 where a size is free.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from device_agent.manifest import TensorSpec
from edgekit.errors import BadInput

if TYPE_CHECKING:
    from onnx import ValueInfoProto

Arrays = Mapping[str, np.ndarray[Any, Any]]

_NUMPY_TYPES: dict[str, type[np.generic]] = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
}
_PROTOCOL_NAMES = {np.dtype(kind): name for name, kind in _NUMPY_TYPES.items()}


def protocol_dtype(dtype: Any) -> str:
    """Name in the Open Inference Protocol of a NumPy type; raises KeyError where there is none."""
    return _PROTOCOL_NAMES[np.dtype(dtype)]


def numpy_dtype(name: str) -> np.dtype[Any]:
    """NumPy type for a name of the Open Inference Protocol; raises KeyError for BYTES and BF16."""
    return np.dtype(_NUMPY_TYPES[name])


def spec_of(info: ValueInfoProto) -> TensorSpec:
    """Describe an input or output of an ONNX graph; raises KeyError for a type that NumPy has not."""
    import onnx

    tensor = info.type.tensor_type
    shape = tuple(dim.dim_value if dim.dim_value > 0 else -1 for dim in tensor.shape.dim)
    return TensorSpec(
        info.name, protocol_dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)), shape
    )


def write_npz(target: Path | BinaryIO, arrays: Arrays) -> None:
    """Write a ``.npz``, as ``numpy.savez`` does, which cannot take an array called ``file``."""
    with zipfile.ZipFile(target, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def check_sample(sample: Arrays, signature: Sequence[TensorSpec] | None, where: str) -> None:
    """Check one sample, arrays without the batch axis, against a signature.

    Args:
        sample: by input name.
        signature: what the model takes; None checks for NaN and infinity only.
        where: names the sample in messages, such as ``digits.npz, sample 17``.

    Raises:
        BadInput: wrong names, types or shapes, or a value that is not finite.
    """
    if signature is not None:
        _check_names(sample, signature, where)
        for spec in signature:
            _check_dtype(sample[spec.name], spec, where)
            _check_shape(sample[spec.name], spec, where)
    for name, array in sample.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise BadInput(
                f"{where}: '{name}' holds NaN or infinity",
                "scales and metrics that are computed from it would be meaningless",
                "remove or repair that sample",
            )


def _check_names(sample: Arrays, signature: Sequence[TensorSpec], where: str) -> None:
    expected = {spec.name for spec in signature}
    if set(sample) != expected:
        raise BadInput(
            f"{where}: the inputs have the wrong names",
            f"the model expects {_listed(expected)}; the data has {_listed(sample)}",
            "name the arrays after the model's inputs",
        )


def _check_dtype(array: np.ndarray[Any, Any], spec: TensorSpec, where: str) -> None:
    expected = numpy_dtype(spec.dtype)
    if array.dtype != expected:
        raise BadInput(
            f"{where}: '{spec.name}' has the wrong type",
            f"the model expects {expected.name}; the data has {array.dtype.name}",
            f"convert it, as with array.astype('{expected.name}')",
        )


def _check_shape(array: np.ndarray[Any, Any], spec: TensorSpec, where: str) -> None:
    expected = spec.shape[1:]
    fits = array.ndim == len(expected) and all(
        want in (-1, got) for want, got in zip(expected, array.shape, strict=True)
    )
    if not fits:
        raise BadInput(
            f"{where}: '{spec.name}' has the wrong shape",
            f"the model expects {_shape(expected)} for one sample; the data has {_shape(array.shape)}",
            "reshape or preprocess the data to the model's input",
        )


def _listed(names: Any) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names)) or "none"


def _shape(sizes: Sequence[int]) -> str:
    return "[" + ", ".join("any" if size == -1 else str(size) for size in sizes) + "]"
