"""Make scenes to train, calibrate and judge a detector with: scanned digits pasted on photographs.

    python -m examples.detection.scenes DIR [--seed 0]

writes ``DIR/train.jsonl``, ``DIR/calib.jsonl``, ``DIR/held_out.jsonl`` and their images. A line holds an
image's path and its boxes, ``[x1, y1, x2, y2, class]`` in pixels of the image (docs/models-and-data.md).

The pixels are real: scikit-learn's 1,797 scanned digits on photographs that come with scikit-image and
scikit-learn. A box is exact, because it is computed from the pixels that were pasted. Neither a scan nor a
photograph of the held-out scenes occurs in the others.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Array = np.ndarray[Any, Any]
Box = tuple[int, int, int, int, int]

PIXELS = 96
CLASSES = 10
MOST_DIGITS = 5
SCENES = {"train": 2000, "calib": 256, "held_out": 400}
_PHOTOGRAPHS = (
    "astronaut.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "brick.png", "grass.png",
    "coins.png", "camera.png", "china.jpg",
)  # fmt: skip
_HELD_OUT_PHOTOGRAPHS = ("chelsea.png", "gravel.png", "flower.jpg")
_FROM_SCIKIT_LEARN = ("china.jpg", "flower.jpg")
_HELD_OUT_SCANS = 0.4
_DIGIT_PIXELS = (16, 40)
_CROP_PIXELS = (120, 260)
#: Pasted pixels fainter than this share of full ink are left out, and out of the box.
_FAINT = 0.15
_CONTRAST = 70


@dataclass(frozen=True)
class Material:
    """What scenes of one part are made of: photographs [height, width, 3], scans [8, 8] in 0...1, labels."""

    photographs: tuple[Array, ...]
    scans: Array
    labels: Array


def material(seed: int) -> dict[str, Material]:
    """What each part is made of; the seed decides which scans are held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    scans = digits.images.astype(np.float32) / 16
    order = np.random.default_rng(seed).permutation(len(scans))
    cut = int(len(order) * _HELD_OUT_SCANS)
    held_out, seen = order[:cut], order[cut:]
    known = Material(tuple(map(_photograph, _PHOTOGRAPHS)), scans[seen], digits.target[seen])
    unknown = tuple(map(_photograph, _HELD_OUT_PHOTOGRAPHS))
    return {
        "train": known,
        "calib": known,
        "held_out": Material(unknown, scans[held_out], digits.target[held_out]),
    }


def scenes(source: Material, count: int, seed: tuple[int, ...]) -> Iterator[tuple[Array, list[Box]]]:
    """Scenes uint8 [PIXELS, PIXELS, 3], each with one to ``MOST_DIGITS`` digits and their boxes."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        canvas = _background(source, random)
        boxes: list[Box] = []
        for _ in range(int(random.integers(1, MOST_DIGITS + 1))):
            _paste(canvas, source, boxes, random)
        yield canvas.round().astype(np.uint8), boxes


def _background(source: Material, random: np.random.Generator) -> Array:
    """A random square of a random photograph, scaled, float32."""
    photograph = source.photographs[random.integers(len(source.photographs))]
    edge = int(random.integers(*_CROP_PIXELS))
    top, left = (int(random.integers(0, size - edge + 1)) for size in photograph.shape[:2])
    crop = Image.fromarray(photograph[top : top + edge, left : left + edge])
    return np.array(crop.resize((PIXELS, PIXELS), Image.Resampling.BILINEAR), np.float32)


def _paste(canvas: Array, source: Material, boxes: list[Box], random: np.random.Generator) -> None:
    """Paste a digit where it covers no other; none, where ten tries found no place."""
    number = int(random.integers(len(source.scans)))
    edge = int(random.integers(*_DIGIT_PIXELS))
    ink = _ink(source.scans[number], edge)
    height, width = ink.shape
    for _ in range(10):
        x, y = int(random.integers(0, PIXELS - width + 1)), int(random.integers(0, PIXELS - height + 1))
        if not any(_touch((x, y, x + width, y + height), box) for box in boxes):
            break
    else:
        return
    under = canvas[y : y + height, x : x + width]
    under += ink[..., None] * (_colour(under, random) - under)
    boxes.append((x, y, x + width, y + height, int(source.labels[number])))


def _ink(scan: Array, edge: int) -> Array:
    """A scan scaled to ``edge`` pixels and cut to what shows."""
    grey = Image.fromarray((scan * 255).astype(np.uint8)).resize((edge, edge), Image.Resampling.BICUBIC)
    ink = np.asarray(grey, np.float32) / 255
    ink = np.where(ink < _FAINT, 0, ink)
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _colour(under: Array, random: np.random.Generator) -> Array:
    """A colour that stands out from what it is pasted on."""
    while True:
        colour = random.uniform(0, 255, 3).astype(np.float32)
        if np.abs(colour.mean() - under.mean()) > _CONTRAST:
            return colour


def _touch(a: tuple[int, int, int, int], b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _photograph(name: str) -> Array:
    import skimage.data
    from sklearn.datasets import load_sample_image

    if name in _FROM_SCIKIT_LEARN:
        return np.asarray(load_sample_image(name))
    with Image.open(Path(skimage.data.__file__).with_name(name)) as image:
        return np.asarray(image.convert("RGB"))


def write(directory: Path, seed: int) -> None:
    """Write every part's images and annotations."""
    sources = material(seed)
    for number, (part, count) in enumerate(SCENES.items()):
        images = directory / part
        images.mkdir(parents=True, exist_ok=True)
        lines = []
        for index, (pixels, boxes) in enumerate(scenes(sources[part], count, (seed, number))):
            path = images / f"{index:04}.png"
            Image.fromarray(pixels).save(path)
            lines.append(json.dumps({"image": f"{part}/{path.name}", "boxes": boxes}) + "\n")
        (directory / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{directory / part}.jsonl: {count} scenes")


def main() -> None:
    """Read the options and write."""
    parser = argparse.ArgumentParser(description="Write scenes of digits on photographs, with boxes.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write(options.directory, options.seed)


if __name__ == "__main__":
    main()
