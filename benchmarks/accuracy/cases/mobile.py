"""A depthwise-separable network in the manner of MobileNetV3, known to be hard for INT8.

Inverted residuals with squeeze-and-excitation, hard-swish, ReLU6 and linear bottlenecks (Howard et al.,
"Searching for MobileNetV3", 2019); 10 classes of digits on photographs, no two channels of like range.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accuracy import judging, scans, training
from accuracy.case import CALIBRATION_ROWS, Case, Data, image_rows

_TRAIN_ROWS, _TEST_ROWS = 6000, 4000
#: Channels, expansion, stride, kernel, squeeze-and-excitation, hard-swish (else ReLU6).
_BLOCKS = (
    (16, 2, 1, 3, True, False),
    (24, 4, 2, 3, False, False),
    (24, 4, 1, 3, False, False),
    (40, 4, 2, 5, True, True),
    (40, 4, 1, 5, True, True),
    (56, 4, 1, 3, True, True),
    (80, 4, 2, 5, True, True),
)


class _SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, max(8, channels // 4), 1)
        self.up = nn.Conv2d(max(8, channels // 4), channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.up(F.relu(self.down(x.mean(dim=(2, 3), keepdim=True))))
        return x * F.hardsigmoid(gate)


class _InvertedResidual(nn.Module):
    def __init__(
        self, inputs: int, outputs: int, expansion: int, stride: int, kernel: int, squeeze: bool, swish: bool
    ) -> None:
        super().__init__()
        wide = inputs * expansion
        activation = nn.Hardswish if swish else nn.ReLU6
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide), activation(),
            nn.Conv2d(wide, wide, kernel, stride, padding=kernel // 2, groups=wide, bias=False),
            nn.BatchNorm2d(wide), activation(),
            _SqueezeExcite(wide) if squeeze else nn.Identity(),
            nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers(x)
        return x + result if self.residual else result


class MobileNet(nn.Module):
    """Stem, seven inverted residuals, a wide last layer, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(3, 16, 3, 1, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.Hardswish(),
        ]
        channels = 16
        for outputs, expansion, stride, kernel, squeeze, swish in _BLOCKS:
            layers.append(_InvertedResidual(channels, outputs, expansion, stride, kernel, squeeze, swish))
            channels = outputs
        layers += [nn.Conv2d(channels, 320, 1, bias=False), nn.BatchNorm2d(320), nn.Hardswish()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(320, scans.CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        """[batch, 3, 28, 28] to logits [batch, 10]."""
        logits: Tensor = self.head(self.features(image).mean(dim=(2, 3)))
        return logits


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def _export(path: Path) -> None:
    arrays = scans.crops(_TRAIN_ROWS, 0, test=False)
    model = training.train(MobileNet, arrays, _loss, epochs=5, batch=64, learning_rate=4e-3)
    training.export(model, {"image": torch.zeros(2, *arrays[0].shape[1:])}, ["logits"], path)


def _data() -> Data:
    calibration, _ = scans.crops(CALIBRATION_ROWS, 0, test=False)
    images, labels = scans.crops(_TEST_ROWS, 0, test=True)
    return Data(image_rows(calibration), image_rows(images, batch=100), labels)


CASE = Case(
    name="mobile",
    summary="depthwise-separable, squeeze-and-excitation, hard-swish and ReLU6, on digits over photographs",
    metric="accuracy",
    quality=judging.accuracy,
    distance_name="divergence_millibits",
    distance=judging.divergence(axis=1),
    transformer=False,
    export=_export,
    data=_data,
    sources=(Path(__file__), Path(scans.__file__)),
)
