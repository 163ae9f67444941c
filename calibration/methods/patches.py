"""The inputs of a layer as rows of a matrix product: im2col at some of the positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import NodeProto

from calibration.affine import Floats
from calibration.graph import attribute, integer


def can_cut(node: NodeProto) -> bool:
    """Whether ``patches`` knows the layer's borders."""
    return node.op_type != "Conv" or attribute(node, "auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")


def patches(
    node: NodeProto, values: Floats, kernel: Sequence[int], limit: int, rng: np.random.Generator
) -> Floats:
    """What a layer multiplies its weight with, at no more than ``limit`` of its output positions.

    Args:
        node: a Conv, Gemm or MatMul.
        values: its input.
        kernel: spatial sizes of a Conv's weight; empty for the others.
        limit: positions to draw, without repetition.
        rng: draws them.

    Returns:
        float32 [groups, positions, inputs of a group times kernel positions], in the order of ``to_groups``.
    """
    if node.op_type != "Conv":
        rows = values.reshape(-1, values.shape[-1])
        drawn: Floats = rows[_draw(len(rows), limit, rng)][None]
        return drawn
    windows = _windows(node, values, kernel)
    batch, channels = windows.shape[:2]
    spatial = windows.shape[2 : 2 + len(kernel)]
    chosen = np.unravel_index(_draw(batch * math.prod(spatial), limit, rng), (batch, *spatial))
    at: tuple[Any, ...] = (chosen[0], slice(None), *chosen[1:])
    cut = windows[at]
    groups = integer(node, "group", 1)
    grouped = cut.reshape(len(cut), groups, channels // groups * math.prod(kernel))
    return np.ascontiguousarray(np.moveaxis(grouped, 0, 1))


def _windows(node: NodeProto, values: Floats, kernel: Sequence[int]) -> Floats:
    """A view [batch, channels, *output sizes, *kernel] of a convolution's padded input."""
    rank = len(kernel)
    pads = _integers(node, "pads", [0] * (2 * rank))
    strides, dilations = _integers(node, "strides", [1] * rank), _integers(node, "dilations", [1] * rank)
    borders = [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)]
    padded = np.pad(values, borders)
    reach = tuple((size - 1) * step + 1 for size, step in zip(kernel, dilations, strict=True))
    windows = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=tuple(range(2, 2 + rank)))
    steps = (slice(None, None, step) for step in strides)
    inner = (slice(None, None, step) for step in dilations)
    view: Floats = windows[(slice(None), slice(None), *steps, *inner)]
    return view


def _integers(node: NodeProto, name: str, default: list[int]) -> list[int]:
    value = attribute(node, name)
    return [int(item) for item in value] if isinstance(value, list) and value else default


def _draw(count: int, limit: int, rng: np.random.Generator) -> np.ndarray:
    """Sorted positions, all of them where there are few enough."""
    return np.arange(count) if count <= limit else np.sort(rng.choice(count, limit, replace=False))
