"""``.jsonl`` files of images with boxes: one JSON object a line, with ``image`` and maybe ``boxes``.

    {"image": "street/0017.jpg", "boxes": [[12, 30, 48.5, 96, 2], ...]}

The image's path is relative to the file. A box is ``[x1, y1, x2, y2, class]`` in pixels of the upright image;
it moves with the image when that is scaled and cut for the model, and what is cut away counts no more.

The label of a sample is float32 [most, 5], its boxes in the model's pixels; rows of class -1 fill up to the
largest number of boxes in the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgekit.artifact import file_digest
from edgekit.data import Label, Source
from edgekit.data.digests import order, source_digest
from edgekit.data.images import image_inputs, image_preprocess, open_image
from edgekit.errors import BadInput
from edgekit.preprocess import ImagePreprocess, Preprocess, placement
from edgekit.tensors import Arrays

#: Boxes of one image.
MAX_BOXES = 1000
_FILL = (0.0, 0.0, 0.0, 0.0, -1.0)


class _Entry(NamedTuple):
    where: str
    image: Path
    boxes: list[list[float]] | None


def open_source(path: Path, preprocess: Preprocess | None, names: Sequence[str] | None, seed: int) -> Source:
    """Read the annotations; images are opened as they are read.

    Raises:
        BadInput: a line is malformed, an image is missing, or the model takes no images.
    """
    description = image_preprocess(str(path), preprocess)
    entries = [_entry(path, number, line) for number, line in _lines(path)]
    most = max((len(entry.boxes or ()) for entry in entries), default=0)
    contents = [file_digest(path), *(file_digest(entry.image) for entry in entries)]
    return Source(
        read=partial(_read, entries, order(len(entries), seed), description, names, most),
        count=len(entries),
        digest=source_digest(contents, preprocess, seed),
    )


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as stream:
        yield from ((number, line) for number, line in enumerate(stream, 1) if line.strip())


def _entry(path: Path, number: int, line: bytes) -> _Entry:
    where = f"{path}, line {number}"
    try:
        record = json.loads(line)
    except ValueError as error:
        raise BadInput(f"{where} is not JSON", str(error), "write one JSON object a line") from error
    if not isinstance(record, dict) or not isinstance(record.get("image"), str):
        raise BadInput(
            f"{where} has no image", "a record is an object with the path of an 'image'", "add the path"
        )
    image = path.parent / record["image"]
    if not image.is_file():
        raise BadInput(
            f"{where} names an image that does not exist", f"there is no file {image}", "check the path"
        )
    boxes = record.get("boxes")
    if boxes is not None and not _are_boxes(boxes):
        raise BadInput(
            f"{where} has boxes that are none",
            f"'boxes' is {json.dumps(boxes)[:60]}",
            f"give [x1, y1, x2, y2, class], x1 < x2, y1 < y2, a class from 0; at most {MAX_BOXES} of them",
        )
    return _Entry(where, image, boxes)


def _are_boxes(boxes: Any) -> bool:
    return isinstance(boxes, list) and len(boxes) <= MAX_BOXES and all(map(_is_box, boxes))


def _is_box(box: Any) -> bool:
    if not isinstance(box, list) or len(box) != 5 or not all(type(value) in (int, float) for value in box):
        return False
    x1, y1, x2, y2, label = box
    return all(map(math.isfinite, box)) and x1 < x2 and y1 < y2 and label >= 0 and label == int(label)


def _read(
    entries: list[_Entry],
    indices: list[int],
    preprocess: ImagePreprocess,
    names: Sequence[str] | None,
    most: int,
) -> Iterator[tuple[str, Arrays, Label | None]]:
    for index in indices:
        where, path, boxes = entries[index]
        image = open_image(path, str(path))
        label = None if boxes is None else _moved(boxes, preprocess, image.size, most)
        yield where, image_inputs(preprocess, image, names), label


def _moved(
    boxes: list[list[float]], preprocess: ImagePreprocess, size: tuple[int, int], most: int
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Boxes in the model's pixels; ``size`` is the image's width and height."""
    place = placement(preprocess, *size)
    height, width = preprocess.size
    label = np.tile(np.asarray(_FILL, np.float32), (most, 1))
    row = 0
    for x1, y1, x2, y2, number in boxes:
        left, right = (place.x(value, size[0]) for value in (x1, x2))
        upper, lower = (place.y(value, size[1]) for value in (y1, y2))
        left, right = max(left, 0.0), min(right, float(width))
        upper, lower = max(upper, 0.0), min(lower, float(height))
        if left < right and upper < lower:
            label[row] = (left, upper, right, lower, number)
            row += 1
    return label
