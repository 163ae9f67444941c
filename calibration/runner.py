"""Running samples through a model and showing every tensor to its observer, one row at a time.

Where smallest and largest are enough they are computed inside the graph, next to the operator that
makes the tensor; only tensors whose observer needs the values leave it. Nothing is kept between rows
but the observers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, TensorProto, helper

from calibration.errors import CalibrationError
from calibration.graph import Array, Index, Names
from calibration.macs import MacCounter
from calibration.observers import DEFAULT_PERCENTILE, MinMax, Observer, observer_kind
from calibration.placement import observed_tensors
from calibration.prepare import prepare
from calibration.samples import check, rows, signature
from calibration.scales import Scales, TensorRange
from calibration.session import open_session

_FLOAT_MAX = float(np.finfo(np.float32).max)


def calibrate(
    model: ModelProto,
    samples: Iterable[Mapping[str, Array]],
    *,
    observer: str = "minmax",
    percentile: float = DEFAULT_PERCENTILE,
    threads: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Scales:
    """Find the range of every activation of a model.

    Memory does not grow with the number of samples, and the result depends neither on how they are
    batched nor on their order. Rows of a batch are run one by one; where the model takes an
    ``attention_mask``, the padding at the end of each row is cut off first.

    Args:
        model: a float model; it is prepared first (see ``prepare``).
        samples: mappings from input names to arrays, batch axis first; read once, one at a time.
        observer: ``minmax``, ``percentile``, ``mse`` (least squared error) or ``entropy``.
        percentile: with ``percentile``, the share of values to keep on each side.
        threads: for ONNX Runtime; 0 leaves the choice to it.
        progress: called after each sample with the number of rows done.

    Returns:
        Ranges by tensor name, and the multiply-accumulates of each operator.

    Raises:
        CalibrationError: no samples, a sample that does not fit the model, NaN or infinity in a tensor
            that would be quantized (the tensor and the sample are named), or a model that is quantized
            already.
    """
    kind = observer_kind(observer, percentile=percentile)
    prepared = prepare(model)
    expected = signature(prepared)
    done = 0
    with _Probe(prepared, kind.make, needs_values=kind.needs_values, threads=threads) as probe:
        for position, sample in enumerate(samples):
            check(sample, expected, position)
            for row in rows(sample, expected):
                probe.run(row, position)
                done += 1
            if progress is not None:
                progress(done)
    if done == 0:
        raise CalibrationError(
            "there are no calibration samples",
            "the scales of activations come from real data",
            "give at least one sample; a hundred or more is usual",
        )
    return Scales(observer, kind.settings, done, probe.ranges(), probe.macs.totals)


@dataclass(frozen=True)
class _Fetch:
    """One tensor and the names of its outputs in the instrumented graph."""

    tensor: str
    critical: bool
    names: tuple[str, ...]


class _Probe:
    """The instrumented model with its observers."""

    def __init__(
        self, model: ModelProto, make: Callable[[], Observer], *, needs_values: bool, threads: int
    ) -> None:
        self._model = model
        index = Index(model)
        critical = observed_tensors(model)
        produced = [name for node in model.graph.node for name in node.output]
        floats = [name for name in (*_inputs(model), *produced) if index.is_float_activation(name)]
        self._observers: dict[str, Observer] = {
            name: make() if name in critical else MinMax() for name in floats
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

    def __enter__(self) -> _Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def run(self, row: Mapping[str, Array], position: int) -> None:
        """Show one row to the observers."""
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
        observer = self._observers[fetch.tensor]
        if len(found) == 1:
            if not np.isfinite(found[0]).all():
                raise _not_finite(fetch.tensor, position)
            observer.update(found[0].astype(np.float32, copy=False))
            return
        if found[0] == 0:
            return
        if fetch.critical and not all(math.isfinite(value) for value in found):
            self._check_values(fetch.tensor, row, position)
        if isinstance(observer, MinMax) and not math.isnan(found[1]) and not math.isnan(found[2]):
            lo, hi = (min(max(float(value), -_FLOAT_MAX), _FLOAT_MAX) for value in found[1:3])
            observer.merge(lo, hi, int(found[0]))

    def _check_values(self, tensor: str, row: Mapping[str, Array], position: int) -> None:
        """Look at the tensor itself: a sum can overflow where every value is finite."""
        editor = _Editor(self._model)
        output = editor.values(tensor).names[0]
        values = open_session(editor.model, self._threads).run([output], dict(row))[0]
        if not np.isfinite(values).all():
            raise _not_finite(tensor, position)

    def ranges(self) -> dict[str, TensorRange]:
        """What the observers found; tensors that never held a value are left out."""
        found = {}
        for name, observer in sorted(self._observers.items()):
            if observer.elements:
                lo, hi = observer.range()
                found[name] = TensorRange(lo, hi, observer.lo, observer.hi, observer.elements)
        return found


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
