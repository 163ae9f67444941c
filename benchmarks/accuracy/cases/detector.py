"""A detector without anchors, in the manner of CenterNet (Zhou et al., "Objects as Points", 2019).

The network ends in raw heads: peaks, suppression and boxes are made outside the graph that is quantized.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accuracy import average_precision, scans, training
from accuracy.case import CALIBRATION_ROWS, Array, Case, Data, Outputs, image_rows

_TRAIN_ROWS, _TEST_ROWS = 4000, 800
_STRIDE = 4
_CELLS = scans.PIXELS // _STRIDE
_DETECTIONS = 20
_SURE = 0.3
#: A peak begins as improbable as it is rare (Lin et al., "Focal Loss", 2017).
_PRIOR_LOGIT = -4.6


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    layers = (
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )
    return nn.Sequential(*layers)


class Detector(nn.Module):
    """A backbone to stride 16, a pyramid back to stride 4, three heads."""

    def __init__(self) -> None:
        super().__init__()
        self.quarter = nn.Sequential(_convolution(3, 16, 2), _convolution(16, 32, 2), _convolution(32, 32))
        self.eighth = nn.Sequential(_convolution(32, 64, 2), _convolution(64, 64))
        self.sixteenth = nn.Sequential(_convolution(64, 96, 2), _convolution(96, 96))
        self.lateral_eighth, self.lateral_quarter = nn.Conv2d(64, 48, 1), nn.Conv2d(32, 48, 1)
        self.top = nn.Conv2d(96, 48, 1)
        self.smooth = nn.Sequential(_convolution(48, 64), _convolution(64, 64))
        self.peaks, self.sizes, self.offsets = (nn.Conv2d(64, n, 1) for n in (scans.CLASSES, 2, 2))
        assert self.peaks.bias is not None
        nn.init.constant_(self.peaks.bias, _PRIOR_LOGIT)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures [batch, 3, 64, 64] to three maps.

        Logits of centres are [batch, 10, 16, 16], sizes and offsets [batch, 2, 16, 16], in cells.
        """
        quarter = self.quarter(image)
        eighth = self.eighth(quarter)
        sixteenth = self.sixteenth(eighth)
        merged = self.lateral_eighth(eighth) + F.interpolate(self.top(sixteenth), scale_factor=2.0)
        merged = self.lateral_quarter(quarter) + F.interpolate(merged, scale_factor=2.0)
        features = self.smooth(merged)
        return self.peaks(features), self.sizes(features), self.offsets(features)


def _loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Focal loss on the centres, L1 on sizes and offsets where a centre is."""
    images, heat, regression, centre = batch
    peaks, sizes, offsets = model(images)
    certain = F.logsigmoid(peaks) * (1 - peaks.sigmoid()) ** 2
    wrong = F.logsigmoid(-peaks) * peaks.sigmoid() ** 2 * (1 - heat) ** 4
    count = centre.sum().clamp(min=1)
    focal = -torch.where(heat == 1, certain, wrong).sum() / count
    distance = (torch.cat([sizes, offsets], 1) - regression).abs() * centre[:, None]
    return focal + distance.sum() / count


def targets(boxes: Array) -> tuple[Array, Array, Array]:
    """Heat with a bump at each centre, sizes and offsets in cells at the centres, and where centres are."""
    heat = np.zeros((len(boxes), scans.CLASSES, _CELLS, _CELLS), np.float32)
    regression = np.zeros((len(boxes), 4, _CELLS, _CELLS), np.float32)
    centre = np.zeros((len(boxes), _CELLS, _CELLS), np.float32)
    rows, columns = np.mgrid[:_CELLS, :_CELLS]
    for i, place in zip(*np.nonzero(boxes[:, :, 0] >= 0), strict=True):
        label, x0, y0, x1, y1 = boxes[i, place]
        width, height = (x1 - x0) / _STRIDE, (y1 - y0) / _STRIDE
        x, y = (x0 + x1) / (2 * _STRIDE), (y0 + y1) / (2 * _STRIDE)
        column, row = int(x), int(y)
        spread = max(width, height) / 6
        bump = np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / (2 * spread**2))
        heat[i, int(label)] = np.maximum(heat[i, int(label)], bump)
        regression[i, :, row, column] = (width, height, x - column, y - row)
        centre[i, row, column] = 1
    return heat, regression, centre


def detections(outputs: Outputs) -> Array:
    """The best boxes of each scene, sorted: float32 [scenes, 20, 6] of class, x0, y0, x1, y1, score."""
    peaks, sizes, offsets = (torch.from_numpy(np.ascontiguousarray(output)) for output in outputs)
    score = peaks.sigmoid()
    score = torch.where(score == F.max_pool2d(score, 3, 1, 1), score, 0)
    best, place = score.flatten(1).topk(_DETECTIONS)
    label, cell = place // _CELLS**2, place % _CELLS**2
    at = cell[:, None].expand(-1, 2, -1)
    size = sizes.flatten(2).gather(2, at).clamp(min=0.25)
    centre = torch.stack([cell % _CELLS, cell // _CELLS], 1) + offsets.flatten(2).gather(2, at)
    low, high = (centre - size / 2) * _STRIDE, (centre + size / 2) * _STRIDE
    found: Array = torch.cat([label[:, None], low, high, best[:, None]], 1).transpose(1, 2).numpy()
    return found


def _quality(outputs: Outputs, truth: Array) -> float:
    return average_precision.mean(detections(outputs), truth, (0.5,))


def _distance(reference: Outputs, found: Outputs) -> float:
    """One less the precision with which the float model's sure detections are found again, in thousandths."""
    expected = detections(reference)
    expected[expected[:, :, 5] < _SURE, 0] = -1
    return 1e3 * (1 - average_precision.mean(detections(found), expected[:, :, :5], average_precision.STRICT))


def _export(path: Path) -> None:
    data = scans.scenes(_TRAIN_ROWS, 1, test=False)
    arrays = (data.images, *targets(data.boxes))
    model = training.train(Detector, arrays, _loss, epochs=8, batch=32, learning_rate=4e-3)
    inputs = {"image": torch.zeros(2, 3, scans.PIXELS, scans.PIXELS)}
    training.export(model, inputs, ["peaks", "sizes", "offsets"], path)


def _data() -> Data:
    calibration = scans.scenes(CALIBRATION_ROWS, 1, test=False)
    test = scans.scenes(_TEST_ROWS, 1, test=True)
    return Data(image_rows(calibration.images), image_rows(test.images, batch=50), test.boxes)


CASE = Case(
    name="detector",
    summary="a detector without anchors, quantized at its raw heads, on scenes of digits over photographs",
    metric="map_50",
    quality=_quality,
    distance_name="lost_detections_permille",
    distance=_distance,
    transformer=False,
    export=_export,
    data=_data,
    sources=(Path(__file__), Path(scans.__file__)),
)
