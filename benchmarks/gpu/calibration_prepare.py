"""Graphs, caches and samples for ``calibration_tensorrt.py``, made on the host, without a GPU.

    python benchmarks/gpu/calibration_prepare.py OUT [--digits WEIGHTS]

Writes for each model OUT/NAME.onnx (float), OUT/NAME.qdq.onnx (Q/DQ for TensorRT), OUT/NAME.cache (the
calibration cache)
and OUT/NAME.npz (calibration samples, test samples, and ONNX Runtime's float outputs for the latter).

ResNet-50 has random weights, with BatchNorm statistics from the samples; its
images are crops of scikit-learn's two photographs. The digit network is the demo's, trained.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from calibration import calibrate, prepare, quantize, write_cache
from edgekit.ort import Session

Array = np.ndarray[Any, Any]

OPSET = 17  # TensorRT 8.5's parser
CALIBRATION_IMAGES = 64
TEST_IMAGES = 32


def main() -> None:
    """Prepare both models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--digits", type=Path, help="the demo's digits.safetensors")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    images = _photograph_crops(CALIBRATION_IMAGES + TEST_IMAGES)
    _write(options.out, "resnet50", _resnet50(images), images)
    if options.digits is not None:
        _write(options.out, "digits", *_digits(options.digits))


def _write(out: Path, name: str, module: nn.Module, images: Array) -> None:
    path = out / f"{name}.onnx"
    torch.onnx.export(
        module, (torch.from_numpy(images[:2]),), str(path), input_names=["image"], output_names=["logits"],
        opset_version=OPSET, dynamo=False, dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
    )  # fmt: skip
    model = prepare(onnx.load(str(path)))
    onnx.save(model, str(path))
    samples, tests = (
        images[:CALIBRATION_IMAGES],
        images[CALIBRATION_IMAGES : CALIBRATION_IMAGES + TEST_IMAGES],
    )
    scales = calibrate(model, ({"image": image[None]} for image in samples), observer="entropy")
    (out / f"{name}.cache").write_text(write_cache(model, scales))
    onnx.save(quantize(model, scales, target="tensorrt").model, str(out / f"{name}.qdq.onnx"))
    reference = Session(path).run({"image": tests})["logits"]
    np.savez(out / f"{name}.npz", samples=samples, tests=tests, reference=reference)
    print(f"{name}: {path.stat().st_size / 2**20:.1f} MiB")


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(image).logits
        return logits


def _resnet50(images: Array) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig()
    config.num_labels = 1000
    model = ResNetForImageClassification(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    model.train()
    with torch.no_grad():
        for start in range(0, CALIBRATION_IMAGES, 16):
            model(torch.from_numpy(images[start : start + 16]))
    return _Logits(model.train(False))


def _photograph_crops(count: int) -> Array:
    """Random crops, float32 [count, 3, 224, 224], normalised."""
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images
    rng = np.random.default_rng(0)
    crops = []
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        top = rng.integers(photograph.shape[0] - 224)
        left = rng.integers(photograph.shape[1] - 224)
        crops.append(photograph[top : top + 224, left : left + 224].transpose(2, 0, 1))
    return ((np.stack(crops) / 255.0 - 0.45) / 0.225).astype(np.float32)


def _digits(weights: Path) -> tuple[nn.Module, Array]:
    from safetensors.torch import load_file

    from edgekit.demo import digits

    model = digits.build()
    model.load_state_dict(load_file(weights))
    train, held_out = digits.load(0)
    images = np.concatenate([train.images[:CALIBRATION_IMAGES], held_out.images[:TEST_IMAGES]])
    return model.eval(), images


if __name__ == "__main__":
    main()
