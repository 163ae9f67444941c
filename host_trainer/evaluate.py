"""Judging a model on held-out data, by all processes together."""

from __future__ import annotations

import torch

from host_trainer.config import Config
from host_trainer.data import Samples, Share
from host_trainer.data.order import held_out_batches
from host_trainer.loop import LossFunction, Task, Watcher
from host_trainer.objective import Objective
from host_trainer.parallel import Parallel
from host_trainer.record import Journal


class Evaluator(Watcher):
    """Judges the model after every epoch."""

    def __init__(
        self,
        samples: Samples,
        loss: LossFunction,
        config: Config,
        part: Share,
        engine: Parallel,
        journal: Journal | None,
    ) -> None:
        """Judge on ``samples``; the process that has a journal writes the results down."""
        self._samples = samples
        self._loss = loss
        self._config = config
        self._part = part
        self._engine = engine
        self._journal = journal
        #: Of the last epoch: ``eval/loss`` and, for classes, ``eval/accuracy``.
        self.results: dict[str, float] = {}

    def begin(self, task: Task, step: int) -> None:
        """Know the model; judge it where the run ended right after an epoch, maybe before it was judged."""
        self._model = task.model
        epochs, rest = divmod(step, max(1, task.steps_per_epoch))
        if epochs and not rest and not self.results:
            self.epoch_end(epochs - 1, step)

    def epoch_end(self, epoch: int, step: int) -> None:
        """Mean loss over all samples and, for classes, the share that is right.

        The loss of a batch weighs as many samples as it has.
        """
        self._model.eval()
        sums = torch.zeros(4)  # loss, samples, right, samples of classes
        with torch.no_grad():
            for batch, count in held_out_batches(self._samples, self._config, self._part):
                loss, right = self._judge(self._engine.place(batch))
                if count:
                    hits = (0.0, 0) if right is None else (float(right.sum()), count)
                    sums += torch.tensor([float(loss) * count, count, *hits])
        self._model.train()
        loss_sum, samples, hits_sum, judged = (
            self._engine.gather(sums.to(self._engine.device)).sum(0).tolist()
        )
        self.results = {"eval/loss": loss_sum / samples}
        if judged:
            self.results["eval/accuracy"] = hits_sum / judged
        if self._journal is not None:
            self._journal.write(step, self.results)

    def _judge(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        if isinstance(self._loss, Objective):
            return self._loss.judge(self._model, batch)
        return self._loss(self._model, batch), None
