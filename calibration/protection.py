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
    max_kept: int | None = None,
) -> Protected:
    """Quantize, and keep the most harmful layers in float, as few as reach the score.

    The number is doubled until the score is reached and then bisected, so that of n layers about 2 log2(n)
    numbers are tried. Where more layers in float do not always score higher, fewer might have been enough.

    Args:
        model: the model that was calibrated, or its file.
        scales: from ``calibrate``.
        samples: a handful, for ``sensitivity``; read only where the whole INT8 model is not good enough.
        evaluate: the task's metric of a model, higher is better.
        at_least: the score to reach.
        options: as for ``choose``; ``exclude`` names layers that are in float anyway (``Choice.spared``).
        exact: where ``model`` has rounded weights or corrected biases (``Choice.model``), the graph without
            them (``Choice.exact``): what is kept in float computes as there.
        max_kept: how many layers may stay in float at most; None: as many as it takes, all but one.

    Returns:
        A graph that reaches the score, else the best that was seen.

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
    most = len(order) - 1 if max_kept is None else min(max_kept, len(order) - 1)
    too_few = 0
    while too_few < most:
        found = attempt(tuple(order[: min(2 * too_few or 1, most)]))
        if found.met:
            return _fewest(lambda count: attempt(tuple(order[:count])), too_few, found)
        best = max(best, found, key=lambda candidate: candidate.score)
        too_few = len(found.kept)
    return best


def _fewest(attempt: Callable[[int], Protected], too_few: int, found: Protected) -> Protected:
    """Bisect between a number of layers that is too small and a graph that reaches the score."""
    while len(found.kept) - too_few > 1:
        middle = (too_few + len(found.kept)) // 2
        tried = attempt(middle)
        if tried.met:
            found = tried
        else:
            too_few = middle
    return found
