"""Choosing the observer by its result."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import build
from hard_graphs import make_uneven_cnn
from onnx import ModelProto, TensorProto, helper

from calibration import METHODS, CalibrationError, Options, calibrate, calibrate_each, choose
from calibration.observers import OBSERVERS

ONLY_OBSERVERS = Options(methods=())
GRAPH_METHODS = ("equalization", "smoothing")


def test_one_pass_gives_what_single_passes_give(residual_cnn: ModelProto, images: np.ndarray) -> None:
    """Several observers on one pass find the ranges that each finds alone."""
    together = calibrate_each(residual_cnn, [{"image": images}], OBSERVERS)
    for name, scales in together.items():
        assert scales == calibrate(residual_cnn, [{"image": images}], observer=name)


def test_the_best_score_wins(residual_cnn: ModelProto, images: np.ndarray) -> None:
    """Without a metric, the observer with the best output SQNR on the held-out rows is taken."""
    chosen = choose(residual_cnn, [{"image": images[:16]}], [{"image": images[16:]}], ONLY_OBSERVERS)
    assert chosen.metric == "sqnr_db"
    assert set(chosen.scores) == set(OBSERVERS)
    assert chosen.scores[chosen.observer] == chosen.score == max(chosen.scores.values())
    assert chosen.scales.observer == chosen.observer
    assert (chosen.methods, chosen.model is chosen.exact) == ((), True)


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
    held_out = [{"x": rng.normal(0, 1, (32, 64)).astype(np.float32)}]
    chosen = choose(model, [{"x": seen}], held_out, ONLY_OBSERVERS)
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


def test_methods_are_kept_where_they_help() -> None:
    """On a net with uneven channels auto keeps a method that brings many decibels, and says how many."""
    rng = np.random.default_rng(4)
    images = rng.normal(0, 1, (40, 3, 8, 8)).astype(np.float32)
    chosen = choose(make_uneven_cnn(), [{"image": images[:24]}], [{"image": images[24:]}], Options(threads=1))
    gains = {attempt.name: attempt.gain for attempt in chosen.attempts if attempt.kept}
    assert "equalization" in chosen.methods
    assert (gains["equalization"] or 0.0) > 10
    assert chosen.score == max(chosen.scores.values())


def test_methods_that_bring_nothing_are_left_out() -> None:
    """On an easy net the graph is the float graph, and every attempt is listed with what it brought."""
    rng = np.random.default_rng(0)
    model = build(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        {"x": (TensorProto.FLOAT, ["n", 64])},
        {"y": ["n", 8]},
        {"w": rng.uniform(-1, 1, (64, 8)).astype(np.float32)},
    )
    x = rng.uniform(-1, 1, (96, 64)).astype(np.float32)
    chosen = choose(model, [{"x": x[:64]}], [{"x": x[64:]}], Options(methods=GRAPH_METHODS, threads=1))
    assert chosen.methods == ()
    assert [attempt.name for attempt in chosen.attempts] == [*OBSERVERS, *GRAPH_METHODS]
    assert all(attempt.score is not None or attempt.why for attempt in chosen.attempts)


def test_no_time_no_methods(residual_cnn: ModelProto, images: np.ndarray) -> None:
    """With a budget that is used up the observers decide, and the methods say why they were not tried."""
    options = Options(budget_s=0.0, threads=1)
    chosen = choose(residual_cnn, [{"image": images[:16]}], [{"image": images[16:]}], options)
    assert chosen.methods == ()
    assert {attempt.why for attempt in chosen.attempts if attempt.name in METHODS} == {
        "the time budget was used up"
    }


def test_the_same_arguments_give_the_same_graph() -> None:
    """Without a time budget, choosing twice gives the same bytes."""
    images = np.random.default_rng(4).normal(0, 1, (24, 3, 8, 8)).astype(np.float32)
    model = make_uneven_cnn(channels=8)
    first, second = (
        choose(model, [{"image": images[:16]}], [{"image": images[16:]}], Options(threads=1)).quantized.model
        for _ in range(2)
    )
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)


def test_a_generator_and_an_unknown_method_are_refused(residual_cnn: ModelProto, images: np.ndarray) -> None:
    """Methods need samples that can be read again, and names that exist."""
    held_out = [{"image": images}]
    with pytest.raises(CalibrationError, match="only once"):
        choose(residual_cnn, ({"image": images} for _ in range(1)), held_out)
    with pytest.raises(CalibrationError, match="no method 'magic'"):
        choose(residual_cnn, held_out, held_out, Options(methods=("magic",)))
