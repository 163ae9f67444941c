"""A residual network for scanned digits (scikit-learn's ``load_digits``: 1,797 scans from 43 people).

The scans of 8 x 8 pixels are scaled up to 20 x 20, so that the network has the size of a real edge
classifier: 11 million parameters, some milliseconds on two cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from host_trainer.loop import StepHook, TrainSettings, fit

Array = np.ndarray[Any, Any]

PIXELS = 20
WIDTHS = (64, 128, 256, 512)
BLOCKS_PER_WIDTH = 2
CLASSES = 10
EPOCHS = 7
BATCH_SIZE = 64
_MEAN, _STD = 0.31, 0.38
_LABEL_SMOOTHING = 0.05
_TRAIN_FRACTION = 0.6


class Block(nn.Module):
    """A basic residual block (He et al., "Deep Residual Learning", 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, inputs, height, width] to [batch, outputs, height / stride, width / stride]."""
        branch = F.relu(self.first_norm(self.first(x)))
        branch = self.second_norm(self.second(branch))
        return F.relu(branch + self.shortcut(x))


class DigitNet(nn.Module):
    """Stem, four pairs of blocks, mean over the image, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, WIDTHS[0], 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(WIDTHS[0])
        blocks = []
        channels = WIDTHS[0]
        for stage, width in enumerate(WIDTHS):
            for position in range(BLOCKS_PER_WIDTH):
                blocks.append(Block(channels, width, stride=2 if stage and not position else 1))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        """[batch, 1, 20, 20] to logits [batch, 10]."""
        x = F.relu(self.stem_norm(self.stem(image)))
        logits: Tensor = self.head(self.blocks(x).mean(dim=(2, 3)))
        return logits


def build() -> nn.Module:
    """The factory that ``edgekit compress`` is given."""
    return DigitNet()


def example_inputs() -> Tensor:
    """One blank image."""
    return torch.zeros(1, 1, PIXELS, PIXELS)


@dataclass(frozen=True)
class Split:
    """Images float32 [samples, 1, 20, 20], normalised, and their labels int64 [samples]."""

    images: Array
    labels: Array

    def save(self, path: Path) -> None:
        """Write the ``.npz`` that ``edgekit compress`` reads."""
        np.savez(path, image=self.images, labels=self.labels)


def load(seed: int) -> tuple[Split, Split]:
    """Training and held-out scans, drawn anew for each seed; the held-out part is never trained on."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    small = torch.from_numpy(scans.images.astype(np.float32) / 16)[:, None]
    large = F.interpolate(small, size=(PIXELS, PIXELS), mode="bilinear", align_corners=False)
    images = ((large - _MEAN) / _STD).numpy()
    order = np.random.default_rng(seed).permutation(len(images))
    cut = int(len(images) * _TRAIN_FRACTION)
    parts = (order[:cut], order[cut:])
    train, held_out = (Split(images[part], scans.target[part].astype(np.int64)) for part in parts)
    return train, held_out


def train(data: Split, seed: int, on_step: StepHook) -> nn.Module:
    """Train a network on labelled scans with the house's training loop."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = DigitNet()
    settings = TrainSettings(epochs=EPOCHS, learning_rate=4e-3, seed=seed)
    steps = len(data.labels) // BATCH_SIZE
    fit(model, _batches(data, seed), steps, _cross_entropy, settings, on_step)
    return model


def _batches(data: Split, seed: int) -> Callable[[int], Iterator[tuple[Tensor, Tensor]]]:
    images, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)

    def epoch(number: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.from_numpy(np.random.default_rng((seed, number)).permutation(len(labels)))
        for start in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE):
            chosen = order[start : start + BATCH_SIZE]
            yield images[chosen], labels[chosen]

    return epoch


def _cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels, label_smoothing=_LABEL_SMOOTHING)
