"""Observers: from the values of one tensor to the range that is quantized.

An observer sees a tensor's values in pieces and keeps a fixed amount of memory. Its range depends on
the values alone, not on how they were cut into batches or in which order these came.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt

from calibration.errors import CalibrationError
from calibration.histogram import Histogram
from calibration.ranges import entropy_range, mse_range, percentile_range

DEFAULT_PERCENTILE = 99.99
OBSERVERS = ("minmax", "percentile", "mse", "entropy")


_METHODS: Mapping[str, Callable[[Histogram], tuple[float, float]]] = {
    "mse": mse_range,
    "entropy": entropy_range,
}


class Observer(Protocol):
    """What the runner needs of an observer."""

    @property
    def lo(self) -> float:
        """Smallest value seen."""

    @property
    def hi(self) -> float:
        """Largest value seen."""

    @property
    def elements(self) -> int:
        """How many values were seen."""

    def update(self, values: npt.NDArray[np.float32]) -> None:
        """See more values of the tensor."""

    def range(self) -> tuple[float, float]:
        """The range to quantize."""


class MinMax:
    """The whole range that was seen.

    Attributes:
        lo, hi: smallest and largest value seen.
        elements: how many values were seen.
    """

    def __init__(self) -> None:
        self.lo = math.inf
        self.hi = -math.inf
        self.elements = 0

    def update(self, values: npt.NDArray[np.float32]) -> None:
        """See more values of the tensor."""
        if values.size:
            self.merge(float(values.min()), float(values.max()), values.size)

    def merge(self, lo: float, hi: float, elements: int) -> None:
        """See ``elements`` values whose smallest and largest are known."""
        self.lo, self.hi = min(self.lo, lo), max(self.hi, hi)
        self.elements += elements

    def range(self) -> tuple[float, float]:
        """The range to quantize: all of it."""
        return self.lo, self.hi


class FromHistogram:
    """A range chosen on a histogram of the values.

    Args:
        choose: from the histogram to the range.
    """

    def __init__(self, choose: Callable[[Histogram], tuple[float, float]]) -> None:
        self.histogram = Histogram()
        self._choose = choose

    @property
    def lo(self) -> float:
        """Smallest value seen."""
        return self.histogram.lo

    @property
    def hi(self) -> float:
        """Largest value seen."""
        return self.histogram.hi

    @property
    def elements(self) -> int:
        """How many values were seen."""
        return self.histogram.elements

    def update(self, values: npt.NDArray[np.float32]) -> None:
        """See more values of the tensor."""
        self.histogram.update(values)

    def range(self) -> tuple[float, float]:
        """The range to quantize."""
        if self.histogram.lo == self.histogram.hi:  # a constant tensor has only one sensible range
            return self.histogram.lo, self.histogram.hi
        return self._choose(self.histogram)


@dataclass(frozen=True)
class ObserverKind:
    """One choice of observer with its settings.

    Attributes:
        name: as the user gives it.
        settings: numbers that change the result.
        make: a fresh observer for one tensor.
        needs_values: False where smallest and largest are enough.
    """

    name: str
    settings: Mapping[str, float]
    make: Callable[[], Observer]
    needs_values: bool


def observer_kind(name: str, *, percentile: float = DEFAULT_PERCENTILE) -> ObserverKind:
    """Look an observer up by name.

    Raises:
        CalibrationError: an unknown name, or a percentile outside (50, 100].
    """
    if name == "minmax":
        return ObserverKind(name, {}, MinMax, needs_values=False)
    if name == "percentile":
        if not 50.0 < percentile <= 100.0:
            raise CalibrationError(
                f"percentile {percentile} makes no range",
                "it is the share of values to keep on each side, above 50 and at most 100",
                f"leave it at {DEFAULT_PERCENTILE}",
            )
        chosen = partial(percentile_range, percentile=percentile)
        return ObserverKind(name, {"percentile": float(percentile)}, partial(FromHistogram, chosen), True)
    if name in _METHODS:
        return ObserverKind(name, {}, partial(FromHistogram, _METHODS[name]), True)
    raise CalibrationError(
        f"there is no observer {name!r}",
        "observers choose the range of each tensor from its values",
        "choose one of: " + ", ".join(OBSERVERS),
    )
