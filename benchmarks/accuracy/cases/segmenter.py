"""A U-Net with concatenated skips (Ronneberger et al., 2015): which pixel belongs to which digit."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accuracy import judging, scans, training
from accuracy.case import CALIBRATION_ROWS, Case, Data, image_rows

_TRAIN_ROWS, _TEST_ROWS = 3000, 500
_CLASSES = scans.CLASSES + 1


def _convolutions(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
    )  # fmt: skip


class UNet(nn.Module):
    """Three levels; the first halves the picture, and the last is enlarged to it again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 5, 2, padding=2, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        )
        self.high = _convolutions(16, 24)
        self.middle = _convolutions(24, 48)
        self.low = _convolutions(48, 96)
        self.middle_up = _convolutions(96 + 48, 48)
        self.high_up = _convolutions(48 + 24, 32)
        self.head = nn.Conv2d(32, _CLASSES * 4, 1)

    def forward(self, image: Tensor) -> Tensor:
        """[batch, 3, 64, 64] to logits [batch, 11, 64, 64]."""
        high = self.high(self.stem(image))
        middle = self.middle(F.max_pool2d(high, 2))
        low = self.low(F.max_pool2d(middle, 2))
        middle = self.middle_up(torch.cat([_twice(low), middle], 1))
        high = self.high_up(torch.cat([_twice(middle), high], 1))
        return F.pixel_shuffle(self.head(high), 2)


def _twice(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, masks = batch
    return F.cross_entropy(model(images), masks)


def _export(path: Path) -> None:
    data = scans.scenes(_TRAIN_ROWS, 0, test=False)
    model = training.train(UNet, (data.images, data.masks), _loss, epochs=8, batch=32, learning_rate=4e-3)
    training.export(model, {"image": torch.zeros(2, 3, scans.PIXELS, scans.PIXELS)}, ["logits"], path)


def _data() -> Data:
    calibration = scans.scenes(CALIBRATION_ROWS, 0, test=False)
    test = scans.scenes(_TEST_ROWS, 0, test=True)
    return Data(image_rows(calibration.images), image_rows(test.images, batch=20), test.masks)


CASE = Case(
    name="segmenter",
    summary="a U-Net with concatenated skips, on scenes of digits over photographs",
    metric="mean_iou",
    quality=judging.mean_iou,
    distance_name="divergence_millibits",
    distance=judging.divergence(axis=1),
    transformer=False,
    export=_export,
    data=_data,
    sources=(Path(__file__), Path(scans.__file__)),
)
