"""Choosing the observer by its result."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import build
from onnx import ModelProto, TensorProto, helper

from calibration import CalibrationError, calibrate, calibrate_each, choose
from calibration.observers import OBSERVERS


def test_one_pass_gives_what_single_passes_give(residual_cnn: ModelProto, images: np.ndarray) -> None:
    """Several observers on one pass find the ranges that each finds alone."""
    together = calibrate_each(residual_cnn, [{"image": images}], OBSERVERS)
    for name, scales in together.items():
        assert scales == calibrate(residual_cnn, [{"image": images}], observer=name)


def test_the_best_score_wins(residual_cnn: ModelProto, images: np.ndarray) -> None:
    """Without a metric, the observer with the best output SQNR on the held-out rows is taken."""
    chosen = choose(residual_cnn, [{"image": images[:16]}], [{"image": images[16:]}])
    assert chosen.metric == "sqnr_db"
    assert set(chosen.scores) == set(OBSERVERS)
    assert chosen.scores[chosen.observer] == max(chosen.scores.values())
    assert chosen.scales.observer == chosen.observer


def test_outliers_rule_min_max_out() -> None:
    """Where one sample has an outlier that the held-out rows lack, min-max loses."""
    rng = np.random.default_rng(0)
    model = build(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        {"x": (TensorProto.FLOAT, ["n", 64])},
        {"y": ["n", 8]},
        {"w": rng.normal(0, 1, (64, 8)).astype(np.float32)},
    )
    seen = rng.normal(0, 1, (512, 64)).astype(np.float32)
    seen[5, 5] = 500.0
    chosen = choose(model, [{"x": seen}], [{"x": rng.normal(0, 1, (32, 64)).astype(np.float32)}])
    assert chosen.observer != "minmax"
    assert chosen.scores[chosen.observer] > chosen.scores["minmax"] + 20


def test_the_task_decides_where_it_is_given(residual_cnn: ModelProto, images: np.ndarray) -> None:
    """With a metric of the task, that decides; among equals the first observer is kept."""
    chosen = choose(residual_cnn, [{"image": images}], [], evaluate=lambda model: 1.0)
    assert (chosen.metric, chosen.observer) == ("task", "minmax")


def test_holdout_is_needed_without_a_metric(residual_cnn: ModelProto, images: np.ndarray) -> None:
    """Neither a metric nor held-out rows: an error, not a guess."""
    with pytest.raises(CalibrationError, match="no samples to compare"):
        choose(residual_cnn, [{"image": images}], [])
