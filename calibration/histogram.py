"""A histogram that grows with its data and does not depend on the order in which the data came.

Bin edges are whole multiples of a power of two. When a value falls outside, the width doubles and
neighbouring bins merge; since trunc(x / 2w) = trunc(trunc(x / w) / 2), the counts are those that the
final width would have given from the start. So the result depends only on the values, never on how
they were cut into batches or in which order these came.

Of a large tensor not every value is looked at. Those beyond half of its largest magnitude are, since they
decide where to clip; of the others a fixed share stands for all.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

#: Bins on each side of zero: 64 KiB a tensor, and at least 2,048 of them cover the wider side.
HALF = 4096
#: Below this, 1 / width would leave float32.
_MIN_EXPONENT = -126
#: Values are binned in pieces that stay in the processor's cache.
_CHUNK = 1 << 16
#: An update of more values than this counts a share of the smaller ones.
MOST_COUNTED = 1 << 16


class Extremes:
    """The smallest and the largest of the values that were seen. Threads may share one.

    Attributes:
        lo, hi: smallest and largest value seen.
        elements: how many values were seen.
    """

    def __init__(self) -> None:
        self.lo = math.inf
        self.hi = -math.inf
        self.elements = 0
        self._lock = threading.Lock()

    def update(self, values: npt.NDArray[np.float32]) -> None:
        """See values of any shape."""
        if values.size:
            self.merge(float(values.min()), float(values.max()), values.size)

    def merge(self, lo: float, hi: float, elements: int) -> None:
        """See ``elements`` values whose smallest and largest are known."""
        with self._lock:
            self._merge(lo, hi, elements)

    def _merge(self, lo: float, hi: float, elements: int) -> None:
        self.lo, self.hi = min(self.lo, lo), max(self.hi, hi)
        self.elements += elements


class Histogram(Extremes):
    """Counts of float32 values on a grid of width ``2**exponent``, zero on an edge. Threads may share one.

    Attributes:
        counts: int64, ``2 * HALF`` bins whose sum is near ``elements``; bin i lies between i - HALF and
            i - HALF + 1 times the width, and holds the edge that is nearer to zero.
        exponent: the width's power of two; None before the first non-zero value.
        zeros: how many of the counted values were exactly zero; they are counted in bin ``HALF`` too.
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
        """Count float32 values of any shape: one tensor of one row.

        Raises:
            FloatingPointError: one of them is NaN or infinite; none is counted then.
        """
        if values.size == 0:
            return
        flat = values.reshape(-1)
        lo, hi = float(flat.min()), float(flat.max())  # NaN in one value shows in both
        if not (math.isfinite(lo) and math.isfinite(hi)):
            raise FloatingPointError("a value is not finite")
        with self._lock:
            self._merge(lo, hi, flat.size)
            self._grow_to(max(abs(lo), abs(hi)))
            exponent = self.exponent
            if exponent is None:
                self.counts[HALF] += flat.size
                self.zeros += flat.size
                return
        # Other threads may widen the bins from here on; what is counted meanwhile is widened after it.
        for values_counted, each in _strata(flat, lo, hi):
            counts, zeros = _count(values_counted, exponent, signed=lo < 0), _zeros(values_counted)
            with self._lock:
                self._add(counts * each if each > 1 else counts, exponent, zeros * each)

    def _add(self, counts: npt.NDArray[np.int64], exponent: int, zeros: int) -> None:
        wider = exponent if self.exponent is None else self.exponent
        for _ in range(exponent, wider):
            counts = _merge_pairs(counts)
        self.counts += counts
        self.zeros += zeros

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


def _strata(
    flat: npt.NDArray[np.float32], lo: float, hi: float
) -> Iterator[tuple[npt.NDArray[np.float32], int]]:
    """Pieces of the values to count, each with the number of values that one of them stands for.

    The step has no factor in common with the size, so a sample meets every channel and every position.
    """
    step = -(-flat.size // MOST_COUNTED)
    while math.gcd(step, flat.size) > 1:
        step += 1
    if step == 1:
        yield from ((piece, 1) for piece in _pieces(flat))
        return
    edge = np.float32(max(abs(lo), abs(hi)) / 2)
    size = np.abs if lo < 0 else np.asarray
    tails = np.concatenate([piece[size(piece) > edge] for piece in _pieces(flat)])
    yield from ((piece, 1) for piece in _pieces(tails))
    for piece in _pieces(flat[::step]):
        yield piece[size(piece) <= edge], step


def _pieces(values: npt.NDArray[np.float32]) -> Iterator[npt.NDArray[np.float32]]:
    return (values[start : start + _CHUNK] for start in range(0, values.size, _CHUNK))


def _count(values: npt.NDArray[np.float32], exponent: int, *, signed: bool) -> npt.NDArray[np.int64]:
    # Scaling by a power of two is exact, or underflows to zero, which truncation gives as well.
    steps = (values * np.float32(math.ldexp(1.0, -exponent))).astype(np.int32)
    if signed:
        steps -= values < 0
    steps += HALF
    return np.bincount(steps, minlength=2 * HALF)


def _zeros(values: npt.NDArray[np.float32]) -> int:
    return values.size - int(np.count_nonzero(values != 0))  # much faster than to count floats


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
