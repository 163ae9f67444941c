"""How much of the metric a graph loses against the original, before the held-out data is touched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from edgekit import ort
from edgekit.data import Dataset
from edgekit.measure import accuracy
from edgekit.measure.outputs import collect
from edgekit.models import Model
from edgekit.tensors import Arrays

if TYPE_CHECKING:
    from calibration import Choice, Quantized


class Bound(BaseModel):
    """The largest absolute loss of a metric; ``metric_source``: digest of a metric of the user's own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_drop: float
    metric: str
    metric_source: str | None


class Judge:
    """A metric of graphs on samples that may be looked at as often as wanted, so not the held-out ones.

    Args:
        metric: from ``accuracy.choose``.
        original: the graph to compare with.
        data: the samples.
        model: whose inputs they are.
        behind: what is computed behind each graph; None: nothing.
        tick: told about progress.

    Attributes:
        original: the original's score.

    Raises:
        BadInput: the metric does not suit the model.
    """

    def __init__(
        self,
        metric: str,
        original: Path,
        data: Dataset,
        model: Model,
        behind: bytes | None,
        tick: Callable[[int, int], None],
    ) -> None:
        self._metric = metric
        self._behind = behind
        self._data = data
        self._model = model
        self._tick = tick
        self._reference, self._labels = self._outputs(original)
        self.original = accuracy.score(metric, self._reference, self._reference, self._labels).value

    def score(self, graph: Path | bytes) -> float:
        """The metric of a graph: a file, or a serialized model."""
        outputs, _ = self._outputs(graph)
        return accuracy.score(self._metric, outputs, self._reference, self._labels).value

    def _outputs(self, graph: Path | bytes) -> tuple[accuracy.Outputs, accuracy.Labels]:
        found, labels = collect(
            {"it": ort.open_chain(graph, self._behind)}, self._data, self._model, self._tick
        )
        return found["it"], labels


def can_judge(metric: str, data: Dataset) -> bool:
    """Whether the samples have what the metric needs; a metric of the user's own may need labels."""
    return data.has_labels or not accuracy.needs_labels(metric)


@dataclass(frozen=True)
class Kept:
    """An INT8 graph, the layers that were kept in float, and the scores behind that as JSON."""

    quantized: Quantized
    layers: tuple[str, ...]
    facts: Mapping[str, Any]


def keep_within(
    judge: Judge,
    bound: Bound,
    choice: Choice,
    samples: Sequence[Arrays],
    weight_bits: int,
    max_kept: int | None,
) -> Kept:
    """Keep the worst layers in float, as few as it takes, where the INT8 graph loses more than it may.

    Where the float graph itself loses too much, as after pruning, no layer can help and none is kept.

    Args:
        judge: gives the metric.
        bound: what may be lost against the judge's original.
        choice: from ``calibration.choose``.
        samples: for the harm that each layer does; none: nothing is kept.
        weight_bits: as the choice was made with.
        max_kept: the most layers that may stay in float; None: as many as it takes.
    """
    from calibration import Options, protect

    def score(graph: Any) -> float:
        return judge.score(graph.SerializeToString())

    at_least = judge.original - bound.max_drop
    in_float, in_int8 = score(choice.exact), score(choice.quantized.model)
    facts = {
        "metric": bound.metric,
        "original": judge.original,
        "in_float": in_float,
        "in_int8": in_int8,
        "at_least": at_least,
    }
    if in_int8 >= at_least or in_float < at_least or not samples or max_kept == 0:
        return Kept(choice.quantized, (), {**facts, "protected": in_int8})
    found = protect(
        choice.model,
        choice.scales,
        samples,
        score,
        at_least,
        Options(exclude=choice.spared, weight_bits=weight_bits),
        exact=choice.exact,
        max_kept=max_kept,
    )
    return Kept(found.quantized, found.kept, {**facts, "protected": found.score})
