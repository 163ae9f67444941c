"""Samples: what is fed to the model, checked, and cut into rows without their padding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, TensorProto

from calibration.errors import CalibrationError
from calibration.graph import Array, dims, model_inputs

#: The input that marks padding in text models, by the convention of the Hugging Face tokenizers.
MASK_INPUT = "attention_mask"
#: How a mask may be typed: a bool input called attention_mask marks padding as an integer one does.
_MASK_TYPES = (TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL, TensorProto.FLOAT)


@dataclass(frozen=True)
class Signature:
    """What the model takes.

    Attributes:
        dtypes: by input name.
        shapes: by input name; an int, or a symbol or None where the axis is free.
        batched: whether axis 0 of every input is the same free axis, so that rows can be run one by one.
        mask: name of the padding mask, where there is one.
    """

    dtypes: Mapping[str, np.dtype[np.generic]]
    shapes: Mapping[str, Sequence[int | str | None]]
    batched: bool
    mask: str | None


def signature(model: ModelProto) -> Signature:
    """Read the inputs of a model."""
    inputs = model_inputs(model)
    shapes = {value.name: dims(value) for value in inputs}
    first = [shape[0] if shape else 1 for shape in shapes.values()]
    batched = bool(first) and not any(isinstance(size, int) for size in first) and len(set(first)) == 1
    mask = next((value.name for value in inputs if _is_mask(value)), None)
    dtypes = {
        value.name: np.dtype(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
        for value in inputs
    }
    return Signature(dtypes, shapes, batched, mask)


def _is_mask(value: onnx.ValueInfoProto) -> bool:
    shape = dims(value)
    kind = value.type.tensor_type.elem_type
    return value.name == MASK_INPUT and kind in _MASK_TYPES and len(shape) == 2


def check(sample: Mapping[str, Array], expected: Signature, position: int) -> None:
    """Raise a CalibrationError where a sample does not fit the model's inputs."""
    if not isinstance(sample, Mapping):
        raise _misfit(position, f"it is a {type(sample).__name__}, not a mapping from input names to arrays")
    missing = sorted(set(expected.shapes) - set(sample))
    unknown = sorted(set(sample) - set(expected.shapes))
    if missing or unknown:
        found = f"it lacks {missing}" if missing else f"it has {unknown}"
        raise _misfit(position, f"{found}; the model's inputs are {sorted(expected.shapes)}")
    for name, shape in expected.shapes.items():
        _check_array(sample[name], name, shape, expected.dtypes[name], position)
    if expected.batched and len({len(sample[name]) for name in expected.shapes}) != 1:
        sizes = {name: len(sample[name]) for name in expected.shapes}
        raise _misfit(position, f"its inputs have different batch sizes: {sizes}")


def _check_array(
    value: Array,
    name: str,
    shape: Sequence[int | str | None],
    dtype: np.dtype[np.generic],
    position: int,
) -> None:
    if not isinstance(value, np.ndarray):
        raise _misfit(position, f"{name!r} is a {type(value).__name__}, not a numpy array")
    if value.dtype != dtype:
        raise _misfit(position, f"{name!r} has dtype {value.dtype}, the model takes {dtype}")
    fits = len(value.shape) == len(shape) and all(
        got == want or not isinstance(want, int) for got, want in zip(value.shape, shape, strict=True)
    )
    if not fits or 0 in value.shape:
        wanted = tuple("any" if not isinstance(size, int) else size for size in shape)
        raise _misfit(position, f"{name!r} has shape {value.shape}, the model takes {wanted}")
    if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
        raise _misfit(position, f"{name!r} holds NaN or infinity")


def rows(sample: Mapping[str, Array], expected: Signature) -> Iterator[dict[str, Array]]:
    """Cut a sample into rows of batch 1, each without the padding at its end.

    Rows are run one by one because float kernels may differ in the last bit between batch sizes:
    this way the scales do not depend on how the samples were batched. Where the batch is not free, the
    sample is one row.
    """
    if not expected.batched:
        yield _without_padding(dict(sample), expected)
        return
    for i in range(len(sample[next(iter(expected.shapes))])):
        yield _without_padding({name: value[i : i + 1] for name, value in sample.items()}, expected)


def _without_padding(row: dict[str, Array], expected: Signature) -> dict[str, Array]:
    """Keep the padding at a row's end from the observers.

    Where the length is free it is cut off. Where it is fixed, the row is repeated until it fills the length.
    """
    if expected.mask is None:
        return row
    mask = row[expected.mask]
    shape = list(expected.shapes[expected.mask])
    padded = [name for name in row if list(expected.shapes[name]) == shape]
    lengths = [int(np.flatnonzero(line)[-1]) + 1 if line.any() else line.size for line in mask]
    if isinstance(shape[1], int):
        return row | {name: _repeated(row[name], lengths) for name in padded}
    return row | {name: row[name][:, : max(lengths)] for name in padded}


def _repeated(values: Array, lengths: Sequence[int]) -> Array:
    """Each line's first values over again, to the end of the line."""
    lines = [np.resize(line[:length], line.size) for line, length in zip(values, lengths, strict=True)]
    return np.stack(lines)


def _misfit(position: int, why: str) -> CalibrationError:
    return CalibrationError(
        f"sample {position} does not fit the model",
        why,
        "give arrays with the names, dtypes and shapes of the model's inputs",
    )
