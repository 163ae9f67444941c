"""Mean average precision: COCO's number, whatever the boxes, and the same from resampled images."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgekit.errors import BadInput
from edgekit.measure import accuracy, detection

Array = np.ndarray[Any, Any]
IMAGES, CLASSES = 12, 3


def scenes(seed: int) -> tuple[Array, Array]:
    """Labels, and detections that are sometimes right: shifted boxes, wrong classes, made-up boxes."""
    random = np.random.default_rng(seed)
    labels = np.zeros((IMAGES, 4, 5), np.float32)
    labels[..., 4] = -1
    detections = np.zeros((IMAGES, 6, 6), np.float32)
    for image in range(IMAGES):
        for row in range(int(random.integers(0, 5))):
            x, y, width, height = random.uniform(0, 60), random.uniform(0, 60), *random.uniform(8, 30, 2)
            labels[image, row] = (x, y, x + width, y + height, random.integers(CLASSES))
            detections[image, row, :4] = labels[image, row, :4] + random.normal(0, 2, 4)
            detections[image, row, 4:] = random.uniform(0.05, 1), labels[image, row, 4]
            if random.random() < 0.2:
                detections[image, row, 5] = random.integers(CLASSES)
        if random.random() < 0.5:
            detections[image, 5] = (1, 1, 20, 20, random.choice([0.3, 0.5]), random.integers(CLASSES))
    return detections, labels


def by_pycocotools(detections: Array, labels: Array) -> tuple[float, float]:
    """The library's own averages: over all overlaps, and at 0.5."""
    evaluation = detection._evaluated(detections, labels)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.accumulate()
    precision = evaluation.eval["precision"]
    everywhere, at_half = (float(part[part > -1].mean()) for part in (precision, precision[:1]))
    return everywhere, at_half


def averages(detections: Array, labels: Array, times: Array | None = None) -> Array:
    """MAP at each overlap; ``times``: how often each image counts."""
    times = np.ones((1, len(labels))) if times is None else times
    return detection.average_precision(detection.match(detections, labels), times)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
@example(214)  # a box that is inside out
@example(221)
def test_it_is_coco_s_number(seed: int) -> None:
    """``map`` is what pycocotools computes of the same boxes, and so is mAP at an overlap of 0.5."""
    detections, labels = scenes(seed)
    got = averages(detections, labels)[0]
    assert (got.mean(), got[0]) == pytest.approx(by_pycocotools(detections, labels), abs=1e-9)
    score = accuracy.score("map", {"heads": labels, "detections": detections}, {}, labels)
    assert score.value == pytest.approx(got.mean())
    assert score.samples == IMAGES


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_an_image_that_counts_twice_is_two_images(seed: int) -> None:
    """Counting images several times or not at all gives what the data with those images would give."""
    detections, labels = scenes(seed)
    random = np.random.default_rng(seed)
    for times in random.integers(0, 3, size=(3, IMAGES)):
        picked = np.repeat(np.arange(IMAGES), times)
        if (labels[picked, :, 4] >= 0).any():
            got = averages(detections, labels, times[None].astype(float))[0]
            assert got == pytest.approx(averages(detections[picked], labels[picked])[0], abs=1e-9)


def test_perfect_boxes_score_one_and_none_score_zero() -> None:
    """The scale is that of COCO: 1 for every object found exactly, 0 for nothing found."""
    _, labels = scenes(1)
    exact = np.zeros((*labels.shape[:2], 6), np.float32)
    exact[..., :4], exact[..., 4], exact[..., 5] = labels[..., :4], labels[..., 4] >= 0, labels[..., 4]
    assert averages(exact, labels)[0] == pytest.approx(np.ones(10))
    assert averages(np.zeros_like(exact), labels)[0] == pytest.approx(np.zeros(10))


def test_its_interval_is_over_images() -> None:
    """It holds the value and is narrower for more images; against itself a model loses nothing surely."""
    widths = []
    for repeats in (1, 8):
        parts = [scenes(seed) for seed in range(repeats)]
        detections, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        outputs = {"detections": detections}
        score = accuracy.score("map", outputs, outputs, labels)
        assert score.interval is not None
        assert score.interval.low < score.value < score.interval.high
        widths.append(score.interval.high - score.interval.low)
    assert widths[1] < 0.6 * widths[0]
    same = accuracy.drop("map", outputs, outputs, labels)
    assert same is not None
    assert (same.low, same.high) == (0, 0)


def test_a_worse_detector_is_worse_for_certain() -> None:
    """Losing every box of half of the images is a drop whose whole interval is above zero."""
    detections, labels = scenes(5)
    worse = detections.copy()
    worse[::2, :, 4] = 0
    lost = accuracy.drop("map", {"detections": worse}, {"detections": detections}, labels)
    assert lost is not None
    assert lost.low > 0


def test_a_class_that_no_image_has_does_not_count() -> None:
    """Detections of a class without objects change nothing, as in COCO."""
    detections, labels = scenes(2)
    strange = detections.copy()
    strange[:, 4] = (0, 0, 9, 9, 0.99, 77)
    strange[detections[:, 4, 4] > 0, 4] = detections[detections[:, 4, 4] > 0, 4]
    assert averages(strange, labels) == pytest.approx(averages(detections, labels))


@pytest.mark.parametrize(
    ("outputs", "labels", "reason"),
    [
        ({"logits": np.zeros((2, 3))}, np.zeros((2, 1, 5)), "there is logits"),
        ({"detections": np.zeros((2, 3))}, np.zeros((2, 1, 5)), "'detections' is [2, 3]"),
        ({"detections": np.zeros((2, 3, 6))}, np.zeros(2), "the labels [2]"),
        ({"detections": np.zeros((2, 3, 6))}, np.full((2, 1, 5), -1.0), "no held-out image has a box"),
    ],
)
def test_what_is_no_detector_is_refused(outputs: dict[str, Array], labels: Array, reason: str) -> None:
    """A model without boxes, labels that are classes, and data without any object are named as such."""
    with pytest.raises(BadInput) as caught:
        accuracy.score("map", outputs, outputs, labels)
    assert reason in str(caught.value)


def test_map_needs_boxes() -> None:
    """Asking for ``map`` on data without labels is refused before any work."""
    with pytest.raises(BadInput, match="map needs labels"):
        accuracy.choose("map", labelled=False)
