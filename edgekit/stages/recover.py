"""Recovery of a pruned model: BatchNorm statistics first, then distillation from the original.

Neither needs labels: the pruned model learns to answer as the original does, on the training data's inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from edgekit import surgery
from edgekit.errors import BadInput
from edgekit.modules import output_tensors
from edgekit.profile import Profile
from edgekit.recipe import Recover
from edgekit.stages.registry import Inputs

if TYPE_CHECKING:
    from torch import Tensor, nn


class Config(BaseModel):
    """Settings of this stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recover: Recover
    seed: int
    threads: int


def run(inputs: Inputs, config: Config, profile: Profile, out: Path) -> Mapping[str, Any]:
    """Recover the pruned model and write its structure and weights.

    Raises:
        BadInput: training diverged, or there are fewer than two samples.
    """
    import torch

    from host_trainer.batchnorm import recalibrate
    from host_trainer.errors import TrainingError
    from host_trainer.loop import TrainSettings, fit
    from host_trainer.losses import distillation

    torch.set_num_threads(config.threads)
    model = inputs.sources.model
    teacher = model.module()
    student = surgery.load_into(model.module(), inputs.artifacts["model"].path)
    settings = config.recover
    batches = _Batches(inputs, settings.batch_size, config.seed)

    def loss(module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        with torch.no_grad():
            target = output_tensors(teacher(*batch))
        return distillation(output_tensors(module(*batch)), target, settings.temperature)

    layers = recalibrate(student, batches.epoch(0), lambda module, batch: module(*batch))
    try:
        result = fit(
            student,
            batches.epoch,
            batches.per_epoch,
            loss,
            TrainSettings(epochs=settings.epochs, learning_rate=settings.learning_rate, seed=config.seed),
            lambda step, steps, _loss: inputs.tick(step, steps),
        )
    except TrainingError as error:
        raise BadInput(f"recovery failed: {error.what}", error.why, error.fix) from error
    recalibrate(student, batches.epoch(0), lambda module, batch: module(*batch))
    surgery.save(out, surgery.edits_between(model.module(), student), student)
    return {"steps": result.steps, "epoch_losses": list(result.epoch_losses), "batchnorm_layers": layers}


class _Batches:
    """The training data in batches, in another order each epoch.

    The samples are held in memory: they are the data of a recovery, not of a training run.
    """

    def __init__(self, inputs: Inputs, batch_size: int, seed: int) -> None:
        self._data = inputs.sources.train
        self._names = [spec.name for spec in inputs.sources.model.inputs]
        self._samples = list(self._data.samples())
        if len(self._samples) < 2:
            raise BadInput(
                "recovery has too few samples",
                "one sample has no statistics to learn from",
                "give more data for recovery with --train",
            )
        self._batch_size = min(batch_size, len(self._samples))
        self._seed = seed
        self.per_epoch = len(self._samples) // self._batch_size

    def epoch(self, number: int) -> Iterator[tuple[Tensor, ...]]:
        """Batches of one epoch; the last samples that fill no batch wait for another epoch's order."""
        import torch

        shuffled = self._data.shuffled(self._samples, (self._seed, number))
        for batch in islice(shuffled.batches(self._batch_size), self.per_epoch):
            yield tuple(torch.from_numpy(batch.inputs[name]) for name in self._names)
