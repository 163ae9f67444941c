"""A running mean and how far values lie from it."""

from __future__ import annotations


class Smoothed:
    """Mean and mean absolute deviation with fading weights, as TCP smooths round-trip times (RFC 6298).

    The first values count equally, so that the start is not a guess that has to fade.

    Attributes:
        mean: of the values; what was given at the start until there is one.
        deviation: the mean distance from the mean.
        count: how many values there were.
    """

    __slots__ = ("_least_weight", "count", "deviation", "mean")

    def __init__(self, mean: float = 0.0, memory: int = 16) -> None:
        """Begin at ``mean``; later the last ``memory`` values make up about two thirds."""
        self.mean = mean
        self.deviation = 0.0
        self.count = 0
        self._least_weight = 1.0 / memory

    def add(self, value: float) -> None:
        """Take in a value."""
        self.count += 1
        weight = max(self._least_weight, 1.0 / self.count)
        if self.count > 1:
            self.deviation += weight * (abs(value - self.mean) - self.deviation)
        self.mean += weight * (value - self.mean)
