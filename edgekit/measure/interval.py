"""How sure a measured metric is, from the number of samples that it rests on.

Rates have closed forms that hold for few samples and at 0 and 1; everything else is resampled. A candidate
and the original saw the same samples, so their difference is judged pairwise: that is narrower by far than
two intervals side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
#: From the sums of each sample's statistics [..., statistics] to the metric [...].
Finish = Callable[[Array], Array]

CONFIDENCE = 0.95
_Z = 1.959964  # the normal quantile of (1 + CONFIDENCE) / 2
_RESAMPLES = 500
_SEED = 0


@dataclass(frozen=True)
class Interval:
    """Where the value would lie with unlimited samples of the same kind, at ``confidence``."""

    low: float
    high: float
    method: str
    confidence: float = CONFIDENCE

    def as_json(self) -> dict[str, Any]:
        """The form that reports use."""
        return asdict(self)


def rate(successes: int, samples: int) -> Interval:
    """Interval of a rate (Wilson, "Probable Inference", JASA 1927)."""
    share, z2 = successes / samples, _Z**2
    middle = (share + z2 / (2 * samples)) / (1 + z2 / samples)
    half = _Z * math.sqrt(share * (1 - share) / samples + z2 / (4 * samples**2)) / (1 + z2 / samples)
    return Interval(max(0.0, middle - half), min(1.0, middle + half), "wilson")


def rate_drop(lost: int, gained: int, samples: int) -> Interval:
    """Interval of the loss of a rate between two models that saw the same samples.

    Bonett and Price, "Adjusted Wald Confidence Interval for a Difference of Binomial Proportions Based on
    Paired Data", JEBS 2012. Two models that agree on every sample are still not known to be equal.

    Args:
        lost: samples that only the original got right.
        gained: samples that only the candidate got right.
        samples: all of them.
    """
    p_lost, p_gained = (lost + 1) / (samples + 2), (gained + 1) / (samples + 2)
    difference = p_lost - p_gained
    half = _Z * math.sqrt(max(0.0, p_lost + p_gained - difference**2) / (samples + 2))
    return Interval(difference - half, difference + half, "bonett-price")


def resampled(statistics: Array, finish: Finish) -> Interval:
    """Interval of a metric by the bootstrap (Efron, 1979), percentiles of 500 resamples.

    Args:
        statistics: [samples, statistics], the sums of which decide the metric.
        finish: makes the metric of the sums.
    """
    return _percentiles(finish(_weights(len(statistics)) @ statistics))


def resampled_drop(
    original: Array, finish_original: Finish, candidate: Array, finish_candidate: Finish
) -> Interval:
    """The same of the loss, both drawn from the same resamples."""
    weights = _weights(len(original))
    return _percentiles(finish_original(weights @ original) - finish_candidate(weights @ candidate))


def resampled_speedup(original_ms: Array, candidate_ms: Array) -> Interval:
    """Interval of median over median by the same means, where run i of both was in the same turn.

    Args:
        original_ms: [runs].
        candidate_ms: [runs].
    """
    turns = np.random.default_rng(_SEED).integers(len(original_ms), size=(_RESAMPLES, len(original_ms)))
    return _percentiles(np.median(original_ms[turns], axis=1) / np.median(candidate_ms[turns], axis=1))


def _weights(samples: int) -> Array:
    """[resamples, samples]: how often each sample is drawn; the same at every call."""
    return (
        np.random.default_rng(_SEED)
        .multinomial(samples, np.full(samples, 1 / samples), size=_RESAMPLES)
        .astype(np.float64)
    )


def _percentiles(values: Array) -> Interval:
    low, high = np.quantile(values, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return Interval(float(low), float(high), "bootstrap")
