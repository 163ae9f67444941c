"""How far the outputs of two versions are apart on the same requests.

This is reported and judged by nobody: a version that was trained again is meant to answer differently, and
how differently only its owner can say. What must not change is in the golden rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, Optional, Sequence

import numpy as np

from device_agent.batching.job import Arrays
from device_agent.manifest import TensorSpec
from device_agent.selftest import as_float64

_FLOATS = ("FP16", "BF16", "FP32", "FP64")
_NOT_NUMBERS = ("BYTES", "BOOL")


@dataclass
class _Output:
    """What was seen of one output.

    Attributes:
        largest_difference: of two finite elements; None: there were none.
        compared, agreeing: rows of floats and those with the same argmax; of other types, elements and those
            that are equal.
        other_shapes: requests for which the versions gave different shapes.
    """

    largest_difference: Optional[float] = None
    compared: int = 0
    agreeing: int = 0
    other_shapes: int = 0

    def describe(self) -> Dict[str, Any]:
        """A form for JSON."""
        return {
            "largest_difference": self.largest_difference,
            "agreeing_fraction": round(self.agreeing / self.compared, 6) if self.compared else None,
            "other_shapes": self.other_shapes,
        }


class Agreement:
    """Compares the outputs that two versions have in common.

    A row of an output is a vector along its last axis. Rows of floats agree if their largest element is at
    the same place; rows of one element have no such place, so for them only the difference is kept.

    Args:
        new, old: the outputs of the versions.
    """

    def __init__(self, new: Sequence[TensorSpec], old: Sequence[TensorSpec]) -> None:
        known = {(spec.name, spec.dtype) for spec in old}
        self._dtypes = {spec.name: spec.dtype for spec in new if (spec.name, spec.dtype) in known}
        self._outputs = {name: _Output() for name in self._dtypes}

    def add(self, new: Arrays, old: Arrays) -> None:
        """Compare the answers to one request."""
        for name, dtype in self._dtypes.items():
            seen = self._outputs[name]
            if new[name].shape != old[name].shape:
                seen.other_shapes += 1
            elif new[name].size:
                _compare(seen, dtype, new[name], old[name])

    def describe(self) -> Dict[str, Any]:
        """A form for JSON, by output."""
        return {name: seen.describe() for name, seen in self._outputs.items()}


def _compare(seen: _Output, dtype: str, new: np.ndarray[Any, Any], old: np.ndarray[Any, Any]) -> None:
    if dtype not in _FLOATS:
        seen.compared += new.size
        seen.agreeing += int(np.count_nonzero(np.asarray(new == old)))
    if dtype in _NOT_NUMBERS:
        return
    new_64, old_64 = as_float64(dtype, new), as_float64(dtype, old)
    finite = np.isfinite(new_64) & np.isfinite(old_64)
    if finite.any():
        largest = float(np.max(np.abs(new_64[finite] - old_64[finite])))
        seen.largest_difference = max(largest, seen.largest_difference or 0.0)
    if dtype in _FLOATS and new.ndim and new.shape[-1] > 1:
        same = np.argmax(new_64, axis=-1) == np.argmax(old_64, axis=-1)
        seen.compared += int(np.size(same))
        seen.agreeing += int(np.count_nonzero(same))
