"""RoiAlign as GridSample and AveragePool.

RoiAlign (He et al., "Mask R-CNN", ICCV 2017) averages bilinear samples on a regular grid in each region. The
samples of all regions are one GridSample if the images of the batch lie below each other: row ``y`` of image
``b`` is row ``b * height + y`` of one tall image, which the samples do not leave, because they are held
inside their own image first. So nothing is copied for each region.
"""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, TensorProto

from calibration.graph import attribute, integer
from edgekit.lowering.view import Chain, View

_GRID_SAMPLE_SINCE = 16


def roi_align(node: NodeProto, view: View) -> list[NodeProto] | None:
    """The mean of the samples; None where their number hangs on the region, or sizes are not known."""
    features, regions, owners = node.input
    shape = view.shape(features)
    samples = integer(node, "sampling_ratio", 0)
    mean = attribute(node, "mode", b"avg") == b"avg"
    single = view.type(features) == view.type(regions) == TensorProto.FLOAT
    if shape is None or not samples or not mean or not single or view.opset < _GRID_SAMPLE_SINCE:
        return None
    channels, height, width = shape[1:]
    if not (isinstance(channels, int) and isinstance(height, int) and isinstance(width, int)):
        return None
    out_height, out_width = integer(node, "output_height", 1), integer(node, "output_width", 1)
    chain = view.chain(node)
    maker = _Maker(node, view, chain, regions)
    x, x_weights = maker.positions(0, out_width * samples, width)
    y, y_weights = maker.positions(1, out_height * samples, height)
    owner = chain.then("Unsqueeze", chain.then("Cast", owners, to=TensorProto.FLOAT), maker.ints("last", 1))
    y = chain.then("Add", y, chain.then("Mul", owner, maker.number("height", height)))
    grid = maker.grid(
        x, y, maker.number("width", width), maker.rows_of_all(features, height), out_width * samples
    )
    tall = chain.then("Transpose", features, perm=[1, 0, 2, 3])
    tall = chain.then("Reshape", tall, maker.ints("tall", 1, channels, -1, width))
    mode = "linear" if view.opset >= 20 else "bilinear"
    sampled = chain.then("GridSample", tall, grid, mode=mode, padding_mode="border", align_corners=0)
    inside = chain.then("Mul", maker.spread(y_weights, 2), maker.spread(x_weights, 1))
    inside = chain.then("Reshape", inside, maker.ints("masks", 1, 1, -1, out_width * samples))
    kernel = [samples, samples]
    kept = chain.then("Mul", sampled, inside)
    pooled = chain.then("AveragePool", kept, kernel_shape=kernel, strides=kernel)
    apart = chain.then("Reshape", pooled, maker.ints("apart", channels, -1, out_height, out_width))
    chain.then("Transpose", apart, last=True, perm=[1, 0, 2, 3])
    return chain.nodes


class _Maker:
    """What the rule makes of one node's regions."""

    def __init__(self, node: NodeProto, view: View, chain: Chain, regions: str) -> None:
        self._view, self._chain, self._regions = view, chain, regions
        self._stem = node.name or node.output[0]
        self._scale = attribute(node, "spatial_scale", 1.0)
        default = b"half_pixel" if view.opset >= _GRID_SAMPLE_SINCE else b"output_half_pixel"
        self._half_pixel = attribute(node, "coordinate_transformation_mode", default) == b"half_pixel"

    def positions(self, column: int, count: int, size: int) -> tuple[str, str]:
        """Where a region's samples lie along one axis, in pixels, and their weights; both [regions, count].

        They are held inside the image; one that was more than a pixel outside weighs nothing, the others 1.
        """
        then = self._chain.then
        start, end = (self._scaled(column), self._scaled(column + 2))
        extent = then("Sub", end, start)
        if self._half_pixel:
            start = then("Sub", start, self.number("half", 0.5))
        else:
            extent = then("Max", extent, self.number("one", 1.0))
        middles = ((np.arange(count) + 0.5) / count).astype(np.float32)[None]
        middles_name = self._view.add(f"{self._stem}/middles", middles)
        free = then("Add", start, then("Mul", extent, middles_name))
        low = then("GreaterOrEqual", free, self.number("below", -1.0))
        high = then("LessOrEqual", free, self.number("size", size))
        inside = then("Cast", then("And", low, high), to=TensorProto.FLOAT)
        held = then("Min", then("Max", free, self.number("zero", 0.0)), self.number("last", size - 1))
        return held, inside

    def _scaled(self, column: int) -> str:
        edge = self._chain.then("Gather", self._regions, self.ints("column", column), axis=1)
        return self._chain.then("Mul", edge, self.number("scale", self._scale))

    def rows_of_all(self, features: str, height: int) -> str:
        """Height of the tall image, as a float."""
        then = self._chain.then
        batch = then("Gather", then("Shape", features), self.ints("first", 0))
        return then("Mul", then("Cast", batch, to=TensorProto.FLOAT), self.number("height", height))

    def grid(self, x: str, y: str, width: str, height: str, columns: int) -> str:
        """Positions as GridSample counts them, [1, regions * rows, columns, 2]: (2 p + 1) / size - 1."""
        then = self._chain.then
        one = self.number("one", 1.0)

        def relative(position: str, size: str) -> str:
            twice = then("Add", then("Add", position, position), one)
            return then("Sub", then("Div", twice, size), one)

        across = self.spread(relative(x, width), 1)
        down = self.spread(relative(y, height), 2)
        nothing_down, nothing_across = then("Sub", down, down), then("Sub", across, across)
        pair = [then("Add", across, nothing_down), then("Add", nothing_across, down)]
        last = self.ints("last", -1)
        both = then("Concat", *(then("Unsqueeze", each, last) for each in pair), axis=-1)
        return then("Reshape", both, self.ints("grid", 1, -1, columns, 2))

    def spread(self, values: str, axis: int) -> str:
        """[regions, n] with an axis of size 1 put in."""
        return self._chain.then("Unsqueeze", values, self.ints("axis", axis))

    def number(self, wish: str, value: object) -> str:
        """A float constant."""
        return self._view.add(f"{self._stem}/{wish}", np.array(value, np.float32))

    def ints(self, wish: str, *values: int) -> str:
        """A vector of integers."""
        return self._view.add(f"{self._stem}/{wish}", np.array(values, np.int64))
