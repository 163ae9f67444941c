"""Latency predicted from a profile's figures, for a device that cannot be reached.

An operator takes as long as its arithmetic or its traffic does, whichever is longer (Williams, Waterman and
Patterson, "Roofline", CACM 2009), at the shares of the peaks that kernels reach, plus the time to start it.
Those shares, and how far a prediction may be off, are estimates; ``benchmarks/roofline.py`` holds them
against measurements on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from edgekit.measure.work import Operator
from edgekit.profile import Profile

#: Shares of the peak rate that kernels reach: with long inner sums, and with short ones (depthwise
#: convolutions, first layers), where a vector register is hardly filled.
_LONG_SUMS_FRACTION = 0.7
_SHORT_SUMS_FRACTION = 0.12
_SHORT_SUM = 32
_BANDWIDTH_FRACTION = 0.5
#: To start one operator.
_START_MS = {"cpu": 0.004, "gpu": 0.005}
#: A measured latency is expected between these multiples of the predicted one. Of 13 graphs on a CPU nine in
#: ten were between 0.66 and 1.82 (``benchmarks/roofline.py``, docs/search.md); other devices are not known.
ERROR_FACTORS = (0.5, 2.0)


@dataclass(frozen=True)
class Prediction:
    """A latency that nobody measured.

    Attributes:
        value_ms: the prediction.
        low_ms, high_ms: where a measurement is expected.
        how: by what it was predicted.
    """

    value_ms: float
    low_ms: float
    high_ms: float
    how: str

    def as_json(self) -> dict[str, Any]:
        """The form that reports use."""
        return asdict(self)


def predict(operators: Iterable[Operator], profile: Profile) -> Prediction:
    """Predict the latency of a graph from what its operators have to do.

    Args:
        operators: from ``work.operators``, for the batch that is asked.
        profile: the device; a precision without a peak of its own runs at the fp32 peak.
    """
    value = sum(operator_ms(operator, profile) for operator in operators)
    low, high = ERROR_FACTORS
    return Prediction(value, low * value, high * value, f"roofline of {profile.name}")


def operator_ms(operator: Operator, profile: Profile) -> float:
    """Time of one operator in milliseconds."""
    peak = profile.peak.get(operator.precision) or profile.peak["fp32"]
    share = _SHORT_SUMS_FRACTION if operator.per_output < _SHORT_SUM else _LONG_SUMS_FRACTION
    compute_s = 2 * operator.macs / (peak.ops_per_second * share)
    traffic_s = operator.moved_bytes / (profile.memory.bandwidth_bytes_per_second * _BANDWIDTH_FRACTION)
    return 1e3 * max(compute_s, traffic_s) + _START_MS[profile.accelerator.kind]
