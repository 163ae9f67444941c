"""A small residual network for scanned digits of 8 x 8 pixels: a real model that trains in seconds."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

PIXELS = 8
NARROW, WIDE = 64, 128
EPOCHS = 5
BATCH_SIZE = 64
SAMPLES = 1_000


class Block(nn.Module):
    """A basic residual block."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """[batch, inputs, height, width] to [batch, outputs, height / stride, width / stride]."""
        branch = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(branch)) + self.shortcut(x))


class TinyNet(nn.Module):
    """Stem, two residual blocks, mean over the image, head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, NARROW, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(NARROW)
        self.blocks = nn.Sequential(Block(NARROW, NARROW, 1), Block(NARROW, WIDE, 2))
        self.head = nn.Linear(WIDE, 10)

    def forward(self, image: Tensor) -> Tensor:
        """[batch, 1, 8, 8] to logits [batch, 10]."""
        x = F.relu(self.stem_norm(self.stem(image)))
        logits: Tensor = self.head(self.blocks(x).mean(dim=(2, 3)))
        return logits


def build() -> nn.Module:
    """The factory for ``edgekit compress tiny_net:build``."""
    return TinyNet()


def example_inputs() -> Tensor:
    """One blank image."""
    return torch.zeros(1, 1, PIXELS, PIXELS)


def digits() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Images float32 [samples, 1, 8, 8] and labels int64 [samples]."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    images = scans.images[:SAMPLES].astype(np.float32)[:, None] / 16 - 0.3
    return images, scans.target[:SAMPLES].astype(np.int64)


def train(images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> nn.Module:
    """Train from labels with the house's loop."""
    from host_trainer.loop import TrainSettings, fit

    torch.manual_seed(0)
    model = TinyNet()
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    steps = len(y) // BATCH_SIZE

    def batches(epoch: int) -> Any:
        order = torch.from_numpy(np.random.default_rng(epoch).permutation(len(y)))
        return ((x[part], y[part]) for part in order[: steps * BATCH_SIZE].split(BATCH_SIZE))

    def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1])

    fit(model, batches, steps, loss, TrainSettings(epochs=EPOCHS, learning_rate=4e-3))
    return model


def main() -> None:
    """Train, and write weights and data into the current directory."""
    from safetensors.torch import save_file

    images, labels = digits()
    train_on = slice(0, 700)
    held_out = slice(700, None)
    save_file(train(images[train_on], labels[train_on]).state_dict(), "tiny.safetensors")
    np.savez("calib.npz", image=images[train_on], labels=labels[train_on])
    np.savez("eval.npz", image=images[held_out], labels=labels[held_out])


if __name__ == "__main__":
    main()
