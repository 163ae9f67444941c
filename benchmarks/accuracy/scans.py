"""Scenes made of what scikit-learn carries: 1,797 scanned digits, pasted onto two photographs.

The scans and the halves of the photographs that test scenes are made of are in no training scene.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from accuracy.case import Array

PIXELS = 64
CLASSES = 10
MAX_DIGITS = 5
#: Sides of a pasted scan.
SIDES = (12, 16, 20, 24, 28)
_TRIES = 12
_TRAIN_FRACTION = 0.6
_CROPPED_SIDE = 28


@dataclass(frozen=True)
class Scenes:
    """Scenes with what is in them.

    Attributes:
        images: float32 [scenes, 3, 64, 64], roughly of mean 0 and deviation 1.
        boxes: float32 [scenes, 5, 5]: class, x0, y0, x1, y1 in pixels; class -1 where there is none.
        masks: int64 [scenes, 64, 64]: 0 for background, digit + 1 elsewhere.
    """

    images: Array
    boxes: Array
    masks: Array


def scenes(count: int, seed: int, *, test: bool) -> Scenes:
    """Draw scenes of one to five digits that do not overlap."""
    random = np.random.default_rng((seed, test))
    images = _backgrounds(count, random, test)
    boxes = np.full((count, MAX_DIGITS, 5), -1, np.float32)
    masks = np.zeros((count, PIXELS, PIXELS), np.int64)
    for i in range(count):
        for place in range(random.integers(1, MAX_DIGITS + 1)):
            boxes[i, place] = _paste(images[i], masks[i], random, test)
    images += np.asarray(random.normal(0, 0.04, images.shape), np.float32)
    return Scenes((images - 0.45) / 0.28, boxes, masks)


def crops(count: int, seed: int, *, test: bool) -> tuple[Array, Array]:
    """One digit in the middle of each picture, float32 [count, 3, 28, 28], and the labels int64 [count]."""
    random = np.random.default_rng((seed, test, 1))
    images = _backgrounds(count, random, test)[:, :, :_CROPPED_SIDE, :_CROPPED_SIDE].copy()
    labels = np.zeros(count, np.int64)
    for i in range(count):
        scan, labels[i] = _scan(random, test, int(random.choice(SIDES[1:])))
        room = _CROPPED_SIDE - scan.shape[0]
        x, y = random.integers(0, room + 1, 2)
        _blend(images[i, :, y : y + scan.shape[0], x : x + scan.shape[0]], scan, random)
    images += random.normal(0, 0.08, images.shape).astype(np.float32)
    return (images - 0.45) / 0.28, labels


def _paste(image: Array, mask: Array, random: np.random.Generator, test: bool) -> Array:
    """Paste one digit where nothing is yet; its box, or no box where there was no room."""
    side = int(random.choice(SIDES))
    scan, label = _scan(random, test, side)
    for _ in range(_TRIES):
        x, y = random.integers(0, PIXELS - side + 1, 2)
        if not mask[y : y + side, x : x + side].any():
            _blend(image[:, y : y + side, x : x + side], scan, random)
            mask[y : y + side, x : x + side][scan > 0.4] = label + 1
            rows, columns = np.nonzero(scan > 0.4)
            edges = (x + columns.min(), y + rows.min(), x + columns.max() + 1, y + rows.max() + 1)
            return np.array((label, *edges), np.float32)
    return np.full(5, -1, np.float32)


def _blend(part: Array, scan: Array, random: np.random.Generator) -> None:
    """Draw a scan in a colour that differs from what is behind it."""
    behind = part.mean()
    colour = random.uniform(0.0, 1.0, 3)
    colour += (0.85 if behind < 0.5 else 0.15) - colour.mean()
    part += scan * (np.clip(colour, 0, 1)[:, None, None].astype(np.float32) - part)


def _scan(random: np.random.Generator, test: bool, side: int) -> tuple[Array, int]:
    numbers = split()[1 if test else 0]
    number = int(random.choice(numbers))
    sized, labels = _sized(side)
    return sized[number], int(labels[number])


@cache
def split() -> tuple[Array, Array]:
    """Numbers of the scans for training and for testing."""
    order = np.random.default_rng(0).permutation(len(_sized(SIDES[0])[1]))
    cut = int(len(order) * _TRAIN_FRACTION)
    return order[:cut], order[cut:]


@cache
def _sized(side: int) -> tuple[Array, Array]:
    """All scans, float32 [scans, side, side] from 0 to 1, and their labels."""
    import torch
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = torch.from_numpy(digits.images.astype(np.float32) / 16)[:, None]
    large = torch.nn.functional.interpolate(small, size=(side, side), mode="bilinear", align_corners=False)
    return large[:, 0].numpy(), digits.target.astype(np.int64)


@cache
def _photographs() -> tuple[Array, ...]:
    from sklearn.datasets import load_sample_images

    return tuple(
        np.asarray(image, np.float32).transpose(2, 0, 1) / 255 for image in load_sample_images().images
    )


def _backgrounds(count: int, random: np.random.Generator, test: bool) -> Array:
    """Random cuts of the photographs: their left half for training, their right half for testing."""
    found = np.empty((count, 3, PIXELS, PIXELS), np.float32)
    for i in range(count):
        photograph = _photographs()[random.integers(len(_photographs()))]
        _, height, width = photograph.shape
        first, last = (width // 2, width - PIXELS) if test else (0, width // 2 - PIXELS)
        y, x = random.integers(0, height - PIXELS + 1), random.integers(first, last + 1)
        found[i] = photograph[:, y : y + PIXELS, x : x + PIXELS]
    return found * random.uniform(0.6, 1.0, (count, 1, 1, 1)).astype(np.float32)
