"""INT8 for a model of the zoo, made as ``edgekit compress`` makes it and compared with the float graph.

Cheapest first: the best observer; where the judges' cosine is below the bound, the methods on top of it
within a time; where that is not enough, the layers that hurt most stay in float. The cosine
that is told is of inputs that none of this has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from onnx import ModelProto

    from calibration import Choice

Arrays = Mapping[str, Any]

#: Asked of the judges; a little more than what the zoo asks of unseen inputs.
JUDGED_COSINE = 0.993
METHODS_BUDGET_S = 40.0
#: Noise on the inputs, as a share of their spread: how much does the float graph itself multiply errors.
SHAKE_FRACTION = 0.01


@dataclass(frozen=True)
class Made:
    """The graphs and what is known of them.

    Attributes:
        tensorrt: for TensorRT, with the same layers in int8.
        facts: observer, methods, layers in float, share of the work in int8, cosine; and the cosine of the
            float graph with itself where its inputs have a little noise: no INT8 graph does much better.
    """

    tensorrt: ModelProto
    facts: Mapping[str, Any]


def make(
    graph: ModelProto,
    samples: Sequence[Arrays],
    judges: Sequence[Arrays],
    unseen: Sequence[Arrays],
    threads: int,
) -> Made:
    """Quantize a float graph.

    Args:
        graph: with a free batch axis.
        samples: what the ranges are taken from.
        judges: what observers, methods and layers are chosen on.
        unseen: what the cosine is of.
        threads: for ONNX Runtime.

    Raises:
        CalibrationError: nothing can be quantized.
        ValueError: an output is not finite.
    """
    from calibration import Options, protect, quantize

    judged = _judge(graph, judges, threads)
    choice = _choose(graph, samples, judges, judged, threads)
    options = Options(exclude=choice.spared, threads=threads)
    protected = protect(
        choice.model, choice.scales, judges, judged, JUDGED_COSINE, options, exact=choice.exact
    )
    report, in_float = protected.quantized.report, (*choice.spared, *protected.kept)
    against = _judge(graph, unseen, threads)
    return Made(
        quantize(choice.model, choice.scales, "tensorrt", exclude=in_float).model,
        {
            "observer": choice.observer,
            "methods": choice.methods,
            "in_float": in_float,
            "quantized": len(report.quantized),
            "int8_macs": round(report.int8_macs_fraction or 0.0, 4),
            "cosine": round(against(protected.quantized.model), 5),
            "shaken": round(against(graph, _shaken(unseen)), 5),
        },
    )


def _choose(
    graph: ModelProto,
    samples: Sequence[Arrays],
    judges: Sequence[Arrays],
    judged: Callable[[ModelProto], float],
    threads: int,
) -> Choice:
    """Observers alone where they are good enough, else with methods on top."""
    from calibration import Options, choose

    choice = choose(graph, samples, judges, Options(methods=(), threads=threads))
    if judged(choice.quantized.model) >= JUDGED_COSINE:
        return choice
    return choose(graph, samples, judges, Options(budget_s=METHODS_BUDGET_S, threads=threads))


def _shaken(feeds: Sequence[Arrays]) -> list[Arrays]:
    """The feeds with noise on what is no token number."""
    rng = np.random.default_rng(0)
    return [
        {
            name: value
            + (SHAKE_FRACTION * value.std() * rng.standard_normal(value.shape)).astype(value.dtype)
            if np.issubdtype(value.dtype, np.floating)
            else value
            for name, value in feed.items()
        }
        for feed in feeds
    ]


def _judge(graph: ModelProto, feeds: Sequence[Arrays], threads: int) -> Callable[..., float]:
    """The smallest cosine between a graph's outputs and those of ``graph``, over outputs and feeds."""
    wanted = _answers(graph, feeds, threads)

    def judged(other: ModelProto, given: Sequence[Arrays] = feeds) -> float:
        return min(_cosine(a, b) for a, b in zip(wanted, _answers(other, given, threads), strict=True))

    return judged


def _answers(graph: ModelProto, feeds: Sequence[Arrays], threads: int) -> list[Any]:
    from calibration.session import open_session

    session = open_session(graph, threads)
    return [output for feed in feeds for output in session.run(None, dict(feed))]


def _cosine(a: Any, b: Any) -> float:
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("an output is not finite")
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / length if length else 1.0
