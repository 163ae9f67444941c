"""Cross-layer equalization: the channels between two layers get weights of like size on both sides.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019
(arXiv 1906.04721), section 4.1. The float function stays the same up to rounding. High-bias absorption
(section 4.1.3) is left out on purpose: it is exact only for inputs that never leave the range that was
seen, and not at the padded border of a convolution.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto

from calibration.affine import Floats
from calibration.graph import Index
from calibration.methods.layers import Editor, Site, to_groups
from calibration.methods.links import Link, Reader, bounded, links, scale

#: Chains settle in a few rounds; each round goes once through all links.
_MAX_ROUNDS = 12
#: A round that changes no channel by more than this factor is the last.
_SETTLED_FACTOR = 1.01


def equalize(model: ModelProto) -> ModelProto | None:
    """Scale the channels of every pair of neighbouring layers, s = sqrt(r1 / r2), until none changes.

    r1 is the largest weight of a channel where it is made, r2 where it is read.

    Args:
        model: from ``prepare``.

    Returns:
        A graph that computes the same function; None where no channel has to be scaled.
    """
    pairs = [link for link in links(Index(model)) if link.weight is not None]
    editor = Editor(model)
    changed = False
    for _ in range(_MAX_ROUNDS):
        largest = max((_equalize(editor, link) for link in pairs), default=1.0)
        if largest < _SETTLED_FACTOR:
            break
        changed = True
    if not changed:
        return None
    return editor.finish()


def _equalize(editor: Editor, link: Link) -> float:
    """Equalize one pair; the largest factor, or one over it, by which a channel was scaled."""
    made = output_sizes(editor, link)
    read = np.max([input_sizes(editor, reader) for reader in link.readers], axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        factors = bounded(np.sqrt(made / read))
    largest = float(np.maximum(factors, 1.0 / factors).max())
    if largest >= _SETTLED_FACTOR:
        scale(editor, link, factors)
    return largest


def output_sizes(editor: Editor, link: Link) -> Floats:
    """The largest weight of each channel where it is made, float32 [channels]."""
    if link.weight is None:
        raise ValueError("a link from a normalization has no weight")
    grouped = to_groups(editor.nodes[link.weight.node], editor.read(link.weight))
    sizes: Floats = np.abs(grouped).max(axis=(2, 3)).reshape(-1)
    return sizes


def input_sizes(editor: Editor, reader: Reader) -> Floats:
    """The largest weight of each channel where a layer reads it, float32 [channels]."""
    grouped = to_groups(editor.nodes[reader.node], editor.read(Site(reader.node, 1)))
    sizes: Floats = np.abs(grouped).max(axis=(1, 3)).reshape(-1, reader.repeats).max(axis=1)
    return sizes
