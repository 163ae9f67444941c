"""The order of an epoch: one for all processes and workers, and the same at every run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

#: Samples that are mixed with each other. What is read together lies together in the shards.
WINDOW = 4096


def epoch_order(counts: Sequence[int], seed: int, epoch: int, window: int = WINDOW) -> np.ndarray[Any, Any]:
    """Every sample once, shards in a drawn order, samples mixed within windows.

    Args:
        counts: samples of each shard.
        seed: with ``epoch``, decides everything.
        epoch: from 0.
        window: samples that are mixed; those of one window lie in neighbouring shards of the drawn order.

    Returns:
        int64 of shape (sum of counts,): positions of the samples over all shards, as given.
    """
    rng = np.random.default_rng((seed, epoch))
    starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    drawn = rng.permutation(len(counts))
    order = np.concatenate([np.arange(starts[n], starts[n + 1]) for n in drawn])
    for begin in range(0, len(order), window):
        rng.shuffle(order[begin : begin + window])
    return order
