"""Bias correction: the mean error of every output channel goes into the bias.

Rounding and clipping move the mean of a channel, and what follows adds the same error at every position.
Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019
(arXiv 1906.04721), section 4.2 and appendix D: the empirical form, layer by layer in the order of the
graph, each measured with the layers before it corrected.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, TensorProto, helper

from calibration.affine import Floats
from calibration.graph import Array, Index, drop_unused_constants, outer_reads
from calibration.methods.layers import Editor, Site, bias_site, is_layer, outputs_of
from calibration.methods.rows import Row, Taps
from calibration.storage import copied


@dataclass(frozen=True)
class _Layer:
    """A layer whose bias is corrected.

    Attributes:
        name: its name.
        site: where the bias is; the node there makes the tensor that is measured.
        axis: of the output channels in that tensor.
        feed: name of the input that stands for the bias while it is sought.
    """

    name: str
    site: Site
    axis: int
    feed: str


def correct_biases(
    model: ModelProto,
    quantized: ModelProto,
    layers: Collection[str],
    rows: Sequence[Row],
    *,
    reference: ModelProto | None = None,
    threads: int = 0,
) -> ModelProto | None:
    """Give each layer the bias with which its INT8 outputs have the mean of the float outputs.

    Args:
        model: the float graph that ``quantized`` was made from.
        quantized: the Q/DQ graph.
        layers: names of the layers that are in int8.
        rows: what the means are taken over.
        reference: the graph whose means are right, with the same node names; None: ``model``.
        threads: for ONNX Runtime; 0 leaves the choice to it.

    Returns:
        ``model`` with other biases; None where no layer has a place for one.
    """
    editor = Editor(model)
    found = list(_layers(Index(model), editor, layers))
    if not found:
        return None
    biases = {layer.name: _bias(editor, layer) for layer in found}
    wanted = _Means(reference or model, found, threads).over(rows, found, {})
    free = _Means(_with_free_biases(quantized, found), found, threads)
    for level in _levels(model, found):
        feed = {layer.feed: biases[layer.name] for layer in found}
        means = free.over(rows, level, feed)
        for layer in level:
            error = (wanted[layer.name] - means[layer.name]).reshape(biases[layer.name].shape)
            biases[layer.name] = (biases[layer.name] + error).astype(np.float32)
    for layer in found:
        editor.write(layer.site, biases[layer.name])
    return editor.finish()


def _layers(index: Index, editor: Editor, names: Collection[str]) -> Iterator[_Layer]:
    for node in index.graph.node:
        site = bias_site(node, index) if node.name in names and is_layer(node, index) else None
        if site is not None:
            axis = 1 if node.op_type == "Conv" else -1
            yield _Layer(node.name, site, axis, editor.names.fresh(f"{node.name}_bias_sought"))


def _bias(editor: Editor, layer: _Layer) -> Floats:
    """The bias as it is; zeros where there is none yet."""
    if editor.has(layer.site):
        return editor.read(layer.site)
    return np.zeros(outputs_of(editor.nodes[layer.name], editor.read(Site(layer.name, 1))), np.float32)


def _with_free_biases(quantized: ModelProto, layers: Sequence[_Layer]) -> ModelProto:
    """A copy whose biases are inputs, so that one session serves every step."""
    model = copied(quantized)
    nodes = {node.name: node for node in model.graph.node}
    for layer in layers:
        node = nodes[layer.site.node]
        while len(node.input) <= layer.site.slot:
            node.input.append("")
        node.input[layer.site.slot] = layer.feed
        model.graph.input.append(helper.make_tensor_value_info(layer.feed, TensorProto.FLOAT, None))
    drop_unused_constants(model.graph)
    return model


class _Means:
    """Mean of every output channel of some layers."""

    def __init__(self, model: ModelProto, layers: Sequence[_Layer], threads: int) -> None:
        outputs = {node.name: node.output[0] for node in model.graph.node}
        self._tensors = {layer.name: outputs[layer.site.node] for layer in layers}
        self._taps = Taps(model, list(self._tensors.values()), threads)

    def over(
        self, rows: Sequence[Row], layers: Sequence[_Layer], feed: Mapping[str, Array]
    ) -> dict[str, np.ndarray]:
        """Means over all rows and positions, float64 [channels], by layer."""
        names = [self._tensors[layer.name] for layer in layers]
        sums: dict[str, np.ndarray] = {}
        counts: dict[str, int] = {}
        for row in rows:
            tensors = self._taps.run({**row, **feed}, names)
            for layer in layers:
                values = np.moveaxis(tensors[self._tensors[layer.name]], layer.axis, -1)
                values = values.reshape(-1, values.shape[-1])
                sums[layer.name] = sums.get(layer.name, 0.0) + values.sum(axis=0, dtype=np.float64)
                counts[layer.name] = counts.get(layer.name, 0) + len(values)
        return {name: total / max(counts[name], 1) for name, total in sums.items()}


def _levels(model: ModelProto, layers: Sequence[_Layer]) -> list[list[_Layer]]:
    """The layers by how many of them lie before, at most: those of one level do not feed each other."""
    by_node = {layer.site.node: layer for layer in layers}
    depth: dict[str, int] = {}
    levels: dict[int, list[_Layer]] = {}
    for node in model.graph.node:
        below = max((depth.get(name, 0) for name in (*node.input, *outer_reads(node))), default=0)
        if node.name in by_node:
            levels.setdefault(below, []).append(by_node[node.name])
            below += 1
        depth.update(dict.fromkeys(node.output, below))
    return [levels[number] for number in sorted(levels)]
