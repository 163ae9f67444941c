"""Choosing the range to quantize from a histogram: where to clip so that the whole loses least.

Each method sees the histogram alone, so its range is as independent of batches and order as that is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from calibration.histogram import HALF, Histogram

Doubles = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

LEVELS = 256
#: Clipped ranges that are tried, as shares of the whole; below a tenth a network would saturate.
_SHARES = np.linspace(0.1, 1.0, 91)


def percentile_range(histogram: Histogram, percentile: float) -> tuple[float, float]:
    """The range that leaves out the ``100 - percentile`` percent of values on either side.

    The ends are bin edges, and never beyond what was seen.
    """
    below = np.cumsum(histogram.counts)
    allowed = math.floor(int(below[-1]) * (100.0 - percentile) / 100.0)
    above = np.cumsum(histogram.counts[::-1])
    first = int(np.argmax(below > allowed))
    last = 2 * HALF - 1 - int(np.argmax(above > allowed))
    lo = max((first - HALF) * histogram.width, histogram.lo)
    hi = min((last + 1 - HALF) * histogram.width, histogram.hi)
    return lo, hi


def mse_range(histogram: Histogram) -> tuple[float, float]:
    """The range with the least mean squared error of the quantized values, clipping and rounding together.

    The signal is the same for every range, so this is the range of the best SQNR too. Both ends are
    clipped together first, then each alone. (Banner et al., 2019, "Post training 4-bit quantization",
    minimise the same error in closed form for assumed distributions; here it is summed over the real one.)
    """
    values, weights = _nonzero(histogram)

    def error(lo: float, hi: float) -> float:
        step = max((hi - lo) / (LEVELS - 1), math.ulp(0.0))
        rounded = np.rint(np.clip(values, lo, hi) / step) * step
        return float(np.dot(weights, np.square(rounded - values)))

    def errors(lows: Doubles, highs: Doubles) -> Doubles:
        return np.array([error(float(lo), float(hi)) for lo, hi in zip(lows, highs, strict=True)])

    return _best_range(histogram, errors)


def entropy_range(histogram: Histogram) -> tuple[float, float]:
    """The range whose 256 levels keep the most of the distribution's information.

    Kullback-Leibler divergence between the clipped distribution and the same spread over the levels
    (Migacz, 2017, "8-bit Inference with TensorRT"). Exact zeros are left out: every range keeps them
    exact, and the peak that a ReLU makes of them would drown the rest.
    """
    weights, width = _coarse(histogram)
    half = len(weights) // 2
    beneath = _beneath(weights)
    each = float(histogram.counts.sum()) / max(histogram.looked_at, 1)

    def divergences(lows: Doubles, highs: Doubles) -> Doubles:
        first = half + np.floor(lows / width).astype(np.int64)
        last = half + np.ceil(highs / width).astype(np.int64)
        found = np.full(lows.size, math.inf)
        tried = np.flatnonzero(last - first > LEVELS)
        if tried.size:
            found[tried] = _divergences(weights, beneath, first[tried], last[tried], each)
        return found

    return _best_range(histogram, divergences)


def _beneath(counts: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """How much is below each edge of a bin; sums of whole numbers, so exact."""
    return np.concatenate(([0], np.cumsum(counts)))


def _coarse(histogram: Histogram) -> tuple[Doubles, float]:
    """Counts without zeros and their width, with at most two bins a level.

    In finer bins the noise of counting passes for information, and clipping it away for a gain.
    """
    weights, width = _without_zeros(histogram), histogram.width
    span = max(histogram.hi, 0.0) - min(histogram.lo, 0.0)
    while span / width > 2 * LEVELS and len(weights) > 2:
        weights, width = weights.reshape(-1, 2).sum(axis=1), 2.0 * width
    return weights, width


def _best_range(histogram: Histogram, losses: Callable[[Doubles, Doubles], Doubles]) -> tuple[float, float]:
    """Try the shares of the whole range, both ends together and then each alone; the least loss wins.

    The whole range wins a tie.

    Args:
        histogram: of the values.
        losses: from the lower and the upper ends of several ranges to the loss of each.
    """
    lo, hi = min(histogram.lo, 0.0), max(histogram.hi, 0.0)
    fixed = np.ones_like(_SHARES)
    share = _least(losses(lo * _SHARES, hi * _SHARES))
    if not lo < 0.0 < hi:
        return lo * share, hi * share
    best_hi = _least(losses(lo * share * fixed, hi * _SHARES))
    best_lo = _least(losses(lo * _SHARES, hi * best_hi * fixed))
    return lo * best_lo, hi * best_hi


def _least(losses: Doubles) -> float:
    """The largest of the shares with the least loss."""
    return float(_SHARES[len(_SHARES) - 1 - int(np.argmin(losses[::-1]))])


def _without_zeros(histogram: Histogram) -> Doubles:
    weights = histogram.counts.astype(np.float64)
    weights[HALF] -= histogram.zeros
    return weights


def _nonzero(histogram: Histogram) -> tuple[Doubles, Doubles]:
    """Centers and counts of the bins that hold values other than zero."""
    weights = _without_zeros(histogram)
    held = weights > 0
    return histogram.centers()[held], weights[held]


def _divergences(weights: Doubles, beneath: Doubles, first: Indices, last: Indices, each: float) -> Doubles:
    """The divergence of each clipped range, of all at once: their bins stand one after the other.

    Args:
        weights: the counts of all bins.
        beneath: how much is below each edge of a bin.
        first: the first bin of each range.
        last: the one behind each range, which has more bins than there are levels.
        each: how many values a counted one stands for.
    """
    sizes = last - first
    starts = np.cumsum(sizes) - sizes
    inside = weights[np.arange(int(sizes.sum())) + np.repeat(first - starts, sizes)]
    clipped = inside.copy()
    clipped[starts] += beneath[first]
    clipped[starts + sizes - 1] += beneath[-1] - beneath[last]
    edges = first[:, None] + np.arange(LEVELS + 1) * sizes[:, None] // LEVELS
    mass, bins = np.diff(beneath[edges]), np.diff(_beneath(weights > 0)[edges])
    # What is left after quantization: each level's mass, even over its occupied bins.
    means = mass / np.maximum(bins, 1)
    spread = np.repeat(means.reshape(-1), np.diff(edges).reshape(-1)) * (inside > 0)
    # In how many ways the bins of each could differ within their levels.
    freedom = bins.sum(axis=1) - np.count_nonzero(bins, axis=1)
    # Counts that are even but for chance diverge by half a nat a degree of freedom (Miller, 1955).
    chance = 0.5 * freedom * each / max(float(beneath[-1]), each)
    found: Doubles = _kullback_leibler(clipped, spread, starts, sizes) - chance
    return found


def _kullback_leibler(reference: Doubles, quantized: Doubles, starts: Indices, sizes: Indices) -> Doubles:
    """The divergence of each distribution in nats; bins that quantization left empty count as a small share.

    Infinite where nothing is left.
    """
    parts = [slice(start, start + size) for start, size in zip(starts.tolist(), sizes.tolist(), strict=True)]
    left = np.array([quantized[part].sum() for part in parts])
    total = reference[parts[0]].sum()  # clipping moves counts, so all have the same
    p = reference / max(float(total), 1.0)
    q = np.maximum(quantized / np.repeat(np.where(left == 0.0, 1.0, left), sizes), 1e-12)
    held = p > 0
    p, q = p[held], q[held]
    nats = np.log(p / q)
    ends = np.cumsum(np.add.reduceat(held, starts, dtype=np.int64)).tolist()
    sums = [np.dot(p[a:b], nats[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
    found: Doubles = np.where(left == 0.0, math.inf, sums)
    return found
