"""Learned rounding: each weight goes up or down as the layer's output asks, not to the nearest integer.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020 (arXiv 2004.10568):
for a layer with inputs x, the rounding with the least E[((Q - W) x)**2] is sought among the two integers
around each weight. That error is (Q - W) H (Q - W)^T with H = E[x x^T], so H is all that is kept of the data.
Where AdaRound relaxes the choice and follows gradients, this goes over the weights one after the other and
takes the better integer of each, given all others (coordinate descent). Every step lowers the error, nothing
is drawn or tuned, and the cost is known beforehand: a few passes over each weight.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto

from calibration.affine import Affine, Floats, dequantize, quantize, weight_s8
from calibration.eligibility import weight_axis
from calibration.graph import Index
from calibration.methods.layers import Editor, Site, from_groups, is_layer, to_groups
from calibration.methods.patches import can_cut, patches
from calibration.methods.rows import Row, Taps
from calibration.scales import Scales
from calibration.targets import Target

#: Passes over each weight; most of what can be gained is gained in the first.
SWEEPS = 3
#: Output positions that one row of data shows of a layer.
POSITIONS_PER_ROW = 64
#: What the H of the layers that are looked at together may take. A layer that needs more keeps the nearest.
MAX_MOMENTS_BYTES = 256 << 20
#: Columns whose error is updated together, as one matrix product.
_BLOCK = 64


@dataclass(frozen=True)
class Quantization:
    """How the graph will be quantized.

    Attributes:
        target: the runtime.
        scales: of the graph.
        roots: each quantized activation with the tensor whose scale it takes.
        weight_levels: largest integer in a weight.
    """

    target: Target
    scales: Scales
    roots: Mapping[str, str]
    weight_levels: int

    def activation(self, tensor: str) -> Affine:
        """How an activation is quantized."""
        found = self.scales.tensors[self.roots[tensor]]
        return self.target.activation(found.lo, found.hi)


@dataclass(frozen=True)
class _Layer:
    """A layer whose weight is rounded.

    Attributes:
        node: it.
        weight: its weight as it is.
        affine: how the weight will be quantized.
        sizes: groups, outputs of a group, inputs of a group times kernel positions.
    """

    node: NodeProto
    weight: Floats
    affine: Affine
    sizes: tuple[int, int, int]

    @property
    def moments_bytes(self) -> int:
        """What H takes: float32 [groups, inputs, inputs]."""
        groups, _, inputs = self.sizes
        return 4 * groups * inputs**2


def round_weights(
    model: ModelProto,
    layers: Collection[str],
    rows: Sequence[Row],
    quantization: Quantization,
    *,
    threads: int = 0,
    out_of_time: Callable[[], bool] = lambda: False,
) -> ModelProto | None:
    """Move each weight onto an integer step of its scale, so that ``quantize`` finds exactly these integers.

    Args:
        model: from ``prepare``.
        layers: names of the layers that will be in int8.
        rows: what the layers' inputs are taken from.
        quantization: the scales and the target that the graph will be quantized with.
        threads: for ONNX Runtime; 0 leaves the choice to it.
        out_of_time: asked before each layer; those after a yes keep the nearest integers.

    Returns:
        ``model`` with other weights; None where no weight leaves its nearest integer.
    """
    editor = Editor(model)
    waiting = list(_layers(editor, layers, quantization))
    taps = Taps(model, [layer.node.input[0] for layer in waiting], threads)
    moved = False
    for part in _parts(waiting):
        if out_of_time():
            break
        moments = _moments(part, taps, rows, quantization)
        for layer in part:
            if not out_of_time():
                moved |= _round(editor, layer, moments.pop(layer.node.name), quantization.weight_levels)
    if not moved:
        return None
    return editor.finish()


def descend(wanted: Floats, moments: Floats, levels: int, sweeps: int = SWEEPS) -> Floats:
    """Integers next to ``wanted`` with a small error (Q - wanted) H (Q - wanted)^T.

    Args:
        wanted: weights in steps of their scale, float32 [groups, outputs, inputs].
        moments: H, float32 [groups, inputs, inputs], symmetric with a positive diagonal.
        levels: the largest integer allowed.
        sweeps: passes over all weights; each step lowers the error, so fewer are never worse than none.

    Returns:
        float32 [groups, outputs, inputs], whole numbers. The largest weight of each output keeps its nearest
        integer, because the scale is made from it.
    """
    lowest, highest = np.clip(np.floor(wanted), -levels, levels), np.clip(np.ceil(wanted), -levels, levels)
    chosen = np.clip(np.rint(wanted), -levels, levels)
    largest = np.abs(wanted).argmax(axis=2)[:, :, None]
    for bound in (lowest, highest):
        np.put_along_axis(bound, largest, np.take_along_axis(chosen, largest, axis=2), axis=2)
    error = chosen - wanted
    for _ in range(sweeps):
        if not _sweep(error, wanted, moments, lowest, highest):
            break
    result: Floats = np.rint(wanted + error)
    return result


def _sweep(error: Floats, wanted: Floats, moments: Floats, lowest: Floats, highest: Floats) -> bool:
    """Give each weight in turn its better integer; ``error`` changes in place. Whether any changed."""
    changed = False
    for start in range(0, wanted.shape[2], _BLOCK):
        block = slice(start, min(start + _BLOCK, wanted.shape[2]))
        gradient = error @ moments[:, :, block]
        for column in range(block.start, block.stop):
            here = column - start
            least = wanted[:, :, column] + error[:, :, column]
            least = least - gradient[:, :, here] / moments[:, None, column, column]
            integer = np.clip(np.rint(least), lowest[:, :, column], highest[:, :, column])
            step = integer - wanted[:, :, column] - error[:, :, column]
            step[np.abs(step) < 0.5] = 0.0  # what is left of a sum of floats, and no change
            if step.any():
                changed = True
                error[:, :, column] += step
                gradient += step[:, :, None] * moments[:, None, column, block]
    return changed


def _layers(editor: Editor, names: Collection[str], quantization: Quantization) -> Iterator[_Layer]:
    index = Index(editor.model)
    for node in index.graph.node:
        if node.name not in names or not is_layer(node, index) or not can_cut(node):
            continue
        if index.sole_reader(node.input[1]) is None:
            continue
        layer = _layer(node, editor, quantization)
        if layer.moments_bytes <= MAX_MOMENTS_BYTES:
            yield layer


def _layer(node: NodeProto, editor: Editor, quantization: Quantization) -> _Layer:
    weight = editor.read(Site(node.name, 1))
    bias = None
    if len(node.input) > 2 and node.input[2] and quantization.target.integer_bias:
        bias = editor.read(Site(node.name, 2)).reshape(-1)
    affine = weight_s8(
        weight,
        weight_axis(node, weight.ndim),
        levels=quantization.weight_levels,
        bias=bias,
        input_scale=float(quantization.activation(node.input[0]).scale),
    )
    groups, outputs, inputs, positions = to_groups(node, weight).shape
    return _Layer(node, weight, affine, (groups, outputs, inputs * positions))


def _parts(layers: Sequence[_Layer]) -> Iterator[list[_Layer]]:
    """Cut the layers, in order, into parts whose moments fit the memory together."""
    part: list[_Layer] = []
    used = 0
    for layer in layers:
        if part and used + layer.moments_bytes > MAX_MOMENTS_BYTES:
            yield part
            part, used = [], 0
        part.append(layer)
        used += layer.moments_bytes
    if part:
        yield part


def _moments(
    layers: Sequence[_Layer], taps: Taps, rows: Sequence[Row], quantization: Quantization
) -> dict[str, Floats]:
    """H of each layer by its name, from its quantized inputs."""
    sums: dict[str, Floats] = {}
    for layer in layers:
        groups, _, inputs = layer.sizes
        sums[layer.node.name] = np.zeros((groups, inputs, inputs), np.float32)
    counts = dict.fromkeys(sums, 0)
    rng = np.random.default_rng(0)
    for tensors in taps.over(rows, [layer.node.input[0] for layer in layers]):
        for layer in layers:
            affine = quantization.activation(layer.node.input[0])
            values = tensors[layer.node.input[0]].astype(np.float32, copy=False)
            seen = dequantize(quantize(values, affine), affine)
            cut = patches(layer.node, seen, layer.weight.shape[2:], POSITIONS_PER_ROW, rng)
            sums[layer.node.name] += np.swapaxes(cut, 1, 2) @ cut
            counts[layer.node.name] += cut.shape[1]
    return {name: _shrunk(total, counts[name]) for name, total in sums.items()}


def _shrunk(total: Floats, positions: int) -> Floats:
    """Off-diagonal moments made smaller, the more so the fewer positions they rest on.

    Few positions show correlations that other data do not have; with none left, the nearest integer is best.
    """
    inputs = total.shape[-1]
    moments: Floats = total * np.float32(positions / (positions + inputs))
    diagonal = np.einsum("gii->gi", total)
    floor = np.maximum(1e-6 * diagonal.mean(axis=1, keepdims=True), np.finfo(np.float32).tiny)
    moments[:, np.arange(inputs), np.arange(inputs)] = np.maximum(diagonal, floor)
    return moments


def _round(editor: Editor, layer: _Layer, moments: Floats, levels: int) -> bool:
    """Write the chosen integers times their scale; whether any differs from the nearest."""
    groups, outputs, _ = layer.sizes
    scale = np.broadcast_to(layer.affine.scale, (groups * outputs,)).reshape(groups, outputs, 1)
    grouped = to_groups(layer.node, layer.weight).reshape(layer.sizes)
    wanted = grouped / scale
    chosen = descend(wanted, moments, levels)
    nearest = np.clip(np.rint(wanted), -levels, levels)
    if np.array_equal(chosen, nearest):
        return False
    values = (chosen * scale).reshape(to_groups(layer.node, layer.weight).shape)
    editor.write(Site(layer.node.name, 1), from_groups(layer.node, values, layer.weight))
    return True
