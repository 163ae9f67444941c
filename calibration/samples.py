"""Samples: what is fed to the model, checked, and cut into rows without their padding."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, TensorProto

from calibration.errors import CalibrationError
from calibration.graph import Array, dims, model_inputs

#: The input that marks padding in text models, by the convention of the Hugging Face tokenizers.
MASK_INPUT = "attention_mask"
#: Symbols of a batch axis, and of axes that are none though they come first.
_BATCH = re.compile(r"(batch.*|n|b|bs)", re.IGNORECASE)
_LENGTH = re.compile(r"(time|seq|length|frame|step|t$|s$)", re.IGNORECASE)
#: How a mask may be typed: a bool input called attention_mask marks padding as an integer one does.
_MASK_TYPES = (TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL, TensorProto.FLOAT)


@dataclass(frozen=True)
class Signature:
    """What the model takes.

    Attributes:
        dtypes: by input name.
        shapes: by input name; an int, or a symbol or None where the axis is free.
        batch_axes: by input name, the axis along which rows can be cut and run one by one; None: the
            model has no such axis in every input.
        mask: name of the padding mask, where there is one.
    """

    dtypes: Mapping[str, np.dtype[np.generic]]
    shapes: Mapping[str, Sequence[int | str | None]]
    batch_axes: Mapping[str, int] | None
    mask: str | None


def signature(model: ModelProto) -> Signature:
    """Read the inputs of a model."""
    inputs = model_inputs(model)
    shapes = {value.name: dims(value) for value in inputs}
    mask = next((value.name for value in inputs if _is_mask(value)), None)
    dtypes = {
        value.name: np.dtype(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
        for value in inputs
    }
    return Signature(dtypes, shapes, _batch_axes(shapes), mask)


def _batch_axes(shapes: Mapping[str, Sequence[int | str | None]]) -> Mapping[str, int] | None:
    """The axis of the batch in each input; None where one of them has none.

    It is the axis whose symbol is called like a batch, wherever it stands: recurrent models have it second.
    Where no symbol is, it is the first axis, if that is free and not called like a length.
    """
    symbols = [symbol for shape in shapes.values() for symbol in shape if isinstance(symbol, str)]
    for symbol in dict.fromkeys(symbols):
        if _BATCH.fullmatch(symbol) and all(list(shape).count(symbol) == 1 for shape in shapes.values()):
            return {name: list(shape).index(symbol) for name, shape in shapes.items()}
    first = {shape[0] if shape else 0 for shape in shapes.values()}
    sizes = [size for size in first if not isinstance(size, int)]
    if len(first) != 1 or not sizes or (sizes[0] is not None and _LENGTH.match(sizes[0])):
        return None
    return dict.fromkeys(shapes, 0)


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
    sizes = {name: sample[name].shape[axis] for name, axis in (expected.batch_axes or {}).items()}
    if len(set(sizes.values())) > 1:
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
    this way the scales do not depend on how the samples were batched. Where there is no free batch axis, the
    sample is one row.
    """
    axes = expected.batch_axes
    if axes is None:
        yield _without_padding(dict(sample), expected)
        return
    name, axis = next(iter(axes.items()))
    for i in range(sample[name].shape[axis]):
        row = {name: np.take(value, [i], axes[name]) for name, value in sample.items()}
        yield _without_padding(row, expected)


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
