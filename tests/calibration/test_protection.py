"""Keeping the worst layers in float until the model is good enough."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from graphs import run
from onnx import ModelProto

from calibration import Options, Scales, calibrate, choose, protect, sensitivity, sqnr_db
from calibration.graph import Index, array
from calibration.methods.layers import restored

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


@pytest.mark.parametrize("wanted", [1, 2, 3, 4, 5])
def test_as_few_layers_as_it_takes(
    residual_cnn: ModelProto, cnn_scales: Scales, images: np.ndarray, wanted: int
) -> None:
    """Without a limit the smallest number is kept that reaches the score, up to all layers but one."""
    samples = [{"image": images}]
    layers = len(sensitivity(residual_cnn, cnn_scales, samples))
    asked: list[int] = []

    def in_float(model: ModelProto) -> float:
        asked.append(layers - _in_int8(model))
        return float(asked[-1])

    found = protect(residual_cnn, cnn_scales, samples, in_float, at_least=wanted)
    assert (found.met, len(found.kept)) == (wanted < layers, min(wanted, layers - 1))
    assert len(asked) <= 2 + 2 * math.log2(layers)
    assert len(asked) == len(set(asked))


def _in_int8(model: ModelProto) -> int:
    """How many of a graph's linear layers read what was dequantized."""
    makers = {name: node.op_type for node in model.graph.node for name in node.output}
    linear = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    return sum(makers.get(node.input[1]) == "DequantizeLinear" for node in linear)


def test_what_is_excluded_stays_in_float(
    residual_cnn: ModelProto, cnn_scales: Scales, images: np.ndarray
) -> None:
    """Layers that are in float anyway stay there, and are not counted among those that are kept."""
    found = protect(
        residual_cnn,
        cnn_scales,
        [{"image": images}],
        lambda _: 0.0,
        1.0,
        Options(exclude=("fc",)),
        max_kept=1,
    )
    assert "fc" in found.quantized.report.kept_float
    assert "fc" not in found.kept


def test_an_impossible_score_gives_the_best(
    residual_cnn: ModelProto, cnn_scales: Scales, images: np.ndarray, evaluate: Evaluate
) -> None:
    """Where no choice reaches the score, the best one is returned and says that it is not met."""
    found = protect(residual_cnn, cnn_scales, [{"image": images}], evaluate, at_least=1000.0, max_kept=2)
    assert not found.met
    assert len(found.kept) <= 2
    assert found.score >= protect(residual_cnn, cnn_scales, [], evaluate, at_least=0.0).score


def test_layers_in_float_compute_as_before_the_methods(residual_cnn: ModelProto, images: np.ndarray) -> None:
    """With ``exact``, a kept layer has its own weights and bias again, not those fitted to int8."""
    samples = [{"image": images[:16]}]
    options = Options(observers=("minmax",), methods=("rounding", "bias_correction"), threads=1)
    chosen = choose(residual_cnn, samples, [{"image": images[16:]}], options)
    assert "rounding" in chosen.methods
    found = protect(
        chosen.model, chosen.scales, samples, lambda _: 0.0, 1.0, options, exact=chosen.exact, max_kept=1
    )
    order = sensitivity(chosen.exact, chosen.scales, samples, threads=1)
    graph = restored(chosen.model, chosen.exact, [order[0].node])
    kept, others = _constants(graph), _constants(chosen.model)
    exact = _constants(chosen.exact)
    assert all(np.array_equal(a, b) for a, b in zip(kept[order[0].node], exact[order[0].node], strict=True))
    del kept[order[0].node]
    assert all(np.array_equal(a, b) for name in kept for a, b in zip(kept[name], others[name], strict=True))
    assert not found.met


def _constants(model: ModelProto) -> dict[str, list[np.ndarray]]:
    constants = Index(model).constants
    return {
        node.name: [array(constants[name]) for name in node.input[1:]]
        for node in model.graph.node
        if node.op_type in ("Conv", "Gemm")
    }
