"""Operators that pick elements by their indices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.pruning.axes import PLAIN, Axes, Axis
from edgekit.pruning.rules.registry import rule, wrap
from edgekit.pruning.trace import Call, Tracer

if TYPE_CHECKING:
    from torch import Tensor


@rule("index_select")
def _index_select(tracer: Tracer, call: Call) -> Any:
    tensor = call.tensors()[0]
    axes = list(tracer.axes(tensor))
    along = wrap(int(call.arguments["dim"]), tensor.dim())
    index = call.arguments["index"]
    labels = axes[along].labels
    if labels is not None and _repeats(index, tensor.shape[along]):
        axes[along] = Axis(labels[index.numpy()])
    else:
        tracer.pin(axes[along], "its indices are looked up")
        axes[along] = PLAIN
    return [tuple(axes)]


def _repeats(index: Tensor, size: int) -> bool:
    """Whether an index repeats every entry of an axis equally often, in order (``repeat_interleave``)."""
    times = len(index) // size
    return len(index) == size * times and bool((index.numpy() == np.repeat(np.arange(size), times)).all())


@rule("gather", "take_along_dim", "topk", "sort", "scatter", "scatter_add")
def _gather(tracer: Tracer, call: Call) -> Any:
    tensor = call.tensors()[0]
    axes = tracer.axes(tensor)
    results = call.result if isinstance(call.result, (tuple, list)) else [call.result]
    along = wrap(int(call.arguments["dim"]), tensor.dim())
    made = []
    for i, axis in enumerate(axes):
        if i == along or results[0].shape[i] != tensor.shape[i]:
            tracer.pin(axis, "its indices are looked up")
            made.append(PLAIN)
        else:
            made.append(axis)
    if call.name.startswith("scatter") and isinstance(call.arguments.get("src"), type(tensor)):
        for axis in tracer.axes(call.arguments["src"]):
            tracer.pin(axis, "it is scattered")
    return [tuple(made)] * len(results)


@rule("index", "index_put", "_unsafe_index", "_index_put_impl", "_unsafe_index_put")
def _index(tracer: Tracer, call: Call) -> Any:
    tensor = call.arguments["self"]
    axes = tracer.axes(tensor)
    indices = list(call.arguments["indices"])
    indices += [None] * (tensor.dim() - len(indices))
    if any(index is not None and str(index.dtype) == "torch.bool" and index.dim() != 1 for index in indices):
        return _masked(tracer, call, axes)
    for axis, index in zip(axes, indices, strict=False):
        if index is not None:
            tracer.pin(axis, "its indices are looked up")
    kept = [axis for axis, index in zip(axes, indices, strict=True) if index is None]
    places = [i for i, index in enumerate(indices) if index is not None]
    width = max(index.dim() for index in indices if index is not None)
    adjacent = places == list(range(places[0], places[-1] + 1))
    start = places[0] if adjacent else 0
    picked = (*kept[:start], *([PLAIN] * width), *kept[start:])
    if "put" not in call.name:
        return [picked if len(picked) == call.result.dim() else [PLAIN] * call.result.dim()]
    values = call.arguments["values"]
    if values.dim() and len(picked) >= values.dim():
        for back in range(1, values.dim() + 1):
            if values.shape[-back] != 1:
                tracer.tie((picked[-back], tracer.axes(values)[-back]), values.shape[-back])
    return [axes]


def _masked(tracer: Tracer, call: Call, axes: Axes) -> Any:
    mask = next(index for index in call.arguments["indices"] if index is not None)
    for axis in axes[: mask.dim()]:
        tracer.pin(axis, "a mask picks from it")
    if "put" in call.name:
        for axis in axes:
            tracer.pin(axis, "a mask picks from it")
        return [axes]
    return [(PLAIN, *axes[mask.dim() :])]
