"""A histogram that grows with its data and does not depend on the order in which the data came.

Bin edges are whole multiples of a power of two. When a value falls outside, the width doubles and
neighbouring bins merge; since trunc(x / 2w) = trunc(trunc(x / w) / 2), the counts are those that the
final width would have given from the start. So the result depends only on the values, never on how
they were cut into batches or in which order these came.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

#: Bins on each side of zero: 64 KiB a tensor, and at least 2,048 of them cover the wider side.
HALF = 4096
#: Below this, 1 / width would leave float32.
_MIN_EXPONENT = -126
#: Values are binned in pieces that stay in the processor's cache.
_CHUNK = 1 << 16


class Extremes:
    """The smallest and the largest of the values that were seen.

    Attributes:
        lo, hi: smallest and largest value seen.
        elements: how many values were seen.
    """

    def __init__(self) -> None:
        self.lo = math.inf
        self.hi = -math.inf
        self.elements = 0

    def update(self, values: npt.NDArray[np.float32]) -> None:
        """See values of any shape."""
        if values.size:
            self.merge(float(values.min()), float(values.max()), values.size)

    def merge(self, lo: float, hi: float, elements: int) -> None:
        """See ``elements`` values whose smallest and largest are known."""
        self.lo, self.hi = min(self.lo, lo), max(self.hi, hi)
        self.elements += elements


class Histogram(Extremes):
    """Counts of float32 values on a grid of width ``2**exponent``, zero on an edge.

    Attributes:
        counts: int64, ``2 * HALF`` bins; bin i lies between i - HALF and i - HALF + 1 times the width,
            and holds the edge that is nearer to zero.
        exponent: the width's power of two; None before the first non-zero value.
        zeros: how many of the values were exactly zero; they are counted in bin ``HALF`` too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: npt.NDArray[np.int64] = np.zeros(2 * HALF, np.int64)
        self.exponent: int | None = None
        self.zeros = 0

    @property
    def width(self) -> float:
        """Width of a bin."""
        return math.ldexp(1.0, self.exponent if self.exponent is not None else _MIN_EXPONENT)

    def update(self, values: npt.NDArray[np.float32]) -> None:
        """Count finite float32 values of any shape."""
        if values.size == 0:
            return
        flat = values.reshape(-1)
        lo, hi = float(flat.min()), float(flat.max())
        self.merge(lo, hi, flat.size)
        self.zeros += flat.size - int(np.count_nonzero(flat))
        self._grow_to(max(abs(lo), abs(hi)))
        if self.exponent is None:
            self.counts[HALF] += flat.size
            return
        for start in range(0, flat.size, _CHUNK):
            self._count(flat[start : start + _CHUNK], self.exponent)

    def _count(self, values: npt.NDArray[np.float32], exponent: int) -> None:
        # Scaling by a power of two is exact, or underflows to zero, which truncation gives as well.
        steps = (values * np.float32(math.ldexp(1.0, -exponent))).astype(np.int32)
        steps -= values < 0
        self.counts += np.bincount(steps + HALF, minlength=2 * HALF)

    def _grow_to(self, magnitude: float) -> None:
        needed = _exponent_for(magnitude)
        if needed is None:
            return
        if self.exponent is None:
            self.exponent = needed
        while self.exponent < needed:
            self.counts = _merge_pairs(self.counts)
            self.exponent += 1

    def centers(self) -> npt.NDArray[np.float64]:
        """The middle of each bin."""
        return (np.arange(-HALF, HALF, dtype=np.float64) + 0.5) * np.float64(self.width)


def _exponent_for(magnitude: float) -> int | None:
    """The smallest exponent for which [-magnitude, magnitude] falls inside the bins."""
    if magnitude == 0.0:
        return None
    # frexp: magnitude = m * 2**e with m in [0.5, 1), so magnitude < 2**e = HALF * 2**(e - log2 HALF).
    return max(math.frexp(magnitude)[1] - HALF.bit_length() + 1, _MIN_EXPONENT)


def _merge_pairs(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    pairs = counts.reshape(-1, 2).sum(axis=1)
    merged = np.zeros_like(counts)
    merged[HALF // 2 : HALF // 2 + HALF] = pairs
    return merged
