"""From the detector's raw heads to boxes: an ONNX graph that stays in float and runs behind the model."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper, parser

from examples.detection.detector import CELLS, STRIDE
from examples.detection.scenes import CLASSES, PIXELS

MOST_DETECTIONS = 20
LEAST_SCORE = 0.05
OVERLAP = 0.6
_A = CELLS * CELLS

# Non-maximum suppression gives a list of (image, class, cell). Marking those leaves the other scores at 0, so
# that the best of each image can be taken with the batch axis kept.
_TEXT = f"""
<ir_version: 9, opset_import: ["": 17]>
postprocess (float[n, {CLASSES}, {CELLS}, {CELLS}] logits, float[n, 4, {CELLS}, {CELLS}] distances)
    => (float[n, {MOST_DETECTIONS}, 6] detections)
<
    int64[3] rows = {{0, 0, -1}}, int64[2] flat = {{0, -1}}, int64[1] first = {{0}},
    int64[1] last = {{-1}}, int64[1] most = {{{MOST_DETECTIONS}}}, int64 cells = {{{_A}}},
    float overlap = {{{OVERLAP}}}, float least = {{{LEAST_SCORE}}}, float stride = {{{float(STRIDE)}}},
    float zero = {{0.0}}, float edge = {{{float(PIXELS)}}}
>
{{
    logits_flat = Reshape (logits, rows)
    probabilities = Sigmoid (logits_flat)
    distances_flat = Reshape (distances, rows)
    reach_cells = Relu (distances_flat)
    reach = Mul (reach_cells, stride)
    to_upper_left, to_lower_right = Split <axis = 1> (reach)
    upper_left = Sub (centres, to_upper_left)
    lower_right = Add (centres, to_lower_right)
    corners = Concat <axis = 1> (upper_left, lower_right)
    inside = Clip (corners, zero, edge)
    boxes = Transpose <perm = [0, 2, 1]> (inside)
    picked = NonMaxSuppression (boxes, probabilities, most, overlap, least)
    picked_shape = Shape (picked)
    count = Gather (picked_shape, first)
    ones = ConstantOfShape <value = float[1] {{1.0}}> (count)
    scores_shape = Shape (probabilities)
    nothing = ConstantOfShape <value = float[1] {{0.0}}> (scores_shape)
    kept = ScatterND (nothing, picked, ones)
    scores = Mul (probabilities, kept)
    scores_flat = Reshape (scores, flat)
    best, position = TopK (scores_flat, most)
    label = Div (position, cells)
    cell = Mod (position, cells)
    cell_column = Unsqueeze (cell, last)
    box = GatherND <batch_dims = 1> (boxes, cell_column)
    score_column = Unsqueeze (best, last)
    label_float = Cast <to = 1> (label)
    label_column = Unsqueeze (label_float, last)
    everything = Concat <axis = 2> (box, score_column, label_column)
    there = Greater (score_column, zero)
    there_float = Cast <to = 1> (there)
    detections = Mul (everything, there_float)
}}
"""


def build() -> onnx.ModelProto:
    """``logits`` and ``distances`` to ``detections`` [batch, MOST_DETECTIONS, 6].

    A row is x1, y1, x2, y2 in pixels, score, class; the best comes first, and rows of zeros fill up.
    """
    model = parser.parse_model(_TEXT)
    along = (np.arange(CELLS, dtype=np.float32) + 0.5) * STRIDE
    y, x = np.meshgrid(along, along, indexing="ij")
    centres = np.stack([x.ravel(), y.ravel()])[None]
    model.graph.initializer.append(numpy_helper.from_array(centres, "centres"))
    return model
