"""SmoothQuant: outliers of activations move into the weights that read them.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
ICML 2023 (arXiv 2211.10438). A channel is divided by s = a^alpha / w^(1 - alpha), where a is the largest
activation and w the largest weight of the channel, and the weights that read it are multiplied by s. The
float function stays the same up to rounding.

The division goes into what makes the channel: a LayerNormalization's gain, a layer's weight (query, key and
value share the one before them). Where another operator reads the channel too, as the residual Add of a
post-norm transformer, or where a GELU makes it, a Mul is put before the MatMuls instead. Alpha is searched
for each tensor; 0 noise gained means that the tensor is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, TensorProto, helper

from calibration.affine import Floats, weight_s8
from calibration.graph import Array, Index, replace_nodes
from calibration.methods.layers import Editor, Site, is_layer, to_groups
from calibration.methods.links import Link, Reader, bounded, links, multiply_inputs, scale
from calibration.methods.rows import Row, Taps
from calibration.targets import Target

ALPHAS = (0.35, 0.5, 0.65, 0.8, 1.0)
#: The predicted noise has to fall to this share where nothing is added to the graph, and where a Mul is.
_WORTH_SCALING, _WORTH_INSERTING = 0.9, 0.7


@dataclass
class _Seen:
    """What was seen of the channels that a layer reads: [channels] each."""

    lo: Floats
    hi: Floats
    squares: Floats
    positions: int

    def add(self, values: Floats) -> None:
        """Take in values [positions, channels]."""
        self.lo = np.minimum(self.lo, values.min(axis=0))
        self.hi = np.maximum(self.hi, values.max(axis=0))
        self.squares = self.squares + np.square(values).sum(axis=0)
        self.positions += len(values)


@dataclass(frozen=True)
class _Place:
    """Where channels can be smoothed: at a link, or by a Mul before some readers of one tensor."""

    link: Link | None
    readers: tuple[Reader, ...]


def smooth(model: ModelProto, rows: Sequence[Row], target: Target, threads: int = 0) -> ModelProto | None:
    """Smooth every tensor whose quantization noise falls clearly by it.

    Args:
        model: from ``prepare``.
        rows: what the channels' ranges are taken from.
        target: decides how activations are quantized.
        threads: for ONNX Runtime; 0 leaves the choice to it.

    Returns:
        A graph that computes the same function; None where nothing is gained.
    """
    places = list(_places(Index(model)))
    seen = _look(model, places, rows, threads)
    editor = Editor(model)
    changed = False
    for place in places:
        statistics = [seen.get((reader.tensor, reader.axis)) for reader in place.readers]
        if any(found is None for found in statistics):
            continue
        factors = _search(editor, place, [found for found in statistics if found is not None], target)
        if factors is None:
            continue
        changed = True
        if place.link is not None:
            scale(editor, place.link, factors)
        else:
            _insert(editor, place.readers, factors)
    if not changed:
        return None
    return editor.finish()


def _places(index: Index) -> Iterator[_Place]:
    linked: set[str] = set()
    for link in links(index):
        yield _Place(link, link.readers)
        linked.update(reader.node for reader in link.readers)
    by_tensor: dict[str, list[Reader]] = {}
    for node in index.graph.node:
        if node.name not in linked and node.op_type in ("MatMul", "Gemm") and is_layer(node, index):
            by_tensor.setdefault(node.input[0], []).append(Reader(node.name, node.input[0], -1, 1))
    for readers in by_tensor.values():
        yield _Place(None, tuple(readers))


def _look(
    model: ModelProto, places: Sequence[_Place], rows: Sequence[Row], threads: int
) -> dict[tuple[str, int], _Seen]:
    """Ranges and squares of the channels of every tensor, one row at a time."""
    wanted = {(reader.tensor, reader.axis) for place in places for reader in place.readers}
    names = sorted({tensor for tensor, _ in wanted})
    found: dict[tuple[str, int], _Seen] = {}
    for tensors in Taps(model, names, threads).over(rows, names) if names else ():
        for tensor, axis in wanted:
            values = _channels_last(tensors[tensor], axis)
            if not len(values):
                continue
            if (tensor, axis) not in found:
                zeros = np.zeros(values.shape[1], np.float32)
                found[tensor, axis] = _Seen(zeros, zeros, zeros, 0)
            found[tensor, axis].add(values)
    return found


def _channels_last(values: Array, axis: int) -> Floats:
    """A tensor as [positions, channels]."""
    moved = np.moveaxis(values.astype(np.float32, copy=False), axis, -1)
    return moved.reshape(-1, moved.shape[-1])


def _search(editor: Editor, place: _Place, seen: Sequence[_Seen], target: Target) -> Floats | None:
    """The factors [channels] that divide the channels with the least predicted noise; None: leave them."""
    weights = [_input_weights(editor, reader) for reader in place.readers]
    largest_weight = np.max(
        [_folded(np.abs(w).max(axis=(1, 3)), r) for w, r in zip(weights, place.readers, strict=True)], axis=0
    )
    largest = np.max(
        [_folded(np.maximum(s.hi, -s.lo), r) for s, r in zip(seen, place.readers, strict=True)], axis=0
    )
    noise = _noise(weights, place.readers, seen, np.ones_like(largest), target)
    best, least = None, noise * (_WORTH_SCALING if place.link is not None else _WORTH_INSERTING)
    for alpha in ALPHAS:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            factors = bounded(largest**alpha / largest_weight ** (1.0 - alpha))
        found = _noise(weights, place.readers, seen, factors, target)
        if found < least:
            best, least = factors, found
    return best


def _input_weights(editor: Editor, reader: Reader) -> Floats:
    return to_groups(editor.nodes[reader.node], editor.read(Site(reader.node, 1)))


def _folded(values: Floats, reader: Reader) -> Floats:
    """The largest of the features that belong to each channel: [channels]."""
    folded: Floats = values.reshape(-1, reader.repeats).max(axis=1)
    return folded


def _noise(
    weights: Sequence[Floats],
    readers: Sequence[Reader],
    seen: Sequence[_Seen],
    factors: Floats,
    target: Target,
) -> float:
    """Predicted squared error of the readers' outputs, where channels are divided by ``factors``.

    Uniform noise of a step's size, step**2 / 12, on activations and weights, without correlation.
    """
    total = 0.0
    for weight, reader, found in zip(weights, readers, seen, strict=True):
        spread = np.repeat(factors, reader.repeats)
        scaled = weight * spread.reshape(weight.shape[0], 1, weight.shape[2], 1)
        lo, hi = float((found.lo / spread).min()), float((found.hi / spread).max())
        step = float(target.activation(lo, hi).scale)
        # Noise is taken relative to the reader's signal: a large output does not outvote the others.
        mean_square = found.squares / max(found.positions, 1)
        power = mean_square.reshape(weight.shape[0], 1, weight.shape[2], 1)
        signal = float((np.square(weight) * power).sum())
        from_input = step**2 * float(np.square(scaled).sum())
        steps = weight_s8(scaled.reshape(scaled.shape[0] * scaled.shape[1], -1), 0).scale
        rescaled = (mean_square / np.square(spread)).reshape(weight.shape[0], -1).sum(axis=1)
        per_output = np.repeat(rescaled * weight.shape[3], weight.shape[1])
        from_weight = float((np.square(steps) * per_output).sum())
        total += (from_input + from_weight) / (12.0 * signal) if signal > 0.0 else 0.0
    return total


def _insert(editor: Editor, readers: Sequence[Reader], factors: Floats) -> None:
    """Put one Mul by 1 / factors before the readers of a tensor, and the factors into their weights."""
    tensor = readers[0].tensor
    smoothed = editor.names.fresh(f"{tensor}_smoothed")
    node = helper.make_node("Mul", [tensor, ""], [smoothed], name=smoothed)
    for reader in readers:
        multiply_inputs(editor, reader.node, factors)
        editor.nodes[reader.node].input[0] = smoothed
    graph = editor.model.graph
    shape = next((v for v in (*graph.value_info, *graph.input) if v.name == tensor), None)
    info = helper.make_tensor_value_info(smoothed, TensorProto.FLOAT, None)
    if shape is not None:
        info.CopyFrom(shape)
        info.name = smoothed
    graph.value_info.append(info)
    first = next(i for i, n in enumerate(graph.node) if n.name in {reader.node for reader in readers})
    nodes = list(graph.node)
    replace_nodes(graph, [*nodes[:first], node, *nodes[first:]])
    editor.refresh()
    editor.write(Site(smoothed, 1), 1.0 / factors)
