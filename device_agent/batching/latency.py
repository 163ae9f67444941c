"""What a batch of n rows costs, learned while serving.

The cost is taken as affine, ``fixed + per_row * n``, and fitted by least squares with exponentially fading
weights. A fit over all sizes, in place of an average for each, lets every observation correct the estimate
of sizes that were not seen lately. A device that throttles or changes its power mode becomes slower at every
size alike, so an observation also moves what is remembered of the others towards its own level; a size beyond
all that were seen does not, since it says more about the shape.
"""

from __future__ import annotations

import math
from typing import Optional

#: How many runs of a size come before its usual time: the first allocates, the second may be recorded as a
#: graph. Both can take many times as long, and would make the size look worthless.
PREPARING_RUNS = 2
_KEEP = 0.98  # weight of history at each observation: half is forgotten after 34
_FOLLOW = 0.3  # how far, as an exponent, history moves to the level of an observation
_MIN_VARIANCE = 0.1  # of the row counts; below it the slope would be fitted to noise
_MAX_OUTLIER = 4.0  # a sample counts at most as this multiple of what was expected


class LatencyModel:
    """Learned latency by number of rows."""

    def __init__(self) -> None:
        self._fixed_s = 0.0
        self._per_row_s = 0.0
        self._weight = 0.0
        self._least_rows, self._most_rows = math.inf, 0.0
        self._n = self._t = self._nn = self._nt = 0.0

    def predict(self, rows: int) -> Optional[float]:
        """Expected seconds for a batch of ``rows``; None while nothing was observed."""
        if self._weight == 0.0:
            return None
        return self._fixed_s + self._per_row_s * rows

    def observe(self, rows: int, seconds: float) -> None:
        """Learn from one run."""
        expected_s = self.predict(rows)
        if expected_s and self._least_rows <= rows <= self._most_rows:
            seconds = min(seconds, _MAX_OUTLIER * expected_s)
            self._follow(seconds, expected_s)
        self._least_rows, self._most_rows = min(self._least_rows, rows), max(self._most_rows, rows)
        self._weight = _KEEP * self._weight + 1.0
        self._n = _KEEP * self._n + rows
        self._t = _KEEP * self._t + seconds
        self._nn = _KEEP * self._nn + rows * rows
        self._nt = _KEEP * self._nt + rows * seconds
        self._fit()

    def _follow(self, seconds: float, expected_s: float) -> None:
        level = (seconds / expected_s) ** _FOLLOW
        self._t *= level
        self._nt *= level

    def _fit(self) -> None:
        mean_n, mean_t = self._n / self._weight, self._t / self._weight
        variance = self._nn / self._weight - mean_n * mean_n
        if variance < _MIN_VARIANCE:
            self._rescale(mean_n, mean_t)
            return
        slope_s = (self._nt / self._weight - mean_n * mean_t) / variance
        # The fixed part may come out negative: then rows cost more the more of them there are, as where a
        # batch outgrows a cache. A single row is still held to a tenth of the mean.
        steepest_s = 0.9 * mean_t / (mean_n - 1.0)
        self._per_row_s = min(max(slope_s, 0.0), steepest_s)
        self._fixed_s = mean_t - self._per_row_s * mean_n

    def _rescale(self, mean_n: float, mean_t: float) -> None:
        """One size alone tells the level; keep the shape that was learned before."""
        before_s = self._fixed_s + self._per_row_s * mean_n
        if before_s <= 0.0:
            self._fixed_s, self._per_row_s = mean_t, 0.0
            return
        self._fixed_s *= mean_t / before_s
        self._per_row_s *= mean_t / before_s
