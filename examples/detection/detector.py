"""A one-stage detector without anchors, 1.1 million parameters: residual backbone, neck, two heads.

It returns the raw heads, one prediction for each cell of 8 x 8 pixels; ``postprocess.py`` makes boxes of
them. A cell predicts the distances from its centre to the four sides of the box that it lies in (Tian et al.,
"FCOS: Fully Convolutional One-Stage Object Detection", ICCV 2019).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.detection.scenes import CLASSES, PIXELS

STRIDE = 8
CELLS = PIXELS // STRIDE
_WIDTHS = (32, 64, 128)
_BLOCKS = (1, 2, 3)
_NECK = 64
_RARE = -4.6  # bias of the class logits: at the start every class has a probability of 0.01 everywhere


class Unit(nn.Sequential):
    """Convolution, BatchNorm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class Block(nn.Module):
    """A basic residual block (He et al., "Deep Residual Learning", CVPR 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = Unit(inputs, outputs, 3, stride)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, inputs, height, width] to [batch, outputs, height / stride, width / stride]."""
        return F.relu(self.norm(self.second(self.first(x))) + self.shortcut(x))


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    """Blocks of one width, the first with the stride."""
    rest = (Block(outputs, outputs, 1) for _ in range(blocks - 1))
    return nn.Sequential(Block(inputs, outputs, stride), *rest)


class Detector(nn.Module):
    """The backbone ends at strides 8 and 16; the neck joins both at stride 8."""

    def __init__(self) -> None:
        super().__init__()
        quarter, eighth, sixteenth = _WIDTHS
        self.stem = Unit(3, quarter, 7, 4)
        self.quarter = _stage(quarter, quarter, _BLOCKS[0], 1)
        self.eighth = _stage(quarter, eighth, _BLOCKS[1], 2)
        self.sixteenth = _stage(eighth, sixteenth, _BLOCKS[2], 2)
        self.up = nn.Upsample(scale_factor=2)
        self.join = nn.Sequential(Unit(eighth + sixteenth, _NECK, 1), Unit(_NECK, _NECK, 3))
        self.classify = nn.Sequential(Unit(_NECK, _NECK, 3), nn.Conv2d(_NECK, CLASSES, 1))
        self.locate = nn.Sequential(Unit(_NECK, _NECK, 3), nn.Conv2d(_NECK, 4, 1))
        nn.init.constant_(self.classify.get_parameter("1.bias"), _RARE)
        nn.init.ones_(self.locate.get_parameter("1.bias"))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Raw heads of images [batch, 3, PIXELS, PIXELS].

        Returns:
            ``logits`` [batch, CLASSES, CELLS, CELLS], and ``distances`` [batch, 4, CELLS, CELLS] from a
            cell's centre to the left, upper, right and lower side, in cells.
        """
        eighth = self.eighth(self.quarter(self.stem(image)))
        sixteenth = self.sixteenth(eighth)
        joined = self.join(torch.cat([eighth, self.up(sixteenth)], dim=1))
        return {"logits": self.classify(joined), "distances": self.locate(joined)}


def build() -> nn.Module:
    """The factory that ``edgekit compress`` is given."""
    return Detector()


def example_inputs() -> Tensor:
    """One blank image."""
    return torch.zeros(1, 3, PIXELS, PIXELS)
