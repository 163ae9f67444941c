"""Shapes that are known before a model runs, for a row of batch 1."""

from __future__ import annotations

from onnx import ModelProto

from calibration.graph import dims, model_inputs
from calibration.samples import signature

Shape = tuple[int, ...]


def row_shapes(model: ModelProto) -> dict[str, Shape]:
    """The shape of each tensor that does not depend on the data, when one row runs alone.

    Args:
        model: from ``prepare``, so its shapes are inferred.
    """
    batch = _batch_symbols(model)
    found: dict[str, Shape] = {}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.HasField("shape"):
            sizes = [1 if size in batch else size for size in dims(value)]
            known = tuple(size for size in sizes if isinstance(size, int))
            if len(known) == len(sizes):
                found[value.name] = known
    return found


def _batch_symbols(model: ModelProto) -> set[str]:
    """The symbols of the axis along which rows are cut."""
    axes = signature(model).batch_axes or {}
    shapes = {value.name: dims(value) for value in model_inputs(model)}
    symbols = (shapes[name][axis] for name, axis in axes.items())
    return {symbol for symbol in symbols if isinstance(symbol, str)}
