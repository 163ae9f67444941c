"""Choosing the observer by what it does to the model, not by habit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from onnx import ModelProto

from calibration.graph import Array
from calibration.observers import DEFAULT_PERCENTILE, OBSERVERS
from calibration.prepare import prepare
from calibration.quantizer import Quantized, quantize
from calibration.runner import calibrate_each
from calibration.scales import Scales
from calibration.sensitivity import Reference


@dataclass(frozen=True)
class Choice:
    """The observer that did best, and how the others did.

    Attributes:
        observer: its name.
        scales: its scales.
        quantized: the INT8 graph made from them.
        scores: what each observer reached, by name; higher is better.
        metric: what the scores are: ``task``, or ``sqnr_db`` of the outputs.
    """

    observer: str
    scales: Scales
    quantized: Quantized
    scores: Mapping[str, float]
    metric: str


def choose(
    model: ModelProto,
    samples: Iterable[Mapping[str, Array]],
    holdout: Sequence[Mapping[str, Array]],
    *,
    evaluate: Callable[[ModelProto], float] | None = None,
    observers: Sequence[str] = OBSERVERS,
    target: str = "onnxruntime",
    exclude: Collection[str] = (),
    weight_bits: int = 8,
    percentile: float = DEFAULT_PERCENTILE,
    threads: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Choice:
    """Calibrate once, quantize with each observer, and keep the one that scores best.

    One pass over the samples serves every observer. Among equals the first of ``observers`` wins; the
    default order is the cheapest first.

    Args:
        model: a float model.
        samples: what the ranges are taken from.
        holdout: what the candidates are judged on; best other rows than ``samples``. Not used, and may be
            empty, with ``evaluate``.
        evaluate: the task's metric of an INT8 model, higher is better; without it the candidates are
            judged by the signal to quantization noise of their outputs, which needs no labels.
        observers: the candidates.
        target: the runtime, as for ``quantize``.
        exclude: names of linear operators to keep in float.
        weight_bits: 8 or 7, as for ``quantize``.
        percentile: for the percentile observer.
        threads: for ONNX Runtime; 0 leaves the choice to it.
        progress: called after each sample with the number of rows done.

    Raises:
        CalibrationError: as ``calibrate`` and ``quantize``, and where ``holdout`` is empty and needed.
    """
    prepared = prepare(model)
    metric = "sqnr_db" if evaluate is None else "task"
    if evaluate is None:
        evaluate = Reference(prepared, holdout, threads).sqnr_db
    found = calibrate_each(
        prepared, samples, observers, percentile=percentile, threads=threads, progress=progress
    )
    scores: dict[str, float] = {}
    candidates: dict[str, Quantized] = {}
    for name, scales in found.items():
        candidates[name] = quantize(prepared, scales, target, exclude=exclude, weight_bits=weight_bits)
        scores[name] = float(evaluate(candidates[name].model))
    best = max(scores, key=lambda name: scores[name])
    return Choice(best, found[best], candidates[best], scores, metric)
