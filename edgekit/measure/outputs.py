"""All outputs of some sessions over a data set, for a metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from edgekit import ort
from edgekit.data import Dataset
from edgekit.measure.accuracy import Labels, Outputs
from edgekit.models import Model

_BATCH = 16


def collect(
    sessions: Mapping[str, ort.Chain], data: Dataset, model: Model, tick: Callable[[int, int], None]
) -> tuple[dict[str, Outputs], Labels]:
    """Run every session on every sample.

    Args:
        sessions: by role.
        data: the samples.
        model: whose inputs they are; where its batch is free, samples run in batches.
        tick: told how many samples are done, and of how many.

    Returns:
        Outputs by role and name, samples first, and the labels if there are any. Per-token outputs of
        different lengths are filled with zeros.
    """
    collected: dict[str, dict[str, list[np.ndarray[Any, Any]]]] = {role: {} for role in sessions}
    labels: list[np.ndarray[Any, Any]] = []
    size = _BATCH if model.inputs[0].shape[0] == -1 else 1
    done = 0
    for batch in data.batches(size):
        for role, session in sessions.items():
            for name, value in session.run(batch.inputs).items():
                collected[role].setdefault(name, []).append(value)
        if batch.labels is not None:
            labels.append(batch.labels)
        done += len(next(iter(batch.inputs.values())))
        tick(done, data.count or done)
    joined = {
        role: {name: _join(values) for name, values in by_name.items()} for role, by_name in collected.items()
    }
    return joined, np.concatenate(labels) if labels else None


def _join(values: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    longest = tuple(max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True))
    filled = [
        np.pad(
            value, [(0, 0), *((0, most - size) for most, size in zip(longest, value.shape[1:], strict=True))]
        )
        for value in values
    ]
    return np.concatenate(filled)
