"""Which layers hurt: the error that each quantized layer alone brings to the model's outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto

from calibration.errors import CalibrationError
from calibration.graph import Array
from calibration.placement import place
from calibration.prepare import prepare
from calibration.quantizer import quantize
from calibration.samples import check, rows, signature
from calibration.scales import Scales
from calibration.session import open_session
from calibration.storage import Source
from calibration.targets import target_named


@dataclass(frozen=True)
class LayerSensitivity:
    """The harm done by quantizing one layer.

    Attributes:
        node: name of the layer in the prepared model.
        sqnr_db: signal to quantization noise at the model's outputs, in decibels, with this layer alone in
            int8; lower is worse, infinite where nothing changed.
    """

    node: str
    sqnr_db: float


def sensitivity(
    model: Source,
    scales: Scales,
    samples: Iterable[Mapping[str, Array]],
    target: str = "onnxruntime",
    *,
    threads: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[LayerSensitivity]:
    """Quantize each linear layer alone and measure the outputs against the float model's.

    Args:
        model: the model that was calibrated, or its file.
        scales: from ``calibrate``.
        samples: a handful is enough; they are held in memory.
        target: the runtime whose placement is judged.
        threads: for ONNX Runtime; 0 leaves the choice to it.
        progress: called with the number of layers done and their total.

    Returns:
        One entry a layer, the worst first.

    Raises:
        CalibrationError: no samples, or a sample that does not fit the model.
    """
    prepared = prepare(model)
    reference = Reference(prepared, samples, threads)
    layers = sorted(place(prepared, target_named(target)).quantized)
    found = []
    for done, layer in enumerate(layers, start=1):
        alone = quantize(prepared, scales, target, exclude=[name for name in layers if name != layer])
        found.append(LayerSensitivity(layer, reference.sqnr_db(alone.model)))
        if progress is not None:
            progress(done, len(layers))
    return sorted(found, key=lambda entry: (entry.sqnr_db, entry.node))


def sqnr_db(reference: Sequence[Array], found: Sequence[Array]) -> float:
    """Signal to quantization noise over all arrays, in decibels: 10 log10(sum r**2 / sum (r - f)**2)."""
    signal = sum(float(np.square(r, dtype=np.float64).sum()) for r in reference)
    noise = sum(
        float(np.square(np.subtract(r, f, dtype=np.float64)).sum())
        for r, f in zip(reference, found, strict=True)
    )
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0.0 else -math.inf


class Reference:
    """A float model's outputs, to compare quantized ones with.

    Args:
        model: from ``prepare``.
        samples: held in memory.
        threads: for ONNX Runtime; 0 leaves the choice to it.

    Raises:
        CalibrationError: no samples, or a sample that does not fit the model.
    """

    def __init__(self, model: ModelProto, samples: Iterable[Mapping[str, Array]], threads: int) -> None:
        expected = signature(model)
        self._threads = threads
        self._feeds: list[dict[str, Array]] = []
        for position, sample in enumerate(samples):
            check(sample, expected, position)
            self._feeds.extend(rows(sample, expected))
        if not self._feeds:
            raise CalibrationError(
                "there are no samples to compare on",
                "the harm of quantization is measured on real inputs",
                "give at least one sample",
            )
        self._outputs = self._run(model)

    def sqnr_db(self, model: ModelProto) -> float:
        """Signal to quantization noise of ``model``'s float outputs, in decibels."""
        return sqnr_db(self._outputs, self._run(model))

    def _run(self, model: ModelProto) -> list[Array]:
        session = open_session(model, self._threads)
        found: list[Array] = []
        for feed in self._feeds:
            outputs = session.run(None, feed)
            found.extend(value for value in outputs if np.issubdtype(value.dtype, np.floating))
        return found
