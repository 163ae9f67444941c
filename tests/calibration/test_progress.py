"""The progress bar of calibration."""

from __future__ import annotations

import io

import numpy as np
from onnx import ModelProto

from calibration import ProgressBar, calibrate


def test_the_bar_tells_the_time_that_is_left() -> None:
    """Two rows a second and six to go are three seconds; a resumed run counts from where it began."""
    now = [0.0]
    stream = io.StringIO()
    bar = ProgressBar(20, stream, clock=lambda: now[0])
    bar(10)
    now[0] = 2.0
    bar(14)
    drawn = stream.getvalue().split("\r")
    assert "10/20 rows, -:-- left" in drawn[1]
    assert "14/20 rows, 0:03 left" in drawn[2]
    assert "\n" not in stream.getvalue()


def test_the_bar_ends_with_the_calibration(residual_cnn: ModelProto, images: np.ndarray) -> None:
    """After the last row the bar is full and its line is ended."""
    stream = io.StringIO()
    calibrate(residual_cnn, [{"image": images}], progress=ProgressBar(24, stream))
    last = stream.getvalue().rsplit("\r", 1)[1]
    assert last == f"calibrating [{'#' * 30}] 24/24 rows, 0:00 left \n"
