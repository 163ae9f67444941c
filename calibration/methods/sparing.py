"""Sparing: layers that hurt much and compute little stay in float.

Quantization noise is not spread as the work is: a detector's last convolution, a squeeze-and-excitation gate
or the first layer may bring half of the noise with a hundredth of the multiply-accumulates. What INT8 would
save there is not worth what it costs. Layers are judged by how far the noise falls at the outputs of the INT8
graph when they alone are back in float, and taken, the most harmful first, while they stay within a small
share of the work.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from onnx import ModelProto

from calibration.layer_sensitivity import Reference
from calibration.methods.rows import Row
from calibration.quantizer import Quantized
from calibration.scales import Scales

#: What the spared layers may have of all multiply-accumulates.
MAX_MACS_FRACTION = 0.02
MAX_LAYERS = 4
#: A layer has to raise the outputs' SQNR by this much when it alone is spared.
_WORTH_DB = 0.15


def spare(
    model: ModelProto,
    scales: Scales,
    layers: Collection[str],
    rows: Sequence[Row],
    quantized_without: Callable[[Sequence[str]], Quantized],
    *,
    threads: int = 0,
    out_of_time: Callable[[], bool] = lambda: False,
) -> tuple[str, ...]:
    """Names of the layers to keep in float, the most harmful first.

    Args:
        model: from ``prepare``.
        scales: its scales, which count each layer's work.
        layers: names of the layers that would be in int8; at least one of them is left there.
        rows: what the noise is measured on.
        quantized_without: the INT8 graph with some layers in float.
        threads: for ONNX Runtime; 0 leaves the choice to it.
        out_of_time: asked before each layer; those after a yes are not tried.
    """
    total = sum(scales.macs.values())
    shares = {name: scales.macs[name] / total for name in layers if name in scales.macs and total}
    small = sorted(name for name, share in shares.items() if share <= MAX_MACS_FRACTION)
    if not small or len(layers) < 2:
        return ()
    reference = Reference(model, rows, threads)
    whole = reference.sqnr_db(quantized_without(()).model)
    gains: dict[str, float] = {}
    for name in small:
        if out_of_time():
            break
        gains[name] = reference.sqnr_db(quantized_without((name,)).model) - whole
    chosen: list[str] = []
    left = MAX_MACS_FRACTION
    for name in sorted(gains, key=lambda name: (-gains[name], name)):
        room = len(chosen) < min(MAX_LAYERS, len(layers) - 1)
        if gains[name] >= _WORTH_DB and shares[name] <= left and room:
            chosen.append(name)
            left -= shares[name]
    return tuple(chosen)
