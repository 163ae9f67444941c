"""Tensors that a runtime never stores: what a ReLU or Clip alone reads.

ONNX Runtime and TensorRT compute the activation in the operator before it, so no integers are made of the
tensor between the two, and what the activation cuts off, nobody sees. Such a tensor takes the range of the
activation's result: it needs no look of its own, which would keep the two apart.
"""

from __future__ import annotations

from collections.abc import Collection

from calibration.graph import Index
from calibration.layouts import MERGED


def merged_tensors(index: Index, quantized: Collection[str]) -> dict[str, str]:
    """The float tensors that only an activation reads, each with the result that stands for it.

    Args:
        index: of a prepared model.
        quantized: tensors that some target quantizes; they are left out.
    """
    follows = {}
    for name in index.producer:
        reader = index.sole_reader(name)
        if reader is None or name in quantized or reader.op_type not in MERGED:
            continue
        result = reader.output[0]
        if reader.input[0] == name and index.is_float_activation(name) and index.is_float_activation(result):
            follows[name] = result
    return {name: _end(name, follows) for name in follows}


def _end(name: str, follows: dict[str, str]) -> str:
    while name in follows:
        name = follows[name]
    return name
