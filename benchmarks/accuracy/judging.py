"""Metrics of the tasks, and how far an INT8 model's answers are from the float model's.

Differences in accuracy between good INT8 models are smaller than the sampling error of a test set, so that
the winner would be drawn by lot. A distance to the float model on the same rows has no label noise: the mean
Kullback-Leibler divergence is the rise of the negative log-likelihood that is to be expected where the float
model's probabilities are right.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from accuracy.case import Array, Outputs

_GROUPS = 20


def log_softmax(logits: Array, axis: int) -> Array:
    """Log-probabilities in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=axis, keepdims=True)
    normalised: Array = shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))
    return normalised


def accuracy(outputs: Outputs, truth: Array) -> float:
    """Share of rows whose largest logit (axis 1) is the label."""
    return float((outputs[0].argmax(axis=1) == truth).mean())


def likelihood(outputs: Outputs, truth: Array) -> float:
    """Mean log-likelihood of the labels in bits; logits have their classes on the last axis."""
    found = np.take_along_axis(log_softmax(outputs[0], -1), truth[..., None], axis=-1)
    return float(found.mean() / math.log(2))


def divergence(axis: int) -> Callable[[Outputs, Outputs], float]:
    """Mean Kullback-Leibler divergence from the float model, in millibits; classes are on ``axis``."""

    def distance(reference: Outputs, found: Outputs) -> float:
        expected, got = (log_softmax(outputs[0], axis) for outputs in (reference, found))
        bits = (np.exp(expected) * (expected - got)).sum(axis=axis) / math.log(2)
        return float(1e3 * bits.mean())

    return distance


def mean_iou(outputs: Outputs, truth: Array) -> float:
    """Intersection over union of each class over all pixels, averaged over the classes that occur."""
    classes = outputs[0].shape[1]
    predicted = outputs[0].argmax(axis=1)
    pairs = np.bincount((truth * classes + predicted).ravel(), minlength=classes**2).reshape(classes, classes)
    union = pairs.sum(0) + pairs.sum(1) - np.diag(pairs)
    return float((np.diag(pairs)[union > 0] / union[union > 0]).mean())


def paired_error(
    quality: Callable[[Outputs, Array], float], ours: Outputs, theirs: Outputs, truth: Array
) -> float:
    """Standard error of ``quality(ours) - quality(theirs)`` on the same test rows.

    A delete-group jackknife (Efron and Tibshirani, 1993, chapter 11) over interleaved groups, which serves
    metrics that are no mean over rows, such as average precision.
    """
    rows = np.arange(len(truth))
    groups = min(_GROUPS, len(rows))
    differences = np.empty(groups)
    for group in range(groups):
        kept = rows[rows % groups != group]
        differences[group] = quality([o[kept] for o in ours], truth[kept]) - quality(
            [o[kept] for o in theirs], truth[kept]
        )
    spread = np.square(differences - differences.mean()).sum()
    return math.sqrt(spread * (groups - 1) / groups)
