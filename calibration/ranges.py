"""Choosing the range to quantize from a histogram: where to clip so that the whole loses least.

Each method sees the histogram alone, so its range is as independent of batches and order as that is.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from calibration.histogram import HALF, Histogram

Doubles = npt.NDArray[np.float64]

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

    return _best_range(histogram, error)


def entropy_range(histogram: Histogram) -> tuple[float, float]:
    """The range whose 256 levels keep the most of the distribution's information.

    Kullback-Leibler divergence between the clipped distribution and the same spread over the levels
    (Migacz, 2017, "8-bit Inference with TensorRT"). Exact zeros are left out: every range keeps them
    exact, and the peak that a ReLU makes of them would drown the rest.
    """
    weights, width = _coarse(histogram)
    half = len(weights) // 2
    beneath = np.concatenate(([0.0], np.cumsum(weights)))
    each = float(histogram.counts.sum()) / max(histogram.looked_at, 1)

    def divergence(lo: float, hi: float) -> float:
        first, last = half + math.floor(lo / width), half + math.ceil(hi / width)
        if last - first <= LEVELS:
            return math.inf
        inside = weights[first:last]
        clipped = inside.copy()
        clipped[0] += beneath[first]
        clipped[-1] += beneath[-1] - beneath[last]
        spread, freedom = _spread_over_levels(inside)
        # Counts that are even but for chance diverge by half a nat a degree of freedom (Miller, 1955).
        return _divergence(clipped, spread) - 0.5 * freedom * each / max(float(beneath[-1]), each)

    return _best_range(histogram, divergence)


def _coarse(histogram: Histogram) -> tuple[Doubles, float]:
    """Counts without zeros and their width, with at most two bins a level.

    In finer bins the noise of counting passes for information, and clipping it away for a gain.
    """
    weights, width = _without_zeros(histogram), histogram.width
    span = max(histogram.hi, 0.0) - min(histogram.lo, 0.0)
    while span / width > 2 * LEVELS and len(weights) > 2:
        weights, width = weights.reshape(-1, 2).sum(axis=1), 2.0 * width
    return weights, width


def _best_range(histogram: Histogram, loss: Callable[[float, float], float]) -> tuple[float, float]:
    """Try the shares of the whole range, both ends together and then each alone; the least loss wins.

    The whole range wins a tie.
    """
    lo, hi = min(histogram.lo, 0.0), max(histogram.hi, 0.0)
    share = _least(lambda s: loss(lo * s, hi * s))
    best_hi = _least(lambda s: loss(lo * share, hi * s)) if lo < 0.0 < hi else share
    best_lo = _least(lambda s: loss(lo * s, hi * best_hi)) if lo < 0.0 < hi else share
    return lo * best_lo, hi * best_hi


def _least(loss: Callable[[float], float]) -> float:
    found = [(loss(float(share)), -float(share)) for share in _SHARES]
    return -min(found)[1]


def _without_zeros(histogram: Histogram) -> Doubles:
    weights = histogram.counts.astype(np.float64)
    weights[HALF] -= histogram.zeros
    return weights


def _nonzero(histogram: Histogram) -> tuple[Doubles, Doubles]:
    """Centers and counts of the bins that hold values other than zero."""
    weights = _without_zeros(histogram)
    held = weights > 0
    return histogram.centers()[held], weights[held]


def _spread_over_levels(inside: Doubles) -> tuple[Doubles, int]:
    """What is left of a distribution after quantization: each level's mass, even over its occupied bins.

    With it, in how many ways the bins could differ within their levels: occupied bins less occupied levels.
    """
    edges = np.arange(LEVELS + 1) * len(inside) // LEVELS
    held = inside > 0
    mass = np.add.reduceat(inside, edges[:-1])
    bins = np.add.reduceat(held, edges[:-1], dtype=np.int64)
    mean = mass / np.maximum(bins, 1)
    spread: Doubles = np.repeat(mean, edges[1:] - edges[:-1]) * held
    return spread, int(bins.sum()) - int(np.count_nonzero(bins))


def _divergence(reference: Doubles, quantized: Doubles) -> float:
    """Kullback-Leibler divergence in nats; bins that quantization left empty count as a small share."""
    total = quantized.sum()
    if total == 0.0:
        return math.inf
    p = reference / reference.sum()
    q = np.maximum(quantized / total, 1e-12)
    held = p > 0
    return float(np.dot(p[held], np.log(p[held] / q[held])))
