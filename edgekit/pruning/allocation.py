"""How many slots each group keeps for the model to reach a size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from edgekit.pruning.structure import Group, Scores, Structure

Widths = Mapping[str, int]


def kept_width(width: int, wanted: int, max_layer_ratio: float, unit: int) -> int:
    """The width that a layer of ``width`` keeps where ``wanted`` channels would stay.

    Either all of it, or a multiple of ``unit``, and never less than ``1 - max_layer_ratio`` of it.
    """
    least = math.ceil(width * (1 - max_layer_ratio) / unit) * unit
    return min(width, max(least, unit, wanted // unit * unit))


def keep(group: Group, wanted: int, max_layer_ratio: float, alignment: int) -> int:
    """The number of slots that a group keeps where ``wanted`` would stay: a width that the device likes."""
    return kept_width(group.width, wanted, max_layer_ratio, group.step(alignment))


def globally(
    structure: Structure, scores: Scores, size: float, *, max_layer_ratio: float, alignment: int
) -> tuple[Widths, float]:
    """Rank the slots of all groups together, and remove the lowest until the size is met.

    Args:
        structure: the groups.
        scores: of their slots.
        size: largest share of the parameters to keep.
        max_layer_ratio: no group loses more than this share of its slots.
        alignment: products stay multiples of so many channels wide.

    Returns:
        The widths of the largest model within the size, or of the smallest that is allowed where none is; and
        the share of all slots that were asked to go.
    """
    ranked = np.sort(np.concatenate([scores[group.name] for group in structure.prunable]))

    def widths(removed: int) -> Widths:
        threshold = ranked[removed - 1] if removed else -np.inf
        return {
            group.name: keep(group, int((scores[group.name] > threshold).sum()), max_layer_ratio, alignment)
            for group in structure.prunable
        }

    bound = size * structure.parameters({})
    removed = _first(len(ranked), lambda count: structure.parameters(widths(count)) <= bound)
    return _filled(structure, scores, widths(removed), bound, alignment), removed / len(ranked)


def _filled(structure: Structure, scores: Scores, widths: Widths, bound: float, alignment: int) -> Widths:
    """Give back what still fits, the most important first: one step of a wide group can be a large one."""
    filled = dict(widths)
    steps = []
    for group in structure.prunable:
        ordered = np.sort(scores[group.name])[::-1]
        for kept in range(filled[group.name], group.width, group.step(alignment)):
            wider = min(group.width, kept + group.step(alignment))
            steps.append((float(ordered[kept:wider].mean()), group.name, kept, wider))
    for _, name, kept, wider in sorted(steps, reverse=True):
        if filled[name] == kept and structure.parameters({**filled, name: wider}) <= bound:
            filled[name] = wider
    return filled


def uniformly(structure: Structure, size: float, *, max_layer_ratio: float, alignment: int) -> Widths:
    """Every group keeps the same share of its slots: what a good allocation is measured against."""
    steps = 1000

    def widths(removed: int) -> Widths:
        share = 1 - removed / steps
        return {
            group.name: keep(group, round(share * group.width), max_layer_ratio, alignment)
            for group in structure.prunable
        }

    bound = size * structure.parameters({})
    return widths(_first(steps, lambda count: structure.parameters(widths(count)) <= bound))


def _first(most: int, holds: Callable[[int], bool]) -> int:
    """The smallest number up to ``most`` for which a monotonic condition holds, else ``most``."""
    low, high = -1, most
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle
    return high
