"""Calibration over a crash."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto

from calibration import calibrate


def batches(images: np.ndarray, stop: int | None, taken: list[int]) -> Iterator[dict[str, np.ndarray]]:
    """Six batches of four images; dies after ``stop`` of them."""
    for i in range(6):
        if i == stop:
            raise KeyboardInterrupt
        taken.append(i)
        yield {"image": images[4 * i : 4 * i + 4]}


@pytest.mark.parametrize("observer", ["minmax", "mse"])
def test_a_resumed_run_ends_with_the_same_scales(
    observer: str, residual_cnn: ModelProto, images: np.ndarray, tmp_path: Path
) -> None:
    """Killed after four batches and started again, the run goes on from there to the same scales."""
    whole = calibrate(residual_cnn, batches(images, None, []), observer=observer)
    file = tmp_path / "state"
    told: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        calibrate(
            residual_cnn, batches(images, 4, []), observer=observer, checkpoint=file, checkpoint_every_s=0
        )
    assert file.exists()
    resumed = calibrate(
        residual_cnn, batches(images, None, []), observer=observer, checkpoint=file, progress=told.append
    )
    assert resumed == whole
    assert told == list(range(17, 25))
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_something_else_is_not_used(
    residual_cnn: ModelProto, images: np.ndarray, tmp_path: Path
) -> None:
    """A checkpoint of another observer's run, and a file that is none, are replaced, not believed."""
    file = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        calibrate(residual_cnn, batches(images, 2, []), checkpoint=file, checkpoint_every_s=0)
    fresh = calibrate(residual_cnn, batches(images, None, []), observer="mse")
    assert calibrate(residual_cnn, batches(images, None, []), observer="mse", checkpoint=file) == fresh
    file.write_bytes(b"not an archive")
    assert calibrate(residual_cnn, batches(images, None, []), observer="mse", checkpoint=file) == fresh
