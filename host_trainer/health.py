"""Whether a run is healthy: the band of the gradient's norm, and what counts as an explosion."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections import deque
from collections.abc import Callable
from pathlib import Path

from host_trainer import diagnosis
from host_trainer.config import Monitor
from host_trainer.errors import Diverged
from host_trainer.loop import Step, Task, Watcher
from host_trainer.tensor_file import write_tensors

_WINDOW = 20
_BAND_WINDOW = 10


class Health(Watcher):
    """Alerts when the gradient leaves its band, and stops a run that explodes before the weights move."""

    def __init__(self, settings: Monitor, alert: Callable[[str], None], evidence: Path) -> None:
        """Watch a run.

        Args:
            settings: the bounds.
            alert: told about a gradient outside of its band.
            evidence: directory where the batch of an explosion is written.
        """
        self._settings = settings
        self._alert = alert
        self._evidence = evidence
        self._norms: deque[float] = deque(maxlen=_BAND_WINDOW)
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._outside = False
        #: Mean loss of the run's first steps; it goes into the checkpoints, for a run that goes on.
        self.first_loss: float | None = None

    def begin(self, task: Task, step: int) -> None:
        """Forget what was before."""
        self._task = task
        self._norms.clear()
        self._losses.clear()

    def judge(self, step: Step) -> None:
        """Raise Diverged, with the cause, where the step is an explosion."""
        problem = self._explosion(step)
        if problem is not None:
            raise self._diverged(step, problem)
        if step.skipped:
            return
        self._losses.append(step.loss)
        if self.first_loss is None and len(self._losses) == _WINDOW:
            self.first_loss = statistics.fmean(self._losses)
        self._check_band(step)

    def _explosion(self, step: Step) -> str | None:
        settings = self._settings
        if not math.isfinite(step.loss):
            return f"the loss became {step.loss}"
        if step.skipped:
            return None
        if not math.isfinite(step.grad_norm):
            return f"the gradient became {step.grad_norm}"
        if step.grad_norm > settings.stop_norm:
            return f"the gradient's norm {step.grad_norm:.4g} passed monitor.stop_norm {settings.stop_norm:g}"
        if self.first_loss is not None and self.first_loss > 0 and len(self._losses) == _WINDOW:
            recent, bound = statistics.fmean(self._losses), settings.stop_loss_ratio * self.first_loss
            if recent > bound:
                return f"the mean loss {recent:.4g} passed {bound:.4g}, a multiple of the first steps'"
        return None

    def _diverged(self, step: Step, problem: str) -> Diverged:
        cause = diagnosis.find(self._task, step)
        if cause.rank == self._task.engine.rank:
            _write_batch(step, cause.micro_batch, self._evidence)
        return Diverged(
            f"{problem} at step {step.number}",
            f"{cause}; that batch is in {self._evidence}",
            "repair the data"
            if cause.quantity == "input"
            else "lower optimize.learning_rate, or check the batch",
            data_at_fault=cause.quantity == "input",
        )

    def _check_band(self, step: Step) -> None:
        self._norms.append(step.grad_norm)
        low, high = self._settings.healthy_norm
        median = statistics.median(self._norms)
        outside = len(self._norms) == _BAND_WINDOW and not low <= median <= high
        if outside and not self._outside:
            side = "below" if median < low else "above"
            self._alert(
                f"step {step.number}: the gradient's norm {median:.3g} is {side} its healthy band, "
                f"{low:g} to {high:g}"
            )
        self._outside = outside


def _write_batch(step: Step, micro_batch: int, directory: Path) -> None:
    """Write the micro-batch for whoever looks into it; a full disk must not hide the explosion."""
    batch = step.micro_batches[micro_batch]
    if not isinstance(batch, dict):
        return
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in batch.items()}
    with contextlib.suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
        write_tensors(directory / f"step-{step.number:09d}.safetensors", tensors)
