"""The figures as text: a row for each figure, a column for each server."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

_LABEL_WIDTH = 40
_MIN_WIDTH = 8


def render(title: str, table: Mapping[str, Mapping[str, float | None]]) -> str:
    """Lay out one scenario; a hyphen where nothing was measured."""
    names = list(dict.fromkeys(name for row in table.values() for name in row))
    widths = [max(_MIN_WIDTH, len(name)) for name in names]
    lines = [f"{title:<{_LABEL_WIDTH}} " + _cells(names, widths)]
    for label, row in table.items():
        lines.append(f"{label:<{_LABEL_WIDTH}} " + _cells([shown(row.get(name)) for name in names], widths))
    return "\n".join(lines)


def shown(value: float | None) -> str:
    """Three digits are as many as such figures deserve; large ones are written out."""
    if value is None:
        return "-"
    if math.isinf(value):
        return "never"
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def _cells(texts: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(f"{text:>{width}}" for text, width in zip(texts, widths, strict=True))
