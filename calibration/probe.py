"""Looking inside a model while it runs, one row at a time.

What is asked of a tensor is computed inside the graph, next to the operator that makes it (see ``taps``).
Nothing is kept between rows but the histograms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
from onnx import ModelProto

from calibration.errors import CalibrationError, NothingToQuantize
from calibration.graph import Array, Index
from calibration.histogram import Extremes, Histogram
from calibration.instrument import Instrument
from calibration.macs import MacCounter
from calibration.merged import merged_tensors
from calibration.observers import Collected
from calibration.placement import observed_tensors
from calibration.session import open_session
from calibration.shapes import Shape, row_shapes
from calibration.taps import Seen, Taps

_FLOAT_MAX = float(np.finfo(np.float32).max)


class Probe:
    """A model with extra outputs, and what they have shown so far.

    Several threads may run rows at once. Each row runs on one thread: kernels may sum in another order on
    more, so this way what is collected does not depend on the number of threads.

    Args:
        model: from ``prepare``.
        needs_values: whether histograms of the tensors that may be quantized are wanted.
        max_memory_bytes: how much the tensors of one row that leave the model at once may take; where they
            need more, the row runs several times, and a slice of them leaves it each time.

    Raises:
        NothingToQuantize: no activation is float32.

    Attributes:
        collected: what is known of each float activation.
        merged: the tensors that only a ReLU or Clip reads, each with the tensor whose range it takes.
        macs: multiply-accumulates of what the caller has added.
    """

    def __init__(self, model: ModelProto, *, needs_values: bool, max_memory_bytes: int | None) -> None:
        self._model = model
        self._max_memory_bytes = max_memory_bytes
        index = Index(model)
        critical = observed_tensors(model)
        self.merged = merged_tensors(index, critical)
        produced = [name for node in model.graph.node for name in node.output]
        floats = [
            name
            for name in (*_inputs(model), *produced)
            if index.is_float_activation(name) and name not in self.merged
        ]
        if not floats:
            raise NothingToQuantize(
                "the model has no float32 activations",
                "ranges are taken of those; it may be in half precision already",
                "export it in float32",
            )
        histograms = critical if needs_values else frozenset()
        self._histograms = {name: Histogram() for name in floats if name in histograms}
        self.collected: dict[str, Collected] = {
            name: self._histograms.get(name) or Extremes() for name in floats
        }
        self.macs = MacCounter(model)
        known = row_shapes(model)
        instrument = Instrument(model)
        taps = Taps(instrument, index, known)
        self._taps = {
            name: taps.histogram(name)
            if name in histograms
            else taps.extremes(name, with_total=name in critical)
            for name in floats
        }
        self._known = {name: known[name] for name in self.macs.tensors if name in known}
        self._shapes = {name: instrument.shape(name) for name in self.macs.tensors if name not in known}
        self._session = open_session(instrument.detached, threads=1)

    def run(self, row: Mapping[str, Array], position: int) -> dict[str, Shape]:
        """Run one row and collect what it shows.

        Returns:
            The shapes that ``macs`` counts by.

        Raises:
            CalibrationError: the model does not run on it, or a tensor that may be quantized holds NaN or
                infinity.
        """
        names = list(self._shapes.values())
        for tap in self._taps.values():
            names += tap.numbers
        leaving = {name: tap.values for name, tap in self._taps.items() if tap.values is not None}
        at_once = leaving if self._max_memory_bytes is None else {}
        fetched = self._fetch([*names, *at_once.values()], row, position)
        for name, tap in self._taps.items():
            if tap.values is None:
                self._show_extremes(name, tap.seen(fetched), row, position)
            elif name in at_once:
                self._show_values(name, fetched[tap.values], fetched, row, position)
        if len(at_once) < len(leaving):
            sizes = {name: self._taps[name].leaving_bytes(fetched) for name in leaving}
            for part in self._slices(sizes):
                values = self._fetch([leaving[name] for name in part], row, position)
                for name in part:
                    self._show_values(name, values[leaving[name]], fetched, row, position)
        shown = {name: tuple(fetched[output].tolist()) for name, output in self._shapes.items()}
        return self._known | shown

    def _fetch(self, names: list[str], row: Mapping[str, Array], position: int) -> dict[str, Array]:
        try:
            return dict(zip(names, self._session.run(names, dict(row)), strict=True))
        except Exception as error:  # ONNX Runtime's errors share no base class below Exception
            raise CalibrationError(
                f"the model does not run on sample {position}",
                str(error).strip().splitlines()[0],
                "try the float model on that sample alone",
            ) from error

    def _slices(self, sizes_bytes: Mapping[str, int]) -> Iterator[list[str]]:
        """Cut the tensors into parts that fit the memory together; one that does not fit goes alone."""
        part: list[str] = []
        used = 0
        for name, size in sizes_bytes.items():
            if part and used + size > (self._max_memory_bytes or 0):
                yield part
                part, used = [], 0
            part.append(name)
            used += size
        if part:
            yield part

    def _show_values(
        self,
        tensor: str,
        values: Array,
        fetched: Mapping[str, Array],
        row: Mapping[str, Array],
        position: int,
    ) -> None:
        tap, histogram = self._taps[tensor], self._histograms[tensor]
        floats = values.astype(np.float32, copy=False)
        try:
            if tap.each is None:
                histogram.update(floats)
            else:
                seen = tap.seen(fetched)
                self._check_finite(tensor, seen, row, position)
                histogram.update_share(seen.lo, seen.hi, seen.elements, floats, tap.each)
        except FloatingPointError as error:
            raise _not_finite(tensor, position) from error

    def _show_extremes(self, tensor: str, seen: Seen, row: Mapping[str, Array], position: int) -> None:
        if seen.elements == 0:
            return
        self._check_finite(tensor, seen, row, position)
        if not math.isnan(seen.lo) and not math.isnan(seen.hi):
            lo, hi = (min(max(value, -_FLOAT_MAX), _FLOAT_MAX) for value in (seen.lo, seen.hi))
            self.collected[tensor].merge(lo, hi, seen.elements)

    def _check_finite(self, tensor: str, seen: Seen, row: Mapping[str, Array], position: int) -> None:
        if seen.total is not None and not np.isfinite((seen.lo, seen.hi, seen.total)).all():
            self._check_values(tensor, row, position)

    def _check_values(self, tensor: str, row: Mapping[str, Array], position: int) -> None:
        """Look at the tensor itself: a sum can overflow where every value is finite."""
        instrument = Instrument(self._model)
        output = instrument.values(tensor)
        values = open_session(instrument.detached, threads=1).run([output], dict(row))[0]
        if not np.isfinite(values).all():
            raise _not_finite(tensor, position)


def _inputs(model: ModelProto) -> list[str]:
    return [value.name for value in model.graph.input]


def _not_finite(tensor: str, position: int) -> CalibrationError:
    return CalibrationError(
        f"tensor {tensor!r} holds NaN or infinity on sample {position}",
        "a range that is not finite gives no scale",
        "remove the sample, or find out in the float model where the value comes from",
    )
