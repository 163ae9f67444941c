"""Metrics of a task, computed from a model's outputs on held-out data.

top1          share of samples whose largest logit is the label
cosine        mean cosine between the model's first output and the original's; needs no labels
module:fn     a function of your own: fn(outputs, labels) -> float, higher is better; ``outputs`` maps each
              output's name to an array over all samples, ``labels`` is an array or None
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgekit.errors import BadInput, nearest
from edgekit.objects import is_object_spec, load_callable, load_module, source_digest

Outputs = dict[str, np.ndarray[Any, Any]]
Labels = np.ndarray[Any, Any] | None

BUILT_IN = ("top1", "cosine")


@dataclass(frozen=True)
class Score:
    """A metric's value and how many samples it rests on."""

    name: str
    value: float
    samples: int

    def as_json(self) -> dict[str, Any]:
        """The form that reports use."""
        return {"name": self.name, "value": self.value, "samples": self.samples}


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
    if name == "top1" and not labelled:
        raise BadInput(
            "top1 needs labels",
            "the held-out data has none",
            "give labelled data with --eval, or --metric cosine",
        )
    return name


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
    first = next(iter(outputs.values()))
    if name == "top1":
        return Score(name, _top1(first, labels), len(first))
    if name == "cosine":
        return Score(name, mean_cosine(first, next(iter(original.values()))), len(first))
    return Score(name, _of_the_user(name, load_callable(name), outputs, labels), len(first))


def mean_cosine(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    """Mean over samples of the cosine between two arrays of the same shape, sample axis first."""
    x = a.reshape(len(a), -1).astype(np.float64)
    y = b.reshape(len(b), -1).astype(np.float64)
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    dots = (x * y).sum(axis=1)
    same_zero = (norms == 0) & (x == y).all(axis=1)
    return float(np.where(same_zero, 1.0, dots / np.where(norms == 0, 1.0, norms)).mean())


def _top1(logits: np.ndarray[Any, Any], labels: Labels) -> float:
    if labels is None or logits.ndim != 2 or labels.shape != (len(logits),):
        raise BadInput(
            "top1 does not suit this model or data",
            f"it needs logits [samples, classes] and one label a sample; the output is {list(logits.shape)}",
            "use --metric cosine or --metric module:fn",
        )
    return float((logits.argmax(axis=1) == labels).mean())


def _of_the_user(name: str, function: Callable[..., Any], outputs: Outputs, labels: Labels) -> float:
    try:
        value = float(function(outputs, labels))
    except Exception as error:  # whatever a user's function raises
        raise BadInput(
            f"the metric {name} failed",
            f"{type(error).__name__}: {error}",
            "it is called as fn(outputs, labels) and returns a number",
        ) from error
    if not np.isfinite(value):
        raise BadInput(
            f"the metric {name} gave {value}", "a metric is a finite number", "correct the function"
        )
    return value
