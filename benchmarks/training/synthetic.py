"""Models and batches for measuring the trainer: nothing is downloaded, nothing is learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
CLASSES = 1000


@dataclass(frozen=True)
class Case:
    """A model and its data.

    Attributes:
        build: makes the model, with weights drawn anew.
        batch: makes a batch of so many samples on a device.
        per_process: samples of a step in each process.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[int, torch.device], Batch]
    per_process: int


def bert(layers: int = 12, width: int = 768) -> nn.Module:
    """BERT-base's shape with a classifier of two classes; dropout as it is trained."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=4 * width,
        num_attention_heads=width // 64,
    )  # fmt: skip
    config.num_labels = 2
    return BertForSequenceClassification(config)


def vit(layers: int = 12, width: int = 768) -> nn.Module:
    """ViT-B/16's shape with a thousand classes."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=4 * width,
        num_attention_heads=width // 64,
    )  # fmt: skip
    config.num_labels = CLASSES
    return ViTForImageClassification(config)


def resnet50() -> nn.Module:
    """ResNet-50's shape with a thousand classes."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig()
    config.num_labels = CLASSES
    return ResNetForImageClassification(config)


def texts(samples: int, device: torch.device, tokens: int = 256) -> Batch:
    """Token numbers without padding, and two classes."""
    return {
        "input_ids": torch.randint(0, 30000, (samples, tokens), device=device),
        "attention_mask": torch.ones(samples, tokens, dtype=torch.long, device=device),
        "labels": torch.randint(0, 2, (samples,), device=device),
    }


def images(samples: int, device: torch.device, size: int = 224) -> Batch:
    """Noise, and a thousand classes."""
    return {
        "pixel_values": torch.randn(samples, 3, size, size, device=device),
        "labels": torch.randint(0, CLASSES, (samples,), device=device),
    }


#: On a GPU.
CASES = {
    "bert-base": Case(bert, texts, 64),
    "vit-b16": Case(vit, images, 128),
    "resnet50": Case(resnet50, images, 128),
}
#: Small ones of the same kinds, to see on a CPU that a benchmark works.
QUICK_CASES = {
    "bert-base": Case(lambda: bert(2, 128), lambda n, device: texts(n, device, 32), 4),
    "vit-b16": Case(lambda: vit(2, 128), images, 2),
    "resnet50": Case(resnet50, images, 1),
}


def cases(quick: bool) -> dict[str, Case]:
    """The cases; the small ones where a benchmark is only tried."""
    return QUICK_CASES if quick else CASES
