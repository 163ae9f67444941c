"""The little SVG that the report draws with: elements and axes, coloured by the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape


def element(tag: str, content: str = "", **attributes: object) -> Markup:
    """An element; ``class_`` is ``class``, other underscores are hyphens, everything is escaped."""
    named = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(_plain(value))}"'
        for name, value in attributes.items()
    )
    return Markup(f"<{tag}{named}>{escape(content)}</{tag}>")  # noqa: S704  # escaped just here


def _plain(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def join(parts: Sequence[Markup]) -> Markup:
    """Elements one after the other."""
    return Markup("").join(parts)


@dataclass(frozen=True)
class Axis:
    """A linear scale from values to pixels.

    Attributes:
        low, high: values at the two ends.
        start, end: pixels there.
        step: between two ticks.
    """

    low: float
    high: float
    start: float
    end: float
    step: float

    def __call__(self, value: float) -> float:
        """Pixels of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        """Round values within the axis."""
        first = math.ceil(self.low / self.step - 1e-9)
        last = math.floor(self.high / self.step + 1e-9)
        return [number * self.step for number in range(first, last + 1)]

    def text(self, value: float) -> str:
        """A tick's label, with the decimals that tell it from its neighbours."""
        return f"{value:.{max(0, -math.floor(math.log10(self.step) + 1e-9))}f}"


def axis_over(values: Sequence[float], start: float, end: float, ticks: int = 5) -> Axis:
    """An axis that holds all values with some room at both ends, with about so many ticks."""
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 0.5
    low, high = low - room, high + room
    step = _nice((high - low) / ticks)
    return Axis(low, high, start, end, step)


def _nice(value: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power = float(10.0 ** math.floor(math.log10(value)))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value * 0.999)
