"""Train the detector on scenes that ``scenes.py`` wrote.

    python -m examples.detection.train SCENES WEIGHTS.safetensors [--seed 0]

Some minutes on two cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from edgekit.data import load_data
from edgekit.preprocess import from_mapping
from edgekit.recipe import load_recipe
from examples.detection.detector import CELLS, STRIDE, Detector
from host_trainer.loop import TrainSettings, fit

RECIPE = Path(__file__).with_name("recipe.toml")
EPOCHS = 10
BATCH_SIZE = 32
LEARNING_RATE = 3e-3
#: A cell answers for a box if its centre is inside and at most this many cells from the box's centre.
_RADIUS = 1.5
_BOX_WEIGHT = 2.0

Batch = tuple[Tensor, Tensor]


def load(path: Path, seed: int) -> Batch:
    """Images float32 [scenes, 3, PIXELS, PIXELS] and boxes [scenes, most, 5]; class -1 fills up."""
    preprocess = from_mapping(load_recipe(RECIPE, {}).preprocessing, RECIPE.parent)
    samples = list(load_data(path, preprocess, None, seed).samples())
    images = np.stack([next(iter(sample.inputs.values())) for sample in samples])
    boxes = np.stack([np.asarray(sample.label, np.float32) for sample in samples])
    return torch.from_numpy(images), torch.from_numpy(boxes)


def train(data: Batch, seed: int, on_step: Callable[[int, int, float], None]) -> nn.Module:
    """Train with the house's loop; the same seed gives the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Detector()
    settings = TrainSettings(epochs=EPOCHS, learning_rate=LEARNING_RATE, seed=seed)
    fit(model, _batches(data, seed), len(data[0]) // BATCH_SIZE, detection_loss, settings, on_step)
    return model


def _batches(data: Batch, seed: int) -> Callable[[int], Iterator[Batch]]:
    images, boxes = data

    def epoch(number: int) -> Iterator[Batch]:
        order = torch.from_numpy(np.random.default_rng((seed, number)).permutation(len(images)))
        for chosen in torch.split(order[: len(order) // BATCH_SIZE * BATCH_SIZE], BATCH_SIZE):
            yield images[chosen], boxes[chosen]

    return epoch


def detection_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Quality focal loss for the classes and generalized IoU for the boxes, over the number of boxes' cells.

    A class is to be as probable as its box is good, so that boxes are ranked by how well they fit (Li et al.,
    "Generalized Focal Loss", NeurIPS 2020; Rezatofighi et al., "Generalized IoU", CVPR 2019).
    """
    images, boxes = batch
    heads = model(images)
    logits = heads["logits"].flatten(2)  # [batch, classes, cells]
    corners = _corners(heads["distances"].flatten(2))
    cell_box, cell_class = _assigned(boxes)
    positive = cell_class >= 0
    count = positive.sum().clamp_min(1)
    iou, generalized = _overlap(corners[positive], cell_box[positive])
    quality = torch.zeros_like(logits)
    image, cell = positive.nonzero(as_tuple=True)
    quality[image, cell_class[positive], cell] = iou.detach()
    miss = (quality - logits.sigmoid()).abs().square()
    classes = (miss * F.binary_cross_entropy_with_logits(logits, quality, reduction="none")).sum() / count
    loss: Tensor = classes + _BOX_WEIGHT * (1 - generalized).sum() / count
    return loss


def _centres() -> Tensor:
    """Centres of the cells in pixels, [cells, 2] as x, y."""
    along = (torch.arange(CELLS) + 0.5) * STRIDE
    y, x = torch.meshgrid(along, along, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=1)


def _corners(distances: Tensor) -> Tensor:
    """[batch, 4, cells] in cells to boxes [batch, cells, 4] in pixels."""
    reach = distances.transpose(1, 2).clamp_min(0.05) * STRIDE
    centres = _centres()
    return torch.cat([centres - reach[..., :2], centres + reach[..., 2:]], dim=2)


def _assigned(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """The box and the class that each cell answers for, [batch, cells, 4] and [batch, cells]; -1: none.

    Boxes do not overlap in these scenes; where cells could answer for two, the later one has them.
    """
    centres = _centres()
    cell_box = torch.zeros(len(boxes), len(centres), 4)
    cell_class = torch.full((len(boxes), len(centres)), -1, dtype=torch.long)
    for box in boxes.unbind(1):
        x1, y1, x2, y2, label = (value[:, None] for value in box.unbind(1))
        x, y = centres.unbind(1)
        inside = (x > x1) & (x < x2) & (y > y1) & (y < y2)
        near = torch.maximum((x - (x1 + x2) / 2).abs(), (y - (y1 + y2) / 2).abs()) <= _RADIUS * STRIDE
        mine = inside & near & (label >= 0)
        cell_box = torch.where(mine[..., None], box[:, None, :4], cell_box)
        cell_class = torch.where(mine, label.long(), cell_class)
    return cell_box, cell_class


def _overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalized IoU of boxes [n, 4], pair by pair."""
    inner = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp_min(0).prod(1)
    outer = (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).prod(1)
    union = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - inner
    iou = inner / union
    return iou, iou - (outer - union) / outer


def main() -> None:
    """Read the options, train, and write the weights."""
    parser = argparse.ArgumentParser(description="Train the detector.")
    parser.add_argument("scenes", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    def on_step(step: int, steps: int, loss: float) -> None:
        if step % (steps // EPOCHS) == 0:
            print(f"epoch {step * EPOCHS // steps} of {EPOCHS}: loss {loss:.3f}", flush=True)

    model = train(load(options.scenes / "train.jsonl", options.seed), options.seed, on_step)
    save_file(model.state_dict(), str(options.weights))
    print(options.weights)


if __name__ == "__main__":
    main()
