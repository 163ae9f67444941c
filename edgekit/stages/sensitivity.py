"""What each group of channels is worth: the loss on calibration data when it alone is narrower.

The loss is the distillation loss between the narrowed model's outputs and the original's, so labels are not
needed. Batch normalization uses the batch's own statistics meanwhile: what a moment of recalibration repairs
is no harm (Li et al., "EagleEye", ECCV 2020).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from edgekit.modules import forward, output_tensors
from edgekit.profile import Profile
from edgekit.recipe import Prune
from edgekit.stages.examined import examine
from edgekit.stages.registry import Inputs

if TYPE_CHECKING:
    from torch import nn

_SAMPLES = 48
#: Each group is measured at its width in so many equal steps.
_STEPS = 4
_TEMPERATURE = 2.0


class Config(BaseModel):
    """Settings of this stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prune: Prune
    seed: int
    threads: int


def run(inputs: Inputs, config: Config, profile: Profile, out: Path) -> Mapping[str, Any]:
    """Measure each group; the artifact is its metadata.

    Raises:
        BadInput: the model cannot be pruned.
    """
    import torch

    torch.set_num_threads(config.threads)
    examined = examine(inputs, config.prune, config.seed, profile)
    loss = _loss(examined.cut({}), inputs)
    groups: dict[str, Any] = {}
    for number, group in enumerate(examined.structure.prunable):
        inputs.tick(number, len(examined.structure.prunable))
        widths = [width for width in examined.allowed(group, _STEPS) if width < group.width]
        points = [[width, loss(examined.cut({group.name: width}))] for width in widths]
        groups[group.name] = {"width": group.width, "params": group.parameters, "points": points}
    return {"groups": groups}


def _loss(whole: nn.Module, inputs: Inputs) -> Callable[[nn.Module], float]:
    """The distillation loss of a model on some calibration samples, all in one batch.

    The whole model is changed: it normalizes as the narrowed ones do, so that its own loss is 0.
    """
    import torch

    from host_trainer.losses import distillation

    batch = next(iter(inputs.sources.calib.take(_SAMPLES).batches(_SAMPLES)))
    given = tuple(torch.from_numpy(batch.inputs[spec.name]) for spec in inputs.sources.model.inputs)
    _use_batch_statistics(whole)
    wanted = forward(whole, given)

    def loss(narrowed: nn.Module) -> float:
        _use_batch_statistics(narrowed)
        with torch.no_grad():
            return float(distillation(output_tensors(narrowed(*given)), wanted, _TEMPERATURE))

    return loss


def _use_batch_statistics(model: nn.Module) -> None:
    """Normalize by the batch, and leave the running statistics as they are."""
    from torch.nn.modules.batchnorm import _BatchNorm

    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.train()
            module.momentum = 0.0
