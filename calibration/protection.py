"""Keeping the layers that hurt most in float, until the model is good enough."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from onnx import ModelProto

from calibration.choice import Options
from calibration.graph import Array
from calibration.layer_sensitivity import sensitivity
from calibration.methods.layers import restored
from calibration.prepare import prepare
from calibration.quantizer import Quantized, quantize
from calibration.scales import Scales
from calibration.storage import Source

_DEFAULTS = Options()


@dataclass(frozen=True)
class Protected:
    """An INT8 graph with its worst layers in float.

    Attributes:
        quantized: the graph and its report.
        kept: the layers in float, the most harmful first.
        score: what ``evaluate`` gave for it.
        met: whether the score was reached.
    """

    quantized: Quantized
    kept: tuple[str, ...]
    score: float
    met: bool


def protect(
    model: Source,
    scales: Scales,
    samples: Iterable[Mapping[str, Array]],
    evaluate: Callable[[ModelProto], float],
    at_least: float,
    options: Options = _DEFAULTS,
    *,
    exact: ModelProto | None = None,
    max_kept: int = 8,
) -> Protected:
    """Quantize, and keep one more layer in float while the score is too low, the most harmful first.

    Args:
        model: the model that was calibrated, or its file.
        scales: from ``calibrate``.
        samples: a handful, for ``sensitivity``; read only where the whole INT8 model is not good enough.
        evaluate: the task's metric of a model, higher is better.
        at_least: the score to reach.
        options: as for ``choose``; ``exclude`` names layers that are in float anyway (``Choice.spared``).
        exact: where ``model`` has rounded weights or corrected biases (``Choice.model``), the graph without
            them (``Choice.exact``): what is kept in float computes as there.
        max_kept: how many layers may stay in float at most; at least one layer stays in int8.

    Returns:
        The first graph that reaches the score, else the best that was seen.

    Raises:
        CalibrationError: as ``quantize`` and ``sensitivity``.
    """
    prepared = prepare(model)
    original = prepared if exact is None else prepare(exact)

    def attempt(kept: tuple[str, ...]) -> Protected:
        graph = restored(prepared, original, kept)
        quantized = quantize(
            graph,
            scales,
            options.target,
            exclude=(*options.exclude, *kept),
            weight_bits=options.weight_bits,
        )
        score = float(evaluate(quantized.model))
        return Protected(quantized, kept, score, met=score >= at_least)

    best = attempt(())
    if best.met:
        return best
    harm = sensitivity(original, scales, samples, options.target, threads=options.threads)
    order = [entry.node for entry in harm if entry.node not in options.exclude]
    for count in range(1, min(max_kept, len(order) - 1) + 1):
        found = attempt(tuple(order[:count]))
        if found.met:
            return found
        best = max(best, found, key=lambda candidate: candidate.score)
    return best
