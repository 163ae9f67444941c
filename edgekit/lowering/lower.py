"""Rewriting a graph for a parser, and proving that it still computes the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx.version_converter
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from calibration.graph import Names, model_inputs, opset, rename_reads, replace_nodes, walk_graphs
from edgekit import ort
from edgekit.errors import BadInput
from edgekit.lowering.opsets import OpsetError, to_opset
from edgekit.lowering.restrictions import refusal
from edgekit.lowering.rules import RULES
from edgekit.lowering.tables import Table
from edgekit.lowering.view import View
from edgekit.tensors import Arrays

#: The IR version that came with opset 17's tools; 8.5's parser reads no newer files.
_IR_VERSION = 8
#: Per-channel Q/DQ exists from here on.
_MODERN_OPSET = 13
#: Float rounding in another order of operations; a wrong rewrite is off by far more.
TOLERANCE_FRACTION = 1e-4


@dataclass(frozen=True)
class Refused:
    """A node that a parser does not take, and why; ``node`` is its name or its first output."""

    node: str
    op_type: str
    why: str


@dataclass(frozen=True)
class Lowered:
    """A graph for a parser.

    Attributes:
        model: the graph; the given one, where nothing had to change.
        changes: what was rewritten, in words.
        refused: what the parser still does not take; empty: all of it.
    """

    model: ModelProto
    changes: tuple[str, ...]
    refused: tuple[Refused, ...]


def refusals(model: ModelProto, table: Table) -> tuple[Refused, ...]:
    """The nodes that a parser does not take, bodies of If, Loop and Scan included."""
    view = View(model)
    found = []
    for graph in walk_graphs(model.graph):
        for node in graph.node:
            why = refusal(node, table, view)
            if why is not None:
                found.append(Refused(node.name or node.output[0], node.op_type, why))
    if opset(model) < table.lowest_opset:
        found.append(Refused("the graph", "opset", f"it reads opset {table.lowest_opset} and newer"))
    if opset(model) > table.highest_opset:
        found.append(Refused("the graph", "opset", f"it reads opset {table.highest_opset} and older"))
    return tuple(found)


def lower(model: ModelProto, table: Table) -> Lowered:
    """Rewrite what a parser does not take, as far as there are rules; the given model is not changed."""
    return lower_shaped(model, with_shapes(model), table)


def lower_shaped(model: ModelProto, shaped: ModelProto, table: Table) -> Lowered:
    """As ``lower``, with what ``with_shapes`` made of the model: once for all tables, as it takes a while."""
    lowered = onnx.ModelProto()
    lowered.CopyFrom(shaped)
    lowered, changes = _old_enough(lowered, table)
    if changes:
        lowered = with_shapes(lowered)
    changes += _rewrite(lowered, table)
    refused: tuple[Refused, ...] = ()
    if opset(lowered) > table.highest_opset:
        before = opset(lowered)
        try:
            respelt = to_opset(lowered, table.highest_opset)
            spelt = f", {', '.join(respelt)} spelt as it was then" if respelt else ""
            changes.append(f"opset {before} brought down to {table.highest_opset}{spelt}")
        except OpsetError as error:
            refused = (Refused("the graph", "opset", str(error)),)
    if not table.int64:
        changes += _narrow(lowered)
    if table.highest_opset <= 17:
        lowered.ir_version = min(lowered.ir_version, _IR_VERSION)
    remaining = refused or refusals(lowered, table)
    return Lowered(lowered if changes else model, tuple(changes), remaining)


def prove(model: ModelProto, lowered: ModelProto, examples: Sequence[Arrays]) -> float:
    """Run both with ONNX Runtime; see ``prove_answers``."""
    original = ort.Session(_serialized(model))
    return prove_answers([original.run(example) for example in examples], lowered, examples)


def prove_answers(wanted: Sequence[Arrays], lowered: ModelProto, examples: Sequence[Arrays]) -> float:
    """Run a lowered graph with ONNX Runtime, beside what the original answers to the examples.

    Returns:
        The largest difference of an output, as a share of the output's largest value.

    Raises:
        BadInput: they differ, which is a mistake of a rule and no fault of the model.
    """
    other = ort.Session(_serialized(lowered))
    worst = 0.0
    for example, want in zip(examples, wanted, strict=True):
        got = other.run(_as_wanted(lowered, example))
        worst = max([worst, *(_difference(got[name], value) for name, value in want.items())])
    if not worst <= TOLERANCE_FRACTION:
        raise BadInput(
            "the lowered graph does not compute the same",
            f"an output differs by {worst:.2g} of its largest value",
            "report this; meanwhile choose a profile with a newer runtime",
        )
    return worst


def _old_enough(model: ModelProto, table: Table) -> tuple[ModelProto, list[str]]:
    """Bring a model that is older than the parser reads up to date, where ONNX itself can."""
    before = opset(model)
    if before >= table.lowest_opset:
        return model, []
    try:
        newer = onnx.version_converter.convert_version(model, _MODERN_OPSET)
    except (onnx.version_converter.ConvertError, RuntimeError):  # the old opset is then refused by name
        return model, []
    return newer, [f"opset {before} brought up to {_MODERN_OPSET}"]


def _rewrite(model: ModelProto, table: Table) -> list[str]:
    """Apply the rules to every node that the parser refuses; one pass, because rules end in old operators."""
    view = View(model)
    counts: Counter[str] = Counter()
    for graph in walk_graphs(model.graph):
        nodes: list[NodeProto] = []
        for node in graph.node:
            made = _rewritten(node, table, view)
            counts.update([node.op_type] if made is not None else [])
            nodes.extend([node] if made is None else made)
        replace_nodes(graph, nodes)
    model.graph.initializer.extend(view.added)
    return [f"{name} taken apart ({count})" for name, count in sorted(counts.items())]


def _rewritten(node: NodeProto, table: Table, view: View) -> list[NodeProto] | None:
    rule = RULES.get(node.op_type)
    if rule is None or refusal(node, table, view) is None:
        return None
    return rule(node, view)


def _narrow(model: ModelProto) -> list[str]:
    """32-bit inputs, and constants that fit 32 bits: what a parser without int64 makes of them anyway."""
    changes = []
    names = Names(model)
    for value in model_inputs(model):
        kind = value.type.tensor_type
        if kind.elem_type == TensorProto.INT64:
            wide = names.fresh(f"{value.name}_int64")
            rename_reads(model.graph.node, value.name, wide)
            cast = onnx.helper.make_node("Cast", [value.name], [wide], name=wide, to=TensorProto.INT64)
            model.graph.node.insert(0, cast)
            kind.elem_type = TensorProto.INT32
            changes.append(f"input {value.name} is int32")
    limits = np.iinfo(np.int32)
    for graph in walk_graphs(model.graph):
        for tensor in graph.initializer:
            if tensor.data_type == TensorProto.INT64:
                values = numpy_helper.to_array(tensor)
                cut = np.clip(values, limits.min, limits.max)
                if (cut != values).any():
                    tensor.CopyFrom(numpy_helper.from_array(cut, tensor.name))
                    changes.append(f"constant {tensor.name} cut to 32 bits")
    return changes


def with_shapes(model: ModelProto) -> ModelProto:
    """The model without functions of its own, and with the shapes and types that can be inferred."""
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError):
        return model


def _serialized(model: ModelProto) -> bytes:
    return bytes(model.SerializeToString())


def _as_wanted(model: ModelProto, example: Arrays) -> dict[str, Any]:
    wanted: Mapping[str, Any] = {
        value.name: onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        for value in model_inputs(model)
    }
    return {name: array.astype(wanted[name]) for name, array in example.items() if name in wanted}


def _difference(got: np.ndarray[Any, Any], want: np.ndarray[Any, Any]) -> float:
    if got.shape != want.shape:
        return float("inf")
    largest = max(float(np.abs(want.astype(np.float64)).max(initial=0)), 1e-6)
    return float(np.abs(got.astype(np.float64) - want.astype(np.float64)).max(initial=0)) / largest
