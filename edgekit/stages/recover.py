"""Recovery of a pruned model: BatchNorm statistics first, then distillation from the original.

Neither needs labels: the pruned model learns to answer as the original does, on the training data's inputs,
with all of its weights or with low-rank updates of them. As a last resort it goes on learning with weights
and activations rounded to 8 bits.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from edgekit import surgery
from edgekit.data import Dataset
from edgekit.errors import BadInput
from edgekit.modules import output_tensors
from edgekit.profile import Profile
from edgekit.recipe import Recover
from edgekit.stages.registry import Inputs

if TYPE_CHECKING:
    from torch import Tensor, nn

    from host_trainer.distill import Student

#: With ``patience``, every so-manieth sample is kept aside to say when to stop.
_ASIDE_EVERY = 8
#: Training through rounding starts from a model that is nearly there.
_ROUNDED_LEARNING_RATE_FRACTION = 0.1


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
    from host_trainer.distill import ModuleTeacher, Student, Weights
    from host_trainer.errors import TrainingError

    torch.set_num_threads(config.threads)
    model, settings = inputs.sources.model, config.recover
    pruned = surgery.load_into(model.module(), inputs.artifacts["model"].path)
    train, aside = inputs.sources.train, None
    if settings.patience is not None:
        train, aside = train.split(_ASIDE_EVERY)
    batches = _Batches(train, inputs, settings.batch_size, config.seed)
    judges = [] if aside is None else list(_Batches(aside, inputs, settings.batch_size, config.seed).epoch(0))
    layers = recalibrate(pruned, batches.epoch(0), _call)
    try:
        teacher = ModuleTeacher(model.module(), _call, inside=settings.feature_weight > 0)
        weights = Weights(features=settings.feature_weight, temperature=settings.temperature)
        example = next(batches.epoch(0))
        student = Student(pruned, _call, teacher, weights, example, batches.mask)
        facts = _train(student, batches, judges, example, config, inputs.tick)
    except TrainingError as error:
        raise BadInput(f"recovery failed: {error.what}", error.why, error.fix) from error
    recalibrate(pruned, batches.epoch(0), _call)
    surgery.save(out, surgery.edits_between(model.module(), pruned), pruned)
    return {**facts, "batchnorm_layers": layers}


def _call(module: nn.Module, batch: tuple[Tensor, ...]) -> Any:
    return module(*batch)


def _train(
    student: Student,
    batches: _Batches,
    judges: list[Any],
    example: tuple[Tensor, ...],
    config: Config,
    tick: Any,
) -> dict[str, Any]:
    """Distil, then distil through rounding where that is asked; the example proves an adapter's merge."""
    from host_trainer.adapter import adapted
    from host_trainer.loop import TrainSettings, fit
    from host_trainer.rounding import rounded

    settings = config.recover

    def answer(module: nn.Module) -> Tensor:
        return output_tensors(_call(module, example))[0]

    losses: list[float] = []
    stopping = _Stopping(student, judges, settings, batches.per_epoch)
    phases = (
        (settings.epochs, settings.learning_rate, False),
        (
            settings.quantization_aware_epochs,
            settings.learning_rate * _ROUNDED_LEARNING_RATE_FRACTION,
            True,
        ),
    )
    total, done = sum(epochs for epochs, _, _ in phases) * batches.per_epoch, 0
    for epochs, learning_rate, is_rounded in phases:
        with ExitStack() as stack:
            if is_rounded and epochs:
                stack.enter_context(rounded(student.model))
            elif settings.adapter_rank is not None and epochs:
                stack.enter_context(adapted(student.model, settings.adapter_rank, config.seed, answer))

            def on_step(step: int, _steps: int, _loss: float, done: int = done) -> None:
                tick(done + step, total)
                stopping.after(step)

            stopping.begin()
            try:
                result = fit(
                    student,
                    batches.epoch,
                    batches.per_epoch,
                    lambda module, batch: module(batch),
                    TrainSettings(epochs=epochs, learning_rate=learning_rate, seed=config.seed),
                    on_step,
                )
                losses += result.epoch_losses
            except _Enough:
                student.eval()
            stopping.end()
        done += epochs * batches.per_epoch
    return {"steps": stopping.steps, "epoch_losses": losses, "stopped": stopping.why}


class _Enough(Exception):
    """Training stops early."""


class _Stopping:
    """Stops a phase of training when the time is used up, or nothing gets better, and keeps the best weights.

    Attributes:
        steps: taken so far, in all phases.
        why: the reason of the last early stop; None: there was none.
    """

    def __init__(self, student: Student, judges: list[Any], settings: Recover, steps_per_epoch: int) -> None:
        self.steps = 0
        self.why: str | None = None
        self._student, self._judges = student, judges
        self._patience = settings.patience
        self._steps_per_epoch = steps_per_epoch
        self._deadline = None if settings.budget_s is None else time.monotonic() + settings.budget_s

    def begin(self) -> None:
        """A phase begins; losses of another phase are not comparable."""
        self._best: tuple[float, dict[str, Any]] | None = None
        self._worse = 0

    def after(self, step: int) -> None:
        """A step was taken.

        Raises:
            _Enough: it was the last.
        """
        self.steps += 1
        if self._deadline is not None and time.monotonic() > self._deadline:
            self.why = "the time budget was used up"
            raise _Enough
        if self._patience is not None and step % self._steps_per_epoch == 0:
            self._judge(self._patience)

    def end(self) -> None:
        """The phase is over: the best weights count."""
        if self._best is not None:
            self._student.load_state_dict(self._best[1])

    def _judge(self, patience: int) -> None:
        import torch

        self._student.eval()
        with torch.no_grad():
            value = sum(float(self._student(batch)) for batch in self._judges)
        self._student.train()
        if self._best is None or value < self._best[0]:
            state = {name: tensor.clone() for name, tensor in self._student.state_dict().items()}
            self._best, self._worse = (value, state), 0
            return
        self._worse += 1
        if self._worse >= patience:
            self.why = f"{patience} epochs in turn were no better"
            raise _Enough


class _Batches:
    """The training data in batches, in another order each epoch.

    The samples are held in memory: they are the data of a recovery, not of a training run.
    """

    def __init__(self, data: Dataset, inputs: Inputs, batch_size: int, seed: int) -> None:
        self._data = data
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

    def mask(self, batch: tuple[Tensor, ...]) -> Tensor | None:
        """Which tokens of a batch are no padding, where the model is told."""
        from host_trainer.distill import mask_of_tokens

        return mask_of_tokens(dict(zip(self._names, batch, strict=True)))

    def epoch(self, number: int) -> Iterator[tuple[Tensor, ...]]:
        """Batches of one epoch; the last samples that fill no batch wait for another epoch's order."""
        import torch

        shuffled = self._data.shuffled(self._samples, (self._seed, number))
        for batch in islice(shuffled.batches(self._batch_size), self.per_epoch):
            yield tuple(torch.from_numpy(batch.inputs[name]) for name in self._names)
