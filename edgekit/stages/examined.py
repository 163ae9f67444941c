"""What pruning and the measurement of sensitivity both start from: the model's groups, and their slots'
worth.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from edgekit import pruning, surgery
from edgekit.profile import Profile
from edgekit.recipe import Prune
from edgekit.stages.registry import Inputs

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Examined:
    """A model that was looked at.

    Attributes:
        original: the source model, but for what is rewritten before pruning.
        module: what is pruned now: the original, or what earlier cuts made of it.
        structure: its groups.
        scores: of their slots.
        alignment: products stay multiples of so many channels wide.
        max_layer_ratio: no group loses more than this share of its slots now.
    """

    original: nn.Module
    module: nn.Module
    structure: pruning.Structure
    scores: pruning.Scores
    alignment: int
    max_layer_ratio: float

    def cut(self, widths: Mapping[str, int]) -> nn.Module:
        """A copy whose groups keep so many slots."""
        return pruning.cut(self.module, self.structure, widths, self.scores)

    def allowed(self, group: pruning.Group, steps: int) -> list[int]:
        """Widths that the device likes, down to the narrowest, about ``steps`` of them."""
        wanted = {
            pruning.keep(group, round(group.width * step / steps), self.max_layer_ratio, self.alignment)
            for step in range(steps + 1)
        }
        return sorted(wanted, reverse=True)


def examine(inputs: Inputs, settings: Prune, seed: int, profile: Profile) -> Examined:
    """Find the groups of the source model, or of what earlier cuts made of it, and score their slots.

    Raises:
        BadInput: the model cannot be pruned.
    """
    import torch

    from edgekit.pruning.rewriting import rewrite

    model = inputs.sources.model
    original = module = rewrite(model.module())
    if "model" in inputs.artifacts:
        module = surgery.load_into(model.module(), inputs.artifacts["model"].path)
    example = tuple(torch.from_numpy(array) for array in model.example(2).values())
    structure = pruning.examine(module, example)
    inputs.tick(1, 3)
    samples = _samples(inputs, settings.samples)
    scores = pruning.scores_of(module, structure, settings.importance, samples, seed)
    inputs.tick(2, 3)
    alignment = max(profile.alignment.values())
    return Examined(original, module, structure, scores, alignment, _max_ratio_of_a_cut(settings))


def _max_ratio_of_a_cut(settings: Prune) -> float:
    """The share that a group may lose in one cut, so that all together take no more than the settings say."""
    if settings.steps == 1:
        return settings.max_layer_ratio
    return float(1 - (1 - settings.max_layer_ratio) ** (1 / settings.steps))


def _samples(inputs: Inputs, most: int) -> Iterator[tuple[Tensor, ...]]:
    """Calibration samples, each a batch of its own."""
    import torch

    names = [spec.name for spec in inputs.sources.model.inputs]
    for batch in islice(inputs.sources.calib.batches(1), most):
        yield tuple(torch.from_numpy(batch.inputs[name]) for name in names)
