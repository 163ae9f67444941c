"""Metrics of a task, computed from a model's outputs on held-out data.

top1          share of samples whose largest logit is the label
f1            macro F1: the mean over the classes that occur
map           COCO's mean average precision of the output ``detections`` (detection.py)
cosine        mean cosine between the model's first output and the original's; needs no labels
sqnr          signal to noise of all outputs against the original's, in decibels, at most 100; needs no labels
module:fn     a function of your own: fn(outputs, labels), higher is better; ``outputs`` maps each output's
name
              to an array over all samples, ``labels`` is an array or None. It returns a number, or one for
              each sample: their mean is the metric, and it then has an interval
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edgekit.errors import BadInput, nearest
from edgekit.measure import detection, interval
from edgekit.measure.interval import Interval
from edgekit.objects import is_object_spec, load_callable, load_module, source_digest

Array = np.ndarray[Any, Any]
Outputs = dict[str, Array]
Labels = Array | None

#: Where outputs are equal, or nearly, the signal to noise says no more than this.
MAX_SQNR_DB = 100.0


@dataclass(frozen=True)
class Metric:
    """A built-in metric: statistics of each sample, and what their sums say.

    Attributes:
        each: (outputs, original's outputs, labels) -> [samples, statistics].
        finish: sums [..., statistics] -> the metric [...].
        needs_labels: whether it can do without.
        is_rate: whether it is a share of samples, each right or wrong.
        of_all: where no sum over samples decides the metric: (outputs, labels) -> what takes the place of
            ``finish``; it is given how often each sample counts.
    """

    each: Callable[[Outputs, Outputs, Labels], Array]
    finish: interval.Finish
    needs_labels: bool
    is_rate: bool = False
    of_all: Callable[[Outputs, Labels], interval.Finish] | None = None


@dataclass(frozen=True)
class Score:
    """A metric's value, how many samples it rests on, and how sure it is; None: it does not say."""

    name: str
    value: float
    samples: int
    interval: Interval | None = None

    def as_json(self) -> dict[str, Any]:
        """The form that reports use."""
        found = None if self.interval is None else self.interval.as_json()
        return {"name": self.name, "value": self.value, "samples": self.samples, "interval": found}


def choose(metric: str | None, labelled: bool) -> str:
    """Name of the metric to use: the one asked for, else top1 with labels, else cosine.

    Raises:
        BadInput: no such metric, it cannot be imported, or it needs labels and there are none.
    """
    name = metric or ("top1" if labelled else "cosine")
    if name not in BUILT_IN and not is_object_spec(name):
        raise BadInput(
            f"unknown metric {name!r}", "it is neither built in nor module:fn", nearest(name, BUILT_IN)
        )
    if name not in BUILT_IN:
        load_callable(name)  # better now than after the work
    elif BUILT_IN[name].needs_labels and not labelled:
        raise BadInput(
            f"{name} needs labels",
            "the held-out data has none",
            "give labelled data with --eval, or --metric cosine",
        )
    return name


def needs_labels(name: str) -> bool:
    """Whether it takes labels; one of the user's own may."""
    return name not in BUILT_IN or BUILT_IN[name].needs_labels


def source(name: str) -> str | None:
    """Digest of the module that holds a metric of the user's own; None for one that is built in."""
    return None if name in BUILT_IN else source_digest(load_module(name))


def score(name: str, outputs: Outputs, original: Outputs, labels: Labels) -> Score:
    """Compute the metric.

    Args:
        name: from ``choose``.
        outputs: of the model that is judged, by name, the sample axis first.
        original: of the original model on the same samples.
        labels: integer classes, or None.

    Raises:
        BadInput: the outputs do not suit the metric, or the user's function failed.
    """
    samples = len(next(iter(outputs.values())))
    metric, each = _statistics(name, outputs, original, labels)
    value = float(metric.finish(each.sum(axis=0)))
    return Score(name, value, samples, _interval(metric, each, samples))


def drop(name: str, outputs: Outputs, original: Outputs, labels: Labels) -> Interval | None:
    """How sure the loss against the original is; None where a metric is one number for all samples.

    Raises:
        BadInput: as ``score``.
    """
    metric, ours = _statistics(name, outputs, original, labels)
    reference, theirs = _statistics(name, original, original, labels)
    if len(ours) != len(theirs) or len(ours) != len(next(iter(outputs.values()))) or len(ours) < 2:
        return None
    if metric.is_rate and reference.is_rate:
        differences = theirs[:, 0] - ours[:, 0]
        lost, gained = int((differences > 0).sum()), int((differences < 0).sum())
        return interval.rate_drop(lost, gained, len(ours))
    return interval.resampled_drop(theirs, reference.finish, ours, metric.finish)


def mean_cosine(a: Array, b: Array) -> float:
    """Mean over samples of the cosine between two arrays of the same shape, sample axis first."""
    return float(_cosines(a, b).mean())


def _statistics(name: str, outputs: Outputs, original: Outputs, labels: Labels) -> tuple[Metric, Array]:
    if name in BUILT_IN:
        metric = BUILT_IN[name]
        if metric.of_all is not None:
            metric = replace(metric, finish=metric.of_all(outputs, labels))
        return metric, metric.each(outputs, original, labels)
    values = _of_the_user(name, load_callable(name), outputs, labels)
    each = _counted(values)
    return Metric(
        lambda *_: each, _mean, needs_labels=False, is_rate=bool(np.isin(values, (0, 1)).all())
    ), each


def _interval(metric: Metric, each: Array, samples: int) -> Interval | None:
    if len(each) != samples or samples < 2:
        return None
    if metric.is_rate:
        return interval.rate(int(each[:, 0].sum()), samples)
    return interval.resampled(each, metric.finish)


def _counted(values: Array) -> Array:
    """[samples, 2]: a value and a one, so that the sums give the mean."""
    return np.stack([values.astype(np.float64), np.ones(len(values))], axis=1)


def _mean(sums: Array) -> Array:
    return np.asarray(sums[..., 0] / sums[..., 1])


def _correct(outputs: Outputs, _original: Outputs, labels: Labels) -> Array:
    said, right = _classes("top1", outputs, labels)
    return _counted(said == right)


def _f1_counts(outputs: Outputs, _original: Outputs, labels: Labels) -> Array:
    """[samples, 3 classes]: right, said and true, one class each."""
    said, right = _classes("f1", outputs, labels)
    classes = np.arange(max(int(said.max(initial=0)), int(right.max(initial=0))) + 1)
    is_said, is_right = said[:, None] == classes, right[:, None] == classes
    return np.concatenate([is_said & is_right, is_said, is_right], axis=1).astype(np.float64)


def _macro_f1(sums: Array) -> Array:
    both, said, right = np.split(sums, 3, axis=-1)
    occurs = said + right > 0
    each = np.divide(2 * both, said + right, out=np.zeros_like(both), where=occurs)
    return np.asarray(each.sum(axis=-1) / np.maximum(1, occurs.sum(axis=-1)))


def _classes(name: str, outputs: Outputs, labels: Labels) -> tuple[Array, Array]:
    logits = next(iter(outputs.values()))
    if labels is None or logits.ndim != 2 or labels.shape != (len(logits),):
        raise BadInput(
            f"{name} does not suit this model or data",
            f"it needs logits [samples, classes] and one label a sample; the output is {list(logits.shape)}",
            "use --metric cosine or --metric module:fn",
        )
    return logits.argmax(axis=1), labels


def _which(outputs: Outputs, _original: Outputs, _labels: Labels) -> Array:
    """[samples, samples]: the sums say how often each sample counts."""
    return np.eye(len(next(iter(outputs.values()))))


def _average_precision(outputs: Outputs, labels: Labels) -> interval.Finish:
    if detection.DETECTIONS not in outputs or labels is None:
        raise BadInput(
            "map does not suit this model or data",
            f"it needs boxes as labels and an output '{detection.DETECTIONS}'; there is {', '.join(outputs)}",
            "docs/detection.md says what detectors give; postprocessing.graph may make it",
        )
    matches = detection.match(outputs[detection.DETECTIONS], labels)

    def finish(times: Array) -> Array:
        return np.asarray(detection.average_precision(matches, np.atleast_2d(times)).mean(axis=1).squeeze())

    return finish


def _cosine_statistics(outputs: Outputs, original: Outputs, _labels: Labels) -> Array:
    return _counted(_cosines(next(iter(outputs.values())), next(iter(original.values()))))


def _cosines(a: Array, b: Array) -> Array:
    x = a.reshape(len(a), -1).astype(np.float64)
    y = b.reshape(len(b), -1).astype(np.float64)
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    dots = (x * y).sum(axis=1)
    same_zero = (norms == 0) & (x == y).all(axis=1)
    return np.asarray(np.where(same_zero, 1.0, dots / np.where(norms == 0, 1.0, norms)))


def _signal_and_noise(outputs: Outputs, original: Outputs, _labels: Labels) -> Array:
    """[samples, 2]: squares of the original's outputs, and of the difference."""
    signal, noise = 0.0, 0.0
    for name, value in outputs.items():
        reference = original[name].reshape(len(value), -1).astype(np.float64)
        error = reference - value.reshape(len(value), -1)
        signal = signal + np.square(reference).sum(axis=1)
        noise = noise + np.square(error).sum(axis=1)
    return np.stack([np.asarray(signal), np.asarray(noise)], axis=1)


def _decibels(sums: Array) -> Array:
    signal, noise = sums[..., 0], sums[..., 1]
    least = np.maximum(signal, np.finfo(np.float64).tiny) * 10 ** (-MAX_SQNR_DB / 10)
    return np.asarray(10 * np.log10(np.maximum(signal, least) / np.maximum(noise, least)))


def _of_the_user(name: str, function: Callable[..., Any], outputs: Outputs, labels: Labels) -> Array:
    """One value, or one a sample."""
    try:
        values = np.asarray(function(outputs, labels), dtype=np.float64)
    except Exception as error:  # whatever a user's function raises
        raise BadInput(
            f"the metric {name} failed",
            f"{type(error).__name__}: {error}",
            "it is called as fn(outputs, labels) and returns a number, or one for each sample",
        ) from error
    samples = len(next(iter(outputs.values())))
    if values.shape not in ((), (samples,)):
        raise BadInput(
            f"the metric {name} gave an array of the shape {list(values.shape)}",
            f"a metric is a number, or one for each of the {samples} samples",
            "correct the function",
        )
    if not np.isfinite(values).all():
        raise BadInput(
            f"the metric {name} gave {values if values.ndim == 0 else 'NaN or infinity'}",
            "a metric is a finite number",
            "correct the function",
        )
    return np.atleast_1d(values)


BUILT_IN: Mapping[str, Metric] = {
    "top1": Metric(_correct, _mean, needs_labels=True, is_rate=True),
    "f1": Metric(_f1_counts, _macro_f1, needs_labels=True),
    "map": Metric(_which, _mean, needs_labels=True, of_all=_average_precision),
    "cosine": Metric(_cosine_statistics, _mean, needs_labels=False),
    "sqnr": Metric(_signal_and_noise, _decibels, needs_labels=False),
}
