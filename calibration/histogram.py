"""A histogram that grows with its data and does not depend on the order in which the data came.

Bin edges are whole multiples of a power of two. When a value falls outside, the width doubles and
neighbouring bins merge; since trunc(x / 2w) = trunc(trunc(x / w) / 2), the counts are those that the
final width would have given from the start. So the result depends only on the values, never on how
they were cut into batches or in which order these came.

Of a large tensor a share stands for all: what decides where to clip is the form of the distribution, and
that shows in thousands of values as in millions. The smallest and the largest are known beside it.
"""

from __future__ import annotations

import math
import threading

import numpy as np
import numpy.typing as npt

#: Bins on each side of zero: 64 KiB a tensor, and at least 2,048 of them cover the wider side.
HALF = 4096
#: Below this, 1 / width would leave float32.
_MIN_EXPONENT = -126
#: Values are binned in pieces that stay in the processor's cache.
_CHUNK = 1 << 16
#: Of more values than this in a row, about this many are counted.
MOST_COUNTED = 1 << 14


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
        looked_at: how many values were really counted; each may stand for several.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: npt.NDArray[np.int64] = np.zeros(2 * HALF, np.int64)
        self.exponent: int | None = None
        self.zeros = 0
        self.looked_at = 0

    @property
    def width(self) -> float:
        """Width of a bin."""
        return math.ldexp(1.0, self.exponent if self.exponent is not None else _MIN_EXPONENT)

    def update(self, values: npt.NDArray[np.float32]) -> None:
        """Count float32 values of any shape: one tensor of one row.

        Raises:
            FloatingPointError: one of them is NaN or infinite; none is counted then.
        """
        if values.size:
            flat = values.reshape(-1)
            step = step_of_share(flat.size)
            self.update_share(float(flat.min()), float(flat.max()), flat.size, flat[::step], step)

    def update_share(
        self, lo: float, hi: float, elements: int, share: npt.NDArray[np.float32], each: int
    ) -> None:
        """Count one tensor of one row by some of its values.

        Args:
            lo: the smallest of all.
            hi: the largest of all.
            elements: how many there are in all.
            share: some of them, of any shape.
            each: how many values one of ``share`` stands for.

        Raises:
            FloatingPointError: ``lo``, ``hi`` or one of ``share`` is NaN or infinite; none is counted then.
        """
        # NaN in one value shows in the largest, and in both ends where these are of all values.
        if not all(map(math.isfinite, (lo, hi, float(share.max(initial=lo))))):
            raise FloatingPointError("a value is not finite")
        with self._lock:
            self._merge(lo, hi, elements)
            self.looked_at += share.size
            self._grow_to(max(abs(lo), abs(hi)))
            exponent = self.exponent
            if exponent is None:
                self.counts[HALF] += share.size * each
                self.zeros += share.size * each
                return
        # Other threads may widen the bins from here on; what is counted meanwhile is widened after it.
        flat, signed = share.reshape(-1), lo < 0
        for start in range(0, flat.size, _CHUNK):
            piece = flat[start : start + _CHUNK]
            counts, zeros = _count(piece, exponent, signed=signed), _zeros(piece)
            if each > 1:
                counts *= each
            with self._lock:
                self._add(counts, exponent, zeros * each)

    def _add(self, counts: npt.NDArray[np.int64], exponent: int, zeros: int) -> None:
        """Add the counts of all bins, or of those on the right of zero."""
        wider = exponent if self.exponent is None else self.exponent
        if wider > exponent and counts.size == HALF:
            counts = np.concatenate((np.zeros(HALF, np.int64), counts))
        for _ in range(exponent, wider):
            counts = _merge_pairs(counts)
        self.counts[-counts.size :] += counts
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


def step_of_share(elements: int) -> int:
    """Of so many values in a row, every how many-th is counted.

    It has no factor in common with their number, so that each channel and each position is met.
    """
    step = -(-elements // MOST_COUNTED)
    while math.gcd(step, elements) > 1:
        step += 1
    return step


def _count(values: npt.NDArray[np.float32], exponent: int, *, signed: bool) -> npt.NDArray[np.int64]:
    """The counts of all bins, or, where no value is negative, of those on the right of zero."""
    # Scaling by a power of two is exact, or underflows to zero, which truncation gives as well.
    steps = (values * np.float32(math.ldexp(1.0, -exponent))).astype(np.int32)
    if not signed:
        return np.bincount(steps, minlength=HALF)
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
