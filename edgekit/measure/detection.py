"""Mean average precision of boxes, as COCO counts it (Lin et al., "Microsoft COCO", ECCV 2014).

A detector's output ``detections`` is [samples, most, 6]: x1, y1, x2, y2, score, class; rows with a score of 0
fill up. Labels are [samples, most, 5]: x1, y1, x2, y2, class; rows of class -1 fill up.

pycocotools says which detection is right at which overlap. The average over that is taken here, because its
own takes a second, and an interval needs hundreds.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgekit.errors import BadInput

Array = np.ndarray[Any, Any]

#: Name of the output that holds a detector's boxes.
DETECTIONS = "detections"
#: Overlaps (intersection over union) over which COCO's mAP is the mean; the first one is mAP at 0.5.
OVERLAPS = np.linspace(0.5, 0.95, 10)
_RECALLS = np.linspace(0, 1, 101)
_MOST_DETECTIONS = 100


@dataclass(frozen=True)
class ClassMatches:
    """The detections of one class in all images, the surest first.

    Attributes:
        image: of each detection, [n].
        right: whether it found an object that none before it found, at each overlap, bool [overlaps, n].
        counted: whether it counts, bool [overlaps, n]: not what found nothing and is inside out, as in COCO.
        objects: how many there are in each image, [images].
    """

    image: Array
    right: Array
    counted: Array
    objects: Array


def match(detections: Array, labels: Array) -> tuple[ClassMatches, ...]:
    """Match detections with objects; one entry for each class that has objects.

    Raises:
        BadInput: the arrays are not boxes, or there is no object at all.
    """
    _check(detections, labels)
    evaluation = _evaluated(detections, labels)
    found = []
    for number in range(len(evaluation.params.catIds)):
        images = evaluation.evalImgs[number * len(labels) : (number + 1) * len(labels)]
        objects = np.array([0 if one is None else len(one["gtIds"]) for one in images])
        if objects.any():
            found.append(_of_class(images, objects))
    return tuple(found)


def average_precision(matches: tuple[ClassMatches, ...], times: Array) -> Array:
    """Mean over the classes of the area under precision over recall.

    Args:
        matches: from ``match``.
        times: how often each image counts, [draws, images]; ones for the data as they are.

    Returns:
        [draws, overlaps]. Classes without objects in a draw are left out of its mean.
    """
    areas = np.stack([_area(one, times) for one in matches])  # [classes, draws, overlaps]
    there = np.stack([times @ one.objects > 0 for one in matches])[..., None]
    classes = there.sum(axis=0)
    total: Array = np.where(there, areas, 0).sum(axis=0)
    means: Array = total / np.maximum(classes, 1)
    return means


def _area(one: ClassMatches, times: Array) -> Array:
    """[draws, overlaps]: the mean of the best precision at 101 recalls or above."""
    weight = times[:, one.image].astype(np.float64)  # [draws, n]
    objects = np.maximum(times @ one.objects, 1)[:, None]
    areas = np.zeros((len(times), len(OVERLAPS)))
    for number, (right, counted) in enumerate(zip(one.right, one.counted, strict=True)):
        seen = np.maximum(np.cumsum(weight * counted, axis=1), 1e-9)
        hits = np.cumsum(weight * right, axis=1)
        recall = hits / objects
        best = np.maximum.accumulate((hits / seen)[:, ::-1], axis=1)[:, ::-1]
        for draw in range(len(times)):
            position = np.searchsorted(recall[draw], _RECALLS, side="left")
            reached = position[position < recall.shape[1]]
            areas[draw, number] = best[draw, reached].sum() / len(_RECALLS)
    return areas


def _of_class(images: list[Any], objects: Array) -> ClassMatches:
    present = [(number, one) for number, one in enumerate(images) if one is not None]
    image = np.concatenate([np.full(len(one["dtScores"]), number) for number, one in present])
    scores = np.concatenate([np.asarray(one["dtScores"], np.float64) for _, one in present])
    right = np.concatenate([np.asarray(one["dtMatches"]) > 0 for _, one in present], axis=1)
    counted = ~np.concatenate([np.asarray(one["dtIgnore"], bool) for _, one in present], axis=1)
    order = np.argsort(-scores, kind="stable")
    return ClassMatches(image[order], right[:, order], counted[:, order], objects)


def _evaluated(detections: Array, labels: Array) -> Any:
    """Pycocotools' evaluation, matched; its chatter is kept off the terminal."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations: list[dict[str, Any]] = [
        {"id": number, "image_id": image, "category_id": int(box[4]), "bbox": _as_xywh(box),
         "area": float((box[2] - box[0]) * (box[3] - box[1])), "iscrowd": 0}
        for number, (image, box) in enumerate(_rows(labels, labels[..., 4] >= 0), 1)
    ]  # fmt: skip
    found = [
        [image, *_as_xywh(box), box[4], box[5]] for image, box in _rows(detections, detections[..., 4] > 0)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": number} for number in range(len(labels))],
            "categories": [{"id": number} for number in sorted({a["category_id"] for a in annotations})],
            "annotations": annotations,
        }
        truth.createIndex()
        known = [row for row in found if int(row[6]) in truth.cats]
        answers = truth.loadRes(np.array(known, np.float64)) if known else COCO()
        evaluation = COCOeval(truth, answers, "bbox")
        evaluation.params.imgIds = list(range(len(labels)))
        evaluation.params.catIds = sorted(truth.cats)
        evaluation.params.iouThrs = OVERLAPS
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [_MOST_DETECTIONS]
        evaluation.evaluate()
    return evaluation


def _rows(boxes: Array, there: Array) -> list[tuple[int, Array]]:
    return [(int(image), boxes[image, row]) for image, row in np.argwhere(there)]


def _as_xywh(box: Array) -> list[float]:
    x1, y1, x2, y2 = (float(value) for value in box[:4])
    return [x1, y1, x2 - x1, y2 - y1]


def _check(detections: Array, labels: Array) -> None:
    boxes = detections.ndim == 3 and detections.shape[2] == 6
    if not boxes or labels.ndim != 3 or labels.shape[2] != 5 or len(labels) != len(detections):
        raise BadInput(
            "map does not suit this model or data",
            f"'{DETECTIONS}' is {list(detections.shape)} and the labels {list(labels.shape)}, "
            "not [samples, most, 6] and [samples, most, 5]",
            "docs/detection.md says what detectors give and how boxes are labelled",
        )
    if not (labels[..., 4] >= 0).any():
        raise BadInput(
            "map has nothing to find", "no held-out image has a box", "give images with boxes in --eval"
        )
