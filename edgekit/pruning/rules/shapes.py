"""Operators that arrange a tensor's elements anew."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgekit.pruning.axes import PLAIN, Axis
from edgekit.pruning.rules.layers import tiled
from edgekit.pruning.rules.registry import axis_list, broadcast, rule, unknown, wrap
from edgekit.pruning.trace import Call, Tracer


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "pixel_unshuffle", "view_copy")
def _view(tracer: Tracer, call: Call) -> Any:
    tensor = call.tensors()[0]
    return [tracer.reshape(tracer.axes(tensor), tensor.shape, call.result.shape)]


@rule("as_strided")
def _as_strided(tracer: Tracer, call: Call) -> Any:
    """Only the memory's order may change."""
    tensor = call.tensors()[0]
    return [tracer.axes(tensor)] if tensor.shape == call.result.shape else unknown(tracer, call)


@rule("unsqueeze", "squeeze")
def _ones(tracer: Tracer, call: Call) -> Any:
    """Only axes of size 1 come or go: the others keep their order."""
    tensor = call.tensors()[0]
    kept = iter([axis for axis, size in zip(tracer.axes(tensor), tensor.shape, strict=True) if size != 1])
    return [tuple(PLAIN if size == 1 else next(kept) for size in call.result.shape)]


@rule("permute")
def _permute(tracer: Tracer, call: Call) -> Any:
    tensor = call.tensors()[0]
    axes = tracer.axes(tensor)
    return [tuple(axes[axis] for axis in call.arguments["dims"])]


@rule("t")
def _t(tracer: Tracer, call: Call) -> Any:
    return [tuple(reversed(tracer.axes(call.tensors()[0])))]


@rule("transpose")
def _transpose(tracer: Tracer, call: Call) -> Any:
    axes = list(tracer.axes(call.tensors()[0]))
    one, two = (wrap(int(call.arguments[name]), len(axes)) for name in ("dim0", "dim1"))
    axes[one], axes[two] = axes[two], axes[one]
    return [tuple(axes)]


@rule("expand")
def _expand(tracer: Tracer, call: Call) -> Any:
    return [broadcast(tracer, call.tensors(), call.result.shape)]


@rule("repeat")
def _repeat(tracer: Tracer, call: Call) -> Any:
    tensor, counts = call.tensors()[0], call.arguments["repeats"]
    new = len(counts) - tensor.dim()
    axes = [tiled(axis, n) for axis, n in zip(tracer.axes(tensor), counts[new:], strict=True)]
    return [(*([PLAIN] * new), *axes)]


@rule("cat", "concat")
def _cat(tracer: Tracer, call: Call) -> Any:
    tensors = [tensor for tensor in call.tensors() if tensor.dim() == call.result.dim()]
    along = wrap(int(call.arguments["dim"]), call.result.dim())
    made = []
    for i in range(call.result.dim()):
        axes = [tracer.axes(tensor)[i] for tensor in tensors]
        if i != along:
            made.append(tracer.tie(axes, call.result.shape[i]))
            continue
        for axis in axes:
            tracer.splits.spoils(axis)
        if all(axis.labels is None for axis in axes):
            made.append(PLAIN)
            continue
        parts = [
            np.zeros(tensor.shape[i], np.int64) if axis.labels is None else axis.labels
            for axis, tensor in zip(axes, tensors, strict=True)
        ]
        made.append(Axis(np.concatenate(parts)))
    return [tuple(made)]


@rule("stack")
def _stack(tracer: Tracer, call: Call) -> Any:
    tensors = call.tensors()
    along = wrap(int(call.arguments["dim"]), call.result.dim())
    axes = list(broadcast(tracer, tensors, tensors[0].shape))
    return [(*axes[:along], PLAIN, *axes[along:])]


@rule("split", "split_with_sizes", "split_copy")
def _split(tracer: Tracer, call: Call) -> Any:
    tensor = call.tensors()[0]
    axes = tracer.axes(tensor)
    along = wrap(int(call.arguments["dim"]), tensor.dim())
    axis = axes[along]
    sizes = [part.shape[along] for part in call.result]
    tracer.splits.spoils(axis)
    if axis.labels is not None and len(sizes) > 1:
        tracer.sight((axis,), (tensor.shape[along],))
        if len(set(sizes)) == 1:
            rows = axis.labels.reshape(len(sizes), -1)
            tracer.labels.tie(rows, rows[:1])
            tracer.sight((Axis(rows[0]),), (sizes[0],))
        else:
            tracer.pin(axis, "it is split into unequal parts")
    made, start = [], 0
    for size in sizes:
        part = axis if axis.labels is None else Axis(axis.labels[start : start + size])
        made.append((*axes[:along], part, *axes[along + 1 :]))
        start += size
    return made


@rule("glu")
def _glu(tracer: Tracer, call: Call) -> Any:
    """One half gates the other."""
    tensor = call.tensors()[0]
    axes = list(tracer.axes(tensor))
    along = wrap(int(call.arguments["dim"]), tensor.dim())
    labels = axes[along].labels
    if labels is not None:
        halves = labels.reshape(2, -1)
        tracer.labels.tie(halves[0], halves[1])
        axes[along] = Axis(halves[0])
    return [tuple(axes)]


@rule("slice", "narrow")
def _slice(tracer: Tracer, call: Call) -> Any:
    tensor = call.tensors()[0]
    axes = list(tracer.axes(tensor))
    along = wrap(int(call.arguments["dim"]), tensor.dim())
    size, length = tensor.shape[along], call.result.shape[along]
    start, labels = int(call.arguments.get("start") or 0), axes[along].labels
    if length == size:
        return [tuple(axes)]
    tracer.splits.spoils(axes[along])
    parts = length and size % length == 0 and start % length == 0 and call.arguments.get("step", 1) == 1
    if labels is not None and parts:  # a half, a third...
        rows = labels.reshape(-1, length)
        tracer.labels.tie(rows, rows[:1])
        axes[along] = Axis(rows[start // length])
    else:
        tracer.pin(axes[along], "the code takes a part of it")
        axes[along] = PLAIN
    return [tuple(axes)]


@rule("select", "unbind")
def _select(tracer: Tracer, call: Call) -> Any:
    tensor = call.tensors()[0]
    axes = list(tracer.axes(tensor))
    along = wrap(int(call.arguments["dim"]), tensor.dim())
    tracer.pin(axes[along], "the code picks from it by number")
    kept = tuple(axes[:along] + axes[along + 1 :])
    return [kept] * (len(call.result) if isinstance(call.result, (list, tuple)) else 1)


@rule("constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad2d", "replication_pad1d")
@rule("flip", "roll", "index_add", "index_copy", "unfold", "cumprod", "tril", "triu", "replication_pad3d")
def _unmoved(tracer: Tracer, call: Call) -> Any:
    """Axes that keep their size, and are not among those that the operator works along, pass through."""
    tensor = call.tensors()[0]
    axes = tracer.axes(tensor)
    moved = _moved(call, tensor.dim())
    made = [PLAIN] * call.result.dim()
    for i, axis in enumerate(axes):
        if i in moved or call.result.shape[i] != tensor.shape[i]:
            tracer.pin(axis, f"{call.name} works along it")
        else:
            made[i] = axis
    if call.name.startswith("index"):
        added = tracer.axes(call.arguments["source"])
        made = [
            PLAIN if i in moved else tracer.tie((axis, other), size)
            for i, (axis, other, size) in enumerate(zip(made, added, tensor.shape, strict=True))
        ]
    return [tuple(made)]


def _moved(call: Call, dims: int) -> list[int]:
    if call.name in ("flip", "roll"):
        return axis_list(call.arguments["dims"], dims)
    if call.name in ("tril", "triu"):
        return [dims - 2, dims - 1]
    along = call.arguments.get("dim", call.arguments.get("dimension"))
    return [] if along is None else [wrap(int(along), dims)]
