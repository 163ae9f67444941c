"""Mean average precision of detections, all points interpolated (Everingham et al., PASCAL VOC, 2010)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from accuracy.case import Array

#: The overlaps of COCO's stricter figure.
STRICT = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))


def mean(found: Array, truth: Array, overlaps: Sequence[float]) -> float:
    """Average precision, averaged over the classes that occur and the least overlaps that count as a hit.

    Args:
        found: [scenes, detections, 6]: class, x0, y0, x1, y1, score; each scene's best first.
        truth: [scenes, boxes, 5]: class, x0, y0, x1, y1; class -1 where there is no box.
        overlaps: the least intersections over union.
    """
    overlap = np.where(found[:, :, None, 0] == truth[:, None, :, 0], _overlaps(found, truth), 0.0)
    classes = np.unique(truth[:, :, 0])
    values = []
    for least in overlaps:
        hits = _hits(overlap, least)
        for label in classes[classes >= 0]:
            chosen = found[:, :, 0] == label
            count = int((truth[:, :, 0] == label).sum())
            values.append(average_precision(found[:, :, 5][chosen], hits[chosen], count))
    return float(np.mean(values))


def average_precision(scores: Array, hits: Array, count: int) -> float:
    """Area under the curve of precision over recall, precision made monotone.

    Args:
        scores: of the detections of one class.
        hits: which of them found a box that none before had found.
        count: how many boxes there are.
    """
    order = np.argsort(-scores, kind="stable")
    found = np.cumsum(hits[order])
    precision = found / np.arange(1, len(found) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return float(best[hits[order]].sum() / count)


def _hits(overlap: Array, least: float) -> Array:
    """Give each detection, the best first, the box that it covers most among those not yet taken."""
    free = overlap.copy()
    scenes = np.arange(len(overlap))
    hits = np.zeros(overlap.shape[:2], bool)
    for place in range(overlap.shape[1]):
        box = free[:, place].argmax(axis=1)
        hits[:, place] = free[scenes, place, box] >= least
        taken = hits[:, place]
        free[scenes[taken], :, box[taken]] = 0.0
    return hits


def _overlaps(found: Array, truth: Array) -> Array:
    """Intersection over union of each detection with each box: [scenes, detections, boxes]."""
    a, b = found[:, :, None, 1:5], truth[:, None, :, 1:5]
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    shared = np.clip(sides, 0, None).prod(axis=-1)
    areas = [(box[..., 2] - box[..., 0]) * (box[..., 3] - box[..., 1]) for box in (a, b)]
    shares: Array = shared / np.maximum(areas[0] + areas[1] - shared, 1e-9)
    return shares
