"""Emission for TensorRT 8.5 and DLA, which quantize implicitly: a calibration cache and layer precisions.

The cache is the text that TensorRT's calibrators write: a line that names the TensorRT version and the
algorithm, then for each tensor ``name: HEX``, the scale (largest magnitude / 127) as the eight hex digits
of a big-endian float32. The plain ONNX graph goes beside it.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping

from calibration.affine import symmetric_s8
from calibration.errors import CalibrationError
from calibration.fp16 import MAX_FP16, to_fp16
from calibration.graph import Index
from calibration.layouts import COPYING, MERGED
from calibration.placement import place
from calibration.prepare import prepare
from calibration.scales import Scales
from calibration.storage import Source
from calibration.targets import TARGETS

ALGORITHM = "EntropyCalibration2"
#: Operators that TensorRT merges into others, or that move integers as they are.
_CARRYING = MERGED | COPYING | {"Concat"}


def write_cache(model: Source, scales: Scales, tensorrt: tuple[int, int, int] = (8, 5, 2)) -> str:
    """The calibration cache of a model.

    Tensors beyond float16's range, such as attention masks, are left out: TensorRT then keeps the layers
    around them in float.

    Args:
        model: the model that was calibrated, or its file; give TensorRT the prepared one, whose tensors are
            named so.
        scales: from ``calibrate``.
        tensorrt: version that will read the cache.

    Returns:
        The text of the cache file, the tensors in order of their names.
    """
    lines = [f"TRT-{_number(*tensorrt)}-{ALGORITHM}"]
    prepared = prepare(model)
    index = Index(prepared)
    roots = place(prepared, TARGETS["tensorrt"]).tensors
    for name in sorted({*index.producer, *index.readers}):
        found = scales.tensors.get(roots.get(name, name))
        if found is None or not index.is_float_activation(name):
            continue
        if max(abs(found.lo), abs(found.hi)) <= MAX_FP16:
            scale = float(symmetric_s8(found.lo, found.hi).scale)
            lines.append(f"{name}: {struct.pack('>f', scale).hex()}")
    return "\n".join(lines) + "\n"


def _number(major: int, minor: int, patch: int) -> int:
    """TensorRT's own number for a version (``NV_TENSORRT_VERSION``), which has a digit more from 10 on."""
    return (major * 10000 if major >= 10 else major * 1000) + minor * 100 + patch


def read_cache(text: str) -> dict[str, float]:
    """Scales by tensor name from a calibration cache.

    Raises:
        CalibrationError: the text is not a calibration cache.
    """
    header, *lines = text.splitlines() or [""]
    if not header.startswith("TRT-"):
        raise _malformed(f"its first line is {header[:40]!r}, not TRT-VERSION-ALGORITHM")
    found = {}
    for line in lines:
        name, separator, digits = line.rpartition(": ")
        try:
            (found[name],) = struct.unpack(">f", bytes.fromhex(digits))
        except (ValueError, struct.error) as error:
            raise _malformed(f"line {line[:60]!r} has no eight hex digits") from error
        if not separator:
            raise _malformed(f"line {line[:60]!r} names no tensor")
    return found


def layer_precisions(model: Source, scales: Scales, *, exclude: Collection[str] = ()) -> Mapping[str, str]:
    """The precision of each operator of the prepared model: ``int8``, ``fp16`` or ``fp32``.

    The operators that the Q/DQ graph for TensorRT quantizes are int8 here too, and so is what only carries
    their integers: a ReLU that was held to fp16 would keep the convolution before it from ending in int8,
    and so all of the network in fp16. The others are fp16. What does not fit float16, by the guard of
    ``to_fp16``, is fp32: TensorRT has no scale for it either (see ``write_cache``).
    """
    prepared = prepare(model)
    placement = place(prepared, TARGETS["tensorrt"], exclude)
    _, report = to_fp16(prepared, scales)
    in_int8 = placement.quantized | placement.joined | _carriers(Index(prepared), placement.tensors)
    return {
        node.name: "fp32" if node.name in report.kept else "int8" if node.name in in_int8 else "fp16"
        for node in prepared.graph.node
    }


def _carriers(index: Index, quantized: Collection[str]) -> frozenset[str]:
    """Names of the activations and copying operators whose result is quantized, there or further on."""
    carriers, tensors = set(), list(quantized)
    while tensors:
        node = index.producer.get(tensors.pop())
        if node is not None and node.op_type in _CARRYING and node.name not in carriers:
            carriers.add(node.name)
            tensors.extend(node.input if node.op_type == "Concat" else node.input[:1])
    return frozenset(carriers)


def _malformed(why: str) -> CalibrationError:
    return CalibrationError(
        "the text is not a TensorRT calibration cache", why, "write it again with write_cache"
    )
