"""What is known of a tensor's axes, and how a reshape changes it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from edgekit.pruning.labels import FOREIGN, Array, Labels, constant_along

#: Merged axes longer than this are not followed: their channels are pinned.
_LONGEST = 20_000_000


@dataclass(frozen=True)
class Place:
    """One of the axes into which a reshape splits an axis of channels (heads and head width, for one)."""

    site: tuple[int, int]
    axis: int
    size: int


@dataclass(frozen=True, eq=False)
class Axis:
    """An axis of a tensor.

    Attributes:
        labels: of its indices, int64 [size]; None: nothing on it can be pruned.
        places: the splits that it comes from.
    """

    labels: Array | None = None
    places: frozenset[Place] = frozenset()


PLAIN = Axis()
Axes = tuple[Axis, ...]


class Splits:
    """Which axis of each split carries the labels, learnt from what happens to the axes afterwards.

    An axis of ``size`` channels that is split in two can lose whole rows or whole columns, not both. The axis
    over which a product or a softmax runs (a head's width) and one from which single indices are picked
    (query, key, value) cannot carry them; one that a batched product runs along (the heads) should.
    """

    def __init__(self) -> None:
        self._choice: dict[tuple[int, int], int | None] = {}
        self._used: dict[tuple[int, int], tuple[Place, ...]] = {}
        self._good: set[Place] = set()
        self._bad: set[Place] = set()

    def begin(self) -> None:
        """Forget which splits were met, but not what was learnt."""
        self._used.clear()

    def choose(self, places: Sequence[Place]) -> int | None:
        """The axis that carries the labels of a split; None: none of them can."""
        site = places[0].site
        self._used[site] = tuple(places)
        if site not in self._choice:
            self._choice[site] = max(places, key=lambda place: place.size).axis
        return self._choice[site]

    def suits(self, axis: Axis) -> None:
        """The axis is the batch of a batched product."""
        self._good |= axis.places

    def spoils(self, axis: Axis) -> None:
        """The axis is summed over, picked from, or meets constants."""
        self._bad |= axis.places

    def settle(self) -> bool:
        """Choose again by what was learnt; whether nothing changed."""
        settled = True
        for site, places in self._used.items():
            fit = [place for place in places if place not in self._bad]
            best = max(fit, key=lambda place: (place in self._good, place.size), default=None)
            chosen = None if best is None else best.axis
            settled = settled and self._choice[site] == chosen
            self._choice[site] = chosen
        return settled


def reshape(
    labels: Labels, splits: Splits, call: int, axes: Axes, before: Sequence[int], after: Sequence[int]
) -> Axes:
    """The axes of a tensor of shape ``before`` when it is seen in the shape ``after``.

    Args:
        labels: of all channels.
        splits: decides which axis carries the labels where an axis is split.
        call: number of the call, the same in every run of the model.
        axes: of the tensor before.
        before: its shape.
        after: its new shape, of the same number of elements.
    """
    result = [PLAIN] * len(after)
    for number, (old, new) in enumerate(_blocks(before, after)):
        known = [axes[i] for i in old]
        if len(old) == len(new) == 1:
            result[new[0]] = known[0]
            continue
        merged = _merge(labels, known, [before[i] for i in old])
        for i, axis in zip(
            new, _split(labels, splits, (call, number), merged, [after[i] for i in new]), strict=True
        ):
            result[i] = axis
    return tuple(result)


def _blocks(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """The smallest runs of old and new axes with the same product; axes of size 1 are left out."""
    old = [i for i, size in enumerate(before) if size != 1]
    new = [i for i, size in enumerate(after) if size != 1]
    while old and new:
        left, right = [old.pop(0)], [new.pop(0)]
        while (a := math.prod(before[i] for i in left)) != (b := math.prod(after[i] for i in right)):
            if a < b:
                left.append(old.pop(0))
            else:
                right.append(new.pop(0))
        yield left, right


def _merge(labels: Labels, axes: Sequence[Axis], sizes: Sequence[int]) -> Axis:
    """One axis of several; where more than one has channels to prune, the longest keeps them."""
    origins = [axis.places for axis in axes if axis.places]
    places = origins[0] if len(origins) == 1 else frozenset()
    carriers = [i for i, axis in enumerate(axes) if axis.labels is not None]
    if not carriers:
        return Axis(None, places)
    carrier = max(carriers, key=lambda i: sizes[i])
    for i in carriers:
        if i != carrier:
            labels.pin(_known(axes[i]), "its axis is merged with another axis of channels")
    if math.prod(sizes) > _LONGEST:
        labels.pin(_known(axes[carrier]), "its axis is merged into one that is too long to follow")
        return Axis(None, places)
    shape = [size if i == carrier else 1 for i, size in enumerate(sizes)]
    flat = np.broadcast_to(_known(axes[carrier]).reshape(shape), sizes).ravel()
    return Axis(flat, places)


def _split(
    labels: Labels, splits: Splits, site: tuple[int, int], merged: Axis, sizes: Sequence[int]
) -> list[Axis]:
    if len(sizes) == 1:
        return [merged]
    if merged.labels is None:
        return [PLAIN] * len(sizes)
    values = labels.roots(merged.labels).reshape(sizes)
    varying = [i for i in range(len(sizes)) if not constant_along(values, i)]
    if not varying:
        labels.pin(values, "it is a single channel")
        return [PLAIN] * len(sizes)
    if len(varying) == 1:
        carrier = varying[0]
        row = np.moveaxis(values, carrier, -1).reshape(-1, sizes[carrier])[0]
        return [Axis(row, merged.places) if i == carrier else PLAIN for i in range(len(sizes))]
    places = [Place(site, i, sizes[i]) for i in varying]
    chosen = splits.choose(places)
    axes = [Axis(None, frozenset(place for place in places if place.axis == i)) for i in range(len(sizes))]
    if chosen is None or chosen not in varying:
        labels.pin(values[values != FOREIGN], "its axis is split into axes that the code counts on")
        return axes
    rows = np.moveaxis(values, chosen, -1).reshape(-1, sizes[chosen])
    labels.tie(rows, rows[:1])
    axes[chosen] = Axis(rows[0].copy(), axes[chosen].places)
    return axes


def _known(axis: Axis) -> Array:
    if axis.labels is None:
        raise ValueError("the axis has no labels")
    return axis.labels
