"""Where to prune: the widths that lose least for the size and the latency that are asked.

Each group's loss against its width was measured alone (``edgekit.stages.sensitivity``) and losses are taken
to add up. Width is then given away greedily, where it costs the least loss for what it brings, until all
bounds hold; what was given away in vain is taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Widths = dict[str, int]
#: Widths -> for each bound what is used of it; at most 1 holds it.
Uses = Callable[[Mapping[str, int]], Sequence[float]]

_TINY = 1e-9


@dataclass(frozen=True)
class Curve:
    """What a group loses with its width.

    Attributes:
        width: whole.
        widths: that it may have, descending from ``width``.
        losses: for each of them; convex, from 0 upwards.
    """

    width: int
    widths: tuple[int, ...]
    losses: tuple[float, ...]


def curve(width: int, allowed: Sequence[int], points: Sequence[tuple[int, float]]) -> Curve:
    """A curve through measured points.

    A narrower group is never taken to lose less, and the curve is replaced by its lower convex envelope, so
    that the greedy choice sees what a long step would bring.

    Args:
        width: whole.
        allowed: widths to choose from.
        points: (width, loss) as measured.
    """
    known = sorted([(width, 0.0), *((w, max(0.0, loss)) for w, loss in points if w < width)], reverse=True)
    kept = [known[0][0], *(w for w, _ in known[1:])]
    losses = np.maximum.accumulate([loss for _, loss in known])
    hull: list[tuple[int, float]] = []
    for point in zip(kept, losses.tolist(), strict=True):
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    widths = tuple(sorted({width, *(w for w in allowed if w < width)}, reverse=True))
    xs, ys = zip(*reversed(hull), strict=True)
    below = _slope(hull[-2], hull[-1]) if len(hull) > 1 else 0.0
    found = [float(np.interp(w, xs, ys)) + (below * (xs[0] - w) if w < xs[0] else 0.0) for w in widths]
    return Curve(width, widths, tuple(found))


def allocate(curves: Mapping[str, Curve], uses: Uses) -> Widths:
    """The widths that lose least within the bounds; where no widths hold them, the narrowest.

    Args:
        curves: by group.
        uses: called some hundred times a group.
    """
    at = dict.fromkeys(curves, 0)
    now = _excess(uses(_widths(curves, at)))
    while now > 0:
        best, best_rate, best_excess = None, -1.0, now
        for name, found in curves.items():
            if at[name] + 1 == len(found.widths):
                continue
            excess = _excess(uses(_widths(curves, {**at, name: at[name] + 1})))
            lost = found.losses[at[name] + 1] - found.losses[at[name]]
            rate = max(now - excess, _TINY) / (lost + _TINY)
            if rate > best_rate:
                best, best_rate, best_excess = name, rate, excess
        if best is None:
            break
        at[best] += 1
        now = best_excess
    return _widths(curves, _taken_back(curves, at, uses) if now <= 0 else at)


def _taken_back(curves: Mapping[str, Curve], at: dict[str, int], uses: Uses) -> dict[str, int]:
    """Undo steps that the bounds can do without, the most harmful first."""
    while True:
        steps = sorted(
            (name for name in curves if at[name]),
            key=lambda name: curves[name].losses[at[name]] - curves[name].losses[at[name] - 1],
            reverse=True,
        )
        for name in steps:
            wider = {**at, name: at[name] - 1}
            if _excess(uses(_widths(curves, wider))) <= 0:
                at = wider
                break
        else:
            return at


def _widths(curves: Mapping[str, Curve], at: Mapping[str, int]) -> Widths:
    return {name: found.widths[at[name]] for name, found in curves.items()}


def _excess(used: Sequence[float]) -> float:
    """What is used beyond the bounds, all of them together: a step that helps with two is worth more."""
    return sum(max(0.0, share - 1) for share in used)


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    """Loss for each unit of width that goes, from a wider to a narrower point."""
    return (b[1] - a[1]) / (a[0] - b[0])
