"""Observers: from what was seen of a tensor to the range that is quantized.

An observer's range depends on the tensor's values alone, not on how they were cut into batches or in
which order these came, because what is collected of them does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from calibration.errors import CalibrationError
from calibration.histogram import Extremes, Histogram
from calibration.ranges import entropy_range, mse_range, percentile_range

DEFAULT_PERCENTILE = 99.99
OBSERVERS = ("minmax", "percentile", "mse", "entropy")

Collected = Extremes | Histogram
Range = tuple[float, float]


@dataclass(frozen=True)
class Observer:
    """A way to choose ranges.

    Attributes:
        name: as the user gives it.
        settings: numbers that change the result.
        choose: from a histogram to the range; None: all that was seen.
    """

    name: str
    settings: Mapping[str, float]
    choose: Callable[[Histogram], Range] | None

    @property
    def needs_values(self) -> bool:
        """Whether it chooses from a histogram, or smallest and largest are enough."""
        return self.choose is not None

    def range(self, collected: Collected) -> Range:
        """The range to quantize.

        A tensor of one value, and one without a histogram, keeps all that was seen.
        """
        whole = (collected.lo, collected.hi)
        if self.choose is None or not isinstance(collected, Histogram) or collected.lo == collected.hi:
            return whole
        return self.choose(collected)


def observer_named(name: str, *, percentile: float = DEFAULT_PERCENTILE) -> Observer:
    """Look an observer up.

    Raises:
        CalibrationError: an unknown name, or a percentile outside (50, 100].
    """
    if name == "percentile":
        return Observer(name, {"percentile": float(percentile)}, _percentile(percentile))
    methods: Mapping[str, Callable[[Histogram], Range] | None] = {
        "minmax": None,
        "mse": mse_range,
        "entropy": entropy_range,
    }
    if name in methods:
        return Observer(name, {}, methods[name])
    raise CalibrationError(
        f"there is no observer {name!r}",
        "observers choose the range of each tensor from its values",
        "choose one of: " + ", ".join(OBSERVERS),
    )


def _percentile(percentile: float) -> Callable[[Histogram], Range]:
    if 50.0 < percentile <= 100.0:
        return partial(percentile_range, percentile=percentile)
    raise CalibrationError(
        f"percentile {percentile} makes no range",
        "it is the share of values to keep on each side, above 50 and at most 100",
        f"leave it at {DEFAULT_PERCENTILE}",
    )
