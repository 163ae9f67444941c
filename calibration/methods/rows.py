"""Tensors of a model on a few rows of real data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import onnxruntime as ort
from onnx import ModelProto

from calibration.graph import Array
from calibration.instrument import Instrument
from calibration.samples import check, rows, signature
from calibration.session import open_session

Row = Mapping[str, Array]


def first_rows(model: ModelProto, samples: Iterable[Row], limit: int) -> list[Row]:
    """The first ``limit`` rows of the samples, checked and without padding.

    Raises:
        CalibrationError: a sample does not fit the model.
    """
    expected = signature(model)
    found: list[Row] = []
    for position, sample in enumerate(samples):
        check(sample, expected, position)
        found.extend(rows(sample, expected))
        if len(found) >= limit:
            break
    return found[:limit]


class Taps:
    """A model that shows tensors from its inside.

    Args:
        model: from ``prepare``, or quantized.
        tensors: the names of the tensors.
        threads: for ONNX Runtime; 0 leaves the choice to it.
    """

    def __init__(self, model: ModelProto, tensors: Sequence[str], threads: int) -> None:
        self._inputs = frozenset(value.name for value in model.graph.input)
        instrument = Instrument(model)
        for name in dict.fromkeys(tensors):
            if name not in self._inputs:
                instrument.values(name)
        self._session = open_session(instrument.detached, threads) if instrument.model.graph.output else None
        self._options = ort.RunOptions()
        self._options.only_execute_path_to_fetches = True

    def run(self, row: Row, tensors: Sequence[str]) -> dict[str, Array]:
        """Some of the tensors on one row; only what they need is computed."""
        wanted = [name for name in dict.fromkeys(tensors) if name not in self._inputs]
        feed = {name: value for name, value in row.items() if name in self._inputs}
        found = {name: row[name] for name in tensors if name in self._inputs}
        if self._session is not None and wanted:
            found.update(zip(wanted, self._session.run(wanted, feed, self._options), strict=True))
        return found

    def over(self, rows_: Iterable[Row], tensors: Sequence[str]) -> Iterator[dict[str, Array]]:
        """Some of the tensors on each row."""
        for row in rows_:
            yield self.run(row, tensors)
