"""Links: two ends of a tensor at which its channels can be scaled against each other.

A channel can be divided by a positive number where it is made and multiplied by it where it is read, if
everything between is positively homogeneous (f(s x) = s f(x) for s > 0): linear operators, ReLU, pooling.
ReLU6 is not, GELU and SiLU are not, and a residual Add reads a channel that another branch makes too; links
end there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto

from calibration.affine import Floats
from calibration.graph import Index, dims, integer
from calibration.methods.layers import Editor, Site, bias_site, from_groups, is_layer, to_groups

_ELEMENTWISE = frozenset({"Relu", "LeakyRelu"})
_POOLS = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"})
_CHANNEL_NORMS = frozenset({"BatchNormalization", "InstanceNormalization"})
#: A scale leaves this range only for channels that hardly carry anything.
MAX_SCALE = 1e4


@dataclass(frozen=True)
class Reader:
    """A layer that reads the channels.

    Attributes:
        node: its name.
        tensor: what it reads.
        axis: of the channels in that tensor, 1 or -1.
        repeats: how many consecutive input features belong to a channel: more than 1 behind a Flatten.
    """

    node: str
    tensor: str
    axis: int
    repeats: int


@dataclass(frozen=True)
class Link:
    """Where channels are made and read.

    Attributes:
        weight: the weight whose output channels they are; None where a normalization makes them.
        vectors: constants with one value a channel that scale with them: biases, gains, shifts.
        readers: the layers that read them.
        channels: how many there are.
    """

    weight: Site | None
    vectors: tuple[Site, ...]
    readers: tuple[Reader, ...]
    channels: int


def links(index: Index) -> Iterator[Link]:
    """Every link of a prepared graph, in the order of the graph."""
    for node in index.graph.node:
        made = _maker(node, index)
        if made is None:
            continue
        weight, vectors, output, axis, channels = made
        readers = _readers(output, axis, 1, channels, index)
        if readers:
            yield Link(weight, vectors, tuple(readers), channels)


def scale(editor: Editor, link: Link, factors: Floats) -> None:
    """Divide the channels by ``factors`` [channels] where they are made, multiply where they are read."""
    if link.weight is not None:
        node, weight = editor.nodes[link.weight.node], editor.read(link.weight)
        grouped = to_groups(node, weight)
        rows = factors.reshape(grouped.shape[0], grouped.shape[1], 1, 1)
        editor.write(link.weight, from_groups(node, grouped / rows, weight))
    for site in link.vectors:
        vector = editor.read(site)
        editor.write(site, vector / factors.reshape(vector.shape))
    for reader in link.readers:
        multiply_inputs(editor, reader.node, np.repeat(factors, reader.repeats))


def multiply_inputs(editor: Editor, name: str, factors: Floats) -> None:
    """Multiply a layer's weight by one factor for each input channel."""
    node, site = editor.nodes[name], Site(name, 1)
    weight = editor.read(site)
    grouped = to_groups(node, weight)
    columns = factors.reshape(grouped.shape[0], 1, grouped.shape[2], 1)
    editor.write(site, from_groups(node, grouped * columns, weight))


def bounded(factors: Floats) -> Floats:
    """Factors with geometric mean 1 inside the allowed range; 1 where a factor is not a positive number."""
    usable = np.isfinite(factors) & (factors > 0)
    if not usable.any():
        return np.ones_like(factors)
    logs = np.where(usable, np.log(np.where(usable, factors, 1.0)), 0.0)
    centred = np.where(usable, logs - logs[usable].mean(), 0.0)
    limit = np.log(MAX_SCALE)
    result: Floats = np.exp(np.clip(centred, -limit, limit)).astype(np.float32)
    return result


_Made = tuple[Site | None, tuple[Site, ...], str, int, int]


def _maker(node: NodeProto, index: Index) -> _Made | None:
    """What makes channels at ``node``: weight, vectors, the tensor that bears them, its axis, how many."""
    if is_layer(node, index):
        return _layer_maker(node, index)
    if node.op_type in _CHANNEL_NORMS:
        return _norm_maker(node, (Site(node.name, 1), Site(node.name, 2)), 1, index)
    if node.op_type == "LayerNormalization" and integer(node, "axis", -1) == -1:
        sites = tuple(Site(node.name, slot) for slot in (1, 2) if len(node.input) > slot and node.input[slot])
        return _norm_maker(node, sites, -1, index)
    if node.op_type == "Mul":
        return _gain_maker(node, index)
    return None


def _layer_maker(node: NodeProto, index: Index) -> _Made:
    weight = index.constants[node.input[1]]
    channels = int(weight.dims[0] if _rows_are_outputs(node) else weight.dims[1])
    bias = bias_site(node, index)
    vectors = () if bias is None else (bias,)
    output, axis = node.output[0], 1 if node.op_type == "Conv" else -1
    if node.op_type == "MatMul" and bias is not None:
        output = index.readers[output][0].output[0]
    elif len(node.input) < 3 or not node.input[2]:
        vectors = ()
    return Site(node.name, 1), vectors, output, axis, channels


def _norm_maker(node: NodeProto, sites: tuple[Site, ...], axis: int, index: Index) -> _Made | None:
    if not sites or not all(node.input[site.slot] in index.constants for site in sites):
        return None
    sizes = {tuple(index.constants[node.input[site.slot]].dims) for site in sites}
    if len(sizes) != 1 or len(next(iter(sizes))) != 1:
        return None
    return None, sites, node.output[0], axis, int(next(iter(sizes))[0])


def _gain_maker(node: NodeProto, index: Index) -> _Made | None:
    """A Mul by one constant a feature, and the Add of a constant that may follow: a spelled-out LayerNorm."""
    gain = _vector_slot(node, index)
    if gain is None:
        return None
    channels = int(index.constants[node.input[gain]].dims[0])
    addition = index.sole_reader(node.output[0])
    shift = _vector_slot(addition, index) if addition is not None and addition.op_type == "Add" else None
    if addition is None or shift is None or index.constants[addition.input[shift]].dims[0] != channels:
        return None, (Site(node.name, gain),), node.output[0], -1, channels
    sites = (Site(node.name, gain), Site(addition.name, shift))
    return None, sites, addition.output[0], -1, channels


def _vector_slot(node: NodeProto, index: Index) -> int | None:
    """Which operand is a constant vector longer than one, where the other is an activation."""
    for slot in (0, 1):
        constant = index.constants.get(node.input[slot])
        if constant is not None and len(constant.dims) == 1 and constant.dims[0] > 1:
            return slot if index.is_float_activation(node.input[1 - slot]) else None
    return None


def _readers(tensor: str, axis: int, repeats: int, channels: int, index: Index) -> list[Reader]:
    """The layers that read a tensor's channels, through homogeneous operators; empty where any other does."""
    if tensor in index.outputs:
        return []
    found: list[Reader] = []
    for node in index.readers.get(tensor, []):
        below = _reader(node, tensor, axis, repeats, channels, index)
        if not below:
            return []
        found += below
    return found


def _reader(
    node: NodeProto, tensor: str, axis: int, repeats: int, channels: int, index: Index
) -> list[Reader]:
    if node.op_type in _ELEMENTWISE or (node.op_type in _POOLS and axis == 1 and len(node.output) == 1):
        return _readers(node.output[0], axis, repeats, channels, index)
    if node.op_type in ("Flatten", "Reshape") and axis == 1 and repeats == 1:
        width = _flat_width(node, index)
        if width is None or width % channels:
            return []
        return _readers(node.output[0], -1, width // channels, channels, index)
    if not is_layer(node, index) or list(node.input).count(tensor) != 1:
        return []
    if (node.op_type == "Conv") != (axis == 1):
        return []
    return [Reader(node.name, tensor, axis, repeats)]


def _flat_width(node: NodeProto, index: Index) -> int | None:
    """The number of features where a node turns [n, channels, ...] into [n, features]; None: it does not."""
    shapes = {value.name: dims(value) for value in (*index.graph.value_info, *index.graph.input)}
    before, after = shapes.get(node.input[0], []), shapes.get(node.output[0], [])
    if len(after) != 2 or len(before) < 3 or not isinstance(after[1], int):
        return None
    rows_stay = before[0] == after[0] or (node.op_type == "Flatten" and integer(node, "axis", 1) == 1)
    sizes = before[1:]
    features = [size for size in sizes if isinstance(size, int)]
    whole = len(features) == len(sizes) and int(np.prod(features)) == after[1]
    return after[1] if rows_stay and whole else None


def _rows_are_outputs(node: NodeProto) -> bool:
    return node.op_type == "Conv" or (node.op_type == "Gemm" and bool(integer(node, "transB", 0)))
