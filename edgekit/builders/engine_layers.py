"""The layers of an engine, from what the builder of TensorRT-RTX lists while it builds.

TensorRT's engine inspector tells the same of an engine that was loaded, and loading needs the GPU. The
builder lists the layers (``ProfilingVerbosity.DETAILED``) in the inspector's own words, a line each:

    Name: N, LayerType: T, Inputs: [ {..., Datatype: D}], Constants: [...], Outputs: [...], ..., Metadata: M

The layers are those of the built engine, fused and with their types. Which kernels run is not among it: RTX
chooses these on the GPU, when the engine first runs there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_LINE = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: \[.*?\], "
    r"Outputs: \[(?P<outputs>.*?)\], \w+: .*?Metadata: ?(?P<nodes>.*)"
)
_DATATYPE = re.compile(r"Datatype: (\w+)")
_NODE = re.compile(r"\[ONNX Layer: (.*?)\]")
_NAMES = {"Float": "fp32", "Half": "fp16", "BFloat16": "bf16"}


@dataclass(frozen=True)
class EngineLayer:
    """A layer of an engine.

    Attributes:
        name: TensorRT's.
        kind: TensorRT's word for it, such as ``gemm``, ``correlation`` or, for generated code, ``kgen``.
        inputs: types of its inputs, each once, without its weights; such as ``int8``.
        outputs: types of its outputs, each once.
        nodes: of the ONNX graph, which were fused into it.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]


def read(listing: str) -> tuple[EngineLayer, ...] | None:
    """Layers of a listing that begins with the line ``Layers:``; None: it is not in this form."""
    first, *lines = listing.split("\n\n")[0].splitlines() or [""]
    matches = [_LINE.fullmatch(line) for line in lines]
    if first != "Layers:" or not matches or not all(matches):
        return None
    return tuple(
        EngineLayer(
            match["name"],
            match["kind"],
            _types(match["inputs"]),
            _types(match["outputs"]),
            tuple(_NODE.findall(match["nodes"])),
        )
        for match in matches
        if match is not None
    )


def _types(tensors: str) -> tuple[str, ...]:
    found = dict.fromkeys(_DATATYPE.findall(tensors))
    return tuple(_NAMES.get(name, name.lower()) for name in found)
