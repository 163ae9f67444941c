"""Calibration: samples in, scales out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from onnx import ModelProto

from calibration.errors import CalibrationError
from calibration.graph import Array
from calibration.observers import DEFAULT_PERCENTILE, Observer, observer_named
from calibration.prepare import prepare
from calibration.probe import Probe
from calibration.samples import check, rows, signature
from calibration.scales import Scales, TensorRange


def calibrate(
    model: ModelProto,
    samples: Iterable[Mapping[str, Array]],
    *,
    observer: str = "minmax",
    percentile: float = DEFAULT_PERCENTILE,
    threads: int = 0,
    max_memory_bytes: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Scales:
    """Find the range of every activation of a model.

    Memory does not grow with the number of samples, and the result depends neither on how they are
    batched nor on their order. Rows of a batch are run one by one; where the model takes an
    ``attention_mask``, the padding at the end of each row does not reach the observers.

    Args:
        model: a float model; it is prepared first (see ``prepare``).
        samples: mappings from input names to arrays, batch axis first; read once, one at a time.
        observer: ``minmax``, ``percentile``, ``mse`` (least squared error) or ``entropy``.
        percentile: with ``percentile``, the share of values to keep on each side.
        threads: for ONNX Runtime; 0 leaves the choice to it.
        max_memory_bytes: how much the tensors that leave the model for their histograms may take at once;
            where a row's need more, the row runs several times. None: no limit.
        progress: called after each sample with the number of rows done.

    Returns:
        Ranges by tensor name, and the multiply-accumulates of each operator.

    Raises:
        CalibrationError: no samples, a sample that does not fit the model, NaN or infinity in a tensor
            that would be quantized (the tensor and the sample are named), or a model that is quantized
            already.
    """
    kinds = [observer_named(observer, percentile=percentile)]
    return _calibrate(model, samples, kinds, threads, max_memory_bytes, progress)[0]


def calibrate_each(
    model: ModelProto,
    samples: Iterable[Mapping[str, Array]],
    observers: Sequence[str],
    *,
    percentile: float = DEFAULT_PERCENTILE,
    threads: int = 0,
    max_memory_bytes: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Scales]:
    """The scales of several observers from one pass over the samples; otherwise as ``calibrate``."""
    kinds = [observer_named(name, percentile=percentile) for name in observers]
    found = _calibrate(model, samples, kinds, threads, max_memory_bytes, progress)
    return dict(zip(observers, found, strict=True))


def _calibrate(
    model: ModelProto,
    samples: Iterable[Mapping[str, Array]],
    observers: Sequence[Observer],
    threads: int,
    max_memory_bytes: int | None,
    progress: Callable[[int], None] | None,
) -> list[Scales]:
    prepared = prepare(model)
    expected = signature(prepared)
    needs_values = any(observer.needs_values for observer in observers)
    done = 0
    with Probe(
        prepared, needs_values=needs_values, threads=threads, max_memory_bytes=max_memory_bytes
    ) as probe:
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
    return [_scales(probe, observer, done) for observer in observers]


def _scales(probe: Probe, observer: Observer, samples: int) -> Scales:
    """One observer's scales; tensors that never held a value are left out."""
    tensors = {}
    for name, collected in sorted(probe.collected.items()):
        if collected.elements:
            lo, hi = observer.range(collected)
            tensors[name] = TensorRange(lo, hi, collected.lo, collected.hi, collected.elements)
    return Scales(observer.name, observer.settings, samples, tensors, dict(probe.macs.totals))
