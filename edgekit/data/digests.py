"""Identities and orders of data sets."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

from edgekit import preprocess as preprocessing
from edgekit.preprocess import Preprocess


def source_digest(content: Any, preprocess: Preprocess | None, seed: int | None) -> str:
    """SHA-256 over the content's own digests, the preprocessing and the order's seed."""
    parts = [content, preprocessing.digest(preprocess), seed]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def order(count: int, seed: int) -> list[int]:
    """A permutation of ``range(count)`` that the seed decides."""
    return [int(index) for index in np.random.default_rng(seed).permutation(count)]
