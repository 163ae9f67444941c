"""A bundle's golden inputs and outputs: what is sent, and what must come back."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from device_agent.manifest import Manifest, TensorSpec, Tolerance
from edgekit.errors import BadInput
from edgekit.tensors import Arrays, numpy_dtype


@dataclass(frozen=True)
class Case:
    """A request and its answer.

    Attributes:
        inputs, outputs: by name.
        tolerances: how far each output may be off.
    """

    inputs: Arrays
    outputs: Arrays
    tolerances: Mapping[str, Tolerance]

    def identical(self, got: Arrays) -> bool:
        """Whether an answer is the golden one bit for bit."""
        return all(np.array_equal(got[name], value) for name, value in self.outputs.items())

    def difference(self, got: Arrays) -> str:
        """In which output an answer is farther off than its tolerance; empty: in none."""
        return next((name for name in self.outputs if not self._within(name, got.get(name))), "")

    def _within(self, name: str, got: np.ndarray[Any, Any] | None) -> bool:
        golden, tolerance = self.outputs[name], self.tolerances[name]
        if got is None or got.shape != golden.shape:
            return False
        close = np.isclose(
            got.astype(np.float64), golden.astype(np.float64), tolerance.relative, tolerance.absolute
        )
        return bool(close.all())


@dataclass(frozen=True)
class Golden:
    """Everything that a bundle says of itself as arrays, the batch axis first.

    Attributes:
        whole: all rows at once.
        batchable: whether rows may be sent alone, or several times.
        most_rows: the largest batch that was tested.
    """

    whole: Case
    batchable: bool
    most_rows: int

    def batch(self, rows: int) -> Arrays:
        """Inputs of so many rows, repeated as needed; of a fixed batch, as they are."""
        if not self.batchable:
            return self.whole.inputs
        return {
            name: np.take(array, range(rows), axis=0, mode="wrap")
            for name, array in self.whole.inputs.items()
        }

    def cases(self) -> list[Case]:
        """A case for each row; of a fixed batch, the only one."""
        if not self.batchable:
            return [self.whole]
        count = len(next(iter(self.whole.inputs.values())))
        return [
            Case(_row(self.whole.inputs, row), _row(self.whole.outputs, row), self.whole.tolerances)
            for row in range(count)
        ]


def load(directory: Path, manifest: Manifest) -> Golden:
    """Read the golden arrays of an unpacked bundle.

    Raises:
        BadInput: they cannot be read, or are not the numbers that the manifest announces.
    """
    inputs = _read(directory / manifest.golden.inputs, manifest.inputs)
    outputs = _read(directory / manifest.golden.outputs, manifest.outputs)
    free = all(spec.shape[:1] == (-1,) for spec in (*manifest.inputs, *manifest.outputs))
    rows = {len(array) if array.ndim else 0 for array in (*inputs.values(), *outputs.values())}
    batchable = free and len(rows) == 1 and rows != {0}
    return Golden(Case(inputs, outputs, manifest.golden.tolerances), batchable, manifest.max_batch_size)


def _read(path: Path, specs: tuple[TensorSpec, ...]) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {spec.name: stored[spec.name] for spec in specs}
        wrong = [spec.name for spec in specs if arrays[spec.name].dtype != numpy_dtype(spec.dtype)]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise _unusable(path, f"{type(error).__name__}: {error}") from error
    if wrong:
        raise _unusable(path, f"'{wrong[0]}' is of another type than the manifest says")
    return arrays


def _unusable(path: Path, why: str) -> BadInput:
    fix = "make the bundle again with `edgekit compress`; text tensors cannot be benched"
    return BadInput(f"the golden file {path.name} cannot be used", why, fix)


def _row(arrays: Arrays, row: int) -> Arrays:
    return {name: array[row : row + 1] for name, array in arrays.items()}
