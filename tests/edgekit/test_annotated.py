"""Images with boxes: what the label holds, and that boxes move with their image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgekit.data import load_data
from edgekit.errors import BadInput
from edgekit.preprocess import ImagePreprocess

GREY = {"channels": "L", "mean": (0.0,), "std": (1.0,)}


def write(root: Path, *records: Any) -> Path:
    """A file with one line a record, and a black image of 40 x 20 pixels with a white patch for it."""
    pixels = np.zeros((20, 40), np.uint8)
    pixels[4:12, 24:32] = 255
    Image.fromarray(pixels).save(root / "patch.png")
    path = root / "boxes.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


PATCH = {"image": "patch.png", "boxes": [[24, 4, 32, 12, 3]]}


@pytest.mark.parametrize(
    "preprocess",
    [
        ImagePreprocess(size=(40, 80), resample="nearest", **GREY),
        ImagePreprocess(size=(20, 40), resample=None, **GREY),
        ImagePreprocess(size=(40, 40), shortest_edge=40, resample="nearest", **GREY),
        ImagePreprocess(size=(16, 16), shortest_edge=20, resample="nearest", **GREY),
    ],
)
def test_a_box_moves_with_its_image(tmp_path: Path, preprocess: ImagePreprocess) -> None:
    """However the image is scaled and cut, the box lies around the same pixels."""
    data = load_data(write(tmp_path, PATCH), preprocess, None)
    [sample] = data.samples()
    [box] = sample.label  # type: ignore[misc]  # boxes, since the line has some
    image = sample.inputs["pixel_values"][0]
    rows, columns = np.nonzero(image > 0.5)
    assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1, 3]


def test_boxes_fill_up_to_the_most_and_cut_ones_are_gone(tmp_path: Path) -> None:
    """Every sample has as many rows as the fullest image; a box outside of what the model sees is gone."""
    outside = {"image": "patch.png", "boxes": [[0, 0, 5, 5, 1], [24, 4, 32, 12, 0]]}
    preprocess = ImagePreprocess(size=(20, 20), shortest_edge=20, **GREY)
    data = load_data(write(tmp_path, PATCH, outside, {"image": "patch.png", "boxes": []}), preprocess, None)
    labels = np.stack([sample.label for sample in data.samples()])  # type: ignore[misc]
    assert labels.shape == (3, 2, 5)
    assert sorted((labels[..., 4] >= 0).sum(axis=1)) == [0, 1, 1]
    assert data.has_labels
    [batch] = data.batches(8)
    assert batch.labels is not None
    assert batch.labels.shape == (3, 2, 5)


def test_images_without_boxes_can_be_calibrated_on(tmp_path: Path) -> None:
    """Lines that name only an image are data without labels."""
    data = load_data(write(tmp_path, {"image": "patch.png"}), ImagePreprocess(size=(20, 40), **GREY), None)
    assert not data.has_labels


def test_the_digest_follows_the_images(tmp_path: Path) -> None:
    """Another picture under the same name is other data."""
    preprocess = ImagePreprocess(size=(20, 40), **GREY)
    path = write(tmp_path, PATCH)
    before = load_data(path, preprocess, None).digest
    Image.new("L", (40, 20)).save(tmp_path / "patch.png")
    assert load_data(path, preprocess, None).digest != before


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "hello"}, "has no image"),
        ({"image": "missing.png"}, "does not exist"),
        ({"image": "patch.png", "boxes": [[1, 2, 3, 4]]}, "boxes that are none"),
        ({"image": "patch.png", "boxes": [[5, 2, 3, 4, 0]]}, "boxes that are none"),
        ({"image": "patch.png", "boxes": [[1, 2, 3, 4, 0.5]]}, "boxes that are none"),
        ({"image": "patch.png", "boxes": [[1, 2, float("nan"), 4, 0]]}, "boxes that are none"),
        ({"image": "patch.png", "boxes": [[1, 2, 3, 4, True]]}, "boxes that are none"),
        ({"image": "patch.png", "boxes": [[1, 2, 3, 4, 0]] * 1001}, "at most 1000"),
    ],
)
def test_bad_annotations_are_named_by_line(tmp_path: Path, record: Any, reason: str) -> None:
    """What is wrong with a line is said before any image is read, with the line's number."""
    path = write(tmp_path, PATCH, record)
    with pytest.raises(BadInput) as caught:
        load_data(path, ImagePreprocess(size=(20, 40), **GREY), None)
    assert "line 2" in str(caught.value)
    assert reason in f"{caught.value} {caught.value.fix}"


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    """A path in another encoding is bad input, named by its line, and no failure of ours."""
    path = write(tmp_path, PATCH)
    path.write_bytes(path.read_bytes() + '{"image": "caf\u00e9.png"}\n'.encode("latin-1"))
    with pytest.raises(BadInput, match="line 2 is not JSON"):
        load_data(path, ImagePreprocess(size=(20, 40), **GREY), None)
