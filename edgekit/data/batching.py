"""Samples to batches: stacked, and padded where they are texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from edgekit.tensors import Arrays

_MASK = "attention_mask"
_TOKENS = "input_ids"

_Labelled = tuple[Arrays, Any]


def batched(
    samples: Iterable[_Labelled], size: int, pad_id: int
) -> Iterator[tuple[Arrays, np.ndarray[Any, Any] | None]]:
    """Group consecutive samples to batches of at most ``size``.

    Samples with an attention mask are padded to the longest of their batch; of all others only those of
    equal shapes share a batch.

    Args:
        samples: (inputs without batch axis, label or None).
        size: the largest batch, at least 1.
        pad_id: what ``input_ids`` are padded with; everything else is padded with 0.
    """
    if size < 1:
        raise ValueError(f"a batch of {size} samples")
    group: list[_Labelled] = []
    for sample in samples:
        if group and (len(group) == size or not _stackable(group[0][0], sample[0])):
            yield _stack(group, pad_id)
            group = []
        group.append(sample)
    if group:
        yield _stack(group, pad_id)


def _stackable(first: Arrays, other: Arrays) -> bool:
    if _MASK in first:
        return True
    return all(array.shape == other[name].shape for name, array in first.items())


def _stack(group: list[_Labelled], pad_id: int) -> tuple[Arrays, np.ndarray[Any, Any] | None]:
    inputs = {
        name: _padded([sample[name] for sample, _ in group], pad_id if name == _TOKENS else 0)
        for name in group[0][0]
    }
    labels = [label for _, label in group]
    return inputs, None if labels[0] is None else np.asarray(labels)


def _padded(arrays: list[np.ndarray[Any, Any]], fill: int) -> np.ndarray[Any, Any]:
    """Stack arrays along a new first axis, filled up at their ends to the largest of them."""
    shape = tuple(max(sizes) for sizes in zip(*(array.shape for array in arrays), strict=True))
    stacked = np.full((len(arrays), *shape), fill, arrays[0].dtype)
    for row, array in zip(stacked, arrays, strict=True):
        row[tuple(slice(0, size) for size in array.shape)] = array
    return stacked
