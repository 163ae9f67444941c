"""Calibration: samples in, scales out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from onnx import ModelProto

from calibration.checkpoint import Checkpoint, Progress
from calibration.errors import CalibrationError
from calibration.graph import Array, Index
from calibration.observers import DEFAULT_PERCENTILE, Observer, observer_named
from calibration.prepare import prepare
from calibration.probe import Probe
from calibration.samples import check, rows, signature
from calibration.saturation import useful_range, within
from calibration.scales import Scales, TensorRange
from calibration.storage import Source
from calibration.workers import Workers


def calibrate(
    model: Source,
    samples: Iterable[Mapping[str, Array]],
    *,
    observer: str = "minmax",
    percentile: float = DEFAULT_PERCENTILE,
    threads: int = 0,
    max_memory_bytes: int | None = None,
    checkpoint: Path | None = None,
    checkpoint_every_s: float = 30.0,
    progress: Callable[[int], None] | None = None,
) -> Scales:
    """Find the range of every activation of a model.

    Memory does not grow with the number of samples, and the result depends neither on how they are
    batched nor on their order. Rows of a batch are run one by one; where the model takes an
    ``attention_mask``, the padding at the end of each row does not reach the observers.

    Args:
        model: a float model or its file; it is prepared first (see ``prepare``).
        samples: mappings from input names to arrays; read once, one at a time. Rows are cut along the axis
            whose symbol is called like a batch in every input, else along a free first axis; a sample of a
            model without either is one row.
        observer: ``minmax``, ``percentile``, ``mse`` (least squared error) or ``entropy``.
        percentile: with ``percentile``, the share of values to keep on each side.
        threads: rows that run at once, each on one thread; 0: one for each processor, at most eight.
        max_memory_bytes: how much the tensors that leave the model for their histograms may take at once;
            where they need more, a row runs several times. None: no limit.
        checkpoint: a file for what was collected so far; after a crash, the same call with the same samples
            goes on from there. It is removed at the end.
        checkpoint_every_s: seconds between two writes of it.
        progress: called with the number of rows done, after each row; ``ProgressBar`` is one.

    Returns:
        Ranges by tensor name, and the multiply-accumulates of each operator.

    Raises:
        NothingToQuantize: no activation is float32.
        CalibrationError: no samples, a sample that does not fit the model, NaN or infinity in a tensor
            that would be quantized (the tensor and the sample are named), or a model that is quantized
            already.
    """
    run = _Run(threads, max_memory_bytes, checkpoint, checkpoint_every_s, progress)
    return run.scales(model, samples, [observer_named(observer, percentile=percentile)])[0]


def calibrate_each(
    model: Source,
    samples: Iterable[Mapping[str, Array]],
    observers: Sequence[str],
    *,
    percentile: float = DEFAULT_PERCENTILE,
    threads: int = 0,
    max_memory_bytes: int | None = None,
    checkpoint: Path | None = None,
    checkpoint_every_s: float = 30.0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Scales]:
    """The scales of several observers from one pass over the samples; otherwise as ``calibrate``."""
    kinds = [observer_named(name, percentile=percentile) for name in observers]
    run = _Run(threads, max_memory_bytes, checkpoint, checkpoint_every_s, progress)
    found = run.scales(model, samples, kinds)
    return dict(zip(observers, found, strict=True))


#: More rows at once take more memory than they save time.
_MOST_THREADS = 8


@dataclass(frozen=True)
class _Run:
    """The settings of one pass over the samples; they do not change its result."""

    threads: int
    max_memory_bytes: int | None
    checkpoint: Path | None
    checkpoint_every_s: float
    progress: Callable[[int], None] | None

    def scales(
        self, model: Source, samples: Iterable[Mapping[str, Array]], observers: Sequence[Observer]
    ) -> list[Scales]:
        """Show all samples to a probe, and let each observer choose its ranges."""
        prepared = prepare(model)
        workers = self.threads or min(os.cpu_count() or 1, _MOST_THREADS)
        each = None if self.max_memory_bytes is None else self.max_memory_bytes // workers
        needs_values = any(observer.needs_values for observer in observers)
        probe = Probe(prepared, needs_values=needs_values, max_memory_bytes=each)
        rows_done = self._show(prepared, samples, probe, workers)
        if rows_done == 0:
            raise CalibrationError(
                "there are no calibration samples",
                "the scales of activations come from real data",
                "give at least one sample; a hundred or more is usual",
            )
        index = Index(prepared)
        return [_scales(probe, observer, rows_done, index) for observer in observers]

    def _show(
        self, prepared: ModelProto, samples: Iterable[Mapping[str, Array]], probe: Probe, workers: int
    ) -> int:
        """Run every sample, after those that a checkpoint holds already; the number of rows."""
        expected = signature(prepared)
        saved = None
        if self.checkpoint is not None:
            saved = Checkpoint(self.checkpoint, prepared, probe, self.checkpoint_every_s)
        start = saved.restore() if saved else Progress(0, 0)
        with Workers(probe, workers, start.rows, self.progress) as at_work:
            for position, sample in enumerate(samples):
                if position < start.samples:
                    continue
                check(sample, expected, position)
                for row in rows(sample, expected):
                    at_work.submit(row, position)
                if saved and saved.is_due():
                    at_work.finish()
                    saved.write(Progress(position + 1, at_work.done))
            at_work.finish()
        if saved:
            saved.remove()
        return at_work.done


def _scales(probe: Probe, observer: Observer, samples: int, index: Index) -> Scales:
    """One observer's scales; tensors that never held a value are left out."""
    tensors = {}
    for name, collected in sorted(probe.collected.items()):
        if collected.elements:
            lo, hi = within(observer.range(collected), useful_range(name, index))
            tensors[name] = TensorRange(lo, hi, collected.lo, collected.hi, collected.elements)
    tensors.update({name: tensors[end] for name, end in probe.merged.items() if end in tensors})
    return Scales(observer.name, observer.settings, samples, tensors, dict(probe.macs.totals))
