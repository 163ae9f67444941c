"""Labels of channels: which indices of which axes stand or fall together.

Every index of every axis of a parameter gets a label. What a model computes ties labels (a sum ties the
channels of its two sides) and pins them (the classes of the head must stay). Labels that are tied, directly
or through others, form a slot: it is kept whole or removed whole.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.int64]

#: The label of an index that belongs to no parameter.
FOREIGN = 0


class Labels:
    """A union-find over labels, on arrays; a pin carries its reason."""

    def __init__(self) -> None:
        self._count = 1
        self._parent = np.arange(1024, dtype=np.int64)
        self._pin = np.zeros(1024, np.int32)
        self._reasons = ["no reason"]
        self.pin(np.zeros(1, np.int64), "it is no channel of a layer")

    def __len__(self) -> int:
        return self._count

    def fresh(self, count: int) -> Array:
        """New labels, untied."""
        labels = np.arange(self._count, self._count + count, dtype=np.int64)
        self._count += count
        room = len(self._parent)
        if self._count > room:
            more = max(room, self._count - room)
            self._parent = np.concatenate([self._parent, np.arange(room, room + more, dtype=np.int64)])
            self._pin = np.concatenate([self._pin, np.zeros(more, np.int32)])
        return labels

    def roots(self, labels: Array) -> Array:
        """The label that stands for each label's slot."""
        found = self._parent[labels]
        while True:
            above = self._parent[found]
            if np.array_equal(above, found):
                self._parent[labels] = found
                return found
            found = above

    def tie(self, first: Array, second: Array) -> None:
        """Tie labels pairwise (the arrays broadcast); what is tied to a foreign index is pinned."""
        first, second = (side.ravel() for side in np.broadcast_arrays(first, second))
        foreign = (first == FOREIGN) | (second == FOREIGN)
        if foreign.any():
            lonely = np.concatenate([first[foreign], second[foreign]])
            self.pin(lonely[lonely != FOREIGN], "it meets values that no layer makes")
            first, second = first[~foreign], second[~foreign]
        while True:
            a, b = self.roots(first), self.roots(second)
            differ = a != b
            if not differ.any():
                return
            low, high = np.minimum(a, b)[differ], np.maximum(a, b)[differ]
            np.minimum.at(self._parent, high, low)  # parents only get smaller: no cycles

    def pin(self, labels: Array, why: str) -> None:
        """These must stay; the first reason given for a label is kept."""
        if why not in self._reasons:
            self._reasons.append(why)
        labels = labels.ravel()
        free = labels[self._pin[labels] == 0]
        self._pin[free] = self._reasons.index(why)

    def pinned(self) -> tuple[npt.NDArray[np.int32], list[str]]:
        """For each label the number of the reason why its slot must stay (0: it may go), and the reasons."""
        roots = self.roots(np.arange(self._count, dtype=np.int64))
        held = np.flatnonzero(self._pin)
        none = np.iinfo(np.int32).max
        by_root = np.full(self._count, none, np.int32)
        np.minimum.at(by_root, roots[held], self._pin[held])
        by_root[by_root == none] = 0
        return by_root[roots], list(self._reasons)


def constant_along(values: npt.NDArray[Any], axis: int) -> bool:
    """Whether all slices along an axis are the same."""
    return bool((values == np.take(values, [0], axis=axis)).all())
