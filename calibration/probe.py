"""Looking inside a model while it runs, one row at a time.

Where smallest and largest are enough they are computed inside the graph, next to the operator that
makes the tensor; only tensors whose histogram is wanted leave it. Nothing is kept between rows but
the histograms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto

from calibration.errors import CalibrationError
from calibration.graph import Array, Index
from calibration.histogram import Extremes, Histogram
from calibration.instrument import Instrument
from calibration.macs import MacCounter, Shape
from calibration.observers import Collected
from calibration.placement import observed_tensors
from calibration.session import open_session

_FLOAT_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class _Extremes:
    """Names of the outputs that show a tensor's size, smallest and largest value, and perhaps its sum.

    NaN and infinity anywhere in a tensor show in its sum.
    """

    size: str
    lo: str
    hi: str
    total: str | None


class Probe:
    """A model with extra outputs, and what they have shown so far.

    Several threads may run rows at once. Each row runs on one thread: kernels may sum in another order on
    more, so this way what is collected does not depend on the number of threads.

    Args:
        model: from ``prepare``.
        needs_values: whether histograms of the tensors that may be quantized are wanted.
        max_memory_bytes: how much the tensors of one row that leave the model at once may take; where they
            need more, the row runs several times, and a slice of them leaves it each time.

    Attributes:
        collected: what is known of each float activation.
        macs: multiply-accumulates of what the caller has added.
    """

    def __init__(self, model: ModelProto, *, needs_values: bool, max_memory_bytes: int | None) -> None:
        self._model = model
        self._max_memory_bytes = max_memory_bytes
        index = Index(model)
        critical = observed_tensors(model)
        produced = [name for node in model.graph.node for name in node.output]
        floats = [name for name in (*_inputs(model), *produced) if index.is_float_activation(name)]
        self._whole = [name for name in floats if needs_values and name in critical]
        self.collected: dict[str, Collected] = {
            name: Histogram() if needs_values and name in critical else Extremes() for name in floats
        }
        self.macs = MacCounter(model)
        instrument = Instrument(model)
        self._extremes = {
            name: _Extremes(
                instrument.size(name),
                instrument.reduce("ReduceMin", name),
                instrument.reduce("ReduceMax", name),
                instrument.reduce("ReduceSum", name) if name in critical else None,
            )
            for name in floats
            if name not in self._whole
        }
        self._shapes = {name: instrument.shape(name) for name in self.macs.tensors}
        self._sizes = {name: instrument.size(name) for name in self._whole}
        for name in self._whole:
            instrument.values(name)
        self._session = open_session(instrument.detached, threads=1)

    def run(self, row: Mapping[str, Array], position: int) -> dict[str, Shape]:
        """Run one row and collect what it shows.

        Returns:
            The shapes that ``macs`` counts by.

        Raises:
            CalibrationError: the model does not run on it, or a tensor that may be quantized holds NaN or
                infinity.
        """
        small = [*self._shapes.values(), *self._sizes.values()]
        for extremes in self._extremes.values():
            small += [name for name in (extremes.size, extremes.lo, extremes.hi, extremes.total) if name]
        at_once = self._whole if self._max_memory_bytes is None else []
        fetched = self._fetch([*small, *at_once], row, position)
        for tensor, extremes in self._extremes.items():
            self._show_extremes(tensor, extremes, fetched, row, position)
        if at_once:
            self._show_whole({name: fetched[name] for name in at_once}, position)
        else:
            sizes = {name: 4 * int(fetched[output]) for name, output in self._sizes.items()}
            for part in self._slices(sizes):
                self._show_whole(self._fetch(part, row, position), position)
        return {name: tuple(fetched[output].tolist()) for name, output in self._shapes.items()}

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

    def _show_whole(self, tensors: Mapping[str, Array], position: int) -> None:
        for name, values in tensors.items():
            try:
                self.collected[name].update(values.astype(np.float32, copy=False))
            except FloatingPointError as error:
                raise _not_finite(name, position) from error

    def _show_extremes(
        self,
        tensor: str,
        extremes: _Extremes,
        fetched: Mapping[str, Array],
        row: Mapping[str, Array],
        position: int,
    ) -> None:
        elements = int(fetched[extremes.size])
        if elements == 0:
            return
        lo, hi = float(fetched[extremes.lo]), float(fetched[extremes.hi])
        if extremes.total is not None and not np.isfinite((lo, hi, float(fetched[extremes.total]))).all():
            self._check_values(tensor, row, position)
        if not math.isnan(lo) and not math.isnan(hi):
            lo, hi = (min(max(value, -_FLOAT_MAX), _FLOAT_MAX) for value in (lo, hi))
            self.collected[tensor].merge(lo, hi, elements)

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
