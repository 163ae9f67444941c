"""``.npz`` files: one array for each input, samples along the first axis, and maybe ``labels``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from device_agent.manifest import TensorSpec
from edgekit.artifact import file_digest
from edgekit.data import Label, Source
from edgekit.data.digests import order, source_digest
from edgekit.errors import BadInput
from edgekit.tensors import Arrays, check_sample

LABELS = "labels"


def open_source(path: Path, signature: Sequence[TensorSpec] | None, seed: int) -> Source:
    """Read the arrays and check all of them, since they are in memory anyway.

    Raises:
        BadInput: damaged, holding Python objects, of unequal lengths, or not what the model takes.
    """
    arrays = read_arrays(path)
    labels = arrays.pop(LABELS, None)
    if not arrays:
        raise BadInput(
            f"the data {path} holds no inputs",
            "it has no array besides 'labels'" if labels is not None else "it has no arrays at all",
            "save one array for each input: numpy.savez(path, input=..., labels=...)",
        )
    _check_lengths(path, arrays, labels)
    count = len(next(iter(arrays.values())))
    for index in range(count):
        check_sample(_row(arrays, index), signature, f"{path}, sample {index}")
    return Source(
        read=partial(_read, path, arrays, labels, order(count, seed)),
        count=count,
        digest=source_digest(file_digest(path), None, seed),
    )


def read_arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """All arrays of an ``.npz`` file by name; Python objects are refused, never unpickled."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # zipfile, zlib and NumPy's header parser raise a dozen types
        raise BadInput(
            f"the data {path} cannot be read",
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}",
            "save plain arrays with numpy.savez(path, input=..., labels=...)",
        ) from error


def _check_lengths(
    path: Path, arrays: dict[str, np.ndarray[Any, Any]], labels: np.ndarray[Any, Any] | None
) -> None:
    named = arrays if labels is None else {**arrays, LABELS: labels}
    scalars = [name for name, array in named.items() if array.ndim == 0]
    lengths = {} if scalars else {name: len(array) for name, array in named.items()}
    if scalars or len(set(lengths.values())) > 1:
        raise BadInput(
            f"the arrays in {path} do not hold the same number of samples",
            f"'{scalars[0]}' is a single number"
            if scalars
            else ", ".join(f"'{name}' has {length}" for name, length in lengths.items()),
            "the first axis of every array counts the samples",
        )


def _row(arrays: dict[str, np.ndarray[Any, Any]], index: int) -> Arrays:
    return {name: array[index, ...] for name, array in arrays.items()}


def _read(
    path: Path,
    arrays: dict[str, np.ndarray[Any, Any]],
    labels: np.ndarray[Any, Any] | None,
    indices: list[int],
) -> Iterator[tuple[str, Arrays, Label | None]]:
    for index in indices:
        label = None if labels is None else _label(labels[index])
        yield f"{path}, sample {index}", _row(arrays, index), label


def _label(value: Any) -> Label:
    return value if isinstance(value, np.ndarray) else value.item()
