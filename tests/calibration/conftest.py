"""Fixtures of the calibration tests; the graphs are built in ``graphs``."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from onnx import ModelProto

# The tests are not a package.
sys.path.insert(0, str(Path(__file__).parent))

from graphs import make_attention, make_residual_cnn


@pytest.fixture(scope="session")
def residual_cnn() -> ModelProto:
    """A small residual CNN with BatchNormalization."""
    return make_residual_cnn()


@pytest.fixture(scope="session")
def attention() -> ModelProto:
    """A small attention layer that takes token numbers and a mask."""
    return make_attention()


@pytest.fixture(scope="session")
def images() -> npt.NDArray[np.float32]:
    """Twenty-four images for ``residual_cnn``."""
    return np.random.default_rng(2).normal(0, 1, (24, 3, 8, 8)).astype(np.float32)


@pytest.fixture(scope="session")
def tokens() -> dict[str, npt.NDArray[np.int64]]:
    """Six rows of tokens for ``attention``, padded to twelve; the padding is a token of its own."""
    rng = np.random.default_rng(3)
    ids = rng.integers(1, 50, (6, 12))
    mask = (np.arange(12)[None, :] < np.array([[12], [3], [7], [5], [9], [1]])).astype(np.int64)
    return {"input_ids": np.where(mask == 1, ids, 0), "attention_mask": mask}
