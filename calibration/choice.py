"""Choosing observer and methods by what they do to the model, not by habit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from onnx import ModelProto

from calibration.errors import CalibrationError
from calibration.graph import Array
from calibration.layer_sensitivity import Reference
from calibration.methods.bias_correction import correct_biases
from calibration.methods.equalization import equalize
from calibration.methods.rounding import Quantization, round_weights
from calibration.methods.rows import Row, first_rows
from calibration.methods.smoothing import smooth
from calibration.methods.sparing import spare
from calibration.observers import DEFAULT_PERCENTILE, OBSERVERS
from calibration.placement import place
from calibration.prepare import prepare
from calibration.quantizer import WEIGHT_LEVELS, Quantized, quantize
from calibration.runner import calibrate_each
from calibration.scales import Scales
from calibration.storage import Source
from calibration.targets import target_named

#: In the order in which they are tried: those that change the ranges come before those that rest on them.
METHODS = ("equalization", "smoothing", "sparing", "rounding", "bias_correction")
#: These come first and need new scales; they leave the float function as it is.
_CHANGE_RANGES = frozenset({"equalization", "smoothing"})
#: A method has to bring this much of the outputs' SQNR to be kept; less is within the noise of held-out rows.
MIN_GAIN_DB = 0.1
#: Layers in float cost time, so that they have to bring more.
_MIN_SPARING_GAIN_DB = 0.5


@dataclass(frozen=True)
class Options:
    """What ``choose`` may try.

    Attributes:
        observers: the candidates, cheapest first.
        methods: those of ``METHODS`` to try, whatever their order here; none: observers only.
        percentile: for the percentile observer.
        target: the runtime, as for ``quantize``.
        exclude: names of linear operators to keep in float.
        weight_bits: 8 or 7, as for ``quantize``.
        method_rows: how many rows the methods look at; they are held in memory.
        budget_s: no method begins after this many seconds; None: all are tried. With a budget the result
            depends on the machine's speed; without one it does not.
        threads: for ONNX Runtime; 0 leaves the choice to it.
    """

    observers: Sequence[str] = OBSERVERS
    methods: Sequence[str] = METHODS
    percentile: float = DEFAULT_PERCENTILE
    target: str = "onnxruntime"
    exclude: Sequence[str] = ()
    weight_bits: int = 8
    method_rows: int = 32
    budget_s: float | None = None
    threads: int = 0


@dataclass(frozen=True)
class Attempt:
    """What was tried, and what it brought.

    Attributes:
        name: of the observer or the method.
        score: of the INT8 graph; None where there was nothing to judge.
        gain: against the best before it; None for the first, and where one of the two is not finite.
        kept: whether the result rests on it.
        why: the reason that there is no score.
    """

    name: str
    score: float | None
    gain: float | None
    kept: bool
    why: str | None = None


@dataclass(frozen=True)
class Choice:
    """The INT8 graph that did best, what it was made from, and how everything else did.

    Attributes:
        observer: the observer of ``scales``.
        methods: the methods that were kept, in the order in which they were applied.
        model: the prepared graph that ``scales`` and ``quantized`` belong to, with all methods applied.
        exact: the same without those methods that change the float function: what a layer that stays in
            float has to compute. The same object as ``model`` where there is none.
        scales: its scales.
        quantized: the INT8 graph made from them.
        score: of ``quantized``; higher is better.
        metric: what scores are: ``task``, or ``sqnr_db`` of the outputs.
        attempts: all that was tried, in order.
        spared: layers that were left in float because they hurt much and compute little.
    """

    observer: str
    methods: tuple[str, ...]
    model: ModelProto
    exact: ModelProto
    scales: Scales
    quantized: Quantized
    score: float
    metric: str
    attempts: tuple[Attempt, ...]
    spared: tuple[str, ...] = ()

    @property
    def scores(self) -> dict[str, float]:
        """What each attempt reached, by name."""
        return {attempt.name: attempt.score for attempt in self.attempts if attempt.score is not None}


def choose(
    model: Source,
    samples: Iterable[Mapping[str, Array]],
    holdout: Sequence[Mapping[str, Array]],
    options: Options = Options(),
    *,
    evaluate: Callable[[ModelProto], float] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Choice:
    """Quantize with each observer, keep the best, then try each method on top and keep those that help.

    One pass over the samples serves every observer; each method that changes the graph costs one more.
    Among equals the first observer wins. The same arguments give the same graph, unless there is a time
    budget.

    Args:
        model: a float model or its file.
        samples: what the ranges are taken from. With methods they are read several times: give a list, or
            an iterable that starts over, not a generator.
        holdout: what the candidates are judged on; best other rows than ``samples``. Not used, and may be
            empty, with ``evaluate``.
        options: what may be tried.
        evaluate: the task's metric of an INT8 model, higher is better; without it the candidates are
            judged by the signal to quantization noise of their outputs, which needs no labels.
        progress: called after each sample of a pass with the number of rows done; a pass begins at 0.

    Raises:
        CalibrationError: as ``calibrate`` and ``quantize``; where ``holdout`` is empty and needed; an unknown
            method; samples that can be read only once.
    """
    _check(options, samples)
    prepared = prepare(model)
    metric = "sqnr_db" if evaluate is None else "task"
    if evaluate is None:
        evaluate = Reference(prepared, holdout, options.threads).sqnr_db
    search = _Search(samples, options, evaluate, MIN_GAIN_DB if metric == "sqnr_db" else 0.0, progress)
    best, attempts = search.run(prepared)
    kept = frozenset((best.scales.observer, *best.methods))
    return Choice(
        observer=best.scales.observer,
        methods=best.methods,
        model=best.model,
        exact=best.exact,
        scales=best.scales,
        quantized=best.quantized,
        score=best.score,
        metric=metric,
        attempts=tuple(replace(attempt, kept=attempt.name in kept) for attempt in attempts),
        spared=best.spared,
    )


@dataclass(frozen=True)
class _Candidate:
    """A graph with its scales, quantized and judged."""

    model: ModelProto
    exact: ModelProto
    scales: Scales
    quantized: Quantized
    score: float
    methods: tuple[str, ...] = ()
    spared: tuple[str, ...] = ()


class _Search:
    """Greedy composition: a method is applied to the best so far."""

    def __init__(
        self,
        samples: Iterable[Row],
        options: Options,
        evaluate: Callable[[ModelProto], float],
        min_gain: float,
        progress: Callable[[int], None] | None,
    ) -> None:
        self._samples = samples
        self._options = options
        self._evaluate = evaluate
        self._min_gain = min_gain
        self._progress = progress
        self._target = target_named(options.target)
        self._deadline = math.inf if options.budget_s is None else time.monotonic() + options.budget_s

    def run(self, prepared: ModelProto) -> tuple[_Candidate, list[Attempt]]:
        """The best candidate, and every attempt; ``kept`` is not decided yet."""
        observed = list(self._observe(prepared, ()))
        best = max(observed, key=lambda candidate: candidate.score)
        attempts, so_far = [], None
        for candidate in observed:
            attempts.append(_attempt(candidate.scales.observer, candidate.score, so_far))
            so_far = candidate.score if so_far is None else max(so_far, candidate.score)
        wanted = [name for name in METHODS if name in self._options.methods]
        rows = first_rows(prepared, self._samples, self._options.method_rows) if wanted else []
        for name in wanted:
            if self._late():
                attempts.append(Attempt(name, None, None, False, "the time budget was used up"))
                continue
            found = self._apply(name, best, rows)
            if found is None:
                attempts.append(Attempt(name, None, None, False, "it finds nothing to change in this model"))
                continue
            attempts.append(_attempt(name, found.score, best.score))
            if found.score > best.score + self._worth(name):
                best = found
        return best, attempts

    def _apply(self, name: str, best: _Candidate, rows: Sequence[Row]) -> _Candidate | None:
        """The best so far with one method more; None where the method changes nothing."""
        methods = (*best.methods, name)
        if name == "sparing":
            return self._spare(best, methods, rows)
        changed = self._changed(name, best, rows)
        if changed is None:
            return None
        if name in _CHANGE_RANGES:
            return max(self._observe(changed, methods), key=lambda candidate: candidate.score)
        return self._judge(changed, best.exact, best.scales, methods, best.spared)

    def _spare(self, best: _Candidate, methods: tuple[str, ...], rows: Sequence[Row]) -> _Candidate | None:
        """The best so far with some layers in float."""
        spared = spare(
            best.model,
            best.scales,
            best.quantized.report.quantized,
            rows,
            lambda names: self._quantize(best.model, best.scales, names),
            threads=self._options.threads,
            out_of_time=self._late,
        )
        return self._judge(best.model, best.exact, best.scales, methods, spared) if spared else None

    def _changed(self, name: str, best: _Candidate, rows: Sequence[Row]) -> ModelProto | None:
        """The graph that a method makes of the best so far."""
        threads, layers = self._options.threads, best.quantized.report.quantized
        if name == "equalization":
            return equalize(best.exact)
        if name == "smoothing":
            return smooth(best.exact, rows, self._target, threads)
        if name == "rounding":
            return round_weights(
                best.model, layers, rows, self._quantization(best), threads=threads, out_of_time=self._late
            )
        return correct_biases(
            best.model, best.quantized.model, layers, rows, reference=best.exact, threads=threads
        )

    def _quantization(self, best: _Candidate) -> Quantization:
        placement = place(best.model, self._target, (*self._options.exclude, *best.spared))
        levels = WEIGHT_LEVELS[self._options.weight_bits]
        return Quantization(self._target, best.scales, placement.tensors, levels)

    def _worth(self, name: str) -> float:
        """What a method has to bring to be kept."""
        return _MIN_SPARING_GAIN_DB if name == "sparing" and self._min_gain else self._min_gain

    def _late(self) -> bool:
        return time.monotonic() > self._deadline

    def _observe(self, model: ModelProto, methods: tuple[str, ...]) -> Iterator[_Candidate]:
        """Calibrate a graph, and judge it with the scales of each observer."""
        found = calibrate_each(
            model,
            self._samples,
            self._options.observers,
            percentile=self._options.percentile,
            threads=self._options.threads,
            progress=self._progress,
        )
        for scales in found.values():
            yield self._judge(model, model, scales, methods)

    def _judge(
        self,
        model: ModelProto,
        exact: ModelProto,
        scales: Scales,
        methods: tuple[str, ...],
        spared: tuple[str, ...] = (),
    ) -> _Candidate:
        quantized = self._quantize(model, scales, spared)
        score = float(self._evaluate(quantized.model))
        return _Candidate(model, exact, scales, quantized, score, methods, spared)

    def _quantize(self, model: ModelProto, scales: Scales, spared: Sequence[str]) -> Quantized:
        options = self._options
        exclude = (*options.exclude, *spared)
        return quantize(model, scales, options.target, exclude=exclude, weight_bits=options.weight_bits)


def _attempt(name: str, score: float, before: float | None) -> Attempt:
    gain = score - before if before is not None and math.isfinite(score) and math.isfinite(before) else None
    return Attempt(name, score, gain, kept=False)


def _check(options: Options, samples: Iterable[Row]) -> None:
    unknown = sorted(set(options.methods) - set(METHODS))
    if unknown:
        raise CalibrationError(
            f"there is no method {unknown[0]!r}",
            "methods change a graph so that its INT8 form comes closer to it",
            "choose among: " + ", ".join(METHODS),
        )
    if options.methods and iter(samples) is samples:
        raise CalibrationError(
            "the samples can be read only once",
            "methods need several passes over them, and this is an iterator or a generator",
            "give a list or an iterable that starts over, or Options(methods=())",
        )
