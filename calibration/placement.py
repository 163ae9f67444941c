"""Placement: which operators of a graph run in int8, and at which tensors Q/DQ pairs stand."""

from __future__ import annotations

from collections.abc import Iterable

from onnx import ModelProto, NodeProto

from calibration.eligibility import reason_to_keep
from calibration.errors import CalibrationError
from calibration.graph import LINEAR, RECURRENT, Index, subgraphs, walk_graphs
from calibration.layouts import Placement, integer_islands, quantized_inputs
from calibration.targets import TARGETS, Target


def place(model: ModelProto, target: Target, exclude: Iterable[str] = ()) -> Placement:
    """Decide what is quantized in a prepared model.

    Args:
        model: from ``prepare``.
        target: the runtime.
        exclude: names of linear nodes to keep in float.

    Raises:
        CalibrationError: ``exclude`` names a node that is not there, or the only linear operators are
            inside If, Loop or Scan bodies.
    """
    index = Index(model)
    excluded = _check_exclude(model, frozenset(exclude))
    kept: dict[str, str] = {}
    linear: list[NodeProto] = []
    for node in model.graph.node:
        if node.op_type in LINEAR:
            reason = reason_to_keep(node, index, target, excluded)
            if reason is None:
                linear.append(node)
            else:
                kept[node.name] = reason
        elif node.op_type in RECURRENT:
            kept[node.name] = f"{node.op_type} runs over time steps"
    kept.update(_inside_bodies(model))
    layout = integer_islands if target.ends_in_integers else quantized_inputs
    return layout(index, linear, kept)


def observed_tensors(model: ModelProto) -> frozenset[str]:
    """Every tensor that some target would quantize: their ranges have to be finite."""
    found: set[str] = set()
    for target in TARGETS.values():
        found.update(place(model, target).tensors.values())
    return frozenset(found)


def _check_exclude(model: ModelProto, exclude: frozenset[str]) -> frozenset[str]:
    unknown = sorted(exclude - {node.name for node in model.graph.node})
    if unknown:
        raise CalibrationError(
            f"there is no node {unknown[0]!r} to exclude",
            "nodes are named as in the prepared model",
            "take the names from the report's quantized and kept_float lists",
        )
    return exclude


def _inside_bodies(model: ModelProto) -> dict[str, str]:
    found = {}
    for node in model.graph.node:
        for body in subgraphs(node):
            for graph in walk_graphs(body):
                for i, inner in enumerate(graph.node):
                    if inner.op_type in LINEAR | RECURRENT:
                        name = f"{node.name}/{inner.name or f'{inner.op_type}_{i}'}"
                        found[name] = f"inside the body of a {node.op_type}"
    return found
