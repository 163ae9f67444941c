"""Structured pruning to a share of the parameters, in widths that the device likes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from edgekit import pruning, surgery
from edgekit.modules import parameter_count
from edgekit.profile import Profile
from edgekit.recipe import Prune
from edgekit.stages.registry import Inputs

if TYPE_CHECKING:
    from torch import Tensor, nn


class Config(BaseModel):
    """Settings of this stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prune: Prune
    size: float
    seed: int


def run(inputs: Inputs, config: Config, profile: Profile, out: Path) -> Mapping[str, Any]:
    """Prune the model and write its structure and weights.

    Raises:
        BadInput: the model cannot be pruned.
    """
    import torch

    from edgekit.pruning.rewriting import rewrite

    model = inputs.sources.model
    original = rewrite(model.module())
    example = tuple(torch.from_numpy(array) for array in model.example(2).values())
    alignment = max(profile.alignment.values())
    structure = pruning.examine(original, example)
    inputs.tick(1, 3)
    samples = _samples(inputs, config.prune.samples)
    scores = pruning.scores_of(original, structure, config.prune.importance, samples, config.seed)
    inputs.tick(2, 3)
    widths, slot_fraction = pruning.globally(
        structure, scores, config.size, max_layer_ratio=config.prune.max_layer_ratio, alignment=alignment
    )
    pruned = pruning.cut(original, structure, widths, scores)
    surgery.save(out, surgery.edits_between(original, pruned), pruned)
    return {
        "params": parameter_count(pruned),
        "params_original": parameter_count(original),
        "channel_fraction": slot_fraction,
        "alignment": alignment,
        "widths": _widths(original, pruned),
        "groups": {group.name: [group.width, widths[group.name]] for group in structure.prunable},
        "kept_whole": {group.name: group.why for group in structure.groups if not group.prunable},
    }


def _samples(inputs: Inputs, most: int) -> Iterator[tuple[Tensor, ...]]:
    """Calibration samples, each a batch of its own."""
    import torch

    names = [spec.name for spec in inputs.sources.model.inputs]
    for batch in islice(inputs.sources.calib.batches(1), most):
        yield tuple(torch.from_numpy(batch.inputs[name]) for name in names)


def _widths(original: nn.Module, pruned: nn.Module) -> dict[str, list[int]]:
    """Layer -> [output channels before, after], for the layers that have them."""
    before = dict(original.named_modules())
    widths = {}
    for name, module in pruned.named_modules():
        for attribute in ("out_channels", "out_features"):
            if hasattr(module, attribute):
                widths[name] = [int(getattr(before[name], attribute)), int(getattr(module, attribute))]
    return widths
