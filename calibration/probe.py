"""Looking inside a model while it runs, one row at a time.

Where smallest and largest are enough they are computed inside the graph, next to the operator that
makes the tensor; only tensors whose histogram is wanted leave it. Nothing is kept between rows but
the histograms.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, TensorProto, helper

from calibration.errors import CalibrationError
from calibration.graph import Array, Index, Names
from calibration.histogram import Extremes, Histogram
from calibration.macs import MacCounter
from calibration.observers import Collected
from calibration.placement import observed_tensors
from calibration.session import open_session

_FLOAT_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class _Fetch:
    """One tensor and the names of its outputs in the instrumented graph."""

    tensor: str
    critical: bool
    names: tuple[str, ...]


class Probe:
    """A model with extra outputs, and what they have shown so far.

    Args:
        model: from ``prepare``.
        needs_values: whether histograms of the tensors that may be quantized are wanted.
        threads: for ONNX Runtime and the histograms; 0 leaves the choice to them.

    Attributes:
        collected: what is known of each float activation.
        macs: multiply-accumulates so far.
    """

    def __init__(self, model: ModelProto, *, needs_values: bool, threads: int) -> None:
        self._model = model
        index = Index(model)
        critical = observed_tensors(model)
        produced = [name for node in model.graph.node for name in node.output]
        floats = [name for name in (*_inputs(model), *produced) if index.is_float_activation(name)]
        self.collected: dict[str, Collected] = {
            name: Histogram() if needs_values and name in critical else Extremes() for name in floats
        }
        self.macs = MacCounter(model)
        editor = _Editor(model)
        self._fetches = [
            editor.values(name) if needs_values and name in critical else editor.extremes(name, critical)
            for name in floats
        ]
        self._shapes = {name: editor.shape(name) for name in self.macs.tensors}
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads or min(os.cpu_count() or 1, 8))
        self._session = open_session(editor.model, threads)
        self._wanted = [name for fetch in self._fetches for name in fetch.names] + list(self._shapes.values())

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def run(self, row: Mapping[str, Array], position: int) -> None:
        """Run one row and collect what it shows."""
        try:
            fetched = dict(zip(self._wanted, self._session.run(self._wanted, dict(row)), strict=True))
        except Exception as error:  # ONNX Runtime's errors share no base class below Exception
            raise CalibrationError(
                f"the model does not run on sample {position}",
                str(error).strip().splitlines()[0],
                "try the float model on that sample alone",
            ) from error
        sizes = {name: tuple(fetched[output].tolist()) for name, output in self._shapes.items()}
        shown = (
            self._pool.submit(self._show, fetch, [fetched[name] for name in fetch.names], row, position)
            for fetch in self._fetches
        )
        for result in list(shown):
            result.result()
        self.macs.add(sizes)

    def _show(self, fetch: _Fetch, found: list[Array], row: Mapping[str, Array], position: int) -> None:
        collected = self.collected[fetch.tensor]
        if isinstance(collected, Histogram):
            if not np.isfinite(found[0]).all():
                raise _not_finite(fetch.tensor, position)
            collected.update(found[0].astype(np.float32, copy=False))
            return
        if found[0] == 0:
            return
        if fetch.critical and not all(math.isfinite(value) for value in found):
            self._check_values(fetch.tensor, row, position)
        if not math.isnan(found[1]) and not math.isnan(found[2]):
            lo, hi = (min(max(float(value), -_FLOAT_MAX), _FLOAT_MAX) for value in found[1:3])
            collected.merge(lo, hi, int(found[0]))

    def _check_values(self, tensor: str, row: Mapping[str, Array], position: int) -> None:
        """Look at the tensor itself: a sum can overflow where every value is finite."""
        editor = _Editor(self._model)
        output = editor.values(tensor).names[0]
        values = open_session(editor.model, self._threads).run([output], dict(row))[0]
        if not np.isfinite(values).all():
            raise _not_finite(tensor, position)


class _Editor:
    """Adds outputs to a copy of a model."""

    def __init__(self, model: ModelProto) -> None:
        self.model = ModelProto()
        self.model.CopyFrom(model)
        del self.model.graph.output[:]
        self._names = Names(model)

    def values(self, tensor: str) -> _Fetch:
        """Return the tensor itself."""
        self.model.graph.output.append(helper.make_empty_tensor_value_info(tensor))
        return _Fetch(tensor, True, (tensor,))

    def extremes(self, tensor: str, critical: frozenset[str]) -> _Fetch:
        """Return its size, its smallest and largest value and, where it matters, its sum: NaN shows there."""
        kinds = ["Size", "ReduceMin", "ReduceMax"] + ["ReduceSum"] * (tensor in critical)
        return _Fetch(tensor, tensor in critical, tuple(self._reduce(kind, tensor) for kind in kinds))

    def shape(self, tensor: str) -> str:
        """Return its shape."""
        return self._add("Shape", tensor, TensorProto.INT64)

    def _reduce(self, kind: str, tensor: str) -> str:
        if kind == "Size":
            return self._add(kind, tensor, TensorProto.INT64)
        return self._add(kind, tensor, TensorProto.FLOAT, keepdims=0)

    def _add(self, kind: str, tensor: str, dtype: int, **attributes: int) -> str:
        output = self._names.fresh(f"{tensor}_{kind}")
        node = helper.make_node(kind, [tensor], [output], name=output)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        self.model.graph.node.append(node)
        self.model.graph.output.append(helper.make_tensor_value_info(output, dtype, None))
        return output


def _inputs(model: ModelProto) -> list[str]:
    return [value.name for value in model.graph.input]


def _not_finite(tensor: str, position: int) -> CalibrationError:
    return CalibrationError(
        f"tensor {tensor!r} holds NaN or infinity on sample {position}",
        "a range that is not finite gives no scale",
        "remove the sample, or find out in the float model where the value comes from",
    )
