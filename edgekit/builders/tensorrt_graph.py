"""The graph that a TensorRT builds from, with what it needs beside it.

Up to 8.x flags of the builder say the precision: the graph is a plain float one, with a calibration cache for
int8 and a list of the layers that must not be in it. From 10 on, and for TensorRT-RTX, the graph's own types
and Q/DQ pairs say it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from packaging.version import Version

from edgekit.builders.work import Work
from edgekit.lowering.lower import Refused, lower, prove
from edgekit.lowering.tables import Table, lowest_version
from edgekit.profile import Profile

if TYPE_CHECKING:
    from collections.abc import Mapping

    from onnx import ModelProto

    from calibration import Scales

#: The last TensorRT of the Jetsons that is told precisions by flags is 8.6; strong types came with 9.
_STRONGLY_TYPED_FROM = Version("9")
#: The DLA knew no Q/DQ pairs before 11, which has no flags any more.
_STRONGLY_TYPED_ON_DLA_FROM = Version("11")


@dataclass(frozen=True)
class TensorRtGraph:
    """What a TensorRT builds from.

    Attributes:
        model: the serialized ONNX graph.
        changes: what was rewritten for its parser.
        refused: what its parser does not take; then the graph is of no use to it.
        cache: a calibration cache; empty where there is none.
        precisions: by node; empty where the graph itself says them.
        names: of the nodes, with their operators.
        attention_by_cache: whether TensorRT 8 gets a calibration cache for products of activations.
    """

    model: bytes
    changes: tuple[str, ...]
    refused: tuple[Refused, ...]
    cache: str = ""
    precisions: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    attention_by_cache: bool = False


def make(work: Work, profile: Profile, table: Table, *, on_dla: bool = False) -> TensorRtGraph:
    """Make the graph, and prove with ONNX Runtime that lowering it changed nothing.

    Args:
        work: what to build.
        profile: the device.
        table: what its parser takes.
        on_dla: whether the DLA shall run it, not the GPU alone.

    Raises:
        BadInput: it did.
        CalibrationError: the graph cannot be read.
    """
    version = lowest_version(profile)
    by_flags = profile.runtime.name == "tensorrt" and version < (
        _STRONGLY_TYPED_ON_DLA_FROM if on_dla else _STRONGLY_TYPED_FROM
    )
    scales = _scales(work)
    source = _float_graph(work) if by_flags or work.precision == "fp32" else _typed_graph(work, scales)
    lowered = lower(source, table)
    if lowered.changes and not lowered.refused:
        prove(source, lowered.model, work.examples)
    cache, precisions = "", {}
    if by_flags and scales is not None:
        from calibration import layer_precisions, write_cache

        cache = write_cache(source, scales, _three(version))
        precisions = dict(layer_precisions(source, scales, exclude=work.in_float))
    elif by_flags and work.precision == "fp16":
        precisions = dict.fromkeys(work.in_float, "fp32")
    return TensorRtGraph(
        bytes(lowered.model.SerializeToString()),
        lowered.changes,
        lowered.refused,
        cache,
        _inherited(lowered.model, precisions),
        {node.name: node.op_type for node in lowered.model.graph.node},
        attention_by_cache=bool(cache) and version < _STRONGLY_TYPED_FROM and _multiplies_activations(source),
    )


def _scales(work: Work) -> Scales | None:
    from calibration import load

    return None if work.scales is None else load(work.scales)


def _float_graph(work: Work) -> ModelProto:
    """Prepared as calibration does, so that nodes and tensors have the names that cache and list speak of."""
    from calibration import prepare

    return prepare(work.plain)


def _typed_graph(work: Work, scales: Scales | None) -> ModelProto:
    """A graph whose types say the precision; what stays in float of an int8 graph is float16."""
    from calibration import load_model, quantize

    if scales is None:
        return load_model(work.graph)
    return quantize(_float_graph(work), scales, "tensorrt-fp16", exclude=work.in_float).model


def _multiplies_activations(model: ModelProto) -> bool:
    from calibration.graph import Index

    index = Index(model)
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    return any(all(map(index.is_float_activation, node.input)) for node in products)


def _inherited(model: ModelProto, precisions: Mapping[str, str]) -> dict[str, str]:
    """Precisions of the lowered nodes; those that stand for another one are named ``OTHER/Operator``."""
    found = {}
    for node in model.graph.node:
        precision = precisions.get(node.name) or precisions.get(node.name.rpartition("/")[0])
        if precision is not None:
            found[node.name] = precision
    return found


def _three(version: Version) -> tuple[int, int, int]:
    return version.major, version.minor, version.micro
