"""Keeping the worst layers in float until the model is good enough."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from graphs import run
from onnx import ModelProto

from calibration import Scales, calibrate, protect, sensitivity, sqnr_db

Evaluate = Callable[[ModelProto], float]


@pytest.fixture(scope="module")
def cnn_scales(residual_cnn: ModelProto, images: np.ndarray) -> Scales:
    return calibrate(residual_cnn, [{"image": images}])


@pytest.fixture(scope="module")
def evaluate(residual_cnn: ModelProto, images: np.ndarray) -> Evaluate:
    reference = run(residual_cnn, {"image": images})
    return lambda model: sqnr_db(reference, run(model, {"image": images}))


def test_a_good_model_is_left_alone(residual_cnn: ModelProto, cnn_scales: Scales, evaluate: Evaluate) -> None:
    """Where the whole INT8 model reaches the score nothing is kept, and no sample is read."""
    found = protect(residual_cnn, cnn_scales, [], evaluate, at_least=20.0)
    assert (found.kept, found.met) == ((), True)


def test_the_worst_layers_are_kept_first(
    residual_cnn: ModelProto, cnn_scales: Scales, images: np.ndarray, evaluate: Evaluate
) -> None:
    """A higher score is reached by keeping the most harmful layers, no more than it takes."""
    samples = [{"image": images}]
    whole = protect(residual_cnn, cnn_scales, samples, evaluate, at_least=0.0)
    found = protect(residual_cnn, cnn_scales, samples, evaluate, at_least=whole.score + 0.5)
    worst = [entry.node for entry in sensitivity(residual_cnn, cnn_scales, samples)]
    assert found.met
    assert found.kept == tuple(worst[: len(found.kept)])
    assert set(found.quantized.report.kept_float) == set(found.kept)


def test_an_impossible_score_gives_the_best(
    residual_cnn: ModelProto, cnn_scales: Scales, images: np.ndarray, evaluate: Evaluate
) -> None:
    """Where no choice reaches the score, the best one is returned and says that it is not met."""
    found = protect(residual_cnn, cnn_scales, [{"image": images}], evaluate, at_least=1000.0, max_kept=2)
    assert not found.met
    assert len(found.kept) <= 2
    assert found.score >= protect(residual_cnn, cnn_scales, [], evaluate, at_least=0.0).score
